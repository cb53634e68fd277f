//! How much room the store's file system has left, and whether that is too little for new pings.
//!
//! Knows one folder and one floor. Must not know RocksDB, or what is done when there is too little.

use std::{
    io,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

/// The room that a store has, when it was last looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes that are free to this process.
    pub free_bytes: u64,
    /// The least that must be free.
    pub floor_bytes: u64,
    /// Whether new pings are to wait: there is less than the floor, or was and there is not yet enough
    /// more.
    pub is_short: bool,
}

impl Space {
    /// How much must be free before new pings are taken again.
    #[must_use]
    pub fn enough_bytes(&self) -> u64 {
        enough_bytes(self.floor_bytes)
    }
}

/// Looks at the file system, and remembers what it saw for those who must not wait for a disk.
#[derive(Debug)]
pub(super) struct Room {
    floor_bytes: u64,
    free_bytes: AtomicU64,
    is_short: AtomicBool,
}

/// What must be free beyond the floor, as a share of it, before new pings are taken again: an eighth, so
/// that pings are not taken and put off in turns while the log is written and deleted around the floor.
const MARGIN: u64 = 8;

impl Room {
    pub(super) fn new(floor_bytes: u64) -> Self {
        Self {
            floor_bytes,
            free_bytes: AtomicU64::new(0),
            is_short: AtomicBool::new(false),
        }
    }

    /// Asks the system. A disk that hangs may hang this too.
    pub(super) fn look(&self, folder: &Path) -> io::Result<()> {
        let found = rustix::fs::statvfs(folder)?;
        // Some file systems have no size of their own and say 0 to everything.
        let free_bytes = if found.f_blocks == 0 {
            u64::MAX
        } else {
            found.f_bavail.saturating_mul(found.f_frsize)
        };
        self.free_bytes.store(free_bytes, Ordering::Relaxed);
        let was_short = self.is_short();
        self.is_short.store(
            is_short(was_short, free_bytes, self.floor_bytes),
            Ordering::Relaxed,
        );
        Ok(())
    }

    pub(super) fn is_short(&self) -> bool {
        self.is_short.load(Ordering::Relaxed)
    }

    pub(super) fn seen(&self) -> Space {
        Space {
            free_bytes: self.free_bytes.load(Ordering::Relaxed),
            floor_bytes: self.floor_bytes,
            is_short: self.is_short(),
        }
    }
}

fn is_short(was_short: bool, free_bytes: u64, floor_bytes: u64) -> bool {
    let needed_bytes = if was_short {
        enough_bytes(floor_bytes)
    } else {
        floor_bytes
    };
    free_bytes < needed_bytes
}

fn enough_bytes(floor_bytes: u64) -> u64 {
    floor_bytes.saturating_add(floor_bytes / MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_wait_below_the_floor_until_there_is_an_eighth_more_than_it() {
        let mut was_short = false;
        let mut course = Vec::new();
        for free_bytes in [900, 800, 799, 800, 899, 900, 899, 800, 799] {
            was_short = is_short(was_short, free_bytes, 800);
            course.push(was_short);
        }
        assert_eq!(
            course,
            [false, false, true, true, true, false, false, false, true]
        );
    }

    #[test]
    fn without_a_floor_nothing_waits() {
        assert!(!is_short(false, 0, 0));
        assert!(!is_short(true, 0, 0));
    }

    #[test]
    fn the_system_says_what_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let room = Room::new(u64::MAX);
        room.look(folder.path()).unwrap();
        assert!(0 < room.seen().free_bytes);
        assert!(room.seen().is_short, "nothing has so much room");
        assert!(room.look(&folder.path().join("absent")).is_err());
        assert!(room.is_short(), "what was seen last stands");
    }
}
