//! Who may be told of whom, in the store: keys, values, and how they are read back.
//!
//! Knows the layout of two families. Must not know when a holder may grant, or what a checker is told.
//!
//! # Families
//!
//! - `checkers`: a checker's number, one byte → its name, which is never another, and whether everybody has granted it.
//! - `grants`: `user` → what its holder has decided of each checker. There is a row once something was decided, until
//!   everything is erased.

use prost::Message;
use rocksdb::IteratorMode;
use waypost_proto::id::UserId;

use super::{
    Batch, ReadError, Store, bad_key, bad_value,
    record::{self, RecordError},
};
use crate::grants::{CheckerNumber, CheckerSet, Checkers, Decision, Decisions};

pub(super) const CHECKERS: &str = "checkers";
pub(super) const GRANTS: &str = "grants";

/// A checker's name. Field numbers are for ever, here and below.
#[derive(Clone, PartialEq, Message)]
struct CheckerRow {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bool, tag = "2")]
    is_granted_by_all: bool,
}

/// All that a holder has decided.
#[derive(Clone, PartialEq, Message)]
struct GrantsRow {
    #[prost(message, repeated, tag = "1")]
    decisions: Vec<DecisionRow>,
}

#[derive(Clone, PartialEq, Message)]
struct DecisionRow {
    #[prost(uint32, tag = "1")]
    checker: u32,
    #[prost(uint64, tag = "2")]
    granted_ms: u64,
    /// 0 while the grant holds.
    #[prost(uint64, tag = "3")]
    withdrawn_ms: u64,
}

impl Batch {
    /// Keeps all checkers, with their numbers.
    pub fn put_checkers(&mut self, checkers: &Checkers) {
        let by_all = checkers.are_granted_by_all();
        for (number, name) in checkers.iter() {
            let row = CheckerRow {
                name: name.to_owned(),
                is_granted_by_all: by_all.contains(number),
            };
            self.put(CHECKERS, &[number.get()], &row);
        }
    }

    /// Keeps what a holder has decided.
    pub fn put_decisions(&mut self, user: UserId, decisions: &Decisions) {
        let rows = decisions.as_slice().iter().map(|decision| DecisionRow {
            checker: decision.checker.get().into(),
            granted_ms: decision.granted_ms,
            withdrawn_ms: decision.withdrawn_ms.unwrap_or_default(),
        });
        let decisions = rows.collect();
        self.put_of_user(GRANTS, &user.0, &GrantsRow { decisions });
    }
}

impl Store {
    /// The checkers that have a number.
    ///
    /// # Errors
    /// When one cannot be read: a grant might come to be another's.
    pub fn load_checkers(&self) -> Result<Checkers, ReadError> {
        let rows = self
            .db
            .iterator_cf(&self.family(CHECKERS), IteratorMode::Start);
        let (mut names, mut by_all) = (Vec::new(), CheckerSet::default());
        for row in rows {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            // Without a gap, since they are given in order and never taken.
            let number = u32::try_from(names.len()).ok().and_then(CheckerNumber::new);
            let number = number.filter(|number| key[..] == [number.get()]);
            let number = number.ok_or_else(|| bad_key(CHECKERS, &key))?;
            let row: CheckerRow =
                record::decode_row(&value).map_err(|source| bad_value(CHECKERS, &key, source))?;
            names.push(row.name);
            if row.is_granted_by_all {
                by_all = by_all.union(number.into());
            }
        }
        let mut checkers = Checkers::restore(names);
        checkers.grant_by_all(by_all);
        Ok(checkers)
    }

    /// What each holder has decided who has decided anything.
    ///
    /// # Errors
    /// When one cannot be read: somebody might be told who may not.
    pub fn load_decisions(&self) -> Result<Vec<(UserId, Decisions)>, ReadError> {
        let rows = self.scan(&self.family(GRANTS), None);
        let decided = rows.map(|row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            let user = <[u8; 16]>::try_from(&*key).map_err(|_| bad_key(GRANTS, &key))?;
            Ok((UserId(user), self.decisions(UserId(user), &value)?))
        });
        decided
            .filter_map(|decided| self.unless_erased(decided))
            .collect()
    }

    /// What one holder has decided; of one who was erased, nothing.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn decisions_of(&self, user: UserId) -> Result<Decisions, ReadError> {
        let Some(value) = self.grants_row(user)? else {
            return Ok(Decisions::default());
        };
        let decisions = self.unless_erased(self.decisions(user, &value));
        decisions.unwrap_or_else(|| Ok(Decisions::default()))
    }

    /// Whether anything is kept that one holder has decided. It is not opened.
    pub(super) fn has_decisions(&self, user: UserId) -> Result<bool, ReadError> {
        Ok(self.grants_row(user)?.is_some())
    }

    /// Reads a row of grants.
    pub(super) fn decisions(&self, user: UserId, value: &[u8]) -> Result<Decisions, ReadError> {
        decisions(&user.0, &self.opened(GRANTS, user, &user.0, value)?)
    }

    fn grants_row(&self, user: UserId) -> Result<Option<Vec<u8>>, ReadError> {
        let row = self.db.get_cf(&self.family(GRANTS), user.0);
        row.map_err(|error| ReadError::RocksDb(error.into_string()))
    }
}

fn decisions(key: &[u8], value: &[u8]) -> Result<Decisions, ReadError> {
    let bad_value = |source| bad_value(GRANTS, key, source);
    let row: GrantsRow = record::decode_row(value).map_err(bad_value)?;
    let decisions = row.decisions.iter().map(|decision| {
        Some(Decision {
            checker: CheckerNumber::new(decision.checker)?,
            granted_ms: decision.granted_ms,
            withdrawn_ms: (decision.withdrawn_ms != 0).then_some(decision.withdrawn_ms),
        })
    });
    let decisions: Option<Vec<_>> = decisions.collect();
    decisions
        .map(Decisions::restore)
        .ok_or_else(|| bad_value(RecordError::Malformed))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::StoreConfig;

    const NOON_MS: u64 = 1_767_268_800_000;
    const USER: UserId = UserId([7; 16]);

    fn open(data_dir: &Path) -> Store {
        Store::open(data_dir, &StoreConfig::default(), NOON_MS).unwrap()
    }

    #[test]
    fn numbers_and_decisions_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let mut checkers = store.load_checkers().unwrap();
        assert_eq!(checkers, Checkers::default());
        let mut decisions = store.decisions_of(USER).unwrap();
        assert_eq!(decisions, Decisions::default());
        let mut batch = store.batch();
        for name in ["ops", "night-watch"] {
            let number = checkers.enrol(name).unwrap().unwrap();
            checkers.grant_by_all(number.into());
            decisions.grant(number, CheckerSet::default(), NOON_MS);
        }
        let ops = checkers.number("ops").unwrap();
        assert!(decisions.withdraw(ops, CheckerSet::default(), NOON_MS + 1));
        batch.put_checkers(&checkers);
        batch.put_decisions(USER, &decisions);
        store.commit(batch).unwrap();
        drop(store);
        let store = open(folder.path());
        assert_eq!(store.load_checkers().unwrap(), checkers);
        assert_eq!(store.decisions_of(USER).unwrap(), decisions);
        assert_eq!(store.load_decisions().unwrap(), [(USER, decisions)]);
    }
}
