//! Bad networks: loss, disorder, copies, noise, darkness and changed addresses between real devices and a
//! real gateway, one by one and all together by seed. Whatever the network does, every ping arrives, is
//! stored once and is seen by checkers.
//!
//! Knows what each fault must not do to the promises. Must not know how the relay makes it.

use std::{
    collections::BTreeMap,
    num::{NonZeroU32, NonZeroUsize},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use quinn::{Endpoint, crypto::rustls::QuicServerConfig};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;
use waypost_gateway::{
    clock::system_now_ms,
    tls::{self, TlsConfig},
    transport,
    worker::DevicesConfig,
};
use waypost_loadtest::{
    checker::{Checker, Watch},
    device::{Device, DeviceConfig, Observer},
    fleet::{Fleet, FleetConfig},
    ledger::DeviceLedger,
    link::{LinkError, Links},
    progress::Progress,
    run::Target,
    verify,
};
use waypost_proto::{
    frame::encode_frame,
    id::{DeviceId, UserId},
    outbox::Event,
    ping::Ping,
    session::Lane,
    v1,
};
use waypost_tests::{
    Counts, MetricsPage, Relay, Weather, World, hello, ping, ping_at, soak, until,
};

/// A fleet, a gateway and the network between them.
struct Trial {
    seed: u64,
    world: World,
    relay: Relay,
    target: Target,
    fleet: Arc<Fleet>,
    users: Vec<UserId>,
    /// What checkers were told before.
    before: Vec<waypost_checker::Entry>,
    watch: Watch,
    /// Makes each ping unlike all others.
    next_ping: AtomicU64,
}

/// What a trial has shown.
struct Findings {
    seed: u64,
    /// Broken promises in words; there must be none.
    faults: Vec<String>,
    network: Counts,
    sent: u64,
    connections: u64,
    /// Why devices lost their connection, and how often.
    breaks: BTreeMap<String, u64>,
    /// From the last ping to the last acknowledgement.
    settling: Duration,
}

impl Trial {
    /// A gateway, and a fleet that is not connected yet, in fair weather.
    async fn start(seed: u64) -> Self {
        Self::start_in(seed, Weather::FAIR).await
    }

    /// The same in other weather. Some devices have a backlog, of frames that need many datagrams.
    #[expect(clippy::print_stderr, reason = "shown when the test fails")]
    async fn start_in(seed: u64, weather: Weather) -> Self {
        eprintln!("seed {seed}");
        let world = World::start().await;
        let relay = Relay::start(world.addresses().devices, seed).unwrap();
        relay.set_weather(weather);
        let target = world.target(relay.address());
        let devices: Vec<_> = (0..DEVICES).map(device).collect();
        let users: Vec<_> = devices.iter().map(|device| device.user).collect();
        let mut checker = Checker::connect(world.addresses().freshness, &target.pki)
            .await
            .unwrap();
        let before = checker.get(&users).await.unwrap().entries;
        let watch = checker.watch().unwrap();
        let progress = Progress::silent();
        let fleet = Fleet::enrol(&devices, &target, &FleetConfig::default(), &progress)
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
            watch,
            next_ping: AtomicU64::new(1),
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
        let ping = Ping {
            time_ms: system_now_ms(),
            ..ping(self.next_ping.fetch_add(1, Ordering::Relaxed))
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
    async fn settle(self) -> Findings {
        let sent = Instant::now();
        until(async || (self.fleet.open() == 0).then_some(())).await;
        self.find(sent.elapsed()).await
    }

    /// Compares what was sent, what was acknowledged, what the metrics count, what checkers are told and
    /// what is stored.
    async fn find(self, settling: Duration) -> Findings {
        let expected = self.fleet.expected();
        let mut checker = Checker::connect(self.target.freshness.unwrap(), &self.target.pki)
            .await
            .unwrap();
        let answer = checker.get(&self.users).await.unwrap();
        let freshness = verify::check_freshness(&expected, &self.before, &answer);
        let last = expected.iter().map(|one| one.newest.position).max();
        let is_level = self.watch.reaches(last.unwrap_or(0)).await;
        let stream = verify::check_stream(
            &expected,
            |user| self.watch.seen(user),
            is_level.then_some(last.unwrap_or(0)),
            self.watch.faults(),
        );
        let metrics = self.world.metrics().await;
        let network = self.relay.counts();
        let breaks = self.fleet.breaks();
        self.relay.set_weather(Weather::FAIR);
        let mut ledgers = Arc::into_inner(self.fleet).unwrap().close().await;
        let store = self.world.stop().await;
        let stored = verify::check_store(&store, &mut ledgers).unwrap();

        let sent: u64 = ledgers.iter().map(|ledger| ledger.sent).sum();
        let mut faults = book_faults(&ledgers, &metrics);
        for (name, told) in [("freshness", freshness), ("stream", stream)] {
            if told.wrong != 0 || told.checked != ledgers.len() as u64 {
                faults.push(format!("{name}: {told:?}"));
            }
        }
        let wanted = verify::StoreFindings {
            stored: sent,
            ..verify::StoreFindings::default()
        };
        if stored != wanted {
            faults.push(format!("of {sent} sent, in the store: {stored:?}"));
        }
        let findings = Findings {
            seed: self.seed,
            faults,
            network,
            sent,
            connections: ledgers.iter().map(|ledger| ledger.connections).sum(),
            breaks,
            settling,
        };
        say(format_args!(
            "network: seed {}: {} pings; settled {} ms after the last; {} connections of {} devices; {:?}; {:?}",
            findings.seed,
            findings.sent,
            findings.settling.as_millis(),
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
        let Self { seed, faults, .. } = self;
        assert!(faults.is_empty(), "broken with seed {seed}: {faults:#?}");
        assert_eq!(self.network.overflowed, 0, "the relay itself was too small");
    }

    /// Whoever loses a connection comes back with another; here nobody should have had to.
    #[track_caller]
    fn expect_no_break(&self) {
        let Self { breaks, .. } = self;
        assert_eq!(self.connections, u64::from(DEVICES), "{breaks:?}");
    }
}

/// The devices' books against each other and against the gateway's counters.
fn book_faults(ledgers: &[DeviceLedger], metrics: &MetricsPage) -> Vec<String> {
    let mut faults = Vec::new();
    let fate = |fate| metrics.value(&format!("waypost_pings_total{{fate=\"{fate}\"}}"));
    let (accepted, duplicate) = (fate("accepted"), fate("duplicate"));
    let received = metrics.value("waypost_pings_received_total");
    let of_all_fates = accepted + duplicate + fate("filtered") + fate("rejected");
    if received != of_all_fates {
        faults.push(format!("{received} received, {of_all_fates} with a fate"));
    }
    let sum_of = |count: fn(&DeviceLedger) -> u64| ledgers.iter().map(count).sum::<u64>() as f64;
    let sent = sum_of(|ledger| ledger.sent);
    if accepted != sent {
        faults.push(format!("{sent} sent, {accepted} accepted"));
    }
    if accepted < sum_of(|ledger| ledger.fates.accepted)
        || duplicate < sum_of(|ledger| ledger.fates.duplicate)
    {
        faults.push("acknowledgements have counted more than the gateway".to_owned());
    }
    for ledger in ledgers {
        let fates = ledger.fates;
        let device = ledger.device;
        if ledger.open() != 0 {
            faults.push(format!(
                "{device}: {} pings are not acknowledged",
                ledger.open()
            ));
        }
        if (ledger.dropped, ledger.epochs_lost) != (0, 0) {
            faults.push(format!(
                "{device}: the device had to drop pings, or its epoch"
            ));
        }
        // An acknowledgement may get lost with its connection, and nobody counts it again.
        let is_whole = fates.accepted == ledger.sent && fates.duplicate == 0;
        if ledger.sent < fates.accepted || !(is_whole || 1 < ledger.connections) {
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
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.lost);
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
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.overtaken);
    findings.expect_no_break();
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
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.duplicated);
    findings.expect_no_break();
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
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.corrupted);
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
    let findings = trial.settle().await;
    findings.expect_kept();
    findings.expect_no_break();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_may_pass_for_two_seconds_again_and_again() {
    let trial = Trial::start(6).await;
    trial.connect().await;
    for _ in 0..2 {
        // By then both sides know how short the way is, and try again soon enough.
        until(async || (trial.fleet.open() == 0).then_some(())).await;
        trial.relay.set_weather(DARK);
        trial.send_during(sleep(Duration::from_secs(2))).await;
        trial.relay.set_weather(Weather::FAIR);
    }
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.blacked_out);
    findings.expect_no_break();
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
                relay.rebind().unwrap();
            }
        })
        .await;
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.answered_after_rebinding);
    findings.expect_no_break();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_went_to_the_old_port_is_had_by_asking_again() {
    let world = World::start().await;
    let relay = Relay::start(world.addresses().devices, 8).unwrap();
    let (device, heard) = lone_device(&world, &relay);
    device.go_online();
    until(async || (0 < heard.lock().welcomes).then_some(())).await;
    // QUIC's own acknowledgements pass, so the device has nothing to send again; answers do not.
    relay.set_weather_down(Weather {
        longest_datagram_bytes: 60,
        ..Weather::FAIR
    });
    device.push(ping(1));
    let tries = 3;
    until(async || (tries <= relay.counts().too_long).then_some(())).await;
    assert_eq!(device.held(), 1);
    relay.rebind().unwrap();
    relay.set_weather(Weather::FAIR);
    until(async || (device.held() == 0).then_some(())).await;
    assert_eq!(heard.lock().welcomes, 1, "the connection lives on");
    assert!(0 < relay.counts().answered_after_rebinding);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_port_that_cannot_be_answered_for_a_while_breaks_nothing() {
    // The gateway follows to the new port, cannot validate it, and goes back to the old one, with what
    // it had sent to the new one still unanswered.
    let trial = Trial::start(9).await;
    trial.connect().await;
    let relay = &trial.relay;
    let mut dice = SmallRng::seed_from_u64(trial.seed);
    for _ in 0..6 {
        until(async || (trial.fleet.open() == 0).then_some(())).await;
        relay.set_weather_down(DARK);
        relay.rebind().unwrap();
        (0..DEVICES as usize).for_each(|at| trial.send(at));
        sleep(Duration::from_millis(dice.random_range(100..600))).await;
        relay.set_weather(Weather::FAIR);
    }
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.blacked_out);
    findings.expect_no_break();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_changes_in_mid_handshake_costs_an_attempt_and_no_more() {
    let trial = Trial::start_in(
        13,
        Weather {
            delay: Duration::from_secs(1),
            ..Weather::FAIR
        },
    )
    .await;
    let relay = &trial.relay;
    // QUIC lets nobody move before the handshake is complete.
    let change = async {
        until(async || (u64::from(DEVICES) <= relay.counts().passed).then_some(())).await;
        relay.rebind().unwrap();
    };
    tokio::join!(trial.connect(), change);
    let findings = trial.settle().await;
    findings.expect_kept();
    assert!(0 < findings.network.rebound);
    assert!(!findings.breaks.is_empty(), "attempts were lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_gets_through_a_line_of_24_kbit_per_second() {
    let world = World::start().await;
    let relay = Relay::start(world.addresses().devices, 14).unwrap();
    relay.set_weather(Weather {
        delay: Duration::from_millis(200),
        bytes_per_s: NonZeroU32::new(3_000),
        ..Weather::FAIR
    });
    let (device, heard) = lone_device(&world, &relay);
    // As different from each other as those of a moving vehicle, so that a batch is long: a full one
    // takes this line four seconds, and each lane has one.
    let mut dice = SmallRng::seed_from_u64(14);
    for seq in 1..=2_000 {
        let still = ping(seq);
        device.push(Ping {
            time_ms: still.time_ms + dice.random_range(0..1_000),
            latitude_e7: still.latitude_e7 + dice.random_range(0..100_000),
            longitude_e7: still.longitude_e7 + dice.random_range(0..100_000),
            speed_cm_per_s: Some(dice.random_range(0..3_000)),
            course_ddeg: Some(dice.random_range(0..3_600)),
            ..still
        });
    }
    device.go_online();
    until(async || (device.held() == 0).then_some(())).await;
    assert!(heard.lock().ends.is_empty(), "{heard:?}");
    assert!(16_000 < relay.counts().passed_bytes);
    let metrics = world.metrics().await;
    assert_eq!(metrics.value("waypost_pings_received_total"), 2_000.0);
    drop(device);
    let store = world.stop().await;
    let mut stored: Vec<_> = store
        .rows()
        .flat_map(|row| row.unwrap().record.pings)
        .map(|ping| ping.seq)
        .collect();
    stored.sort_unstable();
    assert_eq!(stored, (1..=2_000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_migration_loses_its_devices_when_the_port_changes() {
    // The negative control of the two above: the port changes for real, and somebody must follow it.
    assert!(is_heard_after_rebinding(true).await);
    assert!(!is_heard_after_rebinding(false).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_that_is_not_answered_ends_the_connection_before_quic_notices() {
    let world = World::start().await;
    let relay = Relay::start(world.addresses().devices, 9).unwrap();
    let (device, heard) = lone_device(&world, &relay);
    device.go_online();
    until(async || (0 < heard.lock().welcomes).then_some(())).await;
    relay.set_weather(DARK);
    device.heartbeat();
    let end = until(async || heard.lock().ends.pop()).await;
    assert!(matches!(end, Some(LinkError::NoAnswer(_))), "{end:?}");
    relay.set_weather(Weather::FAIR);
    until(async || (1 < heard.lock().welcomes).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_datagram_of_the_fleet_or_the_gateway_is_longer_than_every_network_carries() {
    let narrow = Weather {
        longest_datagram_bytes: 1_200,
        ..Weather::FAIR
    };
    let trial = Trial::start_in(10, narrow).await;
    trial.connect().await;
    trial.send_during(sleep(Duration::from_secs(1))).await;
    let findings = trial.settle().await;
    findings.expect_kept();
    assert_eq!(
        (
            findings.network.too_long,
            findings.network.longest_passed_bytes
        ),
        (0, 1_200)
    );
    findings.expect_no_break();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_found_a_wide_path_survives_when_it_becomes_narrow() {
    let world = World::start().await;
    let relay = Relay::start(world.addresses().devices, 11).unwrap();
    let device = world.device(1);
    let link = world.connect_at(relay.address(), &device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    // A millisecond apart, so that none is of the future.
    let start_ms = ping(0).time_ms;
    let mut batches = (0..).map(|at| {
        (at * 1_000 + 1..=at * 1_000 + 1_000)
            .map(|seq| ping_at(seq, start_ms + seq))
            .collect::<Vec<_>>()
    });
    let mut sent = 0;
    // Its probes come with other packets; once the longest has passed, batches go out as long.
    while relay.counts().longest_passed_bytes < 1_400 {
        live.send_pings(epoch, &batches.next().unwrap()).await;
        live.ack().await;
        sent += 1_000;
        assert!(
            sent < 100_000,
            "no probe gets through: does this system let datagrams be probed?"
        );
    }
    relay.set_weather(Weather {
        longest_datagram_bytes: 1_250,
        ..Weather::FAIR
    });
    for _ in 0..3 {
        live.send_pings(epoch, &batches.next().unwrap()).await;
        let ack = live.ack().await;
        sent += 1_000;
        assert_eq!((ack.durable_upto, ack.accepted), (sent, sent));
    }
    assert!(0 < relay.counts().too_long);
    let accepted = world
        .metrics()
        .await
        .value("waypost_connections_accepted_total");
    assert_eq!(accepted, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_nothing_passes_nothing_is_acknowledged_and_the_books_say_so() {
    // The negative control of all the others: they do notice what does not arrive.
    let trial = Trial::start_in(12, DARK).await;
    let (progress, stop) = (Progress::silent(), CancellationToken::new());
    let fleet = trial.fleet.clone();
    let connecting = tokio::spawn({
        let stop = stop.clone();
        async move { fleet.connect(&progress, &stop).await }
    });
    until(async || (u64::from(DEVICES) <= trial.fleet.breaks().values().sum()).then_some(())).await;
    stop.cancel();
    connecting.await.unwrap().unwrap();
    assert_eq!((trial.fleet.acked(), trial.fleet.connected()), (0, 0));
    let findings = trial.find(Duration::ZERO).await;
    let is_told = |what: &str| findings.faults.iter().any(|fault| fault.contains(what));
    assert!(is_told("are not acknowledged") && is_told("in the store") && is_told("freshness"));
    assert_eq!(findings.network.passed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_faults_together_lose_nothing() {
    // At once, because most of a storm is waiting.
    let (one, two, three) = tokio::join!(
        Box::pin(storm(101)),
        Box::pin(storm(102)),
        Box::pin(storm(103))
    );
    [one, two, three].iter().for_each(Findings::expect_kept);
}

/// For `make soak`: storms by seeds that nobody has tried.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_network() {
    let first_seed = soak::seed();
    let end = Instant::now() + soak::length();
    let mut dice = SmallRng::seed_from_u64(first_seed);
    let (mut storms, mut pings, mut connections) = (0_u64, 0, 0);
    let mut network = Counts::default();
    let mut seed = first_seed;
    while Instant::now() < end {
        let findings = storm(seed).await;
        findings.expect_kept();
        storms += 1;
        pings += findings.sent;
        connections += findings.connections;
        network = network.and(&findings.network);
        seed = dice.random();
    }
    let Counts {
        passed,
        lost,
        duplicated,
        corrupted,
        overtaken,
        blacked_out,
        rebound,
        ..
    } = network;
    soak::summary(format_args!(
        "every ping arrives once over a bad network: {storms} storms, {pings} pings, {connections} connections; \
         {passed} datagrams passed, {lost} lost, {duplicated} duplicated, {corrupted} corrupted, {overtaken} overtaken, \
         {blacked_out} blacked out, {rebound} ports changed; seed {first_seed}"
    ));
}

/// Weather of all kinds, one after the other, for a few seconds, while everybody connects and sends.
async fn storm(seed: u64) -> Findings {
    let mut dice = SmallRng::seed_from_u64(seed);
    let trial = Trial::start_in(seed, any_weather(&mut dice)).await;
    let relay = &trial.relay;
    let script = async {
        for _ in 0..8 {
            let lasts_ms = match dice.random_range(0..8) {
                0 => {
                    relay.set_weather(DARK);
                    dice.random_range(0..2_000)
                }
                1 | 2 => {
                    relay.rebind().unwrap();
                    dice.random_range(0..300)
                }
                _ => {
                    relay.set_weather(any_weather(&mut dice));
                    dice.random_range(0..700)
                }
            };
            sleep(Duration::from_millis(lasts_ms)).await;
        }
        relay.set_weather(Weather::FAIR);
    };
    tokio::join!(trial.connect(), trial.send_during(script));
    trial.settle().await
}

fn any_weather(dice: &mut SmallRng) -> Weather {
    let mut share = |most: f64| {
        if dice.random() {
            dice.random_range(0.0..most)
        } else {
            0.0
        }
    };
    let (loss, duplication, corruption) = (share(0.2), share(0.3), share(0.05));
    Weather {
        loss,
        duplication,
        corruption,
        delay: Duration::from_millis(dice.random_range(0..20)),
        jitter: Duration::from_millis(dice.random_range(0..20)),
        longest_datagram_bytes: 1_200,
        ..Weather::FAIR
    }
}

/// Whether a server that does no more than answer is still heard after the port has changed.
async fn is_heard_after_rebinding(follows_migration: bool) -> bool {
    // For its certificates; its gateway has nothing to do here.
    let world = World::start().await;
    let files = world.scratch("pki");
    let tls = TlsConfig {
        certificate: files.join("server.pem"),
        private_key: files.join("server.key"),
        client_ca: files.join("ca.pem"),
        trust_domain: world.authority.trust_domain().to_owned(),
        ..TlsConfig::default()
    };
    let config = DevicesConfig {
        // Soon known to be gone; nothing else waits for it.
        idle_timeout: Duration::from_secs(3),
        ..DevicesConfig::default()
    };
    let tls = QuicServerConfig::try_from(tls::device_server_config(&tls).unwrap()).unwrap();
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
    server
        .transport_config(Arc::new(transport::connection_settings(&config).unwrap()))
        .migration(follows_migration);
    let endpoint = Endpoint::server(server, ([127, 0, 0, 1], 0).into()).unwrap();
    let relay = Relay::start(endpoint.local_addr().unwrap(), 0).unwrap();
    tokio::spawn(async move {
        let connection = endpoint.accept().await?.await.ok()?;
        let (mut send, mut recv) = connection.accept_bi().await.ok()?;
        let mut answer = BytesMut::new();
        let kind = Some(v1::gateway_frame::Kind::Ack(v1::Ack::default()));
        encode_frame(&v1::GatewayFrame { kind }, &mut answer);
        while let Ok(Some(_)) = recv.read_chunk(usize::MAX, true).await {
            send.write_all(&answer).await.ok()?;
        }
        Some(())
    });
    let link = world.connect_at(relay.address(), &world.device(1)).await;
    let mut stream = link.open_raw().await;
    stream.send_raw(b"before").await;
    assert!(stream.next().await.is_some());
    relay.rebind().unwrap();
    stream.send_raw(b"after").await;
    stream.next().await.is_some()
}

/// What a lone device has told.
#[derive(Debug, Default)]
struct Heard {
    welcomes: u64,
    ends: Vec<Option<LinkError>>,
}

struct Listener(Arc<Mutex<Heard>>);

impl Observer for Listener {
    fn connected(&mut self) {}

    fn observed(&mut self, event: &Event, _read_at: Instant) {
        self.0.lock().welcomes += u64::from(matches!(event, Event::Welcomed { .. }));
    }

    fn disconnected(&mut self, error: Option<&LinkError>) {
        self.0.lock().ends.push(error.cloned());
    }
}

/// A device of the load test behind a relay.
fn lone_device(world: &World, relay: &Relay) -> (Device, Arc<Mutex<Heard>>) {
    let issued = world.authority.issue_device(device(1)).unwrap();
    let root =
        CertificateDer::from_pem_slice(world.authority.certificate_pem().as_bytes()).unwrap();
    let links = Links::open(relay.address(), "localhost", root, NonZeroUsize::MIN).unwrap();
    let credentials = links
        .credentials(vec![issued.certificate_der()], issued.private_key_der())
        .unwrap();
    let config = DeviceConfig {
        credentials,
        capacity: const { NonZeroUsize::new(10_000).unwrap() },
        seed: 1,
    };
    let heard = Arc::<Mutex<Heard>>::default();
    let device = Device::spawn(Arc::new(links), config, Listener(heard.clone()));
    (device, heard)
}

fn device(number: u32) -> DeviceId {
    let mut user = [0x22; 16];
    user[12..].copy_from_slice(&number.to_be_bytes());
    DeviceId {
        user: UserId(user),
        device: 1,
    }
}

/// Numbers for whoever looks on.
#[expect(
    clippy::print_stdout,
    reason = "shown by --nocapture, and when the test fails"
)]
fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

const DARK: Weather = Weather {
    is_blacked_out: true,
    ..Weather::FAIR
};

const DEVICES: u32 = 24;
const DEVICES_WITH_BACKLOG: usize = 4;
const BACKLOG_PINGS: u32 = 2_000;
const PING_INTERVAL: Duration = Duration::from_millis(25);
