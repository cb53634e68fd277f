//! Metrics of the audit log.
//!
//! Knows their names. Must not know what is recorded.

use metrics::{Counter, Gauge};

use super::series::{new_counter, new_gauge};

/// Moved by the audit log.
#[derive(Debug)]
pub struct AuditMetrics {
    /// Deeds that are on record.
    pub entries: Counter,
    /// Deeds that could not be recorded.
    pub lost: Counter,
    /// Logs that did not hold together when they were opened.
    pub broken: Counter,
    /// Deeds that wait for the disk.
    pub queued: Gauge,
}

impl AuditMetrics {
    pub(super) fn register() -> Self {
        Self {
            entries: new_counter(
                "waypost_audit_entries_total",
                "Deeds that were recorded in the audit log.",
            ),
            lost: new_counter(
                "waypost_audit_lost_total",
                "Deeds that could not be recorded in the audit log.",
            ),
            broken: new_counter(
                "waypost_audit_broken_total",
                "Audit logs that somebody had changed, found when they were opened.",
            ),
            queued: new_gauge(
                "waypost_audit_queued",
                "Deeds that wait to be written to the audit log.",
            ),
        }
    }
}
