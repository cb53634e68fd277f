//! Many workers on one port: a connection stays with the worker that has it, and the port with one gateway.

use waypost_gateway::{
    config::Config,
    gateway::{BindError, Gateway},
    worker::WorkerError,
};
use waypost_loadtest::relay::Relay;
use waypost_proto::{
    session::{CloseCode, Lane},
    v1::gateway_frame::Kind,
};
use waypost_tests::{World, hello, ping, stored_seqs};

#[tokio::test(flavor = "multi_thread")]
async fn devices_behind_a_nat_that_changes_their_ports_stay_with_their_workers() {
    let world = World::start_with(|config| config.devices.workers = 4).await;
    let relay = Relay::start(world.addresses().devices, 1).unwrap();
    let devices: Vec<_> = (1..=DEVICES).map(|number| world.device(number)).collect();
    let mut streams = Vec::new();
    for device in &devices {
        let link = world.connect_at(relay.address(), device).await;
        let mut stream = link.open(hello(Lane::Live, 0)).await;
        let epoch = stream.welcome().await.epoch;
        streams.push((stream, epoch));
    }
    for seq in 1..=PORTS {
        relay.rebind().unwrap();
        for (stream, epoch) in &mut streams {
            stream.send_pings(*epoch, &[ping(seq)]).await;
            assert_eq!(stream.ack().await.durable_upto, seq);
        }
    }
    assert_ne!(relay.counts().answered_after_rebinding, 0);
    let metrics = world.metrics().await;
    let accepted = metrics.value("waypost_connections_accepted_total");
    assert_eq!(accepted, f64::from(DEVICES), "nobody had to come back");
    drop(streams);
    let store = world.stop().await;
    for device in &devices {
        assert_eq!(stored_seqs(&store, device).len() as u64, PORTS);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_taken_over_from_whichever_worker_it_was_on() {
    let world = World::start_with(|config| config.devices.workers = 4).await;
    let device = world.device(1);
    // Where a connection begins is up to chance: each of these is on another worker than the one before
    // with a probability of three quarters.
    let mut older = world.connect(&device).await;
    let mut stream = older.open(hello(Lane::Live, 0)).await;
    stream.welcome().await;
    for _ in 0..20 {
        let newer = world.connect(&device).await;
        let mut newer_stream = newer.open(hello(Lane::Live, 1)).await;
        newer_stream.welcome().await;
        assert_eq!(older.closed().await, Some(CloseCode::TakenOver));
        (older, stream) = (newer, newer_stream);
    }
    drop(stream);
    let taken_over = world.metrics().await;
    assert_eq!(
        taken_over.value("waypost_connections_taken_over_total"),
        20.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_gateway_on_the_port_is_refused_and_the_first_serves_on() {
    for (workers, of_second) in [(1, 4), (4, 1), (4, 4)] {
        let world = World::start_with(|config| config.devices.workers = workers).await;
        let second = {
            let mut config = world.config().clone();
            config.devices.listen = world.addresses().devices;
            config.devices.workers = of_second;
            Config {
                data_dir: world.scratch("second"),
                ..config
            }
        };
        let refused = Gateway::bind(&second).await.err();
        assert!(
            matches!(
                refused,
                Some(BindError::Worker(WorkerError::Bind { listen, .. }))
                    if listen == world.addresses().devices
            ),
            "{refused:?}"
        );
        let link = world.connect(&world.device(1)).await;
        link.open(hello(Lane::Live, 0)).await.welcome().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_that_is_sent_away_is_told_when_to_come_back() {
    let mut world = World::start_with(|config| {
        config.devices.workers = 2;
        // One a second, so that hardly any is told the same.
        config.devices.admission.returns_per_s = 1;
    })
    .await;
    let mut waits_ms = Vec::new();
    let mut streams = Vec::new();
    for number in 1..=DEVICES {
        let link = world.connect(&world.device(number)).await;
        let mut stream = link.open(hello(Lane::Live, 0)).await;
        stream.welcome().await;
        streams.push(stream);
    }
    let stopping = world.restart();
    let told = async {
        for stream in &mut streams {
            // Whoever may come back at once is only closed.
            let mut wait_ms = 0;
            while let Some(frame) = stream.next().await {
                let Kind::Flow(flow) = frame else {
                    panic!("nothing else is told: {frame:?}");
                };
                assert!(flow.go_away);
                wait_ms = flow.retry_after_ms;
            }
            waits_ms.push(wait_ms);
        }
    };
    tokio::join!(stopping, told);
    assert!(waits_ms.iter().all(|wait_ms| *wait_ms <= DEVICES * 1_000));
    waits_ms.sort_unstable();
    waits_ms.dedup();
    assert!(
        DEVICES as usize / 2 < waits_ms.len(),
        "each its own: {waits_ms:?}"
    );
}

const DEVICES: u32 = 24;
/// How often the ports change.
const PORTS: u64 = 5;
