//! Metrics of erasures.
//!
//! Knows their names. Must not know what is erased.

use metrics::Counter;

use super::series::new_counter;

/// Moved by the eraser.
#[derive(Debug)]
pub struct ErasureMetrics {
    /// Users of whom nothing is left.
    pub finished: Counter,
    /// Attempts that did not come to their end.
    pub failed: Counter,
}

impl ErasureMetrics {
    pub(super) fn register() -> Self {
        Self {
            finished: new_counter(
                "waypost_erasures_finished_total",
                "Users of whom nothing is left, as their holders wanted.",
            ),
            failed: new_counter(
                "waypost_erasures_failed_total",
                "Erasures that did not come to their end and are begun again at the next start.",
            ),
        }
    }
}
