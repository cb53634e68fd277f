//! A device that outlives its gateway: it queues, sends, resends, backfills, and goes on after a crash.
//!
//! Written against the wire, without the outbox of `waypost-proto`, so that it does not share a mistake
//! with it. It remembers all that it ever sent, for the audit, and notes in the ledger what it was told
//! is settled. Knows the device's end of the protocol. Must not know the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use quinn::{ConnectionError, RecvStream, SendStream, VarInt};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use waypost_gateway::clock::system_now_ms;
use waypost_proto::{
    batch, frame,
    ping::{Ping, Source},
    session::{CloseCode, Lane},
    v1,
};

use crate::{
    Device, hello,
    ledger::{self, Acked, Ledger},
    link::{self, Link},
};

/// Where the gateway is in its present life, and where to note what it says.
#[derive(Debug)]
pub(crate) struct Visit<'a> {
    pub(crate) gateway: SocketAddr,
    pub(crate) ca_pem: &'a str,
    pub(crate) ledger: &'a Mutex<Ledger>,
    /// The newest commit that any device was told of in an earlier life of the gateway.
    pub(crate) told_before: u64,
}

/// A device and its memory.
#[derive(Debug)]
pub struct Survivor {
    device: Device,
    number: u32,
    dice: StdRng,
    epoch: u32,
    incarnation: Bytes,
    last_acked: u64,
    next_seq: u64,
    /// Not known to be settled.
    held: BTreeMap<u64, Ping>,
    /// Settled in this epoch, the newest: to be sent again for no reason.
    settled: Vec<Ping>,
    /// Everything that may have reached the gateway, by epoch and number.
    sent: BTreeMap<(u32, u64), Ping>,
    /// Numbers that were never given to a ping.
    skipped: BTreeSet<(u32, u64)>,
    /// What contradicted itself in what the gateway said.
    faults: Vec<String>,
    told_position: u64,
    told_contact_ms: u64,
    epochs: BTreeSet<u32>,
    /// On its present connection.
    is_welcomed: bool,
}

/// The connection is gone; the device tries again.
struct Cut;

/// What one connection is for.
struct Plan {
    /// How many new pings it may sample.
    fresh: u32,
    /// Pings held from before, not sent on this connection yet, lowest number first.
    backlog: Vec<Ping>,
    /// How many pings may wait for their ack.
    window: u64,
    /// Whether to go on with duplicates and heartbeats when there is nothing else.
    stays: bool,
}

struct Stream {
    send: SendStream,
    recv: RecvStream,
    unread: BytesMut,
    order: Order,
}

/// The newest that was said on one stream. Streams overtake each other, so each has its own.
#[derive(Clone, Copy)]
struct Order {
    position: u64,
    receive_ms: u64,
}

/// What a Welcome and an Ack have in common.
struct Told<'a> {
    durable_upto: u64,
    ranges: &'a [v1::SeqRange],
    position: u64,
    receive_ms: u64,
}

impl Survivor {
    pub fn new(device: Device, number: u32, seed: u64) -> Self {
        Self {
            device,
            number,
            dice: StdRng::seed_from_u64(seed),
            epoch: 0,
            incarnation: Bytes::new(),
            last_acked: 0,
            next_seq: 1,
            held: BTreeMap::new(),
            settled: Vec::new(),
            sent: BTreeMap::new(),
            skipped: BTreeSet::new(),
            faults: Vec::new(),
            told_position: 0,
            told_contact_ms: 0,
            epochs: BTreeSet::new(),
            is_welcomed: false,
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn sent(&self) -> &BTreeMap<(u32, u64), Ping> {
        &self.sent
    }

    /// Whether a number of an epoch was passed over, so that it may be closed as a gap.
    pub fn has_skipped(&self, epoch: u32, seq: u64) -> bool {
        self.skipped.contains(&(epoch, seq))
    }

    pub fn has_used_epoch(&self, epoch: u32) -> bool {
        self.epochs.contains(&epoch)
    }

    pub fn told_position(&self) -> u64 {
        self.told_position
    }

    pub fn told_contact_ms(&self) -> u64 {
        self.told_contact_ms
    }

    pub fn take_faults(&mut self) -> Vec<String> {
        std::mem::take(&mut self.faults)
    }

    /// Works until it is dropped, which may be at any moment.
    pub(crate) async fn work(&mut self, visit: &Visit<'_>) {
        // So that a store does not grow without bound while a test lasts.
        let mut fresh = 150;
        loop {
            if self.dice.random_ratio(1, 25) {
                self.wipe();
            }
            // Some connections only last for a few pings.
            let share = if self.dice.random_ratio(1, 3) {
                fresh.min(10)
            } else {
                fresh
            };
            fresh -= share;
            let stays = fresh == 0 && share > 10;
            drop(self.connection(visit, share, stays).await);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Connects until nothing is held.
    pub(crate) async fn hand_over(&mut self, visit: &Visit<'_>) {
        loop {
            let ended = self.connection(visit, 0, false).await;
            if ended.is_ok() && self.held.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The queue is gone and all that was in it, as after a new install.
    fn wipe(&mut self) {
        self.epoch = 0;
        self.incarnation = Bytes::new();
        self.begin_epoch();
        self.held.clear();
    }

    fn begin_epoch(&mut self) {
        self.last_acked = 0;
        self.next_seq = 1;
        self.settled.clear();
    }

    async fn connection(&mut self, visit: &Visit<'_>, fresh: u32, stays: bool) -> Result<(), Cut> {
        let credentials = Some(&*self.device.credentials);
        let attempt = link::attempt(visit.gateway, visit.ca_pem, credentials, link::ordinary());
        let link = attempt.await.established().ok_or(Cut)?;
        self.is_welcomed = false;
        let ended = self.talk(&link, visit, fresh, stays).await;
        match link.connection().close_reason() {
            Some(ConnectionError::ApplicationClosed(close)) => {
                let code = CloseCode::from_number(close.error_code.into_inner());
                let is_said = match code {
                    Some(CloseCode::ShuttingDown | CloseCode::Overloaded) => true,
                    // An attempt of its own that it gave up may arrive after its next one.
                    Some(CloseCode::TakenOver) => true,
                    // A handshake that the gateway breaks off because it stops.
                    Some(CloseCode::NoError) => !self.is_welcomed,
                    _ => false,
                };
                if !is_said {
                    self.fault(format!("the gateway closed with {code:?}"));
                }
            }
            // Some devices say goodbye, others just go.
            None if self.dice.random() => link.connection().close(VarInt::from_u32(0), b""),
            _ => {}
        }
        ended
    }

    async fn talk(
        &mut self,
        link: &Link,
        visit: &Visit<'_>,
        fresh: u32,
        stays: bool,
    ) -> Result<(), Cut> {
        let order = Order {
            position: self.told_position,
            receive_ms: 0,
        };
        let mut live = Stream::open(link, self.hello(Lane::Live), order).await?;
        match live.next().await? {
            v1::gateway_frame::Kind::Welcome(welcome) => {
                self.welcomed(&welcome, &mut live.order, visit);
            }
            other => return self.unexpected(&other),
        }
        let mut plan = Plan {
            fresh,
            backlog: self.held.values().rev().copied().collect(),
            window: self.dice.random_range(1..=60),
            stays,
        };
        let mut backfill = None;
        if !plan.backlog.is_empty() && self.dice.random_ratio(3, 4) {
            backfill = Some(Stream::open(link, self.hello(Lane::Backfill), order).await?);
        }
        let (mut sent, mut answered) = (0, 0);
        loop {
            while sent - answered < plan.window
                && let Some((lane, kind, pings)) = self.next_frame(&mut plan, sent == answered)
            {
                let stream = match (lane, &mut backfill) {
                    (Lane::Backfill, Some(backfill)) => backfill,
                    _ => &mut live,
                };
                sent += pings;
                stream.send(kind).await?;
            }
            if sent == answered && !plan.stays {
                return Ok(());
            }
            let (frame, order) = tokio::select! {
                frame = live.next() => (frame?, &mut live.order),
                (frame, order) = next_of(&mut backfill) => (frame?, order),
            };
            match frame {
                v1::gateway_frame::Kind::Welcome(welcome) => self.welcomed(&welcome, order, visit),
                v1::gateway_frame::Kind::Ack(ack) => {
                    self.acked(&ack, order, visit);
                    let total = ack.accepted + ack.duplicate + ack.filtered + ack.rejected;
                    answered = answered.max(total);
                    if sent < answered {
                        self.fault(format!("{answered} of {sent} pings were answered"));
                        return Err(Cut);
                    }
                }
                other @ (v1::gateway_frame::Kind::ControlResult(_)
                | v1::gateway_frame::Kind::Flow(_)
                | v1::gateway_frame::Kind::Renewed(_)) => {
                    return self.unexpected(&other);
                }
            }
        }
    }

    /// What to send next, on which lane, and how many pings that is.
    fn next_frame(
        &mut self,
        plan: &mut Plan,
        all_is_answered: bool,
    ) -> Option<(Lane, v1::device_frame::Kind, u64)> {
        let count = self.dice.random_range(1..=6);
        let is_repeat = !self.settled.is_empty() && self.dice.random_ratio(1, 8);
        let (lane, pings) = if is_repeat {
            let from = self.dice.random_range(0..self.settled.len());
            let mut pings: Vec<Ping> = self
                .settled
                .iter()
                .skip(from)
                .take(count)
                .copied()
                .collect();
            pings.sort_unstable_by_key(|ping| ping.seq);
            (Lane::Live, pings)
        } else if !plan.backlog.is_empty() && (plan.fresh == 0 || self.dice.random()) {
            let from = plan.backlog.len().saturating_sub(3 * count);
            let mut pings = plan.backlog.split_off(from);
            pings.reverse();
            (Lane::Backfill, pings)
        } else if 0 < plan.fresh {
            plan.fresh = plan.fresh.saturating_sub(u32::try_from(count).unwrap());
            (Lane::Live, (0..count).map(|_| self.sample()).collect())
        } else if plan.stays && all_is_answered {
            return Some((
                Lane::Live,
                v1::device_frame::Kind::Heartbeat(v1::Heartbeat {}),
                0,
            ));
        } else {
            return None;
        };
        for ping in &pings {
            self.sent.insert((self.epoch, ping.seq), *ping);
        }
        let kind = v1::device_frame::Kind::Batch(batch::encode(self.epoch, &pings));
        Some((lane, kind, pings.len() as u64))
    }

    fn sample(&mut self) -> Ping {
        if self.dice.random_ratio(1, 40) {
            for _ in 0..self.dice.random_range(1..=3) {
                self.skipped.insert((self.epoch, self.next_seq));
                self.next_seq += 1;
            }
        }
        const HALF_RETENTION_MS: u64 = 15 * 24 * 60 * 60 * 1_000;
        let time_ms = if self.dice.random_ratio(1, 50) {
            FAR_FUTURE_MS
        } else {
            system_now_ms() - self.dice.random_range(0..HALF_RETENTION_MS)
        };
        let source = if self.dice.random_ratio(1, 5) {
            Source::LastKnown
        } else {
            Source::Gnss
        };
        let ping = Ping {
            accuracy_dm: self.dice.random_bool(0.5).then_some(40),
            battery_percent: Some(self.dice.random_range(0..=100)),
            source,
            ..Ping::at(
                self.next_seq,
                time_ms,
                self.dice.random_range(-900_000_000..=900_000_000),
                self.dice.random_range(-1_800_000_000..=1_800_000_000),
            )
        };
        self.held.insert(ping.seq, ping);
        self.next_seq += 1;
        ping
    }

    fn hello(&self, lane: Lane) -> v1::Hello {
        let oldest = self.held.keys().next().copied();
        v1::Hello {
            oldest_unsent_seq: oldest.unwrap_or(self.next_seq),
            next_seq: self.next_seq,
            queued: self.held.len() as u64,
            last_acked: self.last_acked,
            incarnation: self.incarnation.clone(),
            ..hello(lane, self.epoch)
        }
    }

    fn welcomed(&mut self, welcome: &v1::Welcome, order: &mut Order, visit: &Visit<'_>) {
        self.is_welcomed = true;
        if self.epoch != welcome.epoch {
            if self.epoch != 0 {
                self.fault(format!(
                    "epoch {} was taken away, {} came instead",
                    self.epoch, welcome.epoch
                ));
            }
            if self.epochs.contains(&welcome.epoch) {
                self.fault(format!("epoch {} was issued twice", welcome.epoch));
            }
            self.epoch = welcome.epoch;
            self.epochs.insert(welcome.epoch);
            self.begin_epoch();
            for (_, ping) in std::mem::take(&mut self.held) {
                let seq = self.next_seq;
                self.held.insert(seq, Ping { seq, ..ping });
                self.next_seq += 1;
            }
        }
        if !self.incarnation.is_empty() && self.incarnation != welcome.incarnation {
            self.fault("the store became another one".to_owned());
        }
        self.incarnation = welcome.incarnation.clone();
        let told = Told {
            durable_upto: welcome.durable_upto,
            ranges: &welcome.ranges,
            position: welcome.position,
            receive_ms: welcome.server_ms,
        };
        self.told(&told, order, visit);
    }

    fn acked(&mut self, ack: &v1::Ack, order: &mut Order, visit: &Visit<'_>) {
        if ack.epoch != self.epoch || ack.incarnation != self.incarnation {
            return self.fault(format!(
                "an ack of epoch {} in epoch {}",
                ack.epoch, self.epoch
            ));
        }
        let told = Told {
            durable_upto: ack.durable_upto,
            ranges: &ack.ranges,
            position: ack.position,
            receive_ms: ack.receive_ms,
        };
        self.told(&told, order, visit);
    }

    /// Takes note of what is settled: first in the ledger, then in the queue.
    fn told(&mut self, told: &Told<'_>, order: &mut Order, visit: &Visit<'_>) {
        let &Told {
            durable_upto,
            ranges,
            position,
            receive_ms,
        } = told;
        let highest = ranges.last().map_or(durable_upto, |range| range.last);
        if self.next_seq <= highest {
            self.fault(format!(
                "{highest} was settled, but the next number is {}",
                self.next_seq
            ));
        }
        if position < order.position {
            self.fault(format!("position {position} came after {}", order.position));
        }
        if position <= visit.told_before {
            self.fault(format!(
                "position {position} was used again: {} was told before the crash",
                visit.told_before
            ));
        }
        if receive_ms < order.receive_ms {
            self.fault(format!(
                "receive time {receive_ms} came after {}",
                order.receive_ms
            ));
        }
        *order = Order {
            position,
            receive_ms,
        };
        let is_settled = |seq: &u64| {
            *seq <= durable_upto
                || ranges
                    .iter()
                    .any(|range| (range.first..=range.last).contains(seq))
        };
        let settled: Vec<Ping> = self
            .held
            .iter()
            .filter(|(seq, _)| is_settled(seq))
            .map(|(_, ping)| *ping)
            .collect();
        if !settled.is_empty() {
            let lines: Vec<Acked> = settled
                .iter()
                .map(|ping| Acked {
                    device: self.number,
                    epoch: self.epoch,
                    seq: ping.seq,
                    digest: ledger::digest(ping),
                    position,
                    receive_ms,
                })
                .collect();
            visit.ledger.lock().note(&lines);
        }
        for ping in settled {
            self.held.remove(&ping.seq);
            self.settled.push(ping);
        }
        const REMEMBERED: usize = 64;
        let forgotten = self.settled.len().saturating_sub(REMEMBERED);
        self.settled.drain(..forgotten);
        self.last_acked = self.last_acked.max(durable_upto);
        self.told_position = self.told_position.max(position);
        self.told_contact_ms = self.told_contact_ms.max(receive_ms);
    }

    fn unexpected(&mut self, kind: &v1::gateway_frame::Kind) -> Result<(), Cut> {
        self.fault(format!("an unexpected frame: {kind:?}"));
        Err(Cut)
    }

    fn fault(&mut self, what: String) {
        self.faults.push(format!("device {}: {what}", self.number));
    }
}

impl Stream {
    async fn open(link: &Link, hello: v1::Hello, order: Order) -> Result<Self, Cut> {
        let (send, recv) = link.connection().open_bi().await.map_err(|_| Cut)?;
        let mut stream = Self {
            send,
            recv,
            unread: BytesMut::new(),
            order,
        };
        stream.send(v1::device_frame::Kind::Hello(hello)).await?;
        Ok(stream)
    }

    async fn send(&mut self, kind: v1::device_frame::Kind) -> Result<(), Cut> {
        let mut bytes = BytesMut::new();
        frame::encode_frame(&v1::DeviceFrame { kind: Some(kind) }, &mut bytes);
        self.send.write_all(&bytes).await.map_err(|_| Cut)
    }

    /// The next frame. May be dropped while it waits.
    async fn next(&mut self) -> Result<v1::gateway_frame::Kind, Cut> {
        loop {
            if let Some(frame) = link::take_frame(&mut self.unread) {
                return frame.kind.ok_or(Cut);
            }
            match self.recv.read_chunk(usize::MAX, true).await {
                Ok(Some(chunk)) => self.unread.extend_from_slice(&chunk.bytes),
                Ok(None) | Err(_) => return Err(Cut),
            }
        }
    }
}

async fn next_of(
    stream: &mut Option<Stream>,
) -> (Result<v1::gateway_frame::Kind, Cut>, &mut Order) {
    match stream {
        Some(stream) => (stream.next().await, &mut stream.order),
        None => std::future::pending().await,
    }
}

/// Whether the gateway must refuse a ping for ever.
pub(crate) fn is_refused(ping: &Ping) -> bool {
    ping.time_ms == FAR_FUTURE_MS
}

/// Later than any clock that these tests run by: the year 2200.
const FAR_FUTURE_MS: u64 = 7_258_118_400_000;
