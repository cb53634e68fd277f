//! Metrics of pings: what became of each.
//!
//! Knows their names and that they add up. Must not know what decides a ping's fate.

use metrics::Counter;
use waypost_proto::ping::RejectCode;

use super::series::{labelled_counter, new_counter};

/// Reject codes in the order of [`Fates::rejected`], with their labels.
pub const REJECTS: [(RejectCode, &str); 9] = [
    (RejectCode::BadCoordinates, "bad_coordinates"),
    (RejectCode::TimeInFuture, "time_in_future"),
    (RejectCode::TooOld, "too_old"),
    (RejectCode::Schema, "schema"),
    (RejectCode::Paused, "paused"),
    (RejectCode::Erased, "erased"),
    (RejectCode::RateLimited, "rate_limited"),
    (RejectCode::Overloaded, "overloaded"),
    (RejectCode::TooSparse, "too_sparse"),
];

/// What became of pings that were received. The four fates always add up to what was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fates {
    /// Stored.
    pub accepted: u64,
    /// Settled before.
    pub duplicate: u64,
    /// Left out by the thinning rule.
    pub filtered: u64,
    /// Refused, by code in the order of [`REJECTS`]; counted with [`Fates::reject`].
    pub rejected: [u64; REJECTS.len()],
}

impl Fates {
    /// Counts `pings` more that were refused with `code`.
    pub fn reject(&mut self, code: RejectCode, pings: u64) {
        // CODE_UNSPECIFIED is never sent; were it counted here, it would be a broken schema.
        let at = REJECTS
            .iter()
            .position(|(known, _)| *known == code)
            .unwrap_or(SCHEMA_AT);
        self.rejected[at] += pings;
    }

    /// How many were refused, whatever the code.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected.iter().sum()
    }

    /// How many there were.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.accepted + self.duplicate + self.filtered + self.rejected()
    }

    pub(super) fn add(&mut self, more: &Self) {
        self.accepted += more.accepted;
        self.duplicate += more.duplicate;
        self.filtered += more.filtered;
        for (total, more) in self.rejected.iter_mut().zip(more.rejected) {
            *total += more;
        }
    }
}

const SCHEMA_AT: usize = 3;
const _: () = assert!(matches!(REJECTS[SCHEMA_AT].0, RejectCode::Schema));

pub(super) struct FateMetrics {
    accepted: Counter,
    duplicate: Counter,
    filtered: Counter,
    rejected: Counter,
    received: Counter,
    rejected_by_code: [Counter; REJECTS.len()],
}

impl FateMetrics {
    pub(super) fn register() -> Self {
        let fate = |fate| {
            labelled_counter(
                "waypost_pings_total",
                "Pings by what became of them. The fates add up to waypost_pings_received_total.",
                "fate",
                fate,
            )
        };
        Self {
            accepted: fate("accepted"),
            duplicate: fate("duplicate"),
            filtered: fate("filtered"),
            rejected: fate("rejected"),
            received: new_counter(
                "waypost_pings_received_total",
                "Pings received from devices whose fate is settled.",
            ),
            rejected_by_code: REJECTS.map(|(_, label)| {
                labelled_counter(
                    "waypost_pings_rejected_total",
                    "Pings refused, by reject code. The codes add up to the fate 'rejected'.",
                    "code",
                    label,
                )
            }),
        }
    }

    pub(super) fn show(&self, fates: &Fates) {
        self.accepted.absolute(fates.accepted);
        self.duplicate.absolute(fates.duplicate);
        self.filtered.absolute(fates.filtered);
        self.rejected.absolute(fates.rejected());
        self.received.absolute(fates.received());
        for (counter, pings) in self.rejected_by_code.iter().zip(fates.rejected) {
            counter.absolute(pings);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;
    use crate::metrics::{
        Metrics,
        series::approximate,
        tests::{series, sum},
    };

    fn some_of_each() -> Fates {
        let mut fates = Fates {
            accepted: 5,
            duplicate: 3,
            filtered: 2,
            ..Fates::default()
        };
        for (code, _) in REJECTS {
            fates.reject(code, 1);
        }
        fates
    }

    #[test]
    fn fates_add_up_at_every_scrape() {
        let metrics = Metrics::new();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    metrics.settled(&some_of_each());
                }
            });
            for _ in 0..200 {
                let page = series(&metrics.render());
                let received = page["waypost_pings_received_total"];
                assert_eq!(sum(&page, "waypost_pings_total"), received);
                assert_eq!(
                    sum(&page, "waypost_pings_rejected_total"),
                    page[r#"waypost_pings_total{fate="rejected"}"#],
                );
            }
            done.store(true, Ordering::Relaxed);
        });
        let page = series(&metrics.render());
        assert!(0.0 < page["waypost_pings_received_total"]);
        assert_eq!(
            page["waypost_pings_received_total"],
            approximate(metrics.fates().received())
        );
    }

    /// The control for the test above: counters moved one by one do not add up at every scrape.
    #[test]
    fn counters_moved_one_by_one_would_not_add_up() {
        let metrics = Metrics::new();
        let done = AtomicBool::new(false);
        let torn = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    metrics.sessions.frames_received.of("hello").increment(1);
                    metrics.sessions.acks_sent.increment(1);
                }
            });
            let torn = (0..10_000).any(|_| {
                let page = series(&metrics.render());
                page[r#"waypost_frames_received_total{kind="hello"}"#]
                    != page["waypost_acks_sent_total"]
            });
            done.store(true, Ordering::Relaxed);
            torn
        });
        assert!(torn, "the test above would pass without its protection");
    }
}
