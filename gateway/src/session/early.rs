//! What a device says before its handshake is over, and may say only if it resumes a session.
//!
//! Knows one stream, a Hello and a batch. Must not know acks, clocks or takeovers: early data can be another's
//! copy of what the device once sent, so nothing that it leads to may say or prove that the device is there.
//! Its pings go to the store, where each is kept once however often it comes. All else is kept here until the
//! handshake is over, and then goes the way of everything that a device says.
//!
//! # Bounds
//!
//! One stream, its Hello and one batch; [`EARLY_BYTES`] of it are read, and the rest waits in QUIC's window.
//! It lasts as long as a handshake may. The committer takes only what it has room for.

use std::sync::Arc;

use quinn::Connection;
use tokio::time::Instant;
use waypost_proto::{
    device::Claim,
    frame::FrameReader,
    id::DeviceId,
    session::{Lane, Request, Session, Step, Violation},
};

use super::{READ_BYTES, SessionParts, Stream, count};
use crate::commit::{Bell, Mailbox};

/// What a device has said so far.
pub(crate) struct Early {
    device: DeviceId,
    connection: Connection,
    parts: Arc<SessionParts>,
    /// The claim of a Hello, after which a batch may follow.
    claim: Option<Claim>,
    read_bytes: usize,
    pub(super) stream: Option<Stream>,
    pub(super) session: Session,
    /// What follows from its frames, in order, and is not done yet.
    pub(super) steps: Vec<Result<Step, Violation>>,
    /// The batch that the committer has; its answer comes to `mailbox`.
    pub(super) asked: Option<Request>,
    pub(super) mailbox: Arc<Mailbox>,
}

impl Early {
    /// Nothing yet. `bell` is the connection's worker's.
    pub(crate) fn new(
        connection: Connection,
        device: DeviceId,
        bell: &Arc<Bell>,
        parts: Arc<SessionParts>,
    ) -> Self {
        Self {
            device,
            connection,
            claim: None,
            read_bytes: 0,
            stream: None,
            session: super::new_session(&parts),
            steps: Vec::new(),
            asked: None,
            mailbox: Mailbox::new(bell),
            parts,
        }
    }

    /// Whether anything was said at all.
    pub(crate) fn has_begun(&self) -> bool {
        self.stream.is_some()
    }

    /// Listens for as long as there is something that may be done early. May be cancelled at any time.
    pub(crate) async fn listen(&mut self) {
        // What is wrong with the connection will be told when it ends.
        let Ok((send, recv)) = self.connection.accept_bi().await else {
            return;
        };
        self.stream = Some(Stream {
            send,
            recv,
            reader: FrameReader::new(self.parts.config.frame_bytes.get() as usize),
            lane: None,
            deadline: None::<Instant>,
            is_finished: false,
        });
        while let Some(stream) = &mut self.stream
            && self.read_bytes < EARLY_BYTES
            && let Ok(Some(chunk)) = stream.recv.read_chunk(READ_BYTES, true).await
        {
            self.read_bytes += chunk.bytes.len();
            stream.reader.extend(&chunk.bytes);
            if !self.work_through() {
                return;
            }
        }
    }

    /// Takes the complete frames that have come. False when all that follows has to wait.
    fn work_through(&mut self) -> bool {
        loop {
            let Some(stream) = &mut self.stream else {
                return false;
            };
            let frame = match stream.reader.next() {
                Ok(Some(frame)) => frame,
                Ok(None) => return true,
                Err(error) => {
                    self.steps.push(Err(error.into()));
                    return false;
                }
            };
            count(&self.parts.metrics, &frame);
            match self.session.handle_frame(stream.lane, frame) {
                Ok(Step::Ask(Lane::Live, Request::Hello(claim))) => {
                    stream.lane = Some(Lane::Live);
                    self.claim = Some(claim);
                    let hello = Step::Ask(Lane::Live, Request::Hello(claim));
                    self.steps.push(Ok(hello));
                }
                Ok(Step::Ask(Lane::Live, request @ Request::Batch { .. })) => {
                    let is_taken = self.claim.is_some_and(|claim| {
                        self.parts.commit.offer_early(
                            self.device,
                            claim,
                            request.clone(),
                            &self.mailbox,
                        )
                    });
                    if is_taken {
                        self.asked = Some(request);
                    } else {
                        self.steps.push(Ok(Step::Ask(Lane::Live, request)));
                    }
                    return false;
                }
                other => {
                    self.steps.push(other);
                    return false;
                }
            }
        }
    }
}

/// Most bytes that are read early: a Hello and a batch of 1,000 pings.
const EARLY_BYTES: usize = 16_384;
