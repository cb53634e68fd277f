//! Any bytes, in any pieces, through the frame reader.
#![no_main]

#[path = "../src/frames.rs"]
mod frames;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    frames::run(data);
});
