//! The audit log: who began to watch whom is on record, and nobody can change that unnoticed.

use std::{fs, path::Path};

use bytes::Bytes;
use serde_json::Value;
use tokio::process::Command;
use waypost_gateway::store::Held;
use waypost_proto::{session::Lane, v1};
use waypost_tests::{World, binary, command::waypost, hello, ping};

/// What is on record: who, what, and whose.
fn recorded(data_dir: &Path) -> Vec<(Value, Value, Value)> {
    let text = fs::read_to_string(data_dir.join("audit.log")).unwrap();
    let deed = |line: &str| {
        let deed: Value = serde_json::from_str(line.split_once(' ').unwrap().1).unwrap();
        (
            deed["who"].clone(),
            deed["what"].clone(),
            deed["whose"].clone(),
        )
    };
    text.lines().map(deed).collect()
}

async fn verify(data_dir: &Path, options: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(binary("waypost"))
        .args(["audit", "verify", "--data"])
        .arg(data_dir)
        .args(options)
        .output()
        .await
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_whom_is_on_record_once_an_hour_and_cannot_be_changed_unnoticed() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let device = world.device(1);
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    live.ack().await;

    let mut checker = world.checker().await;
    let of_one = v1::WatchRequest {
        user_ids: vec![Bytes::copy_from_slice(&device.id.user.0)],
        ..v1::WatchRequest::default()
    };
    let all = v1::WatchRequest::default();
    for request in [all.clone(), all.clone(), of_one, all] {
        checker.watch(request).await.unwrap();
    }
    world
        .metrics_until(|page| page.value("waypost_audit_entries_total") == 3.0)
        .await;
    // A stop writes what still waits.
    world.restart().await;
    let dev = serde_json::json!({"checker": "dev"});
    let user = serde_json::json!({"users": [device.id.user.to_string()]});
    let started = ("gateway".into(), "started".into(), "nobody".into());
    let watched = |whose| (dev.clone(), "watch_started".into(), whose);
    assert_eq!(
        recorded(&data_dir),
        [
            started.clone(),
            watched("everybody".into()),
            watched(user),
            started.clone()
        ]
    );
    let text = fs::read_to_string(data_dir.join("audit.log")).unwrap();
    let position = ping(1).latitude_e7.to_string();
    assert!(!text.contains(position.trim_end_matches('0')), "{text}");

    // Beside the running gateway.
    let (code, said) = verify(&data_dir, &[]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.starts_with("4 entries hold together\nhead  "),
        "{said}"
    );
    let head = said.trim_end().rsplit(' ').next().unwrap().to_owned();
    assert_eq!(verify(&data_dir, &["--contains", &head]).await.0, Some(0));

    let forged = text.replace(
        &device.id.user.to_string(),
        &world.device(2).id.user.to_string(),
    );
    fs::write(data_dir.join("audit.log"), &forged).unwrap();
    let (code, said) = verify(&data_dir, &[]).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("line 3"), "{said}");
    // A gateway that finds it goes on with a new one, and says so.
    world.restart().await;
    let page = world.metrics().await;
    assert_eq!(page.value("waypost_audit_broken_total"), 1.0);
    assert_eq!(recorded(&data_dir), [started]);
    let (code, said) = verify(&data_dir, &["--contains", &head]).await;
    assert_eq!(code, Some(1), "{said}");
    let kept = fs::read_dir(&data_dir).unwrap().any(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.starts_with("audit.log.broken-")
    });
    assert!(kept, "nothing is thrown away");
}

/// With a gateway or without one, it is one chain.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_operator_does_is_on_record_whether_a_gateway_runs_or_not() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let users: Vec<_> = [1, 2].map(|number| world.device(number)).into();
    for device in &users {
        let mut live = world.connect(device).await.open(hello(Lane::Live, 0)).await;
        live.welcome().await;
    }
    let started: (Value, Value, Value) = ("gateway".into(), "started".into(), "nobody".into());
    let mut expected = vec![started.clone()];
    for (device, is_running) in users.iter().zip([true, false]) {
        if !is_running {
            world.stop_gateway().await;
        }
        let user = device.id.user.to_string();
        let of_user = ["--user", user.as_str()];
        for (command, option, what) in [
            ("revoke", None, Some("revoked")),
            ("revoke", None, None),
            ("revoke", Some("--lift"), Some("revocation_lifted")),
            ("export", None, Some("exported")),
            ("erase", Some("--yes"), Some("erased")),
            ("erase", None, None),
        ] {
            let options: Vec<_> = of_user.into_iter().chain(option).collect();
            let ran = waypost(&data_dir, &[command], &options).await;
            assert_eq!(ran.code, Some(0), "{command}: {}", ran.said);
            let whose = serde_json::json!({"users": [user]});
            expected.extend(what.map(|what| ("operator".into(), what.into(), whose)));
        }
    }
    world.start_gateway().await;
    expected.push(started);
    assert_eq!(recorded(&data_dir), expected);
    let (code, said) = verify(&data_dir, &[]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.starts_with("10 entries hold together"), "{said}");
}

/// The control of the last: a log that was changed is found by a command that writes to it, and nothing is done that is
/// not on record.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_finds_a_log_that_was_changed_and_does_nothing_without_a_record() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let device = world.device(1);
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    live.welcome().await;
    world.stop_gateway().await;
    let user = device.id.user.to_string();
    let path = data_dir.join("audit.log");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("gateway", "nobody_")).unwrap();
    let ran = waypost(&data_dir, &["revoke"], &["--user", &user]).await;
    assert_eq!(ran.code, Some(0), "{}", ran.said);
    assert!(ran.said.contains("somebody has changed"), "{}", ran.said);
    assert_eq!(recorded(&data_dir).len(), 1, "in a new one");

    // There is no writing to a folder, whoever one is.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    for command in ["export", "erase"] {
        let options = match command {
            "erase" => vec!["--user", &user, "--yes"],
            _ => vec!["--user", &user],
        };
        let ran = waypost(&data_dir, &[command], &options).await;
        assert_eq!((ran.code, ran.out), (Some(1), Vec::new()));
        assert!(ran.said.contains("audit log"), "{}", ran.said);
    }
    let held = World::open_store(&data_dir).held_of(device.id.user);
    assert_eq!(held.unwrap(), Held::Something);
}
