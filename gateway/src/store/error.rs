//! What can go wrong with the store, as the operator is told.
//!
//! Knows the words, and which failures of RocksDB mean damage. Must not know when it is tried again: a failed commit never
//! is.

use std::{
    io,
    path::{Path, PathBuf},
};

use rocksdb::ErrorKind;
use waypost_proto::id::UserId;

use super::{
    facts::FORMAT,
    folder::Folder,
    keys::{Day, PingKey},
    record::RecordError,
};
use crate::{
    hex::hex,
    seal::{key_store::KeyError, master::MasterKeyError},
};

/// Why the store cannot be opened. The messages are for the operator.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder cannot be used at all.
    #[error(
        "cannot use {path} for the store: {source}; it must be a folder that this user may write to"
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody else writes to it.
    #[error(
        "another gateway has the store in {path} open; stop it first, or use another data folder"
    )]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// There is nothing to read.
    #[error("there is no store in {path}; a gateway makes one when it starts")]
    NoStore {
        /// The folder.
        path: PathBuf,
    },
    /// A restore was cut short.
    #[error(
        "a store was being put back in {path}, and is not whole: run `waypost restore` again, or remove store.restoring \
         to begin with an empty store"
    )]
    PutBackInPart {
        /// The folder.
        path: PathBuf,
    },
    /// A later version wrote it.
    #[error(
        "the store in {path} has format {found}; this version knows formats up to {FORMAT}, so use a later one"
    )]
    LaterFormat {
        /// The folder.
        path: PathBuf,
        /// The store's format.
        found: u32,
    },
    /// A later version wrote it, or another program.
    #[error(
        "the store in {path} has a part named {name:?} that this version does not know; use the version that wrote it"
    )]
    UnknownFamily {
        /// The folder.
        path: PathBuf,
        /// The column family's name.
        name: String,
    },
    /// What is there contradicts itself.
    #[error("the store in {path} is damaged: {text}; restore it from a backup")]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// RocksDB's text, or ours.
        text: String,
    },
    /// Any other failure of RocksDB, of the disk most likely.
    #[error("the store in {path} cannot be opened: {text}")]
    RocksDb {
        /// The folder.
        path: PathBuf,
        /// RocksDB's text.
        text: String,
    },
    /// Acknowledged pings are missing.
    #[error(
        "the store has lost acknowledged data: it holds commits up to {recovered}, but commits up to \
         {watermark} were known to be on disk. The write-ahead log was damaged or cut short, or an older \
         copy of the folder was put in place. Restore a backup that is newer, or look for the log as the \
         last stop left it in {}. To go on without the lost data, delete {}: devices that were acknowledged \
         more than the store remembers are told so and send again what they still hold",
        .store.display(), .file.display()
    )]
    BehindWatermark {
        /// The last commit that is there.
        recovered: u64,
        /// The last commit that must be there.
        watermark: u64,
        /// The folder that holds `recovery-*`.
        store: PathBuf,
        /// The file that says so.
        file: PathBuf,
    },
    /// Whether acknowledged pings are missing cannot be told.
    #[error(
        "cannot read {}: {source}. It says how far commits were known to be on disk; without it a loss would \
         go unnoticed. Look at the disk, then delete the file to go on", .file.display()
    )]
    Watermark {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The system gave no random numbers for a new store's keys.
    #[error("the system gives no random numbers")]
    NoRandomness,
    /// The master key cannot be had.
    #[error(transparent)]
    MasterKey(#[from] MasterKeyError),
    /// The master key that was made with the store is gone.
    #[error(
        "{path} is missing, and without the master key in it nothing that is stored can be read: put it back, or name \
         the place of the master key under [store.sealing]"
    )]
    MasterKeyMissing {
        /// The file.
        path: PathBuf,
    },
    /// The users' keys cannot be had.
    #[error(transparent)]
    Keys(#[from] KeyError),
}

/// A failed commit. It is final: nothing after it is durable for sure, and every later commit of this
/// store fails with the same error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// RocksDB could not write.
    #[error("the store could not write: {0}")]
    RocksDb(String),
    /// Pings of a day whose family is not there; [`super::Store::open_day`] comes first.
    #[error("the store was given pings of {0}, a day that is not open")]
    DayNotOpen(Day),
    /// The store was opened for reading.
    #[error("the store is open for reading only")]
    ReadOnly,
    /// Users' keys could not be made or destroyed for good.
    #[error("the users' keys could not be written: {0}")]
    Keys(String),
    /// The system gave no random numbers.
    #[error("the system gives no random numbers")]
    NoRandomness,
}

/// A failed read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// RocksDB could not read.
    #[error("the store could not be read: {0}")]
    RocksDb(String),
    /// A key is not of the form it must have.
    #[error("a key of {family} is damaged: {key}; restore the store from a backup")]
    Key {
        /// The column family.
        family: String,
        /// The key in hexadecimal digits.
        key: String,
    },
    /// A value cannot be decoded.
    #[error("a row of {family} is damaged: {source} (key {key}); restore the store from a backup")]
    Value {
        /// The column family.
        family: String,
        /// The key in hexadecimal digits.
        key: String,
        /// What is wrong with the value.
        source: RecordError,
    },
    /// Pings are sealed, and their user's key is not there: it was destroyed, or the reader has no master key.
    #[error("the pings of {} of {day} are sealed, and there is no key for them", .key.device)]
    Sealed {
        /// The day on which they were received.
        day: Day,
        /// Whose pings, and where they begin.
        key: PingKey,
    },
    /// The same of another row.
    #[error(
        "a row of {family} of user {user} is sealed, and there is no key for it. If the master key is not in the data \
         folder, name the gateway's configuration, which says where it is; if the user's key was lost, put back a copy of \
         the folder of keys that has it"
    )]
    SealedRow {
        /// The column family.
        family: String,
        /// Whose row.
        user: UserId,
    },
}

pub(super) fn locked(data_dir: &Path) -> OpenError {
    OpenError::Locked {
        path: data_dir.to_owned(),
    }
}

pub(super) fn behind(folder: &Folder, recovered: u64, watermark: u64) -> OpenError {
    OpenError::BehindWatermark {
        recovered,
        watermark,
        store: folder.path().to_owned(),
        file: folder.watermark(),
    }
}

pub(super) fn open_error(data_dir: &Path, error: rocksdb::Error) -> OpenError {
    let path = data_dir.to_owned();
    match error.kind() {
        ErrorKind::Corruption => OpenError::Damaged {
            path,
            text: error.into_string(),
        },
        _ => OpenError::RocksDb {
            path,
            text: error.into_string(),
        },
    }
}

pub(super) fn bad_key(family: &str, key: &[u8]) -> ReadError {
    ReadError::Key {
        family: family.to_owned(),
        key: hex(key),
    }
}

pub(super) fn bad_value(family: &str, key: &[u8], source: RecordError) -> ReadError {
    ReadError::Value {
        family: family.to_owned(),
        key: hex(key),
        source,
    }
}
