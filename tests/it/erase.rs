//! Erasure: the holder wants it, and then nothing is left, nothing more is taken, and checkers know that and no more. The
//! wish may come from a device, or by another way to the operator.

use std::fs;

use bytes::Bytes;
use tonic::Code;
use waypost_gateway::store::{Held, Store};
use waypost_proto::{
    id::UserId,
    session::{CloseCode, Lane},
    v1::{
        self, Entry, State, control, control_result::Outcome, device_frame, gateway_frame, reject,
        watch_event::Kind,
    },
};
use waypost_tests::{
    Process, Stream, World,
    command::{self, waypost},
    files::has_rows_of,
    hello,
    link::Returning,
    ping,
};

fn erase() -> control::Action {
    control::Action::Erase(control::Erase {})
}

/// Has everything erased, and reads the receipt.
async fn erased(stream: &mut Stream, id: u64) -> v1::Receipt {
    let action = Some(erase());
    let control = v1::Control { id, action };
    stream.send(device_frame::Kind::Control(control)).await;
    loop {
        match stream.next().await {
            Some(gateway_frame::Kind::ControlResult(result)) => {
                assert_eq!((result.id, result.outcome()), (id, Outcome::Done));
                return result.receipt.expect("a receipt");
            }
            Some(gateway_frame::Kind::Ack(_)) => {}
            other => panic!("no receipt but {other:?}"),
        }
    }
}

async fn watched(world: &World, token: Bytes, upto: u64) -> (Vec<Kind>, Bytes) {
    let mut checker = world.checker().await;
    let request = v1::WatchRequest {
        token,
        ..v1::WatchRequest::default()
    };
    let mut stream = checker.watch(request).await.unwrap().into_inner();
    let mut came = Vec::new();
    loop {
        for event in stream.message().await.unwrap().unwrap().events {
            match event.kind.unwrap() {
                Kind::Progress(progress) if upto <= progress.position => {
                    return (came, progress.token);
                }
                kind => came.push(kind),
            }
        }
    }
}

fn of_user(came: &[Kind], user: UserId) -> (Vec<Entry>, Vec<State>) {
    let (mut entries, mut states) = (Vec::new(), Vec::new());
    for kind in came {
        match kind {
            Kind::Entry(entry) if entry.user == user.0[..] => entries.push(entry.clone()),
            Kind::Transition(transition) if transition.user == user.0[..] => {
                states.push(transition.state());
            }
            Kind::Deadline(deadline) => assert_ne!(deadline.user, user.0[..], "{deadline:?}"),
            _ => {}
        }
    }
    (entries, states)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_erased_is_nowhere_and_no_device_of_the_user_gets_in_again() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let device = world.device(1);
    let user = device.id.user;
    let second = device.sibling(&world, 2);
    let other = world.device(9);
    let mut others = world.connect(&other).await.open(hello(Lane::Live, 0)).await;
    let other_epoch = others.welcome().await.epoch;
    others.send_pings(other_epoch, &[ping(1)]).await;
    others.ack().await;

    // The first device leaves with a ticket for later.
    let returning = Returning::new(&world, &device);
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    live.ack().await;
    for (id, action) in [
        (1, control::Action::Pause(control::Pause {})),
        (2, control::Action::Resume(control::Resume {})),
    ] {
        assert_eq!(live.control(id, action).await, Outcome::Done);
    }
    let mut lane = world
        .connect(&second)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let second_epoch = lane.welcome().await.epoch;
    lane.send_pings(second_epoch, &[ping(1)]).await;
    let position = lane.ack().await.position;
    let (_, token) = watched(&world, Bytes::new(), position).await;
    assert!(has_rows_of(&data_dir, &device) && has_rows_of(&data_dir, &second));

    let receipt = erased(&mut live, 7).await;
    assert_eq!((receipt.devices, receipt.pings, receipt.events), (2, 3, 2));
    assert!(receipt.fenced_ms <= receipt.finished_ms);
    assert_eq!(live.link().closed().await, Some(CloseCode::Erased));
    assert!(!has_rows_of(&data_dir, &device) && !has_rows_of(&data_dir, &second));
    assert!(has_rows_of(&data_dir, &other), "nobody else's");

    // Whoever is still connected is told; whoever comes is turned away, with a ticket or without.
    lane.send_pings(second_epoch, &[ping(2)]).await;
    let ack = lane.ack().await;
    assert_eq!(ack.rejects[0].code(), reject::Code::Erased);
    assert!(!ack.rejects[0].retryable);
    let marker = world.entry(&device).await;
    let expected = Entry {
        user: Bytes::copy_from_slice(&user.0),
        state: State::Erased.into(),
        position: receipt.position,
        ..Entry::default()
    };
    assert_eq!(marker, expected);
    // Its early data is taken for what it is, and then it is turned away.
    let (link, accepted) = returning.connect_early(world.addresses().devices);
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.try_send_pings(epoch, &[ping(3)]).await;
    assert!(accepted.await);
    assert_eq!(link.closed().await, Some(CloseCode::Erased));
    for _ in 0..2 {
        for device in [&device, &second] {
            let link = world.connect(device).await;
            let _lane = link.open(hello(Lane::Live, epoch)).await;
            assert_eq!(link.closed().await, Some(CloseCode::Erased));
        }
        assert_eq!(world.entry(&device).await, expected);
        let (came, _) = watched(&world, token.clone(), receipt.position).await;
        let (entries, states) = of_user(&came, user);
        assert_eq!(entries, std::slice::from_ref(&expected));
        assert_eq!(states, [State::Erased], "not even that there was a pause");
        let deadlines = vec![v1::DeadlineSetting {
            user: Bytes::copy_from_slice(&user.0),
            expect_every_ms: 60_000,
            grace_ms: 0,
        }];
        let request = v1::SetDeadlinesRequest { deadlines };
        let refused = world.checker().await.set_deadlines(request).await;
        assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
        world.restart().await;
    }
    let mut others = world
        .connect(&other)
        .await
        .open(hello(Lane::Live, other_epoch))
        .await;
    others.welcome().await;
    others.send_pings(other_epoch, &[ping(2)]).await;
    assert_eq!(others.ack().await.accepted, 1);
    let store = world.stop().await;
    assert_eq!(store.rows_of(user).count(), 0);
    assert_eq!(store.devices_of(user).count(), 0);
    assert_eq!(store.rows_of(other.id.user).count(), 2);
}

/// The fence is there as soon as a checker knows of it, and the rest comes, however often the gateway is killed.
#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_survives_kills_at_any_moment() {
    let mut gateway = Process::start(&[]).await;
    for round in 1..=6_u32 {
        let device = gateway.device(round);
        let mut live = gateway
            .connect(&device)
            .await
            .open(hello(Lane::Live, 0))
            .await;
        let epoch = live.welcome().await.epoch;
        let pings: Vec<_> = (1..=100).map(ping).collect();
        live.send_pings(epoch, &pings).await;
        live.ack().await;
        let action = Some(erase());
        let control = v1::Control { id: 1, action };
        live.send(device_frame::Kind::Control(control)).await;
        let fenced = async { while gateway.entry(&device).await.state() != State::Erased {} };
        waypost_tests::within_minutes(fenced).await;
        // At another moment each time, and with another start that is cut off.
        for _ in 0..round % 3 {
            gateway.kill();
            gateway.restart().await;
        }
        assert_eq!(gateway.entry(&device).await.state(), State::Erased);
        let link = gateway.connect(&device).await;
        let _lane = link.open(hello(Lane::Live, epoch)).await;
        assert_eq!(link.closed().await, Some(CloseCode::Erased));
    }
    gateway.kill();
    gateway.restart().await;
    let nothing_left = async || {
        let is_left = (1..=6).any(|round| has_rows_of(gateway.data_dir(), &gateway.device(round)));
        (!is_left).then_some(())
    };
    waypost_tests::until(nothing_left).await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
}

fn options(user: &str) -> [&str; 4] {
    ["--user", user, "--yes", "--json"]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_operator_erases_is_nowhere_and_connections_end_and_nobody_gets_in_again() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let device = world.device(1);
    let user = device.id.user.to_string();
    let second = device.sibling(&world, 2);
    let other = world.device(9);
    let mut others = world.connect(&other).await.open(hello(Lane::Live, 0)).await;
    let other_epoch = others.welcome().await.epoch;
    others.send_pings(other_epoch, &[ping(1)]).await;
    others.ack().await;
    // Both are connected when it happens, the first with a ticket for later.
    let returning = Returning::new(&world, &device);
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    live.ack().await;
    let mut lane = world
        .connect(&second)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let second_epoch = lane.welcome().await.epoch;
    lane.send_pings(second_epoch, &[ping(1)]).await;
    let position = lane.ack().await.position;
    let (_, token) = watched(&world, Bytes::new(), position).await;

    // Nobody is there to be asked, and of an id that nobody has there is nothing to ask.
    let unasked = waypost(&data_dir, &["erase"], &["--user", &user]).await;
    assert_eq!(unasked.code, Some(2), "{}", unasked.said);
    assert!(unasked.said.contains("--yes"), "{}", unasked.said);
    let nobody = world.device(5).id.user.to_string();
    let unknown = waypost(&data_dir, &["erase"], &options(&nobody)).await;
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.said.contains("never heard"), "{}", unknown.said);
    assert!(has_rows_of(&data_dir, &device) && has_rows_of(&data_dir, &second));
    live.send_pings(epoch, &[ping(3)]).await;
    assert_eq!(live.ack().await.accepted, 3, "nothing has happened");

    let receipt = waypost(&data_dir, &["erase"], &options(&user)).await.json();
    let counts = &receipt["counts"];
    assert_eq!(
        (&counts["devices"], &counts["pings"]),
        (&2.into(), &4.into())
    );
    assert_eq!(
        (&receipt["is_running"], &receipt["was_erased"]),
        (&true.into(), &false.into())
    );
    assert_eq!(live.link().closed().await, Some(CloseCode::Erased));
    assert_eq!(lane.link().closed().await, Some(CloseCode::Erased));
    assert!(!has_rows_of(&data_dir, &device) && !has_rows_of(&data_dir, &second));
    assert!(has_rows_of(&data_dir, &other), "nobody else's");
    let again = waypost(&data_dir, &["erase"], &options(&user)).await.json();
    assert_eq!(again["finished_ms"], receipt["finished_ms"]);
    assert_eq!(again["was_erased"], true);
    let exported = waypost(&data_dir, &["export"], &["--user", &user]).await;
    assert_eq!(exported.code, Some(1));
    assert!(exported.said.contains("was erased"), "{}", exported.said);

    let expected = Entry {
        user: Bytes::copy_from_slice(&device.id.user.0),
        state: State::Erased.into(),
        position: receipt["position"].as_u64().unwrap(),
        ..Entry::default()
    };
    let (link, accepted) = returning.connect_early(world.addresses().devices);
    let mut early = link.open(hello(Lane::Live, epoch)).await;
    early.try_send_pings(epoch, &[ping(4)]).await;
    assert!(accepted.await);
    assert_eq!(link.closed().await, Some(CloseCode::Erased));
    for _ in 0..2 {
        for device in [&device, &second] {
            let link = world.connect(device).await;
            let _lane = link.open(hello(Lane::Live, epoch)).await;
            assert_eq!(link.closed().await, Some(CloseCode::Erased));
        }
        assert_eq!(world.entry(&device).await, expected);
        let (came, _) = watched(&world, token.clone(), expected.position).await;
        let (entries, states) = of_user(&came, device.id.user);
        assert_eq!(entries, std::slice::from_ref(&expected));
        assert_eq!(states, [State::Erased]);
        world.restart().await;
    }
    others = world
        .connect(&other)
        .await
        .open(hello(Lane::Live, other_epoch))
        .await;
    others.welcome().await;
    let log = fs::read_to_string(data_dir.join("audit.log")).unwrap();
    let recorded = format!(r#""who":"operator","what":"erased","whose":{{"users":["{user}"]}}"#);
    assert_eq!(log.matches(&recorded).count(), 1, "{log}");
    let verified = waypost::<&str>(&data_dir, &["audit", "verify"], &[]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.said);
    let store = world.stop().await;
    assert_eq!(store.rows_of(device.id.user).count(), 0);
    assert_eq!(store.rows_of(other.id.user).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_erased_without_a_gateway_is_nowhere_and_the_next_one_knows_it() {
    let mut world = World::start().await;
    let data_dir = world.config().data_dir.clone();
    let (device, other) = (world.device(1), world.device(9));
    let user = device.id.user.to_string();
    let (mut epoch, mut position) = (0, 0);
    for device in [&device, &other] {
        let mut live = world.connect(device).await.open(hello(Lane::Live, 0)).await;
        epoch = live.welcome().await.epoch;
        live.send_pings(epoch, &[ping(1), ping(2)]).await;
        position = live.ack().await.position;
    }
    let (_, token) = watched(&world, Bytes::new(), position).await;
    world.stop_gateway().await;
    assert!(has_rows_of(&data_dir, &device));

    let receipt = waypost(&data_dir, &["erase"], &options(&user)).await.json();
    assert_eq!(
        (&receipt["is_running"], &receipt["counts"]["pings"]),
        (&false.into(), &2.into())
    );
    assert!(!has_rows_of(&data_dir, &device));
    assert!(has_rows_of(&data_dir, &other), "nobody else's");
    let again = waypost(&data_dir, &["erase"], &options(&user)).await.json();
    assert_eq!(again["finished_ms"], receipt["finished_ms"]);
    assert_eq!(again["was_erased"], true);

    world.start_gateway().await;
    let link = world.connect(&device).await;
    let _lane = link.open(hello(Lane::Live, epoch)).await;
    assert_eq!(link.closed().await, Some(CloseCode::Erased));
    let entry = world.entry(&device).await;
    assert_eq!(
        (entry.state(), Some(entry.position)),
        (State::Erased, receipt["position"].as_u64())
    );
    let (came, _) = watched(&world, token, entry.position).await;
    let (entries, states) = of_user(&came, device.id.user);
    assert_eq!(entries, [entry]);
    assert_eq!(states, [State::Erased]);
    let log = fs::read_to_string(data_dir.join("audit.log")).unwrap();
    assert_eq!(log.matches(r#""what":"erased""#).count(), 1, "{log}");
    let verified = waypost::<&str>(&data_dir, &["audit", "verify"], &[]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.said);
}

/// Whoever is killed, the command or the gateway that it has asked, the erasure comes to its end.
#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_by_command_survives_kills_and_is_asked_for_again() {
    let mut gateway = Process::start(&[]).await;
    let data_dir = gateway.data_dir().to_owned();
    for round in 1..=6_u32 {
        let device = gateway.device(round);
        let user = device.id.user.to_string();
        let mut live = gateway
            .connect(&device)
            .await
            .open(hello(Lane::Live, 0))
            .await;
        let epoch = live.welcome().await.epoch;
        let pings: Vec<_> = (1..=100).map(ping).collect();
        live.send_pings(epoch, &pings).await;
        live.ack().await;
        let is_running = round % 2 == 0;
        if !is_running {
            gateway.terminate();
            assert_eq!(gateway.exit_code().await, Some(0));
        }
        let mut erasing = command::begin(&data_dir, &["erase"], &options(&user));
        // As soon as the fence is on disk, which anybody can see.
        let fenced = async || {
            // The gateway may take a file away just now.
            let held = Store::open_read_only(&data_dir)
                .ok()?
                .held_of(device.id.user);
            matches!(held, Ok(Held::Erased(_))).then_some(())
        };
        waypost_tests::until(fenced).await;
        match (is_running, round % 3) {
            (true, 0) => erasing.start_kill().unwrap(),
            (true, _) => gateway.kill(),
            (false, _) => erasing.start_kill().unwrap(),
        }
        // It may have been done before it was killed.
        command::ended(erasing).await;
        if !is_running && round % 3 != 0 {
            let receipt = waypost(&data_dir, &["erase"], &options(&user)).await.json();
            assert_eq!(receipt["is_running"], false);
        }
        if !(is_running && round % 3 == 0) {
            gateway.restart().await;
        }
        let receipt = waypost(&data_dir, &["erase"], &options(&user)).await.json();
        assert_eq!(receipt["counts"]["pings"], 100);
        assert!(!has_rows_of(&data_dir, &device), "round {round}");
        let link = gateway.connect(&device).await;
        let _lane = link.open(hello(Lane::Live, epoch)).await;
        assert_eq!(link.closed().await, Some(CloseCode::Erased));
    }
    let verified = waypost::<&str>(&data_dir, &["audit", "verify"], &[]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.said);
    let log = fs::read_to_string(data_dir.join("audit.log")).unwrap();
    assert_eq!(log.matches(r#""what":"erased""#).count(), 6, "{log}");
}
