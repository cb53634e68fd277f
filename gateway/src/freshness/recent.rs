//! The last few commits as they were, for readers that are level: what each of them would read is the same.
//!
//! Plain data. Knows values in the order of commits, and a place to keep what was made of them; must not
//! know what that is, or who reads.
//!
//! # Bounds
//!
//! At most as many values as [`Recent::new`] is told, 72 bytes each and what was made of them; every commit
//! takes the room of one more, so that those that change nobody do not pile up. The oldest makes way, and
//! whoever has not read it by then reads the users themselves, which coalesces. A commit that is larger
//! than all the room is not kept at all.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;

use super::index::LastSeen;
use crate::grants::CheckerSet;

/// What one commit changed.
#[derive(Debug)]
pub struct Commit {
    /// The head before it.
    previous: u64,
    position: u64,
    seen: Vec<LastSeen>,
    /// Who may be told of all of them.
    granted_by_all: CheckerSet,
    encoded: OnceLock<Encoded>,
}

/// What one commit changed, in somebody's words.
#[derive(Debug)]
pub struct Encoded {
    /// The words for all values, one after the other.
    pub bytes: Bytes,
    /// Where the words for each value end.
    pub ends: Vec<usize>,
}

/// Commits in ascending order, without a gap.
#[derive(Debug)]
pub(super) struct Recent {
    commits: VecDeque<Arc<Commit>>,
    room: usize,
    room_taken: usize,
}

impl Commit {
    /// The users that it changed, as it left them.
    #[must_use]
    pub fn seen(&self) -> &[LastSeen] {
        &self.seen
    }

    /// The checkers that may be told of all of these users.
    #[must_use]
    pub fn granted_by_all(&self) -> CheckerSet {
        self.granted_by_all
    }

    /// The same in the words of `encode`, which is asked only once. All who read a commit must mean the
    /// same by them.
    pub fn encoded(&self, encode: impl FnOnce(&[LastSeen]) -> Encoded) -> &Encoded {
        self.encoded.get_or_init(|| encode(&self.seen))
    }

    fn room(&self) -> usize {
        self.seen.len() + 1
    }
}

impl Encoded {
    /// The words for the value at this place.
    #[must_use]
    pub fn of(&self, at: usize) -> &[u8] {
        let begin = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[begin..self.ends[at]]
    }
}

impl Recent {
    pub(super) fn new(room: usize) -> Self {
        Self {
            commits: VecDeque::new(),
            room,
            room_taken: 0,
        }
    }

    /// Takes the commit that comes after all others.
    pub(super) fn push(&mut self, previous: u64, position: u64, seen: Vec<LastSeen>) {
        let commit = Commit {
            previous,
            position,
            granted_by_all: seen
                .iter()
                .fold(CheckerSet::ALL, |all, seen| all.intersection(seen.granted)),
            seen,
            encoded: OnceLock::new(),
        };
        self.room_taken += commit.room();
        self.commits.push_back(Arc::new(commit));
        while self.room < self.room_taken
            && let Some(oldest) = self.commits.pop_front()
        {
            self.room_taken -= oldest.room();
        }
    }

    /// The commits after `position`, if there are any, all of them are here, and together they take no more
    /// than this much room.
    pub(super) fn after(&self, position: u64, room: usize) -> Option<Vec<Arc<Commit>>> {
        let first = self
            .commits
            .partition_point(|commit| commit.position <= position);
        if self.commits.get(first)?.previous > position {
            return None;
        }
        let commits = self.commits.range(first..);
        let taken: usize = commits.clone().map(|commit| commit.room()).sum();
        (taken <= room).then(|| commits.cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use waypost_proto::{device::Clocks, id::UserId};

    use super::*;
    use crate::sharing::Sharing;

    fn seen(users: u8, position: u64) -> Vec<LastSeen> {
        let seen = |n| LastSeen {
            user: UserId([n; 16]),
            clocks: Clocks::default(),
            sharing: Sharing::Active,
            granted: CheckerSet::ALL,
            position,
        };
        (0..users).map(seen).collect()
    }

    fn positions(recent: &Recent, after: u64) -> Option<Vec<u64>> {
        let commits = recent.after(after, 100)?;
        Some(commits.iter().map(|commit| commit.position).collect())
    }

    #[test]
    fn commits_are_handed_out_without_a_gap_or_not_at_all() {
        let mut recent = Recent::new(12);
        recent.push(0, 10, seen(3, 10));
        recent.push(10, 11, seen(3, 11));
        recent.push(11, 20, seen(2, 20));
        assert_eq!(positions(&recent, 0), Some(vec![10, 11, 20]));
        assert_eq!(positions(&recent, 10), Some(vec![11, 20]));
        assert_eq!(positions(&recent, 15), Some(vec![20]));
        assert_eq!(positions(&recent, 20), None);
        // The first one makes way, and whoever has not had it gets none.
        recent.push(20, 21, seen(1, 21));
        assert_eq!(positions(&recent, 0), None);
        assert_eq!(positions(&recent, 9), None);
        assert_eq!(positions(&recent, 10), Some(vec![11, 20, 21]));
        assert!(
            recent.after(10, 8).is_none(),
            "3 + 2 + 1 values and 3 commits"
        );
        assert!(recent.after(10, 9).is_some());
        // One that is larger than all the room leaves nothing.
        recent.push(21, 22, seen(12, 22));
        assert_eq!(positions(&recent, 21), None);
        recent.push(22, 23, seen(1, 23));
        assert_eq!(positions(&recent, 21), None);
        assert_eq!(positions(&recent, 22), Some(vec![23]));
    }

    #[test]
    fn commits_that_change_nobody_do_not_pile_up() {
        let mut recent = Recent::new(12);
        for position in 1..1_000 {
            recent.push(position - 1, position, Vec::new());
        }
        assert_eq!(recent.commits.len(), 12);
    }

    #[test]
    fn the_words_for_a_commit_are_found_once() {
        let mut recent = Recent::new(12);
        recent.push(0, 1, seen(2, 1));
        let times = Cell::new(0);
        for _ in 0..3 {
            let commits = recent.after(0, 12).unwrap();
            let encoded = commits[0].encoded(|seen| {
                times.set(times.get() + 1);
                Encoded {
                    bytes: Bytes::from_static(b"words"),
                    ends: vec![2; seen.len()],
                }
            });
            assert_eq!((&*encoded.bytes, encoded.ends.len()), (&b"words"[..], 2));
        }
        assert_eq!(times.get(), 1);
    }
}
