//! The accept loop of one worker: newcomers in, sessions out, and an orderly end.
//!
//! Knows quinn's endpoint and what [`crate::admission`] decides. Must not know certificates or pings.
//!
//! # Bounds
//!
//! At most [`DevicesConfig::connections`] are open or shaking hands, on all workers together, and
//! [`crate::admission`] says who may begin; all others are refused before any cryptography is spent on them. Whoever
//! comes while too many wait for that is dropped before it is seen here, which is noticed by their number.
//! What a connection may hold is in [`crate::session`].
//!
//! A handshake takes a third of a millisecond of its worker's time, during which nobody else is served. So in
//! each turn of the worker at most one begins: between two of them every packet that has arrived is read, and
//! every session that has something to do does it. And none begins while a turn takes longer than
//! [`LONGEST_TURN`], for then earlier ones have yet to be finished. In a storm of newcomers, those who are connected
//! already wait for a handshake or two and not for all of them, and no time is lost for the storm: as long as
//! somebody knocks, there is always something to do.

use std::{
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use quinn::{Endpoint, Incoming};
use tokio::{sync::watch, task::yield_now, time::timeout};
use tokio_util::task::TaskTracker;
use tracing::warn;
use waypost_proto::session::CloseCode;

use crate::{
    admission::Verdict,
    commit::Bell,
    handshake::{self, Newcomer},
    newcomers::Newcomers,
    rate::Bucket,
    session::SessionParts,
    worker::DevicesConfig,
};

/// What the accept loops of all workers share.
#[derive(Debug)]
pub(crate) struct AcceptParts {
    /// Timeouts.
    pub(crate) config: DevicesConfig,
    /// What newcomers are met with from now on, when certificate files have changed. None before that, when endpoints
    /// have what they began with.
    pub(crate) server: watch::Receiver<Option<quinn::ServerConfig>>,
    /// Who belongs here.
    pub(crate) trust_domain: Arc<str>,
    /// What each session gets.
    pub(crate) sessions: Arc<SessionParts>,
    /// What may still be logged of refusals.
    pub(crate) refusals: Arc<Mutex<Bucket>>,
}

/// Accepts connections until the sessions are told to drain, then waits for those to end.
pub(crate) async fn serve(endpoint: Endpoint, newcomers: Arc<Newcomers>, parts: Arc<AcceptParts>) {
    let sessions = TaskTracker::new();
    let bell = Arc::<Bell>::default();
    let hearing = tokio::spawn({
        let bell = Arc::clone(&bell);
        async move { bell.serve().await }
    });
    let draining = &parts.sessions.draining;
    let mut server = parts.server.clone();
    loop {
        let incoming = tokio::select! {
            biased;
            () = draining.cancelled() => break,
            Ok(()) = server.changed() => {
                // Connections that have begun go on as they are.
                endpoint.set_server_config(server.borrow_and_update().clone());
                continue;
            }
            incoming = next(&endpoint, &newcomers) => incoming,
        };
        let Some(incoming) = incoming else { break };
        let metrics = &parts.sessions.metrics;
        let address = incoming.remote_address().ip();
        let admission = &parts.sessions.admission;
        if newcomers.looked_at() {
            admission.had_no_room_to_wait();
        }
        match admission.admit(address, incoming.remote_address_validated()) {
            Ok(place) => {
                let newcomer = Newcomer {
                    incoming,
                    handshake_timeout: place.patience(parts.config.handshake_timeout),
                    place,
                    trust_domain: Arc::clone(&parts.trust_domain),
                    refusals: Arc::clone(&parts.refusals),
                    bell: Arc::clone(&bell),
                    tasks: sessions.clone(),
                };
                sessions.spawn(handshake::accept(newcomer, Arc::clone(&parts.sessions)));
                until_a_turn_is_short().await;
            }
            Err(verdict @ (Verdict::Refuse(limit) | Verdict::Ignore(limit))) => {
                metrics.limits.reached.of(limit.as_label()).increment(1);
                metrics.connections.refused.of("overloaded").increment(1);
                match verdict {
                    Verdict::Ignore(_) => {
                        metrics.limits.ignored.increment(1);
                        incoming.ignore();
                    }
                    _ => incoming.refuse(),
                }
            }
            Err(Verdict::Prove | Verdict::Accept) => {
                metrics.limits.address_proofs.increment(1);
                // It fails only for those that have proved theirs, of whom it is not asked.
                drop(incoming.retry());
            }
        }
    }
    endpoint.set_server_config(None);
    parts.sessions.takeovers.call_all();
    sessions.close();
    // A device that takes its answers drop by drop must not hold up the stop.
    let is_prompt = timeout(SESSIONS_TIMEOUT, sessions.wait()).await.is_ok();
    endpoint.close(
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
    drop(timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await);
    hearing.abort();
}

/// The next newcomer.
async fn next(endpoint: &Endpoint, newcomers: &Newcomers) -> Option<Incoming> {
    let mut accepted = pin!(endpoint.accept());
    match poll_fn(|context| Poll::Ready(accepted.as_mut().poll(context))).await {
        Poll::Ready(incoming) => incoming,
        Poll::Pending => {
            newcomers.none_waits();
            accepted.await
        }
    }
}

/// Lets everybody else have a turn, and again if that has taken long.
async fn until_a_turn_is_short() {
    loop {
        let begun = Instant::now();
        yield_now().await;
        if begun.elapsed() <= LONGEST_TURN {
            return;
        }
    }
}

/// While a worker takes longer than this to serve everybody once, no newcomer makes it longer still: two or three
/// handshakes.
const LONGEST_TURN: Duration = Duration::from_millis(1);
/// How long a stopping endpoint lets its sessions finish before it closes on them; well within the time
/// that a stop may take.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a stopping endpoint waits for its peers to acknowledge that it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
