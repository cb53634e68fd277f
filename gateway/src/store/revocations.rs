//! Who is revoked, in the store: keys, values, and how they are read back.
//!
//! Knows the layout of one family. Must not know who revokes or what follows from it.
//!
//! # Families
//!
//! - `revocations`: `user`, or `user | device` → since when. There is a row only while the revocation is in force.

use prost::Message;
use waypost_proto::id::UserId;

use super::{Batch, ReadError, Store, bad_key, bad_value, keys, record};
use crate::revocation::{Revocation, Subject};

pub(super) const REVOCATIONS: &str = "revocations";

/// Field numbers are for ever.
#[derive(Clone, PartialEq, Message)]
struct RevocationRow {
    #[prost(uint64, tag = "1")]
    since_ms: u64,
}

impl Batch {
    /// Revokes, since a moment in milliseconds since 1970-01-01 UTC; or lifts the revocation if there is none.
    pub fn put_revocation(&mut self, subject: Subject, since_ms: Option<u64>) {
        let key = key(subject);
        match since_ms {
            Some(since_ms) => self.put(REVOCATIONS, &key, &RevocationRow { since_ms }),
            None => self.delete(REVOCATIONS, &key),
        }
    }
}

impl Store {
    /// All revocations that are in force, by user, and each user's own before those of the devices.
    ///
    /// # Errors
    /// When a row cannot be read: somebody would be let in who must not be.
    pub fn load_revocations(&self) -> Result<Vec<Revocation>, ReadError> {
        self.scan(&self.family(REVOCATIONS), None)
            .map(|row| {
                let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
                let subject = subject_of(&key).ok_or_else(|| bad_key(REVOCATIONS, &key))?;
                let RevocationRow { since_ms } = record::decode_row(&value)
                    .map_err(|source| bad_value(REVOCATIONS, &key, source))?;
                Ok(Revocation { subject, since_ms })
            })
            .collect()
    }
}

fn key(subject: Subject) -> Vec<u8> {
    match subject {
        Subject::User(user) => user.0.to_vec(),
        Subject::Device(device) => keys::device_key(&device).to_vec(),
    }
}

fn subject_of(key: &[u8]) -> Option<Subject> {
    match <[u8; 16]>::try_from(key) {
        Ok(user) => Some(Subject::User(UserId(user))),
        Err(_) => keys::device_of_key(key).map(Subject::Device),
    }
}

#[cfg(test)]
mod tests {
    use waypost_proto::id::DeviceId;

    use super::*;
    use crate::store::StoreConfig;

    const NOON_MS: u64 = 1_767_268_800_000;

    #[test]
    fn revocations_come_back_until_they_are_lifted() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Store::open(folder.path(), &StoreConfig::default(), NOON_MS).unwrap();
        let user = UserId([7; 16]);
        let subjects = [
            Subject::User(user),
            Subject::Device(DeviceId { user, device: 0 }),
            Subject::Device(DeviceId { user, device: 9 }),
            Subject::User(UserId([8; 16])),
        ];
        let store = open();
        assert_eq!(store.load_revocations().unwrap(), []);
        let mut batch = store.batch();
        for (since_ms, subject) in (1..).zip(subjects) {
            batch.put_revocation(subject, Some(since_ms));
        }
        batch.put_position(5);
        store.commit(batch).unwrap();
        drop(store);

        let store = open();
        let kept: Vec<_> = (1..)
            .zip(subjects)
            .map(|(since_ms, subject)| Revocation { subject, since_ms })
            .collect();
        assert_eq!(store.load_revocations().unwrap(), kept);
        let mut batch = store.batch();
        batch.put_revocation(subjects[1], None);
        store.commit(batch).unwrap();
        drop(store);
        let left = open().load_revocations().unwrap();
        assert_eq!(left, [kept[0], kept[2], kept[3]]);
    }
}
