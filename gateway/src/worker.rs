//! The QUIC endpoint: who may connect, and one session task for each who does.
//!
//! Knows quinn's settings and the handshake. Must not know pings.
//!
//! # Bounds
//!
//! At most [`DevicesConfig::connections`] are open or shaking hands, and [`crate::admission`] says who may
//! begin; all others are refused before any cryptography is spent on them. Refusals that anybody can
//! cause are logged up to `LOGGED_REFUSALS` a second, and counted always. quinn's own buffers are bounded by
//! the settings below; what a connection may hold is in [`crate::session`].

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use quinn::{
    ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, Incoming, TokioRuntime,
    TransportConfig, VarInt, crypto::rustls::QuicServerConfig,
};
use ring::hmac;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};
use waypost_proto::{id::DeviceId, session::CloseCode};

use crate::{
    admission::{Admission, AdmissionConfig, Place, Verdict},
    allowance::{AllowanceConfig, TooMany},
    metrics::Metrics,
    rate::{Bucket, Rate},
    session::{self, SessionConfig, SessionParts},
    tls::{self, Refusal},
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
            sessions.spawn(accept(newcomer, Arc::clone(&parts)));
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

/// A connection that may begin.
struct Newcomer {
    incoming: Incoming,
    place: Place,
    handshake_timeout: Duration,
    trust_domain: Arc<str>,
    /// What may still be logged of refusals.
    refusals: Arc<Mutex<Bucket>>,
}

/// From the first packet to the end of the session.
async fn accept(newcomer: Newcomer, parts: Arc<SessionParts>) {
    let Newcomer {
        incoming,
        mut place,
        handshake_timeout,
        trust_domain,
        refusals,
    } = newcomer;
    let metrics = &parts.metrics;
    let remote = incoming.remote_address();
    let started = Instant::now();
    metrics.connections.handshakes_in_progress.increment(1.0);
    let connection = match incoming.accept() {
        Ok(connecting) => tokio::select! {
            connection = timeout(handshake_timeout, connecting) => Some(connection),
            // Not at once: a device that has been let in is told why it is closed.
            () = async { parts.draining.cancelled().await; sleep(LAST_HANDSHAKES).await } => None,
        },
        Err(error) => Some(Ok(Err(error))),
    };
    place.shaken_hands();
    metrics.connections.handshakes_in_progress.decrement(1.0);
    let connection = match connection {
        Some(Ok(Ok(connection))) => connection,
        Some(Ok(Err(error))) => {
            match Refusal::from_connection_error(&error) {
                Some(refusal) => refused(metrics, remote, &refusal, &refusals),
                None => {
                    debug!(%remote, %error, "a handshake broke off");
                    metrics
                        .connections
                        .refused
                        .of("handshake_broken")
                        .increment(1);
                }
            }
            return;
        }
        Some(Err(_)) => {
            debug!(%remote, "a handshake took too long");
            metrics.connections.refused.of("timed_out").increment(1);
            return;
        }
        None => {
            metrics.connections.refused.of("shutting_down").increment(1);
            return;
        }
    };
    let device = match device_of(&connection, &trust_domain) {
        Ok(device) => device,
        Err(refusal) => {
            refused(metrics, remote, &refusal, &refusals);
            let code = u32::from(CloseCode::BadIdentity as u8);
            connection.close(code.into(), refusal.to_string().as_bytes());
            return;
        }
    };
    let limits = &metrics.limits;
    let entered = parts.allowances.enter(device, std::time::Instant::now());
    limits.devices.set(parts.allowances.devices() as f64);
    match entered {
        Ok(allowance) => {
            debug!(%device, %remote, "connected");
            let metrics = metrics.clone();
            metrics
                .connections
                .handshake_duration
                .record(started.elapsed());
            metrics.connections.accepted.increment(1);
            metrics.connections.open.increment(1.0);
            session::serve(connection, device, allowance, parts).await;
            metrics.connections.open.decrement(1.0);
        }
        Err(too_many) => {
            debug!(%device, %remote, "turned away: {too_many}");
            let limit = match too_many {
                TooMany::Connections(_) => "device_connections",
                TooMany::Devices => "devices",
            };
            limits.reached.of(limit).increment(1);
            metrics.connections.refused.of("overloaded").increment(1);
            let code = u32::from(CloseCode::Overloaded as u8);
            connection.close(code.into(), too_many.to_string().as_bytes());
        }
    }
}

fn refused(metrics: &Metrics, remote: SocketAddr, refusal: &Refusal, logged: &Mutex<Bucket>) {
    let rate = Rate::new(LOGGED_REFUSALS, Duration::from_secs(1), LOGGED_REFUSALS);
    let may_log = logged.lock().take(&rate, 1, std::time::Instant::now());
    if may_log.is_ok() {
        info!(%remote, reason = refusal.as_label(), "connection refused: {refusal}");
    }
    metrics
        .connections
        .refused
        .of(refusal.as_label())
        .increment(1);
}

fn device_of(connection: &quinn::Connection, trust_domain: &str) -> Result<DeviceId, Refusal> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or(Refusal::NoCertificate)?;
    tls::device_of(&chain, trust_domain)
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

/// How many refusals are logged in a second, so that nobody can fill a disk with them.
const LOGGED_REFUSALS: u32 = 20;
const CONNECTION_ID_BYTES: usize = 8;
/// Between two stateless resets: a quarter of the handshakes that a core can do, which is what follows.
const RESET_INTERVAL: Duration = Duration::from_millis(1);
/// How long a stopping endpoint goes on with handshakes that were begun before.
const LAST_HANDSHAKES: Duration = Duration::from_secs(1);
/// How long a stopping endpoint lets its sessions finish before it closes on them; well within the time
/// that a stop may take.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a stopping endpoint waits for its peers to acknowledge that it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().write(text)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_can_fill_the_log_with_refusals_and_all_are_counted() {
        let (log, metrics) = (Log::default(), Metrics::new());
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .finish();
        let logged = Mutex::default();
        let remote = SocketAddr::from(([192, 0, 2, 1], 7));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..100_000 {
                refused(&metrics, remote, &Refusal::UnknownAuthority, &logged);
            }
        });
        let lines = String::from_utf8_lossy(&log.0.lock()).lines().count();
        // Twenty at once; the loop would have to take an hour for all of them.
        assert!((20..50_000).contains(&lines), "{lines} lines");
        let counted = r#"waypost_connections_refused_total{reason="unknown_issuer"} 100000"#;
        assert!(metrics.render().contains(counted));
    }
}
