//! Disks that fill up: below the floor new pings wait; without a floor a full disk is final.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use waypost_proto::{session::Lane, v1::reject::Code};
use waypost_tests::{Mount, Process, World, hello, ping, stored_seqs, until};

use super::{
    faults::ANY_RATE,
    ledger::{
        all_send_until_closed, cannot_start, connect_all, recovers, stopped_because_of, wrong,
    },
};

/// Writes until the file is so large or the disk is full.
fn write_ballast(path: &Path, mib: usize) {
    let mut file = File::create(path).unwrap();
    for _ in 0..mib * 16 {
        if file.write_all(&[1; 1 << 16]).is_err() {
            // What is left of the disk.
            while file.write_all(&[1; 512]).is_ok() {}
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_pings_wait_while_the_disk_is_nearly_full_and_nobody_is_taken_for_silent() {
    let Some(mount) = Mount::small(96) else {
        return;
    };
    let settings = [
        ("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "32"),
        ("WAYPOST_STORE_MEMTABLE_MIB", "8"),
        ("WAYPOST_STORE_WAL_MIB", "8"),
    ];
    let mut gateway = Process::prepared_on(&mount.path(), &settings);
    gateway.restart().await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert_eq!(live.ack().await.durable_upto, 1);
    let before = gateway.entry(&device).await;

    let ballast = mount.path().join("ballast");
    write_ballast(&ballast, 70);
    let said = until(async || match gateway.readiness().await.unwrap() {
        (503, said) => Some(said),
        _ => None,
    })
    .await;
    assert!(
        said.contains("not ready: the disk is nearly full"),
        "{said}"
    );
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    let ack = live.ack().await;
    assert_eq!(ack.durable_upto, 1);
    assert_eq!((ack.accepted, ack.duplicate, ack.rejected), (1, 1, 1));
    assert_eq!(ack.rejects.len(), 1);
    assert_eq!(ack.rejects[0].seq, 2);
    assert_eq!(ack.rejects[0].code(), Code::Overloaded);
    assert!(ack.rejects[0].retryable);
    assert_eq!(ack.flow.unwrap().retry_after_ms, 30_000);
    let after = gateway.entry(&device).await;
    assert!(
        before.last_contact_ms < after.last_contact_ms,
        "it was heard"
    );
    assert_eq!(after.last_sample_ms, before.last_sample_ms);
    let metrics = gateway
        .metrics_until(|metrics| metrics.value("waypost_disk_refusing") == 1.0)
        .await;
    assert!(metrics.value("waypost_disk_free_bytes") < metrics.value("waypost_disk_floor_bytes"));
    assert_eq!(
        metrics.value("waypost_pings_rejected_total{code=\"overloaded\"}"),
        1.0
    );

    fs::remove_file(ballast).unwrap();
    until(async || (gateway.admin("/readyz").await.0 == 200).then_some(())).await;
    live.send_pings(epoch, &[ping(2)]).await;
    assert_eq!(live.ack().await.durable_upto, 2);
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let store = World::open_store(gateway.data_dir());
    assert_eq!(stored_seqs(&store, &device), [(epoch, 1), (epoch, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_starts_on_a_nearly_full_disk_hears_devices_and_stores_nothing() {
    let world = World::start_with(|config| config.store.free_space_floor_mib = u32::MAX).await;
    let (code, said) = world.readiness().await;
    assert_eq!(code, 503);
    assert!(said.contains("the disk is nearly full"), "{said}");
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.rejected, ack.durable_upto), (0, 1, 0));
    assert_eq!(ack.rejects[0].code(), Code::Overloaded);
    assert!(ack.receive_ms <= world.entry(&device).await.last_contact_ms);
    assert_eq!(stored_seqs(&world.stop().await, &device), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_final_and_after_room_was_made_everything_is_there() {
    let Some(mount) = Mount::small(96) else {
        return;
    };
    let settings = [
        ANY_RATE,
        ("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "0"),
        ("WAYPOST_STORE_MEMTABLE_MIB", "8"),
        ("WAYPOST_STORE_WAL_MIB", "8"),
    ];
    let mut gateway = Process::prepared_on(&mount.path(), &settings);
    gateway.restart().await;
    let senders = connect_all(&gateway, 500).await;
    let ballast = mount.path().join("ballast");
    write_ballast(&ballast, 200);
    let mut senders = all_send_until_closed(senders).await;
    stopped_because_of(&mut gateway, "No space left on device").await;

    // What the end of the process has freed.
    write_ballast(&mount.path().join("more ballast"), 200);
    cannot_start(&mut gateway).await;
    fs::remove_file(ballast).unwrap();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}
