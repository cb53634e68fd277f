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
use waypost_tests::{MetricsPage, Stream, World, hello, packets, ping, ping_at};

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

/// On a line of a few bytes a second a frame takes longer than the timeout; what counts is that it goes on.
/// The control is the stream that stalls.
#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_trickles_in_is_waited_for() {
    let timeout = Duration::from_secs(3);
    let world = World::start_with(|config| config.devices.session.frame_timeout = timeout).await;
    let link = world.connect(&world.device(1)).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let frame = raw_frame(v1::device_frame::Kind::Batch(three_pings(epoch)));
    let began = std::time::Instant::now();
    let (last, first) = frame.split_last().unwrap();
    for (at, byte) in first.iter().enumerate() {
        live.send_raw(&[*byte]).await;
        // Longer than the timeout in all, and far less from byte to byte.
        let share = u32::try_from(at + 1).unwrap() * (timeout + timeout / 2);
        let due = share / u32::try_from(first.len()).unwrap();
        tokio::time::sleep(due.saturating_sub(began.elapsed())).await;
    }
    live.send_raw(&[*last]).await;
    assert_eq!(live.ack().await.accepted, 3);
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

/// It was not: each new stream had a time of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_takes_each_stream_back_and_never_says_hello_is_let_go() {
    let world = World::start_with(|config| {
        config.devices.session.first_frame_timeout = Duration::from_millis(300);
    })
    .await;
    let link = world.connect(&world.device(1)).await;
    let never_silent_for_long = async {
        let mut before: Option<Stream> = None;
        while let Ok(mut stream) = link.try_open_raw().await {
            stream.send_raw_unless_closed(&[9]).await;
            // The next one is open before the gateway learns that this one is gone.
            tokio::time::sleep(Duration::from_millis(20)).await;
            if let Some(before) = before.replace(stream) {
                before.abandon();
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), never_silent_for_long)
        .await
        .expect("it is let go at last");
    assert_eq!(link.closed().await, Some(CloseCode::FirstFrameTimeout));
}

fn limit_reached(limit: &str) -> String {
    format!("waypost_limits_reached_total{{limit=\"{limit}\"}}")
}

/// The seqs that were put off with RATE_LIMITED, and the time that was told.
fn put_off(ack: &v1::Ack) -> (Vec<u64>, u32) {
    let seqs = ack.rejects.iter().map(|reject| {
        assert_eq!(reject.code(), RejectCode::RateLimited);
        assert!(reject.retryable);
        reject.seq
    });
    (
        seqs.collect(),
        ack.flow.as_ref().map_or(0, |flow| flow.retry_after_ms),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn more_pings_than_allowed_are_put_off_and_stored_when_they_come_back() {
    let world = World::start_with(|config| {
        config.devices.allowance.pings_per_s = 1;
        config.devices.allowance.pings_burst = 5;
    })
    .await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let pings: Vec<_> = (1..=10).map(ping).collect();
    live.send_pings(epoch, &pings[..5]).await;
    assert_eq!(live.ack().await.durable_upto, 5);
    live.send_pings(epoch, &pings).await;
    let ack = live.ack().await;
    let (seqs, retry_after_ms) = put_off(&ack);
    assert_eq!(seqs, (6..=10).collect::<Vec<_>>());
    assert!(0 < retry_after_ms);
    assert_eq!(
        (ack.durable_upto, ack.duplicate),
        (5, 5),
        "what is stored stays a duplicate"
    );
    let received = world.metrics().await.value("waypost_pings_received_total");
    assert_eq!(received, 15.0, "what is put off is counted");
    assert!(1.0 <= world.metrics().await.value(&limit_reached("device_pings")));

    loop {
        live.send_pings(epoch, &pings[5..]).await;
        let ack = live.ack().await;
        if ack.durable_upto == 10 {
            assert_eq!(ack.accepted, 10);
            break;
        }
        let (seqs, retry_after_ms) = put_off(&ack);
        assert_eq!(seqs, (6..=10).collect::<Vec<_>>());
        tokio::time::sleep(Duration::from_millis(retry_after_ms.into())).await;
    }
    let store = world.stop().await;
    let expected: Vec<_> = (1..=10).map(|seq| (epoch, seq)).collect();
    assert_eq!(waypost_tests::stored_seqs(&store, &device), expected);
}

/// Sends five hundred frames, connects anew, and returns whether one of the next twenty is put off.
async fn frames_are_limited_over_a_new_connection(world: &World) -> bool {
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    // The stream and its Hello are two of them.
    let heartbeat = raw_frame(v1::device_frame::Kind::Heartbeat(v1::Heartbeat {}));
    live.send_raw(&heartbeat.repeat(498)).await;
    world
        .metrics_until(|metrics| {
            metrics.value("waypost_frames_received_total{kind=\"heartbeat\"}") == 498.0
        })
        .await;

    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.welcome().await;
    for seq in 1..=20 {
        live.send_pings(epoch, &[ping(seq)]).await;
    }
    loop {
        let ack = live.ack().await;
        if !ack.rejects.is_empty() {
            assert!(0 < put_off(&ack).1);
            return true;
        }
        if ack.durable_upto == 20 {
            return false;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_beyond_the_rate_are_put_off_also_over_a_new_connection() {
    let world = World::start_with(|config| {
        config.devices.allowance.frames_per_s = 1;
        config.devices.allowance.frames_burst = 500;
    })
    .await;
    assert!(frames_are_limited_over_a_new_connection(&world).await);
    assert!(1.0 <= world.metrics().await.value(&limit_reached("device_frames")));
}

/// The control: it is the limit that does it.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_limit_as_many_frames_are_not_put_off() {
    let world = World::start_with(|config| config.devices.allowance.frames_per_s = 0).await;
    assert!(!frames_are_limited_over_a_new_connection(&world).await);
    assert_eq!(
        world.metrics().await.value(&limit_reached("device_frames")),
        0.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_connects_again_and_again_is_turned_away_for_a_while() {
    let world = World::start_with(|config| {
        config.devices.allowance.connections_per_minute = 1;
        config.devices.allowance.connections_burst = 5;
    })
    .await;
    let device = world.device(1);
    for _ in 1..=5 {
        let link = world.connect(&device).await;
        link.open(hello(Lane::Live, 0)).await.welcome().await;
    }
    let link = world.connect(&device).await;
    assert_eq!(link.closed().await, Some(CloseCode::Overloaded));
    let metrics = world.metrics().await;
    assert!(1.0 <= metrics.value(&limit_reached("device_connections")));
    let other = world.attempt(Some(&world.device(2).credentials)).await;
    assert!(other.is_served().await, "another device is not meant");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_connects_too_often_is_refused_and_no_other_is() {
    let world = World::start_with(|config| {
        config.devices.admission.address_handshakes_per_s = 1;
        config.devices.admission.address_handshakes_burst = 60;
        config.devices.allowance.connections_per_minute = 0;
    })
    .await;
    let device = world.device(1);
    let mut served = 0;
    while world
        .attempt(Some(&device.credentials))
        .await
        .is_connected()
    {
        served += 1;
        assert!(served < 1_000, "it is never refused");
    }
    assert!(
        120 <= served,
        "60 before it must prove its address, and 60 then: {served}"
    );
    let metrics = world.metrics().await;
    assert!(1.0 <= metrics.value(&limit_reached("address_handshakes")));
    assert!(61.0 <= metrics.value("waypost_address_proofs_total"));
    let neighbour = world
        .attempt_from("127.0.0.2".parse().unwrap(), &world.device(2))
        .await;
    assert!(neighbour.is_served().await);
}

/// Begins as many handshakes as there are packets and goes on with none; how many are in progress then.
async fn stall(world: &World, packets: usize) -> f64 {
    let config = waypost_tests::link::client_config(
        world.authority.certificate_pem(),
        None,
        waypost_tests::link::ordinary(),
    );
    let packets = packets::first_packets(packets, &config).await;
    let seen = |metrics: &MetricsPage| {
        metrics.value("waypost_handshakes_in_progress")
            + metrics.value("waypost_address_proofs_total")
    };
    let source = "127.0.0.3".parse().unwrap();
    let gateway = world.addresses().devices;
    packets::send_from(source, gateway, &packets, Duration::from_millis(1)).await;
    let metrics = world
        .metrics_until(|metrics| packets.len() as f64 == seen(metrics))
        .await;
    metrics.value("waypost_handshakes_in_progress")
}

#[tokio::test(flavor = "multi_thread")]
async fn while_handshakes_stall_newcomers_prove_their_address_and_get_in() {
    let world = World::start_with(|config| {
        config.devices.handshake_timeout = Duration::from_secs(600);
        config.devices.admission.prove_address_from_handshakes = 20;
    })
    .await;
    assert_eq!(stall(&world, 100).await, 20.0);
    let proofs = world.metrics().await.value("waypost_address_proofs_total");
    let newcomer = world.attempt(Some(&world.device(1).credentials)).await;
    assert!(newcomer.is_served().await);
    let metrics = world.metrics().await;
    assert!(proofs + 1.0 <= metrics.value("waypost_address_proofs_total"));
}

/// The control: without the proof, whoever writes any address on his packets holds every place there is.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_proof_stalled_handshakes_hold_as_many_places_as_they_like() {
    let world = World::start_with(|config| {
        config.devices.handshake_timeout = Duration::from_secs(600);
        config.devices.admission.prove_address_from_handshakes = usize::MAX;
        config.devices.admission.handshakes = 100.try_into().unwrap();
    })
    .await;
    assert_eq!(stall(&world, 100).await, 100.0);
    let newcomer = world.attempt(Some(&world.device(1).credentials)).await;
    assert!(
        !newcomer.is_connected(),
        "there is no place left for a good one"
    );
    let metrics = world.metrics().await;
    assert!(1.0 <= metrics.value(&limit_reached("handshakes")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_conversation_that_is_sent_again_changes_nothing() {
    let world = World::start().await;
    let device = world.device(7);
    let spy = packets::Eavesdropper::start(world.addresses().devices).await;
    let link = world.connect_at(spy.address(), &device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    assert_eq!(live.ack().await.durable_upto, 2);
    let before = world.metrics().await;
    let contact_ms = world.entry(&device).await.last_contact_ms;

    let recorded = spy.recorded();
    assert!(3 < recorded.len());
    let gateway = world.addresses().devices;
    for source in ["127.0.0.1", "127.0.0.4"] {
        for _ in 0..3 {
            packets::send_from(source.parse().unwrap(), gateway, &recorded, Duration::ZERO).await;
        }
    }
    // An answer to a stranger who came after all of it: it was all read.
    beside_a_good_device(&world, async |_, stream, _| stream).await;
    let after = world.metrics().await;
    let frames = "waypost_frames_received_total{kind=\"batch\"}";
    assert_eq!(
        after.value(frames),
        before.value(frames) + 2.0,
        "only the good one's"
    );
    assert_eq!(world.entry(&device).await.last_contact_ms, contact_ms);
    live.send_pings(epoch, &[ping(3)]).await;
    assert_eq!(
        live.ack().await.durable_upto,
        3,
        "and the device itself goes on"
    );
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
    let world = World::start_with(|config| config.devices.allowance.pings_per_s = 0).await;
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
