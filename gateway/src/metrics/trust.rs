//! Metrics of who is trusted: what is revoked, and certificate files that were read again.
//!
//! Knows their names. Must not know who revokes or where files are.

use metrics::Gauge;

use super::series::{ByLabel, by_label, labelled_gauge};
use crate::revocation::Counts;

/// Moved by whoever changes what is trusted.
#[derive(Debug)]
pub struct TrustMetrics {
    revoked_users: Gauge,
    revoked_devices: Gauge,
    revoked_certificates: Gauge,
    /// How often changed certificate files were read again, by outcome, a label of [`RELOADS`].
    pub reloads: ByLabel,
}

impl TrustMetrics {
    pub(super) fn register() -> Self {
        let revocations = |of| {
            labelled_gauge(
                "waypost_revocations",
                "Revocations in force: of users and devices by the operator, of certificates by the authorities' lists.",
                "of",
                of,
            )
        };
        Self {
            revoked_users: revocations("user"),
            revoked_devices: revocations("device"),
            revoked_certificates: revocations("certificate"),
            reloads: by_label(
                "waypost_tls_reloads_total",
                "Times that changed certificate files were read again, by whether they could be used.",
                "outcome",
                &RELOADS,
            ),
        }
    }
}

impl TrustMetrics {
    /// Takes how many revocations are in force.
    pub fn revoked(&self, counts: Counts) {
        self.revoked_users.set(counts.users as f64);
        self.revoked_devices.set(counts.devices as f64);
        self.revoked_certificates.set(counts.certificates as f64);
    }
}

/// What became of changed certificate files.
pub const RELOADS: [&str; 2] = ["used", "failed"];
