//! `waypost backup`: adds a backup of a store to a folder, beside a running gateway or without one.
//!
//! Knows the command line, who can make a checkpoint just now, and what a person needs to read. Must not know how a
//! checkpoint is made or a folder of backups kept.

use std::{
    fmt, fs,
    io::Write,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::Serialize;

use super::{
    BackupError,
    folder::{Added, Backups},
    unusable,
};
use crate::{
    audit,
    clock::system_now_ms,
    console::print,
    control::{self, Answer, Command},
    inspect::Moment,
    seal::{copy, key_store},
    standalone::{self, by_gateway_or_alone},
    store::{BackupLock, Checkpoint, OpenError, Store, checkpoint_in},
};

/// Arguments of `waypost backup`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  waypost backup --data /var/lib/waypost --to /mnt/backups/waypost --keep 7
  waypost backup --data /var/lib/waypost --to /mnt/backups/waypost --keys-to /mnt/keys/waypost

The gateway may be running, and nobody waits for it. Files that an earlier backup in the folder has are not copied
again. When this returns, the backup is on disk; killed before that, it leaves none.
A backup holds the store, what is kept of users sealed, and the audit log. It does not hold the users' keys: whoever is
erased stays readable for as long as a copy of the key is kept. --keys-to keeps one copy of the keys, the present one,
and what was destroyed meanwhile goes from it: run it again after an erasure. Keep the master key apart from both.
`waypost restore` puts a backup back.")]
pub struct BackupArgs {
    /// The gateway's data folder
    #[arg(long = "data", value_name = "DIR")]
    data_dir: PathBuf,
    /// The folder of backups, of this store only; it is made if need be
    #[arg(long, value_name = "FOLDER")]
    to: PathBuf,
    /// Keep the newest N backups in it and remove the others; without it, all are kept
    #[arg(long, value_name = "N")]
    keep: Option<NonZeroUsize>,
    /// Bring the copy of the users' keys in this folder up to date as well, and of the list of erased users
    #[arg(long, value_name = "FOLDER")]
    keys_to: Option<PathBuf>,
    /// The gateway's configuration file, which says where the master key is. Without a running gateway the store is
    /// opened, and not without that key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was done, for people and programs.
#[derive(Serialize)]
struct Report {
    backup: u32,
    made_ms: u64,
    /// All commits up to this one are in it.
    position: u64,
    files: usize,
    bytes: u64,
    /// Of these no earlier backup had any.
    new_files: usize,
    new_bytes: u64,
    has_audit_log: bool,
    /// The backups that were removed.
    removed: Vec<u32>,
    /// None if the keys were not copied.
    key_files: Option<usize>,
    #[serde(skip)]
    to: PathBuf,
}

/// Makes a backup, and says so.
///
/// # Errors
/// When it cannot be made, or the output is closed. Then the folder has the backups that it had.
pub fn run(args: &BackupArgs, out: &mut impl Write) -> Result<(), BackupError> {
    let BackupArgs { data_dir, to, .. } = args;
    let backups = open_folder(args)?;
    let lock = match BackupLock::take(data_dir) {
        Ok(lock) => lock.ok_or_else(|| BackupError::Busy(data_dir.clone()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let path = data_dir.clone();
            return Err(OpenError::NoStore { path }.into());
        }
        Err(error) => return Err(unusable(data_dir)(error)),
    };
    let made_ms = system_now_ms();
    let checkpoint = checkpoint(args)?;
    let audit_log = data_dir.join(audit::FILE_NAME);
    let added = backups.add(&checkpoint_in(data_dir), checkpoint, &audit_log, made_ms);
    // In any case, for it holds on to files that the store has done with.
    let dropped = Store::drop_checkpoint_in(data_dir).map_err(unusable(data_dir));
    drop(lock);
    let Added {
        manifest,
        new_files,
        new_bytes,
    } = added?;
    dropped?;
    // After the store: whatever key it has used was there before.
    let keys = key_store::folder_in(data_dir);
    let key_files = args.keys_to.as_deref().map(|to| copy::copy(&keys, to));
    let report = Report {
        backup: manifest.number,
        made_ms,
        position: manifest.store.position,
        files: manifest.all_files().count(),
        bytes: manifest.bytes(),
        new_files,
        new_bytes,
        has_audit_log: manifest.audit_log.is_some(),
        key_files: key_files.transpose()?,
        removed: backups.clean(args.keep.map(NonZeroUsize::get))?,
        to: to.clone(),
    };
    Ok(print(&report, args.json, out)?)
}

/// The folder of backups, once it is sure that no other folder is in it that must not be.
fn open_folder(args: &BackupArgs) -> Result<Backups, BackupError> {
    let BackupArgs {
        data_dir,
        to,
        keys_to,
        ..
    } = args;
    // Empty, if it turns out to lie where it must not.
    fs::create_dir_all(to).map_err(unusable(to))?;
    let within = |inner: &Path, outer: &Path, reason| {
        let real = |path: &Path| fs::canonicalize(path).map_err(unusable(path));
        if real(inner)?.starts_with(real(outer)?) {
            return Err(BackupError::Within {
                inner: inner.to_owned(),
                outer: outer.to_owned(),
                reason,
            });
        }
        Ok(())
    };
    if data_dir.exists() {
        within(
            to,
            data_dir,
            "what destroys the one would destroy the other",
        )?;
    }
    if let Some(keys_to) = keys_to {
        fs::create_dir_all(keys_to).map_err(unusable(keys_to))?;
        let reason =
            "whoever has the backups would have the keys to them, and keep alive what was erased";
        within(keys_to, to, reason)?;
        within(to, keys_to, reason)?;
        within(
            keys_to,
            data_dir,
            "what destroys the one would destroy the other",
        )?;
    }
    Backups::open(to)
}

/// Has the gateway make a checkpoint, or makes it if there is none.
fn checkpoint(args: &BackupArgs) -> Result<Checkpoint, BackupError> {
    let BackupArgs {
        data_dir, config, ..
    } = args;
    let (checkpoint, _) = by_gateway_or_alone(
        || match control::ask(data_dir, &Command::Checkpoint)? {
            None => Ok(None),
            Some(Answer::Checkpointed(checkpoint)) => Ok(Some(checkpoint)),
            Some(Answer::Refused(reason)) => Err(BackupError::Refused(reason)),
            Some(other) => Err(BackupError::Refused(format!("it answers {other:?}"))),
        },
        || {
            let store = standalone::open_store(data_dir, config.as_deref(), system_now_ms())?;
            Ok(store.checkpoint()?)
        },
        |error| matches!(error, BackupError::Standalone(error) if error.is_locked()),
    )?;
    Ok(checkpoint)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            backup,
            made_ms,
            position,
            files,
            bytes,
            new_files,
            new_bytes,
            ..
        } = self;
        let (made, to) = (Moment(*made_ms), self.to.display());
        writeln!(f, "Backup {backup} of {made} is in {to}.")?;
        writeln!(
            f,
            "It holds all commits up to {position}. Files: {files}, {bytes} bytes; new ones: {new_files}, {new_bytes} bytes."
        )?;
        if !self.has_audit_log {
            writeln!(f, "There was no audit log to copy.")?;
        }
        if !self.removed.is_empty() {
            let removed: Vec<_> = self.removed.iter().map(ToString::to_string).collect();
            writeln!(f, "Removed: {}.", removed.join(", "))?;
        }
        match self.key_files {
            Some(key_files) => {
                writeln!(f, "The copy of the keys is up to date; files: {key_files}.")
            }
            None => writeln!(
                f,
                "The users' keys are not in it, and without them nothing of it can be read: see --keys-to."
            ),
        }
    }
}
