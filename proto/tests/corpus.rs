//! The corpus of the fuzz targets, replayed without a fuzzer: what it once found to reach new code holds
//! still. The fuzzer itself runs by `.ci/fuzz`.

#[path = "../fuzz/src/batches.rs"]
mod batches;
#[path = "../fuzz/src/frames.rs"]
mod frames;
#[path = "../fuzz/src/sessions.rs"]
mod sessions;

use std::{fs, path::Path};

/// Runs a target on its corpus, and gives the sum of what it got through.
fn replayed(target: &str, run: fn(&[u8]) -> usize) -> usize {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let entries = fs::read_dir(&folder).expect("each target has a corpus");
    let mut reached = 0;
    for entry in entries {
        let path = entry.expect("the folder can be read").path();
        let bytes = fs::read(&path).expect("a file can be read");
        // The name is what one needs to run it alone.
        let result = std::panic::catch_unwind(|| run(&bytes));
        reached += result.unwrap_or_else(|_| panic!("{} fails", path.display()));
    }
    reached
}

#[test]
fn frames_of_the_corpus_are_read_the_same_however_they_are_split() {
    assert!(100 < replayed("frames", frames::run));
}

#[test]
fn pings_of_the_corpus_are_valid_and_come_back_as_they_were() {
    assert!(100 < replayed("batches", batches::run));
}

#[test]
fn sessions_of_the_corpus_store_once_and_their_counts_add_up() {
    assert!(100 < replayed("sessions", sessions::run));
}
