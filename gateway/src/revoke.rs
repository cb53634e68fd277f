//! `waypost revoke`: has a device or user be served no more, by the running gateway or in its store.
//!
//! Knows the command line, who can write to the store just now, and what a person needs to read. Must not know what
//! follows from a revocation.

use std::{
    fmt,
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use serde::Serialize;
use waypost_proto::id::{DeviceId, UserId};

use crate::{
    audit::chain::{What, Whose},
    clock::system_now_ms,
    console::{parse_user, print},
    control::{self, Answer, Command, ControlError, Outcome},
    inspect::Moment,
    revocation::{MOST_REVOKED, NoRoom, Revocation, Subject},
    standalone::{self, StandaloneError, by_gateway_or_alone},
    store::{CommitError, OpenError, ReadError, Store},
};

/// Arguments of `waypost revoke`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  waypost revoke --data /var/lib/waypost --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8 --device 2
  waypost revoke --data /var/lib/waypost --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8
  waypost revoke --data /var/lib/waypost --list

What is revoked is the name: no certificate of it is let in again, whenever it was made. A device that comes
back to its holder gets a new number, or the revocation is lifted. What was stored before stays.
When this returns, nothing more of the device is stored, and its open connections are closed. Without a
running gateway it is written to the store, and in force from the next start on. Either way it is in the
audit log.")]
pub struct RevokeArgs {
    /// The gateway's data folder. The gateway may be running
    #[arg(long = "data", value_name = "DIR")]
    data_dir: PathBuf,
    /// The gateway's configuration file, which says where the master key is. Without a running gateway the store is
    /// opened, and not without that key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The user, a UUID in lower case: all devices, also later ones
    #[arg(long, value_name = "UUID", value_parser = parse_user, required_unless_present = "list")]
    user: Option<UserId>,
    /// Only the device of this number
    #[arg(long, value_name = "N", requires = "user")]
    device: Option<u32>,
    /// Serve again whom an earlier call of the same --user and --device has revoked
    #[arg(long, requires = "user")]
    lift: bool,
    /// List what is revoked instead
    #[arg(long, conflicts_with_all = ["user", "device", "lift"])]
    list: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why nobody was revoked.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum RevokeError {
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The gateway will not.
    #[error("the gateway refuses: {0}")]
    Refused(String),
    /// The output is closed.
    #[error("cannot write the report: {0}")]
    Output(#[from] io::Error),
}

/// What was done, for people and programs.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    of: Named,
    /// None while it is not revoked.
    revoked_since_ms: Option<u64>,
    before_ms: Option<u64>,
    connections_ended: usize,
    /// Whether it is in force already: a gateway runs.
    is_running: bool,
    #[serde(skip)]
    is_lifted: bool,
}

#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    of: Named,
    revoked_since_ms: u64,
}

#[derive(Serialize)]
struct List {
    revocations: Vec<Listed>,
}

#[derive(Serialize)]
struct Named {
    user: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<u32>,
    #[serde(skip)]
    subject: Subject,
}

/// Revokes, or lifts a revocation, or lists them, and says so.
///
/// # Errors
/// When the gateway or the store cannot do it, or the output is closed.
pub fn run(args: &RevokeArgs, out: &mut impl Write) -> Result<(), RevokeError> {
    let RevokeArgs { data_dir, json, .. } = args;
    let subject = args.user.map(|user| match args.device {
        None => Subject::User(user),
        Some(device) => Subject::Device(DeviceId { user, device }),
    });
    let Some(subject) = subject else {
        let revocations = Store::open_without_keys(data_dir)?.load_revocations()?;
        return Ok(print(&List::new(&revocations), *json, out)?);
    };
    let (outcome, is_running) = carry_out(args, subject)?;
    let report = Report {
        of: subject.into(),
        revoked_since_ms: outcome.now_ms,
        before_ms: outcome.before_ms,
        connections_ended: outcome.ended,
        is_running,
        is_lifted: args.lift,
    };
    Ok(print(&report, *json, out)?)
}

/// Asks the gateway, or writes to its store if there is none. Says which.
fn carry_out(args: &RevokeArgs, subject: Subject) -> Result<(Outcome, bool), RevokeError> {
    let command = match args.lift {
        false => Command::Revoke(subject.into()),
        true => Command::Lift(subject.into()),
    };
    by_gateway_or_alone(
        || match control::ask(&args.data_dir, &command)? {
            None => Ok(None),
            Some(Answer::Done(outcome)) => Ok(Some(outcome)),
            Some(Answer::Refused(reason)) => Err(RevokeError::Refused(reason)),
            Some(other) => Err(RevokeError::Refused(format!("it answers {other:?}"))),
        },
        || write(args, subject),
        |error| matches!(error, RevokeError::Standalone(error) if error.is_locked()),
    )
}

/// Does what the committer would, in a store that nobody else has open.
fn write(args: &RevokeArgs, subject: Subject) -> Result<Outcome, RevokeError> {
    let RevokeArgs {
        data_dir,
        config,
        lift: is_lifted,
        ..
    } = args;
    let is_lifted = *is_lifted;
    let now_ms = system_now_ms();
    let store = standalone::open_store(data_dir, config.as_deref(), now_ms)?;
    let kept = store.load_revocations()?;
    let before_ms = kept
        .iter()
        .find(|kept| kept.subject == subject)
        .map(|kept| kept.since_ms);
    if before_ms.is_none() == is_lifted {
        return Ok(Outcome {
            before_ms,
            now_ms: before_ms,
            ended: 0,
        });
    }
    if !is_lifted && MOST_REVOKED <= kept.len() {
        return Err(NoRoom.into());
    }
    let recovered = store.recovered()?;
    let what = match is_lifted {
        false => What::Revoked,
        true => What::RevocationLifted,
    };
    standalone::record(data_dir, what, Whose::of_subject(subject), now_ms)?;
    let now_ms = (!is_lifted).then_some(now_ms);
    let mut batch = store.batch();
    batch.put_position(recovered.position + 1);
    batch.put_revocation(subject, now_ms);
    store.commit(batch)?;
    Ok(Outcome {
        before_ms,
        now_ms,
        ended: 0,
    })
}

impl From<Subject> for Named {
    fn from(subject: Subject) -> Self {
        let (user, device) = match subject {
            Subject::User(user) => (user, None),
            Subject::Device(DeviceId { user, device }) => (user, Some(device)),
        };
        Self {
            user: user.to_string(),
            device,
            subject,
        }
    }
}

impl List {
    fn new(revocations: &[Revocation]) -> Self {
        let listed = |revocation: &Revocation| Listed {
            of: revocation.subject.into(),
            revoked_since_ms: revocation.since_ms,
        };
        Self {
            revocations: revocations.iter().map(listed).collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = self.of.subject;
        match (self.is_lifted, self.before_ms) {
            (false, None) => {
                writeln!(f, "Revoked {subject}.")?;
            }
            (false, Some(before_ms)) => {
                let since = Moment(before_ms);
                writeln!(f, "Nothing to do: {subject} is revoked since {since}.")?;
            }
            (true, Some(_)) => writeln!(f, "The revocation of {subject} is lifted.")?,
            (true, None) => writeln!(
                f,
                "Nothing to do: {subject} is not revoked. A device may be for its user's sake, and a user's devices each for their own: see --list."
            )?,
        }
        match (self.is_running, self.is_lifted, self.connections_ended) {
            (false, _, _) => writeln!(
                f,
                "No gateway runs on this data folder; the next one goes by it."
            ),
            (true, true, _) => Ok(()),
            (true, false, 1) => writeln!(f, "One open connection was ended."),
            (true, false, ended) => writeln!(f, "{ended} open connections were ended."),
        }
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.revocations.is_empty() {
            return writeln!(f, "Nobody is revoked.");
        }
        self.revocations.iter().try_for_each(|listed| {
            let since = Moment(listed.revoked_since_ms);
            writeln!(f, "{} since {since}", listed.of.subject)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use clap::Parser;
    use prost::Message;
    use tempfile::TempDir;
    use waypost_proto::{batch, ping::Ping};

    use super::*;
    use crate::{
        audit,
        seal::master::{self, SealingConfig},
        store::{Day, PingKey, StoreConfig, record},
    };

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RevokeArgs,
    }

    const USER: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

    fn revoke(folder: &TempDir, options: &[&str]) -> Result<String, String> {
        let data_dir = folder.path().to_str().unwrap();
        let args = Cli::try_parse_from([&["revoke", "--data", data_dir], options].concat())
            .map_err(|error| error.to_string())?
            .args;
        let mut out = Vec::new();
        run(&args, &mut out).map_err(|error| error.to_string())?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn without_a_gateway_the_store_itself_is_written_and_no_ping_goes() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            revoke(&folder, &["--user", USER])
                .unwrap_err()
                .contains("there is no store"),
            "none is made"
        );
        let long_ago_ms = 1_000_000_000_000;
        let forever = StoreConfig {
            retention: Duration::MAX,
            ..StoreConfig::default()
        };
        let store = Store::open(folder.path(), &forever, long_ago_ms).unwrap();
        let days = store.days();
        drop(store);

        let of_device = ["--user", USER, "--device", "2"];
        let said = revoke(&folder, &of_device).unwrap();
        assert!(said.starts_with(&format!(
            "Revoked device 2 of user {USER}.\nNo gateway runs"
        )));
        let said = revoke(&folder, &of_device).unwrap();
        assert!(said.starts_with("Nothing to do"), "{said}");
        let said = revoke(&folder, &["--user", USER, "--json"]).unwrap();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(
            (
                &said["user"],
                &said["is_running"],
                said["revoked_since_ms"].is_u64()
            ),
            (&USER.into(), &false.into(), true)
        );
        assert!(said.get("device").is_none());

        let listed = revoke(&folder, &["--list"]).unwrap();
        assert_eq!(listed.lines().count(), 2, "{listed}");
        assert!(
            listed.starts_with(&format!("user {USER} since ")),
            "{listed}"
        );
        let lift = [&of_device[..], &["--lift"]].concat();
        assert!(
            revoke(&folder, &lift)
                .unwrap()
                .starts_with("The revocation of device 2")
        );
        assert!(revoke(&folder, &lift).unwrap().starts_with("Nothing to do"));
        let listed: serde_json::Value =
            serde_json::from_str(&revoke(&folder, &["--list", "--json"]).unwrap()).unwrap();
        assert_eq!(listed["revocations"].as_array().unwrap().len(), 1);

        let store = Store::open_read_only(folder.path()).unwrap();
        assert_eq!(
            store.days()[..days.len()],
            days,
            "days are the gateway's to drop"
        );
        assert_eq!(store.load_devices().unwrap().1.position, 3, "a commit each");

        let log = folder.path().join(audit::FILE_NAME);
        let held = audit::read(&log, |_| ()).unwrap();
        assert!(matches!(held, audit::Read::Whole { .. }), "{held:?}");
        let log = fs::read_to_string(log).unwrap();
        let deeds = ["\"revoked\"", "\"revocation_lifted\""].map(|what| log.matches(what).count());
        assert_eq!(deeds, [2, 1], "what was so already is no deed:\n{log}");
    }

    #[test]
    fn a_store_whose_master_key_is_elsewhere_is_opened_with_the_configuration_that_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("waypost.toml");
        fs::write(
            &file,
            "[store.sealing]\nmaster_key_file = \"elsewhere.key\"\n",
        )
        .unwrap();
        master::make_file(&folder.path().join("elsewhere.key")).unwrap();
        let sealing = SealingConfig {
            master_key_file: Some("elsewhere.key".into()),
            ..SealingConfig::default()
        };
        let config = StoreConfig {
            sealing,
            ..StoreConfig::default()
        };
        let now_ms = system_now_ms();
        let store = Store::open(folder.path(), &config, now_ms).unwrap();
        let key = PingKey {
            device: DeviceId {
                user: UserId([1; 16]),
                device: 1,
            },
            epoch: 1,
            first_seq: 1,
        };
        let columns = batch::encode(1, &[Ping::at(1, now_ms, 0, 0)]).encode_to_vec();
        let mut batch = store.batch();
        let row = record::encode_pings(now_ms, 1, &columns);
        batch.put_pings(Day::of_ms(now_ms), &key, &row);
        store.commit(batch).unwrap();
        drop(store);

        let error = revoke(&folder, &["--user", USER]).unwrap_err();
        assert!(error.contains("master key"), "{error}");
        let file = file.to_str().unwrap();
        let said = revoke(&folder, &["--user", USER, "--config", file]).unwrap();
        assert!(said.starts_with("Revoked"), "{said}");
    }

    #[test]
    fn a_command_that_means_nothing_is_told() {
        let folder = tempfile::tempdir().unwrap();
        for (options, told) in [
            (&["--device", "2"][..], "--user"),
            (&[], "--user"),
            (&["--user", USER, "--list"], "--list"),
            (&["--user", "somebody"], "lower case"),
        ] {
            let error = revoke(&folder, options).unwrap_err();
            assert!(error.contains(told), "{options:?}: {error}");
        }
    }
}
