//! How the lines of the audit log hold together: each begins with a hash of the one before it and of itself.
//!
//! Plain data. Knows deeds and lines; must not know files or the time.
//!
//! A line is `HASH JSON`, where HASH is the SHA-256, in hexadecimal digits, of the HASH of the line before it (64 zeros
//! before the first), a space, and the JSON. Whoever changes, removes or inserts a line has to write all later ones
//! anew; that they did is known to everybody who has noted any later HASH. The gateway says each in its own log.

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use waypost_proto::id::UserId;

use crate::{hex::hex, revocation::Subject};

/// Users that a deed names. Of more it has the number and a digest.
pub const MOST_NAMED: usize = 100;

/// Something that was done to somebody's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deed {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// Who did it.
    pub who: Who,
    /// What was done.
    pub what: What,
    /// To whose data.
    pub whose: Whose,
}

/// Who did something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// The gateway by itself.
    Gateway,
    /// Whoever can give commands to the gateway.
    Operator,
    /// The checker of this name.
    Checker(String),
    /// The holder, with this device.
    Holder(String),
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// The gateway began to serve.
    Started,
    /// A checker began to be told how fresh users are.
    WatchStarted,
    /// A code was made that lets a device in.
    Invited,
    /// A device was let in by its code.
    Enrolled,
    /// The checker of this name may be told of signs of life: the holder has agreed to it.
    Granted(String),
    /// It may not any more.
    Withdrawn(String),
    /// Everything that is held was given to the holder.
    Exported,
    /// Everything that was held was erased, or is from then on.
    Erased,
    /// A device, or all of them, is not served any more.
    Revoked,
    /// One that was revoked is served again.
    RevocationLifted,
    /// The store was put back from a backup.
    Restored,
}

/// Whose data something was done to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// Nobody's.
    Nobody,
    /// That of all users.
    Everybody,
    /// That of these users.
    Users(Vec<String>),
    /// What concerns one device of a user.
    Device(String),
    /// That of more users than can be named.
    Many {
        /// How many.
        users: usize,
        /// The SHA-256 of their ids, 16 bytes each, one after the other, in ascending order.
        digest: String,
    },
}

impl Whose {
    /// What concerns a user, or one device.
    #[must_use]
    pub fn of_subject(subject: Subject) -> Self {
        match subject {
            Subject::User(user) => Self::of(&[user]),
            Subject::Device(device) => Self::Device(device.to_string()),
        }
    }

    /// The data of these users, in ascending order.
    #[must_use]
    pub fn of(users: &[UserId]) -> Self {
        if users.len() <= MOST_NAMED {
            return Self::Users(users.iter().map(ToString::to_string).collect());
        }
        let ids: Vec<u8> = users.iter().flat_map(|user| user.0).collect();
        Self::Many {
            users: users.len(),
            digest: hex(digest(&SHA256, &ids).as_ref()),
        }
    }
}

impl Deed {
    /// As it stands in a line.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("text and numbers")
    }
}

/// How a chain has come so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: String,
    entries: u64,
}

/// Why a line does not follow from the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// It was changed, or one before it is missing, or it was put in.
    #[error(
        "its hash is not that of this line and the one before it: it was changed or put in, or one before it is missing"
    )]
    Hash,
    /// It is no line of an audit log.
    #[error("it is no line of an audit log")]
    Form,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            head: "0".repeat(HASH_DIGITS),
            entries: 0,
        }
    }
}

impl Chain {
    /// The hash of the last line.
    #[must_use]
    pub fn head(&self) -> &str {
        &self.head
    }

    /// How many lines there are.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Adds a deed, and gives its line.
    #[must_use]
    pub fn append(&mut self, deed: &Deed) -> String {
        let json = deed.to_json();
        self.advance(&json);
        format!("{} {json}\n", self.head)
    }

    /// Takes a line without its end, and says when its deed was done.
    ///
    /// # Errors
    /// When it does not follow.
    pub fn follow(&mut self, line: &[u8]) -> Result<u64, Broken> {
        let line = str::from_utf8(line).map_err(|_| Broken::Form)?;
        let (hash, json) = line.split_once(' ').ok_or(Broken::Form)?;
        let mut next = self.clone();
        next.advance(json);
        if next.head != hash {
            return Err(Broken::Hash);
        }
        // A later version may know deeds that this one does not; what it must have is a time.
        let timed: Timed = serde_json::from_str(json).map_err(|_| Broken::Form)?;
        *self = next;
        Ok(timed.at_ms)
    }

    fn advance(&mut self, json: &str) {
        let text = format!("{} {json}", self.head);
        self.head = hex(digest(&SHA256, text.as_bytes()).as_ref());
        self.entries += 1;
    }
}

#[derive(Deserialize)]
struct Timed {
    at_ms: u64,
}

const HASH_DIGITS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn deed(at_ms: u64) -> Deed {
        Deed {
            at_ms,
            who: Who::Checker("night-watch".to_owned()),
            what: What::WatchStarted,
            whose: Whose::Everybody,
        }
    }

    fn lines(count: u64) -> Vec<String> {
        let mut chain = Chain::default();
        let line = |at_ms| chain.append(&deed(at_ms)).trim_end().to_owned();
        (0..count).map(line).collect()
    }

    fn follow(lines: &[String]) -> Result<Chain, (usize, Broken)> {
        let mut chain = Chain::default();
        for (at, line) in lines.iter().enumerate() {
            chain
                .follow(line.as_bytes())
                .map_err(|broken| (at, broken))?;
        }
        Ok(chain)
    }

    #[test]
    fn a_chain_that_was_written_is_followed_to_its_head() {
        let lines = lines(5);
        let chain = follow(&lines).unwrap();
        assert_eq!(chain.entries(), 5);
        assert!(lines[4].starts_with(chain.head()));
        let json = lines[1].split_once(' ').unwrap().1;
        assert_eq!(serde_json::from_str::<Deed>(json).unwrap(), deed(1));
    }

    /// The format is for ever: this is what `printf '%064d %s' 0 JSON | sha256sum` gives.
    #[test]
    fn the_first_line_is_as_documented() {
        assert_eq!(
            lines(1)[0],
            "d37981a3bf874dce56b6b09f1d7e29a63b0c6fc7f495eb00a6cbb245146d1f0d \
             {\"at_ms\":0,\"who\":{\"checker\":\"night-watch\"},\"what\":\"watch_started\",\"whose\":\"everybody\"}"
        );
    }

    #[test]
    fn no_line_can_be_changed_removed_put_in_or_moved_unnoticed() {
        let lines = lines(6);
        for at in 0..lines.len() {
            for byte in 0..lines[at].len() {
                let mut changed = lines.clone();
                let mut bytes = changed[at].clone().into_bytes();
                bytes[byte] ^= 1;
                changed[at] = String::from_utf8(bytes).unwrap();
                assert_eq!(follow(&changed).unwrap_err().0, at, "byte {byte}");
            }
            let mut doubled = lines.clone();
            doubled.insert(at, lines[at].clone());
            assert_eq!(follow(&doubled), Err((at + 1, Broken::Hash)));
        }
        for at in 0..lines.len() - 1 {
            let mut removed = lines.clone();
            removed.remove(at);
            assert_eq!(follow(&removed), Err((at, Broken::Hash)));
            let mut moved = lines.clone();
            moved.swap(at, at + 1);
            assert_eq!(follow(&moved), Err((at, Broken::Hash)));
        }
    }

    #[test]
    fn more_users_than_can_be_named_have_a_digest() {
        let users: Vec<_> = (0..=MOST_NAMED as u128)
            .map(|n| UserId(n.to_be_bytes()))
            .collect();
        assert!(matches!(Whose::of(&users[1..]), Whose::Users(named) if named.len() == MOST_NAMED));
        let Whose::Many {
            users: many,
            digest,
        } = Whose::of(&users)
        else {
            panic!("too many to be named");
        };
        assert_eq!((many, digest.len()), (MOST_NAMED + 1, HASH_DIGITS));
        assert_ne!(
            Whose::of(&users),
            Whose::of(&[&users[1..], &users[..1]].concat())
        );
    }
}
