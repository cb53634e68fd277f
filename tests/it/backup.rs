//! Backups: made beside a gateway at work, put back as what they were, and never a way around an erasure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use serde_json::Value;
use waypost_gateway::store::Store;
use waypost_proto::{
    batch,
    ping::Ping,
    session::{CloseCode, Lane},
    v1::{
        self, State, WatchRequest, control, device_frame, gateway_frame, reset, watch_event::Kind,
    },
};
use waypost_tests::{
    Device, Process, World,
    audit::{Fault, Snapshot},
    binary,
    files::{all_bytes, has, has_rows_of, telling_parts, written_times},
    fleet::Fleet,
    hello,
    ledger::{Acked, digest},
    link::Returning,
    ping, stored_seqs, telling_pings, within_minutes,
};

/// Runs a command that prints JSON. What it says otherwise is the error.
fn waypost(command: &str, options: &[(&str, &Path)]) -> Result<Value, String> {
    let mut program = Command::new(binary("waypost"));
    program.arg(command).arg("--json");
    for (option, value) in options {
        program.arg(option).arg(value);
    }
    let output = program.output().unwrap();
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).unwrap());
    }
    Err(String::from_utf8(output.stderr).unwrap())
}

fn backup(data_dir: &Path, to: &Path) -> Value {
    waypost("backup", &[("--data", data_dir), ("--to", to)]).unwrap()
}

fn restore(from: &Path, data_dir: &Path) -> Result<Value, String> {
    waypost("restore", &[("--from", from), ("--data", data_dir)])
}

/// The disk that the store was on is gone; keys, audit log and certificates are not.
fn lose_store(data_dir: &Path) {
    fs::remove_dir_all(data_dir.join("store")).unwrap();
}

/// Another data folder, with the master key and nothing else.
fn another(data_dir: &Path, place: PathBuf) -> PathBuf {
    fs::create_dir(&place).unwrap();
    fs::copy(data_dir.join("master.key"), place.join("master.key")).unwrap();
    place
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &to);
        } else {
            fs::copy(path, to).unwrap();
        }
    }
}

fn named(acked: &Acked, gateway: &Process) -> String {
    let device = gateway.device(acked.device).id;
    format!("{device} epoch {} number {}", acked.epoch, acked.seq)
}

/// What is stored, by name, and how often each sample is there, under whatever number.
fn stored(held: &Snapshot) -> (BTreeMap<String, u64>, usize) {
    let (mut by_name, mut samples) = (BTreeMap::new(), BTreeMap::<_, usize>::new());
    for row in &held.rows {
        for ping in &row.record.pings {
            let key = &row.key;
            let name = format!("{} epoch {} number {}", key.device, key.epoch, ping.seq);
            assert_eq!(by_name.insert(name, digest(ping)), None);
            let sample = (key.device, Ping { seq: 0, ..*ping });
            *samples.entry(format!("{sample:?}")).or_default() += 1;
        }
    }
    let twice = samples.values().filter(|&&times| 1 < times).count();
    (by_name, twice)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_has_all_that_was_acknowledged_and_what_is_lost_comes_again_once() {
    // So that tables are flushed and compacted, and logs begun, while it is made.
    let small = [
        ("WAYPOST_STORE_MEMTABLE_MIB", "1"),
        ("WAYPOST_STORE_WAL_MIB", "1"),
    ];
    let mut gateway = Process::start(&small).await;
    let (data_dir, to) = (gateway.data_dir().to_owned(), gateway.scratch("backups"));
    let mut fleet = Fleet::new(&gateway, 20_261_126);
    let mut acked_before = 0;
    for number in 1..=3 {
        fleet.work_until_acked(&gateway, 200).await;
        acked_before = fleet.acked().len();
        let places = (data_dir.clone(), to.clone());
        let made = tokio::task::spawn_blocking(move || backup(&places.0, &places.1));
        fleet.work_until(&gateway, || made.is_finished()).await;
        let made = made.await.unwrap();
        assert_eq!(made["backup"], number);
        let is_first = number == 1;
        let has_old_files = made["new_files"].as_u64() < made["files"].as_u64();
        assert!(is_first || has_old_files, "{made}");
        assert!(!data_dir.join("store/checkpoint").exists());
    }
    // All of this is lost.
    fleet.work_until_acked(&gateway, 200).await;
    gateway.kill();
    let acked = fleet.acked();
    lose_store(&data_dir);
    let restored = restore(&to, &data_dir).unwrap();
    assert_eq!(restored["backup"], 3);

    let held = Snapshot::of(&data_dir);
    let (by_name, twice) = stored(&held);
    assert_eq!(twice, 0);
    assert_eq!(restored["pings"], by_name.len());
    let is_there = |line: &Acked| {
        let found = by_name.get(&named(line, &gateway));
        assert!(found.is_none_or(|&found| found == line.digest));
        // What is refused for ever is settled and not stored.
        let survivor = &fleet.survivors()[line.device as usize - 1];
        let refused = survivor.sent()[&(line.epoch, line.seq)].time_ms > 7_000_000_000_000;
        found.is_some() || refused
    };
    assert!(acked[..acked_before].iter().all(is_there));
    let lost = acked.iter().filter(|line| !is_there(line));
    let lost: Vec<_> = lost
        .flat_map(|line| {
            let (seq, device) = (line.seq, gateway.device(line.device).id);
            // As a hole that the device has closed, if it went on in its epoch.
            let closed = format!("{seq} of {device} is settled and not stored");
            [named(line, &gateway), closed]
        })
        .collect();
    assert!(
        !lost.is_empty(),
        "the control: what came after the backup is not in it"
    );

    // The first audit says what is lost; from there on nothing else may be missing, twice or made up.
    fleet.audit(&gateway);
    gateway.restart().await;
    fleet.work_until_acked(&gateway, 200).await;
    fleet.hand_over(&gateway).await;
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let (_, faults) = fleet.audit(&gateway);
    let is_of_lost = |text: &String| lost.iter().any(|name| text.starts_with(name.as_str()));
    let unexpected = faults.iter().filter(|fault| match fault {
        Fault::Lost(text) | Fault::Dedup(text) | Fault::Position(text) => !is_of_lost(text),
        // That is how a device is told.
        Fault::Told(text) => !text.contains("was taken away"),
        _ => true,
    });
    assert_eq!(unexpected.collect::<Vec<_>>(), Vec::<&Fault>::new());
    let (_, twice) = stored(fleet.held());
    assert_eq!(twice, 0, "under whatever number");
}

/// One stream up to a position: what came, and the token.
async fn watched(gateway: &Process, token: Bytes, upto: u64) -> (Vec<Kind>, Bytes) {
    let mut checker = gateway.checker().await;
    let request = WatchRequest {
        token,
        ..WatchRequest::default()
    };
    let watching = async {
        let mut stream = checker.watch(request).await.unwrap().into_inner();
        let mut came = Vec::new();
        loop {
            for event in stream.message().await.unwrap().unwrap().events {
                match event.kind.unwrap() {
                    Kind::Progress(progress) if upto <= progress.position => {
                        return (came, progress.token);
                    }
                    kind => came.push(kind),
                }
            }
        }
    };
    within_minutes(watching).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checker_of_the_lost_store_begins_anew_and_is_told_no_silence_of_what_is_lost() {
    let mut gateway = Process::start(&[]).await;
    let (data_dir, to) = (gateway.data_dir().to_owned(), gateway.scratch("backups"));
    let device = gateway.device(1);
    let mut live = gateway
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    let kept = live.ack().await;
    let (_, before) = watched(&gateway, Bytes::new(), kept.position).await;
    backup(&data_dir, &to);
    live.send_pings(epoch, &[ping(2)]).await;
    let lost = live.ack().await;
    let (_, after) = watched(&gateway, Bytes::new(), lost.position).await;
    // The control: both tokens are good for the store that issued them.
    for token in [&before, &after] {
        let (came, _) = watched(&gateway, token.clone(), lost.position).await;
        assert!(
            !came.iter().any(|kind| matches!(kind, Kind::Reset(_))),
            "{came:?}"
        );
    }
    gateway.kill();
    lose_store(&data_dir);
    let restored = restore(&to, &data_dir).unwrap();
    gateway.restart().await;

    let position = restored["position"].as_u64().unwrap();
    assert!(lost.position < position);
    for token in [before, after] {
        let (came, _) = watched(&gateway, token, position + 1).await;
        let reset = came.iter().find_map(|kind| match kind {
            Kind::Reset(reset) => Some(reset.reason()),
            _ => None,
        });
        assert_eq!(reset, Some(reset::Reason::OtherStore), "{came:?}");
        let entry = came.iter().find_map(|kind| match kind {
            Kind::Entry(entry) if entry.user == device.id.user.0[..] => Some(entry),
            _ => None,
        });
        // It is not known any more that the user was heard, and it is not said that nobody was.
        let known_ms = entry.unwrap().last_contact_ms;
        assert!(kept.receive_ms <= known_ms && known_ms < lost.receive_ms);
        let is_in_gap = came.iter().any(|kind| match kind {
            Kind::Coverage(gap) => {
                gap.from_ms <= lost.receive_ms
                    && (gap.until_ms == 0 || lost.receive_ms < gap.until_ms)
            }
            _ => false,
        });
        assert!(is_in_gap, "{came:?}");
    }

    // The device is told, gets an epoch that the lost store cannot have issued, and its pings are counted anew.
    let claim = v1::Hello {
        last_acked: 2,
        incarnation: kept.incarnation,
        ..hello(Lane::Live, epoch)
    };
    let mut live = gateway.connect(&device).await.open(claim).await;
    let welcome = live.welcome().await;
    assert!(epoch + 1_000_000 < welcome.epoch, "{welcome:?}");
    live.send_pings(welcome.epoch, &[ping(1)]).await;
    let ack = live.ack().await;
    assert_eq!(ack.accepted, 1);
    assert!(position < ack.position);
    // A device that was told of nothing that is lost goes on.
    gateway.kill();
    let store = Store::open_read_only(&data_dir).unwrap();
    assert_eq!(
        stored_seqs(&store, &device),
        [(epoch, 1), (welcome.epoch, 1)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_backup_put_back_twice_is_two_lives_and_a_revocation_outlives_both() {
    let mut gateway = Process::start(&[]).await;
    let (data_dir, to) = (gateway.data_dir().to_owned(), gateway.scratch("backups"));
    let (stolen, other) = (gateway.device(1), gateway.device(2));
    let mut epochs = BTreeSet::new();
    for device in [&stolen, &other] {
        let link = gateway.connect(device).await;
        let mut live = link.open(hello(Lane::Live, 0)).await;
        let epoch = live.welcome().await.epoch;
        epochs.insert(epoch);
        live.send_pings(epoch, &[ping(1)]).await;
        live.ack().await;
    }
    backup(&data_dir, &to);
    let user = stolen.id.user.to_string();
    let revoke: [(&str, &Path); 3] = [
        ("--data", &data_dir),
        ("--user", Path::new(&user)),
        ("--device", Path::new("1")),
    ];
    waypost("revoke", &revoke).unwrap();
    let mut tokens = Vec::new();
    for life in 0..2 {
        gateway.terminate();
        assert_eq!(gateway.exit_code().await, Some(0));
        lose_store(&data_dir);
        let restored = restore(&to, &data_dir).unwrap();
        assert_eq!(restored["revocations"], 1, "{restored}");
        gateway.restart().await;
        // Each time a wiped queue asks for an epoch, it is one that nobody ever had.
        let link = gateway.connect(&other).await;
        let mut live = link.open(hello(Lane::Live, 0)).await;
        let welcome = live.welcome().await;
        assert!(epochs.insert(welcome.epoch), "life {life}: {welcome:?}");
        let link = gateway.attempt(Some(&stolen.credentials)).await;
        assert_eq!(link.unwrap().closed().await, Some(CloseCode::Revoked));
        for token in std::mem::take(&mut tokens) {
            let (came, _) = watched(&gateway, token, welcome.position).await;
            assert!(
                came.iter().any(|kind| matches!(kind, Kind::Reset(_))),
                "{came:?}"
            );
        }
        tokens.push(watched(&gateway, Bytes::new(), welcome.position).await.1);
    }
}

/// Whom the holder has taken a grant from is told nothing by a backup from before that either.
#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_was_withdrawn_after_a_backup_stays_withdrawn() {
    let mut gateway = Process::start(&[]).await;
    let (data_dir, to) = (gateway.data_dir().to_owned(), gateway.scratch("backups"));
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    live.welcome().await;
    backup(&data_dir, &to);
    assert_eq!(gateway.entry(&device).await.state(), State::Active);
    let name = "dev".to_owned();
    let withdraw = control::Action::WithdrawChecker(control::WithdrawChecker { name });
    let withdrawn = live.control(1, withdraw).await;
    assert_eq!(withdrawn, v1::control_result::Outcome::Done);
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let log = data_dir.join("audit.log");
    let since = fs::read(&log).unwrap();
    for is_on_record in [true, false] {
        lose_store(&data_dir);
        if !is_on_record {
            // The control: a log that ends before the withdrawal knows of none.
            let text = String::from_utf8(since.clone()).unwrap();
            let (before, _) = text.split_once("\"withdrawn\"").unwrap();
            let whole = before.rfind('\n').unwrap() + 1;
            fs::write(&log, &text[..whole]).unwrap();
        }
        let restored = restore(&to, &data_dir).unwrap();
        assert_eq!(
            restored["grant_changes"],
            u64::from(is_on_record),
            "{restored}"
        );
        gateway.restart().await;
        let link = gateway.connect(&device).await;
        link.open(hello(Lane::Live, 0)).await.welcome().await;
        let told = gateway.entry(&device).await.state();
        let expected = match is_on_record {
            true => State::Withdrawn,
            false => State::Active,
        };
        assert_eq!(told, expected);
        gateway.terminate();
        assert_eq!(gateway.exit_code().await, Some(0));
    }
}

/// The wrapped key of a user, as it lies in a folder of keys.
fn wrapped_key(keys: &Path, device: &Device) -> Option<Vec<u8>> {
    let bytes = fs::read(keys.join("00000001.keys")).unwrap();
    let slots = bytes[52..].chunks_exact(68);
    let mut slots = slots.filter(|slot| slot[4..20] == device.id.user.0);
    slots.next().map(|slot| slot[20..].to_vec())
}

fn pings_of(store: &Store, device: &Device) -> Vec<Ping> {
    let rows = store.rows_of(device.id.user);
    rows.flat_map(|row| row.unwrap().record.pings).collect()
}

async fn erase(live: &mut waypost_tests::Stream) {
    let action = Some(control::Action::Erase(control::Erase {}));
    let control = v1::Control { id: 1, action };
    live.send(device_frame::Kind::Control(control)).await;
    loop {
        if let Some(gateway_frame::Kind::ControlResult(result)) = live.next().await {
            assert!(result.receipt.is_some());
            return;
        }
    }
}

struct Erased {
    world: World,
    gone: Device,
    /// Of the device that is gone, with a ticket from before.
    returning: Returning,
    stays: Device,
    stays_epoch: u32,
    pings: Vec<Ping>,
    telling: Vec<Vec<u8>>,
}

impl Erased {
    /// Two users; `copy` is called before one of them is erased.
    async fn after(copy: impl AsyncFnOnce(&mut World, &Device)) -> Self {
        let mut world = World::start().await;
        let (gone, stays) = (world.device(1), world.device(2));
        let pings = telling_pings();
        let mut telling = telling_parts(&batch::encode(1, &pings).encode_to_vec());
        assert!(10 < telling.len());
        let mut lane = world.connect(&stays).await.open(hello(Lane::Live, 0)).await;
        let stays_epoch = lane.welcome().await.epoch;
        lane.send_pings(stays_epoch, &[ping(1)]).await;
        lane.ack().await;
        let returning = Returning::new(&world, &gone);
        let link = returning.connect(world.addresses().devices).await;
        let mut live = link.open(hello(Lane::Live, 0)).await;
        let epoch = live.welcome().await.epoch;
        live.send_pings(epoch, &pings).await;
        assert_eq!(live.ack().await.accepted, 40);
        for (id, action) in [
            (1, control::Action::Pause(control::Pause {})),
            (2, control::Action::Resume(control::Resume {})),
        ] {
            live.control(id, action).await;
        }
        let store = Store::open_read_only(&world.config().data_dir).unwrap();
        let (_, record) = store.devices_of(gone.id.user).next().unwrap().unwrap();
        telling.extend(written_times(&record));
        drop(store);
        copy(&mut world, &gone).await;
        let link = returning.connect(world.addresses().devices).await;
        let mut live = link.open(hello(Lane::Live, epoch)).await;
        live.welcome().await;
        erase(&mut live).await;
        assert_eq!(link.closed().await, Some(CloseCode::Erased));
        Self {
            world,
            gone,
            returning,
            stays,
            stays_epoch,
            pings,
            telling,
        }
    }

    /// The gateway runs again on what was put back: nothing of the erased user is served, or there.
    async fn assert_gone(self) {
        let Self {
            world,
            gone,
            returning,
            stays,
            stays_epoch,
            ..
        } = self;
        assert_eq!(world.entry(&gone).await.state(), State::Erased);
        // With its ticket: as early data if another process takes that, and with the resumed handshake if not. Which it is,
        // and then the end, may be known between any two of these.
        let (link, accepted) = returning.connect_early(world.addresses().devices);
        let say = async || {
            let mut lane = link.try_open_raw().await.ok()?;
            let hello = device_frame::Kind::Hello(hello(Lane::Live, 1));
            if lane.try_send(hello).await {
                lane.try_send_pings(1, &[ping(50)]).await;
            }
            Some(lane)
        };
        let _early = say().await;
        let _later = match accepted.await {
            true => None,
            false => say().await,
        };
        assert_eq!(link.closed().await, Some(CloseCode::Erased));
        let link = world.connect(&gone).await;
        let _lane = link.open(hello(Lane::Live, 0)).await;
        assert_eq!(link.closed().await, Some(CloseCode::Erased));
        let link = world.connect(&stays).await;
        let mut lane = link.open(hello(Lane::Live, stays_epoch)).await;
        lane.welcome().await;
        lane.send_pings(stays_epoch, &[ping(1), ping(2)]).await;
        let ack = lane.ack().await;
        assert_eq!((ack.accepted, ack.duplicate), (1, 1));
        let data_dir = world.config().data_dir.clone();
        let nothing_left = async || (!has_rows_of(&data_dir, &gone)).then_some(());
        waypost_tests::until(nothing_left).await;
        assert!(has_rows_of(&data_dir, &stays), "nobody else's");
        let store = world.stop().await;
        assert!(!has_rows_of(&data_dir, &gone), "now that nothing moves");
        assert_eq!(store.rows_of(gone.id.user).count(), 0);
        assert_eq!(store.devices_of(gone.id.user).count(), 0);
        assert_eq!(store.events_of_user(gone.id.user).unwrap().len(), 0);
        assert_eq!(stored_seqs(&store, &stays).len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_erased_after_a_backup_is_erased_in_what_is_put_back() {
    let (to, keys) = ("backups", "copy-of-keys");
    let mut erased = Erased::after(async |world, _| {
        let data_dir = &world.config().data_dir;
        let (to, keys) = (world.scratch(to), world.scratch(keys));
        let options: [(&str, &Path); 3] =
            [("--data", data_dir), ("--to", &to), ("--keys-to", &keys)];
        waypost("backup", &options).unwrap();
    })
    .await;
    let Erased {
        world,
        gone,
        pings,
        telling,
        ..
    } = &mut erased;
    let (to, keys) = (world.scratch(to), world.scratch(keys));
    let data_dir = world.config().data_dir.clone();
    world.stop_gateway().await;

    // The control: before the erasure the same backup with the keys of then opens, and tells everything.
    let old = another(&data_dir, world.scratch("old"));
    let options: [(&str, &Path); 3] = [("--from", &to), ("--keys", &keys), ("--data", &old)];
    assert_eq!(waypost("restore", &options).unwrap()["erased_users"], 0);
    let store = Store::open_read_only(&old).unwrap();
    assert_eq!(pings_of(&store, gone), *pings);
    assert!(store.devices_of(gone.id.user).count() == 1 && has_rows_of(&old, gone));
    drop(store);
    let wrapped = wrapped_key(&keys, gone).unwrap();

    // With those keys and the audit log of now, it is known from there.
    let witnessed = another(&data_dir, world.scratch("witnessed"));
    fs::copy(data_dir.join("audit.log"), witnessed.join("audit.log")).unwrap();
    let options: [(&str, &Path); 3] = [("--from", &to), ("--keys", &keys), ("--data", &witnessed)];
    assert_eq!(waypost("restore", &options).unwrap()["erased_users"], 1);
    assert!(!has(&all_bytes(&witnessed), &wrapped) && !has_rows_of(&witnessed, gone));

    // With the keys of now.
    lose_store(&data_dir);
    fs::remove_file(data_dir.join("audit.log")).unwrap();
    let restored = restore(&to, &data_dir).unwrap();
    assert_eq!(restored["erased_users"], 1);
    for folder in [&data_dir, &to] {
        let bytes = all_bytes(folder);
        assert!(telling.iter().all(|part| !has(&bytes, part)), "in clear");
        assert!(!has(&bytes, &wrapped), "a key that opens it");
    }
    assert_eq!(wrapped_key(&data_dir.join("keys"), gone), None);
    assert!(!has_rows_of(&data_dir, gone), "before anybody is served");
    assert!(
        has(&all_bytes(&keys), &wrapped),
        "the control of the search"
    );

    world.start_gateway().await;
    erased.assert_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_erased_after_a_folder_was_copied_by_hand_is_erased_when_it_is_put_back() {
    let mut erased = Erased::after(async |world, gone| {
        world.stop_gateway().await;
        let data_dir = &world.config().data_dir;
        copy_folder(&data_dir.join("store"), &world.scratch("store-copy"));
        assert!(has_rows_of(&world.scratch("store-copy"), gone));
        world.start_gateway().await;
    })
    .await;
    let world = &mut erased.world;
    world.stop_gateway().await;
    let data_dir = world.config().data_dir.clone();
    lose_store(&data_dir);
    copy_folder(&world.scratch("store-copy"), &data_dir.join("store"));
    world.start_gateway().await;
    erased.assert_gone().await;
}

/// A stopped gateway with some pings, and one backup of it.
async fn with_backup() -> (Process, PathBuf) {
    let mut gateway = Process::prepared(&[]);
    gateway.restart().await;
    let device = gateway.device(1);
    let mut live = gateway
        .connect(&device)
        .await
        .open(hello(Lane::Live, 0))
        .await;
    let epoch = live.welcome().await.epoch;
    for from in 0..20 {
        let pings: Vec<_> = (from * 150 + 1..=from * 150 + 150).map(ping).collect();
        live.send_pings(epoch, &pings).await;
        live.ack().await;
    }
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let to = gateway.scratch("backups");
    // Without a gateway.
    backup(gateway.data_dir(), &to);
    (gateway, to)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_refused_with_the_reason_and_nothing_is_put_over_a_store() {
    let (gateway, to) = with_backup().await;
    let data_dir = gateway.data_dir();
    let refused = restore(&to, data_dir).unwrap_err();
    assert!(refused.contains("there is a store in"), "{refused}");
    let inside = data_dir.join("backups");
    let refused = waypost("backup", &[("--data", data_dir), ("--to", &inside)]).unwrap_err();
    assert!(refused.contains("must not lie in"), "{refused}");
    let keys_inside = to.join("keys");
    let options: [(&str, &Path); 3] = [
        ("--data", data_dir),
        ("--to", &to),
        ("--keys-to", &keys_inside),
    ];
    let refused = waypost("backup", &options).unwrap_err();
    assert!(refused.contains("keep alive what was erased"), "{refused}");
    fs::remove_dir_all(inside).unwrap();

    lose_store(data_dir);
    for file in fs::read_dir(to.join("files")).unwrap() {
        let path = file.unwrap().path();
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = bad.len() / 2;
        match bad.get_mut(at) {
            Some(byte) => *byte ^= 1,
            None => bad.push(1),
        }
        fs::write(&path, bad).unwrap();
        let log = fs::read(data_dir.join("audit.log")).unwrap();
        if good.starts_with(&log[..20]) {
            // The log that is here is the newer one, and the backup's is not looked at.
            restore(&to, data_dir).unwrap();
            lose_store(data_dir);
        } else {
            let refused = restore(&to, data_dir).unwrap_err();
            assert!(refused.contains("backup 1 is damaged"), "{refused}");
            assert!(refused.contains(path.to_str().unwrap()), "{refused}");
        }
        assert!(!data_dir.join("store").exists());
        fs::write(&path, good).unwrap();
    }
    // Without the keys, or with another store's.
    let keys = data_dir.join("keys");
    fs::rename(&keys, gateway.scratch("keys")).unwrap();
    let refused = restore(&to, data_dir).unwrap_err();
    assert!(refused.contains("there are no users' keys in"), "{refused}");
    let (other, _) = with_backup().await;
    copy_folder(&other.data_dir().join("keys"), &keys);
    fs::copy(
        other.data_dir().join("master.key"),
        data_dir.join("master.key"),
    )
    .unwrap();
    let refused = restore(&to, data_dir).unwrap_err();
    assert!(refused.contains("are those of another store"), "{refused}");
    assert!(!data_dir.join("store").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_or_a_restore_that_is_killed_leaves_nothing_that_is_taken_for_whole() {
    let (mut gateway, to) = with_backup().await;
    gateway.restart().await;
    let data_dir = gateway.data_dir().to_owned();
    let begin = |command: &str, folder: &str| {
        let mut program = Command::new(binary("waypost"));
        program.arg(command).arg("--data").arg(&data_dir);
        program.arg(folder).arg(&to);
        let quiet = program.stdout(Stdio::null()).stderr(Stdio::null());
        quiet.spawn().unwrap()
    };
    let expected = Snapshot::of(&data_dir).pings();
    let mut cut_short = [0, 0];
    let mut kill = async |command: &str, folder: &str, after: u64| {
        let mut child = begin(command, folder);
        tokio::time::sleep(Duration::from_millis(after)).await;
        child.kill().unwrap();
        let is_done = child.wait().unwrap().success();
        cut_short[usize::from(command == "restore")] += usize::from(!is_done);
        is_done
    };
    for after in (0..60).step_by(4) {
        kill("backup", "--to", after).await;
        // Whatever there is under a number is whole.
        for file in fs::read_dir(&to).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            let number = name.strip_prefix("backup-");
            if let Some(number) = number.and_then(|number| number.strip_suffix(".json")) {
                let elsewhere = another(&data_dir, gateway.scratch("elsewhere"));
                copy_folder(&data_dir.join("keys"), &elsewhere.join("keys"));
                let options: [(&str, &Path); 3] = [
                    ("--from", &to),
                    ("--data", &elsewhere),
                    ("--backup", Path::new(number)),
                ];
                let restored = waypost("restore", &options).unwrap();
                assert_eq!(restored["pings"], expected);
                fs::remove_dir_all(elsewhere).unwrap();
                // Once is enough of each.
                fs::remove_file(to.join(&name)).unwrap();
            }
        }
    }
    let made = backup(&data_dir, &to);
    assert!(!data_dir.join("store/checkpoint").exists());
    let files = fs::read_dir(to.join("files")).unwrap().count();
    assert!(files as u64 <= made["files"].as_u64().unwrap(), "{made}");
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));

    lose_store(&data_dir);
    for after in (0..60).step_by(4) {
        let is_done = kill("restore", "--from", after).await;
        let is_there = data_dir.join("store").exists();
        assert!(is_there || !is_done);
        if is_there {
            assert_eq!(Snapshot::of(&data_dir).pings(), expected);
            lose_store(&data_dir);
        } else if data_dir.join("store.restoring").exists() {
            gateway.try_restart().await.unwrap_err();
            assert!(gateway.log().contains("run `waypost restore` again"));
            assert!(!data_dir.join("store").exists());
        }
    }
    assert!(0 < cut_short[0] && 0 < cut_short[1], "{cut_short:?}");
    assert_eq!(restore(&to, &data_dir).unwrap()["pings"], expected);
    gateway.restart().await;
}
