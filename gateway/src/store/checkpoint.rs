//! A checkpoint: the whole store as it was at one moment, in a folder beside the database, for a backup to copy.
//!
//! Knows how RocksDB makes one. Must not know where it is copied to.
//!
//! Table files never change, so the checkpoint has them by hard links; only the end of the write-ahead log is copied,
//! by up to `store.wal_mib`. No memtable is flushed and no commit waits. What waits is the turn of a day, for as long
//! as that takes: RocksDB looks at the families first and at its log afterwards, so that rows of a day that came to be
//! in between would be in the log and have no family, and a store that is opened passes over such rows in silence.
//!
//! # Bounds
//!
//! There is one at a time, of one backup. While it is there, files stay on the disk that compaction has done with: at
//! most as much again as the store takes. It goes when the backup has copied it, or, if that was killed, at the next
//! backup, erasure or start.

use std::{
    io,
    path::{Path, PathBuf},
};

use rocksdb::checkpoint;
use serde::{Deserialize, Serialize};

use super::{CommitError, Store, folder::Folder, watermark};
use crate::hex::hex;

/// What a checkpoint is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The store's incarnation, in hexadecimal digits.
    pub incarnation: String,
    /// The store's life, in hexadecimal digits: within it, a table file of one name is always the same.
    pub life: String,
    /// It holds all commits up to this one, and perhaps later ones.
    pub position: u64,
    /// It holds everybody who was heard up to this moment, in milliseconds since 1970-01-01 UTC. None if the gateway
    /// never heard anybody.
    pub heard_until_ms: Option<u64>,
    /// So many keys of users had been made: as many are needed to read it.
    pub keys_made: u64,
}

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The store has failed, or is open for reading.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// What an earlier one has left cannot be removed.
    #[error("cannot remove an earlier checkpoint in {path}: {source}")]
    Leftover {
        /// The store's folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// RocksDB could not make it.
    #[error("the store could not make a checkpoint of itself: {0}")]
    RocksDb(String),
}

/// Where the checkpoint of a data folder is, if there is one.
#[must_use]
pub fn checkpoint_in(data_dir: &Path) -> PathBuf {
    Folder::of_data_dir(data_dir).checkpoint()
}

impl Store {
    /// Makes a checkpoint, in place of an earlier one. Waits for the disk; commits do not wait for it.
    ///
    /// # Errors
    /// When it cannot be made. The store goes on as before.
    pub fn checkpoint(&self) -> Result<Checkpoint, CheckpointError> {
        let writer = self.writer()?;
        let _one = writer.checkpoint.lock();
        self.folder
            .drop_checkpoint()
            .map_err(|source| CheckpointError::Leftover {
                path: self.folder.path().to_owned(),
                source,
            })?;
        // Before RocksDB looks: all of this is in what it finds.
        let noted = writer.watermark.noted();
        // No day is opened or dropped meanwhile. This is by RocksDB's source (`DBImpl::GetLiveFilesStorageInfo`): between
        // its two looks there are microseconds and no call of the system, so that no test of ours provokes what would
        // happen in between.
        let days = self.days.lock();
        let made = checkpoint::Checkpoint::new(&self.db).and_then(|checkpoint| {
            checkpoint.create_checkpoint_with_log_size(self.folder.checkpoint(), u64::MAX)
        });
        drop(days);
        made.map_err(|error| CheckpointError::RocksDb(error.into_string()))?;
        Ok(Checkpoint {
            incarnation: hex(&self.facts.incarnation),
            life: hex(&self.facts.life),
            position: noted.position,
            heard_until_ms: noted.heard_until_ms,
            keys_made: self.writable_keys()?.lock().made(),
        })
    }

    /// Removes what is left of a checkpoint in a data folder.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn drop_checkpoint_in(data_dir: &Path) -> io::Result<()> {
        Folder::of_data_dir(data_dir).drop_checkpoint()
    }

    /// Says whether there is no store in a data folder. A lock that a start has left which failed is none, and is removed.
    pub(crate) fn clear_place_in(data_dir: &Path) -> bool {
        Folder::of_data_dir(data_dir).clear_of_lock()
    }

    /// Where the files of a store that is put back belong.
    pub(crate) fn database_put_back_in(data_dir: &Path) -> PathBuf {
        Folder::put_back_in(data_dir).database()
    }

    /// Says what must be in the files that are put back, so that a store that holds less is refused, and up to when
    /// the gateway could hear.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn expect_put_back(data_dir: &Path, checkpoint: &Checkpoint) -> io::Result<()> {
        let noted = watermark::Noted {
            position: checkpoint.position,
            heard_until_ms: checkpoint.heard_until_ms,
        };
        watermark::write(&Folder::put_back_in(data_dir).watermark(), noted)
    }
}
