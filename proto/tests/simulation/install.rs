//! One install of a device's app: the real [`Outbox`] and the shell around it.
//!
//! Knows streams and patience, as the load test's device does. Must not know the gateway; decides nothing
//! about pings, but remembers which ping each number names.

use std::{collections::BTreeMap, num::NonZeroUsize};

use bytes::{Bytes, BytesMut};
use waypost_proto::{
    frame::{FrameReader, encode_frame},
    outbox::{Event, LeaveReason, Outbox},
    ping::Ping,
    session::{CloseCode, Lane},
    v1::{self, device_frame::Kind},
};

use crate::{
    history::{Entry, LinkId, Name, name_of},
    world::StreamId,
};

pub(crate) struct Install {
    pub(crate) device: u32,
    pub(crate) link: Option<LinkId>,
    pub(crate) owes_heartbeat: bool,
    /// How often it took itself for a copy, or its epoch for that of another queue.
    pub(crate) epochs_taken: u64,
    outbox: Outbox,
    /// What is held, by its current number.
    names: BTreeMap<u64, Name>,
    /// Settled in the outbox's current epoch and store, to be sent again.
    repeatable: Vec<Ping>,
    payloads: BTreeMap<Name, Ping>,
    next_seq: u64,
    streams: Vec<DeviceStream>,
    owed_since_ms: Option<u64>,
    saved: Option<(Outbox, BTreeMap<u64, Name>, u64)>,
    /// When the shell wants to be woken.
    alarm_ms: Option<u64>,
}

struct DeviceStream {
    reader: FrameReader,
    is_finished: bool,
    is_ended: bool,
}

/// Something for the world to do.
pub(crate) enum Wish {
    Write(StreamId, Bytes),
    Finish(StreamId),
    Close,
}

impl std::fmt::Debug for Install {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "device {}: {:?}", self.device, self.outbox)
    }
}

impl Install {
    pub(crate) fn new(device: u32, capacity: u64) -> Self {
        Self {
            device,
            link: None,
            owes_heartbeat: false,
            epochs_taken: 0,
            outbox: new_outbox(capacity),
            names: BTreeMap::new(),
            repeatable: Vec::new(),
            payloads: BTreeMap::new(),
            next_seq: 1,
            streams: Vec::new(),
            owed_since_ms: None,
            saved: None,
            alarm_ms: None,
        }
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.outbox.is_settled()
    }

    /// At the end only those come back that have something to say.
    pub(crate) fn wants_connection(&self, is_healing: bool) -> bool {
        !is_healing || !self.is_settled()
    }

    pub(crate) fn retry_after_ms(&self) -> u64 {
        self.outbox.retry_after_ms()
    }

    /// Takes in a ping, after leaving out some numbers. True if another had to go.
    pub(crate) fn push(&mut self, ping: Ping, gap: u64, history: &mut Vec<Entry>) -> bool {
        let name = name_of(&ping);
        let pushed = if gap == 0 {
            self.outbox.push(ping)
        } else {
            let seq = self.next_seq + gap;
            self.outbox.push_numbered(Ping { seq, ..ping }).unwrap()
        };
        self.next_seq = pushed.seq + 1;
        history.push(Entry::Pushed { name, ping });
        self.payloads.insert(name, ping);
        assert!(self.names.insert(pushed.seq, name).is_none());
        if let Some(dropped) = pushed.dropped {
            let (oldest, name) = self.names.pop_first().unwrap();
            assert_eq!(oldest, dropped, "the oldest is dropped");
            history.push(Entry::Dropped { name });
        }
        pushed.dropped.is_some()
    }

    /// Sends one more time what was settled, as a device with a bad memory does.
    pub(crate) fn push_again(&mut self) {
        if let Some(ping) = self.repeatable.pop() {
            self.outbox.push_again(ping);
        }
    }

    pub(crate) fn connected(&mut self, link: LinkId, now_ms: u64) {
        self.link = Some(link);
        self.outbox.connected();
        self.streams.clear();
        self.owed_since_ms = Some(now_ms);
    }

    pub(crate) fn disconnected(&mut self, code: Option<CloseCode>, forgets: bool, now_ms: u64) {
        if forgets {
            self.forget_in_flight(now_ms);
        }
        self.link = None;
        if code == Some(CloseCode::FencedEpoch) {
            self.outbox.fenced();
        }
        self.outbox.disconnected();
    }

    /// Sets the one alarm. True if that is news.
    pub(crate) fn set_alarm(&mut self, at_ms: u64, now_ms: u64) -> bool {
        let is_news = self
            .alarm_ms
            .is_none_or(|alarm_ms| alarm_ms <= now_ms || at_ms < alarm_ms);
        if is_news {
            self.alarm_ms = Some(at_ms);
        }
        is_news
    }

    /// What the device may send now, and when it wants to be asked again.
    pub(crate) fn fill(&mut self, now_ms: u64) -> (Vec<Wish>, Option<u64>) {
        let mut wishes = Vec::new();
        if self.outbox.must_reconnect() {
            return (vec![Wish::Close], None);
        }
        if self.streams.is_empty() {
            self.open(Lane::Live, now_ms, &mut wishes);
        }
        if std::mem::take(&mut self.owes_heartbeat) {
            let heartbeat = Kind::Heartbeat(v1::Heartbeat {});
            self.queue(0, heartbeat, &mut wishes);
        }
        while let Some(batch) = self.outbox.poll_batch(Lane::Live, now_ms) {
            self.queue(0, Kind::Batch(batch), &mut wishes);
        }
        let last = self.streams.len() - 1;
        let has_backfill = last > 0 && !self.streams[last].is_ended;
        if has_backfill && !self.streams[last].is_finished {
            while let Some(batch) = self.outbox.poll_batch(Lane::Backfill, now_ms) {
                self.queue(last, Kind::Batch(batch), &mut wishes);
            }
            if !self.outbox.has_backlog() {
                self.streams[last].is_finished = true;
                wishes.push(Wish::Finish(id(last)));
            }
        } else if !has_backfill && self.outbox.has_backlog() {
            self.open(Lane::Backfill, now_ms, &mut wishes);
            let (more, wake_ms) = self.fill(now_ms);
            wishes.extend(more);
            return (wishes, wake_ms);
        }
        let is_owed = !self.outbox.is_welcomed() || 0 < self.outbox.in_flight();
        self.owed_since_ms = is_owed.then(|| self.owed_since_ms.unwrap_or(now_ms));
        let give_up_ms = self.owed_since_ms.map(|since_ms| since_ms + PATIENCE_MS);
        if give_up_ms.is_some_and(|at_ms| at_ms <= now_ms) {
            wishes.push(Wish::Close);
        }
        let wake_ms = self.outbox.poll_timeout(now_ms);
        (wishes, wake_ms.into_iter().chain(give_up_ms).min())
    }

    /// Something of a stream has arrived, or its end.
    pub(crate) fn receive(
        &mut self,
        at: StreamId,
        bytes: Option<Bytes>,
        now_ms: u64,
        history: &mut Vec<Entry>,
    ) {
        let stream = &mut self.streams[usize::try_from(at).unwrap()];
        let Some(bytes) = bytes else {
            stream.is_ended = true;
            return;
        };
        stream.reader.extend(&bytes);
        let mut frames = Vec::new();
        while let Some(frame) = stream.reader.next().expect("the gateway writes frames") {
            frames.push(frame);
        }
        for frame in frames {
            self.owed_since_ms = None;
            for event in self.outbox.handle(frame, now_ms) {
                self.observe(event, history);
            }
            assert_eq!(self.names.len(), self.outbox.held());
        }
    }

    pub(crate) fn save(&mut self) {
        self.saved = Some((self.outbox.clone(), self.names.clone(), self.next_seq));
    }

    pub(crate) fn is_saved(&self) -> bool {
        self.saved.is_some()
    }

    /// The state of an earlier time comes back, and does not know what happened since.
    /// Its shell knows that, and asks for an epoch of its own.
    pub(crate) fn restore(&mut self, keeps_epoch: bool, history: &mut Vec<Entry>) {
        let (outbox, names, next_seq) = self.saved.clone().unwrap();
        let wiped = self
            .names
            .values()
            .filter(|&name| !names.values().any(|kept| kept == name));
        history.extend(wiped.map(|&name| Entry::Wiped { name }));
        self.outbox = outbox;
        self.outbox.disconnected();
        if !keeps_epoch {
            self.outbox.fenced();
        }
        self.names = names;
        self.next_seq = next_seq;
        self.repeatable.clear();
    }

    pub(crate) fn wipe(&mut self, capacity: u64, history: &mut Vec<Entry>) {
        let names = std::mem::take(&mut self.names).into_values();
        history.extend(names.map(|name| Entry::Wiped { name }));
        self.outbox = new_outbox(capacity);
        self.next_seq = 1;
        self.repeatable.clear();
    }

    fn open(&mut self, lane: Lane, now_ms: u64, wishes: &mut Vec<Wish>) {
        let hello = self.outbox.hello(lane, now_ms);
        if let Some((&oldest, _)) = self.names.first_key_value() {
            assert!(
                hello.oldest_unsent_seq <= oldest,
                "what is held is not given up"
            );
        }
        self.streams.push(DeviceStream {
            reader: FrameReader::new(FRAME_BYTES),
            is_finished: false,
            is_ended: false,
        });
        self.queue(self.streams.len() - 1, Kind::Hello(hello), wishes);
    }

    fn queue(&self, at: usize, kind: Kind, wishes: &mut Vec<Wish>) {
        let mut bytes = BytesMut::new();
        encode_frame(&v1::DeviceFrame { kind: Some(kind) }, &mut bytes);
        wishes.push(Wish::Write(id(at), bytes.freeze()));
    }

    fn observe(&mut self, event: Event, history: &mut Vec<Entry>) {
        match event {
            Event::Settled(range) => {
                for seq in range.first..=range.last {
                    let name = self
                        .names
                        .remove(&seq)
                        .expect("only what was held is settled");
                    history.push(Entry::Forgotten { name });
                    self.repeatable.push(Ping {
                        seq,
                        ..self.payloads[&name]
                    });
                }
            }
            Event::Renumbered { previous_seqs, .. } => {
                assert!(self.names.keys().eq(&previous_seqs));
                self.names = (1..)
                    .zip(std::mem::take(&mut self.names).into_values())
                    .collect();
                self.next_seq = previous_seqs.len() as u64 + 1;
                self.repeatable.clear();
            }
            Event::Leaving(LeaveReason::EpochTaken) => self.epochs_taken += 1,
            Event::Leaving(_)
            | Event::Welcomed { .. }
            | Event::Repeated(_)
            | Event::Rejected { .. }
            | Event::Acknowledged { .. }
            | Event::ControlAnswered { .. } => {}
        }
    }
}

impl Install {
    /// What [`crate::gateway::Sabotage::ForgetAtCut`] does: it takes for acknowledged what was only sent.
    fn forget_in_flight(&mut self, now_ms: u64) {
        let told = self.outbox.hello(Lane::Live, now_ms);
        if self.outbox.in_flight() == 0 || told.epoch == 0 {
            return;
        }
        let made_up = v1::Ack {
            epoch: told.epoch,
            incarnation: told.incarnation,
            durable_upto: told.next_seq - 1,
            ..v1::Ack::default()
        };
        let kind = Some(v1::gateway_frame::Kind::Ack(made_up));
        self.outbox.handle(v1::GatewayFrame { kind }, now_ms);
        self.names.clear();
    }
}

fn new_outbox(capacity: u64) -> Outbox {
    Outbox::new(NonZeroUsize::new(usize::try_from(capacity).unwrap()).unwrap())
}

fn id(at: usize) -> StreamId {
    StreamId::try_from(at).unwrap()
}

/// Larger than any frame of the gateway.
const FRAME_BYTES: usize = 65_536;
/// How long the gateway may owe an answer.
const PATIENCE_MS: u64 = 30_000;
