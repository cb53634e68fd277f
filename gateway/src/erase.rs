//! Erasure: from the moment at which a holder wanted it until nothing is left, and a receipt.
//!
//! The committer makes the fence: from one commit on nothing more is taken from any of the user's devices, and checkers
//! know the user as erased. The eraser does the rest on a thread of its own, since it takes as long as the disk needs:
//! it counts what there is, destroys the user's key, deletes the rows, has the files written anew in which they lay, and
//! looks for them once more. Each step
//! may be done twice, so one that a crash has interrupted is begun again at the next start. It also has the files written
//! anew in which events lay whose retention is over. A store that was put back from before an erasure is told of it by
//! [`replay`]. Knows who waits and for whom; the steps are in their own file, since [`command`] does them as well where no
//! gateway runs. Must not know sessions, or who may erase.
//!
//! # Bounds
//!
//! 256 erasures wait; further ones are put off before anything has changed. They are carried out one after
//! the other. Of each that has ever been, some 60 bytes of memory stay, for the receipt.

pub mod command;
pub mod replay;
mod steps;

use std::{fmt, io, sync::Arc, thread};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};
use waypost_proto::{id::UserId, v1};

use crate::{
    clock::Clock, grants::CheckerSet, metrics::Metrics, sharing::Transition, store::Store,
};

pub use self::steps::{EraseError, Steps};

/// Erasures that wait for the one that is under way.
const MOST_WAITING: usize = 256;

/// How far an erasure has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Erasure {
    /// The commit of the fence.
    pub position: u64,
    /// When that was, in milliseconds since 1970-01-01 UTC.
    pub fenced_ms: u64,
    /// What there was to remove, once it is counted.
    pub counts: Option<Counts>,
    /// When nothing was left.
    pub finished_ms: Option<u64>,
    /// The checkers that could be told of the user at the fence, and so may know that this was erased. Nobody else's
    /// business, so it is in no receipt.
    #[serde(skip)]
    pub told: CheckerSet,
}

/// What was held on a user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Records of devices.
    pub devices: u64,
    /// Pings.
    pub pings: u64,
    /// Events that checkers had been told.
    pub events: u64,
}

impl Erasure {
    /// One whose fence is this transition.
    #[must_use]
    pub fn begun_by(fence: &Transition) -> Self {
        Self {
            position: fence.position,
            fenced_ms: fence.at_ms,
            counts: None,
            finished_ms: None,
            told: fence.checkers,
        }
    }

    /// What the holder gets, once nothing is left.
    #[must_use]
    pub fn receipt(&self) -> Option<v1::Receipt> {
        let counts = self.counts.unwrap_or_default();
        Some(v1::Receipt {
            fenced_ms: self.fenced_ms,
            finished_ms: self.finished_ms?,
            position: self.position,
            devices: counts.devices,
            pings: counts.pings,
            events: counts.events,
        })
    }
}

/// As many erasures wait as there is room for. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MOST_WAITING} erasures wait already, and are carried out one after the other; try again later"
)]
pub struct NoPlace;

/// Tells when nothing is left of a user.
#[derive(Debug)]
pub struct Finished(oneshot::Receiver<()>);

impl Finished {
    /// Waits for it. False if it did not come to that: it failed or the gateway stops, and is begun again at the next
    /// start. It may be cancelled and called again.
    pub async fn wait(&mut self) -> bool {
        (&mut self.0).await.is_ok()
    }
}

/// Hands erasures to the eraser. When the last clone is gone, it ends after the step it is at.
#[derive(Clone, Debug)]
pub struct EraseHandle {
    jobs: mpsc::Sender<Job>,
}

/// Gives places as well, to whoever must not keep the eraser from ending.
#[derive(Clone, Debug)]
pub struct ErasePlaces(mpsc::WeakSender<Job>);

/// The eraser's end of the queue.
#[derive(Debug)]
pub struct EraseJobs {
    jobs: mpsc::Receiver<Job>,
}

/// A place among those that wait.
#[derive(Debug)]
pub struct Place(mpsc::OwnedPermit<Job>);

/// What is told when nothing is left. Dropped untold, it says by itself that nothing is known.
type Tell = Box<dyn FnOnce(v1::Receipt) + Send>;

enum Job {
    /// A user whose fence is durable, and who waits for the receipt.
    Erase {
        user: UserId,
        /// None for one that was begun before.
        begun: Option<Erasure>,
        tell: Tell,
    },
    /// Events were forgotten.
    Sweep,
}

/// Both ends of the queue.
#[must_use]
pub fn queue() -> (EraseHandle, EraseJobs) {
    let (sender, receiver) = mpsc::channel(MOST_WAITING);
    (EraseHandle { jobs: sender }, EraseJobs { jobs: receiver })
}

impl EraseHandle {
    /// Has the files written anew in which events lay that were forgotten. When it finds no place, an erasure that waits does
    /// the same.
    pub fn sweep(&self) {
        self.jobs.try_send(Job::Sweep).ok();
    }

    /// A place for one more, if there is room.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        self.jobs.clone().try_reserve_owned().ok().map(Place)
    }

    /// Whoever only takes places.
    #[must_use]
    pub fn places(&self) -> ErasePlaces {
        ErasePlaces(self.jobs.downgrade())
    }
}

impl ErasePlaces {
    /// A place for one more.
    ///
    /// # Errors
    /// When there is none, or the eraser ends.
    pub fn place(&self) -> Result<Place, NoPlace> {
        let jobs = self.0.upgrade().ok_or(NoPlace)?;
        jobs.try_reserve_owned().map(Place).map_err(|_| NoPlace)
    }
}

impl Place {
    /// Hands over a user whose fence is durable; `begun` is missing if it was handed over before. `tell` is called
    /// when nothing is left, which may be at once.
    pub fn erase(
        self,
        user: UserId,
        begun: Option<Erasure>,
        tell: impl FnOnce(v1::Receipt) + Send + 'static,
    ) {
        self.0.send(Job::Erase {
            user,
            begun,
            tell: Box::new(tell),
        });
    }

    /// The same for who only wants to know when nothing is left.
    #[must_use]
    pub fn erase_and_tell(self, user: UserId, begun: Option<Erasure>) -> Finished {
        let (finished, receiver) = oneshot::channel();
        self.erase(user, begun, move |_| {
            // Whoever waited may have gone.
            finished.send(()).ok();
        });
        Finished(receiver)
    }
}

/// The eraser before it runs.
#[derive(Debug)]
pub struct Eraser {
    jobs: mpsc::Receiver<Job>,
    steps: Steps,
    metrics: Metrics,
    /// All that have ever been begun.
    erasures: FxHashMap<UserId, Erasure>,
}

impl Eraser {
    /// `erasures` are those of the store. What is not finished is done first.
    #[must_use]
    pub fn new(
        jobs: EraseJobs,
        store: Arc<Store>,
        clock: Clock,
        metrics: Metrics,
        erasures: impl IntoIterator<Item = (UserId, Erasure)>,
    ) -> Self {
        Self {
            jobs: jobs.jobs,
            steps: Steps::new(store, clock),
            metrics,
            erasures: erasures.into_iter().collect(),
        }
    }

    /// Starts the thread. The receiver hears when it has ended.
    ///
    /// # Errors
    /// When the operating system gives none.
    pub fn spawn(mut self) -> io::Result<oneshot::Receiver<()>> {
        let (ended, receiver) = oneshot::channel();
        thread::Builder::new()
            .name("eraser".to_owned())
            .spawn(move || {
                self.serve();
                // Nothing of the store may be open when that is heard.
                drop(self);
                // Nobody listens only when the gateway is gone already.
                ended.send(()).ok();
            })?;
        Ok(receiver)
    }

    /// Finishes all that is begun, and says how many failed; of each the log says why.
    pub fn finish_begun(&mut self) -> usize {
        let begun = self.erasures.iter();
        let left: Vec<_> = begun
            .filter(|(_, erasure)| erasure.finished_ms.is_none())
            .map(|(&user, _)| user)
            .collect();
        let finished = left.iter().filter_map(|&user| self.finish(user));
        let finished = finished.count();
        left.len() - finished
    }

    fn serve(&mut self) {
        // Those that failed are begun again at the next start.
        self.finish_begun();
        while let Some(job) = self.jobs.blocking_recv() {
            let Job::Erase { user, begun, tell } = job else {
                if let Err(error) = self.steps.purge_events() {
                    warn!(%error, "the files in which forgotten events lay could not be written anew; it is tried again tomorrow");
                }
                continue;
            };
            if let Some(begun) = begun {
                self.erasures.insert(user, begun);
            }
            // One that failed is not told: the next start begins it again.
            if let Some(receipt) = self.finish(user) {
                tell(receipt);
            }
        }
    }

    /// Erases a user if that is not done yet.
    fn finish(&mut self, user: UserId) -> Option<v1::Receipt> {
        let mut erasure = *self.erasures.get(&user)?;
        if erasure.finished_ms.is_none() {
            let is_stopping = || self.jobs.is_closed();
            let erased = self.steps.carry_out(user, &mut erasure, is_stopping);
            // However far it has come: another attempt goes on with what was counted.
            self.erasures.insert(user, erasure);
            match erased {
                Ok(()) => self.metrics.erasures.finished.increment(1),
                Err(EraseError::Stopping) => return None,
                Err(error) => {
                    self.metrics.erasures.failed.increment(1);
                    error!(
                        %user, %error,
                        "not erased; nothing more is taken of this user, and it is begun again at the next start"
                    );
                    return None;
                }
            }
            let Counts {
                devices,
                pings,
                events,
            } = erasure.counts.unwrap_or_default();
            info!(%user, devices, pings, events, "erased, and nothing is left");
        }
        erasure.receipt()
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Erase { user, begun, .. } => f
                .debug_struct("Erase")
                .field("user", user)
                .field("begun", begun)
                .finish_non_exhaustive(),
            Self::Sweep => f.write_str("Sweep"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message;
    use waypost_proto::{batch, device::DeviceRecord, id::DeviceId, ping::Ping};

    use super::*;
    use crate::{
        bulletin::News,
        clock::system_now_ms,
        deadlines::{self, Checker, Event, Kind},
        grants::{CheckerNumber, Decisions},
        sharing::{Sharing, Turn},
        store::{Day, PingKey, StoreConfig, record},
    };

    pub(super) const ALICE: UserId = UserId([1; 16]);
    pub(super) const BOB: UserId = UserId([2; 16]);

    pub(super) fn open(folder: &Path) -> Arc<Store> {
        Arc::new(Store::open(folder, &StoreConfig::default(), system_now_ms()).unwrap())
    }

    fn turned(user: UserId, position: u64, to: Sharing) -> Transition {
        Transition {
            user,
            turn: Turn::Sharing(to),
            checkers: CheckerSet::ALL,
            at_ms: system_now_ms(),
            position,
            number: 0,
        }
    }

    /// Two users with two devices each, pings on two days, a pause, a call and a grant.
    pub(super) fn filled(folder: &Path) -> Arc<Store> {
        let store = open(folder);
        let today = Day::of_ms(system_now_ms());
        store.open_day(today.next()).unwrap();
        let mut batch = store.batch();
        for user in [ALICE, BOB] {
            for number in [1, 2] {
                let device = DeviceId {
                    user,
                    device: number,
                };
                let pings = [Ping::at(1, 5, 0, 0), Ping::at(2, 6, 0, 0)];
                let columns = batch::encode(1, &pings).encode_to_vec();
                let value = record::encode_pings(7, 1, &columns);
                let key = PingKey {
                    device,
                    epoch: 1,
                    first_seq: 1,
                };
                batch.put_pings(today, &key, &value);
                batch.put_pings(today.next(), &key, &value);
                batch.put_device(&device, &DeviceRecord::default());
            }
            let mut decisions = Decisions::default();
            let checker = CheckerNumber::new(3).unwrap();
            assert!(decisions.grant(checker, CheckerSet::default(), 2));
            batch.put_decisions(user, &decisions);
            batch.put_news(&News {
                deadlines: vec![deadlines::Change::Event(Event {
                    checker: Checker([7; 16]),
                    user,
                    kind: Kind::Late,
                    position: 3,
                    at_ms: 4,
                    last_contact_ms: 5,
                    due_ms: 6,
                })],
                ..News::default()
            });
        }
        batch.put_news(&News {
            transitions: vec![
                turned(ALICE, 4, Sharing::Paused),
                Transition {
                    number: 1,
                    ..turned(BOB, 4, Sharing::Paused)
                },
            ],
            ..News::default()
        });
        store.commit(batch).unwrap();
        store
    }

    pub(super) const EACH: Counts = Counts {
        devices: 2,
        pings: 8,
        events: 3,
    };

    pub(super) fn fence(store: &Store) {
        let mut batch = store.batch();
        batch.put_news(&News {
            transitions: vec![turned(ALICE, 5, Sharing::Erased)],
            ..News::default()
        });
        store.commit(batch).unwrap();
    }

    pub(super) fn eraser(store: &Arc<Store>) -> Eraser {
        let kept = store.load_holders().unwrap();
        let (_, jobs) = queue();
        Eraser::new(
            jobs,
            Arc::clone(store),
            Clock::starting_at(0),
            Metrics::new(),
            kept.erasures,
        )
    }

    /// A crash behind each step leaves it to the next start, which ends with the same receipt.
    #[test]
    fn an_erasure_comes_to_its_end_whichever_step_was_the_last_before_a_crash() {
        for steps in 0..=3 {
            let folder = tempfile::tempdir().unwrap();
            let store = filled(folder.path());
            fence(&store);
            let mut erasure = store.load_holders().unwrap().erasures[0].1;
            if 1 <= steps {
                erasure.counts = Some(EACH);
                eraser(&store).steps.note(ALICE, &erasure).unwrap();
            }
            if 2 <= steps {
                assert!(store.destroy_key(&ALICE, 7).unwrap());
            }
            if 3 <= steps {
                let events = store.events_of_user(ALICE).unwrap();
                let mut batch = store.batch();
                batch.delete_user(ALICE, &store.days(), &events);
                store.commit(batch).unwrap();
            }
            drop(store);
            let store = open(folder.path());
            // What is left of Alice is nothing to be served, whether it can be read or not, and everybody else is.
            let (devices, _) = store.load_devices().unwrap();
            assert!(devices.iter().all(|(device, _)| device.user == BOB));
            assert_eq!(devices.len() as u64, EACH.devices);
            // Nobody can want another, so it ends when it has done what was left; without a queue nothing is
            // finished, as in a gateway that stops.
            let mut stopping = eraser(&store);
            assert!(stopping.finish(ALICE).is_none());
            let (handle, jobs) = queue();
            let mut eraser = Eraser {
                jobs: jobs.jobs,
                ..stopping
            };
            let receipt = eraser.finish(ALICE).unwrap();
            drop(handle);
            assert_eq!(
                (receipt.devices, receipt.pings, receipt.events),
                (EACH.devices, EACH.pings, EACH.events),
                "after {steps} steps"
            );
            assert_eq!(receipt.position, 5);
            assert_eq!(eraser.steps.count(ALICE).unwrap(), Counts::default());
            assert_eq!(eraser.steps.count(BOB).unwrap(), EACH, "and nobody else");
            assert_eq!(eraser.finish(ALICE), Some(receipt), "once");
            assert!(!store.destroy_key(&ALICE, 7).unwrap(), "no key is left");
            assert!(store.destroy_key(&BOB, 7).unwrap());
            drop(eraser);
            drop(store);
            let kept = open(folder.path()).load_holders().unwrap();
            let alice = kept.erasures.iter().find(|(user, _)| *user == ALICE);
            let alice = alice.unwrap().1;
            assert_eq!(alice.receipt(), Some(receipt));
            assert_eq!(alice.told, CheckerSet::ALL, "who is told that it was");
        }
    }

    /// The control of the last look.
    #[test]
    fn what_was_not_deleted_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let store = filled(folder.path());
        let eraser = eraser(&store);
        let error = eraser.steps.find_nothing(ALICE).unwrap_err();
        assert!(
            matches!(error, EraseError::StillThere(left) if left == EACH),
            "{error}"
        );
        let events = store.events_of_user(ALICE).unwrap();
        let mut batch = store.batch();
        // One day is forgotten.
        batch.delete_user(ALICE, &store.days()[..1], &events);
        store.commit(batch).unwrap();
        let error = eraser.steps.find_nothing(ALICE).unwrap_err();
        let left = Counts {
            pings: 4,
            ..Counts::default()
        };
        assert!(
            matches!(error, EraseError::StillThere(found) if found == left),
            "{error}"
        );
    }

    #[test]
    fn more_erasures_than_can_wait_are_put_off() {
        let (handle, jobs) = queue();
        let places: Vec<_> = std::iter::from_fn(|| handle.place()).collect();
        assert_eq!(places.len(), MOST_WAITING);
        let others = handle.places();
        assert_eq!(others.place().err(), Some(NoPlace));
        drop(places);
        assert!(handle.place().is_some());
        drop(others.place().unwrap());
        drop(jobs);
        assert!(handle.place().is_none());
        drop(handle);
        assert_eq!(others.place().err(), Some(NoPlace), "it keeps nobody going");
    }
}
