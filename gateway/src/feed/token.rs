//! Resume tokens: opaque to checkers, and believed only if this store issued them.
//!
//! Knows what a token is bound to. Must not know streams.
//!
//! A token is `version | incarnation | position | scope | HMAC-SHA256 of all before`, 73 bytes. It holds
//! no time: it does not expire.

use bytes::{BufMut, Bytes, BytesMut};
use ring::{digest, hmac};
use waypost_proto::{
    id::UserId,
    v1::{State, reset::Reason},
};

const VERSION: u8 = 1;
const BODY_BYTES: usize = 1 + 16 + 8 + 16;
const TOKEN_BYTES: usize = BODY_BYTES + 32;

/// Whom a token was issued to, and for which selection: both in 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scope(pub(super) [u8; 16]);

/// Issues the tokens of one store and reads them back.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    incarnation: [u8; 16],
    key: hmac::Key,
}

impl Scope {
    /// The scope of a checker that watches these users, each list in ascending order without repetition;
    /// `None` for all.
    pub(super) fn new(checker: &str, users: Option<&[UserId]>, states: &[State]) -> Self {
        let mut digest = digest::Context::new(&digest::SHA256);
        // Lengths first, so that no two selections are the same bytes.
        digest.update(&(checker.len() as u64).to_be_bytes());
        digest.update(checker.as_bytes());
        digest.update(&[u8::from(users.is_some())]);
        let users = users.unwrap_or_default();
        digest.update(&(users.len() as u64).to_be_bytes());
        for user in users {
            digest.update(&user.0);
        }
        for state in states {
            digest.update(&(*state as i32).to_be_bytes());
        }
        let mut scope = [0; 16];
        scope.copy_from_slice(&digest.finish().as_ref()[..16]);
        Self(scope)
    }
}

impl Tokens {
    /// For the store with this incarnation, which keeps this key.
    pub(super) fn new(incarnation: [u8; 16], key: &[u8; 32]) -> Self {
        Self {
            incarnation,
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
        }
    }

    /// The store that speaks.
    pub(super) fn incarnation(&self) -> Bytes {
        Bytes::copy_from_slice(&self.incarnation)
    }

    /// A token to go on after `position`.
    pub(super) fn issue(&self, position: u64, scope: Scope) -> Bytes {
        let mut token = BytesMut::with_capacity(TOKEN_BYTES);
        token.put_u8(VERSION);
        token.put_slice(&self.incarnation);
        token.put_u64(position);
        token.put_slice(&scope.0);
        let tag = hmac::sign(&self.key, &token);
        token.put_slice(tag.as_ref());
        token.freeze()
    }

    /// The position to go on after.
    ///
    /// # Errors
    /// Why the stream must begin again. `head` is the newest position of the store: a token from beyond
    /// it was issued before the store lost its end, so it is of another store in all but name.
    pub(super) fn read(&self, token: &[u8], scope: Scope, head: u64) -> Result<u64, Reason> {
        if token.len() != TOKEN_BYTES || token[0] != VERSION {
            return Err(Reason::BadToken);
        }
        // Before the tag: another store has another key.
        if token[1..17] != self.incarnation {
            return Err(Reason::OtherStore);
        }
        let (body, tag) = token.split_at(BODY_BYTES);
        hmac::verify(&self.key, body, tag).map_err(|_| Reason::BadToken)?;
        if body[25..] != scope.0 {
            return Err(Reason::OtherSelector);
        }
        let mut position = [0; 8];
        position.copy_from_slice(&body[17..25]);
        let position = u64::from_be_bytes(position);
        if head < position {
            Err(Reason::OtherStore)
        } else {
            Ok(position)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: [UserId; 2] = [UserId([1; 16]), UserId([2; 16])];

    fn scope() -> Scope {
        Scope::new("ops", Some(&USERS), &[])
    }

    fn tokens() -> Tokens {
        Tokens::new([7; 16], &[8; 32])
    }

    #[test]
    fn a_token_leads_back_to_its_position() {
        let token = tokens().issue(42, scope());
        assert_eq!(tokens().read(&token, scope(), 42), Ok(42));
    }

    #[test]
    fn no_byte_of_a_token_can_be_changed() {
        let token = tokens().issue(42, scope());
        for at in 0..token.len() {
            for bit in 0..8 {
                let mut forged = token.to_vec();
                forged[at] ^= 1 << bit;
                let reason = tokens().read(&forged, scope(), u64::MAX).unwrap_err();
                let expected = if (1..17).contains(&at) {
                    Reason::OtherStore
                } else {
                    Reason::BadToken
                };
                assert_eq!(reason, expected, "byte {at}");
            }
        }
        for length in 0..token.len() {
            assert_eq!(
                tokens().read(&token[..length], scope(), 42),
                Err(Reason::BadToken)
            );
        }
    }

    #[test]
    fn a_token_is_good_for_its_store_checker_and_selection_only() {
        let token = tokens().issue(42, scope());
        let other_store = Tokens::new([9; 16], &[8; 32]);
        assert_eq!(
            other_store.read(&token, scope(), 42),
            Err(Reason::OtherStore)
        );
        let other_key = Tokens::new([7; 16], &[9; 32]);
        assert_eq!(other_key.read(&token, scope(), 42), Err(Reason::BadToken));
        for other in [
            Scope::new("op", Some(&USERS), &[]),
            Scope::new("ops", Some(&USERS[..1]), &[]),
            Scope::new("ops", Some(&[]), &[]),
            Scope::new("ops", None, &[]),
            Scope::new("ops", Some(&USERS), &[State::Active]),
        ] {
            assert_eq!(tokens().read(&token, other, 42), Err(Reason::OtherSelector));
        }
    }

    #[test]
    fn a_token_from_beyond_the_head_is_of_a_store_that_was_set_back() {
        let token = tokens().issue(42, scope());
        assert_eq!(tokens().read(&token, scope(), 41), Err(Reason::OtherStore));
    }
}
