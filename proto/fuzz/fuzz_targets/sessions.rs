//! Any operations on sessions of one device.
#![no_main]

#[path = "../src/sessions.rs"]
mod sessions;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    sessions::run(data);
});
