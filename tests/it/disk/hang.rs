//! Disks that hang: it is told, and nothing is acknowledged or announced until they go on.

use waypost_gateway::clock::system_now_ms;
use waypost_proto::{
    session::Lane,
    v1::{self, coverage::Reason, watch_event::Kind},
};
use waypost_tests::{
    Call, DiskError, FailingDisk, Form, Mount, Order, Process, World, hello, ping, stored_seqs,
    until,
};

use super::faults::start_on_failing;

/// The largest `resolved_ms` of the Progress that come until there were so many.
async fn progress(stream: &mut tonic::Streaming<v1::WatchResponse>, count: usize) -> u64 {
    let (mut seen, mut resolved_ms) = (0, 0);
    while seen < count {
        let response = stream.message().await.unwrap().expect("the stream goes on");
        for event in response.events {
            if let Some(Kind::Progress(progress)) = event.kind {
                resolved_ms = resolved_ms.max(progress.resolved_ms);
                seen += 1;
            }
        }
    }
    resolved_ms
}

/// Reads on to the span in which the disk did not answer, and the largest `resolved_ms` that came before it.
async fn disk_failed(stream: &mut tonic::Streaming<v1::WatchResponse>) -> (v1::Coverage, u64) {
    let mut resolved_ms = 0;
    loop {
        let response = stream.message().await.unwrap().expect("the stream goes on");
        for event in response.events {
            match event.kind {
                Some(Kind::Coverage(span)) if span.reason() == Reason::DiskFailed => {
                    return (span, resolved_ms);
                }
                Some(Kind::Progress(progress)) => {
                    resolved_ms = resolved_ms.max(progress.resolved_ms);
                }
                _ => {}
            }
        }
    }
}

/// While the disk hangs, which it does between `hang` and the drop of what that returns.
async fn is_told_and_waited_for<Hanging>(gateway: &mut Process, hang: impl FnOnce() -> Hanging) {
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert_eq!(live.ack().await.durable_upto, 1);
    let mut watch = gateway
        .checker()
        .await
        .watch(v1::WatchRequest::default())
        .await
        .unwrap()
        .into_inner();

    let hanging = hang();
    live.send_pings(epoch, &[ping(2)]).await;
    let said = tokio::select! {
        biased;
        ack = live.ack() => panic!("a disk that hangs has no {ack:?}"),
        said = until(async || match gateway.admin("/readyz").await {
            (503, said) => Some(said),
            _ => None,
        }) => said,
    };
    assert!(said.contains("the disk has not answered for"), "{said}");
    let resolved_ms = tokio::select! {
        biased;
        ack = live.ack() => panic!("a disk that hangs has no {ack:?}"),
        resolved_ms = progress(&mut watch, 5) => resolved_ms,
    };
    let metrics = gateway
        .metrics_until(|metrics| 5.0 <= metrics.value("waypost_disk_waited_seconds"))
        .await;
    assert!(1.0 <= metrics.value("waypost_disk_stalls_total"));
    assert!(1.0 < metrics.value("waypost_freshness_lag_seconds"));
    assert_eq!(
        gateway.admin("/healthz").await.0,
        200,
        "a restart would not help"
    );

    drop(hanging);
    let ack = live.ack().await;
    assert_eq!(ack.durable_upto, 2);
    assert!(
        resolved_ms < ack.receive_ms,
        "nobody was told that this moment was complete"
    );
    let (span, announced_ms) = disk_failed(&mut watch).await;
    assert!(
        announced_ms <= span.from_ms && span.from_ms + 5_000 <= span.until_ms,
        "{announced_ms} was announced before {span:?}"
    );
    until(async || (gateway.admin("/readyz").await.0 == 200).then_some(())).await;
    // Once for each stall; a slow disk may have had one of its own.
    let told = gateway.log().matches("has not answered").count();
    assert!((1..=2).contains(&told), "{}", gateway.log());
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let store = World::open_store(gateway.data_dir());
    assert_eq!(stored_seqs(&store, &device), [(epoch, 1), (epoch, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_disk_is_told_and_nothing_is_acknowledged_or_resolved_until_it_thaws() {
    let Some(mount) = Mount::freezable() else {
        return;
    };
    let no_floor = [("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "0")];
    let mut gateway = Process::prepared_on(&mount.path(), &no_floor);
    gateway.restart().await;
    is_told_and_waited_for(&mut gateway, || mount.freeze()).await;
}

/// The same where nobody is root.
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_hangs_is_told_and_nothing_is_acknowledged_or_resolved_until_it_ends() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    is_told_and_waited_for(&mut gateway, || {
        disk.order(Order {
            times: 0,
            form: Form::Hang,
            ..Order::next(Call::Sync, "/store/", DiskError::Io)
        });
        Healing(&disk)
    })
    .await;
}

/// A backlog that cannot get on does not keep the news waiting: LIVE is received while BACKFILL waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_that_waits_for_the_disk_does_not_keep_live_from_being_received() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let gateway = start_on_failing(&disk, &[("WAYPOST_COMMIT_QUEUE_REQUESTS", "1")]).await;
    let link = gateway.connect(&gateway.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let mut backfill = link.open(hello(Lane::Backfill, epoch)).await;
    backfill.welcome().await;
    disk.order(Order {
        times: 0,
        form: Form::Hang,
        ..Order::next(Call::Sync, "/store/", DiskError::Io)
    });
    let healing = Healing(&disk);
    // More than the commit that hangs, the queue, and the one that waits for a place in it.
    for seq in 1..=8 {
        backfill.send_pings(epoch, &[ping(seq)]).await;
    }
    let counted = |kind| format!("waypost_frames_received_total{{kind=\"{kind}\"}}");
    gateway
        .metrics_until(|metrics| 3.0 <= metrics.value(&counted("batch")))
        .await;
    live.send(v1::device_frame::Kind::Heartbeat(v1::Heartbeat {}))
        .await;
    gateway
        .metrics_until(|metrics| 1.0 <= metrics.value(&counted("heartbeat")))
        .await;
    let healed_ms = system_now_ms();
    drop(healing);
    assert!(live.ack().await.receive_ms <= healed_ms);
    while backfill.ack().await.durable_upto < 8 {}
}

/// Withdraws the order when it is dropped.
struct Healing<'a>(&'a FailingDisk);

impl Drop for Healing<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}
