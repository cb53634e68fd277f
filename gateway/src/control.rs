//! The operator's door to a running gateway: a socket in the data folder, one line of JSON in and one out.
//!
//! Knows what is said there, and how a command says it. What the gateway does on it is in [`Door`]. Must not know
//! what a command prints.
//!
//! Two commands take longer than a line. To `erase` come lines as long as it lasts, each with how far it is; the last
//! one has its end, or is a refusal. To `export` comes the line `follows`, then the text in `chunks`, and then one more
//! line: `whole`, with the number of bytes, or a refusal. What ends before such a last line was cut off, and whoever
//! reads says so.
//!
//! Whoever may open the socket may do all that can be said there: it is for the user that the gateway runs as. The
//! admin port asks nobody who they are, so it is no place for this.

mod call;
mod chunks;
mod door;
mod long;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use waypost_proto::id::{DeviceId, UserId};

use crate::{erase::Erasure, export::Format, revocation::Subject, store::Checkpoint};

pub use self::{
    call::Call,
    door::{Door, DoorParts},
};

/// What the operator can have a gateway do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Serve somebody no more.
    Revoke(Target),
    /// Serve them again.
    Lift(Target),
    /// Give everything that is held on a user.
    Export(Wanted),
    /// Erase everything that is held on a user, for ever.
    Erase(Holder),
    /// Make a checkpoint of the store, for a backup to copy. Whoever asks holds [`crate::store::BackupLock`].
    Checkpoint,
}

/// Whose data a command is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// The user, a UUID.
    user: String,
}

/// What is to be given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The user, a UUID.
    user: String,
    /// How it is to be written.
    format: Format,
}

/// Whom a command is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The user, a UUID.
    user: String,
    /// One device; all of the user's if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device: Option<u32>,
}

/// What a gateway says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is on disk and in force.
    Done(Outcome),
    /// The checkpoint is in its place.
    Checkpointed(Checkpoint),
    /// It is not, for this reason.
    Refused(String),
    /// How far an erasure is. What it is about is fenced off, on disk.
    Erasure(Erasure),
    /// What was wanted comes in chunks behind this line.
    Follows,
    /// It has come, and this is all.
    Whole {
        /// How much it was.
        bytes: u64,
    },
}

/// What has become of a revocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Since when it was in force before, in milliseconds since 1970-01-01 UTC; none if it was not.
    pub before_ms: Option<u64>,
    /// Since when it is in force now; none if it is not.
    pub now_ms: Option<u64>,
    /// How many connections were ended.
    pub ended: usize,
}

/// Why a gateway could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket is there and cannot be used.
    #[error("cannot reach the gateway at {path}: {source}; use the user that the gateway runs as")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It did not answer, or not in time.
    #[error(
        "the gateway at {path} did not answer: {source}; whether it has done it is not known, and asking again does no harm"
    )]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It ended what it was giving before the end.
    #[error(
        "cut off: {reason}. What has come is not everything that is held, so do not hand it on; try again"
    )]
    CutOff {
        /// Why, as far as this side knows.
        reason: String,
    },
    /// What it gives cannot be written.
    #[error("cannot write what the gateway gives: {0}")]
    Output(io::Error),
    /// The socket could not be made.
    #[error(
        "cannot make the socket for commands, {path}: {source}; the data folder must be one that this user may write to, and its path no longer than 90 bytes"
    )]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl From<Subject> for Target {
    fn from(subject: Subject) -> Self {
        let (user, device) = match subject {
            Subject::User(user) => (user, None),
            Subject::Device(DeviceId { user, device }) => (user, Some(device)),
        };
        Self {
            user: user.to_string(),
            device,
        }
    }
}

impl Target {
    /// Whom it means; none if the user is not one.
    #[must_use]
    pub fn subject(&self) -> Option<Subject> {
        let user = UserId::parse(&self.user)?;
        Some(match self.device {
            None => Subject::User(user),
            Some(device) => Subject::Device(DeviceId { user, device }),
        })
    }
}

impl Command {
    /// Wants everything that is held on a user.
    #[must_use]
    pub fn export(user: UserId, format: Format) -> Self {
        let user = user.to_string();
        Self::Export(Wanted { user, format })
    }

    /// Wants it erased.
    #[must_use]
    pub fn erase(user: UserId) -> Self {
        let user = user.to_string();
        Self::Erase(Holder { user })
    }
}

/// Has the gateway of a data folder do something that is answered by one line, and waits for that. None if no gateway
/// runs there.
///
/// # Errors
/// When one does and cannot be asked, or gives no answer.
pub fn ask(data_dir: &Path, command: &Command) -> Result<Option<Answer>, ControlError> {
    match Call::begin(data_dir, command)? {
        Some(mut call) => call.answer().map(Some),
        None => Ok(None),
    }
}

/// The socket's name in the data folder.
const SOCKET: &str = "control.sock";
/// The longest line, either way; what is longer is cut off, and is no JSON then.
const LINE_BYTES: u64 = 4_096;
/// How long a caller waits for a line or a chunk: a commit, on a disk that is slow today.
const PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_read_as_it_was_written_and_nothing_else_is_one() {
        let user = UserId([7; 16]);
        for subject in [
            Subject::User(user),
            Subject::Device(DeviceId { user, device: 3 }),
        ] {
            let command = Command::Revoke(subject.into());
            let line = serde_json::to_string(&command).unwrap();
            let Command::Revoke(target) = serde_json::from_str(&line).unwrap() else {
                panic!("{line} is another command");
            };
            assert_eq!(target.subject(), Some(subject));
        }
        let no_user = r#"{"revoke":{"user":"everybody"}}"#;
        let Command::Revoke(target) = serde_json::from_str(no_user).unwrap() else {
            panic!("another command");
        };
        assert_eq!(target.subject(), None);
        for wrong in [
            r#"{"revoke":{"user":"x","devices":[1]}}"#,
            r#"{"revoke":{"device":1}}"#,
            r#"{"erase":{"user":"x","device":1}}"#,
            r#"{"export":{"user":"x"}}"#,
            r#"{"export":{"user":"x","format":"csv"}}"#,
        ] {
            serde_json::from_str::<Command>(wrong).unwrap_err();
        }
    }

    #[test]
    fn nobody_listens_where_there_is_no_socket_or_one_that_was_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let command = Command::Lift(Subject::User(UserId([1; 16])).into());
        assert_eq!(ask(folder.path(), &command).unwrap(), None);
        let left_behind = std::os::unix::net::UnixListener::bind(folder.path().join(SOCKET));
        drop(left_behind.unwrap());
        assert_eq!(ask(folder.path(), &command).unwrap(), None);
    }
}
