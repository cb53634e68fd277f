//! Sealing: a user's values are written with a key of the user's own, and without it they cannot be read.
//!
//! Knows the cipher, and keys while they are in memory. Must not know files, where a master key comes from, or
//! what is sealed. Its parts: the [`master`] key wraps the data keys, a `segment` is a file of wrapped keys, the
//! [`key_store`] keeps those files and beside them the list of the `erased`, [`copy`] makes a copy of all of them, and
//! [`command`] is `waypost keys`.
//!
//! # The cipher
//!
//! AES-256-GCM-SIV (RFC 8452). A nonce is derived from what the value belongs to, so none is stored. Should one
//! ever come twice, then GCM-SIV still gives nothing away but whether the two values are the same. The crate
//! `aes-gcm-siv` has not been audited; those that it is made of, `aes` and `polyval`, have been, in earlier versions.
//! Keys, and what is derived of them, are wiped when they are dropped.

pub mod command;
pub mod copy;
mod erased;
pub mod key_store;
pub mod master;
mod segment;

use std::fmt;

use aes_gcm_siv::{
    Aes256GcmSiv, KeyInit,
    aead::{AeadInOut, inout::InOutBuf},
};
use ring::{
    digest::{SHA256, digest},
    rand::SecureRandom,
};
use zeroize::Zeroize;

/// How long a key is.
pub const KEY_BYTES: usize = 32;
/// By how much a sealed value is longer.
pub const TAG_BYTES: usize = 16;
/// How long a nonce is.
pub const NONCE_BYTES: usize = 12;

/// A key, wiped when it is dropped. In a box, so that moving it leaves no copy behind.
struct Key(Box<[u8; KEY_BYTES]>);

/// A user's own key.
pub struct DataKey(Key);

/// The key that wraps all data keys of a store.
pub struct MasterKey {
    key: Key,
    id: MasterId,
}

/// Names a master key and gives nothing of it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MasterId(pub [u8; 8]);

/// What a sealed value belongs to. It opens as nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    nonce: [u8; NONCE_BYTES],
    associated: [u8; ASSOCIATED_BYTES],
    associated_bytes: usize,
}

/// A value does not open: it is damaged, belongs elsewhere, or was sealed with another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it does not open with this key: it is damaged, or belongs elsewhere")]
pub struct Unopened;

/// The system gave no random numbers for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random numbers")]
pub struct NoRandomness;

/// A row's key and its family's name.
const ASSOCIATED_BYTES: usize = 64;
/// What the digest that names a master key begins with, so that it is the digest of nothing else.
const MASTER_ID_OF: &[u8] = b"waypost master key id\0";

impl Key {
    fn random(random: &dyn SecureRandom) -> Result<Self, NoRandomness> {
        let mut key = Self(Box::new([0; KEY_BYTES]));
        random
            .fill(&mut key.0[..])
            .map_err(|_| NoRandomness)
            .map(|()| key)
    }

    /// Writes the sealed form of a value to the end of `sealed`.
    fn seal(&self, identity: &Identity, value: &[u8], sealed: &mut Vec<u8>) {
        let begin = sealed.len();
        sealed.reserve(value.len() + TAG_BYTES);
        sealed.extend_from_slice(value);
        let tag = Aes256GcmSiv::new((&*self.0).into())
            .encrypt_inout_detached(
                (&identity.nonce).into(),
                identity.associated(),
                InOutBuf::from(&mut sealed[begin..]),
            )
            .expect("shorter than 64 GiB");
        sealed.extend_from_slice(&tag);
    }

    fn open(&self, identity: &Identity, sealed: &[u8]) -> Result<Vec<u8>, Unopened> {
        let (value, tag) = sealed.split_last_chunk::<TAG_BYTES>().ok_or(Unopened)?;
        let mut value = value.to_vec();
        Aes256GcmSiv::new((&*self.0).into())
            .decrypt_inout_detached(
                (&identity.nonce).into(),
                identity.associated(),
                InOutBuf::from(&mut value[..]),
                tag.into(),
            )
            .map_err(|_| Unopened)?;
        Ok(value)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl DataKey {
    /// A new key.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn random(random: &dyn SecureRandom) -> Result<Self, NoRandomness> {
        Key::random(random).map(Self)
    }

    /// Writes the sealed form of a value to the end of `sealed`: as long as the value, and [`TAG_BYTES`].
    pub fn seal(&self, identity: &Identity, value: &[u8], sealed: &mut Vec<u8>) {
        self.0.seal(identity, value, sealed);
    }

    /// The value again.
    ///
    /// # Errors
    /// When it was not sealed with this key, as this identity, or not exactly like this.
    pub fn open(&self, identity: &Identity, sealed: &[u8]) -> Result<Vec<u8>, Unopened> {
        self.0.open(identity, sealed)
    }
}

impl MasterKey {
    /// A new key.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn random(random: &dyn SecureRandom) -> Result<Self, NoRandomness> {
        Key::random(random).map(Self::of)
    }

    fn of(key: Key) -> Self {
        let mut named = [0; MASTER_ID_OF.len() + KEY_BYTES];
        named[..MASTER_ID_OF.len()].copy_from_slice(MASTER_ID_OF);
        named[MASTER_ID_OF.len()..].copy_from_slice(&key.0[..]);
        let mut id = MasterId([0; 8]);
        id.0.copy_from_slice(&digest(&SHA256, &named).as_ref()[..8]);
        named.zeroize();
        Self { key, id }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> MasterId {
        self.id
    }

    /// The key's bytes, for whoever writes them down.
    fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.key.0
    }

    /// Wraps a data key: as many bytes, and [`TAG_BYTES`].
    fn wrap(&self, identity: &Identity, key: &DataKey, wrapped: &mut Vec<u8>) {
        self.key.seal(identity, &key.0.0[..], wrapped);
    }

    fn unwrap(&self, identity: &Identity, wrapped: &[u8]) -> Result<DataKey, Unopened> {
        let mut bytes = self.key.open(identity, wrapped)?;
        let mut key = Key(Box::new([0; KEY_BYTES]));
        let is_key = bytes.len() == KEY_BYTES;
        if is_key {
            key.0.copy_from_slice(&bytes);
        }
        bytes.zeroize();
        is_key.then_some(DataKey(key)).ok_or(Unopened)
    }
}

impl Identity {
    /// What a value under a key in a family of rows is. Nonces should differ for what one data key seals.
    ///
    /// # Panics
    /// When the key and the name together are longer than any that there is, 64 bytes.
    #[must_use]
    pub fn new(family: &str, key: &[u8], nonce: [u8; NONCE_BYTES]) -> Self {
        let mut associated = [0; ASSOCIATED_BYTES];
        let associated_bytes = key.len() + family.len();
        // Keys of a family that are sealed are all of one length, so no two pairs look the same.
        associated[..key.len()].copy_from_slice(key);
        associated[key.len()..associated_bytes].copy_from_slice(family.as_bytes());
        Self {
            nonce,
            associated,
            associated_bytes,
        }
    }

    /// Its nonce.
    #[must_use]
    pub fn nonce(&self) -> &[u8; NONCE_BYTES] {
        &self.nonce
    }

    fn associated(&self) -> &[u8] {
        &self.associated[..self.associated_bytes]
    }
}

impl fmt::Debug for DataKey {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey")
    }
}

impl fmt::Debug for MasterKey {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MasterKey").field(&self.id).finish()
    }
}

impl fmt::Display for MasterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ring::rand::SystemRandom;

    use super::*;

    fn key() -> DataKey {
        DataKey::random(&SystemRandom::new()).unwrap()
    }

    fn sealed(key: &DataKey, identity: &Identity, value: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::new();
        key.seal(identity, value, &mut sealed);
        sealed
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_again_and_is_not_to_be_seen(
            value in prop::collection::vec(any::<u8>(), 16..300), row in any::<[u8; 32]>(), nonce: [u8; 12]
        ) {
            let (key, identity) = (key(), Identity::new("family", &row, nonce));
            let sealed = sealed(&key, &identity, &value);
            prop_assert_eq!(sealed.len(), value.len() + TAG_BYTES);
            prop_assert!(!sealed.windows(16).any(|window| value.windows(16).any(|plain| plain == window)));
            prop_assert_eq!(key.open(&identity, &sealed), Ok(value));
        }
    }

    #[test]
    fn a_value_that_was_changed_in_one_bit_or_cut_does_not_open() {
        let (key, identity) = (key(), Identity::new("family", &[7; 32], [3; 12]));
        let sealed = sealed(&key, &identity, b"the position of somebody");
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut changed = sealed.clone();
                changed[at] ^= 1 << bit;
                assert_eq!(key.open(&identity, &changed), Err(Unopened), "byte {at}");
            }
            assert_eq!(key.open(&identity, &sealed[..at]), Err(Unopened));
        }
        assert!(key.open(&identity, &sealed).is_ok());
    }

    #[test]
    fn a_value_opens_in_its_own_place_only_and_with_its_own_key_only() {
        let (own, row, nonce) = (key(), [7; 32], [3; 12]);
        let sealed = sealed(&own, &Identity::new("family", &row, nonce), b"value");
        let mut other_row = row;
        other_row[31] = 8;
        for elsewhere in [
            Identity::new("familz", &row, nonce),
            Identity::new("family", &other_row, nonce),
            Identity::new("family", &row, [4; 12]),
        ] {
            assert_eq!(own.open(&elsewhere, &sealed), Err(Unopened));
        }
        let here = Identity::new("family", &row, nonce);
        assert_eq!(key().open(&here, &sealed), Err(Unopened));
        assert!(own.open(&here, &sealed).is_ok());
    }

    #[test]
    fn the_cipher_is_that_of_rfc_8452() {
        // Its appendix C.2, the first test with 8 bytes of plaintext.
        let mut bytes = Box::new([0; KEY_BYTES]);
        bytes[0] = 1;
        let mut nonce = [0; NONCE_BYTES];
        nonce[0] = 3;
        let key = DataKey(Key(bytes));
        let sealed = sealed(
            &key,
            &Identity::new("", &[], nonce),
            &[1, 0, 0, 0, 0, 0, 0, 0],
        );
        let expected = [
            0xc2, 0xef, 0x32, 0x8e, 0x5c, 0x71, 0xc8, 0x3b, 0x84, 0x31, 0x22, 0x13, 0x0f, 0x73,
            0x64, 0xb7, 0x61, 0xe0, 0xb9, 0x74, 0x27, 0xe3, 0xdf, 0x28,
        ];
        assert_eq!(sealed, expected);
    }

    #[test]
    fn a_wrapped_key_is_unwrapped_by_its_master_key_only() {
        let random = SystemRandom::new();
        let (master, other) = (
            MasterKey::random(&random).unwrap(),
            MasterKey::random(&random).unwrap(),
        );
        assert_ne!(master.id(), other.id());
        let (key, identity) = (key(), Identity::new("keys", &[1; 16], [0; 12]));
        let mut wrapped = Vec::new();
        master.wrap(&identity, &key, &mut wrapped);
        assert_eq!(wrapped.len(), KEY_BYTES + TAG_BYTES);
        assert!(!wrapped.windows(8).any(|window| window == &key.0.0[..8]));
        assert_eq!(other.unwrap(&identity, &wrapped).err(), Some(Unopened));
        let unwrapped = master.unwrap(&identity, &wrapped).unwrap();
        assert_eq!(unwrapped.0.0, key.0.0);
    }

    #[test]
    fn nobody_prints_a_key() {
        let master = MasterKey::of(Key(Box::new([0xab; KEY_BYTES])));
        for said in [
            format!("{master:?}"),
            master.id().to_string(),
            format!("{:?}", key()),
        ] {
            assert!(
                !said.contains("abab") && !said.contains("171, 171"),
                "{said}"
            );
        }
    }
}
