//! The holder's pause: checkers are told of it as such, and of nothing else until the holder resumes.

use bytes::Bytes;
use waypost_checker::rpc::freshness_client::FreshnessClient;
use waypost_proto::{
    id::UserId,
    session::Lane,
    v1::{
        self, DeadlineSetting, Entry, State, Transition, control, control_result, deadline,
        device_frame, gateway_frame, reject, watch_event::Kind,
    },
};
use waypost_tests::{Relay, Stream, Weather, World, hello, link::Returning, ping, stored_seqs};

/// Asks for what the holder wants, and waits until it holds.
async fn ask(stream: &mut Stream, id: u64, action: control::Action) {
    let outcome = stream.control(id, action).await;
    assert_eq!(outcome, control_result::Outcome::Done);
}

fn control(id: u64, action: control::Action) -> device_frame::Kind {
    device_frame::Kind::Control(v1::Control {
        id,
        action: Some(action),
    })
}

fn pause() -> control::Action {
    control::Action::Pause(control::Pause {})
}

fn resume() -> control::Action {
    control::Action::Resume(control::Resume {})
}

/// A stream, and what came on it since it was looked at last.
struct Watching {
    stream: tonic::Streaming<v1::WatchResponse>,
    token: Bytes,
    came: Vec<Kind>,
}

impl Watching {
    async fn begin(world: &World, request: v1::WatchRequest) -> Self {
        let mut checker = world.checker().await;
        Self {
            stream: checker.watch(request).await.unwrap().into_inner(),
            token: Bytes::new(),
            came: Vec::new(),
        }
    }

    /// What came of a user, up to the announcement of a position.
    async fn of(&mut self, user: UserId, position: u64) -> (Vec<Entry>, Vec<Transition>) {
        while !self.came.iter().any(|kind| match kind {
            Kind::Progress(progress) => position <= progress.position,
            _ => false,
        }) {
            let message = self.stream.message().await.unwrap().unwrap();
            self.came
                .extend(message.events.into_iter().map(|event| event.kind.unwrap()));
        }
        let (mut entries, mut transitions) = (Vec::new(), Vec::new());
        for kind in self.came.drain(..) {
            match kind {
                Kind::Entry(entry) if entry.user == user.0[..] => entries.push(entry),
                Kind::Transition(transition) if transition.user == user.0[..] => {
                    transitions.push(transition);
                }
                Kind::Progress(progress) => self.token = progress.token,
                Kind::SnapshotEnd(end) => self.token = end.token,
                _ => {}
            }
        }
        (entries, transitions)
    }
}

fn states(transitions: &[Transition]) -> Vec<State> {
    transitions.iter().map(Transition::state).collect()
}

/// Somebody else is heard, so that commits go on. The position of that.
async fn heard(world: &World, other: &mut Stream) -> u64 {
    world.next_millisecond().await;
    other
        .send(device_frame::Kind::Heartbeat(v1::Heartbeat {}))
        .await;
    other.ack().await.position
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_holder_has_paused_nothing_that_a_checker_sees_moves_on_any_device_or_over_a_restart()
 {
    let mut world = World::start().await;
    let device = world.device(1);
    let user = device.id.user;
    let second = device.sibling(&world, 2);
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert!(!live.ack().await.paused);
    let mut other = world
        .connect(&world.device(9))
        .await
        .open(hello(Lane::Live, 0))
        .await;
    other.welcome().await;
    let mut watching = Watching::begin(&world, v1::WatchRequest::default()).await;
    watching.of(user, 0).await;

    ask(&mut live, 7, pause()).await;
    let position = heard(&world, &mut other).await;
    let (entries, transitions) = watching.of(user, position).await;
    let paused = entries.last().expect("checkers are told").clone();
    assert_eq!(paused.state(), State::Paused);
    assert_eq!(states(&transitions), [State::Paused]);
    assert_eq!(transitions[0].position, paused.position);

    // On this device and on another: pings, heartbeats, connections, a new epoch, the same wish again.
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    let ack = live.ack().await;
    assert!(ack.paused);
    assert_eq!((ack.duplicate, ack.rejected, ack.durable_upto), (1, 1, 2));
    assert_eq!(ack.rejects[0].code(), reject::Code::Paused);
    assert!(!ack.rejects[0].retryable);
    ask(&mut live, 8, pause()).await;
    let mut lane = world
        .connect(&second)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let welcome = lane.welcome().await;
    assert!(welcome.paused);
    lane.send_pings(welcome.epoch, &[ping(1)]).await;
    assert_eq!(lane.ack().await.rejects[0].code(), reject::Code::Paused);
    let position = heard(&world, &mut other).await;
    let (entries, transitions) = watching.of(user, position).await;
    assert_eq!((entries, transitions), (vec![], vec![]));
    assert_eq!(world.entry(&device).await, paused);

    world.restart().await;
    assert_eq!(world.entry(&device).await, paused);
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, epoch))
        .await;
    let welcome = live.welcome().await;
    assert!(welcome.paused);
    assert_eq!(world.entry(&device).await, paused);
    let mut lane = world
        .connect(&second)
        .await
        .open(hello(Lane::Live, 1))
        .await;
    assert!(lane.welcome().await.paused);
    ask(&mut lane, 1, resume()).await;

    live.send_pings(epoch, &[ping(3)]).await;
    let ack = live.ack().await;
    assert!(!ack.paused);
    assert_eq!(ack.accepted, 1);
    let request = v1::WatchRequest {
        token: watching.token,
        ..v1::WatchRequest::default()
    };
    let mut watching = Watching::begin(&world, request).await;
    let (entries, transitions) = watching.of(user, ack.position).await;
    assert_eq!(states(&transitions), [State::Active]);
    let active = entries.last().expect("changed since the token");
    assert_eq!(active.state(), State::Active);
    assert!(paused.last_contact_ms < active.last_contact_ms);
    assert_eq!(active.last_sample_ms, ping(3).time_ms);
    assert_eq!(
        stored_seqs(&world.stop().await, &device),
        [(epoch, 1), (epoch, 3)],
        "what came meanwhile is not kept"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pause_and_resume_is_told_once_however_long_a_checker_was_away() {
    let mut world = World::start().await;
    let device = world.device(1);
    let user = device.id.user;
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    live.welcome().await;
    let mut watching = Watching::begin(&world, v1::WatchRequest::default()).await;
    let only_active = v1::WatchRequest {
        states: vec![State::Active.into()],
        ..v1::WatchRequest::default()
    };
    let mut selecting = Watching::begin(&world, only_active.clone()).await;
    watching.of(user, 0).await;
    selecting.of(user, 0).await;

    // All in one flight, so that commits may hold several, and then over a restart.
    for id in 0..20 {
        let action = if id % 2 == 0 { pause() } else { resume() };
        live.send(control(id, action)).await;
    }
    for id in 0..20 {
        let Some(gateway_frame::Kind::ControlResult(result)) = live.next().await else {
            panic!("no answer to {id}");
        };
        assert_eq!(result.id, id);
    }
    world.restart().await;
    let mut live = world
        .connect(&device)
        .await
        .open(hello(Lane::Live, 1))
        .await;
    live.welcome().await;
    ask(&mut live, 20, pause()).await;
    live.send(device_frame::Kind::Heartbeat(v1::Heartbeat {}))
        .await;
    let position = live.ack().await.position;

    for (was, request) in [
        (watching, v1::WatchRequest::default()),
        (selecting, only_active),
    ] {
        let has_states = !request.states.is_empty();
        let request = v1::WatchRequest {
            token: was.token,
            ..request
        };
        let mut again = Watching::begin(&world, request).await;
        let (entries, transitions) = again.of(user, position).await;
        let expected: Vec<_> = [State::Paused, State::Active].repeat(10);
        assert_eq!(states(&transitions[..20]), expected);
        assert_eq!(states(&transitions[20..]), [State::Paused]);
        assert!(
            transitions.is_sorted_by_key(|transition| (transition.position, transition.number)),
            "{transitions:?}"
        );
        // Who is not in a selected state has no entry, and is not taken for silent all the same.
        assert_eq!(entries.len(), usize::from(!has_states));
        let token = again.token.clone();
        let request = v1::WatchRequest {
            token,
            states: if has_states {
                vec![State::Active.into()]
            } else {
                vec![]
            },
            ..v1::WatchRequest::default()
        };
        let mut third = Watching::begin(&world, request).await;
        assert_eq!(third.of(user, position).await, (vec![], vec![]), "once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_late_or_listed_as_silent_while_paused() {
    let world = World::start().await;
    let (paused, silent) = (world.device(1), world.device(2));
    let mut checker = world.checker().await;
    let mut lanes = Vec::new();
    for device in [&paused, &silent] {
        let mut live = world.connect(device).await.open(hello(Lane::Live, 0)).await;
        live.welcome().await;
        lanes.push(live);
    }
    ask(&mut lanes[0], 1, pause()).await;
    let deadlines = [&paused, &silent]
        .map(|device| DeadlineSetting {
            user: Bytes::copy_from_slice(&device.id.user.0),
            expect_every_ms: 1,
            grace_ms: 1,
        })
        .into();
    checker
        .set_deadlines(v1::SetDeadlinesRequest { deadlines })
        .await
        .unwrap();
    let mut stream = checker
        .watch(v1::WatchRequest::default())
        .await
        .unwrap()
        .into_inner();
    // Both are due in the same millisecond, so the commit that calls the one late would call the other.
    let mut late: Vec<(UserId, u64)> = Vec::new();
    let mut announced = 0;
    while late.is_empty() || announced < late[0].1 {
        read_late(&mut stream, &mut late, &mut announced).await;
    }
    assert!(
        late.iter().all(|(user, _)| *user == silent.id.user),
        "{late:?}"
    );
    let listed = stale(&mut checker).await;
    assert!(listed.contains(&silent.id.user) && !listed.contains(&paused.id.user));
    ask(&mut lanes[0], 2, resume()).await;
    assert!(stale(&mut checker).await.contains(&paused.id.user));
    // Its deadline has been there all the time.
    while late.iter().all(|(user, _)| *user == silent.id.user) {
        read_late(&mut stream, &mut late, &mut announced).await;
    }
}

/// Reads one message: who was called late, at which position, and what was announced.
async fn read_late(
    stream: &mut tonic::Streaming<v1::WatchResponse>,
    late: &mut Vec<(UserId, u64)>,
    announced: &mut u64,
) {
    for event in stream.message().await.unwrap().unwrap().events {
        match event.kind.unwrap() {
            Kind::Deadline(deadline) => {
                assert_eq!(deadline.kind(), deadline::Kind::Late);
                late.push((user_of(&deadline.user), deadline.position));
            }
            Kind::Progress(progress) => *announced = progress.position,
            _ => {}
        }
    }
}

fn user_of(bytes: &[u8]) -> UserId {
    UserId(bytes.try_into().unwrap())
}

async fn stale(checker: &mut FreshnessClient<tonic::transport::Channel>) -> Vec<UserId> {
    let request = v1::ListStaleRequest {
        older_than_ms: u64::MAX,
        ..v1::ListStaleRequest::default()
    };
    let response = checker.list_stale(request).await.unwrap().into_inner();
    let users = response.entries.iter();
    users.map(|entry| user_of(&entry.user)).collect()
}

/// Whoever has seen early data can send it again. It never completes a handshake, so nothing that waits for the end of
/// one is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_in_early_data_is_not_done_before_the_handshake_is_over() {
    let world = World::start().await;
    let device = world.device(1);
    let returning = Returning::new(&world, &device);
    let link = returning.connect(world.addresses().devices).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    link.close();
    live.link().ended().await;

    let relay = Relay::start(world.addresses().devices, 1).unwrap();
    relay.set_weather_down(Weather {
        is_blacked_out: true,
        ..Weather::FAIR
    });
    let (link, accepted) = returning.connect_early(relay.address());
    let mut live = link.open(hello(Lane::Live, epoch)).await;
    live.send(control(1, pause())).await;
    // Early frames are read, and counted, before anything is done about them.
    world
        .metrics_until(|page| 1.0 <= page.value("waypost_frames_received_total{kind=\"control\"}"))
        .await;
    // Everything that was asked of the committer before this is done after it.
    let mut other = world
        .connect(&world.device(2))
        .await
        .open(hello(Lane::Live, 0))
        .await;
    other.welcome().await;
    assert_eq!(world.entry(&device).await.state(), State::Active);

    relay.set_weather_down(Weather::FAIR);
    assert!(accepted.await);
    live.welcome().await;
    let answer = live.next().await;
    assert!(
        matches!(answer, Some(gateway_frame::Kind::ControlResult(result)) if result.id == 1),
        "the control: once the handshake is over it is done"
    );
    assert_eq!(world.entry(&device).await.state(), State::Paused);
}
