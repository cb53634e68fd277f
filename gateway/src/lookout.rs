//! The lookout: finds out, from one look to the next, when the gateway could not hear.
//!
//! Takes looks, gives sightings. Must not know time, tasks or disks: whoever looks says what the clocks show.
//! The committer looks before it announces any moment, so no moment is announced before it is known whether
//! the gateway could hear until then.

use std::time::{Duration, Instant};

use crate::{clock::Reading, coverage::Reason};

/// Nothing for so long from the one who looks, and whoever wanted to be heard may have been turned away by
/// full queues and buffers. As long as a disk that does not answer makes the gateway not ready.
const STALL: Duration = Duration::from_secs(5);
/// A clock that gained more than this between two looks was set, not late.
const STEP_FORWARD_MS: u64 = 2_000;
/// A clock that shows so much less than it did was set, not adjusted.
const STEP_BACK_MS: u64 = 1_000;
/// Newcomers that were turned away come back within seconds; so long after the last of them, none is.
const CALM: Duration = Duration::from_secs(5);

/// What is seen at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// What the clocks show.
    pub reading: Reading,
    /// How many newcomers have been turned away for want of room, since the start.
    pub turned_away: u64,
    /// For how long the disk has been waited for since the last look.
    pub disk_wait: Duration,
    /// The last moment that was announced.
    pub resolved_ms: u64,
}

/// A span in which the gateway could not hear has begun, or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Its first moment.
    pub from_ms: u64,
    /// The first moment after it; none while it lasts.
    pub until_ms: Option<u64>,
    /// Why.
    pub reason: Reason,
}

/// What the last look has left.
#[derive(Debug, Default)]
pub struct Lookout {
    last: Option<(Reading, u64)>,
    overload: Option<Overload>,
    /// The moment at which times stand still because the system's clock was set back.
    standing_since_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Overload {
    from_ms: u64,
    last_turned_away: Instant,
}

impl Lookout {
    /// Looks. Of two sightings of one beginning and reason, the later holds.
    pub fn look(&mut self, look: &Look) -> Vec<Sighting> {
        let now = look.reading;
        let mut sightings = Vec::new();
        let last = self.last.replace((now, look.turned_away));
        self.look_at_clock(now, &mut sightings);
        if let Some((last, turned_away)) = last {
            let passed = now.at.saturating_duration_since(last.at);
            look_for_leap(last, now, passed, &mut sightings);
            look_for_stall(look, last, passed, &mut sightings);
            self.look_at_newcomers(turned_away < look.turned_away, last, now, &mut sightings);
        }
        sightings
    }

    fn look_at_clock(&mut self, now: Reading, sightings: &mut Vec<Sighting>) {
        let sighting = |from_ms, until_ms| Sighting {
            from_ms,
            until_ms,
            reason: Reason::ClockStepped,
        };
        match self.standing_since_ms {
            None if STEP_BACK_MS < now.now_ms.saturating_sub(now.system_ms) => {
                self.standing_since_ms = Some(now.now_ms);
                sightings.push(sighting(now.now_ms, None));
            }
            Some(since_ms) if now.now_ms <= now.system_ms => {
                self.standing_since_ms = None;
                // As long as it stood, no time passed.
                sightings.push(sighting(since_ms, Some(since_ms)));
            }
            _ => {}
        }
    }

    fn look_at_newcomers(
        &mut self,
        are_turned_away: bool,
        last: Reading,
        now: Reading,
        sightings: &mut Vec<Sighting>,
    ) {
        match &mut self.overload {
            None if are_turned_away => {
                let from_ms = last.now_ms;
                self.overload = Some(Overload {
                    from_ms,
                    last_turned_away: now.at,
                });
                sightings.push(Sighting {
                    from_ms,
                    until_ms: None,
                    reason: Reason::Overloaded,
                });
            }
            Some(overload) if are_turned_away => overload.last_turned_away = now.at,
            Some(overload)
                if CALM <= now.at.saturating_duration_since(overload.last_turned_away) =>
            {
                sightings.push(Sighting {
                    from_ms: overload.from_ms,
                    until_ms: Some(now.now_ms),
                    reason: Reason::Overloaded,
                });
                self.overload = None;
            }
            _ => {}
        }
    }
}

/// The gateway's clock has gained more than time has passed.
fn look_for_leap(last: Reading, now: Reading, passed: Duration, sightings: &mut Vec<Sighting>) {
    let leap_ms = (now.now_ms - last.now_ms).saturating_sub(milliseconds(passed));
    if STEP_FORWARD_MS < leap_ms {
        sightings.push(Sighting {
            from_ms: last.now_ms,
            until_ms: Some(last.now_ms + leap_ms),
            reason: Reason::ClockStepped,
        });
    }
}

/// Nobody has looked for a while: the disk kept whoever does, or it did not get to run.
fn look_for_stall(look: &Look, last: Reading, passed: Duration, sightings: &mut Vec<Sighting>) {
    if passed < STALL {
        return;
    }
    let (from_ms, reason) = if passed / 2 <= look.disk_wait {
        (look.resolved_ms, Reason::DiskFailed)
    } else {
        (last.now_ms, Reason::Overloaded)
    };
    sightings.push(Sighting {
        from_ms,
        until_ms: Some(look.reading.now_ms),
        reason,
    });
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON_MS: u64 = 1_767_268_800_000;

    /// A lookout and what it looks at.
    struct Bench {
        lookout: Lookout,
        look: Look,
        /// How far the system's clock is from where it should be.
        set_by_ms: i64,
        true_ms: u64,
    }

    impl Bench {
        fn new() -> Self {
            let reading = Reading {
                now_ms: NOON_MS,
                system_ms: NOON_MS,
                at: Instant::now(),
            };
            let mut bench = Self {
                lookout: Lookout::default(),
                look: Look {
                    reading,
                    turned_away: 0,
                    disk_wait: Duration::ZERO,
                    resolved_ms: NOON_MS - 1,
                },
                set_by_ms: 0,
                true_ms: NOON_MS,
            };
            assert_eq!(bench.after(0), []);
            bench
        }

        /// Looks some milliseconds later.
        fn after(&mut self, passed_ms: u64) -> Vec<Sighting> {
            self.true_ms += passed_ms;
            let reading = &mut self.look.reading;
            reading.at += Duration::from_millis(passed_ms);
            reading.system_ms = self.true_ms.checked_add_signed(self.set_by_ms).unwrap();
            reading.now_ms = reading.now_ms.max(reading.system_ms);
            self.lookout.look(&self.look)
        }
    }

    fn seen(from_ms: u64, until_ms: Option<u64>, reason: Reason) -> Vec<Sighting> {
        vec![Sighting {
            from_ms: NOON_MS + from_ms,
            until_ms: until_ms.map(|until_ms| NOON_MS + until_ms),
            reason,
        }]
    }

    #[test]
    fn nothing_is_seen_while_all_is_well() {
        let mut bench = Bench::new();
        for step in 0..100 {
            bench.set_by_ms = if step % 2 == 0 { 900 } else { 0 };
            assert_eq!(bench.after(200), [], "a clock that is adjusted a little");
        }
        assert_eq!(bench.after(4_999), [], "a slow moment");
    }

    #[test]
    fn a_leap_of_the_clock_is_a_span_of_its_length() {
        let mut bench = Bench::new();
        bench.after(1_000);
        bench.set_by_ms = 3_600_000;
        let leap = seen(1_000, Some(3_601_000), Reason::ClockStepped);
        assert_eq!(bench.after(200), leap);
        assert_eq!(bench.after(200), []);
    }

    #[test]
    fn a_clock_that_was_set_back_stands_until_it_has_caught_up() {
        let mut bench = Bench::new();
        bench.set_by_ms = -3_000;
        assert_eq!(bench.after(200), seen(0, None, Reason::ClockStepped));
        for _ in 0..13 {
            assert_eq!(bench.after(200), []);
        }
        assert_eq!(bench.after(200), seen(0, Some(0), Reason::ClockStepped));
        assert_eq!(bench.after(200), []);
    }

    #[test]
    fn a_clock_that_is_set_right_again_at_once_leaves_no_span_open() {
        let mut bench = Bench::new();
        bench.set_by_ms = -3_600_000;
        assert_eq!(bench.after(200), seen(0, None, Reason::ClockStepped));
        bench.set_by_ms = 7_200_000;
        // The same beginning: the later of the two holds, and it has ended.
        let both = [
            seen(0, Some(0), Reason::ClockStepped),
            seen(0, Some(7_200_200), Reason::ClockStepped),
        ];
        assert_eq!(bench.after(200), both.concat());
    }

    #[test]
    fn a_disk_that_did_not_answer_is_blamed_from_the_last_announcement_on() {
        let mut bench = Bench::new();
        bench.look.disk_wait = Duration::from_millis(5_900);
        bench.look.resolved_ms = NOON_MS + 10;
        assert_eq!(
            bench.after(6_000),
            seen(10, Some(6_000), Reason::DiskFailed)
        );
    }

    #[test]
    fn a_process_that_did_not_get_to_run_was_overloaded() {
        let mut bench = Bench::new();
        bench.after(200);
        assert_eq!(
            bench.after(6_000),
            seen(200, Some(6_200), Reason::Overloaded)
        );
    }

    #[test]
    fn overload_lasts_until_nobody_was_turned_away_for_a_while() {
        let mut bench = Bench::new();
        bench.after(200);
        bench.look.turned_away = 3;
        assert_eq!(bench.after(200), seen(200, None, Reason::Overloaded));
        assert_eq!(bench.after(4_900), []);
        bench.look.turned_away = 4;
        assert_eq!(bench.after(200), []);
        assert_eq!(bench.after(4_900), []);
        assert_eq!(
            bench.after(200),
            seen(200, Some(10_600), Reason::Overloaded)
        );
        assert_eq!(bench.after(4_900), []);
    }
}
