//! The tripwire for lost commits: a small file beside the database that says how far commits were known
//! to be on disk.
//!
//! RocksDB opens after it cut off a damaged end of its log, and cannot always tell an end that was torn
//! before anybody was told from one that was acknowledged. This file can: it trails the commits by about
//! a second, so a store that recovers less than it has lost acknowledged data. Knows positions and one
//! file. Must not know RocksDB.

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

use crate::durable;

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
    position: Arc<AtomicU64>,
    stop: Option<mpsc::SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watermark {
    /// Starts from the position that the store recovered.
    pub(super) fn start(path: PathBuf, recovered: u64) -> io::Result<Self> {
        let position = Arc::new(AtomicU64::new(recovered));
        let (stop, stopped) = mpsc::sync_channel(0);
        let noted = Arc::clone(&position);
        let thread = thread::Builder::new()
            .name("watermark".to_owned())
            .spawn(move || keep_written(&path, &noted, recovered, &stopped))?;
        Ok(Self {
            position,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Notes that all commits up to this one are on disk.
    pub(super) fn note(&self, position: u64) {
        self.position.fetch_max(position, Ordering::Relaxed);
    }
}

impl Drop for Watermark {
    /// Writes the last position.
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
pub(super) fn read(path: &Path) -> io::Result<Option<u64>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its content is damaged");
    let (number, _) = text.split_once(' ').ok_or_else(damaged)?;
    let position = number.parse().map_err(|_| damaged())?;
    (content(position) == text)
        .then_some(Some(position))
        .ok_or_else(damaged)
}

fn keep_written(path: &Path, noted: &AtomicU64, recovered: u64, stopped: &mpsc::Receiver<()>) {
    let mut written = recovered;
    loop {
        let stop = stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout);
        let position = noted.load(Ordering::Relaxed);
        if written < position {
            match write(path, position) {
                Ok(()) => written = position,
                // The older number stays: a weaker tripwire, not a wrong one. The commits themselves
                // decide whether the disk is good enough to go on.
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

fn write(path: &Path, position: u64) -> io::Result<()> {
    durable::replace_file(path, content(position).as_bytes(), MODE)
}

fn content(position: u64) -> String {
    let number = position.to_string();
    let digest = digest(&SHA256, number.as_bytes());
    let check: String = digest.as_ref()[..CHECK_BYTES]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{number} {check}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_noted_position_is_written_at_the_latest_when_it_stops() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watermark");
        assert_eq!(read(&path).unwrap(), None);
        let watermark = Watermark::start(path.clone(), 7).unwrap();
        watermark.note(12);
        watermark.note(11);
        drop(watermark);
        assert_eq!(read(&path).unwrap(), Some(12));
    }

    #[test]
    fn damage_is_not_taken_for_a_position() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watermark");
        write(&path, 1_234).unwrap();
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
