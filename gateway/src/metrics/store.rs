//! Metrics of the store, as it counts itself.
//!
//! Knows their names. Must not know where the figures come from.

use std::time::Duration;

use metrics::{Counter, Gauge};

use super::{
    series::{approximate, new_counter, new_gauge},
    text::write_family,
};

/// What the store says of itself, read about once a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreFigures {
    /// Bytes on disk, the log included.
    pub size_bytes: u64,
    /// Whether RocksDB has stopped writes.
    pub write_stopped: bool,
    /// The rate that RocksDB has slowed writes to; 0 when it has not.
    pub delayed_write_bytes_per_second: u64,
    /// Bytes that compaction has yet to rewrite.
    pub pending_compaction_bytes: u64,
    /// Memtables that wait to be flushed.
    pub immutable_memtables: u64,
    /// Errors of background work since the store was opened.
    pub background_errors: u64,
    /// Syncs of the write-ahead log since the store was opened.
    pub wal_syncs: u64,
    /// The time they took together.
    pub wal_sync_time: Duration,
}

pub(super) struct StoreMetrics {
    size: Gauge,
    write_stopped: Gauge,
    delayed_write: Gauge,
    pending_compaction: Gauge,
    immutable_memtables: Gauge,
    background_errors: Counter,
}

impl StoreMetrics {
    pub(super) fn register() -> Self {
        Self {
            size: new_gauge(
                "waypost_store_size_bytes",
                "Bytes on disk, the write-ahead log included.",
            ),
            write_stopped: new_gauge(
                "waypost_store_write_stopped",
                "1 while RocksDB has stopped writes until compaction or flushing catches up.",
            ),
            delayed_write: new_gauge(
                "waypost_store_delayed_write_bytes_per_second",
                "The rate that RocksDB has slowed writes to; 0 while it has not.",
            ),
            pending_compaction: new_gauge(
                "waypost_store_pending_compaction_bytes",
                "Bytes that compaction has yet to rewrite.",
            ),
            immutable_memtables: new_gauge(
                "waypost_store_immutable_memtables",
                "Memtables that wait to be flushed.",
            ),
            background_errors: new_counter(
                "waypost_store_background_errors_total",
                "Errors of RocksDB's background work since the start.",
            ),
        }
    }

    pub(super) fn show(&self, figures: &StoreFigures) {
        self.size.set(approximate(figures.size_bytes));
        self.write_stopped
            .set(if figures.write_stopped { 1.0 } else { 0.0 });
        self.delayed_write
            .set(approximate(figures.delayed_write_bytes_per_second));
        self.pending_compaction
            .set(approximate(figures.pending_compaction_bytes));
        self.immutable_memtables
            .set(approximate(figures.immutable_memtables));
        self.background_errors.absolute(figures.background_errors);
    }
}

/// The store counts its syncs itself, so they come as a total time and a number, not in buckets.
pub(super) fn write_sync_time(text: &mut String, store: &StoreFigures) {
    let name = "waypost_wal_sync_seconds";
    let help = "Syncs of the write-ahead log since the start, and the time they took together.";
    write_family(
        text,
        name,
        "summary",
        help,
        &[
            ("_sum", store.wal_sync_time.as_secs_f64().to_string()),
            ("_count", store.wal_syncs.to_string()),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Metrics, tests::series};

    #[test]
    fn figures_of_the_store_are_shown_as_they_are() {
        let metrics = Metrics::new();
        metrics.store(StoreFigures {
            size_bytes: 4_096,
            write_stopped: true,
            wal_syncs: 4,
            wal_sync_time: Duration::from_millis(10),
            background_errors: 2,
            ..StoreFigures::default()
        });
        let page = series(&metrics.render());
        assert_eq!(page["waypost_store_size_bytes"], 4_096.0);
        assert_eq!(page["waypost_store_write_stopped"], 1.0);
        assert_eq!(page["waypost_store_background_errors_total"], 2.0);
        assert_eq!(page["waypost_wal_sync_seconds_count"], 4.0);
        assert_eq!(page["waypost_wal_sync_seconds_sum"], 0.01);
    }
}
