//! The freshness service over real TLS on loopback, with certificates made here.

use std::{collections::BTreeMap, os::fd::AsRawFd, thread};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustc_hash::FxHashMap;
use tokio::{
    io::AsyncWriteExt,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{Code, Status, Streaming, transport::Channel};
use waypost_proto::{
    device::Clocks,
    id::UserId,
    v1::{
        self, Coverage, Deadline, DeadlineSetting, Entry, GetRequest, Header, ListDeadlinesRequest,
        ListStaleRequest, Progress, SetDeadlinesRequest, State, WatchEvent, WatchRequest,
        WatchResponse, coverage, deadline, reset, watch_event::Kind,
    },
};

use bytes::Bytes;

use crate::{
    bulletin::News,
    clock::system_now_ms,
    commit::{CommitConfig, CommitParts, Committer},
    coverage::{Reason, Span},
    deadlines::{self, Checker, Event, Late, Registration, Setting},
    enrol::invitations::Invitations,
    erase,
    freshness::Grants,
    grants::CheckerNumber,
    orders::{self, Order, Orders},
    revocation::Revocations,
    sharing::{Holders, Transition, Turn},
    store::{Batch, StoreConfig},
    tls::{TlsConfig, freshness_server_config},
    vigil::{Vigil, VigilParts},
};

use waypost_checker::{Config, connect, rpc::freshness_client::FreshnessClient};

use super::*;

const TRUST_DOMAIN: &str = "test.waypost";
const OPS: &str = "spiffe://test.waypost/checker/ops";
const INCARNATION: [u8; 16] = [7; 16];

/// Certificates for one test.
struct Pki {
    authority: Issuer<'static, KeyPair>,
    ca_pem: String,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca_pem = params.self_signed(&key).unwrap().pem();
        Self {
            authority: Issuer::new(params, key),
            ca_pem,
        }
    }

    fn issue(&self, name: SanType) -> (String, String) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![name];
        let key = KeyPair::generate().unwrap();
        (
            params.signed_by(&key, &self.authority).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

/// A served index.
struct Harness {
    pki: Pki,
    address: String,
    freshness: Arc<Freshness>,
    bulletin: Arc<Bulletin>,
    store: Arc<Store>,
    orders: Orders,
    _folder: tempfile::TempDir,
    metrics: Metrics,
    cancel: CancellationToken,
    running: JoinHandle<()>,
}

impl Harness {
    fn start() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut FreshnessConfig)) -> Self {
        Self::with_patience(PEER_PATIENCE, change)
    }

    fn with_patience(patience: Duration, change: impl FnOnce(&mut FreshnessConfig)) -> Self {
        let mut config = FreshnessConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            checkers: vec!["ops".to_owned(), "night".to_owned()],
            progress_interval: Duration::from_millis(10),
            ..FreshnessConfig::default()
        };
        change(&mut config);
        let pki = Pki::new();
        let (certificate, key) = pki.issue(SanType::DnsName("localhost".try_into().unwrap()));
        let files = tempfile::tempdir().unwrap();
        let file = |name, text: &str| {
            let path = files.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let tls = freshness_server_config(&TlsConfig {
            certificate: file("server.pem", &certificate),
            private_key: file("server.key", &key),
            client_ca: file("ca.pem", &pki.ca_pem),
            trust_domain: TRUST_DOMAIN.to_owned(),
            ..TlsConfig::default()
        })
        .unwrap();
        let checkers = Checkers::granted_by_all(config.checkers.clone());
        let grants = Grants::everything();
        let freshness = Arc::new(Freshness::restore(std::iter::empty(), [], grants, 0));
        let bulletin = Arc::new(Bulletin::default());
        let store = Store::open(files.path(), &StoreConfig::default(), system_now_ms()).unwrap();
        let store = Arc::new(store);
        let (order, orders) = orders::queue();
        let revocations = Arc::<Revocations>::default();
        let metrics = Metrics::new();
        let parts = FeedParts {
            trust_domain: TRUST_DOMAIN.to_owned(),
            freshness: Arc::clone(&freshness),
            bulletin: Arc::clone(&bulletin),
            store: Arc::downgrade(&store),
            order,
            checkers: Arc::new(checkers),
            inviter: None,
            revocations: Arc::clone(&revocations),
            incarnation: INCARNATION,
            token_key: [9; 32],
            clock: Clock::starting_at(0),
            readiness: Readiness::starting(),
            audit: Audit::start(files.path(), 0, &metrics).unwrap().0,
            metrics: metrics.clone(),
        };
        let mut feed = Feed::bind(&config, watch::channel(tls).1, parts).unwrap();
        feed.peer_patience = patience;
        let address = format!("https://{}", feed.local_addr());
        let cancel = CancellationToken::new();
        let running = tokio::spawn(feed.run(cancel.clone()));
        Self {
            pki,
            address,
            freshness,
            bulletin,
            store,
            orders,
            _folder: files,
            metrics,
            cancel,
            running,
        }
    }

    async fn client(&self, uri: &str) -> FreshnessClient<Channel> {
        connect(&self.config(&self.address, uri)).await.unwrap()
    }

    fn config(&self, address: &str, uri: &str) -> Config {
        let (certificate, key) = self.pki.issue(SanType::URI(uri.try_into().unwrap()));
        Config::new(address, &self.pki.ca_pem, certificate, key, "localhost")
    }

    async fn watch(&self, token: &Bytes) -> Watching {
        let request = WatchRequest {
            token: token.clone(),
            ..WatchRequest::default()
        };
        Watching::begin(self.client(OPS).await, request)
            .await
            .unwrap()
    }

    fn publish(&self, position: u64, users: &[u8]) {
        let changes: Vec<_> = users.iter().map(|&n| (user(n), heard(position))).collect();
        self.freshness.publish(position, position, &changes, &[]);
    }

    /// Says something at a position of its own, as the committer does.
    fn say(&self, position: u64, news: &News) {
        let mut batch = Batch::default();
        batch.put_position(position);
        batch.put_news(news);
        self.store.commit(batch).unwrap();
        self.bulletin.publish(news);
        let turned = &news.transitions;
        self.freshness.publish(position, position, &[], turned);
    }

    fn say_span(&self, position: u64, from_ms: u64, until_ms: Option<u64>) {
        let span = Span {
            from_ms,
            until_ms,
            reason: Reason::Down,
            position,
        };
        let change = self
            .bulletin
            .coverage(|coverage| coverage.change(vec![span]));
        self.say(
            position,
            &News {
                coverage: Some(change),
                ..News::default()
            },
        );
    }

    /// Calls users of a checker late, or lets them recover.
    async fn next_order(
        &mut self,
    ) -> (orders::SetDeadlines, orders::Reply<u64, deadlines::NotSet>) {
        match self.orders.next().await {
            Order::SetDeadlines(order, reply) => (order, reply),
            other => panic!("no checker has ordered {other:?}"),
        }
    }

    fn say_late(&self, position: u64, checker: &str, users: &[u8], kind: deadlines::Kind) {
        self.say_late_at(position + 1, position, checker, users, kind);
    }

    fn say_late_at(
        &self,
        at_ms: u64,
        position: u64,
        checker: &str,
        users: &[u8],
        kind: deadlines::Kind,
    ) {
        let mut changes = Vec::new();
        for &n in users {
            let event = Event {
                checker: Checker::named(checker),
                user: user(n),
                kind,
                position,
                at_ms,
                last_contact_ms: 2,
                due_ms: 3,
            };
            let late = Late {
                position,
                at_ms: event.at_ms,
                last_contact_ms: 2,
                due_ms: 3,
            };
            changes.push(deadlines::Change::Set(Registration {
                checker: event.checker,
                user: event.user,
                setting: Setting {
                    expect_every_ms: 60_000,
                    grace_ms: 30_000,
                },
                since_ms: 1,
                late: (kind == deadlines::Kind::Late).then_some(late),
            }));
            changes.push(deadlines::Change::Event(event));
        }
        self.say(
            position,
            &News {
                deadlines: changes,
                ..News::default()
            },
        );
    }

    /// Whether a checker that connects now is answered. It may learn only from the first answer that it
    /// is not.
    async fn serves_another(&self) -> bool {
        match connect(&self.config(&self.address, OPS)).await {
            Ok(mut client) => client.get(GetRequest::default()).await.is_ok(),
            Err(_) => false,
        }
    }

    fn metric(&self, line: &str) -> bool {
        self.metrics
            .render()
            .lines()
            .any(|rendered| rendered == line)
    }
}

/// A stream, taken apart into its events.
struct Watching {
    // Dropping the client would close its connection.
    _client: FreshnessClient<Channel>,
    stream: Streaming<WatchResponse>,
    events: std::vec::IntoIter<WatchEvent>,
}

impl Watching {
    async fn begin(
        mut client: FreshnessClient<Channel>,
        request: WatchRequest,
    ) -> Result<Self, Status> {
        let stream = client.watch(request).await?.into_inner();
        Ok(Self {
            _client: client,
            stream,
            events: Vec::new().into_iter(),
        })
    }

    async fn next(&mut self) -> Result<Kind, Status> {
        loop {
            if let Some(event) = self.events.next() {
                return Ok(event.kind.unwrap());
            }
            let message = self
                .stream
                .message()
                .await?
                .expect("a stream has no end of its own");
            self.events = message.events.into_iter();
        }
    }

    async fn header(&mut self) -> Header {
        match self.next().await.unwrap() {
            Kind::Header(header) => header,
            other => panic!("a header comes first, not {other:?}"),
        }
    }

    /// The entries up to the end of the snapshot, by user, and the token there.
    async fn snapshot(&mut self) -> (Vec<Entry>, u64, Bytes) {
        let mut entries = Vec::new();
        loop {
            match self.next().await.unwrap() {
                Kind::Entry(entry) => entries.push(entry),
                Kind::SnapshotEnd(end) => {
                    assert_eq!(end.count, entries.len() as u64);
                    entries.sort_by(|a, b| a.user.cmp(&b.user));
                    return (entries, end.position, end.token);
                }
                other => panic!("{other:?} in a snapshot"),
            }
        }
    }

    /// Everything up to the end of the snapshot or the progress that reaches `position`, but for the header and
    /// other progress.
    async fn all_until(&mut self, position: u64) -> (Vec<Kind>, Bytes) {
        let mut told = Vec::new();
        loop {
            match self.next().await.unwrap() {
                Kind::Header(_) => {}
                Kind::SnapshotEnd(end) if position <= end.position => return (told, end.token),
                Kind::Progress(progress) if position <= progress.position => {
                    return (told, progress.token);
                }
                Kind::Progress(_) => {}
                other => told.push(other),
            }
        }
    }

    /// The entries up to the progress that reaches `position`.
    async fn until(&mut self, position: u64) -> (Vec<Entry>, Progress) {
        let mut entries = Vec::new();
        loop {
            match self.next().await.unwrap() {
                Kind::Entry(entry) => entries.push(entry),
                Kind::Progress(progress) if position <= progress.position => {
                    return (entries, progress);
                }
                Kind::Progress(_) => {}
                other => panic!("{other:?} among changes"),
            }
        }
    }
}

fn user(n: u8) -> UserId {
    UserId([n; 16])
}

fn heard(at_ms: u64) -> Clocks {
    Clocks {
        last_contact_ms: at_ms,
        last_sample_ms: at_ms + 1,
        last_fix_ms: at_ms + 2,
        durable_ms: at_ms + 3,
    }
}

fn id(n: u8) -> Bytes {
    Bytes::copy_from_slice(&user(n).0)
}

fn entry(n: u8, position: u64) -> Entry {
    Entry {
        user: id(n),
        last_contact_ms: position,
        last_sample_ms: position + 1,
        last_fix_ms: position + 2,
        durable_ms: position + 3,
        state: State::Active.into(),
        position,
        coalesced: 0,
    }
}

fn span(position: u64, from_ms: u64, until_ms: u64) -> Kind {
    Kind::Coverage(Coverage {
        from_ms,
        until_ms,
        reason: coverage::Reason::Down.into(),
        position,
    })
}

fn late(n: u8, position: u64) -> Kind {
    deadline_event(n, position, deadline::Kind::Late)
}

fn recovered(n: u8, position: u64) -> Kind {
    deadline_event(n, position, deadline::Kind::Recovered)
}

fn deadline_event(n: u8, position: u64, kind: deadline::Kind) -> Kind {
    Kind::Deadline(Deadline {
        user: id(n),
        kind: kind.into(),
        at_ms: position + 1,
        position,
        last_contact_ms: 2,
        due_ms: 3,
    })
}

#[tokio::test]
async fn spans_come_in_the_snapshot_and_when_they_begin_and_end_and_again_after_a_token() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    harness.say_span(2, 100, Some(200));
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    let mut in_snapshot = Vec::new();
    let end = loop {
        match watching.next().await.unwrap() {
            Kind::SnapshotEnd(end) => break end,
            other => in_snapshot.push(other),
        }
    };
    assert_eq!(in_snapshot, [Kind::Entry(entry(1, 1)), span(2, 100, 200)]);
    assert_eq!((end.count, end.position), (1, 2), "a span is no entry");

    harness.say_span(3, 300, None);
    let (told, begun) = watching.all_until(3).await;
    assert_eq!(told, [span(3, 300, 0)]);
    harness.say_span(4, 300, Some(400));
    let (told, ended) = watching.all_until(4).await;
    assert_eq!(told, [span(4, 300, 400)]);
    harness.say_span(5, 500, Some(600));

    for (token, expected) in [
        (&end.token, vec![span(4, 300, 400), span(5, 500, 600)]),
        (&begun, vec![span(4, 300, 400), span(5, 500, 600)]),
        (&ended, vec![span(5, 500, 600)]),
    ] {
        let (told, _) = harness.watch(token).await.all_until(5).await;
        assert_eq!(told, expected);
    }
}

#[tokio::test]
async fn a_checker_is_told_of_its_own_deadlines_once_each_and_in_order() {
    use deadlines::Kind::{Late, Recovered};
    let harness = Harness::start();
    harness.publish(1, &[1]);
    let mut watching = harness.watch(&Bytes::new()).await;
    let (_, at_snapshot) = watching.all_until(1).await;
    harness.say_late(2, "ops", &[1, 2], Late);
    let (told, after_late) = watching.all_until(2).await;
    assert_eq!(told, [late(1, 2), late(2, 2)]);
    harness.say_late(3, "night", &[1], Late);
    harness.say_late(4, "ops", &[1], Recovered);
    let (told, after_all) = watching.all_until(4).await;
    assert_eq!(told, [recovered(1, 4)]);

    for (token, expected) in [
        (&at_snapshot, vec![late(1, 2), late(2, 2), recovered(1, 4)]),
        (&after_late, vec![recovered(1, 4)]),
        (&after_all, vec![]),
    ] {
        harness.publish(harness.freshness.head().position + 1, &[]);
        let head = harness.freshness.head().position;
        let (told, _) = harness.watch(token).await.all_until(head).await;
        assert_eq!(told, expected);
    }
    // Whoever begins anew is told who is late now.
    let (told, _) = harness.watch(&Bytes::new()).await.all_until(4).await;
    assert_eq!(told, [Kind::Entry(entry(1, 1)), late(2, 2)]);
    // Only of those that it has selected.
    let request = WatchRequest {
        user_ids: vec![id(1)],
        ..WatchRequest::default()
    };
    let client = harness.client(OPS).await;
    let mut of_one = Watching::begin(client, request).await.unwrap();
    let (told, _) = of_one.all_until(4).await;
    assert_eq!(told, [Kind::Entry(entry(1, 1))]);
    let head = harness.freshness.head().position;
    harness.say_late(head + 1, "ops", &[1, 2], Late);
    let (told, _) = of_one.all_until(head + 1).await;
    assert_eq!(told, [late(1, head + 1)]);
}

#[tokio::test]
async fn more_events_than_fit_a_message_all_come_before_the_announcement() {
    use deadlines::Kind::{Late, Recovered};
    let harness = Harness::start();
    let mut watching = harness.watch(&Bytes::new()).await;
    let (_, token) = watching.all_until(0).await;
    let users: Vec<u8> = (0..=255).collect();
    let mut expected = Vec::new();
    for position in 1..=9 {
        let kind = if position % 2 == 1 { Late } else { Recovered };
        harness.say_late(position, "ops", &users, kind);
        expected.extend(users.iter().map(|&n| match kind {
            Late => late(n, position),
            Recovered => recovered(n, position),
        }));
    }
    assert_eq!(watching.all_until(9).await.0, expected);
    drop(token);
    let (told, _) = harness.watch(&Bytes::new()).await.all_until(9).await;
    assert_eq!(told.len(), 256, "who is late now");
}

#[tokio::test]
async fn a_token_of_before_what_was_dropped_begins_again_for_its_checker_only() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    let mut watching = harness.watch(&Bytes::new()).await;
    let (_, before) = watching.all_until(1).await;
    harness.say_late(2, "ops", &[1], deadlines::Kind::Late);
    let (_, after) = watching.all_until(2).await;
    harness.bulletin.forget(Checker::named("night"), 2);
    let mut resumed = harness.watch(&before).await;
    assert_eq!(resumed.header().await.position, 1);

    harness.bulletin.forget(Checker::named("ops"), 2);
    let mut resumed = harness.watch(&after).await;
    assert_eq!(resumed.header().await.position, 2);
    let mut reset = harness.watch(&before).await;
    assert_eq!(reset.header().await.position, 0);
    match reset.next().await.unwrap() {
        Kind::Reset(reset) => assert_eq!(reset.reason(), reset::Reason::MarkersGone),
        other => panic!("not a reset: {other:?}"),
    }
    let (told, _) = reset.all_until(2).await;
    assert_eq!(told, [Kind::Entry(entry(1, 1)), late(1, 2)]);
}

/// The committer deletes them at the day's end, on a clock that is set.
#[tokio::test]
async fn events_whose_retention_is_over_go_when_the_day_ends_and_tokens_from_before_them_are_reset()
{
    use deadlines::Kind::{Late, Recovered};
    const DAY_MS: u64 = 24 * 3_600_000;
    let harness = Harness::start();
    // Ahead of the system's clock, so that it stands still.
    let noon_ms = (system_now_ms() / DAY_MS + 1_000) * DAY_MS + DAY_MS / 2;
    harness.publish(1, &[1]);
    let (_, before) = harness.watch(&Bytes::new()).await.all_until(1).await;
    harness.say_late_at(noon_ms, 2, "ops", &[1], Late);
    let (_, after_late) = harness.watch(&before).await.all_until(2).await;
    harness.say_late_at(noon_ms + DAY_MS, 3, "ops", &[1], Recovered);
    harness.say_late_at(noon_ms + DAY_MS, 4, "night", &[1], Late);

    let clock = Clock::starting_at(noon_ms + DAY_MS);
    let retention = Duration::from_secs(2 * 24 * 3_600);
    let (handle, committer) = Committer::new(
        &CommitConfig::default(),
        CommitParts {
            invitations: Invitations::default(),
            store: Arc::clone(&harness.store),
            freshness: Arc::clone(&harness.freshness),
            metrics: harness.metrics.clone(),
            clock: clock.clone(),
            devices: FxHashMap::default(),
            position: 4,
            retention,
            vigil: Vigil::new(VigilParts {
                bulletin: Arc::clone(&harness.bulletin),
                deadlines: Vec::new(),
                max_deadlines: 0,
                start: None,
                metrics: harness.metrics.clone(),
            }),
            holders: Holders::default(),
            checkers: Arc::default(),
            revocations: Arc::default(),
            orders: orders::queue().1,
            erase: erase::queue().0,
            audit: Audit::nowhere(&harness.metrics),
            turned_away: Arc::default(),
        },
    );
    let ended = committer.spawn().unwrap();
    let resolved_to = async |moment_ms| {
        until(|| moment_ms <= harness.freshness.head().resolved_ms + 1).await;
        harness.freshness.head().position
    };
    // That the clock was set is told as well, and is not what this is about.
    let told = async |token: &Bytes, head| {
        let mut watching = harness.watch(token).await;
        let started_at = watching.header().await.position;
        let (mut told, _) = watching.all_until(head).await;
        told.retain(|kind| !matches!(kind, Kind::Coverage(_)));
        (started_at, told)
    };
    let event = |kind, position, at_ms| match deadline_event(1, position, kind) {
        Kind::Deadline(event) => Kind::Deadline(Deadline { at_ms, ..event }),
        other => other,
    };
    let late = event(deadline::Kind::Late, 2, noon_ms);
    let recovered = event(deadline::Kind::Recovered, 3, noon_ms + DAY_MS);
    // Kept for two days at least.
    for kept_ms in [noon_ms + DAY_MS, noon_ms + DAY_MS + DAY_MS / 4] {
        clock.leap_to(kept_ms);
        let head = resolved_to(kept_ms).await;
        let all = vec![late.clone(), recovered.clone()];
        assert_eq!(told(&before, head).await, (1, all));
    }
    clock.leap_to(noon_ms + 2 * DAY_MS + 1);
    let head = resolved_to(noon_ms + 2 * DAY_MS + 1).await;
    let (started_at, again) = told(&before, head).await;
    assert_eq!(
        (started_at, &again[1..]),
        (0, &[Kind::Entry(entry(1, 1))][..])
    );
    match again[0] {
        Kind::Reset(reset) => assert_eq!(reset.reason(), reset::Reason::MarkersGone),
        ref other => panic!("not a reset: {other:?}"),
    }
    assert_eq!(told(&after_late, head).await, (2, vec![recovered]));
    assert_eq!(harness.bulletin.forgotten(Checker::named("night")), 0);
    let events_of = |checker| {
        let events = harness
            .store
            .events_of(Checker::named(checker), 0..u64::MAX, 9);
        events
            .unwrap()
            .iter()
            .map(|event| event.position)
            .collect::<Vec<_>>()
    };
    assert_eq!((events_of("ops"), events_of("night")), (vec![3], vec![4]));
    // A later process knows it as well.
    let kept = harness.store.load_deadlines().unwrap();
    assert_eq!(kept.forgotten, [(Checker::named("ops"), 2)]);
    drop(handle);
    ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn deadlines_are_handed_to_the_committer_and_read_back_in_pages() {
    let mut harness = Harness::start();
    let mut ops = harness.client(OPS).await;
    let asked = |user, expect_every_ms, grace_ms| DeadlineSetting {
        user,
        expect_every_ms,
        grace_ms,
    };
    let request = |deadlines| SetDeadlinesRequest { deadlines };
    for wrong in [
        vec![asked(Bytes::from_static(b"short"), 1, 1)],
        vec![asked(id(1), u64::MAX, 1)],
        vec![asked(id(1), 1, u64::MAX)],
        vec![asked(id(1), 1, 1); 1_001],
    ] {
        let refused = ops.set_deadlines(request(wrong)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    let calling = tokio::spawn({
        let mut ops = ops.clone();
        let call = request(vec![asked(id(1), 60_000, 30_000), asked(id(2), 0, 5)]);
        async move { ops.set_deadlines(call).await }
    });
    let (order, reply) = harness.next_order().await;
    assert_eq!(order.checker, Checker::named("ops"));
    let setting = Setting {
        expect_every_ms: 60_000,
        grace_ms: 30_000,
    };
    assert_eq!(order.settings, [(user(1), Some(setting)), (user(2), None)]);
    reply.answer(Ok(17));
    assert_eq!(calling.await.unwrap().unwrap().into_inner().position, 17);
    let calling = tokio::spawn({
        let mut ops = ops.clone();
        async move { ops.set_deadlines(SetDeadlinesRequest::default()).await }
    });
    let too_many = deadlines::TooMany { most: 5 }.into();
    harness.next_order().await.1.answer(Err(too_many));
    let refused = calling.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let calling = tokio::spawn({
        let mut ops = ops.clone();
        let call = request(vec![asked(id(1), 60_000, 30_000)]);
        async move { ops.set_deadlines(call).await }
    });
    let not_granted = deadlines::NotSet::NotGranted(user(1));
    harness.next_order().await.1.answer(Err(not_granted));
    let refused = calling.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

    harness.say_late(1, "ops", &[3, 1, 2], deadlines::Kind::Late);
    harness.say_late(2, "ops", &[2], deadlines::Kind::Recovered);
    harness.say_late(3, "night", &[9], deadlines::Kind::Late);
    let mut listed = Vec::new();
    let mut page = ListDeadlinesRequest {
        page_size: 2,
        ..ListDeadlinesRequest::default()
    };
    loop {
        let answer = ops.list_deadlines(page.clone()).await.unwrap().into_inner();
        listed.extend(answer.deadlines);
        page.page_token = answer.next_page_token;
        if page.page_token.is_empty() {
            break;
        }
    }
    let listed: Vec<_> = listed
        .into_iter()
        .map(|state| {
            let late = state.late.map(|late| late.position);
            (state.setting.unwrap(), state.since_ms, late)
        })
        .collect();
    let state = |n, late| (asked(id(n), 60_000, 30_000), 1, late);
    assert_eq!(
        listed,
        [state(1, Some(1)), state(2, None), state(3, Some(1))]
    );
}

#[tokio::test]
async fn silence_is_asked_for_in_time_that_the_gateway_could_hear() {
    let harness = Harness::start();
    let heard: Vec<_> = [(1, 100), (2, 149), (3, 150), (4, 800)]
        .map(|(n, at_ms)| (user(n), heard(at_ms)))
        .into();
    harness.freshness.publish(1, 1_000, &heard, &[]);
    let mut ops = harness.client(OPS).await;
    let silent_for = |silent_for_ms| ListStaleRequest {
        silent_for_ms,
        ..ListStaleRequest::default()
    };
    let plain = ops.list_stale(silent_for(300)).await.unwrap().into_inner();
    assert_eq!((plain.entries.len(), plain.older_than_ms), (3, 700));
    assert_eq!(plain.coverage, []);

    // 450 ms of the last 850 it could hear.
    let spans = [(2, 200, 500), (3, 700, 800)];
    for (position, from_ms, until_ms) in spans {
        harness.say_span(position, from_ms, Some(until_ms));
    }
    let told = ops.list_stale(silent_for(450)).await.unwrap().into_inner();
    let silent: Vec<_> = told.entries.into_iter().map(|entry| entry.user).collect();
    assert_eq!((silent, told.older_than_ms), (vec![id(1), id(2)], 150));
    let told: Vec<_> = told.coverage.into_iter().map(Kind::Coverage).collect();
    assert_eq!(told, [span(2, 200, 500), span(3, 700, 800)]);

    let both = ListStaleRequest {
        older_than_ms: 1,
        ..silent_for(1)
    };
    let refused = ops.list_stale(both).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
}

#[tokio::test]
async fn a_watch_is_a_snapshot_and_then_changes() {
    let harness = Harness::start();
    harness.publish(1, &[1, 2]);
    harness.publish(2, &[2, 3]);
    let mut watching = harness.watch(&Bytes::new()).await;
    let header = watching.header().await;
    assert_eq!(
        (header.incarnation.as_ref(), header.position),
        (&INCARNATION[..], 0)
    );
    let (entries, position, _) = watching.snapshot().await;
    assert_eq!(
        (entries, position),
        (vec![entry(1, 1), entry(2, 2), entry(3, 2)], 2)
    );

    harness.publish(3, &[1, 4]);
    let (entries, progress) = watching.until(3).await;
    assert_eq!(entries, [entry(1, 3), entry(4, 3)]);
    assert_eq!((progress.position, progress.resolved_ms), (3, 3));
    assert!(harness.metric("waypost_freshness_watchers 1"));
    assert!(harness.metric("waypost_freshness_entries_sent_total 5"));
}

#[tokio::test]
async fn a_token_brings_every_user_changed_since_once() {
    let harness = Harness::start();
    harness.publish(1, &[1, 2, 3]);
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    let (_, _, at_snapshot) = watching.snapshot().await;
    harness.publish(2, &[1]);
    let (_, progress) = watching.until(2).await;
    drop(watching);
    harness.publish(3, &[1, 2]);
    harness.publish(4, &[2]);

    for (token, start, expected) in [
        (&progress.token, 2, vec![entry(1, 3), entry(2, 4)]),
        (&at_snapshot, 1, vec![entry(1, 3), entry(2, 4)]),
    ] {
        let mut resumed = harness.watch(token).await;
        assert_eq!(resumed.header().await.position, start);
        let (entries, _) = resumed.until(4).await;
        assert_eq!(entries, expected);
    }
}

#[tokio::test]
async fn a_token_of_an_empty_store_begins_with_a_snapshot() {
    let harness = Harness::start();
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    let (entries, position, token) = watching.snapshot().await;
    assert_eq!((entries, position), (vec![], 0));
    harness.publish(1, &[1]);
    let mut resumed = harness.watch(&token).await;
    assert_eq!(resumed.header().await.position, 0);
    assert_eq!(resumed.snapshot().await.0, [entry(1, 1)]);
}

#[tokio::test]
async fn a_token_that_cannot_be_used_is_answered_with_reset_and_a_snapshot() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    let (_, _, token) = watching.snapshot().await;

    let mut forged = token.to_vec();
    forged[24] ^= 1; // the position
    let mut foreign = token.to_vec();
    foreign[1] ^= 1; // the incarnation
    let all = WatchRequest::default();
    for (client, request, reason) in [
        (
            OPS,
            WatchRequest {
                token: forged.into(),
                ..all.clone()
            },
            reset::Reason::BadToken,
        ),
        (
            OPS,
            WatchRequest {
                token: foreign.into(),
                ..all.clone()
            },
            reset::Reason::OtherStore,
        ),
        (
            OPS,
            WatchRequest {
                token: token.clone(),
                user_ids: vec![id(1)],
                ..all.clone()
            },
            reset::Reason::OtherSelector,
        ),
        (
            "spiffe://test.waypost/checker/night",
            WatchRequest {
                token: token.clone(),
                ..all
            },
            reset::Reason::OtherSelector,
        ),
    ] {
        let client = harness.client(client).await;
        let mut watching = Watching::begin(client, request).await.unwrap();
        assert_eq!(watching.header().await.position, 0);
        match watching.next().await.unwrap() {
            Kind::Reset(reset) => assert_eq!(reset.reason(), reason),
            other => panic!("{other:?} instead of {reason:?}"),
        }
        let (entries, _, _) = watching.snapshot().await;
        assert_eq!(entries, [entry(1, 1)]);
    }
    assert!(harness.metric(r#"waypost_freshness_resets_total{reason="other_selector"} 2"#));
}

#[tokio::test]
async fn a_selection_gets_its_users_only_and_hears_of_those_never_seen() {
    let harness = Harness::start();
    harness.publish(1, &[1, 2]);
    let client = harness.client(OPS).await;
    let request = WatchRequest {
        user_ids: vec![id(2), id(9), id(2)],
        ..WatchRequest::default()
    };
    let mut watching = Watching::begin(client, request).await.unwrap();
    watching.header().await;
    let never_seen = Entry {
        user: id(9),
        state: State::NeverSeen.into(),
        ..Entry::default()
    };
    assert_eq!(watching.snapshot().await.0, [entry(2, 1), never_seen]);
    harness.publish(2, &[1, 3]);
    harness.publish(3, &[9]);
    assert_eq!(watching.until(3).await.0, [entry(9, 3)]);

    let client = harness.client(OPS).await;
    let request = WatchRequest {
        states: vec![State::Paused.into()],
        ..WatchRequest::default()
    };
    let mut watching = Watching::begin(client, request).await.unwrap();
    watching.header().await;
    assert_eq!(watching.snapshot().await.0, []);
}

#[tokio::test]
async fn progress_comes_also_when_nothing_happens() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    watching.snapshot().await;
    watching.until(1).await;
    harness.freshness.resolve(777);
    loop {
        let (entries, progress) = watching.until(1).await;
        assert_eq!(entries, []);
        if progress.resolved_ms == 777 {
            break;
        }
    }
}

/// Who changes in a commit: some users in nearly every one, most of them rarely.
fn users_of(commit: u64) -> impl Iterator<Item = UserId> {
    (0..8u64).map(move |n| {
        let spread = if n < 2 { 5 } else { 3_000 };
        let number = (commit * 8 + n).wrapping_mul(0x9e37_79b9_7f4a_7c15) % spread;
        let mut user = [0; 16];
        user[..8].copy_from_slice(&number.to_be_bytes());
        UserId(user)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_announced_before_it_was_sent_while_commits_go_on() {
    const COMMITS: u64 = 30_000;
    let harness = Harness::start();
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    let freshness = Arc::clone(&harness.freshness);
    let publisher = thread::spawn(move || {
        for commit in 1..=COMMITS {
            // The time is the number of the commit, so `resolved_ms` says which commits it covers.
            let changes: Vec<_> = users_of(commit).map(|user| (user, heard(commit))).collect();
            freshness.publish(commit, commit, &changes, &[]);
        }
    });

    let mut view: BTreeMap<Bytes, u64> = BTreeMap::new();
    let mut truth: BTreeMap<Bytes, u64> = BTreeMap::new();
    let (mut true_upto, mut announced, mut resolved) = (0, 0, 0);
    while resolved < COMMITS {
        match watching.next().await.unwrap() {
            Kind::Entry(entry) => {
                assert!(
                    announced < entry.position,
                    "{} after {announced}",
                    entry.position
                );
                let before = view.insert(entry.user, entry.last_contact_ms);
                assert!(before < Some(entry.last_contact_ms), "the same value twice");
            }
            Kind::SnapshotEnd(end) => announced = end.position,
            Kind::Progress(progress) => {
                assert!(announced <= progress.position && resolved <= progress.resolved_ms);
                (announced, resolved) = (progress.position, progress.resolved_ms);
                for commit in true_upto + 1..=resolved {
                    for user in users_of(commit) {
                        truth.insert(Bytes::copy_from_slice(&user.0), commit);
                    }
                }
                true_upto = resolved;
                for (user, heard) in &truth {
                    assert!(
                        view.get(user).is_some_and(|seen| heard <= seen),
                        "resolved {resolved} was announced without commit {heard}"
                    );
                }
            }
            other => panic!("{other:?} while commits go on"),
        }
    }
    publisher.join().unwrap();
    assert_eq!(view, truth);
}

#[tokio::test]
async fn a_slow_reader_gets_newer_values_and_not_more_of_them() {
    const COMMITS: u64 = 2_000;
    let harness = Harness::start();
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    let everybody: Vec<_> = (0..=u8::MAX).collect();
    for commit in 1..=COMMITS {
        harness.publish(commit, &everybody);
        // The service runs, its reader does not.
        tokio::task::yield_now().await;
    }
    let mut view = BTreeMap::new();
    let mut received = 0;
    loop {
        match watching.next().await.unwrap() {
            Kind::Entry(entry) => {
                received += 1;
                view.insert(entry.user, entry.position);
            }
            Kind::Progress(progress) if progress.position == COMMITS => break,
            _ => {}
        }
    }
    assert!(view.len() == everybody.len() && view.values().all(|&position| position == COMMITS));
    assert!(
        received < COMMITS * 256 / 4,
        "{received} entries were kept for it"
    );
}

#[tokio::test]
async fn a_reader_that_stands_still_keeps_its_stream_and_learns_what_it_missed() {
    let harness = Harness::start();
    let mut slow = harness.watch(&Bytes::new()).await;
    slow.header().await;
    let everybody: Vec<_> = (0..=u8::MAX).collect();
    let mut commit = 0;
    // Until what lies between the two ends is full.
    while !harness.metric("waypost_freshness_lagging_watchers 1") {
        commit += 1;
        harness.publish(commit, &everybody);
        sleep(Duration::from_millis(1)).await;
    }
    // Another one does not notice.
    let mut other = harness.watch(&Bytes::new()).await;
    other.header().await;
    let (entries, position, _) = other.snapshot().await;
    assert_eq!((entries.len(), position), (everybody.len(), commit));
    for _ in 0..100 {
        commit += 1;
        harness.publish(commit, &everybody);
        let (entries, _) = other.until(commit).await;
        assert_eq!(
            entries,
            everybody
                .iter()
                .map(|&n| entry(n, commit))
                .collect::<Vec<_>>()
        );
    }

    // Everybody changes in every commit, so the position says how many values there have been.
    let mut values = BTreeMap::new();
    let mut is_in_snapshot = true;
    let mut missed = 0;
    loop {
        match slow.next().await.unwrap() {
            Kind::Entry(entry) => {
                let before = values.insert(entry.user, entry.position);
                if is_in_snapshot {
                    assert_eq!((before, entry.coalesced), (None, 0));
                } else {
                    let coalesced = u64::from(entry.coalesced);
                    assert_eq!(before.unwrap_or(0) + coalesced + 1, entry.position);
                    missed += coalesced;
                }
            }
            Kind::SnapshotEnd(_) => is_in_snapshot = false,
            Kind::Progress(progress) if progress.position == commit => break,
            Kind::Progress(_) => {}
            other => panic!("{other:?} for a slow reader"),
        }
    }
    assert!(values.len() == everybody.len() && values.values().all(|&value| value == commit));
    assert!(50 * 256 <= missed, "{missed} values were overtaken");
    let counted = format!("waypost_freshness_coalesced_total {missed}");
    until(|| harness.metric(&counted)).await;
    until(|| harness.metric("waypost_freshness_lagging_watchers 0")).await;
}

/// A machine between a checker and the gateway, which the gateway takes for the checker's.
struct Machine {
    address: String,
    is_still: watch::Sender<bool>,
    /// Towards the gateway.
    socket: oneshot::Receiver<socket2::Socket>,
}

impl Machine {
    /// Hands on what both ends say.
    async fn start(harness: &Harness) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap());
        let gateway = harness.address.strip_prefix("https://").unwrap().to_owned();
        let is_still = watch::Sender::new(false);
        let mut stillness = is_still.subscribe();
        let (says_socket, socket) = oneshot::channel();
        tokio::spawn(async move {
            let (checker, _) = listener.accept().await.unwrap();
            let gateway = tokio::net::TcpStream::connect(gateway).await.unwrap();
            drop(says_socket.send(socket2::SockRef::from(&gateway).try_clone().unwrap()));
            let (mut from_checker, mut to_checker) = checker.into_split();
            let (from_gateway, mut to_gateway) = gateway.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_checker, &mut to_gateway).await });
            let mut buffer = vec![0; 1 << 16];
            loop {
                drop(stillness.wait_for(|is_still| !is_still).await);
                from_gateway.readable().await.unwrap();
                match from_gateway.try_read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => to_checker.write_all(&buffer[..count]).await.unwrap(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
        });
        Self {
            address,
            is_still,
            socket,
        }
    }

    /// A checker behind it, which itself waits for as long as it takes.
    async fn client(&self, harness: &Harness) -> FreshnessClient<Channel> {
        const LONG: Duration = Duration::from_secs(3_600);
        let endpoint = harness.config(&self.address, OPS).endpoint().unwrap();
        let channel = endpoint.http2_keep_alive_interval(LONG).connect().await;
        FreshnessClient::new(channel.unwrap())
    }

    /// Does not read from the gateway any more, or does so again.
    fn stand_still(&self, is_still: bool) {
        self.is_still.send_replace(is_still);
    }

    /// Does not even acknowledge any more, as if it had lost its power. Nobody hears of it.
    #[expect(unsafe_code, reason = "a socket option without a safe wrapper")]
    async fn vanish(self) {
        const RETURN: u16 = 0x06; // BPF_RET | BPF_K, here of no byte
        let mut nothing = libc::sock_filter {
            code: RETURN,
            jt: 0,
            jf: 0,
            k: 0,
        };
        let program = libc::sock_fprog {
            len: 1,
            filter: &raw mut nothing,
        };
        let socket = self.socket.await.unwrap();
        // SAFETY: the option takes a `sock_fprog` by pointer and size. It and its instruction live until the call
        // returns, and the kernel copies them.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of_val(&program).try_into().unwrap(),
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        // Open for as long as the test runs: a socket that is closed says so.
        std::mem::forget(socket);
    }
}

/// Whoever reads nothing is there as long as its machine is. Another one, whose machine vanishes only after the first
/// has stopped reading, shows that the patience has passed.
#[tokio::test]
async fn a_reader_that_stands_still_outlasts_one_whose_machine_has_vanished() {
    let harness = Harness::with_patience(Duration::from_millis(200), |_| ());
    let (still, vanishing) = (
        Machine::start(&harness).await,
        Machine::start(&harness).await,
    );
    let watch = async |machine: &Machine| {
        let client = machine.client(&harness).await;
        let mut watching = Watching::begin(client, WatchRequest::default())
            .await
            .unwrap();
        watching.header().await;
        watching.snapshot().await;
        watching
    };
    let (mut slow, mut other) = (watch(&still).await, watch(&vanishing).await);
    assert!(harness.metric("waypost_freshness_watchers 2"));
    tokio::spawn(async move { while other.next().await.is_ok() {} });

    still.stand_still(true);
    let everybody: Vec<_> = (0..=u8::MAX).collect();
    let mut commit = 0;
    // Until what lies between the two ends is full, so that not a byte gets through.
    while !harness.metric("waypost_freshness_lagging_watchers 1") {
        assert!(harness.metric("waypost_freshness_watchers 2"), "cut off");
        commit += 1;
        harness.publish(commit, &everybody);
        sleep(Duration::from_millis(1)).await;
    }
    vanishing.vanish().await;
    until(|| harness.metric("waypost_freshness_watchers 1")).await;

    still.stand_still(false);
    let (entries, _) = slow.until(commit).await;
    let last: BTreeMap<_, _> = entries
        .iter()
        .map(|entry| (&entry.user, entry.position))
        .collect();
    assert!(last.len() == 256 && last.values().all(|&position| position == commit));
}

#[tokio::test]
async fn a_machine_that_vanishes_while_nothing_is_read_or_while_nothing_is_said_gives_its_place_back()
 {
    for has_stopped_reading in [true, false] {
        let harness = Harness::with_patience(Duration::from_millis(200), |config| {
            config.max_connections = 1;
        });
        let machine = Machine::start(&harness).await;
        let mut client = machine.client(&harness).await;
        if has_stopped_reading {
            let mut watching = Watching::begin(client, WatchRequest::default())
                .await
                .unwrap();
            watching.header().await;
            machine.stand_still(true);
            let everybody: Vec<_> = (0..=u8::MAX).collect();
            let mut commit = 0;
            while !harness.metric("waypost_freshness_lagging_watchers 1") {
                commit += 1;
                harness.publish(commit, &everybody);
                sleep(Duration::from_millis(1)).await;
            }
        } else {
            client.get(GetRequest::default()).await.unwrap();
        }
        machine.vanish().await;
        while !harness.serves_another().await {}
    }
}

#[tokio::test]
async fn only_named_checkers_are_answered() {
    let harness = Harness::start();
    for (uri, words) in [
        (
            "spiffe://test.waypost/user/6ba7b810-9dad-11d1-80b4-00c04fd430c8/device/1",
            "only checkers may ask",
        ),
        (
            "spiffe://test.waypost/checker/stranger",
            "checker \"stranger\" is not in",
        ),
        ("spiffe://other.waypost/checker/ops", "another trust domain"),
    ] {
        let mut client = harness.client(uri).await;
        let mut refused = vec![
            client.get(GetRequest::default()).await.unwrap_err(),
            client
                .list_stale(ListStaleRequest::default())
                .await
                .unwrap_err(),
        ];
        refused.extend(Watching::begin(client, WatchRequest::default()).await.err());
        assert_eq!(refused.len(), 3);
        for status in refused {
            assert_eq!(status.code(), Code::PermissionDenied, "{uri}");
            assert!(
                status.message().contains(words),
                "{uri}: {}",
                status.message()
            );
        }
    }
    assert!(harness.metric(r#"waypost_freshness_refused_checkers_total{reason="not_allowed"} 3"#));
    assert!(
        harness
            .client(OPS)
            .await
            .get(GetRequest::default())
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_not_even_heard() {
    let harness = Harness::start();
    let (certificate, key) = Pki::new().issue(SanType::URI(OPS.try_into().unwrap()));
    let client = connect(&Config::new(
        &harness.address,
        &harness.pki.ca_pem,
        certificate,
        key,
        "localhost",
    ))
    .await;
    // In TLS 1.3 the client may learn of it only when it first reads.
    if let Ok(mut client) = client {
        assert!(client.get(GetRequest::default()).await.is_err());
    }
    let counted = r#"waypost_freshness_refused_checkers_total{reason="unknown_issuer"} 1"#;
    until(|| harness.metric(counted)).await;
}

/// Before, whoever could reach the port could keep all checkers out without any certificate.
#[tokio::test]
async fn strangers_who_stall_in_the_handshake_keep_no_checker_out() {
    let harness = Harness::with(|config| config.max_connections = 2);
    let port = harness.address.rsplit_once(':').unwrap().1;
    let gateway = format!("127.0.0.1:{port}").parse().unwrap();
    let mut strangers = Vec::new();
    for _ in 0..100 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).unwrap();
        strangers.push(socket.connect(gateway).await.unwrap());
    }
    let counted = r#"waypost_freshness_refused_checkers_total{reason="overloaded"} 84"#;
    until(|| harness.metric(counted)).await;
    let mut checker = harness.client(OPS).await;
    assert!(checker.get(GetRequest::default()).await.is_ok());
    drop(strangers);
}

#[tokio::test]
async fn what_is_no_tls_is_counted() {
    let harness = Harness::start();
    let address = harness.address.strip_prefix("https://").unwrap();
    let mut stranger = tokio::net::TcpStream::connect(address).await.unwrap();
    AsyncWriteExt::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let counted = r#"waypost_freshness_refused_checkers_total{reason="other"} 1"#;
    until(|| harness.metric(counted)).await;
}

/// Looks until it is so; only a hang takes minutes.
async fn until(is_so: impl Fn() -> bool) {
    let looking = async {
        while !is_so() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), looking)
        .await
        .expect("it happens within two minutes");
}

#[tokio::test]
async fn get_answers_in_the_order_of_the_request() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    harness.publish(2, &[2]);
    let mut client = harness.client(OPS).await;
    let user_ids = vec![id(2), id(3), id(1)];
    let answer = client
        .get(GetRequest { user_ids })
        .await
        .unwrap()
        .into_inner();
    let never_seen = Entry {
        user: id(3),
        state: State::NeverSeen.into(),
        ..Entry::default()
    };
    assert_eq!(answer.entries, [entry(2, 2), never_seen, entry(1, 1)]);
    assert_eq!((answer.position, answer.resolved_ms), (2, 2));
}

#[tokio::test]
async fn the_silent_are_listed_page_by_page() {
    let harness = Harness::start();
    for (position, n) in [(1, 5), (2, 4), (3, 3), (4, 2), (5, 1)] {
        harness.publish(position, &[n]);
    }
    let mut client = harness.client(OPS).await;
    let mut request = ListStaleRequest {
        older_than_ms: 4,
        page_size: 2,
        ..Default::default()
    };
    let first = client
        .list_stale(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.entries, [entry(5, 1), entry(4, 2)]);
    assert_eq!((first.position, first.resolved_ms), (5, 5));
    request.page_token = first.next_page_token;
    let second = client.list_stale(request).await.unwrap().into_inner();
    assert_eq!(second.entries, [entry(3, 3)]);
    assert!(second.next_page_token.is_empty());
}

#[tokio::test]
async fn requests_beyond_the_limits_are_refused_with_a_reason() {
    let harness = Harness::start();
    let mut client = harness.client(OPS).await;
    let short = Bytes::from_static(b"short");
    let mut refused = Vec::new();
    for user_ids in [vec![id(1); 1_001], vec![short.clone()]] {
        refused.push(client.get(GetRequest { user_ids }).await.unwrap_err());
    }
    for request in [
        ListStaleRequest {
            page_size: 1_001,
            ..Default::default()
        },
        ListStaleRequest {
            page_token: short,
            ..Default::default()
        },
    ] {
        refused.push(client.list_stale(request).await.unwrap_err());
    }
    for request in [
        WatchRequest {
            user_ids: vec![id(1); 10_001],
            ..Default::default()
        },
        WatchRequest {
            states: vec![0],
            ..Default::default()
        },
        WatchRequest {
            states: vec![99],
            ..Default::default()
        },
    ] {
        refused.push(client.watch(request).await.unwrap_err());
    }
    for status in refused {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(!status.message().is_empty());
    }
}

#[tokio::test]
async fn one_watcher_too_many_is_refused_until_another_goes() {
    let harness = Harness::with(|config| config.max_watchers = 1);
    let mut first = harness.watch(&Bytes::new()).await;
    first.header().await;
    let mut client = harness.client(OPS).await;
    let status = client.watch(WatchRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(first);
    // The place is free once the service has noticed; how soon that is, is not promised.
    while client.watch(WatchRequest::default()).await.is_err() {}
}

#[tokio::test]
async fn one_connection_too_many_is_closed() {
    let harness = Harness::with(|config| config.max_connections = 1);
    let mut first = harness.client(OPS).await;
    first.get(GetRequest::default()).await.unwrap();
    assert!(!harness.serves_another().await);
    drop(first);
    // The place is free once the service has noticed; how soon that is, is not promised.
    while !harness.serves_another().await {}
}

#[tokio::test]
async fn streams_end_with_unavailable_when_the_gateway_stops() {
    let harness = Harness::start();
    let mut watching = harness.watch(&Bytes::new()).await;
    watching.header().await;
    harness.cancel.cancel();
    let status = loop {
        if let Err(status) = watching.next().await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("shutting down"), "{status}");
    drop(watching);
    (&mut { harness.running }).await.unwrap();
}

#[tokio::test]
async fn settings_that_break_the_contract_are_refused() {
    for (config, words) in [
        (
            FreshnessConfig {
                checkers: vec!["Ops Room".to_owned()],
                ..Default::default()
            },
            "\"Ops Room\" is no name of a checker",
        ),
        (
            FreshnessConfig {
                progress_interval: Duration::from_secs(2),
                ..Default::default()
            },
            "between 10ms and 1s",
        ),
    ] {
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

fn turned(n: u8, turn: Turn, position: u64) -> News {
    let ops = CheckerNumber::FIRST;
    News {
        transitions: vec![Transition {
            user: user(n),
            turn,
            checkers: ops.into(),
            at_ms: position,
            position,
            number: 0,
        }],
        ..News::default()
    }
}

fn withdrawn(n: u8, position: u64) -> [Kind; 2] {
    [
        Kind::Transition(v1::Transition {
            user: id(n),
            state: State::Withdrawn.into(),
            at_ms: position,
            position,
            number: 0,
        }),
        Kind::Entry(Entry {
            user: id(n),
            state: State::Withdrawn.into(),
            position,
            ..Entry::default()
        }),
    ]
}

#[tokio::test]
async fn a_withdrawal_is_told_once_on_each_stream_and_then_nothing_until_it_is_granted_again() {
    let harness = Harness::start();
    harness.publish(1, &[1, 2]);
    let mut open = harness.watch(&Bytes::new()).await;
    let (_, before) = open.all_until(1).await;
    harness.say(2, &turned(1, Turn::Withdrawn, 2));
    harness.publish(3, &[1, 2]);
    let (told, after) = open.all_until(3).await;
    let mut expected = withdrawn(1, 2).to_vec();
    expected.push(Kind::Entry(entry(2, 3)));
    let sorted = |mut told: Vec<Kind>| {
        told.sort_by_key(|kind| matches!(kind, Kind::Entry(entry) if entry.user == id(2)));
        told
    };
    assert_eq!(sorted(told), expected);
    // The other checker is not concerned.
    let night = "spiffe://test.waypost/checker/night";
    let mut other = Watching::begin(harness.client(night).await, WatchRequest::default())
        .await
        .unwrap();
    let (told, _) = other.all_until(3).await;
    assert!(told.contains(&Kind::Entry(entry(1, 3))), "{told:?}");
    // A stream that was away is told as well, one that was told already and one that begins anew are not.
    let (told, _) = harness.watch(&before).await.all_until(3).await;
    assert_eq!(sorted(told), expected);
    let (told, _) = harness.watch(&after).await.all_until(3).await;
    assert_eq!(told, []);
    let (told, _) = harness.watch(&Bytes::new()).await.all_until(3).await;
    assert_eq!(told, [Kind::Entry(entry(2, 3))]);

    // An entry as of the grant, for one who has not changed since; and whoever was away is told of that alone.
    harness.say(4, &turned(1, Turn::Granted, 4));
    let granted = Kind::Entry(Entry {
        position: 4,
        ..entry(1, 3)
    });
    let alone = std::slice::from_ref(&granted);
    assert_eq!(open.all_until(4).await.0, alone);
    let (told, _) = harness.watch(&after).await.all_until(4).await;
    assert_eq!(told, alone);
    let (told, _) = harness.watch(&before).await.all_until(4).await;
    assert!(!told.contains(&withdrawn(1, 2)[0]), "{told:?}");
    // For one who has, the change.
    harness.publish(5, &[1]);
    let (told, _) = harness.watch(&after).await.all_until(5).await;
    assert_eq!(told, [Kind::Entry(entry(1, 5))]);
    assert_eq!(open.all_until(5).await.0, [Kind::Entry(entry(1, 5))]);
}

#[tokio::test]
async fn whoever_selects_states_and_names_is_told_of_a_withdrawal_too() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    let request = WatchRequest {
        user_ids: vec![id(1)],
        states: vec![State::Active.into()],
        ..WatchRequest::default()
    };
    let watch = async |request: &WatchRequest| {
        Watching::begin(harness.client(OPS).await, request.clone())
            .await
            .unwrap()
    };
    let mut open = watch(&request).await;
    assert_eq!(open.all_until(1).await.0, [Kind::Entry(entry(1, 1))]);
    harness.say(2, &turned(1, Turn::Withdrawn, 2));
    // Else the user would seem to be silent.
    assert_eq!(open.all_until(2).await.0, withdrawn(1, 2)[..1]);
    let named = WatchRequest {
        states: Vec::new(),
        ..request
    };
    let known = Kind::Entry(Entry {
        user: id(1),
        state: State::Withdrawn.into(),
        ..Entry::default()
    });
    assert_eq!(watch(&named).await.all_until(2).await.0, [known]);
}

/// On the bulletin, a withdrawal is a moment before it is in the freshness, and its stream must not go on with entries
/// in between.
#[tokio::test]
async fn nothing_of_a_user_comes_after_the_withdrawal_however_commits_and_streams_interleave() {
    let harness = Harness::start();
    harness.publish(1, &[1]);
    let mut open = harness.watch(&Bytes::new()).await;
    let (_, mut token) = open.all_until(1).await;
    let mut position = 1;
    for round in 0..60 {
        for _ in 0..round % 4 {
            position += 1;
            harness.publish(position, &[1]);
        }
        position += 1;
        harness.say(position, &turned(1, Turn::Withdrawn, position));
        let last = position;
        for _ in 0..round % 3 {
            position += 1;
            harness.publish(position, &[1, 2]);
        }
        let mut resumed = harness.watch(&token).await;
        for watching in [&mut resumed, &mut open] {
            let (told, _) = watching.all_until(position).await;
            let of_user = told.iter().filter(|kind| match kind {
                Kind::Entry(entry) => entry.user == id(1),
                Kind::Transition(transition) => transition.user == id(1),
                _ => false,
            });
            let of_user: Vec<_> = of_user.cloned().collect();
            assert!(
                of_user.ends_with(&withdrawn(1, last)),
                "round {round}: {told:?}"
            );
        }
        position += 1;
        harness.say(position, &turned(1, Turn::Granted, position));
        let (told, after) = open.all_until(position).await;
        assert!(
            matches!(&told[..], [Kind::Entry(entry)] if entry.user == id(1)),
            "{told:?}"
        );
        token = after;
    }
}
