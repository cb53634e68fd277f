//! The gateway: builds the parts in the order the data meets them, and owns their tasks.
//!
//! Knows every part by its handle and nothing of their insides. The order of stopping is the order of
//! the data: stop accepting, stop reading, commit what is queued, acknowledge it, close.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use serde::Serialize;
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use waypost_proto::{id::UserId, session::Lane};

use crate::{
    accept::{self, AcceptParts},
    admin::{Admin, AdminError, Readiness, Stage},
    admission::Admission,
    allowance::Allowances,
    audit::{self, Audit},
    bulletin::Bulletin,
    clock::{Clock, system_now_ms},
    commit::{CommitHandle, CommitParts, Committer},
    config::Config,
    control::{ControlError, Door, DoorParts},
    disk::DiskWatch,
    enrol::{Enrolment, EnrolmentError, EnrolmentParts, Renewals, invitations::Invitations},
    erase::{self, EraseError, Eraser},
    export::stream::{ExportParts, Exports},
    feed::{Feed, FeedError, FeedParts, FreshnessConfig},
    freshness::{Freshness, Grants},
    grants::{Checkers, TooManyCheckers},
    metrics::Metrics,
    orders::{self, OrderHandle},
    reload::Reload,
    revocation::Revocations,
    session::SessionParts,
    sharing::{Holders, Sharing, Withheld},
    store::{CommitError, OpenError, ReadError, Store},
    takeover::Takeovers,
    tls::{TlsError, TlsFiles},
    vigil::{Start, Vigil, VigilParts},
    worker::{WorkerError, Workers},
};

/// Why the gateway could not start.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum BindError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The settings name more checkers than a store can have.
    #[error("freshness.checkers: {0}")]
    Checkers(#[from] TooManyCheckers),
    /// The numbers of new checkers could not be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Erase(#[from] EraseError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The addresses could not be read or written.
    #[error("cannot write {path}: {source}")]
    Addresses {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The audit log cannot be written.
    #[error("cannot write the audit log {path}: {source}")]
    Audit {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The operating system gave no thread or socket.
    #[error("the operating system refused: {0}")]
    System(#[from] std::io::Error),
}

/// Why a running gateway ended.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A commit failed. Nothing was acknowledged after it; a restart recovers what was.
    #[error("{0}; nothing was acknowledged after this, and a restart recovers everything that was")]
    Commit(#[from] CommitError),
    /// A part ended that must not.
    #[error("the {0} ended unexpectedly; see the log above")]
    PartEnded(&'static str),
    /// Draining took longer than it may.
    #[error(
        "draining took longer than {0:?}; what was not acknowledged will be sent again by the devices"
    )]
    DrainTimeout(Duration),
}

/// Where a running gateway can be reached. Written to `addresses.json` in the data folder once it is
/// ready, for tools that let the system choose ports.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Addresses {
    /// UDP, for devices.
    pub devices: SocketAddr,
    /// TCP, for checkers.
    pub freshness: SocketAddr,
    /// TCP, for operators.
    pub admin: SocketAddr,
    /// UDP, for newcomers; none where nobody can enrol.
    pub enrolment: Option<SocketAddr>,
}

/// A gateway that holds its sockets and its store, and serves nobody yet.
#[derive(Debug)]
pub struct Gateway {
    addresses: Addresses,
    store: Arc<Store>,
    freshness: Arc<Freshness>,
    metrics: Metrics,
    readiness: Readiness,
    commit: CommitHandle,
    orders: OrderHandle,
    committer: Committer,
    workers: Workers,
    accept: AcceptParts,
    enrolment: Option<Enrolment>,
    feed: Feed,
    admin: Admin,
    audit: Audit,
    audit_ended: oneshot::Receiver<()>,
    eraser: Eraser,
    exports: Exports,
    door: Door,
    reload: Reload,
}

impl Gateway {
    /// Opens the store, rebuilds the freshness index from it, and binds all ports.
    ///
    /// # Errors
    /// When a part cannot start; nothing has been served then.
    pub async fn bind(config: &Config) -> Result<Self, BindError> {
        let began_ms = system_now_ms();
        let metrics = Metrics::new();
        let readiness = Readiness::starting();
        let admin = Admin::bind(&config.admin, metrics.clone(), readiness.clone()).await?;
        let (tls_files, tls) = TlsFiles::load(&config.tls, &metrics)?;
        let tls_files = tls_files.and(config.enrolment.files());

        let store = Arc::new(Store::open(&config.data_dir, &config.store, began_ms)?);
        // Before anything is read of it that is served.
        erase::replay::replay(&store, &[], began_ms)?;
        let (devices, recovered) = store.load_devices()?;
        let clock = Clock::starting_at(recovered.high_water_ms);
        // Nothing is said of the time since an earlier process until it is written down that nobody was heard in it.
        let heard_until_ms = (recovered.high_water_ms != 0).then_some(recovered.high_water_ms);
        let holders = store.load_holders()?;
        let retention_ms = u64::try_from(config.store.retention.as_millis()).unwrap_or(u64::MAX);
        let oldest_ms = clock.now_ms().saturating_sub(retention_ms);
        let is_known_to_checkers = |(_, withheld): &(UserId, Withheld)| {
            withheld.sharing != Sharing::Erased || oldest_ms <= withheld.since_ms
        };
        let checkers = Arc::new(number_checkers(&store, &config.freshness)?);
        let decided = store.load_decisions()?.into_iter();
        let by_all = checkers.are_granted_by_all();
        let grants = Grants {
            by_all,
            decided: decided
                .map(|(user, decisions)| (user, decisions.visibility(by_all)))
                .collect(),
        };
        let freshness = Freshness::restore(
            devices
                .iter()
                .map(|(device, record)| (*device, record.clocks, record.position)),
            holders
                .withheld
                .iter()
                .copied()
                .filter(is_known_to_checkers),
            grants,
            heard_until_ms.unwrap_or_else(|| clock.now_ms().saturating_sub(1)),
        );
        let freshness = Arc::new(freshness.at_least(recovered.position));
        let deadlines = store.load_deadlines()?;
        let bulletin = Arc::new(Bulletin::restore(
            store.load_coverage()?,
            &deadlines.registrations,
            deadlines.forgotten,
            holders.forgotten,
            recovered.position,
        ));
        info!(
            devices = devices.len(),
            deadlines = deadlines.registrations.len(),
            position = recovered.position,
            "the store is open"
        );

        let (audit, audit_ended) = Audit::start(&config.data_dir, clock.now_ms(), &metrics)
            .map_err(|source| BindError::Audit {
                path: config.data_dir.join(audit::FILE_NAME).display().to_string(),
                source,
            })?;
        let revocations = Arc::new(Revocations::restore(store.load_revocations()?));
        revocations.set_listed(tls.revoked);
        metrics.trust.revoked(revocations.counts());

        metrics.commits.known_devices.set(devices.len() as f64);
        metrics.commits.position.set(recovered.position as f64);

        let admission = Admission::new(
            &config.devices.admission,
            config.devices.connections,
            metrics.clone(),
        );
        let vigil = Vigil::new(VigilParts {
            bulletin: Arc::clone(&bulletin),
            deadlines: deadlines.registrations,
            max_deadlines: config.freshness.max_deadlines,
            start: heard_until_ms.map(|heard_until_ms| Start {
                heard_until_ms,
                began_ms,
            }),
            metrics: metrics.clone(),
        });
        let (orders, ordered) = orders::queue();
        let (erase, erase_jobs) = erase::queue();
        let erase_places = erase.places();
        let eraser = Eraser::new(
            erase_jobs,
            Arc::clone(&store),
            clock.clone(),
            metrics.clone(),
            holders.erasures,
        );
        let (commit, committer) = Committer::new(
            &config.commit,
            CommitParts {
                store: Arc::clone(&store),
                freshness: Arc::clone(&freshness),
                metrics: metrics.clone(),
                clock: clock.clone(),
                devices: FxHashMap::from_iter(devices),
                holders: Holders::restore(holders.withheld),
                checkers: Arc::clone(&checkers),
                revocations: Arc::clone(&revocations),
                position: recovered.position,
                retention: config.store.retention,
                vigil,
                invitations: Invitations::restore(
                    store.load_invitations()?,
                    config.enrolment.max_invitations,
                ),
                orders: ordered,
                erase,
                audit: audit.clone(),
                turned_away: admission.turned_away(),
            },
        );
        let workers = Workers::bind(&config.devices, tls.devices.server, &store.secret())?;
        let draining = CancellationToken::new();
        let devices = workers.local_addr()?;
        let enrolment = Enrolment::bind(
            &config.enrolment,
            EnrolmentParts {
                tls: &config.tls,
                check: &tls.devices.check,
                devices,
                checkers: &checkers.numbered(&config.freshness.checkers),
                order: orders.clone(),
                metrics: metrics.clone(),
                draining: draining.clone(),
            },
        )?;
        let issuing = enrolment.as_ref().map(|one| Arc::clone(&one.issuing));
        let (device_servers, device_server) = watch::channel(None);
        let (checker_servers, checker_server) = watch::channel(tls.checkers);
        let feed = Feed::bind(
            &config.freshness,
            checker_server,
            FeedParts {
                trust_domain: config.tls.trust_domain.clone(),
                freshness: Arc::clone(&freshness),
                bulletin,
                store: Arc::downgrade(&store),
                order: orders.clone(),
                checkers: Arc::clone(&checkers),
                inviter: enrolment.as_ref().map(|one| one.inviter.clone()),
                revocations: Arc::clone(&revocations),
                incarnation: store.life(),
                token_key: store.secret(),
                clock: clock.clone(),
                readiness: readiness.clone(),
                audit: audit.clone(),
                metrics: metrics.clone(),
            },
        )?;
        let exports = Exports::new(ExportParts {
            store: Arc::clone(&store),
            audit: audit.clone(),
            audit_log: config.data_dir.join(audit::FILE_NAME),
            clock: clock.clone(),
            metrics: metrics.clone(),
            retention: config.store.retention,
        });
        let door_clock = clock.clone();
        let sessions = SessionParts {
            config: config.devices.session.clone(),
            commit: commit.clone(),
            admission,
            renewals: Renewals::new(issuing),
            restored_check: RwLock::new(tls.devices.check),
            revocations,
            connected: Arc::default(),
            takeovers: Takeovers::new(metrics.clone()),
            allowances: Allowances::new(
                &config.devices.allowance,
                config.devices.connections.saturating_mul(2),
            ),
            exports: exports.clone(),
            metrics: metrics.clone(),
            clock,
            incarnation: Bytes::copy_from_slice(&store.incarnation()),
            draining,
        };
        let sessions = Arc::new(sessions);
        let door = DoorParts {
            orders: orders.clone(),
            connected: Arc::clone(&sessions.connected),
            exports: exports.clone(),
            store: Arc::clone(&store),
            erase: erase_places,
            audit: audit.clone(),
            clock: door_clock,
            metrics: metrics.clone(),
        };
        let door = Door::bind(&config.data_dir, door)?;
        let reload = Reload {
            files: tls_files,
            config: config.devices.clone(),
            secret: store.secret(),
            devices: device_servers,
            checkers: checker_servers,
            enrolment: enrolment.as_ref().map(|one| Arc::clone(&one.reload)),
            sessions: Arc::clone(&sessions),
        };
        let accept = AcceptParts {
            config: config.devices.clone(),
            server: device_server,
            trust_domain: config.tls.trust_domain.as_str().into(),
            sessions,
            refusals: Arc::default(),
        };
        metrics
            .commits
            .queue_capacity
            .set(config.commit.queue_requests.get() as f64);
        let addresses = Addresses {
            devices,
            freshness: feed.local_addr(),
            admin: admin.local_addr(),
            enrolment: enrolment.as_ref().map(Enrolment::local_addr),
        };
        write_addresses(&config.data_dir, &addresses)?;
        Ok(Self {
            addresses,
            store,
            freshness,
            metrics,
            readiness,
            commit,
            orders,
            committer,
            workers,
            accept,
            enrolment,
            feed,
            admin,
            audit,
            audit_ended,
            eraser,
            exports,
            door,
            reload,
        })
    }

    /// Where it can be reached.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until `stop` is cancelled, then drains; or until a part fails.
    ///
    /// # Errors
    /// When a commit failed, a part ended by itself, or draining took too long.
    pub async fn run(self, stop: CancellationToken) -> Result<(), GatewayError> {
        let Self {
            addresses,
            store,
            freshness,
            metrics,
            readiness,
            commit,
            orders,
            committer,
            workers,
            accept,
            enrolment,
            feed,
            admin,
            audit,
            audit_ended,
            eraser,
            exports,
            door,
            reload,
        } = self;
        let disk = DiskWatch::new(Arc::clone(&store), committer.pulse(), metrics.clone());
        let draining = accept.sessions.draining.clone();
        let closing = CancellationToken::new();
        let mut parts = JoinSet::new();
        parts.spawn(named("admin endpoint", admin.run(closing.clone())));
        parts.spawn(named("freshness service", feed.run(closing.clone())));
        if let Some(enrolment) = enrolment {
            parts.spawn(named("port of enrolment", enrolment.run()));
        }
        // Who comes to it while the gateway stops writes to the store when it has.
        parts.spawn(named("operator's door", door.run(draining.clone())));
        // It holds what sessions hold, so it goes when they do.
        let watching = reload.run(draining.clone());
        parts.spawn(named("watch over certificate files", watching));
        parts.spawn(named(
            "sampler",
            sample(
                freshness,
                commit,
                orders,
                audit,
                metrics,
                draining.clone(),
                closing.clone(),
            ),
        ));
        let accept = Arc::new(accept);
        let serve =
            move |endpoint, newcomers| accept::serve(endpoint, newcomers, Arc::clone(&accept));
        let mut workers = workers.spawn(serve).map_err(|error| {
            error!(%error, "no thread for a worker");
            GatewayError::PartEnded("worker")
        })?;
        // Last, because it writes down that from now on devices can be heard.
        let mut committed = committer.spawn().map_err(|error| {
            error!(%error, "no thread for the committer");
            GatewayError::PartEnded("committer")
        })?;

        let mut erased = eraser.spawn().map_err(|error| {
            error!(%error, "no thread for the eraser");
            GatewayError::PartEnded("eraser")
        })?;

        readiness.advance(match disk.obstacle() {
            None => Stage::Ready,
            Some(obstacle) => Stage::Hindered(obstacle.to_string()),
        });
        parts.spawn(named(
            "watch over the disk",
            disk.run(readiness.clone(), closing.clone()),
        ));
        info!(
            devices = %addresses.devices,
            freshness = %addresses.freshness,
            admin = %addresses.admin,
            "ready"
        );
        let ended = tokio::select! {
            () = stop.cancelled() => Ok(()),
            result = &mut committed => Err(commit_failed(result)),
            Some(part) = parts.join_next() => Err(GatewayError::PartEnded(part.unwrap_or("panicked part"))),
            Some(_) = workers.join_next() => Err(GatewayError::PartEnded("worker")),
        };
        let result = match ended {
            Ok(()) => {
                info!("draining: what is queued is committed and acknowledged");
                readiness.advance(Stage::Draining);
                draining.cancel();
                timeout(DRAIN_TIMEOUT, async {
                    while workers.join_next().await.is_some() {}
                    // The last handles went with the sessions and the sampler: the committer finishes.
                    committed
                        .await
                        .map_or(Err(GatewayError::PartEnded("committer")), |end| Ok(end?))
                })
                .await
                .unwrap_or(Err(GatewayError::DrainTimeout(DRAIN_TIMEOUT)))
            }
            Err(failure) => {
                // Sessions learn of it by their answers, which are all lost, and close.
                readiness.advance(Stage::Failed(failure.to_string()));
                error!(%failure, "the gateway stops");
                draining.cancel();
                let all_closed = async { while workers.join_next().await.is_some() {} };
                drop(timeout(FAILED_CLOSE_TIMEOUT, all_closed).await);
                Err(failure)
            }
        };
        closing.cancel();
        // The committer has gone, so the eraser ends after its step, which may be long.
        if timeout(ERASER_PATIENCE, &mut erased).await.is_err() {
            store.stop_compactions();
            drop(timeout(CLOSE_TIMEOUT, erased).await);
        }
        drop(
            timeout(CLOSE_TIMEOUT, async {
                while parts.join_next().await.is_some() {}
                exports.ended().await;
                drop(exports);
                // With the last part went the last who could have had something recorded.
                audit_ended.await.ok();
            })
            .await,
        );
        info!("stopped");
        result
    }
}

/// The numbers of the store's checkers, those that are new in the settings included. They are on disk before anybody can
/// grant one.
fn number_checkers(store: &Store, config: &FreshnessConfig) -> Result<Checkers, BindError> {
    let known = store.load_checkers()?;
    let mut checkers = known.clone();
    for name in &config.checkers {
        checkers.enrol(name)?;
    }
    let numbered = checkers.numbered(&config.checkers).into_values();
    let granted = numbered.filter(|_| config.are_checkers_granted);
    checkers.grant_by_all(granted.collect());
    if checkers != known {
        let mut batch = store.batch();
        batch.put_checkers(&checkers);
        store.commit(batch)?;
    }
    Ok(checkers)
}

async fn named(name: &'static str, part: impl Future<Output = ()>) -> &'static str {
    part.await;
    name
}

fn commit_failed(
    result: Result<Result<(), CommitError>, oneshot::error::RecvError>,
) -> GatewayError {
    match result {
        Ok(Err(error)) => GatewayError::Commit(error),
        // It ended although handles exist, or its thread panicked.
        Ok(Ok(())) | Err(_) => GatewayError::PartEnded("committer"),
    }
}

/// Copies what has to be looked at, rather than counted, into the metrics, once a second.
async fn sample(
    freshness: Arc<Freshness>,
    commit: CommitHandle,
    orders: OrderHandle,
    audit: Audit,
    metrics: Metrics,
    draining: CancellationToken,
    closing: CancellationToken,
) {
    let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
    loop {
        tokio::select! {
            () = draining.cancelled() => break,
            _ = ticks.tick() => {}
        }
        metrics
            .commits
            .queued_live
            .set(commit.depth(Lane::Live) as f64);
        metrics
            .commits
            .queued_backfill
            .set(commit.depth(Lane::Backfill) as f64);
        metrics.vigil.queued_orders.set(orders.depth() as f64);
        metrics.audit.queued.set(audit.depth() as f64);
        metrics.freshness.users.set(freshness.users() as f64);
        metrics.freshness.changes.set(freshness.changes() as f64);
        metrics
            .freshness
            .lagging_bytes
            .set(freshness.lagging_bytes() as f64);
        metrics.freshness.resolved(freshness.head().resolved_ms);
    }
    // The committer finishes when every handle is gone.
    drop(commit);
    closing.cancelled().await;
}

fn write_addresses(data_dir: &Path, addresses: &Addresses) -> Result<(), BindError> {
    let path = data_dir.join("addresses.json");
    let json = serde_json::to_vec(addresses).map_err(std::io::Error::other);
    json.and_then(|json| std::fs::write(&path, json))
        .map_err(|source| BindError::Addresses {
            path: path.display().to_string(),
            source,
        })
}

/// How long a stop may take: sessions finish what is in flight, the committer what is queued.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the eraser may go on when the gateway stops. What is not finished is begun again at the next start.
const ERASER_PATIENCE: Duration = Duration::from_secs(1);
/// After a failure there is nothing to finish, only closes to send.
const FAILED_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the last responses of the other ports may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the metrics that are looked at are looked at.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
