//! The changes of users in the order of their positions, each user's last one and of the earlier ones
//! what somebody still counts.
//!
//! Plain data. Knows what a change is and which ones may be forgotten; must not know what users look like
//! or how readers read.
//!
//! A change is void as soon as its user has changed again. A void one is needed by a reader that stands
//! before it and after the user's change before it: there the reader learns which value it had last, and so
//! how many it missed. Nobody needs any other.
//!
//! # Bounds
//!
//! With U users, and readers that lag at R different places: at most twice `U × (1 + R)` changes, and a few
//! blocks, of 24 bytes each. Forgetting goes on all the time, four changes looked at for each one that
//! comes, a block at once; nothing ever walks the whole list. One pass over a list of length n leaves at most
//! `U × (1 + R)`, and the n / 4 that came meanwhile.

use std::collections::VecDeque;

/// How many changes are looked at, to be kept or forgotten, for each one that comes.
const LOOKED_AT_PER_CHANGE: usize = 4;

/// A place in the list; there need not be a change at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) position: u64,
    pub(super) user: u32,
}

impl Place {
    /// Behind all changes at or below this position, and before all others.
    pub(super) fn after(position: u64) -> Self {
        Self {
            position: position.saturating_add(1),
            user: 0,
        }
    }
}

/// A user changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) at: Place,
    /// The which of the user's changes it is. Comes round after 2^32 of them.
    pub(super) ordinal: u32,
    /// The position of the user's change before it.
    pub(super) previous: u64,
}

/// Changes in ascending order.
#[derive(Debug)]
pub(super) struct Changes {
    /// How many are in a block at most.
    block: usize,
    /// None is empty.
    blocks: VecDeque<Vec<Change>>,
    len: usize,
    pass: Pass,
    /// How many more may be looked at.
    allowance: usize,
}

/// One walk over the list that forgets what is not needed.
#[derive(Debug, Default)]
struct Pass {
    /// The next block to look at. Those before it are full, save for the last of them.
    next_block: usize,
    /// Changes beyond came later and are not looked at: a reader that came meanwhile may need them.
    until: u64,
    /// Where the readers stood at the beginning, ascending. One that has moved on since needs no more than
    /// it did there: what it passed meanwhile it has taken into account.
    readers: Vec<Place>,
}

impl Changes {
    pub(super) fn new(block: usize) -> Self {
        Self {
            block,
            blocks: VecDeque::new(),
            len: 0,
            pass: Pass::default(),
            allowance: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Takes a change, which comes after all others.
    pub(super) fn push(&mut self, change: Change) {
        self.len += 1;
        match self.blocks.back_mut() {
            Some(last) if last.len() < self.block => last.push(change),
            _ => {
                let mut block = Vec::with_capacity(self.block);
                block.push(change);
                self.blocks.push_back(block);
            }
        }
    }

    /// The changes from a place on.
    pub(super) fn starting_at(&self, place: Place) -> impl Iterator<Item = &Change> {
        let is_before = |change: &Change| change.at < place;
        let first = self
            .blocks
            .partition_point(|block| block.last().is_some_and(is_before));
        let skipped = self
            .blocks
            .get(first)
            .map_or(0, |block| block.partition_point(is_before));
        self.blocks.range(first..).flatten().skip(skipped)
    }

    /// Forgets some of what is not needed, after `pushed` changes have come: those for which `is_void` and
    /// which no reader needs. `readers` gives the places from which on they have yet to read.
    pub(super) fn forget(
        &mut self,
        pushed: usize,
        is_void: impl Fn(&Change) -> bool,
        readers: impl Fn() -> Vec<Place>,
    ) {
        self.allowance += pushed * LOOKED_AT_PER_CHANGE;
        while self.block <= self.allowance {
            self.allowance -= self.block;
            let first = self
                .blocks
                .get(self.pass.next_block)
                .and_then(|b| b.first());
            if first.is_none_or(|change| self.pass.until < change.at.position) {
                self.begin_pass(readers());
            }
            self.look_at_block(&is_void);
        }
    }

    fn begin_pass(&mut self, mut readers: Vec<Place>) {
        readers.sort_unstable();
        let last = self.blocks.back().and_then(|block| block.last());
        self.pass = Pass {
            next_block: 0,
            until: last.map_or(0, |change| change.at.position),
            readers,
        };
    }

    fn look_at_block(&mut self, is_void: impl Fn(&Change) -> bool) {
        let at = self.pass.next_block;
        let Some(mut block) = self.blocks.get_mut(at).map(std::mem::take) else {
            return;
        };
        let looked_at = block.len();
        block.retain(|change| {
            self.pass.until < change.at.position || !is_void(change) || self.pass.needs(change)
        });
        self.len -= looked_at - block.len();
        if let Some(before) = at.checked_sub(1) {
            let before = &mut self.blocks[before];
            let room = self.block - before.len();
            before.extend(block.drain(..room.min(block.len())));
        }
        if block.is_empty() {
            self.blocks.remove(at);
        } else {
            self.blocks[at] = block;
            self.pass.next_block += 1;
        }
    }
}

impl Pass {
    /// Whether a reader stands before this change and after the user's change before it.
    fn needs(&self, change: &Change) -> bool {
        let previous = Place {
            position: change.previous,
            user: change.at.user,
        };
        let behind = self.readers.partition_point(|&reader| reader <= previous);
        self.readers
            .get(behind)
            .is_some_and(|&reader| reader <= change.at)
    }
}
