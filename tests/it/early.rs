//! Early data: a device that comes back sends its ping with the first packet. It is on disk before the gateway
//! has said a word, and nothing but that follows from it until the handshake is over: whoever has seen the
//! packets go by can send them again.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::net::UdpSocket;
use waypost_proto::{session::Lane, v1};
use waypost_tests::{
    Device, Link, MetricsPage, Relay, Stream, Weather, World, hello,
    link::Returning,
    packets::{self, Eavesdropper},
    ping, stored_seqs,
};

const ACCEPTED: &str = "waypost_pings_total{fate=\"accepted\"}";
const DUPLICATE: &str = "waypost_pings_total{fate=\"duplicate\"}";
const TIMED_OUT: &str = "waypost_connections_refused_total{reason=\"timed_out\"}";
const EARLY_BATCHES: &str = "waypost_early_batches_total";
const TAKEN_OVER: &str = "waypost_connections_taken_over_total";

fn handshakes(kind: &str) -> String {
    format!("waypost_handshakes_total{{kind=\"{kind}\"}}")
}

/// A gateway that soon gives up on handshakes which do not go on, as those of replayed packets.
async fn start() -> World {
    World::start_with(|config| config.devices.handshake_timeout = Duration::from_secs(4)).await
}

/// Sends a first ping over a full handshake, which leaves a ticket, and goes. The epoch.
async fn leave_with_a_ticket(world: &World, returning: &Returning) -> u32 {
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert_eq!(live.ack().await.durable_upto, 1);
    link.close();
    world
        .metrics_until(|page| page.value("waypost_connections") == 0.0)
        .await;
    epoch
}

/// A Hello and a ping, as soon as the connection takes them.
async fn say(link: &Link, epoch: u32, seq: u64) -> Stream {
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.send_pings(epoch, &[ping(seq)]).await;
    live
}

/// The first packets of a device that comes back with a ping, which arrive nowhere.
async fn swallowed_first_flight(returning: &Returning, epoch: u32, seq: u64) -> Vec<Vec<u8>> {
    let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (link, _accepted) = returning.connect_early(nobody.local_addr().unwrap());
    let _live = say(&link, epoch, seq).await;
    let mut flight = Vec::new();
    let mut buffer = [0; 2_048];
    // What is not answered is sent again: by the fourth datagram all of it was there once, at least.
    while flight.len() < 4 {
        let (length, _) = nobody.recv_from(&mut buffer).await.unwrap();
        flight.push(buffer[..length].to_vec());
    }
    flight
}

async fn replay(gateway: SocketAddr, packets: &[Vec<u8>]) {
    let elsewhere = "127.0.0.5".parse().unwrap();
    packets::send_from(elsewhere, gateway, packets, Duration::ZERO).await;
}

/// Sends packets again until the gateway has begun a handshake with them and given it up, so often at least. For a
/// while after it has, it knows them as those of a connection that is over.
async fn replay_until_given_up(world: &World, packets: &[Vec<u8>], times: f64) -> MetricsPage {
    waypost_tests::until(async || {
        let page = world.metrics().await;
        // A packet that comes late may begin one more.
        if times <= page.value(TIMED_OUT) {
            return Some(page);
        }
        replay(world.addresses().devices, packets).await;
        None
    })
    .await
}

/// What a checker sees of the device, but for what the commits of others move.
async fn seen(world: &World, device: &Device) -> (u64, u64, u64, u64, u64) {
    let v1::Entry {
        last_contact_ms,
        last_sample_ms,
        last_fix_ms,
        durable_ms,
        position,
        ..
    } = world.entry(device).await;
    (
        last_contact_ms,
        last_sample_ms,
        last_fix_ms,
        durable_ms,
        position,
    )
}

fn silence() -> Weather {
    Weather {
        is_blacked_out: true,
        ..Weather::FAIR
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_ping_is_on_disk_before_the_gateway_has_said_a_word_and_proves_nothing_until_it_has()
 {
    let world = start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let before = seen(&world, &device).await;

    let relay = Relay::start(world.addresses().devices, 1).unwrap();
    relay.set_weather_down(silence());
    let (link, accepted) = returning.connect_early(relay.address());
    let mut live = say(&link, epoch, 2).await;
    let page = world
        .metrics_until(|page| page.value(ACCEPTED) == 2.0)
        .await;
    assert_eq!(page.value(EARLY_BATCHES), 1.0);
    assert_eq!(page.value(&handshakes("early_data")), 0.0);
    assert_eq!(seen(&world, &device).await, before, "nobody was heard");

    relay.set_weather_down(Weather::FAIR);
    assert!(accepted.await);
    let welcome = live.welcome().await;
    assert_eq!(
        (welcome.epoch, welcome.durable_upto),
        (epoch, 1),
        "the early ping is the ack's to tell"
    );
    let ack = live.ack().await;
    assert_eq!((ack.durable_upto, ack.accepted, ack.duplicate), (2, 1, 0));
    let after = seen(&world, &device).await;
    assert!(before.0 < after.0, "the contact counts now");
    assert_eq!(after.1, ping(2).time_ms, "and what was sampled");
    live.send_pings(epoch, &[ping(2), ping(3)]).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.duplicate), (2, 1), "the totals run on");

    let page = world.metrics().await;
    assert_eq!(page.value(&handshakes("full")), 1.0);
    assert_eq!(page.value(&handshakes("early_data")), 1.0);
    assert_eq!(page.value("waypost_pings_received_total"), 4.0);
    let store = world.stop().await;
    assert_eq!(
        stored_seqs(&store, &device),
        [(epoch, 1), (epoch, 2), (epoch, 3)]
    );
}

/// The control: without a ticket there is nothing on disk while the gateway's first packet is under way.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_handshake_takes_a_round_trip_before_the_ping_can_leave() {
    let world = World::start().await;
    let device = world.device(1);
    let relay = Relay::start(world.addresses().devices, 1).unwrap();
    relay.set_weather_down(silence());
    let returning = Returning::new(&world, &device);
    let talking = async {
        let link = returning.connect(relay.address()).await;
        let mut live = link.open(hello(Lane::Live, 0)).await;
        let epoch = live.welcome().await.epoch;
        live.send_pings(epoch, &[ping(1)]).await;
        live.ack().await
    };
    let watching = async {
        // The gateway's flight was lost a few times over: the device has had all the time there is.
        let is_lost = async || (2 < relay.counts().blacked_out).then_some(());
        waypost_tests::until(is_lost).await;
        assert_eq!(world.metrics().await.value(ACCEPTED), 0.0);
        relay.set_weather_down(Weather::FAIR);
    };
    let (ack, ()) = tokio::join!(talking, watching);
    assert_eq!(ack.accepted, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_flight_that_was_served_and_comes_again_changes_nothing() {
    let world = start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let gateway = world.addresses().devices;
    let spy = Eavesdropper::start(gateway).await;
    let (link, accepted) = returning.connect_early(spy.address());
    let mut live = say(&link, epoch, 2).await;
    assert!(accepted.await);
    live.welcome().await;
    assert_eq!(live.ack().await.durable_upto, 2);
    let before = seen(&world, &device).await;
    // On a slow machine the handshake may be over before the early batch is looked at.
    let early_before = world.metrics().await.value(EARLY_BATCHES);

    let recorded = spy.recorded();
    // While the connection lives these are its packets, seen before; once it is forgotten they begin another.
    replay(gateway, &recorded).await;
    live.send_pings(epoch, &[ping(3)]).await;
    assert_eq!(live.ack().await.durable_upto, 3, "the device goes on");
    assert!(before.0 < seen(&world, &device).await.0);
    let before = seen(&world, &device).await;
    link.close();
    let page = replay_until_given_up(&world, &recorded, 1.0).await;
    assert_eq!((page.value(ACCEPTED), page.value(DUPLICATE)), (3.0, 0.0));
    assert_eq!(
        (page.value(EARLY_BATCHES), page.value(TAKEN_OVER)),
        (early_before, 0.0)
    );
    let devices_let_in = ["full", "resumed", "early_data"]
        .map(|kind| page.value(&handshakes(kind)))
        .iter()
        .sum::<f64>();
    assert_eq!(devices_let_in, 2.0, "none but the device itself");
    assert_eq!(seen(&world, &device).await, before, "nobody was heard");
    let store = world.stop().await;
    assert_eq!(
        stored_seqs(&store, &device),
        [(epoch, 1), (epoch, 2), (epoch, 3)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_flight_that_never_arrived_is_stored_when_somebody_sends_it_and_that_is_all() {
    let world = start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let flight = swallowed_first_flight(&returning, epoch, 3).await;
    // Meanwhile the device has come anew, and is there.
    let link = world.connect(&device).await;
    let mut live = say(&link, epoch, 2).await;
    live.welcome().await;
    assert_eq!(live.ack().await.durable_upto, 2);
    let before = seen(&world, &device).await;

    for times in [1.0, 2.0] {
        let page = replay_until_given_up(&world, &flight, times).await;
        assert_eq!((page.value(ACCEPTED), page.value(DUPLICATE)), (3.0, 0.0));
        assert_eq!(
            (page.value(EARLY_BATCHES), page.value(TAKEN_OVER)),
            (1.0, 0.0)
        );
        assert_eq!(seen(&world, &device).await, before, "nobody was heard");
    }

    // The control: the device itself says the same, and that is heard, and no second ping.
    live.send_pings(epoch, &[ping(3)]).await;
    let ack = live.ack().await;
    assert_eq!((ack.durable_upto, ack.duplicate), (3, 1));
    let after = seen(&world, &device).await;
    assert!(before.0 < after.0);
    assert_eq!(after.1, ping(3).time_ms);
    let store = world.stop().await;
    assert_eq!(
        stored_seqs(&store, &device),
        [(epoch, 1), (epoch, 2), (epoch, 3)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_early_and_was_never_proven_is_known_after_a_restart_and_counts_with_the_next_contact()
 {
    let mut world = start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let flight = swallowed_first_flight(&returning, epoch, 2).await;
    let before = seen(&world, &device).await;
    replay(world.addresses().devices, &flight).await;
    world
        .metrics_until(|page| page.value(EARLY_BATCHES) == 1.0)
        .await;
    world.restart().await;
    assert_eq!(seen(&world, &device).await, before, "nobody was heard");

    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    // The device learns that it need not send it again, and what it sampled is not lost for that.
    assert_eq!(live.welcome().await.durable_upto, 2);
    assert_eq!(seen(&world, &device).await.1, ping(2).time_ms);
    let store = world.stop().await;
    assert_eq!(stored_seqs(&store, &device), [(epoch, 1), (epoch, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_flight_means_nothing_to_a_gateway_that_was_restarted() {
    let mut world = start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let flight = swallowed_first_flight(&returning, epoch, 2).await;
    let before = seen(&world, &device).await;
    world.restart().await;

    let page = replay_until_given_up(&world, &flight, 1.0).await;
    assert_eq!(
        (page.value(ACCEPTED), page.value(EARLY_BATCHES)),
        (0.0, 0.0)
    );
    assert_eq!(seen(&world, &device).await, before);
    let store = world.stop().await;
    assert_eq!(stored_seqs(&store, &device), [(epoch, 1)]);
}

/// Connects early, says something that has to wait, and holds the gateway's answers back until it is known
/// that it waits.
async fn waits(first: v1::Hello, seq: u64, told: impl FnOnce(&v1::Welcome, u32)) {
    let world = start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let before = seen(&world, &device).await;
    let relay = Relay::start(world.addresses().devices, 1).unwrap();
    relay.set_weather_down(silence());
    let (link, accepted) = returning.connect_early(relay.address());
    let epoch_of_batch = first.epoch;
    let mut live = link.open(first).await;
    if epoch_of_batch != 0 {
        live.send_pings(epoch_of_batch, &[ping(seq)]).await;
    }
    let frames = |page: &MetricsPage| {
        let of = |kind| page.value(&format!("waypost_frames_received_total{{kind=\"{kind}\"}}"));
        of("hello") == 2.0 && (epoch_of_batch == 0 || of("batch") == 2.0)
    };
    world.metrics_until(frames).await;
    // Whatever came of it at the committer is over when one who came later has an answer.
    let other = world.connect(&world.device(2)).await;
    other.open(hello(Lane::Live, 0)).await.welcome().await;
    let page = world.metrics().await;
    assert_eq!(
        (page.value(ACCEPTED), page.value(EARLY_BATCHES)),
        (1.0, 0.0)
    );
    assert_eq!(seen(&world, &device).await, before, "nobody was heard");
    relay.set_weather_down(Weather::FAIR);
    assert!(accepted.await);
    let welcome = live.welcome().await;
    told(&welcome, epoch);
    if epoch_of_batch != 0 {
        assert_eq!(live.ack().await.accepted, 1, "it was judged after all");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_waits_for_the_handshake() {
    waits(hello(Lane::Live, 0), 0, |welcome, epoch| {
        assert!(epoch < welcome.epoch);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_a_hole_waits_for_the_handshake() {
    let first = v1::Hello {
        oldest_unsent_seq: 9,
        ..hello(Lane::Live, 1)
    };
    waits(first, 9, |welcome, epoch| {
        assert_eq!((welcome.epoch, welcome.durable_upto), (epoch, 8));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_sessions_nothing_is_resumed() {
    let world = World::start_with(|config| config.tls.sessions = 0).await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    leave_with_a_ticket(&world, &returning).await;
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    let page = world.metrics().await;
    assert_eq!(page.value(&handshakes("full")), 2.0);
    assert_eq!(page.value("waypost_sessions_stored"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_resumed_without_early_data_as_well() {
    let world = World::start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let epoch = leave_with_a_ticket(&world, &returning).await;
    let link = returning.connect(world.addresses().devices).await;
    let mut live = say(&link, epoch, 2).await;
    live.welcome().await;
    assert_eq!(live.ack().await.durable_upto, 2);
    let page = world.metrics().await;
    assert_eq!(page.value(&handshakes("resumed")), 1.0);
    assert_eq!(page.value("waypost_sessions_stored"), 1.0);
}
