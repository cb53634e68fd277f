//! When the gateway could not hear, and who was not heard in time, through real kills: what checkers are told of
//! either is right, comes once, and comes to everybody whom it concerns.

use std::{net::UdpSocket, time::Duration};

use bytes::Bytes;
use tonic::{Streaming, transport::Channel};
use waypost_checker::rpc::freshness_client::FreshnessClient;
use waypost_gateway::clock::system_now_ms;
use waypost_proto::{
    session::Lane,
    v1::{
        Coverage, Deadline, DeadlineSetting, ListDeadlinesRequest, ListStaleRequest,
        SetDeadlinesRequest, WatchRequest, WatchResponse, coverage::Reason, deadline,
        watch_event::Kind,
    },
};
use waypost_tests::{
    Device, Process, World, hello, link, packets::first_packets, until, within_minutes,
};

/// Short, so that a test need not wait long; nothing depends on how long it takes.
const EXPECT_EVERY_MS: u64 = 300;
const GRACE_MS: u64 = 200;

/// A stream, taken apart.
struct Following {
    _checker: FreshnessClient<Channel>,
    stream: Streaming<WatchResponse>,
    events: std::vec::IntoIter<Kind>,
    /// Of the last announcement or the end of the snapshot.
    token: Bytes,
    position: u64,
    announced_ms: u64,
    spans: Vec<Coverage>,
    deadlines: Vec<Deadline>,
}

impl Following {
    async fn begin(mut checker: FreshnessClient<Channel>, token: Bytes) -> Self {
        let request = WatchRequest {
            token,
            ..WatchRequest::default()
        };
        let stream = checker.watch(request).await.unwrap().into_inner();
        Self {
            _checker: checker,
            stream,
            events: Vec::new().into_iter(),
            token: Bytes::new(),
            position: 0,
            announced_ms: 0,
            spans: Vec::new(),
            deadlines: Vec::new(),
        }
    }

    /// Reads on until it is so.
    async fn until(&mut self, is_so: impl Fn(&Self) -> bool) {
        let reading = async {
            while !is_so(self) {
                self.read().await;
            }
        };
        within_minutes(reading).await;
    }

    async fn read(&mut self) {
        let Some(event) = self.events.next() else {
            let message = self.stream.message().await.unwrap().unwrap();
            let kinds = message.events.into_iter().map(|event| event.kind.unwrap());
            self.events = kinds.collect::<Vec<_>>().into_iter();
            return;
        };
        match event {
            Kind::Coverage(span) => {
                assert!(
                    self.position < span.position || self.token.is_empty(),
                    "{span:?} came after {} was announced",
                    self.position
                );
                self.spans.push(span);
            }
            Kind::Deadline(deadline) => {
                assert!(
                    self.position < deadline.position || self.token.is_empty(),
                    "{deadline:?} came after {} was announced",
                    self.position
                );
                self.deadlines.push(deadline);
            }
            Kind::SnapshotEnd(end) => (self.token, self.position) = (end.token, end.position),
            Kind::Progress(progress) => {
                (self.token, self.position) = (progress.token, progress.position);
                self.announced_ms = progress.resolved_ms;
            }
            Kind::Header(_) | Kind::Entry(_) | Kind::Transition(_) => {}
            Kind::Reset(reset) => panic!("{reset:?}"),
        }
    }

    fn kinds(&self) -> Vec<deadline::Kind> {
        self.deadlines.iter().map(Deadline::kind).collect()
    }
}

async fn expect(
    checker: &mut FreshnessClient<Channel>,
    device: &Device,
    expect_every_ms: u64,
) -> u64 {
    let deadlines = vec![DeadlineSetting {
        user: user(device),
        expect_every_ms,
        grace_ms: GRACE_MS,
    }];
    let set = checker
        .set_deadlines(SetDeadlinesRequest { deadlines })
        .await;
    set.unwrap().into_inner().position
}

fn user(device: &Device) -> Bytes {
    Bytes::copy_from_slice(&device.id.user.0)
}

/// The device connects, is heard, and goes. Returns when.
async fn heard(gateway: &Process, device: &Device) -> u64 {
    let link = gateway.connect(device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    gateway.entry(device).await.last_contact_ms
}

/// How much of the time between two moments lies in spans; they do not overlap here.
fn blind_ms(spans: &[Coverage], from_ms: u64, until_ms: u64) -> u64 {
    let part = |span: &Coverage| {
        let (from_ms, until_ms) = (span.from_ms.max(from_ms), span.until_ms.min(until_ms));
        until_ms.saturating_sub(from_ms)
    };
    spans.iter().map(part).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_is_a_gap_that_begins_in_time_and_makes_nobody_late() {
    let mut gateway = Process::start(&[("WAYPOST_FRESHNESS_PROGRESS_INTERVAL", "10ms")]).await;
    let device = gateway.device(1);
    let mut checker = gateway.checker().await;
    let mut following = Following::begin(gateway.checker().await, Bytes::new()).await;
    let expect_every_ms = 10 * EXPECT_EVERY_MS;
    let set_at = expect(&mut checker, &device, expect_every_ms).await;
    let contact_ms = heard(&gateway, &device).await;
    following
        .until(|following| set_at < following.position)
        .await;
    assert_eq!(following.spans, [], "a new store has no past");
    let token = following.token.clone();
    gateway.kill();
    let killed_ms = system_now_ms();
    gateway.restart().await;
    let ready_ms = system_now_ms();

    let mut following = Following::begin(gateway.checker().await, token).await;
    following
        .until(|following| !following.deadlines.is_empty())
        .await;
    let [down, starting] = following.spans[..] else {
        panic!("{:?}", following.spans)
    };
    assert_eq!(
        (down.reason(), starting.reason()),
        (Reason::Down, Reason::Starting)
    );
    assert_eq!(
        (down.until_ms, down.position),
        (starting.from_ms, starting.position)
    );
    assert!(
        contact_ms <= down.from_ms && down.from_ms <= killed_ms,
        "{contact_ms} {down:?} {killed_ms}"
    );
    assert!(
        killed_ms <= down.until_ms && starting.until_ms <= ready_ms,
        "{starting:?}"
    );
    let late = &following.deadlines[0];
    let heard_for_ms =
        late.due_ms - late.last_contact_ms - blind_ms(&following.spans, contact_ms, late.due_ms);
    assert_eq!(late.last_contact_ms, contact_ms);
    assert!(
        expect_every_ms + GRACE_MS <= heard_for_ms,
        "late after {heard_for_ms} ms: {late:?}, {:?}",
        following.spans
    );

    let mut checker = gateway.checker().await;
    let since = ListStaleRequest {
        older_than_ms: contact_ms + 1,
        ..ListStaleRequest::default()
    };
    let silent = checker.list_stale(since).await.unwrap().into_inner();
    assert_eq!(silent.entries.len(), 1);
    assert_eq!(silent.coverage, following.spans);
    let silent_for = |silent_for_ms| ListStaleRequest {
        silent_for_ms,
        ..ListStaleRequest::default()
    };
    let silent = checker.list_stale(silent_for(heard_for_ms)).await;
    assert_eq!(silent.unwrap().into_inner().entries.len(), 1);
    // Longer than it has heard at all: nobody is known to be silent for that.
    let nobody = checker
        .list_stale(silent_for(u64::MAX))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(nobody.entries, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn late_and_recovered_come_once_each_through_a_kill_to_whoever_resumes_and_whoever_is_slow() {
    use deadline::Kind::{Late, Recovered};
    let mut gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let mut checker = gateway.checker().await;
    heard(&gateway, &device).await;
    let mut following = Following::begin(gateway.checker().await, Bytes::new()).await;
    following.until(|following| 0 < following.position).await;
    let before = following.token.clone();
    expect(&mut checker, &device, EXPECT_EVERY_MS).await;
    following
        .until(|following| !following.deadlines.is_empty())
        .await;
    let late = following.deadlines[0].clone();
    following
        .until(|following| late.position <= following.position)
        .await;
    let after_late = following.token.clone();
    assert_eq!(following.kinds(), [Late]);

    gateway.kill();
    gateway.restart().await;
    // Reads nothing until all is over.
    let mut slow = Following::begin(gateway.checker().await, before.clone()).await;
    let mut checker = gateway.checker().await;
    let contact_ms = heard(&gateway, &device).await;
    let mut resumed = Following::begin(gateway.checker().await, after_late).await;
    resumed
        .until(|following| !following.deadlines.is_empty())
        .await;
    let recovered = resumed.deadlines[0].clone();
    assert_eq!(recovered.kind(), Recovered);
    assert_eq!(
        (recovered.last_contact_ms, recovered.due_ms),
        (contact_ms, late.due_ms)
    );
    // Longer than the test: it shall not be late again meanwhile. It may have been already.
    let over = expect(&mut checker, &device, 3_600_000).await;

    slow.until(|following| over <= following.position).await;
    let mut anew = Following::begin(gateway.checker().await, before).await;
    anew.until(|following| over <= following.position).await;
    resumed.until(|following| over <= following.position).await;
    assert_eq!(slow.deadlines, anew.deadlines);
    assert_eq!(slow.deadlines[1..], resumed.deadlines);
    assert_eq!(slow.deadlines[..2], [late, recovered]);
    let in_turns = [Late, Recovered].into_iter().cycle();
    assert!(
        slow.kinds()
            .into_iter()
            .eq(in_turns.take(slow.deadlines.len()))
    );
    assert_eq!(
        slow.deadlines.len() % 2,
        0,
        "who was late is not under the new setting"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_that_were_answered_survive_a_kill() {
    let mut gateway = Process::start(&[]).await;
    let (kept, removed) = (gateway.device(1), gateway.device(2));
    let mut checker = gateway.checker().await;
    expect(&mut checker, &removed, 3_600_000).await;
    expect(&mut checker, &removed, 0).await;
    expect(&mut checker, &kept, 7_200_000).await;
    gateway.kill();
    gateway.restart().await;
    let mut checker = gateway.checker().await;
    let listed = checker
        .list_deadlines(ListDeadlinesRequest::default())
        .await;
    let listed = listed.unwrap().into_inner().deadlines;
    assert_eq!(listed.len(), 1, "{listed:?}");
    let setting = listed[0].setting.clone().unwrap();
    assert_eq!(
        (setting.user, setting.expect_every_ms),
        (user(&kept), 7_200_000)
    );
    assert_eq!(listed[0].late, None);
    let metrics = gateway
        .metrics_until(|metrics| metrics.value("waypost_deadlines") == 1.0)
        .await;
    assert_eq!(metrics.value("waypost_deadlines_late"), 0.0);
    // A user who was never heard is late all the same.
    let mut following = Following::begin(gateway.checker().await, Bytes::new()).await;
    expect(&mut checker, &kept, 1).await;
    following
        .until(|following| !following.deadlines.is_empty())
        .await;
    assert_eq!(following.deadlines[0].last_contact_ms, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_stop_in_order_the_gap_begins_where_the_announcements_ended() {
    let mut world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    link.open(hello(Lane::Live, 0)).await.welcome().await;
    let mut following = Following::begin(world.checker().await, Bytes::new()).await;
    following
        .until(|following| following.announced_ms != 0)
        .await;
    world.restart().await;
    let ready_ms = system_now_ms();
    let announced_ms = following.announced_ms;
    let mut following = Following::begin(world.checker().await, following.token).await;
    following
        .until(|following| following.spans.len() == 2)
        .await;
    let down = &following.spans[0];
    assert!(
        announced_ms <= down.from_ms && down.from_ms < down.until_ms && down.until_ms <= ready_ms,
        "complete up to {announced_ms}, then {down:?}, and ready at {ready_ms}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomers_that_are_turned_away_for_want_of_room_are_a_gap() {
    let world = World::start_with(|config| config.devices.connections = 1).await;
    let mut following = Following::begin(world.checker().await, Bytes::new()).await;
    let first = world.connect(&world.device(1)).await;
    let mut live = first.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    let before_ms = system_now_ms();
    let refused = world.attempt(Some(&world.device(2).credentials)).await;
    assert!(!refused.is_served().await);
    following
        .until(|following| !following.spans.is_empty())
        .await;
    let begun = following.spans[0];
    assert_eq!((begun.reason(), begun.until_ms), (Reason::Overloaded, 0));
    following
        .until(|following| following.spans.len() == 2)
        .await;
    let ended = following.spans[1];
    assert_eq!(
        (ended.reason(), ended.from_ms),
        (Reason::Overloaded, begun.from_ms)
    );
    let calm = Duration::from_millis(ended.until_ms - before_ms);
    assert!(Duration::from_secs(5) <= calm, "{ended:?}");
}

/// Nobody sees them come, and still it is known that nobody could have been heard.
#[tokio::test(flavor = "multi_thread")]
async fn newcomers_that_are_dropped_before_they_are_seen_are_a_gap() {
    let world = World::start_with(|config| {
        config.devices.workers = 1;
        config.devices.admission.newcomers = 4.try_into().unwrap();
    })
    .await;
    let dropped = r#"waypost_limits_reached_total{limit="newcomers"}"#;
    let device = world.device(1);
    let mut following = Following::begin(world.checker().await, Bytes::new()).await;
    let link = world.connect(&device).await;
    link.open(hello(Lane::Live, 0)).await.welcome().await;
    assert_eq!(
        world.metrics().await.value(dropped),
        0.0,
        "who comes alone has room"
    );

    let ca_pem = world.authority.certificate_pem();
    let config = link::client_config(ca_pem, Some(&device.credentials), link::ordinary());
    let packets = first_packets(100, &config).await;
    let crowd = UdpSocket::bind("127.0.0.1:0").unwrap();
    until(async || {
        for packet in &packets {
            crowd.send_to(packet, world.addresses().devices).unwrap();
        }
        (world.metrics().await.value(dropped) != 0.0).then_some(())
    })
    .await;
    following
        .until(|following| !following.spans.is_empty())
        .await;
    assert_eq!(following.spans[0].reason(), Reason::Overloaded);
}
