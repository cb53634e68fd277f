//! Deadlines: whom a checker expects to be heard how often, and who is late.
//!
//! Plain data. Knows settings, timers and lateness; must not know where they are kept, who is told, or what
//! time it is. Lateness is reckoned on the hearing clock of [`Coverage`]: it stands still while the gateway
//! cannot hear.
//!
//! # When a user is late
//!
//! A checker that expects a user every `expect_every_ms` with `grace_ms` of patience calls the user late when the
//! gateway could have heard for both together since the last contact, or since the deadline was set or the
//! holder resumed, and did not. After a span in which the gateway could not hear, everybody has the grace to come
//! back in, but once: spans that follow each other cannot put off a LATE by more than one more grace.
//!
//! # Timers
//!
//! A contact moves no timer. A timer that goes off looks at the user's last contact and moves on, or calls the
//! user late. So a ping costs a look into the set of those who are late, which is nearly always empty, and a
//! tick looks at those timers only that go off in it, however many there are.
//!
//! # Bounds
//!
//! At most `most` deadlines; more are refused as a whole call. One turn looks at [`MOST_LOOKED`] timers and calls
//! [`MOST_FIRED`] users late; the rest is for the next. A deadline takes about 140 bytes.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{SHA256, digest};
use rustc_hash::FxHashMap;
use waypost_proto::id::UserId;

use crate::coverage::Coverage;

/// How many users one turn calls late: a commit of some 500 KB.
pub const MOST_FIRED: usize = 4_096;
/// How many timers one turn looks at: a few milliseconds.
pub const MOST_LOOKED: usize = 16_384;
/// Timers go off together that are due within so much of each other, so that they share a commit.
const SLOT_MS: u64 = 100;
/// The longest that can be expected or granted: a year. Beyond it somebody has mistaken the unit.
pub const LONGEST_MS: u64 = 366 * 24 * 60 * 60 * 1_000;

/// A checker, by a digest of its name: 16 bytes whatever the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Checker(pub [u8; 16]);

impl Checker {
    /// The checker of this name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest(&SHA256, name.as_bytes()).as_ref()[..16]);
        Self(bytes)
    }
}

/// How often a user is expected, in milliseconds of the hearing clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The user should be heard at least this often; from 1 to [`LONGEST_MS`].
    pub expect_every_ms: u64,
    /// How much longer to wait before it is called late; up to [`LONGEST_MS`].
    pub grace_ms: u64,
}

/// What is known of a user when its timer goes off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    /// When it was last heard; 0 for never.
    pub last_contact_ms: u64,
    /// Whether its silence means anything.
    pub standing: Standing,
}

/// Whether a user's silence means anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It does, since the holder resumed last; 0 for always.
    Active {
        /// When the holder resumed.
        since_ms: u64,
    },
    /// The holder has paused, or erased everything.
    Silenced,
}

/// The silence that a user was called late for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late {
    /// The commit that said so.
    pub position: u64,
    /// When it was said.
    pub at_ms: u64,
    /// The last contact before it; 0 for none.
    pub last_contact_ms: u64,
    /// By when the user should have been heard.
    pub due_ms: u64,
}

/// One deadline, as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Who set it.
    pub checker: Checker,
    /// Whom it is for.
    pub user: UserId,
    /// How often the user is expected.
    pub setting: Setting,
    /// When it was first set.
    pub since_ms: u64,
    /// Whether the user is late.
    pub late: Option<Late>,
}

/// What happened to a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The user was not heard in time.
    Late,
    /// The user was heard again, or is not late under new settings.
    Recovered,
}

impl Kind {
    /// Its name in metrics and exports.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Late => "late",
            Self::Recovered => "recovered",
        }
    }
}

/// Something that a checker is told, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Whom to tell.
    pub checker: Checker,
    /// Of whom.
    pub user: UserId,
    /// What.
    pub kind: Kind,
    /// The commit that says so.
    pub position: u64,
    /// When it was said.
    pub at_ms: u64,
    /// The user's last contact then; 0 for none.
    pub last_contact_ms: u64,
    /// By when the user should have been heard.
    pub due_ms: u64,
}

/// What a commit changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A deadline is new or changed.
    Set(Registration),
    /// A deadline is gone.
    Removed(Checker, UserId),
    /// A checker is to be told.
    Event(Event),
}

/// Where and when a change is said.
#[derive(Clone, Copy, Debug)]
pub struct Said {
    /// The commit that will hold it.
    pub position: u64,
    /// The gateway's clock, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// How many timers were looked at.
    pub looked: usize,
    /// How many users were called late.
    pub fired: usize,
    /// Whether there is more to do at once.
    pub is_behind: bool,
}

/// There would be too many deadlines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this gateway keeps {most} deadlines and no more")]
pub struct TooMany {
    /// How many there may be.
    pub most: usize,
}

/// Why a call sets no deadlines. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSet {
    /// There would be too many.
    #[error(transparent)]
    TooMany(#[from] TooMany),
    /// The checker is not told of a user, so a deadline for it would never pass.
    #[error("user {0} has not granted this checker")]
    NotGranted(UserId),
}

/// All deadlines, their timers and who is late.
#[derive(Debug)]
pub struct Deadlines {
    most: usize,
    /// Numbered, so that timers can be small. They stay few: there is one for each configured name.
    checkers: Vec<Checker>,
    slots: Vec<Deadline>,
    free: Vec<u32>,
    by_user: FxHashMap<(u16, UserId), u32>,
    /// By when they go off, on the hearing clock.
    timers: BTreeSet<(u64, u32)>,
    late: BTreeMap<UserId, Vec<u32>>,
    late_count: usize,
}

#[derive(Debug)]
struct Deadline {
    user: UserId,
    checker: u16,
    setting: Setting,
    since_ms: u64,
    /// When its timer goes off, while it is not late.
    timer: u64,
    late: Option<Box<Late>>,
}

impl Deadlines {
    /// None yet, and never more than `most`.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            checkers: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            by_user: FxHashMap::default(),
            timers: BTreeSet::new(),
            late: BTreeMap::new(),
            late_count: 0,
        }
    }

    /// Puts one of a store in place, also beyond the bound. Its timer goes off at once and finds out.
    pub fn restore(&mut self, registration: Registration) {
        let checker = self.number(registration.checker);
        let index = self.place(Deadline {
            user: registration.user,
            checker,
            setting: registration.setting,
            since_ms: registration.since_ms,
            timer: 0,
            late: registration.late.map(Box::new),
        });
        if registration.late.is_some() {
            self.late.entry(registration.user).or_default().push(index);
            self.late_count += 1;
        } else {
            self.timers.insert((0, index));
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_user.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_user.is_empty()
    }

    /// How many users are late, once for each checker.
    #[must_use]
    pub fn late(&self) -> usize {
        self.late_count
    }

    /// Sets a checker's deadlines for these users, or removes them where there is no setting. Of two for one
    /// user the later holds. What was set before keeps its beginning. A user who is late is judged anew.
    ///
    /// # Errors
    /// When there would be too many; then nothing has changed.
    pub fn set(
        &mut self,
        checker: Checker,
        settings: &[(UserId, Option<Setting>)],
        said: Said,
        coverage: &Coverage,
        contact_of: impl Fn(&UserId) -> Contact,
        changes: &mut Vec<Change>,
    ) -> Result<(), TooMany> {
        let number = self.number(checker);
        let last: FxHashMap<UserId, Option<Setting>> = settings.iter().copied().collect();
        let (mut more, mut fewer) = (0, 0);
        for (user, setting) in &last {
            match (self.by_user.contains_key(&(number, *user)), setting) {
                (false, Some(_)) => more += 1,
                (true, None) => fewer += 1,
                _ => {}
            }
        }
        if more != 0 && self.most < (self.len() + more).saturating_sub(fewer) {
            return Err(TooMany { most: self.most });
        }
        for (&user, &setting) in &last {
            let known = self.by_user.get(&(number, user)).copied();
            match (known, setting) {
                (Some(index), Some(setting)) => {
                    if self.slot(index).setting != setting {
                        self.change(index, setting, said, coverage, contact_of(&user), changes);
                    }
                }
                (None, Some(setting)) => {
                    let index = self.place(Deadline {
                        user,
                        checker: number,
                        setting,
                        since_ms: said.at_ms,
                        timer: 0,
                        late: None,
                    });
                    let due = self.due(index, coverage, contact_of(&user));
                    self.start_timer(index, due);
                    changes.push(Change::Set(self.registration(index)));
                }
                (Some(index), None) => {
                    self.remove(index);
                    changes.push(Change::Removed(checker, user));
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// Removes a checker's deadline for a user of whom it may be told no more.
    pub fn forget(&mut self, checker: Checker, user: UserId, changes: &mut Vec<Change>) {
        let number = self.number(checker);
        if let Some(&index) = self.by_user.get(&(number, user)) {
            self.remove(index);
            changes.push(Change::Removed(checker, user));
        }
    }

    /// Removes all deadlines for a user, of whichever checker.
    pub fn forget_user(&mut self, user: UserId, changes: &mut Vec<Change>) {
        for checker in self.checkers.clone() {
            self.forget(checker, user, changes);
        }
    }

    /// Users were heard, at these moments: whoever was late is not any more.
    pub fn heard(
        &mut self,
        contacts: impl Iterator<Item = (UserId, u64)>,
        said: Said,
        coverage: &Coverage,
        changes: &mut Vec<Change>,
    ) {
        if self.late.is_empty() {
            return;
        }
        for (user, last_contact_ms) in contacts {
            let Some(indices) = self.late.get(&user).cloned() else {
                continue;
            };
            let contact = Contact {
                last_contact_ms,
                standing: Standing::Active { since_ms: 0 },
            };
            for index in indices {
                let due = self.due(index, coverage, contact);
                self.recover(index, due, last_contact_ms, said, changes);
            }
        }
    }

    /// Lets the timers go off that are due by `now_ms`, up to which every contact is known.
    pub fn turn(
        &mut self,
        now_ms: u64,
        said: Said,
        coverage: &Coverage,
        contact_of: impl Fn(&UserId) -> Contact,
        changes: &mut Vec<Change>,
    ) -> Turn {
        let now = coverage.heard_ms(now_ms);
        let mut turn = Turn::default();
        while let Some(&(timer, index)) = self.timers.first()
            && timer <= now
        {
            if turn.looked == MOST_LOOKED || turn.fired == MOST_FIRED {
                turn.is_behind = true;
                break;
            }
            turn.looked += 1;
            self.timers.pop_first();
            let contact = contact_of(&self.slot(index).user);
            let due = self.due(index, coverage, contact);
            if contact.standing == Standing::Silenced {
                // Looked at again when it could be late at the earliest if the holder resumed now.
                let Setting {
                    expect_every_ms,
                    grace_ms,
                } = self.slot(index).setting;
                self.start_timer(index, now + expect_every_ms + grace_ms);
            } else if due <= now {
                turn.fired += 1;
                self.call_late(index, due, contact, said, coverage, changes);
            } else {
                self.start_timer(index, due);
            }
        }
        turn
    }

    /// By when the user must have been heard, on the hearing clock.
    fn due(&self, index: u32, coverage: &Coverage, contact: Contact) -> u64 {
        let deadline = self.slot(index);
        let Setting {
            expect_every_ms,
            grace_ms,
        } = deadline.setting;
        let resumed_ms = match contact.standing {
            Standing::Active { since_ms } => since_ms,
            Standing::Silenced => 0,
        };
        let base_ms = contact
            .last_contact_ms
            .max(deadline.since_ms)
            .max(resumed_ms);
        let due = coverage.heard_ms(base_ms) + expect_every_ms + grace_ms;
        // Spans that ended before the base change nothing here.
        let back_again = coverage.heard_ms(coverage.last_end_ms()) + grace_ms;
        due.max(back_again.min(due + grace_ms))
    }

    fn change(
        &mut self,
        index: u32,
        setting: Setting,
        said: Said,
        coverage: &Coverage,
        contact: Contact,
        changes: &mut Vec<Change>,
    ) {
        self.slots[index as usize].setting = setting;
        let due = self.due(index, coverage, contact);
        if self.slot(index).late.is_none() {
            self.start_timer(index, due);
        } else if coverage.heard_ms(said.at_ms) < due {
            self.recover(index, due, contact.last_contact_ms, said, changes);
            return;
        }
        changes.push(Change::Set(self.registration(index)));
    }

    fn call_late(
        &mut self,
        index: u32,
        due: u64,
        contact: Contact,
        said: Said,
        coverage: &Coverage,
        changes: &mut Vec<Change>,
    ) {
        let late = Late {
            position: said.position,
            at_ms: said.at_ms,
            last_contact_ms: contact.last_contact_ms,
            due_ms: coverage.moment_of(due),
        };
        self.slots[index as usize].late = Some(Box::new(late));
        let user = self.slot(index).user;
        self.late.entry(user).or_default().push(index);
        self.late_count += 1;
        changes.push(Change::Set(self.registration(index)));
        changes.push(Change::Event(Event {
            checker: self.checker_of(index),
            user,
            kind: Kind::Late,
            position: said.position,
            at_ms: said.at_ms,
            last_contact_ms: contact.last_contact_ms,
            due_ms: late.due_ms,
        }));
    }

    fn recover(
        &mut self,
        index: u32,
        due: u64,
        last_contact_ms: u64,
        said: Said,
        changes: &mut Vec<Change>,
    ) {
        let Some(late) = self.no_longer_late(index) else {
            return;
        };
        self.start_timer(index, due);
        changes.push(Change::Set(self.registration(index)));
        changes.push(Change::Event(Event {
            checker: self.checker_of(index),
            user: self.slot(index).user,
            kind: Kind::Recovered,
            position: said.position,
            at_ms: said.at_ms,
            last_contact_ms,
            due_ms: late.due_ms,
        }));
    }

    fn no_longer_late(&mut self, index: u32) -> Option<Late> {
        let late = self.slots[index as usize].late.take()?;
        self.late_count -= 1;
        let user = self.slot(index).user;
        if let Some(indices) = self.late.get_mut(&user) {
            indices.retain(|&other| other != index);
            if indices.is_empty() {
                self.late.remove(&user);
            }
        }
        Some(*late)
    }

    fn start_timer(&mut self, index: u32, due: u64) {
        let deadline = &mut self.slots[index as usize];
        self.timers.remove(&(deadline.timer, index));
        deadline.timer = due.next_multiple_of(SLOT_MS);
        self.timers.insert((deadline.timer, index));
    }

    fn remove(&mut self, index: u32) {
        self.no_longer_late(index);
        let deadline = self.slot(index);
        let (timer, key) = (deadline.timer, (deadline.checker, deadline.user));
        self.timers.remove(&(timer, index));
        self.by_user.remove(&key);
        self.free.push(index);
    }

    fn place(&mut self, deadline: Deadline) -> u32 {
        let key = (deadline.checker, deadline.user);
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = deadline;
                index
            }
            None => {
                self.slots.push(deadline);
                u32::try_from(self.slots.len() - 1).expect("bounded far below")
            }
        };
        self.by_user.insert(key, index);
        index
    }

    fn number(&mut self, checker: Checker) -> u16 {
        let known = self.checkers.iter().position(|&known| known == checker);
        let number = known.unwrap_or_else(|| {
            self.checkers.push(checker);
            self.checkers.len() - 1
        });
        u16::try_from(number).expect("a configuration names fewer checkers")
    }

    fn registration(&self, index: u32) -> Registration {
        let deadline = self.slot(index);
        Registration {
            checker: self.checker_of(index),
            user: deadline.user,
            setting: deadline.setting,
            since_ms: deadline.since_ms,
            late: deadline.late.as_deref().copied(),
        }
    }

    fn checker_of(&self, index: u32) -> Checker {
        self.checkers[usize::from(self.slot(index).checker)]
    }

    fn slot(&self, index: u32) -> &Deadline {
        &self.slots[index as usize]
    }
}

#[cfg(test)]
mod tests;
