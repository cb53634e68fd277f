//! The `waypost` command, run to its end by nobody at a terminal.

use std::{ffi::OsStr, path::Path, process::Stdio};

use tokio::process::{Child, Command};

use crate::binary;

/// How a command ended, and what it wrote.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: Vec<u8>,
    /// What it said beside that.
    pub said: String,
}

impl Ran {
    /// The one JSON object that it has printed.
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{}", self.said);
        serde_json::from_slice(&self.out).unwrap()
    }
}

/// Runs it on a data folder.
pub async fn waypost<W: AsRef<OsStr>>(data_dir: &Path, command: &[&str], options: &[W]) -> Ran {
    ended(begin(data_dir, command, options)).await
}

/// Starts it. What it writes is read when somebody waits for its end.
pub fn begin<W: AsRef<OsStr>>(data_dir: &Path, command: &[&str], options: &[W]) -> Child {
    Command::new(binary("waypost"))
        .args(command)
        .arg("--data")
        .arg(data_dir)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Reads what it writes, and waits for its end.
pub async fn ended(child: Child) -> Ran {
    let output = crate::within_minutes(child.wait_with_output()).await;
    let output = output.unwrap();
    Ran {
        code: output.status.code(),
        out: output.stdout,
        said: String::from_utf8(output.stderr).unwrap(),
    }
}
