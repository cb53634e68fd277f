//! Metrics of how connections begin: in full or resumed, and the TLS sessions that they are resumed from.
//!
//! Knows their names. Must not know TLS.

use metrics::{Counter, Gauge};

use super::series::{ByLabel, by_label, new_counter, new_gauge};

/// Moved by handshakes and by the sessions that they are resumed from.
#[derive(Debug)]
pub struct ResumptionMetrics {
    /// Completed handshakes of devices that were let in, by kind, a label of [`HANDSHAKES`].
    pub handshakes: ByLabel,
    /// Sessions that can be resumed.
    pub stored: Gauge,
    /// Sessions that nobody came back with, by reason, a label of [`DROPS`].
    pub dropped: ByLabel,
    /// Batches that were stored before their handshake was over.
    pub early_batches: Counter,
}

impl ResumptionMetrics {
    pub(super) fn register() -> Self {
        Self {
            handshakes: by_label(
                "waypost_handshakes_total",
                "Handshakes of devices that were let in: full, resumed, or resumed with early data.",
                "kind",
                &HANDSHAKES,
            ),
            stored: new_gauge(
                "waypost_sessions_stored",
                "TLS sessions that devices may resume.",
            ),
            dropped: by_label(
                "waypost_sessions_dropped_total",
                "TLS sessions dropped unused, for want of room or because they were too old.",
                "reason",
                &DROPS,
            ),
            early_batches: new_counter(
                "waypost_early_batches_total",
                "Batches that were stored before their device's handshake was over.",
            ),
        }
    }
}

/// How a connection began.
pub const HANDSHAKES: [&str; 3] = ["full", "resumed", "early_data"];

/// Why a session was dropped that nobody had resumed.
pub const DROPS: [&str; 2] = ["room", "expired"];
