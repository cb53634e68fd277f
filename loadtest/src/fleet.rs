//! The devices of a run and their books.
//!
//! Knows who is connected and what was acknowledged when. Must not know what is sent or why, nor QUIC.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use waypost_gateway::pki::Authority;
use waypost_proto::{id::DeviceId, outbox::Event, ping::Ping};

use crate::{
    device::{Device, DeviceConfig, Observer},
    ledger::DeviceLedger,
    link::{LinkError, Links},
    progress::Progress,
    report::{Count, Latencies},
    run::Target,
    verify::Expected,
};

/// All devices of a run.
#[derive(Debug)]
pub struct Fleet {
    links: Arc<Links>,
    devices: Vec<Device>,
    books: Arc<Books>,
}

/// What all devices write into.
#[derive(Debug)]
struct Books {
    begun: Instant,
    ledgers: Vec<Mutex<DeviceLedger>>,
    latencies: Mutex<AckLatencies>,
    sent: AtomicU64,
    acked: AtomicU64,
    dropped: AtomicU64,
    /// Devices whose Hello was answered on a connection that still is.
    connected: AtomicU64,
    /// 0 before the first acknowledgement.
    last_acked_us: AtomicU64,
    /// Why connections ended that should not have, and how often.
    breaks: Mutex<BTreeMap<String, u64>>,
}

#[derive(Debug, Default)]
struct AckLatencies {
    all: Latencies,
    recent: Latencies,
}

/// Writes what one device learns into the books.
#[derive(Debug)]
struct Bookkeeper {
    books: Arc<Books>,
    at: usize,
    is_welcomed: bool,
}

impl Fleet {
    /// Gives each device a certificate and makes it, not connected yet. For each, at most about
    /// `keep_each` settled pings are remembered.
    ///
    /// # Errors
    /// When the development authority cannot be used, or there is no socket.
    pub async fn enrol(
        devices: &[DeviceId],
        target: &Target,
        keep_each: usize,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        progress.begin("enrolling", Some(devices.len() as u64));
        let authority = Authority::open(&target.pki)?;
        let root = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes())
            .context("the authority's certificate is not PEM")?;
        let links = Arc::new(Links::open(target.devices, GATEWAY_NAME, root, SOCKETS)?);
        let books = Arc::new(Books {
            begun: Instant::now(),
            ledgers: devices
                .iter()
                .map(|device| Mutex::new(DeviceLedger::new(*device, keep_each)))
                .collect(),
            latencies: Mutex::default(),
            sent: AtomicU64::default(),
            acked: AtomicU64::default(),
            dropped: AtomicU64::default(),
            connected: AtomicU64::default(),
            last_acked_us: AtomicU64::default(),
            breaks: Mutex::default(),
        });
        // One key pair for all: a simulated fleet is one holder, and making keys is not what is tested.
        let key = KeyPair::generate()?;
        let mut made = Vec::with_capacity(devices.len());
        for (at, device) in devices.iter().enumerate() {
            let issued = authority.issue_device_with_key(*device, &key)?;
            let credentials =
                links.credentials(vec![issued.certificate_der()], issued.private_key_der())?;
            let config = DeviceConfig {
                credentials,
                capacity: CAPACITY,
                seed: at as u64,
            };
            let bookkeeper = Bookkeeper {
                books: books.clone(),
                at,
                is_welcomed: false,
            };
            made.push(Device::spawn(links.clone(), config, bookkeeper));
            if at.is_multiple_of(ENROL_STRIDE) {
                progress.at(at as u64, String::new);
                tokio::task::yield_now().await;
            }
        }
        Ok(Self {
            links,
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
        let total = self.devices.len() as u64;
        progress.begin("connecting", Some(total));
        let mut waiting = self.devices.iter();
        let mut asked = 0;
        let mut moved = (0, Instant::now());
        loop {
            let connected = self.connected();
            if connected == total || stop.is_cancelled() {
                return Ok(());
            }
            while asked < connected + HANDSHAKES_AT_ONCE
                && let Some(device) = waiting.next()
            {
                device.go_online();
                asked += 1;
            }
            if moved.0 != connected {
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
            progress.at(connected, String::new);
            sleep(CONNECT_LOOK_INTERVAL).await;
        }
    }

    /// Ends every connection and makes new ones.
    ///
    /// # Errors
    /// When none gets through for too long.
    pub async fn reconnect(
        &self,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        self.devices.iter().for_each(Device::go_offline);
        while 0 < self.connected() {
            sleep(CONNECT_LOOK_INTERVAL).await;
        }
        self.connect(progress, stop).await
    }

    /// Hands a ping to its device. It was due at `due_us` on the clock of [`Self::now_us`].
    pub fn send(&self, at: usize, ping: Ping, due_us: u64) {
        self.books.sent.fetch_add(1, Ordering::Relaxed);
        // Booked and pushed under one lock, so that the books and the outbox have one order.
        let mut ledger = self.books.ledgers[at].lock();
        ledger.send(&ping, due_us);
        if let Some(seq) = self.devices[at].push(ping).dropped {
            ledger.dropped(seq);
            self.books.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Hands a ping to its device again, under the number that it had.
    pub fn send_again(&self, at: usize, ping: Ping, due_us: u64) {
        let mut ledger = self.books.ledgers[at].lock();
        // A device that had to begin a new epoch has no such ping any more; then nothing is resent.
        if self.devices[at].push_again(ping) {
            ledger.send_again(due_us);
            self.books.sent.fetch_add(1, Ordering::Relaxed);
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
        self.books.acked.load(Ordering::Relaxed)
    }

    /// How many pings wait for an answer.
    #[must_use]
    pub fn open(&self) -> u64 {
        let answered = self.acked() + self.books.dropped.load(Ordering::Relaxed);
        self.books
            .sent
            .load(Ordering::Relaxed)
            .saturating_sub(answered)
    }

    /// How many devices are connected.
    #[must_use]
    pub fn connected(&self) -> u64 {
        self.books.connected.load(Ordering::Relaxed)
    }

    /// When the newest acknowledgement came, on the clock of [`Self::now_us`]; `None` before the first.
    #[must_use]
    pub fn last_acked_us(&self) -> Option<u64> {
        Some(self.books.last_acked_us.load(Ordering::Relaxed)).filter(|us| 0 < *us)
    }

    /// From due to acknowledged.
    #[must_use]
    pub fn ack_latencies(&self) -> Latencies {
        self.books.latencies.lock().all.clone()
    }

    /// The same since this was asked last.
    #[must_use]
    pub fn take_recent_latencies(&self) -> Latencies {
        std::mem::take(&mut self.books.latencies.lock().recent)
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
        let _left = timeout(FAREWELL_PATIENCE, self.links.wait_idle()).await;
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

impl Observer for Bookkeeper {
    fn connected(&mut self) {
        self.books.ledgers[self.at].lock().connected();
    }

    fn observed(&mut self, event: &Event, read_at: Instant) {
        let books = &*self.books;
        if matches!(event, Event::Welcomed { .. })
            && !std::mem::replace(&mut self.is_welcomed, true)
        {
            books.connected.fetch_add(1, Ordering::Relaxed);
        }
        let read_us = books.us_at(read_at);
        let mut acked = 0;
        let mut latencies = None;
        books.ledgers[self.at].lock().book(event, |due_us| {
            let latencies = latencies.get_or_insert_with(|| books.latencies.lock());
            let latency_us = read_us.saturating_sub(due_us);
            latencies.all.record_us(latency_us);
            latencies.recent.record_us(latency_us);
            acked += 1;
        });
        if 0 < acked {
            books.last_acked_us.fetch_max(read_us, Ordering::Relaxed);
            books.acked.fetch_add(acked, Ordering::Relaxed);
        }
    }

    fn disconnected(&mut self, error: Option<&LinkError>) {
        if std::mem::take(&mut self.is_welcomed) {
            self.books.connected.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(error) = error {
            let reason = format!("{:#}", anyhow::Error::from(error.clone()));
            *self.books.breaks.lock().entry(reason).or_default() += 1;
        }
    }
}

/// A name in the development server's certificate.
const GATEWAY_NAME: &str = "localhost";
/// Enough that no socket's buffer is where packets get lost.
const SOCKETS: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");
/// How many pings a device holds before it drops its oldest: more than any has in a day of AIS.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(100_000).expect("not zero");
/// Handshakes in progress at a time. More only wait for the same processors.
const HANDSHAKES_AT_ONCE: u64 = 128;
const ENROL_STRIDE: usize = 100;
const CONNECT_LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// Longer than a device waits for a handshake, and then tries again.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);
