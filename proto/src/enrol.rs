//! What enrolment agrees on: how a code is written and read, and when a certificate is due for the next.
//!
//! Knows texts and arithmetic. Must not know certificates, keys or who is invited, nor where random numbers come
//! from.

use std::fmt;

/// The protocol's name in the TLS handshake of enrolment.
pub const ENROLL_ALPN: &[u8] = b"waypost-enroll/1";

/// The longest frame of enrolment, its prefix not counted.
pub const ENROLL_FRAME_BYTES: usize = 8_192;

/// What an invitation is redeemed with: 80 random bits, written as 16 characters that people can type.
///
/// Whoever tried a billion of them a second would need a million years for half of all, so it is not guessed; and it
/// is kept as a hash only, so it is not read out of a store or a backup either.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code([u8; Self::BYTES]);

/// A text that cannot be a code, whatever was issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a code is 16 letters and digits, such as 7K3M-XW9T-0VQF-HN2C")]
pub struct NotACode;

/// Crockford's base 32: no I, L, O, which look like digits, and no U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const BITS_PER_CHARACTER: usize = 5;
const CHARACTERS: usize = Code::BYTES * 8 / BITS_PER_CHARACTER;
const GROUP: usize = 4;

impl Code {
    /// How many random bytes it is.
    pub const BYTES: usize = 10;

    /// A code of random bytes.
    #[must_use]
    pub fn new(random: [u8; Self::BYTES]) -> Self {
        Self(random)
    }

    /// Its bytes. A secret.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Reads a code as people type it: in either case, with O for 0, and I and L for 1, hyphens and spaces anywhere.
    ///
    /// # Errors
    /// When it is no code.
    pub fn parse(text: &str) -> Result<Self, NotACode> {
        let mut bits: u128 = 0;
        let mut characters = 0;
        for character in text.bytes().filter(|byte| !matches!(byte, b'-' | b' ')) {
            let character = match character.to_ascii_uppercase() {
                b'O' => b'0',
                b'I' | b'L' => b'1',
                other => other,
            };
            let value = (0_u8..)
                .zip(ALPHABET)
                .find_map(|(value, &known)| (known == character).then_some(value))
                .filter(|_| characters < CHARACTERS)
                .ok_or(NotACode)?;
            bits = bits << BITS_PER_CHARACTER | u128::from(value);
            characters += 1;
        }
        if characters != CHARACTERS {
            return Err(NotACode);
        }
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice(&bits.to_be_bytes()[size_of::<u128>() - Self::BYTES..]);
        Ok(Self(bytes))
    }
}

/// In groups of four.
impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self
            .0
            .iter()
            .fold(0_u128, |bits, &byte| bits << 8 | u128::from(byte));
        for at in 0..CHARACTERS {
            if at != 0 && at % GROUP == 0 {
                f.write_str("-")?;
            }
            let value = bits >> (BITS_PER_CHARACTER * (CHARACTERS - 1 - at)) & 0x1f;
            let character = usize::try_from(value).map(|value| ALPHABET[value]);
            write!(f, "{}", char::from(character.expect("five bits fit")))?;
        }
        Ok(())
    }
}

/// Says that it is one and not which: it is a secret.
impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code(..)")
    }
}

/// When a certificate is to be renewed: at two thirds of its life, so that a third is left for a network that is away.
/// Both are milliseconds since 1970-01-01 UTC, as is the result.
#[must_use]
pub fn renew_at_ms(issued_ms: u64, expires_ms: u64) -> u64 {
    let life_ms = expires_ms.saturating_sub(issued_ms);
    issued_ms + (life_ms - life_ms / 3)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_code_is_read_as_it_was_written_however_it_is_typed(
            random in any::<[u8; Code::BYTES]>(),
            cuts in prop::collection::vec((0..30_usize, prop_oneof![Just('-'), Just(' ')]), 0..6),
            is_lower in any::<bool>(),
        ) {
            let code = Code::new(random);
            let mut text = code.to_string();
            prop_assert_eq!(text.len(), 19);
            if is_lower {
                text = text.to_lowercase().replace('0', "o").replace('1', "l");
            }
            for (at, separator) in cuts {
                text.insert(at.min(text.len()), separator);
            }
            prop_assert_eq!(Code::parse(&text), Ok(code));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _either = Code::parse(&text);
        }

        #[test]
        fn a_renewal_is_due_within_the_life_and_after_two_thirds_of_it(
            issued_ms in 0..u64::MAX / 2,
            life_ms in 0..u64::MAX / 4,
        ) {
            let due_ms = renew_at_ms(issued_ms, issued_ms + life_ms);
            prop_assert!(due_ms <= issued_ms + life_ms);
            prop_assert!(u128::from(due_ms - issued_ms) * 3 >= u128::from(life_ms) * 2);
        }
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for text in [
            "",
            "7K3M-XW9T-0VQF-HN2",
            "7K3M-XW9T-0VQF-HN2C-0",
            "7K3M-XW9T-0VQF-HN2U",
            "7K3M_XW9T_0VQF_HN2C",
            "\u{ff17}K3M-XW9T-0VQF-HN2C",
        ] {
            assert_eq!(Code::parse(text), Err(NotACode), "{text}");
        }
    }

    #[test]
    fn a_code_does_not_show_in_debug_output() {
        let code = Code::new([0xab; Code::BYTES]);
        assert_eq!(format!("{code:?}"), "Code(..)");
    }
}
