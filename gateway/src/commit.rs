//! The committer: the one owner of dedup state and of writes.
//!
//! It takes what sessions have handed over, up to a limit, judges it, commits it with one fsync,
//! publishes it, and only then answers. The next group is what queued up during the last fsync. Only when
//! that was everything and there is a crowd, it lets requests gather for a moment: see [`crate::gather`].
//! Between groups it writes what the [`Vigil`] has to say, and what is ordered (`orders`).
//! Knows device records, who has paused or is revoked, what holders decide of checkers, and order; must not know
//! connections, queues or RocksDB.
//!
//! # Bounds
//!
//! The map of device records holds one record per device that the certificate authority has admitted, and
//! [`Holders`] a few bytes for each user who has paused or erased everything. Those of [`Invitations`] are bounded there.
//! What waits for a commit is bounded by [`crate::handoff`].

mod orders;

use std::{
    collections::hash_map::Entry,
    future,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prost::Message;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};
use waypost_proto::{
    batch::{self, DecodedBatch},
    device::{Admission, Claim, Deferral, DeviceRecord, Judgement, LastStored, Policy},
    id::{DeviceId, UserId},
    ping::{Ping, RejectCode},
    ranges::RangeSet,
    session::{CheckerWish, Grant, Granted, Request, Settled, Welcomed, Wish, batch_len},
};

use crate::{
    audit::{
        Audit,
        chain::{Deed, What, Who, Whose},
    },
    bulletin::News,
    clock::Clock,
    deadlines::{Checker, Contact, Said, Standing},
    disk::Pulse,
    enrol::invitations::Invitations,
    erase::{EraseHandle, Erasure, Place},
    freshness::Freshness,
    gather::GatherRequests,
    grants::{CheckerSet, Checkers, Decisions},
    handoff::{self, Reply, Requests, Rings, Submission},
    lookout::Look,
    metrics::{Fates, Metrics},
    orders::Orders,
    rate::{Bucket, Rate},
    revocation::Revocations,
    sharing::{Holders, Sharing, Transition, Turn},
    store::{Batch, CommitError, Day, PingKey, Retention, Store, record},
    vigil::Vigil,
};

pub use crate::handoff::{Answer, Bell, CommitHandle, Mail, Mailbox, NotQueued, Stopped};

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

/// The committer before it runs: all state, no thread.
#[derive(Debug)]
pub struct Committer {
    requests: Requests,
    policy: Policy,
    store: Arc<Store>,
    freshness: Arc<Freshness>,
    metrics: Metrics,
    clock: Clock,
    devices: FxHashMap<DeviceId, DeviceRecord>,
    holders: Holders,
    checkers: Arc<Checkers>,
    revocations: Arc<Revocations>,
    /// What the thinning rule compares with; empty while neither the operator nor a holder thins. Not kept on disk: after a
    /// restart one ping more is stored per device, and no coordinate lies in a device row.
    last_stored: FxHashMap<DeviceId, LastStored>,
    position: u64,
    day: Option<Day>,
    retention: Retention,
    /// When the next day has to go, in milliseconds since 1970-01-01 UTC.
    drop_ms: u64,
    pulse: Pulse,
    /// Requests that were taken since the committer has last had nothing to do.
    taken: Arc<AtomicUsize>,
    /// What may still be logged of losses.
    losses_said: Bucket,
    vigil: Vigil,
    invitations: Invitations,
    orders: Orders,
    erase: EraseHandle,
    audit: Audit,
    turned_away: Arc<AtomicU64>,
    /// For how long commits have waited for the disk since the last look.
    disk_wait: Duration,
    /// The last moment that was announced, or is about to be.
    resolved_ms: u64,
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
    /// Who does not share.
    pub holders: Holders,
    /// The store's checkers, whom holders grant.
    pub checkers: Arc<Checkers>,
    /// Who is let in no more, which it writes and others read.
    pub revocations: Arc<Revocations>,
    /// The last position that the store holds.
    pub position: u64,
    /// How old pings may become, counted from their receipt, and events for checkers.
    pub retention: Duration,
    /// What it keeps beside pings.
    pub vigil: Vigil,
    /// Who may enrol.
    pub invitations: Invitations,
    /// What others than devices have it write.
    pub orders: Orders,
    /// Who erases what a fence was made around.
    pub erase: EraseHandle,
    /// Where erasures are recorded.
    pub audit: Audit,
    /// How many newcomers were turned away for want of room: those could not be heard.
    pub turned_away: Arc<AtomicU64>,
}

impl Committer {
    /// A committer and the handle to its queues.
    #[must_use]
    pub fn new(config: &CommitConfig, parts: CommitParts) -> (CommitHandle, Self) {
        let (handle, requests) = handoff::new(
            config.queue_requests,
            config.group_pings,
            parts.clock.clone(),
        );
        let paused = &parts.metrics.freshness.paused;
        paused.set(parts.holders.paused() as f64);
        let open = &parts.metrics.enrolment.open_invitations;
        open.set(parts.invitations.len() as f64);
        let committer = Self {
            requests,
            policy: config.policy(parts.retention),
            store: parts.store,
            freshness: parts.freshness,
            metrics: parts.metrics,
            clock: parts.clock,
            devices: parts.devices,
            holders: parts.holders,
            checkers: parts.checkers,
            revocations: parts.revocations,
            last_stored: FxHashMap::default(),
            position: parts.position,
            day: None,
            retention: Retention::of(parts.retention),
            drop_ms: 0,
            pulse: Pulse::default(),
            taken: Arc::default(),
            losses_said: Bucket::default(),
            vigil: parts.vigil,
            invitations: parts.invitations,
            orders: parts.orders,
            erase: parts.erase,
            audit: parts.audit,
            turned_away: parts.turned_away,
            disk_wait: Duration::ZERO,
            resolved_ms: 0,
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
        let taken = Arc::clone(&self.taken);
        // Used by the committer's own thread alone, so the lock is never waited for.
        let gather = Mutex::new(GatherRequests::new(Instant::now()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .on_thread_park(move || {
                let taken = taken.swap(0, Ordering::Relaxed);
                let wait = gather.lock().before_sleep(taken, Instant::now());
                if !wait.is_zero() {
                    // Nothing is queued, so all that this delays is what comes meanwhile.
                    thread::sleep(wait);
                }
            })
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
        let news = self.vigil.begin(self.clock.now_ms(), self.position + 1);
        self.say(&news)?;
        let mut group = Vec::new();
        loop {
            // Between two groups one, so that neither waits for long.
            if let Some(order) = self.orders.try_next() {
                self.obey(order)?;
            }
            let gathered = tokio::select! {
                biased;
                gathered = self.requests.gather(&mut group) => gathered,
                order = self.orders.next() => {
                    self.obey(order)?;
                    continue;
                }
                () = future::ready(()), if self.vigil.is_behind() => {
                    let _waiting = self.pulse.wait();
                    self.call_late()?;
                    continue;
                }
            };
            let Some(gathered) = gathered else {
                return Ok(());
            };
            let _waiting = self.pulse.wait();
            self.look()?;
            self.resolved_ms = gathered.resolved_ms;
            if group.is_empty() {
                self.rotate(gathered.drain_ms)?;
                self.freshness.resolve(gathered.resolved_ms);
            } else {
                self.taken.fetch_add(group.len(), Ordering::Relaxed);
                self.commit(&mut group, gathered.resolved_ms)?;
            }
            self.store.note_heard(gathered.resolved_ms);
            self.call_late()?;
        }
    }

    /// Finds out whether the gateway could hear until now, before any moment is announced that is later than the
    /// last.
    fn look(&mut self) -> Result<(), CommitError> {
        let look = Look {
            reading: self.clock.read(),
            turned_away: self.turned_away.load(Ordering::Relaxed),
            disk_wait: std::mem::take(&mut self.disk_wait),
            resolved_ms: self.resolved_ms,
        };
        let news = self.vigil.look(&look, self.position + 1);
        self.say(&news)
    }

    /// Calls late who was not heard in time by the last moment that was announced.
    fn call_late(&mut self) -> Result<(), CommitError> {
        let said = self.said_next();
        let (freshness, holders) = (&self.freshness, &self.holders);
        let news = self.vigil.call_late(self.resolved_ms, said, |user| {
            contact(freshness, holders, user)
        });
        self.say(&news)
    }

    /// Takes nothing more of a user. False if it was so already.
    fn take_no_more_of(&mut self, user: UserId) -> bool {
        let is_new = self.holders.grant(user, Wish::Erase).is_some();
        if is_new {
            // Rare enough to look at all of them.
            self.devices.retain(|device, _| device.user != user);
            self.last_stored.retain(|device, _| device.user != user);
        }
        is_new
    }

    /// Has it recorded what a holder has done.
    fn record(&self, device: DeviceId, what: What, at_ms: u64) {
        self.audit.tell(Deed {
            at_ms,
            who: Who::Holder(device.to_string()),
            what,
            whose: Whose::of(&[device.user]),
        });
    }

    /// And what it was of checkers, if it was that.
    fn record_turn(&self, device: DeviceId, turn: Turn, checkers: CheckerSet, at_ms: u64) {
        let what = match turn {
            Turn::Sharing(_) => return,
            Turn::Granted => What::Granted,
            Turn::Withdrawn => What::Withdrawn,
        };
        for name in self.checkers.names(checkers) {
            self.record(device, what(name.to_owned()), at_ms);
        }
    }

    fn said_next(&self) -> Said {
        Said {
            position: self.position + 1,
            at_ms: self.clock.now_ms(),
        }
    }

    /// Writes news that are no device's, at a position of their own, and publishes them.
    fn say(&mut self, news: &News) -> Result<(), CommitError> {
        if news.is_empty() {
            return Ok(());
        }
        self.say_with(self.store.batch(), news)
    }

    /// The same, with what else is in a batch.
    fn say_with(&mut self, mut batch: Batch, news: &News) -> Result<(), CommitError> {
        batch.put_news(news);
        let position = self.write(batch)?;
        self.vigil.publish(news);
        self.freshness
            .publish(position, self.resolved_ms, &[], &news.transitions);
        Ok(())
    }

    /// Writes a batch at a position of its own, which it returns.
    fn write(&mut self, mut batch: Batch) -> Result<u64, CommitError> {
        let position = self.position + 1;
        batch.put_position(position);
        let bytes = batch.size_bytes();
        let started = Instant::now();
        self.store.commit(batch)?;
        self.durable(position, bytes, started.elapsed());
        Ok(position)
    }

    /// A commit is on disk.
    fn durable(&mut self, position: u64, bytes: usize, duration: Duration) {
        self.position = position;
        self.disk_wait += duration;
        let commits = &self.metrics.commits;
        commits.duration.record(duration);
        commits.size_bytes.record(bytes as f64);
        commits.position.set(position as f64);
        commits.commits.increment(1);
    }

    /// Durable, then visible, then acknowledged.
    fn commit(&mut self, group: &mut Vec<Submission>, resolved_ms: u64) -> Result<(), CommitError> {
        let commit_ms = self.clock.now_ms();
        self.rotate(commit_ms)?;
        let position = self.position + 1;
        let said = Said {
            position,
            at_ms: commit_ms,
        };
        let mut judged = Judged::new(self.store.batch(), said);
        // Also when nothing else is written, as when all wait for their Hello: it is announced, and a position that is
        // not on disk would be used again after a restart.
        judged.batch.put_position(position);
        let put_off = self.store.space().is_short.then_some(NO_ROOM);
        for submission in group.drain(..) {
            let Submission {
                device,
                receive_ms,
                request,
                deferral,
                early,
                reply,
            } = submission;
            // Whatever its session knows by now: once a revocation is on disk, nothing of its subject gets there.
            if self.revocations.holds(&device) {
                judged.answers.push((reply, Answer::Revoked));
                continue;
            }
            self.open_day_of_receipt(receive_ms)?;
            // What was stored before is answered as ever, and the device is heard: its record takes the
            // same few bytes each time.
            let deferral = put_off.or(deferral);
            let moment = Moment {
                receive_ms,
                commit_ms,
                position,
            };
            if let Request::Control {
                id,
                wish: Wish::Erase,
            } = request
            {
                self.fence(device, id, reply, &mut judged);
                continue;
            }
            let answer = match early {
                Some(claim) => {
                    self.judge_early(device, request, deferral, claim, moment, &mut judged)
                }
                None => self.judge(device, request, deferral, moment, &mut judged),
            };
            judged.answers.push((reply, answer));
        }
        // Nothing that a checker sees comes of these, nor do their records say that anything was heard.
        for device in &judged.touched_early {
            let Some(record) = self.devices.get(device) else {
                continue;
            };
            judged.batch.put_device(device, record);
        }
        for &device in &judged.touched {
            let Entry::Occupied(record) = self.devices.entry(device) else {
                continue;
            };
            judged.batch.put_device(&device, record.get());
            // A position that moved would tell of a contact as well as a clock.
            let is_visible = self.holders.sharing(&device.user) == Sharing::Active
                || judged.has_turned(&device.user);
            if is_visible {
                judged.changes.push((device.user, record.get().clocks));
            }
        }

        let contacts = judged.changes.iter();
        let mut news = self.vigil.heard(
            contacts.map(|(user, clocks)| (*user, clocks.last_contact_ms)),
            said,
        );
        for device in &judged.fenced {
            news.deadlines.extend(self.vigil.forget_user(device.user));
        }
        news.transitions = std::mem::take(&mut judged.transitions);
        for transition in &news.transitions {
            if transition.turn == Turn::Withdrawn {
                let names = self.checkers.names(transition.checkers);
                for checker in names.map(Checker::named) {
                    news.deadlines
                        .extend(self.vigil.forget(checker, transition.user));
                }
            }
        }
        judged.batch.put_news(&news);

        let bytes = judged.batch.size_bytes();
        let started = Instant::now();
        self.store.commit(judged.batch)?;
        self.durable(position, bytes, started.elapsed());

        self.vigil.publish(&news);
        self.freshness
            .publish(position, resolved_ms, &judged.changes, &news.transitions);

        self.metrics.settled(&judged.fates);
        let commits = &self.metrics.commits;
        commits.given_up.increment(judged.gaps);
        commits.size_pings.record(judged.fates.accepted as f64);
        commits.size_batches.record(judged.answers.len() as f64);
        commits.known_devices.set(self.devices.len() as f64);
        let paused = &self.metrics.freshness.paused;
        paused.set(self.holders.paused() as f64);
        let mut rings = Rings::default();
        for (reply, answer) in judged.answers {
            reply.answer(answer, &mut rings);
        }
        for &device in &judged.fenced {
            self.record(device, What::Erased, commit_ms);
        }
        for &(device, turn, checkers) in &judged.decided {
            self.record_turn(device, turn, checkers, commit_ms);
        }
        for wanted in judged.erasures {
            wanted.hand_over();
        }
        Ok(())
    }

    /// A holder wants everything erased: from this commit on nothing more is taken of the user. What is held is then
    /// erased in its own time, and the answer comes after that.
    fn fence(&mut self, device: DeviceId, id: u64, reply: Reply, judged: &mut Judged) {
        let Some(place) = self.erase.place() else {
            let grant = Grant::TryLater;
            let answer = Answer::Granted(Granted { id, grant });
            judged.answers.push((reply, answer));
            return;
        };
        let user = device.user;
        let told = self.visible_to(user, judged);
        let begun = self.take_no_more_of(user).then(|| {
            let fence = judged.turn(user, Turn::Sharing(Sharing::Erased), told);
            judged.fenced.push(device);
            Erasure::begun_by(&fence)
        });
        judged.erasures.push(Wanted {
            place,
            user,
            begun,
            id,
            reply,
        });
    }

    /// Answers a device whose user is erased. Nothing of it is kept.
    fn turn_away(request: &Request, moment: Moment, judged: &mut Judged) -> Answer {
        let (epoch, pings, rejects) = match request {
            Request::Hello(_) | Request::Control { .. } | Request::Checkers { .. } => {
                return Answer::Erased;
            }
            Request::Heartbeat => (0, 0, Vec::new()),
            Request::Batch { batch, .. } => {
                let seqs = batch.pings.iter().map(|ping| ping.seq);
                let seqs = seqs.chain(batch.malformed.iter().map(|&(seq, _)| seq));
                let rejects: Vec<_> = seqs.map(|seq| (seq, RejectCode::Erased)).collect();
                judged
                    .fates
                    .reject(RejectCode::Erased, rejects.len() as u64);
                (batch.epoch, batch_len(batch), rejects)
            }
        };
        Answer::Settled(Settled {
            epoch,
            pings,
            accepted: 0,
            duplicate: 0,
            filtered: 0,
            rejects,
            settled: RangeSet::default(),
            receive_ms: moment.receive_ms,
            commit_ms: moment.commit_ms,
            position: moment.position,
            retry_after_ms: 0,
            is_paused: false,
        })
    }

    /// Applies one request to its device's record and to the write batch.
    fn judge(
        &mut self,
        device: DeviceId,
        request: Request,
        deferral: Option<Deferral>,
        moment: Moment,
        judged: &mut Judged,
    ) -> Answer {
        let Moment {
            receive_ms,
            commit_ms,
            position,
        } = moment;
        let was = self.holders.sharing(&device.user);
        if was == Sharing::Erased {
            return Self::turn_away(&request, moment, judged);
        }
        if let Request::Control { wish, .. } = request
            && let Some(to) = self.holders.grant(device.user, wish)
        {
            let told = self.visible_to(device.user, judged);
            judged.turn(device.user, Turn::Sharing(to), told);
        }
        let is_paused = self.holders.sharing(&device.user) == Sharing::Paused;
        let record = self.devices.entry(device).or_default();
        // To pause and to resume is to be heard. In between no clock moves, also none that would show later.
        if !(was == Sharing::Paused && is_paused) {
            record.contact(receive_ms);
            record.clocks.durable_ms = record.clocks.durable_ms.max(commit_ms);
        }
        if record.position != position {
            record.position = position;
            judged.touched.push(device);
        }
        match request {
            Request::Hello(claim) => {
                let gaps_before = record.gaps;
                let admission = record.admit_above(claim, self.store.epochs_issued());
                judged.gaps = judged.gaps.saturating_add(record.gaps - gaps_before);
                // Counted for each; said of so many that one device cannot fill the log.
                if admission == Admission::LostAcknowledged
                    && self
                        .losses_said
                        .take(&logged_losses(), 1, Instant::now())
                        .is_ok()
                {
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
                    is_paused,
                })
            }
            Request::Batch { batch, .. } if batch.epoch != record.epoch => Answer::Fenced,
            Request::Batch {
                batch,
                columns,
                density,
            } => {
                let policy = self.policy.and(&density);
                let mut last_stored = self.last_stored.get(&device).copied();
                let deferral = deferral.filter(|_| !is_paused);
                let judgement = match deferral {
                    Some(deferral) => record.defer(&batch.pings, &batch.malformed, deferral.code),
                    None if is_paused => {
                        record.refuse(&batch.pings, &batch.malformed, RejectCode::Paused)
                    }
                    None => record.judge(
                        &batch.pings,
                        &batch.malformed,
                        receive_ms,
                        &policy,
                        &mut last_stored,
                    ),
                };
                if let Some(last_stored) = last_stored.filter(|_| policy.thins()) {
                    self.last_stored.insert(device, last_stored);
                }
                let retry_after_ms = deferral.map_or(0, |deferral| deferral.retry_after_ms);
                let settled = judged.settle(device, record, &batch, columns, judgement, moment);
                Answer::Settled(Settled {
                    retry_after_ms,
                    is_paused,
                    ..settled
                })
            }
            Request::Control { id, .. } => Answer::Granted(Granted {
                id,
                grant: Grant::Holds,
            }),
            Request::Checkers { id, wish } => Answer::Granted(Granted {
                id,
                grant: self.decide(device, wish, judged),
            }),
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
                is_paused,
            }),
        }
    }

    /// Does what a holder wants of who is told of the user, and says who is then.
    fn decide(&mut self, device: DeviceId, wish: CheckerWish, judged: &mut Judged) -> Grant {
        let (user, at_ms) = (device.user, judged.said.at_ms);
        let known = judged.decisions.get(&user).cloned();
        let mut decisions = match known.map_or_else(|| self.store.decisions_of(user), Ok) {
            Ok(decisions) => decisions,
            Err(error) => {
                error!(%error, "a holder can neither be told which checkers may be told, nor change it");
                return Grant::Unreadable;
            }
        };
        let (name, turn) = match wish {
            CheckerWish::Show => return Grant::Checkers(decisions.shown(&self.checkers)),
            CheckerWish::Grant(name) => (name, Turn::Granted),
            CheckerWish::Withdraw(name) => (name, Turn::Withdrawn),
        };
        let Some(checker) = self.checkers.number(&name) else {
            return Grant::UnknownChecker;
        };
        let by_all = self.checkers.are_granted_by_all();
        let has_changed = match turn {
            Turn::Withdrawn => decisions.withdraw(checker, by_all, at_ms),
            _ => decisions.grant(checker, by_all, at_ms),
        };
        let shown = decisions.shown(&self.checkers);
        if has_changed {
            judged.batch.put_decisions(user, &decisions);
            judged.turn(user, turn, checker.into());
            judged.decided.push((device, turn, checker.into()));
            judged.decisions.insert(user, decisions);
        }
        Grant::Checkers(shown)
    }

    /// Who may be told of a user, with what this commit has changed so far.
    fn visible_to(&self, user: UserId, judged: &Judged) -> CheckerSet {
        match judged.decisions.get(&user) {
            Some(decisions) => {
                let by_all = self.checkers.are_granted_by_all();
                decisions.visibility(by_all).granted
            }
            None => self.freshness.visibility(&user).granted,
        }
    }

    /// Stores early data whose Hello would change nothing, so that it can be judged now as well as after it;
    /// all else waits. Whoever sent it is not heard: no clock moves, nothing is published, and a device that
    /// is not known stays so. The answer says what was settled before, for that is what Welcome has to tell.
    fn judge_early(
        &mut self,
        device: DeviceId,
        request: Request,
        deferral: Option<Deferral>,
        claim: Claim,
        moment: Moment,
        judged: &mut Judged,
    ) -> Answer {
        // A holder who has paused may have resumed when Hello is judged; only then is it known what becomes of the pings.
        let shares = self.holders.sharing(&device.user) == Sharing::Active;
        let record = self.devices.get_mut(&device).filter(|_| shares);
        match (request, record) {
            (
                Request::Batch {
                    batch,
                    columns,
                    density,
                },
                Some(record),
            ) if deferral.is_none()
                && batch.epoch == record.epoch
                && record.goes_on_unchanged(&claim) =>
            {
                let policy = self.policy.and(&density);
                let mut last_stored = self.last_stored.get(&device).copied();
                let settled_before = record.settled.clone();
                let judgement = record.judge_unproven(
                    &batch.pings,
                    &batch.malformed,
                    moment.receive_ms,
                    &policy,
                    &mut last_stored,
                );
                if let Some(last_stored) = last_stored.filter(|_| policy.thins()) {
                    self.last_stored.insert(device, last_stored);
                }
                judged.touched_early.push(device);
                self.metrics.resumption.early_batches.increment(1);
                let settled = judged.settle(device, record, &batch, columns, judgement, moment);
                Answer::Settled(Settled {
                    settled: settled_before,
                    ..settled
                })
            }
            _ => Answer::Fenced,
        }
    }

    /// Opens the day's column family when the day changes, and drops the days whose time has come. Between two commits
    /// it is looked whether it has, and when there are none, five times a second.
    fn rotate(&mut self, now_ms: u64) -> Result<(), CommitError> {
        let day = Day::of_ms(now_ms);
        if self.day != Some(day) {
            self.store.open_day(day)?;
            self.day = Some(day);
        }
        if now_ms < self.drop_ms {
            return Ok(());
        }
        let first_kept = self.retention.first_kept_day(now_ms);
        self.drop_ms = self.retention.ends_ms(first_kept);
        let dropped = self.store.drop_days_before(first_kept)?;
        if dropped > 0 {
            info!(days = dropped, "dropped days whose retention is over");
        }
        self.forget_events(first_kept.start_ms())
    }

    /// Opens the day on which something was received, if that is not the day of its commit: it has waited over midnight.
    fn open_day_of_receipt(&mut self, receive_ms: u64) -> Result<(), CommitError> {
        let day = Day::of_ms(receive_ms);
        if self.day != Some(day) {
            self.store.open_day(day)?;
            // If it has waited for so long that the day had to go, that is done after this commit.
            self.drop_ms = 0;
        }
        Ok(())
    }

    /// Deletes the events of deadlines and the transitions whose retention is over.
    fn forget_events(&self, before_ms: u64) -> Result<(), CommitError> {
        let found = self.store.events_before(before_ms).and_then(|events| {
            let transition = self.store.newest_transition_before(before_ms)?;
            Ok((events, transition))
        });
        let (events, transition) = match found {
            Ok(found) => found,
            // They are only kept for longer.
            Err(error) => {
                warn!(%error, "events for checkers whose retention is over could not be found");
                return Ok(());
            }
        };
        if events.is_empty() && transition.is_none() {
            return Ok(());
        }
        let mut batch = self.store.batch();
        // Told first: no reader may take what is gone for what never was.
        for (checker, position) in events {
            self.vigil.forget_events(checker, position);
            batch.forget_events(checker, position);
        }
        if let Some(position) = transition {
            self.vigil.forget_transitions(position);
            batch.forget_transitions(position);
        }
        self.store.commit(batch)?;
        self.erase.sweep();
        Ok(())
    }
}

/// What is known of a user's silence.
fn contact(freshness: &Freshness, holders: &Holders, user: &UserId) -> Contact {
    Contact {
        last_contact_ms: freshness.last_contact_ms(user),
        standing: match holders.sharing(user) {
            // To resume is to be heard, so it cannot be later than the last contact.
            Sharing::Active => Standing::Active { since_ms: 0 },
            Sharing::Paused | Sharing::Erased => Standing::Silenced,
        },
    }
}

/// One group on its way to disk.
#[derive(Debug)]
struct Judged {
    batch: Batch,
    said: Said,
    /// Devices whose record changed, each once.
    touched: Vec<DeviceId>,
    /// Devices whose record was changed by early data.
    touched_early: Vec<DeviceId>,
    changes: Vec<(UserId, waypost_proto::device::Clocks)>,
    /// In the order in which they were wanted.
    transitions: Vec<Transition>,
    /// The devices whose holders have had everything erased.
    fenced: Vec<DeviceId>,
    /// What holders have decided of checkers in this commit, and by which device.
    decisions: FxHashMap<UserId, Decisions>,
    decided: Vec<(DeviceId, Turn, CheckerSet)>,
    erasures: Vec<Wanted>,
    answers: Vec<(Reply, Answer)>,
    fates: Fates,
    gaps: u64,
}

impl Judged {
    fn new(batch: Batch, said: Said) -> Self {
        Self {
            batch,
            said,
            touched: Vec::new(),
            touched_early: Vec::new(),
            changes: Vec::new(),
            transitions: Vec::new(),
            fenced: Vec::new(),
            decisions: FxHashMap::default(),
            decided: Vec::new(),
            erasures: Vec::new(),
            answers: Vec::new(),
            fates: Fates::default(),
            gaps: 0,
        }
    }

    /// Notes what a holder has turned, and whom it concerns.
    fn turn(&mut self, user: UserId, turn: Turn, checkers: CheckerSet) -> Transition {
        let transition = Transition {
            user,
            turn,
            checkers,
            at_ms: self.said.at_ms,
            position: self.said.position,
            number: u32::try_from(self.transitions.len()).unwrap_or(u32::MAX),
        };
        self.transitions.push(transition);
        transition
    }

    /// Whether a holder has paused or resumed.
    fn has_turned(&self, user: &UserId) -> bool {
        self.transitions.iter().any(|transition| {
            transition.user == *user && matches!(transition.turn, Turn::Sharing(_))
        })
    }

    /// Writes down and counts what became of a batch.
    fn settle(
        &mut self,
        device: DeviceId,
        record: &DeviceRecord,
        batch: &DecodedBatch,
        columns: Vec<u8>,
        judgement: Judgement,
        moment: Moment,
    ) -> Settled {
        let Moment {
            receive_ms,
            commit_ms,
            position,
        } = moment;
        let pings = batch_len(batch);
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
            self.batch.put_pings(Day::of_ms(receive_ms), &key, &value);
        }
        let accepted = judgement.stored.len() as u64;
        self.fates.accepted += accepted;
        self.fates.duplicate += judgement.duplicate;
        self.fates.filtered += judgement.filtered;
        for (_, code) in &judgement.rejects {
            self.fates.reject(*code, 1);
        }
        Settled {
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
            retry_after_ms: 0,
            is_paused: false,
        }
    }
}

/// An erasure that a device waits for.
#[derive(Debug)]
struct Wanted {
    place: Place,
    user: UserId,
    /// None if its fence was made before.
    begun: Option<Erasure>,
    id: u64,
    reply: Reply,
}

impl Wanted {
    fn hand_over(self) {
        let (id, reply) = (self.id, self.reply);
        self.place.erase(self.user, self.begun, move |receipt| {
            let grant = Grant::Erased(receipt);
            let answer = Answer::Granted(Granted { id, grant });
            reply.answer(answer, &mut Rings::default());
        });
    }
}

/// When something came, and the commit that it went into.
#[derive(Clone, Copy, Debug)]
struct Moment {
    receive_ms: u64,
    commit_ms: u64,
    position: u64,
}

/// How many losses may be logged: each is an alarm, and a device can make them up.
fn logged_losses() -> Rate {
    Rate::new(1, Duration::from_secs(1), 20)
}

/// New pings while the disk is nearly full. 30 s: whoever makes room is a person or a nightly job, and a
/// device that asks more often only wastes its battery.
const NO_ROOM: Deferral = Deferral {
    code: RejectCode::Overloaded,
    retry_after_ms: 30_000,
};
