//! What a watch gives its consumer.
//!
//! Knows the events and how they are read from the wire. Must not know in which order they may come.

use std::time::Duration;

use waypost_proto::{
    id::UserId,
    v1::{self, State, coverage, deadline, reset},
};

use crate::{CheckerError, Resume, Violation};

/// One step of a watch. Times are as in `freshness.proto`: milliseconds since 1970-01-01 UTC.
#[derive(Debug)]
pub enum Event {
    /// A stream has begun: changes after `position` follow, or a snapshot when it is 0.
    Connected {
        /// The commit it goes on after.
        position: u64,
    },
    /// Forget all that came before; a snapshot follows.
    Reset {
        /// What the gateway says; unspecified when a snapshot was interrupted and begins again.
        reason: reset::Reason,
    },
    /// A user's freshness.
    Entry {
        /// What is known now.
        entry: Entry,
        /// Part of a snapshot: what was known already, not a change.
        is_snapshot: bool,
    },
    /// Everybody who is known has come; what follows is change.
    SnapshotEnd {
        /// How many entries the snapshot held, all of which came.
        count: u64,
        /// The state was of this commit.
        position: u64,
        /// Store this with the effects of all that came before.
        resume: Resume,
    },
    /// "Nobody heard from U since T" may be said of a T up to `resolved_ms`, and of no later one.
    Progress {
        /// The moment up to which every contact has been given out; 0 while a stream catches up, when
        /// nothing new may be said.
        resolved_ms: u64,
        /// No entry at or below this commit will come later.
        position: u64,
        /// How far `resolved_ms` was behind the gateway's clock.
        lag_ms: u64,
        /// Store this with the effects of all that came before.
        resume: Resume,
    },
    /// The gateway was not able to hear, or is not. One that lasts comes again when it has ended.
    Coverage(Gap),
    /// A registered deadline passed, or the user came back. In a snapshot, the LATE that holds.
    Deadline(Deadline),
    /// A holder has paused, resumed, erased everything, or withdrawn this checker's grant.
    Transition(Transition),
    /// For some time nothing was learned of anybody: what is after `resolved_ms` is unknown.
    Stale {
        /// The moment up to which all is known.
        resolved_ms: u64,
    },
    /// The stream moves on again after it was stale.
    Live {
        /// The moment up to which all is known.
        resolved_ms: u64,
    },
    /// The stream has ended; another is begun by itself, where this one ended.
    Disconnected {
        /// Why.
        why: Interruption,
        /// When the next is tried.
        retry_in: Duration,
    },
}

/// How fresh one user is: the newest over all of the user's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The user.
    pub user: UserId,
    /// What is known of the user. Silence means something only if this is [`State::Active`].
    pub state: State,
    /// When the gateway last heard from the user at all.
    pub last_contact_ms: u64,
    /// The newest sample, by the device's clock; 0 if none.
    pub last_sample_ms: u64,
    /// The newest sample of a position that was really fixed; 0 if none.
    pub last_fix_ms: u64,
    /// The time stamp of the commit that has it on disk.
    pub durable_ms: u64,
    /// The commit that changed it last.
    pub position: u64,
    /// How many earlier values this stream did not carry because newer ones overtook them.
    pub coalesced: u32,
}

/// A span in which the gateway was not able to hear: silence in it says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// When it began.
    pub from_ms: u64,
    /// When it ended; none while it lasts.
    pub until_ms: Option<u64>,
    /// What was the matter.
    pub reason: coverage::Reason,
    /// The commit that said so: of its begin, or of its end.
    pub position: u64,
}

/// A deadline's event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// Whose deadline.
    pub user: UserId,
    /// Late, or recovered.
    pub kind: deadline::Kind,
    /// When the gateway said so.
    pub at_ms: u64,
    /// The commit that has it.
    pub position: u64,
    /// The user's last contact then; 0 if there never was one.
    pub last_contact_ms: u64,
    /// By when the user should have been heard.
    pub due_ms: u64,
}

/// A holder has paused sharing, resumed, erased everything, or withdrawn this checker's grant. The user's entry says what
/// holds now; this is each change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Whose holder.
    pub user: UserId,
    /// What holds since: [`State::Paused`], [`State::Active`], [`State::Erased`] or [`State::Withdrawn`].
    pub state: State,
    /// When the commit was made that says so.
    pub at_ms: u64,
    /// That commit.
    pub position: u64,
    /// Tells apart the transitions of one commit, which come in their order.
    pub number: u32,
}

/// Why a stream ended that will be begun again.
#[derive(Debug, thiserror::Error)]
pub enum Interruption {
    /// There is no connection.
    #[error(transparent)]
    Unreachable(CheckerError),
    /// The gateway said why; one that stops says so with UNAVAILABLE.
    #[error("{0}")]
    Status(String),
    /// It did not say why.
    #[error("the gateway ended it")]
    Ended,
    /// The call was not answered, or the stream did not move.
    #[error("no progress for {0:?}")]
    Motionless(Duration),
    /// The stream broke the contract, so it is read from the start again.
    #[error("the gateway broke the order of its stream: {0}")]
    Violation(#[from] Violation),
}

/// The user that 16 bytes name.
pub(crate) fn user_of(bytes: &[u8]) -> Result<UserId, Violation> {
    <[u8; 16]>::try_from(bytes)
        .map(UserId)
        .map_err(|_| Violation::User { bytes: bytes.len() })
}

impl TryFrom<v1::Entry> for Entry {
    type Error = Violation;

    fn try_from(entry: v1::Entry) -> Result<Self, Violation> {
        Ok(Self {
            user: user_of(&entry.user)?,
            state: entry.state(),
            last_contact_ms: entry.last_contact_ms,
            last_sample_ms: entry.last_sample_ms,
            last_fix_ms: entry.last_fix_ms,
            durable_ms: entry.durable_ms,
            position: entry.position,
            coalesced: entry.coalesced,
        })
    }
}

impl From<v1::Coverage> for Gap {
    fn from(span: v1::Coverage) -> Self {
        Self {
            from_ms: span.from_ms,
            until_ms: (span.until_ms != 0).then_some(span.until_ms),
            reason: span.reason(),
            position: span.position,
        }
    }
}

impl TryFrom<v1::Transition> for Transition {
    type Error = Violation;

    fn try_from(transition: v1::Transition) -> Result<Self, Violation> {
        Ok(Self {
            user: user_of(&transition.user)?,
            state: transition.state(),
            at_ms: transition.at_ms,
            position: transition.position,
            number: transition.number,
        })
    }
}

impl TryFrom<v1::Deadline> for Deadline {
    type Error = Violation;

    fn try_from(deadline: v1::Deadline) -> Result<Self, Violation> {
        Ok(Self {
            user: user_of(&deadline.user)?,
            kind: deadline.kind(),
            at_ms: deadline.at_ms,
            position: deadline.position,
            last_contact_ms: deadline.last_contact_ms,
            due_ms: deadline.due_ms,
        })
    }
}
