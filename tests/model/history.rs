//! The model: everything that is true of users, made of what the committer answered.
//!
//! Knows the promises of the device protocol. Shares nothing with the gateway but the numbers in its answers: when a
//! request was received, in which commit it is, and which pings were refused; and of pauses, whose answers tell no
//! number, the commits that the store says they are in. Must not know what any checker was told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use waypost_gateway::{
    grants::{CheckerNumber, CheckerSet},
    sharing::{Sharing, Transition, Turn},
};
use waypost_proto::{
    device::is_retryable,
    id::{DeviceId, UserId},
    ping::{Ping, RejectCode},
    session::{Lane, Wish},
    v1::State,
};

/// What a holder can want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wants {
    Share(Wish),
    /// That a checker, by its place among them, is told or not.
    Tell {
        checker: usize,
        is_granted: bool,
    },
}

/// What a holder wanted and was granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) device: DeviceId,
    pub(crate) wants: Wants,
    /// As in [`Fact`]; always on LIVE.
    pub(crate) number: u64,
    /// It was not received before.
    pub(crate) asked_ms: u64,
}

/// A request that is in a commit.
#[derive(Clone, Debug)]
pub(crate) struct Fact {
    pub(crate) device: DeviceId,
    pub(crate) position: u64,
    pub(crate) lane: Lane,
    /// Of two requests on a lane, the one with the lower number came first.
    pub(crate) number: u64,
    pub(crate) receive_ms: u64,
    /// The commit's time, where the answer tells it.
    pub(crate) commit_ms: Option<u64>,
    /// Whether the answer says that the holder has paused.
    pub(crate) is_paused: bool,
    pub(crate) what: What,
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    /// A Hello, a heartbeat: nothing but a sign of life.
    Contact,
    /// The holder pauses or resumes. It was received before the commit, and not before this.
    Turn { to: State, asked_ms: u64 },
    /// The holder decides of a checker. The same holds.
    Decision { asked_ms: u64 },
    Pings {
        pings: Pings,
        /// Early data proves nothing.
        is_early: bool,
        rejects: Vec<(u64, RejectCode)>,
        accepted: u64,
    },
}

/// What a request holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pings {
    pub(crate) epoch: u32,
    pub(crate) valid: Vec<Ping>,
    pub(crate) malformed: Vec<u64>,
}

/// A user, as a commit left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Value {
    pub(crate) position: u64,
    pub(crate) last_contact: Moment,
    pub(crate) last_sample_ms: u64,
    pub(crate) last_fix_ms: u64,
    /// None where no answer told it.
    pub(crate) durable_ms: Option<u64>,
    pub(crate) state: State,
}

/// A moment, as far as it is known. Only of the contact that pauses or resumes nobody tells when exactly it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) earliest_ms: u64,
    pub(crate) latest_ms: u64,
}

/// All that is true.
#[derive(Debug, Default)]
pub(crate) struct History {
    users: BTreeMap<UserId, Life>,
    /// Every ping that must be in the store, once.
    stored: BTreeSet<(DeviceId, u32, u64)>,
    pub(crate) duplicates: u64,
    pub(crate) rejected: u64,
    pub(crate) early: u64,
    pub(crate) turns: u64,
}

#[derive(Debug, Default)]
struct Life {
    /// By position.
    values: Vec<Value>,
    /// When the user was heard.
    contacts: Vec<Moment>,
    state: Option<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Samples {
    sample_ms: u64,
    fix_ms: u64,
}

#[derive(Debug, Default)]
struct Device {
    unproven: Samples,
    settled: BTreeSet<(u32, u64)>,
}

impl Samples {
    fn take(&mut self, other: Self) {
        self.sample_ms = self.sample_ms.max(other.sample_ms);
        self.fix_ms = self.fix_ms.max(other.fix_ms);
    }
}

impl History {
    /// Of everything that was answered, and the transitions that the store has, in its order.
    ///
    /// # Errors
    /// When answers contradict each other, or one of the rules: every ping is stored once, every change between pause
    /// and sharing is said once.
    pub(crate) fn of(
        mut facts: Vec<Fact>,
        wanted: &[Wanted],
        transitions: &[Transition],
    ) -> Result<Self, String> {
        facts.extend(turns(wanted, transitions)?);
        facts.sort_by_key(|fact| (fact.position, fact.lane, fact.number));
        let mut history = Self {
            turns: transitions.len() as u64,
            ..Self::default()
        };
        let mut devices: BTreeMap<DeviceId, Device> = BTreeMap::new();
        for commit in facts.chunk_by(|a, b| a.position == b.position) {
            history.commit(commit, &mut devices)?;
        }
        for life in history.users.values_mut() {
            life.contacts
                .sort_unstable_by_key(|contact| contact.latest_ms);
        }
        Ok(history)
    }

    fn commit(
        &mut self,
        facts: &[Fact],
        devices: &mut BTreeMap<DeviceId, Device>,
    ) -> Result<(), String> {
        let position = facts[0].position;
        let mut times = facts.iter().filter_map(|fact| fact.commit_ms);
        let durable_ms = times.next();
        if times.any(|commit_ms| Some(commit_ms) != durable_ms) {
            return Err(format!("the commit {position} has two times: {facts:?}"));
        }
        // A ping that came on both lanes at once is accepted on one of them; which, does not matter.
        let mut accepted: BTreeMap<DeviceId, (u64, u64)> = BTreeMap::new();
        for fact in facts {
            let device = devices.entry(fact.device).or_default();
            let life = self.users.entry(fact.device.user).or_default();
            let was_paused = life.state == Some(State::Paused);
            let turns = |fact: &&Fact| matches!(fact.what, What::Turn { .. });
            let mut of_user = facts
                .iter()
                .filter(|other| other.device.user == fact.device.user);
            // With a turn in the same commit, answers tell of which side of it they are.
            if fact.is_paused != was_paused && !of_user.any(|other| turns(&other)) {
                return Err(format!(
                    "{fact:?} was answered of a user who was {:?}",
                    life.state
                ));
            }
            let mut samples = Samples::default();
            let mut is_early = false;
            if let What::Pings {
                pings,
                is_early: early,
                rejects,
                accepted: said,
            } = &fact.what
            {
                is_early = *early;
                let (new, fresh) = self.settle(fact.device, device, pings, rejects);
                samples = fresh;
                let counts = accepted.entry(fact.device).or_default();
                counts.0 += new;
                counts.1 += said;
            }
            if is_early {
                self.early += 1;
                device.unproven.take(samples);
                continue;
            }
            let contact = match fact.what {
                What::Turn { to, asked_ms } => {
                    let life = self.users.entry(fact.device.user).or_default();
                    life.state = Some(to);
                    Moment {
                        earliest_ms: asked_ms,
                        latest_ms: fact.receive_ms,
                    }
                }
                // While the holder has paused, nothing is a sign of life.
                _ if fact.is_paused => continue,
                What::Decision { asked_ms } => Moment {
                    earliest_ms: asked_ms,
                    latest_ms: fact.receive_ms,
                },
                _ => Moment {
                    earliest_ms: fact.receive_ms,
                    latest_ms: fact.receive_ms,
                },
            };
            samples.take(std::mem::take(&mut device.unproven));
            let life = self.users.entry(fact.device.user).or_default();
            life.heard(position, contact, samples, durable_ms);
        }
        match accepted
            .iter()
            .find(|(_, (true_count, said))| true_count != said)
        {
            Some((device, (true_count, said))) => Err(format!(
                "the commit {position} says that it stored {said} pings of {device:?}, and {true_count} were new"
            )),
            None => Ok(()),
        }
    }

    /// How many pings were stored, and what was sampled in them.
    fn settle(
        &mut self,
        id: DeviceId,
        device: &mut Device,
        pings: &Pings,
        rejects: &[(u64, RejectCode)],
    ) -> (u64, Samples) {
        let rejects: BTreeMap<u64, RejectCode> = rejects.iter().copied().collect();
        let (mut new, mut samples) = (0, Samples::default());
        let malformed = pings.malformed.iter().map(|&seq| (seq, None));
        let valid = pings.valid.iter().map(|ping| (ping.seq, Some(ping)));
        for (seq, ping) in valid.chain(malformed) {
            match rejects.get(&seq) {
                Some(&code) => {
                    self.rejected += 1;
                    if !is_retryable(code) {
                        device.settled.insert((pings.epoch, seq));
                    }
                }
                None if device.settled.insert((pings.epoch, seq)) => {
                    new += 1;
                    self.stored.insert((id, pings.epoch, seq));
                    if let Some(ping) = ping {
                        samples.take(Samples {
                            sample_ms: ping.time_ms,
                            fix_ms: if ping.is_fix() { ping.time_ms } else { 0 },
                        });
                    }
                }
                None => self.duplicates += 1,
            }
        }
        (new, samples)
    }

    pub(crate) fn users(&self) -> impl Iterator<Item = UserId> {
        let heard = self
            .users
            .iter()
            .filter(|(_, life)| !life.values.is_empty());
        heard.map(|(&user, _)| user)
    }

    pub(crate) fn stored(&self) -> &BTreeSet<(DeviceId, u32, u64)> {
        &self.stored
    }

    /// The newest position that changed a user.
    pub(crate) fn position(&self) -> u64 {
        let newest = self.users.values().filter_map(|life| life.values.last());
        newest.map(|value| value.position).max().unwrap_or_default()
    }

    /// The user as of a position; none if it was not heard by then.
    pub(crate) fn at(&self, user: &UserId, position: u64) -> Option<&Value> {
        let values = &self.users.get(user)?.values;
        let after = values.partition_point(|value| value.position <= position);
        values[..after].last()
    }

    /// The user's next change after a position.
    pub(crate) fn next(&self, user: &UserId, position: u64) -> Option<&Value> {
        let values = &self.users.get(user)?.values;
        values.get(values.partition_point(|value| value.position <= position))
    }

    pub(crate) fn last(&self, user: &UserId) -> Option<&Value> {
        self.at(user, u64::MAX)
    }

    /// When the user was last heard at the earliest, as of a moment; 0 if it was not.
    pub(crate) fn heard_by(&self, user: &UserId, moment_ms: u64) -> u64 {
        let contacts = self.users.get(user).map_or(&[][..], |life| &life.contacts);
        let heard = contacts.partition_point(|contact| contact.latest_ms <= moment_ms);
        let earliest = contacts[..heard].iter().map(|contact| contact.earliest_ms);
        earliest.max().unwrap_or_default()
    }

    /// Whether the user shares, and has not paused since a position.
    pub(crate) fn shares_since(&self, user: &UserId, position: u64) -> bool {
        let values = self.users.get(user).map_or(&[][..], |life| &life.values);
        let until = values.partition_point(|value| value.position <= position);
        let since = &values[until.saturating_sub(1)..];
        since.iter().all(|value| value.state == State::Active)
    }

    /// How often the user changed between two positions, neither of them counted.
    pub(crate) fn changes_between(&self, user: &UserId, after: u64, before: u64) -> u64 {
        let values = self.users.get(user).map_or(&[][..], |life| &life.values);
        let between = values
            .iter()
            .filter(|value| after < value.position && value.position < before);
        between.count() as u64
    }
}

impl Moment {
    pub(crate) fn may_be(self, moment_ms: u64) -> bool {
        (self.earliest_ms..=self.latest_ms).contains(&moment_ms)
    }
}

impl Life {
    fn heard(&mut self, position: u64, contact: Moment, samples: Samples, durable_ms: Option<u64>) {
        self.contacts.push(contact);
        let before = self.values.last().copied().unwrap_or_else(|| Value {
            position: 0,
            last_contact: Moment::default(),
            last_sample_ms: 0,
            last_fix_ms: 0,
            durable_ms: None,
            state: State::Active,
        });
        if before.position == position {
            self.values.pop();
        }
        let last = before.last_contact;
        self.values.push(Value {
            position,
            last_contact: Moment {
                earliest_ms: last.earliest_ms.max(contact.earliest_ms),
                latest_ms: last.latest_ms.max(contact.latest_ms),
            },
            last_sample_ms: before.last_sample_ms.max(samples.sample_ms),
            last_fix_ms: before.last_fix_ms.max(samples.fix_ms),
            durable_ms,
            state: self.state.unwrap_or(State::Active),
        });
    }
}

/// The set of one checker, by its place among them.
pub(crate) fn bit(checker: usize) -> CheckerSet {
    let number = u32::try_from(checker).ok().and_then(CheckerNumber::new);
    number.map(CheckerSet::from).unwrap()
}

/// What each user's holders wanted, less what was so already, is what the store has of the user, in that order.
fn turns(wanted: &[Wanted], transitions: &[Transition]) -> Result<Vec<Fact>, String> {
    let mut wanted = wanted.to_vec();
    wanted.sort_by_key(|wanted| wanted.number);
    let mut said: BTreeMap<UserId, VecDeque<&Transition>> = BTreeMap::new();
    for transition in transitions {
        said.entry(transition.user)
            .or_default()
            .push_back(transition);
    }
    let (mut paused, mut withdrawn) = (BTreeSet::new(), BTreeSet::new());
    let mut facts = Vec::new();
    for wanted in wanted {
        let (user, asked_ms) = (wanted.device.user, wanted.asked_ms);
        let (is_change, turn, what) = match wanted.wants {
            Wants::Share(Wish::Pause) => {
                let to = State::Paused;
                let turn = Turn::Sharing(Sharing::Paused);
                (paused.insert(user), turn, What::Turn { to, asked_ms })
            }
            Wants::Share(Wish::Resume) => {
                let to = State::Active;
                let turn = Turn::Sharing(Sharing::Active);
                (paused.remove(&user), turn, What::Turn { to, asked_ms })
            }
            Wants::Tell {
                checker,
                is_granted: true,
            } => {
                let is_change = withdrawn.remove(&(user, checker));
                (is_change, Turn::Granted, What::Decision { asked_ms })
            }
            Wants::Tell { checker, .. } => {
                let is_change = withdrawn.insert((user, checker));
                (is_change, Turn::Withdrawn, What::Decision { asked_ms })
            }
            Wants::Share(_) => return Err(format!("nobody wants {wanted:?} in a run")),
        };
        if !is_change {
            continue;
        }
        let transition = said.get_mut(&user).and_then(VecDeque::pop_front);
        let concerns = |transition: &Transition| match wanted.wants {
            Wants::Share(_) => true,
            Wants::Tell { checker, .. } => transition.checkers == bit(checker),
        };
        let Some(transition) = transition
            .filter(|transition| transition.turn == turn)
            .filter(|transition| concerns(transition))
        else {
            return Err(format!(
                "{wanted:?} was granted, and the store says {transition:?}"
            ));
        };
        facts.push(Fact {
            device: wanted.device,
            position: transition.position,
            lane: Lane::Live,
            number: wanted.number,
            receive_ms: transition.at_ms,
            commit_ms: Some(transition.at_ms),
            is_paused: paused.contains(&user),
            what,
        });
    }
    match said.values().flatten().next() {
        Some(transition) => Err(format!("nobody wanted {transition:?}")),
        None => Ok(facts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceId = DeviceId {
        user: UserId([1; 16]),
        device: 1,
    };

    fn fact(position: u64, what: What) -> Fact {
        Fact {
            device: DEVICE,
            position,
            lane: Lane::Live,
            number: position,
            receive_ms: 10 * position,
            commit_ms: Some(10 * position),
            is_paused: false,
            what,
        }
    }

    /// A batch with a ping of this number.
    fn batch(seq: u64, is_early: bool, accepted: u64) -> What {
        let ping = Ping::at(seq, 1_000 + seq, 0, 0);
        What::Pings {
            pings: Pings {
                epoch: 1,
                valid: vec![ping],
                malformed: Vec::new(),
            },
            is_early,
            rejects: Vec::new(),
            accepted,
        }
    }

    fn pause() -> (Wanted, Transition) {
        let wanted = Wanted {
            device: DEVICE,
            wants: Wants::Share(Wish::Pause),
            number: 2,
            asked_ms: 15,
        };
        let transition = Transition {
            user: DEVICE.user,
            turn: Turn::Sharing(Sharing::Paused),
            checkers: CheckerSet::ALL,
            at_ms: 20,
            position: 2,
            number: 0,
        };
        (wanted, transition)
    }

    #[test]
    fn early_data_shows_with_the_next_contact_and_a_pause_hides_all_after_it() {
        let (wanted, transition) = pause();
        let hidden = Fact {
            is_paused: true,
            ..fact(3, What::Contact)
        };
        let facts = vec![fact(1, batch(7, true, 1)), hidden];
        let history = History::of(facts, &[wanted], &[transition]).unwrap();
        let value = *history.last(&DEVICE.user).unwrap();
        assert_eq!((value.position, value.state), (2, State::Paused));
        assert_eq!(value.last_sample_ms, 1_007);
        assert!(value.last_contact.may_be(15) && value.last_contact.may_be(20));
        assert!(!value.last_contact.may_be(30));
        assert_eq!(history.heard_by(&DEVICE.user, 19), 0, "nobody knows");
        assert_eq!(history.heard_by(&DEVICE.user, 20), 15);
    }

    #[test]
    fn answers_that_cannot_all_be_true_are_named() {
        let (wanted, transition) = pause();
        let elsewhen = Fact {
            commit_ms: Some(11),
            ..fact(1, What::Contact)
        };
        let first = fact(1, batch(7, false, 1));
        for (facts, wanted, transitions, name) in [
            (
                vec![first.clone(), elsewhen],
                vec![],
                vec![],
                "has two times",
            ),
            (
                vec![first, fact(2, batch(7, false, 1))],
                vec![],
                vec![],
                "0 were new",
            ),
            (
                vec![fact(1, batch(7, false, 0))],
                vec![],
                vec![],
                "1 were new",
            ),
            (vec![], vec![wanted], vec![], "was granted"),
            (vec![], vec![], vec![transition], "nobody wanted"),
            (vec![], vec![wanted], vec![transition; 2], "nobody wanted"),
            (
                vec![fact(3, What::Contact)],
                vec![wanted],
                vec![transition],
                "was answered of a user",
            ),
        ] {
            let wrong = History::of(facts, &wanted, &transitions).unwrap_err();
            assert!(wrong.contains(name), "{wrong}\nand not {name}");
        }
    }
}
