//! The checker library and its example against a real gateway that is killed and started again.

use std::{path::Path, process::Stdio};

use tokio::process::{Child, Command};
use waypost_checker::{Event, Selector, Watch};
use waypost_proto::session::Lane;
use waypost_tests::{Process, binary, hello, ping, until, within_minutes};

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

/// The example, with a command that writes down what it is told.
fn example(gateway: &Process, folder: &Path) -> Child {
    let pki = gateway.data_dir().join("pki");
    Command::new(binary("examples/checker"))
        .args([
            "--addr",
            &format!("https://{}", gateway.addresses().freshness),
        ])
        .arg("--ca")
        .arg(pki.join("ca.pem"))
        .arg("--cert")
        .arg(pki.join("checker-dev.pem"))
        .arg("--key")
        .arg(pki.join("checker-dev.key"))
        .args([
            "--silent-after",
            "300ms",
            "--command",
            "echo $WAYPOST_ID >> told",
        ])
        .current_dir(folder)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_alerts_once_though_it_is_killed_and_once_more_when_the_user_is_heard() {
    let gateway = Process::start(&[]).await;
    let folder = gateway.scratch("checker");
    std::fs::create_dir(&folder).unwrap();
    let told = || std::fs::read_to_string(folder.join("told")).unwrap_or_default();
    let device = gateway.device(1);
    let user = device.id.user;
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    let silent = format!("silent-{user}-{}\n", live.ack().await.receive_ms);

    let mut checker = example(&gateway, &folder);
    until(async || told().contains(&silent).then_some(())).await;
    // Once it is written down as delivered, it is not delivered again.
    let is_settled = || {
        let state = std::fs::read(folder.join("checker-state.json")).ok()?;
        let state: serde_json::Value = serde_json::from_slice(&state).ok()?;
        (state["undelivered"] == serde_json::json!([])).then_some(())
    };
    until(async || is_settled()).await;
    checker.kill().await.unwrap();

    let _checker = example(&gateway, &folder);
    live.send_pings(epoch, &[ping(2)]).await;
    let heard_ms = live.ack().await.receive_ms;
    let again = format!("silent-{user}-{heard_ms}\n");
    until(async || told().contains(&again).then_some(())).await;
    let heard = format!("heard-{user}-{heard_ms}\n");
    let told = told();
    // On a machine that is busy enough it may have been unknown for a while, and that is said as well.
    let of_user = told.lines().filter(|line| line.contains(&user.to_string()));
    let of_user: Vec<_> = of_user.map(|line| format!("{line}\n")).collect();
    assert_eq!(of_user, [silent, heard, again]);
}
