//! The committer: the one owner of dedup state and of writes.
//!
//! It takes what is queued up to a limit, judges it, commits it with one fsync, publishes it, and only
//! then answers. There is no linger timer: the next group is what queued up during the last fsync.
//! Knows device records and order; must not know connections or RocksDB.
//!
//! # Bounds
//!
//! Each lane has a queue of [`CommitConfig::queue_requests`]. When one is full its sessions wait for a
//! place and read nothing more, so that QUIC flow control holds the devices back. The map of device
//! records holds one record per device that the certificate authority has admitted.

use std::{collections::hash_map::Entry, num::NonZeroUsize, sync::Arc, thread, time::Duration};

use parking_lot::Mutex;
use prost::Message;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tracing::{error, info};
use waypost_proto::{
    batch,
    device::{Admission, Deferral, DeviceRecord, LastStored, Policy},
    id::{DeviceId, UserId},
    ping::{Ping, RejectCode},
    session::{Lane, Request, Settled, Welcomed, batch_len},
};

use crate::{
    clock::Clock,
    disk::Pulse,
    freshness::Freshness,
    metrics::{Fates, Metrics},
    store::{Batch, CommitError, Day, PingKey, Store, record},
};

/// Settings of the committer and of what it admits.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct CommitConfig {
    /// How many requests may wait per lane. Each holds at most one batch; a full queue holds the
    /// sessions back.
    pub queue_requests: NonZeroUsize,
    /// How many pings one commit may hold, so that no ack waits behind an unbounded write.
    pub group_pings: NonZeroUsize,
    /// How far a device's clock may be ahead before its pings are refused with TIME_IN_FUTURE.
    #[serde(with = "humantime_serde")]
    pub future_tolerance: Duration,
    /// Thinning: at least this much device time between two stored pings of a device; 0s is off.
    #[serde(with = "humantime_serde")]
    pub least_interval: Duration,
    /// Thinning: at least this many metres between two stored pings of a device; 0 is off.
    pub least_distance_m: u32,
}

impl Default for CommitConfig {
    fn default() -> Self {
        const fn number(number: usize) -> NonZeroUsize {
            NonZeroUsize::new(number).expect("not zero")
        }
        Self {
            queue_requests: const { number(4_096) },
            group_pings: const { number(65_536) },
            future_tolerance: Duration::from_secs(300),
            least_interval: Duration::ZERO,
            least_distance_m: 0,
        }
    }
}

impl CommitConfig {
    fn policy(&self, retention: Duration) -> Policy {
        let milliseconds =
            |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Policy {
            retention_ms: milliseconds(retention),
            future_tolerance_ms: milliseconds(self.future_tolerance),
            least_interval_ms: milliseconds(self.least_interval),
            least_distance_m: f64::from(self.least_distance_m),
        }
    }
}

/// What a session gets back.
#[derive(Debug)]
pub enum Answer {
    /// To a Hello.
    Welcomed(Welcomed),
    /// To a batch or a heartbeat.
    Settled(Settled),
    /// The batch was of an epoch that ended while it waited.
    Fenced,
    /// It is not known whether the request is on disk: the committer stopped. The device keeps what it
    /// has and sends it again.
    Lost,
}

/// Where the answers for one session collect. Bounded by what the session may have in flight.
#[derive(Debug, Default)]
pub struct Mailbox {
    answers: Mutex<Vec<(Lane, Answer)>>,
    arrived: Notify,
}

impl Mailbox {
    /// Waits until there is something, and takes all of it, in the order it was asked.
    pub async fn take(&self) -> Vec<(Lane, Answer)> {
        loop {
            let answers = std::mem::take(&mut *self.answers.lock());
            if !answers.is_empty() {
                return answers;
            }
            self.arrived.notified().await;
        }
    }
}

/// The right to answer one request. Dropped without an answer, it answers [`Answer::Lost`], so that no
/// session waits for ever whatever becomes of the committer.
#[derive(Debug)]
struct Reply {
    mailbox: Arc<Mailbox>,
    lane: Lane,
    is_answered: bool,
}

impl Reply {
    fn answer(mut self, answer: Answer) {
        self.post(answer);
    }

    fn post(&mut self, answer: Answer) {
        self.is_answered = true;
        self.mailbox.answers.lock().push((self.lane, answer));
        self.mailbox.arrived.notify_one();
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_answered {
            self.post(Answer::Lost);
        }
    }
}

#[derive(Debug)]
struct Submission {
    device: DeviceId,
    receive_ms: u64,
    request: Request,
    /// A batch is to be put off, whatever is in it.
    deferral: Option<Deferral>,
    reply: Reply,
}

/// Hands requests to the committer. When the last clone is gone, the committer finishes what is queued
/// and stops.
#[derive(Clone, Debug)]
pub struct CommitHandle {
    live: mpsc::Sender<Submission>,
    backfill: mpsc::Sender<Submission>,
    clock: Clock,
}

/// The committer has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the committer has stopped")]
pub struct Stopped;

impl CommitHandle {
    /// Queues a request and returns its receive time; waits while the lane's queue is full. The receive
    /// time is taken once there is a place, so that nothing older can be queued behind it.
    ///
    /// # Errors
    /// When the committer has stopped. The mailbox gets nothing then.
    pub async fn submit(
        &self,
        device: DeviceId,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<(), Stopped> {
        // Hello is small, and nothing on either lane can start before it is answered.
        let queue = match (lane, &request) {
            (Lane::Live, _) | (_, Request::Hello(_)) => &self.live,
            (Lane::Backfill, _) => &self.backfill,
        };
        let place = queue.reserve().await.map_err(|_| Stopped)?;
        let receive_ms = self.clock.now_ms();
        let reply = Reply {
            mailbox: Arc::clone(mailbox),
            lane,
            is_answered: false,
        };
        place.send(Submission {
            device,
            receive_ms,
            request,
            deferral,
            reply,
        });
        Ok(())
    }

    /// How many requests wait, per lane.
    #[must_use]
    pub fn depth(&self, lane: Lane) -> usize {
        let queue = match lane {
            Lane::Live => &self.live,
            Lane::Backfill => &self.backfill,
        };
        queue.max_capacity() - queue.capacity()
    }
}

/// The committer before it runs: all state, no thread.
#[derive(Debug)]
pub struct Committer {
    live: mpsc::Receiver<Submission>,
    backfill: mpsc::Receiver<Submission>,
    group_pings: usize,
    policy: Policy,
    store: Arc<Store>,
    freshness: Arc<Freshness>,
    metrics: Metrics,
    clock: Clock,
    devices: FxHashMap<DeviceId, DeviceRecord>,
    /// What the thinning rule compares with; empty while the rule is off. Not kept on disk: after a
    /// restart one ping more is stored per device, and no coordinate lies in a device row.
    last_stored: FxHashMap<DeviceId, LastStored>,
    position: u64,
    resolved_ms: u64,
    day: Option<Day>,
    pulse: Pulse,
}

/// What the committer starts from.
#[derive(Debug)]
pub struct CommitParts {
    /// Where it writes.
    pub store: Arc<Store>,
    /// Where it publishes.
    pub freshness: Arc<Freshness>,
    /// What it counts with.
    pub metrics: Metrics,
    /// The gateway's clock, already past everything the store remembers.
    pub clock: Clock,
    /// All device records of the store.
    pub devices: FxHashMap<DeviceId, DeviceRecord>,
    /// The last position that the store holds.
    pub position: u64,
    /// How long pings are kept.
    pub retention: Duration,
}

impl Committer {
    /// A committer and the handle to its queues.
    #[must_use]
    pub fn new(config: &CommitConfig, parts: CommitParts) -> (CommitHandle, Self) {
        let (live_sender, live) = mpsc::channel(config.queue_requests.get());
        let (backfill_sender, backfill) = mpsc::channel(config.queue_requests.get());
        let handle = CommitHandle {
            live: live_sender,
            backfill: backfill_sender,
            clock: parts.clock.clone(),
        };
        let resolved_ms = parts.clock.now_ms().saturating_sub(1);
        let committer = Self {
            live,
            backfill,
            group_pings: config.group_pings.get(),
            policy: config.policy(parts.retention),
            store: parts.store,
            freshness: parts.freshness,
            metrics: parts.metrics,
            clock: parts.clock,
            devices: parts.devices,
            last_stored: FxHashMap::default(),
            position: parts.position,
            resolved_ms,
            day: None,
            pulse: Pulse::default(),
        };
        (handle, committer)
    }

    /// Tells since when a commit waits for the disk.
    #[must_use]
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Starts the committer's own thread: a commit blocks on the disk, and nothing else may wait for it.
    /// The receiver gets how it ended.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn spawn(self) -> std::io::Result<tokio::sync::oneshot::Receiver<Result<(), CommitError>>> {
        let (ended, receiver) = tokio::sync::oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || {
                let result = runtime.block_on(self.run());
                // Nobody listens only when the gateway is gone already.
                drop(ended.send(result));
            })?;
        Ok(receiver)
    }

    /// Commits until every handle is gone and the queues are empty, or until a commit fails.
    ///
    /// # Errors
    /// When a commit failed. That is final: what was queued is answered [`Answer::Lost`].
    pub async fn run(mut self) -> Result<(), CommitError> {
        self.rotate(self.clock.now_ms())?;
        let mut group = Vec::new();
        loop {
            let first = tokio::select! {
                biased;
                Some(submission) = self.live.recv() => Some((Lane::Live, submission)),
                Some(submission) = self.backfill.recv() => Some((Lane::Backfill, submission)),
                () = tokio::time::sleep(IDLE_RESOLVE_INTERVAL),
                    if !(self.live.is_closed() && self.backfill.is_closed()) => None,
                else => return Ok(()),
            };
            // Read before the queues are drained: whatever is queued after this moment is received
            // after it.
            let drain_ms = self.clock.now_ms();
            let resolved_ms = self.gather(first, drain_ms, &mut group);
            let _waiting = self.pulse.wait();
            if group.is_empty() {
                self.rotate(drain_ms)?;
                self.resolved_ms = resolved_ms;
                self.freshness.resolve(resolved_ms);
            } else {
                self.commit(&mut group, resolved_ms)?;
            }
        }
    }

    /// Drains the queues into `group`, LIVE first, and returns up to when all that was received is in
    /// this group or an earlier one.
    fn gather(
        &mut self,
        first: Option<(Lane, Submission)>,
        drain_ms: u64,
        group: &mut Vec<Submission>,
    ) -> u64 {
        let mut pings = 0;
        // Each queue is in the order of receipt: what is left in it is no older than what was taken.
        let mut taken_upto_ms = [self.resolved_ms; 2];
        if let Some((lane, first)) = first {
            pings += request_len(&first.request);
            taken_upto_ms[lane as usize] = first.receive_ms;
            group.push(first);
        }
        // BACKFILL keeps an eighth of every group, so that it goes on under any load of LIVE.
        let bounds = [self.group_pings - self.group_pings / 8, self.group_pings];
        // More may be received within the millisecond of the drain, and of the last request taken.
        let mut resolved_ms = drain_ms.saturating_sub(1);
        for ((queue, bound), upto_ms) in [&mut self.live, &mut self.backfill]
            .into_iter()
            .zip(bounds)
            .zip(&mut taken_upto_ms)
        {
            while pings < bound {
                let Ok(submission) = queue.try_recv() else {
                    break;
                };
                pings += request_len(&submission.request);
                *upto_ms = submission.receive_ms;
                group.push(submission);
            }
            if !queue.is_empty() {
                resolved_ms = resolved_ms.min(upto_ms.saturating_sub(1));
            }
        }
        self.resolved_ms.max(resolved_ms)
    }

    /// Durable, then visible, then acknowledged.
    fn commit(&mut self, group: &mut Vec<Submission>, resolved_ms: u64) -> Result<(), CommitError> {
        let commit_ms = self.clock.now_ms();
        self.rotate(commit_ms)?;
        let position = self.position + 1;
        let mut judged = Judged::new(self.store.batch());
        let put_off = self.store.space().is_short.then_some(NO_ROOM);
        for mut submission in group.drain(..) {
            // What was stored before is answered as ever, and the device is heard: its record takes the
            // same few bytes each time.
            submission.deferral = put_off.or(submission.deferral);
            self.judge(submission, position, commit_ms, &mut judged);
        }
        for &device in &judged.touched {
            let Entry::Occupied(record) = self.devices.entry(device) else {
                continue;
            };
            judged.batch.put_device(&device, record.get());
            judged.changes.push((device.user, record.get().clocks));
        }

        let bytes = judged.batch.size_bytes();
        let started = std::time::Instant::now();
        self.store.commit(judged.batch)?;
        self.metrics.commits.duration.record(started.elapsed());
        self.position = position;

        self.resolved_ms = resolved_ms;
        self.freshness
            .publish(position, resolved_ms, &judged.changes);

        self.metrics.settled(&judged.fates);
        let commits = &self.metrics.commits;
        commits.given_up.increment(judged.gaps);
        commits.size_pings.record(judged.fates.accepted as f64);
        commits.size_bytes.record(bytes as f64);
        commits.size_batches.record(judged.answers.len() as f64);
        commits.known_devices.set(self.devices.len() as f64);
        commits.position.set(position as f64);
        commits.commits.increment(1);
        for (reply, answer) in judged.answers {
            reply.answer(answer);
        }
        Ok(())
    }

    /// Applies one request to its device's record and to the write batch.
    fn judge(
        &mut self,
        submission: Submission,
        position: u64,
        commit_ms: u64,
        judged: &mut Judged,
    ) {
        let Submission {
            device,
            receive_ms,
            request,
            deferral,
            reply,
        } = submission;
        // A request that was stamped just before an announcement and queued just after it was heard,
        // as far as anybody can know, right after the announced moment.
        let receive_ms = receive_ms.max(self.resolved_ms + 1);
        let record = self.devices.entry(device).or_default();
        record.contact(receive_ms);
        record.clocks.durable_ms = record.clocks.durable_ms.max(commit_ms);
        if record.position != position {
            record.position = position;
            judged.touched.push(device);
        }
        let answer = match request {
            Request::Hello(claim) => {
                let gaps_before = record.gaps;
                let admission = record.admit(claim);
                judged.gaps = judged.gaps.saturating_add(record.gaps - gaps_before);
                if admission == Admission::LostAcknowledged {
                    error!(
                        %device,
                        epoch = record.epoch,
                        "this device was acknowledged more than the store remembers: data was lost; \
                         it sends what it still has under a new epoch"
                    );
                }
                self.metrics
                    .sessions
                    .hellos
                    .of(admission.as_label())
                    .increment(1);
                Answer::Welcomed(Welcomed {
                    admission,
                    epoch: record.epoch,
                    settled: record.settled.clone(),
                    receive_ms,
                    position,
                })
            }
            Request::Batch { batch, .. } if batch.epoch != record.epoch => Answer::Fenced,
            Request::Batch { batch, columns } => {
                let mut last_stored = self.last_stored.get(&device).copied();
                let pings = batch_len(&batch);
                let judgement = match deferral {
                    Some(deferral) => record.defer(&batch.pings, &batch.malformed, deferral.code),
                    None => record.judge(
                        &batch.pings,
                        &batch.malformed,
                        receive_ms,
                        &self.policy,
                        &mut last_stored,
                    ),
                };
                if let Some(last_stored) = last_stored.filter(|_| self.policy.thins()) {
                    self.last_stored.insert(device, last_stored);
                }
                if let Some(&first) = judgement.stored.first() {
                    let key = PingKey {
                        device,
                        epoch: batch.epoch,
                        first_seq: batch.pings[first].seq,
                    };
                    let is_whole = judgement.stored.len() == pings as usize;
                    let columns = if is_whole {
                        columns
                    } else {
                        let stored: Vec<Ping> =
                            judgement.stored.iter().map(|&at| batch.pings[at]).collect();
                        batch::encode(batch.epoch, &stored).encode_to_vec()
                    };
                    let value = record::encode_pings(receive_ms, position, &columns);
                    judged.batch.put_pings(Day::of_ms(commit_ms), &key, &value);
                }
                let accepted = judgement.stored.len() as u64;
                judged.fates.accepted += accepted;
                judged.fates.duplicate += judgement.duplicate;
                judged.fates.filtered += judgement.filtered;
                for (_, code) in &judgement.rejects {
                    judged.fates.reject(*code, 1);
                }
                Answer::Settled(Settled {
                    epoch: record.epoch,
                    pings,
                    accepted,
                    duplicate: judgement.duplicate,
                    filtered: judgement.filtered,
                    rejects: judgement.rejects,
                    settled: record.settled.clone(),
                    receive_ms,
                    commit_ms,
                    position,
                    retry_after_ms: deferral.map_or(0, |deferral| deferral.retry_after_ms),
                })
            }
            Request::Heartbeat => Answer::Settled(Settled {
                epoch: record.epoch,
                pings: 0,
                accepted: 0,
                duplicate: 0,
                filtered: 0,
                rejects: Vec::new(),
                settled: record.settled.clone(),
                receive_ms,
                commit_ms,
                position,
                retry_after_ms: 0,
            }),
        };
        judged.answers.push((reply, answer));
    }

    /// Opens the day's column family when the day changes, and drops the days that retention is over
    /// for.
    fn rotate(&mut self, now_ms: u64) -> Result<(), CommitError> {
        let day = Day::of_ms(now_ms);
        if self.day == Some(day) {
            return Ok(());
        }
        self.store.open_day(day)?;
        self.day = Some(day);
        let oldest = Day::of_ms(now_ms.saturating_sub(self.policy.retention_ms));
        let dropped = self.store.drop_days_before(oldest)?;
        if dropped > 0 {
            info!(days = dropped, "dropped days whose retention is over");
        }
        Ok(())
    }
}

/// One group on its way to disk.
#[derive(Debug)]
struct Judged {
    batch: Batch,
    /// Devices whose record changed, each once.
    touched: Vec<DeviceId>,
    changes: Vec<(UserId, waypost_proto::device::Clocks)>,
    answers: Vec<(Reply, Answer)>,
    fates: Fates,
    gaps: u64,
}

impl Judged {
    fn new(batch: Batch) -> Self {
        Self {
            batch,
            touched: Vec::new(),
            changes: Vec::new(),
            answers: Vec::new(),
            fates: Fates::default(),
            gaps: 0,
        }
    }
}

fn request_len(request: &Request) -> usize {
    match request {
        Request::Hello(_) | Request::Heartbeat => 1,
        Request::Batch { batch, .. } => batch_len(batch) as usize,
    }
}

/// New pings while the disk is nearly full. 30 s: whoever makes room is a person or a nightly job, and a
/// device that asks more often only wastes its battery.
const NO_ROOM: Deferral = Deferral {
    code: RejectCode::Overloaded,
    retry_after_ms: 30_000,
};

/// How often an idle committer says that nothing is left behind, well below the second that the
/// freshness contract allows.
const IDLE_RESOLVE_INTERVAL: Duration = Duration::from_millis(200);
