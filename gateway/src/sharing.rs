//! Whether holders share: who has paused, and each change of that.
//!
//! Plain data. Knows users and their wishes; must not know devices, where this is kept, or who is told.
//!
//! # Bounds
//!
//! Some 40 bytes for each user who has paused. Only a device of a known user can pause.

use rustc_hash::FxHashMap;
use waypost_proto::{id::UserId, session::Wish};

use crate::deadlines::Said;

/// Whether a user's silence means anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// The holder shares.
    #[default]
    Active,
    /// The holder has paused: nothing is kept, and nothing that a checker sees moves.
    Paused,
}

impl Sharing {
    /// Its name in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
        }
    }
}

/// A pause that lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// The commit that began it, at which the user stands for checkers as long as it lasts.
    pub position: u64,
    /// When that was, in milliseconds since 1970-01-01 UTC.
    pub since_ms: u64,
}

/// A user's holder has paused or resumed. Checkers are told of each, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Whose holder.
    pub user: UserId,
    /// What holds from then on.
    pub to: Sharing,
    /// When it was said, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// The commit that says so.
    pub position: u64,
    /// Its place among the transitions of that commit, in the order in which they came to be.
    pub number: u32,
}

/// Who has paused.
#[derive(Debug, Default)]
pub struct Holders {
    paused: FxHashMap<UserId, Pause>,
}

impl Holders {
    /// As a store has them.
    #[must_use]
    pub fn restore(paused: impl IntoIterator<Item = (UserId, Pause)>) -> Self {
        Self {
            paused: paused.into_iter().collect(),
        }
    }

    /// Whether this user shares.
    #[must_use]
    pub fn sharing(&self, user: &UserId) -> Sharing {
        // The usual case, for each request of each device: nobody has paused.
        if !self.paused.is_empty() && self.paused.contains_key(user) {
            Sharing::Paused
        } else {
            Sharing::Active
        }
    }

    /// How many have paused.
    #[must_use]
    pub fn paused(&self) -> usize {
        self.paused.len()
    }

    /// Does what a holder wants, and says what holds from now on. None if it was so already.
    pub fn grant(&mut self, user: UserId, wish: Wish, said: Said) -> Option<Sharing> {
        let to = match wish {
            Wish::Pause => Sharing::Paused,
            Wish::Resume => Sharing::Active,
        };
        if to == self.sharing(&user) {
            return None;
        }
        match to {
            Sharing::Paused => {
                let pause = Pause {
                    position: said.position,
                    since_ms: said.at_ms,
                };
                self.paused.insert(user, pause);
            }
            Sharing::Active => {
                self.paused.remove(&user);
            }
        }
        Some(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserId = UserId([1; 16]);
    const BOB: UserId = UserId([2; 16]);

    fn at(position: u64) -> Said {
        Said {
            position,
            at_ms: 10 * position,
        }
    }

    #[test]
    fn a_wish_that_is_so_already_changes_nothing() {
        let mut holders = Holders::default();
        assert_eq!(holders.grant(ALICE, Wish::Resume, at(1)), None);
        let paused = holders.grant(ALICE, Wish::Pause, at(2));
        assert_eq!(paused, Some(Sharing::Paused));
        assert_eq!(holders.grant(ALICE, Wish::Pause, at(3)), None);
        assert_eq!(
            (holders.sharing(&ALICE), holders.sharing(&BOB)),
            (Sharing::Paused, Sharing::Active)
        );
        let resumed = holders.grant(ALICE, Wish::Resume, at(4));
        assert_eq!(resumed, Some(Sharing::Active));
        assert_eq!(
            (holders.sharing(&ALICE), holders.paused()),
            (Sharing::Active, 0)
        );
    }
}
