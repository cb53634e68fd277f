//! How long a worker lets packets gather before it looks at them, and the committer requests.
//!
//! Knows how busy a thread was, or how much it was asked for. Must not know time, which is an argument, nor what
//! the thread does.
//!
//! A worker that has nothing to do sleeps until a packet wakes it. When packets come every few hundred
//! microseconds, falling asleep and waking for each costs more than what is done for it: a bare quinn server at
//! 10,000 lone pings a second takes 47 µs of CPU a ping, and 30 µs when it lets packets gather for a
//! millisecond. A worker that is hardly busy must not do so, or a single ping would wait for company that does
//! not come.
//!
//! The committer has the same trouble: at that rate it takes a third of all processor time, two thirds of it for
//! syncs, and a sync costs the same whether it is for one ping or for ten. It cannot tell from how busy it is,
//! because a single device that waits for each ack keeps it as busy as a crowd: so it goes by the number of
//! requests.

use std::time::{Duration, Instant};

/// Decides for one worker, from how busy it was a moment ago.
#[derive(Debug)]
pub(crate) struct Gather {
    window_began: Instant,
    /// When the worker woke last; it has been awake since.
    woke: Instant,
    busy: Duration,
    /// What was decided at the end of the last window.
    wait: Duration,
}

impl Gather {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            window_began: now,
            woke: now,
            busy: Duration::ZERO,
            wait: Duration::ZERO,
        }
    }

    /// The worker has nothing more to do. Returns how long it should let things gather, at most [`LONGEST`],
    /// before it looks again.
    pub(crate) fn before_sleep(&mut self, now: Instant) -> Duration {
        self.busy += now.saturating_duration_since(self.woke);
        self.wait
    }

    /// The worker has something to do again.
    pub(crate) fn woken(&mut self, now: Instant) {
        self.woke = now;
        let window = now.saturating_duration_since(self.window_began);
        if window < WINDOW {
            return;
        }
        let least_share = if self.wait.is_zero() {
            SHARE_TO_BEGIN
        } else {
            SHARE_TO_GO_ON
        };
        self.wait = if window < self.busy * least_share {
            LONGEST
        } else {
            Duration::ZERO
        };
        self.window_began = now;
        self.busy = Duration::ZERO;
    }
}

/// Decides for the committer, from how many requests it was handed a moment ago.
#[derive(Debug)]
pub struct GatherRequests {
    window_began: Instant,
    requests: usize,
    sleeps: usize,
    /// What was decided at the end of the last window.
    wait: Duration,
}

impl GatherRequests {
    /// Nothing has come before `now`.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            window_began: now,
            requests: 0,
            sleeps: 0,
            wait: Duration::ZERO,
        }
    }

    /// Nothing more is queued, and so many `requests` were since the last time. Returns how long the committer
    /// should let others gather, at most half a millisecond, before it looks again.
    pub fn before_sleep(&mut self, requests: usize, now: Instant) -> Duration {
        self.requests = self.requests.saturating_add(requests);
        self.sleeps += 1;
        let window = now.saturating_duration_since(self.window_began);
        if window < WINDOW {
            return self.wait;
        }
        let is_crowd = CROWD_REQUESTS_PER_S * window.as_secs_f64() <= self.requests as f64;
        let comes_together = self.sleeps.saturating_mul(LARGE_GROUP_REQUESTS) <= self.requests;
        self.wait = if is_crowd && !comes_together {
            LONGEST_FOR_REQUESTS
        } else {
            Duration::ZERO
        };
        self.window_began = now;
        self.requests = 0;
        self.sleeps = 0;
        self.wait
    }
}

/// The longest time for which anything may wait for company. The kernel's timers are late by up to 50 µs.
pub(crate) const LONGEST: Duration = Duration::from_micros(900);
/// What is decided holds for so long, and a sleep of this length means that there was nothing to gather.
const WINDOW: Duration = Duration::from_millis(10);
/// A worker begins to let packets gather when it is busy for more than one part in so many. A device that sends
/// its next ping whenever the last one is on disk keeps it busy for less; 1,000 pings a second from others keep
/// it busy for more.
const SHARE_TO_BEGIN: u32 = 12;
/// And goes on while it is busy for more than one part in so many: gathering makes the same work less.
const SHARE_TO_GO_ON: u32 = 24;
/// With the commit itself about as long as a worker lets packets gather: an answer that is ready before its worker
/// looks again has lost nothing.
const LONGEST_FOR_REQUESTS: Duration = Duration::from_micros(500);
/// So many requests a second are a crowd: more than one device, or a few, can bring that wait for each ack.
const CROWD_REQUESTS_PER_S: f64 = 3_000.0;
/// A group of so many costs hardly less for each if it is larger still.
const LARGE_GROUP_REQUESTS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Lets a packet come every `period`, over a second. To be woken takes as long as to handle a packet, which is
    /// half of `work`. Returns the share of the worker's sleeps in which things gathered.
    fn gathered(period: Duration, work: Duration) -> f64 {
        let begun = Instant::now();
        let mut now = begun;
        let mut came = begun;
        let mut gather = Gather::new(now);
        let (mut sleeps, mut gathered) = (0, 0);
        while now < begun + Duration::from_secs(1) {
            now += work / 2;
            while came <= now {
                came += period;
                now += work / 2;
            }
            let wait = gather.before_sleep(now);
            assert!(wait <= LONGEST);
            sleeps += 1;
            gathered += i32::from(!wait.is_zero());
            now = (now + wait).max(came);
            gather.woken(now);
        }
        f64::from(gathered) / f64::from(sleeps)
    }

    #[test]
    fn lone_pings_do_not_wait_for_company() {
        assert_eq!(gathered(Duration::from_millis(10), 100 * US), 0.0);
        assert_eq!(
            gathered(1_000 * US, 60 * US),
            0.0,
            "one device that waits for each ack"
        );
    }

    #[test]
    fn a_busy_worker_lets_packets_gather() {
        // 5,000 packets a second.
        assert!(0.9 < gathered(200 * US, 30 * US));
        assert!(0.7 < gathered(50 * US, 40 * US));
    }

    #[test]
    fn a_device_that_waits_for_each_ack_is_let_go_again_when_the_crowd_has_gone() {
        let mut now = Instant::now();
        let mut gather = Gather::new(now);
        let mut sleep = |work: Duration, pause: Duration| {
            now += work;
            let wait = gather.before_sleep(now);
            now += wait.max(pause);
            gather.woken(now);
            wait
        };
        for _ in 0..1_000 {
            sleep(100 * US, 100 * US);
        }
        assert_eq!(sleep(100 * US, 100 * US), LONGEST, "a crowd");
        for _ in 0..100 {
            sleep(30 * US, 500 * US);
        }
        assert_eq!(sleep(30 * US, 500 * US), Duration::ZERO);
    }

    /// Hands the committer `each` requests every `period`, over a second, and returns what it decided in the end.
    fn gathered_requests(gather: &mut GatherRequests, each: usize, period: Duration) -> Duration {
        let begun = gather.window_began;
        let steps = 1_000_000 / u32::try_from(period.as_micros()).unwrap();
        (1..=steps)
            .map(|step| gather.before_sleep(each, begun + period * step))
            .last()
            .unwrap()
    }

    #[test]
    fn requests_gather_while_there_is_a_crowd() {
        let mut gather = GatherRequests::new(Instant::now());
        assert_eq!(
            gathered_requests(&mut gather, 1, 800 * US),
            Duration::ZERO,
            "one device that waits for each ack"
        );
        assert_eq!(
            gathered_requests(&mut gather, 2, 250 * US),
            LONGEST_FOR_REQUESTS
        );
        assert_eq!(
            gathered_requests(&mut gather, 8, 1_000 * US),
            LONGEST_FOR_REQUESTS,
            "the same crowd in fewer groups"
        );
        assert_eq!(
            gathered_requests(&mut gather, 100, 1_000 * US),
            Duration::ZERO,
            "a crowd that comes in large groups by itself"
        );
        assert_eq!(
            gathered_requests(&mut gather, 1, 1_300 * US),
            Duration::ZERO,
            "the crowd has gone"
        );
    }

    #[test]
    fn the_first_ping_after_a_pause_does_not_wait() {
        let begun = Instant::now();
        let mut gather = Gather::new(begun);
        let mut now = begun;
        for _ in 0..1_000 {
            now += 100 * US;
            gather.before_sleep(now);
            now += 100 * US;
            gather.woken(now);
        }
        assert_eq!(gather.before_sleep(now), LONGEST, "it was busy");
        now += Duration::from_millis(500);
        gather.woken(now);
        assert_eq!(gather.before_sleep(now + 50 * US), Duration::ZERO);
    }
}
