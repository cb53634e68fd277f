//! How fresh every user is, in memory: written by the committer, read by the feed.
//!
//! Knows users, whether they share and with whom, clocks and positions. Must not know where commits come from, who reads,
//! or what the time is; has no task of its own. What is published here is durable already.
//!
//! # Bounds
//!
//! The users, which are all kept; some 30 bytes for each who has granted a checker and was never seen, and for each who
//! has withdrawn a grant: both come by a device with a certificate only. For each reader that lags up to 48 bytes a user for changes that are void
//! but counted, less where several lag at the same place, and up to some 30 bytes a user that the reader
//! remembers. The last 16,384 values that were published, for readers that are level. No lock is held for
//! longer than a block or a commit takes, save when one of the tables grows.

mod changes;
mod index;
mod recent;

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::RwLock;
use tokio::sync::watch;
use waypost_proto::{
    device::Clocks,
    id::{DeviceId, UserId},
};

use self::index::{BLOCK, Index};
pub use self::{
    index::{Head, LastSeen, Reader, Step, Update},
    recent::{Commit, Encoded},
};
use crate::{
    grants::{CheckerNumber, CheckerSet, Visibility},
    sharing::{Sharing, Transition, Withheld},
};

/// The freshness of every user, and the head that readers wait for.
#[derive(Debug)]
pub struct Freshness {
    /// Held for a commit by the writer and for a block by readers.
    index: RwLock<Index>,
    /// A copy of the index's head, advanced after it.
    head: watch::Sender<Head>,
}

/// Who may be told of whom when a store is opened.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    /// Whom everybody has granted who has not decided otherwise.
    pub by_all: CheckerSet,
    /// Those who have decided something.
    pub decided: Vec<(UserId, Visibility)>,
}

impl Grants {
    /// Every checker may be told of everybody who has not decided otherwise.
    #[must_use]
    pub fn everything() -> Self {
        Self {
            by_all: CheckerSet::ALL,
            decided: Vec::new(),
        }
    }
}

/// What a checker is told of one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glimpse {
    /// Nothing: the user was never seen, or never granted it.
    NeverSeen,
    /// Nothing any more.
    Withdrawn,
    /// What is known.
    Seen(LastSeen),
}

/// Some of the users who have been silent, longest silence first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StalePage {
    /// They have not been heard since, as far as `head` knows.
    pub users: Vec<LastSeen>,
    /// Continue after this one; none on the last page.
    pub next: Option<Silence>,
    /// The state the page is complete for: taken before it was gathered.
    pub head: Head,
}

/// A place in the order of silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Silence {
    /// When the user was last heard.
    pub last_contact_ms: u64,
    /// The user, to tell apart those who fell silent in the same millisecond.
    pub user: UserId,
}

impl Freshness {
    /// The state of a store: its devices in any order, who does not share, who may be told of whom, and the moment up to
    /// which it holds every contact.
    #[must_use]
    pub fn restore(
        devices: impl Iterator<Item = (DeviceId, Clocks, u64)>,
        withheld: impl IntoIterator<Item = (UserId, Withheld)>,
        grants: Grants,
        resolved_ms: u64,
    ) -> Self {
        let mut index = Index::new(BLOCK);
        index.restore(
            devices.map(|(id, clocks, position)| (id.user, clocks, position)),
            withheld.into_iter(),
            grants.by_all,
            grants.decided.into_iter(),
            resolved_ms,
        );
        let head = watch::Sender::new(index.head());
        Self {
            index: RwLock::new(index),
            head,
        }
    }

    /// The same, and it has come at least to this position: not every commit is in a device's record.
    #[must_use]
    pub fn at_least(self, position: u64) -> Self {
        self.index.write().at_least(position);
        self.head.send_replace(self.head());
        self
    }

    /// Makes a durable commit visible: who was heard, and what holders have turned, in that order. Called by the
    /// committer alone, with ascending positions; every contact received up to `resolved_ms` is in this commit or
    /// an earlier one.
    pub fn publish(
        &self,
        position: u64,
        resolved_ms: u64,
        contacts: &[(UserId, Clocks)],
        transitions: &[Transition],
    ) {
        let head = {
            let mut index = self.index.write();
            index.publish(position, resolved_ms, contacts, transitions);
            index.head()
        };
        self.head.send_replace(head);
    }

    /// Every contact up to `resolved_ms` has been published. Called by the committer when it is idle.
    pub fn resolve(&self, resolved_ms: u64) {
        let head = {
            let mut index = self.index.write();
            index.resolve(resolved_ms);
            index.head()
        };
        self.head.send_replace(head);
    }

    /// How far the state has come.
    #[must_use]
    pub fn head(&self) -> Head {
        self.index.read().head()
    }

    /// Tells of every new head. When it is told, what belongs to it can be read.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    /// How many have subscribed and still are.
    #[must_use]
    pub fn subscribers(&self) -> usize {
        self.head.receiver_count()
    }

    /// When a user was last heard; 0 for one that was never seen.
    #[must_use]
    pub fn last_contact_ms(&self, user: &UserId) -> u64 {
        let index = self.index.read();
        index
            .find(user)
            .map_or(0, |seen| seen.clocks.last_contact_ms)
    }

    /// Who may be told of a user, and who could once.
    #[must_use]
    pub fn visibility(&self, user: &UserId) -> Visibility {
        self.index.read().visibility(user)
    }

    /// What a checker is told of a user, now.
    #[must_use]
    pub fn glimpse(&self, checker: CheckerNumber, user: &UserId) -> Glimpse {
        self.index.read().glimpse(checker, user)
    }

    /// How many users have ever been seen.
    #[must_use]
    pub fn users(&self) -> usize {
        self.index.read().users().len()
    }

    /// How many changes are kept, one for each user and what readers that lag still count.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.index.read().changes()
    }

    /// The memory, in bytes, of what is kept for readers that lag, and of changes that are not yet forgotten.
    #[must_use]
    pub fn lagging_bytes(&self) -> usize {
        self.index.read().lagging_bytes()
    }

    /// What a checker is told of these users, at one head.
    #[must_use]
    pub fn get(&self, checker: CheckerNumber, users: &[UserId]) -> (Vec<Glimpse>, Head) {
        let index = self.index.read();
        let glimpses = users.iter().map(|user| index.glimpse(checker, user));
        (glimpses.collect(), index.head())
    }

    /// Up to `limit` users who share, with this checker too, and were not heard since `older_than_ms`, from `after` on,
    /// longest silence first. Looks at every user, a block at a time.
    #[must_use]
    pub fn stale(
        &self,
        checker: CheckerNumber,
        older_than_ms: u64,
        after: Option<Silence>,
        limit: usize,
    ) -> StalePage {
        let head = self.head();
        let mut longest = BTreeMap::new();
        for first in (0..self.users()).step_by(BLOCK) {
            let index = self.index.read();
            for &seen in index.users()[first..].iter().take(BLOCK) {
                let last_contact_ms = seen.clocks.last_contact_ms;
                let silence = Silence {
                    last_contact_ms,
                    user: seen.user,
                };
                if seen.sharing != Sharing::Active
                    || !seen.granted.contains(checker)
                    || older_than_ms <= last_contact_ms
                    || after.is_some_and(|after| silence <= after)
                {
                    continue;
                }
                // One more than asked for, to know whether there is a next page.
                if longest.len() <= limit {
                    longest.insert(silence, seen);
                } else if longest
                    .last_key_value()
                    .is_some_and(|(last, _)| silence < *last)
                {
                    longest.pop_last();
                    longest.insert(silence, seen);
                }
            }
        }
        let has_more = limit < longest.len();
        if has_more {
            longest.pop_last();
        }
        let next = longest
            .last_key_value()
            .map(|(&last, _)| last)
            .filter(|_| has_more);
        StalePage {
            users: longest.into_values().collect(),
            next,
            head,
        }
    }

    /// A reader that is handed the state of every user and then what changes.
    #[must_use]
    pub fn reader_from_start(&self) -> Reader {
        self.index.write().reader_from_start()
    }

    /// A reader that is handed every user changed after `position`, once, and then what changes.
    #[must_use]
    pub fn reader_after(&self, position: u64) -> Reader {
        self.index.write().reader_after(position)
    }

    /// Lets a reader that does not get level by following do so in a sweep, which ends however fast users
    /// change. Does nothing while one is under way.
    pub fn sweep(&self, reader: &mut Reader) {
        let target = self.index.read().sweep_target();
        reader.sweep(target);
    }

    /// Everything committed since, for a reader that has had everything before and is not far behind: then
    /// it is level with this head. The commits are the same for all readers. None when there is nothing
    /// new, or it has to [`Self::read`].
    pub fn read_recent(&self, reader: &mut Reader) -> Option<(Vec<Arc<Commit>>, Head)> {
        self.index.read().read_recent(reader)
    }

    /// Appends to `entries` the next few that the reader has not had and that are `wanted`. Looks at a
    /// bounded number, so it may append none and still be [`Step::Behind`].
    pub fn read(
        &self,
        reader: &mut Reader,
        wanted: impl Fn(&LastSeen) -> bool,
        entries: &mut Vec<Update>,
    ) -> Step {
        reader.make_room(BLOCK);
        entries.reserve(BLOCK);
        let step = self.index.read().read(reader, wanted, entries);
        reader.show_memory();
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sharing::Turn;

    const OPS: CheckerNumber = CheckerNumber::FIRST;

    fn user(n: u8) -> UserId {
        UserId([n; 16])
    }

    fn heard(at_ms: u64) -> Clocks {
        Clocks {
            last_contact_ms: at_ms,
            durable_ms: at_ms,
            ..Clocks::default()
        }
    }

    fn empty() -> Freshness {
        Freshness::restore(std::iter::empty(), [], Grants::everything(), 0)
    }

    fn seen(freshness: &Freshness, n: u8) -> LastSeen {
        match freshness.glimpse(OPS, &user(n)) {
            Glimpse::Seen(seen) => seen,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_user_is_as_fresh_as_its_freshest_device() {
        let device = |n, device| DeviceId {
            user: user(n),
            device,
        };
        let old = Clocks {
            last_contact_ms: 10,
            last_sample_ms: 9,
            last_fix_ms: 3,
            durable_ms: 11,
        };
        let new = Clocks {
            last_contact_ms: 20,
            last_sample_ms: 5,
            last_fix_ms: 4,
            durable_ms: 21,
        };
        let freshness = Freshness::restore(
            [
                (device(1, 7), new, 5),
                (device(2, 1), old, 2),
                (device(1, 8), old, 3),
            ]
            .into_iter(),
            [],
            Grants::everything(),
            40,
        );
        assert_eq!(freshness.users(), 2);
        let (found, head) = freshness.get(OPS, &[user(1), user(9)]);
        let clocks = Clocks {
            last_contact_ms: 20,
            last_sample_ms: 9,
            last_fix_ms: 4,
            durable_ms: 21,
        };
        assert_eq!(
            found,
            [
                Glimpse::Seen(LastSeen {
                    user: user(1),
                    clocks,
                    sharing: Sharing::Active,
                    granted: CheckerSet::ALL,
                    position: 5
                }),
                Glimpse::NeverSeen
            ]
        );
        assert_eq!(
            head,
            Head {
                position: 5,
                resolved_ms: 40
            }
        );
    }

    #[test]
    fn nothing_goes_back() {
        let freshness = empty();
        freshness.publish(1, 100, &[(user(1), heard(90))], &[]);
        freshness.publish(2, 80, &[(user(1), heard(50))], &[]);
        freshness.resolve(70);
        assert_eq!(
            freshness.head(),
            Head {
                position: 2,
                resolved_ms: 100
            }
        );
        let seen = seen(&freshness, 1);
        assert_eq!((seen.clocks, seen.position), (heard(90), 2));
    }

    /// The bound that the head of this file states, with all the room that tables and blocks may take beside it.
    #[test]
    fn a_reader_that_lags_costs_a_few_bytes_a_user_and_one_that_is_level_nothing() {
        const USERS: usize = 20_000;
        let id = |n: usize| UserId((n as u128).to_be_bytes());
        let freshness = empty();
        let mut slow = freshness.reader_from_start();
        let mut entries = Vec::new();
        let mut most = 0;
        for position in 1..=400 {
            let changes: Vec<_> = (0..USERS / 10)
                .map(|n| {
                    (
                        id((n * 7 + position * 1_999) % USERS),
                        heard(position as u64),
                    )
                })
                .collect();
            freshness.publish(position as u64, 0, &changes, &[]);
            if position % 40 == 0 {
                // A few steps are not enough to get level.
                freshness.read(&mut slow, |_| true, &mut entries);
                freshness.sweep(&mut slow);
            }
            most = most.max(freshness.lagging_bytes());
        }
        let bound = USERS * 128;
        assert!(USERS * 24 < most && most < bound, "{most} bytes");
        while freshness.read(&mut slow, |_| true, &mut entries) == Step::Behind {}
        for position in 401..500 {
            let everybody: Vec<_> = (0..USERS).map(|n| (id(n), heard(position))).collect();
            freshness.publish(position, 0, &everybody, &[]);
            while freshness.read(&mut slow, |_| true, &mut entries) == Step::Behind {}
        }
        assert!(
            freshness.lagging_bytes() < USERS * 40,
            "nothing but what is not yet forgotten"
        );
    }

    #[test]
    fn whoever_has_paused_is_not_silent_and_stands_where_the_pause_began_also_after_a_restart() {
        let pause = |position, to| Transition {
            user: user(1),
            turn: Turn::Sharing(to),
            checkers: CheckerSet::ALL,
            at_ms: 70,
            position,
            number: 0,
        };
        let freshness = empty();
        freshness.publish(1, 50, &[(user(1), heard(50)), (user(2), heard(50))], &[]);
        let paused = [pause(2, Sharing::Paused)];
        freshness.publish(2, 70, &[(user(1), heard(70))], &paused);
        let listed = |freshness: &Freshness| -> Vec<UserId> {
            let page = freshness.stale(OPS, 1_000, None, 9);
            page.users.iter().map(|seen| seen.user).collect()
        };
        assert_eq!(listed(&freshness), [user(2)]);
        let seen = seen(&freshness, 1);
        assert_eq!((seen.sharing, seen.position), (Sharing::Paused, 2));

        // What the device did meanwhile changed its record, at 5, and shows nowhere.
        let device = |n| DeviceId {
            user: user(n),
            device: 1,
        };
        let lasting = Withheld {
            sharing: Sharing::Paused,
            position: 2,
            since_ms: 70,
            told: CheckerSet::ALL,
        };
        let restored = Freshness::restore(
            [(device(1), heard(70), 5), (device(2), heard(50), 1)].into_iter(),
            [(user(1), lasting)],
            Grants::everything(),
            100,
        );
        assert_eq!(restored.get(OPS, &[user(1)]).0[0], Glimpse::Seen(seen));
        assert_eq!(restored.head().position, 5);
        assert_eq!(listed(&restored), [user(2)]);

        let resumed = [pause(6, Sharing::Active)];
        restored.publish(6, 200, &[(user(1), heard(200))], &resumed);
        assert_eq!(listed(&restored), [user(2), user(1)]);
    }

    #[test]
    fn of_a_user_who_was_erased_nothing_is_known_but_that() {
        let freshness = empty();
        let erased = Transition {
            user: user(1),
            turn: Turn::Sharing(Sharing::Erased),
            checkers: CheckerSet::ALL,
            at_ms: 70,
            position: 2,
            number: 0,
        };
        freshness.publish(1, 50, &[(user(1), heard(50))], &[]);
        freshness.publish(2, 70, &[(user(1), heard(70))], &[erased]);
        let marker = LastSeen {
            user: user(1),
            clocks: Clocks::default(),
            sharing: Sharing::Erased,
            granted: CheckerSet::ALL,
            position: 2,
        };
        assert_eq!(freshness.get(OPS, &[user(1)]).0, [Glimpse::Seen(marker)]);
        let withheld = Withheld {
            sharing: Sharing::Erased,
            position: 2,
            since_ms: 70,
            told: CheckerSet::ALL,
        };
        let restored = Freshness::restore(
            std::iter::empty(),
            [(user(1), withheld)],
            Grants::everything(),
            100,
        );
        assert_eq!(restored.get(OPS, &[user(1)]).0, [Glimpse::Seen(marker)]);
        for freshness in [freshness, restored] {
            assert_eq!(freshness.stale(OPS, 1_000, None, 9).users, []);
        }
    }

    #[test]
    fn subscribers_hear_of_commits_and_of_idle_time() {
        let freshness = empty();
        let mut heads = freshness.subscribe();
        freshness.publish(1, 10, &[(user(1), heard(10))], &[]);
        assert!(heads.has_changed().unwrap());
        assert_eq!(
            *heads.borrow_and_update(),
            Head {
                position: 1,
                resolved_ms: 10
            }
        );
        freshness.resolve(20);
        assert_eq!(
            *heads.borrow_and_update(),
            Head {
                position: 1,
                resolved_ms: 20
            }
        );
    }

    #[test]
    fn the_silent_are_listed_longest_first_in_pages_that_do_not_overlap() {
        let freshness = empty();
        // Users 1 and 2 fell silent in the same millisecond; 9 is not silent at all.
        let contacts = [(5, 300), (2, 100), (1, 100), (7, 200), (9, 500)];
        let changes: Vec<_> = contacts.map(|(n, at_ms)| (user(n), heard(at_ms))).into();
        freshness.publish(1, 600, &changes, &[]);

        let mut after = None;
        let mut listed = Vec::new();
        let mut pages = 0;
        loop {
            let page = freshness.stale(OPS, 500, after, 2);
            pages += 1;
            listed.extend(page.users.iter().map(|seen| seen.user));
            assert_eq!(page.head.resolved_ms, 600);
            after = page.next;
            if after.is_none() {
                break;
            }
            // The one who speaks up between two pages is not listed; nobody else is moved.
            freshness.publish(1 + pages, 600, &[(user(5), heard(550))], &[]);
        }
        assert_eq!(listed, [user(1), user(2), user(7)]);
        assert_eq!(pages, 2);
    }

    #[test]
    fn a_checker_is_told_of_those_only_who_granted_it() {
        let other = CheckerNumber::new(1).unwrap();
        let visibility = |granted: CheckerNumber, withdrawn: CheckerSet| Visibility {
            granted: granted.into(),
            withdrawn,
        };
        let grants = Grants {
            by_all: CheckerSet::default(),
            decided: vec![
                (user(1), visibility(OPS, other.into())),
                (user(2), visibility(other, CheckerSet::default())),
            ],
        };
        let device = |n| DeviceId {
            user: user(n),
            device: 1,
        };
        let devices = [1, 2, 3].map(|n| (device(n), heard(10), 1));
        let freshness = Freshness::restore(devices.into_iter(), [], grants, 40);
        let users = [user(1), user(2), user(3)];
        let told = |checker| -> Vec<bool> {
            let (glimpses, _) = freshness.get(checker, &users);
            let seen = |glimpse: &Glimpse| matches!(glimpse, Glimpse::Seen(_));
            glimpses.iter().map(seen).collect()
        };
        assert_eq!(told(OPS), [true, false, false]);
        assert_eq!(told(other), [false, true, false]);
        assert_eq!(freshness.glimpse(other, &user(1)), Glimpse::Withdrawn);
        assert_eq!(freshness.glimpse(OPS, &user(2)), Glimpse::NeverSeen);
        let listed = |checker| -> Vec<UserId> {
            let page = freshness.stale(checker, 1_000, None, 9);
            page.users.iter().map(|seen| seen.user).collect()
        };
        assert_eq!(listed(OPS), [user(1)]);
        assert_eq!(listed(other), [user(2)]);
        // Who has erased everything is known as that to those who could be told.
        let erased = Transition {
            user: user(1),
            turn: Turn::Sharing(Sharing::Erased),
            checkers: OPS.into(),
            at_ms: 70,
            position: 2,
            number: 0,
        };
        freshness.publish(2, 70, &[], &[erased]);
        assert_eq!(seen(&freshness, 1).sharing, Sharing::Erased);
        assert_eq!(freshness.glimpse(other, &user(1)), Glimpse::NeverSeen);
    }
}
