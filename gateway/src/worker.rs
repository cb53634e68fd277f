//! The workers: one pinned thread a core, each with a runtime and a QUIC endpoint of its own on the shared port.
//!
//! Knows threads and processors. Must not know what is served on an endpoint. A connection lives and dies on the
//! worker that accepted it (see `steer`), so whatever serves it needs no lock that another worker holds,
//! and wakes nobody else.
//!
//! # Bounds
//!
//! As many threads as [`DevicesConfig::workers`] says. What an endpoint may hold is in [`crate::transport`].

use std::{
    net::{SocketAddr, UdpSocket},
    num::NonZeroU8,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use quinn::{Endpoint, TokioRuntime};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};
use tokio::{runtime::Runtime, sync::oneshot, task::JoinSet};
use tracing::{debug, error};

use crate::{
    admission::AdmissionConfig,
    allowance::AllowanceConfig,
    gather::Gather,
    newcomers::{Counting, Newcomers},
    port,
    session::SessionConfig,
    transport,
};

/// Where devices connect, and what one of them may do.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct DevicesConfig {
    /// The UDP address that devices connect to. Loopback until somebody decides otherwise.
    pub listen: SocketAddr,
    /// How many threads serve devices, each on a core of its own; 0 for one per core that the process may use.
    pub workers: u8,
    /// How many connections may be open or shaking hands. Each takes about 40 KB of memory.
    pub connections: usize,
    /// How long a handshake may take.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// How long a connection may be silent before it is given up. Devices keep theirs alive every 20 s.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Size that is asked of the kernel for the buffers of each worker's socket. A burst from many devices is
    /// lost where it does not fit; the kernel caps it at net.core.rmem_max.
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
            workers: 0,
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

/// Why devices cannot be served.
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

/// The workers before they run: they hold their sockets, and nothing is received.
#[derive(Debug)]
pub struct Workers {
    sockets: Vec<UdpSocket>,
    server: quinn::ServerConfig,
    most_newcomers: usize,
    secret: [u8; 32],
}

impl Workers {
    /// Opens the port. `secret` is the store's: with the same one, a gateway that was killed and started again
    /// can tell devices that their connections are gone.
    ///
    /// # Errors
    /// When the address cannot be bound, or the settings do not fit QUIC.
    pub fn bind(
        config: &DevicesConfig,
        tls: Arc<rustls::ServerConfig>,
        secret: &[u8; 32],
    ) -> Result<Self, WorkerError> {
        let server = transport::server_config(config, tls, secret)?;
        let workers = NonZeroU8::new(config.workers).map_or_else(one_per_core, NonZeroU8::get);
        let sockets = port::open(config.listen, workers, config.socket_buffer_bytes);
        let sockets = sockets.map_err(|source| WorkerError::Bind {
            listen: config.listen,
            source,
        })?;
        Ok(Self {
            sockets,
            server,
            most_newcomers: config.admission.newcomers.get(),
            secret: *secret,
        })
    }

    /// Where devices connect.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.sockets[0].local_addr()
    }

    /// Starts the threads. Each runs what `serve` makes of its endpoint and of who waits there, and ends with it. A task for each worker
    /// ends when its worker does, whatever the reason.
    ///
    /// # Errors
    /// When the operating system gives no thread or no runtime. Threads that run by then go on until their
    /// endpoint fails; the caller gives up.
    pub fn spawn<F, Served>(self, serve: F) -> std::io::Result<JoinSet<()>>
    where
        F: Fn(Endpoint, Arc<Newcomers>) -> Served + Clone + Send + 'static,
        Served: Future<Output = ()>,
    {
        let cores = cores();
        let workers = u8::try_from(self.sockets.len()).unwrap_or(u8::MAX);
        let mut running = JoinSet::new();
        for (worker, socket) in (0..workers).zip(self.sockets) {
            let (alive, ended) = oneshot::channel::<()>();
            let core = cores.get(usize::from(worker) % cores.len().max(1)).copied();
            let runtime = runtime()?;
            let endpoint = transport::endpoint_config(&self.secret, worker, workers);
            let (mut server, serve) = (self.server.clone(), serve.clone());
            let newcomers = Arc::new(Newcomers::new(self.most_newcomers));
            server.crypto = Arc::new(Counting {
                tls: server.crypto,
                newcomers: Arc::clone(&newcomers),
            });
            thread::Builder::new()
                .name(format!("worker-{worker}"))
                .spawn(move || {
                    let _alive = alive;
                    pin_to(core);
                    // Within the runtime, which then watches the socket.
                    runtime.block_on(async {
                        match Endpoint::new(endpoint, Some(server), socket, Arc::new(TokioRuntime))
                        {
                            Ok(endpoint) => serve(endpoint, newcomers).await,
                            Err(error) => error!(%error, "a socket for devices cannot be used"),
                        }
                    });
                })?;
            running.spawn(async {
                // The thread sends nothing: it has ended when it has let go of its end.
                drop(ended.await);
            });
        }
        Ok(running)
    }
}

/// A runtime for one thread that lets packets gather while it is busy.
fn runtime() -> std::io::Result<Runtime> {
    // Both hooks run on the worker's own thread, so the lock is never waited for.
    let gather = Arc::new(Mutex::new(Gather::new(Instant::now())));
    let gather_woken = Arc::clone(&gather);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .on_thread_park(move || {
            let wait = gather.lock().before_sleep(Instant::now());
            if !wait.is_zero() {
                // Nothing is ready to run here, so all that this delays is what comes meanwhile: packets, answers
                // of the committer, newcomers and timers, by a millisecond at most.
                thread::sleep(wait);
            }
        })
        .on_thread_unpark(move || gather_woken.lock().woken(Instant::now()))
        .build()
}

/// The processors that this process may use.
fn cores() -> Vec<usize> {
    sched_getaffinity(None).map_or_else(
        |_| Vec::new(),
        |allowed| {
            (0..CpuSet::MAX_CPU)
                .filter(|&core| allowed.is_set(core))
                .collect()
        },
    )
}

fn one_per_core() -> u8 {
    u8::try_from(cores().len()).unwrap_or(u8::MAX).max(1)
}

/// Keeps this thread on one processor, so that what it knows of its connections stays in that one's cache.
fn pin_to(core: Option<usize>) {
    let Some(core) = core else { return };
    let mut only = CpuSet::new();
    only.set(core);
    if let Err(error) = sched_setaffinity(None, &only) {
        // It works as well, a little slower.
        debug!(core, %error, "a worker was not pinned");
    }
}
