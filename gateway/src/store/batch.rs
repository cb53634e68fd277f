//! Rows that are to be written together, before they are.
//!
//! Knows the families that there are, and of whom a row is. Must not know RocksDB or the cipher.

use std::ops::Range;

use waypost_proto::{
    device::DeviceRecord,
    id::{DeviceId, UserId},
};

use super::{
    keys::{self, Day, PingKey},
    record, sealed,
};
use crate::seal::key_store::KeyStore;

/// Rows that are to be written together. Nothing of them exists before [`super::Store::commit`].
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Keys and values, one after the other.
    bytes: Vec<u8>,
    puts: Vec<Put>,
    pub(super) position: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Put {
    pub(super) family: Family,
    pub(super) operation: Operation,
    /// Where its key ends and its value begins; the key begins where the put before it ends.
    key_end: usize,
    value_end: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// In [`Family::Devices`] and [`Family::Day`] the value is sealed.
    Put,
    /// The value is of the user with whom the key ends, and is sealed.
    PutOfUser,
    /// There is no value.
    Delete,
    /// The value is the key after the last.
    DeleteRange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Devices,
    Day(Day),
    /// Any other, by its name.
    Notices(&'static str),
}

impl Batch {
    /// Adds a row of pings, as [`record::encode_pings`] made it. It is sealed when it is committed.
    pub fn put_pings(&mut self, day: Day, key: &PingKey, value: &[u8]) {
        self.bytes.extend_from_slice(&key.to_bytes());
        let key_end = self.bytes.len();
        self.bytes.extend_from_slice(value);
        self.puts.push(Put {
            family: Family::Day(day),
            operation: Operation::Put,
            key_end,
            value_end: self.bytes.len(),
        });
    }

    /// Makes a position durable, also one that is in no row.
    pub fn put_position(&mut self, position: u64) {
        self.position = self.position.max(position);
    }

    /// Replaces a device's record, which is sealed when it is committed. The newest position of these and of [`Self::put_position`] is the one
    /// that the commit makes durable.
    pub fn put_device(&mut self, device: &DeviceId, record: &DeviceRecord) {
        self.bytes.extend_from_slice(&keys::device_key(device));
        let key_end = self.bytes.len();
        record::encode_device(record, &mut self.bytes);
        self.puts.push(Put {
            family: Family::Devices,
            operation: Operation::Put,
            key_end,
            value_end: self.bytes.len(),
        });
        self.position = self.position.max(record.position);
    }

    pub(super) fn put(&mut self, family: &'static str, key: &[u8], row: &impl prost::Message) {
        let key_end = self.add_key(key);
        record::encode_row(row, &mut self.bytes);
        self.add(family, Operation::Put, key_end);
    }

    /// The same of a row that is sealed when it is committed; its key ends with the user, who must not be erased.
    pub(super) fn put_of_user(
        &mut self,
        family: &'static str,
        key: &[u8],
        row: &impl prost::Message,
    ) {
        let key_end = self.add_key(key);
        record::encode_row(row, &mut self.bytes);
        self.add(family, Operation::PutOfUser, key_end);
    }

    pub(super) fn delete(&mut self, family: &'static str, key: &[u8]) {
        let key_end = self.add_key(key);
        self.add(family, Operation::Delete, key_end);
    }

    pub(super) fn delete_range(&mut self, family: &'static str, keys: Range<&[u8]>) {
        self.delete_range_of(Family::Notices(family), keys);
    }

    pub(super) fn delete_range_of(&mut self, family: Family, keys: Range<&[u8]>) {
        let key_end = self.add_key(keys.start);
        self.bytes.extend_from_slice(keys.end);
        self.puts.push(Put {
            family,
            operation: Operation::DeleteRange,
            key_end,
            value_end: self.bytes.len(),
        });
    }

    fn add_key(&mut self, key: &[u8]) -> usize {
        self.bytes.extend_from_slice(key);
        self.bytes.len()
    }

    fn add(&mut self, family: &'static str, operation: Operation, key_end: usize) {
        self.puts.push(Put {
            family: Family::Notices(family),
            operation,
            key_end,
            value_end: self.bytes.len(),
        });
    }

    /// The rows in their order: what is to be done with each, its key and its value.
    pub(super) fn rows(&self) -> impl Iterator<Item = (Put, &[u8], &[u8])> {
        let mut rest = &*self.bytes;
        let mut start = 0;
        self.puts.iter().map(move |put| {
            let (row, behind) = rest.split_at(put.value_end - start);
            let (key, value) = row.split_at(put.key_end - start);
            (rest, start) = (behind, put.value_end);
            (*put, key, value)
        })
    }

    /// The users of whom something is sealed in it and who have no key, each once.
    pub(super) fn users_without_key(&self, keys: &KeyStore) -> Vec<UserId> {
        let mut users = Vec::new();
        for (put, key, _) in self.rows() {
            let user = match (put.family, put.operation) {
                (Family::Devices | Family::Day(_), Operation::Put) => sealed::first_user(key),
                (Family::Notices(_), Operation::PutOfUser) => sealed::last_user(key),
                _ => None,
            };
            users.extend(user.filter(|user| keys.key(user).is_none()));
        }
        users.sort_unstable();
        users.dedup();
        users
    }

    /// How many rows it has.
    pub(super) fn len(&self) -> usize {
        self.puts.len()
    }

    /// How large its keys and values are.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
    }
}
