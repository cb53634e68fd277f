//! A disk that fails when it is told to: orders for `preload/failing_disk.c`, in one gateway's process.
//!
//! Knows the form of an order and of what was done. Must not know what a test makes of it.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use tempfile::TempDir;

use crate::preload;

/// What to do to which calls. In words: `fail the 3rd sync of a file whose path holds ".log"`.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    pub call: Call,
    pub text: &'static str,
    /// The first call that is hit, from 1, counted from the moment the order is given.
    pub nth: u32,
    /// How many are hit from there on; 0: all.
    pub times: u32,
    pub form: Form,
    pub error: DiskError,
}

#[derive(Clone, Copy, Debug)]
pub enum Call {
    Sync,
    Write,
    Read,
    /// Opening for writing, renaming, making folders, deleting.
    Change,
    /// Any of these but reading.
    All,
}

#[derive(Clone, Copy, Debug)]
pub enum Form {
    /// It does nothing and fails.
    Fail,
    /// A write writes half of what it should, and the next one fails.
    Torn,
    /// It does nothing and says that it did.
    Lie,
    /// It waits until the order is withdrawn.
    Hang,
}

#[derive(Clone, Copy, Debug)]
pub enum DiskError {
    Io,
    NoSpace,
    ReadOnly,
}

impl Order {
    /// The next such call fails, and only that.
    pub fn next(call: Call, text: &'static str, error: DiskError) -> Self {
        Self {
            call,
            text,
            nth: 1,
            times: 1,
            form: Form::Fail,
            error,
        }
    }
}

impl DiskError {
    /// The same on every Linux.
    fn number(self) -> i32 {
        match self {
            Self::Io => 5,
            Self::NoSpace => 28,
            Self::ReadOnly => 30,
        }
    }

    /// As the system says it, and the gateway with it.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Io => "Input/output error",
            Self::NoSpace => "No space left on device",
            Self::ReadOnly => "Read-only file system",
        }
    }
}

/// A call that was hit.
#[derive(Clone, Debug)]
pub struct Done {
    pub is_sync: bool,
    /// How much of the file was synced before.
    pub synced_bytes: u64,
    pub path: PathBuf,
}

/// The library and the place of its orders.
#[derive(Debug)]
pub struct FailingDisk {
    dir: TempDir,
}

impl FailingDisk {
    /// `None`, with a message, where there is no C compiler.
    pub fn build() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        preload::compile("failing_disk.c", &library(&dir)).then_some(Self { dir })
    }

    /// What a process needs to be under its orders.
    pub fn environment(&self) -> [(String, String); 2] {
        let text = |path: PathBuf| path.into_os_string().into_string().unwrap();
        [
            ("LD_PRELOAD".to_owned(), text(library(&self.dir))),
            ("FAILING_DISK_ORDER".to_owned(), text(self.order_file())),
        ]
    }

    /// From now on.
    pub fn order(&self, order: Order) {
        let Order {
            call,
            text,
            nth,
            times,
            form,
            error,
        } = order;
        let (call, form) = (
            match call {
                Call::Sync => "sync",
                Call::Write => "write",
                Call::Read => "read",
                Call::Change => "change",
                Call::All => "all",
            },
            match form {
                Form::Fail => "fail",
                Form::Torn => "torn",
                Form::Lie => "lie",
                Form::Hang => "hang",
            },
        );
        let number = error.number();
        // In one step, so that no half of an order is read.
        let new = self.dir.path().join("new");
        fs::write(&new, format!("{call} {text} {nth} {times} {form} {number}")).unwrap();
        fs::rename(&new, self.order_file()).unwrap();
    }

    /// The disk is well again.
    pub fn heal(&self) {
        fs::remove_file(self.order_file()).unwrap();
    }

    /// What was hit so far, in order.
    pub fn done(&self) -> Vec<Done> {
        let lines = fs::read_to_string(self.dir.path().join("order.done")).unwrap_or_default();
        let done = |line: &str| {
            let mut words = line.splitn(3, ' ');
            Done {
                is_sync: words.next().unwrap() == "sync",
                synced_bytes: words.next().unwrap().parse().unwrap(),
                path: words.next().unwrap().into(),
            }
        };
        lines.lines().map(done).collect()
    }

    /// Takes away what was not synced of the files whose sync was hit: after a failed sync the kernel need
    /// not keep it, and says that the next one succeeded.
    pub fn lose_unsynced(&self) -> u64 {
        let mut lost_bytes = 0;
        let mut cut = Vec::new();
        for done in self.done() {
            if !done.is_sync || cut.contains(&done.path) {
                continue;
            }
            // It may be gone: flushed and deleted after a fault that did no harm.
            let Ok(file) = File::options().write(true).open(&done.path) else {
                continue;
            };
            let length = file.metadata().unwrap().len();
            file.set_len(done.synced_bytes.min(length)).unwrap();
            lost_bytes += length.saturating_sub(done.synced_bytes);
            cut.push(done.path);
        }
        lost_bytes
    }

    /// What was hit so far is no longer of interest.
    pub fn forget(&self) {
        drop(fs::remove_file(self.dir.path().join("order.done")));
    }

    fn order_file(&self) -> PathBuf {
        self.dir.path().join("order")
    }
}

fn library(dir: &TempDir) -> PathBuf {
    dir.path().join("failing_disk.so")
}
