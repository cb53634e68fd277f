//! The checker library against a real gateway that is killed and started again.

use waypost_checker::{Event, Selector, Watch};
use waypost_proto::session::Lane;
use waypost_tests::{Process, hello, ping, within_minutes};

/// Reads events up to one that is asked for, and returns them all.
async fn read_to(watch: &mut Watch, is_wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut events = Vec::new();
    let reading = async {
        while !events.last().is_some_and(&is_wanted) {
            events.push(watch.next().await.unwrap());
        }
    };
    within_minutes(reading).await;
    events
}

fn position_of(event: &Event) -> u64 {
    match event {
        Event::SnapshotEnd { position, .. } | Event::Progress { position, .. } => *position,
        _ => 0,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_where_it_was_and_says_when_it_knows_nothing() {
    let mut gateway = Process::start(&[]).await;
    let config = gateway.checker_config();
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    let first = live.ack().await.position;

    let mut watch = Watch::new(&config, Selector::default(), None).unwrap();
    let events = read_to(&mut watch, |event| first <= position_of(event)).await;
    assert!(
        matches!(events[0], Event::Connected { position: 0 }),
        "{events:?}"
    );
    let snapshot: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Entry {
                entry,
                is_snapshot: true,
            } => Some(entry.user),
            _ => None,
        })
        .collect();
    assert_eq!(snapshot, [device.id.user]);
    let events = read_to(&mut watch, |event| matches!(event, Event::Progress { .. })).await;
    let Some(Event::Progress { resume, .. }) = events.last() else {
        panic!("it ends with progress: {events:?}")
    };
    let stored = resume.to_bytes();

    gateway.kill();
    let events = read_to(&mut watch, |event| matches!(event, Event::Stale { .. })).await;
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::Disconnected { .. })),
        "{events:?}"
    );
    gateway.restart().await;
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.welcome().await;
    live.send_pings(epoch, &[ping(2)]).await;
    let second = live.ack().await.position;

    // The same watch, and another that begins with what was stored, both go on.
    let resume = waypost_checker::Resume::from_bytes(&stored).unwrap();
    let mut later = Watch::new(&config, Selector::default(), Some(resume)).unwrap();
    for watch in [&mut watch, &mut later] {
        let events = read_to(watch, |event| second <= position_of(event)).await;
        assert!(
            events.iter().any(
                |event| matches!(event, Event::Entry { entry, is_snapshot: false } if entry.last_sample_ms == ping(2).time_ms)
            ),
            "{events:?}"
        );
        assert!(
            !events
                .iter()
                .any(|event| matches!(event, Event::Reset { .. } | Event::SnapshotEnd { .. })),
            "{events:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_let_in_is_told_and_does_not_try_for_ever() {
    let gateway = Process::start(&[]).await;
    let mut config = gateway.checker_config();
    let stranger = gateway.authority().issue_checker("stranger").unwrap();
    config.certificate_pem = stranger.certificate_pem.clone().into();
    config.private_key_pem = stranger.private_key_pem.clone().into();
    let mut watch = Watch::new(&config, Selector::default(), None).unwrap();
    let refused = within_minutes(watch.next()).await.unwrap_err();
    assert!(refused.to_string().contains("refuses"), "{refused}");
}
