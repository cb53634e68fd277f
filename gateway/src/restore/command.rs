//! `waypost restore`: puts a store back from a backup.
//!
//! Knows the command line and what a person needs to read. How it is done is the parent's.

use std::{fmt, io::Write, path::PathBuf};

use clap::Args;
use serde::Serialize;

use super::{PutBack, RestoreError, Wanted, restore};
use crate::{
    clock::system_now_ms,
    config::{self, Config},
    console::print,
    inspect::Moment,
};

/// Arguments of `waypost restore`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Example: with the master key and, if they survived, the keys and the audit log in the new data folder already
  waypost restore --from /mnt/backups/waypost --data /var/lib/waypost
and with a copy of the keys
  waypost restore --from /mnt/backups/waypost --keys /mnt/keys/waypost --data /var/lib/waypost

Nothing is put back over a store. Take the newest keys that there are: they know who was erased since the backup was
made, and that is erased before anybody is served. An audit.log that is in the data folder already is newer than the one
in the backup: it goes on, and revocations in it hold.
Devices send again what they still have of what is lost. Checkers begin anew, and the time since the backup was made is
to them one in which the gateway could not hear.")]
pub struct RestoreArgs {
    /// The folder of backups
    #[arg(long, value_name = "FOLDER")]
    from: PathBuf,
    /// The data folder, in which there must be no store
    #[arg(long = "data", value_name = "DIR")]
    data_dir: PathBuf,
    /// Which backup; the newest without it
    #[arg(long, value_name = "N")]
    backup: Option<u32>,
    /// A copy of the users' keys; without it, they are in the data folder
    #[arg(long, value_name = "FOLDER")]
    keys: Option<PathBuf>,
    /// The gateway's configuration file, which says where the master key is; without it, in the data folder
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
    heard_until_ms: Option<u64>,
    position: u64,
    devices: u64,
    pings: u64,
    erased_users: usize,
    revocations: usize,
    enrolled_users: usize,
    grant_changes: usize,
    /// Whether it went by a copy of the keys.
    #[serde(skip)]
    is_by_copy: bool,
    #[serde(skip)]
    data_dir: PathBuf,
}

/// Puts a store back, and says so.
///
/// # Errors
/// When that is not possible, or the output is closed.
pub fn run(args: &RestoreArgs, out: &mut impl Write) -> Result<(), RestoreError> {
    let data_dir = &args.data_dir;
    let config = Config::load(
        args.config.as_deref(),
        config::environment(),
        Some(data_dir.clone()),
    )?;
    let PutBack {
        backup,
        made_ms,
        heard_until_ms,
        position,
        devices,
        pings,
        erased,
        revocations,
        enrolled,
        grants,
    } = restore(&Wanted {
        from: &args.from,
        backup: args.backup,
        keys: args.keys.as_deref(),
        data_dir,
        store: &config.store,
        now_ms: system_now_ms(),
    })?;
    let report = Report {
        backup,
        made_ms,
        heard_until_ms,
        position,
        devices,
        pings,
        erased_users: erased,
        revocations,
        enrolled_users: enrolled,
        grant_changes: grants,
        is_by_copy: args.keys.is_some(),
        data_dir: data_dir.clone(),
    };
    Ok(print(&report, args.json, out)?)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (made, data_dir) = (Moment(self.made_ms), self.data_dir.display());
        writeln!(
            f,
            "Backup {} of {made} is put back in {data_dir}.",
            self.backup
        )?;
        writeln!(
            f,
            "Every row of it opens. Devices: {}, pings: {}.",
            self.devices, self.pings
        )?;
        if 0 < self.erased_users {
            writeln!(
                f,
                "Users erased after it was made, who are erased in it too: {}.",
                self.erased_users
            )?;
        }
        if self.is_by_copy {
            writeln!(
                f,
                "Who was erased after the copy of the keys was made, and is in no audit log here, is not known: erase them \
                 again with `waypost erase` before anybody is served."
            )?;
        }
        if 0 < self.revocations {
            writeln!(
                f,
                "Revocations made or lifted after it was made, which hold: {}.",
                self.revocations
            )?;
        }
        if 0 < self.grant_changes {
            writeln!(
                f,
                "Grants given or withdrawn after it was made, which holds: {}.",
                self.grant_changes
            )?;
        }
        writeln!(
            f,
            "Invitations, pauses and deadlines of after {made} are lost: tell the holders, and have checkers set their \
             deadlines again. To checkers the gateway could not hear since {}.",
            Moment(self.heard_until_ms.unwrap_or(self.made_ms))
        )
    }
}
