//! Deadlines beside a model that counts milliseconds, through gaps, restarts, pauses and changed settings.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::coverage::{Change as CoverageChange, Forgotten, Reason, Span};

const OPS: Checker = Checker([1; 16]);

fn user(number: u32) -> UserId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    UserId(id)
}

fn user_at(at: usize) -> UserId {
    user(at.try_into().unwrap())
}

fn setting(expect_every_ms: u64, grace_ms: u64) -> Setting {
    Setting {
        expect_every_ms,
        grace_ms,
    }
}

fn at(position: u64, at_ms: u64) -> Said {
    Said { position, at_ms }
}

fn heard_at(last_contact_ms: u64) -> Contact {
    Contact {
        last_contact_ms,
        standing: Standing::Active { since_ms: 0 },
    }
}

fn events(changes: &[Change]) -> Vec<Event> {
    changes
        .iter()
        .filter_map(|change| match change {
            Change::Event(event) => Some(*event),
            Change::Set(_) | Change::Removed(..) => None,
        })
        .collect()
}

/// What is true of one user, counted step by step.
#[derive(Clone, Debug, Default)]
struct Truth {
    setting: Option<Setting>,
    is_late: bool,
    is_paused: bool,
    resumed_ms: u64,
    last_contact_ms: u64,
    /// For how long it was silent and could have been heard.
    silent_ms: u64,
}

impl Truth {
    fn is_overdue(&self, heard_since_gap_ms: u64) -> bool {
        self.setting.is_some_and(|setting| {
            let due_ms = setting.expect_every_ms + setting.grace_ms;
            due_ms <= self.silent_ms
                && (setting.grace_ms <= heard_since_gap_ms
                    || due_ms + setting.grace_ms <= self.silent_ms)
        })
    }
}

/// The deadlines and the truth. All times are multiples of the slot, so that both agree to the millisecond.
struct Simulation {
    dice: StdRng,
    now_ms: u64,
    position: u64,
    coverage: Coverage,
    /// What the deadlines are shown instead, by the negative control.
    plain: Option<Coverage>,
    deadlines: Deadlines,
    /// As they are on disk.
    rows: BTreeMap<UserId, Registration>,
    truth: Vec<Truth>,
    /// Since the end of the last gap.
    heard_since_gap_ms: u64,
    lasting: Option<Span>,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    late: u32,
    recovered: u32,
    restarts: u32,
}

const USERS: usize = 8;

impl Simulation {
    fn new(seed: u64, is_plain: bool) -> Self {
        Self {
            dice: StdRng::seed_from_u64(seed),
            now_ms: 1_000_000,
            position: 0,
            coverage: Coverage::default(),
            plain: is_plain.then(Coverage::default),
            deadlines: Deadlines::new(USERS),
            rows: BTreeMap::new(),
            truth: vec![Truth::default(); USERS],
            heard_since_gap_ms: u64::MAX,
            lasting: None,
            counts: Counts::default(),
        }
    }

    fn run(mut self, steps: usize) -> Result<Counts, String> {
        for _ in 0..steps {
            let passed_ms = SLOT_MS * self.dice.random_range(0..8);
            self.pass(passed_ms, self.lasting.is_none());
            match self.dice.random_range(0..100) {
                0..50 => self.contact()?,
                50..58 => self.change_setting()?,
                58..64 => self.pause_or_resume()?,
                64..70 => self.overload_begins_or_ends(),
                70..75 => self.gap(),
                75..80 => self.restart(),
                _ => {}
            }
            self.turn()?;
        }
        Ok(self.counts)
    }

    fn pass(&mut self, passed_ms: u64, can_hear: bool) {
        self.now_ms += passed_ms;
        if can_hear {
            self.heard_since_gap_ms = self.heard_since_gap_ms.saturating_add(passed_ms);
            for truth in &mut self.truth {
                truth.silent_ms += passed_ms;
            }
        }
    }

    /// The gateway finds out, afterwards, that it could not hear: it was down, its disk hung, its clock
    /// leapt.
    fn gap(&mut self) {
        if self.lasting.is_some() {
            return;
        }
        let from_ms = self.now_ms;
        let length_ms = SLOT_MS * self.dice.random_range(0..60);
        self.pass(length_ms, false);
        let reason = Reason::ALL[self.dice.random_range(0..Reason::ALL.len())];
        self.say(Span {
            from_ms,
            until_ms: Some(self.now_ms),
            reason,
            position: 0,
        });
        self.heard_since_gap_ms = 0;
    }

    /// The gateway says that it cannot hear everybody, while some are heard.
    fn overload_begins_or_ends(&mut self) {
        let span = match self.lasting.take() {
            Some(span) => {
                self.heard_since_gap_ms = 0;
                Span {
                    until_ms: Some(self.now_ms),
                    ..span
                }
            }
            None => Span {
                from_ms: self.now_ms,
                until_ms: None,
                reason: Reason::Overloaded,
                position: 0,
            },
        };
        self.say(span);
        self.lasting = Some(span).filter(|span| span.until_ms.is_none());
    }

    fn say(&mut self, span: Span) {
        self.position += 1;
        let change: CoverageChange = self.coverage.change(vec![Span {
            position: self.position,
            ..span
        }]);
        self.coverage.apply(&change);
    }

    fn restart(&mut self) {
        if self.lasting.is_some() {
            self.overload_begins_or_ends();
        }
        self.gap();
        self.counts.restarts += 1;
        let spans = self.coverage.within(0, u64::MAX);
        self.coverage = Coverage::restore(spans, Forgotten::default());
        self.deadlines = Deadlines::new(USERS);
        for &row in self.rows.values() {
            self.deadlines.restore(row);
        }
    }

    fn contact(&mut self) -> Result<(), String> {
        let at = self.dice.random_range(0..USERS);
        self.hear(at)
    }

    fn hear(&mut self, at: usize) -> Result<(), String> {
        let truth = &mut self.truth[at];
        if truth.is_paused {
            return Ok(());
        }
        let was_late = std::mem::take(&mut truth.is_late);
        truth.last_contact_ms = self.now_ms;
        truth.silent_ms = 0;
        self.position += 1;
        let mut changes = Vec::new();
        self.deadlines.heard(
            [(user_at(at), self.now_ms)].into_iter(),
            Said {
                position: self.position,
                at_ms: self.now_ms,
            },
            self.plain.as_ref().unwrap_or(&self.coverage),
            &mut changes,
        );
        let expected = was_late.then_some((at, Kind::Recovered));
        self.check(&changes, expected.into_iter().collect())
    }

    fn pause_or_resume(&mut self) -> Result<(), String> {
        let at = self.dice.random_range(0..USERS);
        if self.truth[at].is_paused {
            self.truth[at].is_paused = false;
            self.truth[at].resumed_ms = self.now_ms;
            return self.hear(at);
        }
        // Whoever pauses says so, and is heard by that.
        self.hear(at)?;
        self.truth[at].is_paused = true;
        Ok(())
    }

    fn change_setting(&mut self) -> Result<(), String> {
        let at = self.dice.random_range(0..USERS);
        let new = self.dice.random_bool(0.8).then(|| Setting {
            expect_every_ms: SLOT_MS * self.dice.random_range(1..40),
            grace_ms: SLOT_MS * self.dice.random_range(0..20),
        });
        let truth = &mut self.truth[at];
        let was_set = truth.setting.is_some();
        truth.setting = new;
        if new.is_some() && !was_set {
            truth.silent_ms = 0;
        }
        let mut expected = Vec::new();
        if truth.is_late && !truth.is_overdue(self.heard_since_gap_ms) {
            truth.is_late = false;
            if new.is_some() {
                expected.push((at, Kind::Recovered));
            }
        }
        self.position += 1;
        let mut changes = Vec::new();
        let contact_of = contacts(&self.truth);
        self.deadlines
            .set(
                OPS,
                &[(user_at(at), new)],
                Said {
                    position: self.position,
                    at_ms: self.now_ms,
                },
                self.plain.as_ref().unwrap_or(&self.coverage),
                contact_of,
                &mut changes,
            )
            .map_err(|error| error.to_string())?;
        self.check(&changes, expected)
    }

    fn turn(&mut self) -> Result<(), String> {
        self.position += 1;
        let mut expected = Vec::new();
        for (at, truth) in self.truth.iter_mut().enumerate() {
            if !truth.is_late && !truth.is_paused && truth.is_overdue(self.heard_since_gap_ms) {
                truth.is_late = true;
                expected.push((at, Kind::Late));
            }
        }
        let mut changes = Vec::new();
        let turn = self.deadlines.turn(
            self.now_ms,
            Said {
                position: self.position,
                at_ms: self.now_ms,
            },
            self.plain.as_ref().unwrap_or(&self.coverage),
            contacts(&self.truth),
            &mut changes,
        );
        assert!(!turn.is_behind);
        self.check(&changes, expected)
    }

    /// Writes down what changed, and compares what was said with what should have been.
    fn check(
        &mut self,
        changes: &[Change],
        mut expected: Vec<(usize, Kind)>,
    ) -> Result<(), String> {
        for change in changes {
            match *change {
                Change::Set(row) => {
                    self.rows.insert(row.user, row);
                }
                Change::Removed(_, user) => {
                    self.rows.remove(&user);
                }
                Change::Event(_) => {}
            }
        }
        let mut said: Vec<_> = events(changes)
            .into_iter()
            .map(|event| {
                let number = u32::from_be_bytes(event.user.0[..4].try_into().unwrap());
                (number as usize, event.kind)
            })
            .collect();
        let order = |&(at, kind): &(usize, Kind)| (at, kind.as_label());
        said.sort_by_key(order);
        expected.sort_by_key(order);
        for (_, kind) in &said {
            match kind {
                Kind::Late => self.counts.late += 1,
                Kind::Recovered => self.counts.recovered += 1,
            }
        }
        if said == expected {
            Ok(())
        } else {
            Err(format!(
                "at {} was said {said:?}, and true is {expected:?}",
                self.now_ms
            ))
        }
    }
}

fn contacts(truth: &[Truth]) -> impl Fn(&UserId) -> Contact {
    let contacts: Vec<_> = truth
        .iter()
        .map(|truth| Contact {
            last_contact_ms: truth.last_contact_ms,
            standing: if truth.is_paused {
                Standing::Silenced
            } else {
                Standing::Active {
                    since_ms: truth.resumed_ms,
                }
            },
        })
        .collect();
    move |user| contacts[u32::from_be_bytes(user.0[..4].try_into().unwrap()) as usize]
}

#[test]
fn late_and_recovered_are_said_once_each_and_at_the_right_time_whatever_happens() {
    let mut all = Counts::default();
    for seed in 0..300 {
        let counts = Simulation::new(seed, false).run(300);
        let counts = counts.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        all.late += counts.late;
        all.recovered += counts.recovered;
        all.restarts += counts.restarts;
    }
    assert!(
        1_000 < all.late && 1_000 < all.recovered && 1_000 < all.restarts,
        "{all:?}"
    );
}

/// The negative control.
#[test]
fn a_clock_that_runs_on_while_the_gateway_cannot_hear_is_caught() {
    let caught = (0..50)
        .filter(|&seed| Simulation::new(seed, true).run(300).is_err())
        .count();
    assert!(45 < caught, "{caught} of 50");
}

#[test]
fn an_hour_down_makes_nobody_late_and_gives_everybody_the_grace_to_come_back() {
    let mut deadlines = Deadlines::new(10);
    let mut changes = Vec::new();
    let none = Coverage::default();
    let asked = [(user(1), Some(setting(60_000, 30_000)))];
    let heard = |_: &UserId| heard_at(1_000_000);
    deadlines
        .set(OPS, &asked, at(1, 1_000_000), &none, heard, &mut changes)
        .unwrap();
    // Down in the last second before it would be late.
    let coverage = Coverage::restore(
        [Span {
            from_ms: 1_089_000,
            until_ms: Some(4_689_000),
            reason: Reason::Down,
            position: 2,
        }],
        Forgotten::default(),
    );
    changes.clear();
    deadlines.turn(4_718_900, at(3, 4_718_900), &coverage, heard, &mut changes);
    assert_eq!(changes, []);
    let turn = deadlines.turn(4_719_000, at(4, 4_719_000), &coverage, heard, &mut changes);
    assert_eq!((turn.fired, deadlines.late()), (1, 1));
    let late = events(&changes)[0];
    assert_eq!(
        (late.kind, late.last_contact_ms, late.due_ms),
        (Kind::Late, 1_000_000, 4_719_000)
    );
}

#[test]
fn gaps_that_follow_each_other_put_off_a_late_by_one_more_grace_at_most() {
    let mut deadlines = Deadlines::new(10);
    let mut changes = Vec::new();
    let asked = [(user(1), Some(setting(60_000, 30_000)))];
    let heard = |_: &UserId| heard_at(1_000_000);
    let mut coverage = Coverage::default();
    deadlines
        .set(
            OPS,
            &asked,
            at(1, 1_000_000),
            &coverage,
            heard,
            &mut changes,
        )
        .unwrap();
    changes.clear();
    // A second of every ten, for ever.
    let mut now_ms = 1_000_000;
    while changes.is_empty() {
        now_ms += 10_000;
        let span = Span {
            from_ms: now_ms - 1_000,
            until_ms: Some(now_ms),
            reason: Reason::Overloaded,
            position: now_ms,
        };
        let change = coverage.change(vec![span]);
        coverage.apply(&change);
        deadlines.turn(now_ms, at(now_ms, now_ms), &coverage, heard, &mut changes);
    }
    let heard_for_ms = coverage.heard_ms(now_ms) - coverage.heard_ms(1_000_000);
    assert!((120_000..130_000).contains(&heard_for_ms), "{heard_for_ms}");
}

#[test]
fn a_deadline_for_somebody_long_silent_begins_when_it_is_set() {
    let mut deadlines = Deadlines::new(10);
    let (coverage, mut changes) = (Coverage::default(), Vec::new());
    let asked = [(user(1), Some(setting(1_000, 0)))];
    let never = |_: &UserId| heard_at(0);
    deadlines
        .set(OPS, &asked, at(1, 500_000), &coverage, never, &mut changes)
        .unwrap();
    changes.clear();
    deadlines.turn(500_900, at(2, 500_900), &coverage, never, &mut changes);
    assert_eq!(changes, []);
    deadlines.turn(501_000, at(3, 501_000), &coverage, never, &mut changes);
    assert_eq!(events(&changes).len(), 1);
}

#[test]
fn a_call_that_would_be_too_many_changes_nothing() {
    let mut deadlines = Deadlines::new(2);
    let (coverage, mut changes) = (Coverage::default(), Vec::new());
    let some = Some(setting(1_000, 0));
    let never = |_: &UserId| heard_at(0);
    let mut set = |asked: &[(UserId, Option<Setting>)]| {
        changes.clear();
        let result = deadlines.set(OPS, asked, at(1, 1), &coverage, never, &mut changes);
        (result, changes.len(), deadlines.len())
    };
    assert_eq!(set(&[(user(1), some), (user(2), some)]), (Ok(()), 2, 2));
    let too_many = Err(TooMany { most: 2 });
    assert_eq!(
        set(&[(user(1), None), (user(3), some), (user(4), some)]),
        (too_many, 0, 2)
    );
    assert_eq!(set(&[(user(1), None), (user(3), some)]), (Ok(()), 2, 2));
    // Said again, it is nothing new; of two for one user the later holds.
    assert_eq!(set(&[(user(3), None), (user(3), some)]), (Ok(()), 0, 2));
    assert_eq!(set(&[(user(2), None), (user(3), None)]), (Ok(()), 2, 0));
}

#[test]
fn each_checker_has_its_own_deadline_for_a_user() {
    let night = Checker([2; 16]);
    let mut deadlines = Deadlines::new(10);
    let (coverage, mut changes) = (Coverage::default(), Vec::new());
    let heard = |_: &UserId| heard_at(1_000);
    for (checker, expect_every_ms) in [(OPS, 1_000), (night, 5_000)] {
        let asked = [(user(1), Some(setting(expect_every_ms, 0)))];
        deadlines
            .set(
                checker,
                &asked,
                at(1, 1_000),
                &coverage,
                heard,
                &mut changes,
            )
            .unwrap();
    }
    changes.clear();
    deadlines.turn(3_000, at(2, 3_000), &coverage, heard, &mut changes);
    let late: Vec<_> = events(&changes).iter().map(|event| event.checker).collect();
    assert_eq!(late, [OPS]);
    changes.clear();
    deadlines.turn(6_000, at(3, 6_000), &coverage, heard, &mut changes);
    let late: Vec<_> = events(&changes).iter().map(|event| event.checker).collect();
    assert_eq!(late, [night]);
    changes.clear();
    deadlines.heard(
        [(user(1), 7_000)].into_iter(),
        at(4, 7_000),
        &coverage,
        &mut changes,
    );
    let recovered: Vec<_> = events(&changes).iter().map(|event| event.kind).collect();
    assert_eq!(recovered, [Kind::Recovered; 2]);
    assert_eq!(deadlines.late(), 0);
}

/// How many timers a tick looks at while a thousandth of all users is due in it.
fn looked_in_a_tick(deadlines_in_all: u32, due_in_tick: u32) -> usize {
    let mut deadlines = Deadlines::new(deadlines_in_all as usize);
    let (coverage, mut changes) = (Coverage::default(), Vec::new());
    let heard = |_: &UserId| heard_at(0);
    for first in (0..deadlines_in_all).step_by(1_000) {
        changes.clear();
        let asked: Vec<_> = (first..first + 1_000)
            .map(|number| {
                let expect_every_ms = if number < due_in_tick { 900 } else { 60_000 };
                (user(number), Some(setting(expect_every_ms, 100)))
            })
            .collect();
        deadlines
            .set(OPS, &asked, at(1, 0), &coverage, heard, &mut changes)
            .unwrap();
    }
    assert_eq!(deadlines.len(), deadlines_in_all as usize);
    let mut looked = 0;
    // They were all heard meanwhile, so their timers only move on.
    for now_ms in (0..2_000).step_by(100) {
        changes.clear();
        let turn = deadlines.turn(
            now_ms,
            at(2, now_ms),
            &coverage,
            |_| heard_at(500),
            &mut changes,
        );
        looked += turn.looked;
        assert_eq!(
            (turn.fired, turn.is_behind),
            (usize::from(1_500 == now_ms) * due_in_tick as usize, false)
        );
    }
    looked
}

#[test]
fn a_tick_costs_what_is_due_in_it_however_many_deadlines_there_are() {
    assert_eq!(looked_in_a_tick(10_000, 300), 600);
    assert_eq!(looked_in_a_tick(1_000_000, 300), 600);
}

#[test]
fn when_everybody_falls_silent_at_once_they_are_called_late_in_turns() {
    let many = u32::try_from(3 * MOST_FIRED - 1).unwrap();
    let mut deadlines = Deadlines::new(many as usize);
    let (coverage, mut changes) = (Coverage::default(), Vec::new());
    let heard = |_: &UserId| heard_at(0);
    let asked: Vec<_> = (0..many)
        .map(|number| (user(number), Some(setting(1_000, 0))))
        .collect();
    deadlines
        .set(OPS, &asked, at(1, 0), &coverage, heard, &mut changes)
        .unwrap();
    let mut fired = Vec::new();
    loop {
        changes.clear();
        let turn = deadlines.turn(1_000, at(2, 1_000), &coverage, heard, &mut changes);
        fired.push(turn.fired);
        if !turn.is_behind {
            break;
        }
    }
    assert_eq!(fired, [MOST_FIRED, MOST_FIRED, MOST_FIRED - 1]);
    assert_eq!(deadlines.late(), many as usize);
}
