//! Which values are sealed, and as what: all that is kept of a user, each row with the user's own key.
//!
//! Knows the first bytes of a sealed value and what tells one row from all others. Must not know RocksDB, where keys
//! are kept, or what a row holds.
//!
//! The row's whole key and its family's name are sealed with a value: one that was moved to another row, or another day,
//! does not open.
//!
//! - A row of pings is written once: each sequence number is stored once. So its nonce is made of the row's key: the
//!   device, the epoch and the first sequence number, folded to twelve bytes, which are the same for two rows of a user
//!   only after four thousand million pings of one epoch; even then the cipher holds.
//! - Every other row is written again and again, so the position of the commit stands before it in clear, and is in the
//!   nonce with the row's key, folded to four bytes. Positions are used once in the life of a store; where a value comes
//!   with a nonce a second time, in another life or of a row whose key folds to the same, the cipher still gives
//!   nothing away but whether both are the same value of the same row.

use std::borrow::Cow;

use waypost_proto::id::UserId;

use super::{keys::PingKey, record::RecordError};
use crate::seal::{DataKey, Identity, NONCE_BYTES, TAG_BYTES};

/// The first byte of a sealed row of pings. What follows opens to a value of another format.
const PINGS: u8 = 2;
/// The first byte of any other sealed row. A position follows.
const REWRITTEN: u8 = 3;
const POSITION_BYTES: usize = size_of::<u64>();
/// By how much a sealed value is longer, at most.
pub(super) const OVERHEAD_BYTES: usize = 1 + POSITION_BYTES + TAG_BYTES;

/// Writes a row of pings, sealed, in the place of what was in `sealed`.
pub(super) fn seal_pings(
    key: &DataKey,
    family: &str,
    row: &[u8],
    value: &[u8],
    sealed: &mut Vec<u8>,
) {
    sealed.clear();
    sealed.push(PINGS);
    key.seal(&of_pings(family, row), value, sealed);
}

/// Writes any other row of a user, sealed in the commit of a position, in the place of what was in `sealed`.
pub(super) fn seal_row(
    key: &DataKey,
    family: &str,
    row: &[u8],
    position: u64,
    value: &[u8],
    sealed: &mut Vec<u8>,
) {
    sealed.clear();
    sealed.push(REWRITTEN);
    let position = position.to_be_bytes();
    sealed.extend_from_slice(&position);
    key.seal(&of_row(family, row, position), value, sealed);
}

/// Whether a value is sealed. The values of before there was sealing are not, nor is what is kept of an erased user.
pub(super) fn is_sealed(value: &[u8]) -> bool {
    matches!(value.first(), Some(&(PINGS | REWRITTEN)))
}

/// A value as it was before it was sealed. None if it is sealed and there is no key.
pub(super) fn open<'v>(
    key: Option<&DataKey>,
    family: &str,
    row: &[u8],
    value: &'v [u8],
) -> Option<Result<Cow<'v, [u8]>, RecordError>> {
    let (identity, part) = match value.split_first() {
        Some((&PINGS, part)) => (of_pings(family, row), part),
        Some((&REWRITTEN, rest)) => match rest.split_first_chunk::<POSITION_BYTES>() {
            Some((position, part)) => (of_row(family, row, *position), part),
            None => return Some(Err(RecordError::Malformed)),
        },
        _ => return Some(Ok(Cow::Borrowed(value))),
    };
    let opened = key?.open(&identity, part).map(Cow::Owned);
    Some(opened.map_err(RecordError::from))
}

/// Whose row it is, where keys begin with the user; none if this is no key of a row.
pub(super) fn first_user(row: &[u8]) -> Option<UserId> {
    row.first_chunk().map(|user| UserId(*user))
}

/// Whose row it is, where keys end with the user; none if this is no key of a row.
pub(super) fn last_user(row: &[u8]) -> Option<UserId> {
    row.last_chunk().map(|user| UserId(*user))
}

fn of_pings(family: &str, row: &[u8]) -> Identity {
    let mut nonce = [0; NONCE_BYTES];
    if let Some(key) = PingKey::from_bytes(row) {
        let (device, numbers) = nonce.split_at_mut(size_of::<u32>());
        device.copy_from_slice(&key.device.device.to_be_bytes());
        let folded = u64::from(key.epoch) << 32 ^ key.first_seq;
        numbers.copy_from_slice(&folded.to_be_bytes());
    }
    Identity::new(family, row, nonce)
}

fn of_row(family: &str, row: &[u8], position: [u8; POSITION_BYTES]) -> Identity {
    let mut nonce = [0; NONCE_BYTES];
    let (folded, rest) = nonce.split_at_mut(NONCE_BYTES - POSITION_BYTES);
    for (at, byte) in row.iter().enumerate() {
        folded[at % (NONCE_BYTES - POSITION_BYTES)] ^= byte;
    }
    rest.copy_from_slice(&position);
    Identity::new(family, row, nonce)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use ring::rand::SystemRandom;
    use waypost_proto::id::DeviceId;

    use super::*;
    use crate::seal::Unopened;

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
                    let identity = of_pings("", &row(device, epoch, first_seq.into()));
                    assert!(seen.insert(*identity.nonce()));
                }
            }
        }
    }

    #[test]
    fn each_version_of_a_row_has_a_nonce_of_its_own() {
        let mut seen = HashSet::new();
        for position in (0..64).map(|bit| 1_u64 << bit) {
            for device in [0, 1, 2, 255, 256, u32::MAX] {
                let row = &row(device, 0, 0)[..20];
                let identity = of_row("", row, position.to_be_bytes());
                assert!(seen.insert(*identity.nonce()));
            }
        }
    }

    #[test]
    fn a_row_opens_under_its_own_key_and_family_only() {
        let key = DataKey::random(&SystemRandom::new()).unwrap();
        let (row, other) = (row(1, 2, 3), row(1, 2, 4));
        let (mut pings, mut rewritten) = (Vec::new(), Vec::new());
        seal_pings(&key, "family", &row, b"value", &mut pings);
        seal_row(&key, "family", &row, 9, b"value", &mut rewritten);
        for mut sealed in [pings, rewritten] {
            assert!(is_sealed(&sealed) && sealed.len() <= 5 + OVERHEAD_BYTES);
            let open = |family, row| open(Some(&key), family, row, &sealed);
            let opened = open("family", &row).unwrap();
            assert_eq!(opened.as_deref(), Ok(&b"value"[..]));
            let unopened = Some(Err(RecordError::Unopened(Unopened)));
            assert_eq!(open("family", &other), unopened);
            assert_eq!(open("another", &row), unopened);
            assert_eq!(super::open(None, "family", &row, &sealed), None);
            for at in 1..sealed.len() {
                sealed[at] ^= 1;
                let opened = super::open(Some(&key), "family", &row, &sealed);
                assert_eq!(opened, unopened, "byte {at}");
                sealed[at] ^= 1;
                let cut = super::open(Some(&key), "family", &row, &sealed[..at]);
                assert!(cut.unwrap().is_err(), "cut at {at}");
            }
        }
        let clear = b"\x01value";
        assert!(!is_sealed(clear));
        let opened = open(None, "family", &row, clear).unwrap();
        assert_eq!(opened.as_deref(), Ok(&clear[..]));
    }
}
