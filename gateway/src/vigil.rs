//! The vigil: what the committer keeps beside pings. Whether the gateway could hear, and who was not heard in time.
//!
//! Takes looks, contacts and orders, and gives the news that is to be written. The committer writes them, publishes
//! them to the [`Bulletin`] by [`Vigil::publish`], and only then their position. Knows no store and no clock.
//!
//! # Order
//!
//! The committer looks after it has gathered a group and before it announces the moment that the group is complete
//! for. What was blind until then is written first. So neither a deadline nor an announced moment ever runs into a
//! time of which it is not known whether the gateway could hear.

use std::sync::Arc;

use waypost_proto::id::UserId;

use crate::{
    bulletin::{Bulletin, News},
    coverage::{Reason, Span},
    deadlines::{Change, Checker, Contact, Deadlines, Registration, Said, Setting, TooMany},
    lookout::{Look, Lookout},
    metrics::Metrics,
};

/// What the committer keeps beside pings.
#[derive(Debug)]
pub struct Vigil {
    bulletin: Arc<Bulletin>,
    deadlines: Deadlines,
    lookout: Lookout,
    metrics: Metrics,
    start: Option<Start>,
    is_behind: bool,
}

/// What is known of the time before the process could hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Up to when an earlier process could hear.
    pub heard_until_ms: u64,
    /// When this process began.
    pub began_ms: u64,
}

/// What a vigil starts from.
#[derive(Debug)]
pub struct VigilParts {
    /// Where it publishes.
    pub bulletin: Arc<Bulletin>,
    /// The deadlines of the store.
    pub deadlines: Vec<Registration>,
    /// How many deadlines there may be.
    pub max_deadlines: usize,
    /// None for a store that is new: nobody could have been heard before.
    pub start: Option<Start>,
    /// What it counts with.
    pub metrics: Metrics,
}

impl Vigil {
    /// Nobody has looked yet.
    #[must_use]
    pub fn new(parts: VigilParts) -> Self {
        let mut deadlines = Deadlines::new(parts.max_deadlines);
        for registration in parts.deadlines {
            deadlines.restore(registration);
        }
        let vigil = Self {
            bulletin: parts.bulletin,
            deadlines,
            lookout: Lookout::default(),
            metrics: parts.metrics,
            start: parts.start,
            is_behind: false,
        };
        vigil.show();
        vigil
    }

    /// The time since an earlier process could hear: it was down, then it started. Spans that lasted when it went
    /// have ended with it. To be said once, when devices are about to be heard.
    pub fn begin(&mut self, now_ms: u64, position: u64) -> News {
        let Some(start) = self.start.take() else {
            return News::default();
        };
        let began_ms = start.began_ms.clamp(start.heard_until_ms, now_ms);
        let mut spans: Vec<_> = self.bulletin.coverage(|coverage| {
            let ended = coverage.lasting().map(|span| Span {
                until_ms: Some(start.heard_until_ms.max(span.from_ms)),
                position,
                ..span
            });
            ended.collect()
        });
        for (from_ms, until_ms, reason) in [
            (start.heard_until_ms, began_ms, Reason::Down),
            (began_ms, now_ms, Reason::Starting),
        ] {
            spans.push(Span {
                from_ms,
                until_ms: Some(until_ms),
                reason,
                position,
            });
        }
        self.news_of(spans)
    }

    /// Looks whether the gateway could hear since the last look.
    pub fn look(&mut self, look: &Look, position: u64) -> News {
        let sightings = self.lookout.look(look).into_iter();
        let spans: Vec<_> = sightings
            .map(|sighting| Span {
                from_ms: sighting.from_ms,
                until_ms: sighting.until_ms,
                reason: sighting.reason,
                position,
            })
            .collect();
        self.news_of(spans)
    }

    /// Users were heard: those who were late have recovered.
    pub fn heard(&mut self, contacts: impl Iterator<Item = (UserId, u64)>, said: Said) -> News {
        let Self {
            bulletin,
            deadlines,
            ..
        } = self;
        let mut changes = Vec::new();
        bulletin.coverage(|coverage| deadlines.heard(contacts, said, coverage, &mut changes));
        News {
            deadlines: changes,
            ..News::default()
        }
    }

    /// A checker may be told of a user no more, and expects nothing of it any more. The user is not late then: to withdraw
    /// is to be heard, and nobody is late while paused.
    pub fn forget(&mut self, checker: Checker, user: UserId) -> Vec<Change> {
        let mut changes = Vec::new();
        self.deadlines.forget(checker, user, &mut changes);
        changes
    }

    /// A user is erased: nobody expects anything of it any more.
    pub fn forget_user(&mut self, user: UserId) -> Vec<Change> {
        let mut changes = Vec::new();
        self.deadlines.forget_user(user, &mut changes);
        changes
    }

    /// Calls late who was not heard in time by `resolved_ms`, up to which every contact is known.
    pub fn call_late(
        &mut self,
        resolved_ms: u64,
        said: Said,
        contact_of: impl Fn(&UserId) -> Contact,
    ) -> News {
        let Self {
            bulletin,
            deadlines,
            ..
        } = self;
        let mut changes = Vec::new();
        let turn = bulletin.coverage(|coverage| {
            deadlines.turn(resolved_ms, said, coverage, contact_of, &mut changes)
        });
        self.is_behind = turn.is_behind;
        News {
            deadlines: changes,
            ..News::default()
        }
    }

    /// Whether [`Self::call_late`] has more to do at once.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.is_behind
    }

    /// Sets a checker's deadlines.
    ///
    /// # Errors
    /// When there would be too many; then nothing has changed.
    pub fn set_deadlines(
        &mut self,
        checker: Checker,
        settings: &[(UserId, Option<Setting>)],
        said: Said,
        contact_of: impl Fn(&UserId) -> Contact,
    ) -> Result<News, TooMany> {
        let Self {
            bulletin,
            deadlines,
            ..
        } = self;
        let mut changes = Vec::new();
        bulletin.coverage(|coverage| {
            deadlines.set(checker, settings, said, coverage, contact_of, &mut changes)
        })?;
        Ok(News {
            deadlines: changes,
            ..News::default()
        })
    }

    /// A checker's events up to a position are about to be deleted.
    pub fn forget_events(&self, checker: Checker, position: u64) {
        self.bulletin.forget(checker, position);
    }

    /// Transitions up to a position are about to be deleted.
    pub fn forget_transitions(&self, position: u64) {
        self.bulletin.forget_transitions(position);
    }

    /// Publishes news that are durable.
    pub fn publish(&self, news: &News) {
        if news.is_empty() {
            return;
        }
        self.bulletin.publish(news);
        let metrics = &self.metrics.vigil;
        for span in news.coverage.iter().flat_map(|change| &change.spans) {
            // A span is said when it begins and again when it ends.
            if span.until_ms.is_some() {
                metrics.spans.of(span.reason.as_label()).increment(1);
            }
        }
        for change in &news.deadlines {
            if let Change::Event(event) = change {
                metrics.events.of(event.kind.as_label()).increment(1);
            }
        }
        for transition in &news.transitions {
            let to = transition.turn.as_label();
            self.metrics.freshness.transitions.of(to).increment(1);
        }
        self.show();
    }

    fn show(&self) {
        let metrics = &self.metrics.vigil;
        let lasting = self
            .bulletin
            .coverage(|coverage| coverage.lasting().count());
        metrics.blind.set(if lasting == 0 { 0.0 } else { 1.0 });
        metrics.deadlines.set(self.deadlines.len() as f64);
        metrics.late.set(self.deadlines.late() as f64);
    }

    fn news_of(&self, spans: Vec<Span>) -> News {
        let coverage =
            (!spans.is_empty()).then(|| self.bulletin.coverage(|coverage| coverage.change(spans)));
        News {
            coverage,
            ..News::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{
        clock::Reading,
        coverage::{Coverage, Forgotten},
        deadlines::{Kind, Standing},
    };

    const OPS: Checker = Checker([1; 16]);
    const ALICE: UserId = UserId([1; 16]);
    const HOUR_MS: u64 = 3_600_000;

    fn contact(last_contact_ms: u64) -> impl Fn(&UserId) -> Contact {
        move |_| Contact {
            last_contact_ms,
            standing: Standing::Active { since_ms: 0 },
        }
    }

    fn at(position: u64, at_ms: u64) -> Said {
        Said { position, at_ms }
    }

    fn vigil(
        bulletin: &Arc<Bulletin>,
        deadlines: Vec<Registration>,
        start: Option<Start>,
    ) -> Vigil {
        Vigil::new(VigilParts {
            bulletin: Arc::clone(bulletin),
            deadlines,
            max_deadlines: 10,
            start,
            metrics: Metrics::new(),
        })
    }

    fn kinds(news: &News) -> Vec<Kind> {
        let events = news.deadlines.iter().filter_map(|change| match change {
            Change::Event(event) => Some(event.kind),
            Change::Set(_) | Change::Removed(..) => None,
        });
        events.collect()
    }

    #[test]
    fn the_time_since_an_earlier_process_is_down_then_starting_and_ends_what_lasted() {
        let lasted = Span {
            from_ms: 500,
            until_ms: None,
            reason: Reason::Overloaded,
            position: 3,
        };
        let coverage = Coverage::restore([lasted], Forgotten::default());
        let bulletin = Arc::new(Bulletin::restore(coverage, [], [], 0, 3));
        let start = Start {
            heard_until_ms: 1_000,
            began_ms: HOUR_MS,
        };
        let mut vigil = vigil(&bulletin, Vec::new(), Some(start));
        let news = vigil.begin(HOUR_MS + 200, 4);
        vigil.publish(&news);
        let span = |from_ms, until_ms, reason| Span {
            from_ms,
            until_ms: Some(until_ms),
            reason,
            position: 4,
        };
        assert_eq!(
            bulletin.coverage(|coverage| coverage.within(0, u64::MAX)),
            [
                span(500, 1_000, Reason::Overloaded),
                span(1_000, HOUR_MS, Reason::Down),
                span(HOUR_MS, HOUR_MS + 200, Reason::Starting)
            ]
        );
        assert!(vigil.begin(HOUR_MS + 300, 5).is_empty(), "once");
    }

    #[test]
    fn before_the_first_start_nobody_could_have_been_heard() {
        let mut vigil = vigil(&Arc::default(), Vec::new(), None);
        assert!(vigil.begin(HOUR_MS, 1).is_empty());
    }

    #[test]
    fn a_clock_set_back_during_the_stop_leaves_spans_without_length() {
        let bulletin = Arc::default();
        let start = Start {
            heard_until_ms: HOUR_MS,
            began_ms: 1_000,
        };
        let mut vigil = vigil(&bulletin, Vec::new(), Some(start));
        // The gateway's clock goes on from what it showed last.
        let news = vigil.begin(HOUR_MS, 1);
        vigil.publish(&news);
        for span in bulletin.coverage(|coverage| coverage.within(0, u64::MAX)) {
            assert_eq!((span.from_ms, span.until_ms), (HOUR_MS, Some(HOUR_MS)));
        }
    }

    /// The whole way: set, a leap of the clock that makes nobody late, late, a restart, recovered.
    #[test]
    fn a_deadline_is_kept_through_a_leap_and_a_restart() {
        let bulletin = Arc::new(Bulletin::default());
        let mut first = vigil(&bulletin, Vec::new(), None);
        let setting = Setting {
            expect_every_ms: 60_000,
            grace_ms: 0,
        };
        let asked = [(ALICE, Some(setting))];
        let news = first
            .set_deadlines(OPS, &asked, at(1, 1_000), contact(1_000))
            .unwrap();
        first.publish(&news);
        let began = Instant::now();
        let mut look = Look {
            reading: Reading {
                now_ms: 1_000,
                system_ms: 1_000,
                at: began,
            },
            turned_away: 0,
            disk_wait: Duration::ZERO,
            resolved_ms: 999,
        };
        assert!(first.look(&look, 2).is_empty());
        look.reading = Reading {
            now_ms: HOUR_MS,
            system_ms: HOUR_MS,
            at: began + Duration::from_secs(1),
        };
        let news = first.look(&look, 2);
        assert!(news.coverage.is_some());
        first.publish(&news);
        assert!(
            first
                .call_late(HOUR_MS, at(3, HOUR_MS), contact(1_000))
                .is_empty()
        );
        let late_ms = HOUR_MS + 59_000;
        let news = first.call_late(late_ms, at(3, late_ms), contact(1_000));
        assert_eq!(kinds(&news), [Kind::Late]);
        first.publish(&news);
        assert_eq!(bulletin.now(OPS, |_| true).late.len(), 1);
        assert_eq!(bulletin.newest_event(OPS), 3);

        let rows = news.deadlines.iter().filter_map(|change| match change {
            Change::Set(registration) => Some(*registration),
            Change::Event(_) | Change::Removed(..) => None,
        });
        let rows: Vec<_> = rows.collect();
        let coverage = bulletin.coverage(Clone::clone);
        let bulletin = Arc::new(Bulletin::restore(coverage, &rows, [], 0, 3));
        let start = Start {
            heard_until_ms: late_ms,
            began_ms: 2 * HOUR_MS,
        };
        let mut second = vigil(&bulletin, rows, Some(start));
        let news = second.begin(2 * HOUR_MS + 1, 4);
        second.publish(&news);
        let now_ms = 2 * HOUR_MS + 1_000;
        assert!(
            second
                .call_late(now_ms, at(5, now_ms), contact(1_000))
                .is_empty(),
            "it was said"
        );
        let news = second.heard([(ALICE, now_ms)].into_iter(), at(5, now_ms));
        assert_eq!(kinds(&news), [Kind::Recovered]);
        second.publish(&news);
        assert_eq!(bulletin.now(OPS, |_| true).late, []);
        assert!(
            second
                .heard([(ALICE, now_ms + 1)].into_iter(), at(6, now_ms + 1))
                .is_empty()
        );
    }
}
