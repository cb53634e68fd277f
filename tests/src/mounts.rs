//! File systems of a test's own: a small one that fills up, and one that can be frozen. Root only.
//!
//! Each belongs to a shell that waits for the end of its input, and then thaws and unmounts. So it goes
//! when it is dropped, when the test panics, and also when the test process is killed.

use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

/// A mounted file system.
#[derive(Debug)]
pub struct Mount {
    dir: TempDir,
    keeper: Child,
}

/// It hangs until this is dropped.
#[derive(Debug)]
pub struct Frozen<'a>(&'a Mount);

impl Mount {
    /// A file system in memory that holds so much and no more. `None`, with a message, where it cannot
    /// be mounted.
    pub fn small(mib: u32) -> Option<Self> {
        Self::keep(&format!(
            "mount -t tmpfs -o size={mib}m,mode=700 waypost-test \"$DIR\""
        ))
    }

    /// A file system that [`Self::freeze`] works on. `None`, with a message, where it cannot be mounted.
    pub fn freezable() -> Option<Self> {
        Self::keep(
            "truncate -s 512M \"$DIR.image\" && mkfs.ext4 -q -m 0 \"$DIR.image\" && \
             mount -o loop \"$DIR.image\" \"$DIR\" && rm \"$DIR.image\"",
        )
    }

    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    fn keep(mount: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("mount");
        std::fs::create_dir(&folder).unwrap();
        let mounted = Command::new("sh")
            .args(["-c", mount])
            .env("DIR", &folder)
            .output()
            .unwrap();
        if !mounted.status.success() {
            let why = String::from_utf8_lossy(&mounted.stderr);
            eprintln!("skipped: no file system can be mounted here, which takes root: {why}");
            return None;
        }
        let keeper = Command::new("sh")
            .args([
                "-c",
                "cat > /dev/null; fsfreeze -u \"$DIR\" 2> /dev/null; umount \"$DIR\" || umount -l \"$DIR\"",
            ])
            .env("DIR", &folder)
            .stdin(Stdio::piped())
            .process_group(0) // Ctrl-C is for the test
            .spawn()
            .unwrap();
        Some(Self { dir, keeper })
    }

    pub fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("mount")
    }

    /// Every write to it hangs.
    pub fn freeze(&self) -> Frozen<'_> {
        fsfreeze("-f", &self.path());
        Frozen(self)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        fsfreeze("-u", &self.0.path());
    }
}

fn fsfreeze(what: &str, path: &Path) {
    let done = Command::new("fsfreeze").arg(what).arg(path).status();
    // In a panic already there is the shell to do it.
    assert!(
        std::thread::panicking() || done.is_ok_and(|done| done.success()),
        "fsfreeze {what} {}",
        path.display()
    );
}
