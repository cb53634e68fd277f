//! Backups of the store: a folder of them, and `waypost backup`, which adds one.
//!
//! A [`manifest`] says what one backup is made of, the [`folder`] keeps the files of all of them, and [`command`] has a
//! checkpoint made and copied. How one is put back is [`crate::restore`]'s.
//!
//! # Why a checkpoint, and not RocksDB's backup engine
//!
//! The engine copies from the running database, for as long as that takes, and cannot be kept from looking at it just
//! when a day turns (see `store::checkpoint`). Its check of a backup compares sizes. A checkpoint is made within moments;
//! what follows is copying files that do not change, in a process of its own, to wherever there is room, with a
//! digest of each that is checked before anything is put back.
//!
//! # What is in it
//!
//! The store and the audit log. What is kept of users in the store is sealed; the keys are not in it, and must not be,
//! since a backup that holds them keeps alive what was erased.

pub mod command;
pub mod folder;
pub mod manifest;

use std::{io, path::PathBuf};

use crate::{
    control::ControlError,
    seal::key_store::KeyError,
    standalone::StandaloneError,
    store::{CheckpointError, OpenError},
};

/// Why there is no backup, or none that can be used. The messages are for the operator.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum BackupError {
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The gateway will not.
    #[error("the gateway refuses: {0}")]
    Refused(String),
    /// Another one is under way.
    #[error("another backup of {0} is under way; wait for its end")]
    Busy(PathBuf),
    /// The folder of backups is in use.
    #[error("somebody else uses the backups in {0}; wait for their end")]
    FolderBusy(PathBuf),
    /// A file or folder cannot be used.
    #[error("cannot use {path}: {source}")]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A folder lies where it must not.
    #[error("{inner} must not lie in {outer}: {reason}")]
    Within {
        /// The folder.
        inner: PathBuf,
        /// The one around it.
        outer: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// The backups are of another store.
    #[error(
        "the backups in {0} are of another store: name an empty folder, or one that has backups of this one"
    )]
    OtherStore(PathBuf),
    /// There is none.
    #[error("there is no backup in {0}: name the folder that `waypost backup --to` wrote to")]
    None(PathBuf),
    /// There is none of that number.
    #[error("there is no backup {number} in {folder}; those that are there: {there}")]
    NoSuch {
        /// The folder.
        folder: PathBuf,
        /// What was asked for.
        number: u32,
        /// The numbers of those that there are.
        there: String,
    },
    /// It is not as it was written.
    #[error(
        "backup {number} is damaged, and nothing is put back from it: {path} {problem}. Take another one"
    )]
    Damaged {
        /// Which.
        number: u32,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The output is closed.
    #[error("cannot write the report: {0}")]
    Output(#[from] io::Error),
}

/// The failure of a file or folder.
pub(crate) fn unusable(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.into();
    move |source| BackupError::Unusable { path, source }
}
