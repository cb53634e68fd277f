//! The metrics of one moment as plain numbers, for people: what the status page shows.
//!
//! Read from the very text that Prometheus gets, so the page and a dashboard cannot disagree. Knows
//! metric names, as part of [`crate::metrics`]. Must not know how its numbers are shown.

use std::collections::HashMap;

use super::{Fates, Metrics};

/// What [`Metrics`] said at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// What became of pings.
    pub fates: Fates,
    /// Open connections with devices.
    pub connections: f64,
    /// Connections let in.
    pub connections_accepted: f64,
    /// Connections refused, whatever the reason.
    pub connections_refused: f64,
    /// Handshakes in progress.
    pub handshakes_in_progress: f64,
    /// Devices whose dedup state is held.
    pub known_devices: f64,
    /// Batches that wait for the committer, on both lanes.
    pub queued_batches: f64,
    /// Durable commits.
    pub commits: f64,
    /// How long commits took.
    pub commit_duration: Distribution,
    /// How long acks took.
    pub ack_latency: Distribution,
    /// Syncs of the log.
    pub wal_syncs: f64,
    /// Their time together, in seconds.
    pub wal_sync_seconds: f64,
    /// Users with a known last sign of life.
    pub users: f64,
    /// Open Watch streams.
    pub watchers: f64,
    /// How far freshness lies behind now, in seconds.
    pub lag_seconds: f64,
    /// Bytes of the store.
    pub store_size_bytes: f64,
    /// Whether RocksDB has stopped writes.
    pub write_stopped: bool,
    /// Bytes in RAM, where the system tells.
    pub memory_bytes: Option<f64>,
    /// CPU time in seconds, where the system tells.
    pub cpu_seconds: Option<f64>,
}

/// A histogram: for each upper bound in ascending order, how many observations were at or below it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    buckets: Vec<(f64, f64)>,
}

impl Distribution {
    /// What was observed after `earlier`, which is this histogram at an earlier moment.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier
            .buckets
            .iter()
            .map(|(_, count)| *count)
            .chain(std::iter::repeat(0.0));
        let buckets = self.buckets.iter().zip(before);
        Self {
            buckets: buckets
                .map(|((bound, count), before)| (*bound, count - before))
                .collect(),
        }
    }

    /// The value that a share `quantile` of the observations is at or below, interpolated within its
    /// bucket as Prometheus does; nothing if nothing was observed.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let (_, total) = *self.buckets.last()?;
        if total <= 0.0 {
            return None;
        }
        let rank = quantile * total;
        let at = self.buckets.iter().position(|(_, count)| rank <= *count)?;
        let (lower, below) = if at == 0 {
            (0.0, 0.0)
        } else {
            self.buckets[at - 1]
        };
        let (upper, upto) = self.buckets[at];
        if upper.is_infinite() || upto <= below {
            return Some(lower);
        }
        Some(lower + (upper - lower) * (rank - below) / (upto - below))
    }
}

impl Metrics {
    /// The metrics of this moment as plain numbers.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let page = self.render();
        let read = Reading::of(&page);
        Snapshot {
            fates: self.fates(),
            connections: read.sum("waypost_connections"),
            connections_accepted: read.sum("waypost_connections_accepted_total"),
            connections_refused: read.sum("waypost_connections_refused_total"),
            handshakes_in_progress: read.sum("waypost_handshakes_in_progress"),
            known_devices: read.sum("waypost_known_devices"),
            queued_batches: read.sum("waypost_commit_queue_batches"),
            commits: read.sum("waypost_commits_total"),
            commit_duration: read.distribution("waypost_commit_duration_seconds_bucket"),
            ack_latency: read.distribution("waypost_ack_latency_seconds_bucket"),
            wal_syncs: read.sum("waypost_wal_sync_seconds_count"),
            wal_sync_seconds: read.sum("waypost_wal_sync_seconds_sum"),
            users: read.sum("waypost_freshness_users"),
            watchers: read.sum("waypost_freshness_watchers"),
            lag_seconds: read.sum("waypost_freshness_lag_seconds"),
            store_size_bytes: read.sum("waypost_store_size_bytes"),
            write_stopped: read.sum("waypost_store_write_stopped") != 0.0,
            memory_bytes: read
                .series("process_resident_memory_bytes")
                .next()
                .map(|(_, value)| value),
            cpu_seconds: read
                .series("process_cpu_seconds_total")
                .next()
                .map(|(_, value)| value),
        }
    }
}

/// A rendered page by metric name: the labels and the value of each series, in the page's order.
struct Reading<'page> {
    series: HashMap<&'page str, Vec<(&'page str, f64)>>,
}

impl<'page> Reading<'page> {
    fn of(page: &'page str) -> Self {
        let mut series: HashMap<_, Vec<_>> = HashMap::new();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let Ok(value) = value.parse() else { continue };
            let (name, labels) = name.split_once('{').unwrap_or((name, ""));
            series.entry(name).or_default().push((labels, value));
        }
        Self { series }
    }

    fn series(&self, name: &str) -> impl Iterator<Item = (&'page str, f64)> {
        self.series.get(name).into_iter().flatten().copied()
    }

    fn sum(&self, name: &str) -> f64 {
        self.series(name).map(|(_, value)| value).sum()
    }

    fn distribution(&self, name: &str) -> Distribution {
        let bound = |labels: &str| {
            labels
                .strip_prefix("le=\"")?
                .strip_suffix("\"}")?
                .parse()
                .ok()
        };
        let buckets = self
            .series(name)
            .filter_map(|(labels, count)| Some((bound(labels)?, count)));
        Distribution {
            buckets: buckets.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::StoreFigures;

    #[test]
    fn a_snapshot_holds_what_the_metrics_were_told() {
        let metrics = Metrics::new();
        metrics.connections.open.set(4.0);
        metrics.connections.accepted.increment(5);
        metrics.connections.refused.of("expired").increment(1);
        metrics.connections.refused.of("overloaded").increment(2);
        metrics.connections.handshakes_in_progress.set(6.0);
        metrics.commits.known_devices.set(7.0);
        metrics.commits.queued_live.set(1.0);
        metrics.commits.queued_backfill.set(2.0);
        metrics.commits.commits.increment(8);
        metrics.commits.duration.record(Duration::from_millis(2));
        metrics
            .sessions
            .ack_latency
            .record(Duration::from_millis(20));
        metrics.freshness.users.set(9.0);
        metrics.freshness.watchers.set(10.0);
        metrics.store(StoreFigures {
            size_bytes: 11,
            write_stopped: true,
            wal_syncs: 12,
            wal_sync_time: Duration::from_millis(500),
            ..StoreFigures::default()
        });
        metrics.settled(&Fates {
            accepted: 13,
            ..Fates::default()
        });

        let snapshot = metrics.snapshot();
        assert_eq!(snapshot.fates, metrics.fates());
        assert_eq!(snapshot.connections, 4.0);
        assert_eq!(snapshot.connections_accepted, 5.0);
        assert_eq!(snapshot.connections_refused, 3.0);
        assert_eq!(snapshot.handshakes_in_progress, 6.0);
        assert_eq!(snapshot.known_devices, 7.0);
        assert_eq!(snapshot.queued_batches, 3.0);
        assert_eq!(snapshot.commits, 8.0);
        assert_eq!(snapshot.users, 9.0);
        assert_eq!(snapshot.watchers, 10.0);
        assert_eq!(snapshot.store_size_bytes, 11.0);
        assert!(snapshot.write_stopped);
        assert_eq!(snapshot.wal_syncs, 12.0);
        assert_eq!(snapshot.wal_sync_seconds, 0.5);
        let commit = snapshot.commit_duration.quantile(0.5).unwrap();
        assert!((0.001..=0.0025).contains(&commit), "{commit}");
        let ack = snapshot.ack_latency.quantile(0.5).unwrap();
        assert!((0.01..=0.025).contains(&ack), "{ack}");
    }

    #[test]
    fn quantiles_are_interpolated_within_their_bucket() {
        let buckets = vec![
            (1.0, 50.0),
            (2.0, 90.0),
            (4.0, 90.0),
            (f64::INFINITY, 100.0),
        ];
        let distribution = Distribution { buckets };
        assert_eq!(distribution.quantile(0.25), Some(0.5));
        assert_eq!(distribution.quantile(0.7), Some(1.5));
        assert_eq!(distribution.quantile(0.9), Some(2.0));
        assert_eq!(
            distribution.quantile(0.99),
            Some(4.0),
            "beyond the last bound nothing is known"
        );
        assert_eq!(Distribution::default().quantile(0.5), None);
    }

    #[test]
    fn only_what_was_observed_since_counts() {
        let metrics = Metrics::new();
        let slow = Duration::from_secs(4);
        (0..100).for_each(|_| metrics.commits.duration.record(slow));
        let earlier = metrics.snapshot().commit_duration;
        assert_eq!(earlier.since(&earlier).quantile(0.99), None);
        metrics.commits.duration.record(Duration::from_millis(2));
        let later = metrics.snapshot().commit_duration;
        assert!(later.since(&earlier).quantile(0.99).unwrap() <= 0.0025);
        assert_eq!(later.since(&Distribution::default()), later);
    }
}
