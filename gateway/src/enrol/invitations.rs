//! Who is invited, and what becomes of a code: the core that the committer asks.
//!
//! Knows hashes of codes and keys, numbers of devices, and expiry. Must not know codes, certificates, time, which is an
//! argument, or the disk: each change is returned to be written, and answered when it is.
//!
//! A code works once because one thread decides, and because what it has decided is on disk before anybody is
//! answered. Until it expires it answers the key that redeemed it again: the answer may have been lost on its way.
//!
//! # Bounds
//!
//! At most so many as [`super::EnrolmentConfig::max_invitations`] are kept, some 120 bytes each; another one is
//! refused. One that has expired makes room, and nobody is told how it had ended.

use ring::digest;
use rustc_hash::FxHashMap;
use waypost_proto::{
    enrol::Code,
    id::{DeviceId, UserId},
};

use crate::grants::CheckerSet;

/// The SHA-256 of a code: what a store or a backup holds of it. A salt would add nothing to 80 random bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeHash(pub [u8; 32]);

/// The SHA-256 of a public key, as it stands in a certificate (SubjectPublicKeyInfo, DER).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHash(pub [u8; 32]);

/// What a code is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// Who redeems it.
    pub device: DeviceId,
    /// The checkers that the holder grants by redeeming it.
    pub checkers: CheckerSet,
    /// From when on it is worth nothing, in milliseconds since 1970-01-01 UTC.
    pub expires_ms: u64,
    /// Who has.
    pub redeemed_by: Option<KeyHash>,
}

/// Whose device is invited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invitee {
    /// A user whose id was made just now, of random numbers.
    NewUser(UserId),
    /// A user that must be known.
    KnownUser(UserId),
}

impl Invitee {
    /// The user.
    #[must_use]
    pub fn user(&self) -> UserId {
        match *self {
            Self::NewUser(user) | Self::KnownUser(user) => user,
        }
    }
}

/// Why there is no invitation. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotInvited {
    /// Ids are made by the gateway only, so that they say nothing of a person.
    #[error("this gateway knows no such user: leave the user out to invite a new one")]
    UnknownUser,
    /// As many are open as are kept.
    #[error(
        "{most} invitations are open, which is the most: wait until some expire, or raise [enrolment] max_invitations"
    )]
    TooMany {
        /// How many are kept.
        most: usize,
    },
    /// The user has had four billion devices.
    #[error("this user has no number left for another device")]
    NoNumberLeft,
}

/// The code was never issued, has expired, or was redeemed with another key. Which of these is nobody's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the code is not valid")]
pub struct NotValid;

/// What is to be written before anybody is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// An invitation as it is now.
    pub kept: Option<(CodeHash, Invitation)>,
    /// Those that have expired.
    pub forgotten: Vec<CodeHash>,
    /// The last number that was given to a device of a user.
    pub numbered: Option<DeviceId>,
}

/// All invitations that have not expired, and perhaps some that have.
#[derive(Debug, Default)]
pub struct Invitations {
    kept: FxHashMap<CodeHash, Invitation>,
    most: usize,
}

impl CodeHash {
    /// Of a code.
    #[must_use]
    pub fn of(code: &Code) -> Self {
        Self(sha256(code.as_bytes()))
    }
}

impl KeyHash {
    /// Of a public key, in DER.
    #[must_use]
    pub fn of(public_key: &[u8]) -> Self {
        Self(sha256(public_key))
    }
}

impl Invitations {
    /// Those that a store has kept, and how many may be.
    pub fn restore(kept: impl IntoIterator<Item = (CodeHash, Invitation)>, most: usize) -> Self {
        Self {
            kept: kept.into_iter().collect(),
            most,
        }
    }

    /// How many are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// What a code is for, valid or not.
    #[must_use]
    pub fn find(&self, code: CodeHash) -> Option<Invitation> {
        self.kept.get(&code).copied()
    }

    /// Invites a device until `expires_ms`. `last_device` is the highest number that a device of the user has had, none
    /// if the user is not known.
    ///
    /// # Errors
    /// When it is not invited.
    pub fn invite(
        &mut self,
        code: CodeHash,
        invitee: Invitee,
        checkers: CheckerSet,
        last_device: Option<u32>,
        expires_ms: u64,
        now_ms: u64,
    ) -> Result<(Invitation, Change), NotInvited> {
        if last_device.is_none() && matches!(invitee, Invitee::KnownUser(_)) {
            return Err(NotInvited::UnknownUser);
        }
        let number = last_device.unwrap_or_default().checked_add(1);
        let number = number.ok_or(NotInvited::NoNumberLeft)?;
        let open = |invitation: &Invitation| now_ms < invitation.expires_ms;
        if self.most <= self.kept.values().filter(|kept| open(kept)).count() {
            return Err(NotInvited::TooMany { most: self.most });
        }
        let mut forgotten = Vec::new();
        self.kept.retain(|code, invitation| {
            let is_open = open(invitation);
            if !is_open {
                forgotten.push(*code);
            }
            is_open
        });
        let invitation = Invitation {
            device: DeviceId {
                user: invitee.user(),
                device: number,
            },
            checkers,
            expires_ms,
            redeemed_by: None,
        };
        self.kept.insert(code, invitation);
        let change = Change {
            kept: Some((code, invitation)),
            forgotten,
            numbered: Some(invitation.device),
        };
        Ok((invitation, change))
    }

    /// Redeems a code with a key. There is no change when the same key has done so before.
    ///
    /// # Errors
    /// When the code is not valid, for this key.
    pub fn redeem(
        &mut self,
        code: CodeHash,
        key: KeyHash,
        now_ms: u64,
    ) -> Result<(DeviceId, Option<Change>), NotValid> {
        let invitation = self.kept.get_mut(&code).ok_or(NotValid)?;
        if invitation.expires_ms <= now_ms {
            return Err(NotValid);
        }
        match invitation.redeemed_by {
            Some(redeemed_by) if redeemed_by != key => Err(NotValid),
            Some(_) => Ok((invitation.device, None)),
            None => {
                invitation.redeemed_by = Some(key);
                let change = Change {
                    kept: Some((code, *invitation)),
                    ..Change::default()
                };
                Ok((invitation.device, Some(change)))
            }
        }
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;
    const NOW_MS: u64 = 1_767_268_800_000;
    const USER: UserId = UserId([7; 16]);
    const KEY: KeyHash = KeyHash([1; 32]);
    const OTHER_KEY: KeyHash = KeyHash([2; 32]);
    const NAMED: CheckerSet = CheckerSet::ALL;

    fn code(n: u8) -> CodeHash {
        CodeHash::of(&Code::new([n; Code::BYTES]))
    }

    fn invite(kept: &mut Invitations, n: u8, invitee: Invitee, last: Option<u32>) -> Invitation {
        let expires_ms = NOW_MS + HOUR_MS;
        let (invitation, change) = kept
            .invite(code(n), invitee, NAMED, last, expires_ms, NOW_MS)
            .unwrap();
        assert_eq!(change.kept, Some((code(n), invitation)));
        assert_eq!(change.numbered, Some(invitation.device));
        invitation
    }

    #[test]
    fn a_code_works_for_one_key_and_again_for_the_same_until_it_expires() {
        let mut kept = Invitations::restore([], 10);
        let invited = invite(&mut kept, 1, Invitee::NewUser(USER), None);
        assert_eq!(invited.device.device, 1);
        let (device, change) = kept.redeem(code(1), KEY, NOW_MS).unwrap();
        assert_eq!(device, invited.device);
        let redeemed = Invitation {
            redeemed_by: Some(KEY),
            ..invited
        };
        assert_eq!(change.unwrap().kept, Some((code(1), redeemed)));
        for _ in 0..3 {
            assert_eq!(kept.redeem(code(1), OTHER_KEY, NOW_MS), Err(NotValid));
            let again = kept.redeem(code(1), KEY, NOW_MS + HOUR_MS - 1);
            assert_eq!(again, Ok((device, None)), "nothing new to write");
        }
        let late = kept.redeem(code(1), KEY, NOW_MS + HOUR_MS);
        assert_eq!(late, Err(NotValid));
    }

    #[test]
    fn a_redeemed_code_is_redeemed_after_a_restart_as_well() {
        let mut kept = Invitations::restore([], 10);
        invite(&mut kept, 1, Invitee::NewUser(USER), None);
        let (device, change) = kept.redeem(code(1), KEY, NOW_MS).unwrap();
        let mut kept = Invitations::restore(change.unwrap().kept, 10);
        assert_eq!(kept.redeem(code(1), OTHER_KEY, NOW_MS), Err(NotValid));
        assert_eq!(kept.redeem(code(1), KEY, NOW_MS), Ok((device, None)));
    }

    #[test]
    fn a_code_that_was_never_issued_or_has_expired_is_refused_alike() {
        let mut kept = Invitations::restore([], 10);
        invite(&mut kept, 1, Invitee::NewUser(USER), None);
        let never = kept.redeem(code(2), KEY, NOW_MS);
        let late = kept.redeem(code(1), KEY, NOW_MS + HOUR_MS);
        assert_eq!((never, late), (Err(NotValid), Err(NotValid)));
    }

    #[test]
    fn numbers_go_on_from_the_last_and_only_known_users_get_further_devices() {
        let mut kept = Invitations::restore([], 10);
        let further = invite(&mut kept, 1, Invitee::KnownUser(USER), Some(41));
        assert_eq!(further.device.device, 42);
        for (last, refused) in [
            (None, NotInvited::UnknownUser),
            (Some(u32::MAX), NotInvited::NoNumberLeft),
        ] {
            let invitee = Invitee::KnownUser(USER);
            let again = kept.invite(code(2), invitee, NAMED, last, NOW_MS + 1, NOW_MS);
            assert_eq!(again, Err(refused));
        }
        assert_eq!(kept.len(), 1);
    }

    #[test]
    fn there_is_an_end_to_open_invitations_and_expired_ones_make_room() {
        let mut kept = Invitations::restore([], 2);
        invite(&mut kept, 1, Invitee::NewUser(USER), None);
        invite(&mut kept, 2, Invitee::NewUser(USER), None);
        let new = Invitee::NewUser(USER);
        let refused = kept.invite(code(3), new, NAMED, None, NOW_MS + 1, NOW_MS);
        assert_eq!(refused, Err(NotInvited::TooMany { most: 2 }));
        let later_ms = NOW_MS + HOUR_MS;
        let made = kept.invite(code(3), new, NAMED, None, later_ms + 1, later_ms);
        let mut forgotten = made.unwrap().1.forgotten;
        forgotten.sort_by_key(|code| code.0);
        let mut expired = vec![code(1), code(2)];
        expired.sort_by_key(|code| code.0);
        assert_eq!(forgotten, expired);
        assert_eq!(kept.len(), 1);
    }
}
