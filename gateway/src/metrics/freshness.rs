//! Metrics of freshness: its users, those who watch it, and how far it lies behind.
//!
//! Knows their names. Must not know what is told to whom.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Gauge};

use super::{
    connections::REFUSALS,
    series::{ByLabel, by_label, new_counter, new_gauge, seconds},
};

/// Moved by the freshness index and its service.
#[derive(Debug)]
pub struct FreshnessMetrics {
    /// Users with a known last sign of life.
    pub users: Gauge,
    /// Those of them who have paused.
    pub paused: Gauge,
    /// Holders who paused, resumed or erased everything, granted a checker or withdrew that, by what holds since: a label
    /// of [`TURNS`].
    pub transitions: ByLabel,
    /// Open Watch streams.
    pub watchers: Gauge,
    /// Open Watch streams that have not been level for a progress interval.
    pub lagging: Gauge,
    /// Changes that are kept: one for each user, and what streams that lag still count.
    pub changes: Gauge,
    /// The memory of what is kept for streams that lag.
    pub lagging_bytes: Gauge,
    /// Entries sent on Watch streams.
    pub entries_sent: Counter,
    /// Values that Watch streams did not get because newer ones overtook them.
    pub coalesced: Counter,
    /// Tokens that could not be resumed, by reason, a label of [`RESETS`].
    pub resets: ByLabel,
    /// Checkers that were turned away, by reason, a label of [`REFUSALS`].
    pub refused: ByLabel,
    resolved_ms: AtomicU64,
}

impl FreshnessMetrics {
    pub(super) fn register() -> Self {
        Self {
            users: new_gauge(
                "waypost_freshness_users",
                "Users with a known last sign of life.",
            ),
            paused: new_gauge(
                "waypost_freshness_paused_users",
                "Users whose holder has paused sharing.",
            ),
            transitions: by_label(
                "waypost_freshness_transitions_total",
                "Holders who paused, resumed or erased everything, granted a checker or withdrew that, by what holds since.",
                "state",
                &TURNS,
            ),
            watchers: new_gauge("waypost_freshness_watchers", "Open Watch streams."),
            lagging: new_gauge(
                "waypost_freshness_lagging_watchers",
                "Open Watch streams that have not been level for a progress interval.",
            ),
            changes: new_gauge(
                "waypost_freshness_changes",
                "Changes that are kept: one for each user, and what streams that lag still count.",
            ),
            lagging_bytes: new_gauge(
                "waypost_freshness_lagging_bytes",
                "Memory that is kept for Watch streams that lag: changes that are void but counted, and what each stream remembers of users.",
            ),
            entries_sent: new_counter(
                "waypost_freshness_entries_sent_total",
                "Entries sent on Watch streams.",
            ),
            coalesced: new_counter(
                "waypost_freshness_coalesced_total",
                "Values that Watch streams did not get because newer ones overtook them.",
            ),
            resets: by_label(
                "waypost_freshness_resets_total",
                "Watch streams that began again because their token could not be resumed.",
                "reason",
                &RESETS,
            ),
            refused: by_label(
                "waypost_freshness_refused_checkers_total",
                "Checkers that were turned away.",
                "reason",
                &REFUSALS,
            ),
            resolved_ms: AtomicU64::new(0),
        }
    }

    /// Notes the moment up to which the freshness stream is complete. The lag is reckoned when it is
    /// read, so a stream that stands still shows a growing one.
    pub fn resolved(&self, resolved_ms: u64) {
        self.resolved_ms.fetch_max(resolved_ms, Ordering::Relaxed);
    }
}

/// How far the stream lies behind, reckoned when it is read.
pub(super) struct LagMetrics(Gauge);

impl LagMetrics {
    pub(super) fn register() -> Self {
        Self(new_gauge(
            "waypost_freshness_lag_seconds",
            "How far the moment up to which the freshness stream is complete lies behind now.",
        ))
    }

    pub(super) fn show(&self, freshness: &FreshnessMetrics, now_ms: u64) {
        let resolved_ms = freshness.resolved_ms.load(Ordering::Relaxed);
        if resolved_ms != 0 {
            self.0.set(seconds(now_ms.saturating_sub(resolved_ms)));
        }
    }
}

/// Why a Watch began again instead of resuming; as `Reset.Reason` in `freshness.proto`.
pub const RESETS: [&str; 4] = ["other_store", "other_selector", "bad_token", "markers_gone"];

/// What a holder can turn.
pub const TURNS: [&str; 5] = ["active", "paused", "erased", "granted", "withdrawn"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::system_now_ms,
        metrics::{Metrics, tests::series},
        sharing::{Sharing, Turn},
    };

    #[test]
    fn each_turn_that_a_holder_can_take_has_a_series_of_its_own() {
        let turns = [
            Turn::Sharing(Sharing::Active),
            Turn::Sharing(Sharing::Paused),
            Turn::Sharing(Sharing::Erased),
            Turn::Granted,
            Turn::Withdrawn,
        ];
        assert_eq!(turns.map(Turn::as_label), TURNS);
    }

    #[test]
    fn the_lag_grows_while_the_stream_stands_still() {
        let metrics = Metrics::new();
        metrics.freshness.resolved(system_now_ms() - 60_000);
        assert!(60.0 <= series(&metrics.render())["waypost_freshness_lag_seconds"]);
    }
}
