//! Calls that fail: each is final where it must be, and nobody was told what is not so.

use std::fs;

use waypost_tests::{Call, DiskError, FailingDisk, Form, Order, Process, until};

use super::ledger::{
    Sender, all_send_until, all_send_until_closed, cannot_start, connect_all, recovers,
    stopped_because_of, wrong,
};

pub(super) async fn start_on_failing(disk: &FailingDisk, more: &[(&str, &str)]) -> Process {
    let environment = disk.environment();
    let mut environment: Vec<(&str, &str)> = environment
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    environment.push(ANY_RATE);
    environment.extend(more);
    let mut gateway = Process::prepared(&environment);
    gateway.restart().await;
    gateway
}

/// The gateway stops at this fault, and nothing that it acknowledged is missing.
async fn is_final(order: Order, batch_pings: u64, settings: &[(&str, &str)]) {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, settings).await;
    let senders = connect_all(&gateway, batch_pings).await;
    disk.order(order);
    let mut senders = all_send_until_closed(senders).await;
    stopped_because_of(&mut gateway, order.error.in_words()).await;
    assert!(!disk.done().is_empty(), "the fault happened");
    disk.heal();
    let lost_bytes = disk.lose_unsynced();
    if let (Call::Sync, ".log") = (order.call, order.text) {
        assert!(0 < lost_bytes, "what was not synced is lost");
    }
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// One device sends as much here as a thousand may.
pub(super) const ANY_RATE: (&str, &str) = ("WAYPOST_DEVICES_ALLOWANCE_PINGS_PER_S", "0");

/// So small that table files are written all the time.
pub(super) const SMALL_TABLES: [(&str, &str); 2] = [
    ("WAYPOST_STORE_MEMTABLE_MIB", "4"),
    ("WAYPOST_STORE_WAL_MIB", "1"),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_of_the_log_is_final() {
    let order = Order::next(Call::Sync, ".log", DiskError::Io);
    is_final(order, 20, &[]).await;
}

/// The kernel reports such a failure once; whoever asks again is told that all is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_failed_sync_of_the_log_is_final_too() {
    let order = Order {
        nth: 17,
        ..Order::next(Call::Sync, ".log", DiskError::Io)
    };
    is_final(order, 20, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_is_final() {
    let order = Order {
        nth: 9,
        ..Order::next(Call::Write, ".log", DiskError::Io)
    };
    is_final(order, 20, &[]).await;
}

/// A full disk takes a part of the write first.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_written_in_part_is_final() {
    let order = Order {
        nth: 9,
        times: 2,
        form: Form::Torn,
        ..Order::next(Call::Write, ".log", DiskError::NoSpace)
    };
    is_final(order, 20, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_file_that_cannot_be_written_is_final() {
    let order = Order {
        times: 0,
        ..Order::next(Call::Write, ".sst", DiskError::NoSpace)
    };
    is_final(order, 1_000, &SMALL_TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_file_that_cannot_be_synced_is_final() {
    let order = Order {
        nth: 2,
        ..Order::next(Call::Sync, ".sst", DiskError::Io)
    };
    is_final(order, 1_000, &SMALL_TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_cannot_be_synced_is_final() {
    let order = Order::next(Call::Sync, "MANIFEST", DiskError::Io);
    is_final(order, 1_000, &SMALL_TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_became_read_only_is_final_and_a_restart_says_so() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 20).await;
    let order = Order {
        times: 0,
        ..Order::next(Call::All, "/store/", DiskError::ReadOnly)
    };
    disk.order(order);
    let mut senders = all_send_until_closed(senders).await;
    stopped_because_of(&mut gateway, order.error.in_words()).await;
    let said_before = gateway.log().len();
    cannot_start(&mut gateway).await;
    let said = gateway.log().split_off(said_before);
    assert!(said.contains("Read-only file system"), "{said}");
    assert!(said.contains("may write to"), "it says what to do: {said}");
    disk.heal();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// The commits decide whether the disk is good enough; the watermark is only a tripwire.
#[tokio::test(flavor = "multi_thread")]
async fn a_watermark_that_cannot_be_written_stops_nobody_and_is_told() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 20).await;
    disk.order(Order {
        times: 0,
        ..Order::next(Call::All, "/watermark", DiskError::Io)
    });
    let enough = senders[0].durable_upto + 200;
    let mut senders = all_send_until(senders, enough).await;
    until(async || {
        gateway
            .log()
            .contains("the watermark could not be written")
            .then_some(())
    })
    .await;
    assert!(senders.iter().all(|sender| sender.stream.is_some()));
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    gateway.kill();
    disk.heal();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// Recovery cuts off an end of the log that was torn; a log that it cannot read is not such an end.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_read_at_the_start_is_not_taken_for_its_end() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 100).await;
    let enough = senders[0].durable_upto + 20_000;
    let mut senders = all_send_until(senders, enough).await;
    gateway.kill();
    for nth in [1, 2, 5] {
        disk.forget();
        disk.order(Order {
            nth,
            ..Order::next(Call::Read, ".log", DiskError::Io)
        });
        cannot_start(&mut gateway).await;
        assert_eq!(disk.done().len(), 1, "the fault happened");
        disk.heal();
        assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    }
    let log = gateway.log();
    assert!(log.contains("Input/output error"), "{log}");
    recovers(&mut gateway, &mut senders).await;
}

/// The control for all of the above: with a disk that says that it synced and did not, acknowledged
/// pings are lost. The checker of these tests sees it, and so does the gateway.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::print_stdout, reason = "the control's result is published")]
async fn a_disk_that_lies_about_syncs_loses_pings_and_both_checker_and_gateway_notice() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 20).await;
    let before: usize = senders.iter().map(|sender| sender.acked.len()).sum();
    disk.order(Order {
        times: 0,
        form: Form::Lie,
        ..Order::next(Call::Sync, ".log", DiskError::Io)
    });
    let enough = senders[0].durable_upto + 200;
    let senders = all_send_until(senders, enough).await;
    let position = senders.iter().map(|sender| sender.position).max().unwrap();
    let watermark = gateway.data_dir().join("store/watermark");
    until(async || {
        let text = fs::read_to_string(&watermark).ok()?;
        let noted: u64 = text.split(' ').next()?.parse().ok()?;
        (position <= noted).then_some(())
    })
    .await;
    gateway.kill();
    assert_eq!(
        wrong(gateway.data_dir(), &senders),
        [""; 0],
        "a killed process loses nothing that it gave to the kernel"
    );
    assert!(0 < disk.lose_unsynced());
    disk.heal();
    let lost = wrong(gateway.data_dir(), &senders);
    let acked: usize = senders.iter().map(|sender| sender.acked.len()).sum();
    println!(
        "with a disk that lies, {} of {} acknowledged pings were lost",
        lost.len(),
        acked - before
    );
    assert!(3 * 100 < lost.len(), "{lost:?}");
    cannot_start(&mut gateway).await;
    let log = gateway.log();
    assert!(log.contains("has lost acknowledged data"), "{log}");
}

/// The control for the checker alone.
#[tokio::test(flavor = "multi_thread")]
async fn one_acknowledgement_too_many_does_not_escape_the_checker() {
    let mut gateway = Process::prepared(&[]);
    gateway.restart().await;
    let mut senders = vec![Sender::connect(&gateway, 1, 20).await];
    senders[0].send_until(100).await;
    gateway.kill();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    let made_up = senders[0].next_seq;
    senders[0].acked.insert(made_up);
    assert_eq!(
        wrong(gateway.data_dir(), &senders),
        [format!("{}: {made_up} lost", senders[0].device.id)]
    );
}
