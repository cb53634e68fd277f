//! The checker library and its example against a real gateway that is killed and started again.

use std::{io, net::SocketAddr, path::Path, process::Stdio, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};
use waypost_checker::{
    Checker, CheckerError, Config, Deadline, DeadlineSetting, Event, Resume, Selector, UserId,
    Watch,
    deadline::Kind::{Late, Recovered},
};
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

/// The deadlines among them.
fn deadlines_of(events: &[Event]) -> impl Iterator<Item = Deadline> {
    events.iter().filter_map(|event| match event {
        Event::Deadline(deadline) => Some(*deadline),
        _ => None,
    })
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
    let resume = Resume::from_bytes(&stored).unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_are_told_once_each_through_a_kill_and_to_a_watch_that_resumes() {
    let mut gateway = Process::start(&[]).await;
    let mut checker = Checker::connect(gateway.checker_config()).await.unwrap();
    let device = gateway.device(1);
    let setting = |expect_every_ms| DeadlineSetting {
        user: device.id.user,
        expect_every_ms,
        grace_ms: 200,
    };
    // Whoever resumes from before anything was said gets a snapshot.
    let first = checker.set_deadlines(&[setting(3_600_000)]).await.unwrap();
    let mut watch = checker.watch(Selector::default(), None).unwrap();
    let is_first =
        |event: &_| matches!(event, Event::Progress { position, .. } if first <= *position);
    let mut events = read_to(&mut watch, is_first).await;
    let Some(Event::Progress { resume, .. }) = events.last() else {
        panic!("it ends with progress: {events:?}")
    };
    let before = resume.to_bytes();
    let set_at = checker.set_deadlines(&[setting(300)]).await.unwrap();
    events.extend(read_to(&mut watch, |event| matches!(event, Event::Deadline(_))).await);
    // Right after the LATE, and before the announcement that it may be resumed after.
    gateway.kill();
    gateway.restart().await;
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    events.extend(read_to(&mut watch, |event| matches!(event, Event::Deadline(_))).await);
    // Longer than the test, so that it is not late again; it may have been already. A call that was under way when
    // the gateway went may be made again.
    let over = until(async || checker.set_deadlines(&[setting(3_600_000)]).await.ok()).await;
    events.extend(read_to(&mut watch, |event| over <= position_of(event)).await);

    let told: Vec<_> = deadlines_of(&events).collect();
    let kinds: Vec<_> = told.iter().map(|deadline| deadline.kind).collect();
    let in_turns = [Late, Recovered].repeat(told.len() / 2);
    assert_eq!(
        kinds, in_turns,
        "nobody is late under the new setting: {told:?}"
    );
    let (late, recovered) = (told[0], told[1]);
    assert!(set_at < late.position && late.position < recovered.position);
    assert_eq!(late.last_contact_ms, 0, "it was never heard");
    assert!(late.due_ms <= late.at_ms && late.at_ms <= recovered.last_contact_ms);
    assert_eq!(recovered.due_ms, late.due_ms);
    let from = Resume::from_bytes(&before).unwrap();
    let mut later = checker.watch(Selector::default(), Some(from)).unwrap();
    let events = read_to(&mut later, |event| over <= position_of(event)).await;
    assert_eq!(deadlines_of(&events).collect::<Vec<_>>(), told);
    let listed = checker.list_deadlines(None).await.unwrap();
    assert_eq!(listed.next_page_token, None);
    let [deadline] = listed.deadlines[..] else {
        panic!("{listed:?}")
    };
    assert_eq!(
        (deadline.setting, deadline.late),
        (setting(3_600_000), None)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_are_listed_in_pages_and_one_too_many_changes_nothing() {
    const MOST: u32 = 1_200;
    let most = MOST.to_string();
    let gateway = Process::start(&[("WAYPOST_FRESHNESS_MAX_DEADLINES", &most)]).await;
    let mut checker = Checker::connect(gateway.checker_config()).await.unwrap();
    let setting = |number: u32| DeadlineSetting {
        user: UserId(u128::from(number).to_be_bytes()),
        expect_every_ms: 3_600_000 + u64::from(number),
        grace_ms: 60_000,
    };
    let settings: Vec<_> = (0..MOST).map(setting).collect();
    for call in settings.chunks(1_000) {
        checker.set_deadlines(call).await.unwrap();
    }
    let refused = checker.set_deadlines(&[setting(MOST)]).await.unwrap_err();
    assert!(matches!(refused, CheckerError::NoRoom(_)), "{refused}");
    let refused = checker.set_deadlines(&settings).await.unwrap_err();
    assert!(matches!(refused, CheckerError::Refused(_)), "{refused}");

    let (mut listed, mut pages, mut token) = (Vec::new(), Vec::new(), None);
    loop {
        let page = checker.list_deadlines(token).await.unwrap();
        pages.push(page.deadlines.len());
        listed.extend(page.deadlines.iter().map(|deadline| deadline.setting));
        token = page.next_page_token;
        if token.is_none() {
            break;
        }
    }
    assert_eq!(pages, [1_000, 200]);
    assert_eq!(listed, settings);
    let removed = DeadlineSetting {
        expect_every_ms: 0,
        ..setting(7)
    };
    checker
        .set_deadlines(&[removed, setting(MOST)])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_not_answered_is_given_up_before_its_connection_is() {
    let gateway = Process::start(&[]).await;
    let config = Config {
        lost_after: Duration::from_millis(500),
        ..gateway.checker_config()
    };
    let mut checker = Checker::connect(config).await.unwrap();
    gateway.suspend();
    let given_up = within_minutes(checker.get(&[])).await.unwrap_err();
    assert!(
        given_up.to_string().contains("nothing came for 500ms"),
        "{given_up}"
    );
}

/// The example, with whom it tells.
fn example(gateway: &Process, folder: &Path, receiver: [&str; 2]) -> Child {
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
        .args(["--silent-after", "300ms", "--retry-pause", "50ms"])
        .args(receiver)
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

    let command = ["--command", "echo $WAYPOST_ID >> told"];
    let mut checker = example(&gateway, &folder, command);
    until(async || told().contains(&silent).then_some(())).await;
    // Once it is written down as delivered, it is not delivered again.
    let is_settled = || {
        let state = std::fs::read(folder.join("checker-state.json")).ok()?;
        let state: Value = serde_json::from_slice(&state).ok()?;
        (state["undelivered"] == json!([])).then_some(())
    };
    until(async || is_settled()).await;
    checker.kill().await.unwrap();

    let _checker = example(&gateway, &folder, command);
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

/// A snapshot tells who is late, and of those who have recovered meanwhile nothing.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_reset_the_example_says_who_is_not_late_any_more_and_nothing_twice() {
    let gateway = Process::start(&[]).await;
    let folder = gateway.scratch("checker");
    std::fs::create_dir(&folder).unwrap();
    let state_file = folder.join("checker-state.json");
    let state = || {
        let state = std::fs::read(&state_file).ok()?;
        serde_json::from_slice::<Value>(&state).ok()
    };
    let told = || {
        let told = std::fs::read_to_string(folder.join("told")).unwrap_or_default();
        let lines = told
            .lines()
            .filter(|line| line.contains("late") || line.contains("recovered"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut checker = Checker::connect(gateway.checker_config()).await.unwrap();
    let [back, away] = [1, 2].map(|number| gateway.device(number).id.user);
    let setting = |user, expect_every_ms| DeadlineSetting {
        user,
        expect_every_ms,
        grace_ms: 0,
    };
    checker
        .set_deadlines(&[setting(back, 1), setting(away, 1)])
        .await
        .unwrap();
    let command = ["--command", "echo $WAYPOST_KIND $WAYPOST_ID >> told"];
    let mut example_running = example(&gateway, &folder, command);
    let settled = || {
        let state = state()?;
        (state["undelivered"] == json!([]) && told().len() == 2).then_some(state)
    };
    let mut settled = until(async || settled()).await;
    example_running.kill().await.unwrap();
    let late = told();
    let position = settled["late"][back.to_string()].as_u64().unwrap();
    assert!(
        late.contains(&format!("late deadline-{back}-{position}")),
        "{late:?}"
    );

    checker
        .set_deadlines(&[setting(back, 3_600_000)])
        .await
        .unwrap();
    // No token of this gateway: it begins anew.
    settled["resume"] = json!([1, 0, 0, 0, 0, 0, 0, 0, 9, 1]);
    std::fs::write(&state_file, serde_json::to_vec(&settled).unwrap()).unwrap();
    let _example = example(&gateway, &folder, command);
    let all = until(async || Some(told()).filter(|told| 2 < told.len())).await;
    assert_eq!(all[2..], [format!("recovered not-late-{back}-{position}")]);
}

/// Where alerts are posted: writes down each, and answers as a test says.
struct Webhook {
    address: SocketAddr,
    posted: Arc<Mutex<Vec<Posted>>>,
}

#[derive(Clone, Debug)]
struct Posted {
    idempotency_key: String,
    alert: Value,
}

impl Posted {
    fn is(&self, kind: &str) -> bool {
        self.alert["kind"] == kind
    }
}

/// What becomes of an alert that was read.
#[derive(Clone, Copy)]
enum Answer {
    Status(u16),
    /// The connection is closed instead.
    Close,
    /// The connection stays open until the other end goes.
    Never,
}

impl Webhook {
    /// `answer` is told the alert's kind and how often the same alert was posted before.
    async fn start(answer: fn(&str, usize) -> Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let posted = Arc::<Mutex<Vec<Posted>>>::default();
        let taken = Arc::clone(&posted);
        tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                tokio::spawn(take_alert(connection, Arc::clone(&taken), answer));
            }
        });
        Self { address, posted }
    }

    fn posted(&self) -> Vec<Posted> {
        self.posted.lock().clone()
    }

    /// Waits for an alert of this kind after the first few.
    async fn next(&self, kind: &str, after: usize) -> Posted {
        until(async || {
            self.posted()
                .into_iter()
                .skip(after)
                .find(|post| post.is(kind))
        })
        .await
    }
}

async fn take_alert(
    mut connection: TcpStream,
    posted: Arc<Mutex<Vec<Posted>>>,
    answer: fn(&str, usize) -> Answer,
) -> io::Result<()> {
    let mut reader = BufReader::new(&mut connection);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let header = |name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(": "));
        let found = lines.find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map_or(String::new(), |(_, value)| value.to_owned())
    };
    assert!(head.starts_with("POST /alerts HTTP/1.1"), "{head}");
    assert_eq!(header("content-type"), "application/json");
    let mut body = vec![0; header("content-length").parse().unwrap()];
    reader.read_exact(&mut body).await?;
    let post = Posted {
        idempotency_key: header("idempotency-key"),
        alert: serde_json::from_slice(&body).unwrap(),
    };
    let kind = post.alert["kind"].as_str().unwrap().to_owned();
    let before = {
        let mut posted = posted.lock();
        let same = posted.iter().filter(|known| known.alert == post.alert);
        let before = same.count();
        posted.push(post);
        before
    };
    match answer(&kind, before) {
        Answer::Status(status) => {
            let answer =
                format!("HTTP/1.1 {status} -\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            connection.write_all(answer.as_bytes()).await?;
            connection.shutdown().await
        }
        Answer::Close => Ok(()),
        Answer::Never => reader.read_to_end(&mut Vec::new()).await.map(drop),
    }
}

/// An alert that was not taken comes again, in the same words, in its order and also from the next process, until
/// it is taken.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_posts_an_alert_again_until_it_is_taken_and_no_later_one_before_it() {
    let webhook = Webhook::start(|kind, before| match (kind, before) {
        ("silent", 0) => Answer::Status(500),
        ("silent", 1) => Answer::Close,
        ("silent", 2) => Answer::Status(302),
        ("silent", 3) => Answer::Never,
        _ => Answer::Status(204),
    })
    .await;
    let receiver = ["--webhook", &format!("http://{}/alerts", webhook.address)];
    let mut gateway = Process::start(&[]).await;
    let folder = gateway.scratch("checker");
    std::fs::create_dir(&folder).unwrap();
    let device = gateway.device(1);
    let user = device.id.user.to_string();
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    let silent_ms = live.ack().await.receive_ms;

    let of_user = || {
        let mut posted = webhook.posted();
        posted.retain(|post| post.alert["user"] == user);
        posted
    };
    let mut checker = example(&gateway, &folder, receiver);
    until(async || (of_user().len() == 4).then_some(())).await;
    // It waits for the answer to the fourth, and will never know that this one was taken.
    checker.kill().await.unwrap();
    let mut checker = example(&gateway, &folder, receiver);
    until(async || (of_user().len() == 5).then_some(())).await;
    live.send_pings(epoch, &[ping(2)]).await;
    let heard_ms = live.ack().await.receive_ms;
    webhook.next("heard", 0).await;
    let of_user = of_user();
    let silent = json!({
        "id": format!("silent-{user}-{silent_ms}"), "kind": "silent", "user": user, "at_ms": silent_ms,
    });
    let heard = json!({
        "id": format!("heard-{user}-{heard_ms}"), "kind": "heard", "user": user, "at_ms": heard_ms,
    });
    let expected = [&silent, &silent, &silent, &silent, &silent, &heard];
    let alerts: Vec<_> = of_user[..6].iter().map(|post| &post.alert).collect();
    assert_eq!(alerts, expected);
    for post in &of_user {
        assert_eq!(post.alert["id"], post.idempotency_key);
    }

    // Nobody is called silent because the gateway is gone; that is told in words of its own, and once more by a
    // process that begins meanwhile.
    let before = webhook.posted().len();
    gateway.kill();
    let unknown = webhook.next("unknown", before).await;
    assert!(
        silent_ms < unknown.alert["at_ms"].as_u64().unwrap(),
        "{unknown:?}"
    );
    checker.kill().await.unwrap();
    let before = webhook.posted().len();
    let _checker = example(&gateway, &folder, receiver);
    let unknown = webhook.next("unknown", before).await;
    let at_ms = unknown.alert["at_ms"].as_u64().unwrap();
    assert!(
        silent_ms < at_ms,
        "told apart from any other time: {unknown:?}"
    );
    assert_eq!(unknown.alert["id"], format!("unknown-{at_ms}"));
    gateway.restart().await;
    webhook.next("known", before).await;
}
