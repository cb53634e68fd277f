//! Faults by seed: any call, any file, any moment, also while the gateway starts.

use std::time::Instant;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use waypost_tests::{Call, DiskError, FailingDisk, Form, Order, soak};

use super::{
    faults::{SMALL_TABLES, start_on_failing},
    ledger::{all_send_until, connect_all, recovers, wrong},
};

/// What was tried, for the summary.
#[derive(Default)]
struct Tally {
    rounds: u64,
    hit: u64,
    stopped: u64,
    went_on: u64,
    failed_starts: u64,
    acked: u64,
}

/// Faults of any kind at any call, also while the gateway starts: whatever happens, what was
/// acknowledged is there, and when the disk is well again the devices finish by themselves.
async fn any_fault(disk: &FailingDisk, seed: u64, tally: &mut Tally) {
    let mut random = StdRng::seed_from_u64(seed);
    let settings: &[_] = if random.random() { &SMALL_TABLES } else { &[] };
    let batch_pings = if settings.is_empty() { 20 } else { 500 };
    let mut gateway = start_on_failing(disk, settings).await;
    let mut senders = connect_all(&gateway, batch_pings).await;
    let texts = [".log", ".sst", "MANIFEST", "/store/", "/store/rocksdb/"];
    disk.order(any_order(&mut random, &texts, 60));
    let enough = senders[0].durable_upto + 200 * batch_pings;
    senders = all_send_until(senders, enough).await;
    if senders.iter().all(|sender| sender.stream.is_some()) {
        tally.went_on += 1;
        gateway.kill();
    } else {
        tally.stopped += 1;
        assert_eq!(gateway.exit_code().await, Some(1), "seed {seed}");
    }
    disk.heal();
    tally.hit += disk.done().len() as u64;
    disk.lose_unsynced();
    disk.forget();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0], "seed {seed}");
    for _ in 0..random.random_range(0..4) {
        // A start makes some 80 calls.
        let mut order = any_order(&mut random, &["/store/"], 40);
        if random.random() {
            order.call = Call::Read;
        }
        disk.order(order);
        match gateway.try_restart().await {
            Ok(()) => gateway.kill(),
            Err(status) => {
                tally.failed_starts += 1;
                assert_eq!(status.code(), Some(1), "seed {seed}");
            }
        }
        disk.heal();
        tally.hit += disk.done().len() as u64;
        disk.lose_unsynced();
        disk.forget();
        assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0], "seed {seed}");
    }
    recovers(&mut gateway, &mut senders).await;
    tally.rounds += 1;
    tally.acked += senders
        .iter()
        .map(|sender| sender.acked.len() as u64)
        .sum::<u64>();
}

fn any_order(random: &mut StdRng, texts: &[&'static str], calls: u32) -> Order {
    let call = [Call::Sync, Call::Write, Call::Change, Call::All][random.random_range(0..4)];
    let form = match call {
        Call::Write if random.random() => Form::Torn,
        _ => Form::Fail,
    };
    Order {
        call,
        text: texts[random.random_range(0..texts.len())],
        nth: random.random_range(1..calls),
        times: random.random_range(0..4),
        form,
        error: [DiskError::Io, DiskError::NoSpace, DiskError::ReadOnly][random.random_range(0..3)],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_and_whenever_what_was_acknowledged_is_there() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut tally = Tally::default();
    for seed in 1..=6 {
        any_fault(&disk, seed, &mut tally).await;
    }
    assert!(0 < tally.stopped, "no fault was felt");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_failing_disk() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let (seed, length) = (soak::seed(), soak::length());
    let end = Instant::now() + length;
    let mut tally = Tally::default();
    while Instant::now() < end {
        any_fault(&disk, seed.wrapping_add(tally.rounds), &mut tally).await;
    }
    soak::summary(format_args!(
        "no fault of a disk loses an acknowledged ping: {} rounds, {} calls hit, {} times the gateway \
         stopped and {} times went on, {} starts failed, {} pings acknowledged, 0 lost; seed {seed}",
        tally.rounds, tally.hit, tally.stopped, tally.went_on, tally.failed_starts, tally.acked
    ));
}
