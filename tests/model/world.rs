//! The gateway of a run, in this process: the real store, committer, freshness and feed, from one life to the next.
//!
//! Knows how the parts are put together, how they stop in order and how they crash. Must not know what is sent or
//! told. Sessions are not here: a device hands its requests over itself, by the committer's handle.
//!
//! A crash is what a killed process leaves: the committer goes away between two groups with all that was queued, and
//! the next life begins with a copy of the folder as it was then. What a kill in the middle of a write leaves is
//! tried out by `tests/it/crash.rs`.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, atomic::AtomicU64},
    thread,
    time::Duration,
};

use rustls::ServerConfig;
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::oneshot, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use waypost_checker::{Config, connect, rpc::freshness_client::FreshnessClient};
use waypost_gateway::{
    admin::{Readiness, Stage},
    audit::Audit,
    bulletin::Bulletin,
    clock::{Clock, system_now_ms},
    commit::{Bell, CommitConfig, CommitHandle, CommitParts, Committer},
    coverage::Span,
    deadlines::{Checker, Event},
    enrol::invitations::Invitations,
    erase,
    freshness::{Freshness, Grants, Head},
    grants::Checkers,
    metrics::Metrics,
    orders::{self, OrderHandle},
    pki::{Authority, Credentials},
    revocation::Revocations,
    sharing::{Holders, Transition},
    store::{CommitError, OpenError, Store, StoreConfig},
    tls::{TlsConfig, freshness_server_config},
    vigil::{Start, Vigil, VigilParts},
};

/// Opens the feed of the gateway, or one that is broken, and serves until cancelled.
pub(crate) type OpenFeed = fn(FeedParts, CancellationToken) -> (SocketAddr, JoinHandle<()>);

/// What a feed is opened with, whichever it is.
pub(crate) struct FeedParts {
    pub(crate) tls: Arc<ServerConfig>,
    pub(crate) checkers: Vec<String>,
    pub(crate) progress_interval: Duration,
    pub(crate) trust_domain: String,
    pub(crate) freshness: Arc<Freshness>,
    pub(crate) bulletin: Arc<Bulletin>,
    pub(crate) store: std::sync::Weak<Store>,
    pub(crate) order: OrderHandle,
    pub(crate) numbers: Arc<Checkers>,
    pub(crate) revocations: Arc<Revocations>,
    pub(crate) incarnation: [u8; 16],
    pub(crate) token_key: [u8; 32],
    pub(crate) clock: Clock,
    pub(crate) readiness: Readiness,
    pub(crate) audit: Audit,
    pub(crate) metrics: Metrics,
}

/// A feed of the gateway's, under whichever path.
macro_rules! open_feed {
    ($($feed:ident)::+) => {
        |parts: $crate::world::FeedParts, cancel: tokio_util::sync::CancellationToken| {
            use $($feed)::+ as feed;
            let config = feed::FreshnessConfig {
                listen: std::net::SocketAddr::from(([127, 0, 0, 1], 0)),
                checkers: parts.checkers,
                progress_interval: parts.progress_interval,
                ..feed::FreshnessConfig::default()
            };
            let opened = feed::Feed::bind(
                &config,
                tokio::sync::watch::channel(parts.tls).1,
                feed::FeedParts {
                    trust_domain: parts.trust_domain,
                    freshness: parts.freshness,
                    bulletin: parts.bulletin,
                    store: parts.store,
                    order: parts.order,
                    checkers: parts.numbers,
                    revocations: parts.revocations,
                    incarnation: parts.incarnation,
                    token_key: parts.token_key,
                    clock: parts.clock,
                    readiness: parts.readiness,
                    audit: parts.audit,
                    inviter: None,
                    metrics: parts.metrics,
                },
            )
            .unwrap();
            (opened.local_addr(), tokio::spawn(opened.run(cancel)))
        }
    };
}
pub(crate) use open_feed;

/// The checkers that are let in.
pub(crate) const CHECKERS: [&str; 2] = ["ops", "night"];
const TRUST_DOMAIN: &str = "test.example";
/// As often as it may be, so that much is announced.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(10);
/// How long a stop in order waits for streams to end.
const FAREWELL: Duration = Duration::from_millis(100);

/// The certificates of all runs of a process.
struct Pki {
    server: Arc<ServerConfig>,
    ca_pem: String,
    checkers: Vec<Credentials>,
}

fn pki() -> &'static Pki {
    static PKI: OnceLock<Pki> = OnceLock::new();
    PKI.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path(), TRUST_DOMAIN).unwrap();
        let server = authority.issue_server(&["localhost"]).unwrap();
        server.write(folder.path(), "server").unwrap();
        let tls = TlsConfig {
            certificate: folder.path().join("server.pem"),
            private_key: folder.path().join("server.key"),
            client_ca: folder.path().join("ca.pem"),
            trust_domain: TRUST_DOMAIN.to_owned(),
            ..TlsConfig::default()
        };
        Pki {
            server: freshness_server_config(&tls).unwrap(),
            ca_pem: authority.certificate_pem().to_owned(),
            checkers: CHECKERS
                .map(|name| authority.issue_checker(name).unwrap())
                .into(),
        }
    })
}

/// How a checker reaches a life.
pub(crate) fn checker_config(address: SocketAddr, checker: usize) -> Config {
    let credentials = &pki().checkers[checker];
    Config::new(
        format!("https://{address}"),
        &pki().ca_pem,
        &credentials.certificate_pem,
        &credentials.private_key_pem,
        "localhost",
    )
}

pub(crate) struct World {
    open_feed: OpenFeed,
    folder: TempDir,
    lives: u32,
    life: Option<Life>,
}

/// From a start to a stop or a crash.
pub(crate) struct Life {
    pub(crate) commit: CommitHandle,
    pub(crate) address: SocketAddr,
    pub(crate) incarnation: [u8; 16],
    pub(crate) bell: Arc<Bell>,
    pub(crate) clock: Clock,
    data: PathBuf,
    freshness: Arc<Freshness>,
    bulletin: Arc<Bulletin>,
    store: Arc<Store>,
    kill: CancellationToken,
    committer: thread::JoinHandle<Result<(), CommitError>>,
    closing: CancellationToken,
    feed: JoinHandle<()>,
    /// Of the feed alone, so that a crash takes its streams with it.
    runtime: Runtime,
    audit_ended: oneshot::Receiver<()>,
    wakes: JoinHandle<()>,
}

impl World {
    pub(crate) async fn start(open_feed: OpenFeed) -> Self {
        let mut world = Self {
            open_feed,
            folder: tempfile::tempdir().unwrap(),
            lives: 0,
            life: None,
        };
        world.begin_life(world.data_of(0)).await;
        world
    }

    pub(crate) fn life(&self) -> &Life {
        self.life.as_ref().expect("it lives between two restarts")
    }

    /// Stops in order: what is queued is committed and answered.
    pub(crate) async fn stop(&mut self) -> PathBuf {
        let life = self.life.take().expect("it lives");
        let data = life.data.clone();
        // No handle is left then, and the committer finishes what is queued.
        drop(life.end(|_| ()).await);
        data
    }

    /// Stops in order and starts again.
    pub(crate) async fn restart(&mut self) {
        let data = self.stop().await;
        self.begin_life(data).await;
    }

    /// Crashes and starts again from what is on disk then.
    pub(crate) async fn crash(&mut self) {
        let life = self.life.take().expect("it lives");
        let (from, to) = (life.data.clone(), self.data_of(self.lives));
        let remains = life.end(CancellationToken::cancel).await;
        remains.leave(&from, &to);
        self.begin_life(to).await;
    }

    /// Leaves everything as it is, if it still lives.
    pub(crate) fn leave(&mut self) {
        if let Some(life) = self.life.take() {
            life.kill.cancel();
            life.wakes.abort();
            life.runtime.shutdown_background();
        }
    }

    pub(crate) async fn checker(&self, checker: usize) -> FreshnessClient<Channel> {
        connect(&checker_config(self.life().address, checker))
            .await
            .unwrap()
    }

    /// How far the state has come.
    pub(crate) fn head(&self) -> Head {
        self.life().freshness.head()
    }

    /// Every span that there is.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let bulletin = &self.life().bulletin;
        bulletin.coverage(|coverage| coverage.said_between(0, u64::MAX))
    }

    /// Every event that a checker had to be told.
    pub(crate) fn events(&self, checker: usize) -> Vec<Event> {
        let checker = Checker::named(CHECKERS[checker]);
        self.life()
            .store
            .events_of(checker, 0..u64::MAX, usize::MAX)
            .unwrap()
    }

    /// Every pause and its end, and every grant that was withdrawn or given again.
    pub(crate) fn transitions(&self) -> Vec<Transition> {
        self.life()
            .store
            .transitions(0..u64::MAX, usize::MAX)
            .unwrap()
    }

    fn data_of(&self, life: u32) -> PathBuf {
        self.folder.path().join(format!("data-{life}"))
    }

    /// As the gateway does it.
    async fn begin_life(&mut self, data: PathBuf) {
        self.lives += 1;
        let began_ms = system_now_ms();
        let metrics = Metrics::new();
        let readiness = Readiness::starting();
        let config = StoreConfig {
            // How much room the temporary folder has is not what this is about.
            free_space_floor_mib: 0,
            ..StoreConfig::default()
        };
        let store = Arc::new(open(&data, &config, began_ms).await);
        let (devices, recovered) = store.load_devices().unwrap();
        let clock = Clock::starting_at(recovered.high_water_ms);
        let heard_until_ms = (recovered.high_water_ms != 0).then_some(recovered.high_water_ms);
        let holders = store.load_holders().unwrap();
        let numbers = Arc::new(Checkers::granted_by_all(CHECKERS));
        let by_all = numbers.are_granted_by_all();
        let decided = store.load_decisions().unwrap().into_iter();
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
            holders.withheld.iter().copied(),
            grants,
            heard_until_ms.unwrap_or_else(|| clock.now_ms().saturating_sub(1)),
        );
        let freshness = Arc::new(freshness.at_least(recovered.position));
        let deadlines = store.load_deadlines().unwrap();
        let bulletin = Arc::new(Bulletin::restore(
            store.load_coverage().unwrap(),
            &deadlines.registrations,
            deadlines.forgotten,
            holders.forgotten,
            recovered.position,
        ));
        let vigil = Vigil::new(VigilParts {
            bulletin: Arc::clone(&bulletin),
            deadlines: deadlines.registrations,
            max_deadlines: 1_000,
            start: heard_until_ms.map(|heard_until_ms| Start {
                heard_until_ms,
                began_ms,
            }),
            metrics: metrics.clone(),
        });
        let (order, orders) = orders::queue();
        let (audit, audit_ended) = Audit::start(&data, clock.now_ms(), &metrics).unwrap();
        // Nobody erases anything here.
        let (erase, _) = erase::queue();
        let commit_config = CommitConfig {
            queue_requests: NonZeroUsize::new(16).unwrap(),
            group_pings: NonZeroUsize::new(32).unwrap(),
            ..CommitConfig::default()
        };
        let (commit, committer) = Committer::new(
            &commit_config,
            CommitParts {
                store: Arc::clone(&store),
                freshness: Arc::clone(&freshness),
                metrics: metrics.clone(),
                clock: clock.clone(),
                devices: devices.into_iter().collect(),
                holders: Holders::restore(holders.withheld),
                checkers: Arc::clone(&numbers),
                position: recovered.position,
                retention: config.retention,
                vigil,
                orders,
                revocations: Arc::default(),
                invitations: Invitations::default(),
                erase,
                audit: audit.clone(),
                turned_away: Arc::new(AtomicU64::new(0)),
            },
        );
        let closing = CancellationToken::new();
        let incarnation = store.incarnation();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let within = runtime.enter();
        let (address, feed) = (self.open_feed)(
            FeedParts {
                tls: Arc::clone(&pki().server),
                checkers: CHECKERS.map(str::to_owned).into(),
                progress_interval: PROGRESS_INTERVAL,
                trust_domain: TRUST_DOMAIN.to_owned(),
                freshness: Arc::clone(&freshness),
                bulletin: Arc::clone(&bulletin),
                store: Arc::downgrade(&store),
                order,
                numbers,
                revocations: Arc::default(),
                incarnation,
                token_key: store.secret(),
                clock: clock.clone(),
                readiness: readiness.clone(),
                audit,
                metrics,
            },
            closing.clone(),
        );
        drop(within);
        let kill = CancellationToken::new();
        let committer = spawn(committer, kill.clone());
        readiness.advance(Stage::Ready);
        let bell: Arc<Bell> = Arc::default();
        let wakes = {
            let bell = Arc::clone(&bell);
            tokio::spawn(async move { bell.serve().await })
        };
        self.life = Some(Life {
            commit,
            address,
            incarnation,
            bell,
            clock,
            data,
            freshness,
            bulletin,
            store,
            kill,
            committer,
            closing,
            feed,
            runtime,
            audit_ended,
            wakes,
        });
    }
}

/// What is left of a life: its store, still open.
struct Remains(Arc<Store>);

impl Remains {
    /// Leaves to the next life what is on disk now. What the store writes when it is closed is not in it.
    fn leave(self, from: &Path, to: &Path) {
        // The store may still tidy up: a copy is good if nothing has changed meanwhile.
        while copy(from, to).is_err() || files(from).ok() != files(to).ok() {
            fs::remove_dir_all(to).unwrap();
        }
        drop(self.0);
    }
}

impl Life {
    /// Ends when its last handle is gone, or at once if `stop` cancels the committer.
    async fn end(self, stop: impl FnOnce(&CancellationToken)) -> Remains {
        stop(&self.kill);
        let is_crash = self.kill.is_cancelled();
        drop(self.commit);
        let ended = tokio::task::spawn_blocking(|| self.committer.join());
        ended.await.unwrap().unwrap().unwrap();
        if !is_crash {
            self.closing.cancel();
            // Whoever does not read its farewell is not waited for.
            drop(timeout(FAREWELL, self.feed).await);
        }
        self.runtime.shutdown_background();
        // The last who could have had something recorded has gone.
        self.audit_ended.await.ok();
        self.wakes.abort();
        Remains(self.store)
    }
}

/// The committer on a thread of its own, where it can be killed between two groups.
fn spawn(
    committer: Committer,
    kill: CancellationToken,
) -> thread::JoinHandle<Result<(), CommitError>> {
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.unwrap().block_on(async {
            tokio::select! {
                biased;
                () = kill.cancelled() => Ok(()),
                ended = committer.run() => ended,
            }
        })
    })
}

/// A question that is being answered may hold the store of the life before for a moment longer.
async fn open(data: &Path, config: &StoreConfig, now_ms: u64) -> Store {
    loop {
        match Store::open(data, config, now_ms) {
            Ok(store) => return store,
            Err(OpenError::Locked { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let copy = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            self::copy(&entry.path(), &copy)?;
        } else {
            fs::copy(entry.path(), copy)?;
        }
    }
    Ok(())
}

/// Every file under a folder, and its size.
fn files(folder: &Path) -> io::Result<BTreeMap<PathBuf, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = PathBuf::from(entry.file_name());
        if entry.file_type()?.is_dir() {
            let within = files(&entry.path())?.into_iter();
            found.extend(within.map(|(path, bytes)| (name.join(path), bytes)));
        } else {
            found.insert(name, entry.metadata()?.len());
        }
    }
    Ok(found)
}
