//! The freshness service: tells checkers how fresh users are, over gRPC. Operators find [`crate::enrol`] at the same
//! port.
//!
//! Knows the port, its bounds and who may call; `service` knows the calls and `watcher` the stream, `notices` what is
//! told on it beside entries, and `discovery` what tools ask. Must not know devices or commits: it reads
//! [`Freshness`], the [`Bulletin`], and events of deadlines from the store.
//!
//! # Bounds
//!
//! At most [`FreshnessConfig::max_connections`] are open; more are closed at once, and those that are
//! still shaking hands have bounds of their own. At most [`FreshnessConfig::max_watchers`] streams are
//! open; more are refused with RESOURCE_EXHAUSTED. Two lists of the silent are made at a time; further
//! ones wait, as many as the connections allow calls.
//!
//! A stream that is read slowly holds two messages of some 130 KB at most, what HTTP/2 and the kernel
//! buffer for any connection, and what it remembers of each user to get level again (see
//! [`crate::freshness`]), however much happens meanwhile. It is not closed for being slow, nor for not being read at
//! all: only a checker whose machine does not acknowledge anything any more is closed.

mod discovery;
mod listener;
mod liveness;
mod message;
mod notices;
mod service;
mod tcp_info;
mod token;
mod watcher;
mod wire;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, watch},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;
use tracing::{error, info};
use waypost_proto::id::is_checker_name;

pub(crate) use self::listener::Peer;
pub use self::message::Message;
use self::{
    listener::Door, notices::Notices, rpc::freshness_server::FreshnessServer, service::Service,
    token::Tokens,
};
use crate::{
    admin::Readiness,
    audit::Audit,
    bulletin::Bulletin,
    clock::Clock,
    enrol::{Inviter, rpc::enrolment_server::EnrolmentServer},
    freshness::Freshness,
    grants::Checkers,
    metrics::Metrics,
    orders::OrderHandle,
    revocation::Revocations,
    store::Store,
};

/// The generated server of `waypost.v1.Freshness`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
pub mod rpc {
    include!("gen/waypost.v1.rs");
}

/// Where checkers connect, and who may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FreshnessConfig {
    /// The TCP address that checkers connect to. Loopback until somebody decides otherwise.
    pub listen: SocketAddr,
    /// The names of the checkers that may call. A certificate alone does not let anybody in, so an
    /// empty list lets nobody in. Each is told of those users only who have granted it.
    pub checkers: Vec<String>,
    /// Whether everybody has granted all of these checkers, until a holder withdraws it. It is for holders to say, so only
    /// a gateway for development has it, and no file can set it.
    #[serde(skip)]
    pub are_checkers_granted: bool,
    /// How many connections with a certificate may be open. A checker needs one.
    pub max_connections: usize,
    /// How many streams may be open. One that is read slowly holds some 500 KB, most
    /// of it in HTTP/2's send buffer.
    pub max_watchers: usize,
    /// How often a stream says up to when it is complete. The contract says every second, so at most
    /// that; half of it, so that one that comes late is still in time.
    #[serde(with = "humantime_serde")]
    pub progress_interval: Duration,
    /// How many deadlines all checkers together may set; more are refused. Each takes about 140 bytes.
    pub max_deadlines: usize,
}

impl Default for FreshnessConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4434)),
            checkers: Vec::new(),
            are_checkers_granted: false,
            max_connections: 512,
            max_watchers: 256,
            progress_interval: Duration::from_millis(500),
            max_deadlines: 1_000_000,
        }
    }
}

impl FreshnessConfig {
    /// Whether the settings can be used, before a port is bound.
    ///
    /// # Errors
    /// When one cannot; the error says which.
    pub fn check(&self) -> Result<(), FeedError> {
        if let Some(name) = self.checkers.iter().find(|name| !is_checker_name(name)) {
            return Err(FeedError::CheckerName { name: name.clone() });
        }
        if self.progress_interval < LEAST_PROGRESS_INTERVAL
            || MOST_PROGRESS_INTERVAL < self.progress_interval
        {
            return Err(FeedError::ProgressInterval {
                interval: self.progress_interval,
            });
        }
        Ok(())
    }
}

/// Why the freshness service cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// A name that no certificate can have.
    #[error(
        "freshness.checkers: {name:?} is no name of a checker: use 1 to 64 of a-z, 0-9, '-', '_' and '.'"
    )]
    CheckerName {
        /// The name.
        name: String,
    },
    /// An interval outside of the contract.
    #[error("freshness.progress_interval is {interval:?}: set it to between 10ms and 1s")]
    ProgressInterval {
        /// What was set.
        interval: Duration,
    },
    /// The address is taken, not ours, or not allowed.
    #[error(
        "cannot listen for checkers on tcp {listen}: {source}; is another gateway running, or is freshness.listen wrong?"
    )]
    Bind {
        /// The address.
        listen: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// What the service speaks of and with.
#[derive(Debug)]
pub struct FeedParts {
    /// The `<trust-domain>` of `spiffe://<trust-domain>/checker/<name>`.
    pub trust_domain: String,
    /// What it reads.
    pub freshness: Arc<Freshness>,
    /// When the gateway could not hear, and who is late.
    pub bulletin: Arc<Bulletin>,
    /// Where events of deadlines are kept. It is not held open by a stream that is read slowly.
    pub store: Weak<Store>,
    /// What checkers set goes there.
    pub order: OrderHandle,
    /// The numbers by which users have granted checkers: all of [`FreshnessConfig::checkers`] have one.
    pub checkers: Arc<Checkers>,
    /// What operators call at the same port, if anybody can enrol.
    pub inviter: Option<Inviter>,
    /// Whose certificates are revoked.
    pub revocations: Arc<Revocations>,
    /// The store's name.
    pub incarnation: [u8; 16],
    /// The store's key for resume tokens.
    pub token_key: [u8; 32],
    /// The gateway's clock.
    pub clock: Clock,
    /// What the health service says.
    pub readiness: Readiness,
    /// Where it is recorded who watches whom.
    pub audit: Audit,
    /// What it counts with.
    pub metrics: Metrics,
}

/// The bound service.
#[derive(Debug)]
pub struct Feed {
    listener: tokio::net::TcpListener,
    listen: SocketAddr,
    tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    config: FreshnessConfig,
    parts: FeedParts,
    peer_patience: Duration,
}

impl Feed {
    /// Opens the port, within a runtime. Nothing is served before [`Self::run`].
    ///
    /// # Errors
    /// When a setting cannot be used or the address cannot be bound.
    pub fn bind(
        config: &FreshnessConfig,
        tls: watch::Receiver<Arc<rustls::ServerConfig>>,
        parts: FeedParts,
    ) -> Result<Self, FeedError> {
        config.check()?;
        let bind_error = |source| FeedError::Bind {
            listen: config.listen,
            source,
        };
        let socket = TcpListener::bind(config.listen).map_err(bind_error)?;
        socket.set_nonblocking(true).map_err(bind_error)?;
        let listener = tokio::net::TcpListener::from_std(socket).map_err(bind_error)?;
        let listen = listener.local_addr().map_err(bind_error)?;
        Ok(Self {
            listener,
            listen,
            tls,
            config: config.clone(),
            parts,
            peer_patience: PEER_PATIENCE,
        })
    }

    /// Where checkers connect.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.listen
    }

    /// Serves until cancelled, or until the listening socket breaks, which is logged. When cancelled,
    /// streams end with UNAVAILABLE, which tells checkers to come back.
    pub async fn run(self, cancel: CancellationToken) {
        let watchers = TaskTracker::new();
        let metrics = self.parts.metrics.clone();
        let stages = self.parts.readiness.subscribe();
        let (reporter, health) = discovery::health().await;
        let (reflection, older_reflection) = discovery::reflection();
        let service = Service {
            tokens: Tokens::new(self.parts.incarnation, &self.parts.token_key),
            trust_domain: self.parts.trust_domain,
            freshness: self.parts.freshness,
            notices: Notices::new(self.parts.bulletin, self.parts.store),
            order: self.parts.order,
            audit: self.parts.audit,
            watched: Mutex::default(),
            revocations: self.parts.revocations,
            clock: self.parts.clock,
            metrics: self.parts.metrics,
            checkers: self.parts.checkers.numbered(&self.config.checkers),
            progress_interval: self.config.progress_interval,
            room: Arc::new(Semaphore::new(self.config.max_watchers)),
            lists: Arc::new(Semaphore::new(MAX_LISTS)),
            watchers: watchers.clone(),
            cancel: cancel.clone(),
        };
        let connections = Door {
            listener: self.listener,
            tls: self.tls,
            room: Arc::new(Semaphore::new(self.config.max_connections)),
            patience: self.peer_patience,
            metrics,
        }
        .open(cancel.clone());
        let mut server = Server::builder().max_concurrent_streams(MAX_CALLS_PER_CONNECTION);
        let serving = server
            .add_service(FreshnessServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_optional_service(self.parts.inviter.map(|inviter| {
                EnrolmentServer::new(inviter).max_decoding_message_size(MAX_INVITE_BYTES)
            }))
            .add_service(health)
            .add_service(reflection)
            .add_service(older_reflection)
            .serve_with_incoming_shutdown(connections, cancel.clone().cancelled_owned());
        info!(listen = %self.listen, "freshness service is up");
        let serving = async {
            if let Err(error) = serving.await {
                error!(%error, "the freshness service cannot accept connections any more");
                return;
            }
            watchers.close();
            watchers.wait().await;
        };
        tokio::select! {
            () = serving => {}
            // Whoever does not read its farewell is not waited for.
            () = async { cancel.cancelled().await; sleep(FAREWELL).await } => {}
            never = discovery::follow(reporter, stages) => match never {},
        }
    }
}

/// More often is only noise; rarer breaks the contract.
const LEAST_PROGRESS_INTERVAL: Duration = Duration::from_millis(10);
const MOST_PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// How long nothing that is sent to a checker may be acknowledged by its machine. One that vanished gives its streams
/// back within 20 s, a connection without a stream within 40 s, and either within seven minutes if it had stopped
/// reading before.
const PEER_PATIENCE: Duration = Duration::from_secs(10);

/// One stream and a few questions beside it are usual.
const MAX_CALLS_PER_CONNECTION: u32 = 64;

/// Lists of the silent that are made at a time: each looks at every user, and none may slow down commits.
const MAX_LISTS: usize = 2;

/// Holds a Watch of 10,000 users, some 180 KB, and a little more.
const MAX_REQUEST_BYTES: usize = 256 << 10;

/// Holds an Invite, which names one user, and what later versions may add.
const MAX_INVITE_BYTES: usize = 4 << 10;

/// How long streams have to say that the gateway is shutting down.
const FAREWELL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
