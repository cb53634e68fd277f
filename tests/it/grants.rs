//! A checker is told of those only who have granted it, from the code that a holder redeems to the withdrawal on the
//! device, in every call alike.

use bytes::Bytes;
use tonic::{Code, transport::Channel};
use waypost_checker::rpc::freshness_client::FreshnessClient;
use waypost_gateway::config::Config;
use waypost_proto::{
    id::UserId,
    session::Lane,
    v1::{
        self, DeadlineSetting, Entry, GetRequest, InviteRequest, ListDeadlinesRequest,
        ListStaleRequest, SetDeadlinesRequest, State, Transition, WatchRequest, control,
        control_result::Outcome, deadline, device_frame, watch_event::Kind,
    },
};
use waypost_tests::{
    Stream, World, hello,
    newcomer::{Newcomer, issued},
    ping,
};

/// Two checkers whom nobody has granted.
fn two_checkers(config: &mut Config) {
    config.freshness.checkers = vec!["dev".to_owned(), "night".to_owned()];
    config.freshness.are_checkers_granted = false;
}

async fn start() -> World {
    World::start_with(|config| {
        two_checkers(config);
        let ca = config.tls.client_ca.clone();
        config.enrolment.ca_key = Some(ca.with_extension("key"));
        config.enrolment.ca_certificate = Some(ca);
        config.enrolment.operators = vec!["office".to_owned()];
    })
    .await
}

fn show() -> control::Action {
    control::Action::ShowCheckers(control::ShowCheckers {})
}

fn grant(name: &str) -> control::Action {
    control::Action::GrantChecker(control::GrantChecker { name: name.into() })
}

fn withdraw(name: &str) -> control::Action {
    control::Action::WithdrawChecker(control::WithdrawChecker { name: name.into() })
}

/// Has it done, and says which checkers may be told then, and which could once.
async fn ask(stream: &mut Stream, action: control::Action) -> (Vec<String>, Vec<String>) {
    let result = stream.asked(1, action).await;
    assert_eq!(result.outcome(), Outcome::Done);
    let of = |is_granted: bool| {
        let checkers = result.checkers.iter();
        checkers
            .filter(|checker| (checker.withdrawn_ms == 0) == is_granted)
            .map(|checker| checker.name.clone())
            .collect()
    };
    (of(true), of(false))
}

async fn heard(stream: &mut Stream) -> u64 {
    stream
        .send(device_frame::Kind::Heartbeat(v1::Heartbeat {}))
        .await;
    stream.ack().await.position
}

async fn live(world: &World, device: &waypost_tests::Device) -> Stream {
    let link = world.connect(device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    live
}

fn id(user: UserId) -> Bytes {
    Bytes::copy_from_slice(&user.0)
}

/// One of the two, as it calls.
struct Checker {
    calls: FreshnessClient<Channel>,
    name: &'static str,
}

impl Checker {
    async fn of(world: &World, name: &'static str) -> Self {
        let credentials = world.authority.issue_checker(name).unwrap();
        let calls = world.checker_with(&credentials).await;
        Self { calls, name }
    }

    async fn get(&mut self, user: UserId) -> Entry {
        let user_ids = vec![id(user)];
        let response = self.calls.get(GetRequest { user_ids }).await.unwrap();
        response.into_inner().entries.remove(0)
    }

    /// Everybody who was not heard until now: all who may be seen.
    async fn silent(&mut self) -> Vec<Bytes> {
        let request = ListStaleRequest {
            older_than_ms: u64::MAX,
            ..ListStaleRequest::default()
        };
        let response = self.calls.list_stale(request).await.unwrap().into_inner();
        response
            .entries
            .into_iter()
            .map(|entry| entry.user)
            .collect()
    }

    async fn expect(&mut self, user: UserId, expect_every_ms: u64) -> Result<u64, tonic::Status> {
        let deadlines = vec![DeadlineSetting {
            user: id(user),
            expect_every_ms,
            grace_ms: 0,
        }];
        let set = self.calls.set_deadlines(SetDeadlinesRequest { deadlines });
        set.await.map(|set| set.into_inner().position)
    }

    async fn deadlines(&mut self) -> Vec<Bytes> {
        let listed = self.calls.list_deadlines(ListDeadlinesRequest::default());
        let deadlines = listed.await.unwrap().into_inner().deadlines.into_iter();
        deadlines
            .map(|deadline| deadline.setting.unwrap().user)
            .collect()
    }

    /// Nothing is told of a user, in no call, but that it was withdrawn, or not even that.
    async fn is_told_nothing(&mut self, user: UserId, state: State) {
        let name = self.name;
        let nothing = Entry {
            user: id(user),
            state: state.into(),
            ..Entry::default()
        };
        assert_eq!(self.get(user).await, nothing, "{name}");
        assert!(!self.silent().await.contains(&id(user)), "{name}");
        assert!(!self.deadlines().await.contains(&id(user)), "{name}");
        let refused = self.expect(user, 60_000).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{name}: {refused}");
        let mut watching = Watching::begin(self, &Bytes::new()).await;
        assert_eq!(watching.of(user, 0).await, Told::default(), "{name}");
    }
}

/// A stream, and what came on it since it was looked at last.
struct Watching {
    stream: tonic::Streaming<v1::WatchResponse>,
    token: Bytes,
    came: Vec<Kind>,
}

/// What came of a user.
#[derive(Debug, Default, PartialEq)]
struct Told {
    entries: Vec<Entry>,
    transitions: Vec<Transition>,
    deadlines: Vec<deadline::Kind>,
}

impl Told {
    fn states(&self) -> Vec<State> {
        self.entries.iter().map(Entry::state).collect()
    }
}

impl Watching {
    async fn begin(checker: &mut Checker, token: &Bytes) -> Self {
        let request = WatchRequest {
            token: token.clone(),
            ..WatchRequest::default()
        };
        Self {
            stream: checker.calls.watch(request).await.unwrap().into_inner(),
            token: Bytes::new(),
            came: Vec::new(),
        }
    }

    /// What came of a user, up to the announcement of a position.
    async fn of(&mut self, user: UserId, position: u64) -> Told {
        while !self.came.iter().any(|kind| match kind {
            Kind::Progress(progress) => position <= progress.position,
            _ => false,
        }) {
            self.more().await;
        }
        let mut told = Told::default();
        for kind in self.came.drain(..) {
            match kind {
                Kind::Entry(entry) if entry.user == user.0[..] => told.entries.push(entry),
                Kind::Transition(transition) if transition.user == user.0[..] => {
                    told.transitions.push(transition);
                }
                Kind::Deadline(deadline) if deadline.user == user.0[..] => {
                    told.deadlines.push(deadline.kind());
                }
                Kind::Progress(progress) => self.token = progress.token,
                Kind::SnapshotEnd(end) => self.token = end.token,
                Kind::Reset(reset) => panic!("{reset:?}"),
                _ => {}
            }
        }
        told
    }

    /// Waits for a user to be called late.
    async fn until_late(&mut self, user: UserId) {
        while !self.came.iter().any(|kind| match kind {
            Kind::Deadline(event) => event.user == user.0[..],
            _ => false,
        }) {
            self.more().await;
        }
    }

    async fn more(&mut self) {
        let message = self.stream.message().await.unwrap().unwrap();
        let events = message.events.into_iter();
        self.came.extend(events.map(|event| event.kind.unwrap()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_an_invitation_names_is_told_of_the_user_and_nobody_else() {
    let world = start().await;
    let (mut dev, mut night) = (
        Checker::of(&world, "dev").await,
        Checker::of(&world, "night").await,
    );
    let unknown = world.invite(InviteRequest {
        checkers: vec!["dev".to_owned(), "nobody".to_owned()],
        ..InviteRequest::default()
    });
    assert_eq!(unknown.await.unwrap_err().code(), Code::InvalidArgument);
    let invitation = InviteRequest {
        checkers: vec!["dev".to_owned()],
        ..InviteRequest::default()
    };
    let invited = world.invite(invitation.clone()).await.unwrap();
    assert!(
        invited.uri.contains("&checkers=dev&code="),
        "{}",
        invited.uri
    );
    let user = UserId(invited.user[..].try_into().unwrap());
    // Whoever has not agreed yet is not there yet.
    dev.is_told_nothing(user, State::NeverSeen).await;
    let newcomer = Newcomer::new();
    for _ in 0..2 {
        let response = world.redeem(&newcomer, &invited.code).await;
        assert_eq!(issued(response).checkers, ["dev"]);
    }
    // From now on the checker may expect the user, who was never heard.
    dev.expect(user, 60_000).await.unwrap();
    assert_eq!(dev.get(user).await.state(), State::NeverSeen);
    night.is_told_nothing(user, State::NeverSeen).await;
    let enrolled = newcomer.with(issued(world.redeem(&newcomer, &invited.code).await));
    let link = world.connect_enrolled(&enrolled).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    live.ack().await;
    assert_eq!(dev.get(user).await.state(), State::Active);
    assert_eq!(dev.silent().await, [id(user)]);
    night.is_told_nothing(user, State::NeverSeen).await;
    let granted = live.asked(1, show()).await.checkers;
    assert_eq!((granted.len(), &*granted[0].name), (1, "dev"));
    assert!(0 < granted[0].granted_ms && granted[0].withdrawn_ms == 0);

    // What the holder has withdrawn, no invitation brings back; what is new, it does.
    ask(&mut live, withdraw("dev")).await;
    let further = world.invite(InviteRequest {
        user: invited.user,
        checkers: vec!["night".to_owned(), "dev".to_owned()],
        ..InviteRequest::default()
    });
    let code = further.await.unwrap().code;
    let response = world.redeem(&Newcomer::new(), &code).await;
    assert_eq!(issued(response).checkers, ["night"]);
    assert_eq!(night.get(user).await.state(), State::Active);
    dev.is_told_nothing(user, State::Withdrawn).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_shows_a_user_to_one_checker_and_a_withdrawal_is_told_once_and_lasts() {
    let mut world = start().await;
    let device = world.device(1);
    let user = device.id.user;
    let mut stream = live(&world, &device).await;
    let (mut dev, mut night) = (
        Checker::of(&world, "dev").await,
        Checker::of(&world, "night").await,
    );
    for checker in [&mut dev, &mut night] {
        checker.is_told_nothing(user, State::NeverSeen).await;
    }
    let mut watching = Watching::begin(&mut dev, &Bytes::new()).await;
    watching.of(user, 0).await;
    for (name, outcome) in [
        ("nobody", Outcome::UnknownChecker),
        ("", Outcome::UnknownChecker),
    ] {
        assert_eq!(stream.control(1, grant(name)).await, outcome);
        assert_eq!(stream.control(1, withdraw(name)).await, outcome);
    }
    assert_eq!(ask(&mut stream, show()).await, (vec![], vec![]));
    for name in ["night", "dev", "dev"] {
        ask(&mut stream, grant(name)).await;
    }
    let position = heard(&mut stream).await;
    let told = watching.of(user, position).await;
    assert!(
        !told.entries.is_empty() && told.transitions.is_empty(),
        "{told:?}"
    );
    assert!(told.states().iter().all(|&state| state == State::Active));
    dev.expect(user, 3_600_000).await.unwrap();
    let before = watching.token.clone();

    // From another device of the user.
    let second = device.sibling(&world, 2);
    let mut sibling = live(&world, &second).await;
    let all = (vec!["dev".to_owned(), "night".to_owned()], vec![]);
    assert_eq!(ask(&mut sibling, show()).await, all);
    let one = (vec!["night".to_owned()], vec!["dev".to_owned()]);
    for _ in 0..2 {
        assert_eq!(ask(&mut sibling, withdraw("dev")).await, one);
    }
    let position = heard(&mut stream).await;
    let told = watching.of(user, position).await;
    let [.., last] = &told.entries[..] else {
        panic!("{told:?}")
    };
    let withdrawn = Entry {
        user: id(user),
        state: State::Withdrawn.into(),
        position: last.position,
        ..Entry::default()
    };
    assert_eq!(*last, withdrawn, "{told:?}");
    let times = told
        .states()
        .iter()
        .filter(|&&state| state == State::Withdrawn)
        .count();
    assert_eq!((times, told.transitions.len()), (1, 1), "{told:?}");
    assert_eq!(told.transitions[0].state(), State::Withdrawn);
    let after = watching.token.clone();
    let position = heard(&mut stream).await;
    assert_eq!(watching.of(user, position).await, Told::default());
    dev.is_told_nothing(user, State::Withdrawn).await;
    assert_eq!(night.get(user).await.state(), State::Active);

    for is_restarted in [false, true] {
        if is_restarted {
            world.restart().await;
            dev = Checker::of(&world, "dev").await;
            night = Checker::of(&world, "night").await;
            stream = live(&world, &device).await;
        }
        let position = heard(&mut stream).await;
        let told = Watching::begin(&mut dev, &before)
            .await
            .of(user, position)
            .await;
        assert_eq!(
            (told.entries, told.transitions.len()),
            (vec![withdrawn.clone()], 1)
        );
        let told = Watching::begin(&mut dev, &after)
            .await
            .of(user, position)
            .await;
        assert_eq!(told, Told::default());
        dev.is_told_nothing(user, State::Withdrawn).await;
        assert_eq!(night.get(user).await.state(), State::Active);
    }
    let mut watching = Watching::begin(&mut dev, &after).await;
    ask(&mut stream, grant("dev")).await;
    let position = heard(&mut stream).await;
    let told = watching.of(user, position).await;
    assert!(told.states().contains(&State::Active), "{told:?}");
    assert_eq!(
        dev.deadlines().await,
        Vec::<Bytes>::new(),
        "it is to be set anew"
    );
    dev.expect(user, 3_600_000).await.unwrap();
    let page = world.metrics().await;
    assert_eq!(
        page.value("waypost_freshness_transitions_total{state=\"granted\"}"),
        1.0
    );
}

/// What was called late is called off for one who may be told again, and for nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_goes_with_its_grant_and_nobody_stays_late_by_it() {
    let world = start().await;
    let device = world.device(1);
    let user = device.id.user;
    let mut stream = live(&world, &device).await;
    ask(&mut stream, grant("dev")).await;
    let mut dev = Checker::of(&world, "dev").await;
    let mut watching = Watching::begin(&mut dev, &Bytes::new()).await;
    let position = dev.expect(user, 1).await.unwrap();
    watching.until_late(user).await;
    watching.of(user, position).await;
    let token = watching.token.clone();
    ask(&mut stream, withdraw("dev")).await;
    let position = heard(&mut stream).await;
    // The contact came first, so it may have called that off before.
    watching.of(user, position).await;
    dev.is_told_nothing(user, State::Withdrawn).await;
    let told = Watching::begin(&mut dev, &token)
        .await
        .of(user, position)
        .await;
    assert_eq!(told.deadlines, [], "nothing more is told");
    ask(&mut stream, grant("dev")).await;
    let position = heard(&mut stream).await;
    // To a stream that is told of both at once, the user is not late at the end.
    let told = Watching::begin(&mut dev, &token)
        .await
        .of(user, position)
        .await;
    assert_ne!(
        told.deadlines.last(),
        Some(&deadline::Kind::Late),
        "{told:?}"
    );
    let told = Watching::begin(&mut dev, &Bytes::new())
        .await
        .of(user, position)
        .await;
    assert_eq!(told.deadlines, [], "nobody is late");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_holder_has_paused_grants_change_and_no_other_checker_sees_that() {
    let world = start().await;
    let device = world.device(1);
    let user = device.id.user;
    let mut stream = live(&world, &device).await;
    let mut other = live(&world, &world.device(9)).await;
    ask(&mut stream, grant("night")).await;
    let pause = control::Action::Pause(control::Pause {});
    assert_eq!(stream.control(2, pause).await, Outcome::Done);
    let (mut dev, mut night) = (
        Checker::of(&world, "dev").await,
        Checker::of(&world, "night").await,
    );
    let mut dev_watching = Watching::begin(&mut dev, &Bytes::new()).await;
    let mut night_watching = Watching::begin(&mut night, &Bytes::new()).await;
    let position = heard(&mut other).await;
    assert_eq!(dev_watching.of(user, position).await, Told::default());
    let told = night_watching.of(user, position).await;
    assert_eq!(told.states(), [State::Paused]);

    ask(&mut stream, grant("dev")).await;
    let position = heard(&mut other).await;
    let shown = dev_watching.of(user, position).await;
    assert_eq!(shown.states(), [State::Paused]);
    let hidden = Entry {
        position: shown.entries[0].position,
        ..told.entries[0].clone()
    };
    assert_eq!(shown.entries, [hidden], "as it stood when the pause began");
    ask(&mut stream, withdraw("dev")).await;
    let position = heard(&mut other).await;
    let withdrawn = dev_watching.of(user, position).await;
    assert_eq!(withdrawn.states(), [State::Withdrawn]);
    let seen = night_watching.of(user, position).await;
    assert_eq!(seen, Told::default(), "nothing moves");
    dev.is_told_nothing(user, State::Withdrawn).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_is_told_to_those_who_could_be_told_then_and_leaves_no_decision() {
    let mut world = start().await;
    let device = world.device(1);
    let user = device.id.user;
    let mut stream = live(&world, &device).await;
    for action in [grant("night"), grant("dev"), withdraw("dev")] {
        ask(&mut stream, action).await;
    }
    let (mut dev, mut night) = (
        Checker::of(&world, "dev").await,
        Checker::of(&world, "night").await,
    );
    let (mut dev_watching, mut night_watching) = (
        Watching::begin(&mut dev, &Bytes::new()).await,
        Watching::begin(&mut night, &Bytes::new()).await,
    );
    let position = heard(&mut stream).await;
    assert_eq!(dev_watching.of(user, position).await, Told::default());
    night_watching.of(user, position).await;
    let erase = control::Action::Erase(control::Erase {});
    let receipt = stream.asked(3, erase).await.receipt.unwrap();
    let told = night_watching.of(user, receipt.position).await;
    assert_eq!(told.states(), [State::Erased]);
    assert_eq!(
        dev_watching.of(user, receipt.position).await,
        Told::default()
    );
    for is_restarted in [false, true] {
        if is_restarted {
            world.restart().await;
            dev = Checker::of(&world, "dev").await;
            night = Checker::of(&world, "night").await;
        }
        assert_eq!(night.get(user).await.state(), State::Erased);
        assert_eq!(dev.get(user).await.state(), State::NeverSeen);
    }
    let store = world.stop().await;
    assert!(store.decisions_of(user).unwrap().as_slice().is_empty());
}

/// As with `--dev`: everybody has granted the checkers of the settings, until the holder says otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn what_everybody_has_granted_a_holder_withdraws_for_good() {
    let mut world = World::start().await;
    let device = world.device(1);
    let mut stream = live(&world, &device).await;
    let granted = stream.asked(1, show()).await.checkers;
    assert_eq!((&*granted[0].name, granted[0].granted_ms), ("dev", 0));
    assert_eq!(world.entry(&device).await.state(), State::Active);
    ask(&mut stream, withdraw("dev")).await;
    assert_eq!(world.entry(&device).await.state(), State::Withdrawn);
    world.restart().await;
    assert_eq!(world.entry(&device).await.state(), State::Withdrawn);
    let mut stream = live(&world, &device).await;
    ask(&mut stream, grant("dev")).await;
    assert_eq!(world.entry(&device).await.state(), State::Active);

    world
        .metrics_until(|page| page.value("waypost_audit_entries_total") == 2.0)
        .await;
    let audit = std::fs::read_to_string(world.config().data_dir.join("audit.log")).unwrap();
    for what in ["withdrawn", "granted"] {
        let deed = format!(
            r#""who":{{"holder":"{}"}},"what":{{"{what}":"dev"}}"#,
            device.id
        );
        assert_eq!(audit.matches(&deed).count(), 1, "{audit}");
    }
}
