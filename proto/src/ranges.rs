//! The dedup set: which sequence numbers of one epoch are settled.
//!
//! Knows only numbers. A well-behaved device has one number here, the floor; any other has at most
//! [`MAX_RANGES`] ranges above it, so the state of a device is bounded whatever it sends and never
//! expires. The shape is that of QUIC's and TCP's selective acknowledgements.

/// How many ranges may stand apart above the floor. Beyond it the device must send what is missing
/// first ([`Verdict::TooSparse`]); nothing is forgotten to make room.
pub const MAX_RANGES: usize = 64;

/// Sequence numbers from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeqRange {
    /// The lowest.
    pub first: u64,
    /// The highest; not below `first`.
    pub last: u64,
}

impl SeqRange {
    /// How many numbers it holds. Sequence numbers start at 1, so it fits.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(self) -> u64 {
        self.last - self.first + 1
    }
}

/// What the set says to one sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was not there and is now.
    New,
    /// It was there.
    Duplicate,
    /// It would be one range too many; the set is unchanged.
    TooSparse,
}

/// Settled sequence numbers: all of `1..=floor`, and ranges above it.
///
/// The ranges are sorted, do not touch each other or the floor, and number at most [`MAX_RANGES`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    floor: u64,
    above: Vec<SeqRange>,
}

impl RangeSet {
    /// Rebuilds a set from its parts, as [`Self::floor`] and [`Self::above`] gave them.
    /// `None` if the parts break the order or the bound.
    #[must_use]
    pub fn from_parts(floor: u64, above: Vec<SeqRange>) -> Option<Self> {
        let mut below = floor;
        for range in &above {
            // A gap of at least one number, or it would have been merged.
            if range.first < below.checked_add(2)? || range.last < range.first {
                return None;
            }
            below = range.last;
        }
        (above.len() <= MAX_RANGES).then_some(Self { floor, above })
    }

    /// All numbers up to this one are settled; 0 if none.
    #[must_use]
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// The settled ranges above the floor, in order.
    #[must_use]
    pub fn above(&self) -> &[SeqRange] {
        &self.above
    }

    /// The highest settled number; 0 if none.
    #[must_use]
    pub fn highest(&self) -> u64 {
        self.above.last().map_or(self.floor, |range| range.last)
    }

    /// Whether a number is settled.
    #[must_use]
    pub fn contains(&self, seq: u64) -> bool {
        seq <= self.floor
            || self.above[..self.ranges_from_at_most(seq)]
                .last()
                .is_some_and(|range| seq <= range.last)
    }

    /// Settles one number; 0 is not a sequence number and always a duplicate.
    pub fn insert(&mut self, seq: u64) -> Verdict {
        if self.contains(seq) {
            return Verdict::Duplicate;
        }
        if seq == self.floor + 1 {
            self.raise_floor(seq);
            return Verdict::New;
        }
        let at = self.ranges_from_at_most(seq);
        let touches_lower = at > 0 && self.above[at - 1].last + 1 == seq;
        let touches_upper = at < self.above.len() && seq + 1 == self.above[at].first;
        match (touches_lower, touches_upper) {
            (true, true) => {
                self.above[at - 1].last = self.above[at].last;
                self.above.remove(at);
            }
            (true, false) => self.above[at - 1].last = seq,
            (false, true) => self.above[at].first = seq,
            (false, false) if self.above.len() == MAX_RANGES => return Verdict::TooSparse,
            (false, false) => self.above.insert(
                at,
                SeqRange {
                    first: seq,
                    last: seq,
                },
            ),
        }
        Verdict::New
    }

    /// Gives up every number below `oldest_unsent` that is not settled, and says how many those were:
    /// the device will never send them. Numbers above the highest settled one are given up as well, if
    /// the device says so.
    pub fn close_below(&mut self, oldest_unsent: u64) -> u64 {
        let Some(upto) = oldest_unsent
            .checked_sub(1)
            .filter(|upto| *upto > self.floor)
        else {
            return 0;
        };
        let settled: u64 = self
            .above
            .iter()
            .filter(|range| range.first <= upto)
            .map(|range| range.last.min(upto) - range.first + 1)
            .sum();
        let given_up = upto - self.floor - settled;
        self.raise_floor(upto);
        given_up
    }

    /// The holes between the floor and the highest settled number, lowest first.
    pub fn missing(&self) -> impl Iterator<Item = SeqRange> {
        let starts = std::iter::once(self.floor).chain(self.above.iter().map(|range| range.last));
        starts.zip(&self.above).map(|(below, range)| SeqRange {
            first: below + 1,
            last: range.first - 1,
        })
    }

    /// How many ranges begin at or below `seq`.
    fn ranges_from_at_most(&self, seq: u64) -> usize {
        self.above.partition_point(|range| range.first <= seq)
    }

    /// Moves the floor up and swallows the ranges that it reaches.
    fn raise_floor(&mut self, upto: u64) {
        self.floor = upto;
        let mut reached = 0;
        for range in &self.above {
            if range.first > self.floor.saturating_add(1) {
                break;
            }
            self.floor = self.floor.max(range.last);
            reached += 1;
        }
        self.above.drain(..reached);
        if self.above.is_empty() {
            // A device that once had holes goes back to its constant size.
            self.above = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64),
        CloseBelow(u64),
        Reload,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            20 => (1..200_u64).prop_map(Step::Insert),
            1 => (0..200_u64).prop_map(Step::CloseBelow),
            1 => Just(Step::Reload),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_hash_set(steps in prop::collection::vec(step(), 0..400)) {
            let mut set = RangeSet::default();
            let mut model = HashSet::new();
            for step in steps {
                match step {
                    Step::Insert(seq) => match set.insert(seq) {
                        Verdict::New => prop_assert!(model.insert(seq)),
                        Verdict::Duplicate => prop_assert!(model.contains(&seq)),
                        Verdict::TooSparse => {
                            prop_assert!(!model.contains(&seq));
                            prop_assert_eq!(set.above().len(), MAX_RANGES);
                        }
                    },
                    Step::CloseBelow(seq) => {
                        let given_up = (1..seq).filter(|seq| model.insert(*seq)).count();
                        prop_assert_eq!(set.close_below(seq), given_up as u64);
                    }
                    Step::Reload => {
                        let parts = RangeSet::from_parts(set.floor(), set.above().to_vec());
                        prop_assert_eq!(parts.as_ref(), Some(&set));
                    }
                }
                for seq in 1..=200 {
                    prop_assert_eq!(set.contains(seq), model.contains(&seq), "seq {}", seq);
                }
                let missing: HashSet<u64> = set.missing().flat_map(|range| range.first..=range.last).collect();
                let holes: HashSet<u64> = (1..=set.highest()).filter(|seq| !model.contains(seq)).collect();
                prop_assert_eq!(missing, holes);
            }
        }
    }

    #[test]
    fn one_range_too_many_changes_nothing() {
        let mut set = RangeSet::default();
        for at in 1..=MAX_RANGES as u64 {
            assert_eq!(set.insert(at * 2 + 1), Verdict::New);
        }
        let before = set.clone();
        assert_eq!(set.insert(1_000), Verdict::TooSparse);
        assert_eq!(set, before);
        assert_eq!(
            set.insert(4),
            Verdict::New,
            "a number that joins two ranges always fits"
        );
    }

    #[test]
    fn the_last_sequence_numbers_do_not_overflow() {
        let mut set = RangeSet::default();
        assert_eq!(set.insert(u64::MAX), Verdict::New);
        assert_eq!(set.insert(u64::MAX), Verdict::Duplicate);
        assert_eq!(set.insert(u64::MAX - 1), Verdict::New);
        assert_eq!(set.close_below(u64::MAX), u64::MAX - 2);
        assert_eq!(set.floor(), u64::MAX);
        assert_eq!(set.insert(u64::MAX), Verdict::Duplicate);
        assert_eq!(set.insert(0), Verdict::Duplicate);
    }

    #[test]
    fn parts_that_break_the_order_are_refused() {
        let range = |first, last| SeqRange { first, last };
        assert!(RangeSet::from_parts(5, vec![range(7, 8), range(10, 10)]).is_some());
        assert!(
            RangeSet::from_parts(5, vec![range(6, 8)]).is_none(),
            "touches the floor"
        );
        assert!(
            RangeSet::from_parts(5, vec![range(7, 8), range(9, 9)]).is_none(),
            "touches its neighbour"
        );
        assert!(
            RangeSet::from_parts(5, vec![range(8, 7)]).is_none(),
            "ends before it begins"
        );
        assert!(
            RangeSet::from_parts(u64::MAX, vec![range(7, 8)]).is_none(),
            "nothing is above the top"
        );
    }
}
