//! The follower against a small gateway that does all that the contract allows, and some that it forbids.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use waypost_proto::v1::{self, Header, State};

use super::*;

const PATIENCE: Patience = Patience {
    stale_after: Duration::from_secs(3),
    lost_after: Duration::from_secs(15),
};

fn user(number: u8) -> UserId {
    UserId([number; 16])
}

fn entry(number: u8, position: u64) -> Kind {
    Kind::Entry(v1::Entry {
        user: Bytes::copy_from_slice(&user(number).0),
        state: State::Active.into(),
        position,
        ..v1::Entry::default()
    })
}

fn header(position: u64) -> Kind {
    Kind::Header(Header {
        position,
        ..Header::default()
    })
}

fn progress(position: u64) -> Kind {
    Kind::Progress(Progress {
        resolved_ms: position,
        position,
        token: token(0, position),
        ..Progress::default()
    })
}

fn snapshot_end(count: u64, position: u64) -> Kind {
    Kind::SnapshotEnd(SnapshotEnd {
        count,
        position,
        token: token(0, position),
    })
}

/// A store's number and a position.
fn token(store: u8, position: u64) -> Bytes {
    Bytes::from([&[store], &position.to_be_bytes()[..]].concat())
}

/// A follower and the events it has given.
struct Following {
    follower: Follower,
    now: Instant,
    events: VecDeque<Event>,
}

impl Following {
    fn new(from: Option<Resume>) -> Self {
        let now = Instant::now();
        Self {
            follower: Follower::new(from, PATIENCE, now),
            now,
            events: VecDeque::new(),
        }
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    fn begin(&mut self) {
        self.follower.begin(self.now);
    }

    fn take(&mut self, kinds: impl IntoIterator<Item = Kind>) -> Result<(), Violation> {
        kinds
            .into_iter()
            .try_for_each(|kind| self.follower.take(kind, self.now, &mut self.events))
    }

    fn stream(&mut self, kinds: impl IntoIterator<Item = Kind>) -> Result<(), Violation> {
        self.begin();
        self.take(kinds)
    }

    /// What was said since, in short.
    fn said(&mut self) -> String {
        let words = self.events.drain(..).map(|event| match event {
            Event::Connected { position } => format!("connected{position}"),
            Event::Reset { reason } => format!("reset{}", reason as i32),
            Event::Entry { entry, is_snapshot } => {
                let mark = if is_snapshot { "s" } else { "e" };
                format!("{mark}{}@{}", entry.user.0[0], entry.position)
            }
            Event::SnapshotEnd { position, .. } => format!("end{position}"),
            Event::Progress { position, .. } => format!("progress{position}"),
            Event::Coverage(gap) => format!("gap{}", gap.from_ms),
            Event::Deadline(deadline) => {
                format!("deadline{}@{}", deadline.user.0[0], deadline.position)
            }
            Event::Transition(transition) => {
                format!("transition{}@{}", transition.number, transition.position)
            }
            Event::Stale { resolved_ms } => format!("stale{resolved_ms}"),
            Event::Live { resolved_ms } => format!("live{resolved_ms}"),
            Event::Disconnected { .. } => "disconnected".to_owned(),
        });
        words.collect::<Vec<_>>().join(" ")
    }
}

fn snapshot() -> [Kind; 4] {
    [header(0), entry(1, 5), entry(2, 3), snapshot_end(2, 5)]
}

#[test]
fn a_snapshot_and_its_changes_are_given_as_they_come() {
    let mut following = Following::new(None);
    following.stream(snapshot()).unwrap();
    following.take([entry(1, 6), progress(6)]).unwrap();
    assert_eq!(following.said(), "connected0 s1@5 s2@3 end5 e1@6 progress6");
}

#[test]
fn what_comes_again_after_the_connection_broke_is_given_once() {
    let mut following = Following::new(None);
    following.stream(snapshot()).unwrap();
    following.take([entry(1, 7), entry(2, 6)]).unwrap();
    following.said();
    // Not announced, so the gateway sends it again.
    assert_eq!(following.follower.token(), token(0, 5));
    following
        .stream([
            header(5),
            entry(1, 7),
            entry(2, 6),
            entry(3, 8),
            progress(8),
        ])
        .unwrap();
    assert_eq!(following.said(), "connected5 e3@8 progress8");
}

#[test]
fn what_a_stored_resume_covers_is_dropped_also_when_the_gateway_goes_further_back() {
    let mut following = Following::new(Some(Resume::new(7, token(0, 7))));
    following
        .stream([
            header(4),
            entry(1, 5),
            progress(5),
            entry(2, 7),
            entry(3, 8),
        ])
        .unwrap();
    assert_eq!(following.said(), "connected4 progress7 e3@8");
    assert_eq!(following.follower.token(), token(0, 7));
}

#[test]
fn gaps_deadlines_and_transitions_are_given_once_too_and_only_in_their_place() {
    let gap = |position, until_ms| {
        Kind::Coverage(v1::Coverage {
            from_ms: 3,
            until_ms,
            position,
            ..v1::Coverage::default()
        })
    };
    let late = |position| {
        Kind::Deadline(v1::Deadline {
            user: Bytes::copy_from_slice(&user(1).0),
            position,
            ..v1::Deadline::default()
        })
    };
    let turn = |position, number| {
        Kind::Transition(v1::Transition {
            user: Bytes::copy_from_slice(&user(1).0),
            position,
            number,
            ..v1::Transition::default()
        })
    };
    let mut following = Following::new(None);
    // Those of a snapshot are not in its count.
    following
        .stream([
            header(0),
            gap(2, 0),
            late(4),
            entry(1, 5),
            snapshot_end(1, 5),
        ])
        .unwrap();
    // Two in one commit, to and fro.
    following
        .take([gap(6, 9), turn(6, 0), turn(6, 1), late(7), entry(1, 7)])
        .unwrap();
    assert_eq!(
        following.said(),
        "connected0 gap3 deadline1@4 s1@5 end5 gap3 transition0@6 transition1@6 deadline1@7 e1@7"
    );
    following
        .stream([
            header(5),
            gap(6, 9),
            turn(6, 0),
            turn(6, 1),
            turn(6, 2),
            late(7),
            entry(1, 7),
            progress(7),
        ])
        .unwrap();
    assert_eq!(following.said(), "connected5 transition2@6 progress7");
    for kind in [gap(7, 9), late(7), turn(7, 0)] {
        let violation = following.take([kind]).unwrap_err();
        assert!(matches!(violation, Violation::AfterAnnouncement { .. }));
    }
}

#[test]
fn an_interrupted_snapshot_begins_anew_and_says_so() {
    let mut following = Following::new(None);
    following.stream([header(0), entry(1, 5)]).unwrap();
    following.stream(snapshot()).unwrap();
    assert_eq!(
        following.said(),
        "connected0 s1@5 connected0 reset0 s1@5 s2@3 end5"
    );
}

#[test]
fn a_reset_is_told_once_with_its_reason() {
    let mut following = Following::new(Some(Resume::new(7, token(9, 7))));
    let reset = Kind::Reset(Reset {
        reason: reset::Reason::OtherStore.into(),
    });
    following
        .stream([header(0), reset, entry(1, 2), snapshot_end(1, 2)])
        .unwrap();
    assert_eq!(following.said(), "connected0 reset1 s1@2 end2");
    assert_eq!(following.follower.token(), token(0, 2));
}

#[test]
fn half_a_snapshot_is_nothing_to_resume_from() {
    let mut following = Following::new(Some(Resume::new(7, token(9, 7))));
    let reset = Kind::Reset(Reset::default());
    following.stream([header(0), reset, entry(1, 2)]).unwrap();
    assert!(following.follower.token().is_empty());
}

/// The negative controls of the order: each of these must be noticed.
#[test]
fn each_broken_promise_is_a_violation() {
    let announced = |kind: Kind| {
        let mut following = Following::new(None);
        following.stream(snapshot()).unwrap();
        following.take([progress(6)]).unwrap();
        following.take([kind]).unwrap_err().to_string()
    };
    let begun = |kinds: &[Kind]| {
        let mut following = Following::new(Some(Resume::new(5, token(0, 5))));
        following
            .stream(kinds.iter().cloned())
            .unwrap_err()
            .to_string()
    };
    let nobody = Kind::Entry(v1::Entry::default());
    for (noticed, words) in [
        (announced(entry(1, 6)), "after 6 was announced"),
        (announced(progress(5)), "went back from 6 to 5"),
        (
            announced(snapshot_end(0, 7)),
            "the end of a snapshot came out of turn",
        ),
        (announced(header(6)), "a second header"),
        (announced(nobody), "named by 0 bytes"),
        (begun(&[header(6)]), "goes on after 6, not after 5"),
        (begun(&[progress(6)]), "before the header"),
        (begun(&[header(5), entry(1, 5)]), "after 5 was announced"),
        (
            begun(&[header(0), entry(1, 5), snapshot_end(2, 5)]),
            "held 2 entries, but 1 came",
        ),
        (
            begun(&[header(0), entry(1, 5), progress(5)]),
            "progress within a snapshot",
        ),
    ] {
        assert!(noticed.contains(words), "{noticed}");
    }
}

#[test]
fn silence_of_the_stream_is_its_own_state() {
    let mut following = Following::new(None);
    following.stream(snapshot()).unwrap();
    following.take([progress(6)]).unwrap();
    following.said();
    following.wait(2_999);
    assert!(following.follower.overdue(following.now).is_none());
    // Entries alone, and progress that stands still, do not make it live.
    following.take([entry(1, 9), progress(6)]).unwrap();
    following.wait(1);
    let stale = following.follower.overdue(following.now);
    assert!(matches!(
        stale,
        Some(Overdue::Stale(Event::Stale { resolved_ms: 6 }))
    ));
    assert!(following.follower.overdue(following.now).is_none(), "once");
    following.take([progress(9)]).unwrap();
    assert_eq!(following.said(), "e1@9 progress6 progress9 live9");
}

#[test]
fn a_stream_is_stale_without_a_connection_too_and_given_up_when_it_does_not_move() {
    let mut following = Following::new(None);
    following.wait(3_000);
    let stale = following.follower.overdue(following.now);
    assert!(matches!(stale, Some(Overdue::Stale(_))));
    assert_eq!(following.follower.due(), None, "nothing to give up");
    following.begin();
    following.wait(14_999);
    assert!(following.follower.overdue(following.now).is_none());
    following.wait(1);
    assert_eq!(following.follower.due(), Some(following.now));
    let lost = following.follower.overdue(following.now);
    assert!(matches!(lost, Some(Overdue::Motionless)));
}

#[test]
fn a_snapshot_that_flows_is_not_stale() {
    let mut following = Following::new(None);
    following.stream([header(0)]).unwrap();
    for position in 1..10 {
        following.wait(2_000);
        following.take([entry(1, position)]).unwrap();
        assert!(following.follower.overdue(following.now).is_none());
    }
}

/// What happens to the gateway, the connection and the consumer.
#[derive(Clone, Copy, Debug)]
enum Happening {
    /// A user is heard.
    Commit(u8),
    /// The stream brings so many events, entries in an order that this turns.
    Read(u8, u8),
    /// The connection breaks; the next stream starts so far before the token, if it may.
    Break(u8),
    /// The consumer's process ends, and another begins with what it stored.
    Crash,
    /// Another store takes the place of this one, without some user.
    Replace(u8),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0u8..5).prop_map(Happening::Commit),
        6 => (1u8..6, any::<u8>()).prop_map(|(count, turn)| Happening::Read(count, turn)),
        2 => (0u8..3).prop_map(Happening::Break),
        1 => Just(Happening::Crash),
        1 => (0u8..5).prop_map(Happening::Replace),
    ]
}

/// The last commit of each user.
#[derive(Default)]
struct Store {
    number: u8,
    head: u64,
    newest: BTreeMap<u8, u64>,
}

/// One stream of it.
struct Stream {
    after: u64,
    count: Option<u64>,
    sent: BTreeMap<u8, u64>,
    queue: VecDeque<Kind>,
}

impl Store {
    fn open(&self, token: &Bytes, back: u8) -> Stream {
        let place = token
            .split_first()
            .map(|(store, position)| (*store, u64::from_be_bytes(position.try_into().unwrap())));
        let mut queue = VecDeque::new();
        let after = match place {
            Some((store, position)) if store == self.number && 0 < position => {
                position.saturating_sub(back.into()).max(1)
            }
            _ => 0,
        };
        queue.push_back(header(after));
        if place.is_some_and(|(store, _)| store != self.number) {
            queue.push_back(Kind::Reset(Reset::default()));
        }
        Stream {
            after,
            count: (after == 0).then_some(0),
            sent: BTreeMap::new(),
            queue,
        }
    }

    /// The stream's next event.
    fn next(&self, stream: &mut Stream, turn: u8) -> Kind {
        if let Some(kind) = stream.queue.pop_front() {
            return kind;
        }
        let mut pending: Vec<_> = self
            .newest
            .iter()
            .filter(|&(user, position)| {
                stream.after < *position && stream.sent.get(user) != Some(position)
            })
            .collect();
        let turn = usize::from(turn) % pending.len().max(1);
        pending.rotate_left(turn);
        if let Some(&(&user, &position)) = pending.first() {
            stream.sent.insert(user, position);
            stream.count = stream.count.map(|count| count + 1);
            return entry(user, position);
        }
        match stream.count.take() {
            Some(count) => Kind::SnapshotEnd(SnapshotEnd {
                count,
                position: self.head,
                token: token(self.number, self.head),
            }),
            None => Kind::Progress(Progress {
                resolved_ms: self.head,
                position: self.head,
                token: token(self.number, self.head),
                ..Progress::default()
            }),
        }
    }
}

/// A consumer's effects: what it knows, and each change that it acted on.
#[derive(Clone, Default)]
struct Effects {
    known: BTreeMap<u8, u64>,
    acted: BTreeSet<(u8, u64)>,
    resume: Option<Resume>,
}

impl Effects {
    /// Works through what was given; true if it was stored at the end.
    fn work(&mut self, event: Event) -> bool {
        match event {
            Event::Reset { .. } => {
                self.known.clear();
                // Another store counts anew.
                self.acted.clear();
                self.resume = None;
                false
            }
            Event::Entry { entry, is_snapshot } => {
                let number = entry.user.0[0];
                let change = (number, entry.position);
                self.known.insert(number, entry.position);
                assert!(
                    is_snapshot || self.acted.insert(change),
                    "{change:?} was acted on before"
                );
                false
            }
            Event::SnapshotEnd { resume, .. } | Event::Progress { resume, .. } => {
                self.resume = Some(resume);
                true
            }
            _ => false,
        }
    }
}

/// Plays it and returns how many entries the gateway sent, and how many were given.
fn play(happenings: &[Happening]) -> (usize, usize) {
    let mut store = Store::default();
    let mut following = Following::new(None);
    let (mut sent, mut given) = (0, 0);
    let (mut effects, mut stored) = (Effects::default(), Effects::default());
    let mut stream = store.open(&Bytes::new(), 0);
    following.begin();
    let settle = [Happening::Break(0), Happening::Read(40, 0)];
    for happening in happenings.iter().chain(&settle) {
        match *happening {
            Happening::Commit(user) => {
                store.head += 1;
                store.newest.insert(user, store.head);
                continue;
            }
            Happening::Read(count, turn) => {
                for _ in 0..count {
                    let kind = store.next(&mut stream, turn);
                    sent += usize::from(matches!(kind, Kind::Entry(_)));
                    following.take([kind]).unwrap();
                    while let Some(event) = following.events.pop_front() {
                        given += usize::from(matches!(event, Event::Entry { .. }));
                        if effects.work(event) {
                            stored = effects.clone();
                        }
                    }
                }
                continue;
            }
            Happening::Break(back) => {
                stream = store.open(&following.follower.token(), back);
            }
            Happening::Crash => {
                effects = stored.clone();
                following = Following::new(stored.resume.clone());
                stream = store.open(&following.follower.token(), 0);
            }
            Happening::Replace(user) => {
                store.number += 1;
                store.newest.remove(&user);
                stream = store.open(&following.follower.token(), 0);
            }
        }
        following.begin();
    }
    assert_eq!(
        effects.known, store.newest,
        "who is gone is gone, and all others are known"
    );
    assert_eq!(stored.known, store.newest, "and all of it was stored");
    (sent, given)
}

/// The control: the gateway does send changes again, and it is the follower that keeps them from the consumer.
#[test]
fn without_the_follower_changes_would_come_twice() {
    let twice = [
        Happening::Commit(1),
        Happening::Read(3, 0),
        Happening::Commit(1),
        Happening::Read(1, 0),
    ];
    // The header, the entry, the end of the snapshot, the change; then the change again.
    assert_eq!(play(&twice), (3, 2));
}

proptest! {
    /// A consumer who stores its effects together with the resume acts on each change once, forgets what
    /// a reset forgets, and ends knowing what the store knows: through broken connections, crashes of its
    /// own and another store.
    #[test]
    fn a_consumer_is_exactly_once(happenings in prop::collection::vec(happening(), 0..60)) {
        play(&happenings);
    }
}
