//! What one device may do over time, however often it connects anew.
//!
//! Knows devices and rates. Must not know what a connection or a frame is, nor decide what happens to a
//! device that is over: its session does.
//!
//! # Bounds
//!
//! One entry, about 100 bytes, for each device that is connected or has used up a part of its allowance and
//! not got it back; as many as [`Allowances::new`] is told. When all are taken, a device that has no entry
//! is turned away until one is free: it takes as many devices with certificates of their own, all of
//! them over or connected.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use waypost_proto::id::DeviceId;

use crate::rate::{Bucket, Rate};

/// How much a device may do. 0 is no limit.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct AllowanceConfig {
    /// How many connections a minute a device may begin; more are closed with OVERLOADED. A phone on a train
    /// that loses its network needs a few.
    pub connections_per_minute: u32,
    /// How many at once after a pause.
    pub connections_burst: u32,
    /// How many frames a second a device may send, streams that it opens counted; beyond that it is read
    /// more slowly, and its batches are put off with RATE_LIMITED. An ordinary device sends one every
    /// few seconds; one at this rate costs about a hundredth of a core.
    pub frames_per_s: u32,
    /// How many at once after a pause.
    pub frames_burst: u32,
    /// How many pings a second a device may send; beyond that its batches are put off with RATE_LIMITED. A
    /// backlog of a week with a ping every second flows in two minutes.
    pub pings_per_s: u32,
    /// How many at once after a pause: most of a day with a ping every second.
    pub pings_burst: u32,
}

impl Default for AllowanceConfig {
    fn default() -> Self {
        Self {
            connections_per_minute: 60,
            connections_burst: 60,
            frames_per_s: 500,
            frames_burst: 5_000,
            pings_per_s: 5_000,
            pings_burst: 50_000,
        }
    }
}

/// The rates of a configuration.
#[derive(Clone, Copy, Debug)]
struct Rates {
    connections: Rate,
    frames: Rate,
    pings: Rate,
}

/// What is left of a device's allowance.
#[derive(Clone, Copy, Debug, Default)]
struct Left {
    connections: Bucket,
    frames: Bucket,
    pings: Bucket,
}

impl Left {
    fn is_full(&self, now: Instant) -> bool {
        [self.connections, self.frames, self.pings]
            .iter()
            .all(|bucket| bucket.is_full(now))
    }
}

/// One device's, shared by its connections: an older one that has not ended yet spends from it as well.
#[derive(Clone, Debug)]
pub struct Allowance {
    rates: Rates,
    left: Arc<Mutex<Left>>,
}

impl Allowance {
    /// Takes as many pings out.
    ///
    /// # Errors
    /// When there are not as many; the time after which there may be.
    pub fn take_pings(&self, pings: u32, now: Instant) -> Result<(), Duration> {
        self.left.lock().pings.take(&self.rates.pings, pings, now)
    }

    /// Counts a frame that has been read, or a stream that was opened. Returns for how long nothing more
    /// should be read, zero while the device keeps to its rate.
    pub fn charge_frame(&self, now: Instant) -> Duration {
        self.left.lock().frames.charge(&self.rates.frames, 1, now)
    }
}

/// Why a device may not begin a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMany {
    /// It begins too many.
    #[error("the device begins too many connections; come back in {} s", .0.as_secs() + 1)]
    Connections(Duration),
    /// The gateway keeps watch on as many devices as it can.
    #[error("the gateway keeps watch on as many devices as it can; come back later")]
    Devices,
}

/// The allowances of all devices.
#[derive(Debug)]
pub struct Allowances {
    rates: Rates,
    most: usize,
    left: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    left: FxHashMap<DeviceId, Arc<Mutex<Left>>>,
    swept_at: Option<Instant>,
}

impl All {
    /// Forgets those that have all of their allowance again and are not here; at most once a second, for
    /// it looks at every one.
    fn sweep(&mut self, now: Instant) {
        let is_swept = self
            .swept_at
            .is_some_and(|at| now.saturating_duration_since(at) < SECOND);
        if !is_swept {
            self.swept_at = Some(now);
            self.left
                .retain(|_, left| is_in_use(left) || !left.lock().is_full(now));
        }
    }
}

impl Allowances {
    /// Nobody has used anything. At most `most` devices are remembered.
    #[must_use]
    pub fn new(config: &AllowanceConfig, most: usize) -> Self {
        let rates = Rates {
            connections: Rate::new(
                config.connections_per_minute,
                Duration::from_secs(60),
                config.connections_burst,
            ),
            frames: Rate::new(config.frames_per_s, SECOND, config.frames_burst),
            pings: Rate::new(config.pings_per_s, SECOND, config.pings_burst),
        };
        Self {
            rates,
            most,
            left: Mutex::default(),
        }
    }

    /// Begins a connection; [`Self::leave`] ends it.
    ///
    /// # Errors
    /// When the device may not begin one.
    pub fn enter(&self, device: DeviceId, now: Instant) -> Result<Allowance, TooMany> {
        let mut all = self.left.lock();
        if self.most <= all.left.len() && !all.left.contains_key(&device) {
            all.sweep(now);
            if self.most <= all.left.len() {
                return Err(TooMany::Devices);
            }
        }
        let left = Arc::clone(all.left.entry(device).or_default());
        drop(all);
        let taken = left
            .lock()
            .connections
            .take(&self.rates.connections, 1, now);
        taken.map_err(TooMany::Connections)?;
        Ok(Allowance {
            rates: self.rates,
            left,
        })
    }

    /// Ends a connection. What the device has used up stays used up.
    pub fn leave(&self, device: DeviceId, allowance: Allowance, now: Instant) {
        // Under the lock, so that of two connections that end at once the second finds itself the last.
        let mut all = self.left.lock();
        drop(allowance);
        if let Some(left) = all.left.get(&device)
            && !is_in_use(left)
            && left.lock().is_full(now)
        {
            all.left.remove(&device);
        }
    }

    /// How many devices are remembered.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.left.lock().left.len()
    }
}

/// Whether a connection holds it.
fn is_in_use(left: &Arc<Mutex<Left>>) -> bool {
    1 < Arc::strong_count(left)
}

const SECOND: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use waypost_proto::id::UserId;

    use super::*;

    fn device(device: u32) -> DeviceId {
        DeviceId {
            user: UserId([7; 16]),
            device,
        }
    }

    fn allowances(most: usize) -> Allowances {
        let config = AllowanceConfig {
            connections_per_minute: 60,
            connections_burst: 3,
            frames_per_s: 10,
            frames_burst: 5,
            pings_per_s: 100,
            pings_burst: 1_000,
        };
        Allowances::new(&config, most)
    }

    #[test]
    fn what_was_used_up_stays_used_up_over_a_new_connection() {
        let all = allowances(10);
        let now = Instant::now();
        let first = all.enter(device(1), now).unwrap();
        assert_eq!(first.take_pings(1_000, now), Ok(()));
        for _ in 0..5 {
            assert_eq!(first.charge_frame(now), Duration::ZERO);
        }
        all.leave(device(1), first, now);

        let second = all.enter(device(1), now).unwrap();
        assert_eq!(second.take_pings(1, now), Err(SECOND / 100));
        assert_eq!(second.charge_frame(now), SECOND / 10);
        let other = all.enter(device(2), now).unwrap();
        assert_eq!(
            other.take_pings(1, now),
            Ok(()),
            "another device has its own"
        );
    }

    #[test]
    fn two_connections_at_once_share_one_allowance() {
        let all = allowances(10);
        let now = Instant::now();
        let older = all.enter(device(1), now).unwrap();
        let newer = all.enter(device(1), now).unwrap();
        assert_eq!(older.take_pings(1_000, now), Ok(()));
        assert!(newer.take_pings(1, now).is_err());
        all.leave(device(1), older, now);
        assert!(newer.take_pings(1, now).is_err());
    }

    #[test]
    fn a_device_that_begins_connection_after_connection_is_turned_away_for_a_while() {
        let all = allowances(10);
        let now = Instant::now();
        for _ in 0..3 {
            let allowance = all.enter(device(1), now).unwrap();
            all.leave(device(1), allowance, now);
        }
        assert_eq!(
            all.enter(device(1), now).unwrap_err(),
            TooMany::Connections(SECOND)
        );
        assert!(all.enter(device(2), now).is_ok());
        assert!(all.enter(device(1), now + SECOND).is_ok());
    }

    #[test]
    fn a_device_that_is_gone_and_has_used_up_nothing_is_forgotten() {
        let all = allowances(10);
        let now = Instant::now();
        let allowance = all.enter(device(1), now).unwrap();
        all.leave(device(1), allowance, now + SECOND);
        assert_eq!(all.devices(), 0);
    }

    #[test]
    fn there_is_a_most_of_devices_and_places_come_free_with_time() {
        let all = allowances(2);
        let now = Instant::now();
        let connected = all.enter(device(1), now).unwrap();
        let gone = all.enter(device(2), now).unwrap();
        all.leave(device(2), gone, now);
        assert_eq!(all.enter(device(3), now).unwrap_err(), TooMany::Devices);
        assert!(
            all.enter(device(1), now).is_ok(),
            "one that is known may come"
        );
        let later = now + 10 * SECOND;
        assert!(all.enter(device(3), later).is_ok());
        assert_eq!(all.devices(), 2);
        assert_eq!(
            connected.take_pings(1_000, later),
            Ok(()),
            "a connected one is kept, full or not"
        );
        assert!(
            all.enter(device(1), later)
                .unwrap()
                .take_pings(1, later)
                .is_err()
        );
    }
}
