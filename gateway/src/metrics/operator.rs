//! Metrics of the operator's commands to a running gateway.
//!
//! Knows their names. Must not know what a command does.

use metrics::{Counter, Gauge};

use super::series::{new_counter, new_gauge};

/// Moved by the operator's door.
#[derive(Debug)]
pub struct OperatorMetrics {
    /// Commands that are being answered.
    pub callers: Gauge,
    /// Those of them that take long.
    pub long_calls: Gauge,
    /// Commands that were refused because too many that take long were under way.
    pub refused: Counter,
}

impl OperatorMetrics {
    pub(super) fn register() -> Self {
        Self {
            callers: new_gauge(
                "waypost_operator_callers",
                "Commands of the operator that are being answered.",
            ),
            long_calls: new_gauge(
                "waypost_operator_long_calls",
                "Exports and erasures that the operator has begun and that are under way.",
            ),
            refused: new_counter(
                "waypost_operator_long_calls_refused_total",
                "Exports and erasures that the operator was refused because too many were under way.",
            ),
        }
    }
}
