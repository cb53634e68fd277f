//! Metrics of enrolment: who was invited, who has come, and who was turned away.
//!
//! Knows their names. Must not know codes.

use metrics::Gauge;

use super::series::{ByLabel, by_label, new_gauge};

/// Moved by the port of enrolment, by sessions, and by what operators call.
#[derive(Debug)]
pub struct EnrolmentMetrics {
    /// Requests for a certificate, by what came of them, a label of [`ENROLMENTS`].
    pub requests: ByLabel,
    /// Calls of operators, by what came of them, a label of [`INVITATIONS`].
    pub invitations: ByLabel,
    /// Invitations that are kept.
    pub open_invitations: Gauge,
}

impl EnrolmentMetrics {
    pub(super) fn register() -> Self {
        Self {
            requests: by_label(
                "waypost_enrolments_total",
                "Requests for a certificate, by what came of them.",
                "outcome",
                &ENROLMENTS,
            ),
            invitations: by_label(
                "waypost_invitations_total",
                "Invitations that operators asked for, by what came of them.",
                "outcome",
                &INVITATIONS,
            ),
            open_invitations: new_gauge(
                "waypost_invitations_kept",
                "Invitations that are kept: open, or redeemed and not yet expired.",
            ),
        }
    }
}

/// What comes of a request: a certificate for a newcomer or for a device that renews; a refusal, as
/// `EnrolmentRefusal.Code` in `enrolment.proto`; a newcomer that comes too often, or while all places are taken; or a
/// conversation that did not get so far.
pub const ENROLMENTS: [&str; 8] = [
    "issued",
    "renewed",
    "code_not_valid",
    "bad_request",
    "try_later",
    "not_offered",
    "refused_unheard",
    "broken_off",
];

/// What comes of an operator's call.
pub const INVITATIONS: [&str; 4] = ["made", "not_allowed", "refused", "failed"];
