//! Metrics of exports.
//!
//! Knows their names. Must not know what is exported.

use metrics::Counter;

use super::series::new_counter;

/// Moved by the exports, to devices and to the operator.
#[derive(Debug)]
pub struct ExportMetrics {
    /// Exports that were received to the end.
    pub finished: Counter,
    /// Exports that did not come to their end.
    pub failed: Counter,
}

impl ExportMetrics {
    pub(super) fn register() -> Self {
        Self {
            finished: new_counter(
                "waypost_exports_finished_total",
                "Exports of what is held on a user that a device or the operator has received to the end.",
            ),
            failed: new_counter(
                "waypost_exports_failed_total",
                "Exports of what is held on a user that did not come to their end.",
            ),
        }
    }
}
