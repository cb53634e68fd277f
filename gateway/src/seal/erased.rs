//! The list of erased users, as the bytes of one file beside the keys.
//!
//! A store that is put back from a backup knows nothing of those who were erased after it was made. Their keys are
//! gone, but the store has them as devices that were heard, as paused, as expected. So who was erased is kept where
//! their keys were: no older copy of the store comes without the present keys.
//!
//! Knows the layout. Must not know files, or what follows from being on the list.
//!
//! # Layout
//!
//! A magic number, the incarnation of the store, for each user 16 bytes of id and 8 of when, and a check over all of it. The
//! file is always replaced as a whole, so that no crash leaves a part of it: whatever does not add up is damage.

use std::collections::BTreeMap;

use ring::digest::{SHA256, digest};
use waypost_proto::id::UserId;

const MAGIC: [u8; 8] = *b"wp-gone1";
const HEADER_BYTES: usize = MAGIC.len() + 16;
const ROW_BYTES: usize = 16 + 8;
const CHECK_BYTES: usize = 8;

/// Who was erased, and when, in milliseconds since 1970-01-01 UTC.
pub(super) type Erased = BTreeMap<UserId, u64>;

/// What is wrong with a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("it is not as it was written")]
    Damaged,
    #[error("it is of another store")]
    OtherStore,
}

/// The list as a file has it.
pub(super) fn encode(erased: &Erased, incarnation: &[u8; 16]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + erased.len() * ROW_BYTES + CHECK_BYTES);
    bytes.extend(MAGIC);
    bytes.extend(incarnation);
    for (user, erased_ms) in erased {
        bytes.extend(user.0);
        bytes.extend(erased_ms.to_be_bytes());
    }
    let check = check(&bytes);
    bytes.extend(check);
    bytes
}

/// Reads a list.
pub(super) fn decode(bytes: &[u8], incarnation: &[u8; 16]) -> Result<Erased, Fault> {
    let checked = bytes.len().checked_sub(CHECK_BYTES);
    let (checked, found) = bytes.split_at(checked.ok_or(Fault::Damaged)?);
    if found != check(checked) {
        return Err(Fault::Damaged);
    }
    let rows = checked.strip_prefix(&MAGIC).ok_or(Fault::Damaged)?;
    let (of, rows) = rows.split_at_checked(16).ok_or(Fault::Damaged)?;
    if of != incarnation {
        return Err(Fault::OtherStore);
    }
    let (rows, rest) = rows.as_chunks::<ROW_BYTES>();
    if !rest.is_empty() {
        return Err(Fault::Damaged);
    }
    let row = |row: &[u8; ROW_BYTES]| {
        let (mut user, mut erased_ms) = ([0; 16], [0; 8]);
        user.copy_from_slice(&row[..16]);
        erased_ms.copy_from_slice(&row[16..]);
        (UserId(user), u64::from_be_bytes(erased_ms))
    };
    Ok(rows.iter().map(row).collect())
}

fn check(bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&digest(&SHA256, bytes).as_ref()[..CHECK_BYTES]);
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    const INCARNATION: [u8; 16] = [9; 16];

    #[test]
    fn a_list_comes_back_and_no_damage_to_it_is_taken_for_a_list() {
        let lists = [
            Erased::new(),
            Erased::from([(UserId([1; 16]), 7)]),
            (0..20).map(|n| (UserId([n; 16]), n.into())).collect(),
        ];
        for list in lists {
            let bytes = encode(&list, &INCARNATION);
            assert_eq!(decode(&bytes, &INCARNATION), Ok(list));
            assert_eq!(decode(&bytes, &[8; 16]), Err(Fault::OtherStore));
            for at in 0..bytes.len() {
                let mut bad = bytes.clone();
                bad[at] ^= 1;
                assert_eq!(decode(&bad, &INCARNATION), Err(Fault::Damaged), "byte {at}");
                assert_eq!(decode(&bytes[..at], &INCARNATION), Err(Fault::Damaged));
            }
        }
    }
}
