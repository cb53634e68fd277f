//! What a checker was told, judged against what devices were acknowledged.
//!
//! Knows the two promises of `Progress`: no entry at or below an announced position comes later, and
//! whoever was heard up to an announced moment has been told. Must not know streams or processes.

use std::{collections::BTreeMap, fmt};

use waypost_proto::id::UserId;

/// Something a checker was told, in the order it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// A user's last sign of life.
    Heard {
        user: UserId,
        last_contact_ms: u64,
        position: u64,
    },
    /// Everything up to here has been told.
    Resolved { upto_ms: u64, position: u64 },
    /// The gateway was killed; counted, and otherwise no excuse.
    Crash,
}

/// A contact that a device was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    pub user: UserId,
    pub receive_ms: u64,
}

/// How much was claimed, all of it right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    pub crashes: u64,
    pub entries: u64,
    pub progresses: u64,
    pub contacts: u64,
}

impl fmt::Display for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            crashes,
            entries,
            progresses,
            contacts,
        } = self;
        write!(
            f,
            "{crashes} crashes, {entries} entries, {progresses} announcements, {contacts} contacts of devices"
        )
    }
}

impl Claims {
    /// Judges all that was said.
    ///
    /// # Errors
    /// The first claim that was wrong.
    pub fn judge(said: &[Said], contacts: &[Contact]) -> Result<Self, String> {
        let mut claims = Self {
            contacts: contacts.len() as u64,
            ..Self::default()
        };
        let mut acknowledged: BTreeMap<UserId, Vec<u64>> = BTreeMap::new();
        for contact in contacts {
            acknowledged
                .entry(contact.user)
                .or_default()
                .push(contact.receive_ms);
        }
        acknowledged
            .values_mut()
            .for_each(|times| times.sort_unstable());
        let mut known: BTreeMap<UserId, u64> = BTreeMap::new();
        let (mut resolved_ms, mut settled) = (0, 0);
        for said in said {
            match *said {
                Said::Crash => claims.crashes += 1,
                Said::Heard {
                    user,
                    last_contact_ms,
                    position,
                } => {
                    claims.entries += 1;
                    if position <= settled {
                        return Err(format!(
                            "an entry at {position} came after position {settled} was announced"
                        ));
                    }
                    let known = known.entry(user).or_default();
                    if last_contact_ms < *known {
                        return Err(format!(
                            "{user} went back from {known} to {last_contact_ms}"
                        ));
                    }
                    if *known < last_contact_ms && last_contact_ms <= resolved_ms {
                        return Err(format!(
                            "{user} was heard at {last_contact_ms}, told after {resolved_ms} was resolved"
                        ));
                    }
                    *known = last_contact_ms;
                }
                Said::Resolved { upto_ms, position } => {
                    claims.progresses += 1;
                    resolved_ms = resolved_ms.max(upto_ms);
                    settled = settled.max(position);
                    for (user, times) in &acknowledged {
                        let heard = times.partition_point(|&time_ms| time_ms <= upto_ms);
                        let Some(&heard_ms) = times[..heard].last() else {
                            continue;
                        };
                        let known_ms = known.get(user).copied().unwrap_or_default();
                        if known_ms < heard_ms {
                            return Err(format!(
                                "{user} was called silent since {known_ms} as of {upto_ms}, and was heard at {heard_ms}"
                            ));
                        }
                    }
                }
            }
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: UserId = UserId([1; 16]);

    fn heard(last_contact_ms: u64, position: u64) -> Said {
        Said::Heard {
            user: USER,
            last_contact_ms,
            position,
        }
    }

    fn resolved(upto_ms: u64, position: u64) -> Said {
        Said::Resolved { upto_ms, position }
    }

    fn contact(receive_ms: u64) -> Contact {
        Contact {
            user: USER,
            receive_ms,
        }
    }

    #[test]
    fn what_is_right_is_counted() {
        let said = [
            heard(5, 1),
            resolved(6, 1),
            Said::Crash,
            heard(9, 2),
            resolved(9, 2),
        ];
        let claims = Claims::judge(&said, &[contact(5), contact(9)]).unwrap();
        assert_eq!(
            (claims.crashes, claims.entries, claims.progresses),
            (1, 2, 2)
        );
    }

    /// The negative controls: each of these must be caught.
    #[test]
    fn every_kind_of_wrong_is_caught() {
        for (said, contacts, told) in [
            (vec![resolved(6, 0)], vec![contact(5)], "was called silent"),
            (
                vec![heard(4, 1), resolved(6, 1)],
                vec![contact(5)],
                "was called silent",
            ),
            (
                vec![resolved(6, 3), heard(7, 3)],
                vec![],
                "came after position",
            ),
            (vec![resolved(6, 0), heard(6, 1)], vec![], "was resolved"),
            (
                vec![heard(6, 1), Said::Crash, heard(5, 2)],
                vec![],
                "went back",
            ),
        ] {
            let wrong = Claims::judge(&said, &contacts).unwrap_err();
            assert!(wrong.contains(told), "{wrong}");
        }
    }
}
