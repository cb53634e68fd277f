//! SIGKILL at any moment: no acknowledged ping is lost, none is stored twice, and the devices finish by
//! themselves.

use std::{process::Command, time::Duration};

use quinn::ConnectionError;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use waypost_proto::{device::DeviceRecord, ranges::RangeSet, session::Lane};
use waypost_tests::{
    Process, ais_file,
    audit::{self, Fault, Snapshot},
    binary,
    fleet::{Audited, Fleet, store_settings},
    hello, soak,
};

/// The load test keeps its own ledger of what was acknowledged and checks
/// the store against it at the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_has_everything_it_acknowledged() {
    let Some(ais) = ais_file() else { return };
    let mut gateway = Process::start(&[]).await;
    let report = gateway.data_dir().join("report.json");
    let replay = Command::new(binary("loadtest"))
        .arg("replay")
        .arg(ais)
        .args([
            "--speed-up",
            "4000",
            "--addr",
            &gateway.addresses().devices.to_string(),
        ])
        .args(["--freshness", &gateway.addresses().freshness.to_string()])
        .args(["--admin", &gateway.addresses().admin.to_string()])
        .arg("--pki")
        .arg(gateway.data_dir().join("pki"))
        .arg("--data")
        .arg(gateway.data_dir())
        .arg("--json")
        .arg(&report)
        .spawn()
        .unwrap();
    for _ in 1..=2 {
        // Counters begin again with each process; what was stored before does not come again.
        gateway
            .metrics_until(|metrics| {
                20_000.0 <= metrics.value("waypost_pings_total{fate=\"accepted\"}")
            })
            .await;
        gateway.kill();
        gateway.restart().await;
    }
    let output = tokio::task::spawn_blocking(|| replay.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert!(output.status.success(), "{report:#}");
    assert_eq!(report["lost"], 0);
    assert_eq!(report["stored_twice"], 0);
    assert_eq!(report["freshness_wrong"], 0);
    assert_eq!(report["stored"], 99_999);
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
}

/// Without that a device would learn it only when an answer is overdue. The idle timeout of the connection
/// is longer than the test waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_gateway_tells_devices_that_their_connections_are_gone() {
    let mut gateway = Process::start(&[]).await;
    let link = gateway.connect(&gateway.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    gateway.kill();
    gateway.restart().await;
    // Its next keep-alive asks for it.
    assert_eq!(link.ended().await, ConnectionError::Reset);
}

/// How many rounds one store sees, so that an audit stays short.
const ROUNDS_OF_A_STORE: u32 = 25;

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_at_random_moments_lose_nothing_and_double_nothing() {
    let counts = crash_loop(soak::fixed_seed(20_261_123), 20).await;
    assert_eq!(counts.rounds, 20);
    assert!(0 < counts.audited.acked, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_crash_loop() {
    let seed = soak::seed();
    let counts = crash_loop(seed, soak::rounds()).await;
    soak::summary(format_args!(
        "an acknowledged ping survives SIGKILL: {} rounds, {} kills while starting, {} while draining, \
         {} pings acknowledged, {} stored, 0 lost, 0 stored twice; seed {seed}",
        counts.rounds,
        counts.kills_while_starting,
        counts.kills_while_draining,
        counts.audited.acked,
        counts.audited.stored,
    ));
}

#[derive(Debug, Default)]
struct Counts {
    rounds: u32,
    kills_while_starting: u32,
    kills_while_draining: u32,
    audited: Audited,
}

/// The seed decides on the moments and on what the devices do; what the gateway is doing then is up to
/// the machine.
async fn crash_loop(seed: u64, rounds: u32) -> Counts {
    let mut counts = Counts::default();
    while counts.rounds < rounds {
        let of_this_store = ROUNDS_OF_A_STORE.min(rounds - counts.rounds);
        let store_seed = soak::part(seed, counts.rounds);
        let audited = one_store(store_seed, of_this_store, &mut counts).await;
        counts.audited.acked += audited.acked;
        counts.audited.stored += audited.stored;
    }
    counts
}

async fn one_store(seed: u64, rounds: u32, counts: &mut Counts) -> Audited {
    let mut dice = StdRng::seed_from_u64(seed);
    let gateway = &mut Process::prepared(store_settings(&mut dice));
    // The very first starts, too.
    kill_while_starting(gateway, &mut dice, counts).await;
    gateway.restart().await;
    let mut fleet = Fleet::new(gateway, seed);
    for _ in 0..rounds {
        let life = Duration::from_millis(dice.random_range(20..600));
        fleet.work_for(gateway, life).await;
        if dice.random_ratio(1, 5) {
            gateway.terminate();
            let drain = Duration::from_millis(dice.random_range(0..40));
            fleet.work_for(gateway, drain).await;
            counts.kills_while_draining += 1;
        }
        gateway.kill();
        counts.rounds += 1;
        let (_, faults) = fleet.audit(gateway);
        Fleet::assert_sound(&faults, gateway);
        kill_while_starting(gateway, &mut dice, counts).await;
        gateway.restart().await;
        let faults = fleet.audit_freshness(gateway).await;
        Fleet::assert_sound(&faults, gateway);
    }
    fleet.hand_over(gateway).await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let (audited, faults) = fleet.audit(gateway);
    Fleet::assert_sound(&faults, gateway);
    audited
}

async fn kill_while_starting(gateway: &mut Process, dice: &mut StdRng, counts: &mut Counts) {
    for _ in 0..[0, 0, 1, 2][dice.random_range(0..4)] {
        let after = Duration::from_millis(dice.random_range(0..250));
        gateway.start_and_kill(after).await;
        counts.kills_while_starting += 1;
    }
}

/// The audit would notice: each fault, made by hand, is found and named.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_notices_a_lost_a_doubled_an_altered_and_a_made_up_ping() {
    let mut gateway = Process::prepared(&[]);
    gateway.restart().await;
    let mut fleet = Fleet::new(&gateway, 7);
    fleet.work_until_acked(&gateway, 100).await;
    fleet.hand_over(&gateway).await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let (audited, faults) = fleet.audit(&gateway);
    assert_eq!(faults, []);
    assert!(0 < audited.acked);

    let whole = fleet.held();
    let found = |now: &Snapshot| audit::compare(now, whole, &fleet.acked(), fleet.survivors());
    assert_eq!(found(whole), []);

    let mut lost = whole.clone();
    lost.rows.pop().unwrap();
    assert!(
        found(&lost)
            .iter()
            .any(|fault| matches!(fault, Fault::Lost(_)))
    );

    let mut doubled = whole.clone();
    doubled.rows.push(doubled.rows[0].clone());
    assert!(
        found(&doubled)
            .iter()
            .any(|fault| matches!(fault, Fault::Twice(_)))
    );

    let mut altered = whole.clone();
    altered.rows[0].record.pings[0].latitude_e7 ^= 1;
    assert!(
        found(&altered)
            .iter()
            .any(|fault| matches!(fault, Fault::Altered(_)))
    );

    let mut late = whole.clone();
    late.rows[0].record.position += 1;
    assert!(
        found(&late)
            .iter()
            .any(|fault| matches!(fault, Fault::Position(_)))
    );

    let spoils: [fn(&mut DeviceRecord); 3] = [
        |record| record.clocks.last_contact_ms -= 1_000,
        |record| record.clocks.last_sample_ms += 1,
        |record| record.clocks.last_fix_ms = 0,
    ];
    for spoil in spoils {
        let mut spoilt = whole.clone();
        spoilt.devices.values_mut().for_each(spoil);
        assert!(
            found(&spoilt)
                .iter()
                .any(|fault| matches!(fault, Fault::Clock(_)))
        );
    }

    let mut forgetful = whole.clone();
    for record in forgetful.devices.values_mut() {
        record.settled = RangeSet::default();
    }
    assert!(
        found(&forgetful)
            .iter()
            .any(|fault| matches!(fault, Fault::Dedup(_)))
    );

    // The other way round: a line of the ledger that no gateway ever gave cause for.
    let mut ledger = fleet.acked();
    let mut line = ledger[0];
    line.seq += 1_000_000;
    ledger.push(line);
    let faults = audit::compare(whole, whole, &ledger, fleet.survivors());
    assert!(faults.iter().any(|fault| matches!(fault, Fault::Lost(_))));
}
