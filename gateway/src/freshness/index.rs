//! Users by id and by the position of their last change, and readers that walk through them.
//!
//! Plain data without locks, tasks or time. Knows how a reader of any speed gets every user's latest
//! value; must not know who reads.
//!
//! There is no log of values. A change is an element `(position, user)`, and it is void as soon as the
//! user has moved to a later position, so a reader that falls behind finds fewer and newer values, never
//! a longer queue. That has a price: a user who changes faster than a reader advances moves away from
//! it again and again. Therefore passing a position does not mean that all contacts up to it were handed
//! out; only [`Step::Level`] means that. A reader that does not get level by following can sweep: one
//! pass over all users, in their own order, which ends after a fixed number of steps however fast they
//! change. A snapshot is a sweep from the beginning.

use rustc_hash::FxHashMap;
use waypost_proto::{device::Clocks, id::UserId};

/// How many changes or users one [`Index::read`] looks at, and so how long it holds a lock and how many
/// entries it hands out at most. Some tens of microseconds.
pub(super) const BLOCK: usize = 512;

/// The list of changes may be this much longer than twice the users before it is compacted.
const SLACK: usize = 1024;

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
    /// The commit that changed it last.
    pub position: u64,
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
    /// The first change not passed. All before it have been handed out or are void.
    next: Change,
    sweep: Option<Sweep>,
    /// For each block of users the head when the last sweep read it: what a sweep handed out from
    /// beyond its start is not handed out again by following. Empty unless a sweep was needed.
    passed: Vec<u64>,
}

/// A pass over all users.
#[derive(Debug)]
struct Sweep {
    start: Head,
    next_user: u32,
    /// Users from here on have come after the start; they need not be reached.
    end_user: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Change {
    position: u64,
    user: u32,
}

#[derive(Debug)]
pub(super) struct Index {
    block: usize,
    head: Head,
    users: Vec<LastSeen>,
    by_id: FxHashMap<UserId, u32>,
    /// Ascending. Holds exactly one element that is not void for each user.
    changes: Vec<Change>,
}

impl Reader {
    /// No entry at or below this position will be handed out.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.next.position - 1
    }

    /// Whether a sweep is under way.
    #[must_use]
    pub fn is_sweeping(&self) -> bool {
        self.sweep.is_some()
    }

    fn is_news(&self, change: Change, block: usize) -> bool {
        self.next <= change
            && self
                .passed
                .get(change.user as usize / block)
                .is_none_or(|&at| at < change.position)
    }
}

impl Index {
    pub(super) fn new(block: usize) -> Self {
        Self {
            block,
            head: Head::default(),
            users: Vec::new(),
            by_id: FxHashMap::default(),
            changes: Vec::new(),
        }
    }

    /// Puts the devices of a store in place; they come in any order.
    pub(super) fn restore(
        &mut self,
        devices: impl Iterator<Item = (UserId, Clocks, u64)>,
        resolved_ms: u64,
    ) {
        for (user, clocks, position) in devices {
            let at = self.place(user);
            let seen = &mut self.users[at as usize];
            seen.clocks = seen.clocks.newest(clocks);
            seen.position = seen.position.max(position);
            self.head.position = self.head.position.max(position);
        }
        let mut changes: Vec<Change> = (0..)
            .zip(&self.users)
            .map(|(user, seen)| Change {
                position: seen.position,
                user,
            })
            .collect();
        changes.sort_unstable();
        self.changes = changes;
        self.resolve(resolved_ms);
    }

    /// Takes what a commit changed. Positions ascend.
    pub(super) fn publish(
        &mut self,
        position: u64,
        resolved_ms: u64,
        changes: &[(UserId, Clocks)],
    ) {
        debug_assert!(self.head.position < position, "positions ascend");
        let first = self.changes.len();
        for &(id, clocks) in changes {
            let user = self.place(id);
            let seen = &mut self.users[user as usize];
            seen.clocks = seen.clocks.newest(clocks);
            // Two devices of one user in one commit are one change.
            if seen.position != position {
                seen.position = position;
                self.changes.push(Change { position, user });
            }
        }
        self.changes[first..].sort_unstable();
        self.head.position = position;
        self.resolve(resolved_ms);
        if 2 * self.users.len() + SLACK < self.changes.len() {
            let users = &self.users;
            self.changes
                .retain(|change| users[change.user as usize].position == change.position);
        }
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

    pub(super) fn find(&self, user: &UserId) -> Option<&LastSeen> {
        self.by_id.get(user).map(|&at| &self.users[at as usize])
    }

    /// A reader that is handed the state of every user, then changes.
    pub(super) fn reader_from_start(&self) -> Reader {
        let mut reader = self.reader_after(0);
        self.sweep(&mut reader);
        reader
    }

    /// A reader that is handed what changed after `position`.
    pub(super) fn reader_after(&self, position: u64) -> Reader {
        let next = Change {
            position: position.saturating_add(1),
            user: 0,
        };
        Reader {
            next,
            sweep: None,
            passed: Vec::new(),
        }
    }

    /// Lets a reader that cannot get level by following do so in one pass over all users.
    pub(super) fn sweep(&self, reader: &mut Reader) {
        reader
            .passed
            .resize(self.users.len().div_ceil(self.block), 0);
        reader.sweep = Some(Sweep {
            start: self.head,
            next_user: 0,
            end_user: self.next_user(),
        });
    }

    /// Hands out the next few entries that the reader has not had and that are `wanted`.
    pub(super) fn read(
        &self,
        reader: &mut Reader,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<LastSeen>,
    ) -> Step {
        match reader.sweep.take() {
            Some(sweep) => self.read_sweeping(reader, sweep, wanted, entries),
            None => self.read_following(reader, wanted, entries),
        }
    }

    fn read_following(
        &self,
        reader: &mut Reader,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<LastSeen>,
    ) -> Step {
        let first = self.changes.partition_point(|change| *change < reader.next);
        for &change in self.changes[first..].iter().take(self.block) {
            let seen = &self.users[change.user as usize];
            let is_void = seen.position != change.position;
            if !is_void && reader.is_news(change, self.block) && wanted(seen) {
                entries.push(*seen);
            }
        }
        match self.changes.get(first + self.block) {
            Some(&next) => {
                reader.next = next;
                Step::Behind
            }
            None => {
                // A reader from beyond the head stays there: nothing it has not had can be below.
                reader.next = reader.next.max(self.after_head(self.head));
                reader.passed.clear();
                Step::Level(self.head)
            }
        }
    }

    fn read_sweeping(
        &self,
        reader: &mut Reader,
        mut sweep: Sweep,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<LastSeen>,
    ) -> Step {
        if sweep.next_user < sweep.end_user {
            let first = sweep.next_user as usize;
            // Whole blocks, also where the last one has grown since: `passed` speaks for all of it.
            for (user, seen) in (sweep.next_user..)
                .zip(&self.users[first..])
                .take(self.block)
            {
                let change = Change {
                    position: seen.position,
                    user,
                };
                if reader.is_news(change, self.block) && wanted(seen) {
                    entries.push(*seen);
                }
                sweep.next_user = user + 1;
            }
            reader.passed[first / self.block] = self.head.position;
        }
        if sweep.next_user < sweep.end_user {
            reader.sweep = Some(sweep);
            return Step::Behind;
        }
        // Whoever was at or below the start has been handed out where it stood, or has moved beyond.
        reader.next = reader.next.max(self.after_head(sweep.start));
        Step::Level(sweep.start)
    }

    fn after_head(&self, head: Head) -> Change {
        Change {
            position: head.position + 1,
            user: 0,
        }
    }

    fn place(&mut self, user: UserId) -> u32 {
        let next = self.next_user();
        let at = *self.by_id.entry(user).or_insert(next);
        if at == next {
            self.users.push(LastSeen {
                user,
                clocks: Clocks::default(),
                position: 0,
            });
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

    use proptest::prelude::*;

    use super::*;

    /// Small, so that a few users are many blocks.
    const BLOCK: usize = 3;

    fn user(n: u8) -> UserId {
        UserId([n; 16])
    }

    fn heard(at_ms: u64) -> Clocks {
        Clocks {
            last_contact_ms: at_ms,
            ..Clocks::default()
        }
    }

    #[derive(Clone, Debug)]
    enum Event {
        Publish(Vec<(u8, u64)>),
        /// A new reader of everything.
        Start,
        /// A new reader from a position this many before the head.
        Resume(u64),
        Read(usize),
        Sweep(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => prop::collection::vec((0u8..20, 0u64..1000), 0..12).prop_map(Event::Publish),
            1 => Just(Event::Start),
            1 => (0u64..40).prop_map(Event::Resume),
            8 => any::<usize>().prop_map(Event::Read),
            1 => any::<usize>().prop_map(Event::Sweep),
        ]
    }

    /// What is true: every user's value after each commit.
    #[derive(Default)]
    struct Model {
        commits: Vec<BTreeMap<UserId, (u64, u64)>>,
    }

    impl Model {
        fn head(&self) -> u64 {
            self.commits.len() as u64
        }

        fn at(&self, position: u64) -> BTreeMap<UserId, (u64, u64)> {
            position
                .checked_sub(1)
                .map(|at| self.commits[usize::try_from(at).unwrap()].clone())
                .unwrap_or_default()
        }

        fn publish(&mut self, changes: &[(u8, u64)]) {
            let mut now = self.at(self.head());
            for &(n, at_ms) in changes {
                let (contact, position) = now.entry(user(n)).or_default();
                *contact = at_ms.max(*contact);
                *position = self.commits.len() as u64 + 1;
            }
            self.commits.push(now);
        }
    }

    /// A reader and what it was handed.
    struct Checked {
        reader: Reader,
        start: u64,
        view: BTreeMap<UserId, (u64, u64)>,
        handed: HashSet<(UserId, u64)>,
    }

    impl Checked {
        fn read(&mut self, index: &Index, model: &Model) -> Result<Step, TestCaseError> {
            let settled = self.reader.settled();
            let is_sweeping = self.reader.is_sweeping();
            let mut entries = Vec::new();
            let step = index.read(&mut self.reader, |_| true, &mut entries);
            prop_assert!(entries.len() <= BLOCK);
            prop_assert!(is_sweeping || entries.is_sorted_by_key(|seen| seen.position));
            let now = model.at(model.head());
            for seen in entries {
                prop_assert!(settled < seen.position, "below what was settled");
                prop_assert_eq!(
                    now[&seen.user],
                    (seen.clocks.last_contact_ms, seen.position)
                );
                prop_assert!(
                    self.handed.insert((seen.user, seen.position)),
                    "handed out twice"
                );
                self.view
                    .insert(seen.user, (seen.clocks.last_contact_ms, seen.position));
            }
            prop_assert!(settled <= self.reader.settled());
            if let Step::Level(head) = step {
                prop_assert!(self.reader.settled() == head.position);
                for (user, (contact, position)) in model.at(head.position) {
                    if self.start < position {
                        let viewed = self.view.get(&user);
                        prop_assert!(
                            viewed.is_some_and(|&(c, p)| contact <= c && position <= p),
                            "level without {user}"
                        );
                    }
                }
            }
            Ok(step)
        }
    }

    proptest! {
        #[test]
        fn every_reader_gets_every_change_once_and_is_level_only_when_it_has(
            events in prop::collection::vec(event(), 1..120)
        ) {
            let mut index = Index::new(BLOCK);
            let mut model = Model::default();
            let mut readers: Vec<Checked> = Vec::new();
            for event in events {
                match event {
                    Event::Publish(changes) => {
                        model.publish(&changes);
                        let changes: Vec<_> =
                            changes.iter().map(|&(n, at_ms)| (user(n), heard(at_ms))).collect();
                        index.publish(model.head(), 0, &changes);
                    }
                    Event::Start | Event::Resume(_) => {
                        let (reader, start) = match event {
                            Event::Resume(back) => {
                                let start = model.head().saturating_sub(back);
                                (index.reader_after(start), start)
                            }
                            _ => (index.reader_from_start(), 0),
                        };
                        let (view, handed) = Default::default();
                        readers.push(Checked { reader, start, view, handed });
                    }
                    Event::Read(which) if !readers.is_empty() => {
                        let which = which % readers.len();
                        readers[which].read(&index, &model)?;
                    }
                    Event::Sweep(which) if !readers.is_empty() => {
                        let which = which % readers.len();
                        index.sweep(&mut readers[which].reader);
                    }
                    Event::Read(_) | Event::Sweep(_) => {}
                }
                prop_assert!(index.changes.len() <= 2 * index.users.len() + SLACK);
            }
            for reader in &mut readers {
                while reader.read(&index, &model)? != Step::Level(index.head()) {}
                let changed: BTreeMap<_, _> = model
                    .at(model.head())
                    .into_iter()
                    .filter(|(_, (_, position))| reader.start < *position)
                    .collect();
                prop_assert_eq!(&reader.view, &changed);
            }
        }
    }

    #[test]
    fn a_sweep_gets_level_with_users_who_change_faster_than_they_are_read() {
        let mut index = Index::new(BLOCK);
        let everybody: Vec<_> = (0..50).map(|n| (user(n), heard(1))).collect();
        index.publish(1, 10, &everybody);
        let mut reader = index.reader_after(0);

        // Following alone never gets there: whoever is next has moved away.
        let mut entries = Vec::new();
        for position in 2..200 {
            assert_eq!(
                index.read(&mut reader, |_| true, &mut entries),
                Step::Behind
            );
            index.publish(position, 10 * position, &everybody);
        }
        index.sweep(&mut reader);
        entries.clear();
        let mut position = 200;
        let head = loop {
            if let Step::Level(head) = index.read(&mut reader, |_| true, &mut entries) {
                break head;
            }
            index.publish(position, 10 * position, &everybody);
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
    }

    #[test]
    fn the_list_of_changes_stays_short_however_long_it_runs() {
        let mut index = Index::new(BLOCK);
        index.publish(1, 0, &[(user(0), heard(1)), (user(1), heard(1))]);
        for position in 2..10_000 {
            index.publish(position, 0, &[(user(1), heard(position))]);
        }
        assert!(index.changes.len() <= 2 * 2 + SLACK);
        let mut entries = Vec::new();
        let mut reader = index.reader_after(0);
        while index.read(&mut reader, |_| true, &mut entries) == Step::Behind {}
        let positions: Vec<_> = entries.iter().map(|seen| seen.position).collect();
        assert_eq!(positions, [1, 9_999]);
    }

    #[test]
    fn a_reader_gets_only_whom_it_wants_and_is_level_all_the_same() {
        let mut index = Index::new(BLOCK);
        let everybody: Vec<_> = (0..50).map(|n| (user(n), heard(1))).collect();
        index.publish(1, 5, &everybody);
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
            entries.iter().map(|seen| seen.user).collect::<Vec<_>>(),
            [user(41)]
        );
    }
}
