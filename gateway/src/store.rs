//! What is on disk: pings, device records and the few facts about the store itself, in RocksDB.
//!
//! Knows column families, rows and RocksDB's failures; no other file but those under `store/` names
//! RocksDB. Must not know who sends, who waits, or what a record means.
//!
//! # Families
//!
//! - `meta`: format version, incarnation, secret, what a restore has changed (`life`), and the last position, which
//!   every commit writes.
//! - `devices`: one record a device ([`record::encode_device`]).
//! - `coverage`, `deadlines` and `deadline_events`: when the gateway could not hear, and who is expected (`notices`).
//! - `users` and `transitions`: who has paused, and each change of that (`holders`).
//! - `invitations` and `enrolled`: who may enrol, and the numbers of their devices (`enrolment`).
//! - `revocations`: who is let in no more (`revocations`).
//! - `pings-YYYY-MM-DD`: the rows of pings received on that day ([`record::encode_pings`]), dropped as a whole when
//!   retention is over.
//!
//! What is kept of a user is sealed with the user's key (`sealed`): rows of pings and devices, pauses, grants,
//! transitions, deadlines and their events. In clear are the keys of rows, and what must be readable without a user's
//! key: of an erased user the fence, of all others the numbers of their devices, invitations and revocations.
//!
//! A commit writes all of its rows at once and synced: after a crash they are all there or none is. The keys of users
//! who are stored for the first time are on disk before that, in a folder of their own ([`crate::seal`]).

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fmt, io,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use rocksdb::{
    BoundColumnFamily, ColumnFamilyDescriptor, DB, DBIteratorWithThreadMode, FlushOptions,
    IteratorMode, PrefixRange, WriteBatch,
    properties::{
        ACTUAL_DELAYED_WRITE_RATE, BACKGROUND_ERRORS, ESTIMATE_PENDING_COMPACTION_BYTES,
        IS_WRITE_STOPPED, LIVE_SST_FILES_SIZE, NUM_IMMUTABLE_MEM_TABLE,
    },
    statistics::Histogram,
};
use tracing::{info, warn};
use waypost_proto::{
    device::DeviceRecord,
    id::{DeviceId, UserId},
};

mod batch;
mod checkpoint;
mod enrolment;
mod error;
mod facts;
mod folder;
mod grants;
mod holders;
mod keys;
mod life;
mod notices;
pub mod record;
mod retention;
mod revocations;
mod sealed;
mod settings;
mod space;
mod view;
mod watermark;

use batch::{Family, Operation};
use enrolment::{ENROLLED, INVITATIONS};
use error::{bad_key, bad_value, behind, locked, open_error};
use facts::{Facts, META_KEYS_USED, META_POSITION, fixed};
use folder::{Folder, Lock};
use grants::{CHECKERS, GRANTS};
use holders::{TRANSITIONS, USERS};
use notices::{COVERAGE, DEADLINES, EVENTS};
use record::PingRecord;
use revocations::REVOCATIONS;
use settings::Settings;
use space::Room;
use watermark::{Noted, Watermark};

use crate::seal::{
    MasterKey,
    key_store::{self, KeyStore},
    master::{self, SealingConfig},
};

pub use batch::Batch;
pub use checkpoint::{Checkpoint, CheckpointError, checkpoint_in};
pub use error::{CommitError, OpenError, ReadError};
pub use folder::BackupLock;
pub use holders::{KeptHolders, UserEvents, WithheldCounts};
pub use keys::{Day, PingKey};
pub use notices::KeptDeadlines;
pub use retention::Retention;
pub use settings::StoreConfig;
pub use space::Space;
pub use view::{Held, UserView};

/// The open store. The gateway has it open for writing, alone; any number of readers may be beside it.
pub struct Store {
    // Fields are dropped in this order: the database is closed before the lock is given back.
    db: DB,
    settings: Settings,
    days: Mutex<BTreeSet<Day>>,
    facts: Facts,
    /// The first failure. It is final, whatever RocksDB would say to another attempt.
    failure: OnceLock<CommitError>,
    /// None for a reader that has no master key.
    keys: Option<Mutex<KeyStore>>,
    folder: Folder,
    room: Room,
    writer: Option<Writer>,
}

/// What only the writer has.
struct Writer {
    watermark: Watermark,
    /// One checkpoint at a time.
    checkpoint: Mutex<()>,
    _lock: Lock,
}

/// The right to change what lies in a data folder beside the store: nobody has that open for writing until this is
/// dropped.
#[derive(Debug)]
pub struct Claim {
    _lock: Lock,
}

/// What the device records say of the store as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The last commit; 0 before the first. The next one takes the number after it.
    pub position: u64,
    /// The newest time of the gateway's clock that the store remembers, in milliseconds since
    /// 1970-01-01 UTC.
    pub high_water_ms: u64,
}

/// One row of pings, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PingRow {
    /// The day on which it was received.
    pub day: Day,
    /// Whose pings, and where they begin.
    pub key: PingKey,
    /// When they were received, in which commit, and the pings.
    pub record: PingRecord,
}

/// How the store is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes on disk: table files and the write-ahead log.
    pub size_bytes: u64,
    /// Whether RocksDB has stopped writes until it has caught up.
    pub is_write_stopped: bool,
    /// The rate that RocksDB has slowed writes to; 0 when it has not.
    pub delayed_write_bytes_per_second: u64,
    /// Bytes that compaction has yet to rewrite, by RocksDB's estimate.
    pub pending_compaction_bytes: u64,
    /// Memtables that wait to be flushed.
    pub immutable_memtables: u64,
    /// Errors of background work since the store was opened.
    pub background_errors: u64,
    /// Syncs of the write-ahead log since the store was opened.
    pub wal_syncs: u64,
    /// The time they took together.
    pub wal_sync_time: Duration,
}

const META: &str = "meta";
const DEVICES: &str = "devices";
/// Those that are there as long as the store is.
const PERMANENT: [&str; 12] = [
    META,
    DEVICES,
    COVERAGE,
    DEADLINES,
    EVENTS,
    USERS,
    TRANSITIONS,
    INVITATIONS,
    ENROLLED,
    REVOCATIONS,
    CHECKERS,
    GRANTS,
];
/// RocksDB's own, which cannot be left out; nothing is in it.
const UNUSED: &str = rocksdb::DEFAULT_COLUMN_FAMILY_NAME;
const KEY_WAS_MADE: &str = "made before, if there was none";
/// What RocksDB adds to a key and a value in a write batch: type, family and two lengths.
const PUT_OVERHEAD_BYTES: usize = 8;
/// How often a reader tries to open beside a writer that deletes old files at the same moment.
const READER_ATTEMPTS: u32 = 20;

impl Store {
    /// Opens the store of a data folder for writing, makes it if there is none, drops the days whose
    /// retention is over, and opens the current one.
    ///
    /// # Errors
    /// When it is in use, damaged, of a later version, or has lost acknowledged data.
    pub fn open(data_dir: &Path, config: &StoreConfig, now_ms: u64) -> Result<Self, OpenError> {
        let folder = Folder::of_data_dir(data_dir);
        if !folder.holds_database() && Folder::put_back_in(data_dir).path().exists() {
            return Err(OpenError::PutBackInPart {
                path: data_dir.to_owned(),
            });
        }
        Self::open_in(folder, data_dir, config, now_ms)
    }

    /// The same of a store that is being put back, and is not in its place yet.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_put_back(
        data_dir: &Path,
        config: &StoreConfig,
        now_ms: u64,
    ) -> Result<Self, OpenError> {
        Self::open_in(Folder::put_back_in(data_dir), data_dir, config, now_ms)
    }

    fn open_in(
        folder: Folder,
        data_dir: &Path,
        config: &StoreConfig,
        now_ms: u64,
    ) -> Result<Self, OpenError> {
        let unusable = |source| OpenError::Folder {
            path: folder.path().to_owned(),
            source,
        };
        let lock = folder
            .lock()
            .map_err(unusable)?
            .ok_or_else(|| locked(data_dir))?;
        let master = config.sealing.master_key(data_dir)?;
        let watermark = watermark::read(&folder.watermark())
            .map_err(|source| OpenError::Watermark {
                file: folder.watermark(),
                source,
            })?
            .unwrap_or_default();
        if !folder.holds_database() && 0 < watermark.position {
            return Err(behind(&folder, 0, watermark.position));
        }
        folder.keep_log_of_unclean_stop(now_ms).map_err(unusable)?;
        folder.drop_abandoned_checkpoint().map_err(unusable)?;
        folder.make_database().map_err(unusable)?;

        let failed = |error| open_error(data_dir, error);
        let settings = Settings::writer(config).map_err(failed)?;
        let days = days_of(data_dir, &folder, &settings)?;
        let db = DB::open_cf_descriptors(
            &settings.database,
            folder.database(),
            families(&settings, &days),
        )
        .map_err(failed)?;
        let mut facts = match facts::read(&db, data_dir)? {
            Some(facts) => facts,
            None => facts::write_new(&db, data_dir)?,
        };
        if facts.position < watermark.position {
            return Err(behind(&folder, facts.position, watermark.position));
        }
        facts::raise_format(&db, data_dir)?;
        facts.heard_until_ms = watermark.heard_until_ms;
        let keys = open_keys(data_dir, master, &facts)?;
        // A clock that was set back since the last start makes nothing younger.
        let now_ms = now_ms.max(watermark.heard_until_ms.unwrap_or_default());
        // RocksDB has moved all that was in the log to table files.
        folder.mark_running(Day::of_ms(now_ms)).map_err(unusable)?;
        let room = Room::new(config.free_space_floor_bytes());
        room.look(folder.path()).map_err(unusable)?;
        let recovered = Noted {
            position: facts.position,
            heard_until_ms: watermark.heard_until_ms,
        };
        let watermark = Watermark::start(folder.watermark(), recovered).map_err(unusable)?;
        let store = Self {
            db,
            settings,
            days: Mutex::new(days),
            facts,
            failure: OnceLock::new(),
            keys: Some(Mutex::new(keys)),
            folder,
            room,
            writer: Some(Writer {
                watermark,
                checkpoint: Mutex::new(()),
                _lock: lock,
            }),
        };
        let failed = |error: CommitError| OpenError::RocksDb {
            path: data_dir.to_owned(),
            text: error.to_string(),
        };
        store
            .drop_days_before(config.first_kept_day(now_ms))
            .map_err(failed)?;
        store.make_day(Day::of_ms(now_ms)).map_err(failed)?;
        Ok(store)
    }

    /// Keeps everybody from opening the store of a data folder for writing.
    ///
    /// # Errors
    /// When there is none, or somebody has it open.
    pub fn claim(data_dir: &Path) -> Result<Claim, OpenError> {
        let folder = Folder::of_data_dir(data_dir);
        if !folder.holds_database() {
            return Err(OpenError::NoStore {
                path: data_dir.to_owned(),
            });
        }
        let lock = folder.lock().map_err(|source| OpenError::Folder {
            path: folder.path().to_owned(),
            source,
        })?;
        let lock = lock.ok_or_else(|| locked(data_dir))?;
        Ok(Claim { _lock: lock })
    }

    /// Opens the store of a data folder for reading: everything that was committed before now. Works
    /// beside a gateway that has it open; what is committed later is not seen. The master key is the one in the data
    /// folder, if there is one; otherwise sealed rows are counted and not opened.
    ///
    /// # Errors
    /// When there is none, or it is damaged or of a later version.
    pub fn open_read_only(data_dir: &Path) -> Result<Self, OpenError> {
        Self::open_sealed_read_only(data_dir, &SealingConfig::default())
    }

    /// The same with the master key of wherever it is.
    ///
    /// # Errors
    /// As [`Self::open_read_only`], and when there is no master key in the place that is named.
    pub fn open_sealed_read_only(
        data_dir: &Path,
        sealing: &SealingConfig,
    ) -> Result<Self, OpenError> {
        let mut store = Self::open_without_keys(data_dir)?;
        // After the rows: whatever key they were sealed with was there before them.
        if let Some(master) = sealing.master_key(data_dir)? {
            let folder = key_store::folder_in(data_dir);
            let incarnation = store.incarnation();
            let keys = KeyStore::open_read_only(&folder, master, incarnation)?;
            store.keys = Some(Mutex::new(keys));
        }
        Ok(store)
    }

    /// The same for whoever needs nothing that is sealed: it does not matter where the master key is.
    ///
    /// # Errors
    /// As [`Self::open_read_only`].
    pub fn open_without_keys(data_dir: &Path) -> Result<Self, OpenError> {
        let folder = Folder::of_data_dir(data_dir);
        if !folder.holds_database() {
            return Err(OpenError::NoStore {
                path: data_dir.to_owned(),
            });
        }
        let mut attempt = 1;
        loop {
            let logs = folder.log_files().unwrap_or_default();
            let opened = Self::open_read_only_once(data_dir, &folder);
            // What was in a log that went meanwhile is in a table that this reader may not know of.
            let may_miss = logs.iter().any(|log| !log.exists());
            match opened {
                // The writer may delete a file between our reading its name and opening it.
                Err(OpenError::RocksDb { .. } | OpenError::Damaged { .. })
                    if attempt < READER_ATTEMPTS => {}
                opened if !may_miss => return opened,
                _ if attempt < READER_ATTEMPTS => {}
                _ => {
                    return Err(OpenError::RocksDb {
                        path: data_dir.to_owned(),
                        text: "its log went to tables meanwhile, again and again; try again"
                            .to_owned(),
                    });
                }
            }
            attempt += 1;
        }
    }

    fn open_read_only_once(data_dir: &Path, folder: &Folder) -> Result<Self, OpenError> {
        let failed = |error| open_error(data_dir, error);
        let settings = Settings::reader().map_err(failed)?;
        let days = days_of(data_dir, folder, &settings)?;
        let db = DB::open_cf_descriptors_read_only(
            &settings.database,
            folder.database(),
            families(&settings, &days),
            false, // a log file is no error: the newest commits are in it
        )
        .map_err(failed)?;
        let facts = facts::read(&db, data_dir)?.ok_or_else(|| OpenError::NoStore {
            path: data_dir.to_owned(),
        })?;
        let (days, failure, folder) = (Mutex::new(days), OnceLock::new(), folder.clone());
        Ok(Self {
            db,
            settings,
            days,
            facts,
            failure,
            keys: None,
            folder,
            room: Room::new(0), // nothing is written
            writer: None,
        })
    }

    /// Whether it can open what is sealed: a reader without the master key cannot.
    #[must_use]
    pub fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Names this store: random, made with it. To devices and to the keys a store that was put back is the same one.
    #[must_use]
    pub fn incarnation(&self) -> [u8; 16] {
        self.facts.incarnation
    }

    /// The secret that resume tokens are sealed with and that QUIC's keys are derived from: random, made
    /// with the store, so that both outlive the process.
    #[must_use]
    pub fn secret(&self) -> [u8; 32] {
        self.facts.secret
    }

    /// Up to when an earlier process could hear, as far as its last note says: at most about a second too
    /// early. None if there was none.
    #[must_use]
    pub fn heard_until_ms(&self) -> Option<u64> {
        self.facts.heard_until_ms
    }

    /// Notes that the gateway could hear up to a moment. It is on disk within about a second, and when the store is
    /// closed.
    pub fn note_heard(&self, until_ms: u64) {
        if let Some(writer) = &self.writer {
            writer.watermark.note_heard(until_ms);
        }
    }

    /// All device records but those of users whose erasure has begun, and what they say of the store as a whole.
    ///
    /// # Errors
    /// When a record cannot be read: dedup cannot go on without it.
    pub fn load_devices(&self) -> Result<(Vec<(DeviceId, DeviceRecord)>, Recovered), ReadError> {
        let mut recovered = self.recovered_without_devices()?;
        let fenced = self.fenced()?;
        let devices = self
            .devices()
            .filter_map(|device| self.unless_erased(device))
            .filter(|device| !matches!(device, Ok((id, _)) if fenced.contains(&id.user)));
        let devices = devices.collect::<Result<Vec<_>, _>>()?;
        for (_, record) in &devices {
            recovered.take(record);
        }
        Ok((devices, recovered))
    }

    /// What the device records say of the store as a whole, as far as they can be opened: for whoever does without dedup.
    ///
    /// # Errors
    /// When the store cannot be read, or a record is damaged.
    pub fn recovered(&self) -> Result<Recovered, ReadError> {
        let mut recovered = self.recovered_without_devices()?;
        for device in self.devices() {
            match device {
                Ok((_, record)) => recovered.take(&record),
                Err(ReadError::SealedRow { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(recovered)
    }

    /// The position is kept apart from the records, so that none is used twice even if the record that had the last one is
    /// gone.
    fn recovered_without_devices(&self) -> Result<Recovered, ReadError> {
        Ok(Recovered {
            position: self.last_position()?,
            high_water_ms: self.facts.heard_until_ms.unwrap_or_default(),
        })
    }

    /// All device records, by user and device.
    pub fn devices(&self) -> impl Iterator<Item = Result<(DeviceId, DeviceRecord), ReadError>> {
        self.devices_within(None)
    }

    /// The devices that have a record, by user and device. No record is opened.
    pub fn device_ids(&self) -> impl Iterator<Item = Result<DeviceId, ReadError>> {
        self.device_ids_within(None)
    }

    /// The devices of one user that have a record.
    pub fn device_ids_of(&self, user: UserId) -> impl Iterator<Item = Result<DeviceId, ReadError>> {
        self.device_ids_within(Some(user))
    }

    /// The device records of one user.
    pub fn devices_of(
        &self,
        user: UserId,
    ) -> impl Iterator<Item = Result<(DeviceId, DeviceRecord), ReadError>> {
        self.devices_within(Some(user))
    }

    /// All rows of pings: by day, and within a day by user, device, epoch and sequence number.
    pub fn rows(&self) -> impl Iterator<Item = Result<PingRow, ReadError>> {
        self.rows_within(None)
    }

    /// The rows of pings of one user, in the same order.
    pub fn rows_of(&self, user: UserId) -> impl Iterator<Item = Result<PingRow, ReadError>> {
        self.rows_within(Some(user))
    }

    /// The days that have a family, in order.
    #[must_use]
    pub fn days(&self) -> Vec<Day> {
        self.days.lock().iter().copied().collect()
    }

    /// An empty batch.
    #[must_use]
    pub fn batch(&self) -> Batch {
        Batch::default()
    }

    /// Writes a batch, all of it or nothing, and returns when it is on disk.
    ///
    /// # Errors
    /// When that is not sure. No later commit succeeds either.
    pub fn commit(&self, batch: Batch) -> Result<(), CommitError> {
        let writer = self.writer()?;
        self.write(&batch).map_err(|error| self.fail(error))?;
        writer.watermark.note(batch.position);
        Ok(())
    }

    /// Makes the family of a day, if there is none. With a new day, what is in the log is on its way to table files
    /// when this returns: a day's pings are in no log any more by the time they are dropped, however few come.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn open_day(&self, day: Day) -> Result<(), CommitError> {
        let Some(newest) = self.make_day(day)? else {
            return Ok(());
        };
        // What came in the last moments of the day before that one was perhaps committed in it.
        if let Err(error) = self.folder.mark_running(newest.previous()) {
            warn!(%error, "it could not be noted how old the log may be; a copy of it, should the gateway be killed today, may go early");
        }
        self.flush(false)
            .map_err(|error| self.fail(CommitError::RocksDb(error.into_string())))
    }

    /// Makes the family of a day, if there is none. Returns the newest day that there was, if this one is newer.
    fn make_day(&self, day: Day) -> Result<Option<Day>, CommitError> {
        self.writer()?;
        let mut days = self.days.lock();
        if days.contains(&day) {
            return Ok(None);
        }
        self.db
            .create_cf(day.family_name(), &self.settings.day)
            .map_err(|error| self.fail(CommitError::RocksDb(error.into_string())))?;
        let newest = days.last().copied();
        days.insert(day);
        Ok(newest.filter(|newest| *newest < day))
    }

    /// Moves what is in the log to table files, and waits for that or not.
    fn flush(&self, waits: bool) -> Result<(), rocksdb::Error> {
        let mut families: Vec<_> = PERMANENT.map(|name| self.family(name)).into();
        let days = self.days().into_iter();
        families.extend(days.filter_map(|day| self.db.cf_handle(&day.family_name())));
        let mut options = FlushOptions::default();
        options.set_wait(waits);
        let all: Vec<_> = families.iter().collect();
        self.db.flush_cfs_opt(&all, &options)
    }

    /// Drops all days before one, with all of their pings, and says how many those were. A batch with
    /// pings of such a day can no longer be committed, so this is for the committer, between batches.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn drop_days_before(&self, first_kept: Day) -> Result<usize, CommitError> {
        self.writer()?;
        let mut days = self.days.lock();
        let kept = days.split_off(&first_kept);
        let dropped = std::mem::replace(&mut *days, kept);
        for day in &dropped {
            self.db
                .drop_cf(&day.family_name())
                .map_err(|error| self.fail(CommitError::RocksDb(error.into_string())))?;
            info!(%day, "the day's retention is over; its pings were dropped");
        }
        if let Err(error) = self.folder.drop_recoveries_before(first_kept) {
            warn!(%error, "a kept log of an earlier recovery could not be deleted, although its retention is over");
        }
        Ok(dropped.len())
    }

    /// Destroys a user's key: no row that was sealed with it can be read again, wherever a copy of it is. Says whether
    /// there was one. A row that is committed later gets another key. Beside the keys it is kept that the user was
    /// erased at `erased_ms`, for a store that is put back from before.
    ///
    /// # Errors
    /// When that is not sure. It is as final as a failed commit.
    pub fn destroy_key(&self, user: &UserId, erased_ms: u64) -> Result<bool, CommitError> {
        let destroyed = self.writable_keys()?.lock().destroy(user, erased_ms);
        destroyed.map_err(|error| self.fail(CommitError::Keys(error.to_string())))
    }

    /// The users who were ever erased, as it is kept beside the keys: with when, in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn erased(&self) -> Vec<(UserId, u64)> {
        let keys = self.keys.as_ref().map(Mutex::lock);
        keys.map_or_else(Vec::new, |keys| keys.erased().collect())
    }

    /// Keeps beside the keys that users were erased.
    ///
    /// # Errors
    /// As [`Self::destroy_key`].
    pub fn note_erased(&self, users: &[(UserId, u64)]) -> Result<(), CommitError> {
        let noted = self.writable_keys()?.lock().note_erased(users);
        noted.map_err(|error| self.fail(CommitError::Keys(error.to_string())))
    }

    /// Looks how much room there is. Waits for the disk if that hangs.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn look_at_space(&self) -> io::Result<()> {
        self.room.look(self.folder.path())
    }

    /// The room there was at the last look, without asking the disk.
    #[must_use]
    pub fn space(&self) -> Space {
        self.room.seen()
    }

    /// How the store is doing, now. Waits for the disk if that hangs.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let mut families: Vec<_> = PERMANENT.map(|name| self.family(name)).into();
        families.extend(
            self.days()
                .iter()
                .filter_map(|day| self.db.cf_handle(&day.family_name())),
        );
        // A property that RocksDB does not know reads 0; the tests would see it.
        let of_store = |name| self.db.property_int_value(name).ok().flatten().unwrap_or(0);
        let of_family = |family, name| {
            self.db
                .property_int_value_cf(family, name)
                .ok()
                .flatten()
                .unwrap_or(0)
        };
        let sum = |name| {
            families
                .iter()
                .map(|family| of_family(family, name))
                .sum::<u64>()
        };
        let syncs = self
            .settings
            .database
            .get_histogram_data(Histogram::WalFileSyncMicros);
        Statistics {
            size_bytes: sum(LIVE_SST_FILES_SIZE) + self.folder.log_bytes(),
            is_write_stopped: of_store(IS_WRITE_STOPPED) != 0,
            delayed_write_bytes_per_second: of_store(ACTUAL_DELAYED_WRITE_RATE),
            pending_compaction_bytes: sum(ESTIMATE_PENDING_COMPACTION_BYTES),
            immutable_memtables: sum(NUM_IMMUTABLE_MEM_TABLE),
            background_errors: sum(BACKGROUND_ERRORS),
            wal_syncs: syncs.count(),
            wal_sync_time: Duration::from_micros(syncs.sum()),
        }
    }

    fn write(&self, batch: &Batch) -> Result<(), CommitError> {
        if batch.len() == 0 && batch.position == 0 {
            return Ok(());
        }
        let devices = self.family(DEVICES);
        // The family of the day that was seen last, with its name: nearly always the only one.
        let mut open_day: Option<(Day, String, Arc<BoundColumnFamily<'_>>)> = None;
        let overhead_bytes = PUT_OVERHEAD_BYTES + sealed::OVERHEAD_BYTES;
        let mut writes =
            WriteBatch::with_capacity_bytes(batch.size_bytes() + overhead_bytes * batch.len());
        let mut keys = self.keys.as_ref().ok_or(CommitError::ReadOnly)?.lock();
        let newcomers = batch.users_without_key(&keys);
        if !newcomers.is_empty() {
            keys.make(&newcomers)
                .map_err(|error| CommitError::Keys(error.to_string()))?;
            let used = keys.made().to_be_bytes();
            writes.put_cf(&self.family(META), META_KEYS_USED, used);
        }
        let of_user = |user: Option<UserId>| user.and_then(|user| keys.key(&user));
        let (position, mut sealed) = (batch.position, Vec::new());
        for (put, key, value) in batch.rows() {
            match put.family {
                Family::Devices if put.operation == Operation::DeleteRange => {
                    writes.delete_range_cf(&devices, key, value);
                }
                Family::Devices => {
                    let user_key = of_user(sealed::first_user(key)).expect(KEY_WAS_MADE);
                    sealed::seal_row(user_key, DEVICES, key, position, value, &mut sealed);
                    writes.put_cf(&devices, key, &sealed);
                }
                Family::Notices(name) => {
                    let family = self.family(name);
                    match put.operation {
                        Operation::Put => writes.put_cf(&family, key, value),
                        Operation::PutOfUser => {
                            let user_key = of_user(sealed::last_user(key)).expect(KEY_WAS_MADE);
                            sealed::seal_row(user_key, name, key, position, value, &mut sealed);
                            writes.put_cf(&family, key, &sealed);
                        }
                        Operation::Delete => writes.delete_cf(&family, key),
                        Operation::DeleteRange => writes.delete_range_cf(&family, key, value),
                    }
                }
                Family::Day(day) if put.operation == Operation::DeleteRange => {
                    // A day that was dropped meanwhile has nothing left.
                    if let Some(family) = self.db.cf_handle(&day.family_name()) {
                        writes.delete_range_cf(&family, key, value);
                    }
                }
                Family::Day(day) => {
                    let (name, family) = match open_day.take() {
                        Some((open, name, family)) if open == day => (name, family),
                        _ => {
                            let name = day.family_name();
                            let family = self.db.cf_handle(&name);
                            (name, family.ok_or(CommitError::DayNotOpen(day))?)
                        }
                    };
                    let user_key = of_user(sealed::first_user(key)).expect(KEY_WAS_MADE);
                    sealed::seal_pings(user_key, &name, key, value, &mut sealed);
                    writes.put_cf(&family, key, &sealed);
                    open_day = Some((day, name, family));
                }
            }
        }
        drop(keys);
        if 0 < batch.position {
            writes.put_cf(
                &self.family(META),
                META_POSITION,
                batch.position.to_be_bytes(),
            );
        }
        self.db
            .write_opt(writes, &settings::synced())
            .map_err(|error| CommitError::RocksDb(error.into_string()))
    }

    fn writable_keys(&self) -> Result<&Mutex<KeyStore>, CommitError> {
        self.writer()?;
        self.keys.as_ref().ok_or(CommitError::ReadOnly)
    }

    fn writer(&self) -> Result<&Writer, CommitError> {
        match self.failure.get() {
            Some(failure) => Err(failure.clone()),
            None => self.writer.as_ref().ok_or(CommitError::ReadOnly),
        }
    }

    fn fail(&self, error: CommitError) -> CommitError {
        self.failure.get_or_init(|| error).clone()
    }

    fn devices_within(
        &self,
        user: Option<UserId>,
    ) -> impl Iterator<Item = Result<(DeviceId, DeviceRecord), ReadError>> {
        self.scan(&self.family(DEVICES), user).map(|row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            self.device_row(&key, &value)
        })
    }

    fn device_ids_within(
        &self,
        user: Option<UserId>,
    ) -> impl Iterator<Item = Result<DeviceId, ReadError>> {
        self.scan(&self.family(DEVICES), user).map(|row| {
            let (key, _) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            keys::device_of_key(&key).ok_or_else(|| bad_key(DEVICES, &key))
        })
    }

    fn device_row(&self, key: &[u8], value: &[u8]) -> Result<(DeviceId, DeviceRecord), ReadError> {
        let device = keys::device_of_key(key).ok_or_else(|| bad_key(DEVICES, key))?;
        let value = self.opened(DEVICES, device.user, key, value)?;
        let record = record::decode_device(&value);
        let record = record.map_err(|source| bad_value(DEVICES, key, source))?;
        Ok((device, record))
    }

    /// The value of a row of a user, opened if it is sealed.
    fn opened<'v>(
        &self,
        family: &str,
        user: UserId,
        row: &[u8],
        value: &'v [u8],
    ) -> Result<Cow<'v, [u8]>, ReadError> {
        let keys = self.keys.as_ref().map(Mutex::lock);
        let user_key = keys.as_ref().and_then(|keys| keys.key(&user));
        let opened = sealed::open(user_key, family, row, value);
        let opened = opened.ok_or_else(|| ReadError::SealedRow {
            family: family.to_owned(),
            user,
        })?;
        opened.map_err(|source| bad_value(family, row, source))
    }

    /// What was read of a user's row; none if that is sealed for good, because the user was erased. Between the end of
    /// the key and that of the rows it is as if those were gone, whatever stops the gateway there.
    fn unless_erased<T>(&self, read: Result<T, ReadError>) -> Option<Result<T, ReadError>> {
        if let Err(ReadError::SealedRow { user, .. }) = &read {
            let keys = self.keys.as_ref().map(Mutex::lock);
            if keys.is_some_and(|keys| keys.is_erased(user)) {
                return None;
            }
        }
        Some(read)
    }

    fn rows_within(
        &self,
        user: Option<UserId>,
    ) -> impl Iterator<Item = Result<PingRow, ReadError>> {
        self.days().into_iter().flat_map(move |day| {
            let name = day.family_name();
            // A day that was dropped in the meantime has no rows.
            let rows = self
                .db
                .cf_handle(&name)
                .map(|family| self.scan(&family, user));
            rows.into_iter().flatten().map(move |row| {
                let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
                self.ping_row(day, &name, &key, &value)
            })
        })
    }

    /// Reads a row of pings, and opens it if it is sealed.
    fn ping_row(
        &self,
        day: Day,
        family: &str,
        row: &[u8],
        value: &[u8],
    ) -> Result<PingRow, ReadError> {
        let key = PingKey::from_bytes(row).ok_or_else(|| bad_key(family, row))?;
        let keys = self.keys.as_ref().map(Mutex::lock);
        let user_key = keys.as_ref().and_then(|keys| keys.key(&key.device.user));
        let opened = sealed::open(user_key, family, row, value);
        let opened = opened.ok_or(ReadError::Sealed { day, key })?;
        drop(keys);
        let record = opened.and_then(|value| record::decode_pings(&value));
        Ok(PingRow {
            day,
            key,
            record: record.map_err(|source| bad_value(family, row, source))?,
        })
    }

    fn scan(
        &self,
        family: &Arc<BoundColumnFamily<'_>>,
        user: Option<UserId>,
    ) -> DBIteratorWithThreadMode<'_, DB> {
        let mut options = settings::scan();
        if let Some(user) = user {
            options.set_iterate_range(PrefixRange(user.0));
        }
        self.db
            .iterator_cf_opt(family, options, IteratorMode::Start)
    }

    fn family(&self, name: &str) -> Arc<BoundColumnFamily<'_>> {
        permanent_family(&self.db, name)
    }
}

impl Recovered {
    fn take(&mut self, record: &DeviceRecord) {
        self.position = self.position.max(record.position);
        let heard_ms = record.clocks.last_contact_ms.max(record.clocks.durable_ms);
        self.high_water_ms = self.high_water_ms.max(heard_ms);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // After a failure the store was not closed in order, whatever follows.
        if self.writer.is_some()
            && self.failure.get().is_none()
            && let Err(error) = self.folder.unmark_running()
        {
            warn!(%error, "the store's folder still says that a gateway runs");
        }
    }
}

impl fmt::Debug for Store {
    /// Without the token key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("folder", &self.folder.path())
            .finish_non_exhaustive()
    }
}

fn families(settings: &Settings, days: &BTreeSet<Day>) -> Vec<ColumnFamilyDescriptor> {
    let mut families = vec![
        ColumnFamilyDescriptor::new(UNUSED, settings.meta.clone()),
        ColumnFamilyDescriptor::new(META, settings.meta.clone()),
        ColumnFamilyDescriptor::new(DEVICES, settings.devices.clone()),
    ];
    let has_its_own_settings = |name: &&str| [META, DEVICES].contains(name);
    families.extend(
        PERMANENT
            .iter()
            .filter(|name| !has_its_own_settings(name))
            .map(|&name| ColumnFamilyDescriptor::new(name, settings.notices.clone())),
    );
    families.extend(
        days.iter()
            .map(|day| ColumnFamilyDescriptor::new(day.family_name(), settings.day.clone())),
    );
    families
}

/// The days that the store on disk has a family for.
fn days_of(
    data_dir: &Path,
    folder: &Folder,
    settings: &Settings,
) -> Result<BTreeSet<Day>, OpenError> {
    let mut days = BTreeSet::new();
    if folder.holds_database() {
        let names = DB::list_cf(&settings.database, folder.database())
            .map_err(|error| open_error(data_dir, error))?;
        for name in names {
            if let Some(day) = Day::of_family_name(&name) {
                days.insert(day);
            } else if name != UNUSED && !PERMANENT.contains(&name.as_str()) {
                return Err(OpenError::UnknownFamily {
                    path: data_dir.to_owned(),
                    name,
                });
            }
        }
    }
    Ok(days)
}

/// Opens the users' keys. If no master key was found, makes one, unless that would pass over one that is gone.
fn open_keys(
    data_dir: &Path,
    master: Option<MasterKey>,
    facts: &Facts,
) -> Result<KeyStore, OpenError> {
    let folder = key_store::folder_in(data_dir);
    let master = match master {
        Some(master) => master,
        None if 0 < facts.keys_used || key_store::has_keys(&folder)? => {
            return Err(OpenError::MasterKeyMissing {
                path: data_dir.join(master::DEFAULT_FILE),
            });
        }
        None => master::make_default(data_dir)?,
    };
    Ok(KeyStore::open(
        &folder,
        master,
        facts.incarnation,
        facts.keys_used,
    )?)
}

fn permanent_family<'a>(db: &'a DB, name: &str) -> Arc<BoundColumnFamily<'a>> {
    db.cf_handle(name)
        .expect("opened with the store and never dropped")
}

#[cfg(test)]
mod tests;
