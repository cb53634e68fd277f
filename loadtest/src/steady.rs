//! A simulated fleet that sends at a constant rate: seeded random movement.
//!
//! Knows dice and motion. Must not know how pings are sent.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use waypost_proto::{
    id::DeviceId,
    ping::{COURSE_CIRCLE_DDEG, HEADING_CIRCLE_DEG, Ping, Source},
};

use crate::scenario::{DuePing, only_device_of};

/// A simulated fleet.
#[derive(Clone, Debug)]
pub struct Steady {
    /// How many devices, each of a user of its own.
    pub devices: u32,
    /// Pings a second, all devices together. They take turns, so each sends as rarely as it can.
    pub pings_per_s: f64,
    /// How long; `None` for until it is told to stop.
    pub duration: Option<Duration>,
    /// Repeats every step of every device.
    pub seed: u64,
}

/// One device on its way.
#[derive(Debug)]
pub(crate) struct Wanderer {
    seq: u64,
    due: Duration,
    latitude_deg: f64,
    longitude_deg: f64,
    course_deg: f64,
    speed_m_per_s: f64,
    battery_percent: f64,
}

impl Steady {
    /// Who takes part.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceId> {
        (0..self.devices)
            .map(|at| only_device_of(&format!("steady:{}:{at}", self.seed)))
            .collect()
    }

    /// How many pings will be sent; `None` without a duration.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a count of pings; casts of floats saturate"
    )]
    pub fn pings_in_total(&self) -> Option<u64> {
        self.duration
            .map(|duration| (duration.as_secs_f64() * self.pings_per_s).ceil() as u64)
    }

    /// The pings in the order they are due.
    pub fn pings(&self, start_ms: u64) -> impl Iterator<Item = DuePing> {
        let mut dice = StdRng::seed_from_u64(self.seed);
        let mut turns: Vec<usize> = (0..self.devices as usize).collect();
        turns.shuffle(&mut dice);
        let mut fleet: Vec<Wanderer> = turns.iter().map(|_| Wanderer::new(&mut dice, 0)).collect();
        let between_pings_s = self.pings_per_s.recip();
        (0..self.pings_in_total().unwrap_or(u64::MAX))
            .zip((0..turns.len()).cycle())
            .map(move |(number, turn)| {
                let due = Duration::from_secs_f64(number as f64 * between_pings_s);
                let device = turns[turn];
                DuePing {
                    due,
                    device,
                    ping: fleet[device].step(due, start_ms, &mut dice),
                }
            })
    }
}

impl Wanderer {
    /// Somewhere, with so many pings behind it.
    pub(crate) fn new(dice: &mut StdRng, seq: u64) -> Self {
        Self {
            seq,
            due: Duration::ZERO,
            latitude_deg: dice.random_range(-70.0..70.0),
            longitude_deg: dice.random_range(-180.0..180.0),
            course_deg: dice.random_range(0.0..360.0),
            speed_m_per_s: dice.random_range(0.0..20.0),
            battery_percent: dice.random_range(20.0..100.0),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "all values are small; casts of floats saturate"
    )]
    pub(crate) fn step(&mut self, due: Duration, start_ms: u64, dice: &mut StdRng) -> Ping {
        let elapsed_s = due.saturating_sub(self.due).as_secs_f64();
        self.due = due;
        self.seq += 1;
        // A device without a new fix says where it was last, which proves life but not place.
        let has_fix = self.seq == 1 || !dice.random_bool(NO_FIX_PROBABILITY);
        if has_fix {
            self.course_deg = (self.course_deg + dice.random_range(-15.0..15.0)).rem_euclid(360.0);
            self.speed_m_per_s =
                (self.speed_m_per_s + dice.random_range(-1.0..1.0)).clamp(0.0, 40.0);
            let moved_deg = self.speed_m_per_s * elapsed_s / METRES_PER_DEGREE;
            let (east, north) = self.course_deg.to_radians().sin_cos();
            self.latitude_deg = (self.latitude_deg + moved_deg * north).clamp(-80.0, 80.0);
            let around =
                self.longitude_deg + moved_deg * east / self.latitude_deg.to_radians().cos();
            self.longitude_deg = (around + 180.0).rem_euclid(360.0) - 180.0;
        }
        self.battery_percent = (self.battery_percent - elapsed_s * 0.001).max(1.0);
        Ping {
            seq: self.seq,
            time_ms: start_ms + u64::try_from(due.as_millis()).unwrap_or(u64::MAX - start_ms),
            latitude_e7: (self.latitude_deg * 1e7) as i32,
            longitude_e7: (self.longitude_deg * 1e7) as i32,
            accuracy_dm: Some(dice.random_range(20..300)),
            altitude_dm: None,
            speed_cm_per_s: Some((self.speed_m_per_s * 100.0) as u32),
            course_ddeg: Some((self.course_deg * 10.0) as u16 % COURSE_CIRCLE_DDEG),
            heading_deg: Some(self.course_deg as u16 % HEADING_CIRCLE_DEG),
            battery_percent: Some(self.battery_percent as u8),
            source: if has_fix {
                Source::Gnss
            } else {
                Source::LastKnown
            },
        }
    }
}

/// How often a device finds no new position, so that the two clocks of sample and fix differ.
const NO_FIX_PROBABILITY: f64 = 0.02;
/// A sixtieth of it is a nautical mile.
const METRES_PER_DEGREE: f64 = 111_120.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(seed: u64) -> Steady {
        Steady {
            devices: 7,
            pings_per_s: 10.0,
            duration: Some(Duration::from_secs(10)),
            seed,
        }
    }

    #[test]
    fn a_seed_repeats_everything_and_another_nothing() {
        let run = |seed| steady(seed).pings(1_700_000_000_000).collect::<Vec<_>>();
        assert_eq!(run(1), run(1));
        assert!(
            run(1)
                .iter()
                .zip(run(2))
                .all(|(one, two)| one.ping != two.ping)
        );
        assert!(
            steady(1)
                .devices()
                .iter()
                .all(|device| !steady(2).devices().contains(device))
        );
    }

    #[test]
    fn devices_take_turns_at_the_rate_of_the_fleet() {
        let due: Vec<_> = steady(3).pings(0).collect();
        assert_eq!(due.len(), 100);
        assert_eq!(due[10].due, Duration::from_secs(1));
        for device in 0..7 {
            let seqs: Vec<_> = due
                .iter()
                .filter(|due| due.device == device)
                .map(|due| due.ping.seq)
                .collect();
            assert!((14..=15).contains(&seqs.len()));
            assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_device_without_a_fix_stays_where_it_was() {
        let long = Steady {
            duration: Some(Duration::from_secs(1_000)),
            ..steady(4)
        };
        let one: Vec<_> = long
            .pings(0)
            .filter(|due| due.device == 0)
            .map(|due| due.ping)
            .collect();
        let repeats: Vec<_> = one.windows(2).filter(|pair| !pair[1].is_fix()).collect();
        assert!(!repeats.is_empty());
        assert!(
            repeats
                .iter()
                .all(|pair| pair[0].latitude_e7 == pair[1].latitude_e7)
        );
    }
}
