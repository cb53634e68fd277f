//! Metrics of limits: which were reached, and what is remembered to hold somebody to them.
//!
//! Knows their names. Must not know how high a limit is.

use metrics::{Counter, Gauge};

use super::series::{ByLabel, by_label, new_counter, new_gauge};

/// Moved by whoever holds devices to their limits.
#[derive(Debug)]
pub struct LimitMetrics {
    /// How often a limit was reached, a label of [`LIMITS`].
    pub reached: ByLabel,
    /// Newcomers that were refused without being told.
    pub ignored: Counter,
    /// Newcomers that were sent a Retry, to prove their address.
    pub address_proofs: Counter,
    /// Addresses that admission remembers.
    pub addresses: Gauge,
    /// Devices whose allowance is remembered.
    pub devices: Gauge,
}

impl LimitMetrics {
    pub(super) fn register() -> Self {
        Self {
            reached: by_label(
                "waypost_limits_reached_total",
                "How often a limit of devices or of their addresses was reached.",
                "limit",
                &LIMITS,
            ),
            ignored: new_counter(
                "waypost_newcomers_ignored_total",
                "Newcomers over a limit that were not even told so, because too many were.",
            ),
            address_proofs: new_counter(
                "waypost_address_proofs_total",
                "Newcomers that had to prove their address before their handshake began.",
            ),
            addresses: new_gauge(
                "waypost_limited_addresses",
                "Addresses with connections, or with handshakes a moment ago.",
            ),
            devices: new_gauge(
                "waypost_limited_devices",
                "Devices that are connected or have used up a part of their allowance.",
            ),
        }
    }
}

/// What can be too much: newcomers by [`crate::admission`], the rest by [`crate::allowance`].
pub const LIMITS: [&str; 9] = [
    "newcomers",
    "connections",
    "handshakes",
    "address_handshakes",
    "address_connections",
    "device_connections",
    "device_frames",
    "device_pings",
    "devices",
];
