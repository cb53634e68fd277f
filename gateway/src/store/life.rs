//! The lives of a store. A store that is put back from a backup begins another life: what it gave out after the backup
//! was made is out in the world, and it remembers nothing of it.
//!
//! Knows what must never be given out twice, and how a new life makes sure of that. Must not know backups.
//!
//! # What a new life changes
//!
//! - Its name: to checkers it is another store, so that each begins anew, with a Reset, and none goes on from a
//!   moment that this store never had.
//! - Its positions go on above all that any other life can have come to: by the clock, so that it does not matter of which
//!   backup it was made, nor how often. (Two that begin within a minute are told apart by the audit log, from which
//!   [`crate::restore::witness`] makes the moment.) A checker that knows an event by its position never takes a new one
//!   for an old.
//! - Its new epochs as well. A device of which the store remembers all that was acknowledged goes on in its epoch,
//!   and what is in the backup is a duplicate when it comes again.
//!
//! The incarnation stays: keys are bound to it, and devices go by it.

use ring::rand::{SecureRandom, SystemRandom};
use rocksdb::WriteBatch;

use super::{
    CommitError, META, META_POSITION, ReadError, Store, fixed, permanent_family, settings,
};

pub(super) const META_LIFE: &[u8] = b"life";
pub(super) const META_EPOCHS_ISSUED: &[u8] = b"epochs_issued";

/// What a life begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Beginning {
    position: u64,
    epochs_issued: u32,
}

/// More than any store commits in a second.
const COMMITS_PER_SECOND_BITS: u32 = 20;
/// 2026-01-01 UTC: before any store.
const BEGINNING_OF_EPOCHS_MS: u64 = 1_767_225_600_000;
/// Two epochs a second, until 2094: a device may begin a connection a second and 60 at once, and gets at most one epoch on
/// each (`devices.allowance`).
const MS_PER_EPOCH: u64 = 500;

impl Beginning {
    /// Beyond all that any life that began a minute or more before `now_ms` can have given out.
    fn at(now_ms: u64, last_position: u64) -> Self {
        // Below 2^53 for two centuries, so that it is a number in JSON as well.
        let position = (now_ms / 1_000) << COMMITS_PER_SECOND_BITS;
        let epochs = now_ms.saturating_sub(BEGINNING_OF_EPOCHS_MS) / MS_PER_EPOCH;
        Self {
            position: position.max(last_position.saturating_add(1)),
            // The last one is left, or no device would ever get another.
            epochs_issued: u32::try_from(epochs).unwrap_or(u32::MAX - 1),
        }
    }
}

impl Store {
    /// Names this life of the store: what checkers go by.
    #[must_use]
    pub fn life(&self) -> [u8; 16] {
        self.facts.life
    }

    /// Other lives of this store may have issued epochs up to this one.
    #[must_use]
    pub fn epochs_issued(&self) -> u32 {
        self.facts.epochs_issued
    }

    /// The last commit; 0 before the first.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn last_position(&self) -> Result<u64, ReadError> {
        let noted = self
            .db
            .get_cf(&self.family(META), META_POSITION)
            .map_err(|error| ReadError::RocksDb(error.into_string()))?;
        Ok(noted
            .and_then(fixed)
            .map_or(self.facts.position, u64::from_be_bytes))
    }

    /// Begins another life, from the next opening on, and gives its first position. `now_ms` is to be a minute or more
    /// after what any other life began with.
    ///
    /// # Errors
    /// When that is not on disk for sure, or the system gives no random numbers.
    pub(crate) fn begin_life(&self, now_ms: u64) -> Result<u64, CommitError> {
        let writer = self.writer()?;
        let last = self
            .last_position()
            .map_err(|error| CommitError::RocksDb(error.to_string()))?;
        let Beginning {
            position,
            epochs_issued,
        } = Beginning::at(now_ms, last);
        let mut life = [0; 16];
        SystemRandom::new()
            .fill(&mut life)
            .map_err(|_| CommitError::NoRandomness)?;
        let meta = permanent_family(&self.db, META);
        let mut writes = WriteBatch::default();
        writes.put_cf(&meta, META_LIFE, life);
        writes.put_cf(
            &meta,
            META_EPOCHS_ISSUED,
            epochs_issued.max(self.facts.epochs_issued).to_be_bytes(),
        );
        writes.put_cf(&meta, META_POSITION, position.to_be_bytes());
        self.db
            .write_opt(writes, &settings::synced())
            .map_err(|error| self.fail(CommitError::RocksDb(error.into_string())))?;
        writer.watermark.note(position);
        Ok(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    const NOON_MS: u64 = 1_767_268_800_000;

    #[test]
    fn a_later_life_begins_above_all_that_an_earlier_one_can_have_given_out() {
        let first = Beginning::at(NOON_MS, 7);
        let second = Beginning::at(NOON_MS + 3_600_000, 7);
        // A million commits and a connection in each second of that hour, and all connections that it may begin at once.
        assert!(first.position + 3_600 * 1_000_000 < second.position);
        assert!(first.epochs_issued + 3_600 + 60 < second.epochs_issued);
        assert!(7 < first.position && second.position < 1 << 53);
        // With a clock that was set back.
        let last = u64::from(u32::MAX) << 21;
        assert_eq!(Beginning::at(0, last).position, last + 1);
        assert_eq!(Beginning::at(u64::MAX, 0).epochs_issued, u32::MAX - 1);
    }

    #[test]
    fn a_new_life_is_there_at_the_next_opening_and_the_store_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Store::open(folder.path(), &StoreConfig::default(), NOON_MS).unwrap();
        let store = open();
        let (incarnation, secret) = (store.incarnation(), store.secret());
        assert_eq!((store.life(), store.epochs_issued()), (incarnation, 0));
        let mut lives = vec![incarnation];
        let mut positions = vec![store.last_position().unwrap()];
        drop(store);
        for hour in 1..=2 {
            let position = open().begin_life(NOON_MS + hour * 3_600_000).unwrap();
            let store = open();
            assert_eq!((store.incarnation(), store.secret()), (incarnation, secret));
            assert_eq!(store.last_position().unwrap(), position);
            assert!(!lives.contains(&store.life()) && *positions.last().unwrap() < position);
            assert!(0 < store.epochs_issued());
            lives.push(store.life());
            positions.push(position);
        }
    }
}
