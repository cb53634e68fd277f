//! The QUIC endpoint: who may connect, and one session task for each who does.
//!
//! Knows quinn's settings. Must not know certificates or pings.
//!
//! # Bounds
//!
//! At most [`DevicesConfig::connections`] are open or shaking hands, and [`crate::admission`] says who may
//! begin; all others are refused before any cryptography is spent on them. quinn's own buffers are bounded by
//! the settings below; what a connection may hold is in [`crate::session`].

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use quinn::{
    ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, TokioRuntime, TransportConfig,
    VarInt, crypto::rustls::QuicServerConfig,
};
use ring::hmac;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;
use waypost_proto::session::CloseCode;

use crate::{
    admission::{Admission, AdmissionConfig, Verdict},
    allowance::AllowanceConfig,
    handshake::{self, Newcomer},
    metrics::Metrics,
    rate::Bucket,
    session::{SessionConfig, SessionParts},
};

/// Where devices connect, and what one of them may do.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DevicesConfig {
    /// The UDP address that devices connect to. Loopback until somebody decides otherwise.
    pub listen: SocketAddr,
    /// How many connections may be open or shaking hands. Each takes about 45 KB of memory.
    pub connections: usize,
    /// How long a handshake may take.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// How long a connection may be silent before it is given up. Devices keep theirs alive every 20 s.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Size that is asked of the kernel for the socket's buffers. A burst from many devices is lost
    /// where it does not fit; the kernel caps it at net.core.rmem_max.
    pub socket_buffer_bytes: usize,
    /// Who may begin a connection.
    pub admission: AdmissionConfig,
    /// What one device may do over time.
    pub allowance: AllowanceConfig,
    /// Limits and timeouts of each connection.
    pub session: SessionConfig,
}

impl Default for DevicesConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4433)),
            connections: 100_000,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(90),
            socket_buffer_bytes: 8 << 20,
            admission: AdmissionConfig::default(),
            allowance: AllowanceConfig::default(),
            session: SessionConfig::default(),
        }
    }
}

/// Why the endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The address is taken, not ours, or not allowed.
    #[error(
        "cannot listen for devices on udp {listen}: {source}; is another gateway running, or is devices.listen wrong?"
    )]
    Bind {
        /// The address.
        listen: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The idle timeout is more than QUIC can say.
    #[error("devices.idle_timeout is too long for QUIC: {0}")]
    IdleTimeout(#[from] quinn::VarIntBoundsExceeded),
    /// The TLS settings cannot be used for QUIC.
    #[error("the TLS settings cannot be used for QUIC: {0}")]
    Tls(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// The endpoint and the sessions on it.
#[derive(Debug)]
pub struct Worker {
    endpoint: Endpoint,
    config: DevicesConfig,
    trust_domain: Arc<str>,
    metrics: Metrics,
}

impl Worker {
    /// Opens the socket. Nothing is accepted before [`Self::run`]. `secret` is the store's: with the same
    /// one, a gateway that was killed and started again can tell devices that their connections are gone.
    ///
    /// # Errors
    /// When the address cannot be bound, or the settings do not fit QUIC.
    pub fn bind(
        config: &DevicesConfig,
        tls: Arc<rustls::ServerConfig>,
        trust_domain: &str,
        secret: &[u8; 32],
        metrics: Metrics,
    ) -> Result<Self, WorkerError> {
        let bind_error = |source| WorkerError::Bind {
            listen: config.listen,
            source,
        };
        let socket = UdpSocket::bind(config.listen).map_err(bind_error)?;
        grow_buffers(&socket, config.socket_buffer_bytes);
        let mut server =
            quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
        server
            .transport_config(Arc::new(transport(config)?))
            .max_incoming(4_096)
            .incoming_buffer_size(32 << 10)
            .incoming_buffer_size_total(16 << 20);
        let endpoint = Endpoint::new(
            endpoint_config(secret),
            Some(server),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(bind_error)?;
        Ok(Self {
            endpoint,
            config: config.clone(),
            trust_domain: trust_domain.into(),
            metrics,
        })
    }

    /// Where devices connect.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Accepts connections until `draining`, then waits for the sessions to end.
    pub async fn run(self, parts: Arc<SessionParts>, draining: CancellationToken) {
        let sessions = TaskTracker::new();
        let admission = Admission::new(
            &self.config.admission,
            self.config.connections,
            self.metrics.clone(),
        );
        let refusals = Arc::new(Mutex::new(Bucket::default()));
        loop {
            let incoming = tokio::select! {
                biased;
                () = draining.cancelled() => break,
                incoming = self.endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            let address = incoming.remote_address().ip();
            let verdict = admission.admit(address, incoming.remote_address_validated());
            let limits = &self.metrics.limits;
            let place = match verdict {
                Ok(place) => place,
                Err(Verdict::Refuse(limit)) => {
                    limits.reached.of(limit.as_label()).increment(1);
                    let refused = &self.metrics.connections.refused;
                    refused.of("overloaded").increment(1);
                    incoming.refuse();
                    continue;
                }
                Err(Verdict::Prove | Verdict::Accept) => {
                    limits.address_proofs.increment(1);
                    // It fails only for those that have proved theirs, of whom it is not asked.
                    drop(incoming.retry());
                    continue;
                }
            };
            let newcomer = Newcomer {
                incoming,
                handshake_timeout: place.patience(self.config.handshake_timeout),
                place,
                trust_domain: Arc::clone(&self.trust_domain),
                refusals: Arc::clone(&refusals),
            };
            sessions.spawn(handshake::accept(newcomer, Arc::clone(&parts)));
        }
        self.endpoint.set_server_config(None);
        sessions.close();
        // A device that takes its answers drop by drop must not hold up the stop.
        let is_prompt = timeout(SESSIONS_TIMEOUT, sessions.wait()).await.is_ok();
        self.endpoint.close(
            u32::from(CloseCode::ShuttingDown as u8).into(),
            b"the gateway is stopping",
        );
        if !is_prompt {
            warn!(
                sessions = sessions.len(),
                "closing on devices that do not take their last acks"
            );
            sessions.wait().await;
        }
        // Let the last CONNECTION_CLOSE frames leave, within reason.
        drop(timeout(CLOSE_TIMEOUT, self.endpoint.wait_idle()).await);
    }
}

/// Reasons and measurements: a fleet of small senders wants small windows, since each permitted stream
/// and byte of window is memory that every one of them may claim. Public, so that a server without a
/// gateway behind it can be measured with the same.
///
/// # Errors
/// When the idle timeout does not fit QUIC.
pub fn transport(config: &DevicesConfig) -> Result<TransportConfig, WorkerError> {
    let window = |bytes: u32| VarInt::from_u32(bytes);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(config.session.streams.get()))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(window(128 << 10))
        .receive_window(window(256 << 10))
        .send_window(64 << 10)
        .datagram_receive_buffer_size(None)
        .crypto_buffer_size(8 << 10)
        .max_idle_timeout(Some(config.idle_timeout.try_into()?))
        // Keeping alive is the device's business: it knows what its battery can bear.
        .keep_alive_interval(None)
        .mtu_discovery_config(None)
        .allow_spin(false);
    Ok(transport)
}

/// A packet of a connection that this process does not know is answered with a stateless reset (RFC 9000,
/// section 10.3). The device believes it only if it is made with the key that the connection began with:
/// with a key of each process's own, a device would wait for its own timeout after every crash.
fn endpoint_config(secret: &[u8; 32]) -> EndpointConfig {
    let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let key = hmac::sign(&secret, b"waypost quic stateless reset");
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())));
    config
        .cid_generator(|| Box::new(RandomConnectionIds))
        // quinn's 20 ms would take half an hour to tell a large fleet.
        .min_reset_interval(RESET_INTERVAL);
    config
}

/// Connection ids that never come twice. quinn's own have 24 random bits, which a large fleet uses up
/// within days, and whoever had an id before knows the token that resets it.
struct RandomConnectionIds;

impl ConnectionIdGenerator for RandomConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&rand::random::<[u8; CONNECTION_ID_BYTES]>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn grow_buffers(socket: &UdpSocket, wanted_bytes: usize) {
    let socket = socket2::SockRef::from(socket);
    for (name, result, granted) in [
        (
            "net.core.rmem_max",
            socket.set_recv_buffer_size(wanted_bytes),
            socket.recv_buffer_size(),
        ),
        (
            "net.core.wmem_max",
            socket.set_send_buffer_size(wanted_bytes),
            socket.send_buffer_size(),
        ),
    ] {
        // Linux reserves as much again for its own bookkeeping, and reports the sum.
        let granted_bytes = granted.unwrap_or_default() / 2;
        if result.is_err() || granted_bytes < wanted_bytes {
            warn!(
                wanted_bytes,
                granted_bytes,
                "the kernel grants a smaller socket buffer, and bursts may lose packets; raise {name}"
            );
        }
    }
}

const CONNECTION_ID_BYTES: usize = 8;
/// Between two stateless resets: a quarter of the handshakes that a core can do, which is what follows.
const RESET_INTERVAL: Duration = Duration::from_millis(1);
/// How long a stopping endpoint lets its sessions finish before it closes on them; well within the time
/// that a stop may take.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a stopping endpoint waits for its peers to acknowledge that it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
