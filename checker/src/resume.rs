//! Where a watch goes on: what a consumer stores beside its own effects.
//!
//! Knows the form of its bytes. Must not know what a token says; only the gateway that issued it does.

use bytes::{BufMut as _, Bytes};

/// A place in the stream up to which everything was given out. It does not expire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    position: u64,
    token: Bytes,
}

/// Bytes that are no [`Resume`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("these bytes are not where a watch went on: begin without them")]
pub struct BadResume;

/// The first byte, should another form be needed one day.
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 1 + 8;

impl Resume {
    pub(crate) fn new(position: u64, token: Bytes) -> Self {
        Self { position, token }
    }

    /// The commit up to which everything was given out.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn token(&self) -> Bytes {
        self.token.clone()
    }

    /// For a file or a column: some 80 bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.token.len());
        bytes.put_u8(VERSION);
        bytes.put_u64(self.position);
        bytes.put_slice(&self.token);
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// When it did not write this.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadResume> {
        let (head, token) = bytes.split_at_checked(HEAD_BYTES).ok_or(BadResume)?;
        let (version, position) = head.split_first().ok_or(BadResume)?;
        if *version != VERSION || token.is_empty() {
            return Err(BadResume);
        }
        let position = position.try_into().map_err(|_| BadResume)?;
        Ok(Self::new(
            u64::from_be_bytes(position),
            Bytes::copy_from_slice(token),
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_are_read_back(position: u64, token in prop::collection::vec(any::<u8>(), 1..100)) {
            let resume = Resume::new(position, token.into());
            prop_assert_eq!(Resume::from_bytes(&resume.to_bytes()), Ok(resume));
        }

        #[test]
        fn other_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(resume) = Resume::from_bytes(&bytes) {
                prop_assert_eq!(resume.to_bytes(), bytes);
            }
        }
    }
}
