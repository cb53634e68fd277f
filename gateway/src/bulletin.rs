//! The bulletin: what checkers are told beside the freshness of users. When the gateway could not hear, who
//! is late by their deadlines, and up to when holders paused and resumed.
//!
//! Written by the committer when a commit is durable and before its position is published, read by the feed: when
//! a position is published, everything up to it is here. Knows what is true now; events of deadlines and transitions
//! are read from the store, where they are kept. Must not know streams or where commits come from.

use std::collections::BTreeMap;

use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use waypost_proto::id::UserId;

use crate::{
    coverage::{self, Coverage, Span},
    deadlines::{self, Checker, Event, Kind, Late, Registration},
    sharing::Transition,
};

/// What is true now. Nothing is, of a store that is new.
#[derive(Debug, Default)]
pub struct Bulletin {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    coverage: Coverage,
    checkers: FxHashMap<Checker, Notices>,
    /// The newest transition.
    newest_transition: u64,
    /// The newest transition that is no longer kept.
    forgotten_transition: u64,
    /// The newest position of a store when it was opened: what it holds for a checker is not looked up before the
    /// checker asks.
    restored: u64,
}

/// What concerns one checker.
#[derive(Clone, Debug, Default)]
struct Notices {
    /// The newest event.
    newest: u64,
    /// The newest event that is no longer kept.
    forgotten: u64,
    late: BTreeMap<UserId, Late>,
}

/// What a commit says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Spans in which the gateway could not hear.
    pub coverage: Option<coverage::Change>,
    /// Deadlines and their events.
    pub deadlines: Vec<deadlines::Change>,
    /// Holders who paused or resumed, in that order.
    pub transitions: Vec<Transition>,
}

impl News {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.coverage.is_none() && self.deadlines.is_empty() && self.transitions.is_empty()
    }
}

impl Bulletin {
    /// What a store says: its spans, its deadlines, the newest event of each checker and the newest transition that it
    /// no longer keeps, and its position.
    #[must_use]
    pub fn restore<'a>(
        coverage: Coverage,
        deadlines: impl IntoIterator<Item = &'a Registration>,
        forgotten: impl IntoIterator<Item = (Checker, u64)>,
        forgotten_transition: u64,
        position: u64,
    ) -> Self {
        let mut state = State {
            coverage,
            forgotten_transition,
            restored: position,
            ..State::default()
        };
        for registration in deadlines {
            if let Some(late) = registration.late {
                let notices = state.of(registration.checker);
                notices.late.insert(registration.user, late);
            }
        }
        for (checker, forgotten) in forgotten {
            state.of(checker).forgotten = forgotten;
        }
        Self {
            state: RwLock::new(state),
        }
    }

    /// Takes what is durable.
    pub fn publish(&self, news: &News) {
        let mut state = self.state.write();
        if let Some(transition) = news.transitions.last() {
            state.newest_transition = transition.position;
        }
        if let Some(change) = &news.coverage {
            state.coverage.apply(change);
        }
        for change in &news.deadlines {
            match *change {
                deadlines::Change::Set(Registration {
                    checker,
                    user,
                    late,
                    ..
                }) => {
                    let late_users = &mut state.of(checker).late;
                    match late {
                        Some(late) => late_users.insert(user, late),
                        None => late_users.remove(&user),
                    };
                }
                deadlines::Change::Removed(checker, user) => {
                    state.of(checker).late.remove(&user);
                }
                deadlines::Change::Event(event) => {
                    let notices = state.of(event.checker);
                    notices.newest = notices.newest.max(event.position);
                }
            }
        }
    }

    /// A checker's events up to a position are about to be deleted.
    pub fn forget(&self, checker: Checker, position: u64) {
        let mut state = self.state.write();
        let notices = state.of(checker);
        notices.forgotten = notices.forgotten.max(position);
    }

    /// Transitions up to a position are about to be deleted.
    pub fn forget_transitions(&self, position: u64) {
        let mut state = self.state.write();
        state.forgotten_transition = state.forgotten_transition.max(position);
    }

    /// The newest transition, or a position beyond it.
    #[must_use]
    pub fn newest_transition(&self) -> u64 {
        let state = self.state.read();
        state.newest_transition.max(state.restored)
    }

    /// Looks at the spans.
    pub fn coverage<T>(&self, look: impl FnOnce(&Coverage) -> T) -> T {
        look(&self.state.read().coverage)
    }

    /// The newest event of a checker, or one beyond it.
    #[must_use]
    pub fn newest_event(&self, checker: Checker) -> u64 {
        let state = self.state.read();
        let notices = state.checkers.get(&checker);
        notices
            .map_or(0, |notices| notices.newest)
            .max(state.restored)
    }

    /// The newest position at or below which something that a checker was to be told is no longer kept.
    #[must_use]
    pub fn forgotten(&self, checker: Checker) -> u64 {
        let state = self.state.read();
        let notices = state.checkers.get(&checker);
        notices
            .map_or(0, |notices| notices.forgotten)
            .max(state.forgotten_transition)
            .max(state.coverage.forgotten().position)
    }

    /// What a checker that begins now has to know: who of those that it `wants` is late, as the events that said
    /// so, by position; all spans; and the position that both are the state of, if it has been published by then.
    pub fn now(&self, checker: Checker, wants: impl Fn(&UserId) -> bool) -> Now {
        let state = self.state.read();
        let notices = state.checkers.get(&checker);
        let late = notices.into_iter().flat_map(|notices| &notices.late);
        let mut late: Vec<_> = late
            .filter(|(user, _)| wants(user))
            .map(|(&user, late)| Event {
                checker,
                user,
                kind: Kind::Late,
                position: late.position,
                at_ms: late.at_ms,
                last_contact_ms: late.last_contact_ms,
                due_ms: late.due_ms,
            })
            .collect();
        late.sort_by_key(|event| (event.position, event.user));
        let newest = notices.map_or(0, |notices| notices.newest);
        Now {
            late,
            spans: state.coverage.said_between(0, u64::MAX),
            position: newest
                .max(state.newest_transition)
                .max(state.coverage.position())
                .max(state.restored),
        }
    }
}

/// What is true at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Now {
    /// Who is late, as the events that said so.
    pub late: Vec<Event>,
    /// When the gateway could not hear.
    pub spans: Vec<Span>,
    /// The newest position of all of it.
    pub position: u64,
}

impl State {
    fn of(&mut self, checker: Checker) -> &mut Notices {
        self.checkers.entry(checker).or_default()
    }
}
