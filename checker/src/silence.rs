//! Who has been silent for how long, as far as a stream tells.
//!
//! Takes [`Event`]s, gives [`Change`]s. Must not know connections, clocks or what is done about a silence.
//!
//! Silence is counted in time that the gateway could hear, and only up to the moment that the stream is
//! complete for: never because nothing came.
//!
//! # Bounds
//!
//! Some 100 bytes for each user of the selection, and [`MAX_GAPS`] gaps. Those that ended before anybody who
//! is waited for was last heard are forgotten; should that not be enough, the two oldest that have ended become
//! one, so that a silence across them is called later, and never for a time in which nobody could be heard.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use waypost_proto::{
    id::UserId,
    v1::{State, coverage},
};

use crate::{Entry, Event, Gap};

/// Gaps that are kept.
const MAX_GAPS: usize = 4_096;

/// What changed for whoever waits for silences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A user has been silent for too long. Said once for each silence.
    Silent {
        /// Who.
        user: UserId,
        /// Since when.
        last_contact_ms: u64,
        /// Nothing was heard up to here.
        resolved_ms: u64,
    },
    /// A user who was called silent has been heard again.
    HeardAgain {
        /// Who.
        user: UserId,
        /// When.
        last_contact_ms: u64,
    },
    /// The silence of a user who was called silent means nothing any more.
    Closed {
        /// Who.
        user: UserId,
        /// Since when the user was called silent.
        last_contact_ms: u64,
        /// Paused, erased or withdrawn; none when the store knows nothing of the user after a reset.
        state: Option<State>,
    },
}

/// Tells who has been silent for longer than a time.
#[derive(Clone, Debug)]
pub struct Silences {
    silent_after_ms: u64,
    /// When each user was last heard, of those whose silence means something.
    contacts: HashMap<UserId, u64>,
    /// Those of them who have not been called silent, longest silence first.
    waiting: BTreeSet<(u64, UserId)>,
    /// Those who have, and when they had last been heard then. What was said outlives a reset.
    called: HashMap<UserId, u64>,
    /// When nobody could be heard, by begin and reason. They may overlap.
    gaps: BTreeMap<(u64, coverage::Reason), Gap>,
    resolved_ms: u64,
}

impl Silences {
    /// Knows nobody yet, and calls silent who has not been heard for this long.
    #[must_use]
    pub fn new(silent_after_ms: u64) -> Self {
        Self {
            silent_after_ms,
            contacts: HashMap::new(),
            waiting: BTreeSet::new(),
            called: HashMap::new(),
            gaps: BTreeMap::new(),
            resolved_ms: 0,
        }
    }

    /// Puts back what [`Self::known`] told, for a watch that resumes. The gaps go in as their events.
    pub fn remember(&mut self, user: UserId, last_contact_ms: u64, is_called_silent: bool) {
        self.contacts.insert(user, last_contact_ms);
        if is_called_silent {
            self.called.insert(user, last_contact_ms);
        } else {
            self.waiting.insert((last_contact_ms, user));
        }
    }

    /// Each user whose silence means something, when the user was last heard, and whether that was called
    /// silent.
    pub fn known(&self) -> impl Iterator<Item = (UserId, u64, bool)> {
        self.contacts.iter().map(|(&user, &last_contact_ms)| {
            (user, last_contact_ms, self.called.contains_key(&user))
        })
    }

    /// The gaps that still matter.
    pub fn gaps(&self) -> impl Iterator<Item = Gap> {
        self.gaps.values().copied()
    }

    /// How many users' silence means something.
    #[must_use]
    pub fn users(&self) -> usize {
        self.contacts.len()
    }

    /// How many of them are called silent.
    #[must_use]
    pub fn silent(&self) -> usize {
        self.contacts.len() - self.waiting.len()
    }

    /// The moment up to which all is known; 0 before the first progress.
    #[must_use]
    pub fn resolved_ms(&self) -> u64 {
        self.resolved_ms
    }

    /// Takes an event; what it changes goes to `changes`.
    pub fn take(&mut self, event: &Event, changes: &mut Vec<Change>) {
        match event {
            Event::Reset { .. } => {
                self.contacts.clear();
                self.waiting.clear();
                self.gaps.clear();
                self.resolved_ms = 0;
            }
            Event::Entry { entry, .. } => self.take_entry(entry, changes),
            Event::SnapshotEnd { .. } => self.close_the_unknown(changes),
            Event::Progress { resolved_ms, .. } => {
                self.resolved_ms = self.resolved_ms.max(*resolved_ms);
                self.call_silent(changes);
                self.forget_gaps();
            }
            Event::Coverage(gap) => self.take_gap(gap),
            Event::Connected { .. }
            | Event::Deadline(_)
            | Event::Transition(_)
            | Event::Stale { .. }
            | Event::Live { .. }
            | Event::Disconnected { .. } => {}
        }
    }

    fn take_entry(&mut self, entry: &Entry, changes: &mut Vec<Change>) {
        let &Entry {
            user,
            state,
            last_contact_ms,
            ..
        } = entry;
        if let Some(before_ms) = self.contacts.remove(&user) {
            self.waiting.remove(&(before_ms, user));
        }
        if state != State::Active {
            if let Some(last_contact_ms) = self.called.remove(&user) {
                changes.push(Change::Closed {
                    user,
                    last_contact_ms,
                    state: Some(state),
                });
            }
            return;
        }
        self.contacts.insert(user, last_contact_ms);
        match self.called.get(&user) {
            Some(&called_ms) if last_contact_ms <= called_ms => {}
            Some(_) => {
                self.called.remove(&user);
                self.waiting.insert((last_contact_ms, user));
                changes.push(Change::HeardAgain {
                    user,
                    last_contact_ms,
                });
            }
            None => {
                self.waiting.insert((last_contact_ms, user));
            }
        }
    }

    /// After a snapshot: who was called silent and did not come is not there any more.
    fn close_the_unknown(&mut self, changes: &mut Vec<Change>) {
        let contacts = &self.contacts;
        let gone = self
            .called
            .extract_if(|user, _| !contacts.contains_key(user));
        changes.extend(gone.map(|(user, last_contact_ms)| Change::Closed {
            user,
            last_contact_ms,
            state: None,
        }));
    }

    fn call_silent(&mut self, changes: &mut Vec<Change>) {
        let resolved_ms = self.resolved_ms;
        // Whoever was heard earlier has been silent for longer, with gaps and without.
        while let Some(&(last_contact_ms, user)) = self.waiting.first()
            && last_contact_ms <= resolved_ms
            && self.silent_after_ms <= self.heard_ms(last_contact_ms, resolved_ms)
        {
            self.waiting.pop_first();
            self.called.insert(user, last_contact_ms);
            changes.push(Change::Silent {
                user,
                last_contact_ms,
                resolved_ms,
            });
        }
    }

    /// How long the gateway could hear between two moments.
    fn heard_ms(&self, from_ms: u64, until_ms: u64) -> u64 {
        let mut heard_ms = until_ms - from_ms;
        // In the order of their begin, so that what overlaps is counted once.
        let mut counted_to_ms = from_ms;
        let begun = ..(until_ms, coverage::Reason::Unspecified);
        for gap in self.gaps.range(begun).map(|(_, gap)| gap) {
            let begin_ms = gap.from_ms.max(counted_to_ms);
            let end_ms = gap.until_ms.unwrap_or(until_ms).min(until_ms);
            if begin_ms < end_ms {
                heard_ms -= end_ms - begin_ms;
                counted_to_ms = end_ms;
            }
        }
        heard_ms
    }

    fn take_gap(&mut self, gap: &Gap) {
        self.gaps.insert((gap.from_ms, gap.reason), *gap);
        if self.gaps.len() <= MAX_GAPS {
            return;
        }
        // One that lasts is left alone: its end would not find it again.
        let mut ended = self.gaps.values().filter(|gap| gap.until_ms.is_some());
        if let (Some(&one), Some(&other)) = (ended.next(), ended.next()) {
            self.gaps.remove(&(other.from_ms, other.reason));
            let joined = Gap {
                until_ms: one.until_ms.max(other.until_ms),
                ..one
            };
            self.gaps.insert((one.from_ms, one.reason), joined);
        }
    }

    fn forget_gaps(&mut self) {
        let Some(&(oldest_ms, _)) = self.waiting.first() else {
            return;
        };
        self.gaps
            .retain(|_, gap| gap.until_ms.is_none_or(|until_ms| oldest_ms < until_ms));
    }
}

#[cfg(test)]
mod tests;
