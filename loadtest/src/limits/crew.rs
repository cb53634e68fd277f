//! The measuring client: a few threads, each with a socket and a runtime of its own, that play all devices
//! towards one server, whichever it is.
//!
//! Knows threads and what they are ordered to do. Must not know what is measured.
//!
//! # Bounds
//!
//! A thread takes one order at a time; who gives a second one waits. An order that is not done in time, because
//! a server owes answers, fails.

use std::{net::SocketAddr, num::NonZeroUsize, ops::Range, sync::Arc, thread, time::Duration};

use anyhow::Context;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{sleep, timeout},
};
use waypost_gateway::pki::Authority;

use super::{
    load::{self, Drive, Load},
    pace::Pace,
    wire::{Server, Wire},
};
use crate::link::{Credentials, Links};

/// Threads that play devices towards one server. They end, and their connections with them, when this is
/// dropped.
#[derive(Debug)]
pub(crate) struct Crew {
    members: Vec<mpsc::Sender<Order>>,
}

/// Who the devices are. Made beforehand: issuing certificates is no part of what is measured.
#[derive(Debug)]
pub(crate) struct Papers {
    authority: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    certificates: Vec<CertificateDer<'static>>,
}

#[derive(Debug)]
enum Order {
    Connect(usize, oneshot::Sender<anyhow::Result<u64>>),
    Prepare(Drive, Load, oneshot::Sender<anyhow::Result<()>>),
    Exchange(oneshot::Sender<anyhow::Result<()>>),
    Keep(Pace, oneshot::Sender<anyhow::Result<Vec<u64>>>),
}

/// What a thread of the crew has.
struct Member {
    server: Server,
    links: Arc<Links>,
    waiting: std::vec::IntoIter<Credentials>,
    handshakes_at_once: usize,
    wires: Vec<Wire>,
}

impl Papers {
    /// Issues certificates for this many devices, all with one key: a simulated fleet is one holder.
    ///
    /// # Errors
    /// When the authority cannot sign.
    pub(crate) fn issue(authority: &Authority, devices: u32) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let certificates = (0..devices)
            .map(|number| {
                let issued = authority.issue_device_with_key(load::device_id(number), &key)?;
                anyhow::Ok(issued.certificate_der())
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Self {
            authority: CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes())?,
            key: PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
            certificates,
        })
    }
}

impl Crew {
    /// Starts the threads. No device is connected yet.
    ///
    /// # Errors
    /// When there is no thread or no socket to be had.
    pub(crate) async fn start(
        server: Server,
        address: SocketAddr,
        papers: &Arc<Papers>,
        threads: NonZeroUsize,
    ) -> anyhow::Result<Self> {
        let mut members = Vec::new();
        let mut starting = Vec::new();
        for at in 0..threads.get() {
            let (orders, received) = mpsc::channel(1);
            let (started, start) = oneshot::channel();
            let papers = Arc::clone(papers);
            thread::Builder::new()
                .name("client".to_owned())
                .spawn(move || {
                    let runtime = match Builder::new_current_thread().enable_all().build() {
                        Ok(runtime) => runtime,
                        Err(error) => return drop(started.send(Err(error.into()))),
                    };
                    runtime.block_on(async {
                        match Member::new(server, address, &papers, at, threads.get()) {
                            Ok(member) => {
                                // Who does not wait for it has given up, and will give no orders.
                                _ = started.send(Ok(()));
                                member.serve(received).await;
                            }
                            Err(error) => drop(started.send(Err(error))),
                        }
                    });
                })?;
            members.push(orders);
            starting.push(start);
        }
        for start in starting {
            start.await.context(GONE)??;
        }
        Ok(Self { members })
    }

    /// Connects the devices with these numbers, some at a time, until each has its Hello answered. They must
    /// come in order, and each once. Returns how often one was turned away and came again.
    ///
    /// # Errors
    /// When a device does not get in.
    pub(crate) async fn connect(&self, devices: Range<usize>) -> anyhow::Result<u64> {
        let threads = self.members.len();
        let share = |at: usize| {
            devices
                .clone()
                .filter(|number| number % threads == at)
                .count()
        };
        let refusals = self.order(PATIENCE, |at, done| Order::Connect(share(at), done));
        Ok(refusals.await?.into_iter().sum())
    }

    /// Makes every device's frames for the next round.
    ///
    /// # Errors
    /// When a thread of the crew has ended.
    pub(crate) async fn prepare(&self, drive: Drive, load: Load) -> anyhow::Result<()> {
        self.order(PATIENCE, |_, done| Order::Prepare(drive, load, done))
            .await?;
        Ok(())
    }

    /// Sends what was prepared, with one request outstanding on each connection.
    ///
    /// # Errors
    /// When a connection breaks, or an answer is wrong.
    pub(crate) async fn exchange(&self) -> anyhow::Result<()> {
        self.order(PATIENCE, |_, done| Order::Exchange(done))
            .await?;
        Ok(())
    }

    /// Sends what was prepared when it is due. `pace` is that of the first thread. Returns the time from due to
    /// answered of each ping, in microseconds.
    ///
    /// # Errors
    /// When a connection breaks, or an answer is wrong.
    pub(crate) async fn keep(&self, pace: Pace) -> anyhow::Result<Vec<u64>> {
        let threads = self.members.len();
        let latencies = self.order(pace.length() + PATIENCE, |thread, done| {
            let pace = Pace {
                threads,
                thread,
                ..pace
            };
            Order::Keep(pace, done)
        });
        Ok(latencies.await?.concat())
    }

    async fn order<T>(
        &self,
        patience: Duration,
        order: impl Fn(usize, oneshot::Sender<anyhow::Result<T>>) -> Order,
    ) -> anyhow::Result<Vec<T>> {
        let mut pending = Vec::new();
        for (at, member) in self.members.iter().enumerate() {
            let (done, result) = oneshot::channel();
            member.send(order(at, done)).await.ok().context(GONE)?;
            pending.push(result);
        }
        let all = async {
            let mut results = Vec::new();
            for result in pending {
                results.push(result.await.context(GONE)??);
            }
            Ok(results)
        };
        timeout(patience, all)
            .await
            .with_context(|| format!("not every request was answered within {patience:?}"))?
    }
}

impl Member {
    fn new(
        server: Server,
        address: SocketAddr,
        papers: &Papers,
        at: usize,
        threads: usize,
    ) -> anyhow::Result<Self> {
        let one = const { NonZeroUsize::new(1).expect("not zero") };
        let links = Links::open(address, SERVER_NAME, papers.authority.clone(), one)?;
        let waiting = papers
            .certificates
            .iter()
            .skip(at)
            .step_by(threads)
            .map(|certificate| links.credentials(vec![certificate.clone()], papers.key.clone_key()))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self {
            server,
            links: Arc::new(links),
            waiting: waiting.into_iter(),
            handshakes_at_once: (HANDSHAKES_AT_ONCE / threads).max(1),
            wires: Vec::new(),
        })
    }

    /// Does what is ordered until no more orders can come. Who does not wait for a result any more has
    /// given up, and needs none.
    async fn serve(mut self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Connect(devices, done) => drop(done.send(self.connect(devices).await)),
                Order::Prepare(drive, load, done) => {
                    for wire in &mut self.wires {
                        wire.prepare(drive, load.requests, load.request_pings);
                    }
                    drop(done.send(Ok(())));
                }
                Order::Exchange(done) => drop(done.send(self.exchange().await)),
                Order::Keep(pace, done) => drop(done.send(pace.keep(&mut self.wires).await)),
            }
        }
    }

    async fn connect(&mut self, devices: usize) -> anyhow::Result<u64> {
        let mut waiting = self.waiting.by_ref().take(devices);
        let mut connecting = JoinSet::new();
        let mut refusals = 0;
        loop {
            while connecting.len() < self.handshakes_at_once
                && let Some(credentials) = waiting.next()
            {
                let links = Arc::clone(&self.links);
                connecting.spawn(come_in(self.server, links, credentials));
            }
            let Some(connected) = connecting.join_next().await else {
                return Ok(refusals);
            };
            let (wire, refused) = connected??;
            self.wires.push(wire);
            refusals += refused;
        }
    }

    async fn exchange(&mut self) -> anyhow::Result<()> {
        let mut running = JoinSet::new();
        for wire in self.wires.drain(..) {
            running.spawn(wire.exchange());
        }
        while let Some(wire) = running.join_next().await {
            self.wires.push(wire??);
        }
        Ok(())
    }
}

/// Connects and says Hello; a device that is turned away comes again, each time after a longer wait. Returns
/// how often that was.
async fn come_in(
    server: Server,
    links: Arc<Links>,
    credentials: Credentials,
) -> anyhow::Result<(Wire, u64)> {
    let mut refusals = 0;
    loop {
        match links.connect(&credentials).await {
            Ok(link) => return Ok((Wire::open(server, link).await?, refusals.into())),
            Err(_) if refusals < CONNECT_REFUSALS => {
                refusals += 1;
                sleep(CONNECT_WAIT * refusals).await;
            }
            Err(error) => {
                return Err(anyhow::Error::from(error).context("a device does not get in"));
            }
        }
    }
}

/// A name in the development server's certificate.
const SERVER_NAME: &str = "localhost";
/// In all threads together: as many as the gateway lets be in progress from one address, and far more than
/// there are cores.
const HANDSHAKES_AT_ONCE: usize = 128;
const CONNECT_REFUSALS: u32 = 10;
const CONNECT_WAIT: Duration = Duration::from_millis(20);
/// Longer than any order should take on a slow machine, and shorter than people wait for a hung one.
const PATIENCE: Duration = Duration::from_secs(120);
const GONE: &str = "a client thread has ended early";
