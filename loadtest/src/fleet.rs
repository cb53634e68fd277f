//! The devices of a run and their books.
//!
//! Knows who is connected and what was acknowledged when. Must not know what is sent or why, nor QUIC.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    ops::Range,
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use rcgen::KeyPair;
use rustls::{
    crypto::ring::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject},
};
use tokio::{
    runtime::{Builder, EnterGuard, Runtime},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use waypost_gateway::pki::Authority;
use waypost_proto::{id::DeviceId, outbox::Event, ping::Ping};

use crate::{
    device::{Device, DeviceConfig, Observer},
    give_way::give_way,
    ledger::DeviceLedger,
    link::{Handshake, KEEP_ALIVE_INTERVAL, LinkError, Links},
    progress::Progress,
    report::{Count, Latencies},
    run::Target,
    verify::Expected,
};

/// All devices of a run.
#[derive(Debug)]
pub struct Fleet {
    crews: Vec<Crew>,
    devices: Vec<Device>,
    books: Arc<Books>,
}

/// What a fleet is made of.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// How many settled pings are remembered of each device, about.
    pub keep_each: usize,
    /// How many UDP sockets carry all connections of a group.
    pub sockets: NonZeroUsize,
    /// How often a silent device says that it is still there; `None` for never.
    pub keep_alive: Option<Duration>,
    /// The groups, in the order of the devices; what is left over belongs to the last. Empty for one group.
    pub crews: Vec<CrewConfig>,
}

/// A group of devices that are counted apart from others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CrewConfig {
    /// How many.
    pub devices: usize,
    /// Whether they resume their sessions and send early data.
    pub resumes: bool,
    /// Where their work is done.
    pub threads: CrewThreads,
}

/// Where the work of a group is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CrewThreads {
    /// With that of all others.
    #[default]
    Shared,
    /// On a thread of their own, so that what they measure is not how long they waited for the processors behind
    /// the others.
    Apart,
    /// On threads that run when nobody else wants to: they stand for machines elsewhere, whose work must not take
    /// the processors from a gateway on this one.
    GivingWay,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            keep_each: usize::MAX,
            sockets: SOCKETS,
            keep_alive: Some(KEEP_ALIVE_INTERVAL),
            crews: Vec::new(),
        }
    }
}

/// How fast devices connect.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// How many begin in a second; `None` for as many as get through.
    pub per_s: Option<f64>,
    /// How many may be on their way in at a time.
    pub at_once: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            per_s: None,
            at_once: HANDSHAKES_AT_ONCE,
        }
    }
}

/// The sockets of a group, and where its tasks run.
#[derive(Debug)]
struct Crew {
    devices: Range<usize>,
    links: Arc<Links>,
    own: Option<OwnRuntime>,
}

/// A runtime for one group, or for some of the readers. It may be dropped anywhere.
#[derive(Debug)]
pub(crate) struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    /// None for devices that need none.
    pub(crate) fn start(threads: CrewThreads) -> anyhow::Result<Option<Self>> {
        let mut builder = Builder::new_multi_thread();
        match threads {
            CrewThreads::Shared => return Ok(None),
            CrewThreads::Apart => builder.worker_threads(1).thread_name("apart"),
            CrewThreads::GivingWay => builder
                .worker_threads(thread::available_parallelism().map_or(1, NonZeroUsize::get))
                .thread_name("giving-way")
                .on_thread_start(|| {
                    // Where it is not allowed, they do not give way, and the figures are the worse for it.
                    _ = give_way();
                }),
        };
        let runtime = builder
            .enable_all()
            .build()
            .context("no thread to be had")?;
        Ok(Some(Self(Some(runtime))))
    }

    pub(crate) fn enter(&self) -> Option<EnterGuard<'_>> {
        self.0.as_ref().map(Runtime::enter)
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        // To wait for it is not allowed within another runtime, and nothing is left to wait for.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// What all devices write into.
#[derive(Debug)]
struct Books {
    begun: Instant,
    ledgers: Vec<Mutex<DeviceLedger>>,
    groups: Vec<GroupBook>,
    /// 0 before the first acknowledgement.
    last_acked_us: AtomicU64,
    /// Why connections ended that should not have, and how often.
    breaks: Mutex<BTreeMap<String, u64>>,
}

/// What is counted of a group.
#[derive(Debug, Default)]
struct GroupBook {
    sent: AtomicU64,
    acked: AtomicU64,
    dropped: AtomicU64,
    /// Devices whose Hello was answered on a connection that still is.
    connected: AtomicU64,
    latencies: Mutex<AckLatencies>,
}

/// From due to acknowledged.
#[derive(Debug, Default)]
struct AckLatencies {
    phases: Vec<Phase>,
    /// By how the connection began that brought the acknowledgement.
    by_handshake: [Latencies; 3],
    recent: Latencies,
}

/// Pings that were due from some time on, until the next phase.
#[derive(Debug, Default)]
struct Phase {
    from_us: u64,
    latencies: Latencies,
}

/// Writes what one device learns into the books.
#[derive(Debug)]
struct Bookkeeper {
    books: Arc<Books>,
    at: usize,
    group: usize,
    is_connected: bool,
    is_welcomed: bool,
    /// Of the connection that is, or was last.
    handshake: Handshake,
}

impl Fleet {
    /// Gives each device a certificate and makes it, not connected yet.
    ///
    /// # Errors
    /// When the development authority cannot be used, or there is no socket.
    pub async fn enrol(
        devices: &[DeviceId],
        target: &Target,
        config: &FleetConfig,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        progress.begin("enrolling", Some(devices.len() as u64));
        let authority = Authority::open(&target.pki)?;
        let root = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes())
            .context("the authority's certificate is not PEM")?;
        // One key pair for all: a simulated fleet is one holder, and making keys is not what is tested.
        let key = Arc::new(KeyPair::generate()?);
        let signing_key = any_ecdsa_type(&PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .context("the devices' key cannot be used")?;
        let certificates = issue_all(authority, key.clone(), devices, progress).await?;
        let plans = crews_of(&config.crews, devices.len());
        let books = Arc::new(Books {
            begun: Instant::now(),
            ledgers: devices
                .iter()
                .map(|device| Mutex::new(DeviceLedger::new(*device, config.keep_each)))
                .collect(),
            groups: plans.iter().map(|_| GroupBook::default()).collect(),
            last_acked_us: AtomicU64::default(),
            breaks: Mutex::default(),
        });
        let mut certificates = certificates.into_iter();
        let mut made = Vec::with_capacity(devices.len());
        let mut crews = Vec::with_capacity(plans.len());
        for (group, (range, plan)) in (0..).zip(plans) {
            let own = OwnRuntime::start(plan.threads)?;
            let entered = own.as_ref().and_then(OwnRuntime::enter);
            let links = Links::open(target.devices, GATEWAY_NAME, root.clone(), config.sockets)?;
            let links = Arc::new(if plan.resumes {
                links.resuming()
            } else {
                links
            });
            for (at, certificate) in range.clone().zip(certificates.by_ref()) {
                let config = DeviceConfig {
                    credentials: links.credentials_with(certificate, &signing_key)?,
                    capacity: CAPACITY,
                    seed: at as u64,
                };
                let bookkeeper = Bookkeeper {
                    books: books.clone(),
                    at,
                    group,
                    is_connected: false,
                    is_welcomed: false,
                    handshake: Handshake::Full,
                };
                made.push(Device::spawn(links.clone(), config, bookkeeper));
                if at.is_multiple_of(SPAWN_STRIDE) {
                    progress.at(devices.len() as u64, || {
                        format!("{} devices made", Count(at as u64))
                    });
                }
            }
            drop(entered);
            crews.push(Crew {
                devices: range,
                links,
                own,
            });
        }
        Ok(Self {
            crews,
            devices: made,
            books,
        })
    }

    /// Connects all devices, not too many at a time.
    ///
    /// # Errors
    /// When none gets through for too long.
    pub async fn connect(
        &self,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let groups = self.all_groups();
        progress.begin("connecting", Some(self.devices.len() as u64));
        let begun = Instant::now();
        self.connect_groups(groups, Pace::default(), stop, |connected| {
            progress.at(connected, || per_s(connected, begun));
        })
        .await
    }

    /// Connects the devices of some groups at a pace. `look` is told how many of them are there, again and
    /// again.
    ///
    /// # Errors
    /// When none gets through for too long.
    pub async fn connect_groups(
        &self,
        groups: Range<usize>,
        pace: Pace,
        stop: &CancellationToken,
        mut look: impl FnMut(u64),
    ) -> anyhow::Result<()> {
        let devices = self.devices_of(groups.clone());
        let total = devices.len() as u64;
        let mut waiting = self.devices[devices].iter();
        let begun = Instant::now();
        let mut asked = 0;
        let mut moved = (0, begun);
        loop {
            let connected = self.connected_in(groups.clone());
            look(connected);
            if connected == total || stop.is_cancelled() {
                return Ok(());
            }
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a count of devices; casts of floats saturate"
            )]
            let due = pace.per_s.map_or(total, |per_s| {
                (begun.elapsed().as_secs_f64() * per_s) as u64 + 1
            });
            while asked < due.min(connected + pace.at_once)
                && let Some(device) = waiting.next()
            {
                device.go_online();
                asked += 1;
            }
            if moved.0 != connected || asked == connected {
                moved = (connected, Instant::now());
            }
            if CONNECT_PATIENCE <= moved.1.elapsed() {
                let reasons: Vec<String> = self.breaks().into_keys().collect();
                bail!(
                    "only {} of {} devices could connect: {}",
                    Count(connected),
                    Count(total),
                    reasons.join("; ")
                );
            }
            sleep(CONNECT_LOOK_INTERVAL).await;
        }
    }

    /// Ends every connection of some groups, whatever is in flight.
    pub async fn disconnect_groups(&self, groups: Range<usize>) {
        self.devices[self.devices_of(groups.clone())]
            .iter()
            .for_each(Device::go_offline);
        while 0 < self.connected_in(groups.clone()) {
            sleep(CONNECT_LOOK_INTERVAL).await;
        }
    }

    /// Lets the devices of a group be connected while they have something to send, and only then.
    pub fn wake_when_needed(&self, group: usize) {
        self.devices[self.devices_of(group..group + 1)]
            .iter()
            .for_each(Device::go_online_when_needed);
    }

    /// Gives every socket another port.
    ///
    /// # Errors
    /// When the system gives no socket.
    pub fn rebind(&self) -> anyhow::Result<()> {
        self.crews.iter().try_for_each(|crew| {
            let _entered = crew.own.as_ref().and_then(OwnRuntime::enter);
            crew.links.rebind()
        })
    }

    /// From now on, latencies are of another phase: see [`Self::phase_latencies`].
    pub fn begin_phase(&self) {
        let from_us = self.now_us();
        for group in &self.books.groups {
            group.latencies.lock().phases.push(Phase {
                from_us,
                latencies: Latencies::default(),
            });
        }
    }

    /// How many phases have begun.
    #[must_use]
    pub fn phases(&self) -> usize {
        self.books.groups[0].latencies.lock().phases.len()
    }

    /// How many pings of a group were sent, and how many of them acknowledged.
    #[must_use]
    pub fn counts_of(&self, group: usize) -> (u64, u64) {
        let of = group..group + 1;
        (
            self.sum(of.clone(), |book| &book.sent),
            self.sum(of, |book| &book.acked),
        )
    }

    /// Hands a device a ping that it has kept from before the run; its latency is not measured.
    pub fn hold(&self, at: usize, ping: Ping) {
        self.send(at, ping, HELD_DUE_US);
    }

    fn all_groups(&self) -> Range<usize> {
        0..self.crews.len()
    }

    fn devices_of(&self, groups: Range<usize>) -> Range<usize> {
        match self.crews.get(groups) {
            Some([first, .., last]) => first.devices.start..last.devices.end,
            Some([only]) => only.devices.clone(),
            _ => 0..0,
        }
    }

    fn book_of(&self, at: usize) -> &GroupBook {
        let group = self.crews.partition_point(|crew| crew.devices.end <= at);
        &self.books.groups[group.min(self.books.groups.len() - 1)]
    }

    /// Hands a ping to its device. It was due at `due_us` on the clock of [`Self::now_us`].
    pub fn send(&self, at: usize, ping: Ping, due_us: u64) {
        let book = self.book_of(at);
        book.sent.fetch_add(1, Ordering::Relaxed);
        // Booked and pushed under one lock, so that the books and the outbox have one order.
        let mut ledger = self.books.ledgers[at].lock();
        ledger.send(&ping, due_us);
        if let Some(seq) = self.devices[at].push(ping).dropped {
            ledger.dropped(seq);
            book.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Hands a ping to its device again, under the number that it had.
    pub fn send_again(&self, at: usize, ping: Ping, due_us: u64) {
        let mut ledger = self.books.ledgers[at].lock();
        // A device that had to begin a new epoch has no such ping any more; then nothing is resent.
        if self.devices[at].push_again(ping) {
            ledger.send_again(due_us);
            self.book_of(at).sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The run's own clock.
    #[must_use]
    pub fn now_us(&self) -> u64 {
        self.books.us_at(Instant::now())
    }

    /// How many pings were acknowledged.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.sum(self.all_groups(), |book| &book.acked)
    }

    /// How many pings wait for an answer.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.open_in(self.all_groups())
    }

    /// How many pings of some groups wait for an answer.
    #[must_use]
    pub fn open_in(&self, groups: Range<usize>) -> u64 {
        let answered = self.sum(groups.clone(), |book| &book.acked)
            + self.sum(groups.clone(), |book| &book.dropped);
        self.sum(groups, |book| &book.sent).saturating_sub(answered)
    }

    /// How many devices are connected.
    #[must_use]
    pub fn connected(&self) -> u64 {
        self.connected_in(self.all_groups())
    }

    /// How many devices of some groups are connected.
    #[must_use]
    pub fn connected_in(&self, groups: Range<usize>) -> u64 {
        self.sum(groups, |book| &book.connected)
    }

    fn sum(&self, groups: Range<usize>, of: fn(&GroupBook) -> &AtomicU64) -> u64 {
        self.books.groups[groups]
            .iter()
            .map(|book| of(book).load(Ordering::Relaxed))
            .sum()
    }

    /// When the newest acknowledgement came, on the clock of [`Self::now_us`]; `None` before the first.
    #[must_use]
    pub fn last_acked_us(&self) -> Option<u64> {
        Some(self.books.last_acked_us.load(Ordering::Relaxed)).filter(|us| 0 < *us)
    }

    /// From due to acknowledged, of all pings that were due while the run went on.
    #[must_use]
    pub fn ack_latencies(&self) -> Latencies {
        self.all_groups()
            .map(|group| self.group_latencies(group))
            .fold(Latencies::default(), Latencies::and)
    }

    /// The same of one group.
    #[must_use]
    pub fn group_latencies(&self, group: usize) -> Latencies {
        let latencies = self.books.groups[group].latencies.lock();
        latencies
            .phases
            .iter()
            .map(|phase| phase.latencies.clone())
            .fold(Latencies::default(), Latencies::and)
    }

    /// The same of one group and one phase, by when the pings were due. The phase from the beginning of the
    /// run on is 0.
    #[must_use]
    pub fn phase_latencies(&self, group: usize, phase: usize) -> Latencies {
        let latencies = self.books.groups[group].latencies.lock();
        latencies
            .phases
            .get(phase)
            .map_or_else(Latencies::default, |phase| phase.latencies.clone())
    }

    /// The same of one group, by how the connection began that brought the acknowledgement.
    #[must_use]
    pub fn latencies_after(&self, group: usize, handshake: Handshake) -> Latencies {
        self.books.groups[group].latencies.lock().by_handshake[handshake as usize].clone()
    }

    /// What was acknowledged since this was asked last, of some groups.
    #[must_use]
    pub fn take_recent_latencies(&self, groups: Range<usize>) -> Latencies {
        self.books.groups[groups]
            .iter()
            .map(|book| std::mem::take(&mut book.latencies.lock().recent))
            .fold(Latencies::default(), Latencies::and)
    }

    /// Why connections ended that should not have, and how often.
    #[must_use]
    pub fn breaks(&self) -> BTreeMap<String, u64> {
        self.books.breaks.lock().clone()
    }

    /// What checkers must be told from now on, at least.
    #[must_use]
    pub fn expected(&self) -> Vec<Expected> {
        self.books
            .ledgers
            .iter()
            .map(|ledger| Expected::from(&*ledger.lock()))
            .collect()
    }

    /// Disconnects all devices and hands out their books.
    pub async fn close(self) -> Vec<DeviceLedger> {
        self.devices.iter().for_each(Device::go_offline);
        for device in self.devices {
            device.stop().await;
        }
        // Only so that the gateway sees them go; it would notice by itself.
        for crew in &self.crews {
            let _left = timeout(FAREWELL_PATIENCE, crew.links.wait_idle()).await;
        }
        match Arc::try_unwrap(self.books) {
            Ok(books) => books.ledgers.into_iter().map(Mutex::into_inner).collect(),
            // Each device's task has ended and its bookkeeper with it.
            Err(_still_written) => Vec::new(),
        }
    }
}

impl Books {
    fn us_at(&self, instant: Instant) -> u64 {
        u64::try_from((instant - self.begun).as_micros()).unwrap_or(u64::MAX)
    }
}

impl AckLatencies {
    fn record(&mut self, due_us: u64, read_us: u64, handshake: Handshake) {
        if due_us == HELD_DUE_US {
            return;
        }
        let latency_us = read_us.saturating_sub(due_us);
        self.recent.record_us(latency_us);
        self.by_handshake[handshake as usize].record_us(latency_us);
        if self.phases.is_empty() {
            self.phases.push(Phase::default());
        }
        let began = self.phases.partition_point(|phase| phase.from_us <= due_us);
        self.phases[began.max(1) - 1]
            .latencies
            .record_us(latency_us);
    }
}

impl Observer for Bookkeeper {
    fn connected(&mut self) {
        self.is_connected = true;
        self.books.ledgers[self.at].lock().connected();
    }

    fn established(&mut self, handshake: Handshake) {
        self.handshake = handshake;
    }

    fn observed(&mut self, event: &Event, read_at: Instant) {
        let books = &*self.books;
        let group = &books.groups[self.group];
        if matches!(event, Event::Welcomed { .. })
            && !std::mem::replace(&mut self.is_welcomed, true)
        {
            group.connected.fetch_add(1, Ordering::Relaxed);
        }
        let (read_us, handshake) = (books.us_at(read_at), self.handshake);
        let mut acked = 0;
        let mut latencies = None;
        books.ledgers[self.at].lock().book(event, |due_us| {
            let latencies = latencies.get_or_insert_with(|| group.latencies.lock());
            latencies.record(due_us, read_us, handshake);
            acked += 1;
        });
        drop(latencies);
        if 0 < acked {
            books.last_acked_us.fetch_max(read_us, Ordering::Relaxed);
            group.acked.fetch_add(acked, Ordering::Relaxed);
        }
    }

    fn disconnected(&mut self, error: Option<&LinkError>) {
        let books = &*self.books;
        if std::mem::take(&mut self.is_welcomed) {
            let connected = &books.groups[self.group].connected;
            connected.fetch_sub(1, Ordering::Relaxed);
        }
        let was_connected = std::mem::take(&mut self.is_connected);
        if let Some(error) = error {
            if was_connected {
                books.ledgers[self.at].lock().broke();
            }
            let reason = format!("{:#}", anyhow::Error::from(error.clone()));
            *books.breaks.lock().entry(reason).or_default() += 1;
        }
    }
}

/// Signs a certificate for each device, on all processors: for a hundred thousand it takes a while.
async fn issue_all(
    authority: Authority,
    key: Arc<KeyPair>,
    devices: &[DeviceId],
    progress: &Progress,
) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let issued = Arc::new(AtomicU64::new(0));
    let mut signing = spawn_blocking({
        let (devices, issued) = (devices.to_vec(), issued.clone());
        move || {
            let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
            let share = devices.len().div_ceil(threads).max(1);
            thread::scope(|scope| {
                let sign = |device: &DeviceId| {
                    let certificate = authority.issue_device_with_key(*device, &key)?;
                    issued.fetch_add(1, Ordering::Relaxed);
                    anyhow::Ok(certificate.certificate_der())
                };
                let signers: Vec<_> = devices
                    .chunks(share)
                    .map(|chunk| {
                        scope.spawn(move || chunk.iter().map(sign).collect::<Result<Vec<_>, _>>())
                    })
                    .collect();
                let mut certificates = Vec::with_capacity(devices.len());
                for signer in signers {
                    match signer.join() {
                        Ok(signed) => certificates.extend(signed?),
                        Err(panicked) => resume_unwind(panicked),
                    }
                }
                Ok(certificates)
            })
        }
    });
    let begun = Instant::now();
    loop {
        tokio::select! {
            signed = &mut signing => return signed.context("signing has failed")?,
            () = sleep(ENROL_LOOK_INTERVAL) => {
                let issued = issued.load(Ordering::Relaxed);
                progress.at(issued, || per_s(issued, begun));
            }
        }
    }
}

/// Where the devices of each group are.
fn crews_of(crews: &[CrewConfig], devices: usize) -> Vec<(Range<usize>, CrewConfig)> {
    let mut from = 0;
    let mut placed: Vec<_> = crews
        .iter()
        .map(|crew| {
            let range = from..(from + crew.devices).min(devices);
            from = range.end;
            (range, *crew)
        })
        .collect();
    match placed.last_mut() {
        Some((last, _)) => last.end = devices,
        None => placed.push((0..devices, CrewConfig::default())),
    }
    placed
}

pub(crate) fn per_s(done: u64, since: Instant) -> String {
    let elapsed_s = since.elapsed().as_secs_f64().max(0.001);
    format!("{}/s", Count::of(done as f64 / elapsed_s))
}

/// A name in the development server's certificate.
const GATEWAY_NAME: &str = "localhost";
/// Enough that no socket's buffer is where packets get lost.
const SOCKETS: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");
/// How many pings a device holds before it drops its oldest: more than any has in a day of AIS.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(100_000).expect("not zero");
/// Handshakes in progress at a time. More only wait for the same processors.
const HANDSHAKES_AT_ONCE: u64 = 128;
const ENROL_LOOK_INTERVAL: Duration = Duration::from_millis(100);
const SPAWN_STRIDE: usize = 1_000;
/// When a ping was due that a device has kept from before the run: the run's clock has no such time.
const HELD_DUE_US: u64 = 0;
const CONNECT_LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// Longer than a device waits for a handshake, and then tries again.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(devices: usize) -> CrewConfig {
        CrewConfig {
            devices,
            ..CrewConfig::default()
        }
    }

    #[test]
    fn every_device_belongs_to_one_group() {
        let ranges = |crews: &[usize], devices| -> Vec<Range<usize>> {
            let crews: Vec<_> = crews.iter().copied().map(sized).collect();
            let placed = crews_of(&crews, devices).into_iter();
            placed.map(|(range, _)| range).collect()
        };
        assert_eq!(ranges(&[], 7), vec![Range { start: 0, end: 7 }]);
        assert_eq!(ranges(&[3, 4], 7), [0..3, 3..7]);
        assert_eq!(ranges(&[3, 2], 7), [0..3, 3..7], "the last has the rest");
        assert_eq!(ranges(&[9, 2], 7), [0..7, 7..7], "no more than there are");
    }

    #[test]
    fn a_latency_is_of_the_phase_in_which_the_ping_was_due() {
        let mut latencies = AckLatencies::default();
        for from_us in [10, 100, 1_000] {
            latencies.phases.push(Phase {
                from_us,
                latencies: Latencies::default(),
            });
        }
        latencies.record(HELD_DUE_US, 5_000, Handshake::Full);
        for (due_us, read_us) in [(10, 2_000), (99, 2_000), (100, 101), (5_000, 5_001)] {
            latencies.record(due_us, read_us, Handshake::Resumed);
        }
        let counts: Vec<_> = latencies
            .phases
            .iter()
            .map(|phase| phase.latencies.count())
            .collect();
        assert_eq!(
            counts,
            [2, 1, 1],
            "and what was held from before is of none"
        );
        let by_handshake = latencies.by_handshake.each_ref().map(Latencies::count);
        assert_eq!(by_handshake, [0, 4, 0]);
    }
}
