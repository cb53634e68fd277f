//! Metrics of the disk: its room, and whether it answers.
//!
//! Knows their names. Must not know how the disk is watched.

use std::time::Duration;

use metrics::Gauge;

use super::series::{approximate, new_gauge};

/// What the watch over the disk sees, told some times a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFigures {
    /// Bytes that are free.
    pub free_bytes: u64,
    /// Bytes that must stay free.
    pub floor_bytes: u64,
    /// Whether new pings are put off because there is too little.
    pub is_refusing: bool,
    /// How long the disk has kept somebody waiting; 0 when nobody waits.
    pub waited: Duration,
}

pub(super) struct DiskMetrics {
    free: Gauge,
    floor: Gauge,
    refusing: Gauge,
    waited: Gauge,
}

impl DiskMetrics {
    pub(super) fn register() -> Self {
        Self {
            free: new_gauge(
                "waypost_disk_free_bytes",
                "Bytes free on the store's file system.",
            ),
            floor: new_gauge(
                "waypost_disk_floor_bytes",
                "Bytes that must stay free: store.free_space_floor_mib.",
            ),
            refusing: new_gauge(
                "waypost_disk_refusing",
                "1 while new pings are put off because the disk is nearly full.",
            ),
            waited: new_gauge(
                "waypost_disk_waited_seconds",
                "How long the disk has kept a commit waiting by now; 0 while none waits.",
            ),
        }
    }

    pub(super) fn show(&self, figures: &DiskFigures) {
        self.free.set(approximate(figures.free_bytes));
        self.floor.set(approximate(figures.floor_bytes));
        self.refusing
            .set(if figures.is_refusing { 1.0 } else { 0.0 });
        self.waited.set(figures.waited.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Metrics, tests::series};

    #[test]
    fn figures_of_the_disk_are_shown_as_they_are() {
        let metrics = Metrics::new();
        metrics.disk(DiskFigures {
            free_bytes: 100,
            floor_bytes: 200,
            is_refusing: true,
            waited: Duration::from_millis(1_500),
        });
        let page = series(&metrics.render());
        assert_eq!(page["waypost_disk_free_bytes"], 100.0);
        assert_eq!(page["waypost_disk_floor_bytes"], 200.0);
        assert_eq!(page["waypost_disk_refusing"], 1.0);
        assert_eq!(page["waypost_disk_waited_seconds"], 1.5);
    }
}
