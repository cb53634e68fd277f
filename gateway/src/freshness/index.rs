//! Users by id and by the position of their last change, and readers that walk through them.
//!
//! Plain data without locks, tasks or time. Knows how a reader of any speed gets every user's latest
//! value, and how many values it missed; must not know who reads.
//!
//! There is no log of values. A change is an element `(position, user)`, and it is void as soon as the
//! user has moved to a later position, so a reader that falls behind finds fewer and newer values, never
//! a longer queue. That has a price: a user who changes faster than a reader advances moves away from
//! it again and again. Therefore passing a position does not mean that all contacts up to it were handed
//! out; only [`Step::Level`] means that. A reader that does not get level by following can sweep: first it
//! notes who changed since it was level, without handing anything out, and then it hands out the users
//! that it noted. Both end after a fixed number of steps, however fast users change.
//!
//! A value that a newer one overtook is counted by whoever missed it. Every change bears a number, so the
//! count is the difference between the number of the value that is handed out and that of the one before.
//! The latter is what a reader remembers, and only of users whose changes it has passed void, or handed
//! out ahead of its place: one that is level remembers nothing.
//!
//! # Bounds
//!
//! The list of changes is bounded in [`super::changes`], by the users and the places at which readers lag.
//! A reader remembers at most some 30 bytes for each user, unused room included, gives the room back when it
//! is level, and makes it before it takes a lock. A step looks at no more than a block, and a commit at four
//! changes for each of its own: nothing holds a lock for as long as it takes to walk all users or all
//! changes.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use waypost_proto::{device::Clocks, id::UserId};

use super::{
    Glimpse,
    changes::{Change, Changes, Place},
    recent::{Commit, Recent},
};
use crate::{
    grants::{CheckerNumber, CheckerSet, Visibility},
    sharing::{Sharing, Transition, Turn, Withheld},
};

/// How many changes or users one [`Index::read`] looks at, and so how long it holds a lock and how many
/// entries it hands out at most. Some tens of microseconds.
pub(super) const BLOCK: usize = 512;

/// The blocks of values of recent commits that are kept for readers that are level.
const RECENT_BLOCKS: usize = 32;

/// The blocks of them that are handed out at once. Whoever is further behind is better served by fewer and
/// newer values.
const RECENT_BLOCKS_AT_ONCE: usize = 4;

/// How far the state has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The newest commit in it.
    pub position: u64,
    /// Every contact that the gateway received up to this moment is in it.
    pub resolved_ms: u64,
}

/// How fresh one user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastSeen {
    /// The user.
    pub user: UserId,
    /// The newest over all of the user's devices.
    pub clocks: Clocks,
    /// Whether the holder shares.
    pub sharing: Sharing,
    /// Which checkers may be told of the user.
    pub granted: CheckerSet,
    /// The commit that changed it last. To let a checker be told, or not, is no change.
    pub position: u64,
}

/// What a reader is handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// The newest value.
    pub seen: LastSeen,
    /// How many values of this user the reader did not get since the one before, because this one overtook
    /// them. A value of a snapshot has none before. A reader that resumed counts what changed since it did.
    pub coalesced: u32,
}

/// What a reader knows after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more; read on.
    Behind,
    /// The reader has been handed the state of this head or a newer one of every user.
    Level(Head),
}

/// Where one reader stands.
#[derive(Debug)]
pub struct Reader {
    /// The head when it began to read. Changes up to here are not counted.
    start: u64,
    /// The first change not passed.
    next: Place,
    /// Nothing at or below this position will be handed out.
    settled: u64,
    /// The number of the change that was handed out last, for users of whom that is not the last change
    /// before `next`.
    had: FxHashMap<u32, u32>,
    sweep: Option<Sweep>,
    standing: Arc<Standing>,
}

/// What the index knows of a reader.
#[derive(Debug)]
struct Standing {
    /// `next`, or the place after `start` if that is later.
    counts_from: Mutex<Place>,
    /// What the reader remembers takes so much memory.
    remembered_bytes: AtomicUsize,
}

/// How a reader that does not follow gets level.
#[derive(Debug)]
enum Sweep {
    Users(UserSweep),
    Changes(ChangeSweep),
}

/// A pass over all users.
#[derive(Debug)]
struct UserSweep {
    /// How far the state had come when the pass began.
    start: Head,
    next_user: u32,
    /// Users from here on have come after the start; they need not be reached.
    end_user: u32,
    /// A snapshot hands out everybody. Otherwise it is those who changed between `next` and the reader's
    /// start; whoever has changed since is left to follow, so that all changes since are counted.
    is_snapshot: bool,
}

/// A pass over the changes up to the start, and then over those who changed.
#[derive(Debug)]
struct ChangeSweep {
    /// How far the state had come when the pass began.
    start: Head,
    /// Users that were noted and are not yet handed out.
    owed: Vec<u32>,
}

#[derive(Debug)]
pub(super) struct Index {
    block: usize,
    head: Head,
    users: Vec<LastSeen>,
    /// For each user the number of its last change.
    ordinals: Vec<u32>,
    by_id: FxHashMap<UserId, u32>,
    /// Whom everybody has granted who has not decided otherwise.
    granted_by_all: CheckerSet,
    /// What holders have decided who were never seen.
    unseen: FxHashMap<UserId, CheckerSet>,
    /// Who could be told of a user, and may not any more.
    withdrawn: FxHashMap<UserId, CheckerSet>,
    /// The last commit in which a grant was withdrawn.
    newest_withdrawal: u64,
    /// Holds exactly one element that is not void for each user.
    changes: Changes,
    recent: Recent,
    readers: Vec<Weak<Standing>>,
}

impl Reader {
    /// No entry at or below this position will be handed out.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.settled
    }

    /// Whether a sweep is under way.
    #[must_use]
    pub fn is_sweeping(&self) -> bool {
        self.sweep.is_some()
    }

    /// Makes room for what one step may have to remember, and gives back what is not needed any more.
    /// Called before a lock is taken, since it may have to move all that is remembered.
    pub(super) fn make_room(&mut self, block: usize) {
        if self.had.is_empty() && 8 * block < self.had.capacity() {
            self.had = FxHashMap::default();
        }
        self.had.reserve(block);
        if let Some(Sweep::Changes(sweep)) = &mut self.sweep {
            sweep.owed.reserve(block);
        }
    }

    /// Says how much memory it takes what this reader remembers. One that remembers nothing keeps some room.
    pub(super) fn show_memory(&self) {
        let owed = match &self.sweep {
            Some(Sweep::Changes(sweep)) => sweep.owed.capacity(),
            Some(Sweep::Users(_)) | None => 0,
        };
        let had = match self.had.is_empty() {
            true => 0,
            // A table has an eighth more room than it fills, and a byte beside each entry.
            false => self.had.capacity() * 8 / 7,
        };
        let bytes = had * (size_of::<(u32, u32)>() + 1) + owed * size_of::<u32>();
        let remembered = &self.standing.remembered_bytes;
        remembered.store(bytes, Ordering::Relaxed);
    }

    /// Begins a sweep up to this head, of this many users, unless one is under way. Copies what the reader
    /// remembers, so it is done without a lock.
    pub(super) fn sweep(&mut self, (head, users): (Head, u32)) {
        if self.sweep.is_some() {
            return;
        }
        self.sweep = Some(if self.next.position <= self.start {
            // The list holds no void changes for it from before its start.
            Sweep::Users(UserSweep {
                start: head,
                next_user: 0,
                end_user: users,
                is_snapshot: false,
            })
        } else {
            Sweep::Changes(ChangeSweep {
                start: head,
                owed: self.had.keys().copied().collect(),
            })
        });
    }

    fn move_to(&mut self, next: Place) {
        // A reader from beyond the head stays there: nothing it has not had can be below.
        self.next = self.next.max(next);
        *self.standing.counts_from.lock() = self.next.max(Place::after(self.start));
    }

    /// Remembers which value it had last of a user whose change it passes without handing it out. Whether
    /// it did not know that before.
    fn note(&mut self, change: &Change) -> bool {
        let before = self.had.len();
        self.had
            .entry(change.at.user)
            .or_insert_with(|| change.ordinal.wrapping_sub(1));
        before < self.had.len()
    }
}

impl Index {
    pub(super) fn new(block: usize) -> Self {
        Self {
            block,
            head: Head::default(),
            users: Vec::new(),
            ordinals: Vec::new(),
            by_id: FxHashMap::default(),
            granted_by_all: CheckerSet::default(),
            unseen: FxHashMap::default(),
            withdrawn: FxHashMap::default(),
            newest_withdrawal: 0,
            changes: Changes::new(block),
            recent: Recent::new(RECENT_BLOCKS * block),
            readers: Vec::new(),
        }
    }

    /// Puts the devices of a store in place, which come in any order, who does not share, and who may be told of whom.
    pub(super) fn restore(
        &mut self,
        devices: impl Iterator<Item = (UserId, Clocks, u64)>,
        withheld: impl Iterator<Item = (UserId, Withheld)>,
        granted_by_all: CheckerSet,
        decided: impl Iterator<Item = (UserId, Visibility)>,
        resolved_ms: u64,
    ) {
        self.granted_by_all = granted_by_all;
        for (user, visibility) in decided {
            self.unseen.insert(user, visibility.granted);
            if !visibility.withdrawn.is_empty() {
                self.withdrawn.insert(user, visibility.withdrawn);
            }
        }
        for (user, clocks, position) in devices {
            let at = self.place(user);
            let seen = &mut self.users[at as usize];
            seen.clocks = seen.clocks.newest(clocks);
            seen.position = seen.position.max(position);
            self.head.position = self.head.position.max(position);
        }
        for (user, withheld) in withheld {
            let at = self.place(user);
            let seen = &mut self.users[at as usize];
            seen.sharing = withheld.sharing;
            if withheld.sharing == Sharing::Erased {
                seen.granted = withheld.told;
                self.withdrawn.remove(&user);
            }
            // Its devices may have changed since, which is nobody's business.
            seen.position = withheld.position;
            self.head.position = self.head.position.max(withheld.position);
        }
        let mut places: Vec<Place> = (0..)
            .zip(&self.users)
            .map(|(user, seen)| Place {
                position: seen.position,
                user,
            })
            .collect();
        places.sort_unstable();
        for at in places {
            self.changes.push(Change {
                at,
                ordinal: 0,
                previous: 0,
            });
        }
        self.resolve(resolved_ms);
    }

    /// Takes what a commit changed. Positions ascend.
    pub(super) fn publish(
        &mut self,
        position: u64,
        resolved_ms: u64,
        contacts: &[(UserId, Clocks)],
        transitions: &[Transition],
    ) {
        debug_assert!(self.head.position < position, "positions ascend");
        let mut changed = Vec::with_capacity(contacts.len());
        for &(id, clocks) in contacts {
            let user = self.place(id);
            let seen = &mut self.users[user as usize];
            seen.clocks = seen.clocks.newest(clocks);
            changed.extend(self.change(user, position));
        }
        for transition in transitions {
            match transition.turn {
                Turn::Sharing(to) => {
                    let user = self.place(transition.user);
                    let seen = &mut self.users[user as usize];
                    seen.sharing = to;
                    if to == Sharing::Erased {
                        seen.clocks = Clocks::default();
                        self.withdrawn.remove(&transition.user);
                    }
                    changed.extend(self.change(user, position));
                }
                Turn::Granted => self.grant(transition.user, transition.checkers),
                Turn::Withdrawn => {
                    self.withdraw(transition.user, transition.checkers);
                    self.newest_withdrawal = position;
                }
            }
        }
        changed.sort_unstable_by_key(|change| change.at);
        changed.iter().for_each(|&change| self.changes.push(change));
        let seen = changed
            .iter()
            .map(|change| self.users[change.at.user as usize]);
        self.recent
            .push(self.head.position, position, seen.collect());
        self.head.position = position;
        self.resolve(resolved_ms);
        let (users, readers) = (&self.users, &self.readers);
        self.changes.forget(
            changed.len(),
            |change| users[change.at.user as usize].position != change.at.position,
            || {
                let readers = readers.iter().filter_map(Weak::upgrade);
                readers.map(|reader| *reader.counts_from.lock()).collect()
            },
        );
    }

    /// The state has come to this position, whatever is in it. Never goes back.
    pub(super) fn at_least(&mut self, position: u64) {
        self.head.position = self.head.position.max(position);
    }

    /// All contacts up to `resolved_ms` are in the state. Never goes back.
    pub(super) fn resolve(&mut self, resolved_ms: u64) {
        self.head.resolved_ms = self.head.resolved_ms.max(resolved_ms);
    }

    pub(super) fn head(&self) -> Head {
        self.head
    }

    pub(super) fn users(&self) -> &[LastSeen] {
        &self.users
    }

    /// How many changes are kept.
    pub(super) fn changes(&self) -> usize {
        self.changes.len()
    }

    /// The memory of what is kept for readers that lag: changes beyond one for each user, and what each remembers.
    pub(super) fn lagging_bytes(&self) -> usize {
        let void = self.changes.len().saturating_sub(self.users.len());
        let readers = self.readers.iter().filter_map(Weak::upgrade);
        let remembered = readers.map(|reader| reader.remembered_bytes.load(Ordering::Relaxed));
        void * size_of::<Change>() + remembered.sum::<usize>()
    }

    pub(super) fn find(&self, user: &UserId) -> Option<&LastSeen> {
        self.by_id.get(user).map(|&at| &self.users[at as usize])
    }

    /// What a checker is told of a user.
    pub(super) fn glimpse(&self, checker: CheckerNumber, user: &UserId) -> Glimpse {
        let is_withdrawn = || {
            let withdrawn = self.withdrawn.get(user).copied().unwrap_or_default();
            withdrawn.contains(checker)
        };
        match self.find(user) {
            Some(&seen) if seen.granted.contains(checker) => Glimpse::Seen(seen),
            _ if is_withdrawn() => Glimpse::Withdrawn,
            _ => Glimpse::NeverSeen,
        }
    }

    /// Who may be told of a user, and who could once.
    pub(super) fn visibility(&self, user: &UserId) -> Visibility {
        let unseen = || self.unseen.get(user).copied();
        Visibility {
            granted: match self.find(user) {
                Some(seen) => seen.granted,
                None => unseen().unwrap_or(self.granted_by_all),
            },
            withdrawn: self.withdrawn.get(user).copied().unwrap_or_default(),
        }
    }

    /// A reader that is handed the state of every user, then changes.
    pub(super) fn reader_from_start(&mut self) -> Reader {
        let mut reader = self.reader_after(self.head.position);
        reader.settled = 0;
        reader.sweep = Some(Sweep::Users(UserSweep {
            start: self.head,
            next_user: 0,
            end_user: self.next_user(),
            is_snapshot: true,
        }));
        reader
    }

    /// A reader that is handed what changed after `position`.
    pub(super) fn reader_after(&mut self, position: u64) -> Reader {
        let mut reader = Reader {
            start: self.head.position,
            next: Place::after(position),
            settled: position,
            had: FxHashMap::default(),
            sweep: None,
            standing: Arc::new(Standing {
                counts_from: Mutex::new(Place::after(position)),
                remembered_bytes: AtomicUsize::new(0),
            }),
        };
        reader.move_to(reader.next);
        self.readers.retain(|reader| 0 < reader.strong_count());
        self.readers.push(Arc::downgrade(&reader.standing));
        reader
    }

    /// What a sweep that begins now must reach: the head, and the users that there are.
    pub(super) fn sweep_target(&self) -> (Head, u32) {
        (self.head, self.next_user())
    }

    /// Hands out the next few entries that the reader has not had and that are `wanted`.
    pub(super) fn read(
        &self,
        reader: &mut Reader,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<Update>,
    ) -> Step {
        match reader.sweep.take() {
            None => self.follow(reader, wanted, entries),
            Some(Sweep::Users(sweep)) => self.sweep_users(reader, sweep, wanted, entries),
            Some(Sweep::Changes(sweep)) if reader.next.position <= sweep.start.position => {
                self.note_owed(reader, sweep, wanted)
            }
            Some(Sweep::Changes(sweep)) => self.hand_out_owed(reader, sweep, wanted, entries),
        }
    }

    /// What has been committed since, for a reader that has had everything before and is not far behind: it
    /// is level with the head then. Nothing is coalesced.
    pub(super) fn read_recent(&self, reader: &mut Reader) -> Option<(Vec<Arc<Commit>>, Head)> {
        let has_all_before = reader.sweep.is_none()
            && reader.had.is_empty()
            && reader.start < reader.next.position
            && reader.next == Place::after(reader.settled)
            // A commit is as it was, also if its reader may not be told of a user any more.
            && self.newest_withdrawal <= reader.settled;
        if !has_all_before {
            return None;
        }
        let room = RECENT_BLOCKS_AT_ONCE * self.block;
        let commits = self.recent.after(reader.settled, room)?;
        reader.move_to(Place::after(self.head.position));
        reader.settled = self.head.position;
        Some((commits, self.head))
    }

    fn follow(
        &self,
        reader: &mut Reader,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<Update>,
    ) -> Step {
        let mut changes = self.changes.starting_at(reader.next);
        for change in changes.by_ref().take(self.block) {
            let seen = &self.users[change.at.user as usize];
            if seen.position != change.at.position {
                if reader.start < change.at.position && wanted(seen) {
                    reader.note(change);
                }
                continue;
            }
            let before = change.ordinal.wrapping_sub(1);
            let had = reader.had.remove(&change.at.user).unwrap_or(before);
            // A sweep may have handed it out already.
            if had != change.ordinal && wanted(seen) {
                entries.push(Update {
                    seen: *seen,
                    coalesced: before.wrapping_sub(had),
                });
            }
        }
        let step = match changes.next() {
            Some(next) => {
                reader.move_to(next.at);
                Step::Behind
            }
            None => {
                debug_assert!(reader.had.is_empty(), "level, and something is left");
                reader.move_to(Place::after(self.head.position));
                Step::Level(self.head)
            }
        };
        reader.settled = reader.next.position - 1;
        step
    }

    fn sweep_users(
        &self,
        reader: &mut Reader,
        mut sweep: UserSweep,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<Update>,
    ) -> Step {
        let first = sweep.next_user as usize;
        for (user, seen) in (sweep.next_user..sweep.end_user)
            .zip(&self.users[first..])
            .take(self.block)
        {
            sweep.next_user = user + 1;
            let at = Place {
                position: seen.position,
                user,
            };
            let has_moved = reader.start < at.position;
            let is_due = sweep.is_snapshot || (reader.next <= at && !has_moved);
            if is_due && wanted(seen) {
                entries.push(Update {
                    seen: *seen,
                    coalesced: 0,
                });
                if has_moved {
                    reader.had.insert(user, self.ordinals[user as usize]);
                }
            }
        }
        if sweep.next_user < sweep.end_user {
            reader.sweep = Some(Sweep::Users(sweep));
            return Step::Behind;
        }
        // Whoever was at or below the start has been handed out where it stood, or has moved beyond.
        reader.move_to(Place::after(reader.start));
        reader.settled = reader.next.position - 1;
        if sweep.is_snapshot {
            Step::Level(sweep.start)
        } else {
            Step::Behind
        }
    }

    fn note_owed(
        &self,
        reader: &mut Reader,
        mut sweep: ChangeSweep,
        wanted: impl Fn(&LastSeen) -> bool,
    ) -> Step {
        let end = Place::after(sweep.start.position);
        let mut changes = self
            .changes
            .starting_at(reader.next)
            .take_while(|change| change.at < end);
        for change in changes.by_ref().take(self.block) {
            if wanted(&self.users[change.at.user as usize]) && reader.note(change) {
                sweep.owed.push(change.at.user);
            }
        }
        let next = changes.next().map_or(end, |change| change.at);
        reader.move_to(next);
        reader.sweep = Some(Sweep::Changes(sweep));
        Step::Behind
    }

    fn hand_out_owed(
        &self,
        reader: &mut Reader,
        mut sweep: ChangeSweep,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<Update>,
    ) -> Step {
        let first = sweep.owed.len().saturating_sub(self.block);
        for user in sweep.owed.drain(first..) {
            let (seen, ordinal) = (&self.users[user as usize], self.ordinals[user as usize]);
            let had = reader.had.insert(user, ordinal).unwrap_or(ordinal);
            if had != ordinal && wanted(seen) {
                entries.push(Update {
                    seen: *seen,
                    coalesced: ordinal.wrapping_sub(had).wrapping_sub(1),
                });
            }
            if seen.position < reader.next.position {
                reader.had.remove(&user);
            }
        }
        if !sweep.owed.is_empty() {
            reader.sweep = Some(Sweep::Changes(sweep));
            return Step::Behind;
        }
        reader.settled = reader.next.position - 1;
        Step::Level(sweep.start)
    }

    /// Moves a user to a commit. None if it is there already: two devices of one user in one commit are one
    /// change.
    fn change(&mut self, user: u32, position: u64) -> Option<Change> {
        let seen = &mut self.users[user as usize];
        if seen.position == position {
            return None;
        }
        let previous = std::mem::replace(&mut seen.position, position);
        let ordinal = &mut self.ordinals[user as usize];
        *ordinal = ordinal.wrapping_add(1);
        Some(Change {
            at: Place { position, user },
            ordinal: *ordinal,
            previous,
        })
    }

    fn grant(&mut self, user: UserId, checkers: CheckerSet) {
        self.decide(user, |granted| granted.union(checkers));
        if let Some(withdrawn) = self.withdrawn.get_mut(&user) {
            *withdrawn = withdrawn.without(checkers);
        }
    }

    fn withdraw(&mut self, user: UserId, checkers: CheckerSet) {
        self.decide(user, |granted| granted.without(checkers));
        let withdrawn = self.withdrawn.entry(user).or_default();
        *withdrawn = withdrawn.union(checkers);
    }

    fn decide(&mut self, user: UserId, decide: impl FnOnce(CheckerSet) -> CheckerSet) {
        let granted = match self.by_id.get(&user) {
            Some(&at) => &mut self.users[at as usize].granted,
            None => self.unseen.entry(user).or_insert(self.granted_by_all),
        };
        *granted = decide(*granted);
    }

    fn place(&mut self, user: UserId) -> u32 {
        let next = self.next_user();
        let at = *self.by_id.entry(user).or_insert(next);
        if at == next {
            let decided = self.unseen.remove(&user);
            self.users.push(LastSeen {
                user,
                clocks: Clocks::default(),
                sharing: Sharing::Active,
                granted: decided.unwrap_or(self.granted_by_all),
                position: 0,
            });
            self.ordinals.push(0);
        }
        at
    }

    fn next_user(&self) -> u32 {
        u32::try_from(self.users.len()).expect("memory holds fewer than 2^32 users")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::{prelude::*, test_runner::TestRunner};

    use super::*;

    /// Small, so that a few users are many blocks.
    const BLOCK: usize = 3;

    /// What may be in the list of changes beyond twice the users and the readers that lag: blocks that are
    /// not full, and a commit.
    const FEW_BLOCKS: usize = 10 * BLOCK;

    fn user(n: u8) -> UserId {
        UserId([n; 16])
    }

    fn heard(at_ms: u64) -> Clocks {
        Clocks {
            last_contact_ms: at_ms,
            ..Clocks::default()
        }
    }

    fn sharing(is_paused: bool) -> Sharing {
        if is_paused {
            Sharing::Paused
        } else {
            Sharing::Active
        }
    }

    #[derive(Clone, Debug)]
    enum Event {
        /// Users who are heard, and then users who pause or resume.
        Publish(Vec<(u8, u64)>, Vec<u8>),
        /// A new reader of everything.
        Start,
        /// A new reader from a position this many before the head.
        Resume(u64),
        Read(usize),
        ReadRecent(usize),
        Sweep(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => (
                prop::collection::vec((0u8..20, 0u64..1000), 0..12),
                prop::collection::vec(0u8..20, 0..3)
            ).prop_map(|(heard, turned)| Event::Publish(heard, turned)),
            1 => Just(Event::Start),
            1 => (0u64..40).prop_map(Event::Resume),
            8 => any::<usize>().prop_map(Event::Read),
            4 => any::<usize>().prop_map(Event::ReadRecent),
            1 => any::<usize>().prop_map(Event::Sweep),
        ]
    }

    /// What is true: every user's value after each commit, and the number of its change.
    #[derive(Default)]
    struct Model {
        commits: Vec<BTreeMap<UserId, Value>>,
    }

    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    struct Value {
        contact_ms: u64,
        is_paused: bool,
        position: u64,
        changes: u64,
    }

    impl Model {
        fn head(&self) -> u64 {
            self.commits.len() as u64
        }

        fn at(&self, position: u64) -> BTreeMap<UserId, Value> {
            position
                .checked_sub(1)
                .map(|at| self.commits[usize::try_from(at).unwrap()].clone())
                .unwrap_or_default()
        }

        /// Who turns pauses, or resumes.
        fn publish(&mut self, heard: &[(u8, u64)], turned: &[u8]) -> Vec<Transition> {
            let mut now = self.at(self.head());
            let position = self.head() + 1;
            let mut change = |n, change: &mut dyn FnMut(&mut Value)| {
                let value = now.entry(user(n)).or_default();
                value.changes += u64::from(value.position != position);
                value.position = position;
                change(value);
            };
            for &(n, at_ms) in heard {
                change(n, &mut |value| {
                    value.contact_ms = at_ms.max(value.contact_ms)
                });
            }
            let mut transitions = Vec::new();
            for &n in turned {
                change(n, &mut |value| {
                    value.is_paused = !value.is_paused;
                    transitions.push(Transition {
                        user: user(n),
                        turn: Turn::Sharing(sharing(value.is_paused)),
                        checkers: CheckerSet::ALL,
                        at_ms: 0,
                        position,
                        number: 0,
                    });
                });
            }
            self.commits.push(now);
            transitions
        }
    }

    /// A reader and what it was handed.
    struct Checked {
        reader: Reader,
        /// The position that it resumed after.
        after: u64,
        /// For each user the number of the change from which on it counts.
        counts_from: BTreeMap<UserId, u64>,
        is_in_snapshot: bool,
        began: u64,
        view: BTreeMap<UserId, Value>,
        handed: HashSet<(UserId, u64)>,
        /// Values handed out of those that are counted, and values that were overtaken.
        counted: BTreeMap<UserId, u64>,
    }

    impl Checked {
        fn read(&mut self, index: &Index, model: &Model) -> Result<Step, TestCaseError> {
            let settled = self.reader.settled();
            let is_sweeping = self.reader.is_sweeping();
            let mut entries = Vec::new();
            let step = index.read(&mut self.reader, |_| true, &mut entries);
            prop_assert!(entries.len() <= BLOCK);
            prop_assert!(is_sweeping || entries.is_sorted_by_key(|update| update.seen.position));
            let now = model.at(model.head());
            for update in entries {
                prop_assert!(settled < update.seen.position, "below what was settled");
                self.take(update, &now)?;
            }
            prop_assert!(settled <= self.reader.settled());
            if let Step::Level(head) = step {
                self.is_level(head, model)?;
            }
            Ok(step)
        }

        /// Every value since, if the reader is near enough.
        fn read_recent(&mut self, index: &Index, model: &Model) -> Result<(), TestCaseError> {
            let settled = self.reader.settled();
            let Some((commits, head)) = index.read_recent(&mut self.reader) else {
                prop_assert_eq!(settled, self.reader.settled());
                return Ok(());
            };
            for (position, commit) in (settled + 1..).zip(commits) {
                let then = model.at(position);
                let changed = then.values().filter(|value| value.position == position);
                prop_assert_eq!(commit.seen().len(), changed.count());
                for &seen in commit.seen() {
                    self.take(Update { seen, coalesced: 0 }, &then)?;
                }
            }
            prop_assert_eq!(head, index.head());
            self.is_level(head, model)
        }

        fn take(
            &mut self,
            Update { seen, coalesced }: Update,
            truth: &BTreeMap<UserId, Value>,
        ) -> Result<(), TestCaseError> {
            let value = truth[&seen.user];
            prop_assert_eq!(
                (value.contact_ms, sharing(value.is_paused), value.position),
                (seen.clocks.last_contact_ms, seen.sharing, seen.position)
            );
            prop_assert!(
                self.handed.insert((seen.user, seen.position)),
                "handed out twice"
            );
            self.view.insert(seen.user, value);
            if self.is_in_snapshot {
                prop_assert_eq!(coalesced, 0, "coalesced in a snapshot");
                self.counts_from.insert(seen.user, value.changes);
            } else if seen.position <= self.began {
                prop_assert_eq!(coalesced, 0, "coalesced before it resumed");
            } else {
                *self.counted.entry(seen.user).or_default() += 1 + u64::from(coalesced);
                let from = self
                    .counts_from
                    .get(&seen.user)
                    .copied()
                    .unwrap_or_default();
                prop_assert_eq!(
                    from + self.counted[&seen.user],
                    value.changes,
                    "coalesced is wrong"
                );
            }
            Ok(())
        }

        fn is_level(&mut self, head: Head, model: &Model) -> Result<(), TestCaseError> {
            self.is_in_snapshot = false;
            prop_assert!(self.reader.settled() == head.position);
            for (user, value) in model.at(head.position) {
                if self.after < value.position {
                    let viewed = self.view.get(&user);
                    prop_assert!(
                        viewed.is_some_and(|viewed| value.contact_ms <= viewed.contact_ms
                            && value.position <= viewed.position),
                        "level without {user}"
                    );
                }
            }
            Ok(())
        }
    }

    /// Lets readers of any speed read while users change. Without their places, the list of changes
    /// forgets what they count.
    fn run(events: Vec<Event>, are_places_known: bool) -> Result<(), TestCaseError> {
        let mut index = Index::new(BLOCK);
        let mut model = Model::default();
        let mut readers: Vec<Checked> = Vec::new();
        for event in events {
            match event {
                Event::Publish(contacts, turned) => {
                    let transitions = model.publish(&contacts, &turned);
                    let contacts: Vec<_> = contacts
                        .iter()
                        .map(|&(n, at_ms)| (user(n), heard(at_ms)))
                        .collect();
                    index.publish(model.head(), 0, &contacts, &transitions);
                }
                Event::Start | Event::Resume(_) => {
                    let began = model.head();
                    let (reader, after) = match event {
                        Event::Resume(back) => {
                            let after = began.saturating_sub(back);
                            (index.reader_after(after), after)
                        }
                        _ => (index.reader_from_start(), 0),
                    };
                    if !are_places_known {
                        index.readers.clear();
                    }
                    let now = model.at(began).into_iter();
                    readers.push(Checked {
                        is_in_snapshot: reader.is_sweeping(),
                        reader,
                        after,
                        counts_from: now.map(|(user, value)| (user, value.changes)).collect(),
                        began,
                        view: BTreeMap::new(),
                        handed: HashSet::new(),
                        counted: BTreeMap::new(),
                    });
                }
                Event::Read(which) if !readers.is_empty() => {
                    let which = which % readers.len();
                    readers[which].read(&index, &model)?;
                }
                Event::ReadRecent(which) if !readers.is_empty() => {
                    let which = which % readers.len();
                    readers[which].read_recent(&index, &model)?;
                }
                Event::Sweep(which) if !readers.is_empty() => {
                    let which = which % readers.len();
                    readers[which].reader.sweep(index.sweep_target());
                }
                Event::Read(_) | Event::ReadRecent(_) | Event::Sweep(_) => {}
            }
            let places = 1 + readers.len();
            prop_assert!(index.changes() <= 2 * index.users().len() * places + FEW_BLOCKS);
        }
        for reader in &mut readers {
            while reader.read(&index, &model)? != Step::Level(index.head()) {}
            let changed: BTreeMap<_, _> = model
                .at(model.head())
                .into_iter()
                .filter(|(_, value)| reader.after < value.position)
                .collect();
            prop_assert_eq!(&reader.view, &changed);
            for (user, value) in changed {
                let from = reader.counts_from.get(&user).copied().unwrap_or_default();
                let counted = reader.counted.get(&user).copied().unwrap_or_default();
                prop_assert_eq!(from + counted, value.changes, "some are not counted");
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn every_reader_gets_every_change_once_or_counted_and_is_level_only_when_it_has(
            events in prop::collection::vec(event(), 1..200)
        ) {
            run(events, true)?;
        }
    }

    /// The control: the same readers, when the list of changes does not know where they stand.
    #[test]
    fn a_list_that_forgets_what_readers_have_not_passed_is_found_out() {
        let mut runner = TestRunner::deterministic();
        let events = prop::collection::vec(event(), 1..200);
        let failure = runner.run(&events, |events| run(events, false));
        let failure = failure.unwrap_err().to_string();
        assert!(
            failure.contains("coalesced is wrong") || failure.contains("some are not counted"),
            "{failure}"
        );
    }

    #[test]
    fn a_sweep_gets_level_with_users_who_change_faster_than_they_are_read() {
        let mut index = Index::new(BLOCK);
        let everybody: Vec<_> = (0..50).map(|n| (user(n), heard(1))).collect();
        index.publish(1, 10, &everybody, &[]);
        let mut reader = index.reader_after(0);

        // Following alone never gets there: whoever is next has moved away.
        let mut entries = Vec::new();
        for position in 2..200 {
            assert_eq!(
                index.read(&mut reader, |_| true, &mut entries),
                Step::Behind
            );
            index.publish(position, 10 * position, &everybody, &[]);
        }
        reader.sweep(index.sweep_target());
        entries.clear();
        let mut position = 200;
        let head = loop {
            if let Step::Level(head) = index.read(&mut reader, |_| true, &mut entries) {
                break head;
            }
            index.publish(position, 10 * position, &everybody, &[]);
            position += 1;
        };
        assert_eq!(
            head,
            Head {
                position: 199,
                resolved_ms: 1990
            }
        );
        assert_eq!(entries.len(), everybody.len());
        // All but the first value of each, and none of those that were handed out before.
        assert!(entries.iter().all(|update| update.coalesced > 0));
    }

    #[test]
    fn the_list_of_changes_stays_short_however_long_it_runs() {
        let mut index = Index::new(BLOCK);
        index.publish(1, 0, &[(user(0), heard(1)), (user(1), heard(1))], &[]);
        for position in 2..10_000 {
            index.publish(position, 0, &[(user(1), heard(position))], &[]);
        }
        assert!(index.changes() <= 2 * 2 + FEW_BLOCKS);
        let mut entries = Vec::new();
        let mut reader = index.reader_after(0);
        while index.read(&mut reader, |_| true, &mut entries) == Step::Behind {}
        let positions: Vec<_> = entries.iter().map(|update| update.seen.position).collect();
        assert_eq!(positions, [1, 9_999]);
    }

    #[test]
    fn a_reader_gets_only_whom_it_wants_and_is_level_all_the_same() {
        let mut index = Index::new(BLOCK);
        let everybody: Vec<_> = (0..50).map(|n| (user(n), heard(1))).collect();
        index.publish(1, 5, &everybody, &[]);
        let mut reader = index.reader_from_start();
        let mut entries = Vec::new();
        let step = loop {
            match index.read(&mut reader, |seen| seen.user == user(41), &mut entries) {
                Step::Behind => {}
                step => break step,
            }
        };
        assert_eq!(
            step,
            Step::Level(Head {
                position: 1,
                resolved_ms: 5
            })
        );
        assert_eq!(
            entries
                .iter()
                .map(|update| update.seen.user)
                .collect::<Vec<_>>(),
            [user(41)]
        );
    }

    /// A level reader would be handed the commit as it was, in which the user could still be told of.
    #[test]
    fn nobody_is_handed_a_user_out_of_a_commit_that_was_before_the_grant_was_withdrawn() {
        let ops = CheckerNumber::new(5).unwrap();
        let turned = |turn, position| Transition {
            user: user(1),
            turn,
            checkers: ops.into(),
            at_ms: 0,
            position,
            number: 0,
        };
        let mut index = Index::new(BLOCK);
        // Decided before the user was ever seen.
        index.publish(1, 0, &[], &[turned(Turn::Granted, 1)]);
        let mut reader = index.reader_after(1);
        let mut entries = Vec::new();
        let wanted = |seen: &LastSeen| seen.granted.contains(ops);
        let mut read = |index: &Index, reader: &mut Reader| -> Vec<u64> {
            while index.read(reader, wanted, &mut entries) == Step::Behind {}
            entries
                .drain(..)
                .map(|update| update.seen.position)
                .collect()
        };
        assert!(read(&index, &mut reader).is_empty());
        index.publish(2, 0, &[(user(1), heard(2)), (user(2), heard(2))], &[]);
        assert_eq!(read(&index, &mut reader), [2], "and not the other");
        index.publish(3, 0, &[(user(1), heard(3))], &[]);
        index.publish(4, 0, &[], &[turned(Turn::Withdrawn, 4)]);
        assert!(index.read_recent(&mut reader).is_none());
        assert_eq!(index.glimpse(ops, &user(1)), Glimpse::Withdrawn);
        assert_eq!(index.glimpse(ops, &user(2)), Glimpse::NeverSeen);
        assert!(read(&index, &mut reader).is_empty());
        // Once that is passed, commits are handed out again.
        index.publish(5, 0, &[(user(1), heard(5))], &[turned(Turn::Granted, 5)]);
        let (commits, _) = index.read_recent(&mut reader).unwrap();
        assert!(commits[0].granted_by_all().contains(ops));
        assert!(matches!(index.glimpse(ops, &user(1)), Glimpse::Seen(_)));
        index.publish(6, 0, &[(user(1), heard(6)), (user(2), heard(6))], &[]);
        let (commits, _) = index.read_recent(&mut reader).unwrap();
        assert!(
            !commits[0].granted_by_all().contains(ops),
            "there is another"
        );
    }
}
