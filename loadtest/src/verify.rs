//! The checks after a run: the store and the freshness service against the fleet's own books.
//!
//! Knows what each promise means for one ping and one user. Must not know how the run went.

use anyhow::Context;
use rustc_hash::FxHashMap;
use waypost_checker::{Entry, State};
use waypost_gateway::store::Store;
use waypost_proto::{
    id::{DeviceId, UserId},
    ping::Ping,
};

use crate::{
    checker::{Answer, Seen},
    ledger::{DeviceLedger, Fate, Newest, Sent, digest},
};

/// What the store holds, against what was acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreFindings {
    /// Pings found, each counted once.
    pub stored: u64,
    /// Acknowledged, but not found.
    pub lost: u64,
    /// Found once more.
    pub stored_twice: u64,
    /// Found with other values than were sent, or though they were refused.
    pub altered: u64,
    /// Found, but never sent in that epoch.
    pub unknown: u64,
    /// Too many to remember, so not looked for.
    pub unchecked: u64,
    /// The first few faults in words.
    pub examples: Vec<String>,
}

/// What checkers are told, against what the devices know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreshnessFindings {
    /// Users compared.
    pub checked: u64,
    /// Users of whom something was wrong.
    pub wrong: u64,
    /// The first few faults in words.
    pub examples: Vec<String>,
}

/// Reads the whole store of a data folder and compares it with the books.
///
/// # Errors
/// When the store cannot be read.
pub fn check_store(store: &Store, ledgers: &mut [DeviceLedger]) -> anyhow::Result<StoreFindings> {
    let mut check = StoreCheck::new(ledgers);
    for row in store.rows() {
        let row = row.context("cannot read the store")?;
        for ping in &row.record.pings {
            check.found(row.key.device, row.key.epoch, ping);
        }
    }
    Ok(check.finish())
}

/// What a checker must be told of a device's user, at least.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// The user.
    pub user: UserId,
    /// What the device knows.
    pub newest: Newest,
    /// Whether every ping was answered, so that the gateway cannot know more than that.
    pub is_complete: bool,
}

impl From<&DeviceLedger> for Expected {
    fn from(ledger: &DeviceLedger) -> Self {
        let is_complete = ledger.open() == 0 && ledger.dropped == 0;
        Self {
            user: ledger.device.user,
            newest: ledger.newest,
            is_complete,
        }
    }
}

impl Expected {
    /// A gateway that never answered a device has promised nothing of its user.
    fn is_promised(&self) -> bool {
        0 < self.newest.position
    }
}

/// Compares what a checker was told with what the devices knew before it asked. `before` is what it was
/// told when the run began: of an earlier run, perhaps.
#[must_use]
pub fn check_freshness(
    expected: &[Expected],
    before: &[Entry],
    answer: &Answer,
) -> FreshnessFindings {
    let mut findings = FreshnessFindings::default();
    let promised = expected
        .iter()
        .zip(before)
        .zip(&answer.entries)
        .filter(|((expected, _), _)| expected.is_promised());
    for ((expected, before), entry) in promised {
        findings.checked += 1;
        if let Some(fault) = fault_of(expected, before, entry, answer.at_most_ms) {
            findings.wrong += 1;
            example(&mut findings.examples, || {
                format!("user {}: {fault}", expected.user)
            });
        }
    }
    findings
}

/// Compares what the stream has said with what the devices knew. `level` is the position up to which the
/// stream says that it is complete, if that is far enough; `faults` are those of its order.
#[must_use]
pub fn check_stream(
    expected: &[Expected],
    seen: impl Fn(UserId) -> Option<Seen>,
    level: Option<u64>,
    faults: (u64, Option<String>),
) -> FreshnessFindings {
    let mut findings = FreshnessFindings {
        wrong: faults.0,
        ..FreshnessFindings::default()
    };
    findings.examples.extend(faults.1);
    if level.is_none() {
        findings.wrong += 1;
        example(&mut findings.examples, || {
            "the stream did not come level with what was acknowledged".to_owned()
        });
        return findings;
    }
    for expected in expected.iter().filter(|expected| expected.is_promised()) {
        findings.checked += 1;
        let seen = seen(expected.user).unwrap_or_default();
        let Newest {
            receive_ms,
            sample_ms,
            position,
            ..
        } = expected.newest;
        if seen.position < position || seen.contact_ms < receive_ms || seen.sample_ms < sample_ms {
            findings.wrong += 1;
            example(&mut findings.examples, || {
                format!(
                    "user {}: the stream ended with {seen:?}, not {:?}",
                    expected.user, expected.newest
                )
            });
        }
    }
    findings
}

fn fault_of(expected: &Expected, before: &Entry, entry: &Entry, at_most_ms: u64) -> Option<String> {
    let Newest {
        receive_ms,
        sample_ms,
        fix_ms,
        position,
    } = expected.newest;
    let differs = |told_ms: u64, before_ms: u64, known_ms: u64| {
        let least_ms = known_ms.max(before_ms);
        told_ms < least_ms || (expected.is_complete && told_ms != least_ms)
    };
    if entry.user != expected.user {
        Some("the entry is another user's".to_owned())
    } else if entry.state == State::NeverSeen || entry.state == State::Withdrawn {
        Some(format!(
            "the state is {:?}: has the user granted this checker, as all have with `waypost serve --dev`?",
            entry.state
        ))
    } else if entry.state != State::Active {
        Some(format!("the state is {:?}", entry.state))
    } else if differs(entry.last_sample_ms, before.last_sample_ms, sample_ms) {
        Some(format!(
            "last_sample_ms is {}, not {sample_ms}",
            entry.last_sample_ms
        ))
    } else if differs(entry.last_fix_ms, before.last_fix_ms, fix_ms) {
        Some(format!(
            "last_fix_ms is {}, not {fix_ms}",
            entry.last_fix_ms
        ))
    } else if entry.last_contact_ms < receive_ms {
        Some(format!(
            "last_contact_ms is {}, but {receive_ms} was acknowledged",
            entry.last_contact_ms
        ))
    } else if at_most_ms < entry.last_contact_ms {
        Some(format!(
            "last_contact_ms is {}, after the question at {at_most_ms}",
            entry.last_contact_ms
        ))
    } else if entry.position < position {
        Some(format!(
            "position is {}, but {position} was acknowledged",
            entry.position
        ))
    } else {
        None
    }
}

struct StoreCheck<'a> {
    ledgers: &'a mut [DeviceLedger],
    index_of: FxHashMap<DeviceId, usize>,
    findings: StoreFindings,
}

impl<'a> StoreCheck<'a> {
    fn new(ledgers: &'a mut [DeviceLedger]) -> Self {
        let index_of = ledgers
            .iter()
            .enumerate()
            .map(|(at, ledger)| (ledger.device, at))
            .collect();
        Self {
            ledgers,
            index_of,
            findings: StoreFindings::default(),
        }
    }

    /// A ping in the store. Those of other devices, and of our own epochs before this run, are not ours
    /// to judge.
    fn found(&mut self, device: DeviceId, epoch: u32, ping: &Ping) {
        let Some(&at) = self.index_of.get(&device) else {
            return;
        };
        let Some(epoch) = self.ledgers[at]
            .epochs
            .iter_mut()
            .find(|ours| ours.number == epoch)
        else {
            return;
        };
        if ping.seq <= epoch.forgotten {
            return;
        }
        let findings = &mut self.findings;
        let Some(sent) = epoch.get_mut(ping.seq) else {
            findings.unknown += 1;
            return example(&mut findings.examples, || {
                format!("{device} never sent ping {}", ping.seq)
            });
        };
        if std::mem::replace(&mut sent.is_found, true) {
            findings.stored_twice += 1;
            return example(&mut findings.examples, || {
                format!("{device} ping {} is stored twice", ping.seq)
            });
        }
        findings.stored += 1;
        if sent.fate == Fate::Refused {
            findings.altered += 1;
            example(&mut findings.examples, || {
                format!("{device} ping {} is stored though refused", ping.seq)
            });
        } else if sent.digest != digest(ping) {
            findings.altered += 1;
            example(&mut findings.examples, || {
                format!("{device} ping {} is not as it was sent", ping.seq)
            });
        }
    }

    fn finish(self) -> StoreFindings {
        let mut findings = self.findings;
        let some_are_not_stored = self
            .ledgers
            .iter()
            .any(|ledger| 0 < ledger.fates.filtered + ledger.fates.rejected);
        for ledger in self.ledgers {
            let is_missing = |sent: &&Sent| sent.fate == Fate::Settled && !sent.is_found;
            let missing = ledger
                .epochs
                .iter()
                .flat_map(|epoch| &epoch.sent)
                .filter(is_missing)
                .count() as u64;
            // An acknowledgement counts filtered pings but does not name them. One whose acknowledgement
            // was lost may have been filtered or refused as well, if this gateway does such a thing.
            let excused = ledger.fates.filtered
                + if some_are_not_stored {
                    ledger.untold()
                } else {
                    0
                };
            let lost = missing.saturating_sub(excused);
            if 0 < lost {
                findings.lost += lost;
                example(&mut findings.examples, || {
                    format!("{}: {lost} acknowledged pings are lost", ledger.device)
                });
            }
            findings.unchecked += ledger
                .epochs
                .iter()
                .map(|epoch| epoch.forgotten)
                .sum::<u64>();
        }
        findings
    }
}

fn example(examples: &mut Vec<String>, what: impl FnOnce() -> String) {
    if examples.len() < MAX_EXAMPLES {
        examples.push(what());
    }
}

/// Enough to begin looking; the numbers say how many there are.
const MAX_EXAMPLES: usize = 5;

#[cfg(test)]
mod tests {
    use waypost_proto::{
        outbox::{Event, Totals},
        ranges::SeqRange,
    };

    use super::*;
    use crate::ledger::example_ping;

    const DEVICE: DeviceId = DeviceId {
        user: UserId([7; 16]),
        device: 1,
    };

    /// Books of a device in epoch 4 that sent five pings, of which the first three are settled.
    fn ledger(filtered: u64) -> DeviceLedger {
        let mut ledger = DeviceLedger::new(DEVICE, usize::MAX);
        ledger.connected();
        ledger.book(
            &Event::Renumbered {
                epoch: 4,
                previous_seqs: Vec::new(),
            },
            |_| (),
        );
        (1..=5).for_each(|seq| ledger.send(&example_ping(seq), 0));
        ledger.book(&Event::Settled(SeqRange { first: 1, last: 3 }), |_| ());
        let totals = Totals {
            accepted: 3 - filtered,
            duplicate: 0,
            filtered,
            rejected: 0,
        };
        ledger.book(
            &Event::Acknowledged {
                receive_ms: 50,
                commit_ms: 51,
                position: 9,
                totals,
            },
            |_| (),
        );
        ledger
    }

    fn stored(ledger: DeviceLedger, rows: &[(u32, Ping)]) -> StoreFindings {
        let mut ledgers = [ledger];
        let mut check = StoreCheck::new(&mut ledgers);
        for (epoch, ping) in rows {
            check.found(DEVICE, *epoch, ping);
        }
        StoreFindings {
            examples: Vec::new(),
            ..check.finish()
        }
    }

    #[test]
    fn a_store_with_all_that_was_acknowledged_is_right() {
        let all = [1, 2, 3].map(|seq| (4, example_ping(seq)));
        let expected = StoreFindings {
            stored: 3,
            ..StoreFindings::default()
        };
        assert_eq!(stored(ledger(0), &all), expected);
        let with_unacknowledged = [1, 2, 3, 5].map(|seq| (4, example_ping(seq)));
        assert_eq!(
            stored(ledger(0), &with_unacknowledged),
            StoreFindings {
                stored: 4,
                ..expected
            }
        );
    }

    #[test]
    fn each_fault_of_the_store_is_found() {
        let two = [(4, example_ping(1)), (4, example_ping(2))];
        let with = |more: &[(u32, Ping)]| stored(ledger(0), &[two.as_slice(), more].concat());
        let found = |stored| StoreFindings {
            stored,
            ..StoreFindings::default()
        };
        assert_eq!(
            with(&[]),
            StoreFindings {
                lost: 1,
                ..found(2)
            }
        );
        assert_eq!(
            with(&[(4, example_ping(3)), (4, example_ping(1))]),
            StoreFindings {
                stored_twice: 1,
                ..found(3)
            }
        );
        assert_eq!(
            with(&[(
                4,
                Ping {
                    latitude_e7: 5,
                    ..example_ping(3)
                }
            )]),
            StoreFindings {
                altered: 1,
                ..found(3)
            }
        );
        assert_eq!(
            with(&[(4, example_ping(3)), (4, example_ping(6))]),
            StoreFindings {
                unknown: 1,
                ..found(3)
            }
        );
        assert_eq!(
            with(&[(3, example_ping(3))]),
            StoreFindings {
                lost: 1,
                ..found(2)
            },
            "another epoch is another ping"
        );
    }

    #[test]
    fn a_filtered_ping_is_not_lost_but_no_more_than_were_filtered() {
        let found = |stored| StoreFindings {
            stored,
            ..StoreFindings::default()
        };
        assert_eq!(
            stored(ledger(1), &[(4, example_ping(1)), (4, example_ping(3))]),
            found(2)
        );
        assert_eq!(
            stored(ledger(1), &[(4, example_ping(1))]),
            StoreFindings {
                lost: 1,
                ..found(1)
            }
        );
    }

    fn never_seen() -> Entry {
        Entry {
            user: DEVICE.user,
            last_contact_ms: 0,
            last_sample_ms: 0,
            last_fix_ms: 0,
            durable_ms: 0,
            state: State::NeverSeen,
            position: 0,
            coalesced: 0,
        }
    }

    fn wrong(change: impl FnOnce(&mut Entry)) -> u64 {
        let mut entry = Entry {
            user: DEVICE.user,
            last_contact_ms: 60,
            last_sample_ms: 5_000,
            last_fix_ms: 4_000, // The fifth ping was no fix.
            durable_ms: 61,
            state: State::Active,
            position: 10,
            coalesced: 0,
        };
        change(&mut entry);
        let mut ledger = ledger(0);
        ledger.book(&Event::Settled(SeqRange { first: 4, last: 5 }), |_| ());
        let answer = Answer {
            entries: vec![entry],
            at_most_ms: 70,
        };
        let findings = check_freshness(&[Expected::from(&ledger)], &[never_seen()], &answer);
        assert_eq!(findings.checked, 1);
        findings.wrong
    }

    #[test]
    fn each_fault_of_freshness_is_found() {
        assert_eq!(wrong(|_| ()), 0);
        assert_eq!(wrong(|entry| entry.last_sample_ms = 4_999), 1);
        assert_eq!(wrong(|entry| entry.last_sample_ms = 5_001), 1);
        assert_eq!(wrong(|entry| entry.last_fix_ms = 0), 1);
        assert_eq!(wrong(|entry| entry.last_contact_ms = 49), 1);
        assert_eq!(wrong(|entry| entry.last_contact_ms = 71), 1);
        assert_eq!(wrong(|entry| entry.position = 8), 1);
        assert_eq!(wrong(|entry| entry.state = State::NeverSeen), 1);
        assert_eq!(wrong(|entry| entry.user = UserId([8; 16])), 1);
    }

    #[test]
    fn an_unanswered_ping_may_have_arrived() {
        let expected = Expected::from(&ledger(0));
        assert!(!expected.is_complete);
        let fault = |sample_ms| {
            let told = Entry {
                last_contact_ms: 60,
                last_sample_ms: sample_ms,
                last_fix_ms: sample_ms,
                state: State::Active,
                position: 10,
                ..never_seen()
            };
            fault_of(&expected, &never_seen(), &told, 70)
        };
        assert_eq!(fault(3_000), None);
        assert_eq!(fault(5_000), None);
        assert!(fault(2_000).is_some());
    }

    #[test]
    fn each_fault_of_the_stream_is_found() {
        let expected = [Expected::from(&ledger(0))];
        let level = Seen {
            position: 9,
            contact_ms: 50,
            sample_ms: 3_000,
        };
        let wrong = |seen: Seen| check_stream(&expected, |_| Some(seen), Some(9), (0, None)).wrong;
        assert_eq!(wrong(level), 0);
        assert_eq!(
            wrong(Seen {
                position: 8,
                ..level
            }),
            1
        );
        assert_eq!(
            wrong(Seen {
                contact_ms: 49,
                ..level
            }),
            1
        );
        assert_eq!(
            wrong(Seen {
                sample_ms: 2_999,
                ..level
            }),
            1
        );
        assert_eq!(
            check_stream(&expected, |_| None, Some(9), (0, None)).wrong,
            1
        );
        assert_eq!(
            check_stream(&expected, |_| Some(level), None, (0, None)).wrong,
            1
        );
        assert_eq!(
            check_stream(
                &expected,
                |_| Some(level),
                Some(9),
                (2, Some(String::new()))
            )
            .wrong,
            2
        );
    }
}
