//! A segment: some of a store's data keys, wrapped, as the bytes of one file.
//!
//! Knows the layout, and which damage can be the work of a crash. Must not know files, or who uses the keys.
//!
//! # Layout
//!
//! A header, then a slot for each key. The header says of which store and which master key the segment is, how many
//! keys of the store had been made when it was written, and how many slots it was written with: what follows those was
//! appended later. A slot: the slot that its append began with, the user, the wrapped key.
//!
//! # After a crash
//!
//! An append is synced before the next one begins and before any of its keys is used. So only the last append can be
//! there in part, in any part, and nothing is lost by cutting it off. A slot that does not open although one that was
//! appended later does is damage of another kind.

use waypost_proto::id::UserId;

use ring::digest::{SHA256, digest};

use super::{DataKey, Identity, KEY_BYTES, MasterId, MasterKey, NONCE_BYTES, TAG_BYTES};

/// How many slots a segment may have: a new one costs two more syncs, and to destroy a key is to write all the others
/// of its segment again, some 280 KB.
pub(super) const MOST_SLOTS: usize = 4_096;

const MAGIC: [u8; 8] = *b"wp-keys1";
const CHECK_BYTES: usize = 8;
const CHECKED_BYTES: usize = MAGIC.len() + 16 + 8 + 8 + 4;
pub(super) const HEADER_BYTES: usize = CHECKED_BYTES + CHECK_BYTES;
pub(super) const SLOT_BYTES: usize = 4 + 16 + KEY_BYTES + TAG_BYTES;
const USER_AT: usize = 4;
const WRAPPED_AT: usize = 4 + 16;

// The layout on disk: a change here makes every key unreadable, so it must not go unnoticed.
const _: () = assert!(HEADER_BYTES == 52);
const _: () = assert!(SLOT_BYTES == 68);

/// What a segment begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Of which store it is.
    pub(super) incarnation: [u8; 16],
    /// Which master key wraps its keys.
    pub(super) master: MasterId,
    /// How many keys had been made for the store when it was written, destroyed ones included.
    pub(super) made: u64,
    /// With how many slots it was written.
    pub(super) slots: u32,
}

/// What a segment holds.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) header: Header,
    pub(super) keys: Vec<(UserId, DataKey)>,
}

/// Whether the end of a segment can be there in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It is the newest, which is appended to.
    MayBeTorn,
    /// A newer one has been begun.
    Whole,
}

/// What is wrong with a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("it does not begin as a file of keys does")]
    Header,
    #[error("key {0} of it is damaged")]
    Slot(usize),
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.incarnation);
        bytes.extend(self.master.0);
        bytes.extend(self.made.to_be_bytes());
        bytes.extend(self.slots.to_be_bytes());
        let check = check(&bytes);
        bytes.extend(check);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let (checked, rest) = bytes.split_at_checked(CHECKED_BYTES).ok_or(Fault::Header)?;
        let rest = rest.strip_prefix(&check(checked)).ok_or(Fault::Header);
        let fields = checked.strip_prefix(&MAGIC).ok_or(Fault::Header)?;
        let take = |at: usize, bytes: usize| &fields[at..at + bytes];
        let fixed = |_| Fault::Header;
        let header = Self {
            incarnation: take(0, 16).try_into().map_err(fixed)?,
            master: MasterId(take(16, 8).try_into().map_err(fixed)?),
            made: u64::from_be_bytes(take(24, 8).try_into().map_err(fixed)?),
            slots: u32::from_be_bytes(take(32, 4).try_into().map_err(fixed)?),
        };
        rest.map(|_| header)
    }

    /// How many keys had been made for the store when the segment had this many slots.
    pub(super) fn made_with(&self, slots: usize) -> u64 {
        self.made + (slots as u64).saturating_sub(self.slots.into())
    }
}

impl Segment {
    /// Reads a segment, with its own master key. An append that is there in part is left out.
    pub(super) fn read(bytes: &[u8], master: &MasterKey, end: End) -> Result<Self, Fault> {
        let header = Header::decode(bytes)?;
        let slots = &bytes[HEADER_BYTES..];
        let opened: Vec<_> = slots
            .chunks(SLOT_BYTES)
            .map(|slot| open_slot(slot, master, &header.incarnation))
            .collect();
        let written = header.slots as usize;
        let whole = match opened.iter().position(Option::is_none) {
            None => opened.len(),
            Some(bad) => {
                // Only those behind it were appended; what a slot that was written anew says of that is out of date.
                let later = opened[bad..].iter().flatten();
                let is_older = later.map(|slot| slot.append_began).any(|began| bad < began);
                if end == End::Whole || bad < written || is_older {
                    return Err(Fault::Slot(bad));
                }
                bad
            }
        };
        if whole < written {
            return Err(Fault::Slot(whole));
        }
        let keys = opened.into_iter().take(whole).flatten();
        Ok(Self {
            header,
            keys: keys.map(|slot| (slot.user, slot.key)).collect(),
        })
    }

    /// The same segment, written anew, with the keys wrapped by another master key.
    pub(super) fn wrapped_by(&self, master: &MasterKey) -> Vec<u8> {
        let header = Header {
            master: master.id(),
            made: self.header.made_with(self.keys.len()),
            slots: u32::try_from(self.keys.len()).unwrap_or(u32::MAX),
            ..self.header
        };
        let mut bytes = header.encode();
        for (user, key) in &self.keys {
            put_slot(0, user, key, master, &header.incarnation, &mut bytes);
        }
        bytes
    }
}

/// Writes the slot of a key to the end of `bytes`; `append_began` is the slot that is the first of its append.
pub(super) fn put_slot(
    append_began: usize,
    user: &UserId,
    key: &DataKey,
    master: &MasterKey,
    incarnation: &[u8; 16],
    bytes: &mut Vec<u8>,
) {
    let began = u32::try_from(append_began)
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    bytes.extend(began);
    bytes.extend(user.0);
    master.wrap(&identity(began, user, incarnation), key, bytes);
}

/// The segment without the keys of a user, and how many are left; none if it has no such key. What is there must be
/// whole.
pub(super) fn without(bytes: &[u8], user: &UserId) -> Result<Option<(Vec<u8>, usize)>, Fault> {
    let header = Header::decode(bytes)?;
    let (slots, []) = bytes[HEADER_BYTES..].as_chunks::<SLOT_BYTES>() else {
        return Err(Fault::Slot((bytes.len() - HEADER_BYTES) / SLOT_BYTES));
    };
    let is_others = |slot: &&[u8; SLOT_BYTES]| slot[USER_AT..WRAPPED_AT] != user.0;
    let left: Vec<_> = slots.iter().filter(is_others).collect();
    if left.len() == slots.len() {
        return Ok(None);
    }
    let header = Header {
        made: header.made_with(slots.len()),
        slots: u32::try_from(left.len()).unwrap_or(u32::MAX),
        ..header
    };
    let mut bytes = header.encode();
    left.iter().for_each(|slot| bytes.extend_from_slice(*slot));
    Ok(Some((bytes, left.len())))
}

struct Slot {
    append_began: usize,
    user: UserId,
    key: DataKey,
}

fn open_slot(slot: &[u8], master: &MasterKey, incarnation: &[u8; 16]) -> Option<Slot> {
    let (began, rest) = slot.split_first_chunk::<4>()?;
    let (user, wrapped) = rest.split_first_chunk::<16>()?;
    let user = UserId(*user);
    let key = master
        .unwrap(&identity(*began, &user, incarnation), wrapped)
        .ok()?;
    Some(Slot {
        append_began: u32::from_be_bytes(*began) as usize,
        user,
        key,
    })
}

/// A slot cannot be moved to another user, another append or another store.
fn identity(began: [u8; 4], user: &UserId, incarnation: &[u8; 16]) -> Identity {
    let mut key = [0; 16 + 4 + 16];
    key[..16].copy_from_slice(incarnation);
    key[16..20].copy_from_slice(&began);
    key[20..].copy_from_slice(&user.0);
    let mut nonce = [0; NONCE_BYTES];
    nonce.copy_from_slice(&user.0[16 - NONCE_BYTES..]);
    Identity::new("data key", &key, nonce)
}

fn check(bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&digest(&SHA256, bytes).as_ref()[..CHECK_BYTES]);
    check
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;

    const INCARNATION: [u8; 16] = [9; 16];

    fn user(n: u8) -> UserId {
        UserId([n; 16])
    }

    fn master() -> MasterKey {
        MasterKey::random(&SystemRandom::new()).unwrap()
    }

    /// A segment after these appends, each of so many keys, users numbered from 0.
    fn segment(master: &MasterKey, appends: &[u8]) -> Vec<u8> {
        let header = Header {
            incarnation: INCARNATION,
            master: master.id(),
            made: 0,
            slots: 0,
        };
        let mut bytes = header.encode();
        let mut next = 0;
        for keys in appends {
            let began = usize::from(next);
            for n in next..next + keys {
                let key = DataKey::random(&SystemRandom::new()).unwrap();
                put_slot(began, &user(n), &key, master, &INCARNATION, &mut bytes);
            }
            next += keys;
        }
        bytes
    }

    fn users(segment: &Segment) -> Vec<UserId> {
        segment.keys.iter().map(|(user, _)| *user).collect()
    }

    fn first(n: u8) -> Vec<UserId> {
        (0..n).map(user).collect()
    }

    #[test]
    fn a_segment_that_is_cut_at_any_byte_keeps_every_key_before() {
        let master = master();
        let bytes = segment(&master, &[1, 3, 2]);
        for length in HEADER_BYTES..=bytes.len() {
            let read = Segment::read(&bytes[..length], &master, End::MayBeTorn).unwrap();
            let whole = (length - HEADER_BYTES) / SLOT_BYTES;
            assert_eq!(users(&read), first(u8::try_from(whole).unwrap()));
        }
        for length in 0..HEADER_BYTES {
            let read = Segment::read(&bytes[..length], &master, End::MayBeTorn);
            assert_eq!(read.err(), Some(Fault::Header));
        }
    }

    #[test]
    fn the_last_append_may_be_there_in_any_part_and_the_others_may_not() {
        let master = master();
        let whole = segment(&master, &[1, 3, 4]);
        for slot in 0..8 {
            for byte in [0, USER_AT, WRAPPED_AT, SLOT_BYTES - 1] {
                let mut bytes = whole.clone();
                bytes[HEADER_BYTES + slot * SLOT_BYTES + byte] ^= 0x80;
                let read = Segment::read(&bytes, &master, End::MayBeTorn);
                if slot < 4 {
                    assert_eq!(read.err(), Some(Fault::Slot(slot)), "was synced");
                } else {
                    assert_eq!(users(&read.unwrap()), first(u8::try_from(slot).unwrap()));
                }
                let read = Segment::read(&bytes, &master, End::Whole);
                assert_eq!(read.err(), Some(Fault::Slot(slot)));
            }
        }
        // What was not synced reads as zeros, all of it.
        let mut bytes = whole;
        bytes[HEADER_BYTES + 4 * SLOT_BYTES..].fill(0);
        let read = Segment::read(&bytes, &master, End::MayBeTorn).unwrap();
        assert_eq!(users(&read), first(4));
    }

    #[test]
    fn no_byte_of_a_header_may_change() {
        let master = master();
        let bytes = segment(&master, &[1]);
        for at in 0..HEADER_BYTES {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(Header::decode(&changed), Err(Fault::Header), "byte {at}");
        }
    }

    #[test]
    fn a_segment_without_a_user_has_all_others_and_counts_what_was_made() {
        let master = master();
        let whole = segment(&master, &[2, 3]);
        let (bytes, left) = without(&whole, &user(4)).unwrap().unwrap();
        assert_eq!(left, 4);
        assert!(!bytes.windows(16).any(|window| window == user(4).0));
        assert_eq!(without(&bytes, &user(4)).unwrap(), None);
        let read = Segment::read(&bytes, &master, End::MayBeTorn).unwrap();
        assert_eq!(users(&read), first(4));
        assert_eq!(read.header.made_with(4), 5);
        // What was written anew was synced, all of it.
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        let read = Segment::read(&damaged, &master, End::MayBeTorn);
        assert_eq!(read.err(), Some(Fault::Slot(3)));
        let cut = &bytes[..bytes.len() - SLOT_BYTES];
        let read = Segment::read(cut, &master, End::MayBeTorn);
        assert_eq!(read.err(), Some(Fault::Slot(3)));
        // What is appended to it later may be torn again.
        let mut longer = bytes;
        longer.extend([0; SLOT_BYTES]);
        let read = Segment::read(&longer, &master, End::MayBeTorn).unwrap();
        assert_eq!(users(&read), first(4));
    }

    #[test]
    fn what_is_appended_after_many_were_destroyed_may_be_torn_too() {
        let master = master();
        let mut bytes = segment(&master, &[1, 1, 1, 1, 1, 2]);
        for gone in 0..5 {
            (bytes, _) = without(&bytes, &user(gone)).unwrap().unwrap();
        }
        bytes.extend([0; SLOT_BYTES]);
        let read = Segment::read(&bytes, &master, End::MayBeTorn).unwrap();
        assert_eq!(users(&read), [user(5), user(6)]);
        assert_eq!(read.header.made_with(2), 7);
    }

    #[test]
    fn a_segment_is_wrapped_anew_with_the_same_keys() {
        let (old, new) = (master(), master());
        let bytes = segment(&old, &[2, 1]);
        let read = Segment::read(&bytes, &old, End::Whole).unwrap();
        let again = read.wrapped_by(&new);
        assert!(Segment::read(&again, &old, End::Whole).is_err());
        let again = Segment::read(&again, &new, End::Whole).unwrap();
        assert_eq!(again.header.master, new.id());
        assert_eq!(again.header.made_with(3), 3);
        for ((user, key), (user_again, key_again)) in read.keys.iter().zip(&again.keys) {
            assert_eq!((user, &key.0.0), (user_again, &key_again.0.0));
        }
    }
}
