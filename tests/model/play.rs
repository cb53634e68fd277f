//! One run: devices, checkers and restarts, in an order that a seed draws, and the judgement at its end.
//!
//! Knows what may happen and how often. Must not know what is right; that is [`crate::judge`]'s and
//! [`crate::history`]'s. What happens is the same for a seed, but how far threads are when it does is not.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{sleep, timeout};
use waypost_gateway::store::Store;
use waypost_proto::{
    id::{DeviceId, UserId},
    ping::{MAX_LATITUDE_E7, Ping, Source},
    session::Wish,
    v1::{DeadlineSetting, GetRequest, ListStaleRequest, SetDeadlinesRequest, State},
};

use crate::{
    device::{Book, Device, PUT_OFF},
    history::{History, Value, Wants, bit},
    judge::{Selection, Tally, Truth, is_as_it_was, judge, whoever_came_back_has_recovered},
    subscriber::{Nature, Order, Subscriber, With},
    world::{CHECKERS, OpenFeed, World},
};

/// What came of a run in which nothing was wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) told: Tally,
    pub(crate) requests: u64,
    pub(crate) stored: u64,
    pub(crate) duplicates: u64,
    pub(crate) rejected: u64,
    pub(crate) early: u64,
    pub(crate) turns: u64,
    pub(crate) lost: u64,
    pub(crate) restarts: u64,
    pub(crate) crashes: u64,
    pub(crate) rushes: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.told.add(other.told);
        self.requests += other.requests;
        self.stored += other.stored;
        self.duplicates += other.duplicates;
        self.rejected += other.rejected;
        self.early += other.early;
        self.turns += other.turns;
        self.lost += other.lost;
        self.restarts += other.restarts;
        self.crashes += other.crashes;
        self.rushes += other.rushes;
    }
}

/// Plays a run.
///
/// # Errors
/// What was wrong, and what happened last.
pub(crate) async fn play(seed: u64, open_feed: OpenFeed) -> Result<Counts, String> {
    let mut play = Play::begin(seed, open_feed).await;
    let played = timeout(PATIENCE, async {
        for step in 1..=STEPS {
            play.step().await;
            if step.is_multiple_of(STEPS / 3) {
                play.rush().await;
            }
        }
        play.end().await
    });
    let outcome = match played.await {
        Ok(Ok(counts)) => Ok(counts),
        Ok(Err(wrong)) => Err(format!("{wrong}\n{}", play.trace())),
        Err(_) => Err(format!("nothing moves any more\n{}", play.trace())),
    };
    play.world.leave();
    outcome
}

struct Play {
    dice: StdRng,
    world: World,
    devices: Vec<Device>,
    subscribers: Vec<Subscriber>,
    book: Book,
    released: [BTreeSet<UserId>; CHECKERS.len()],
    /// Who has asked to pause last, and not to resume.
    paused: BTreeSet<UserId>,
    /// Who has withdrawn last, and not granted again, and from which checker.
    withdrawn: BTreeSet<(UserId, usize)>,
    counts: Counts,
    trace: VecDeque<String>,
}

impl Play {
    async fn begin(seed: u64, open_feed: OpenFeed) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        let mut devices = Vec::new();
        for number in 0..USERS {
            for device in 1..=dice.random_range(1..=3) {
                let user = user(number);
                devices.push(Device::new(DeviceId { user, device }));
            }
        }
        let subscribers =
            (0..SUBSCRIBERS).map(|number| Subscriber::start(nature(number, &mut dice)));
        Self {
            subscribers: subscribers.collect(),
            world: World::start(open_feed).await,
            dice,
            devices,
            book: Book::default(),
            released: Default::default(),
            paused: BTreeSet::new(),
            withdrawn: BTreeSet::new(),
            counts: Counts::default(),
            trace: VecDeque::new(),
        }
    }

    fn note(&mut self, what: String) {
        if self.trace.len() == LONGEST_TRACE {
            self.trace.pop_front();
        }
        self.trace.push_back(what);
    }

    fn trace(&self) -> String {
        let last: Vec<_> = self.trace.iter().map(|what| format!("  {what}")).collect();
        format!("happened last:\n{}", last.join("\n"))
    }

    /// Something happens.
    async fn step(&mut self) {
        match self.dice.random_range(0..1_000) {
            0..=1 => self.restart().await,
            2..=3 => self.crash().await,
            4..=13 => self.set_deadlines().await,
            14..=93 => self.subscriber().await,
            // So that some users are silent for long enough to be late.
            94..=99 => sleep(Duration::from_millis(self.dice.random_range(20..120))).await,
            100..=129 => self.decide().await,
            _ => self.device().await,
        }
        if self.dice.random_ratio(1, 4) {
            // Commits go on meanwhile; nothing depends on how many.
            sleep(Duration::from_millis(1)).await;
        }
    }

    async fn device(&mut self) {
        let which = self.dice.random_range(0..self.devices.len());
        let event = self.dice.random_range(0..100);
        let (dice, life, book) = (&mut self.dice, self.world.life(), &mut self.book);
        let device = &mut self.devices[which];
        let now_ms = life.clock.now_ms();
        let what = match event {
            0..=44 => {
                for _ in 0..dice.random_range(1..=3) {
                    device.push(ping(now_ms, dice));
                }
                "pings"
            }
            45..=49 => {
                for _ in 0..dice.random_range(6..=14) {
                    device.push(ping(now_ms, dice));
                }
                "has a backlog"
            }
            50..=54 => {
                device.push(bad_ping(now_ms, dice));
                "has a ping that will be refused"
            }
            55..=61 => {
                device.push_again(dice.random_range(0..1_000));
                "sends again"
            }
            62..=73 => {
                device.heartbeat(life, book).await;
                "heartbeat"
            }
            74..=77 => {
                device.late_heartbeat(life, book).await;
                "heartbeat on an older connection"
            }
            78..=85 => {
                let is_early = dice.random_bool(0.5) && !device.has_backfill_in_flight();
                device.connect(is_early, life, book).await;
                if is_early {
                    "connects with early data"
                } else {
                    "connects"
                }
            }
            86..=91 => {
                device.disconnect();
                "is cut off"
            }
            92..=96 if !device.has_backfill_in_flight() => {
                device.replay(life, book);
                "is replayed"
            }
            97 => {
                let user = device.id.user;
                // Who asks to resume and has not paused is heard, and nobody would learn when.
                let wish = if dice.random_bool(0.8) && self.paused.contains(&user) {
                    Wish::Resume
                } else {
                    Wish::Pause
                };
                if device.want(Wants::Share(wish), life, book).await {
                    note_wish(&mut self.paused, user, wish);
                }
                if wish == Wish::Pause {
                    "pauses"
                } else {
                    "resumes"
                }
            }
            98 if device.is_quiet() => {
                device.wipe();
                "is installed anew"
            }
            _ => "",
        };
        let id = device.id;
        device.read(life, book).await;
        // Drawn in any case: how far an answer is must not change what is drawn next.
        let (connects, shakes_hands) = (dice.random_bool(0.5), dice.random_bool(0.7));
        if connects && !device.is_connected() {
            device.connect(false, life, book).await;
        } else if shakes_hands {
            device.finish_handshake(life, book).await;
        }
        let deferral = dice.random_ratio(1, 20).then_some(PUT_OFF);
        device.send(deferral, life, book).await;
        self.note(format!("{id:?} {what}"));
    }

    /// A holder withdraws what a checker is granted, or grants it again.
    async fn decide(&mut self) {
        let of_deciding = |device: &&mut Device| decides(&device.id.user);
        let mut devices: Vec<_> = self.devices.iter_mut().filter(of_deciding).collect();
        let device = devices.swap_remove(self.dice.random_range(0..devices.len()));
        let checker = self.dice.random_range(0..CHECKERS.len());
        let place = (device.id.user, checker);
        let is_granted = self.withdrawn.contains(&place);
        let wants = Wants::Tell {
            checker,
            is_granted,
        };
        let (life, book) = (self.world.life(), &mut self.book);
        if device.want(wants, life, book).await {
            note_decision(&mut self.withdrawn, place, is_granted);
        }
        let what = format!("{:?} wants {wants:?}", device.id);
        self.note(what);
    }

    /// Everybody is heard again and again, while some checkers read nothing: more than is kept for those who are nearly
    /// level, so that these are told newer and fewer values.
    async fn rush(&mut self) {
        self.note("a rush".to_owned());
        self.counts.rushes += 1;
        for subscriber in &self.subscribers {
            if subscriber.nature.window_bytes.is_some() && self.dice.random_bool(0.8) {
                subscriber.order(Order::Read(0)).await;
            }
        }
        for _ in 0..RUSH {
            let (life, book) = (self.world.life(), &mut self.book);
            for device in &mut self.devices {
                device.heartbeat(life, book).await;
            }
        }
        for subscriber in &self.subscribers {
            subscriber.order(Order::ReadOn).await;
        }
    }

    async fn subscriber(&mut self) {
        let which = self.dice.random_range(0..self.subscribers.len());
        let with = match self.dice.random_range(0..20) {
            0..=11 => With::Newest,
            12..=15 => With::Older(self.dice.random_range(1..200)),
            16..=17 => With::Nothing,
            _ => With::Forged,
        };
        let begin = Order::Begin(self.world.life().address, with);
        let order = match self.dice.random_range(0..10) {
            0..=1 => begin,
            2 => Order::Cut,
            3..=6 => Order::Read(self.dice.random_range(0..4)),
            _ => Order::ReadOn,
        };
        self.subscribers[which].order(order).await;
        self.note(format!("subscriber {which}: {order:?}"));
    }

    async fn set_deadlines(&mut self) {
        let checker = self.dice.random_range(0..CHECKERS.len());
        let dice = &mut self.dice;
        let mut deadlines = Vec::new();
        for _ in 0..dice.random_range(1..=6) {
            // A deadline goes with its grant, and cannot be set without it; `tests/it` has that.
            let user = user(dice.random_range(0..USERS));
            if decides(&user) {
                continue;
            }
            let is_removed = dice.random_ratio(1, 8);
            if is_removed {
                self.released[checker].insert(user);
            }
            deadlines.push(DeadlineSetting {
                user: Bytes::copy_from_slice(&user.0),
                expect_every_ms: if is_removed {
                    0
                } else {
                    dice.random_range(1..150)
                },
                grace_ms: dice.random_range(0..50),
            });
        }
        self.note(format!(
            "{} sets {} deadlines",
            CHECKERS[checker],
            deadlines.len()
        ));
        let mut client = self.world.checker(checker).await;
        client
            .set_deadlines(SetDeadlinesRequest { deadlines })
            .await
            .unwrap();
    }

    async fn restart(&mut self) {
        self.note("restart".to_owned());
        self.counts.restarts += 1;
        self.world.restart().await;
        self.begin_again().await;
    }

    async fn crash(&mut self) {
        self.note("crash".to_owned());
        self.counts.crashes += 1;
        self.world.crash().await;
        self.begin_again().await;
    }

    /// Whoever had a connection has none. Most checkers come back at once.
    async fn begin_again(&mut self) {
        for device in &mut self.devices {
            device.bury(&mut self.book);
        }
        // What was wanted and went with the committer does not hold.
        let mut granted = self.book.wanted.clone();
        granted.sort_by_key(|wanted| wanted.number);
        self.paused.clear();
        self.withdrawn.clear();
        for wanted in granted {
            let user = wanted.device.user;
            match wanted.wants {
                Wants::Share(wish) => note_wish(&mut self.paused, user, wish),
                Wants::Tell {
                    checker,
                    is_granted,
                } => note_decision(&mut self.withdrawn, (user, checker), is_granted),
            }
        }
        let address = self.world.life().address;
        for subscriber in &self.subscribers {
            if self.dice.random_bool(0.7) {
                subscriber.order(Order::Begin(address, With::Newest)).await;
            }
        }
    }

    /// Nothing new happens: everything gets through, and is judged.
    async fn end(&mut self) -> Result<Counts, String> {
        while !self.devices.iter().all(Device::is_quiet) || !self.is_sent() {
            let (life, book) = (self.world.life(), &mut self.book);
            for device in &mut self.devices {
                if !device.is_connected() && !device.is_settled() {
                    device.connect(false, life, book).await;
                }
                device.finish_handshake(life, book).await;
                device.read(life, book).await;
                device.send(None, life, book).await;
            }
            sleep(Duration::from_millis(1)).await;
        }
        let facts = std::mem::take(&mut self.book.facts);
        self.counts.requests = facts.len() as u64;
        self.counts.lost = self.book.lost;
        let transitions = self.world.transitions();
        let history = History::of(facts, &self.book.wanted, &transitions)?;
        self.counts.stored = history.stored().len() as u64;
        self.counts.duplicates = history.duplicates;
        self.counts.rejected = history.rejected;
        self.counts.early = history.early;
        self.counts.turns = history.turns;
        let head = self.world.head();
        let finish = Order::Finish {
            address: self.world.life().address,
            position: head.position.max(history.position()),
            resolved_ms: self.world.life().clock.now_ms(),
        };
        for subscriber in &self.subscribers {
            subscriber.order(finish).await;
        }
        let mut logs = Vec::new();
        for subscriber in std::mem::take(&mut self.subscribers) {
            let nature = subscriber.nature.clone();
            logs.push((nature, subscriber.log().await));
        }
        let spans = self.world.spans();
        let events = [0, 1].map(|checker| self.world.events(checker));
        for (nature, log) in &logs {
            let truth = Truth {
                history: &history,
                checker: bit(nature.checker),
                spans: &spans,
                events: &events[nature.checker],
                transitions: &transitions,
                released: &self.released[nature.checker],
            };
            let tally = judge(log, &nature.selection, &truth)
                .map_err(|wrong| format!("{nature:?}: {wrong}"))?;
            self.counts.told.add(tally);
            whoever_came_back_has_recovered(&truth)?;
        }
        self.ask(&history).await?;
        let data = self.world.stop().await;
        look_into_store(&Store::open_read_only(&data).unwrap(), &history)?;
        Ok(self.counts)
    }

    fn is_sent(&self) -> bool {
        self.devices.iter().all(Device::is_settled)
    }

    /// Get and ListStale say the same as the streams.
    async fn ask(&self, history: &History) -> Result<(), String> {
        let mut client = self.world.checker(0).await;
        let users: Vec<_> = (0..=USERS).map(user).collect();
        let user_ids = users
            .iter()
            .map(|user| Bytes::copy_from_slice(&user.0))
            .collect();
        let got = client
            .get(GetRequest { user_ids })
            .await
            .unwrap()
            .into_inner()
            .entries;
        for (user, entry) in users.iter().zip(&got) {
            let has_withdrawn = self.withdrawn.contains(&(*user, 0));
            let is_right = match history.last(user) {
                _ if has_withdrawn => entry.state() == State::Withdrawn && entry.position == 0,
                Some(value) => is_as_it_was(entry, value).is_ok(),
                None => entry.state() == State::NeverSeen && entry.position == 0,
            };
            if !is_right || entry.user != user.0[..] {
                return Err(format!(
                    "Get said {entry:?} of {user}, and {:?} is true",
                    history.last(user)
                ));
            }
        }
        let mut silent = Vec::new();
        let mut request = ListStaleRequest {
            older_than_ms: u64::MAX,
            page_size: 5,
            ..ListStaleRequest::default()
        };
        loop {
            let page = client
                .list_stale(request.clone())
                .await
                .unwrap()
                .into_inner();
            silent.extend(page.entries);
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                break;
            }
        }
        let is_ascending =
            silent.is_sorted_by_key(|entry| (entry.last_contact_ms, entry.user.clone()));
        let listed: BTreeSet<_> = silent.iter().map(|entry| entry.user.to_vec()).collect();
        let sharing = history.users().filter(|user| {
            let is_active = |value: &Value| value.state == State::Active;
            history.last(user).is_some_and(is_active) && !self.withdrawn.contains(&(*user, 0))
        });
        let expected: BTreeSet<_> = sharing.map(|user| user.0.to_vec()).collect();
        if listed != expected || listed.len() != silent.len() || !is_ascending {
            return Err(format!("ListStale said {silent:?}, and {expected:?} share"));
        }
        Ok(())
    }
}

fn note_decision(
    withdrawn: &mut BTreeSet<(UserId, usize)>,
    place: (UserId, usize),
    is_granted: bool,
) {
    if is_granted {
        withdrawn.remove(&place);
    } else {
        withdrawn.insert(place);
    }
}

fn note_wish(paused: &mut BTreeSet<UserId>, user: UserId, wish: Wish) {
    if wish == Wish::Pause {
        paused.insert(user);
    } else {
        paused.remove(&user);
    }
}

/// Every ping that was accepted is there, once, and no other.
fn look_into_store(store: &Store, history: &History) -> Result<(), String> {
    let mut stored = BTreeSet::new();
    for row in store.rows() {
        let row = row.map_err(|error| error.to_string())?;
        for ping in row.record.pings {
            let ping = (row.key.device, row.key.epoch, ping.seq);
            if !stored.insert(ping) {
                return Err(format!("{ping:?} is stored twice"));
            }
        }
    }
    match stored.symmetric_difference(history.stored()).next() {
        Some(ping) => Err(format!(
            "{ping:?} is {} in the store, against what was answered",
            if stored.contains(ping) { "" } else { "not" }
        )),
        None => Ok(()),
    }
}

/// Some want everybody, some a few users, one of whom is never heard; some read in small bites.
fn nature(number: usize, dice: &mut StdRng) -> Nature {
    let users = (number % 3 == 1).then(|| {
        let chosen = (0..=USERS).filter(|_| dice.random_bool(0.4));
        chosen.map(user).chain([user(USERS)]).collect()
    });
    Nature {
        checker: number % CHECKERS.len(),
        selection: Selection {
            users,
            is_active_only: number % 4 == 3,
        },
        window_bytes: number
            .is_multiple_of(2)
            .then(|| dice.random_range(100..1_000)),
    }
}

/// Of every fourth user the holder decides who is told.
fn decides(user: &UserId) -> bool {
    user.0[0] % 4 == 1
}

fn user(number: u8) -> UserId {
    UserId([number + 1; 16])
}

/// Sampled some time ago, in any order; not all of them are fixes.
fn ping(now_ms: u64, dice: &mut StdRng) -> Ping {
    let source = if dice.random_ratio(1, 4) {
        Source::LastKnown
    } else {
        Source::Gnss
    };
    let time_ms = now_ms + 60_000 - dice.random_range(0..3_600_000);
    Ping {
        source,
        ..Ping::at(1, time_ms, 541_000_000, -45_000_000)
    }
}

/// From nowhere on earth, from the future, or from before anybody remembers.
fn bad_ping(now_ms: u64, dice: &mut StdRng) -> Ping {
    match dice.random_range(0..3) {
        0 => Ping::at(1, now_ms, MAX_LATITUDE_E7 + 1, 0),
        1 => Ping::at(1, now_ms + 3_600_000, 0, 0),
        _ => Ping::at(1, now_ms - 40 * 86_400_000, 0, 0),
    }
}

const USERS: u8 = 24;
const SUBSCRIBERS: usize = 8;
const STEPS: usize = 1_500;
/// How often everybody is heard in a rush.
const RUSH: usize = 130;
const LONGEST_TRACE: usize = 60;
/// Only a run that hangs takes so long.
const PATIENCE: Duration = Duration::from_secs(300);
