//! Bad input: each has its code, and nobody else is harmed.

use std::time::Duration;

use bytes::BytesMut;
use prost::Message;
use waypost_proto::{
    frame::encode_frame,
    ping::RejectCode,
    session::{CloseCode, Lane},
    v1,
};
use waypost_tests::{Stream, World, hello, ping, ping_at};

/// Runs one attack on its own connection while another device is connected, and sees that the other
/// one's pings are acknowledged before and after, on the same connection.
async fn beside_a_good_device(
    world: &World,
    attack: impl AsyncFnOnce(&World, Stream, u32) -> Stream,
) -> Stream {
    let good = world.connect(&world.device(99)).await;
    let mut good = good.open(hello(Lane::Live, 0)).await;
    let good_epoch = good.welcome().await.epoch;
    good.send_pings(good_epoch, &[ping(1)]).await;
    assert_eq!(good.ack().await.durable_upto, 1);

    let link = world.connect(&world.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let live = attack(world, live, epoch).await;

    good.send_pings(good_epoch, &[ping(2)]).await;
    assert_eq!(good.ack().await.durable_upto, 2);
    live
}

async fn closes_with(code: CloseCode, attack: impl AsyncFnOnce(&mut Stream, u32)) {
    let world = World::start_with(|config| {
        config.devices.session.first_frame_timeout = Duration::from_millis(300);
        config.devices.session.frame_timeout = Duration::from_millis(300);
    })
    .await;
    let stream = beside_a_good_device(&world, async |_, mut stream, epoch| {
        attack(&mut stream, epoch).await;
        stream
    })
    .await;
    assert_eq!(stream.link().closed().await, Some(code));
    let label = code.as_label();
    world
        .metrics_until(|metrics| {
            metrics.value(&format!(
                "waypost_connections_closed_total{{code=\"{label}\"}}"
            )) == 1.0
        })
        .await;
}

async fn rejected(batch: impl FnOnce(u32) -> v1::PingBatch, code: RejectCode) {
    let world = World::start().await;
    beside_a_good_device(&world, async |_, mut stream, epoch| {
        stream
            .send(v1::device_frame::Kind::Batch(batch(epoch)))
            .await;
        let ack = stream.ack().await;
        let rejects: Vec<_> = ack
            .rejects
            .iter()
            .map(|reject| (reject.seq, reject.code(), reject.retryable))
            .collect();
        assert_eq!(rejects, [(2, code, false)]);
        assert_eq!(
            (ack.accepted, ack.durable_upto),
            (2, 3),
            "its neighbours are stored, and it blocks nothing"
        );
        stream
    })
    .await;
}

fn three_pings(epoch: u32) -> v1::PingBatch {
    waypost_proto::batch::encode(epoch, &[ping(1), ping(2), ping(3)])
}

fn raw_frame(kind: v1::device_frame::Kind) -> BytesMut {
    let mut bytes = BytesMut::new();
    encode_frame(&v1::DeviceFrame { kind: Some(kind) }, &mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn latitude_91() {
    let beyond = |epoch| {
        let mut batch = three_pings(epoch);
        batch.degree_scale = 0;
        batch.latitude = vec![500_000_000, 410_000_000, -410_000_000];
        batch
    };
    rejected(beyond, RejectCode::BadCoordinates).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn extremes_in_place_of_not_a_number() {
    let extreme = |epoch| {
        let mut batch = three_pings(epoch);
        batch.longitude = vec![0, 1 << 62, -(1 << 62)];
        batch
    };
    rejected(extreme, RejectCode::BadCoordinates).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_in_the_far_future() {
    let far = 4_102_444_800_000; // 2100-01-01
    rejected(
        |epoch| waypost_proto::batch::encode(epoch, &[ping(1), ping_at(2, far), ping(3)]),
        RejectCode::TimeInFuture,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_older_than_pings_are_kept() {
    rejected(
        |epoch| waypost_proto::batch::encode(epoch, &[ping(1), ping_at(2, 1), ping(3)]),
        RejectCode::TooOld,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_one_byte_too_long() {
    closes_with(CloseCode::FrameTooLarge, async |stream, _| {
        // 65,537 as a varint; the gateway must not wait for the bytes.
        stream.send_raw(&[0x81, 0x80, 0x04]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_1001() {
    closes_with(CloseCode::BatchTooLarge, async |stream, epoch| {
        let pings: Vec<_> = (1..=1_001).map(ping).collect();
        stream.send_pings(epoch, &pings).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_frame() {
    closes_with(CloseCode::BadFrame, async |stream, epoch| {
        let frame = raw_frame(v1::device_frame::Kind::Batch(three_pings(epoch)));
        stream.send_raw(&frame[..frame.len() - 1]).await;
        stream.finish();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes() {
    closes_with(CloseCode::BadFrame, async |stream, _| {
        // A length of 7, then a field number of 0, which protobuf does not have.
        stream
            .send_raw(&[7, 0, 0xff, 0x13, 0x37, 0xc0, 0xff, 0xee])
            .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_stalls_inside_a_frame() {
    closes_with(CloseCode::FrameTimeout, async |stream, epoch| {
        let frame = raw_frame(v1::device_frame::Kind::Batch(three_pings(epoch)));
        stream.send_raw(&frame[..frame.len() - 1]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_never_says_hello() {
    closes_with(CloseCode::FirstFrameTimeout, async |stream, _| {
        // One byte opens the stream at the gateway; it is the beginning of a frame.
        let silent = stream.link().open_raw().await;
        silent.leak_after_writing(&[9]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lower_epoch_is_fenced() {
    let world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let first = link.open(hello(Lane::Live, 0)).await.welcome().await.epoch;
    let link = world.connect(&device).await;
    let second = link.open(hello(Lane::Live, 0)).await.welcome().await.epoch;
    assert!(first < second);

    let link = world.connect(&device).await;
    let _stream = link.open(hello(Lane::Live, first)).await;
    assert_eq!(
        link.closed().await,
        Some(CloseCode::FencedEpoch),
        "by Hello"
    );

    let link = world.connect(&device).await;
    let mut stream = link.open(hello(Lane::Live, second)).await;
    stream.welcome().await;
    stream.send_pings(first, &[ping(1)]).await;
    assert_eq!(
        link.closed().await,
        Some(CloseCode::FencedEpoch),
        "by a batch"
    );
    assert_eq!(
        world.metrics().await.value("waypost_pings_received_total"),
        0.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifth_stream_does_not_open() {
    let world = World::start().await;
    beside_a_good_device(&world, async |_, mut stream, epoch| {
        let link = stream.link().clone();
        let _others = [
            link.open_raw().await,
            link.open_raw().await,
            link.open_raw().await,
        ];
        let fifth = tokio::time::timeout(Duration::from_millis(200), link.open_raw()).await;
        assert!(fifth.is_err(), "QUIC holds it back");
        stream.send_pings(epoch, &[ping(1)]).await;
        assert_eq!(stream.ack().await.durable_upto, 1, "and the others go on");
        stream
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_stream_of_a_lane() {
    closes_with(CloseCode::LaneInUse, async |stream, epoch| {
        let link = stream.link().clone();
        let second = link.open(hello(Lane::Live, epoch)).await;
        second.leak_after_writing(&[]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_before_hello() {
    closes_with(CloseCode::HelloExpected, async |stream, epoch| {
        let second = stream.link().open_raw().await;
        second
            .leak_after_writing(&raw_frame(v1::device_frame::Kind::Batch(three_pings(
                epoch,
            ))))
            .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_field_is_ignored() {
    let world = World::start().await;
    beside_a_good_device(&world, async |_, mut stream, epoch| {
        let frame = v1::DeviceFrame {
            kind: Some(v1::device_frame::Kind::Batch(three_pings(epoch))),
        };
        let mut body = frame.encode_to_vec();
        // Field 999, length-delimited: three bytes.
        body.extend([0xba, 0x3e, 3, 1, 2, 3]);
        let mut bytes = BytesMut::new();
        prost::encode_length_delimiter(body.len(), &mut bytes).unwrap();
        bytes.extend_from_slice(&body);
        stream.send_raw(&bytes).await;
        assert_eq!(stream.ack().await.accepted, 3);
        stream
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_reads_no_answers_is_let_go() {
    let world = World::start_with(|config| {
        config.devices.session.frame_timeout = Duration::from_millis(300);
    })
    .await;
    let link = world.connect_not_reading(&world.device(1)).await;
    let mut stream = link.open(hello(Lane::Live, 0)).await;
    let heartbeats: Vec<u8> =
        raw_frame(v1::device_frame::Kind::Heartbeat(v1::Heartbeat {})).repeat(400_000);
    // Writing stalls when the gateway stops reading; it is the close that ends it.
    stream.send_raw_until_closed(&heartbeats).await;
    assert_eq!(link.closed().await, Some(CloseCode::NotReading));
}

/// A few bytes can claim a thousand pings. What a connection has in flight is bounded all the same, and
/// so is the answer.
#[tokio::test(flavor = "multi_thread")]
async fn many_large_batches_in_a_few_bytes_keep_to_the_credit() {
    let world = World::start().await;
    let link = world.connect(&world.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let mut bytes = BytesMut::new();
    for at in 0..500 {
        let batch = v1::PingBatch {
            epoch,
            first_seq: 1 + at * 1_000,
            count: 1_000,
            ..v1::PingBatch::default()
        };
        bytes.extend_from_slice(&raw_frame(v1::device_frame::Kind::Batch(batch)));
    }
    live.send_raw(&bytes).await;
    let mut rejected = 0;
    while rejected < 500_000 {
        let ack = live.ack().await;
        assert!(
            ack.encoded_len() <= 65_536,
            "{} bytes in one ack",
            ack.encoded_len()
        );
        rejected = ack.rejected;
    }
}
