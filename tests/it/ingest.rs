//! Pings in, durable acks out: lanes, ranges, duplicates, the four fates, restarts.

use waypost_proto::{
    ping::RejectCode,
    session::{CloseCode, Lane},
    v1,
};
use waypost_tests::{World, hello, ping, ping_at, stored_seqs};

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_after_the_newest_ping_is_stored_once_and_said_at_each_step() {
    let world = World::start().await;
    let device = world.device(1);

    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;

    live.send_pings(epoch, &[ping(50)]).await;
    let ack = live.ack().await;
    assert_eq!(ack.durable_upto, 0);
    assert_eq!(
        ack.ranges,
        [v1::SeqRange {
            first: 50,
            last: 50
        }]
    );
    let newest = world.entry(&device).await;
    assert_eq!(newest.last_sample_ms, ping(50).time_ms);

    let mut backfill = link.open(hello(Lane::Backfill, epoch)).await;
    let welcome = backfill.welcome().await;
    assert_eq!(
        welcome.ranges,
        [v1::SeqRange {
            first: 50,
            last: 50
        }]
    );
    let old: Vec<_> = (1..=49).map(ping).collect();
    backfill.send_pings(epoch, &old).await;
    let ack = backfill.ack().await;
    assert_eq!((ack.durable_upto, ack.ranges.len()), (50, 0));
    assert_eq!(
        (ack.accepted, ack.duplicate),
        (50, 0),
        "totals of the connection, both lanes together"
    );
    assert_eq!(
        world.entry(&device).await.last_sample_ms,
        newest.last_sample_ms,
        "old pings move nothing back"
    );

    let again = world.connect(&device).await;
    let mut live = again.open(hello(Lane::Live, epoch)).await;
    let welcome = live.welcome().await;
    assert_eq!(
        (welcome.epoch, welcome.durable_upto, welcome.ranges.len()),
        (epoch, 50, 0)
    );
    let all: Vec<_> = (1..=50).map(ping).collect();
    live.send_pings(epoch, &all).await;
    let ack = live.ack().await;
    assert_eq!((ack.durable_upto, ack.accepted, ack.duplicate), (50, 0, 50));
    let entry = world.entry(&device).await;
    assert_eq!(entry.last_sample_ms, newest.last_sample_ms);
    assert_eq!(
        entry.last_contact_ms, ack.receive_ms,
        "a duplicate proves life"
    );
    assert_eq!(entry.position, ack.position);

    assert_eq!(link.closed().await, Some(CloseCode::TakenOver));
    let store = world.stop().await;
    assert_eq!(
        stored_seqs(&store, &device),
        (1..=50).map(|seq| (epoch, seq)).collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_ping_has_one_fate_and_the_metrics_agree() {
    let world = World::start_with(|config| {
        config.commit.least_interval = std::time::Duration::from_secs(10);
    })
    .await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;

    // Samples a second apart: of 1 to 20, the first and the eleventh are stored.
    let dense: Vec<_> = (1..=20)
        .map(|seq| ping_at(seq, ping(0).time_ms + seq * 1_000))
        .collect();
    live.send_pings(epoch, &dense).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.filtered, ack.durable_upto), (2, 18, 20));

    let mut batch = waypost_proto::batch::encode(epoch, &[ping_at(20, 1), ping_at(21, 1)]);
    batch.latitude[1] += 10_000_000_000;
    live.send(v1::device_frame::Kind::Batch(batch)).await;
    let ack = live.ack().await;
    assert_eq!((ack.duplicate, ack.rejected, ack.durable_upto), (1, 1, 21));
    assert_eq!(ack.rejects[0].code(), RejectCode::BadCoordinates);
    assert!(!ack.rejects[0].retryable);

    let metrics = world.metrics().await;
    for (fate, count) in [
        ("accepted", 2.0),
        ("filtered", 18.0),
        ("duplicate", 1.0),
        ("rejected", 1.0),
    ] {
        assert_eq!(
            metrics.value(&format!("waypost_pings_total{{fate=\"{fate}\"}}")),
            count,
            "{fate}"
        );
    }
    assert_eq!(metrics.value("waypost_pings_received_total"), 22.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_finds_everything_as_it_was() {
    let mut world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2), ping(7)]).await;
    let before = live.ack().await;
    let entry_before = world.entry(&device).await;

    world.restart().await;
    assert_eq!(world.entry(&device).await, entry_before);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    let welcome = live.welcome().await;
    assert_eq!(welcome.epoch, epoch);
    assert_eq!(
        (welcome.durable_upto, &welcome.ranges),
        (before.durable_upto, &before.ranges)
    );
    assert_eq!(welcome.incarnation, before.incarnation);
    assert!(
        before.position < welcome.position,
        "a position is never used twice"
    );
    live.send_pings(epoch, &[ping(2), ping(3)]).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.duplicate), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_will_never_come_close_the_hole() {
    let world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(10)]).await;
    live.ack().await;

    let link = world.connect(&device).await;
    let oldest = v1::Hello {
        oldest_unsent_seq: 10,
        ..hello(Lane::Live, epoch)
    };
    let mut live = link.open(oldest).await;
    let welcome = live.welcome().await;
    assert_eq!((welcome.durable_upto, welcome.ranges.len()), (10, 0));
    assert_eq!(
        world.metrics().await.value("waypost_pings_given_up_total"),
        9.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_ranges_are_answered_with_what_is_missing() {
    let world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let sparse: Vec<_> = (1..=65).map(|at| ping(at * 2)).collect();
    live.send_pings(epoch, &sparse).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.rejected, ack.ranges.len()), (64, 1, 64));
    assert_eq!(ack.rejects[0].code(), RejectCode::TooSparse);
    assert!(ack.rejects[0].retryable);
    assert_eq!(ack.missing[0], v1::SeqRange { first: 1, last: 1 });

    live.send_pings(epoch, &[ping(1)]).await;
    live.ack().await;
    live.send_pings(epoch, &[ping(130)]).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.durable_upto), (66, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_finishes_its_stream_gets_its_ack_first() {
    let world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    live.finish();
    assert_eq!(live.ack().await.durable_upto, 1);
    assert!(
        live.next().await.is_none(),
        "then the gateway finishes its side"
    );

    let mut again = link.open(hello(Lane::Live, epoch)).await;
    assert_eq!(
        again.welcome().await.durable_upto,
        1,
        "and the lane is free again"
    );
}
