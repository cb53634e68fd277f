//! Whether the machine at the other end of a connection is still there.
//!
//! Pure. Knows acknowledgements and patience. Must not know sockets, or what is sent.
//!
//! A checker that reads a byte a second, or hangs, is there: its kernel acknowledges what comes, and when there is no
//! room for more, it says so whenever it is asked again. So that is what counts. An HTTP/2 PING would say nothing,
//! because it waits behind all that has not been read; and neither would TCP_USER_TIMEOUT, which ends a connection
//! without room though every probe is answered.
//!
//! # Bounds
//!
//! Somebody who vanished is given up one patience after it has left several things unanswered, and at most half a one
//! later if it is looked twice in a patience. On a Watch stream there is something to answer each second, and a
//! quiet peer is asked by the kernel. But one without room is asked after longer and longer times, up to two minutes:
//! so it may take some minutes until somebody is given up who had stopped reading before.

use std::time::{Duration, Instant};

/// What TCP knows of the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Acknowledgements {
    /// What was sent several times, be it data or a probe, has not been answered.
    pub(super) are_due: bool,
    /// How long ago the last one came.
    pub(super) last_ago: Duration,
}

/// How long a peer has owed an acknowledgement.
#[derive(Debug)]
pub(super) struct Liveness {
    patience: Duration,
    due_since: Option<Instant>,
}

impl Liveness {
    /// Of a peer that has just been heard.
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            due_since: None,
        }
    }

    /// Whether the peer is gone: for longer than the patience it has acknowledged nothing, though it should have.
    pub(super) fn is_gone(&mut self, now: Instant, acknowledgements: Acknowledgements) -> bool {
        if !acknowledgements.are_due {
            self.due_since = None;
            return false;
        }
        let due_since = self.due_since.get_or_insert(now);
        // If it was heard since, what is due now was sent at some time after.
        let heard = now.checked_sub(acknowledgements.last_ago);
        *due_since = heard.map_or(*due_since, |heard| heard.max(*due_since));
        self.patience <= now.saturating_duration_since(*due_since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Looks at these seconds, with what is due and the seconds since the last acknowledgement; when it is gone.
    fn gone_at(looks: &[(u64, bool, u64)]) -> Option<u64> {
        let begun = Instant::now();
        let mut liveness = Liveness::new(PATIENCE);
        looks.iter().find_map(|&(at_s, are_due, last_ago_s)| {
            let acknowledgements = Acknowledgements {
                are_due,
                last_ago: Duration::from_secs(last_ago_s),
            };
            let is_gone = liveness.is_gone(begun + Duration::from_secs(at_s), acknowledgements);
            is_gone.then_some(at_s)
        })
    }

    #[test]
    fn who_owes_an_acknowledgement_for_longer_than_the_patience_is_gone() {
        assert_eq!(
            gone_at(&[(0, true, 1), (5, true, 6), (9, true, 10), (10, true, 11)]),
            Some(10)
        );
    }

    #[test]
    fn whoever_acknowledges_now_and_then_is_there_however_much_is_due() {
        let looks: Vec<_> = (0..1_000).map(|at_s| (at_s, true, at_s % 9)).collect();
        assert_eq!(gone_at(&looks), None);
    }

    #[test]
    fn whoever_owes_nothing_may_be_silent_for_ever() {
        let looks: Vec<_> = (0..1_000).map(|at_s| (at_s, false, at_s)).collect();
        assert_eq!(gone_at(&looks), None);
    }

    #[test]
    fn after_a_long_silence_the_patience_begins_with_what_is_due() {
        assert_eq!(
            gone_at(&[(100, false, 100), (105, true, 105), (110, true, 110)]),
            None
        );
        assert_eq!(
            gone_at(&[(100, false, 100), (105, true, 105), (115, true, 115)]),
            Some(115)
        );
    }

    #[test]
    fn an_acknowledgement_in_between_begins_the_patience_anew() {
        assert_eq!(
            gone_at(&[(0, true, 0), (8, true, 2), (12, true, 6), (15, true, 9)]),
            None
        );
        assert_eq!(
            gone_at(&[(0, true, 0), (8, true, 2), (12, true, 6), (16, true, 10)]),
            Some(16)
        );
    }
}
