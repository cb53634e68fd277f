//! Groups of simulated devices: who sends how often, and who is connected when.
//!
//! Knows rhythms, dice and motion. Must not know how pings are sent, or what became of them.

use std::{cmp::Reverse, collections::BinaryHeap, ops::Range, time::Duration};

use rand::{SeedableRng, rngs::StdRng};
use waypost_proto::{id::DeviceId, ping::Ping};

use crate::{
    scenario::{DuePing, only_device_of},
    steady::Wanderer,
};

/// Devices that behave alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// What the report calls them.
    pub name: String,
    /// How many, each of a user of its own.
    pub devices: u32,
    /// Between two reports of one device; above zero.
    pub every: Duration,
    /// How many pings a report holds. They were sampled evenly since the report before and are due with it.
    pub batch: u32,
    /// When they are connected.
    pub presence: Presence,
}

/// When the devices of a group are connected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Presence {
    /// From before the first ping is due until the end. They take turns, evenly.
    Stays,
    /// They connect one after the other from the start on, so many a second, or as fast as it goes; the
    /// first report of each is due within its interval from then.
    Joins {
        /// How many a second; `None` for as fast as it goes.
        per_s: Option<f64>,
    },
    /// All at once, with a report of each that is due in that moment.
    Returns {
        /// When, counted from the start.
        after: Duration,
        /// How many older pings each has kept, a minute apart.
        held: u32,
    },
    /// Only while something is to be sent: a device connects for each report and leaves once all of it is
    /// acknowledged. They take turns, evenly.
    Wakes,
}

/// A fleet of groups.
#[derive(Clone, Debug)]
pub struct Groups {
    /// The groups; a device's index counts through them in this order.
    pub groups: Vec<Group>,
    /// No report is due from then on; `None` for until it is told to stop.
    pub duration: Option<Duration>,
    /// Repeats every step of every device, users included.
    pub seed: u64,
}

impl Group {
    /// When the first report of its device number `at` is due.
    fn first_due(&self, at: u32) -> Duration {
        let share = f64::from(at) / f64::from(self.devices.max(1));
        match self.presence {
            Presence::Stays | Presence::Wakes => self.every.mul_f64(share),
            Presence::Joins { per_s } => {
                let joined_s = per_s.map_or(0.0, |per_s| f64::from(at) / per_s);
                let phase = (f64::from(at) * GOLDEN_RATIO).fract();
                Duration::from_secs_f64(joined_s) + self.every.mul_f64(phase)
            }
            Presence::Returns { after, .. } => after,
        }
    }

    /// How many older pings each device has kept.
    #[must_use]
    pub fn held(&self) -> u32 {
        match self.presence {
            Presence::Returns { held, .. } => held,
            Presence::Stays | Presence::Joins { .. } | Presence::Wakes => 0,
        }
    }
}

impl Groups {
    /// Who takes part.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceId> {
        self.groups
            .iter()
            .flat_map(|group| {
                (0..group.devices)
                    .map(|at| only_device_of(&format!("{}:{}:{at}", group.name, self.seed)))
            })
            .collect()
    }

    /// Where each group's devices are among all.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let mut from = 0;
        self.groups
            .iter()
            .map(|group| {
                let range = from..from + group.devices as usize;
                from = range.end;
                range
            })
            .collect()
    }

    /// How many pings are due while it runs; `None` without a duration.
    #[must_use]
    pub fn pings_in_total(&self) -> Option<u64> {
        let duration = self.duration?;
        let reports_of = |group: &Group, at| {
            let left = duration.saturating_sub(group.first_due(at));
            u64::try_from(left.as_nanos().div_ceil(group.every.as_nanos())).unwrap_or(u64::MAX)
        };
        let pings_of = |group: &Group| {
            let reports: u64 = (0..group.devices).map(|at| reports_of(group, at)).sum();
            reports * u64::from(group.batch)
        };
        Some(self.groups.iter().map(pings_of).sum())
    }

    /// What the devices have kept from before, each device's in order; none is due now. `start_ms` is the
    /// wall clock at the start of the run.
    pub fn held_pings(&self, start_ms: u64) -> impl Iterator<Item = (usize, Ping)> + '_ {
        let mut dice = StdRng::seed_from_u64(self.seed ^ HELD_SEED);
        let holders = self.groups.iter().zip(self.ranges());
        holders
            .flat_map(|(group, range)| range.map(move |device| (device, group.held())))
            .flat_map(move |(device, held)| {
                let mut wanderer = Wanderer::new(&mut dice, 0);
                let begun_ms = start_ms.saturating_sub(u64::from(held) * HELD_INTERVAL_MS);
                let pings: Vec<_> = (0..held)
                    .map(|at| {
                        (
                            device,
                            wanderer.step(
                                Duration::from_millis(u64::from(at) * HELD_INTERVAL_MS),
                                begun_ms,
                                &mut dice,
                            ),
                        )
                    })
                    .collect();
                pings
            })
    }

    /// The pings of some of the groups, in the order they are due.
    pub fn pings(&self, of: Range<usize>, start_ms: u64) -> impl Iterator<Item = DuePing> + '_ {
        let mut dice = StdRng::seed_from_u64(self.seed);
        let ranges = self.ranges();
        let mut queue = BinaryHeap::new();
        for group in of.clone() {
            let devices = ranges[group].clone();
            queue.extend(devices.zip(0..).map(|(device, at)| {
                let due = self.groups[group].first_due(at);
                Reverse(Turn { due, device, group })
            }));
        }
        let first_device = ranges.get(of.start).map_or(0, |range| range.start);
        let mut wanderers: Vec<Wanderer> = of
            .flat_map(|group| ranges[group].clone().map(move |_| group))
            .map(|group| Wanderer::new(&mut dice, u64::from(self.groups[group].held())))
            .collect();
        let mut report: Vec<DuePing> = Vec::new();
        std::iter::from_fn(move || {
            if report.is_empty() {
                let Reverse(turn) = queue.pop()?;
                if self.duration.is_some_and(|duration| duration <= turn.due) {
                    // The queue is in order: nothing else is due in time either.
                    queue.clear();
                    return None;
                }
                let group = &self.groups[turn.group];
                let wanderer = &mut wanderers[turn.device - first_device];
                report.extend((0..group.batch).rev().map(|before| {
                    // The first report of a run holds no samples from before it.
                    let sampled = turn.due.saturating_sub(group.every / group.batch * before);
                    DuePing {
                        due: turn.due,
                        device: turn.device,
                        ping: wanderer.step(sampled, start_ms, &mut dice),
                    }
                }));
                report.reverse();
                queue.push(Reverse(Turn {
                    due: turn.due + group.every,
                    ..turn
                }));
            }
            report.pop()
        })
    }
}

/// Whose turn it is when. Ordered by time, then by device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    due: Duration,
    device: usize,
    group: usize,
}

/// Its multiples fall evenly into an interval, however many there are.
const GOLDEN_RATIO: f64 = 0.618_033_988_749_895;
/// Between two pings that a device has kept.
const HELD_INTERVAL_MS: u64 = 60_000;
/// Other dice for what is held than for what is due, so that either can be made without the other.
const HELD_SEED: u64 = 0x6865_6c64;

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, devices: u32, every_s: u64, presence: Presence) -> Group {
        Group {
            name: name.to_owned(),
            devices,
            every: Duration::from_secs(every_s),
            batch: 1,
            presence,
        }
    }

    fn groups(groups: Vec<Group>, duration_s: u64) -> Groups {
        Groups {
            groups,
            duration: Some(Duration::from_secs(duration_s)),
            seed: 9,
        }
    }

    fn all(groups: &Groups) -> Vec<DuePing> {
        groups
            .pings(0..groups.groups.len(), 1_700_000_000_000)
            .collect()
    }

    #[test]
    fn everybody_reports_in_turn_and_numbers_its_pings_without_gaps() {
        let mut mixed = groups(
            vec![
                group("vans", 5, 10, Presence::Stays),
                group("tags", 3, 4, Presence::Wakes),
            ],
            60,
        );
        mixed.groups[0].batch = 3;
        let due = all(&mixed);
        assert_eq!(Some(due.len() as u64), mixed.pings_in_total());
        assert_eq!(due.len(), 5 * 6 * 3 + 3 * 15);
        assert!(due.is_sorted_by_key(|due| due.due));
        for device in 0..8 {
            let seqs: Vec<_> = due
                .iter()
                .filter(|due| due.device == device)
                .map(|due| due.ping.seq)
                .collect();
            assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
        }
        let of_one: Vec<_> = due.iter().filter(|due| due.device == 2).collect();
        assert!(
            of_one.is_sorted_by_key(|due| due.ping.time_ms),
            "a report's samples are in order"
        );
    }

    #[test]
    fn a_seed_repeats_everything_and_another_nothing() {
        let mixed = groups(vec![group("vans", 4, 1, Presence::Stays)], 5);
        let other = Groups {
            seed: 10,
            ..mixed.clone()
        };
        assert_eq!(all(&mixed), all(&mixed));
        assert!(
            all(&mixed)
                .iter()
                .zip(all(&other))
                .all(|(one, two)| one.ping != two.ping)
        );
        assert_ne!(mixed.devices(), other.devices());
    }

    #[test]
    fn who_joins_is_not_due_before_it_could_be_there() {
        let per_s = 10.0;
        let ramp = groups(
            vec![group("all", 100, 5, Presence::Joins { per_s: Some(per_s) })],
            30,
        );
        let mut seen = [false; 100];
        for due in all(&ramp) {
            let joined_s = due.device as f64 / per_s;
            assert!(joined_s <= due.due.as_secs_f64());
            if !std::mem::replace(&mut seen[due.device], true) {
                assert!(due.due.as_secs_f64() <= joined_s + 5.0);
            }
        }
        assert!(seen.iter().all(|seen| *seen));
        assert_eq!(Some(all(&ramp).len() as u64), ramp.pings_in_total());
    }

    #[test]
    fn who_returns_goes_on_where_its_backlog_ends() {
        let after = Duration::from_secs(2);
        let back = groups(
            vec![
                group("others", 2, 5, Presence::Stays),
                group("back", 3, 60, Presence::Returns { after, held: 4 }),
            ],
            10,
        );
        let start_ms = 1_700_000_000_000;
        let held: Vec<_> = back.held_pings(start_ms).collect();
        assert_eq!(held.len(), 12);
        for device in 2..5 {
            let mut pings: Vec<_> = held
                .iter()
                .filter(|(at, _)| *at == device)
                .map(|(_, ping)| *ping)
                .collect();
            let returned: Vec<_> = all(&back)
                .into_iter()
                .filter(|due| due.device == device)
                .collect();
            assert_eq!(returned.len(), 1, "a minute is longer than the run");
            assert_eq!(returned[0].due, after);
            pings.push(returned[0].ping);
            assert_eq!(
                pings.iter().map(|ping| ping.seq).collect::<Vec<_>>(),
                [1, 2, 3, 4, 5]
            );
            assert!(pings.is_sorted_by_key(|ping| ping.time_ms));
            assert_eq!(pings[0].time_ms, start_ms - 4 * 60_000);
        }
    }
}
