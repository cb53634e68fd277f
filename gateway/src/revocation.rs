//! Who is let in no more: the devices and users that the operator has revoked, and the certificates that the
//! authorities have.
//!
//! Written by the committer when a revocation is durable, and by whoever reads the authorities' lists; read by
//! every handshake, and by the committer for every request. Knows who is revoked. Must not know connections,
//! certificates, or where this is kept.
//!
//! # Bounds
//!
//! Some 40 bytes for each device or user that was revoked. Only the operator can revoke, who is told at
//! [`MOST_REVOKED`] that there is no room for more: a fleet of which that many are lost needs a new authority. Some 20
//! bytes for each certificate of the authorities' lists, whose length is their authors' business.

use std::{fmt, hash::Hash};

use parking_lot::RwLock;
use rustc_hash::{FxHashMap, FxHashSet};
use waypost_proto::id::{DeviceId, UserId};

/// Whom a revocation is about. It is the identity that is revoked: no certificate of its name, of whatever date,
/// is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// All devices of a user, also those that come later.
    User(UserId),
    /// One device. The others of its user go on.
    Device(DeviceId),
}

impl Subject {
    /// The user whose devices it is about.
    #[must_use]
    pub fn user(&self) -> UserId {
        match self {
            Self::User(user) => *user,
            Self::Device(device) => device.user,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(user) => write!(f, "user {user}"),
            Self::Device(DeviceId { user, device }) => write!(f, "device {device} of user {user}"),
        }
    }
}

/// Names one certificate among all of all authorities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CertificateId(pub [u8; 16]);

/// A revocation that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// Whom it is about.
    pub subject: Subject,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub since_ms: u64,
}

/// How many revocations are in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of users.
    pub users: usize,
    /// Of single devices.
    pub devices: usize,
    /// Of certificates, by the authorities.
    pub certificates: usize,
}

/// There are [`MOST_REVOKED`] revocations already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MOST_REVOKED} devices and users are revoked already, and no more can be: give those that are left certificates of a new authority"
)]
pub struct NoRoom;

/// Who is revoked now.
#[derive(Debug, Default)]
pub struct Revocations {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    users: FxHashMap<UserId, u64>,
    devices: FxHashMap<DeviceId, u64>,
    certificates: FxHashSet<CertificateId>,
}

impl Revocations {
    /// As a store has them.
    #[must_use]
    pub fn restore(kept: impl IntoIterator<Item = Revocation>) -> Self {
        let revocations = Self::default();
        for Revocation { subject, since_ms } in kept {
            revocations.set(subject, Some(since_ms));
        }
        revocations
    }

    /// Whether a device may not be served, for its own sake or its user's.
    #[must_use]
    pub fn holds(&self, device: &DeviceId) -> bool {
        let state = self.state.read();
        // The usual case, for each request of each device: nobody is revoked.
        (!state.devices.is_empty() && state.devices.contains_key(device))
            || (!state.users.is_empty() && state.users.contains_key(&device.user))
    }

    /// Whether the authorities have revoked one of these certificates.
    #[must_use]
    pub fn lists(&self, certificates: &[CertificateId]) -> bool {
        let listed = &self.state.read().certificates;
        certificates.iter().any(|id| listed.contains(id))
    }

    /// Since when this very subject is revoked, in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn since_ms(&self, subject: Subject) -> Option<u64> {
        let state = self.state.read();
        match subject {
            Subject::User(user) => state.users.get(&user).copied(),
            Subject::Device(device) => state.devices.get(&device).copied(),
        }
    }

    /// Whether one more can be revoked.
    ///
    /// # Errors
    /// When not.
    pub fn check_room(&self) -> Result<(), NoRoom> {
        let state = self.state.read();
        if MOST_REVOKED <= state.users.len() + state.devices.len() {
            return Err(NoRoom);
        }
        Ok(())
    }

    /// Takes what is durable: revoked since a moment, or no longer.
    pub fn set(&self, subject: Subject, since_ms: Option<u64>) {
        let mut state = self.state.write();
        match subject {
            Subject::User(user) => put(&mut state.users, user, since_ms),
            Subject::Device(device) => put(&mut state.devices, device, since_ms),
        }
    }

    /// Takes the authorities' lists, in place of those before.
    pub fn set_listed(&self, certificates: FxHashSet<CertificateId>) {
        // Large ones take a while to free, and handshakes would wait for it.
        let before = std::mem::replace(&mut self.state.write().certificates, certificates);
        drop(before);
    }

    /// How many there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = self.state.read();
        Counts {
            users: state.users.len(),
            devices: state.devices.len(),
            certificates: state.certificates.len(),
        }
    }
}

fn put<Id: Eq + Hash>(revoked: &mut FxHashMap<Id, u64>, id: Id, since_ms: Option<u64>) {
    match since_ms {
        Some(since_ms) => revoked.insert(id, since_ms),
        None => revoked.remove(&id),
    };
}

/// Most devices and users that can be revoked: 40 MB of memory.
pub const MOST_REVOKED: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserId = UserId([1; 16]);
    const BOB: UserId = UserId([2; 16]);

    fn device(user: UserId, device: u32) -> DeviceId {
        DeviceId { user, device }
    }

    #[test]
    fn a_revoked_device_leaves_its_user_alone_and_a_revoked_user_takes_all_devices_along() {
        let (first, second) = (device(ALICE, 1), device(ALICE, 2));
        let revocations = Revocations::restore([Revocation {
            subject: Subject::Device(first),
            since_ms: 7,
        }]);
        assert_eq!(
            [&first, &second, &device(BOB, 1)].map(|device| revocations.holds(device)),
            [true, false, false]
        );
        revocations.set(Subject::User(ALICE), Some(8));
        assert_eq!(
            [&first, &second, &device(BOB, 1)].map(|device| revocations.holds(device)),
            [true, true, false]
        );
        assert_eq!(revocations.since_ms(Subject::User(ALICE)), Some(8));
        assert_eq!(revocations.since_ms(Subject::Device(second)), None);
        // What is lifted is the one revocation, and the other still holds.
        revocations.set(Subject::User(ALICE), None);
        assert_eq!(
            [&first, &second].map(|device| revocations.holds(device)),
            [true, false]
        );
        revocations.set(Subject::Device(first), None);
        assert!(!revocations.holds(&first));
        assert_eq!(revocations.counts(), Counts::default());
    }

    #[test]
    fn a_chain_is_revoked_with_any_of_its_certificates_and_a_new_list_takes_the_place_of_the_old() {
        let [own, issuer, other] = [1, 2, 3].map(|n| CertificateId([n; 16]));
        let revocations = Revocations::default();
        assert!(!revocations.lists(&[own, issuer]));
        revocations.set_listed([issuer].into_iter().collect());
        assert!(revocations.lists(&[own, issuer]));
        assert!(!revocations.lists(&[own]));
        revocations.set_listed([other].into_iter().collect());
        assert!(!revocations.lists(&[own, issuer]));
        assert_eq!(revocations.counts().certificates, 1);
    }
}
