//! The watch over the disk: whether it answers, and whether it has room.
//!
//! A disk that hangs takes every thread with it that touches it. So whoever looks at the store has a
//! thread of its own, the committer has another, and what is told is decided from what these two leave
//! behind, without touching the disk. Knows the store's figures, readiness and metrics. Must not know what
//! is written or who waits for it.

use std::{
    mem,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    sync::oneshot,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admin::Readiness,
    metrics::{DiskFigures, Metrics, StoreFigures},
    store::{Space, Store},
};

/// Since when somebody waits for the disk, for others to see. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Pulse {
    began: Arc<Mutex<Option<Instant>>>,
}

/// Somebody waits for the disk, until this is dropped.
#[derive(Debug)]
pub struct Waiting(Pulse);

impl Pulse {
    /// The wait begins.
    #[must_use]
    pub fn wait(&self) -> Waiting {
        *self.began.lock() = Some(Instant::now());
        Waiting(self.clone())
    }

    fn waited(&self, now: Instant) -> Duration {
        self.began
            .lock()
            .map_or(Duration::ZERO, |began| now.saturating_duration_since(began))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        *self.0.began.lock() = None;
    }
}

/// What keeps the gateway from storing pings, for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// The disk hangs. Nothing is acknowledged, and nothing is lost, until it goes on.
    #[error("the disk has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    /// New pings are put off, so that the disk does not fill up: a full disk would be final.
    #[error(
        "the disk is nearly full: {} MiB are free, and new pings are put off until {} MiB are; make room, or \
         lower store.free_space_floor_mib",
        .0.free_bytes >> 20, .0.enough_bytes().div_ceil(1 << 20)
    )]
    NearlyFull(Space),
}

/// Decides what to tell.
fn obstacle(waited: Duration, space: Space) -> Option<Obstacle> {
    if SILENT_AFTER <= waited {
        Some(Obstacle::Silent(waited))
    } else if space.is_short {
        Some(Obstacle::NearlyFull(space))
    } else {
        None
    }
}

/// The watch over one store's disk.
#[derive(Debug)]
pub struct DiskWatch {
    store: Arc<Store>,
    commits: Pulse,
    looks: Pulse,
    metrics: Metrics,
}

impl DiskWatch {
    /// Over a store whose committer has this pulse.
    #[must_use]
    pub fn new(store: Arc<Store>, commits: Pulse, metrics: Metrics) -> Self {
        Self {
            store,
            commits,
            looks: Pulse::default(),
            metrics,
        }
    }

    /// What is in the way now.
    #[must_use]
    pub fn obstacle(&self) -> Option<Obstacle> {
        obstacle(self.waited(), self.store.space())
    }

    /// Watches until cancelled, and tells `readiness`, the metrics and the log.
    pub async fn run(self, readiness: Readiness, cancel: CancellationToken) {
        let (stop, stopped) = mpsc::sync_channel(0);
        let (ended, looker_ended) = oneshot::channel();
        let looker = Looker {
            store: Arc::clone(&self.store),
            looks: self.looks.clone(),
            metrics: self.metrics.clone(),
            stopped,
            _ended: ended,
        };
        let spawned = thread::Builder::new()
            .name("disk watch".to_owned())
            .spawn(move || looker.run());
        if let Err(error) = spawned {
            error!(%error, "no thread for the watch over the disk");
            return;
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.tell(&readiness) => {}
        }
        drop(stop);
        // It holds the store. Whoever waits for this limits the wait: the disk may hang.
        drop(looker_ended.await);
    }

    async fn tell(&self, readiness: &Readiness) {
        let mut ticks = interval(TELL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = None;
        loop {
            ticks.tick().await;
            let (waited, space) = (self.waited(), self.store.space());
            let obstacle = obstacle(waited, space);
            self.metrics.disk(DiskFigures {
                free_bytes: space.free_bytes,
                floor_bytes: space.floor_bytes,
                is_refusing: space.is_short,
                waited,
            });
            if told.map(|told| mem::discriminant(&told))
                != obstacle.map(|obstacle| mem::discriminant(&obstacle))
            {
                match obstacle {
                    Some(silent @ Obstacle::Silent(_)) => {
                        self.metrics.commits.stalls.increment(1);
                        error!("{silent}; nothing is acknowledged until it does");
                    }
                    Some(nearly_full @ Obstacle::NearlyFull(_)) => warn!("{nearly_full}"),
                    None => info!("the disk answers and has room"),
                }
            }
            told = obstacle;
            readiness.hinder(obstacle.map(|obstacle| obstacle.to_string()));
        }
    }

    fn waited(&self) -> Duration {
        let now = Instant::now();
        self.commits.waited(now).max(self.looks.waited(now))
    }
}

/// Looks at the store about once a second.
struct Looker {
    store: Arc<Store>,
    looks: Pulse,
    metrics: Metrics,
    stopped: mpsc::Receiver<()>,
    /// Dropped last, when the store is no longer held.
    _ended: oneshot::Sender<()>,
}

impl Looker {
    fn run(self) {
        let (mut background_errors, mut is_blind) = (0, false);
        loop {
            let waiting = self.looks.wait();
            let looked = self.store.look_at_space();
            let statistics = self.store.statistics();
            drop(waiting);
            match looked {
                Ok(()) => is_blind = false,
                // What was seen last stands.
                Err(error) if !is_blind => {
                    is_blind = true;
                    warn!(%error, "the system does not say how much room the disk has");
                }
                Err(_) => {}
            }
            if background_errors < statistics.background_errors {
                background_errors = statistics.background_errors;
                error!(
                    background_errors,
                    "the store could not write table files; see the file LOG in its folder"
                );
            }
            self.metrics.store(StoreFigures {
                size_bytes: statistics.size_bytes,
                write_stopped: statistics.is_write_stopped,
                delayed_write_bytes_per_second: statistics.delayed_write_bytes_per_second,
                pending_compaction_bytes: statistics.pending_compaction_bytes,
                immutable_memtables: statistics.immutable_memtables,
                background_errors: statistics.background_errors,
                wal_syncs: statistics.wal_syncs,
                wal_sync_time: statistics.wal_sync_time,
            });
            if self.stopped.recv_timeout(LOOK_INTERVAL) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
        }
    }
}

/// After this long a commit is not slow but stuck: a healthy disk takes milliseconds, one in trouble
/// some hundred.
const SILENT_AFTER: Duration = Duration::from_secs(5);
/// How often the store is looked at. A gateway writes some 100 MB in that time at the most, well below
/// the floor.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often what was seen is told.
const TELL_INTERVAL: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn space(free_bytes: u64, is_short: bool) -> Space {
        Space {
            free_bytes,
            floor_bytes: 80 * MIB,
            is_short,
        }
    }

    #[test]
    fn a_disk_that_answers_and_has_room_is_in_nobodys_way() {
        let almost = SILENT_AFTER - Duration::from_millis(1);
        assert_eq!(obstacle(almost, space(200 * MIB, false)), None);
    }

    #[test]
    fn a_silent_disk_is_told_with_its_time_and_before_a_full_one() {
        let waited = Duration::from_millis(7_900);
        let told = obstacle(waited, space(0, true)).unwrap();
        assert_eq!(told, Obstacle::Silent(waited));
        assert_eq!(told.to_string(), "the disk has not answered for 7 s");
    }

    #[test]
    fn a_nearly_full_disk_is_told_with_what_it_needs() {
        let told = obstacle(Duration::ZERO, space(12 * MIB, true)).unwrap();
        assert_eq!(
            told.to_string(),
            "the disk is nearly full: 12 MiB are free, and new pings are put off until 90 MiB are; make room, \
             or lower store.free_space_floor_mib"
        );
    }

    #[test]
    fn a_wait_is_seen_until_it_ends_also_by_a_panic() {
        let pulse = Pulse::default();
        let seen = pulse.clone();
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(seen.waited(later), Duration::ZERO);
        let waiting = pulse.wait();
        assert!(Duration::from_secs(50) < seen.waited(later));
        drop(waiting);
        assert_eq!(seen.waited(later), Duration::ZERO);
        let ended = thread::spawn(move || {
            let _waiting = pulse.wait();
            panic!("a commit may");
        });
        assert!(ended.join().is_err());
        assert_eq!(seen.waited(later), Duration::ZERO);
    }
}
