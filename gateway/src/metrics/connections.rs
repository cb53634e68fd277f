//! Metrics of connections with devices: let in, refused, ended.
//!
//! Knows their names and the reasons that are their labels. Must not know how a reason is found.

use metrics::{Counter, Gauge, Histogram};

use super::series::{ByLabel, by_label, new_counter, new_gauge, new_histogram};

/// Moved by the accept loop.
#[derive(Debug)]
pub struct ConnectionMetrics {
    /// Connections with a device that are open.
    pub open: Gauge,
    /// Connections whose handshake was completed and whose device was let in.
    pub accepted: Counter,
    /// By reason, a label of [`REFUSALS`].
    pub refused: ByLabel,
    /// By the close code's name in `device.proto` in lower case, or how it ended without one; a label
    /// of [`CLOSES`].
    pub closed: ByLabel,
    /// Older connections that gave way to a newer one of the same device.
    pub taken_over: Counter,
    /// Handshakes that have begun and not ended.
    pub handshakes_in_progress: Gauge,
    /// How long completed handshakes took.
    pub handshake_duration: Histogram,
}

impl ConnectionMetrics {
    pub(super) fn register() -> Self {
        Self {
            open: new_gauge("waypost_connections", "Open connections with devices."),
            accepted: new_counter(
                "waypost_connections_accepted_total",
                "Connections whose device proved who it is and was let in.",
            ),
            refused: by_label(
                "waypost_connections_refused_total",
                "Connections refused before they were served.",
                "reason",
                &REFUSALS,
            ),
            closed: by_label(
                "waypost_connections_closed_total",
                "Connections that ended, by close code or by how they ended without one.",
                "code",
                &CLOSES,
            ),
            taken_over: new_counter(
                "waypost_connections_taken_over_total",
                "Connections that gave way to a newer one of the same device.",
            ),
            handshakes_in_progress: new_gauge(
                "waypost_handshakes_in_progress",
                "Handshakes that have begun and not ended.",
            ),
            handshake_duration: new_histogram(
                "waypost_handshake_duration_seconds",
                "How long completed handshakes took.",
            ),
        }
    }
}

/// Why a peer was refused before it was served: by TLS, by its certificate, or for want of room.
pub const REFUSALS: [&str; 18] = [
    "no_certificate",
    "bad_certificate",
    "unknown_issuer",
    "expired",
    "not_yet_valid",
    "revoked",
    "no_identity",
    "bad_identity",
    "not_a_device",
    "not_a_checker",
    "not_an_operator",
    "other_trust_domain",
    "not_allowed",
    "no_shared_protocol",
    "handshake_broken",
    "overloaded",
    "timed_out",
    "shutting_down",
];

/// How a device's connection ended.
pub const CLOSES: [&str; 22] = [
    "no_error",
    "bad_frame",
    "frame_too_large",
    "batch_too_large",
    "hello_expected",
    "lane_in_use",
    "fenced_epoch",
    "taken_over",
    "first_frame_timeout",
    "frame_timeout",
    "bad_identity",
    "revoked",
    "overloaded",
    "shutting_down",
    "storage_failed",
    "not_reading",
    "erased",
    "expired",
    "peer_closed",
    "locally_closed",
    "timed_out",
    "transport_error",
];
