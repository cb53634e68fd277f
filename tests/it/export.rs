//! Export: the holder gets everything that is held on the user, as it is at one moment, on the device.

use serde_json::{Value, json};
use waypost_proto::{
    ping::Ping,
    session::Lane,
    v1::{self, control, control_result::Outcome, device_frame, gateway_frame},
};
use waypost_tests::{Stream, World, hello, ping};

/// Asks, and reads the stream that the gateway opens: the answer, and the lines behind it.
async fn exported(stream: &mut Stream, id: u64) -> (Outcome, Vec<Value>) {
    let action = Some(control::Action::Export(control::Export::default()));
    let control = v1::Control { id, action };
    stream.send(device_frame::Kind::Control(control)).await;
    let (frame, text) = stream.link().read_uni().await;
    let Some(gateway_frame::Kind::ControlResult(result)) = frame.kind else {
        panic!("{frame:?}");
    };
    assert_eq!(result.id, id);
    let text = String::from_utf8(text).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    (result.outcome(), lines.collect())
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
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
    let end = json!({"kind": "end", "devices": 2, "transitions": 2, "pings": 901});
    assert_eq!(lines.last(), Some(&end));

    // It is on record, and the lane goes on.
    let log = std::fs::read_to_string(world.config().data_dir.join("audit.log")).unwrap();
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
