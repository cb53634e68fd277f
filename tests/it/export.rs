//! Export: the holder gets everything that is held on the user, as it is at one moment, on the device; and the operator
//! gets the same for the holder, with a running gateway and without one.

use std::{fs, os::unix::fs::PermissionsExt};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tonic::transport::Channel;
use waypost_checker::rpc::freshness_client::FreshnessClient;
use waypost_proto::{
    id::UserId,
    ping::Ping,
    session::Lane,
    v1::{self, control, control_result::Outcome, device_frame, gateway_frame},
};
use waypost_tests::{
    Process, Stream, World,
    command::{self, waypost},
    hello, ping, ping_at,
};

/// Asks, and reads the stream that the gateway opens: the answer, and the text behind it.
async fn exported_as(stream: &mut Stream, id: u64, format: control::Format) -> (Outcome, Vec<u8>) {
    let format = format.into();
    let action = Some(control::Action::Export(control::Export { format }));
    let control = v1::Control { id, action };
    stream.send(device_frame::Kind::Control(control)).await;
    let (frame, text) = stream.link().read_uni().await;
    let Some(gateway_frame::Kind::ControlResult(result)) = frame.kind else {
        panic!("{frame:?}");
    };
    assert_eq!(result.id, id);
    (result.outcome(), text)
}

/// The same as lines.
async fn exported(stream: &mut Stream, id: u64) -> (Outcome, Vec<Value>) {
    let (outcome, text) = exported_as(stream, id, control::Format::JsonLines).await;
    let text = String::from_utf8(text).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    (outcome, lines.collect())
}

/// The text without what says when it was made: the first time and the first position in it.
fn without_its_moment(text: &[u8]) -> String {
    let text = String::from_utf8(text.to_vec()).unwrap();
    let (before, after) = text.split_once("\"exported\":").unwrap();
    let (moment, after) = after.split_once(",\"state\":").unwrap();
    assert!(moment.contains("\"position\":"), "{moment}");
    format!("{before}{after}")
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
}

/// A checker expects the user, and another one that nobody has to hear of.
async fn expect_hourly(checker: &mut FreshnessClient<Channel>, user: UserId) {
    let expect = |user: UserId| v1::DeadlineSetting {
        user: Bytes::copy_from_slice(&user.0),
        expect_every_ms: 3_600_000,
        grace_ms: 0,
    };
    let deadlines = vec![expect(user), expect(UserId([0xee; 16]))];
    let request = v1::SetDeadlinesRequest { deadlines };
    checker.set_deadlines(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_gets_everything_that_is_held_on_its_user_and_nothing_of_anybody_else() {
    let world = World::start().await;
    let device = world.device(1);
    let second = device.sibling(&world, 2);
    let mut others = world
        .connect(&world.device(9))
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = others.welcome().await.epoch;
    others.send_pings(epoch, &[ping(77)]).await;
    others.ack().await;
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    // More than a chunk.
    let pings: Vec<Ping> = (1..=900).map(ping).collect();
    live.send_pings(epoch, &pings).await;
    live.ack().await;
    for (id, action) in [
        (1, control::Action::Pause(control::Pause {})),
        (2, control::Action::Resume(control::Resume {})),
    ] {
        live.control(id, action).await;
    }
    let mut lane = world
        .connect(&second)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let second_epoch = lane.welcome().await.epoch;
    lane.send_pings(second_epoch, &[ping(1)]).await;
    let position = lane.ack().await.position;
    let mut checker = world.checker().await;
    checker.watch(v1::WatchRequest::default()).await.unwrap();
    expect_hourly(&mut checker, device.id.user).await;
    world
        .metrics_until(|page| page.value("waypost_audit_entries_total") == 2.0)
        .await;

    let (outcome, lines) = exported(&mut live, 5).await;
    assert_eq!(outcome, Outcome::Done);
    let user = &lines[0];
    assert_eq!(user["kind"], "user");
    assert_eq!(user["user"], device.id.user.to_string());
    assert_eq!(
        (&user["state"], &user["kept_days"]),
        (&json!("active"), &json!(30))
    );
    assert!(position <= user["position"].as_u64().unwrap());
    assert_eq!(user["told"][0]["checker"], "dev");
    let devices = of_kind(&lines, "device");
    let numbers: Vec<_> = devices.iter().map(|line| &line["device"]).collect();
    assert_eq!(numbers, [&json!(1), &json!(2)]);
    let states: Vec<_> = of_kind(&lines, "transition")
        .iter()
        .map(|line| line["state"].clone())
        .collect();
    assert_eq!(states, [json!("paused"), json!("active")]);
    let seqs: Vec<_> = of_kind(&lines, "ping")
        .iter()
        .map(|line| {
            (
                line["device"].as_u64().unwrap(),
                line["seq"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected: Vec<_> = (1..=900).map(|seq| (1, seq)).chain([(2, 1)]).collect();
    assert_eq!(seqs, expected);
    let first = of_kind(&lines, "ping")[0];
    let latitude = f64::from(ping(1).latitude_e7) / 1e7;
    assert_eq!(first["latitude"], json!(latitude));
    let deadlines = of_kind(&lines, "deadline");
    let of_dev = (
        deadlines[0]["checker"].clone(),
        deadlines[0]["expect_every_ms"].clone(),
    );
    assert_eq!(of_dev, (json!("dev"), json!(3_600_000)));
    let end = json!({"kind": "end", "checkers": 1, "devices": 2, "transitions": 2, "deadlines": 1,
        "deadline_events": 0, "pings": 901});
    assert_eq!(lines.last(), Some(&end));

    // It is on record, and the lane goes on.
    let log = fs::read_to_string(world.config().data_dir.join("audit.log")).unwrap();
    let recorded = format!(r#""who":{{"holder":"{}"}},"what":"exported""#, device.id);
    assert!(log.contains(&recorded), "{log}");
    let map = control::Export {
        format: control::Format::Geojson.into(),
    };
    let action = Some(control::Action::Export(map));
    let control = v1::Control { id: 7, action };
    live.send(device_frame::Kind::Control(control)).await;
    let (_, text) = live.link().read_uni().await;
    let map: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(map["features"].as_array().unwrap().len(), 901);
    let place = &map["features"][0]["geometry"]["coordinates"];
    assert_eq!(place[1], json!(latitude), "longitude first");
    live.send_pings(epoch, &[ping(901)]).await;
    assert_eq!(live.ack().await.accepted, 901);
    let (_, again) = exported(&mut live, 6).await;
    assert_eq!(of_kind(&again, "ping").len(), 902);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_exports_than_are_made_at_a_time_are_put_off_and_a_device_that_goes_holds_up_nobody() {
    let world = World::start().await;
    let device = world.device(1);
    let link = world.connect_not_reading(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    let pings: Vec<Ping> = (1..=900).map(ping).collect();
    live.send_pings(epoch, &pings).await;
    live.ack().await;
    // None of these is read, so none of them ends.
    for id in 1..=4 {
        let action = Some(control::Action::Export(control::Export::default()));
        let control = v1::Control { id, action };
        live.send(device_frame::Kind::Control(control)).await;
    }
    let action = control::Action::Export(control::Export::default());
    assert_eq!(live.control(5, action).await, Outcome::TryLater);
    link.close();
    world
        .metrics_until(|page| page.value("waypost_exports_failed_total") == 4.0)
        .await;
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, epoch))
        .await;
    live.welcome().await;
    let (outcome, lines) = exported(&mut live, 1).await;
    assert_eq!(outcome, Outcome::Done);
    assert_eq!(of_kind(&lines, "ping").len(), 900);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_gives_what_the_device_gets_with_a_gateway_and_without_one() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let device = world.device(1);
    let user = device.id.user.to_string();
    for other in [device.sibling(&world, 2), world.device(9)] {
        let mut lane = world.connect(&other).await.open(hello(Lane::Live, 0)).await;
        let epoch = lane.welcome().await.epoch;
        lane.send_pings(epoch, &[ping(77)]).await;
        lane.ack().await;
    }
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    let pings: Vec<Ping> = (1..=900).map(ping).collect();
    live.send_pings(epoch, &pings).await;
    live.ack().await;
    for (id, action) in [
        (1, control::Action::Pause(control::Pause {})),
        (2, control::Action::Resume(control::Resume {})),
    ] {
        live.control(id, action).await;
    }
    let mut checker = world.checker().await;
    checker.watch(v1::WatchRequest::default()).await.unwrap();
    expect_hourly(&mut checker, device.id.user).await;
    world
        .metrics_until(|page| page.value("waypost_audit_entries_total") == 2.0)
        .await;
    let (_, lines) = exported_as(&mut live, 3, control::Format::JsonLines).await;
    let (_, map) = exported_as(&mut live, 4, control::Format::Geojson).await;
    let lines = without_its_moment(&lines);
    let map = without_its_moment(&map);
    assert_eq!(lines.matches("\"kind\":\"ping\"").count(), 901);

    let file = world.scratch("held.json");
    let file_name = file.to_str().unwrap();
    for is_running in [true, false] {
        if !is_running {
            world.stop_gateway().await;
        }
        let ran = waypost(&data_dir, &["export"], &["--user", &user]).await;
        assert_eq!(ran.code, Some(0), "{}", ran.said);
        assert_eq!(without_its_moment(&ran.out), lines, "running: {is_running}");
        let to_file = [
            "--user", &user, "--format", "geojson", "--output", file_name,
        ];
        let ran = waypost(&data_dir, &["export"], &to_file).await;
        assert_eq!(ran.code, Some(0), "{}", ran.said);
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            without_its_moment(&fs::read(&file).unwrap()),
            map,
            "running: {is_running}"
        );
        fs::remove_file(&file).unwrap();

        let nobody = world.device(5).id.user.to_string();
        let to_file = ["--user", &nobody, "--output", file_name];
        let ran = waypost(&data_dir, &["export"], &to_file).await;
        assert_eq!(ran.code, Some(1));
        assert!(ran.said.contains("never heard of the id"), "{}", ran.said);
        assert!(!file.exists());
    }
    let log = fs::read_to_string(data_dir.join("audit.log")).unwrap();
    let recorded = format!(r#""who":"operator","what":"exported","whose":{{"users":["{user}"]}}"#);
    assert_eq!(log.matches(&recorded).count(), 4, "{log}");
    let verified = waypost::<&str>(&data_dir, &["audit", "verify"], &[]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.said);
}

/// Whoever takes nothing is not waited for, and what was cut off is not taken for a whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_cut_off_is_said_and_holds_up_no_stop() {
    let mut gateway = Process::start(&[]).await;
    let device = gateway.device(1);
    let mut live = gateway
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    // Far more than fits into a pipe and a socket.
    const BATCHES: u64 = 8;
    for batch in 0..BATCHES {
        let seqs = batch * 1_000 + 1..=(batch + 1) * 1_000;
        let pings: Vec<Ping> = seqs
            .map(|seq| ping_at(seq, ping(1).time_ms + seq))
            .collect();
        live.send_pings(epoch, &pings).await;
        live.ack().await;
    }
    let user = device.id.user.to_string();
    let options = ["--user", user.as_str()];
    let data_dir = gateway.data_dir().to_owned();
    let whole = waypost(&data_dir, &["export"], &options).await;
    assert_eq!(whole.code, Some(0), "{}", whole.said);
    let exported = String::from_utf8(whole.out).unwrap();
    assert!(exported.trim_end().ends_with(r#""pings":8000}"#));

    for is_killed in [true, false] {
        // As many as are made at a time. From their first bytes on nobody reads what they write.
        let mut stalled = Vec::new();
        let mut beginning = [0; 100];
        for _ in 0..4 {
            let mut export = command::begin(&data_dir, &["export"], &options);
            let out = export.stdout.as_mut().unwrap();
            out.read_exact(&mut beginning).await.unwrap();
            stalled.push(export);
        }
        let further = waypost(&data_dir, &["export"], &options).await;
        assert_eq!(further.code, Some(1));
        assert!(further.said.contains("try again"), "{}", further.said);
        if is_killed {
            gateway.kill();
            gateway.restart().await;
        } else {
            gateway.terminate();
            assert_eq!(gateway.exit_code().await, Some(0));
        }
        for export in stalled {
            let cut_off = command::ended(export).await;
            assert_eq!(cut_off.code, Some(1));
            assert!(cut_off.said.contains("cut off"), "{}", cut_off.said);
            let text = String::from_utf8(cut_off.out).unwrap();
            assert!(text.len() + beginning.len() < exported.len());
            assert!(!text.contains(r#""kind":"end""#));
        }
    }
    let file = gateway.scratch("held.jsonl");
    let to_file = ["--user", &user, "--output", file.to_str().unwrap()];
    let again = waypost(&data_dir, &["export"], &to_file).await;
    assert_eq!(again.code, Some(0), "without a gateway: {}", again.said);
    assert_eq!(
        without_its_moment(&fs::read(&file).unwrap()),
        without_its_moment(exported.as_bytes())
    );
}
