//! Who is invited, in the store: keys, values, and how they are read back.
//!
//! Knows the layout of two families. Must not know what makes a code valid.
//!
//! # Families
//!
//! - `invitations`: the SHA-256 of a code → who redeems it, until when, and with which key it was. No code is here, so
//!   neither a store nor a backup can be used to enrol.
//! - `enrolled`: `user` → the last number that an invitation has given to a device. It is kept for ever, since no number
//!   is given twice.

use prost::Message;
use rocksdb::IteratorMode;
use waypost_proto::id::{DeviceId, UserId};

use super::{
    Batch, ReadError, Store, bad_key, bad_value,
    record::{self, RecordError},
};
use crate::{
    enrol::invitations::{Change, CodeHash, Invitation, KeyHash},
    grants::CheckerSet,
};

pub(super) const INVITATIONS: &str = "invitations";
pub(super) const ENROLLED: &str = "enrolled";

/// An [`Invitation`]. Field numbers are for ever, here and below.
#[derive(Clone, PartialEq, Message)]
struct InvitationRow {
    #[prost(bytes = "vec", tag = "1")]
    user: Vec<u8>,
    #[prost(uint32, tag = "2")]
    device: u32,
    #[prost(uint64, tag = "3")]
    expires_ms: u64,
    /// Empty until it is redeemed.
    #[prost(bytes = "vec", tag = "4")]
    redeemed_by: Vec<u8>,
    /// A bit for each checker that the holder grants by redeeming it.
    #[prost(fixed64, tag = "5")]
    checkers: u64,
}

#[derive(Clone, PartialEq, Message)]
struct EnrolledRow {
    #[prost(uint32, tag = "1")]
    last_device: u32,
}

impl Batch {
    /// Adds what has become of invitations.
    pub fn put_invitations(&mut self, change: &Change) {
        if let Some((code, invitation)) = &change.kept {
            let row = InvitationRow {
                user: invitation.device.user.0.to_vec(),
                device: invitation.device.device,
                expires_ms: invitation.expires_ms,
                redeemed_by: invitation
                    .redeemed_by
                    .map_or_else(Vec::new, |key| key.0.to_vec()),
                checkers: invitation.checkers.bits(),
            };
            self.put(INVITATIONS, &code.0, &row);
        }
        for code in &change.forgotten {
            self.delete(INVITATIONS, &code.0);
        }
        if let Some(numbered) = change.numbered {
            self.put_last_device(numbered);
        }
    }

    /// Says which number was the last that a device of its user was given.
    pub fn put_last_device(&mut self, device: DeviceId) {
        let last_device = device.device;
        self.put(ENROLLED, &device.user.0, &EnrolledRow { last_device });
    }
}

impl Store {
    /// All invitations, those that have expired included.
    ///
    /// # Errors
    /// When one cannot be read: a code might work twice.
    pub fn load_invitations(&self) -> Result<Vec<(CodeHash, Invitation)>, ReadError> {
        let rows = self
            .db
            .iterator_cf(&self.family(INVITATIONS), IteratorMode::Start);
        rows.map(|row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            let code = <[u8; 32]>::try_from(&*key).map_err(|_| bad_key(INVITATIONS, &key))?;
            let invitation =
                invitation(&value).map_err(|source| bad_value(INVITATIONS, &key, source))?;
            Ok((CodeHash(code), invitation))
        })
        .collect()
    }

    /// The highest number that a device of the user has, or was given by an invitation. None for a user of whom nothing
    /// is known.
    ///
    /// # Errors
    /// When a row cannot be read.
    pub fn last_device(&self, user: UserId) -> Result<Option<u32>, ReadError> {
        let value = self
            .db
            .get_cf(&self.family(ENROLLED), user.0)
            .map_err(|error| ReadError::RocksDb(error.into_string()))?;
        let row = value
            .map(|value| record::decode_row::<EnrolledRow>(&value))
            .transpose()
            .map_err(|source| bad_value(ENROLLED, &user.0, source))?;
        let mut last = row.map(|row| row.last_device);
        // An authority elsewhere gives numbers as well.
        for device in self.device_ids_of(user) {
            last = last.max(Some(device?.device));
        }
        Ok(last)
    }
}

fn invitation(value: &[u8]) -> Result<Invitation, RecordError> {
    let row: InvitationRow = record::decode_row(value)?;
    let user = <[u8; 16]>::try_from(&*row.user).map_err(|_| RecordError::Malformed)?;
    let redeemed_by = match &*row.redeemed_by {
        [] => None,
        key => Some(KeyHash(
            <[u8; 32]>::try_from(key).map_err(|_| RecordError::Malformed)?,
        )),
    };
    Ok(Invitation {
        device: DeviceId {
            user: UserId(user),
            device: row.device,
        },
        checkers: CheckerSet::from_bits(row.checkers),
        expires_ms: row.expires_ms,
        redeemed_by,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use waypost_proto::device::DeviceRecord;

    use super::*;
    use crate::store::StoreConfig;

    const NOON_MS: u64 = 1_767_268_800_000;

    fn open(data_dir: &Path) -> Store {
        Store::open(data_dir, &StoreConfig::default(), NOON_MS).unwrap()
    }

    fn write(store: &Store, change: &Change) {
        let mut batch = store.batch();
        batch.put_invitations(change);
        store.commit(batch).unwrap();
    }

    #[test]
    fn invitations_come_back_as_they_were_and_forgotten_ones_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let device = DeviceId {
            user: UserId([1; 16]),
            device: 3,
        };
        let invitation = Invitation {
            device,
            checkers: CheckerSet::from_bits(0b101),
            expires_ms: NOON_MS + 1,
            redeemed_by: None,
        };
        let redeemed = Invitation {
            redeemed_by: Some(KeyHash([9; 32])),
            ..invitation
        };
        let kept = |n, invitation| Change {
            kept: Some((CodeHash([n; 32]), invitation)),
            numbered: Some(device),
            ..Change::default()
        };
        for n in 1..=3 {
            write(&store, &kept(n, invitation));
        }
        let last = Change {
            forgotten: vec![CodeHash([1; 32])],
            ..kept(2, redeemed)
        };
        write(&store, &last);
        drop(store);
        let store = open(folder.path());
        assert_eq!(
            store.load_invitations().unwrap(),
            [
                (CodeHash([2; 32]), redeemed),
                (CodeHash([3; 32]), invitation)
            ]
        );
        assert_eq!(store.last_device(device.user).unwrap(), Some(3));
        assert_eq!(store.last_device(UserId([2; 16])).unwrap(), None);
    }

    #[test]
    fn a_number_that_another_authority_gave_is_taken_as_well() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let user = UserId([1; 16]);
        let mut batch = store.batch();
        for device in [2, 7] {
            batch.put_device(&DeviceId { user, device }, &DeviceRecord::default());
        }
        store.commit(batch).unwrap();
        assert_eq!(store.last_device(user).unwrap(), Some(7));
        write(
            &store,
            &Change {
                numbered: Some(DeviceId { user, device: 9 }),
                ..Change::default()
            },
        );
        assert_eq!(store.last_device(user).unwrap(), Some(9));
    }
}
