//! The power goes at any moment: what was acknowledged was synced, so it is still there.

use std::{
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use waypost_tests::{
    Process,
    audit::Fault,
    fleet::{Audited, Fleet, store_settings},
    power_cut::{PowerCut, Taken, Unsynced},
    soak,
};

/// How many cuts one store sees, so that an audit stays short.
const CUTS_OF_A_STORE: u32 = 10;
/// On every system that this runs on.
const SIGKILL: i32 = 9;

#[derive(Debug, Default)]
struct Counts {
    cuts: u32,
    taken: Taken,
    audited: Audited,
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_power_cuts_at_random_moments_lose_nothing_that_was_acknowledged() {
    let Some(counts) = power_cuts(soak::fixed_seed(20_261_124), 10).await else {
        return;
    };
    assert_eq!(counts.cuts, 10);
    assert!(0 < counts.audited.acked, "{counts:?}");
    assert!(
        0 < counts.taken.bytes,
        "the power cuts took nothing: {counts:?}"
    );
    assert!(
        0 < counts.taken.names,
        "the power cuts took nothing: {counts:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_power_loss() {
    let (seed, length) = (soak::seed(), soak::length());
    let started = Instant::now();
    first_start_ends_at_changes(seed, 1).await;
    let mut sum = Counts::default();
    let mut stores = 0;
    while started.elapsed() < length {
        let Some(counts) = power_cuts(soak::part(seed, 2 * stores), CUTS_OF_A_STORE).await else {
            return;
        };
        stores += 1;
        sum.add(&counts);
    }
    soak::summary(format_args!(
        "an acknowledged ping survives the loss of power: {} power cuts, which took {} unsynced bytes and \
         {} unsynced names, {} pings acknowledged, {} stored, 0 lost, 0 stored twice; seed {seed}",
        sum.cuts, sum.taken.bytes, sum.taken.names, sum.audited.acked, sum.audited.stored,
    ));
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.cuts += other.cuts;
        self.taken.bytes += other.taken.bytes;
        self.taken.names += other.taken.names;
        self.audited.acked += other.audited.acked;
        self.audited.stored += other.audited.stored;
    }
}

/// One store and its power cuts. `None` where the library cannot be made.
async fn power_cuts(seed: u64, cuts: u32) -> Option<Counts> {
    let mut dice = StdRng::seed_from_u64(seed);
    let mut gateway = Process::prepared(store_settings(&mut dice));
    let mut power = PowerCut::install(&mut gateway)?;
    let mut counts = Counts::default();
    gateway.restart().await;
    let mut fleet = Fleet::new(&gateway, soak::part(seed, 1));
    gateway.kill();
    for _ in 0..cuts {
        live_and_die(&mut gateway, &mut fleet, &mut dice).await;
        let unsynced = if dice.random() {
            Unsynced::Lost
        } else {
            Unsynced::KeptInPart
        };
        let taken = power.cut(unsynced, &mut dice);
        counts.cuts += 1;
        counts.taken.bytes += taken.bytes;
        counts.taken.names += taken.names;
        let (_, faults) = fleet.audit(&gateway);
        Fleet::assert_sound(&faults, &mut gateway);
    }
    gateway.restart().await;
    fleet.hand_over(&gateway).await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    // Also after an orderly stop.
    power.cut(Unsynced::Lost, &mut dice);
    let (audited, faults) = fleet.audit(&gateway);
    Fleet::assert_sound(&faults, &mut gateway);
    counts.audited = audited;
    Some(counts)
}

/// One life of the gateway: it recovers, serves, and is killed after a time, or at a change of its disk.
async fn live_and_die(gateway: &mut Process, fleet: &mut Fleet, dice: &mut StdRng) {
    let by_change = dice.random();
    if by_change {
        // A start makes about a hundred changes, and a commit two.
        let last = dice.random_range(1..800);
        gateway.set("POWER_LOSS_KILL_AT", &last.to_string());
    }
    let started = gateway.try_restart().await;
    gateway.unset("POWER_LOSS_KILL_AT");
    if let Err(status) = started {
        let was_killed = by_change && status.signal() == Some(SIGKILL);
        assert!(was_killed, "{status}: {}", gateway.log());
        return;
    }
    if by_change {
        fleet.work_until(gateway, || gateway.has_ended()).await;
    } else {
        let faults = fleet.audit_freshness(gateway).await;
        Fleet::assert_sound(&faults, gateway);
        let life = Duration::from_millis(dice.random_range(20..800));
        fleet.work_for(gateway, life).await;
        gateway.kill();
    }
}

/// The same with a protection off: a gateway whose syncs of its log do nothing, which is what
/// `sync = false` would be, and one that does not sync the folder that the database lies in. The same
/// audit finds the loss.
#[tokio::test(flavor = "multi_thread")]
#[expect(
    clippy::print_stdout,
    reason = "the result of the control is published"
)]
async fn without_its_syncs_a_power_cut_loses_acknowledged_pings() {
    for (what, swallowed) in [("of the log", ".log"), ("of the store's folder", "/store")] {
        let mut gateway = Process::prepared(&[("POWER_LOSS_SWALLOW", swallowed)]);
        let Some(mut power) = PowerCut::install(&mut gateway) else {
            return;
        };
        gateway.restart().await;
        let mut fleet = Fleet::new(&gateway, 1);
        fleet.work_until_acked(&gateway, 100).await;
        fleet.hand_over(&gateway).await;
        gateway.kill();
        power.cut(Unsynced::Lost, &mut StdRng::seed_from_u64(1));
        let (audited, faults) = fleet.audit(&gateway);
        let lost = faults
            .iter()
            .filter(|fault| matches!(fault, Fault::Lost(_)));
        let lost = lost.count();
        println!(
            "control: without the sync {what}, a power cut lost {lost} of {} acknowledged pings",
            audited.acked
        );
        assert!(0 < lost, "{faults:?}");
    }
}

/// The tripwire: a store that has lost acknowledged commits says so and does not start.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_has_lost_commits_in_a_power_cut_refuses_to_start() {
    let mut gateway = Process::prepared(&[]);
    let Some(mut power) = PowerCut::install(&mut gateway) else {
        return;
    };
    let mut dice = StdRng::seed_from_u64(1);
    gateway.restart().await;
    let mut fleet = Fleet::new(&gateway, 1);
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    power.begin();

    gateway.set("POWER_LOSS_SWALLOW", ".log");
    gateway.restart().await;
    // The first that is written may be of before any commit. The second is not, and is on disk for sure once the third is
    // written.
    let path = gateway.data_dir().join("store/watermark");
    let watermark = || std::fs::read(&path).ok();
    for _ in 0..3 {
        let last = watermark();
        let is_written = || watermark().is_some_and(|now| last.as_ref() != Some(&now));
        fleet.work_until(&gateway, is_written).await;
    }
    gateway.kill();
    power.cut(Unsynced::Lost, &mut dice);
    let status = gateway.try_restart().await.expect_err("it starts");
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    assert!(
        gateway.log().contains("has lost acknowledged data"),
        "{}",
        gateway.log()
    );
}

/// Each change of the disk in a first start, and in a first restart, is once the last one before the power
/// goes. Afterwards a gateway starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_may_end_at_any_change_of_the_disk() {
    // Every second one or so; the soak takes each.
    first_start_ends_at_changes(soak::fixed_seed(1), 2).await;
}

async fn first_start_ends_at_changes(seed: u64, longest_step: usize) {
    let mut dice = StdRng::seed_from_u64(seed);
    let mut gateway = Process::prepared(&[]);
    let Some(mut power) = PowerCut::install(&mut gateway) else {
        return;
    };
    let mut last: usize = 1;
    loop {
        gateway.set("POWER_LOSS_KILL_AT", &last.to_string());
        let Err(status) = gateway.try_restart().await else {
            break;
        };
        assert_eq!(status.signal(), Some(SIGKILL), "{}", gateway.log());
        match last % 3 {
            0 => power.cut(Unsynced::Lost, &mut dice),
            1 => power.cut(Unsynced::KeptInPart, &mut dice),
            _ => Taken::default(), // only the process was killed
        };
        gateway.unset("POWER_LOSS_KILL_AT");
        let started = gateway.try_restart().await;
        assert!(
            started.is_ok(),
            "after change {last}: {status}: {}",
            gateway.log()
        );
        gateway.kill();
        power.empty();
        last += dice.random_range(1..=longest_step);
    }
    assert!(40 < last, "only {last} changes were seen");
}

/// The same of a recovery: it is interrupted at one change after the other, and each time what it had not
/// synced is taken away, until it comes to its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_may_end_at_any_change_of_the_disk() {
    let mut dice = StdRng::seed_from_u64(soak::fixed_seed(2));
    let mut gateway = Process::prepared(&[]);
    let Some(mut power) = PowerCut::install(&mut gateway) else {
        return;
    };
    gateway.restart().await;
    let mut fleet = Fleet::new(&gateway, 2);
    fleet.work_until_acked(&gateway, 100).await;
    gateway.kill();
    let mut last = 1;
    loop {
        power.cut(Unsynced::KeptInPart, &mut dice);
        gateway.set("POWER_LOSS_KILL_AT", &last.to_string());
        let Err(status) = gateway.try_restart().await else {
            break;
        };
        assert_eq!(status.signal(), Some(SIGKILL), "{}", gateway.log());
        last += 1;
    }
    assert!(20 < last, "only {last} changes were seen");
    gateway.kill();
    power.cut(Unsynced::Lost, &mut dice);
    let (audited, faults) = fleet.audit(&gateway);
    Fleet::assert_sound(&faults, &mut gateway);
    assert!(0 < audited.acked);
}

/// The library sees every call that it must see: what it wrote down is what is there.
#[tokio::test(flavor = "multi_thread")]
async fn the_journal_of_the_disk_is_complete() {
    let mut gateway = Process::prepared(&[]);
    let Some(power) = PowerCut::install(&mut gateway) else {
        return;
    };
    gateway.restart().await;
    let mut fleet = Fleet::new(&gateway, 3);
    for _ in 0..2 {
        fleet.work_until_acked(&gateway, 50).await;
        gateway.kill();
        gateway.restart().await;
    }
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    assert_eq!(power.unseen(), Vec::<std::path::PathBuf>::new());
}
