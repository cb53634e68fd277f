//! Any operations on two connections of one device and their committer; for the fuzzer and for the replay
//! of its corpus.
//!
//! Says how much it got through, so that a corpus that reaches nothing is noticed.

use std::collections::HashSet;

use arbitrary::{Arbitrary, Unstructured};
use bytes::Bytes;
use prost::Message;
use waypost_proto::{
    batch,
    device::{Admission, Claim, DeviceRecord, LastStored, Policy},
    ping::{Ping, RejectCode},
    ranges::MAX_RANGES,
    session::{Grant, Granted, Lane, Limits, Request, Session, Settled, Step, Welcomed, batch_len},
    v1::{self, gateway_frame::Kind},
};

/// Something that happens to the gateway's side of one device.
#[derive(Debug, Arbitrary)]
enum Operation {
    Hello {
        connection: u8,
        is_backfill: bool,
        epoch: u8,
        oldest_unsent_seq: u64,
        last_acked: u16,
        is_foreign: bool,
    },
    /// Pings in the session's own epoch, or one beside it.
    Batch {
        connection: u8,
        is_backfill: bool,
        epoch_offset: i8,
        first_seq: u64,
        gaps: Vec<u8>,
        minutes_off: i16,
    },
    /// Any frame at all, also on a stream that has not said Hello.
    Frame {
        connection: u8,
        lane: Option<bool>,
        bytes: Vec<u8>,
    },
    Heartbeat {
        connection: u8,
    },
    CloseLane {
        connection: u8,
        is_backfill: bool,
    },
    GoAway {
        connection: u8,
    },
    Reconnect {
        connection: u8,
    },
    /// The committer answers so many requests with one commit, or puts their batches off.
    Commit {
        requests: u8,
        defers: bool,
    },
}

/// A number of operations. Gives the pings that were stored.
pub(crate) fn run(data: &[u8]) -> usize {
    let Ok(operations) = Vec::<Operation>::arbitrary_take_rest(Unstructured::new(data)) else {
        return 0;
    };
    let mut gateway = Gateway {
        record: DeviceRecord::default(),
        last_stored: None,
        connections: std::array::from_fn(|_| Connection::new()),
        waiting: Vec::new(),
        stored: HashSet::new(),
        now_ms: NOW_MS,
    };
    for operation in operations {
        gateway.apply(operation);
    }
    gateway.commit(usize::MAX, false);
    for connection in &gateway.connections {
        assert!(!connection.session.is_out_of_credit(), "all is answered");
    }
    gateway.stored.len()
}

struct Gateway {
    record: DeviceRecord,
    last_stored: Option<LastStored>,
    connections: [Connection; 2],
    waiting: Vec<(usize, u32, Lane, Request)>,
    stored: HashSet<(u32, u64)>,
    now_ms: u64,
}

struct Connection {
    /// Answers to an earlier one on this place are not for this one.
    generation: u32,
    session: Session,
    epoch: u32,
    pings: u64,
    accepted: u64,
}

impl Connection {
    fn new() -> Self {
        let limits = Limits {
            frame_bytes: 65_536,
            batch_pings: 50,
            credit_pings: 100,
        };
        Self {
            generation: 0,
            session: Session::new(limits, Bytes::from_static(STORE)),
            epoch: 0,
            pings: 0,
            accepted: 0,
        }
    }
}

impl Gateway {
    fn apply(&mut self, operation: Operation) {
        let place = |connection: u8| usize::from(connection % 2);
        match operation {
            Operation::Hello {
                connection,
                is_backfill,
                epoch,
                oldest_unsent_seq,
                last_acked,
                is_foreign,
            } => {
                let hello = v1::Hello {
                    epoch: epoch.into(),
                    oldest_unsent_seq,
                    last_acked: last_acked.into(),
                    lane: i32::from(is_backfill) + 1,
                    incarnation: Bytes::from_static(if is_foreign { b"other" } else { STORE }),
                    ..v1::Hello::default()
                };
                let kind = v1::device_frame::Kind::Hello(hello);
                self.frame(
                    place(connection),
                    None,
                    v1::DeviceFrame { kind: Some(kind) },
                );
            }
            Operation::Batch {
                connection,
                is_backfill,
                epoch_offset,
                first_seq,
                gaps,
                minutes_off,
            } => {
                let at = place(connection);
                let epoch = self.connections[at]
                    .epoch
                    .saturating_add_signed(epoch_offset.into());
                let time_ms = self
                    .now_ms
                    .saturating_add_signed(i64::from(minutes_off) * 60_000);
                let mut seq = first_seq.clamp(1, u64::MAX / 2);
                let mut pings = vec![Ping::at(seq, time_ms, 1, 2)];
                for gap in gaps {
                    seq += 1 + u64::from(gap);
                    pings.push(Ping::at(seq, time_ms, 1, 2));
                }
                let kind = v1::device_frame::Kind::Batch(batch::encode(epoch, &pings));
                let frame = v1::DeviceFrame { kind: Some(kind) };
                self.frame(at, Some(lane_of(is_backfill)), frame);
            }
            Operation::Frame {
                connection,
                lane,
                bytes,
            } => {
                if let Ok(frame) = v1::DeviceFrame::decode(&bytes[..]) {
                    self.frame(place(connection), lane.map(lane_of), frame);
                }
            }
            Operation::Heartbeat { connection } => {
                let kind = v1::device_frame::Kind::Heartbeat(v1::Heartbeat {});
                let frame = v1::DeviceFrame { kind: Some(kind) };
                self.frame(place(connection), Some(Lane::Live), frame);
            }
            Operation::CloseLane {
                connection,
                is_backfill,
            } => {
                let connection = &mut self.connections[place(connection)];
                connection.session.handle_lane_closed(lane_of(is_backfill));
            }
            Operation::GoAway { connection } => {
                self.connections[place(connection)].session.go_away(0)
            }
            Operation::Reconnect { connection } => self.reconnect(place(connection)),
            Operation::Commit { requests, defers } => self.commit(requests.into(), defers),
        }
    }

    fn reconnect(&mut self, at: usize) {
        self.connections[at] = Connection {
            generation: self.connections[at].generation + 1,
            ..Connection::new()
        };
    }

    fn frame(&mut self, at: usize, lane: Option<Lane>, frame: v1::DeviceFrame) {
        let connection = &mut self.connections[at];
        // The shell reads no more than this.
        if connection.session.is_out_of_credit() {
            return;
        }
        if let Some(v1::device_frame::Kind::Hello(hello)) = &frame.kind
            && lane.is_none()
        {
            connection.epoch = hello.epoch;
        }
        match connection.session.handle_frame(lane, frame) {
            Ok(Step::Ask(lane, request)) => {
                self.waiting
                    .push((at, connection.generation, lane, request));
            }
            Ok(Step::Renew(lane, _)) => {
                self.waiting
                    .push((at, connection.generation, lane, Request::Heartbeat));
            }
            Ok(Step::Answer(..) | Step::Export(..) | Step::Wait(_)) => {}
            Err(_) => self.reconnect(at),
        }
    }

    /// One commit, as the committer makes it.
    fn commit(&mut self, requests: usize, defers: bool) {
        self.now_ms += 1_000;
        let requests = requests.min(self.waiting.len());
        let taken: Vec<_> = self.waiting.drain(..requests).collect();
        for (at, generation, lane, request) in taken {
            let before = self.record.clone();
            self.record.contact(self.now_ms);
            match request {
                Request::Hello(claim) => self.hello(at, generation, lane, claim),
                Request::Batch { batch, .. } if batch.epoch != self.record.epoch => {
                    if self.connections[at].generation == generation {
                        self.reconnect(at);
                    }
                }
                Request::Batch { batch, .. } => {
                    let judgement = if defers {
                        let code = RejectCode::Overloaded;
                        self.record.defer(&batch.pings, &batch.malformed, code)
                    } else {
                        self.record.judge(
                            &batch.pings,
                            &batch.malformed,
                            self.now_ms,
                            &POLICY,
                            &mut self.last_stored,
                        )
                    };
                    for &at in &judgement.stored {
                        let is_new = self.stored.insert((batch.epoch, batch.pings[at].seq));
                        assert!(is_new, "stored twice");
                    }
                    let accepted = judgement.stored.len() as u64;
                    let sum = accepted
                        + judgement.duplicate
                        + judgement.filtered
                        + judgement.rejects.len() as u64;
                    assert_eq!(sum, batch_len(&batch).into(), "each ping has one fate");
                    let settled = Settled {
                        epoch: self.record.epoch,
                        pings: batch_len(&batch),
                        accepted,
                        duplicate: judgement.duplicate,
                        filtered: judgement.filtered,
                        rejects: judgement.rejects,
                        settled: self.record.settled.clone(),
                        receive_ms: self.now_ms,
                        commit_ms: self.now_ms,
                        position: 1,
                        retry_after_ms: 0,
                        is_paused: false,
                    };
                    self.settle(at, generation, settled, sum, accepted);
                }
                Request::Heartbeat => {
                    let settled = Settled {
                        epoch: self.record.epoch,
                        pings: 0,
                        accepted: 0,
                        duplicate: 0,
                        filtered: 0,
                        rejects: Vec::new(),
                        settled: self.record.settled.clone(),
                        receive_ms: self.now_ms,
                        commit_ms: self.now_ms,
                        position: 1,
                        retry_after_ms: 0,
                        is_paused: false,
                    };
                    self.settle(at, generation, settled, 0, 0);
                }
                Request::Control { id, .. } | Request::Checkers { id, .. } => {
                    let connection = &self.connections[at];
                    if connection.generation == generation {
                        let frame = connection.session.handle_granted(Granted {
                            id,
                            grant: Grant::Holds,
                        });
                        assert!(matches!(frame.kind, Some(Kind::ControlResult(_))));
                    }
                }
            }
            assert!(before.epoch <= self.record.epoch);
            assert!(self.record.settled.above().len() <= MAX_RANGES);
            assert_eq!(self.record.clocks, self.record.clocks.newest(before.clocks));
            if before.epoch == self.record.epoch {
                assert!(before.settled.floor() <= self.record.settled.floor());
                assert!(before.settled.highest() <= self.record.settled.highest());
            }
        }
    }

    fn hello(&mut self, at: usize, generation: u32, lane: Lane, claim: Claim) {
        let admission = self.record.admit(claim);
        let welcomed = Welcomed {
            admission,
            epoch: self.record.epoch,
            settled: self.record.settled.clone(),
            receive_ms: self.now_ms,
            position: 1,
            is_paused: false,
        };
        let connection = &mut self.connections[at];
        if connection.generation != generation {
            return;
        }
        match connection.session.handle_welcomed(&welcomed) {
            Ok((frame, waiting)) => {
                assert_ne!(admission, Admission::Fenced);
                assert!(matches!(frame.kind, Some(Kind::Welcome(_))));
                connection.epoch = self.record.epoch;
                let waiting = waiting.into_iter();
                self.waiting
                    .extend(waiting.map(|(lane, request)| (at, generation, lane, request)));
            }
            Err(_) => {
                assert_eq!(admission, Admission::Fenced, "on {lane:?}");
                self.reconnect(at);
            }
        }
    }

    fn settle(&mut self, at: usize, generation: u32, settled: Settled, pings: u64, accepted: u64) {
        let connection = &mut self.connections[at];
        if connection.generation != generation {
            return;
        }
        connection.pings += pings;
        connection.accepted += accepted;
        let frame = connection.session.handle_settled(vec![settled]);
        let Some(Kind::Ack(ack)) = frame.and_then(|frame| frame.kind) else {
            panic!("a request is answered with an ack");
        };
        assert_eq!(ack.accepted, connection.accepted);
        let sum = ack.accepted + ack.duplicate + ack.filtered + ack.rejected;
        assert_eq!(sum, connection.pings, "counts add up");
        for range in &ack.ranges {
            assert!(ack.durable_upto < range.first && range.first <= range.last);
            assert!(self.record.settled.contains(range.first));
            assert!(self.record.settled.contains(range.last));
        }
        for reject in &ack.rejects {
            assert_eq!(self.record.settled.contains(reject.seq), !reject.retryable);
        }
        let bytes = v1::GatewayFrame {
            kind: Some(Kind::Ack(ack)),
        };
        assert!(bytes.encoded_len() < MAX_FRAME_BYTES, "an ack fits a frame");
    }
}

fn lane_of(is_backfill: bool) -> Lane {
    if is_backfill {
        Lane::Backfill
    } else {
        Lane::Live
    }
}

const STORE: &[u8] = b"store";
const NOW_MS: u64 = 1_700_000_000_000;
const MAX_FRAME_BYTES: usize = 65_536;
const POLICY: Policy = Policy {
    retention_ms: 86_400_000,
    future_tolerance_ms: 300_000,
    least_interval_ms: 0,
    least_distance_m: 0.0,
};
