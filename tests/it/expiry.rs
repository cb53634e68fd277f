//! No connection outlives its certificate: not one that is idle, nor a busy one, nor one that was resumed with the ticket of
//! another. Who has renewed in time does not notice.

use std::sync::Arc;

use waypost_gateway::{
    clock::system_now_ms,
    pki::{Credentials, Purpose, Validity},
};
use waypost_proto::{
    id::Identity,
    session::{CloseCode, Lane},
    v1,
};
use waypost_tests::{
    Device, MetricsPage, Stream, World, hello,
    link::Returning,
    newcomer::{Newcomer, issued},
    ping, stored_seqs, until, within_minutes,
};

const CLOSED: &str = "waypost_connections_closed_total{code=\"expired\"}";
const REFUSED: &str = "waypost_connections_refused_total{reason=\"expired\"}";
const REFUSED_CHECKERS: &str = "waypost_freshness_refused_checkers_total{reason=\"expired\"}";

/// For how long a certificate holds that is about to expire: time for all that has to happen before.
const LIFE_S: u64 = 5;

/// A certificate, and the first moment at which it does not hold.
fn short_lived(world: &World, identity: &Identity) -> (Credentials, u64) {
    let now_s = system_now_ms() / 1_000;
    let validity = Validity {
        not_before_s: now_s - 3_600,
        not_after_s: now_s + LIFE_S,
    };
    let names = world.authority.names_of(identity).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let credentials = world
        .authority
        .issue(names, Purpose::Client, validity, &key)
        .unwrap();
    (credentials, (validity.not_after_s + 1) * 1_000)
}

fn short_lived_device(world: &World, number: u32) -> (Device, u64) {
    let id = world.device(number).id;
    let (credentials, expires_ms) = short_lived(world, &Identity::Device(id));
    let credentials = Arc::new(credentials);
    (Device { id, credentials }, expires_ms)
}

async fn welcomed(link: &waypost_tests::Link, epoch: u32) -> (Stream, u32) {
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    let epoch = live.welcome().await.epoch;
    (live, epoch)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_a_silent_and_a_busy_connection_end_with_their_certificates_and_no_other_does() {
    let world = World::start().await;
    let stays = world.connect(&world.device(1)).await;
    let (mut other, other_epoch) = welcomed(&stays, 0).await;
    let [(idle, _), (silent, _), (busy, expires_ms)] =
        [2, 3, 4].map(|number| short_lived_device(&world, number));
    let silent = world.connect(&silent).await;
    let idle = world.connect(&idle).await;
    let (_idle_lane, _) = welcomed(&idle, 0).await;
    let busy = world.connect(&busy).await;
    let (mut lane, epoch) = welcomed(&busy, 0).await;
    let pinging = async {
        let mut seq = 0;
        loop {
            seq += 1;
            let acked = match lane.try_send_pings(epoch, &[ping(seq)]).await {
                true => lane.next_ack().await,
                false => None,
            };
            match acked {
                Some(ack) => assert_eq!(ack.durable_upto, seq),
                None => return seq,
            }
        }
    };
    let sent = within_minutes(pinging).await;
    assert!(expires_ms <= system_now_ms(), "not before its time");
    assert!(1 < sent, "it was served until then");
    for link in [&busy, &idle, &silent] {
        assert_eq!(link.closed().await, Some(CloseCode::Expired));
    }
    other.send_pings(other_epoch, &[ping(1)]).await;
    assert_eq!(other.ack().await.durable_upto, 1);
    let page = world.metrics_until(|page| page.value(CLOSED) == 3.0).await;
    assert_eq!(page.value("waypost_connections"), 1.0);
}

/// A first connection leaves a ticket while the certificate holds, and a second one uses it then; another connection tells
/// when the time is over, and a further one comes after that.
async fn comes_back(is_early: bool) {
    let world = World::start().await;
    let gateway = world.addresses().devices;
    let (device, expires_ms) = short_lived_device(&world, 1);
    let (clock, _) = short_lived_device(&world, 2);
    let clock = world.connect(&clock).await;
    let (_lane, _) = welcomed(&clock, 0).await;
    let returning = Returning::new(&world, &device);
    let first = returning.connect(gateway).await;
    let (_lane, epoch) = welcomed(&first, 0).await;
    first.close();

    // The control: it is let in, also early, and has the first one's time.
    let connect = async || match is_early {
        true => returning.connect_early(gateway).0,
        false => returning.connect(gateway).await,
    };
    let (second, accepted) = match is_early {
        true => {
            let (link, accepted) = returning.connect_early(gateway);
            (link, Some(accepted))
        }
        false => (returning.connect(gateway).await, None),
    };
    let mut lane = second.open(hello(Lane::Live, epoch)).await;
    lane.send_pings(epoch, &[ping(1)]).await;
    lane.welcome().await;
    assert_eq!(lane.ack().await.durable_upto, 1);
    if let Some(accepted) = accepted {
        assert!(accepted.await, "its early data is taken");
    }
    // Whose handshake is over before its early data is looked at counts as resumed.
    let resumed = |page: &MetricsPage| {
        let of = |kind| page.value(&format!("waypost_handshakes_total{{kind=\"{kind}\"}}"));
        of("resumed") + of("early_data")
    };
    assert_eq!(resumed(&world.metrics().await), 1.0);
    assert_eq!(second.closed().await, Some(CloseCode::Expired));
    assert!(expires_ms <= system_now_ms(), "not before its time");
    assert_eq!(clock.closed().await, Some(CloseCode::Expired));

    let third = connect().await;
    if let Ok(mut lane) = third.try_open_raw().await {
        let batch = waypost_proto::batch::encode(epoch, &[ping(2)]);
        for kind in [
            v1::device_frame::Kind::Hello(hello(Lane::Live, epoch)),
            v1::device_frame::Kind::Batch(batch),
        ] {
            let mut bytes = bytes::BytesMut::new();
            let frame = v1::DeviceFrame { kind: Some(kind) };
            waypost_proto::frame::encode_frame(&frame, &mut bytes);
            lane.send_raw_unless_closed(&bytes).await;
        }
        assert_eq!(lane.next().await, None, "it is told nothing else");
    }
    assert_eq!(third.closed().await, Some(CloseCode::Expired));
    world.metrics_until(|page| page.value(REFUSED) == 1.0).await;
    assert_eq!(stored_seqs(&world.stop().await, &device), [(epoch, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_connection_ends_with_the_first_ones_certificate_and_none_is_resumed_after_that()
{
    comes_back(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_with_early_data_ends_with_the_first_ones_certificate_and_nothing_is_stored_after_that()
 {
    comes_back(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_renews_in_time_goes_on() {
    let world = World::start_enrolling(|enrolment| {
        enrolment.certificate_lifetime = std::time::Duration::from_secs(LIFE_S);
    })
    .await;
    let (_, first) = world.enrolled().await;
    let link = world.connect_enrolled(&first).await;
    let (mut live, epoch) = welcomed(&link, 0).await;
    // Not at two thirds of it: the next one should begin a second later at least.
    let later_ms = first.issued.server_ms + 1_500;
    until(async || (later_ms <= system_now_ms()).then_some(())).await;
    let next = Newcomer::new();
    let second = next.with(issued(live.renew(next.request()).await.0));
    assert!(first.issued.expires_ms < second.issued.expires_ms);
    let renewed = world.connect_enrolled(&second).await;
    let (_lane, _) = welcomed(&renewed, epoch).await;
    assert_eq!(link.closed().await, Some(CloseCode::TakenOver));
    assert_eq!(renewed.closed().await, Some(CloseCode::Expired));
    // With the time of its own certificate, and not of the first.
    assert!(second.issued.expires_ms + 1_000 <= system_now_ms());
    world.metrics_until(|page| page.value(CLOSED) == 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checker_is_told_nothing_more_when_its_certificate_has_expired() {
    let world = World::start().await;
    let stays = world.authority.issue_checker("dev").unwrap();
    let mut stays = world.checker_with(&stays).await;
    let watch = v1::WatchRequest::default();
    let mut told_too = stays.watch(watch.clone()).await.unwrap().into_inner();
    let checker = Identity::Checker("dev".to_owned());
    let (expiring, expires_ms) = short_lived(&world, &checker);
    let mut ended = world.checker_with(&expiring).await;
    let mut told = ended.watch(watch).await.unwrap().into_inner();
    assert!(told.message().await.unwrap().is_some());
    until(async || told.message().await.err()).await;
    assert!(expires_ms <= system_now_ms(), "not before its time");
    world
        .metrics_until(|page| 1.0 <= page.value(REFUSED_CHECKERS))
        .await;
    ended.get(v1::GetRequest::default()).await.unwrap_err();
    assert!(told_too.message().await.unwrap().is_some());
    stays.get(v1::GetRequest::default()).await.unwrap();
}
