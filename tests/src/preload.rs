//! Libraries that are loaded before libc, to see or to spoil what a gateway asks of its disk.
//!
//! Knows the C compiler. Must not know what a library does.

use std::{path::Path, process::Command};

/// Compiles a library of `tests/preload`. False, with a message, where there is no C compiler.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn compile(source: &str, library: &Path) -> bool {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("preload")
        .join(source);
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o"])
        .arg(library)
        .arg(source)
        .arg("-ldl") // for a libc that has it apart
        .output();
    match compiled {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            true
        }
        Err(error) => {
            eprintln!("skipped: there is no C compiler `cc`: {error}");
            false
        }
    }
}
