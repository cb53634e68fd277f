//! What an export is made of: a store, as it is at one moment, and what the audit log says of who watched.
//!
//! Knows where things are held. Must not know who gets them, or what the text looks like.

use std::{
    io::{self, Write},
    path::Path,
    time::Duration,
};

use waypost_proto::id::UserId;

use super::{Beside, Exporter, Format, Subject};
use crate::{
    audit,
    inspect::Moment,
    store::{Held, ReadError, Store},
};

/// Where it is read.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// What is held.
    pub store: &'a Store,
    /// The audit log's file, which knows who watched.
    pub audit_log: &'a Path,
    /// How long pings are kept.
    pub retention: Duration,
}

/// Why the text did not come to its end. What was written lacks its last line.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The store could not be read.
    #[error("what is held could not be read: {0}")]
    Read(#[from] ReadError),
    /// The audit log could not be read.
    #[error("the audit log, which knows who watched, could not be read: {0}")]
    Recipients(io::Error),
    /// Whoever should get it takes it no more.
    #[error("it could not be written: {0}")]
    Output(#[from] io::Error),
}

/// Why there is nothing to export.
#[derive(Debug, thiserror::Error)]
pub enum NotHeld {
    /// The store has never heard of the user.
    #[error(
        "nothing is held on user {0}: the store has never heard of the id, so look whether it is right"
    )]
    Unknown(UserId),
    /// Nothing is left, or is about to be.
    #[error(
        "everything that was held on user {user} was erased on {since}; `waypost erase` shows the receipt"
    )]
    Erased {
        /// Who.
        user: UserId,
        /// When nothing more was taken.
        since: String,
    },
    /// It is not known whether there is.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Makes sure that there is something to export.
///
/// # Errors
/// When there is not.
pub fn check_held(store: &Store, user: UserId) -> Result<(), NotHeld> {
    match store.held_of(user)? {
        Held::Something => Ok(()),
        Held::Nothing => Err(NotHeld::Unknown(user)),
        Held::Erased(erasure) => Err(NotHeld::Erased {
            user,
            since: Moment(erasure.fenced_ms).to_string(),
        }),
    }
}

impl Source<'_> {
    /// Writes what is held on a user, as it was when this was called.
    ///
    /// # Errors
    /// When that cannot be read or written.
    pub fn write(
        &self,
        user: UserId,
        format: Format,
        now_ms: u64,
        out: impl Write,
    ) -> Result<(), SourceError> {
        let view = self.store.view_of(user);
        let subject = Subject {
            user,
            at_ms: now_ms,
            position: view.position()?,
            sharing: view.sharing()?,
            retention_days: self.retention.as_secs().div_ceil(24 * 60 * 60),
            recipients: audit::recipients(self.audit_log, user).map_err(SourceError::Recipients)?,
            decisions: view.decisions()?,
            checkers: self.store.load_checkers()?,
        };
        let beside = Beside {
            devices: view.devices()?,
            transitions: view.transitions()?,
            deadlines: view.deadlines()?,
            events: view.events()?,
        };
        let mut exporter = Exporter::begin(out, format, &subject, &beside)?;
        for row in view.rows() {
            let row = row?;
            for ping in &row.record.pings {
                exporter.ping(row.key.device, row.key.epoch, row.record.receive_ms, ping)?;
            }
        }
        exporter.end()?;
        Ok(())
    }
}
