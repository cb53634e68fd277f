//! The gateway's half of the device protocol: one connection, from its frames to its acks.
//!
//! Knows which frame may come when, and what is answered. Must not know streams, queues or clocks: the
//! shell passes frames in, takes [`Request`]s to the committer, and brings the answers back. Dedup is
//! not decided here but in [`crate::device`], once for all connections of a device.

use bytes::Bytes;
use prost::Message;

use crate::{
    batch::{self, BatchError, DecodedBatch},
    device::{Admission, Claim, is_retryable},
    frame::FrameError,
    id::is_checker_name,
    ping::RejectCode,
    ranges::{RangeSet, SeqRange},
    terms::{Density, Terms},
    v1::{self, Precision, control_result::Outcome},
};

/// One of a device's two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// What happens now; served first.
    Live,
    /// What has queued up.
    Backfill,
}

impl Lane {
    /// Both, in the order they are served.
    pub const ALL: [Self; 2] = [Self::Live, Self::Backfill];
}

/// What the gateway accepts on a connection. Told in Welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest frame, its length prefix not counted.
    pub frame_bytes: u32,
    /// Most pings in a batch.
    pub batch_pings: u32,
    /// Most pings in flight: read, but not yet committed.
    pub credit_pings: u32,
}

/// A breach of the protocol: the connection is closed with its [`CloseCode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The stream's bytes are no frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A batch cannot be attributed to sequence numbers or is too large.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// Hello named no lane that there is.
    #[error("Hello names no lane that there is")]
    NoLane,
    /// The holder asked for a precision that this version does not know. Storing exact positions instead
    /// would be worse than storing none.
    #[error("Hello asks for a precision that this gateway does not know")]
    UnknownPrecision,
    /// Something came before Hello.
    #[error("the first frame of a stream must be Hello")]
    HelloExpected,
    /// Hello came twice on a stream.
    #[error("Hello came twice on one stream")]
    HelloRepeated,
    /// Another stream of this connection carries the lane.
    #[error("another stream of this connection carries this lane")]
    LaneInUse,
    /// Another queue of this device has a later epoch.
    #[error("epoch {named} is not the current one")]
    Fenced {
        /// The epoch in the frame.
        named: u32,
    },
}

/// Application error codes of the wire contract; see `device.proto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "documented for device authors in device.proto")]
pub enum CloseCode {
    NoError = 0x00,
    BadFrame = 0x01,
    FrameTooLarge = 0x02,
    BatchTooLarge = 0x03,
    HelloExpected = 0x04,
    LaneInUse = 0x05,
    FencedEpoch = 0x06,
    TakenOver = 0x07,
    FirstFrameTimeout = 0x08,
    FrameTimeout = 0x09,
    BadIdentity = 0x0a,
    Revoked = 0x0b,
    Overloaded = 0x0c,
    ShuttingDown = 0x0d,
    StorageFailed = 0x0e,
    NotReading = 0x0f,
    Erased = 0x10,
    Expired = 0x11,
}

impl CloseCode {
    /// The code for a number read off the wire.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            0x00 => Self::NoError,
            0x01 => Self::BadFrame,
            0x02 => Self::FrameTooLarge,
            0x03 => Self::BatchTooLarge,
            0x04 => Self::HelloExpected,
            0x05 => Self::LaneInUse,
            0x06 => Self::FencedEpoch,
            0x07 => Self::TakenOver,
            0x08 => Self::FirstFrameTimeout,
            0x09 => Self::FrameTimeout,
            0x0a => Self::BadIdentity,
            0x0b => Self::Revoked,
            0x0c => Self::Overloaded,
            0x0d => Self::ShuttingDown,
            0x0e => Self::StorageFailed,
            0x0f => Self::NotReading,
            0x10 => Self::Erased,
            0x11 => Self::Expired,
            _ => return None,
        })
    }

    /// Its name in metrics and logs: the wire contract's, in lower case.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::NoError => "no_error",
            Self::BadFrame => "bad_frame",
            Self::FrameTooLarge => "frame_too_large",
            Self::BatchTooLarge => "batch_too_large",
            Self::HelloExpected => "hello_expected",
            Self::LaneInUse => "lane_in_use",
            Self::FencedEpoch => "fenced_epoch",
            Self::TakenOver => "taken_over",
            Self::FirstFrameTimeout => "first_frame_timeout",
            Self::FrameTimeout => "frame_timeout",
            Self::BadIdentity => "bad_identity",
            Self::Revoked => "revoked",
            Self::Overloaded => "overloaded",
            Self::ShuttingDown => "shutting_down",
            Self::StorageFailed => "storage_failed",
            Self::NotReading => "not_reading",
            Self::Erased => "erased",
            Self::Expired => "expired",
        }
    }
}

impl Violation {
    /// The code the connection is closed with.
    #[must_use]
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Frame(FrameError::TooLarge { .. }) => CloseCode::FrameTooLarge,
            Self::Batch(BatchError::TooManyPings { .. }) => CloseCode::BatchTooLarge,
            Self::Frame(_)
            | Self::Batch(_)
            | Self::Truncated
            | Self::NoLane
            | Self::UnknownPrecision => CloseCode::BadFrame,
            Self::HelloExpected | Self::HelloRepeated => CloseCode::HelloExpected,
            Self::LaneInUse => CloseCode::LaneInUse,
            Self::Fenced { .. } => CloseCode::FencedEpoch,
        }
    }
}

/// What the committer is asked to do. Each request is a contact.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Admit the device's queue; answered with [`Welcomed`].
    Hello(Claim),
    /// Judge and store a batch; answered with [`Settled`].
    Batch {
        /// Its pings, no more exact than the holder wants.
        batch: DecodedBatch,
        /// The same as a `PingBatch` message: what is stored if every ping is. Made here, where many
        /// connections can work side by side, and not by the one committer.
        columns: Vec<u8>,
        /// How dense they may be stored, if the holder is stricter than the operator.
        density: Density,
    },
    /// Only a sign of life; answered with [`Settled`].
    Heartbeat,
    /// What the holder wants; answered with [`Granted`].
    Control {
        /// The device's name for it.
        id: u64,
        /// What is wanted.
        wish: Wish,
    },
    /// Which checkers may be told of the user; answered with [`Granted`].
    Checkers {
        /// The device's name for it.
        id: u64,
        /// What is wanted.
        wish: CheckerWish,
    },
}

/// What a holder may want of the gateway, for all devices of the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing is kept and nothing is told until the holder resumes.
    Pause,
    /// Share again.
    Resume,
    /// Remove everything that is held on the user, for ever.
    Erase,
}

/// What a holder may want of who is told of the user. Names are such as a checker can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckerWish {
    /// Only to know who is.
    Show,
    /// This one may be told from now on.
    Grant(String),
    /// This one may be told no more.
    Withdraw(String),
}

/// What follows from a frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Ask the committer, on behalf of this lane.
    Ask(Lane, Request),
    /// Answer the device on this lane.
    Answer(Lane, v1::GatewayFrame),
    /// Send everything that is held on the user, on a stream of its own; the device's name for it, and how it is written.
    Export(Lane, u64, v1::control::Format),
    /// Hello is kept until the other lane's has been answered; nothing to do.
    Wait(Lane),
    /// Answer the device on this lane with its next certificate, for the key of this request (PKCS #10, DER), then
    /// ask the committer for [`Request::Heartbeat`].
    Renew(Lane, Bytes),
}

/// The committer's answer to [`Request::Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcomed {
    /// How the device's claim was taken.
    pub admission: Admission,
    /// The epoch that holds from now on.
    pub epoch: u32,
    /// What is settled in it.
    pub settled: RangeSet,
    /// When Hello was received.
    pub receive_ms: u64,
    /// The commit that holds it.
    pub position: u64,
    /// Whether the holder has paused.
    pub is_paused: bool,
}

/// The answer to [`Request::Control`] and [`Request::Checkers`].
#[derive(Clone, Debug, PartialEq)]
pub struct Granted {
    /// The device's name for it.
    pub id: u64,
    /// What became of it.
    pub grant: Grant,
}

/// What became of a holder's wish.
#[derive(Clone, Debug, PartialEq)]
pub enum Grant {
    /// It holds, durably.
    Holds,
    /// Nothing is left of the user, and nothing more is taken: the connection ends.
    Erased(v1::Receipt),
    /// As many erasures are under way as the gateway takes at a time. Nothing has changed.
    TryLater,
    /// These are the checkers that the holder has ever granted, by name, durably.
    Checkers(Vec<v1::CheckerGrant>),
    /// No checker has this name. Nothing has changed.
    UnknownChecker,
    /// The gateway cannot read who the checkers are. Nothing has changed.
    Unreadable,
}

/// The committer's answer to [`Request::Batch`] and [`Request::Heartbeat`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The device's epoch at that commit: what `settled` and `rejects` count in. Not always that of the
    /// session, since a heartbeat of an older connection may come after the Hello of a newer one.
    pub epoch: u32,
    /// How many pings the request held.
    pub pings: u32,
    /// How many were stored.
    pub accepted: u64,
    /// How many were settled before.
    pub duplicate: u64,
    /// How many the thinning rule left out.
    pub filtered: u64,
    /// The refused ones.
    pub rejects: Vec<(u64, RejectCode)>,
    /// What is settled in the epoch now.
    pub settled: RangeSet,
    /// When the request was received.
    pub receive_ms: u64,
    /// The commit's time stamp.
    pub commit_ms: u64,
    /// The commit.
    pub position: u64,
    /// How long the device should wait before it sends more; 0 when it need not.
    pub retry_after_ms: u32,
    /// Whether the holder has paused.
    pub is_paused: bool,
}

/// One connection of a device.
#[derive(Debug)]
pub struct Session {
    limits: Limits,
    incarnation: Bytes,
    /// The device's epoch: claimed in Hello, then as Welcome confirmed it.
    epoch: Option<u32>,
    /// Whether the first Hello has been answered.
    is_welcomed: bool,
    /// Hellos that came before the first one's answer, at most one a lane. They must not be judged on
    /// their own, or a device that asks for an epoch on both lanes would get two.
    waiting_hellos: Vec<(Lane, Claim)>,
    open: [bool; 2],
    /// The strictest that a Hello of this connection has named.
    terms: Terms,
    totals: Totals,
    pings_in_flight: u32,
    /// Set when the gateway is about to stop: when the device may come back.
    return_after_ms: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    accepted: u64,
    duplicate: u64,
    filtered: u64,
    rejected: u64,
}

impl Session {
    /// A connection that has said nothing yet.
    #[must_use]
    pub fn new(limits: Limits, incarnation: Bytes) -> Self {
        Self {
            limits,
            incarnation,
            epoch: None,
            is_welcomed: false,
            waiting_hellos: Vec::new(),
            open: [false; 2],
            terms: Terms::default(),
            totals: Totals::default(),
            pings_in_flight: 0,
            return_after_ms: None,
        }
    }

    /// Takes one frame. `lane` is what the stream's Hello named, `None` before it.
    ///
    /// # Errors
    /// When the frame breaks the protocol; the connection must then be closed.
    pub fn handle_frame(
        &mut self,
        lane: Option<Lane>,
        frame: v1::DeviceFrame,
    ) -> Result<Step, Violation> {
        use v1::device_frame::Kind;
        match (lane, frame.kind) {
            (None, Some(Kind::Hello(hello))) => self.handle_hello(&hello),
            (None, _) => Err(Violation::HelloExpected),
            (Some(_), Some(Kind::Hello(_))) => Err(Violation::HelloRepeated),
            (Some(lane), Some(Kind::Batch(wire))) => {
                // Whoever asked for an epoch has none before Welcome.
                if wire.epoch == 0 || Some(wire.epoch) != self.epoch {
                    return Err(Violation::Fenced { named: wire.epoch });
                }
                let mut batch = batch::decode(&wire, self.limits.batch_pings as usize)?;
                self.pings_in_flight += batch_len(&batch);
                let columns = if self.terms.precision == Precision::Exact {
                    wire.encode_to_vec()
                } else {
                    batch
                        .pings
                        .iter_mut()
                        .for_each(|ping| self.terms.coarsen(ping));
                    batch::encode(batch.epoch, &batch.pings).encode_to_vec()
                };
                let request = Request::Batch {
                    batch,
                    columns,
                    density: self.terms.density,
                };
                Ok(Step::Ask(lane, request))
            }
            // A kind of frame from the future says at least that somebody is there.
            (Some(lane), Some(Kind::Heartbeat(_)) | None) => {
                Ok(Step::Ask(lane, Request::Heartbeat))
            }
            (Some(lane), Some(Kind::Renew(renew))) => {
                Ok(Step::Renew(lane, renew.certificate_request))
            }
            (Some(lane), Some(Kind::Control(v1::Control { id, action }))) => {
                use v1::control::Action;
                let named = |name: String, wish: fn(String) -> CheckerWish| {
                    if is_checker_name(&name) {
                        let wish = wish(name);
                        Step::Ask(lane, Request::Checkers { id, wish })
                    } else {
                        Step::Answer(lane, result(id, Outcome::UnknownChecker))
                    }
                };
                let wish = match action {
                    Some(Action::ShowCheckers(_)) => {
                        let wish = CheckerWish::Show;
                        return Ok(Step::Ask(lane, Request::Checkers { id, wish }));
                    }
                    Some(Action::GrantChecker(v1::control::GrantChecker { name })) => {
                        return Ok(named(name, CheckerWish::Grant));
                    }
                    Some(Action::WithdrawChecker(v1::control::WithdrawChecker { name })) => {
                        return Ok(named(name, CheckerWish::Withdraw));
                    }
                    Some(Action::Pause(_)) => Wish::Pause,
                    Some(Action::Resume(_)) => Wish::Resume,
                    Some(Action::Erase(_)) => Wish::Erase,
                    Some(Action::Export(v1::control::Export { format })) => {
                        return Ok(match v1::control::Format::try_from(format) {
                            Ok(format) => Step::Export(lane, id, format),
                            Err(_) => Step::Answer(lane, result(id, Outcome::NotSupported)),
                        });
                    }
                    None => {
                        let frame = result(id, Outcome::NotSupported);
                        return Ok(Step::Answer(lane, frame));
                    }
                };
                Ok(Step::Ask(lane, Request::Control { id, wish }))
            }
        }
    }

    /// Takes the answer to a Hello. Returns what to write to the device, and the Hellos that have waited
    /// for this.
    ///
    /// # Errors
    /// When the device's queue is fenced.
    pub fn handle_welcomed(
        &mut self,
        welcomed: &Welcomed,
    ) -> Result<(v1::GatewayFrame, Vec<(Lane, Request)>), Violation> {
        if welcomed.admission == Admission::Fenced {
            return Err(Violation::Fenced {
                named: self.epoch.unwrap_or_default(),
            });
        }
        self.epoch = Some(welcomed.epoch);
        self.is_welcomed = true;
        let waiting = std::mem::take(&mut self.waiting_hellos)
            .into_iter()
            .map(|(lane, claim)| (lane, Request::Hello(self.join(claim))))
            .collect();
        let welcome = v1::Welcome {
            epoch: welcomed.epoch,
            ranges: to_wire(welcomed.settled.above().iter().copied()),
            durable_upto: welcomed.settled.floor(),
            limits: Some(v1::Limits {
                frame_bytes: self.limits.frame_bytes,
                batch_pings: self.limits.batch_pings,
                ranges: u32::try_from(crate::ranges::MAX_RANGES).unwrap_or(u32::MAX),
            }),
            flow: Some(self.flow(0)),
            server_ms: welcomed.receive_ms,
            incarnation: self.incarnation.clone(),
            position: welcomed.position,
            paused: welcomed.is_paused,
        };
        Ok((
            v1::GatewayFrame {
                kind: Some(v1::gateway_frame::Kind::Welcome(welcome)),
            },
            waiting,
        ))
    }

    /// Takes what one commit settled for one lane, in the order it was asked, and makes one ack of it.
    /// `None` when there is nothing to acknowledge.
    pub fn handle_settled(&mut self, settled: Vec<Settled>) -> Option<v1::GatewayFrame> {
        let epoch = settled.last()?.epoch;
        let mut rejects = Vec::new();
        let mut is_too_sparse = false;
        let mut retry_after_ms = 0;
        let mut newest: Option<Settled> = None;
        for mut one in settled {
            retry_after_ms = retry_after_ms.max(one.retry_after_ms);
            self.pings_in_flight = self.pings_in_flight.saturating_sub(one.pings);
            self.totals.accepted += one.accepted;
            self.totals.duplicate += one.duplicate;
            self.totals.filtered += one.filtered;
            self.totals.rejected += one.rejects.len() as u64;
            if one.epoch != epoch {
                one.rejects.clear();
            }
            is_too_sparse |= one
                .rejects
                .iter()
                .any(|(_, code)| *code == RejectCode::TooSparse);
            rejects.extend(one.rejects.drain(..).map(|(seq, code)| v1::Reject {
                seq,
                code: code.into(),
                retryable: is_retryable(code),
            }));
            newest = Some(one);
        }
        let newest = newest?;
        let missing = if is_too_sparse {
            to_wire(newest.settled.missing())
        } else {
            Vec::new()
        };
        let ack = v1::Ack {
            epoch,
            incarnation: self.incarnation.clone(),
            durable_upto: newest.settled.floor(),
            ranges: to_wire(newest.settled.above().iter().copied()),
            level: v1::Level::Fsynced.into(),
            accepted: self.totals.accepted,
            duplicate: self.totals.duplicate,
            filtered: self.totals.filtered,
            rejected: self.totals.rejected,
            rejects,
            receive_ms: newest.receive_ms,
            commit_ms: newest.commit_ms,
            position: newest.position,
            flow: Some(self.flow(retry_after_ms)),
            missing,
            paused: newest.is_paused,
        };
        Some(v1::GatewayFrame {
            kind: Some(v1::gateway_frame::Kind::Ack(ack)),
        })
    }

    /// Takes the answer to what the holder wanted.
    #[must_use]
    pub fn handle_granted(&self, granted: Granted) -> v1::GatewayFrame {
        let id = granted.id;
        let done = v1::ControlResult {
            id,
            outcome: Outcome::Done.into(),
            ..v1::ControlResult::default()
        };
        match granted.grant {
            Grant::Holds => answer(done),
            Grant::Erased(receipt) => answer(v1::ControlResult {
                receipt: Some(receipt),
                ..done
            }),
            Grant::Checkers(checkers) => answer(v1::ControlResult { checkers, ..done }),
            Grant::TryLater | Grant::Unreadable => result(id, Outcome::TryLater),
            Grant::UnknownChecker => result(id, Outcome::UnknownChecker),
        }
    }

    /// A stream is done: its lane may be opened again.
    pub fn handle_lane_closed(&mut self, lane: Lane) {
        self.waiting_hellos.retain(|(waiting, _)| *waiting != lane);
        self.open[lane as usize] = false;
    }

    /// From now on every answer tells the device that the gateway is about to stop, and that it should come
    /// back no sooner than after `return_after_ms`.
    pub fn go_away(&mut self, return_after_ms: u32) {
        self.return_after_ms = Some(return_after_ms);
    }

    /// The same for a device that waits for no answer. `None` if it may come back at once, or does not expect
    /// anything yet.
    #[must_use]
    pub fn farewell(&self) -> Option<v1::GatewayFrame> {
        let flow = self.flow(0);
        (self.is_welcomed && flow.go_away && 0 < flow.retry_after_ms).then_some(v1::GatewayFrame {
            kind: Some(v1::gateway_frame::Kind::Flow(flow)),
        })
    }

    /// Whether the first Hello has been answered. What was settled before is early data: no ack may leave
    /// until then.
    #[must_use]
    pub fn is_welcomed(&self) -> bool {
        self.is_welcomed
    }

    /// Whether the device has used up its credit: read no more until something is settled.
    #[must_use]
    pub fn is_out_of_credit(&self) -> bool {
        self.limits.credit_pings <= self.pings_in_flight
    }

    fn handle_hello(&mut self, hello: &v1::Hello) -> Result<Step, Violation> {
        let lane = match hello.lane() {
            v1::Lane::Live => Lane::Live,
            v1::Lane::Backfill => Lane::Backfill,
            v1::Lane::Unspecified => return Err(Violation::NoLane),
        };
        let Ok(precision) = Precision::try_from(hello.precision) else {
            return Err(Violation::UnknownPrecision);
        };
        if std::mem::replace(&mut self.open[lane as usize], true) {
            return Err(Violation::LaneInUse);
        }
        self.terms = self.terms.stricter(Terms {
            precision,
            density: Density {
                least_interval_ms: hello.least_interval_ms,
                least_distance_m: hello.least_distance_m,
            },
        });
        let claim = Claim {
            epoch: hello.epoch,
            oldest_unsent_seq: hello.oldest_unsent_seq,
            last_acked: hello.last_acked,
            is_foreign: !hello.incarnation.is_empty() && hello.incarnation != self.incarnation,
        };
        match (self.epoch, self.is_welcomed) {
            (None, _) => {
                self.epoch = Some(claim.epoch);
                Ok(Step::Ask(lane, Request::Hello(claim)))
            }
            (Some(_), false) => {
                self.waiting_hellos.push((lane, claim));
                Ok(Step::Wait(lane))
            }
            (Some(_), true) => {
                let claim = self.join(claim);
                Ok(Step::Ask(lane, Request::Hello(claim)))
            }
        }
    }

    /// The claim of a later Hello on a connection that has its epoch. One that was written before the
    /// device could read Welcome names the old epoch, or none, or that of another store; what it says of
    /// that is void.
    fn join(&self, claim: Claim) -> Claim {
        match self.epoch {
            Some(epoch) if claim.epoch != epoch || claim.is_foreign => Claim {
                epoch,
                ..Claim::default()
            },
            _ => claim,
        }
    }

    fn flow(&self, retry_after_ms: u32) -> v1::Flow {
        v1::Flow {
            credit: self.limits.credit_pings,
            min_interval_ms: 0,
            retry_after_ms: retry_after_ms.max(self.return_after_ms.unwrap_or_default()),
            go_away: self.return_after_ms.is_some(),
        }
    }
}

/// How many pings a batch holds, the malformed ones included.
#[must_use]
pub fn batch_len(batch: &DecodedBatch) -> u32 {
    u32::try_from(batch.pings.len() + batch.malformed.len()).unwrap_or(u32::MAX)
}

fn result(id: u64, outcome: Outcome) -> v1::GatewayFrame {
    answer(v1::ControlResult {
        id,
        outcome: outcome.into(),
        ..v1::ControlResult::default()
    })
}

fn answer(result: v1::ControlResult) -> v1::GatewayFrame {
    v1::GatewayFrame {
        kind: Some(v1::gateway_frame::Kind::ControlResult(result)),
    }
}

fn to_wire(ranges: impl Iterator<Item = SeqRange>) -> Vec<v1::SeqRange> {
    ranges
        .map(|SeqRange { first, last }| v1::SeqRange { first, last })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let limits = Limits {
            frame_bytes: 65_536,
            batch_pings: 1_000,
            credit_pings: 10,
        };
        Session::new(limits, Bytes::from_static(b"store"))
    }

    fn hello(lane: v1::Lane, epoch: u32) -> v1::DeviceFrame {
        let hello = v1::Hello {
            epoch,
            lane: lane.into(),
            ..v1::Hello::default()
        };
        v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Hello(hello)),
        }
    }

    fn batch(epoch: u32, seqs: std::ops::RangeInclusive<u64>) -> v1::DeviceFrame {
        let pings: Vec<_> = seqs
            .map(|seq| crate::ping::Ping::at(seq, 1, 0, 0))
            .collect();
        v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Batch(batch::encode(epoch, &pings))),
        }
    }

    fn welcomed(epoch: u32) -> Welcomed {
        Welcomed {
            admission: Admission::Resumed,
            epoch,
            settled: RangeSet::default(),
            receive_ms: 1,
            position: 1,
            is_paused: false,
        }
    }

    fn settled(pings: u32) -> Settled {
        Settled {
            epoch: 1,
            pings,
            accepted: u64::from(pings),
            duplicate: 0,
            filtered: 0,
            rejects: Vec::new(),
            settled: RangeSet::default(),
            receive_ms: 2,
            commit_ms: 3,
            position: 4,
            retry_after_ms: 0,
            is_paused: false,
        }
    }

    fn ack(frame: Option<v1::GatewayFrame>) -> v1::Ack {
        match frame.and_then(|frame| frame.kind) {
            Some(v1::gateway_frame::Kind::Ack(ack)) => ack,
            other => panic!("no ack but {other:?}"),
        }
    }

    #[test]
    fn nothing_comes_before_hello_and_hello_comes_once() {
        let mut session = session();
        assert_eq!(
            session.handle_frame(None, batch(1, 1..=1)),
            Err(Violation::HelloExpected)
        );
        assert_eq!(
            session.handle_frame(None, hello(v1::Lane::Unspecified, 0)),
            Err(Violation::NoLane)
        );
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        assert_eq!(
            session.handle_frame(Some(Lane::Live), hello(v1::Lane::Live, 1)),
            Err(Violation::HelloRepeated)
        );
        assert_eq!(
            session.handle_frame(None, hello(v1::Lane::Live, 1)),
            Err(Violation::LaneInUse)
        );
        session.handle_lane_closed(Lane::Live);
        assert!(
            session.handle_frame(None, hello(v1::Lane::Live, 1)).is_ok(),
            "a closed lane is free"
        );
    }

    #[test]
    fn a_renewal_comes_after_hello_and_brings_its_request_unread() {
        let renew = || v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Renew(v1::Renew {
                certificate_request: Bytes::from_static(b"request"),
            })),
        };
        let mut session = session();
        assert_eq!(
            session.handle_frame(None, renew()),
            Err(Violation::HelloExpected)
        );
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        assert_eq!(
            session.handle_frame(Some(Lane::Live), renew()),
            Ok(Step::Renew(Lane::Live, Bytes::from_static(b"request")))
        );
    }

    #[test]
    fn two_lanes_that_ask_for_an_epoch_get_one() {
        let mut session = session();
        let first = session
            .handle_frame(None, hello(v1::Lane::Live, 0))
            .unwrap();
        assert_eq!(
            first,
            Step::Ask(Lane::Live, Request::Hello(Claim::default()))
        );
        let second = session
            .handle_frame(None, hello(v1::Lane::Backfill, 0))
            .unwrap();
        assert_eq!(second, Step::Wait(Lane::Backfill));
        let (_, waiting) = session.handle_welcomed(&welcomed(7)).unwrap();
        let joined = Claim {
            epoch: 7,
            ..Claim::default()
        };
        assert_eq!(waiting, [(Lane::Backfill, Request::Hello(joined))]);
    }

    #[test]
    fn a_batch_of_another_epoch_is_fenced() {
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 2))
            .unwrap();
        let step = session
            .handle_frame(Some(Lane::Live), batch(2, 1..=1))
            .unwrap();
        assert!(
            matches!(step, Step::Ask(Lane::Live, Request::Batch { .. })),
            "no need to wait for Welcome"
        );
        session.handle_welcomed(&welcomed(2)).unwrap();
        for epoch in [1, 3] {
            assert_eq!(
                session.handle_frame(Some(Lane::Live), batch(epoch, 1..=1)),
                Err(Violation::Fenced { named: epoch })
            );
        }
        let fenced = Welcomed {
            admission: Admission::Fenced,
            ..welcomed(3)
        };
        assert!(session.handle_welcomed(&fenced).is_err());
    }

    #[test]
    fn the_epoch_of_another_store_is_told_as_such() {
        let mut session = session();
        let hello = v1::Hello {
            epoch: 5,
            incarnation: Bytes::from_static(b"other"),
            lane: v1::Lane::Live.into(),
            ..v1::Hello::default()
        };
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Hello(hello)),
        };
        let claim = Claim {
            epoch: 5,
            is_foreign: true,
            ..Claim::default()
        };
        assert_eq!(
            session.handle_frame(None, frame),
            Ok(Step::Ask(Lane::Live, Request::Hello(claim)))
        );
    }

    #[test]
    fn a_precision_of_the_future_is_refused_rather_than_ignored() {
        let mut session = session();
        let hello = v1::Hello {
            precision: 7,
            lane: v1::Lane::Live.into(),
            ..v1::Hello::default()
        };
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Hello(hello)),
        };
        assert_eq!(
            session.handle_frame(None, frame),
            Err(Violation::UnknownPrecision)
        );
    }

    #[test]
    fn acks_merge_and_their_totals_add_up() {
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        session.handle_welcomed(&welcomed(1)).unwrap();
        session
            .handle_frame(Some(Lane::Live), batch(1, 1..=4))
            .unwrap();
        assert!(!session.is_out_of_credit());
        session
            .handle_frame(Some(Lane::Live), batch(1, 5..=10))
            .unwrap();
        assert!(session.is_out_of_credit());

        let mut other = settled(6);
        (other.accepted, other.duplicate, other.filtered) = (2, 1, 2);
        other.rejects = vec![(9, RejectCode::TooOld)];
        let first = ack(session.handle_settled(vec![settled(4), other]));
        assert!(!session.is_out_of_credit());
        assert_eq!(
            (
                first.accepted,
                first.duplicate,
                first.filtered,
                first.rejected
            ),
            (6, 1, 2, 1)
        );
        assert_eq!(first.rejects.len(), 1);
        assert!(!first.rejects[0].retryable);
        let heartbeat = ack(session.handle_settled(vec![settled(0)]));
        assert_eq!(heartbeat.accepted, 6, "totals run on");
        assert!(heartbeat.rejects.is_empty());
        assert_eq!(session.handle_settled(Vec::new()), None);
    }

    #[test]
    fn an_ack_speaks_of_the_epoch_that_was_settled_and_of_no_other() {
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        session.handle_welcomed(&welcomed(1)).unwrap();
        let mut refused = settled(1);
        refused.rejects = vec![(1, RejectCode::TooOld)];
        // A heartbeat that is judged after a newer connection's Hello has begun the next epoch.
        let mut heartbeat = settled(0);
        heartbeat.epoch = 2;
        heartbeat.settled.insert(1);
        let ack = ack(session.handle_settled(vec![refused, heartbeat]));
        assert_eq!((ack.epoch, ack.durable_upto), (2, 1));
        assert!(ack.rejects.is_empty(), "1 is another ping in epoch 2");
        assert_eq!(ack.rejected, 1, "the totals are of the connection");
    }

    #[test]
    fn an_epoch_that_was_asked_for_cannot_be_used_before_welcome() {
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 0))
            .unwrap();
        assert_eq!(
            session.handle_frame(Some(Lane::Live), batch(0, 1..=1)),
            Err(Violation::Fenced { named: 0 })
        );
    }

    #[test]
    fn no_second_hello_of_a_connection_begins_another_epoch() {
        for (epoch, is_foreign) in [(0, false), (1, false), (3, false), (2_000_000, true)] {
            let mut session = session();
            session
                .handle_frame(None, hello(v1::Lane::Live, 0))
                .unwrap();
            session.handle_welcomed(&welcomed(2)).unwrap();
            let mut second = hello(v1::Lane::Backfill, epoch);
            if let Some(v1::device_frame::Kind::Hello(hello)) = &mut second.kind
                && is_foreign
            {
                hello.incarnation = Bytes::from_static(b"other");
            }
            let claim = Claim {
                epoch: 2,
                ..Claim::default()
            };
            assert_eq!(
                session.handle_frame(None, second),
                Ok(Step::Ask(Lane::Backfill, Request::Hello(claim))),
                "{epoch}"
            );
        }
    }

    #[test]
    fn too_sparse_names_what_is_missing() {
        let mut session = session();
        let mut one = settled(1);
        one.rejects = vec![(9, RejectCode::TooSparse)];
        one.settled.insert(3);
        let ack = ack(session.handle_settled(vec![one]));
        assert!(ack.rejects[0].retryable);
        assert_eq!(ack.missing, [v1::SeqRange { first: 1, last: 2 }]);
    }

    fn control(id: u64, action: v1::control::Action) -> v1::DeviceFrame {
        v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Control(v1::Control {
                id,
                action: Some(action),
            })),
        }
    }

    #[test]
    fn what_the_holder_wants_is_asked_of_the_committer_and_granted_when_it_has_answered() {
        let mut session = session();
        let pause = control(4, v1::control::Action::Pause(v1::control::Pause {}));
        let resume = control(5, v1::control::Action::Resume(v1::control::Resume {}));
        assert_eq!(
            session.handle_frame(None, pause.clone()),
            Err(Violation::HelloExpected)
        );
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        let erase = control(6, v1::control::Action::Erase(v1::control::Erase {}));
        let export = |format| {
            control(
                7,
                v1::control::Action::Export(v1::control::Export { format }),
            )
        };
        let map = v1::control::Format::Geojson;
        assert_eq!(
            session.handle_frame(Some(Lane::Live), export(map.into())),
            Ok(Step::Export(Lane::Live, 7, map))
        );
        let unknown = Step::Answer(Lane::Live, result(7, Outcome::NotSupported));
        assert_eq!(
            session.handle_frame(Some(Lane::Live), export(99)),
            Ok(unknown)
        );
        for (frame, id, wish) in [
            (pause, 4, Wish::Pause),
            (resume, 5, Wish::Resume),
            (erase, 6, Wish::Erase),
        ] {
            assert_eq!(
                session.handle_frame(Some(Lane::Live), frame),
                Ok(Step::Ask(Lane::Live, Request::Control { id, wish }))
            );
            let granted = |grant| session.handle_granted(Granted { id, grant });
            assert_eq!(granted(Grant::Holds), result(id, Outcome::Done));
            let receipt = v1::Receipt {
                pings: 7,
                ..v1::Receipt::default()
            };
            assert_eq!(
                granted(Grant::Erased(receipt)),
                answer(v1::ControlResult {
                    id,
                    outcome: Outcome::Done.into(),
                    receipt: Some(receipt),
                    ..v1::ControlResult::default()
                })
            );
            assert_eq!(granted(Grant::TryLater), result(id, Outcome::TryLater));
        }
    }

    #[test]
    fn checkers_are_asked_for_by_names_that_a_checker_can_have() {
        use v1::control::{Action, GrantChecker, ShowCheckers, WithdrawChecker};
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        let grant = |name: &str| Action::GrantChecker(GrantChecker { name: name.into() });
        let withdraw = |name: &str| Action::WithdrawChecker(WithdrawChecker { name: name.into() });
        for (action, wish) in [
            (Action::ShowCheckers(ShowCheckers {}), CheckerWish::Show),
            (grant("ops"), CheckerWish::Grant("ops".into())),
            (withdraw("ops"), CheckerWish::Withdraw("ops".into())),
        ] {
            let request = Request::Checkers { id: 8, wish };
            assert_eq!(
                session.handle_frame(Some(Lane::Live), control(8, action)),
                Ok(Step::Ask(Lane::Live, request))
            );
        }
        for action in [grant(""), withdraw("no such"), grant(&"a".repeat(65))] {
            let unknown = Step::Answer(Lane::Live, result(8, Outcome::UnknownChecker));
            assert_eq!(
                session.handle_frame(Some(Lane::Live), control(8, action)),
                Ok(unknown)
            );
        }
        let checkers = vec![v1::CheckerGrant {
            name: "ops".into(),
            granted_ms: 7,
            withdrawn_ms: 0,
        }];
        let told = answer(v1::ControlResult {
            id: 8,
            outcome: Outcome::Done.into(),
            checkers: checkers.clone(),
            ..v1::ControlResult::default()
        });
        let granted = |grant| session.handle_granted(Granted { id: 8, grant });
        assert_eq!(granted(Grant::Checkers(checkers)), told);
        let unknown = result(8, Outcome::UnknownChecker);
        assert_eq!(granted(Grant::UnknownChecker), unknown);
        let later = result(8, Outcome::TryLater);
        assert_eq!(granted(Grant::Unreadable), later);
    }

    #[test]
    fn nothing_leaves_a_session_that_is_more_exact_than_the_holder_wants() {
        let mut session = session();
        let hello = |lane: v1::Lane, precision: Precision, least_interval_ms| v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Hello(v1::Hello {
                epoch: 1,
                lane: lane.into(),
                precision: precision.into(),
                least_interval_ms,
                least_distance_m: 7,
                ..v1::Hello::default()
            })),
        };
        let place = crate::ping::Ping::at(1, 5, 535_123_457, 101_234_567);
        let mut coarse = place;
        Terms {
            precision: Precision::Grid1Km,
            ..Terms::default()
        }
        .coarsen(&mut coarse);
        let frame = || v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Batch(batch::encode(1, &[place]))),
        };
        let asked = |session: &mut Session| match session
            .handle_frame(Some(Lane::Live), frame())
            .unwrap()
        {
            Step::Ask(
                _,
                Request::Batch {
                    batch,
                    columns,
                    density,
                },
            ) => {
                let stored = v1::PingBatch::decode(&*columns).unwrap();
                let stored = batch::decode(&stored, 10).unwrap();
                assert_eq!(stored, batch, "what is stored is what was judged");
                (batch.pings[0], density.least_interval_ms)
            }
            other => panic!("{other:?}"),
        };
        let live = hello(v1::Lane::Live, Precision::Exact, 60);
        session.handle_frame(None, live).unwrap();
        assert_eq!(asked(&mut session), (place, 60));
        // The lanes of a connection differ: the stricter of each holds.
        let backfill = hello(v1::Lane::Backfill, Precision::Grid1Km, 0);
        session.handle_frame(None, backfill).unwrap();
        assert_eq!(asked(&mut session), (coarse, 60));
    }

    #[test]
    fn a_device_is_told_that_the_holder_has_paused() {
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        let mut welcomed = welcomed(1);
        welcomed.is_paused = true;
        let (frame, _) = session.handle_welcomed(&welcomed).unwrap();
        let Some(v1::gateway_frame::Kind::Welcome(welcome)) = frame.kind else {
            panic!("{frame:?}");
        };
        assert!(welcome.paused);
        let mut one = settled(0);
        assert!(!ack(session.handle_settled(vec![one.clone()])).paused);
        one.is_paused = true;
        assert!(ack(session.handle_settled(vec![one])).paused);
    }

    #[test]
    fn an_unknown_wish_is_answered_and_a_frame_of_the_future_is_a_sign_of_life() {
        let mut session = session();
        session
            .handle_frame(None, hello(v1::Lane::Live, 1))
            .unwrap();
        let control = v1::Control {
            id: 4,
            action: None,
        };
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Control(control)),
        };
        assert_eq!(
            session.handle_frame(Some(Lane::Live), frame),
            Ok(Step::Answer(Lane::Live, result(4, Outcome::NotSupported)))
        );
        let unknown = v1::DeviceFrame { kind: None };
        assert_eq!(
            session.handle_frame(Some(Lane::Live), unknown),
            Ok(Step::Ask(Lane::Live, Request::Heartbeat))
        );
    }
}
