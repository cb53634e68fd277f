//! Who is revoked is out: at once, however it comes back, and after a restart; and nobody else is. The files by which
//! the gateway and its peers prove themselves can change while it runs.

use std::{fs, iter, path::PathBuf, process::Command as Program, sync::Arc};

use tonic::Code;
use waypost_gateway::{
    audit::Audit,
    clock::{Clock, system_now_ms},
    commit::{Answer, Bell, CommitConfig, CommitParts, Committer, Mailbox},
    control::{Command, Outcome},
    enrol::invitations::Invitations,
    erase,
    freshness::{Freshness, Grants},
    metrics::Metrics,
    orders::{self, Revoke},
    pki::{Authority, Credentials},
    revocation::Subject,
    sharing::Holders,
    store::{Store, StoreConfig},
    vigil::{Vigil, VigilParts},
};
use waypost_proto::{
    batch::{self, DecodedBatch},
    device::Claim,
    ping::Ping,
    session::{CloseCode, Lane, Request},
    terms::Density,
    v1,
};
use waypost_tests::{
    Attempt, Device, Link, MetricsPage, Process, Relay, Stream, Weather, World, binary, hello,
    link::Returning, ping, revocation_list, stored_seqs,
};

const ACCEPTED: &str = "waypost_pings_total{fate=\"accepted\"}";
const CLOSED: &str = "waypost_connections_closed_total{code=\"revoked\"}";
const REFUSED: &str = "waypost_connections_refused_total{reason=\"revoked\"}";
const REVOKED_DEVICES: &str = "waypost_revocations{of=\"device\"}";
const REVOKED_USERS: &str = "waypost_revocations{of=\"user\"}";
const REVOKED_CERTIFICATES: &str = "waypost_revocations{of=\"certificate\"}";
const RELOADS_FAILED: &str = "waypost_tls_reloads_total{outcome=\"failed\"}";

/// A connection whose device was welcomed, and how far it has come.
struct Live {
    link: Link,
    stream: Stream,
    epoch: u32,
    seq: u64,
}

impl Live {
    async fn begin(world: &World, device: &Device) -> Self {
        Self::on(world.connect(device).await).await
    }

    async fn on(link: Link) -> Self {
        let mut stream = link.open(hello(Lane::Live, 0)).await;
        let epoch = stream.welcome().await.epoch;
        let seq = 0;
        let mut live = Self {
            link,
            stream,
            epoch,
            seq,
        };
        live.goes_on().await;
        live
    }

    /// One more ping is acknowledged.
    async fn goes_on(&mut self) {
        self.seq += 1;
        self.stream.send_pings(self.epoch, &[ping(self.seq)]).await;
        assert_eq!(self.stream.ack().await.durable_upto, self.seq);
    }
}

fn device(device: &Device) -> Subject {
    Subject::Device(device.id)
}

async fn revoke(world: &World, subject: Subject) -> Outcome {
    world.command(Command::Revoke(subject.into())).await
}

async fn lift(world: &World, subject: Subject) -> Outcome {
    world.command(Command::Lift(subject.into())).await
}

/// Turned away, and told why.
async fn is_out(attempt: Attempt) {
    // As far as it knows it may be connected: the gateway looks at who it is when the handshake is over.
    assert_eq!(attempt.unwrap().closed().await, Some(CloseCode::Revoked));
}

async fn is_in(attempt: Attempt) {
    assert!(attempt.is_served().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_is_out_with_whatever_certificate_and_the_others_of_its_user_go_on() {
    let world = World::start().await;
    let lost = world.device(1);
    let (sibling, stranger) = (lost.sibling(&world, 2), world.device(2));
    let ended = Live::begin(&world, &lost).await;
    let mut others = [
        Live::begin(&world, &sibling).await,
        Live::begin(&world, &stranger).await,
    ];
    let done = revoke(&world, device(&lost)).await;
    assert_eq!((done.before_ms, done.ended), (None, 1));
    assert_eq!(ended.link.closed().await, Some(CloseCode::Revoked));
    for other in &mut others {
        other.goes_on().await;
    }
    is_out(world.attempt(Some(&lost.credentials)).await).await;
    let reissued = world.device(1);
    assert_ne!(
        reissued.credentials.certificate_pem,
        lost.credentials.certificate_pem
    );
    is_out(world.attempt(Some(&reissued.credentials)).await).await;
    is_in(world.attempt(Some(&sibling.credentials)).await).await;

    let page = world.metrics_until(|page| page.value(CLOSED) == 1.0).await;
    assert_eq!(
        (page.value(REFUSED), page.value(REVOKED_DEVICES)),
        (2.0, 1.0)
    );
    let again = revoke(&world, device(&lost)).await;
    assert_eq!((again.before_ms, again.ended), (done.now_ms, 0));

    lift(&world, device(&lost)).await;
    is_in(world.attempt(Some(&lost.credentials)).await).await;
    assert_eq!(world.metrics().await.value(REVOKED_DEVICES), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_user_is_out_with_all_devices_also_those_that_were_never_seen() {
    let mut world = World::start().await;
    let first = world.device(1);
    let [second, later] = [2, 3].map(|number| first.sibling(&world, number));
    let stranger = world.device(2);
    let ended = [
        Live::begin(&world, &first).await,
        Live::begin(&world, &second).await,
    ];
    let mut other = Live::begin(&world, &stranger).await;
    let user = Subject::User(first.id.user);
    assert_eq!(revoke(&world, user).await.ended, 2);
    for live in &ended {
        assert_eq!(live.link.closed().await, Some(CloseCode::Revoked));
    }
    other.goes_on().await;
    for device in [&first, &second, &later] {
        is_out(world.attempt(Some(&device.credentials)).await).await;
    }
    world.restart().await;
    assert_eq!(world.metrics().await.value(REVOKED_USERS), 1.0);
    for device in [&first, &second, &later] {
        is_out(world.attempt(Some(&device.credentials)).await).await;
    }
    is_in(world.attempt(Some(&stranger.credentials)).await).await;
    lift(&world, user).await;
    world.restart().await;
    is_in(world.attempt(Some(&first.credentials)).await).await;
    let audit = fs::read_to_string(world.config().data_dir.join("audit.log")).unwrap();
    for what in ["revoked", "revocation_lifted"] {
        let deed = format!(
            "\"who\":\"operator\",\"what\":\"{what}\",\"whose\":{{\"users\":[\"{}\"]}}",
            first.id.user
        );
        assert!(audit.contains(&deed), "{deed} is not in\n{audit}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_not_said_hello_ends_as_well() {
    let world = World::start().await;
    let lost = world.device(1);
    let silent = world.connect(&lost).await;
    // Its session runs, then.
    world
        .metrics_until(|page| page.value("waypost_connections") == 1.0)
        .await;
    assert_eq!(revoke(&world, device(&lost)).await.ended, 1);
    assert_eq!(silent.closed().await, Some(CloseCode::Revoked));
    world.metrics_until(|page| page.value(CLOSED) == 1.0).await;
}

/// A first connection leaves a ticket; then a second one, with a ping in its first packet or after the handshake.
/// Whether the device is revoked in between. What comes of it, and what is stored.
async fn comes_back(is_revoked: bool, is_early: bool) -> (Option<CloseCode>, Vec<u64>) {
    let world = World::start().await;
    let lost = world.device(1);
    let returning = Returning::new(&world, &lost);
    let gateway = world.addresses().devices;
    let first = Live::on(returning.connect(gateway).await).await;
    let epoch = first.epoch;
    first.link.close();
    if is_revoked {
        revoke(&world, device(&lost)).await;
    }
    let link = if is_early {
        returning.connect_early(gateway).0
    } else {
        returning.connect(gateway).await
    };
    let said = async {
        let mut live = link.try_open_raw().await.ok()?;
        let hello = v1::device_frame::Kind::Hello(hello(Lane::Live, epoch));
        let batch = v1::device_frame::Kind::Batch(batch::encode(epoch, &[ping(2)]));
        for kind in [hello, batch] {
            let mut bytes = bytes::BytesMut::new();
            let frame = v1::DeviceFrame { kind: Some(kind) };
            waypost_proto::frame::encode_frame(&frame, &mut bytes);
            live.send_raw_unless_closed(&bytes).await;
        }
        live.next().await?;
        live.next_ack().await
    };
    let code = match said.await {
        Some(ack) => {
            assert_eq!(ack.durable_upto, 2);
            None
        }
        None => Some(link.closed().await.expect("it is told why")),
    };
    let store = world.stop().await;
    let stored = stored_seqs(&store, &lost);
    (code, stored.into_iter().map(|(_, seq)| seq).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_that_resumes_is_out_and_its_early_ping_is_not_stored() {
    for is_early in [false, true] {
        assert_eq!(
            comes_back(true, is_early).await,
            (Some(CloseCode::Revoked), vec![1]),
            "early: {is_early}"
        );
        // The control.
        assert_eq!(
            comes_back(false, is_early).await,
            (None, vec![1, 2]),
            "early: {is_early}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_revoked_in_the_midst_of_its_handshake_is_out() {
    let world = World::start().await;
    let lost = world.device(1);
    let returning = Returning::new(&world, &lost);
    let first = Live::on(returning.connect(world.addresses().devices).await).await;
    first.link.close();
    let relay = Relay::start(world.addresses().devices, 1).unwrap();
    relay.set_weather_down(Weather {
        is_blacked_out: true,
        ..Weather::FAIR
    });
    let (link, accepted) = returning.connect_early(relay.address());
    let mut live = link.open(hello(Lane::Live, first.epoch)).await;
    live.send_pings(first.epoch, &[ping(2)]).await;
    // It is known by then, and its handshake cannot end.
    world
        .metrics_until(|page| page.value(ACCEPTED) == 2.0)
        .await;
    let done = revoke(&world, device(&lost)).await;
    assert_eq!(done.ended, 0, "it was not let in yet");
    relay.set_weather_down(Weather::FAIR);
    accepted.await;
    assert_eq!(link.closed().await, Some(CloseCode::Revoked));
    assert_eq!(live.next().await, None, "it was told nothing else");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_outlives_a_kill_and_is_in_the_log() {
    let mut gateway = Process::start(&[]).await;
    let (lost, other) = (gateway.device(1), gateway.device(2));
    let mut live = Live::on(gateway.connect(&lost).await).await;
    live.goes_on().await;
    let data_dir = gateway.data_dir().display().to_string();
    let user = lost.id.user.to_string();
    let options = ["--user", user.as_str(), "--device", "1", "--json"];
    let run = |options: &[&str]| {
        let said = Program::new(binary("waypost"))
            .args(["revoke", "--data", &data_dir])
            .args(options)
            .output()
            .unwrap();
        let text = String::from_utf8(said.stdout).unwrap();
        assert!(
            said.status.success(),
            "{text}{}",
            String::from_utf8_lossy(&said.stderr)
        );
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    let said = run(&options);
    assert_eq!(
        (&said["is_running"], &said["connections_ended"]),
        (&true.into(), &1.into())
    );
    assert_eq!(live.link.closed().await, Some(CloseCode::Revoked));
    gateway.kill();

    // The socket of the one that was killed is still there. Another user is revoked without a gateway.
    let user_without_gateway = other.id.user.to_string();
    let said = run(&["--user", &user_without_gateway, "--json"]);
    assert_eq!(said["is_running"], false);
    let listed = run(&["--list", "--json"]);
    assert_eq!(listed["revocations"].as_array().unwrap().len(), 2);
    gateway.restart().await;
    is_out(gateway.attempt(Some(&lost.credentials)).await).await;
    is_out(gateway.attempt(Some(&other.credentials)).await).await;
    is_in(gateway.attempt(Some(&gateway.device(3).credentials)).await).await;
    let said = run(&[&options[..], &["--lift"]].concat());
    assert_eq!(said["is_running"], true);
    is_in(gateway.attempt(Some(&lost.credentials)).await).await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let log = gateway.log();
    for said in [
        "it has been revoked",
        &format!("device 1 of user {user}"),
        "the revocation was lifted",
    ] {
        assert!(log.contains(said), "{said} is not in the log:\n{log}");
    }
}

/// A committer alone: what its sessions know does not matter to it.
#[tokio::test(flavor = "multi_thread")]
async fn once_a_revocation_is_on_disk_nothing_of_its_subject_is_stored_whatever_its_session_knows()
{
    let folder = tempfile::tempdir().unwrap();
    let now_ms = system_now_ms();
    let store = Arc::new(Store::open(folder.path(), &StoreConfig::default(), now_ms).unwrap());
    let metrics = Metrics::new();
    let clock = Clock::starting_at(0);
    let freshness = Arc::new(Freshness::restore(
        iter::empty(),
        [],
        Grants::default(),
        clock.now_ms(),
    ));
    let (order, ordered) = orders::queue();
    let (handle, committer) = Committer::new(
        &CommitConfig::default(),
        CommitParts {
            invitations: Invitations::default(),
            store: Arc::clone(&store),
            freshness: Arc::clone(&freshness),
            metrics: metrics.clone(),
            clock,
            devices: iter::empty().collect(),
            holders: Holders::default(),
            checkers: Arc::default(),
            revocations: Arc::default(),
            position: 0,
            retention: StoreConfig::default().retention,
            erase: erase::queue().0,
            audit: Audit::nowhere(&metrics),
            vigil: Vigil::new(VigilParts {
                bulletin: Arc::default(),
                deadlines: Vec::new(),
                max_deadlines: 0,
                start: None,
                metrics,
            }),
            orders: ordered,
            turned_away: Arc::default(),
        },
    );
    let committed = committer.spawn().unwrap();
    let bell = Arc::<Bell>::default();
    let hearing = tokio::spawn({
        let bell = Arc::clone(&bell);
        async move { bell.serve().await }
    });
    let mailbox = Mailbox::new(&bell);
    let id = waypost_proto::id::DeviceId {
        user: waypost_proto::id::UserId([7; 16]),
        device: 1,
    };
    let ask = async |request: Request| {
        let queued = handle.submit(id, Lane::Live, request, None, &mailbox).await;
        queued.unwrap();
        mailbox.take().await.answers.pop().unwrap().1
    };
    let request = |epoch: u32, seq: u64| {
        let pings: Vec<Ping> = vec![ping(seq)];
        let encoded = batch::encode(epoch, &pings);
        Request::Batch {
            columns: prost::Message::encode_to_vec(&encoded),
            batch: DecodedBatch {
                epoch,
                pings,
                malformed: Vec::new(),
            },
            density: Density::default(),
        }
    };
    let Answer::Welcomed(welcomed) = ask(Request::Hello(Claim::default())).await else {
        panic!("no Welcome");
    };
    let epoch = welcomed.epoch;
    assert!(matches!(ask(request(epoch, 1)).await, Answer::Settled(_)));
    let subject = Subject::Device(id);
    let revoked = order
        .revoke(Revoke {
            subject,
            is_lifted: false,
        })
        .await
        .unwrap();
    assert!(revoked.now_ms.is_some());
    assert!(matches!(ask(request(epoch, 2)).await, Answer::Revoked));
    assert!(matches!(ask(Request::Heartbeat).await, Answer::Revoked));
    let claim = Claim {
        epoch,
        ..Claim::default()
    };
    assert!(handle.offer_early(id, claim, request(epoch, 3), &mailbox));
    let early = mailbox.take().await.answers.pop().unwrap().1;
    assert!(matches!(early, Answer::Revoked), "{early:?}");
    // The control.
    order
        .revoke(Revoke {
            subject,
            is_lifted: true,
        })
        .await
        .unwrap();
    assert!(matches!(ask(request(epoch, 4)).await, Answer::Settled(_)));

    drop(handle);
    committed.await.unwrap().unwrap();
    hearing.abort();
    let stored: Vec<u64> = store
        .rows()
        .flat_map(|row| row.unwrap().record.pings)
        .map(|ping| ping.seq)
        .collect();
    assert_eq!(stored, [1, 4]);
    assert_eq!(store.load_revocations().unwrap(), []);
    drop(store);
    let (_, recovered) = World::open_store(folder.path()).load_devices().unwrap();
    assert_eq!(
        recovered.position,
        freshness.head().position,
        "also those of commits that wrote nothing"
    );
}

/// A world that goes by a list of revoked certificates, on which nobody is who is here.
async fn with_list() -> (World, impl Fn(&[&Credentials])) {
    let mut pki = PathBuf::new();
    let mut path = PathBuf::new();
    let world = World::start_with(|config| {
        pki = config.tls.client_ca.parent().unwrap().to_owned();
        path = pki.join("revoked.pem");
        let authority = Authority::open(&pki).unwrap();
        let stranger = authority.issue_checker("stranger").unwrap();
        fs::write(&path, revocation_list(&pki, &[&stranger])).unwrap();
        config.tls.client_crl = Some(path.clone());
    })
    .await;
    let list = move |revoked: &[&Credentials]| {
        fs::write(&path, revocation_list(&pki, revoked)).unwrap();
    };
    (world, list)
}

async fn reloaded(world: &World, outcome: &str, times: u8) -> MetricsPage {
    let series = format!("waypost_tls_reloads_total{{outcome=\"{outcome}\"}}");
    let times = f64::from(times);
    world
        .metrics_until(|page| page.value(&series) == times)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_changes_ends_whom_it_names_and_nobody_else() {
    let (world, list) = with_list().await;
    let (lost, other) = (world.device(1), world.device(2));
    let returning = Returning::new(&world, &lost);
    let ended = Live::on(returning.connect(world.addresses().devices).await).await;
    let mut stays = Live::begin(&world, &other).await;
    assert_eq!(world.metrics().await.value(REVOKED_CERTIFICATES), 1.0);

    let gone = world.device(3);
    list(&[&gone.credentials, &lost.credentials]);
    let page = reloaded(&world, "used", 1).await;
    assert_eq!(page.value(REVOKED_CERTIFICATES), 2.0);
    assert_eq!(ended.link.closed().await, Some(CloseCode::Revoked));
    stays.goes_on().await;
    assert!(
        !world
            .attempt(Some(&lost.credentials))
            .await
            .is_served()
            .await,
        "nor with a full handshake"
    );
    let resumed = returning.connect(world.addresses().devices).await;
    assert_eq!(resumed.closed().await, Some(CloseCode::Revoked));
    let page = world.metrics_until(|page| page.value(REFUSED) == 2.0).await;
    assert_eq!(page.value(CLOSED), 1.0);
    // It is a certificate that is revoked here, and not the device.
    is_in(world.attempt(Some(&world.device(1).credentials)).await).await;

    // The control: a list that changes, and names nobody who is here.
    list(&[&lost.credentials]);
    let page = reloaded(&world, "used", 2).await;
    assert_eq!(
        (page.value(REVOKED_CERTIFICATES), page.value(CLOSED)),
        (1.0, 1.0)
    );
    stays.goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_cannot_be_read_changes_nothing() {
    let (world, list) = with_list().await;
    let (lost, other) = (world.device(1), world.device(2));
    let mut stays = Live::begin(&world, &other).await;
    list(&[&lost.credentials]);
    reloaded(&world, "used", 1).await;
    let path = world.config().tls.client_crl.clone().unwrap();
    fs::write(&path, "torn").unwrap();
    reloaded(&world, "failed", 1).await;
    // In the authority's name, and signed with another key.
    let forger = world.scratch("forger");
    fs::create_dir(&forger).unwrap();
    fs::copy(world.scratch("pki").join("ca.pem"), forger.join("ca.pem")).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    fs::write(forger.join("ca.key"), key.serialize_pem()).unwrap();
    fs::write(&path, revocation_list(&forger, &[&other.credentials])).unwrap();
    reloaded(&world, "failed", 2).await;
    fs::remove_file(&path).unwrap();
    let page = reloaded(&world, "failed", 3).await;
    assert_eq!(page.value(REVOKED_CERTIFICATES), 1.0);
    assert!(
        !world
            .attempt(Some(&lost.credentials))
            .await
            .is_served()
            .await
    );
    is_in(world.attempt(Some(&world.device(3).credentials)).await).await;
    stays.goes_on().await;
    // The control: one that can be read.
    list(&[&other.credentials]);
    reloaded(&world, "used", 2).await;
    assert_eq!(stays.link.closed().await, Some(CloseCode::Revoked));
    is_in(world.attempt(Some(&lost.credentials)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checker_whose_certificate_is_listed_is_told_nothing_more() {
    let (world, list) = with_list().await;
    let [lost, other] = [(); 2].map(|()| world.authority.issue_checker("dev").unwrap());
    let mut ended = world.checker_with(&lost).await;
    let mut stays = world.checker_with(&other).await;
    let watch = v1::WatchRequest::default();
    let mut told = ended.watch(watch.clone()).await.unwrap().into_inner();
    let mut told_too = stays.watch(watch).await.unwrap().into_inner();
    assert!(told.message().await.unwrap().is_some());
    list(&[&lost]);
    reloaded(&world, "used", 1).await;
    let end = waypost_tests::until(async || told.message().await.err()).await;
    assert_eq!(end.code(), Code::PermissionDenied, "{end}");
    let refused = ended.get(v1::GetRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(told_too.message().await.unwrap().is_some());
    stays.get(v1::GetRequest::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn newcomers_see_a_new_certificate_and_those_who_are_there_go_on() {
    let world = World::start().await;
    let mut before = Live::begin(&world, &world.device(1)).await;
    let pki = world.scratch("pki");
    let renewed = world.authority.issue_server(&["localhost"]).unwrap();
    fs::write(pki.join("server.pem"), &renewed.certificate_pem).unwrap();
    fs::write(pki.join("server.key"), &renewed.private_key_pem).unwrap();
    reloaded(&world, "used", 1).await;
    before.goes_on().await;
    let mut after = Live::begin(&world, &world.device(2)).await;
    assert_eq!(after.link.gateway_certificate(), *renewed.certificate_der());
    assert_ne!(
        before.link.gateway_certificate(),
        *renewed.certificate_der()
    );

    // What cannot be used changes nothing.
    fs::write(pki.join("server.pem"), "torn").unwrap();
    reloaded(&world, "failed", 1).await;
    for live in [&mut before, &mut after] {
        live.goes_on().await;
    }
    let last = Live::begin(&world, &world.device(3)).await;
    assert_eq!(last.link.gateway_certificate(), *renewed.certificate_der());
    assert_eq!(world.metrics().await.value(CLOSED), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_further_authority_is_known_without_a_restart_and_one_that_is_gone_no_more() {
    let world = World::start().await;
    let mut before = Live::begin(&world, &world.device(1)).await;
    let other = World::authority_in(&world.scratch("other"));
    let foreign = other.issue_device(world.device(2).id).unwrap();
    // The control.
    assert!(!world.attempt(Some(&foreign)).await.is_served().await);
    let both = [world.authority.certificate_pem(), other.certificate_pem()].concat();
    let path = &world.config().tls.client_ca;
    fs::write(path, both).unwrap();
    reloaded(&world, "used", 1).await;
    is_in(world.attempt(Some(&foreign)).await).await;

    let returning = Returning::new(&world, &world.device(3));
    let first = Live::on(returning.connect(world.addresses().devices).await).await;
    first.link.close();
    fs::write(path, other.certificate_pem()).unwrap();
    reloaded(&world, "used", 2).await;
    before.goes_on().await;
    let resumed = returning.connect(world.addresses().devices).await;
    assert_eq!(
        resumed.closed().await,
        Some(CloseCode::BadIdentity),
        "nor by resuming"
    );
    is_in(world.attempt(Some(&foreign)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_cannot_be_used_are_said_in_the_log() {
    let mut gateway = Process::start(&[]).await;
    fs::write(gateway.data_dir().join("pki/ca.pem"), "torn").unwrap();
    gateway
        .metrics_until(|page| page.value(RELOADS_FAILED) == 1.0)
        .await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let log = gateway.log();
    assert!(
        log.contains("those before stay in use") && log.contains("[tls] client_ca"),
        "{log}"
    );
}
