//! What a stream tells beside entries: when the gateway could not hear, who is late, and what holders have turned.
//!
//! Knows how far a stream has told of each, and how they become messages. Must not know entries or when a stream
//! announces a position; it is asked to tell up to one before that. Nor what becomes of what a holder has turned: that
//! depends on what may be told of the user by now, and so its parent decides.
//!
//! Spans and who is late now are on the [`Bulletin`]; events of deadlines and transitions are read from the store, and
//! only when there is one that the stream has not told. So a stream with nothing to tell costs a look at three numbers.
//!
//! # Bounds
//!
//! A beginning stream holds the spans and the late users of its checker until it has told them, at most one event a
//! deadline. After that nothing is held: a chunk of [`EVENTS_PER_CHUNK`] is read when there is room to send it.

use std::{
    sync::{Arc, Weak},
    vec,
};

use bytes::Bytes;
use tonic::Status;
use tracing::error;
use waypost_proto::{
    id::UserId,
    v1::{self, coverage, deadline, watch_event::Kind},
};

use super::wire;
use crate::{
    bulletin::Bulletin,
    coverage::{Coverage, Reason, Span},
    deadlines::{self, Checker, Event, LONGEST_MS, Registration, Setting},
    sharing::Transition,
    store::{ReadError, Store},
};

/// Some 40 KB.
const EVENTS_PER_CHUNK: usize = 512;

/// Deadlines in one call.
const MAX_DEADLINES: usize = 1_000;

/// Where notices are read.
#[derive(Clone, Debug)]
pub(super) struct Notices {
    bulletin: Arc<Bulletin>,
    /// A stream that outlives the gateway, because it is read slowly, must not keep the store open.
    store: Weak<Store>,
}

/// Why a stream cannot be told what it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoticeError {
    /// It was read so slowly that what it should be told is no longer kept.
    #[error("what this stream had yet to tell is no longer kept")]
    Gone,
    /// The gateway has stopped.
    #[error("the gateway is shutting down")]
    Closed,
    /// The store cannot be read.
    #[error(transparent)]
    Unreadable(#[from] ReadError),
}

impl From<NoticeError> for Status {
    fn from(error: NoticeError) -> Self {
        match error {
            NoticeError::Gone => Self::aborted(format!("{error}: come back with your token")),
            NoticeError::Closed => Self::unavailable(error.to_string()),
            NoticeError::Unreadable(unreadable) => {
                error!(%unreadable, "events for checkers could not be read");
                Self::internal("the gateway cannot read its store")
            }
        }
    }
}

/// How far a stream has told.
#[derive(Debug)]
pub(super) struct Told {
    checker: Checker,
    /// What was true when the stream began and has not been told, and the position that it was the state of.
    beginning: vec::IntoIter<Kind>,
    beginning_position: u64,
    spans: u64,
    transitions: u64,
    /// Those that were read last.
    turns: Vec<Transition>,
    events: u64,
}

impl Told {
    /// What holders have turned, as far as it was reached by [`Notices::tell`] and not taken before.
    pub(super) fn take_turns(&mut self) -> Vec<Transition> {
        std::mem::take(&mut self.turns)
    }
}

impl Notices {
    pub(super) fn new(bulletin: Arc<Bulletin>, store: Weak<Store>) -> Self {
        Self { bulletin, store }
    }

    /// The newest position at or below which something that a checker was to be told is no longer kept.
    pub(super) fn forgotten(&self, checker: Checker) -> u64 {
        self.bulletin.forgotten(checker)
    }

    /// A stream that has told everything up to a position.
    pub(super) fn after(checker: Checker, position: u64) -> Told {
        Told {
            checker,
            beginning: Vec::new().into_iter(),
            beginning_position: 0,
            spans: position,
            transitions: position,
            turns: Vec::new(),
            events: position,
        }
    }

    /// A stream that has told nothing, and the position that must be published before it tells.
    pub(super) fn told_from_start(
        &self,
        checker: Checker,
        wants: impl Fn(&UserId) -> bool,
    ) -> (Told, u64) {
        let now = self.bulletin.now(checker, wants);
        let spans = now.spans.iter().map(coverage_event);
        let late = now.late.iter().map(deadline_event);
        let beginning: Vec<_> = spans.chain(late).collect();
        let told = Told {
            checker,
            beginning: beginning.into_iter(),
            beginning_position: now.position,
            spans: now.position,
            transitions: now.position,
            turns: Vec::new(),
            events: now.position,
        };
        (told, now.position)
    }

    /// Appends to `events` what is to be told up to a position of the users that are wanted, or the next part of it. True if
    /// that was all. What holders have turned is to be taken from `told` each time.
    pub(super) async fn tell(
        &self,
        told: &mut Told,
        upto: u64,
        wants: impl Fn(&UserId) -> bool,
        events: &mut Vec<Kind>,
    ) -> Result<bool, NoticeError> {
        if upto < told.beginning_position {
            return Ok(true);
        }
        events.extend(told.beginning.by_ref().take(EVENTS_PER_CHUNK));
        if !told.beginning.as_slice().is_empty() {
            return Ok(false);
        }
        if told.spans < upto {
            let spans = self.bulletin.coverage(|coverage| {
                let is_news = told.spans < coverage.position();
                is_news.then(|| coverage.said_between(told.spans, upto))
            });
            events.extend(spans.iter().flatten().map(coverage_event));
            told.spans = upto;
        }
        // Also those that are ahead of the entries. A stream that is brought level by a sweep, or has just handed out its
        // snapshot, leaves out whoever is not in a selected state any more, and the position at which that happened may be
        // beyond what it announces next: without the transition the user would seem to be silent in the old state.
        let ahead = self.bulletin.newest_transition().max(upto);
        if told.transitions < ahead && !self.reach_transitions(told, ahead).await? {
            return Ok(false);
        }
        if upto <= told.events || self.bulletin.newest_event(told.checker) <= told.events {
            told.events = told.events.max(upto);
            return Ok(true);
        }
        let (checker, positions) = (told.checker, told.events + 1..upto + 1);
        let read = self
            .read(move |store| store.events_of(checker, positions, EVENTS_PER_CHUNK))
            .await?;
        // After reading: what was deleted before is told of before it is.
        if told.events < self.forgotten(checker) {
            return Err(NoticeError::Gone);
        }
        let is_all = read.len() < EVENTS_PER_CHUNK;
        told.events = match read.last() {
            Some(last) if !is_all => last.position,
            _ => upto,
        };
        let wanted = read.iter().filter(|event| wants(&event.user));
        events.extend(wanted.map(deadline_event));
        Ok(is_all)
    }

    async fn reach_transitions(&self, told: &mut Told, upto: u64) -> Result<bool, NoticeError> {
        if self.bulletin.newest_transition() <= told.transitions {
            told.transitions = upto;
            return Ok(true);
        }
        let positions = told.transitions + 1..upto + 1;
        let read = self
            .read(move |store| store.transitions(positions, EVENTS_PER_CHUNK))
            .await?;
        // After reading, as below.
        if told.transitions < self.forgotten(told.checker) {
            return Err(NoticeError::Gone);
        }
        let is_all = read.len() < EVENTS_PER_CHUNK;
        told.transitions = match read.last() {
            Some(last) if !is_all => last.position,
            _ => upto,
        };
        told.turns = read;
        Ok(is_all)
    }

    /// A checker's deadlines after a user.
    pub(super) async fn deadlines(
        &self,
        checker: Checker,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<Vec<Registration>, NoticeError> {
        self.read(move |store| store.deadlines_of(checker, after, limit))
            .await
    }

    /// Looks at the spans.
    pub(super) fn coverage<T>(&self, look: impl FnOnce(&Coverage) -> T) -> T {
        self.bulletin.coverage(look)
    }

    /// Reads the store where a disk that hangs keeps nobody else.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, NoticeError> {
        let store = self.store.upgrade().ok_or(NoticeError::Closed)?;
        let read = tokio::task::spawn_blocking(move || read(&store)).await;
        Ok(read.map_err(|_| NoticeError::Closed)??)
    }
}

/// The deadlines that a call sets or removes.
pub(super) fn settings(
    request: &v1::SetDeadlinesRequest,
) -> Result<Vec<(UserId, Option<Setting>)>, Status> {
    let asked = &request.deadlines;
    if MAX_DEADLINES < asked.len() {
        return Err(Status::invalid_argument(format!(
            "{} deadlines are more than the {MAX_DEADLINES} that one call can set",
            asked.len()
        )));
    }
    asked
        .iter()
        .map(|asked| {
            let user = wire::user_id(&asked.user)?;
            if LONGEST_MS < asked.expect_every_ms || LONGEST_MS < asked.grace_ms {
                return Err(Status::invalid_argument(format!(
                    "expect_every_ms {} and grace_ms {} must be at most {LONGEST_MS}, 366 days",
                    asked.expect_every_ms, asked.grace_ms
                )));
            }
            let setting = (asked.expect_every_ms != 0).then_some(Setting {
                expect_every_ms: asked.expect_every_ms,
                grace_ms: asked.grace_ms,
            });
            Ok((user, setting))
        })
        .collect()
}

/// Where a page of ListDeadlines begins, and how long it may be.
pub(super) fn deadlines_page(
    request: &v1::ListDeadlinesRequest,
) -> Result<(Option<UserId>, usize), Status> {
    let limit = match request.page_size as usize {
        0 => MAX_DEADLINES,
        size if size <= MAX_DEADLINES => size,
        size => {
            return Err(Status::invalid_argument(format!(
                "page_size {size} is more than {MAX_DEADLINES}: ask for pages"
            )));
        }
    };
    let token = &request.page_token;
    let after = match <[u8; 16]>::try_from(token.as_ref()) {
        Ok(user) => Some(UserId(user)),
        Err(_) if token.is_empty() => None,
        Err(_) => {
            return Err(Status::invalid_argument(
                "page_token is not one: pass next_page_token of the page before, or none",
            ));
        }
    };
    Ok((after, limit))
}

pub(super) fn deadline_state(registration: &Registration) -> v1::DeadlineState {
    let user = id(&registration.user);
    v1::DeadlineState {
        setting: Some(v1::DeadlineSetting {
            user: user.clone(),
            expect_every_ms: registration.setting.expect_every_ms,
            grace_ms: registration.setting.grace_ms,
        }),
        since_ms: registration.since_ms,
        late: registration.late.map(|late| v1::Deadline {
            user,
            kind: deadline::Kind::Late.into(),
            at_ms: late.at_ms,
            position: late.position,
            last_contact_ms: late.last_contact_ms,
            due_ms: late.due_ms,
        }),
    }
}

pub(super) fn coverage_message(span: &Span) -> v1::Coverage {
    let reason = match span.reason {
        Reason::Down => coverage::Reason::Down,
        Reason::Starting => coverage::Reason::Starting,
        Reason::Overloaded => coverage::Reason::Overloaded,
        Reason::DiskFailed => coverage::Reason::DiskFailed,
        Reason::ClockStepped => coverage::Reason::ClockStepped,
    };
    v1::Coverage {
        from_ms: span.from_ms,
        until_ms: span.until_ms.unwrap_or_default(),
        reason: reason.into(),
        position: span.position,
    }
}

fn coverage_event(span: &Span) -> Kind {
    Kind::Coverage(coverage_message(span))
}

fn deadline_event(event: &Event) -> Kind {
    let kind = match event.kind {
        deadlines::Kind::Late => deadline::Kind::Late,
        deadlines::Kind::Recovered => deadline::Kind::Recovered,
    };
    Kind::Deadline(v1::Deadline {
        user: id(&event.user),
        kind: kind.into(),
        at_ms: event.at_ms,
        position: event.position,
        last_contact_ms: event.last_contact_ms,
        due_ms: event.due_ms,
    })
}

/// The event that tells of a transition to a state.
pub(super) fn transition_event(transition: &Transition, state: v1::State) -> Kind {
    Kind::Transition(v1::Transition {
        user: id(&transition.user),
        state: state.into(),
        at_ms: transition.at_ms,
        position: transition.position,
        number: transition.number,
    })
}

fn id(user: &UserId) -> Bytes {
    Bytes::copy_from_slice(&user.0)
}
