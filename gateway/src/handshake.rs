//! The handshake: from a first packet that may go on to a device that is known.
//!
//! Knows TLS' outcome, who it proves, and how long it may take. Must not know how connections are let in,
//! nor what a device says.
//!
//! Refusals that anybody can cause are logged up to `LOGGED_REFUSALS` a second, and counted always.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quinn::Incoming;
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};
use waypost_proto::{id::DeviceId, session::CloseCode};

use crate::{
    admission::Place,
    allowance::TooMany,
    commit::Bell,
    metrics::Metrics,
    rate::{Bucket, Rate},
    session::{self, SessionParts},
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
}

/// From the first packet to the end of the session.
pub(crate) async fn accept(newcomer: Newcomer, parts: Arc<SessionParts>) {
    let Newcomer {
        incoming,
        mut place,
        handshake_timeout,
        trust_domain,
        refusals,
        bell,
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
            session::serve(connection, device, allowance, bell, parts).await;
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
