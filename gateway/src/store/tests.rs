//! The store against a real RocksDB in temporary folders.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use prost::Message;
use tempfile::TempDir;
use waypost_proto::{
    batch,
    device::Clocks,
    ping::{Ping, Source},
};

use super::{record::RecordError, *};
use crate::{hex::hex, seal::key_store::KeyError};

mod days;

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// 2026-08-20, at noon.
const NOW_MS: u64 = 20_685 * DAY_MS + DAY_MS / 2;

fn open(folder: &TempDir) -> Store {
    Store::open(folder.path(), &StoreConfig::default(), NOW_MS).unwrap()
}

/// The copy of a log that a store left which was opened now.
fn recovery(made_ms: u64) -> String {
    format!("recovery-{made_ms}-since-{}", Day::of_ms(NOW_MS))
}

fn device(user: u8, device: u32) -> DeviceId {
    DeviceId {
        user: UserId([user; 16]),
        device,
    }
}

fn pings(first_seq: u64, count: u64) -> Vec<Ping> {
    let ping = |seq| Ping {
        speed_cm_per_s: Some(100),
        source: Source::Gnss,
        ..Ping::at(seq, NOW_MS + seq, 535_000_000, 100_000_000)
    };
    (first_seq..first_seq + count).map(ping).collect()
}

fn record(position: u64, floor: u64) -> DeviceRecord {
    let mut record = DeviceRecord {
        epoch: 1,
        position,
        ..DeviceRecord::default()
    };
    record.settled.close_below(floor + 1);
    record.clocks = Clocks {
        last_contact_ms: NOW_MS + position,
        durable_ms: NOW_MS + position,
        ..Clocks::default()
    };
    record
}

/// Commits one row of pings and its device's record, as the committer does.
fn commit(
    store: &Store,
    position: u64,
    day: Day,
    id: DeviceId,
    pings: &[Ping],
) -> Result<(), CommitError> {
    let mut batch = store.batch();
    let (first, last) = (pings[0].seq, pings[pings.len() - 1].seq);
    let columns = batch::encode(1, pings).encode_to_vec();
    let value = record::encode_pings(NOW_MS, position, &columns);
    batch.put_pings(
        day,
        &PingKey {
            device: id,
            epoch: 1,
            first_seq: first,
        },
        &value,
    );
    batch.put_device(&id, &record(position, last));
    store.commit(batch)
}

fn rows(store: &Store) -> Vec<PingRow> {
    store.rows().collect::<Result<_, _>>().unwrap()
}

/// The largest log file, which holds the newest commits.
fn log_file(folder: &TempDir) -> PathBuf {
    let files = fs::read_dir(folder.path().join("store/rocksdb"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap()
}

/// What a SIGKILL at this moment leaves: the files as they are, the mark of the running gateway with them.
fn killed(folder: &TempDir) -> TempDir {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                copy(&entry.path(), &target);
            } else if let Err(error) = fs::copy(entry.path(), target) {
                // RocksDB and the watermark's thread may just have done away with it.
                assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
            }
        }
    }
    let left = tempfile::tempdir().unwrap();
    copy(folder.path(), left.path());
    left
}

#[test]
fn a_reopened_store_has_everything() {
    let folder = tempfile::tempdir().unwrap();
    let today = Day::of_ms(NOW_MS);
    let store = open(&folder);
    let names = (store.incarnation(), store.secret());
    assert_eq!(
        store.load_devices().unwrap(),
        (vec![], Recovered::default())
    );
    commit(&store, 1, today, device(1, 7), &pings(1, 10)).unwrap();
    commit(&store, 2, today, device(2, 7), &pings(1, 3)).unwrap();
    commit(&store, 3, today, device(1, 7), &pings(11, 5)).unwrap();
    drop(store);

    let store = open(&folder);
    assert_eq!((store.incarnation(), store.secret()), names);
    let (devices, recovered) = store.load_devices().unwrap();
    assert_eq!(
        devices,
        [(device(1, 7), record(3, 15)), (device(2, 7), record(2, 3))]
    );
    assert_eq!(
        recovered,
        Recovered {
            position: 3,
            high_water_ms: NOW_MS + 3
        }
    );
    let stored: Vec<(PingKey, u64, usize)> = rows(&store)
        .iter()
        .map(|row| (row.key, row.record.position, row.record.pings.len()))
        .collect();
    let key = |id, first_seq| PingKey {
        device: id,
        epoch: 1,
        first_seq,
    };
    assert_eq!(
        stored,
        [
            (key(device(1, 7), 1), 1, 10),
            (key(device(1, 7), 11), 3, 5),
            (key(device(2, 7), 1), 2, 3)
        ]
    );
    assert_eq!(rows(&store)[0].record.pings, pings(1, 10));

    let other = tempfile::tempdir().unwrap();
    assert_ne!(
        open(&other).incarnation(),
        names.0,
        "every store has a name of its own"
    );
}

#[test]
fn a_killed_store_has_everything_and_keeps_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    commit(&store, 1, Day::of_ms(NOW_MS), device(1, 7), &pings(1, 10)).unwrap();
    let left = killed(&folder);
    drop(store);

    let log = fs::read(log_file(&left)).unwrap();
    let name = log_file(&left).file_name().unwrap().to_owned();
    let store = open(&left);
    assert_eq!(rows(&store).len(), 1);
    assert_eq!(store.load_devices().unwrap().1.position, 1);
    let kept = left.path().join("store").join(recovery(NOW_MS)).join(name);
    assert_eq!(fs::read(kept).unwrap(), log);
}

#[test]
fn the_last_position_outlives_the_record_that_had_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    commit(&store, 8, Day::of_ms(NOW_MS), device(1, 7), &pings(1, 1)).unwrap();
    store
        .db
        .delete_cf(&store.family(DEVICES), keys::device_key(&device(1, 7)))
        .unwrap();
    drop(store);
    assert_eq!(
        open(&folder).load_devices().unwrap(),
        (
            vec![],
            Recovered {
                position: 8,
                high_water_ms: 0
            }
        )
    );
}

#[test]
fn a_position_is_kept_also_when_nothing_else_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let mut batch = store.batch();
    batch.put_position(5);
    store.commit(batch).unwrap();
    drop(store);
    assert_eq!(open(&folder).load_devices().unwrap().1.position, 5);
}

#[test]
fn rows_come_by_day_user_device_epoch_and_sequence_number() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    store.open_day(today.next()).unwrap();
    let mut expected = Vec::new();
    for day in [today, today.next()] {
        for user in [1, 2, 255] {
            for number in [1, 256] {
                for first_seq in [1, 256, 65_536] {
                    expected.push((day, device(user, number), first_seq));
                }
            }
        }
    }
    for (position, (day, id, first_seq)) in expected.iter().rev().enumerate() {
        commit(
            &store,
            position as u64 + 1,
            *day,
            *id,
            &pings(*first_seq, 2),
        )
        .unwrap();
    }
    let found = |rows: Vec<PingRow>| -> Vec<_> {
        rows.into_iter()
            .map(|row| (row.day, row.key.device, row.key.first_seq))
            .collect()
    };
    assert_eq!(found(rows(&store)), expected);

    for user in [2, 255, 9] {
        let user = UserId([user; 16]);
        let of_user: Vec<_> = expected
            .iter()
            .copied()
            .filter(|(_, id, _)| id.user == user)
            .collect();
        let read = store.rows_of(user).collect::<Result<Vec<_>, _>>().unwrap();
        assert_eq!(found(read), of_user);
        let devices = store
            .devices_of(user)
            .map(|device| device.unwrap().0)
            .collect::<BTreeSet<_>>();
        assert_eq!(devices, of_user.iter().map(|(_, id, _)| *id).collect());
    }
}

#[test]
fn days_are_opened_once_and_dropped_with_their_pings() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    assert_eq!(store.days(), [today]);
    store.open_day(today).unwrap();
    store.open_day(today.next()).unwrap();
    store.open_day(today.next()).unwrap();
    commit(&store, 1, today, device(1, 7), &pings(1, 1)).unwrap();
    commit(&store, 2, today.next(), device(1, 7), &pings(2, 1)).unwrap();
    assert_eq!(store.drop_days_before(today), Ok(0));
    assert_eq!(store.drop_days_before(today.next()), Ok(1));
    assert_eq!(store.days(), [today.next()]);
    assert_eq!(rows(&store).len(), 1);
    drop(store);

    let config = StoreConfig {
        retention: Duration::from_secs(2 * 24 * 60 * 60),
        ..StoreConfig::default()
    };
    let at = |days: u64| Store::open(folder.path(), &config, NOW_MS + days * DAY_MS).unwrap();
    assert_eq!(
        rows(&at(2)).len(),
        1,
        "of tomorrow's pings, none is older than a day and a half"
    );
    let store = at(3);
    assert_eq!(
        rows(&store).len(),
        0,
        "opening drops what is past retention"
    );
    assert_eq!(
        store.load_devices().unwrap().0.len(),
        1,
        "dedup state does not expire"
    );
}

#[test]
fn a_second_gateway_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let second = Store::open(folder.path(), &StoreConfig::default(), NOW_MS);
    assert!(
        matches!(second, Err(OpenError::Locked { .. })),
        "{second:?}"
    );
    commit(&store, 1, Day::of_ms(NOW_MS), device(1, 7), &pings(1, 1)).unwrap();
    drop(store);
    assert_eq!(rows(&open(&folder)).len(), 1);
}

#[test]
fn a_reader_beside_the_gateway_sees_what_is_committed() {
    let folder = tempfile::tempdir().unwrap();
    let none = Store::open_read_only(folder.path());
    assert!(matches!(none, Err(OpenError::NoStore { .. })), "{none:?}");
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        0,
        "looking leaves nothing behind"
    );

    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    commit(&store, 1, today, device(1, 7), &pings(1, 4)).unwrap();
    let reader = Store::open_read_only(folder.path()).unwrap();
    assert_eq!(reader.incarnation(), store.incarnation());
    assert_eq!(rows(&reader), rows(&store));
    assert_eq!(reader.load_devices(), store.load_devices());
    assert_eq!(
        commit(&reader, 2, today, device(1, 7), &pings(5, 1)),
        Err(CommitError::ReadOnly)
    );
    assert_eq!(
        reader.drop_days_before(today.next()),
        Err(CommitError::ReadOnly)
    );

    // The reader's files may all be replaced under it, and the gateway goes on as if it was not there.
    commit(&store, 2, today, device(1, 7), &pings(5, 1)).unwrap();
    store
        .db
        .flush_cf(&store.db.cf_handle(&today.family_name()).unwrap())
        .unwrap();
    assert_eq!(rows(&reader).len(), 1);
    let later = Store::open_read_only(folder.path()).unwrap();
    assert_eq!(rows(&later).len(), 2);
    assert_eq!(later.load_devices().unwrap().1.position, 2);
}

#[test]
fn a_store_that_lost_acknowledged_commits_refuses_to_open() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    for position in 1..=100 {
        commit(
            &store,
            position,
            Day::of_ms(NOW_MS),
            device(1, 7),
            &pings(position, 1),
        )
        .unwrap();
    }
    let left = killed(&folder);
    drop(store);
    // The stop wrote the watermark; a kill would have found it up to a second older.
    fs::copy(
        folder.path().join("store/watermark"),
        left.path().join("store/watermark"),
    )
    .unwrap();
    let log = File::options().write(true).open(log_file(&left)).unwrap();
    log.set_len(log.metadata().unwrap().len() / 2).unwrap();

    for attempt in 1..=4 {
        let refused = Store::open(left.path(), &StoreConfig::default(), NOW_MS + attempt);
        let Err(OpenError::BehindWatermark {
            recovered,
            watermark,
            ..
        }) = refused
        else {
            panic!("attempt {attempt}: {refused:?}");
        };
        assert_eq!(watermark, 100);
        assert!((1..100).contains(&recovered), "recovered {recovered}");
    }
    let kept = left.path().join("store").join(recovery(NOW_MS + 1));
    assert!(kept.exists(), "the evidence survives every further attempt");

    fs::remove_file(left.path().join("store/watermark")).unwrap();
    let store = open(&left);
    let (devices, recovered) = store.load_devices().unwrap();
    assert!(recovered.position < 100);
    assert_eq!(
        devices[0].1.settled.floor(),
        recovered.position,
        "pings and dedup state are cut at one commit"
    );
    assert_eq!(rows(&store).len() as u64, recovered.position);
}

#[test]
fn a_vanished_database_or_a_damaged_watermark_is_not_a_new_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    commit(&store, 1, Day::of_ms(NOW_MS), device(1, 7), &pings(1, 1)).unwrap();
    drop(store);
    fs::remove_dir_all(folder.path().join("store/rocksdb")).unwrap();
    let refused = Store::open(folder.path(), &StoreConfig::default(), NOW_MS);
    assert!(
        matches!(
            refused,
            Err(OpenError::BehindWatermark {
                recovered: 0,
                watermark: 1,
                ..
            })
        ),
        "{refused:?}"
    );
    assert!(
        !folder.path().join("store/rocksdb").exists(),
        "no new store stands where the old one is to be put back"
    );
    fs::write(folder.path().join("store/watermark"), "1").unwrap();
    let refused = Store::open(folder.path(), &StoreConfig::default(), NOW_MS);
    assert!(
        matches!(refused, Err(OpenError::Watermark { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_failed_commit_is_final() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    commit(&store, 1, today, device(1, 7), &pings(1, 1)).unwrap();
    let failure = CommitError::DayNotOpen(today.next());
    assert_eq!(
        commit(&store, 2, today.next(), device(1, 7), &pings(2, 1)),
        Err(failure.clone())
    );
    assert_eq!(
        commit(&store, 2, today, device(1, 7), &pings(2, 1)),
        Err(failure.clone())
    );
    assert_eq!(store.open_day(today.next()), Err(failure));
    drop(store);
    let store = open(&folder);
    assert_eq!(
        store.load_devices().unwrap().0,
        [(device(1, 7), record(1, 1))],
        "nothing of the failed batch is there"
    );
    let log = fs::read_dir(folder.path().join("store")).unwrap();
    let kept = log
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("recovery-")
        })
        .count();
    assert_eq!(kept, 1, "a stop after a failure is not an orderly one");
}

#[test]
fn damaged_rows_are_reported_with_their_keys() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    commit(&store, 1, today, device(1, 7), &pings(1, 1)).unwrap();
    let key = keys::device_key(&device(1, 8));
    store
        .db
        .put_cf(&store.family(DEVICES), key, b"\x01\xff")
        .unwrap();
    let error = store.load_devices().unwrap_err();
    let expected = ReadError::Value {
        family: DEVICES.to_owned(),
        key: hex(&key),
        source: RecordError::Malformed,
    };
    assert_eq!(error, expected);

    let family = store.db.cf_handle(&today.family_name()).unwrap();
    store
        .db
        .put_cf(
            &family,
            b"short",
            record::encode_pings(1, 1, &batch::encode(1, &pings(1, 1)).encode_to_vec()),
        )
        .unwrap();
    store.db.put_cf(&family, [0; 32], b"").unwrap();
    let errors: Vec<_> = store.rows().filter_map(Result::err).collect();
    let day = today.family_name();
    assert_eq!(
        errors,
        [
            ReadError::Value {
                family: day.clone(),
                key: hex(&[0; 32]),
                source: RecordError::Empty
            },
            ReadError::Key {
                family: day,
                key: hex(b"short")
            },
        ]
    );
}

#[test]
fn what_a_later_version_wrote_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store
        .db
        .create_cf("sealed", &Settings::reader().unwrap().meta)
        .unwrap();
    drop(store);
    let refused = Store::open(folder.path(), &StoreConfig::default(), NOW_MS);
    assert!(
        matches!(&refused, Err(OpenError::UnknownFamily { name, .. }) if name == "sealed"),
        "{refused:?}"
    );

    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store
        .db
        .put_cf(
            &store.family(META),
            facts::META_FORMAT,
            (facts::FORMAT + 1).to_be_bytes(),
        )
        .unwrap();
    drop(store);
    for refused in [
        Store::open(folder.path(), &StoreConfig::default(), NOW_MS),
        Store::open_read_only(folder.path()),
    ] {
        assert!(
            matches!(refused, Err(OpenError::LaterFormat { found, .. }) if found == facts::FORMAT + 1),
            "{refused:?}"
        );
    }
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = Store::open(&file, &StoreConfig::default(), NOW_MS);
    assert!(
        matches!(refused, Err(OpenError::Folder { .. })),
        "{refused:?}"
    );
    assert!(refused.unwrap_err().to_string().contains("file/store"));
}

#[test]
fn damage_in_a_table_file_is_refused_or_reported() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    for position in 1..=50 {
        commit(&store, position, today, device(1, 7), &pings(position, 1)).unwrap();
    }
    store
        .db
        .flush_cf(&store.db.cf_handle(&today.family_name()).unwrap())
        .unwrap();
    let table = store
        .db
        .live_files()
        .unwrap()
        .into_iter()
        .find(|file| file.column_family_name == today.family_name());
    drop(store);
    let table = folder
        .path()
        .join("store/rocksdb")
        .join(table.unwrap().name.trim_start_matches('/'));
    let mut bytes = fs::read(&table).unwrap();
    bytes[20] ^= 1;
    fs::write(&table, bytes).unwrap();
    let store = open(&folder);
    let error = store.rows().find_map(Result::err);
    assert!(matches!(error, Some(ReadError::RocksDb(_))), "{error:?}");
}

#[test]
fn statistics_are_those_of_this_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    let before = store.statistics();
    for position in 1..=20 {
        commit(&store, position, today, device(1, 7), &pings(position, 1)).unwrap();
    }
    let after = store.statistics();
    assert!(
        before.wal_syncs + 20 <= after.wal_syncs,
        "every commit is synced: {before:?} {after:?}"
    );
    assert!(before.wal_sync_time < after.wal_sync_time);
    assert!(before.size_bytes < after.size_bytes);
    let is_calm = |figures: Statistics| {
        !figures.is_write_stopped
            && figures.delayed_write_bytes_per_second == 0
            && figures.background_errors == 0
    };
    assert!(is_calm(after), "{after:?}");
    let log_bytes = store.folder.log_bytes();
    store
        .db
        .flush_cf(&store.db.cf_handle(&today.family_name()).unwrap())
        .unwrap();
    assert!(
        log_bytes < store.statistics().size_bytes,
        "table files count as well"
    );
    for name in [IS_WRITE_STOPPED, ACTUAL_DELAYED_WRITE_RATE] {
        assert!(
            store.db.property_int_value(name).unwrap().is_some(),
            "{name:?}"
        );
    }
    for name in [
        LIVE_SST_FILES_SIZE,
        ESTIMATE_PENDING_COMPACTION_BYTES,
        NUM_IMMUTABLE_MEM_TABLE,
        BACKGROUND_ERRORS,
    ] {
        assert!(
            store
                .db
                .property_int_value_cf(&store.family(DEVICES), name)
                .unwrap()
                .is_some(),
            "{name:?}"
        );
    }
}

#[test]
fn nothing_that_is_shown_of_a_store_holds_its_secret() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let shown = format!("{store:?} {store:#?}");
    assert!(!shown.contains("token"), "{shown}");
}

/// It used to wait for ever: the family `meta` alone could fill all the memory that there was, and nothing
/// made it flush.
#[test]
fn commits_go_on_with_the_least_memory_that_can_be_configured() {
    const COMMITS: u64 = 1_000;
    let folder = tempfile::tempdir().unwrap();
    let config = StoreConfig {
        memtable_mib: std::num::NonZeroU32::MIN,
        wal_mib: std::num::NonZeroU32::MIN,
        ..StoreConfig::default()
    };
    let (done, is_done) = std::sync::mpsc::channel();
    let path = folder.path().to_owned();
    std::thread::spawn(move || {
        let store = Store::open(&path, &config, NOW_MS).unwrap();
        let today = Day::of_ms(NOW_MS);
        for position in 1..=COMMITS {
            let first = 1 + (position - 1) * 100;
            commit(&store, position, today, device(1, 1), &pings(first, 100)).unwrap();
        }
        drop(store);
        done.send(()).unwrap();
    });
    // Only a hang takes this long.
    let patience = Duration::from_secs(300);
    is_done.recv_timeout(patience).expect("all commits end");
    let store = Store::open_read_only(folder.path()).unwrap();
    assert_eq!(rows(&store).len() as u64, COMMITS);
}

/// All bytes of all files of a folder and those in it.
fn all_bytes(folder: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            bytes.extend(all_bytes(&path));
        } else {
            bytes.extend(fs::read(path).unwrap());
        }
    }
    bytes
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// The key and the value of each row of a day, as RocksDB has them.
fn raw_rows(store: &Store, day: Day) -> Vec<[Box<[u8]>; 2]> {
    let family = store.db.cf_handle(&day.family_name()).unwrap();
    let rows = store.db.iterator_cf(&family, IteratorMode::Start);
    rows.map(Result::unwrap).map(<[_; 2]>::from).collect()
}

fn put_raw(store: &Store, day: Day, key: &[u8], value: &[u8]) {
    let family = store.db.cf_handle(&day.family_name()).unwrap();
    store.db.put_cf(&family, key, value).unwrap();
}

fn files_of_keys(folder: &TempDir) -> Vec<PathBuf> {
    let files = fs::read_dir(folder.path().join("keys"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    files
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "keys")
        })
        .collect()
}

#[test]
fn no_stored_ping_can_be_seen_in_any_file() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    // A course that no part of looks like anything else.
    let mut course = pings(1, 40);
    for (at, ping) in (1_i32..).zip(&mut course) {
        ping.latitude_e7 += at.wrapping_mul(0x1234_5677) % 1_000_000;
        ping.longitude_e7 += at.wrapping_mul(0x0765_4321) % 1_000_000;
    }
    let columns = batch::encode(1, &course).encode_to_vec();
    let is_telling = |part: &&[u8]| BTreeSet::from_iter(*part).len() == 8;
    let telling: Vec<_> = columns.windows(8).filter(is_telling).collect();
    assert!(10 < telling.len(), "{}", telling.len());
    let flush = || {
        let family = store.db.cf_handle(&today.family_name()).unwrap();
        store.db.flush_cf(&family).unwrap();
    };
    commit(&store, 1, today, device(1, 7), &course).unwrap();
    assert_eq!(rows(&store)[0].record.pings, course);
    let in_log = all_bytes(folder.path());
    flush();
    let in_table = all_bytes(folder.path());
    for bytes in [&in_log, &in_table] {
        assert!(telling.iter().all(|part| !has(bytes, part)));
    }
    // The negative control: a row as they were before they were sealed.
    let key = PingKey {
        device: device(1, 7),
        epoch: 2,
        first_seq: 1,
    };
    let value = record::encode_pings(NOW_MS, 2, &columns);
    put_raw(&store, today, &key.to_bytes(), &value);
    assert!(has(&all_bytes(folder.path()), telling[0]));
    flush();
    assert!(has(&all_bytes(folder.path()), telling[0]));
}

#[test]
fn rows_from_before_sealing_are_read_beside_sealed_ones() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    let old = PingKey {
        device: device(1, 7),
        epoch: 1,
        first_seq: 1,
    };
    let columns = batch::encode(1, &pings(1, 3)).encode_to_vec();
    let value = record::encode_pings(NOW_MS, 1, &columns);
    put_raw(&store, today, &old.to_bytes(), &value);
    commit(&store, 2, today, device(1, 7), &pings(4, 2)).unwrap();
    let formats: Vec<_> = raw_rows(&store, today)
        .iter()
        .map(|[_, value]| value[0])
        .collect();
    assert_eq!(formats, [1, 2]);
    let found: Vec<_> = rows(&store)
        .into_iter()
        .map(|row| row.record.pings)
        .collect();
    assert_eq!(found, [pings(1, 3), pings(4, 2)]);
}

#[test]
fn a_sealed_row_that_was_changed_or_moved_is_said_to_be_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    store.open_day(today.next()).unwrap();
    commit(&store, 1, today, device(1, 7), &pings(1, 1)).unwrap();
    commit(&store, 2, today, device(2, 7), &pings(1, 1)).unwrap();
    let [[key, value], [others, _]] = &raw_rows(&store, today)[..] else {
        panic!("two rows");
    };
    let damaged = |user: u8| {
        let mut rows = store.rows_of(UserId([user; 16]));
        rows.any(|row| matches!(row, Err(ReadError::Value { .. })))
    };
    assert!(!damaged(1) && !damaged(2));
    for at in 0..value.len() {
        let mut changed = value.clone();
        changed[at] ^= 0x10;
        put_raw(&store, today, key, &changed);
        assert!(damaged(1), "byte {at}");
    }
    put_raw(&store, today, key, value);
    assert!(!damaged(1));
    put_raw(&store, today, others, value);
    assert!(damaged(2), "under another user's key");
    put_raw(&store, today.next(), key, value);
    assert!(damaged(1), "on another day");
}

/// A store of what the checkpoint of another one holds.
fn of_checkpoint(store: &TempDir) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("store")).unwrap();
    let from = checkpoint_in(store.path());
    fs::rename(from, folder.path().join("store/rocksdb")).unwrap();
    folder
}

#[test]
fn a_checkpoint_has_every_row_of_its_commits_while_days_turn() {
    for _ in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                // As often as can be: each row is the first of its day.
                let mut day = Day::of_ms(NOW_MS);
                for number in 1..=60_u8 {
                    day = day.next();
                    store.open_day(day).unwrap();
                    let user = device(number, 7);
                    commit(&store, number.into(), day, user, &pings(1, 1)).unwrap();
                }
            });
            let mut is_last = false;
            while !is_last {
                is_last = writer.is_finished();
                let noted = store.checkpoint().unwrap();
                let copy = of_checkpoint(&folder);
                let copy = Store::open_read_only(copy.path()).unwrap();
                let position = copy.last_position().unwrap();
                assert!(noted.position <= position);
                assert_eq!(copy.device_ids().count() as u64, position);
                let sealed = |row: &Result<_, _>| matches!(row, Err(ReadError::Sealed { .. }));
                let rows = copy.rows().filter(sealed).count() as u64;
                assert_eq!(rows, position, "rows without a family");
            }
        });
        assert!(store.checkpoint().unwrap().position == 60);
    }
}

#[test]
fn a_user_whose_key_was_destroyed_cannot_be_read_again_and_all_others_can() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    for user in 1..=3 {
        commit(&store, user.into(), today, device(user, 7), &pings(1, 2)).unwrap();
    }
    // As a backup of the store has it.
    let backup = killed(&folder);
    fs::remove_dir_all(backup.path().join("keys")).unwrap();
    assert_eq!(store.destroy_key(&UserId([2; 16]), 7), Ok(true));
    assert_eq!(store.destroy_key(&UserId([2; 16]), 7), Ok(false));
    let left = killed(&folder);
    fs::create_dir(backup.path().join("keys")).unwrap();
    for file in files_of_keys(&left) {
        let name = file.file_name().unwrap();
        fs::copy(&file, backup.path().join("keys").join(name)).unwrap();
    }
    for store in [&store, &open(&left), &open(&backup)] {
        for user in [1, 3] {
            let mut rows = store.rows_of(UserId([user; 16]));
            assert_eq!(rows.next().unwrap().unwrap().record.pings, pings(1, 2));
        }
        let mut rows = store.rows_of(UserId([2; 16]));
        let row = rows.next().unwrap();
        assert!(matches!(row, Err(ReadError::Sealed { .. })), "{row:?}");
    }
    commit(&store, 4, today, device(2, 7), &pings(9, 1)).unwrap();
    let rows: Vec<_> = store.rows_of(UserId([2; 16])).collect();
    assert!(matches!(rows[0], Err(ReadError::Value { .. })));
    assert_eq!(rows[1].as_ref().unwrap().record.pings, pings(9, 1));
}

/// A time that looks like no other, and how it is written in a row.
fn telling(number: u64) -> (u64, Vec<u8>) {
    let time_ms = 1_790_000_000_000 + number * 0x1_2345_6789;
    let mut written = Vec::new();
    prost::encoding::encode_varint(time_ms, &mut written);
    (time_ms, written)
}

/// One commit with a row of each kind that is kept of a user, and the times in them as they are written: first those of
/// the user, then that of a span of coverage, which is nobody's.
fn of_every_kind(store: &Store, user: UserId) -> Vec<Vec<u8>> {
    use crate::{
        bulletin::News,
        coverage::{Reason, Span},
        deadlines::{Change, Checker, Event, Kind, Late, Registration, Setting},
        grants::{CheckerSet, Decisions},
        sharing::{Sharing, Transition, Turn},
    };

    let mut written = Vec::new();
    let mut time_ms = || {
        let (time_ms, bytes) = telling(written.len() as u64 + 1);
        written.push(bytes);
        time_ms
    };
    let (checker, position) = (Checker([7; 16]), 5);
    let mut batch = store.batch();
    let mut device = record(position, 3);
    device.clocks = Clocks {
        last_contact_ms: time_ms(),
        last_sample_ms: time_ms(),
        last_fix_ms: time_ms(),
        durable_ms: time_ms(),
    };
    batch.put_device(&DeviceId { user, device: 7 }, &device);
    let mut decisions = Decisions::default();
    let mut checkers = store.load_checkers().unwrap();
    let ops = checkers.enrol("ops").unwrap().unwrap();
    decisions.grant(ops, CheckerSet::default(), time_ms());
    batch.put_decisions(user, &decisions);
    let paused = Transition {
        user,
        turn: Turn::Sharing(Sharing::Paused),
        checkers: CheckerSet::ALL,
        at_ms: time_ms(),
        position,
        number: 0,
    };
    let late = Late {
        position,
        at_ms: time_ms(),
        last_contact_ms: time_ms(),
        due_ms: time_ms(),
    };
    let deadline = Registration {
        checker,
        user,
        setting: Setting {
            expect_every_ms: 60_000,
            grace_ms: 1,
        },
        since_ms: time_ms(),
        late: Some(late),
    };
    let event = Event {
        checker,
        user,
        kind: Kind::Late,
        position,
        at_ms: time_ms(),
        last_contact_ms: time_ms(),
        due_ms: time_ms(),
    };
    let span = Span {
        from_ms: NOW_MS,
        until_ms: Some(time_ms()),
        reason: Reason::Down,
        position,
    };
    batch.put_news(&News {
        coverage: Some(store.load_coverage().unwrap().change(vec![span])),
        deadlines: vec![Change::Set(deadline), Change::Event(event)],
        transitions: vec![paused],
    });
    store.commit(batch).unwrap();
    written
}

/// How much there is to read of one user, of each kind.
fn kinds(store: &Store, user: UserId) -> [usize; 6] {
    let deadlines = store.load_deadlines().unwrap().registrations;
    let checker = crate::deadlines::Checker([7; 16]);
    let transitions = store.transitions(0..u64::MAX, 99).unwrap();
    [
        store.load_devices().unwrap().0.len(),
        store.load_holders().unwrap().withheld.len(),
        store.load_decisions().unwrap().len(),
        transitions.iter().filter(|turn| turn.user == user).count(),
        deadlines.iter().filter(|kept| kept.user == user).count(),
        store.events_of(checker, 0..u64::MAX, 99).unwrap().len(),
    ]
}

#[test]
fn whatever_is_kept_of_a_user_is_in_no_file_in_clear_and_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let user = UserId([3; 16]);
    let written = of_every_kind(&store, user);
    let (of_nobody, of_user) = written.split_last().unwrap();
    // The newest rows are in the log, as they were written.
    let left = killed(&folder);
    let bytes = all_bytes(left.path());
    for (number, part) in of_user.iter().enumerate() {
        assert!(!has(&bytes, part), "time {number} of the user");
    }
    assert!(has(&bytes, of_nobody), "the control of the search");
    for store in [store, open(&left)] {
        assert_eq!(kinds(&store, user), [1; 6]);
        let (id, device) = store.devices().next().unwrap().unwrap();
        assert_eq!((id.user, device.clocks.last_fix_ms), (user, telling(3).0));
    }

    // The control of the rest: the same row in clear, as it was written before rows were sealed, is found and read.
    let store = open(&left);
    let key = keys::device_key(&device(4, 1));
    let mut value = Vec::new();
    let mut clear = record(6, 3);
    clear.clocks.last_contact_ms = telling(99).0;
    record::encode_device(&clear, &mut value);
    let devices = store.family(DEVICES);
    store.db.put_cf(&devices, key, &value).unwrap();
    assert!(has(&all_bytes(left.path()), &telling(99).1));
    assert_eq!(
        store.devices_of(UserId([4; 16])).next().unwrap().unwrap().1,
        clear
    );
}

/// Between the end of the key and that of the rows, and after a folder was put back by hand.
#[test]
fn what_is_sealed_of_an_erased_user_is_passed_over_and_of_anybody_else_it_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let user = UserId([3; 16]);
    of_every_kind(&store, user);
    drop(store);
    let lost = killed(&folder);
    let store = open(&folder);
    assert!(store.destroy_key(&user, NOW_MS).unwrap());
    drop(store);
    for _ in 0..2 {
        let store = open(&folder);
        assert_eq!(kinds(&store, user), [0; 6]);
        assert_eq!(store.decisions_of(user).unwrap(), Default::default());
        let checker = crate::deadlines::Checker([7; 16]);
        assert_eq!(store.expected().unwrap(), [(checker, user)]);
        // All of it is still there to be removed.
        assert_eq!(store.count_user(user).unwrap().devices, 1);
        assert_eq!(store.events_of_user(user).unwrap().len(), 4);
        assert_eq!(store.count_withheld().unwrap().paused, 1);
    }

    // The control: without the list of the erased nobody knows why the key is not there, and dedup cannot go on.
    fs::remove_dir_all(lost.path().join("keys")).unwrap();
    let without = Store::open_read_only(lost.path()).unwrap();
    let expected = ReadError::SealedRow {
        family: DEVICES.to_owned(),
        user,
    };
    assert_eq!(without.load_devices().unwrap_err(), expected);
    assert!(without.load_holders().is_err() && without.load_decisions().is_err());
    assert!(without.load_deadlines().is_err() && without.transitions(0..9, 9).is_err());
    assert_eq!(without.held_of(user).unwrap(), Held::Something);
}

#[test]
fn a_reader_has_all_that_was_committed_before_though_the_log_moves_to_tables_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let committed = std::sync::atomic::AtomicU64::new(0);
    let order = std::sync::atomic::Ordering::SeqCst;
    let is_done = || committed.load(order) == 250;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1..=250_u8 {
                let user = device(number, 7);
                commit(
                    &store,
                    number.into(),
                    Day::of_ms(NOW_MS),
                    user,
                    &pings(1, 1),
                )
                .unwrap();
                committed.store(number.into(), order);
                store.flush(true).unwrap();
            }
        });
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_done() {
                    let before = committed.load(order);
                    // That it cannot be opened just now may be, and is said.
                    let reader = match Store::open_without_keys(folder.path()) {
                        Err(OpenError::Damaged { .. } | OpenError::RocksDb { .. }) => continue,
                        opened => opened.unwrap(),
                    };
                    let found = reader.device_ids().count() as u64;
                    assert!(before <= found, "{found} of {before}");
                }
            });
        }
    });
}

/// As it was before transitions were sealed: in clear, and with the user in the value.
#[test]
fn a_store_of_the_first_format_is_read_and_an_earlier_version_is_told_when_it_is_no_more() {
    use crate::sharing::{Sharing, Turn};

    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let (user, order) = (UserId([3; 16]), [0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0]);
    let paused = [&b"\x01\x0a\x10"[..], &user.0, b"\x10\x02\x18\x09"].concat();
    let put = |family: &str, key: &[u8], value: &[u8]| {
        store.db.put_cf(&store.family(family), key, value).unwrap();
    };
    put(TRANSITIONS, &order, &paused);
    put(META, facts::META_FORMAT, &1_u32.to_be_bytes());
    drop(store);
    let reader = Store::open_read_only(folder.path()).unwrap();
    let read = reader.transitions(0..9, 9).unwrap();
    let expected = Turn::Sharing(Sharing::Paused);
    assert_eq!(
        (read.len(), read[0].user, read[0].turn),
        (1, user, expected)
    );
    let format = |store: &Store| {
        let format = store.db.get_cf(&store.family(META), facts::META_FORMAT);
        format.unwrap().unwrap()
    };
    assert_eq!(format(&reader), 1_u32.to_be_bytes());
    drop(reader);
    let store = open(&folder);
    assert_eq!(format(&store), facts::FORMAT.to_be_bytes());
    of_every_kind(&store, user);
    assert_eq!(store.transitions(0..9, 9).unwrap().len(), 2);
    assert_eq!(store.events_of_user(user).unwrap().len(), 5);
    let mut batch = store.batch();
    batch.forget_transitions(7);
    store.commit(batch).unwrap();
    assert_eq!(store.transitions(0..9, 9).unwrap(), []);
}

#[test]
fn no_key_of_a_committed_row_is_lost_wherever_a_crash_cuts_the_keys() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    commit(&store, 1, today, device(1, 7), &pings(1, 1)).unwrap();
    commit(&store, 2, today, device(2, 7), &pings(1, 1)).unwrap();
    let file = &files_of_keys(&folder)[0];
    let synced = fs::read(file).unwrap();
    // A third user's key was on its way, and the commit that it is for was not begun.
    let committed = killed(&folder);
    commit(&store, 3, today, device(3, 7), &pings(1, 1)).unwrap();
    let longer = fs::read(file).unwrap();
    let in_copy = &files_of_keys(&committed)[0];
    // At every byte in the test of the keys themselves.
    for length in [0, 1, 4, 20, longer.len() - synced.len() - 1] {
        let length = synced.len() + length;
        fs::write(in_copy, &longer[..length]).unwrap();
        assert_eq!(rows(&open(&committed)).len(), 2, "cut at {length}");
    }
    // The negative control: with less than that, it is said what is missing.
    for length in [0, synced.len() / 2, synced.len() - 1] {
        fs::write(in_copy, &synced[..length]).unwrap();
        let refused = Store::open(committed.path(), &StoreConfig::default(), NOW_MS);
        assert!(matches!(refused, Err(OpenError::Keys(_))), "{refused:?}");
    }
    fs::remove_file(in_copy).unwrap();
    let refused = Store::open(committed.path(), &StoreConfig::default(), NOW_MS);
    let missing = matches!(
        refused,
        Err(OpenError::Keys(KeyError::Missing { needed: 2, .. }))
    );
    assert!(missing, "{refused:?}");
}

#[test]
fn a_key_that_cannot_be_written_is_as_final_as_a_failed_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let today = Day::of_ms(NOW_MS);
    fs::remove_dir_all(folder.path().join("keys")).unwrap();
    let failed = commit(&store, 1, today, device(1, 7), &pings(1, 1)).unwrap_err();
    assert!(matches!(failed, CommitError::Keys(_)), "{failed}");
    fs::create_dir(folder.path().join("keys")).unwrap();
    let again = commit(&store, 1, today, device(1, 7), &pings(1, 1));
    assert_eq!(again, Err(failed));
    assert!(rows(&store).is_empty());
}

#[test]
fn a_store_without_its_own_master_key_refuses_to_open_and_makes_none() {
    let folder = tempfile::tempdir().unwrap();
    commit(
        &open(&folder),
        1,
        Day::of_ms(NOW_MS),
        device(1, 7),
        &pings(1, 1),
    )
    .unwrap();
    let master = folder.path().join("master.key");
    let key = fs::read(&master).unwrap();
    fs::remove_file(&master).unwrap();
    let refused = Store::open(folder.path(), &StoreConfig::default(), NOW_MS);
    assert!(
        matches!(refused, Err(OpenError::MasterKeyMissing { .. })),
        "{refused:?}"
    );
    assert!(!master.exists());
    fs::write(&master, "00".repeat(32)).unwrap();
    let refused = Store::open(folder.path(), &StoreConfig::default(), NOW_MS);
    let is_said = matches!(refused, Err(OpenError::Keys(KeyError::OtherMaster { .. })));
    assert!(is_said, "{refused:?}");
    fs::write(&master, key).unwrap();
    assert_eq!(rows(&open(&folder)).len(), 1);
}

#[test]
fn a_claim_keeps_writers_out_until_it_is_dropped_and_readers_never() {
    let folder = TempDir::new().unwrap();
    let error = Store::claim(folder.path()).unwrap_err();
    assert!(matches!(error, OpenError::NoStore { .. }), "{error}");
    let store = open(&folder);
    let error = Store::claim(folder.path()).unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    drop(store);
    let claim = Store::claim(folder.path()).unwrap();
    let error = Store::open(folder.path(), &StoreConfig::default(), NOW_MS).err();
    assert!(matches!(error, Some(OpenError::Locked { .. })), "{error:?}");
    drop(Store::open_read_only(folder.path()).unwrap());
    drop(claim);
    open(&folder);
}

#[test]
fn what_is_held_of_a_user_is_known_from_the_first_row_to_the_fence() {
    use crate::{
        bulletin::News, deadlines::Said, erase::Erasure, grants::CheckerSet, sharing::Transition,
    };

    let folder = TempDir::new().unwrap();
    let store = open(&folder);
    let user = UserId([1; 16]);
    assert_eq!(store.held_of(user).unwrap(), Held::Nothing);
    let day = Day::of_ms(NOW_MS);
    commit(&store, 1, day, device(1, 1), &pings(1, 1)).unwrap();
    assert_eq!(store.held_of(user).unwrap(), Held::Something);
    assert_eq!(store.held_of(UserId([2; 16])).unwrap(), Held::Nothing);
    let mut batch = store.batch();
    let said = Said {
        position: 2,
        at_ms: NOW_MS,
    };
    let fence = Transition::erased(user, CheckerSet::ALL, said);
    batch.put_news(&News {
        transitions: vec![fence],
        ..News::default()
    });
    store.commit(batch).unwrap();
    let begun = Erasure::begun_by(&fence);
    assert_eq!(store.held_of(user).unwrap(), Held::Erased(begun));
}
