//! One execution: sessions, checkers that set deadlines, the committer and a disk, and what must hold in whatever
//! order they meet.
//!
//! Knows what a session and a checker may rely on. Must not know which order it is in; all that is left to chance comes
//! from shuttle, so that a failure can be played again.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use prost::Message;
use shuttle::{
    future,
    rand::{Rng, thread_rng},
    thread,
};
use waypost_gateway::metrics::Metrics;
use waypost_proto::{
    batch::{self, DecodedBatch},
    device::{Admission, Claim, DeviceRecord},
    id::{DeviceId, UserId},
    ping::Ping,
    session::{Lane, Request},
    terms::Density,
};

use crate::{
    audit::Audit,
    bulletin::Bulletin,
    clock::Clock,
    commit::{CommitConfig, CommitParts, Committer},
    coverage::Coverage,
    deadlines::{Checker, Late, Registration, Setting},
    erase,
    enrol::invitations::Invitations,
    freshness::Freshness,
    grants::CheckerNumber,
    handoff::{Answer, Bell, CommitHandle, Mailbox, NotQueued, Stopped},
    orders::{self, OrderError, OrderHandle},
    plan::{Plan, Tally},
    sharing::Holders,
    store::Store,
    sync::Alarm,
    vigil::{Vigil, VigilParts},
};

/// What all tasks of an execution look at.
struct World {
    plan: Plan,
    clock: Clock,
    store: Arc<Store>,
    freshness: Arc<Freshness>,
    bulletin: Arc<Bulletin>,
    tally: Arc<Mutex<Tally>>,
    /// The committer is told to end when nothing is queued.
    // No model: looking is no step of the schedule.
    is_stopping: AtomicBool,
}

impl World {
    fn is_committer_gone(&self) -> bool {
        // A check of ours that fails takes it down as well; then that check is to be the one that is told.
        self.plan.is_committer_cut_off || self.store.has_failed() || std::thread::panicking()
    }
}

/// Plays one execution.
///
/// # Panics
/// When something does not hold that a session or a checker may rely on.
pub(crate) fn play(plan: Plan, tally: &Arc<Mutex<Tally>>) {
    let alarm = Alarm::default();
    alarm.set();
    let clock = Clock::starting_at(NOON_MS);
    let deadlines: Vec<_> = (0..plan.checkers).flat_map(deadlines_before).collect();
    let bulletin = Bulletin::restore(Coverage::default(), &deadlines, [], 0, 0);
    let bulletin = Arc::new(bulletin);
    let store = Arc::new(Store::new(plan.failing_commit, &deadlines));
    let freshness = Freshness::new(Arc::clone(&store), Arc::clone(&bulletin));
    let freshness = Arc::new(freshness);
    let config = CommitConfig {
        queue_requests: plan.queue_requests.try_into().unwrap(),
        group_pings: plan.group_pings.try_into().unwrap(),
        ..CommitConfig::default()
    };
    let record = DeviceRecord {
        epoch: EPOCH,
        ..DeviceRecord::default()
    };
    let (order, ordered) = orders::queue();
    let (handle, committer) = Committer::new(
        &config,
        CommitParts {
            store: Arc::clone(&store),
            freshness: Arc::clone(&freshness),
            metrics: METRICS.clone(),
            clock: clock.clone(),
            devices: (0..Plan::MOST_SESSIONS)
                .map(|at| (device(at), record.clone()))
                .collect(),
            holders: Holders::default(),
            checkers: Arc::default(),
            revocations: Arc::default(),
            position: 0,
            retention: Duration::from_secs(86_400),
            vigil: Vigil::new(VigilParts {
                bulletin: Arc::clone(&bulletin),
                deadlines,
                max_deadlines: plan.most_deadlines,
                start: None,
                metrics: METRICS.clone(),
            }),
            invitations: Invitations::default(),
            orders: ordered,
            erase: erase::queue().0,
            audit: Audit::nowhere(&METRICS),
            turned_away: Arc::default(),
        },
    );
    let world = Arc::new(World {
        clock: clock.clone(),
        store: Arc::clone(&store),
        freshness: Arc::clone(&freshness),
        bulletin,
        tally: Arc::clone(tally),
        is_stopping: AtomicBool::new(false),
        plan,
    });

    let committer = future::spawn(committer.run());
    // Two workers, each of which hears its own bell.
    let bells: [Arc<Bell>; 2] = Default::default();
    let workers = bells.clone().map(|bell| future::spawn(async move { bell.serve().await }));
    let sessions: Vec<_> = (0..world.plan.sessions)
        .map(|at| {
            let mailbox = Mailbox::new(&bells[at % bells.len()]);
            future::spawn(session(Arc::clone(&world), handle.clone(), mailbox, at))
        })
        .collect();
    let checkers: Vec<_> = (0..world.plan.checkers)
        .map(|at| future::spawn(checker(Arc::clone(&world), order.clone(), at)))
        .collect();
    let time = thread::spawn({
        let (ticks, clock) = (world.plan.ticks, clock.clone());
        move || (0..ticks).for_each(|_| clock.tick())
    });
    let timer = thread::spawn({
        let (rings, alarm) = (world.plan.idle_rings, alarm.clone());
        move || (0..rings).for_each(|_| alarm.ring())
    });
    for session in &sessions[..world.plan.leaving] {
        session.abort();
    }
    if world.plan.is_committer_cut_off {
        committer.abort();
    }
    time.join().unwrap();
    timer.join().unwrap();

    future::block_on(async {
        let mut mailboxes = Vec::new();
        for session in sessions {
            match session.await {
                Ok(mailbox) => mailboxes.push(mailbox),
                Err(future::JoinError::Cancelled) => tally.lock().cut_off += 1,
            }
        }
        let mut checkers = VecDeque::from(checkers);
        while !world.plan.do_checkers_stay
            && let Some(checker) = checkers.pop_front()
        {
            checker.await.unwrap();
        }
        if !world.is_committer_gone() {
            // All that was received is told in the end, also when nothing more comes.
            clock.tick();
            while freshness.resolved_ms() + 1 < clock.now_ms() && !world.is_committer_gone() {
                alarm.ring();
                thread::yield_now();
            }
        }
        world.is_stopping.store(true, Ordering::Relaxed);
        drop(handle);
        alarm.ring_for_ever();
        match committer.await {
            Ok(end) => assert_eq!(end.is_err(), store.has_failed(), "how the committer ended"),
            Err(future::JoinError::Cancelled) => {
                assert!(world.plan.is_committer_cut_off, "nobody cut it off");
            }
        }
        for checker in checkers {
            checker.await.unwrap();
        }
        for worker in workers {
            worker.abort();
            assert!(worker.await.is_err(), "a worker hears its bell for ever");
        }
        for (mailbox, may_be_lost) in mailboxes {
            let answers = taken_now(&mailbox);
            assert!(
                answers.len() <= may_be_lost
                    && answers
                        .iter()
                        .all(|(_, answer)| matches!(answer, Answer::Lost)),
                "answered more than was asked: {answers:?}"
            );
        }
    });
}

/// What a session has asked and waits for.
struct Asked {
    is_hello: bool,
    seqs: Vec<u64>,
    /// The clock before and after it was handed over.
    between_ms: (u64, u64),
}

/// A session, and what it may rely on.
struct Session {
    world: Arc<World>,
    device: DeviceId,
    /// Its epoch is not the store's: Hello begins another, and every batch of the old one is void.
    is_foreign: bool,
    is_welcomed: bool,
    waiting: [VecDeque<Asked>; 2],
    /// The lane of the request that was not taken, until it is answered nevertheless.
    refused: Option<Lane>,
    last_position: [u64; 2],
    last_receive_ms: [u64; 2],
}

/// Plays one session. Returns its mailbox, and how many answers may still come that it did not wait for.
async fn session(
    world: Arc<World>,
    handle: CommitHandle,
    mailbox: Arc<Mailbox>,
    at: usize,
) -> (Arc<Mailbox>, usize) {
    let (hello_lane, is_foreign, is_second) = {
        let mut random = thread_rng();
        (
            lane(&mut random),
            random.gen_ratio(1, 4),
            at == 1 && random.gen_ratio(1, 2),
        )
    };
    let mut session = Session {
        // Two connections of one device at once, at times.
        device: device(if is_second { 2 } else { at }),
        is_foreign: is_foreign && !is_second && at != 2,
        is_welcomed: false,
        waiting: Default::default(),
        refused: None,
        last_position: [0; 2],
        last_receive_ms: [0; 2],
        world,
    };
    let claim = Claim {
        epoch: EPOCH,
        is_foreign: session.is_foreign,
        ..Claim::default()
    };
    let mut next = Some((hello_lane, Request::Hello(claim), Vec::new()));
    let mut sent = 0;
    let mut batches = 0;
    while let Some((lane, request, seqs)) = next {
        let world = &session.world;
        if handle.depth(lane) == world.plan.queue_requests {
            world.tally.lock().held_back += 1;
        }
        let is_hello = matches!(request, Request::Hello(_));
        let before_ms = world.clock.now_ms();
        let result = match handle.try_submit(session.device, lane, request, None, &mailbox) {
            Ok(()) => Ok(()),
            Err(NotQueued::HasToWait(request)) => {
                handle
                    .submit(session.device, lane, request, None, &mailbox)
                    .await
            }
            Err(NotQueued::Stopped) => Err(Stopped),
        };
        let after_ms = world.clock.now_ms();
        if result.is_err() {
            assert!(world.is_committer_gone(), "refused by a sound committer");
            world.tally.lock().refused += 1;
            session.refused = Some(lane);
            while session.in_flight() > 0 {
                session.receive(mailbox.take().await.answers);
            }
            // It may be answered all the same, which does not matter to a session that ends.
            return (mailbox, usize::from(session.refused.is_some()));
        }
        session.waiting[lane as usize].push_back(Asked {
            is_hello,
            seqs,
            between_ms: (before_ms, after_ms),
        });
        while session.in_flight() >= session.world.plan.in_flight {
            session.receive(mailbox.take().await.answers);
        }
        next = (batches < session.world.plan.batches).then(|| {
            let mut random = thread_rng();
            batches += 1;
            // As many pings as tells a lane's requests apart; now and then some that were sent before.
            let first = if random.gen_ratio(1, 4) {
                sent / 2
            } else {
                sent
            } + 1;
            let seqs: Vec<u64> = (first..first + batches as u64).collect();
            sent = sent.max(first + batches as u64 - 1);
            (lane_of(&mut random, hello_lane), request_of(&seqs), seqs)
        });
    }
    while session.in_flight() > 0 {
        session.receive(mailbox.take().await.answers);
    }
    (mailbox, 0)
}

impl Session {
    fn in_flight(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }

    fn receive(&mut self, answers: Vec<(Lane, Answer)>) {
        for (lane, answer) in answers {
            let Some(asked) = self.waiting[lane as usize].pop_front() else {
                assert!(
                    self.refused.take() == Some(lane) && matches!(answer, Answer::Lost),
                    "an answer that was not asked for: {answer:?}"
                );
                continue;
            };
            self.check(lane, &asked, answer);
        }
    }

    fn check(&mut self, lane: Lane, asked: &Asked, answer: Answer) {
        let Self { world, device, .. } = self;
        let mut tally = world.tally.lock();
        let (receive_ms, position) = match answer {
            Answer::Welcomed(welcomed) => {
                assert!(asked.is_hello, "a welcome to a batch");
                let is_new = welcomed.admission == Admission::NewEpoch;
                assert_eq!(is_new, self.is_foreign, "how Hello was understood");
                self.is_welcomed = true;
                (welcomed.receive_ms, welcomed.position)
            }
            Answer::Settled(settled) => {
                assert!(self.is_welcomed, "a batch was judged before its Hello");
                assert!(
                    !self.is_foreign,
                    "judged under an epoch that is another store's"
                );
                assert_eq!(settled.pings as usize, asked.seqs.len(), "out of order");
                for &seq in &asked.seqs {
                    assert!(settled.settled.contains(seq), "{seq} is not settled");
                    assert_eq!(
                        world.store.times_stored(*device, settled.epoch, seq),
                        1,
                        "{seq} was acknowledged, and so often it is durable"
                    );
                }
                tally.settled += 1;
                (settled.receive_ms, settled.position)
            }
            Answer::Granted(_) | Answer::Erased | Answer::Revoked => {
                panic!("nobody wants anything: {answer:?}")
            }
            Answer::Fenced => {
                assert!(self.is_welcomed, "a batch was judged before its Hello");
                assert!(self.is_foreign, "fenced in its own epoch");
                tally.fenced += 1;
                return;
            }
            Answer::Lost => {
                assert!(world.is_committer_gone(), "lost by a sound committer");
                tally.lost += 1;
                return;
            }
        };
        assert!(
            position <= world.store.durable_position(),
            "acknowledged before it was durable"
        );
        assert!(
            position <= world.freshness.position(),
            "acknowledged before it was visible"
        );
        assert!(
            self.last_position[lane as usize] <= position,
            "positions go back"
        );
        self.last_position[lane as usize] = position;
        let (before_ms, after_ms) = asked.between_ms;
        assert!(
            (before_ms..=after_ms).contains(&receive_ms),
            "handed over between {before_ms} and {after_ms}, received at {receive_ms}"
        );
        assert!(
            self.last_receive_ms[lane as usize] <= receive_ms,
            "receive times go back"
        );
        self.last_receive_ms[lane as usize] = receive_ms;
    }
}

/// Plays one checker: each of its orders is answered, and what an answer says is so.
async fn checker(world: Arc<World>, order: OrderHandle, at: usize) {
    let checker = checker_at(at);
    let before = deadlines_before(at).into_iter();
    let mut set: HashMap<_, _> = before.map(|one| (one.user, one.setting)).collect();
    for _ in 0..world.plan.orders {
        let wanted = {
            let mut random = thread_rng();
            let user = [OVERDUE, EXPECTED, UserId([0xee; 16])][random.gen_range(0..3)];
            let setting = Setting {
                expect_every_ms: DAY_MS,
                grace_ms: random.gen_range(0..3),
            };
            (user, random.gen_ratio(3, 4).then_some(setting))
        };
        let number = CheckerNumber::FIRST;
        let answer = order.set_deadlines(checker, number, vec![wanted]).await;
        let mut tally = world.tally.lock();
        match answer {
            Ok(position) => {
                match wanted {
                    (user, Some(setting)) => set.insert(user, setting),
                    (user, None) => set.remove(&user),
                };
                tally.ordered += 1;
                assert!(
                    position <= world.store.durable_position(),
                    "what it set is not durable"
                );
                assert!(
                    position <= world.freshness.position(),
                    "answered before it was visible"
                );
                let (user, _) = wanted;
                let now = world.bulletin.now(checker, |&late| late == user);
                assert_eq!(now.late, [], "late after its deadline was changed");
            }
            Err(OrderError::Refused(_)) => tally.too_many += 1,
            Err(OrderError::Stopped) => {
                assert!(
                    world.is_committer_gone() || world.is_stopping.load(Ordering::Relaxed),
                    "refused by a sound committer"
                );
                tally.orders_lost += 1;
                // It may have been carried out all the same.
                return;
            }
        }
        assert_eq!(
            world.store.deadlines_of(checker),
            set,
            "what it set is not durable"
        );
    }
}

/// What a checker has set before: for a user who is overdue, and for one who was called late and whose device is
/// about to be heard.
fn deadlines_before(at: usize) -> Vec<Registration> {
    let overdue = Registration {
        checker: checker_at(at),
        user: OVERDUE,
        setting: Setting {
            expect_every_ms: 1,
            grace_ms: 0,
        },
        since_ms: NOON_MS - 1_000,
        late: None,
    };
    let late = Registration {
        user: device(0).user,
        late: Some(Late {
            position: 0,
            at_ms: NOON_MS - 500,
            last_contact_ms: 0,
            due_ms: NOON_MS - 999,
        }),
        ..overdue
    };
    vec![overdue, late]
}

fn checker_at(at: usize) -> Checker {
    Checker([u8::try_from(at).unwrap() + 1; 16])
}

/// What is in the mailbox, without waiting.
fn taken_now(mailbox: &Mailbox) -> Vec<(Lane, Answer)> {
    match pin!(mailbox.take()).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(mail) => mail.answers,
        Poll::Pending => Vec::new(),
    }
}

fn request_of(seqs: &[u64]) -> Request {
    let pings: Vec<Ping> = seqs
        .iter()
        .map(|&seq| Ping::at(seq, NOON_MS, 0, 0))
        .collect();
    Request::Batch {
        columns: batch::encode(EPOCH, &pings).encode_to_vec(),
        batch: DecodedBatch {
            epoch: EPOCH,
            pings,
            malformed: Vec::new(),
        },
        density: Density::default(),
    }
}

fn lane(random: &mut impl Rng) -> Lane {
    Lane::ALL[random.gen_range(0..2)]
}

/// Half of the batches go on the lane of Hello.
fn lane_of(random: &mut impl Rng, hello_lane: Lane) -> Lane {
    if random.gen_ratio(1, 2) {
        hello_lane
    } else {
        lane(random)
    }
}

fn device(at: usize) -> DeviceId {
    DeviceId {
        user: UserId([u8::try_from(at).unwrap(); 16]),
        device: 1,
    }
}

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

const EPOCH: u32 = 7;
/// Users that no device is of.
const OVERDUE: UserId = UserId([0xfe; 16]);
const EXPECTED: UserId = UserId([0xfd; 16]);
const DAY_MS: u64 = 86_400_000;
/// Some noon, so that the day does not change.
const NOON_MS: u64 = 1_767_268_800_000;
