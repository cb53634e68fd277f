//! One connection of one device: its streams, its timers, its acks.
//!
//! The shell of [`waypost_proto::session::Session`]: knows QUIC streams and time, decides nothing about
//! pings. One task a connection; an idle one holds no buffers.
//!
//! # Bounds
//!
//! A connection has at most [`SessionConfig::streams`] streams (QUIC refuses more), one partly read
//! frame on each, and [`SessionConfig::credit_pings`] pings or `REQUESTS_IN_FLIGHT` requests waiting
//! for their commit. At that point its streams are not read, and QUIC flow control holds the device
//! back. One request of BACKFILL may wait for a place at the committer: until it has one, only LIVE is
//! read. A device that does not read its acks is closed with NOT_READING.
//!
//! What it may send over time is in its [`crate::allowance`], which outlives the connection. Over it, a
//! batch is put off with RATE_LIMITED and the time to come back. Until then nothing more is read, so a device
//! that does not listen is held to the rate all the same.
//!
//! It lasts no longer than the certificate that it began with, or that of the session which it has resumed.

mod early;

use std::{
    future::{Future, poll_fn},
    num::NonZeroU32,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use parking_lot::RwLock;
use quinn::{AcceptBi, Connection, ReadError, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use waypost_proto::{
    device::Deferral,
    frame::{FrameReader, encode_frame},
    id::DeviceId,
    ping::RejectCode,
    session::{
        CloseCode, Grant, Granted, Lane, Limits, Request, Session, Settled, Step, Violation,
        Welcomed, Wish, batch_len,
    },
    v1::{self, enrolment_refusal::Code::TryLater},
};

use crate::{
    admission::Admission,
    allowance::{Allowance, Allowances},
    clock::system_now_ms,
    commit::{Answer, Bell, CommitHandle, Mail, Mailbox, NotQueued, Stopped},
    connected::{Connected, Ending},
    enrol::{Renewals, outcome_label, refused},
    export::stream::Exports,
    metrics::Metrics,
    revocation::{CertificateId, Revocations},
    takeover::Takeovers,
    tls::{Refusal, RestoredCheck},
};

pub(crate) use self::early::Early;

/// What one connection may do, and how long it may take.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct SessionConfig {
    /// Longest frame in bytes. A batch of 1,000 pings needs about 12,000.
    pub frame_bytes: NonZeroU32,
    /// Most pings in one batch.
    pub batch_pings: NonZeroU32,
    /// Most pings of a connection that wait for their commit: enough to keep a backlog flowing over a
    /// long round trip, few enough that ten thousand greedy devices fit into memory, and that an ack
    /// which refuses every one of them fits a frame.
    pub credit_pings: NonZeroU32,
    /// Most streams at a time: two lanes, and room to replace them.
    pub streams: NonZeroU32,
    /// How long the first frame of a stream may take.
    #[serde(with = "humantime_serde")]
    pub first_frame_timeout: Duration,
    /// How long the next bytes of a frame may take once it has begun, and a write to a device that does
    /// not read.
    #[serde(with = "humantime_serde")]
    pub frame_timeout: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        const fn number(number: u32) -> NonZeroU32 {
            NonZeroU32::new(number).expect("not zero")
        }
        Self {
            frame_bytes: const { number(65_536) },
            batch_pings: const { number(1_000) },
            credit_pings: const { number(3_000) },
            streams: const { number(4) },
            first_frame_timeout: Duration::from_secs(10),
            frame_timeout: Duration::from_secs(10),
        }
    }
}

/// What all sessions share.
#[derive(Debug)]
pub struct SessionParts {
    /// Limits and timeouts.
    pub config: SessionConfig,
    /// The way to the disk.
    pub commit: CommitHandle,
    /// Who may begin a connection, and how many have one.
    pub admission: Admission,
    /// Signs the next certificates of devices.
    pub renewals: Renewals,
    /// Checks who resumes a TLS session; another when the files behind it have changed.
    pub restored_check: RwLock<RestoredCheck>,
    /// Who is let in no more.
    pub revocations: Arc<Revocations>,
    /// Whose connections are open, so that a revocation ends them.
    pub connected: Arc<Connected>,
    /// Who is connected, so that a newer connection ends an older one.
    pub takeovers: Takeovers,
    /// What each device may do over time.
    pub allowances: Allowances,
    /// Who gives holders what is held on them.
    pub exports: Exports,
    /// What sessions count with.
    pub metrics: Metrics,
    /// The gateway's clock.
    pub clock: crate::clock::Clock,
    /// Names the store in Welcome and Ack.
    pub incarnation: Bytes,
    /// Cancelled when the gateway stops: finish what is in flight, then close.
    pub draining: CancellationToken,
}

/// A connection whose device has proven itself.
pub(crate) struct Proven {
    pub(crate) connection: Connection,
    pub(crate) device: DeviceId,
    /// What it has shown.
    pub(crate) certificates: Arc<[CertificateId]>,
    /// When the time of its own certificate is over, in milliseconds since 1970-01-01 UTC.
    pub(crate) expires_ms: u64,
}

/// Serves a connection until it ends, and closes it with the reason. `bell` is its worker's, and `early` what
/// it has said before its handshake was over.
pub(crate) async fn serve(
    proven: Proven,
    allowance: Allowance,
    bell: Arc<Bell>,
    parts: Arc<SessionParts>,
    early: Option<Box<Early>>,
) {
    let Proven {
        connection,
        device,
        certificates,
        expires_ms,
    } = proven;
    let present = parts
        .connected
        .enter(device, connection.clone(), Arc::clone(&certificates));
    // Whoever is revoked from now on is found there.
    let is_revoked = parts.revocations.holds(&device) || parts.revocations.lists(&certificates);
    let mailbox = match &early {
        Some(early) => Arc::clone(&early.mailbox),
        None => Mailbox::new(&bell),
    };
    let whose = (device, expires_ms);
    let mut shell = Shell::new(&connection, whose, &allowance, &mailbox, &parts);
    let begun = match early {
        _ if is_revoked => Err(End::revoked()),
        // While it shook hands.
        _ if shell.is_expired() => Err(End::expired()),
        // What happens once, or hardly ever, is kept out of the memory that the task takes all its life.
        Some(early) => Box::pin(shell.take_over_early(early)).await,
        None => Ok(()),
    };
    let end = match begun {
        Ok(()) => shell.run().await,
        Err(end) => end,
    };
    drop(shell);
    let end = match (end, present.ended()) {
        (End::Peer(quinn::ConnectionError::LocallyClosed), Some(why)) => End::because(why),
        (end, _) => end,
    };
    drop(present);
    parts.takeovers.release(device, &mailbox);
    let now = std::time::Instant::now();
    parts.allowances.leave(device, allowance, now);
    let limits = &parts.metrics.limits;
    limits.devices.set(parts.allowances.devices() as f64);
    match end {
        End::Peer(error) => {
            debug!(%device, reason = %error, "the device is gone");
            parts
                .metrics
                .connections
                .closed
                .of(peer_end_label(&error))
                .increment(1);
        }
        End::Ours { code, reason } => {
            debug!(%device, code = code.as_label(), %reason, "connection closed");
            parts
                .metrics
                .connections
                .closed
                .of(code.as_label())
                .increment(1);
            connection.close(u32::from(code as u8).into(), reason.as_bytes());
        }
    }
}

/// How a connection ended.
enum End {
    Peer(quinn::ConnectionError),
    Ours { code: CloseCode, reason: String },
}

impl End {
    fn ours(code: CloseCode, reason: impl ToString) -> Self {
        Self::Ours {
            code,
            reason: reason.to_string(),
        }
    }
}

impl End {
    fn because(why: Ending) -> Self {
        Self::ours(why.close_code(), why)
    }

    fn erased() -> Self {
        Self::because(Ending::Erased)
    }

    fn taken_over() -> Self {
        Self::ours(CloseCode::TakenOver, "a newer connection took over")
    }

    fn expired() -> Self {
        Self::ours(CloseCode::Expired, Refusal::Expired)
    }

    fn revoked() -> Self {
        Self::because(Ending::Revoked)
    }
}

impl From<Violation> for End {
    fn from(violation: Violation) -> Self {
        Self::ours(violation.close_code(), violation)
    }
}

struct Stream {
    send: SendStream,
    recv: RecvStream,
    reader: FrameReader,
    lane: Option<Lane>,
    /// When the frame that is being read must be complete.
    deadline: Option<Instant>,
    /// The device has finished its side; what is in flight is still answered.
    is_finished: bool,
}

struct Shell<'a> {
    connection: &'a Connection,
    device: DeviceId,
    /// When the time of its certificate is over, in milliseconds since 1970-01-01 UTC.
    expires_ms: u64,
    allowance: &'a Allowance,
    parts: &'a Arc<SessionParts>,
    session: Session,
    streams: Vec<Stream>,
    /// Requests at the committer, by lane; a lane may change its stream meanwhile.
    requests_in_flight: [usize; 2],
    mailbox: &'a Arc<Mailbox>,
    /// Whether this is the device's current session: from the first Hello on, until a newer one takes over.
    is_current: bool,
    is_draining: bool,
    /// Until when nothing is read, because the device has sent more than it may.
    held_until: Option<Instant>,
    /// A request of BACKFILL that waits for a place at the committer. Nothing more of that lane is read
    /// meanwhile, and LIVE goes on: its pings are the news.
    waiting_backfill: Option<Submitting>,
    /// When it has asked for a certificate last.
    renewed_at: Option<Instant>,
    /// Waits for the next stream, from one turn to the next: it costs more to begin waiting than to go on.
    accepting: Pin<Box<AcceptBi<'a>>>,
    /// The batch of early data, until Hello is answered. Boxed, for most sessions have none.
    early: Option<Box<EarlyBatch>>,
}

/// A batch that the committer was asked to judge before the Hello that it followed.
enum EarlyBatch {
    /// It may say that it has to see it again, after Hello.
    Asked(Request),
    /// What became of it, and what was settled before it. It is not told before Hello is answered.
    Settled(Settled),
}

type Submitting = Pin<Box<dyn Future<Output = Result<(), Stopped>> + Send>>;

/// What is left to do and has to wait, which is rare: so its memory is taken only then.
type Rest<'a> = Pin<Box<dyn Future<Output = Result<(), End>> + Send + 'a>>;

/// What woke the session.
enum Wake {
    Draining,
    Mail(Mail),
    Read(usize, Result<Option<Bytes>, ReadError>),
    Opened(SendStream, RecvStream),
    Deadline,
    /// Perhaps its certificate's time is over.
    Expiry,
    Released,
    Submitted(Result<(), Stopped>),
    Gone(quinn::ConnectionError),
}

impl<'a> Shell<'a> {
    fn new(
        connection: &'a Connection,
        (device, expires_ms): (DeviceId, u64),
        allowance: &'a Allowance,
        mailbox: &'a Arc<Mailbox>,
        parts: &'a Arc<SessionParts>,
    ) -> Self {
        Self {
            connection,
            device,
            expires_ms,
            allowance,
            parts,
            session: new_session(parts),
            streams: Vec::new(),
            requests_in_flight: [0; 2],
            mailbox,
            is_current: false,
            is_draining: false,
            held_until: None,
            waiting_backfill: None,
            renewed_at: None,
            accepting: Box::pin(connection.accept_bi()),
            early: None,
        }
    }

    /// Goes on where early data has left off. Only now is the device heard, and charged for it.
    async fn take_over_early(&mut self, mut early: Box<Early>) -> Result<(), End> {
        let Some(stream) = early.stream.take() else {
            return Ok(());
        };
        self.opened(stream.send, stream.recv);
        let own = &mut self.streams[0];
        (own.reader, own.lane) = (stream.reader, stream.lane);
        self.session = early.session;
        if let Some(request) = early.asked {
            self.requests_in_flight[Lane::Live as usize] += 1;
            // It is in the store by now; what is too much is made up for by reading nothing for a while.
            let _deferral = self.deferral(&request, None);
            self.early = Some(Box::new(EarlyBatch::Asked(request)));
        }
        for step in early.steps {
            let held_for = self.charge();
            if let Some(rest) = self.follow(0, step?, held_for)? {
                rest.await?;
            }
        }
        self.work_through(0, true).await
    }

    async fn run(&mut self) -> End {
        // A device that opens no stream at all is held to the same time as one that opens a silent one, and
        // so is one that takes each back before it is late.
        let silent_until = Instant::now() + self.parts.config.first_frame_timeout;
        loop {
            let wake = self.wake(silent_until).await;
            // First of all, so that no device can keep it from being looked at.
            if self.is_expired() && !matches!(wake, Wake::Gone(_)) {
                return End::expired();
            }
            let result = match wake {
                Wake::Expiry => Ok(()),
                Wake::Draining => Box::pin(self.begin_draining()).await,
                Wake::Mail(mail) => self.open_mail(mail).await,
                Wake::Read(at, Ok(Some(bytes))) => self.receive(at, &bytes).await,
                Wake::Read(at, Ok(None)) => self.finished(at),
                Wake::Read(at, Err(error)) => self.broken(at, &error),
                Wake::Opened(send, recv) => {
                    self.opened(send, recv);
                    Ok(())
                }
                Wake::Deadline => Err(self.deadline_passed()),
                Wake::Released => {
                    self.held_until = None;
                    self.resume(true).await
                }
                Wake::Submitted(submitted) => {
                    self.waiting_backfill = None;
                    match submitted {
                        Ok(()) if !self.is_draining => self.resume(true).await,
                        Ok(()) => Ok(()),
                        Err(stopped) => Err(End::ours(CloseCode::StorageFailed, stopped)),
                    }
                }
                Wake::Gone(error) => return End::Peer(error),
            };
            if let Err(end) = result {
                return end;
            }
            if self.is_draining && self.requests_in_flight == [0; 2] {
                Box::pin(self.flush()).await;
                return End::ours(CloseCode::ShuttingDown, "the gateway is stopping");
            }
        }
    }

    async fn open_mail(&mut self, mail: Mail) -> Result<(), End> {
        if mail.is_call {
            if self.mailbox.is_taken_over() {
                return Err(End::taken_over());
            }
            if !self.is_draining && self.parts.draining.is_cancelled() {
                Box::pin(self.begin_draining()).await?;
            }
        }
        let was_full = self.is_full();
        self.deliver(mail.answers).await?;
        if self.is_draining {
            return Ok(());
        }
        self.resume(was_full).await
    }

    /// Sends the device away, to come back at a time of its own: all of a fleet at once would be a storm.
    async fn begin_draining(&mut self) -> Result<(), End> {
        self.is_draining = true;
        let spread_ms = self.parts.admission.return_spread().as_millis();
        let spread_ms = u32::try_from(spread_ms).unwrap_or(u32::MAX);
        self.session.go_away(rand::random_range(0..=spread_ms));
        let lane = self.streams.iter().find_map(|stream| stream.lane);
        match lane.zip(self.session.farewell()) {
            Some((lane, frame)) => self.write(lane, encoded(&frame)).await,
            None => Ok(()),
        }
    }

    /// Waits for the next thing to do, the most urgent first.
    async fn wake(&mut self, silent_until: Instant) -> Wake {
        let held_until = self.held_until.filter(|_| !self.is_draining);
        let may_read = !self.is_draining && !self.is_full() && held_until.is_none();
        let reads_backfill = self.waiting_backfill.is_none();
        // Nobody is late while it is we who do not read.
        let deadline = self
            .streams
            .iter()
            .filter(|stream| reads_backfill || stream.lane != Some(Lane::Backfill))
            .filter_map(|stream| stream.deadline)
            .chain((!self.is_current).then_some(silent_until))
            .min()
            .filter(|_| may_read);
        let expiry = Instant::now() + time_left(self.expires_ms);
        let until = deadline.map_or(expiry, |deadline| deadline.min(expiry));
        let (streams, waiting) = (&mut self.streams, &mut self.waiting_backfill);
        let (connection, accepting) = (self.connection, &mut self.accepting);
        let accepts = !self.is_draining && held_until.is_none();
        tokio::select! {
            biased;
            // Before all that a busy device could keep ready for ever. The current session of a device is called
            // instead, so that hundreds of thousands need not wait at one place.
            () = async { self.parts.draining.cancelled().await }, if !self.is_draining && !self.is_current => Wake::Draining,
            mail = self.mailbox.take() => Wake::Mail(mail),
            submitted = async { waiting.as_mut().expect("guarded").await }, if waiting.is_some() => Wake::Submitted(submitted),
            (at, read) = read_any(streams, reads_backfill), if may_read => Wake::Read(at, read),
            () = async { sleep_until(held_until.expect("guarded")).await }, if held_until.is_some() => Wake::Released,
            opened = accepting.as_mut(), if accepts => match opened {
                Ok((send, recv)) => {
                    accepting.set(connection.accept_bi());
                    Wake::Opened(send, recv)
                }
                Err(error) => Wake::Gone(error),
            },
            // Else the end of the connection shows in what is accepted.
            error = connection.closed(), if !accepts => Wake::Gone(error),
            () = sleep_until(until) => if deadline == Some(until) { Wake::Deadline } else { Wake::Expiry },
        }
    }

    fn is_expired(&self) -> bool {
        time_left(self.expires_ms).is_zero()
    }

    fn is_full(&self) -> bool {
        REQUESTS_IN_FLIGHT <= self.requests_in_flight.iter().sum()
            || self.session.is_out_of_credit()
    }

    /// Counts a frame, or a stream that was opened. Returns how long the device has to wait, if it has
    /// sent too many.
    fn charge(&mut self) -> Option<Duration> {
        let wait = self.allowance.charge_frame(std::time::Instant::now());
        if wait.is_zero() {
            return None;
        }
        self.limit_reached("device_frames");
        // Whoever is a little over is let go on after a moment with a few frames, and not one by one.
        let wait = wait.max(SHORTEST_HOLD);
        self.hold(wait);
        Some(wait)
    }

    /// Reads nothing more for a while: a device that waits as it is told does not notice, and one that does
    /// not is held back by QUIC flow control.
    fn hold(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        self.held_until = self.held_until.max(Some(until));
    }

    fn limit_reached(&self, limit: &str) {
        self.parts.metrics.limits.reached.of(limit).increment(1);
    }

    /// Whether a request is put off: a batch that comes too soon after all the others.
    fn deferral(&mut self, request: &Request, held_for: Option<Duration>) -> Option<Deferral> {
        let Request::Batch { batch, .. } = request else {
            return None;
        };
        let wait = match held_for {
            Some(wait) => wait,
            None => {
                let now = std::time::Instant::now();
                let wait = self.allowance.take_pings(batch_len(batch), now).err()?;
                self.limit_reached("device_pings");
                self.hold(wait.min(LONGEST_HOLD));
                wait
            }
        };
        // Rounded up: a moment too early it would be put off once more.
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        Some(Deferral {
            code: RejectCode::RateLimited,
            retry_after_ms: wait_ms.saturating_add(1),
        })
    }

    fn opened(&mut self, send: SendStream, recv: RecvStream) {
        // That it holds back what follows is enough: there is nothing to put off yet.
        let _wait = self.charge();
        // Most have one, all their life.
        self.streams.reserve_exact(1);
        self.streams.push(Stream {
            send,
            recv,
            reader: FrameReader::new(self.parts.config.frame_bytes.get() as usize),
            lane: None,
            deadline: Some(Instant::now() + self.parts.config.first_frame_timeout),
            is_finished: false,
        });
    }

    /// Takes bytes of a stream and works through the frames that they complete.
    async fn receive(&mut self, at: usize, bytes: &[u8]) -> Result<(), End> {
        self.streams[at].reader.extend(bytes);
        self.work_through(at, true).await
    }

    /// Goes on with frames that had arrived when there was no room for more requests.
    /// `was_off` says that nothing was read meanwhile, so that nobody is late.
    async fn resume(&mut self, was_off: bool) -> Result<(), End> {
        let mut begun: Vec<usize> = (0..self.streams.len())
            .filter(|&at| self.streams[at].reader.is_inside_frame())
            .collect();
        begun.sort_by_key(|&at| (self.streams[at].lane.is_none(), self.streams[at].lane));
        for at in begun {
            self.work_through(at, was_off).await?;
        }
        Ok(())
    }

    /// Works through the complete frames of a stream, as long as there is room for more requests: a few
    /// bytes can hold many frames, and a short frame many pings. `is_moving` says that there is news of the
    /// stream, from which its next deadline counts.
    async fn work_through(&mut self, at: usize, mut is_moving: bool) -> Result<(), End> {
        while let Some((step, held_for)) = self.next_step(at)? {
            is_moving = true;
            if let Some(rest) = self.follow(at, step, held_for)? {
                rest.await?;
            }
        }
        let stream = &mut self.streams[at];
        if !stream.reader.is_inside_frame() {
            if stream.lane.is_some() {
                stream.deadline = None;
            }
        } else if stream.deadline.is_none() || (is_moving && stream.lane.is_some()) {
            // From the newest bytes on, so that a full frame gets through a line of any speed.
            stream.deadline = Some(Instant::now() + self.parts.config.frame_timeout);
        }
        Ok(())
    }

    /// What follows from the next complete frame of a stream, and how long the device is held back for it. None if
    /// there is no such frame, or no room for what may follow.
    fn next_step(&mut self, at: usize) -> Result<Option<(Step, Option<Duration>)>, End> {
        let stream = &mut self.streams[at];
        let lane = stream.lane;
        let waits = self.waiting_backfill.is_some() && lane == Some(Lane::Backfill);
        if waits || self.held_until.is_some() || self.is_full() {
            return Ok(None);
        }
        let reader = &mut self.streams[at].reader;
        let Some(frame) = reader.next().map_err(Violation::from)? else {
            return Ok(None);
        };
        count(&self.parts.metrics, &frame);
        let held_for = self.charge();
        let step = self.session.handle_frame(lane, frame)?;
        Ok(Some((step, held_for)))
    }

    /// Does what follows from a frame of a stream. What has to wait is left for the caller.
    fn follow(
        &mut self,
        at: usize,
        step: Step,
        held_for: Option<Duration>,
    ) -> Result<Option<Rest<'_>>, End> {
        match step {
            Step::Ask(lane, request) => {
                self.bind(at, lane);
                let deferral = self.deferral(&request, held_for);
                self.ask(lane, request, deferral)
            }
            Step::Answer(lane, frame) => Ok(Some(Box::pin(self.write(lane, encoded(&frame))))),
            Step::Export(lane, id, format) => {
                let exports = &self.parts.exports;
                if exports.begin(self.connection, self.device, id, format) {
                    return Ok(None);
                }
                let grant = Grant::TryLater;
                let later = self.session.handle_granted(Granted { id, grant });
                Ok(Some(Box::pin(self.write(lane, encoded(&later)))))
            }
            Step::Wait(lane) => {
                self.bind(at, lane);
                Ok(None)
            }
            Step::Renew(lane, request) => Ok(Some(Box::pin(self.renew(lane, request)))),
        }
    }

    /// Answers with the device's next certificate. The signatures that are checked and made take its worker
    /// some half a millisecond, so a connection gets one only so often.
    async fn renew(&mut self, lane: Lane, request: Bytes) -> Result<(), End> {
        let now = Instant::now();
        let wait = self.renewed_at.map_or(Duration::ZERO, |renewed_at| {
            (renewed_at + RENEWAL_PAUSE).saturating_duration_since(now)
        });
        let response = if wait.is_zero() {
            self.renewed_at = Some(now);
            let chain = chain_of(self.connection);
            let holds = match self.parts.revocations.holds(&self.device) {
                true => Err(Refusal::Revoked),
                false => self.parts.restored_check.read().check(&chain),
            };
            let renewals = &self.parts.renewals;
            renewals.renew(self.device, holds, &request, system_now_ms())
        } else {
            let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
            refused(TryLater, wait_ms.saturating_add(1))
        };
        let outcome = outcome_label(&response, "renewed");
        let requests = &self.parts.metrics.enrolment.requests;
        requests.of(outcome).increment(1);
        debug!(device = %self.device, outcome, "asked for its next certificate");
        let frame = v1::GatewayFrame {
            kind: Some(v1::gateway_frame::Kind::Renewed(response)),
        };
        self.write(lane, encoded(&frame)).await?;
        // To ask for it is to be heard.
        match self.ask(lane, Request::Heartbeat, None)? {
            Some(rest) => rest.await,
            None => Ok(()),
        }
    }

    /// Hello has named the stream's lane; with the first one the device becomes this connection's.
    fn bind(&mut self, at: usize, lane: Lane) {
        self.streams[at].lane = Some(lane);
        if !std::mem::replace(&mut self.is_current, true) {
            self.parts.takeovers.claim(self.device, self.mailbox);
            // All current sessions may have been called by now.
            if self.parts.draining.is_cancelled() {
                self.mailbox.call();
            }
        }
    }

    /// Hands a request to the committer, which mostly has room for it.
    fn ask(
        &mut self,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
    ) -> Result<Option<Rest<'_>>, End> {
        // A stop does not wait for an erasure: it goes on at the next start.
        let is_erasure = matches!(
            request,
            Request::Control {
                wish: Wish::Erase,
                ..
            }
        );
        self.requests_in_flight[lane as usize] += usize::from(!is_erasure);
        if lane == Lane::Backfill && !matches!(request, Request::Hello(_)) {
            let (commit, mailbox) = (self.parts.commit.clone(), Arc::clone(self.mailbox));
            let device = self.device;
            let submitting = async move {
                commit
                    .submit(device, lane, request, deferral, &mailbox)
                    .await
            };
            // It is polled with everything else that may wake the session.
            self.waiting_backfill = Some(Box::pin(submitting));
            return Ok(None);
        }
        let commit = &self.parts.commit;
        match commit.try_submit(self.device, lane, request, deferral, self.mailbox) {
            Ok(()) => Ok(None),
            Err(NotQueued::HasToWait(request)) => Ok(Some(Box::pin(
                self.ask_when_there_is_room(lane, request, deferral),
            ))),
            Err(NotQueued::Stopped) => Err(End::ours(CloseCode::StorageFailed, Stopped)),
        }
    }

    async fn ask_when_there_is_room(
        &mut self,
        lane: Lane,
        request: Request,
        deferral: Option<Deferral>,
    ) -> Result<(), End> {
        // While a full queue or a disk that hangs keeps us here, the device may go or come anew.
        tokio::select! {
            biased;
            submitted = self.parts.commit.submit(self.device, lane, request, deferral, self.mailbox) => {
                submitted.map_err(|stopped| End::ours(CloseCode::StorageFailed, stopped))
            }
            error = self.connection.closed() => Err(End::Peer(error)),
            () = self.mailbox.taken_over() => Err(End::taken_over()),
            () = expired(self.expires_ms) => Err(End::expired()),
        }
    }

    /// Writes what a commit has settled: one ack per lane, however many requests it answered.
    async fn deliver(&mut self, answers: Vec<(Lane, Answer)>) -> Result<(), End> {
        let mut settled: [Vec<Settled>; 2] = Default::default();
        for (lane, answer) in answers {
            self.requests_in_flight[lane as usize] -= usize::from(!is_of_an_erasure(&answer));
            match answer {
                Answer::Welcomed(welcomed) => {
                    let early = Box::pin(self.welcome(lane, welcomed)).await?;
                    settled[Lane::Live as usize].extend(early);
                }
                Answer::Settled(one) if !self.session.is_welcomed() => {
                    self.early = Some(Box::new(EarlyBatch::Settled(one)));
                }
                Answer::Settled(one) => settled[lane as usize].push(one),
                Answer::Granted(granted) => Box::pin(self.grant(lane, granted)).await?,
                Answer::Erased => return Err(End::erased()),
                Answer::Fenced if self.early.is_some() => {
                    if let Some(EarlyBatch::Asked(request)) = self.early.take().map(|early| *early)
                        && let Some(rest) = self.ask(lane, request, None)?
                    {
                        rest.await?;
                    }
                }
                Answer::Fenced => {
                    return Err(End::ours(
                        CloseCode::FencedEpoch,
                        "the epoch ended while the batch waited",
                    ));
                }
                Answer::Revoked => return Err(End::revoked()),
                Answer::Lost => {
                    return Err(End::ours(
                        CloseCode::StorageFailed,
                        "the gateway could not write",
                    ));
                }
            }
        }
        for (lane, settled) in Lane::ALL.into_iter().zip(settled) {
            let received_ms = settled.first().map(|first| first.receive_ms);
            let ack = self.session.handle_settled(settled);
            if let Some(ack) = ack.map(|ack| encoded(&ack)) {
                self.write(lane, ack).await?;
                let waited_ms = self
                    .parts
                    .clock
                    .now_ms()
                    .saturating_sub(received_ms.unwrap_or_default());
                let metrics = &self.parts.metrics.sessions;
                metrics.acks_sent.increment(1);
                metrics.ack_latency.record(Duration::from_millis(waited_ms));
            }
        }
        self.close_finished();
        Ok(())
    }

    /// Tells what became of the holder's wish. With an erasure the connection ends.
    async fn grant(&mut self, lane: Lane, granted: Granted) -> Result<(), End> {
        let is_erased = matches!(granted.grant, Grant::Erased(_));
        let frame = self.session.handle_granted(granted);
        self.write(lane, encoded(&frame)).await?;
        if is_erased {
            self.flush().await;
            return Err(End::erased());
        }
        Ok(())
    }

    /// Answers Hello, and asks what has waited for that. Returns what became of early data, if there was any.
    async fn welcome(
        &mut self,
        lane: Lane,
        mut welcomed: Welcomed,
    ) -> Result<Option<Settled>, End> {
        let mut early = match self.early.take().map(|early| *early) {
            Some(EarlyBatch::Settled(one)) => Some(one),
            _ => None,
        };
        if let Some(one) = &mut early
            && one.epoch == welcomed.epoch
        {
            // A device that is told in Welcome of what it has not sent yet, as far as it knows, takes itself
            // for the copy of another. The early batch is the ack's to tell, and this commit is where it
            // became visible.
            std::mem::swap(&mut one.settled, &mut welcomed.settled);
            one.position = welcomed.position;
        }
        let (frame, waiting) = self.session.handle_welcomed(&welcomed)?;
        self.write(lane, encoded(&frame)).await?;
        for (lane, request) in waiting {
            if let Some(rest) = self.ask(lane, request, None)? {
                rest.await?;
            }
        }
        Ok(early)
    }

    async fn write(&mut self, lane: Lane, frame: Bytes) -> Result<(), End> {
        let (frame_timeout, device) = (self.parts.config.frame_timeout, self.device);
        // The device may have reset its side; then nobody wants the answer.
        let Some(stream) = self.stream_of(lane) else {
            return Ok(());
        };
        let mut writing = pin!(stream.send.write_chunk(frame));
        // There is room for an answer, most of the time, and then no clock is needed.
        let at_once = poll_fn(|context| Poll::Ready(writing.as_mut().poll(context))).await;
        let written = match at_once {
            Poll::Ready(written) => Ok(written),
            Poll::Pending => Box::pin(timeout(frame_timeout, writing)).await,
        };
        match written {
            Ok(Ok(())) => Ok(()),
            // A stopped stream loses its acks and nothing else; a lost connection shows up by itself.
            Ok(Err(error)) => {
                debug!(%device, %error, "an answer could not be written");
                Ok(())
            }
            Err(_) => Err(End::ours(
                CloseCode::NotReading,
                "the device does not read its answers",
            )),
        }
    }

    /// Waits until the device has received the last acks: closing a connection drops what is not yet
    /// delivered.
    async fn flush(&mut self) {
        let delivered = async {
            for stream in &mut self.streams {
                if stream.send.finish().is_ok() {
                    drop(stream.send.stopped().await);
                }
            }
        };
        drop(timeout(FLUSH_TIMEOUT, delivered).await);
    }

    /// The device has finished its side of a stream.
    fn finished(&mut self, at: usize) -> Result<(), End> {
        let stream = &mut self.streams[at];
        if stream.reader.is_inside_frame() {
            return Err(Violation::Truncated.into());
        }
        if stream.lane.is_none() {
            return Err(Violation::HelloExpected.into());
        }
        stream.is_finished = true;
        stream.deadline = None;
        self.close_finished();
        Ok(())
    }

    /// A stream was reset, or the connection with it.
    fn broken(&mut self, at: usize, error: &ReadError) -> Result<(), End> {
        debug!(device = %self.device, %error, "a stream broke off");
        match error {
            ReadError::ConnectionLost(error) => Err(End::Peer(error.clone())),
            _ => {
                let stream = self.streams.swap_remove(at);
                if let Some(lane) = stream.lane {
                    self.session.handle_lane_closed(lane);
                }
                Ok(())
            }
        }
    }

    /// Ends our side of streams that the device has finished and that have all their answers.
    fn close_finished(&mut self) {
        let (session, in_flight) = (&mut self.session, self.requests_in_flight);
        self.streams.retain_mut(|stream| {
            let Some(lane) = stream.lane.filter(|lane| in_flight[*lane as usize] == 0) else {
                return true;
            };
            if stream.is_finished {
                // An error means that the device has stopped reading: it is done as well.
                drop(stream.send.finish());
                session.handle_lane_closed(lane);
            }
            !stream.is_finished
        });
    }

    fn deadline_passed(&self) -> End {
        let now = Instant::now();
        let has_silent_lane = self.streams.iter().any(|stream| {
            stream.lane.is_some() && stream.deadline.is_some_and(|deadline| deadline <= now)
        });
        if has_silent_lane {
            End::ours(
                CloseCode::FrameTimeout,
                "a frame was begun and not finished in time",
            )
        } else {
            End::ours(CloseCode::FirstFrameTimeout, "no Hello in time")
        }
    }

    fn stream_of(&mut self, lane: Lane) -> Option<&mut Stream> {
        self.streams
            .iter_mut()
            .find(|stream| stream.lane == Some(lane))
    }
}

/// Whether something came of an erasure, which is not counted among what is in flight. That it is lost is told of
/// everything, and ends the session.
fn is_of_an_erasure(answer: &Answer) -> bool {
    let grant = match answer {
        Answer::Granted(Granted { grant, .. }) => Some(grant),
        _ => None,
    };
    matches!(grant, Some(Grant::Erased(_) | Grant::TryLater))
}

fn encoded(frame: &v1::GatewayFrame) -> Bytes {
    let mut bytes = BytesMut::with_capacity(ANSWER_BYTES);
    encode_frame(frame, &mut bytes);
    bytes.freeze()
}

/// How long it is until a certificate expires, at most [`EXPIRY_LOOK`]. By the clock that TLS checks certificates with.
fn time_left(expires_ms: u64) -> Duration {
    let left_ms = expires_ms.saturating_sub(system_now_ms());
    Duration::from_millis(left_ms).min(EXPIRY_LOOK)
}

/// Waits until a certificate has expired.
async fn expired(expires_ms: u64) {
    loop {
        let left = time_left(expires_ms);
        if left.is_zero() {
            return;
        }
        sleep(left).await;
    }
}

/// What the device has shown, in this handshake or in the one that it has resumed.
fn chain_of(connection: &Connection) -> Vec<CertificateDer<'static>> {
    let identity = connection.peer_identity();
    let chain = identity.and_then(|identity| identity.downcast::<Vec<_>>().ok());
    chain.map(|chain| *chain).unwrap_or_default()
}

fn new_session(parts: &SessionParts) -> Session {
    let limits = Limits {
        frame_bytes: parts.config.frame_bytes.get(),
        batch_pings: parts.config.batch_pings.get(),
        credit_pings: parts.config.credit_pings.get(),
    };
    Session::new(limits, parts.incarnation.clone())
}

/// Counts a frame that was read.
fn count(metrics: &Metrics, frame: &v1::DeviceFrame) {
    use v1::device_frame::Kind;
    let metrics = &metrics.sessions;
    let kind = match &frame.kind {
        Some(Kind::Hello(_)) => "hello",
        Some(Kind::Batch(batch)) => {
            metrics.batch_size_pings.record(f64::from(batch.count));
            "batch"
        }
        Some(Kind::Heartbeat(_)) => "heartbeat",
        Some(Kind::Control(_)) => "control",
        Some(Kind::Renew(_)) => "renew",
        None => "unknown",
    };
    metrics.frames_received.of(kind).increment(1);
}

/// Reads from whichever stream has something, LIVE before BACKFILL before those that have not said.
async fn read_any(
    streams: &mut [Stream],
    reads_backfill: bool,
) -> (usize, Result<Option<Bytes>, ReadError>) {
    poll_fn(|context| {
        for lane in [Some(Lane::Live), Some(Lane::Backfill), None] {
            for (at, stream) in streams.iter_mut().enumerate() {
                if stream.lane == lane
                    && (reads_backfill || lane != Some(Lane::Backfill))
                    && !stream.is_finished
                    && let Poll::Ready(read) = poll_read(&mut stream.recv, context)
                {
                    return Poll::Ready((at, read));
                }
            }
        }
        Poll::Pending
    })
    .await
}

/// The future of a read holds no state of its own, so it can be made anew for each poll.
fn poll_read(
    recv: &mut RecvStream,
    context: &mut Context<'_>,
) -> Poll<Result<Option<Bytes>, ReadError>> {
    let read = pin!(recv.read_chunk(READ_BYTES, true));
    read.poll(context)
        .map(|read| Ok(read?.map(|chunk| chunk.bytes)))
}

fn peer_end_label(error: &quinn::ConnectionError) -> &'static str {
    match error {
        quinn::ConnectionError::ApplicationClosed(_)
        | quinn::ConnectionError::ConnectionClosed(_) => "peer_closed",
        quinn::ConnectionError::TimedOut => "timed_out",
        quinn::ConnectionError::LocallyClosed => "locally_closed",
        _ => "transport_error",
    }
}

/// How many requests of one connection may wait for their commit. Tiny batches reach it before the
/// credit does.
const REQUESTS_IN_FLIGHT: usize = 64;

/// How long a device that is over its rate of frames is not read, at least: as many timers a second as
/// nobody notices, and far less than a person does.
const SHORTEST_HOLD: Duration = Duration::from_millis(100);

/// How long a device that sends too many pings is not read, at most: whoever waits as long as it was told
/// may have other things to say meanwhile.
const LONGEST_HOLD: Duration = Duration::from_secs(1);

/// How often it is looked whether a certificate's time is over, at least, while the device says nothing: a wall clock
/// may be set, and a timer does not notice.
const EXPIRY_LOOK: Duration = Duration::from_secs(3_600);

/// How long a device waits between two certificates on one connection, of which it needs one in days.
const RENEWAL_PAUSE: Duration = Duration::from_secs(10);

/// How long a device may take to receive its last acks when the gateway stops. It gets them again as
/// ranges in its next Welcome.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Holds the usual answer, an ack without refusals, without growing.
const ANSWER_BYTES: usize = 96;

/// Most bytes taken from a stream at once, so that one lane cannot hold up the other.
const READ_BYTES: usize = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of what an async function of five arguments makes.
    fn future_bytes<A, B, C, D, E, Made>(_: impl Fn(A, B, C, D, E) -> Made) -> usize {
        size_of::<Made>()
    }

    #[test]
    fn what_a_connection_holds_all_its_life_is_small() {
        // Hundreds of thousands hold one each. What happens rarely belongs into a box of its own.
        let bytes = future_bytes(serve);
        assert!(bytes <= 2_048, "{bytes}");
    }
}
