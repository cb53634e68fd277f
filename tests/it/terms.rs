//! The holder's terms: no position is stored more exactly or more densely than the holder lets it be, whatever the
//! device sends.

use waypost_proto::{
    id::DeviceId,
    ping::{Ping, Source},
    session::Lane,
    terms::Terms,
    v1::{self, Precision},
};
use waypost_tests::{World, hello, link::Returning, ping};

const LATITUDE_E7: i32 = 535_123_457;
const LONGITUDE_E7: i32 = 101_234_567;

/// A ping that says all that a ping can.
fn talkative(seq: u64) -> Ping {
    Ping {
        accuracy_dm: Some(30),
        altitude_dm: Some(120),
        speed_cm_per_s: Some(140),
        course_ddeg: Some(900),
        heading_deg: Some(91),
        battery_percent: Some(55),
        source: Source::Gnss,
        latitude_e7: LATITUDE_E7 + i32::try_from(seq).unwrap(),
        longitude_e7: LONGITUDE_E7,
        ..ping(seq)
    }
}

fn coarse(precision: Precision, ping: Ping) -> Ping {
    let mut ping = ping;
    let terms = Terms {
        precision,
        ..Terms::default()
    };
    terms.coarsen(&mut ping);
    ping
}

async fn stored(world: World, device: DeviceId) -> Vec<Ping> {
    let store = world.stop().await;
    let rows = store.rows_of(device.user).map(Result::unwrap);
    rows.flat_map(|row| row.record.pings).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_grid_only_cells_are_stored_from_either_lane_and_from_early_data() {
    let world = World::start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let on_a_grid = |lane, epoch| v1::Hello {
        precision: Precision::Grid100M.into(),
        ..hello(lane, epoch)
    };
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(on_a_grid(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[talkative(1), talkative(2)]).await;
    assert_eq!(live.ack().await.accepted, 2);
    let mut backfill = link.open(on_a_grid(Lane::Backfill, epoch)).await;
    backfill.welcome().await;
    // One of them is stored already: then the row is not the batch as it came.
    backfill
        .send_pings(epoch, &[talkative(2), talkative(3)])
        .await;
    assert_eq!(backfill.ack().await.accepted, 3);
    link.close();
    link.ended().await;

    let (link, accepted) = returning.connect_early(world.addresses().devices);
    let mut live = link.open(on_a_grid(Lane::Live, epoch)).await;
    live.send_pings(epoch, &[talkative(4)]).await;
    assert!(accepted.await);
    live.welcome().await;
    assert_eq!(live.ack().await.accepted, 1);
    link.close();
    link.ended().await;

    // The control: the same device, when it says nothing of a grid.
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.welcome().await;
    live.send_pings(epoch, &[talkative(5)]).await;
    live.ack().await;

    let mut expected: Vec<_> = (1..=4)
        .map(|seq| coarse(Precision::Grid100M, talkative(seq)))
        .collect();
    expected.push(talkative(5));
    assert_eq!(stored(world, device.id).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_may_thin_more_than_the_operator_and_what_is_left_out_counts_as_filtered() {
    let world = World::start().await;
    let device = world.device(1);
    let thinned = v1::Hello {
        least_interval_ms: 5_000,
        ..hello(Lane::Live, 0)
    };
    let mut live = world.connect(&device).await.open(thinned).await;
    let epoch = live.welcome().await.epoch;
    let at = |seq: u64| Ping {
        time_ms: ping(1).time_ms + 2_000 * seq,
        ..ping(seq)
    };
    let pings: Vec<_> = (1..=7).map(at).collect();
    live.send_pings(epoch, &pings).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.filtered, ack.durable_upto), (3, 4, 7));
    assert_eq!(stored(world, device.id).await, [at(1), at(4), at(7)]);
}
