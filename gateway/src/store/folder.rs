//! The store's folder: who may write in it, whether the last writer closed it in order, copies of
//! the write-ahead log from before a recovery, and the checkpoint that a backup is made of.
//!
//! Knows files and their names. Must not know RocksDB's API or what is stored.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use tracing::{info, warn};

use super::keys::Day;
use crate::durable;

/// The subfolder of the data folder that holds all of the store.
const STORE: &str = "store";
/// The same of a store that is being put back, until it is whole.
const PUT_BACK: &str = "store.restoring";
/// What a backup copies.
const CHECKPOINT: &str = "checkpoint";
/// What RocksDB names it until it is whole.
const CHECKPOINT_BEGUN: &str = "checkpoint.tmp";
/// Held by a process that makes a backup.
const BACKUP_LOCK: &str = "backup-lock";
const DATABASE: &str = "rocksdb";
const LOCK: &str = "lock";
const RUNNING: &str = "running";
const WATERMARK: &str = "watermark";
const RECOVERY_PREFIX: &str = "recovery-";
/// Between the time at which a copy of the log was made and the day since which there may be pings in it.
const SINCE: &str = "-since-";
/// Who may read the mark of a running writer: a day is no secret.
const MODE: u32 = 0o644;
/// How many copies of the log are kept, the newest: two, so that a second crash right after the first
/// does not take away what is being looked at. The log's own bound is theirs too.
const RECOVERIES_KEPT: usize = 2;

/// Where everything lies.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

/// The right to write, until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// The right to make a backup of a store, until dropped: as long as somebody has it, the checkpoint is in use.
#[derive(Debug)]
pub struct BackupLock {
    _file: File,
}

impl BackupLock {
    /// Takes it for the store of a data folder. `Ok(None)` when somebody else has it.
    ///
    /// # Errors
    /// When the folder of the store cannot be used.
    pub fn take(data_dir: &Path) -> io::Result<Option<Self>> {
        Folder::of_data_dir(data_dir).lock_backup()
    }
}

impl Folder {
    pub(super) fn of_data_dir(data_dir: &Path) -> Self {
        Self {
            path: data_dir.join(STORE),
        }
    }

    /// Where a store is put together that is put back.
    pub(super) fn put_back_in(data_dir: &Path) -> Self {
        Self {
            path: data_dir.join(PUT_BACK),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn database(&self) -> PathBuf {
        self.path.join(DATABASE)
    }

    pub(super) fn watermark(&self) -> PathBuf {
        self.path.join(WATERMARK)
    }

    /// Whether a database has ever been made here: RocksDB's file `CURRENT` comes last.
    pub(super) fn holds_database(&self) -> bool {
        self.database().join("CURRENT").exists()
    }

    /// Removes the folder if nothing is in it but a lock that nobody holds, and says whether it is gone.
    pub(super) fn clear_of_lock(&self) -> bool {
        let names = || {
            fs::read_dir(&self.path)?
                .map(|entry| Ok(entry?.file_name()))
                .collect()
        };
        let names: io::Result<Vec<_>> = names();
        if names.is_ok_and(|names| names == [LOCK]) && matches!(self.lock(), Ok(Some(_))) {
            fs::remove_file(self.path.join(LOCK)).ok();
            fs::remove_dir(&self.path).ok();
        }
        self.path.symlink_metadata().is_err()
    }

    /// Makes the folder of the database if need be. RocksDB would do so as well, but not sync the name: a
    /// loss of power could then take away the whole database, all of its synced files included.
    pub(super) fn make_database(&self) -> io::Result<()> {
        durable::create_folder(&self.database())
    }

    /// Makes the folder if need be, for good, and takes the lock. `Ok(None)` when another process, or another
    /// store of this one, has it. RocksDB has a lock of its own; this one comes before the first file
    /// is touched.
    pub(super) fn lock(&self) -> io::Result<Option<Lock>> {
        durable::create_folder(&self.path)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path.join(LOCK))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    pub(super) fn checkpoint(&self) -> PathBuf {
        self.path.join(CHECKPOINT)
    }

    fn lock_backup(&self) -> io::Result<Option<BackupLock>> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path.join(BACKUP_LOCK))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(BackupLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Removes the checkpoint, or what there is of it.
    pub(super) fn drop_checkpoint(&self) -> io::Result<()> {
        for name in [CHECKPOINT, CHECKPOINT_BEGUN] {
            match fs::remove_dir_all(self.path.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes the checkpoint of a backup that was killed. One that is being copied stays: whoever copies it removes it.
    pub(super) fn drop_abandoned_checkpoint(&self) -> io::Result<()> {
        let is_there = |name| self.path.join(name).exists();
        if (is_there(CHECKPOINT) || is_there(CHECKPOINT_BEGUN)) && self.lock_backup()?.is_some() {
            self.drop_checkpoint()?;
        }
        Ok(())
    }

    /// If the last writer did not close the store, keeps a copy of the write-ahead log as it was left,
    /// by hard links, before recovery changes it: should acknowledged data turn out to be missing, it is
    /// the evidence. The mark of the running writer goes with it, so that a store that refuses to open
    /// is copied once, however often it is tried.
    pub(super) fn keep_log_of_unclean_stop(&self, now_ms: u64) -> io::Result<()> {
        let since = match fs::read_to_string(self.path.join(RUNNING)) {
            // What cannot be told may be as old as can be.
            Ok(mark) => Day::parse(mark.trim_end()).unwrap_or_else(|| Day::of_ms(0)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Day::of_ms(0),
            Err(error) => return Err(error),
        };
        let copy = self
            .path
            .join(format!("{RECOVERY_PREFIX}{now_ms}{SINCE}{since}"));
        match self.link_log(&copy) {
            Ok(files) => {
                info!(files, copy = %copy.display(), "the gateway was not stopped in order; its log was kept")
            }
            // Some file systems cannot link. The copy is a help, not a condition.
            Err(error) => {
                warn!(%error, "the gateway was not stopped in order, and its log could not be kept")
            }
        }
        let recoveries = self.recoveries()?;
        for recovery in recoveries.iter().rev().skip(RECOVERIES_KEPT) {
            fs::remove_dir_all(&recovery.path)?;
        }
        self.unmark_running()
    }

    /// Removes copies of the log in which there may be pings of before a day: they are kept no longer than pings
    /// are, whenever the copy was made.
    pub(super) fn drop_recoveries_before(&self, day: Day) -> io::Result<()> {
        for recovery in self.recoveries()? {
            if recovery.since < day {
                fs::remove_dir_all(recovery.path)?;
            }
        }
        Ok(())
    }

    /// Leaves a mark that lasts until [`Self::unmark_running`], through a loss of power too. It says the day since
    /// which pings may have been received that are in the log.
    pub(super) fn mark_running(&self, since: Day) -> io::Result<()> {
        let mark = format!("{since}\n");
        durable::replace_file(&self.path.join(RUNNING), mark.as_bytes(), MODE)
    }

    /// Not synced: a mark that comes back costs a copy of the log, no more.
    pub(super) fn unmark_running(&self) -> io::Result<()> {
        fs::remove_file(self.path.join(RUNNING))
    }

    /// How large the write-ahead log is.
    pub(super) fn log_bytes(&self) -> u64 {
        // A file may be deleted between listing and asking.
        let sizes = self
            .log_files()
            .unwrap_or_default()
            .into_iter()
            .map(|path| fs::metadata(path).map_or(0, |file| file.len()));
        sizes.sum()
    }

    fn link_log(&self, copy: &Path) -> io::Result<usize> {
        durable::create_folder(copy)?;
        let files = self.log_files()?;
        for file in &files {
            if let Some(name) = file.file_name() {
                fs::hard_link(file, copy.join(name))?;
            }
        }
        durable::sync_folder(copy)?;
        Ok(files.len())
    }

    /// The files of the write-ahead log.
    pub(super) fn log_files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.database())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// The copies of the log, oldest first.
    fn recoveries(&self) -> io::Result<Vec<Recovery>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            found.extend(Recovery::at(path));
        }
        found.sort_unstable();
        Ok(found)
    }
}

/// A copy of the log.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Recovery {
    /// When it was made, in milliseconds since 1970-01-01 UTC.
    made_ms: u64,
    /// No ping in it was received before this day.
    since: Day,
    path: PathBuf,
}

impl Recovery {
    fn at(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_prefix(RECOVERY_PREFIX)?;
        let (made_ms, since) = match name.split_once(SINCE) {
            Some((made_ms, since)) => (made_ms, Day::parse(since)?),
            // An earlier version did not say.
            None => (name, Day::of_ms(0)),
        };
        Some(Self {
            made_ms: made_ms.parse().ok()?,
            since,
            path,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a database of one log file.
    fn folder(data_dir: &Path) -> Folder {
        let folder = Folder::of_data_dir(data_dir);
        fs::create_dir_all(folder.database()).unwrap();
        fs::write(folder.database().join("000004.log"), "acknowledged").unwrap();
        folder
    }

    fn made_ms(folder: &Folder) -> Vec<u64> {
        let recoveries = folder.recoveries().unwrap().into_iter();
        recoveries.map(|recovery| recovery.made_ms).collect()
    }

    fn today() -> Day {
        Day::of_ms(1_800_000_000_000)
    }

    #[test]
    fn the_log_is_kept_once_for_each_unclean_stop_and_only_the_newest_two() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder(data_dir.path());
        folder.keep_log_of_unclean_stop(1).unwrap();
        assert!(made_ms(&folder).is_empty(), "nothing had run");
        for now_ms in [10, 20, 30] {
            folder.mark_running(today()).unwrap();
            folder.keep_log_of_unclean_stop(now_ms).unwrap();
            folder.keep_log_of_unclean_stop(now_ms + 1).unwrap();
        }
        assert_eq!(made_ms(&folder), [20, 30]);
        fs::remove_file(folder.database().join("000004.log")).unwrap();
        let kept = &folder.recoveries().unwrap()[1].path;
        let kept = fs::read_to_string(kept.join("000004.log")).unwrap();
        assert_eq!(kept, "acknowledged");
    }

    #[test]
    fn copies_of_the_log_go_with_the_oldest_day_that_may_be_in_them_whenever_they_were_made() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder(data_dir.path());
        for (made_ms, since) in [(7, today()), (8, today().next())] {
            folder.mark_running(since).unwrap();
            folder.keep_log_of_unclean_stop(made_ms).unwrap();
        }
        folder.drop_recoveries_before(today()).unwrap();
        assert_eq!(made_ms(&folder), [7, 8]);
        folder.drop_recoveries_before(today().next()).unwrap();
        assert_eq!(made_ms(&folder), [8]);
    }

    #[test]
    fn a_copy_of_which_nothing_is_known_goes_first() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder(data_dir.path());
        fs::create_dir(folder.path().join("recovery-1700000000000")).unwrap();
        // As an earlier version left it, and as a loss of power might.
        for (mark, now_ms) in [
            (&b""[..], 1_800_000_000_000),
            (b"\xff\0", 1_800_000_000_001),
        ] {
            fs::write(folder.path().join(RUNNING), mark).unwrap();
            folder.keep_log_of_unclean_stop(now_ms).unwrap();
            assert!(made_ms(&folder).contains(&now_ms));
        }
        folder.drop_recoveries_before(Day::of_ms(0).next()).unwrap();
        assert!(made_ms(&folder).is_empty());
    }

    #[test]
    fn a_checkpoint_goes_when_nobody_copies_it_any_more() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder(data_dir.path());
        for name in [CHECKPOINT, CHECKPOINT_BEGUN] {
            let lock = BackupLock::take(data_dir.path()).unwrap();
            assert!(lock.is_some());
            assert!(BackupLock::take(data_dir.path()).unwrap().is_none());
            let begun = folder.path().join(name);
            fs::create_dir(&begun).unwrap();
            folder.drop_abandoned_checkpoint().unwrap();
            assert!(begun.exists(), "somebody copies it");
            drop(lock);
            folder.drop_abandoned_checkpoint().unwrap();
            assert!(!begun.exists());
        }
    }

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_dropped() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = Folder::of_data_dir(data_dir.path());
        let lock = folder.lock().unwrap();
        assert!(lock.is_some());
        assert!(folder.lock().unwrap().is_none());
        drop(lock);
        assert!(folder.lock().unwrap().is_some());
    }
}
