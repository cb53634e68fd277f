//! Which checkers a holder lets be told of the user: their numbers, sets of them, and what was decided when.
//!
//! Plain data. Knows names and decisions; must not know devices, where this is kept, or what a checker is told.
//!
//! A checker has a number in its store, given once and never again to another name, so that who may be told of a user is
//! one word that is looked at for each value of each stream.
//!
//! # Bounds
//!
//! [`MOST_CHECKERS`] names a store, for ever. A user has at most one decision for each.

use std::collections::BTreeMap;

use waypost_proto::v1::CheckerGrant;

/// Names that a store can number: the bits of a [`CheckerSet`].
pub const MOST_CHECKERS: usize = 64;

/// A checker's number in its store, below [`MOST_CHECKERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckerNumber(u8);

/// Checkers of one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckerSet(u64);

/// A store has given all its numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this store has known {MOST_CHECKERS} names of checkers, which is the most, and {name:?} would be one more: use one of its names again"
)]
pub struct TooManyCheckers {
    /// The name without a number.
    pub name: String,
}

/// The checkers of a store, by number, and those of them whom everybody has granted who did not withdraw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkers {
    names: Vec<String>,
    granted_by_all: CheckerSet,
}

/// What a holder has decided of one checker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Of whom.
    pub checker: CheckerNumber,
    /// Since when it may be told, in milliseconds since 1970-01-01 UTC; 0 for since ever.
    pub granted_ms: u64,
    /// Since when it may not any more; none while it may.
    pub withdrawn_ms: Option<u64>,
}

/// All that a holder has decided, by number of the checker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decisions(Vec<Decision>);

/// What follows from a holder's decisions for those who look at the user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Visibility {
    /// Who may be told.
    pub granted: CheckerSet,
    /// Who could once, and may not any more.
    pub withdrawn: CheckerSet,
}

impl CheckerNumber {
    /// The number that a store gives first.
    pub const FIRST: Self = Self(0);

    /// The number, if it is one.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        let number = u8::try_from(number).ok()?;
        (usize::from(number) < MOST_CHECKERS).then_some(Self(number))
    }

    /// As a number.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

impl CheckerSet {
    /// Every checker that there can be.
    pub const ALL: Self = Self(u64::MAX);

    /// Those whose bits are set.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// A bit for each, the lowest for number 0.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether this one is among them.
    #[must_use]
    pub fn contains(self, checker: CheckerNumber) -> bool {
        self.0 >> checker.0 & 1 == 1
    }

    /// Those of both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that are in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those of this one that are not in the other.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Each, in ascending order.
    pub fn iter(self) -> impl Iterator<Item = CheckerNumber> {
        (0..64)
            .map(CheckerNumber)
            .filter(move |&checker| self.contains(checker))
    }
}

impl From<CheckerNumber> for CheckerSet {
    fn from(checker: CheckerNumber) -> Self {
        Self(1 << checker.0)
    }
}

impl FromIterator<CheckerNumber> for CheckerSet {
    fn from_iter<Numbers: IntoIterator<Item = CheckerNumber>>(numbers: Numbers) -> Self {
        numbers
            .into_iter()
            .fold(Self::default(), |set, checker| set.union(checker.into()))
    }
}

impl Checkers {
    /// As a store has numbered them, from 0 on.
    #[must_use]
    pub fn restore(names: Vec<String>) -> Self {
        Self {
            names,
            granted_by_all: CheckerSet::default(),
        }
    }

    /// These, each of whom everybody has granted.
    ///
    /// # Panics
    /// When there are more than a store can number.
    #[must_use]
    pub fn granted_by_all<Name: Into<String>>(names: impl IntoIterator<Item = Name>) -> Self {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        assert!(names.len() <= MOST_CHECKERS, "a store has fewer checkers");
        let mut checkers = Self::restore(names);
        checkers.granted_by_all = checkers.numbers().collect();
        checkers
    }

    /// Has everybody grant these and no others, save who withdraws it.
    pub fn grant_by_all(&mut self, granted: CheckerSet) {
        self.granted_by_all = granted;
    }

    /// Whom everybody has granted who did not withdraw it.
    #[must_use]
    pub fn are_granted_by_all(&self) -> CheckerSet {
        self.granted_by_all
    }

    /// Numbers a name, if it has no number yet; the number then.
    ///
    /// # Errors
    /// When there is none left.
    pub fn enrol(&mut self, name: &str) -> Result<Option<CheckerNumber>, TooManyCheckers> {
        if self.number(name).is_some() {
            return Ok(None);
        }
        if MOST_CHECKERS <= self.names.len() {
            return Err(TooManyCheckers {
                name: name.to_owned(),
            });
        }
        self.names.push(name.to_owned());
        Ok(self.number(name))
    }

    /// The number of a name.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<CheckerNumber> {
        self.numbers()
            .zip(&self.names)
            .find_map(|(number, known)| (known == name).then_some(number))
    }

    /// These names with their numbers. One that has none is left out.
    #[must_use]
    pub fn numbered(&self, names: &[String]) -> BTreeMap<String, CheckerNumber> {
        let numbered = names
            .iter()
            .map(|name| Some((name.clone(), self.number(name)?)));
        numbered.flatten().collect()
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl Iterator<Item = (CheckerNumber, &str)> {
        self.numbers().zip(self.names.iter().map(String::as_str))
    }

    /// The names of these, by number. One that has none is left out.
    pub fn names(&self, checkers: CheckerSet) -> impl Iterator<Item = &str> {
        checkers.iter().filter_map(|checker| self.name(checker))
    }

    /// The name of one; none if the store has not numbered so many.
    #[must_use]
    pub fn name(&self, checker: CheckerNumber) -> Option<&str> {
        self.names.get(usize::from(checker.0)).map(String::as_str)
    }

    fn numbers(&self) -> impl Iterator<Item = CheckerNumber> + use<> {
        (0..64).map(CheckerNumber).take(self.names.len())
    }
}

impl Decisions {
    /// As they were kept.
    #[must_use]
    pub fn restore(decisions: Vec<Decision>) -> Self {
        Self(decisions)
    }

    /// Each, by number of its checker.
    #[must_use]
    pub fn as_slice(&self) -> &[Decision] {
        &self.0
    }

    /// What follows, where these are granted by all.
    #[must_use]
    pub fn visibility(&self, by_all: CheckerSet) -> Visibility {
        let decided = |is_granted: bool| -> CheckerSet {
            let decisions = self.0.iter();
            decisions
                .filter(|decision| decision.withdrawn_ms.is_none() == is_granted)
                .map(|decision| decision.checker)
                .collect()
        };
        let withdrawn = decided(false);
        Visibility {
            granted: decided(true).union(by_all).without(withdrawn),
            withdrawn,
        }
    }

    /// The holder lets a checker be told. Whether it could not before.
    pub fn grant(&mut self, checker: CheckerNumber, by_all: CheckerSet, at_ms: u64) -> bool {
        let visible = self.visibility(by_all);
        if visible.granted.contains(checker) {
            return false;
        }
        self.decide(Decision {
            checker,
            granted_ms: at_ms,
            withdrawn_ms: None,
        });
        true
    }

    /// The holder lets a checker be told no more. Whether it could before.
    pub fn withdraw(&mut self, checker: CheckerNumber, by_all: CheckerSet, at_ms: u64) -> bool {
        if !self.visibility(by_all).granted.contains(checker) {
            return false;
        }
        let granted_ms = self
            .0
            .iter()
            .find(|decision| decision.checker == checker)
            .map_or(0, |decision| decision.granted_ms);
        self.decide(Decision {
            checker,
            granted_ms,
            withdrawn_ms: Some(at_ms),
        });
        true
    }

    /// The holder agrees to an invitation that names these. What was withdrawn stays so: only the holder gives that back,
    /// on a device. Who can be told now and could not before.
    pub fn agree(&mut self, named: CheckerSet, by_all: CheckerSet, at_ms: u64) -> CheckerSet {
        let withdrawn = self.visibility(by_all).withdrawn;
        named
            .without(withdrawn)
            .iter()
            .filter(|&checker| self.grant(checker, by_all, at_ms))
            .collect()
    }

    /// For the holder: everybody who may be told or could once, by name.
    #[must_use]
    pub fn shown(&self, checkers: &Checkers) -> Vec<CheckerGrant> {
        let decided = self.0.iter().map(|decision| decision.checker).collect();
        let undecided = checkers.are_granted_by_all().without(decided).iter();
        let undecided = undecided.map(|checker| Decision {
            checker,
            granted_ms: 0,
            withdrawn_ms: None,
        });
        let all = self.0.iter().copied().chain(undecided);
        let mut shown: Vec<_> = all
            .filter_map(|decision| {
                Some(CheckerGrant {
                    name: checkers.name(decision.checker)?.to_owned(),
                    granted_ms: decision.granted_ms,
                    withdrawn_ms: decision.withdrawn_ms.unwrap_or_default(),
                })
            })
            .collect();
        shown.sort_by(|one, other| one.name.cmp(&other.name));
        shown
    }

    fn decide(&mut self, decision: Decision) {
        match self
            .0
            .binary_search_by_key(&decision.checker, |known| known.checker)
        {
            Ok(at) => self.0[at] = decision,
            Err(at) => self.0.insert(at, decision),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number(number: u32) -> CheckerNumber {
        CheckerNumber::new(number).unwrap()
    }

    fn set(numbers: &[u32]) -> CheckerSet {
        numbers.iter().copied().map(number).collect()
    }

    #[test]
    fn a_name_keeps_its_number_and_the_last_number_is_the_last() {
        let mut checkers = Checkers::restore(vec!["ops".into()]);
        assert_eq!(checkers.enrol("ops"), Ok(None));
        for more in 1..MOST_CHECKERS {
            let given = checkers.enrol(&format!("more-{more}")).unwrap();
            assert_eq!(given.map(|given| usize::from(given.get())), Some(more));
        }
        let name = "one-more".to_owned();
        assert_eq!(checkers.enrol(&name), Err(TooManyCheckers { name }));
        assert_eq!(checkers.number("ops"), Some(number(0)));
        assert_eq!(checkers.name(number(63)), Some("more-63"));
        assert_eq!(CheckerNumber::new(64), None);
    }

    #[test]
    fn what_was_withdrawn_comes_back_by_the_holder_and_not_by_an_invitation() {
        let mut decisions = Decisions::default();
        let (nobody, ops, other) = (CheckerSet::default(), number(3), number(9));
        let both = set(&[3, 9]);
        assert_eq!(decisions.agree(both, nobody, 10), both);
        assert_eq!(decisions.agree(both, nobody, 11), nobody, "so already");
        assert!(decisions.withdraw(ops, nobody, 20));
        assert!(!decisions.withdraw(ops, nobody, 21));
        let visible = Visibility {
            granted: other.into(),
            withdrawn: ops.into(),
        };
        assert_eq!(decisions.visibility(nobody), visible);
        assert_eq!(decisions.agree(both, nobody, 30), nobody);
        assert_eq!(decisions.visibility(nobody), visible);
        assert!(decisions.grant(ops, nobody, 40));
        assert_eq!(decisions.visibility(nobody).granted, both);
        let kept = Decision {
            checker: ops,
            granted_ms: 40,
            withdrawn_ms: None,
        };
        assert_eq!(decisions.as_slice()[0], kept);
    }

    #[test]
    fn a_grant_by_all_holds_until_it_is_withdrawn() {
        let checkers = Checkers::granted_by_all(["a", "b"]);
        let by_all = checkers.are_granted_by_all();
        let mut decisions = Decisions::default();
        assert_eq!(decisions.visibility(by_all).granted, set(&[0, 1]));
        assert!(!decisions.grant(number(0), by_all, 5), "so already");
        assert!(decisions.withdraw(number(0), by_all, 6));
        assert_eq!(decisions.visibility(by_all).granted, set(&[1]));
        let shown = |name: &str, granted_ms, withdrawn_ms| CheckerGrant {
            name: name.into(),
            granted_ms,
            withdrawn_ms,
        };
        let told = [shown("a", 0, 6), shown("b", 0, 0)];
        assert_eq!(decisions.shown(&checkers), told);
        assert!(decisions.grant(number(0), by_all, 7));
        let told = [shown("a", 7, 0), shown("b", 0, 0)];
        assert_eq!(decisions.shown(&checkers), told);
    }

    proptest! {
        /// A checker may be told exactly if the last decision of it, or the grant by all, says so; and the answer says
        /// whether that changed.
        #[test]
        fn the_last_word_of_each_checker_holds(
            by_all in any::<u64>(),
            words in prop::collection::vec((0..64_u32, any::<bool>()), 0..60),
        ) {
            let by_all = CheckerSet::from_bits(by_all);
            let (mut decisions, mut granted) = (Decisions::default(), by_all);
            let mut withdrawn = CheckerSet::default();
            for (at_ms, (checker, is_grant)) in (1..).zip(words) {
                let checker = number(checker);
                let could = granted.contains(checker);
                let changed = if is_grant {
                    granted = granted.union(checker.into());
                    withdrawn = withdrawn.without(checker.into());
                    decisions.grant(checker, by_all, at_ms)
                } else {
                    if could {
                        withdrawn = withdrawn.union(checker.into());
                    }
                    granted = granted.without(checker.into());
                    decisions.withdraw(checker, by_all, at_ms)
                };
                prop_assert_eq!(changed, could != is_grant);
                prop_assert_eq!(decisions.visibility(by_all), Visibility { granted, withdrawn });
                prop_assert!(decisions.as_slice().is_sorted_by_key(|decision| decision.checker));
            }
        }
    }
}
