//! Metrics of the vigil: when the gateway could not hear, and who was not heard in time.
//!
//! Knows their names. Must not know how either is found out.

use metrics::Gauge;

use super::series::{ByLabel, by_label, new_gauge};

/// Moved by the vigil.
#[derive(Debug)]
pub struct VigilMetrics {
    /// Spans in which the gateway could not hear and that have ended, by reason, a label of [`BLINDNESSES`].
    pub spans: ByLabel,
    /// 1 while there is such a span, 0 otherwise.
    pub blind: Gauge,
    /// Deadlines that are set.
    pub deadlines: Gauge,
    /// Those of them whose user is late.
    pub late: Gauge,
    /// Orders of checkers that wait for the committer.
    pub queued_orders: Gauge,
    /// Events of deadlines, by kind, a label of [`DEADLINE_EVENTS`].
    pub events: ByLabel,
}

impl VigilMetrics {
    pub(super) fn register() -> Self {
        Self {
            spans: by_label(
                "waypost_coverage_gaps_total",
                "Spans in which the gateway could not hear and that have ended.",
                "reason",
                &BLINDNESSES,
            ),
            blind: new_gauge(
                "waypost_coverage_gap_lasts",
                "1 while the gateway cannot hear everybody, 0 otherwise.",
            ),
            deadlines: new_gauge("waypost_deadlines", "Deadlines that checkers have set."),
            late: new_gauge(
                "waypost_deadlines_late",
                "Deadlines that have passed and whose user was not heard since.",
            ),
            queued_orders: new_gauge(
                "waypost_orders_queued",
                "Calls of checkers that wait for the committer.",
            ),
            events: by_label(
                "waypost_deadline_events_total",
                "Users called late, and recovered, by their deadlines.",
                "kind",
                &DEADLINE_EVENTS,
            ),
        }
    }
}

/// Why the gateway could not hear; as `Coverage.Reason` in `freshness.proto`.
pub const BLINDNESSES: [&str; 5] = [
    "down",
    "starting",
    "overloaded",
    "disk_failed",
    "clock_stepped",
];

/// What is said of deadlines; as `Deadline.Kind` in `freshness.proto`.
pub const DEADLINE_EVENTS: [&str; 2] = ["late", "recovered"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{coverage::Reason, deadlines::Kind};

    #[test]
    fn every_reason_and_kind_has_a_series_of_its_own() {
        assert_eq!(Reason::ALL.map(Reason::as_label), BLINDNESSES);
        assert_eq!(
            [Kind::Late, Kind::Recovered].map(Kind::as_label),
            DEADLINE_EVENTS
        );
    }
}
