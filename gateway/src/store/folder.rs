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
        if !self.path.join(RUNNING).exists() {
            return Ok(());
        }
        let copy = self.path.join(format!("{RECOVERY_PREFIX}{now_ms}"));
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
        for (_, path) in recoveries.iter().rev().skip(RECOVERIES_KEPT) {
            fs::remove_dir_all(path)?;
        }
        self.unmark_running()
    }

    /// Removes copies of the log that were made before a day: they hold pings, so they are kept no
    /// longer than pings are.
    pub(super) fn drop_recoveries_before(&self, day: Day) -> io::Result<()> {
        for (made_ms, path) in self.recoveries()? {
            if Day::of_ms(made_ms) < day {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }

    /// Leaves a mark that lasts until [`Self::unmark_running`], through a loss of power too.
    pub(super) fn mark_running(&self) -> io::Result<()> {
        File::create(self.path.join(RUNNING))?;
        durable::sync_folder(&self.path)
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

    fn log_files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.database())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// The copies of the log, oldest first, each with its time in milliseconds since 1970-01-01 UTC.
    fn recoveries(&self) -> io::Result<Vec<(u64, PathBuf)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let made_ms = name
                .to_str()
                .and_then(|name| name.strip_prefix(RECOVERY_PREFIX)?.parse().ok());
            if let Some(made_ms) = made_ms {
                found.push((made_ms, entry.path()));
            }
        }
        found.sort_unstable();
        Ok(found)
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
        folder
            .recoveries()
            .unwrap()
            .into_iter()
            .map(|(made_ms, _)| made_ms)
            .collect()
    }

    #[test]
    fn the_log_is_kept_once_for_each_unclean_stop_and_only_the_newest_two() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder(data_dir.path());
        folder.keep_log_of_unclean_stop(1).unwrap();
        assert!(made_ms(&folder).is_empty(), "nothing had run");
        for now_ms in [10, 20, 30] {
            folder.mark_running().unwrap();
            folder.keep_log_of_unclean_stop(now_ms).unwrap();
            folder.keep_log_of_unclean_stop(now_ms + 1).unwrap();
        }
        assert_eq!(made_ms(&folder), [20, 30]);
        fs::remove_file(folder.database().join("000004.log")).unwrap();
        let kept = folder.path().join("recovery-30").join("000004.log");
        assert_eq!(fs::read_to_string(kept).unwrap(), "acknowledged");
    }

    #[test]
    fn copies_of_the_log_go_with_the_days_they_were_made_on() {
        const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder(data_dir.path());
        for now_ms in [5 * DAY_MS - 1, 5 * DAY_MS] {
            folder.mark_running().unwrap();
            folder.keep_log_of_unclean_stop(now_ms).unwrap();
        }
        folder
            .drop_recoveries_before(Day::of_ms(5 * DAY_MS))
            .unwrap();
        assert_eq!(made_ms(&folder), [5 * DAY_MS]);
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
