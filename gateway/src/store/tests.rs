//! The store against a real RocksDB in temporary folders.

use std::fs::{self, File};

use prost::Message;
use tempfile::TempDir;
use waypost_proto::{
    batch,
    device::Clocks,
    ping::{Ping, Source},
};

use super::*;

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// 2026-08-20, at noon.
const NOW_MS: u64 = 20_685 * DAY_MS + DAY_MS / 2;

fn open(folder: &TempDir) -> Store {
    Store::open(folder.path(), &StoreConfig::default(), NOW_MS).unwrap()
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
    let kept = left
        .path()
        .join("store")
        .join(format!("recovery-{NOW_MS}"))
        .join(name);
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
        retention: Duration::from_secs(24 * 60 * 60),
        ..StoreConfig::default()
    };
    let at = |days: u64| Store::open(folder.path(), &config, NOW_MS + days * DAY_MS).unwrap();
    assert_eq!(
        rows(&at(2)).len(),
        1,
        "tomorrow's pings are within retention the day after"
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
    let kept = left
        .path()
        .join("store")
        .join(format!("recovery-{}", NOW_MS + 1));
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
        .put_cf(&store.family(META), META_FORMAT, 2_u32.to_be_bytes())
        .unwrap();
    drop(store);
    for refused in [
        Store::open(folder.path(), &StoreConfig::default(), NOW_MS),
        Store::open_read_only(folder.path()),
    ] {
        assert!(
            matches!(refused, Err(OpenError::LaterFormat { found: 2, .. })),
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
