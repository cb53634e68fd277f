//! The device's half of the protocol: what waits, what is in flight, and what may be forgotten.
//!
//! Knows epochs, lanes, credit and acknowledgements. Must not know time, streams or disks: a shell
//! tells it when a connection begins and ends, asks it for frames, and hands it what the gateway said.
//!
//! The contract. A ping stays here until an acknowledgement of its epoch and store covers its number,
//! or until the outbox is full and drops its oldest, which it counts. A connection that ends takes
//! nothing with it: what was in flight waits again.
//!
//! A shell does, for each connection: [`Outbox::connected`]; a LIVE stream with [`Outbox::hello`]; then,
//! until the connection ends, [`Outbox::poll_batch`] for LIVE and then BACKFILL,
//! [`Outbox::handle`] for each frame, a BACKFILL stream while [`Outbox::has_backlog`], and an end of its
//! own when [`Outbox::must_reconnect`]; at last [`Outbox::disconnected`].

use std::{collections::VecDeque, num::NonZeroUsize};

use bytes::Bytes;
use prost::Message;

use crate::{
    batch,
    ping::{Ping, RejectCode},
    ranges::SeqRange,
    session::Lane,
    terms::Terms,
    v1,
};

/// A bounded queue of pings and the device's side of its conversation with a gateway.
#[derive(Clone, Debug)]
pub struct Outbox {
    capacity: NonZeroUsize,
    /// Not settled yet, ascending by sequence number.
    held: VecDeque<Held>,
    /// Settled once, to be sent once more; see [`Self::push_again`].
    repeats: VecDeque<Ping>,
    epoch: u32,
    next_seq: u64,
    dropped_total: u64,
    incarnation: Bytes,
    last_acked: u64,
    frame_bytes: usize,
    batch_pings: usize,
    credit: usize,
    min_interval_ms: u64,
    retry_after_ms: u64,
    /// How long to stay away after this connection, because the gateway is about to stop.
    return_after_ms: u64,
    /// No batch before this time.
    not_before_ms: u64,
    /// While there is no credit and nothing in flight, one ping may ask for more at this time.
    probe_ms: u64,
    terms: Terms,
    connection: Connection,
}

/// What became of one ping that was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Its sequence number.
    pub seq: u64,
    /// The oldest ping, which had to go because the outbox was full.
    pub dropped: Option<u64>,
}

/// What a frame of the gateway changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The gateway answered Hello.
    Welcomed {
        /// Its receive time.
        server_ms: u64,
        /// The commit that recorded this contact.
        position: u64,
    },
    /// A new epoch began. What was held is numbered anew, from 1, and pings that were to be sent again
    /// are forgotten, because they would not be repetitions any more.
    Renumbered {
        /// The new epoch.
        epoch: u32,
        /// The old numbers, in order: the first is now 1, the second 2, and so on.
        previous_seqs: Vec<u64>,
    },
    /// These pings are settled and forgotten; all of them had been held.
    Settled(SeqRange),
    /// These pings, which had been pushed again, were answered.
    Repeated(SeqRange),
    /// A ping was refused. If not for ever, it waits again; if for ever, it is settled.
    Rejected {
        /// The ping.
        seq: u64,
        /// The reason.
        code: RejectCode,
        /// Whether it will be sent again.
        retryable: bool,
    },
    /// An acknowledgement of the current epoch and store was read, after all that it changed.
    Acknowledged {
        /// When the gateway received what it answers.
        receive_ms: u64,
        /// When that was on disk.
        commit_ms: u64,
        /// The commit that put it there.
        position: u64,
        /// The running totals of this connection.
        totals: Totals,
    },
    /// The gateway answered a Control.
    ControlAnswered {
        /// The device's id of the request.
        id: u64,
        /// What became of it.
        outcome: v1::control_result::Outcome,
    },
    /// Nothing more is sent on this connection, and when nothing is in flight any more it should end.
    Leaving(LeaveReason),
}

/// Why a connection should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaveReason {
    /// The gateway is about to stop.
    GoAway,
    /// The epoch that Welcome names may hold other pings under the numbers we would give. The next Hello
    /// asks for one that is new.
    EpochTaken,
    /// The gateway cannot take more until it has numbers that are not held here. The next Hello gives
    /// them up.
    HolesToClose,
}

/// The running totals of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Stored.
    pub accepted: u64,
    /// Settled before.
    pub duplicate: u64,
    /// Left out by a thinning rule.
    pub filtered: u64,
    /// Refused.
    pub rejected: u64,
}

impl Totals {
    /// How many pings were answered.
    #[must_use]
    pub fn sum(self) -> u64 {
        [self.accepted, self.duplicate, self.filtered, self.rejected]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

#[derive(Clone, Copy, Debug)]
struct Held {
    ping: Ping,
    is_in_flight: bool,
    /// Under this number it went out on an earlier connection, or was refused for now on this one.
    was_sent: bool,
}

/// What ends with a connection.
#[derive(Clone, Debug, Default)]
struct Connection {
    is_welcomed: bool,
    is_leaving: bool,
    has_begun_epoch: bool,
    /// LIVE carries this number and those above, BACKFILL those below.
    live_from: u64,
    /// No ping that waits for LIVE lies below.
    live_next: u64,
    /// No ping that waits for BACKFILL lies below.
    backfill_next: u64,
    /// The lane of the last batch.
    last_lane: Option<Lane>,
    /// How many of `held` are in flight.
    held_in_flight: usize,
    /// Repeats in flight, each with the value that `sent` had after it, in order.
    repeats_in_flight: VecDeque<(u64, Ping)>,
    /// How many pings were sent.
    sent: u64,
    /// While any ping in these ranges is held, no other is sent.
    missing: Vec<SeqRange>,
}

impl Outbox {
    /// An empty outbox without an epoch.
    #[must_use]
    pub fn new(capacity: NonZeroUsize) -> Self {
        Self {
            capacity,
            held: VecDeque::new(),
            repeats: VecDeque::new(),
            epoch: 0,
            next_seq: 1,
            dropped_total: 0,
            incarnation: Bytes::new(),
            last_acked: 0,
            frame_bytes: DEFAULT_FRAME_BYTES,
            batch_pings: DEFAULT_BATCH_PINGS,
            credit: DEFAULT_BATCH_PINGS,
            min_interval_ms: 0,
            retry_after_ms: 0,
            return_after_ms: 0,
            not_before_ms: 0,
            probe_ms: 0,
            terms: Terms::default(),
            connection: Connection::default(),
        }
    }

    /// Takes in a new ping and gives it the next number; its own `seq` is not looked at.
    pub fn push(&mut self, ping: Ping) -> Pushed {
        let seq = self.next_seq;
        self.append(Ping { seq, ..ping })
    }

    /// Takes in a new ping under the number it has. `None` if that number was passed already.
    pub fn push_numbered(&mut self, ping: Ping) -> Option<Pushed> {
        (self.next_seq <= ping.seq && ping.seq < u64::MAX).then(|| self.append(ping))
    }

    /// Sends a ping that was settled before once more, under the number it has in the current epoch,
    /// as a device does that came back from an old state. It follows on LIVE when no other ping waits.
    /// False if there is no room, or no ping had that number.
    pub fn push_again(&mut self, ping: Ping) -> bool {
        let waiting = self.repeats.len() + self.connection.repeats_in_flight.len();
        let is_known = self.epoch != 0 && 0 < ping.seq && ping.seq < self.next_seq;
        let is_taken = is_known && waiting < self.capacity.get();
        if is_taken {
            self.repeats.push_back(ping);
        }
        is_taken
    }

    /// Sets what the holder lets be stored, from the next Hello on. The gateway sees to it.
    pub fn set_terms(&mut self, terms: Terms) {
        self.terms = terms;
    }

    /// Begins a connection.
    pub fn connected(&mut self) {
        self.return_after_ms = 0;
        self.forget_connection();
        self.split_lanes();
    }

    /// The gateway closes the connection with FENCED_EPOCH; [`Self::disconnected`] follows. The next Hello
    /// asks for an epoch of its own, unless this connection began one already: then what was sent
    /// before that is meant.
    ///
    /// A shell that puts back an older copy of an outbox calls this as well: the copy does not know which
    /// numbers were given since, and under those it could take the acks of other pings for its own. Most
    /// copies give themselves away by their first Welcome, but not all.
    pub fn fenced(&mut self) {
        if !self.connection.has_begun_epoch {
            self.abandon_epoch();
        }
    }

    /// Ends a connection: all that was in flight waits again.
    pub fn disconnected(&mut self) {
        self.forget_connection();
    }

    /// The first frame of a stream. LIVE is opened at once, BACKFILL while [`Self::has_backlog`].
    #[must_use]
    pub fn hello(&self, lane: Lane, device_wall_ms: u64) -> v1::Hello {
        v1::Hello {
            epoch: self.epoch,
            oldest_unsent_seq: self.oldest_unsent_seq(),
            next_seq: self.next_seq,
            queued: (self.held.len() + self.repeats.len() + self.connection.repeats_in_flight.len())
                as u64,
            dropped_total: self.dropped_total,
            last_acked: self.last_acked,
            device_wall_ms,
            precision: self.terms.precision.into(),
            least_interval_ms: self.terms.density.least_interval_ms,
            least_distance_m: self.terms.density.least_distance_m,
            lane: match lane {
                Lane::Live => v1::Lane::Live.into(),
                Lane::Backfill => v1::Lane::Backfill.into(),
            },
            incarnation: self.incarnation.clone(),
        }
    }

    /// Whether this connection needs a BACKFILL stream. Never before its Welcome: two Hellos that both
    /// ask for an epoch would get two.
    #[must_use]
    pub fn has_backlog(&self) -> bool {
        self.connection.is_welcomed
            && self
                .held
                .front()
                .is_some_and(|oldest| oldest.ping.seq < self.connection.live_from)
    }

    /// The next batch of a lane, if there is one and the gateway lets us send it now. Ask for LIVE
    /// before BACKFILL.
    pub fn poll_batch(&mut self, lane: Lane, now_ms: u64) -> Option<v1::PingBatch> {
        let is_open = lane == Lane::Live || self.has_backlog();
        if !is_open
            || !self.may_send()
            || now_ms < self.not_before_ms
            || self.must_wait_for_answer()
            || self.must_yield(lane)
        {
            return None;
        }
        let room = self.room(lane, now_ms).min(self.batch_pings);
        let waiting = self.waiting(lane, room);
        let batch = if !waiting.is_empty() {
            self.send_held(lane, &waiting)?
        } else if !self.has_backlog() {
            self.send_repeats(room)?
        } else {
            return None;
        };
        self.connection.last_lane = Some(lane);
        self.not_before_ms = now_ms.saturating_add(self.min_interval_ms);
        Some(batch)
    }

    /// When to call [`Self::poll_batch`] again although nothing has happened; `None` if only an event
    /// can make it succeed.
    #[must_use]
    pub fn poll_timeout(&self, now_ms: u64) -> Option<u64> {
        let is_waiting =
            self.connection.held_in_flight < self.held.len() || !self.repeats.is_empty();
        if !is_waiting || !self.may_send() {
            return None;
        }
        let has_credit = self.in_flight() < self.credit;
        let wake_ms = match (has_credit, self.in_flight()) {
            (true, _) => self.not_before_ms,
            (false, 0) => self.not_before_ms.max(self.probe_ms),
            (false, _) => return None,
        };
        (now_ms < wake_ms).then_some(wake_ms)
    }

    /// Takes in a frame, from whichever lane, and says what it changed.
    pub fn handle(&mut self, frame: v1::GatewayFrame, now_ms: u64) -> Vec<Event> {
        let mut events = Vec::new();
        match frame.kind {
            Some(v1::gateway_frame::Kind::Welcome(welcome)) => {
                self.welcome(welcome, now_ms, &mut events)
            }
            Some(v1::gateway_frame::Kind::Ack(ack)) => self.ack(ack, now_ms, &mut events),
            Some(v1::gateway_frame::Kind::ControlResult(result)) => {
                events.push(Event::ControlAnswered {
                    id: result.id,
                    outcome: result.outcome(),
                });
            }
            Some(v1::gateway_frame::Kind::Flow(flow)) => self.obey(flow, now_ms, &mut events),
            // A certificate is whoever keeps the key's; and a kind that this side does not know yet.
            Some(v1::gateway_frame::Kind::Renewed(_)) | None => {}
        }
        events
    }

    /// Whether the connection has nothing more to wait for and should end, after [`Event::Leaving`].
    #[must_use]
    pub fn must_reconnect(&self) -> bool {
        // Acknowledgements of an epoch that was abandoned mean nothing.
        self.connection.is_leaving && (self.in_flight() == 0 || self.epoch == 0)
    }

    /// How long the gateway asked us to send nothing more, when it said something last: also how long to stay
    /// away if it closes with OVERLOADED.
    #[must_use]
    pub fn retry_after_ms(&self) -> u64 {
        self.retry_after_ms
    }

    /// How long to stay away after this connection, because the gateway said that it is about to stop; 0 if it
    /// did not.
    #[must_use]
    pub fn return_after_ms(&self) -> u64 {
        self.return_after_ms
    }

    /// The epoch; 0 before the first Welcome, or when the next Hello asks for a new one.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// How many pings are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// How many pings were sent on this connection and not answered yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.connection.held_in_flight + self.connection.repeats_in_flight.len()
    }

    /// Whether Hello was answered on this connection.
    #[must_use]
    pub fn is_welcomed(&self) -> bool {
        self.connection.is_welcomed
    }

    /// Whether nothing is held and nothing is to be sent again.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.held.is_empty()
            && self.repeats.is_empty()
            && self.connection.repeats_in_flight.is_empty()
    }

    fn append(&mut self, ping: Ping) -> Pushed {
        let mut dropped = None;
        if self.held.len() == self.capacity.get()
            && let Some(oldest) = self.held.pop_front()
        {
            self.connection.held_in_flight -= usize::from(oldest.is_in_flight);
            self.dropped_total += 1;
            self.settle_missing();
            dropped = Some(oldest.ping.seq);
        }
        self.next_seq = ping.seq + 1;
        self.held.push_back(Held {
            ping,
            is_in_flight: false,
            was_sent: false,
        });
        Pushed {
            seq: ping.seq,
            dropped,
        }
    }

    fn oldest_unsent_seq(&self) -> u64 {
        self.held
            .front()
            .map_or(self.next_seq, |oldest| oldest.ping.seq)
    }

    fn forget_connection(&mut self) {
        let connection = std::mem::take(&mut self.connection);
        for held in &mut self.held {
            held.was_sent |= std::mem::take(&mut held.is_in_flight);
        }
        for (_, ping) in connection.repeats_in_flight.into_iter().rev() {
            self.repeats.push_front(ping);
        }
    }

    /// With more than one batch waiting, the newest ping goes ahead on LIVE and the rest follows on
    /// BACKFILL.
    fn split_lanes(&mut self) {
        let newest = self
            .held
            .back()
            .filter(|_| self.batch_pings < self.held.len());
        self.connection.live_from = newest.map_or(0, |newest| newest.ping.seq);
    }

    fn may_send(&self) -> bool {
        self.epoch != 0 && !self.connection.is_leaving
    }

    /// When the gateway spaces batches out, LIVE could take every turn; it leaves each second one. While
    /// ranges are missing it leaves all of them: only the lowest of the missing is taken for sure.
    fn must_yield(&self, lane: Lane) -> bool {
        let is_greedy = 0 < self.min_interval_ms && self.connection.last_lane == Some(Lane::Live);
        lane == Lane::Live
            && (is_greedy || self.is_sparse())
            && self.has_backlog()
            && !self.waiting(Lane::Backfill, 1).is_empty()
    }

    /// Whether the gateway can take no new range, and has named those that it misses.
    fn is_sparse(&self) -> bool {
        !self.connection.missing.is_empty()
    }

    /// While ranges are missing one batch is sent at a time: the next begins with what the answer to this
    /// one says is the lowest, and no other pings go round and round meanwhile.
    fn must_wait_for_answer(&self) -> bool {
        self.is_sparse() && 0 < self.in_flight()
    }

    /// How many pings the lane may send now.
    fn room(&self, lane: Lane, now_ms: u64) -> usize {
        let share = match lane {
            Lane::Backfill => self.credit - self.credit / LIVE_SHARE_OF_CREDIT,
            Lane::Live => self.credit,
        };
        if self.credit == 0 && self.in_flight() == 0 && self.probe_ms <= now_ms {
            return 1;
        }
        share.saturating_sub(self.in_flight())
    }

    /// The first pings that wait for a lane and fit one batch, as indices into `held`.
    fn waiting(&self, lane: Lane, at_most: usize) -> Vec<usize> {
        let live_from = self.connection.live_from;
        let (first, end) = match lane {
            Lane::Live => (self.connection.live_next.max(live_from), u64::MAX),
            Lane::Backfill => (self.connection.backfill_next, live_from),
        };
        let from = self.held.partition_point(|held| held.ping.seq < first);
        let to = self
            .held
            .partition_point(|held| held.ping.seq < end)
            .max(from);
        let mut picked: Vec<usize> = Vec::new();
        for (at, held) in self.held.range(from..to).enumerate() {
            let seq = held.ping.seq;
            if picked.len() == at_most {
                break;
            }
            if held.is_in_flight || !self.connection.is_next_among_missing(seq) {
                continue;
            }
            if picked
                .first()
                .is_some_and(|&first| SPAN_OF_BATCH <= seq - self.held[first].ping.seq)
            {
                break;
            }
            picked.push(from + at);
        }
        picked
    }

    fn send_held(&mut self, lane: Lane, waiting: &[usize]) -> Option<v1::PingBatch> {
        let pings: Vec<Ping> = waiting.iter().map(|&at| self.held[at].ping).collect();
        let (batch, count) = self.encode(&pings)?;
        for &at in &waiting[..count] {
            self.held[at].is_in_flight = true;
        }
        let next = pings[count - 1].seq + 1;
        match lane {
            Lane::Backfill => self.connection.backfill_next = next,
            Lane::Live => self.connection.live_next = next,
        }
        self.connection.held_in_flight += count;
        self.connection.sent += count as u64;
        Some(batch)
    }

    fn send_repeats(&mut self, room: usize) -> Option<v1::PingBatch> {
        let mut pings: Vec<Ping> = Vec::new();
        for ping in self.repeats.iter().take(room) {
            let fits = pings.last().is_none_or(|previous| previous.seq < ping.seq)
                && pings
                    .first()
                    .is_none_or(|first| ping.seq - first.seq < SPAN_OF_BATCH);
            if !fits {
                break;
            }
            pings.push(*ping);
        }
        let (batch, count) = self.encode(&pings)?;
        for ping in self.repeats.drain(..count) {
            self.connection.sent += 1;
            self.connection
                .repeats_in_flight
                .push_back((self.connection.sent, ping));
        }
        Some(batch)
    }

    /// A batch of as many of these pings as fit one frame, and how many those are.
    fn encode(&self, pings: &[Ping]) -> Option<(v1::PingBatch, usize)> {
        let mut count = pings.len();
        while 0 < count {
            let batch = batch::encode(self.epoch, &pings[..count]);
            if count == 1 || batch.encoded_len() + FRAME_OVERHEAD_BYTES <= self.frame_bytes {
                return Some((batch, count));
            }
            count /= 2;
        }
        None
    }

    fn welcome(&mut self, welcome: v1::Welcome, now_ms: u64, events: &mut Vec<Event>) {
        if let Some(limits) = welcome.limits {
            self.frame_bytes = stated(limits.frame_bytes).unwrap_or(DEFAULT_FRAME_BYTES);
            self.batch_pings = stated(limits.batch_pings).unwrap_or(DEFAULT_BATCH_PINGS);
        }
        // The first Welcome comes before any answer to what this connection sends. If it covers what was
        // never sent, another queue has used our numbers: this one was put back from an older copy.
        let is_copy = !std::mem::replace(&mut self.connection.is_welcomed, true)
            && welcome.epoch == self.epoch
            && self.covers_unsent(&welcome);
        // Another store may by chance give out the number of our epoch. A batch that followed Hello at
        // once would then have been taken for its own, under numbers that we are about to give anew.
        let is_other_store = self.incarnation != welcome.incarnation;
        let is_ambiguous = is_other_store && welcome.epoch == self.epoch;
        self.incarnation = welcome.incarnation;
        events.push(Event::Welcomed {
            server_ms: welcome.server_ms,
            position: welcome.position,
        });
        let highest = welcome
            .ranges
            .iter()
            .fold(welcome.durable_upto, |high, range| high.max(range.last));
        let first_unused = if welcome.epoch == self.epoch {
            self.next_seq
        } else {
            1
        };
        if welcome.epoch == 0 || is_ambiguous || is_copy || first_unused <= highest {
            self.abandon_epoch();
            self.leave(LeaveReason::EpochTaken, events);
        } else {
            if welcome.epoch != self.epoch {
                self.renumber(welcome.epoch, events);
            }
            self.cover(welcome.durable_upto, &welcome.ranges, events);
        }
        if let Some(flow) = welcome.flow {
            self.obey(flow, now_ms, events);
        }
    }

    fn covers_unsent(&self, welcome: &v1::Welcome) -> bool {
        let floor = v1::SeqRange {
            first: 1,
            last: welcome.durable_upto,
        };
        std::iter::once(&floor).chain(&welcome.ranges).any(|range| {
            let from = self
                .held
                .partition_point(|held| held.ping.seq < range.first);
            self.held
                .range(from..)
                .take_while(|held| held.ping.seq <= range.last)
                .any(|held| !held.was_sent)
        })
    }

    fn ack(&mut self, ack: v1::Ack, now_ms: u64, events: &mut Vec<Event>) {
        if self.epoch == 0 || ack.epoch != self.epoch || ack.incarnation != self.incarnation {
            return;
        }
        let totals = Totals {
            accepted: ack.accepted,
            duplicate: ack.duplicate,
            filtered: ack.filtered,
            rejected: ack.rejected,
        };
        let (mut is_sparse, mut is_refused) = (false, false);
        for reject in &ack.rejects {
            let (seq, code, retryable) = (reject.seq, reject.code(), reject.retryable);
            events.push(Event::Rejected {
                seq,
                code,
                retryable,
            });
            if !retryable {
                self.settle(
                    SeqRange {
                        first: seq,
                        last: seq,
                    },
                    events,
                );
            } else if self.put_back(seq) {
                is_sparse |= code == RejectCode::TooSparse;
                is_refused |= code != RejectCode::TooSparse;
            }
        }
        if is_sparse {
            self.connection.missing = ack
                .missing
                .iter()
                .map(|range| SeqRange {
                    first: range.first,
                    last: range.last,
                })
                .collect();
        }
        self.cover(ack.durable_upto, &ack.ranges, events);
        // The number above the settled ones makes room for all others; if it is not held here, only the
        // next Hello can.
        if is_sparse
            && self
                .held
                .front()
                .is_some_and(|oldest| self.last_acked + 1 < oldest.ping.seq)
        {
            self.leave(LeaveReason::HolesToClose, events);
        }
        self.settle_repeats(totals.sum(), events);
        if self.connection.sent <= totals.sum() && self.put_back_all() && !self.is_sparse() {
            is_refused = true;
        }
        if let Some(flow) = ack.flow {
            self.obey(flow, now_ms, events);
        }
        if is_refused {
            let wait_ms = self.retry_after_ms.max(LEAST_RETRY_MS);
            self.not_before_ms = self.not_before_ms.max(now_ms.saturating_add(wait_ms));
        }
        events.push(Event::Acknowledged {
            receive_ms: ack.receive_ms,
            commit_ms: ack.commit_ms,
            position: ack.position,
            totals,
        });
    }

    fn abandon_epoch(&mut self) {
        self.epoch = 0;
        self.last_acked = 0;
    }

    fn renumber(&mut self, epoch: u32, events: &mut Vec<Event>) {
        self.epoch = epoch;
        let previous_seqs = self.held.iter().map(|held| held.ping.seq).collect();
        self.next_seq = 1;
        for held in &mut self.held {
            held.ping.seq = self.next_seq;
            held.is_in_flight = false;
            held.was_sent = false;
            self.next_seq += 1;
        }
        self.dropped_total = 0;
        self.last_acked = 0;
        self.repeats.clear();
        self.connection = Connection {
            is_welcomed: true,
            has_begun_epoch: true,
            ..Connection::default()
        };
        self.split_lanes();
        events.push(Event::Renumbered {
            epoch,
            previous_seqs,
        });
    }

    fn cover(&mut self, durable_upto: u64, ranges: &[v1::SeqRange], events: &mut Vec<Event>) {
        self.last_acked = self.last_acked.max(durable_upto);
        self.settle(
            SeqRange {
                first: 1,
                last: durable_upto,
            },
            events,
        );
        for range in ranges {
            self.settle(
                SeqRange {
                    first: range.first,
                    last: range.last,
                },
                events,
            );
        }
        self.settle_missing();
        if self.held.is_empty() {
            // A device that once had a backlog goes back to its usual size.
            self.held.shrink_to(USUAL_HELD);
        }
    }

    fn settle(&mut self, range: SeqRange, events: &mut Vec<Event>) {
        let to = self
            .held
            .partition_point(|held| held.ping.seq <= range.last);
        let from = self
            .held
            .partition_point(|held| held.ping.seq < range.first)
            .min(to);
        for held in self.held.drain(from..to) {
            self.connection.held_in_flight -= usize::from(held.is_in_flight);
            let seq = held.ping.seq;
            match events.last_mut() {
                Some(Event::Settled(run)) if run.last + 1 == seq => run.last = seq,
                _ => events.push(Event::Settled(SeqRange {
                    first: seq,
                    last: seq,
                })),
            }
        }
    }

    /// Everything that was sent has been answered: what is in flight all the same was refused, and the
    /// ack that said so got lost or is yet to come. Whether there was any.
    fn put_back_all(&mut self) -> bool {
        if self.connection.held_in_flight == 0 {
            return false;
        }
        for held in &mut self.held {
            held.was_sent |= std::mem::take(&mut held.is_in_flight);
        }
        self.connection.held_in_flight = 0;
        self.connection.live_next = 0;
        self.connection.backfill_next = 0;
        true
    }

    /// Repeats go out on LIVE alone and in order, so the running total tells which are answered.
    fn settle_repeats(&mut self, answered: u64, events: &mut Vec<Event>) {
        let in_flight = &mut self.connection.repeats_in_flight;
        while let Some((_, ping)) = in_flight.pop_front_if(|(sent, _)| *sent <= answered) {
            match events.last_mut() {
                Some(Event::Repeated(run)) if run.last + 1 == ping.seq => run.last = ping.seq,
                _ => events.push(Event::Repeated(SeqRange {
                    first: ping.seq,
                    last: ping.seq,
                })),
            }
        }
    }

    /// Drops the missing ranges of which nothing is held, and lets everything flow again after the last.
    fn settle_missing(&mut self) {
        if self.connection.missing.is_empty() {
            return;
        }
        let held = &self.held;
        self.connection.missing.retain(|range| {
            let at = held.partition_point(|held| held.ping.seq < range.first);
            held.get(at).is_some_and(|held| held.ping.seq <= range.last)
        });
        self.connection.live_next = 0;
        self.connection.backfill_next = 0;
    }

    /// Lets a ping wait again that was in flight. False if it was not.
    fn put_back(&mut self, seq: u64) -> bool {
        let Ok(at) = self.held.binary_search_by_key(&seq, |held| held.ping.seq) else {
            return false;
        };
        if !std::mem::take(&mut self.held[at].is_in_flight) {
            return false;
        }
        self.held[at].was_sent = true;
        self.connection.held_in_flight -= 1;
        self.connection.live_next = self.connection.live_next.min(seq);
        self.connection.backfill_next = self.connection.backfill_next.min(seq);
        true
    }

    fn obey(&mut self, flow: v1::Flow, now_ms: u64, events: &mut Vec<Event>) {
        self.credit = usize::try_from(flow.credit).unwrap_or(usize::MAX);
        self.min_interval_ms = flow.min_interval_ms.into();
        self.retry_after_ms = flow.retry_after_ms.into();
        self.probe_ms = now_ms.saturating_add(self.retry_after_ms.max(LEAST_RETRY_MS));
        if flow.go_away {
            self.return_after_ms = self.retry_after_ms;
            self.leave(LeaveReason::GoAway, events);
        }
    }

    fn leave(&mut self, reason: LeaveReason, events: &mut Vec<Event>) {
        if !std::mem::replace(&mut self.connection.is_leaving, true) {
            events.push(Event::Leaving(reason));
        }
    }
}

impl Connection {
    fn is_next_among_missing(&self, seq: u64) -> bool {
        self.missing.is_empty()
            || self
                .missing
                .iter()
                .any(|range| (range.first..=range.last).contains(&seq))
    }
}

fn stated(limit: u32) -> Option<usize> {
    usize::try_from(limit).ok().filter(|limit| 0 < *limit)
}

/// The frame limit until Welcome states it.
const DEFAULT_FRAME_BYTES: usize = 65_536;
/// The batch limit until Welcome states it, and the credit with it.
const DEFAULT_BATCH_PINGS: usize = 1_000;
/// What DeviceFrame puts around a batch: a tag and a length below 2^32.
const FRAME_OVERHEAD_BYTES: usize = 6;
/// A batch cannot reach this far above its first number.
const SPAN_OF_BATCH: u64 = 1 << 32;
/// BACKFILL leaves one part in so many of the credit to LIVE, so that a ping of now does not wait for a
/// batch of the past to be acknowledged.
const LIVE_SHARE_OF_CREDIT: usize = 4;
/// When the gateway refuses for now but names no time, and when it gives no credit.
const LEAST_RETRY_MS: u64 = 1_000;
/// Room for this many pings is kept when none is held.
const USUAL_HELD: usize = 4;

#[cfg(test)]
mod tests;
