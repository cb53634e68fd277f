//! Metrics of what is said on connections: frames, Hellos, acks.
//!
//! Knows their names. Must not know what a frame holds.

use metrics::{Counter, Histogram};

use super::series::{ByLabel, by_label, new_counter, new_histogram};

/// Moved by the sessions.
#[derive(Debug)]
pub struct SessionMetrics {
    /// By kind, a label of [`FRAME_KINDS`].
    pub frames_received: ByLabel,
    /// Pings in each batch that arrived.
    pub batch_size_pings: Histogram,
    /// By admission, a label of [`ADMISSIONS`].
    pub hellos: ByLabel,
    /// Acks handed to the transport.
    pub acks_sent: Counter,
    /// From a batch's receipt to its ack being handed to the transport.
    pub ack_latency: Histogram,
}

impl SessionMetrics {
    pub(super) fn register() -> Self {
        Self {
            frames_received: by_label(
                "waypost_frames_received_total",
                "Frames read from devices.",
                "kind",
                &FRAME_KINDS,
            ),
            batch_size_pings: new_histogram(
                "waypost_batch_size_pings",
                "Pings in each batch that arrived.",
            ),
            hellos: by_label(
                "waypost_hellos_total",
                "Hellos answered, by what became of the device's epoch.",
                "admission",
                &ADMISSIONS,
            ),
            acks_sent: new_counter("waypost_acks_sent_total", "Acks handed to the transport."),
            ack_latency: new_histogram(
                "waypost_ack_latency_seconds",
                "From a batch's receipt to its ack being handed to the transport.",
            ),
        }
    }
}

/// The kinds of frame that a device sends.
pub const FRAME_KINDS: [&str; 5] = ["hello", "batch", "heartbeat", "control", "renew"];

/// What became of a Hello: the epoch went on, a new one was asked for, a new one was needed because the
/// store remembers less than the device was told, or the epoch was an old one.
pub const ADMISSIONS: [&str; 4] = ["resumed", "new_epoch", "lost_acknowledged", "fenced"];
