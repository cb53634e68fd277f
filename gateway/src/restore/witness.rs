//! What the audit log says has happened since a backup was made, and must not be forgotten with what is lost.
//!
//! Plain data. Knows deeds. Must not know files or the store.
//!
//! Erasures are on the list beside the keys as well; that of the log is another witness, should the keys be from a copy that
//! is older. Of revocations it is the only one, and of what holders decided of checkers. It knows the numbers of enrolled
//! devices, which must not be given again: the certificates are out. And it knows of each life of the store that a restore
//! has begun, however soon the next one follows: as long as it is not lost with the store.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;
use waypost_proto::id::{DeviceId, UserId};

use crate::{
    audit::chain::{Deed, What, Who, Whose},
    revocation::Subject,
};

/// What is known of the time since a backup.
#[derive(Debug)]
pub struct Witness {
    made_ms: u64,
    erased: BTreeMap<UserId, u64>,
    revocations: FxHashMap<Subject, Option<u64>>,
    enrolled: BTreeMap<UserId, u32>,
    grants: Vec<GrantChange>,
    restores: u64,
    newest_ms: u64,
}

/// A holder has let a checker be told, or has taken that back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantChange {
    /// Whose holder.
    pub user: UserId,
    /// The checker's name.
    pub checker: String,
    /// Whether it may be told since.
    pub is_granted: bool,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
}

impl Witness {
    /// One of what followed a moment, in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn of_what_followed(made_ms: u64) -> Self {
        Self {
            made_ms,
            erased: BTreeMap::new(),
            revocations: FxHashMap::default(),
            enrolled: BTreeMap::new(),
            grants: Vec::new(),
            restores: 0,
            newest_ms: 0,
        }
    }

    /// Hears of a deed. They come in the order in which they were done.
    pub fn hear(&mut self, deed: &Deed) {
        self.newest_ms = self.newest_ms.max(deed.at_ms);
        match &deed.what {
            // Also from before: there is no way back from it.
            What::Erased => {
                for user in users_of(&deed.whose) {
                    self.erased.entry(user).or_insert(deed.at_ms);
                }
            }
            // Each began a life of the store, by whatever clock.
            What::Restored => self.restores += 1,
            _ if deed.at_ms < self.made_ms => {}
            What::Revoked | What::RevocationLifted => {
                let since_ms = (deed.what == What::Revoked).then_some(deed.at_ms);
                match &deed.whose {
                    Whose::Device(device) => {
                        let device = parse_device(device).map(Subject::Device);
                        self.revocations
                            .extend(device.map(|device| (device, since_ms)));
                    }
                    whose => {
                        let users = users_of(whose).into_iter().map(Subject::User);
                        self.revocations.extend(users.map(|user| (user, since_ms)));
                    }
                }
            }
            What::Enrolled => {
                if let Who::Holder(device) = &deed.who
                    && let Some(DeviceId { user, device }) = parse_device(device)
                {
                    let last = self.enrolled.entry(user).or_default();
                    *last = device.max(*last);
                }
            }
            what @ (What::Granted(checker) | What::Withdrawn(checker)) => {
                let change = |user| GrantChange {
                    user,
                    checker: checker.clone(),
                    is_granted: matches!(what, What::Granted(_)),
                    at_ms: deed.at_ms,
                };
                let users = users_of(&deed.whose).into_iter();
                self.grants.extend(users.map(change));
            }
            What::Started | What::WatchStarted | What::Invited | What::Exported => {}
        }
    }

    /// Who was ever erased, and when, in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn erased(&self) -> Vec<(UserId, u64)> {
        let erased = self.erased.iter();
        erased
            .map(|(user, erased_ms)| (*user, *erased_ms))
            .collect()
    }

    /// Who was revoked since, with when; none for whom a revocation was lifted last.
    pub fn revocations(&self) -> impl Iterator<Item = (Subject, Option<u64>)> {
        self.revocations
            .iter()
            .map(|(subject, since_ms)| (*subject, *since_ms))
    }

    /// What holders decided of checkers since, in that order.
    #[must_use]
    pub fn grants(&self) -> &[GrantChange] {
        &self.grants
    }

    /// When a life that begins at `now_ms` begins as far as its numbers go, both in milliseconds since 1970-01-01 UTC: a
    /// minute or more after any that is on record, and after all that is on record of it, also if that began just now or by
    /// a clock that was ahead.
    #[must_use]
    pub fn life_begins_ms(&self, now_ms: u64) -> u64 {
        // Each moves on by one more than the one before it.
        let ahead_ms = self.restores.saturating_mul(LEAST_BETWEEN_LIVES_MS);
        now_ms.max(self.newest_ms).saturating_add(ahead_ms)
    }

    /// The last device that was enrolled of each user.
    pub fn enrolled(&self) -> impl Iterator<Item = DeviceId> {
        let enrolled = self.enrolled.iter();
        enrolled.map(|(&user, &device)| DeviceId { user, device })
    }
}

/// What a life of the store needs of another one to have its numbers for itself: see `store::life`.
const LEAST_BETWEEN_LIVES_MS: u64 = 60_000;

fn users_of(whose: &Whose) -> Vec<UserId> {
    match whose {
        Whose::Users(users) => users
            .iter()
            .filter_map(|user| UserId::parse(user))
            .collect(),
        Whose::Nobody | Whose::Everybody | Whose::Device(_) | Whose::Many { .. } => Vec::new(),
    }
}

/// Reads what the display of a device writes.
fn parse_device(text: &str) -> Option<DeviceId> {
    let (user, device) = text.split_once('/')?;
    Some(DeviceId {
        user: UserId::parse(user)?,
        device: device.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserId = UserId([1; 16]);
    const BOB: UserId = UserId([2; 16]);

    fn phone(device: u32) -> DeviceId {
        DeviceId {
            user: ALICE,
            device,
        }
    }

    #[test]
    fn what_followed_holds_and_what_was_before_is_the_store_s_own() {
        let deed = |at_ms, who, what, whose| Deed {
            at_ms,
            who,
            what,
            whose,
        };
        let of_phone = |number| Whose::Device(phone(number).to_string());
        let holder = |number| Who::Holder(phone(number).to_string());
        let (operator, bob) = (Who::Operator, Whose::of(&[BOB]));
        let mut witness = Witness::of_what_followed(100);
        for deed in [
            deed(50, holder(1), What::Erased, Whose::of(&[BOB])),
            deed(60, operator.clone(), What::Revoked, of_phone(1)),
            deed(60, holder(9), What::Enrolled, Whose::of(&[ALICE])),
            deed(
                60,
                holder(9),
                What::Granted("ops".into()),
                Whose::of(&[BOB]),
            ),
            deed(100, operator.clone(), What::Revoked, of_phone(2)),
            deed(101, operator.clone(), What::Revoked, of_phone(3)),
            deed(102, operator.clone(), What::RevocationLifted, of_phone(3)),
            deed(103, operator, What::Revoked, bob),
            deed(104, holder(5), What::Enrolled, Whose::of(&[ALICE])),
            deed(105, holder(4), What::Enrolled, Whose::of(&[ALICE])),
            deed(
                105,
                holder(1),
                What::Granted("ops".into()),
                Whose::of(&[BOB]),
            ),
            deed(
                106,
                holder(1),
                What::Withdrawn("ops".into()),
                Whose::of(&[BOB]),
            ),
            deed(106, holder(1), What::Erased, Whose::of(&[ALICE])),
            deed(107, holder(1), What::Erased, Whose::of(&[ALICE])),
        ] {
            witness.hear(&deed);
        }
        assert_eq!(witness.erased(), [(ALICE, 106), (BOB, 50)]);
        let mut revocations: Vec<_> = witness.revocations().collect();
        revocations.sort_by_key(|(_, since_ms)| *since_ms);
        let expected = [
            (Subject::Device(phone(3)), None),
            (Subject::Device(phone(2)), Some(100)),
            (Subject::User(BOB), Some(103)),
        ];
        assert_eq!(revocations, expected);
        assert_eq!(witness.enrolled().collect::<Vec<_>>(), [phone(5)]);
        let change = |is_granted, at_ms| GrantChange {
            user: BOB,
            checker: "ops".into(),
            is_granted,
            at_ms,
        };
        let since = [change(true, 105), change(false, 106)];
        assert_eq!(witness.grants(), since);
        assert_eq!(witness.life_begins_ms(200), 200, "the first");
    }

    #[test]
    fn lives_begin_a_minute_apart_however_soon_one_follows_and_whatever_the_clock_says() {
        let mut witness = Witness::of_what_followed(u64::MAX);
        let mut last_ms = 0;
        for at_ms in [
            5_000_000, 5_000_000, 5_000_001, 4_000_000, 9_000_000, 4_000_000,
        ] {
            let begins_ms = witness.life_begins_ms(at_ms);
            assert!(last_ms + LEAST_BETWEEN_LIVES_MS <= begins_ms, "{at_ms}");
            last_ms = begins_ms;
            // What a life has recorded was done in it.
            for (what, at_ms) in [(What::Restored, at_ms), (What::Invited, last_ms + 500)] {
                witness.hear(&Deed {
                    at_ms,
                    who: Who::Operator,
                    what,
                    whose: Whose::Everybody,
                });
            }
        }
    }
}
