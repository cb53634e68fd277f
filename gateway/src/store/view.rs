//! Everything that is held on one user, as it was at one moment, however long it takes to read.
//!
//! Knows in which families there is something of a user. Must not know what becomes of it.

use std::fmt;

use rocksdb::{
    AsColumnFamilyRef, DB, DBIteratorWithThreadMode, IteratorMode, PrefixRange, ReadOptions,
    SnapshotWithThreadMode,
};
use waypost_proto::{
    device::DeviceRecord,
    id::{DeviceId, UserId},
};

use super::{
    DEVICES, Day, META, META_POSITION, PingRow, ReadError, Store, fixed,
    grants::GRANTS,
    holders::{TRANSITIONS, USERS},
    notices::{DEADLINES, EVENTS},
    sealed, settings,
};
use crate::{
    deadlines::{Event, Registration},
    erase::Erasure,
    grants::Decisions,
    sharing::{Sharing, Transition},
};

/// Whether there is anything of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The store has never heard of the user.
    Nothing,
    /// It holds something of the user, or has invited a device.
    Something,
    /// Everything was erased, or is on its way to be.
    Erased(Erasure),
}

/// One user's rows at one moment.
pub struct UserView<'a> {
    store: &'a Store,
    user: UserId,
    snapshot: SnapshotWithThreadMode<'a, DB>,
    days: Vec<Day>,
}

impl fmt::Debug for UserView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserView")
            .field("user", &self.user)
            .field("days", &self.days)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Whether there is anything of a user now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn held_of(&self, user: UserId) -> Result<Held, ReadError> {
        let value = self
            .db
            .get_cf(&self.family(USERS), user.0)
            .map_err(|error| ReadError::RocksDb(error.into_string()))?;
        if let Some(value) = value {
            // What is sealed is a pause, whether it can be opened or not.
            let erasure = match sealed::is_sealed(&value) {
                true => None,
                false => self.withheld(user, &value)?.1,
            };
            return Ok(erasure.map_or(Held::Something, Held::Erased));
        }
        Ok(match self.last_device(user)? {
            None => Held::Nothing,
            Some(_) => Held::Something,
        })
    }

    /// What is held on a user now. What is committed later is not in it.
    #[must_use]
    pub fn view_of(&self, user: UserId) -> UserView<'_> {
        UserView {
            store: self,
            user,
            snapshot: self.db.snapshot(),
            days: self.days(),
        }
    }
}

impl UserView<'_> {
    /// The last commit that is in it; 0 for a store without any.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn position(&self) -> Result<u64, ReadError> {
        let noted = self.row(META, META_POSITION)?.and_then(fixed);
        let mut position = noted.map_or(0, u64::from_be_bytes);
        for (_, record) in self.devices()? {
            position = position.max(record.position);
        }
        Ok(position)
    }

    /// Whether the holder shares.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sharing(&self) -> Result<Sharing, ReadError> {
        match self.row(USERS, &self.user.0)? {
            None => Ok(Sharing::Active),
            Some(value) => Ok(self.store.withheld(self.user, &value)?.0.sharing),
        }
    }

    /// What the holder has decided of checkers.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn decisions(&self) -> Result<Decisions, ReadError> {
        match self.row(GRANTS, &self.user.0)? {
            None => Ok(Decisions::default()),
            Some(value) => self.store.decisions(self.user, &value),
        }
    }

    /// The user's devices.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn devices(&self) -> Result<Vec<(DeviceId, DeviceRecord)>, ReadError> {
        let rows = self.scan(&self.store.family(DEVICES));
        rows.map(|row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            self.store.device_row(&key, &value)
        })
        .collect()
    }

    /// When the holder paused and resumed, granted and withdrew. Looks at those of all users.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn transitions(&self) -> Result<Vec<Transition>, ReadError> {
        let rows = self.all_of(TRANSITIONS, |key, value| {
            self.store.transition_row(key, value, Some(self.user))
        });
        rows.collect()
    }

    /// What checkers expect of the user. Looks at what they expect of all users.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn deadlines(&self) -> Result<Vec<Registration>, ReadError> {
        let rows = self.all_of(DEADLINES, |key, value| {
            self.store.registration_of(key, value, self.user)
        });
        rows.collect()
    }

    /// What checkers were told when they had expected the user. Looks at what they were told of all users.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn events(&self) -> Result<Vec<Event>, ReadError> {
        let rows = self.all_of(EVENTS, |key, value| {
            self.store.event_of_user(key, value, self.user)
        });
        rows.collect()
    }

    /// All rows of a family from which something is read.
    fn all_of<T>(
        &self,
        family: &str,
        read: impl Fn(&[u8], &[u8]) -> Result<Option<T>, ReadError>,
    ) -> impl Iterator<Item = Result<T, ReadError>> {
        let family = self.store.family(family);
        let mode = IteratorMode::Start;
        let rows = self.store.db.iterator_cf_opt(&family, self.options(), mode);
        let read = rows.map(move |row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            read(&key, &value)
        });
        read.filter_map(Result::transpose)
    }

    /// The user's pings: by day, and within a day by device, epoch and sequence number.
    pub fn rows(&self) -> impl Iterator<Item = Result<PingRow, ReadError>> {
        self.days.iter().flat_map(move |&day| {
            let name = day.family_name();
            // A day that was dropped in the meantime has no rows.
            let family = self.store.db.cf_handle(&name);
            let rows = family
                .map(|family| self.scan(&family))
                .into_iter()
                .flatten();
            // However slowly it is read, nothing of a day is that should be gone.
            let is_there = move || self.store.days.lock().contains(&day);
            let rows = rows.take_while(move |_| is_there());
            rows.map(move |row| {
                let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
                self.store.ping_row(day, &name, &key, &value)
            })
        })
    }

    fn scan(&self, family: &impl AsColumnFamilyRef) -> DBIteratorWithThreadMode<'_, DB> {
        let mut options = self.options();
        options.set_iterate_range(PrefixRange(self.user.0));
        self.store
            .db
            .iterator_cf_opt(family, options, IteratorMode::Start)
    }

    fn row(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        let family = self.store.family(family);
        let row = self.store.db.get_cf_opt(&family, key, &self.options());
        row.map_err(|error| ReadError::RocksDb(error.into_string()))
    }

    fn options(&self) -> ReadOptions {
        let mut options = settings::scan();
        options.set_snapshot(&self.snapshot);
        options
    }
}
