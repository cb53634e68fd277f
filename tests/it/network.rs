//! Bad networks: loss, disorder, copies, noise, darkness and changed addresses between real devices and a
//! real gateway, one by one and all together by seed. Whatever the network does, every ping arrives, is
//! stored once and is seen by checkers.
//!
//! Knows what each fault must not do to the promises. Must not know how the relay makes it.

use std::{
    collections::BTreeMap,
    io::Write,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use quinn::{ConnectionError, Endpoint, IdleTimeout, VarInt, crypto::rustls::QuicServerConfig};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;
use waypost_gateway::{
    clock::system_now_ms,
    config::Config,
    tls,
};
use waypost_loadtest::{
    checker::Checker, fleet::Fleet, ledger::DeviceLedger, progress::Progress, run::Target, verify,
};
use waypost_proto::{
    id::{DeviceId, UserId},
    ping::Ping,
    session::Lane,
    v1::Entry,
};
use waypost_tests::{Counts, MetricsPage, Relay, Weather, World, hello, ping, until};

/// A fleet, a gateway and the network between them.
struct Trial {
    seed: u64,
    world: World,
    relay: Relay,
    target: Target,
    fleet: Arc<Fleet>,
    users: Vec<UserId>,
    before: Vec<Entry>,
}

/// What a trial has shown.
struct Findings {
    /// Broken promises in words; there must be none.
    faults: Vec<String>,
    network: Counts,
    sent: u64,
    connections: u64,
    /// Why devices lost their connection, and how often.
    breaks: BTreeMap<String, u64>,
    /// From the moment the weather was fair again to the last acknowledgement.
    recovery: Duration,
}

impl Trial {
    /// Connects a fleet in fair weather.
    async fn start(seed: u64) -> Self {
        Self::start_in(seed, Weather::FAIR).await
    }

    /// Connects a fleet. Some of its devices have a backlog of frames that need many datagrams.
    #[expect(clippy::print_stderr, reason = "shown when the test fails")]
    async fn start_in(seed: u64, weather: Weather) -> Self {
        eprintln!("seed {seed}");
        let world = World::start().await;
        let relay = Relay::start(world.addresses().devices, seed);
        relay.set_weather(weather);
        let target = world.target(relay.address());
        let devices: Vec<_> = (0..DEVICES).map(device).collect();
        let users: Vec<_> = devices.iter().map(|device| device.user).collect();
        let mut checker = Checker::connect(world.addresses().freshness, &target.pki)
            .await
            .unwrap();
        let before = checker.get(&users).await.unwrap().entries;
        let progress = Progress::silent();
        let fleet = Fleet::enrol(&devices, &target, usize::MAX, &progress)
            .await
            .unwrap();
        let trial = Self {
            seed,
            world,
            relay,
            target,
            fleet: Arc::new(fleet),
            users,
            before,
        };
        for at in 0..DEVICES_WITH_BACKLOG {
            (0..BACKLOG_PINGS).for_each(|_| trial.send(at));
        }
        trial
    }

    async fn connect(&self) {
        let (progress, stop) = (Progress::silent(), CancellationToken::new());
        self.fleet.connect(&progress, &stop).await.unwrap();
    }

    fn send(&self, at: usize) {
        let now = system_now_ms();
        let position = ping(now % 1_000_000);
        let ping = Ping {
            seq: 0,
            time_ms: now,
            ..position
        };
        self.fleet.send(at, ping, self.fleet.now_us());
    }

    /// Every device sends a ping now and then, until the script of the weather has ended.
    async fn send_during(&self, script: impl Future<Output = ()>) {
        let mut ticks = interval(PING_INTERVAL);
        let mut script = std::pin::pin!(script);
        loop {
            tokio::select! {
                biased;
                () = &mut script => return,
                _ = ticks.tick() => (0..DEVICES as usize).for_each(|at| self.send(at)),
            }
        }
    }

    /// Waits until everything is acknowledged, then compares all books.
    async fn settle(self, mend: bool) -> Findings {
        if mend {
            self.relay.set_weather(Weather::FAIR);
        }
        let mended = Instant::now();
        until(async || (self.fleet.open() == 0).then_some(())).await;
        self.find(mended.elapsed()).await
    }

    /// Compares what was sent, what was acknowledged, what the metrics count, what checkers are told and
    /// what is stored.
    async fn find(self, recovery: Duration) -> Findings {
        let expected = self.fleet.expected();
        let mut checker = Checker::connect(self.target.freshness.unwrap(), &self.target.pki)
            .await
            .unwrap();
        let answer = checker.get(&self.users).await.unwrap();
        let freshness = verify::check_freshness(&expected, &self.before, &answer);
        let metrics = self.world.metrics().await;
        let network = self.relay.counts();
        let breaks = self.fleet.breaks();
        self.relay.set_weather(Weather::FAIR);
        let mut ledgers = Arc::into_inner(self.fleet).unwrap().close().await;
        let store = self.world.stop().await;
        let stored = verify::check_store(&store, &mut ledgers).unwrap();

        let sent: u64 = ledgers.iter().map(|ledger| ledger.sent).sum();
        let mut faults = book_faults(&ledgers, &metrics);
        if freshness.wrong != 0 || freshness.checked != ledgers.len() as u64 {
            faults.push(format!("freshness: {freshness:?}"));
        }
        let wanted = verify::StoreFindings {
            stored: sent,
            ..verify::StoreFindings::default()
        };
        if stored != wanted {
            faults.push(format!("of {sent} sent, in the store: {stored:?}"));
        }
        let findings = Findings {
            faults,
            network,
            sent,
            connections: ledgers.iter().map(|ledger| ledger.connections).sum(),
            breaks,
            recovery,
        };
        say(format_args!(
            "seed {}: {} pings; all acknowledged {} ms after the weather; {} connections of {} devices; {:?}; {:?}",
            self.seed,
            findings.sent,
            findings.recovery.as_millis(),
            findings.connections,
            DEVICES,
            findings.network,
            findings.breaks,
        ));
        findings
    }
}

impl Findings {
    #[track_caller]
    fn expect_kept(&self) {
        assert!(self.faults.is_empty(), "broken: {:#?}", self.faults);
        assert_eq!(self.network.overflowed, 0, "the relay itself was too small");
    }
}

/// The devices' books against each other and against the gateway's counters.
fn book_faults(ledgers: &[DeviceLedger], metrics: &MetricsPage) -> Vec<String> {
    let mut faults = Vec::new();
    let fate = |fate| metrics.value(&format!("waypost_pings_total{{fate=\"{fate}\"}}")) as u64;
    let (accepted, duplicate) = (fate("accepted"), fate("duplicate"));
    let received = metrics.value("waypost_pings_received_total") as u64;
    let of_all_fates = accepted + duplicate + fate("filtered") + fate("rejected");
    if received != of_all_fates {
        faults.push(format!("{received} received, {of_all_fates} with a fate"));
    }
    let sent: u64 = ledgers.iter().map(|ledger| ledger.sent).sum();
    if accepted != sent {
        faults.push(format!("{sent} sent, {accepted} accepted"));
    }
    for ledger in ledgers {
        let fates = ledger.fates;
        let device = ledger.device;
        if ledger.open() != 0 {
            faults.push(format!("{device}: {} pings are not acknowledged", ledger.open()));
        }
        if (ledger.dropped, ledger.epochs_lost) != (0, 0) {
            faults.push(format!("{device}: the device had to drop pings, or its epoch"));
        }
        // An ack that a broken connection took with it has counted what no later one counts.
        let is_short = fates.accepted + ledger.untold() < ledger.sent;
        let is_whole = 1 < ledger.connections || fates.accepted == ledger.sent;
        if is_short || !is_whole || ledger.sent < fates.accepted {
            faults.push(format!(
                "{device}: {} sent over {} connections, counted {fates:?}",
                ledger.sent, ledger.connections
            ));
        }
    }
    faults
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifth_of_all_datagrams_may_be_lost() {
    let weather = Weather {
        loss: 0.2,
        delay: Duration::from_millis(2),
        ..Weather::FAIR
    };
    let trial = Trial::start_in(1, weather).await;
    trial.connect().await;
    trial.send_during(sleep(Duration::from_secs(2))).await;
    let findings = trial.settle(false).await;
    findings.expect_kept();
    assert!(100 < findings.network.lost);
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_may_overtake_each_other() {
    let weather = Weather {
        delay: Duration::from_millis(1),
        jitter: Duration::from_millis(15),
        ..Weather::FAIR
    };
    let trial = Trial::start_in(2, weather).await;
    trial.connect().await;
    trial.send_during(sleep(Duration::from_secs(2))).await;
    let findings = trial.settle(false).await;
    findings.expect_kept();
    assert!(100 < findings.network.overtaken);
    assert_eq!(findings.connections, u64::from(DEVICES));
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_may_arrive_twice() {
    let weather = Weather {
        duplication: 0.3,
        jitter: Duration::from_millis(5),
        ..Weather::FAIR
    };
    let trial = Trial::start_in(3, weather).await;
    trial.connect().await;
    trial.send_during(sleep(Duration::from_secs(2))).await;
    let findings = trial.settle(false).await;
    findings.expect_kept();
    assert!(100 < findings.network.duplicated);
    assert_eq!(findings.connections, u64::from(DEVICES));
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_may_arrive_changed() {
    let weather = Weather {
        corruption: 0.1,
        delay: Duration::from_millis(2),
        ..Weather::FAIR
    };
    let trial = Trial::start_in(4, weather).await;
    trial.connect().await;
    trial.send_during(sleep(Duration::from_secs(2))).await;
    let findings = trial.settle(false).await;
    findings.expect_kept();
    assert!(100 < findings.network.corrupted);
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_may_take_long() {
    let weather = Weather {
        delay: Duration::from_millis(150),
        jitter: Duration::from_millis(30),
        ..Weather::FAIR
    };
    let trial = Trial::start_in(5, weather).await;
    trial.connect().await;
    trial.send_during(sleep(Duration::from_secs(2))).await;
    let findings = trial.settle(false).await;
    findings.expect_kept();
    assert_eq!(findings.connections, u64::from(DEVICES));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_may_pass_for_two_seconds_again_and_again() {
    let trial = Trial::start(6).await;
    trial.connect().await;
    let relay = &trial.relay;
    trial
        .send_during(async {
            for _ in 0..2 {
                relay.set_weather(Weather {
                    is_blacked_out: true,
                    ..Weather::FAIR
                });
                sleep(Duration::from_secs(2)).await;
                relay.set_weather(Weather::FAIR);
                sleep(Duration::from_millis(500)).await;
            }
        })
        .await;
    let findings = trial.settle(true).await;
    findings.expect_kept();
    assert!(100 < findings.network.blacked_out);
    assert_eq!(findings.connections, u64::from(DEVICES), "no connection is given up so soon");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nat_may_change_its_ports_in_mid_stream() {
    let trial = Trial::start_in(
        7,
        Weather {
            delay: Duration::from_millis(3),
            ..Weather::FAIR
        },
    )
    .await;
    trial.connect().await;
    let relay = &trial.relay;
    trial
        .send_during(async {
            for _ in 0..6 {
                sleep(Duration::from_millis(300)).await;
                relay.rebind();
            }
        })
        .await;
    let findings = trial.settle(false).await;
    findings.expect_kept();
    assert!(100 < findings.network.answered_after_rebinding);
    assert_eq!(findings.connections, u64::from(DEVICES), "connections live on");
}

fn device(number: u32) -> DeviceId {
    let mut user = [0x22; 16];
    user[12..].copy_from_slice(&number.to_be_bytes());
    DeviceId {
        user: UserId(user),
        device: 1,
    }
}

/// A line of numbers, for whoever looks on with `--nocapture`.
fn say(line: impl std::fmt::Display) {
    // Standard output that is closed is nobody looking on.
    drop(writeln!(std::io::stdout(), "network: {line}"));
}

const DEVICES: u32 = 24;
const DEVICES_WITH_BACKLOG: usize = 4;
const BACKLOG_PINGS: u32 = 2_000;
const PING_INTERVAL: Duration = Duration::from_millis(25);
