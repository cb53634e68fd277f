//! The tripwire for lost commits: a small file beside the database that says how far commits were known
//! to be on disk, and up to when the gateway could hear.
//!
//! RocksDB opens after it cut off a damaged end of its log, and cannot always tell an end that was torn
//! before anybody was told from one that was acknowledged. This file can: it trails the commits by about
//! a second, so a store that recovers less than it has lost acknowledged data. For the same reason the next
//! process knows when this one went, to about a second and never too late, however it went; the file is written while
//! that moves, commits or not. Knows positions, moments and one file. Must not know RocksDB.
//!
//! One line: `position moment check`. An earlier form without the moment is read as well.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use ring::digest::{SHA256, digest};
use tracing::warn;

use crate::{durable, hex::hex};

/// How often the file is written while commits go on: how much of the newest loss it may miss. A sync a
/// second is nothing beside those of the commits.
const INTERVAL: Duration = Duration::from_secs(1);
/// How much of the digest guards the number.
const CHECK_BYTES: usize = 8;
/// Who may read it: a number of commits is no secret.
const MODE: u32 = 0o644;

/// The writer of the file, on a thread of its own, so that no commit waits for it.
#[derive(Debug)]
pub(super) struct Watermark {
    noted: Arc<Notes>,
    stop: Option<mpsc::SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What the file says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Noted {
    /// All commits up to this one are on disk.
    pub(super) position: u64,
    /// The gateway could hear up to this moment, in milliseconds since 1970-01-01 UTC; none if it never said so.
    pub(super) heard_until_ms: Option<u64>,
}

/// What is to be written.
#[derive(Debug)]
struct Notes {
    position: AtomicU64,
    /// 0 for never.
    heard_until_ms: AtomicU64,
}

impl Notes {
    fn now(&self) -> Noted {
        let heard_until_ms = self.heard_until_ms.load(Ordering::Relaxed);
        Noted {
            position: self.position.load(Ordering::Relaxed),
            heard_until_ms: (heard_until_ms != 0).then_some(heard_until_ms),
        }
    }
}

impl Watermark {
    /// Starts from the position that the store recovered and the moment that its file says.
    pub(super) fn start(path: PathBuf, recovered: Noted) -> io::Result<Self> {
        let noted = Arc::new(Notes {
            position: AtomicU64::new(recovered.position),
            heard_until_ms: AtomicU64::new(recovered.heard_until_ms.unwrap_or_default()),
        });
        let (stop, stopped) = mpsc::sync_channel(0);
        let written = Arc::clone(&noted);
        let thread = thread::Builder::new()
            .name("watermark".to_owned())
            .spawn(move || keep_written(&path, &written, recovered, &stopped))?;
        Ok(Self {
            noted,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// What was noted last.
    pub(super) fn noted(&self) -> Noted {
        self.noted.now()
    }

    /// Notes that all commits up to this one are on disk.
    pub(super) fn note(&self, position: u64) {
        self.noted.position.fetch_max(position, Ordering::Relaxed);
    }

    /// Notes that the gateway could hear up to this moment.
    pub(super) fn note_heard(&self, until_ms: u64) {
        self.noted
            .heard_until_ms
            .fetch_max(until_ms, Ordering::Relaxed);
    }
}

impl Drop for Watermark {
    /// Writes what was noted last.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that writes the watermark had panicked");
        }
    }
}

/// Reads the file. `Ok(None)` when there is none.
pub(super) fn read(path: &Path) -> io::Result<Option<Noted>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its content is damaged");
    let number = |text: &str| text.parse().map_err(|_| damaged());
    let (numbers, _) = text.rsplit_once(' ').ok_or_else(damaged)?;
    let noted = match numbers.split_once(' ') {
        Some((position, heard_until_ms)) => Noted {
            position: number(position)?,
            heard_until_ms: Some(number(heard_until_ms)?),
        },
        None => Noted {
            position: number(numbers)?,
            heard_until_ms: None,
        },
    };
    (content(noted) == text)
        .then_some(Some(noted))
        .ok_or_else(damaged)
}

fn keep_written(path: &Path, notes: &Notes, recovered: Noted, stopped: &mpsc::Receiver<()>) {
    let mut written = recovered;
    loop {
        let stop = stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout);
        let noted = notes.now();
        if written != noted {
            match write(path, noted) {
                Ok(()) => written = noted,
                // The older numbers stay: a weaker tripwire, not a wrong one, and a time in which the gateway is
                // said to have been down though it was not. The commits themselves decide whether the disk is good
                // enough to go on.
                Err(error) => {
                    warn!(%error, path = %path.display(), "the watermark could not be written")
                }
            }
        }
        if stop {
            return;
        }
    }
}

/// Writes the file, of a store that nobody has open.
pub(super) fn write(path: &Path, noted: Noted) -> io::Result<()> {
    durable::replace_file(path, content(noted).as_bytes(), MODE)
}

fn content(noted: Noted) -> String {
    let numbers = match noted.heard_until_ms {
        Some(heard_until_ms) => format!("{} {heard_until_ms}", noted.position),
        None => noted.position.to_string(),
    };
    let digest = digest(&SHA256, numbers.as_bytes());
    let check = hex(&digest.as_ref()[..CHECK_BYTES]);
    format!("{numbers} {check}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_noted_position_is_written_at_the_latest_when_it_stops() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watermark");
        assert_eq!(read(&path).unwrap(), None);
        let recovered = Noted {
            position: 7,
            heard_until_ms: None,
        };
        let watermark = Watermark::start(path.clone(), recovered).unwrap();
        watermark.note(12);
        watermark.note(11);
        drop(watermark);
        let noted = Noted {
            position: 12,
            heard_until_ms: None,
        };
        assert_eq!(read(&path).unwrap(), Some(noted));
    }

    #[test]
    fn the_moment_is_written_also_when_nothing_was_committed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watermark");
        let recovered = Noted {
            position: 7,
            heard_until_ms: Some(1_000),
        };
        let watermark = Watermark::start(path.clone(), recovered).unwrap();
        watermark.note_heard(2_000);
        watermark.note_heard(1_500);
        drop(watermark);
        let noted = Noted {
            position: 7,
            heard_until_ms: Some(2_000),
        };
        assert_eq!(read(&path).unwrap(), Some(noted));
    }

    #[test]
    fn damage_is_not_taken_for_a_position_or_a_moment() {
        for heard_until_ms in [None, Some(5_678)] {
            damage_is_seen(Noted {
                position: 1_234,
                heard_until_ms,
            });
        }
    }

    fn damage_is_seen(noted: Noted) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watermark");
        write(&path, noted).unwrap();
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(read(&path).is_err(), "byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(read(&path).is_err(), "cut at {at}");
        }
    }
}
