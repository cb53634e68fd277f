//! Whether holders share: who has paused, who has erased everything, and each change of that and of grants.
//!
//! Plain data. Knows users and their wishes; must not know devices, where this is kept, or who is told.
//!
//! # Bounds
//!
//! Some 40 bytes for each user who has paused or erased. Only a device with a certificate can do either.

use rustc_hash::FxHashMap;
use waypost_proto::{id::UserId, session::Wish};

use crate::{deadlines::Said, grants::CheckerSet};

/// Whether a user's silence means anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// The holder shares.
    #[default]
    Active,
    /// The holder has paused: nothing is kept, and nothing that a checker sees moves.
    Paused,
    /// The holder has erased everything, for ever.
    Erased,
}

impl Sharing {
    /// Its name in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Erased => "erased",
        }
    }
}

/// A holder does not share, since a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Withheld {
    /// How: paused or erased.
    pub sharing: Sharing,
    /// The commit that began it, at which the user stands for checkers as long as it lasts.
    pub position: u64,
    /// When that was, in milliseconds since 1970-01-01 UTC.
    pub since_ms: u64,
    /// Of one who has erased everything: who could be told of the user then. It is all that is left of grants.
    pub told: CheckerSet,
}

/// A user's holder has paused, resumed, or erased everything, or has let checkers be told or not. Those whom it concerns
/// are told of each, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Whose holder.
    pub user: UserId,
    /// What has turned.
    pub turn: Turn,
    /// Whom it concerns: those who could be told of the user then, or whose grant it is.
    pub checkers: CheckerSet,
    /// When it was said, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// The commit that says so.
    pub position: u64,
    /// Its place among the transitions of that commit, in the order in which they came to be.
    pub number: u32,
}

/// What has turned with a transition, and holds from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Whether the holder shares.
    Sharing(Sharing),
    /// Some checkers may be told of the user.
    Granted,
    /// Some may not any more.
    Withdrawn,
}

impl Turn {
    /// Its name in an export.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Sharing(sharing) => sharing.as_label(),
            Self::Granted => "granted",
            Self::Withdrawn => "withdrawn",
        }
    }
}

impl Transition {
    /// That a holder has everything erased, in a commit that says nothing else; and who is told that.
    #[must_use]
    pub fn erased(user: UserId, told: CheckerSet, said: Said) -> Self {
        Self {
            user,
            turn: Turn::Sharing(Sharing::Erased),
            checkers: told,
            at_ms: said.at_ms,
            position: said.position,
            number: 0,
        }
    }
}

/// Who does not share.
#[derive(Debug, Default)]
pub struct Holders {
    withheld: FxHashMap<UserId, Sharing>,
    paused: usize,
}

impl Holders {
    /// As a store has them.
    #[must_use]
    pub fn restore(withheld: impl IntoIterator<Item = (UserId, Withheld)>) -> Self {
        let withheld: FxHashMap<_, _> = withheld
            .into_iter()
            .map(|(user, withheld)| (user, withheld.sharing))
            .collect();
        let paused = withheld.values().filter(|&&how| how == Sharing::Paused);
        Self {
            paused: paused.count(),
            withheld,
        }
    }

    /// Whether this user shares.
    #[must_use]
    pub fn sharing(&self, user: &UserId) -> Sharing {
        if self.withheld.is_empty() {
            // Asked for each request of each device.
            return Sharing::Active;
        }
        self.withheld.get(user).copied().unwrap_or_default()
    }

    /// How many have paused.
    #[must_use]
    pub fn paused(&self) -> usize {
        self.paused
    }

    /// Does what a holder wants, and says what holds from now on. None if it was so already, or the holder has
    /// erased everything before.
    pub fn grant(&mut self, user: UserId, wish: Wish) -> Option<Sharing> {
        let from = self.sharing(&user);
        let to = match wish {
            Wish::Pause => Sharing::Paused,
            Wish::Resume => Sharing::Active,
            Wish::Erase => Sharing::Erased,
        };
        if to == from || from == Sharing::Erased {
            return None;
        }
        match to {
            Sharing::Active => self.withheld.remove(&user),
            Sharing::Paused | Sharing::Erased => self.withheld.insert(user, to),
        };
        self.paused += usize::from(to == Sharing::Paused);
        self.paused -= usize::from(from == Sharing::Paused);
        Some(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserId = UserId([1; 16]);
    const BOB: UserId = UserId([2; 16]);

    #[test]
    fn a_wish_that_is_so_already_changes_nothing() {
        let mut holders = Holders::default();
        for (wish, changed, paused) in [
            (Wish::Resume, None, 0),
            (Wish::Pause, Some(Sharing::Paused), 1),
            (Wish::Pause, None, 1),
            (Wish::Resume, Some(Sharing::Active), 0),
            (Wish::Pause, Some(Sharing::Paused), 1),
        ] {
            assert_eq!(holders.grant(ALICE, wish), changed);
            assert_eq!(holders.paused(), paused);
        }
        assert_eq!(
            (holders.sharing(&ALICE), holders.sharing(&BOB)),
            (Sharing::Paused, Sharing::Active)
        );
    }

    #[test]
    fn nothing_brings_a_user_back_who_was_erased() {
        let withheld = |sharing| Withheld {
            sharing,
            position: 1,
            since_ms: 1,
            told: CheckerSet::default(),
        };
        let restored = [
            (ALICE, withheld(Sharing::Erased)),
            (BOB, withheld(Sharing::Paused)),
        ];
        let mut holders = Holders::restore(restored);
        assert_eq!(holders.paused(), 1);
        assert_eq!(holders.grant(BOB, Wish::Erase), Some(Sharing::Erased));
        assert_eq!(holders.paused(), 0);
        for user in [ALICE, BOB] {
            for wish in [Wish::Pause, Wish::Resume, Wish::Erase] {
                assert_eq!(holders.grant(user, wish), None);
                assert_eq!(holders.sharing(&user), Sharing::Erased);
            }
        }
    }
}
