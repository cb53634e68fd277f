//! Which values are sealed, and as what: rows of pings, each with its user's key.
//!
//! Knows the format byte of a sealed value and what tells one row from all others. Must not know RocksDB, where keys
//! are kept, or what a row holds.
//!
//! A row of pings is written once: each sequence number is stored once. So its nonce is made of the row's key: the
//! device, the epoch and the first sequence number, folded to twelve bytes, which are the same for two rows of a user
//! only after four thousand million pings of one epoch; even then the cipher holds. The whole key and the family's name
//! are sealed with it: a value that was moved to another row, or another day, does not open.

use waypost_proto::id::UserId;

use super::{keys::PingKey, record::RecordError};
use crate::seal::{DataKey, Identity, NONCE_BYTES, TAG_BYTES};

/// The first byte of a sealed value. What follows opens to a value of another format.
const FORMAT: u8 = 2;
/// By how much a sealed value is longer.
pub(super) const OVERHEAD_BYTES: usize = 1 + TAG_BYTES;

/// Writes a row of pings, sealed, in the place of what was in `sealed`.
pub(super) fn seal_pings(
    key: &DataKey,
    family: &str,
    row: &[u8],
    value: &[u8],
    sealed: &mut Vec<u8>,
) {
    sealed.clear();
    sealed.push(FORMAT);
    key.seal(&identity(family, row), value, sealed);
}

/// What is sealed of a value; none of one that is older than sealing.
pub(super) fn sealed_part(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(&[FORMAT])
}

/// The value that a row of pings was sealed as.
pub(super) fn open_pings(
    key: &DataKey,
    family: &str,
    row: &[u8],
    sealed_part: &[u8],
) -> Result<Vec<u8>, RecordError> {
    Ok(key.open(&identity(family, row), sealed_part)?)
}

/// Whose row it is; none if this is no key of a row.
pub(super) fn user_of(row: &[u8]) -> Option<UserId> {
    row.first_chunk().map(|user| UserId(*user))
}

fn identity(family: &str, row: &[u8]) -> Identity {
    let mut nonce = [0; NONCE_BYTES];
    if let Some(key) = PingKey::from_bytes(row) {
        let (device, numbers) = nonce.split_at_mut(size_of::<u32>());
        device.copy_from_slice(&key.device.device.to_be_bytes());
        let folded = u64::from(key.epoch) << 32 ^ key.first_seq;
        numbers.copy_from_slice(&folded.to_be_bytes());
    }
    Identity::new(family, row, nonce)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use ring::rand::SystemRandom;
    use waypost_proto::id::DeviceId;

    use super::*;
    use crate::{seal::Unopened, store::Day};

    fn row(device: u32, epoch: u32, first_seq: u64) -> [u8; 32] {
        let user = UserId([3; 16]);
        let device = DeviceId { user, device };
        PingKey {
            device,
            epoch,
            first_seq,
        }
        .to_bytes()
    }

    #[test]
    fn the_rows_of_a_user_have_nonces_of_their_own() {
        let numbers = [0, 1, 2, 3, 255, 256, 65_536, u32::MAX];
        let mut seen = HashSet::new();
        for device in numbers {
            for epoch in numbers {
                for first_seq in numbers {
                    let identity = identity("", &row(device, epoch, first_seq.into()));
                    assert!(seen.insert(*identity.nonce()));
                }
            }
        }
    }

    #[test]
    fn a_row_opens_under_its_own_key_and_day_only() {
        let key = DataKey::random(&SystemRandom::new()).unwrap();
        let (row, other, mut sealed) = (row(1, 2, 3), row(1, 2, 4), Vec::new());
        let (day, next) = (Day::of_ms(0), Day::of_ms(u64::MAX));
        seal_pings(&key, &day.family_name(), &row, b"value", &mut sealed);
        let part = sealed_part(&sealed).unwrap();
        assert_eq!(sealed_part(b"\x01value"), None);
        let open = |day: Day, row| open_pings(&key, &day.family_name(), row, part);
        assert_eq!(open(day, &row), Ok(b"value".to_vec()));
        for (day, row) in [(day, &other), (next, &row)] {
            assert_eq!(open(day, row), Err(RecordError::Unopened(Unopened)));
        }
    }
}
