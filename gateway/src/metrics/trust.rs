//! Metrics of who is trusted: what is revoked.
//!
//! Knows their names. Must not know who revokes.

use metrics::Gauge;

use super::series::labelled_gauge;
use crate::revocation::Counts;

/// Moved by whoever changes what is trusted.
#[derive(Debug)]
pub struct TrustMetrics {
    revoked_users: Gauge,
    revoked_devices: Gauge,
    revoked_certificates: Gauge,
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
