//! A hostile crowd beside a thousand good devices: the good ones lose nothing, and hardly wait. A binary of
//! its own, so that no other test takes the processor meanwhile.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test, whose measurements are printed"
)]

use std::{collections::BTreeMap, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use waypost_gateway::clock::system_now_ms;
use waypost_loadtest::{
    fleet::{Fleet, FleetConfig},
    ledger::DeviceLedger,
    progress::Progress,
    report::Latencies,
    run::Target,
    steady::Steady,
    verify,
};
use waypost_proto::session::Lane;
use waypost_tests::{
    MetricsPage, Process, World, crowd::Crowd, hello, packets::Eavesdropper, ping, soak,
};

const GOOD_DEVICES: u32 = 1_000;
/// As a fleet of a thousand does that sends every other second, and enough for a p99 in ten seconds.
const PINGS_PER_S: f64 = 500.0;
/// What the crowd may do to the good devices' p99, with which it shares two cores, and the test as well.
/// Measured in a debug build: 7 to 19 times where two cores were half free, from 4..10 ms to 26..175 ms, and
/// 1 to 5 times where nothing was free to begin with. A slower machine has less to spare.
const MOST_TIMES_SLOWER: f64 = 100.0;
/// The p99 of a calm gateway can be next to nothing. Below this nobody who waits for an ack is starved.
const ALWAYS_FAST_MS: f64 = 2_000.0;
/// What the gateway's memory may grow by. By its limits: 256 unproved handshakes of 40 KB, some 80
/// connections with at most 256 KB of unread data each, 16 MiB of packets that wait for a handshake, 2 x
/// 16 MiB of memtables for what the crowd stores, and as much again for what an allocator keeps.
const MOST_MORE_BYTES: f64 = 160e6;

/// Each abuse that is answered in a way of its own, and where that is counted.
const ANSWERS: [(&str, &str); 20] = [
    (
        "slow reader",
        r#"waypost_connections_closed_total{code="not_reading"}"#,
    ),
    (
        "half a frame",
        r#"waypost_connections_closed_total{code="frame_timeout"}"#,
    ),
    (
        "silent streams",
        r#"waypost_connections_closed_total{code="first_frame_timeout"}"#,
    ),
    (
        "streams taken back",
        r#"waypost_connections_closed_total{code="first_frame_timeout"}"#,
    ),
    (
        "no stream at all",
        r#"waypost_connections_closed_total{code="first_frame_timeout"}"#,
    ),
    (
        "frame too long",
        r#"waypost_connections_closed_total{code="frame_too_large"}"#,
    ),
    (
        "batch too large",
        r#"waypost_connections_closed_total{code="batch_too_large"}"#,
    ),
    (
        "noise in a stream",
        r#"waypost_connections_closed_total{code="bad_frame"}"#,
    ),
    (
        "frame bombs",
        r#"waypost_pings_rejected_total{code="schema"}"#,
    ),
    (
        "sparse numbers",
        r#"waypost_pings_rejected_total{code="too_sparse"}"#,
    ),
    (
        "byte by byte",
        r#"waypost_frames_received_total{kind="batch"}"#,
    ),
    (
        "tiny batches",
        r#"waypost_limits_reached_total{limit="device_frames"}"#,
    ),
    (
        "heartbeats",
        r#"waypost_frames_received_total{kind="heartbeat"}"#,
    ),
    (
        "flood of pings",
        r#"waypost_limits_reached_total{limit="device_pings"}"#,
    ),
    (
        "flood of pings",
        r#"waypost_pings_rejected_total{code="rate_limited"}"#,
    ),
    (
        "churn",
        r#"waypost_limits_reached_total{limit="device_connections"}"#,
    ),
    (
        "strangers",
        r#"waypost_connections_refused_total{reason="unknown_issuer"}"#,
    ),
    (
        "handshakes never finished",
        r#"waypost_connections_refused_total{reason="timed_out"}"#,
    ),
    ("handshakes never finished", "waypost_address_proofs_total"),
    (
        "noise like a first packet",
        r#"waypost_connections_refused_total{reason="handshake_broken"}"#,
    ),
];

/// What a gateway uses, at most, while it is watched.
#[derive(Clone, Copy, Debug, Default)]
struct Most {
    resident_bytes: f64,
    handshakes: f64,
}

impl Most {
    fn look(&mut self, page: &MetricsPage) {
        let now = Self {
            resident_bytes: page.value("process_resident_memory_bytes"),
            handshakes: page.value("waypost_handshakes_in_progress"),
        };
        self.resident_bytes = self.resident_bytes.max(now.resident_bytes);
        self.handshakes = self.handshakes.max(now.handshakes);
    }
}

/// Hands the fleet what is due until `until_us` on its clock, looking at the gateway meanwhile.
async fn send_until(
    fleet: &Fleet,
    due: &mut std::iter::Peekable<impl Iterator<Item = (u64, usize, waypost_proto::ping::Ping)>>,
    until_us: u64,
    gateway: &Process,
) -> Most {
    let mut most = Most::default();
    let mut looked = Instant::now();
    while let Some((due_us, device, ping)) = due.next_if(|(due_us, ..)| *due_us < until_us) {
        let early_us = due_us.saturating_sub(fleet.now_us());
        if 0 < early_us {
            sleep_until(Instant::now() + Duration::from_micros(early_us)).await;
        }
        fleet.send(device, ping, due_us);
        if LOOK_INTERVAL <= looked.elapsed() {
            looked = Instant::now();
            most.look(&metrics(gateway).await);
        }
    }
    most
}

async fn metrics(gateway: &Process) -> MetricsPage {
    MetricsPage(gateway.admin("/metrics").await.1)
}

/// Waits until every ping of the fleet is acknowledged, and takes the latencies since this was last done.
async fn settled(fleet: &Fleet) -> Latencies {
    let patience = Instant::now() + Duration::from_secs(300);
    while 0 < fleet.open() {
        assert!(
            Instant::now() < patience,
            "{} pings are not acknowledged",
            fleet.open()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fleet.take_recent_latencies(0..1)
}

/// What a good device has said to the gateway, byte for byte.
async fn a_recorded_conversation(gateway: &Process) -> Vec<Vec<u8>> {
    let spy = Eavesdropper::start(gateway.addresses().devices).await;
    let link = gateway.connect_at(spy.address(), &gateway.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    assert_eq!(live.ack().await.durable_upto, 2);
    spy.recorded()
}

/// What is measured and what is tried.
#[derive(Clone, Copy)]
struct Plan {
    calm: Duration,
    crowded: Duration,
    is_limited: bool,
    seed: u64,
}

struct Outcome {
    calm: Latencies,
    crowded: Latencies,
    pings: u64,
    rounds: BTreeMap<&'static str, u64>,
    /// What should not be, each in words.
    faults: Vec<String>,
}

/// Short enough that each abuse meets its end, and far longer than a good device takes on a busy machine.
const SHORT_TIMEOUTS: [(&str, &str); 5] = [
    ("WAYPOST_DEVICES_HANDSHAKE_TIMEOUT", "5s"),
    ("WAYPOST_DEVICES_SESSION_FIRST_FRAME_TIMEOUT", "5s"),
    ("WAYPOST_DEVICES_SESSION_FRAME_TIMEOUT", "5s"),
    ("WAYPOST_STORE_MEMTABLE_MIB", "16"),
    ("WAYPOST_STORE_CACHE_MIB", "16"),
];
const NO_LIMITS: [(&str, &str); 6] = [
    (
        "WAYPOST_DEVICES_ADMISSION_PROVE_ADDRESS_FROM_HANDSHAKES",
        "1000000",
    ),
    ("WAYPOST_DEVICES_ADMISSION_UNPROVED_PER_S", "0"),
    ("WAYPOST_DEVICES_ADMISSION_ADDRESS_HANDSHAKES_PER_S", "0"),
    ("WAYPOST_DEVICES_ALLOWANCE_CONNECTIONS_PER_MINUTE", "0"),
    ("WAYPOST_DEVICES_ALLOWANCE_FRAMES_PER_S", "0"),
    ("WAYPOST_DEVICES_ALLOWANCE_PINGS_PER_S", "0"),
];

/// One after the other: each measures how long the good devices wait.
static ALONE: Mutex<()> = Mutex::const_new(());

/// The same fleet for a while without the crowd and for a while with it, on the real binary.
async fn beside_a_crowd(plan: Plan) -> Outcome {
    let _alone = ALONE.lock().await;
    let seed = plan.seed;
    let limits = if plan.is_limited { &[][..] } else { &NO_LIMITS };
    let mut gateway = Process::start(&[&SHORT_TIMEOUTS, limits].concat()).await;
    let recorded = a_recorded_conversation(&gateway).await;
    let steady = Steady {
        devices: GOOD_DEVICES,
        pings_per_s: PINGS_PER_S,
        duration: Some(plan.calm + plan.crowded),
        seed,
    };
    let target = Target {
        devices: gateway.addresses().devices,
        freshness: None,
        admin: None,
        pki: gateway.data_dir().join("pki"),
        data: None,
    };
    let progress = Progress::silent();
    let fleet = Fleet::enrol(
        &steady.devices(),
        &target,
        &FleetConfig::default(),
        &progress,
    )
    .await
    .unwrap();
    fleet
        .connect(&progress, &CancellationToken::new())
        .await
        .unwrap();

    let begun_us = fleet.now_us();
    let due_us = |due: Duration| begun_us + u64::try_from(due.as_micros()).unwrap();
    let mut due = steady
        .pings(system_now_ms())
        .map(|due| (due_us(due.due), due.device, due.ping))
        .peekable();
    let calm_most = send_until(&fleet, &mut due, due_us(plan.calm), &gateway).await;
    let calm = settled(&fleet).await;
    let before = metrics(&gateway).await;
    for (abuse, counter) in ANSWERS {
        let is_ordinary = counter.contains("frames_received");
        assert!(
            is_ordinary || before.value(counter) == 0.0,
            "{counter} before any {abuse}"
        );
    }

    let crowd = Crowd::gather(target.devices, &gateway.authority(), recorded, seed);
    let mut most = send_until(&fleet, &mut due, u64::MAX, &gateway).await;
    let crowded = settled(&fleet).await;
    let is_unmoved =
        |page: &MetricsPage, counter: &str| page.value(counter) <= before.value(counter);
    let after = gateway
        .metrics_until(|page| {
            // A slow machine may not have come to the end of each abuse by now.
            !plan.is_limited || !ANSWERS.iter().any(|(_, counter)| is_unmoved(page, counter))
        })
        .await;
    if !plan.is_limited {
        let is_flooded =
            |page: &MetricsPage| MOST_HANDSHAKES < page.value("waypost_handshakes_in_progress");
        most.look(&gateway.metrics_until(is_flooded).await);
    }
    let rounds = crowd.disperse().await;
    println!(
        "p99 of acks {:.1} ms without the crowd, {:.1} ms with it; memory {:.0} MB, {:.0} MB; at most {} handshakes \
         in progress; {} newcomers had to prove their address; {rounds:?}",
        calm.quantile_ms(0.99),
        crowded.quantile_ms(0.99),
        calm_most.resident_bytes / 1e6,
        most.resident_bytes / 1e6,
        most.handshakes,
        after.value("waypost_address_proofs_total"),
    );

    let mut faults = Vec::new();
    for (abuse, counter) in ANSWERS
        .iter()
        .filter(|(_, counter)| is_unmoved(&after, counter))
    {
        faults.push(format!("{abuse}: {counter} has not moved"));
    }
    for (abuse, rounds) in rounds.iter().filter(|(_, rounds)| **rounds == 0) {
        faults.push(format!("{abuse}: {rounds} rounds"));
    }
    if !fleet.breaks().is_empty() {
        faults.push(format!(
            "good devices lost connections: {:?}",
            fleet.breaks()
        ));
    }
    if calm_most.resident_bytes + MOST_MORE_BYTES < most.resident_bytes {
        faults.push(format!(
            "too much memory: {calm_most:?}, and {most:?} with the crowd"
        ));
    }
    if MOST_HANDSHAKES < most.handshakes {
        faults.push(format!("too many handshakes in progress: {most:?}"));
    }
    let bearable_ms = (calm.quantile_ms(0.99) * MOST_TIMES_SLOWER).max(ALWAYS_FAST_MS);
    if bearable_ms < crowded.quantile_ms(0.99) {
        faults.push(format!(
            "too slow: the p99 of acks is {} ms, and {} ms with the crowd",
            calm.quantile_ms(0.99),
            crowded.quantile_ms(0.99)
        ));
    }
    let received = after.value("waypost_pings_received_total");
    let fates = ["accepted", "duplicate", "filtered", "rejected"]
        .map(|fate| after.value(&format!("waypost_pings_total{{fate=\"{fate}\"}}")));
    if received != fates.iter().sum::<f64>() {
        faults.push(format!("{fates:?} do not add up to {received}"));
    }

    // When the crowd is gone, nothing of it stays.
    gateway
        .metrics_until(|page| {
            page.value("waypost_connections") == f64::from(GOOD_DEVICES)
                && page.value("waypost_handshakes_in_progress") == 0.0
        })
        .await;
    let mut ledgers: Vec<DeviceLedger> = fleet.close().await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    if gateway.log().contains("panicked") {
        faults.push(gateway.log());
    }
    let pings: u64 = ledgers.iter().map(|ledger| ledger.sent).sum();
    let store = World::open_store(gateway.data_dir());
    let findings = verify::check_store(&store, &mut ledgers).unwrap();
    let expected = verify::StoreFindings {
        stored: pings,
        ..verify::StoreFindings::default()
    };
    if findings != expected {
        faults.push(format!(
            "not every ping is stored once, as it was sent: {findings:?}"
        ));
    }
    Outcome {
        calm,
        crowded,
        pings,
        rounds,
        faults,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_crowd_costs_good_devices_no_ping_and_little_time() {
    let outcome = beside_a_crowd(Plan {
        calm: Duration::from_secs(8),
        crowded: Duration::from_secs(16),
        is_limited: true,
        seed: 1,
    })
    .await;
    assert_eq!(outcome.faults, [""; 0]);
}

/// The control: with its limits off, the gateway lets the same crowd do what it likes, and that is seen. The
/// good pings are stored all the same: that does not hang on the limits.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_limits_the_same_crowd_does_as_it_likes() {
    let outcome = beside_a_crowd(Plan {
        calm: Duration::from_secs(2),
        crowded: Duration::from_secs(8),
        is_limited: false,
        seed: 1,
    })
    .await;
    let is_told = |part: &str| outcome.faults.iter().any(|fault| fault.contains(part));
    for part in [
        "too many handshakes in progress",
        "waypost_address_proofs_total has not moved",
        "limit=\"device_frames\"} has not moved",
        "limit=\"device_pings\"} has not moved",
        "limit=\"device_connections\"} has not moved",
    ] {
        assert!(is_told(part), "{part:?} is not among {:?}", outcome.faults);
    }
    assert!(!is_told("not every ping is stored"), "{:?}", outcome.faults);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_hostile() {
    let (seed, length) = (soak::seed(), soak::length());
    let outcome = beside_a_crowd(Plan {
        calm: length / 5,
        crowded: length / 5 * 4,
        is_limited: true,
        seed,
    })
    .await;
    assert_eq!(outcome.faults, [""; 0]);
    soak::summary(format_args!(
        "a hostile crowd costs good devices no ping: {} pings of {GOOD_DEVICES} devices beside {} rounds and \
         packets of abuse, none lost, none twice, p99 of acks {} ms without it and {} ms with it; seed {seed}",
        outcome.pings,
        outcome.rounds.values().sum::<u64>(),
        outcome.calm.quantile_ms(0.99),
        outcome.crowded.quantile_ms(0.99),
    ));
}

/// As many as need not prove their address, the good ones' own among them, and some that have.
const MOST_HANDSHAKES: f64 = 400.0;
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
