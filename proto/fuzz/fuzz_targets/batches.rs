//! Any message through the column decoder and back.
#![no_main]

#[path = "../src/batches.rs"]
mod batches;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    batches::run(data);
});
