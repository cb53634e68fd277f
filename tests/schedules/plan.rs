//! What one execution consists of, and what is counted over all of them. Knows chance; must not know what
//! is played.

use shuttle::rand::{Rng, thread_rng};

/// How one execution is made up.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// How many sessions there are; two may be of one device.
    pub(crate) sessions: usize,
    /// How many checkers set deadlines, and how often each.
    pub(crate) checkers: usize,
    pub(crate) orders: usize,
    /// How many deadlines there may be.
    pub(crate) most_deadlines: usize,
    /// Checkers are still there when the committer is told to stop.
    pub(crate) do_checkers_stay: bool,
    /// How many batches each of them sends.
    pub(crate) batches: usize,
    /// How many answers a session lets wait before it sends more.
    pub(crate) in_flight: usize,
    pub(crate) queue_requests: usize,
    pub(crate) group_pings: usize,
    /// How often the clock moves.
    pub(crate) ticks: usize,
    /// How often the committer's idle timer fires before all sessions are done.
    pub(crate) idle_rings: usize,
    /// The commit that fails.
    pub(crate) failing_commit: Option<u64>,
    pub(crate) is_committer_cut_off: bool,
    /// Sessions that are cut off at any moment, the first ones.
    pub(crate) leaving: usize,
}

impl Plan {
    pub(crate) const MOST_SESSIONS: usize = 3;
    pub(crate) const MOST_CHECKERS: usize = 2;

    /// Anything that can happen while the disk is sound and nobody leaves.
    pub(crate) fn sound() -> Self {
        let mut random = thread_rng();
        let do_checkers_stay = random.gen_ratio(1, 4);
        Self {
            sessions: random.gen_range(1..=Self::MOST_SESSIONS),
            checkers: random.gen_range(0..=Self::MOST_CHECKERS),
            orders: if do_checkers_stay {
                // So many that some have yet to come when the committer stops.
                random.gen_range(6..=12)
            } else {
                random.gen_range(1..=3)
            },
            most_deadlines: random.gen_range(2..=6),
            do_checkers_stay,
            batches: random.gen_range(1..=4),
            in_flight: random.gen_range(1..=4),
            queue_requests: random.gen_range(1..=4),
            group_pings: random.gen_range(1..=10),
            ticks: random.gen_range(0..=3),
            idle_rings: random.gen_range(0..=2),
            failing_commit: None,
            is_committer_cut_off: false,
            leaving: 0,
        }
    }

    /// And the disk fails.
    pub(crate) fn failing() -> Self {
        Self {
            failing_commit: Some(thread_rng().gen_range(1..=3)),
            ..Self::sound()
        }
    }

    /// And the committer is cut off while it waits.
    pub(crate) fn abandoned() -> Self {
        Self {
            is_committer_cut_off: true,
            ..Self::sound()
        }
    }

    /// And sessions are cut off.
    pub(crate) fn leaving() -> Self {
        Self {
            sessions: Self::MOST_SESSIONS,
            leaving: thread_rng().gen_range(1..=2),
            ..Self::sound()
        }
    }
}

/// How often things happened, so that a test can see that its schedules got there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) settled: u64,
    pub(crate) fenced: u64,
    /// Answers of a committer that stopped.
    pub(crate) lost: u64,
    /// Requests that a committer that had stopped did not take.
    pub(crate) refused: u64,
    /// Requests that came when their queue was full.
    pub(crate) held_back: u64,
    /// Sessions that were cut off before they were done.
    pub(crate) cut_off: u64,
    /// Orders that were carried out.
    pub(crate) ordered: u64,
    /// Orders for which there was no room.
    pub(crate) too_many: u64,
    /// Orders of which nobody knows, because the committer stopped.
    pub(crate) orders_lost: u64,
}
