//! The handshake: from a first packet that may go on to a device that is known.
//!
//! Knows TLS' outcome, who it proves, and how long it may take. Must not know how connections are let in,
//! nor what a device says.
//!
//! A device that resumes its TLS session is known from its first packet, and what it sends with that is taken in
//! by [`Early`]. But TLS does not look at its certificate again, so that is done here, each time; and so is whether
//! the device is one that the operator has revoked, of which no certificate says anything.
//!
//! Refusals that anybody can cause are logged up to `LOGGED_REFUSALS` a second, and counted always.

use std::{future::pending, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quinn::{Incoming, crypto::rustls::HandshakeData};
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::{debug, info};
use waypost_proto::{id::DeviceId, session::CloseCode};

use crate::{
    admission::Place,
    allowance::TooMany,
    commit::Bell,
    metrics::Metrics,
    rate::{Bucket, Rate},
    session::{self, Early, Proven, SessionParts},
    tls::{self, Refusal},
};

/// A connection that may begin.
pub(crate) struct Newcomer {
    pub(crate) incoming: Incoming,
    pub(crate) place: Place,
    pub(crate) handshake_timeout: Duration,
    pub(crate) trust_domain: Arc<str>,
    /// What may still be logged of refusals.
    pub(crate) refusals: Arc<Mutex<Bucket>>,
    /// Rung when the committer has answers for this worker's sessions.
    pub(crate) bell: Arc<Bell>,
    /// The tasks of this worker's connections.
    pub(crate) tasks: TaskTracker,
}

/// From the first packet to the beginning of the session, which has a task of its own: a connection lives for
/// days, and need not hold all that time what a handshake takes.
pub(crate) async fn accept(newcomer: Newcomer, parts: Arc<SessionParts>) {
    let Newcomer {
        incoming,
        mut place,
        handshake_timeout,
        trust_domain,
        refusals,
        bell,
        tasks,
    } = newcomer;
    let metrics = &parts.metrics;
    let remote = incoming.remote_address();
    let started = Instant::now();
    metrics.connections.handshakes_in_progress.increment(1.0);
    let shaken = shake_hands(incoming, handshake_timeout, &trust_domain, &bell, &parts).await;
    place.shaken_hands();
    metrics.connections.handshakes_in_progress.decrement(1.0);
    let Shaken {
        proven,
        kind,
        early,
    } = match shaken {
        Ok(shaken) => shaken,
        Err(Failure::Refused(refusal)) => {
            refused(metrics, remote, &refusal, &refusals);
            return;
        }
        Err(Failure::Broken(error)) => {
            debug!(%remote, %error, "a handshake broke off");
            metrics
                .connections
                .refused
                .of("handshake_broken")
                .increment(1);
            return;
        }
        Err(Failure::TooSlow) => {
            debug!(%remote, "a handshake took too long");
            metrics.connections.refused.of("timed_out").increment(1);
            return;
        }
        Err(Failure::ShuttingDown) => {
            metrics.connections.refused.of("shutting_down").increment(1);
            return;
        }
    };
    let device = proven.device;
    let limits = &metrics.limits;
    let entered = parts.allowances.enter(device, std::time::Instant::now());
    limits.devices.set(parts.allowances.devices() as f64);
    match entered {
        Ok(allowance) => {
            debug!(%device, %remote, "connected");
            metrics
                .connections
                .handshake_duration
                .record(started.elapsed());
            metrics.connections.accepted.increment(1);
            metrics.resumption.handshakes.of(kind).increment(1);
            metrics.connections.open.increment(1.0);
            tasks.spawn(async move {
                let session = Arc::clone(&parts);
                session::serve(proven, allowance, bell, session, early).await;
                parts.metrics.connections.open.decrement(1.0);
                drop(place);
            });
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
            let connection = &proven.connection;
            connection.close(code.into(), too_many.to_string().as_bytes());
        }
    }
}

/// A handshake that went well.
struct Shaken {
    proven: Proven,
    /// How it began, a label of [`crate::metrics::HANDSHAKES`].
    kind: &'static str,
    /// What the device said meanwhile.
    early: Option<Box<Early>>,
}

/// How a handshake failed.
enum Failure {
    Refused(Refusal),
    Broken(quinn::ConnectionError),
    TooSlow,
    ShuttingDown,
}

/// What is known of a device right after its first packet.
enum Start {
    /// It shows a certificate in this handshake, and TLS checks it.
    Full,
    /// It resumes a session, and the certificate is the one that was shown when that began: TLS does not
    /// check it again.
    Resumed(Vec<CertificateDer<'static>>),
    /// Its first message came in pieces, or has to be sent again: it may be either.
    NotYetKnown,
}

impl Start {
    fn of(connection: &quinn::Connection) -> Self {
        // In this order: the protocol is chosen right after it is decided whether a session is resumed.
        let has_protocol = connection
            .handshake_data()
            .and_then(|data| data.downcast::<HandshakeData>().ok())
            .is_some_and(|data| data.protocol.is_some());
        match chain_of(connection) {
            Some(chain) => Self::Resumed(chain),
            None if has_protocol => Self::Full,
            None => Self::NotYetKnown,
        }
    }
}

/// Waits for the end of a handshake, and meanwhile listens to a device that resumes its session.
async fn shake_hands(
    incoming: Incoming,
    handshake_timeout: Duration,
    trust_domain: &str,
    bell: &Arc<Bell>,
    parts: &Arc<SessionParts>,
) -> Result<Shaken, Failure> {
    let connecting = incoming.accept().map_err(Failure::broken)?;
    let (connection, over) = match connecting.into_0rtt() {
        Ok(begun) => begun,
        // A server's side always may; if not, there is no early data, and that is all.
        Err(connecting) => {
            let connection = connecting.await.map_err(Failure::broken)?;
            let chain = chain_of(&connection).unwrap_or_default();
            let device = restored(&chain, trust_domain, parts);
            return Shaken::new(connection, &chain, device, "full", None);
        }
    };
    let start = Start::of(&connection);
    let resumed = match &start {
        Start::Resumed(chain) => Some(restored(chain, trust_domain, parts)),
        Start::Full | Start::NotYetKnown => None,
    };
    let mut early = match resumed {
        Some(Ok(device)) => {
            let (connection, parts) = (connection.clone(), Arc::clone(parts));
            Some(Box::new(Early::new(connection, device, bell, parts)))
        }
        _ => None,
    };
    let listening = async {
        if let Some(early) = &mut early {
            early.listen().await;
        }
        pending().await
    };
    tokio::select! {
        biased;
        over = timeout(handshake_timeout, over) => drop(over.map_err(|_| Failure::TooSlow)?),
        // Not at once: a device that has been let in is told why it is closed.
        () = async { parts.draining.cancelled().await; sleep(LAST_HANDSHAKES).await } => {
            return Err(Failure::ShuttingDown);
        }
        () = listening => {}
    }
    match (connection.close_reason(), &start) {
        (None, _) => {}
        // It has shaken hands and is gone already.
        (Some(quinn::ConnectionError::ApplicationClosed(_)), Start::Full) => {}
        (Some(error), _) => return Err(Failure::broken(error)),
    }
    let chain = chain_of(&connection).unwrap_or_default();
    let (device, kind) = match (resumed, start) {
        (Some(device), _) => match early.as_ref().is_some_and(|early| early.has_begun()) {
            true => (device, "early_data"),
            false => (device, "resumed"),
        },
        (None, Start::Full) => (known(&chain, trust_domain, parts), "full"),
        (None, _) => (restored(&chain, trust_domain, parts), "full"),
    };
    Shaken::new(connection, &chain, device, kind, early)
}

impl Shaken {
    /// Closes the connection with the reason if it is nobody's.
    fn new(
        connection: quinn::Connection,
        chain: &[CertificateDer<'_>],
        device: Result<DeviceId, Refusal>,
        kind: &'static str,
        early: Option<Box<Early>>,
    ) -> Result<Self, Failure> {
        match device {
            Ok(device) => Ok(Self {
                proven: Proven {
                    certificates: tls::certificate_ids(chain),
                    expires_ms: tls::expires_ms(chain),
                    connection,
                    device,
                },
                kind,
                early,
            }),
            Err(refusal) => {
                let code = u32::from(refusal.close_code() as u8);
                connection.close(code.into(), refusal.to_string().as_bytes());
                Err(Failure::Refused(refusal))
            }
        }
    }
}

impl Failure {
    fn broken(error: quinn::ConnectionError) -> Self {
        match Refusal::from_connection_error(&error) {
            Some(refusal) => Self::Refused(refusal),
            None => Self::Broken(error),
        }
    }
}

/// The device of a certificate that TLS may not have checked in this handshake.
fn restored(
    chain: &[CertificateDer<'_>],
    trust_domain: &str,
    parts: &SessionParts,
) -> Result<DeviceId, Refusal> {
    let check = parts.restored_check.read().clone();
    check.check(chain)?;
    known(chain, trust_domain, parts)
}

/// The device of a certificate that TLS has checked.
fn known(
    chain: &[CertificateDer<'_>],
    trust_domain: &str,
    parts: &SessionParts,
) -> Result<DeviceId, Refusal> {
    let device = tls::device_of(chain, trust_domain)?;
    if parts.revocations.holds(&device) {
        debug!(%device, "turned away: it has been revoked");
        return Err(Refusal::Revoked);
    }
    Ok(device)
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

fn chain_of(connection: &quinn::Connection) -> Option<Vec<CertificateDer<'static>>> {
    let identity = connection.peer_identity()?;
    Some(*identity.downcast::<Vec<CertificateDer<'static>>>().ok()?)
}

/// How many refusals are logged in a second, so that nobody can fill a disk with them.
const LOGGED_REFUSALS: u32 = 20;
/// How long a stopping endpoint goes on with handshakes that were begun before.
const LAST_HANDSHAKES: Duration = Duration::from_secs(1);

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
