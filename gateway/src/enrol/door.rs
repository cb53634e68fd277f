//! The port for newcomers: one question, one answer, and out.
//!
//! Knows QUIC and the time it may all take. Must not know what makes a code valid.
//!
//! It is an endpoint of its own, with no more than a thread's turn of the shared runtime: newcomers cannot slow down
//! those who are enrolled, nor get to anything but an answer.
//!
//! # Bounds
//!
//! At most [`MOST_NEWCOMERS`] are served at a time, each for [`CONVERSATION`] at most, with one stream and one frame of
//! [`ENROLL_FRAME_BYTES`]. Whoever comes beyond that, or more often than [`Guesses`] allows, is refused before any
//! cryptography is spent. Nobody comes so far who has not shown that the address is its own, which costs no memory.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use quinn::{Connection, Endpoint, Incoming, TransportConfig, VarInt};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;
use waypost_proto::{
    enrol::{Code, ENROLL_FRAME_BYTES},
    frame::{FrameError, FrameReader, encode_frame},
    session::CloseCode,
    v1::{EnrollRequest, EnrollResponse, IssuedCertificate, enrolment_refusal},
};

use super::{
    EnrolmentConfig, EnrolmentError, EnrolmentParts, Issuing,
    guesses::Guesses,
    invitations::{CodeHash, KeyHash},
    registrar::{TRY_LATER_MS, answer, outcome_label, refused},
};
use crate::{
    clock::system_now_ms,
    metrics::Metrics,
    orders::{OrderError, OrderHandle, Redeem, Redeemed},
    pki::request::RequestedKey,
    tls::enrolment::EnrolmentTls,
};

/// The bound port.
#[derive(Debug)]
pub(super) struct Door {
    endpoint: Endpoint,
    /// What newcomers are met with from now on, when certificate files have changed.
    server: watch::Receiver<Option<quinn::ServerConfig>>,
    guesses: Guesses,
    desk: Arc<Desk>,
    draining: CancellationToken,
}

/// Where newcomers are answered.
#[derive(Debug)]
struct Desk {
    issuing: Arc<Issuing>,
    order: OrderHandle,
    metrics: Metrics,
}

impl Door {
    pub(super) fn bind(
        config: &EnrolmentConfig,
        tls: &EnrolmentTls,
        server: watch::Receiver<Option<quinn::ServerConfig>>,
        issuing: Arc<Issuing>,
        parts: &EnrolmentParts<'_>,
    ) -> Result<Self, EnrolmentError> {
        let endpoint = Endpoint::server(server_config(tls)?, config.listen).map_err(|source| {
            EnrolmentError::Bind {
                listen: config.listen,
                source,
            }
        })?;
        Ok(Self {
            endpoint,
            server,
            guesses: Guesses::new(
                config.tries_per_minute,
                config.tries_burst,
                config.all_tries_per_s.get(),
            ),
            desk: Arc::new(Desk {
                issuing,
                order: parts.order.clone(),
                metrics: parts.metrics.clone(),
            }),
            draining: parts.draining.clone(),
        })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    pub(super) async fn run(mut self) {
        let room = Arc::new(Semaphore::new(MOST_NEWCOMERS));
        let newcomers = TaskTracker::new();
        loop {
            let incoming = tokio::select! {
                biased;
                () = self.draining.cancelled() => break,
                Ok(()) = self.server.changed() => {
                    // Conversations that have begun go on as they are.
                    self.endpoint.set_server_config(self.server.borrow_and_update().clone());
                    continue;
                }
                incoming = self.endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            if !incoming.remote_address_validated() {
                // It fails only for those that have proved theirs.
                drop(incoming.retry());
                continue;
            }
            let address = incoming.remote_address().ip();
            let place = Arc::clone(&room).try_acquire_owned().ok();
            let now = std::time::Instant::now();
            match place.filter(|_| self.guesses.take(address, now)) {
                Some(place) => {
                    let desk = Arc::clone(&self.desk);
                    newcomers.spawn(async move {
                        desk.serve(incoming).await;
                        drop(place);
                    });
                }
                None => {
                    self.desk.count("refused_unheard");
                    incoming.refuse();
                }
            }
        }
        self.endpoint.set_server_config(None);
        newcomers.close();
        drop(timeout(LAST_CONVERSATIONS, newcomers.wait()).await);
        self.endpoint
            .close(code(CloseCode::ShuttingDown), b"the gateway is stopping");
        drop(timeout(CLOSE_TIMEOUT, self.endpoint.wait_idle()).await);
    }
}

impl Desk {
    async fn serve(&self, incoming: Incoming) {
        let remote = incoming.remote_address();
        let outcome = match timeout(CONVERSATION, self.converse(incoming)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => {
                debug!(%remote, %error, "enrolment broke off");
                "broken_off"
            }
            Err(_) => {
                debug!(%remote, "enrolment took too long");
                "broken_off"
            }
        };
        self.count(outcome);
    }

    /// What came of it. Whatever ends it, dropping the connection closes it.
    async fn converse(&self, incoming: Incoming) -> Result<&'static str, Broken> {
        let connection = incoming.await?;
        let (mut send, mut recv) = connection.accept_bi().await?;
        let mut reader = FrameReader::new(ENROLL_FRAME_BYTES);
        let request = loop {
            match reader.next::<EnrollRequest>() {
                Ok(Some(request)) => break request,
                Ok(None) => {}
                Err(error) => return Err(wrong(&connection, error)),
            }
            match recv.read_chunk(ENROLL_FRAME_BYTES, true).await? {
                Some(chunk) => reader.extend(&chunk.bytes),
                None => return Err(wrong(&connection, FrameError::Malformed)),
            }
        };
        let response = self.answer(&request).await;
        let mut bytes = BytesMut::new();
        encode_frame(&response, &mut bytes);
        send.write_chunk(bytes.freeze()).await?;
        // An error means that the newcomer has gone, with its answer or without.
        drop(send.finish());
        drop(send.stopped().await);
        connection.close(code(CloseCode::NoError), b"");
        Ok(outcome_label(&response, "issued"))
    }

    /// The key is looked at before the code, so that a request that cannot be granted uses no code up, and says nothing
    /// of one.
    async fn answer(&self, request: &EnrollRequest) -> EnrollResponse {
        let Ok(key) = RequestedKey::read(&request.certificate_request) else {
            return refused(enrolment_refusal::Code::BadRequest, 0);
        };
        let Ok(code) = Code::parse(&request.code) else {
            return refused(enrolment_refusal::Code::NotValid, 0);
        };
        let redeem = Redeem {
            code: CodeHash::of(&code),
            key: KeyHash::of(key.as_der()),
        };
        match self.order.redeem(redeem).await {
            Ok(Redeemed { device, checkers }) => {
                let registrar = self.issuing.registrar();
                let certified = registrar.certify(device, &key, system_now_ms());
                answer(certified.map(|issued| IssuedCertificate { checkers, ..issued }))
            }
            Err(OrderError::Refused(_)) => refused(enrolment_refusal::Code::NotValid, 0),
            Err(OrderError::Stopped) => refused(enrolment_refusal::Code::TryLater, TRY_LATER_MS),
        }
    }

    fn count(&self, outcome: &str) {
        self.metrics.enrolment.requests.of(outcome).increment(1);
    }
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Read(#[from] quinn::ReadError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Frame(FrameError),
}

fn wrong(connection: &Connection, error: FrameError) -> Broken {
    let close = match error {
        FrameError::TooLarge { .. } => CloseCode::FrameTooLarge,
        FrameError::Malformed => CloseCode::BadFrame,
    };
    connection.close(code(close), error.to_string().as_bytes());
    Broken::Frame(error)
}

fn code(code: CloseCode) -> VarInt {
    VarInt::from_u32(u32::from(code as u8))
}

/// How newcomers are met.
pub(super) fn server_config(tls: &EnrolmentTls) -> Result<quinn::ServerConfig, EnrolmentError> {
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(Arc::clone(&tls.server))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(Arc::new(transport()))
        .max_incoming(MOST_NEWCOMERS)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES * MOST_NEWCOMERS as u64);
    Ok(server)
}

fn transport() -> TransportConfig {
    let window = VarInt::from_u32(WINDOW_BYTES);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(window)
        .receive_window(window)
        .send_window(WINDOW_BYTES.into())
        .datagram_receive_buffer_size(None)
        .crypto_buffer_size(8 << 10)
        .mtu_discovery_config(None)
        .allow_spin(false);
    transport
}

/// A crew in one room, and then some.
const MOST_NEWCOMERS: usize = 64;
/// What one newcomer may send before it is looked at.
const INCOMING_BYTES: u64 = 16 << 10;
/// What may be on its way in either direction: a frame, and room.
const WINDOW_BYTES: u32 = 16 << 10;
const _: () = assert!(ENROLL_FRAME_BYTES < WINDOW_BYTES as usize);
/// How long a newcomer may take, from its first packet to its answer.
const CONVERSATION: Duration = Duration::from_secs(10);
/// How long a stopping endpoint lets newcomers have their answers.
const LAST_CONVERSATIONS: Duration = Duration::from_secs(1);
/// How long a stopping endpoint waits for its peers to acknowledge that it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
