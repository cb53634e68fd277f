//! When the gateway could hear, and when not: spans, and the clock that runs only while it could.
//!
//! Plain data. Knows spans and times; must not know who finds out about a span, where it is kept, or what
//! time it is.
//!
//! # The hearing clock
//!
//! [`Coverage::heard_ms`] is wall time less all blind time before it, spans that overlap counted once. It
//! stands still in a span. "Silent for ten minutes" is said in its minutes, so a gateway that was down for an
//! hour has not found anybody silent for that hour.
//!
//! # Bounds
//!
//! [`MOST_SPANS`] are kept. When one more comes, the oldest that has ended goes, and with it the knowledge of
//! what lay before its end: the hearing clock counts on from there, but whatever was earlier is as if it had
//! been at that moment, which makes a silence shorter and never longer.

use std::collections::BTreeMap;

/// How many spans are kept: years of restarts, or a week of an attack that has the gateway refuse newcomers
/// every now and then.
pub const MOST_SPANS: usize = 4_096;

/// Why the gateway could not hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// It did not run.
    Down,
    /// It ran, and served nobody yet.
    Starting,
    /// It refused newcomers for want of room, or did not get to run for a while.
    Overloaded,
    /// Its disk did not answer.
    DiskFailed,
    /// The system's clock was set: nothing was received in the time that was leapt over, and none passes until
    /// a clock that was set back has caught up.
    ClockStepped,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Down,
        Self::Starting,
        Self::Overloaded,
        Self::DiskFailed,
        Self::ClockStepped,
    ];

    /// Its name in metrics and logs.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Starting => "starting",
            Self::Overloaded => "overloaded",
            Self::DiskFailed => "disk_failed",
            Self::ClockStepped => "clock_stepped",
        }
    }
}

/// A span in which the gateway could not hear, and the commit that said so last. Times are in milliseconds
/// since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first moment.
    pub from_ms: u64,
    /// The first moment after it; none while it lasts. The same as its first for a clock that was set back:
    /// no time passed.
    pub until_ms: Option<u64>,
    /// Why.
    pub reason: Reason,
    /// The commit that began it, or ended it if it has ended.
    pub position: u64,
}

/// What tells spans apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId {
    /// Its first moment.
    pub from_ms: u64,
    /// Why.
    pub reason: Reason,
}

impl Span {
    /// What tells it apart.
    #[must_use]
    pub fn id(&self) -> SpanId {
        SpanId {
            from_ms: self.from_ms,
            reason: self.reason,
        }
    }

    /// Whether it has any part in `from_ms..=until_ms`.
    fn overlaps(&self, from_ms: u64, until_ms: u64) -> bool {
        self.from_ms <= until_ms && self.until_ms.is_none_or(|until| from_ms <= until)
    }
}

/// What is no longer known of spans that had to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// All of them ended at or before this moment.
    pub until_ms: u64,
    /// All of them were said at or below this position.
    pub position: u64,
}

/// What a commit changes: spans that come or end, and those that go to make room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// New or changed.
    pub spans: Vec<Span>,
    /// Gone.
    pub gone: Vec<SpanId>,
    /// What is forgotten with those, and was before.
    pub forgotten: Forgotten,
}

/// A stretch in which some span was, or several.
#[derive(Clone, Copy, Debug)]
struct Blind {
    from_ms: u64,
    /// [`u64::MAX`] while it lasts.
    until_ms: u64,
    /// All blind time before it.
    before_ms: u64,
}

impl Blind {
    fn length_ms(&self) -> u64 {
        self.until_ms - self.from_ms
    }

    /// What the hearing clock shows in it.
    fn heard_ms(&self) -> u64 {
        self.from_ms - self.before_ms
    }
}

/// All spans that are kept.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    spans: BTreeMap<SpanId, Span>,
    forgotten: Forgotten,
    /// Blind time before `forgotten.until_ms`.
    forgotten_blind_ms: u64,
    /// The spans merged, ascending and apart from each other, after `forgotten.until_ms`.
    blind: Vec<Blind>,
    last_end_ms: u64,
    position: u64,
}

impl Coverage {
    /// The spans of a store, and what it says is forgotten.
    #[must_use]
    pub fn restore(spans: impl IntoIterator<Item = Span>, forgotten: Forgotten) -> Self {
        let mut coverage = Self {
            forgotten,
            last_end_ms: forgotten.until_ms,
            position: forgotten.position,
            ..Self::default()
        };
        coverage.apply(&Change {
            spans: spans.into_iter().collect(),
            gone: Vec::new(),
            forgotten,
        });
        coverage
    }

    /// What has to change for these spans to be kept; nothing has yet.
    #[must_use]
    pub fn change(&self, spans: Vec<Span>) -> Change {
        let new = spans
            .iter()
            .filter(|span| !self.spans.contains_key(&span.id()))
            .count();
        let excess = (self.spans.len() + new).saturating_sub(MOST_SPANS);
        let mut forgotten = self.forgotten;
        // Not those that end with this very change: they must be told first.
        let ended = self.spans.values().filter_map(|span| {
            let until_ms = span.until_ms?;
            Some((span, until_ms))
        });
        let gone = ended
            .take(excess)
            .map(|(span, until_ms)| {
                forgotten.until_ms = forgotten.until_ms.max(until_ms);
                forgotten.position = forgotten.position.max(span.position);
                span.id()
            })
            .collect();
        Change {
            spans,
            gone,
            forgotten,
        }
    }

    /// Takes a change.
    pub fn apply(&mut self, change: &Change) {
        for span in &change.spans {
            self.position = self.position.max(span.position);
            self.last_end_ms = self.last_end_ms.max(span.until_ms.unwrap_or_default());
            self.spans.insert(span.id(), *span);
        }
        self.merge();
        if self.forgotten != change.forgotten || !change.gone.is_empty() {
            self.forgotten_blind_ms = self.blind_ms(change.forgotten.until_ms);
            self.forgotten = change.forgotten;
            for id in &change.gone {
                self.spans.remove(id);
            }
            self.merge();
        }
    }

    /// What the hearing clock shows at a moment. Two of its readings can be compared; one alone means
    /// nothing.
    #[must_use]
    pub fn heard_ms(&self, at_ms: u64) -> u64 {
        let at_ms = at_ms.max(self.forgotten.until_ms);
        at_ms - self.blind_ms(at_ms)
    }

    /// The latest moment up to `at_ms` since which the gateway could hear for `heard_ms`; 0 if it has not for
    /// so long.
    #[must_use]
    pub fn moment_before(&self, at_ms: u64, heard_ms: u64) -> u64 {
        let Some(target_ms) = self.heard_ms(at_ms).checked_sub(heard_ms) else {
            return 0;
        };
        if target_ms < self.heard_ms(0) {
            // Of that time only the sum is known. With all of it blind, it would be this moment.
            return target_ms;
        }
        let passed = self
            .blind
            .partition_point(|blind| blind.heard_ms() <= target_ms);
        target_ms
            .saturating_add(self.blind_before_ms(passed))
            .min(at_ms)
    }

    /// The first moment at which the hearing clock showed this; the inverse of [`Self::heard_ms`] for readings
    /// since what is forgotten.
    #[must_use]
    pub fn moment_of(&self, heard_ms: u64) -> u64 {
        let passed = self
            .blind
            .partition_point(|blind| blind.heard_ms() < heard_ms);
        heard_ms.saturating_add(self.blind_before_ms(passed))
    }

    /// When the last span that has ended did; 0 if there was none.
    #[must_use]
    pub fn last_end_ms(&self) -> u64 {
        self.last_end_ms
    }

    /// The newest commit that changed a span.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// What is no longer known.
    #[must_use]
    pub fn forgotten(&self) -> Forgotten {
        self.forgotten
    }

    /// Spans that have not ended.
    pub fn lasting(&self) -> impl Iterator<Item = Span> {
        self.spans
            .values()
            .filter(|span| span.until_ms.is_none())
            .copied()
    }

    /// Spans that were said after a position and up to another, by position.
    #[must_use]
    pub fn said_between(&self, after: u64, upto: u64) -> Vec<Span> {
        let said = self.spans.values();
        let mut said: Vec<_> = said
            .filter(|span| after < span.position && span.position <= upto)
            .copied()
            .collect();
        said.sort_by_key(|span| (span.position, span.id()));
        said
    }

    /// Spans that have a part in `from_ms..=until_ms`, by their beginning.
    #[must_use]
    pub fn within(&self, from_ms: u64, until_ms: u64) -> Vec<Span> {
        let spans = self.spans.values();
        spans
            .filter(|span| span.overlaps(from_ms, until_ms))
            .copied()
            .collect()
    }

    fn merge(&mut self) {
        self.blind.clear();
        for span in self.spans.values() {
            let from_ms = span.from_ms.max(self.forgotten.until_ms);
            let until_ms = span.until_ms.unwrap_or(u64::MAX);
            if until_ms <= from_ms {
                continue;
            }
            match self.blind.last_mut() {
                Some(last) if from_ms <= last.until_ms => {
                    last.until_ms = last.until_ms.max(until_ms);
                }
                _ => self.blind.push(Blind {
                    from_ms,
                    until_ms,
                    before_ms: 0,
                }),
            }
        }
        let mut before_ms = self.forgotten_blind_ms;
        for blind in &mut self.blind {
            blind.before_ms = before_ms;
            before_ms = before_ms.saturating_add(blind.length_ms());
        }
    }

    /// Blind time up to a moment that is not forgotten.
    fn blind_ms(&self, at_ms: u64) -> u64 {
        let begun = self.blind.partition_point(|blind| blind.from_ms < at_ms);
        match begun.checked_sub(1).map(|last| self.blind[last]) {
            Some(last) => last.before_ms + (at_ms.min(last.until_ms) - last.from_ms),
            None => self.forgotten_blind_ms,
        }
    }

    /// Blind time in the first few stretches and before them.
    fn blind_before_ms(&self, stretches: usize) -> u64 {
        match stretches.checked_sub(1).map(|last| self.blind[last]) {
            Some(last) => last.before_ms.saturating_add(last.length_ms()),
            None => self.forgotten_blind_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const END_MS: u64 = 200;

    fn span() -> impl Strategy<Value = Span> {
        (
            0..END_MS,
            prop::option::weighted(0.95, 0..40_u64),
            0..Reason::ALL.len(),
            1..50_u64,
        )
            .prop_map(|(from_ms, length_ms, reason, position)| Span {
                from_ms,
                until_ms: length_ms.map(|length_ms| from_ms + length_ms),
                reason: Reason::ALL[reason],
                position,
            })
    }

    /// Marks every millisecond.
    struct Naive {
        could_hear: Vec<bool>,
    }

    impl Naive {
        fn new(spans: &[Span]) -> Self {
            let is_in = |at_ms: u64, span: &Span| {
                span.from_ms <= at_ms && span.until_ms.is_none_or(|until| at_ms < until)
            };
            let could_hear = (0..2 * END_MS)
                .map(|at_ms| !spans.iter().any(|span| is_in(at_ms, span)))
                .collect();
            Self { could_hear }
        }

        fn heard_between(&self, from_ms: u64, until_ms: u64) -> u64 {
            let range = usize::try_from(from_ms).unwrap()..usize::try_from(until_ms).unwrap();
            self.could_hear[range]
                .iter()
                .filter(|&&could| could)
                .count() as u64
        }
    }

    fn of(spans: &[Span]) -> (Coverage, Vec<Span>) {
        let coverage = Coverage::restore(spans.iter().copied(), Forgotten::default());
        let kept = coverage.spans.values().copied().collect();
        (coverage, kept)
    }

    proptest! {
        #[test]
        fn the_hearing_clock_counts_the_milliseconds_in_no_span(
            spans in prop::collection::vec(span(), 0..12), at_ms in 0..2 * END_MS
        ) {
            let (coverage, kept) = of(&spans);
            prop_assert_eq!(coverage.heard_ms(at_ms), Naive::new(&kept).heard_between(0, at_ms));
        }

        #[test]
        fn the_moment_before_is_the_latest_since_which_so_much_was_heard(
            spans in prop::collection::vec(span(), 0..12), at_ms in 0..2 * END_MS, heard_ms in 0..END_MS
        ) {
            let (coverage, kept) = of(&spans);
            let naive = Naive::new(&kept);
            let latest = (0..=at_ms).rev().find(|&from| heard_ms <= naive.heard_between(from, at_ms));
            prop_assert_eq!(coverage.moment_before(at_ms, heard_ms), latest.unwrap_or_default());
        }

        #[test]
        fn the_moment_of_a_reading_is_the_first_that_shows_it(
            spans in prop::collection::vec(span(), 0..12), at_ms in 0..2 * END_MS
        ) {
            let (coverage, kept) = of(&spans);
            let naive = Naive::new(&kept);
            let shown = coverage.heard_ms(at_ms);
            let first = (0..=at_ms).find(|&moment| naive.heard_between(0, moment) == shown);
            prop_assert_eq!(Some(coverage.moment_of(shown)), first);
        }

        /// However spans come, end and go, readings since what is forgotten do not change, and those of
        /// before only become later.
        #[test]
        fn forgetting_moves_no_reading_since_and_makes_no_silence_longer(
            spans in prop::collection::vec(span(), 1..12), goes in 0..12_usize
        ) {
            let (mut coverage, kept) = of(&spans);
            let naive = Naive::new(&kept);
            let mut change = coverage.change(Vec::new());
            for span in kept.iter().filter(|span| span.until_ms.is_some()).take(goes) {
                change.gone.push(span.id());
                change.forgotten.until_ms = change.forgotten.until_ms.max(span.until_ms.unwrap());
                change.forgotten.position = change.forgotten.position.max(span.position);
            }
            coverage.apply(&change);
            prop_assert_eq!(coverage.spans.len() + change.gone.len(), kept.len());
            for at_ms in 0..2 * END_MS {
                let (heard_ms, true_ms) = (coverage.heard_ms(at_ms), naive.heard_between(0, at_ms));
                if change.forgotten.until_ms <= at_ms {
                    prop_assert_eq!(heard_ms, true_ms);
                } else {
                    prop_assert!(true_ms <= heard_ms);
                }
                for wanted_ms in [0, 1, 20, 100] {
                    let from_ms = coverage.moment_before(at_ms, wanted_ms);
                    prop_assert!(
                        from_ms == 0 || wanted_ms <= naive.heard_between(from_ms, at_ms.max(from_ms))
                            || at_ms < change.forgotten.until_ms
                    );
                }
            }
        }
    }

    #[test]
    fn the_oldest_that_have_ended_make_room_and_are_told_of() {
        let span = |number: u64, until_ms| Span {
            from_ms: 10 * number,
            until_ms,
            reason: Reason::Overloaded,
            position: number,
        };
        let most = MOST_SPANS as u64;
        // The very first lasts, so the second and third have to go.
        let spans = (1..=most).map(|number| span(number, (number != 1).then_some(10 * number + 5)));
        let mut coverage = Coverage::restore(spans, Forgotten::default());
        assert_eq!(coverage.change(vec![span(1, Some(12))]).gone, []);
        let change = coverage.change(vec![span(most + 1, None), span(most + 2, None)]);
        assert_eq!(
            change.gone,
            [span(2, None).id(), span(3, None).id()],
            "{change:?}"
        );
        assert_eq!(
            change.forgotten,
            Forgotten {
                until_ms: 35,
                position: 3
            }
        );
        coverage.apply(&change);
        assert_eq!(coverage.spans.len(), MOST_SPANS);
        assert_eq!(coverage.lasting().count(), 3);
        assert_eq!(coverage.position(), most + 2);
        let again = Coverage::restore(coverage.spans.into_values(), coverage.forgotten);
        assert_eq!(
            (again.forgotten(), again.position()),
            (change.forgotten, most + 2)
        );
    }

    #[test]
    fn spans_are_found_by_when_they_were_said_and_by_where_they_lie() {
        let span = |from_ms, until_ms, position| Span {
            from_ms,
            until_ms,
            reason: Reason::Down,
            position,
        };
        let (first, second, third) = (
            span(10, Some(20), 7),
            span(30, Some(40), 5),
            span(50, None, 9),
        );
        let coverage = Coverage::restore([first, second, third], Forgotten::default());
        assert_eq!(coverage.said_between(0, 9), [second, first, third]);
        assert_eq!(coverage.said_between(5, 8), [first]);
        assert_eq!(coverage.within(20, 30), [first, second]);
        assert_eq!(coverage.within(21, 29), []);
        assert_eq!(coverage.within(60, 70), [third]);
        assert_eq!(coverage.last_end_ms(), 40);
    }
}
