//! How RocksDB is set up, and why. Where nothing is said, RocksDB's default stands.
//!
//! Knows RocksDB's options. Must not know what is stored.

use std::{num::NonZeroU32, time::Duration};

use rocksdb::{
    BlockBasedOptions, Cache, DBCompactionStyle, DBCompressionType, DBRecoveryMode,
    MemtableFactory, Options, ReadOptions, WriteBufferManager, WriteOptions,
};
use serde::{Deserialize, Serialize};

use super::{keys::Day, retention::Retention};
use crate::seal::master::SealingConfig;

/// The store's part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// How old a ping may become, counted from its receipt, and an event that checkers are told: none becomes older.
    /// A day's pings are dropped together, so the last of a day are kept for almost a day less. While the gateway does
    /// not run nothing is dropped, and at the next start it is before anybody is served. At least 2 days. 30 days: long
    /// enough for an inquiry after an incident, short enough to be called a default that protects.
    #[serde(with = "super::retention")]
    pub retention: Duration,
    /// Memory for blocks that are read, in MiB. 256: the gateway itself reads only at start, so this
    /// serves compaction's metadata and the reading commands.
    pub cache_mib: NonZeroU32,
    /// Memory for what is not yet in table files, in MiB. When it is full, commits wait for a flush:
    /// slower acknowledgements are better than a process killed for its memory. 256: some seconds of a
    /// full load, so that a slow disk's flush does not show.
    pub memtable_mib: NonZeroU32,
    /// How far the write-ahead log may grow, in MiB, before the families that hold it back are flushed.
    /// It bounds how much is replayed after a crash; 512 take a few seconds.
    pub wal_mib: NonZeroU32,
    /// How much of the disk must stay free, in MiB. Below it new pings are put off with OVERLOADED and a
    /// time to come back, because a full disk is a failure that ends the process. 2,048: the log
    /// and its two copies from before a recovery, and the memtables; more with a larger log. Compactions
    /// come on top: one may need as much again as the pings of its day take. 0 is off.
    pub free_space_floor_mib: u32,
    /// Threads for flushes and compactions. 2: one of each, which leaves the other cores to devices.
    pub background_threads: NonZeroU32,
    /// The key that all users' keys are wrapped with.
    pub sealing: SealingConfig,
}

impl Default for StoreConfig {
    fn default() -> Self {
        const fn number(number: u32) -> NonZeroU32 {
            NonZeroU32::new(number).expect("not zero")
        }
        Self {
            retention: Duration::from_secs(30 * 24 * 60 * 60),
            cache_mib: const { number(256) },
            memtable_mib: const { number(256) },
            wal_mib: const { number(512) },
            free_space_floor_mib: 2_048,
            background_threads: const { number(2) },
            sealing: SealingConfig::default(),
        }
    }
}

impl StoreConfig {
    /// What must stay free, in bytes.
    #[must_use]
    pub fn free_space_floor_bytes(&self) -> u64 {
        u64::from(self.free_space_floor_mib) << 20
    }

    /// The oldest day whose pings are still kept.
    #[must_use]
    pub fn first_kept_day(&self, now_ms: u64) -> Day {
        Retention::of(self.retention).first_kept_day(now_ms)
    }
}

/// The options of one open store. Kept as long as the store, because families are made while it is
/// open and the statistics are read through [`Self::database`].
pub(super) struct Settings {
    /// The database as a whole.
    pub(super) database: Options,
    /// The family of the few rows about the store itself.
    pub(super) meta: Options,
    /// The family of device records.
    pub(super) devices: Options,
    /// The family of one day's pings.
    pub(super) day: Options,
    /// The families of coverage and deadlines.
    pub(super) notices: Options,
}

// Named options that the `rocksdb` crate has no function for. They are the base of every `Options`
// here, because `get_options_from_string` forgets Rust objects that were set before it.
//
// strict_bytes_per_sync: a large table file is written back piece by piece, in earnest, so that its
//   final sync does not delay that of the log.
// max_bgerror_resume_count: after a failed write nothing resumes by itself. Resuming after a full disk
//   has lost consistency (facebook/rocksdb#11643, #12998); we stop, and the restart recovers.
// memtable_protection_bytes_per_key: a checksum for each entry from its insertion to its flush; what
//   was acknowledged must not rot in faulty memory on its way to a table file.
// allow_data_in_errors: no key or value in RocksDB's messages and log.
const NAMED: &str = "strict_bytes_per_sync=true;max_bgerror_resume_count=0;\
                     memtable_protection_bytes_per_key=8;allow_data_in_errors=false";

const MIB: usize = 1 << 20;
/// Larger than the default 4 KiB: rows are written and scanned in runs, hardly ever read alone, and
/// larger blocks compress better and need less index.
const BLOCK_BYTES: usize = 16 << 10;
/// Table files held open by a gateway, which hardly reads: well below the usual limit of 1,024 file
/// handles, of which gRPC and admin connections need some.
const MAX_OPEN_FILES: i32 = 512;
/// RocksDB's own log, the file `LOG`: a few files of a few MiB tell the story of a failure.
const INFO_LOG_FILES: usize = 5;
const INFO_LOG_BYTES: usize = 16 * MIB;
/// What a day's memtable may take of the budget: a quarter, so that one fills while others flush.
const MEMTABLES_PER_BUDGET: usize = 4;
/// Memory for blocks when only reading.
const READER_CACHE_BYTES: usize = 32 * MIB;

impl Settings {
    /// For the one process that writes.
    pub(super) fn writer(config: &StoreConfig) -> Result<Self, rocksdb::Error> {
        let memtable_bytes = mib(config.memtable_mib);
        // One limit for both, so the sum is what the store takes: memtables are charged to the cache.
        // Estimate 0 is the variant of the clock cache that sizes itself, recommended since 10.7.
        let cache = Cache::new_hyper_clock_cache(mib(config.cache_mib) + memtable_bytes, 0);
        let memtables = WriteBufferManager::new_write_buffer_manager_with_cache(
            memtable_bytes,
            true,
            cache.clone(),
        );

        let mut database = named()?;
        database.create_if_missing(true);
        // A store that was killed while it was being made gets the families that it lacks.
        database.create_missing_column_families(true);
        // The default, said because the promise stands on it: without it RocksDB would write on after
        // a failed write to the log.
        database.set_paranoid_checks(true);
        // A torn, never acknowledged tail is cut off and the store opens; this is the mode that
        // RocksDB's own crash test runs. That nothing acknowledged was cut off as well is what the
        // watermark proves.
        database.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        // The default, said because copies of the log by hard link are valid only without recycling,
        // and RocksDB's crash test does not cover recycling.
        database.set_recycle_log_file_num(0);
        database.set_max_total_wal_size(u64::from(config.wal_mib.get()) << 20);
        // Table files are handed to the disk by the MiB and not all at their end.
        database.set_bytes_per_sync(MIB as u64);
        database.set_max_background_jobs(
            i32::try_from(config.background_threads.get()).unwrap_or(i32::MAX),
        );
        database.set_max_open_files(MAX_OPEN_FILES);
        // Files that are no longer needed are deleted by a background thread, not by the committer.
        database.set_avoid_unnecessary_blocking_io(true);
        database.set_keep_log_file_num(INFO_LOG_FILES);
        database.set_max_log_file_size(INFO_LOG_BYTES);
        database.set_write_buffer_manager(&memtables);
        database.set_allow_concurrent_memtable_write(false); // there is one writer; see `append_only`
        // Their default level has the time of each sync of the log, and no timer inside a mutex. (The
        // crate's names for levels are one off from RocksDB's, so none is set.)
        database.enable_statistics();

        let day_memtable_bytes = memtable_bytes / MEMTABLES_PER_BUDGET;
        Ok(Self {
            database,
            meta: meta(day_memtable_bytes / 4)?,
            devices: devices(&cache, day_memtable_bytes / 2)?,
            day: day(&cache, day_memtable_bytes)?,
            notices: notices(&cache, day_memtable_bytes / 16)?,
        })
    }

    /// For a process that only reads, also beside the one that writes.
    pub(super) fn reader() -> Result<Self, rocksdb::Error> {
        let cache = Cache::new_hyper_clock_cache(READER_CACHE_BYTES, 0);
        let mut database = named()?;
        // A writer beside may have an unfinished record at the end of its log.
        database.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        // All files are opened at once, because the writer beside may delete any of them later.
        database.set_max_open_files(-1);
        database.set_allow_concurrent_memtable_write(false); // see `append_only`
        Ok(Self {
            database,
            meta: named()?,
            devices: devices(&cache, MIB)?,
            day: day(&cache, MIB)?,
            notices: notices(&cache, MIB)?,
        })
    }
}

/// How every commit is written: acknowledged means synced. The log is never switched off anywhere.
pub(super) fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

/// How whole families are read: once, so nothing is gained from keeping the blocks.
pub(super) fn scan() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    options
}

/// A few rows, one of them overwritten by each commit. RocksDB's default of 64 MiB would let its memtable
/// fill the whole budget, in steps of a MiB. Then commits wait for a flush that nobody has asked for,
/// because a family is flushed when it has reached its own size, and they wait for ever. The sizes of all
/// families that are written to must stay below the budget together.
fn meta(memtable_bytes: usize) -> Result<Options, rocksdb::Error> {
    let mut options = named()?;
    options.set_write_buffer_size(memtable_bytes);
    Ok(options)
}

/// Device records: overwritten over and over, so levelled compaction, which keeps one version of each.
/// Read only as a whole, at start, so without a filter.
fn devices(cache: &Cache, memtable_bytes: usize) -> Result<Options, rocksdb::Error> {
    let mut options = named()?;
    options.set_write_buffer_size(memtable_bytes);
    options.set_max_write_buffer_number(3);
    append_only(&mut options);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_block_based_table_factory(&table(cache));
    Ok(options)
}

/// Coverage and deadlines: few rows, some of them overwritten, and read while the gateway runs. So their memtable is
/// the usual skip list, which need not be sorted to be read, and small, because all of these are written to.
fn notices(cache: &Cache, memtable_bytes: usize) -> Result<Options, rocksdb::Error> {
    let mut options = named()?;
    options.set_write_buffer_size(memtable_bytes);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_block_based_table_factory(&table(cache));
    Ok(options)
}

/// One day's pings: written once, never overwritten, dropped as a whole.
fn day(cache: &Cache, memtable_bytes: usize) -> Result<Options, rocksdb::Error> {
    let mut options = named()?;
    options.set_write_buffer_size(memtable_bytes);
    options.set_max_write_buffer_number(4);
    append_only(&mut options);
    // Writes each byte 2 to 10 times where levelled compaction writes it 10 to 30 times.
    options.set_compaction_style(DBCompactionStyle::Universal);
    // For universal compaction both mean "rewrite everything that is older", and both default to 30
    // days: a day would be rewritten just before it is dropped.
    options.set_ttl(0);
    options.set_periodic_compaction_seconds(0);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_block_based_table_factory(&table(cache));
    Ok(options)
}

/// A memtable that appends and is sorted when it is flushed, in the background. No commit reads what was written:
/// all that it must know is in memory. Finding the place of each row in a skip list, whose nodes are in no
/// cache by then, would be half of a commit's processor time. It takes one writer at a time.
fn append_only(options: &mut Options) {
    options.set_memtable_factory(MemtableFactory::Vector);
}

fn table(cache: &Cache) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_block_size(BLOCK_BYTES);
    // Indices count against the cache, so that its size is a bound.
    table.set_cache_index_and_filter_blocks(true);
    table
}

fn named() -> Result<Options, rocksdb::Error> {
    Options::default().get_options_from_string(NAMED)
}

fn mib(number: NonZeroU32) -> usize {
    usize::try_from(number.get())
        .unwrap_or(usize::MAX)
        .saturating_mul(MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_is_read_and_misspellings_are_refused() {
        let config: StoreConfig = toml::from_str("retention = \"60h\"\nwal_mib = 64").unwrap();
        assert_eq!(config.retention, Duration::from_secs(60 * 60 * 60));
        assert_eq!(config.wal_mib.get(), 64);
        assert_eq!(config.cache_mib, StoreConfig::default().cache_mib);
        assert!(toml::from_str::<StoreConfig>("retenton = \"60h\"").is_err());
        assert!(toml::from_str::<StoreConfig>("cache_mib = 0").is_err());
    }

    #[test]
    fn a_retention_that_whole_days_cannot_keep_is_refused_with_the_reason() {
        for (text, is_good) in [("0s", false), ("47h 59m 59s", false), ("2days", true)] {
            let read = toml::from_str::<StoreConfig>(&format!("retention = \"{text}\""));
            assert_eq!(read.is_ok(), is_good, "{text}");
            if let Err(error) = read {
                let told = error.to_string();
                assert!(told.contains("set it to 2days or more"), "{told}");
            }
        }
    }
}
