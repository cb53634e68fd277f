//! Freshness out: what a checker sees, over real gRPC with real certificates.

use std::collections::HashMap;

use waypost_proto::{
    session::Lane,
    v1::{self, watch_event::Kind},
};
use waypost_tests::{World, hello, ping};

/// Reads events up to and including the first Progress that reaches `position`.
async fn read_to(
    stream: &mut tonic::Streaming<v1::WatchResponse>,
    position: u64,
) -> (Vec<Kind>, v1::Progress) {
    let mut events = Vec::new();
    loop {
        let response = stream.message().await.unwrap().expect("the stream goes on");
        for event in response.events {
            match event.kind.expect("every event has a kind") {
                Kind::Progress(progress) if position <= progress.position => {
                    return (events, progress);
                }
                kind => events.push(kind),
            }
        }
    }
}

fn entries(events: &[Kind]) -> Vec<&v1::Entry> {
    events
        .iter()
        .filter_map(|kind| match kind {
            Kind::Entry(entry) => Some(entry),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_is_a_snapshot_then_changes_and_resumes_where_it_ended() {
    let mut world = World::start().await;
    let (first, second) = (world.device(1), world.device(2));
    let one = world.connect(&first).await;
    let mut one = one.open(hello(Lane::Live, 0)).await;
    let one_epoch = one.welcome().await.epoch;
    one.send_pings(one_epoch, &[ping(1)]).await;
    let snapshot_position = one.ack().await.position;

    let mut checker = world.checker().await;
    let mut stream = checker
        .watch(v1::WatchRequest::default())
        .await
        .unwrap()
        .into_inner();
    let (events, _) = read_to(&mut stream, snapshot_position).await;
    assert!(matches!(events[0], Kind::Header(_)));
    let snapshot = entries(&events);
    assert_eq!(snapshot.len(), 1);
    assert_eq!(snapshot[0].user.as_ref(), first.id.user.0);
    let Some(Kind::SnapshotEnd(end)) = events
        .iter()
        .find(|kind| matches!(kind, Kind::SnapshotEnd(_)))
    else {
        panic!("no end of the snapshot in {events:?}")
    };
    assert_eq!(end.count, 1);

    let two = world.connect(&second).await;
    let mut two = two.open(hello(Lane::Live, 0)).await;
    let two_epoch = two.welcome().await.epoch;
    two.send_pings(two_epoch, &[ping(1), ping(2)]).await;
    let ack = two.ack().await;
    let (events, progress) = read_to(&mut stream, ack.position).await;
    let newest: HashMap<_, _> = entries(&events)
        .into_iter()
        .map(|entry| (entry.user.clone(), entry))
        .collect();
    let entry = newest[&second.id.user.0[..]];
    assert_eq!(entry.state(), v1::State::Active);
    assert_eq!(
        (entry.last_sample_ms, entry.last_fix_ms),
        (ping(2).time_ms, ping(2).time_ms)
    );
    assert_eq!(
        (entry.last_contact_ms, entry.position),
        (ack.receive_ms, ack.position)
    );
    assert!(
        ack.receive_ms <= progress.resolved_ms,
        "complete up to what was acknowledged"
    );
    drop(stream);

    one.send_pings(one_epoch, &[ping(3)]).await;
    let missed = one.ack().await;
    world.restart().await;
    let mut checker = world.checker().await;
    let resume = v1::WatchRequest {
        token: progress.token,
        ..v1::WatchRequest::default()
    };
    let mut stream = checker.watch(resume).await.unwrap().into_inner();
    let (events, _) = read_to(&mut stream, missed.position).await;
    let users: Vec<_> = entries(&events)
        .into_iter()
        .map(|entry| entry.user.as_ref())
        .collect();
    assert_eq!(
        users,
        [&first.id.user.0[..]],
        "only who changed since, after a restart too"
    );
    assert!(
        !events
            .iter()
            .any(|kind| matches!(kind, Kind::Reset(_) | Kind::SnapshotEnd(_)))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_and_a_refused_ping_prove_life_and_nothing_else() {
    let world = World::start().await;
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(5)]).await;
    live.ack().await;
    let before = world.entry(&device).await;

    live.send(v1::device_frame::Kind::Heartbeat(v1::Heartbeat {}))
        .await;
    let beat = live.ack().await;
    let after = world.entry(&device).await;
    assert_eq!(after.last_contact_ms, beat.receive_ms);
    assert!(before.position < after.position);
    assert_eq!(
        (after.last_sample_ms, after.last_fix_ms),
        (before.last_sample_ms, before.last_fix_ms)
    );

    live.send_pings(epoch, &[waypost_tests::ping_at(6, 1)])
        .await;
    let refused = live.ack().await;
    assert_eq!(refused.rejected, 1);
    let last = world.entry(&device).await;
    assert_eq!(
        (last.last_contact_ms, last.last_sample_ms),
        (refused.receive_ms, before.last_sample_ms)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_the_newest_of_its_devices() {
    let world = World::start().await;
    let phone = world.device(1);
    let watch = phone.sibling(&world, 2);
    let on_phone = world.connect(&phone).await;
    let mut on_phone = on_phone.open(hello(Lane::Live, 0)).await;
    let phone_epoch = on_phone.welcome().await.epoch;
    on_phone.send_pings(phone_epoch, &[ping(9)]).await;
    on_phone.ack().await;
    let on_watch = world.connect(&watch).await;
    let mut on_watch = on_watch.open(hello(Lane::Live, 0)).await;
    let watch_epoch = on_watch.welcome().await.epoch;
    on_watch.send_pings(watch_epoch, &[ping(2)]).await;
    let ack = on_watch.ack().await;

    let entry = world.entry(&phone).await;
    assert_eq!(entry.last_sample_ms, ping(9).time_ms);
    assert_eq!(
        (entry.last_contact_ms, entry.position),
        (ack.receive_ms, ack.position)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_silent_are_listed_longest_first() {
    let world = World::start().await;
    for number in 1..=3 {
        let link = world.connect(&world.device(number)).await;
        link.open(hello(Lane::Live, 0)).await.welcome().await;
        // Contacts of one millisecond have no order of their own; wait for the clock, not for luck.
        world.next_millisecond().await;
    }
    let mut checker = world.checker().await;
    let mut request = v1::ListStaleRequest {
        older_than_ms: u64::MAX,
        page_size: 2,
        ..Default::default()
    };
    let mut users = Vec::new();
    loop {
        let page = checker
            .list_stale(request.clone())
            .await
            .unwrap()
            .into_inner();
        users.extend(page.entries.into_iter().map(|entry| entry.user));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let expected: Vec<_> = (1..=3)
        .map(|number| world.device(number).id.user.0.to_vec())
        .collect();
    assert_eq!(users, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_named_checker_may_ask() {
    let world = World::start().await;
    let stranger = world.authority.issue_checker("stranger").unwrap();
    let device = world.authority.issue_device(world.device(1).id).unwrap();
    for credentials in [stranger, device] {
        let mut client = world.checker_with(&credentials).await;
        let refused = client.get(v1::GetRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    }
}
