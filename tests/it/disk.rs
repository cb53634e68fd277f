//! Failing, lying, full and frozen disks: nothing is acknowledged that is not stored, and the gateway says
//! what is the matter.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tonic::transport::Channel;
use waypost_gateway::feed::{client, rpc::freshness_client::FreshnessClient};
use waypost_proto::{
    ping::Ping,
    session::Lane,
    v1::{self, reject::Code, watch_event::Kind},
};
use waypost_tests::{
    Call, Device, DiskError, FailingDisk, Form, Mount, Order, Process, Stream, World, hello, ping,
    ping_at, stored_seqs, until,
};

const SENDERS: u32 = 3;
/// What is on its way without an acknowledgement, so that a fault always finds some.
const AHEAD_BATCHES: u64 = 4;

/// A device that sends as fast as acknowledgements allow, and its ledger of them.
struct Sender {
    device: Device,
    batch_pings: u64,
    epoch: u32,
    stream: Option<Stream>,
    next_seq: u64,
    acked: BTreeSet<u64>,
    durable_upto: u64,
    position: u64,
}

impl Sender {
    async fn connect(gateway: &Process, number: u32, batch_pings: u64) -> Self {
        let mut sender = Self {
            device: gateway.device(number),
            batch_pings,
            epoch: 0,
            stream: None,
            next_seq: 1,
            acked: BTreeSet::new(),
            durable_upto: 0,
            position: 0,
        };
        sender.reconnect(gateway).await;
        sender
    }

    async fn reconnect(&mut self, gateway: &Process) {
        let link = gateway.connect(&self.device).await;
        let mut stream = link.open(hello(Lane::Live, self.epoch)).await;
        let epoch = stream.welcome().await.epoch;
        assert!(
            self.epoch == 0 || epoch == self.epoch,
            "the epoch is remembered"
        );
        self.epoch = epoch;
        self.stream = Some(stream);
    }

    /// Goes on until so many are acknowledged, or the connection ends.
    async fn send_until(&mut self, enough: u64) {
        let mut stream = self.stream.take().unwrap();
        while self.durable_upto < enough {
            while self.next_seq <= self.durable_upto + AHEAD_BATCHES * self.batch_pings {
                let batch = samples(self.next_seq, self.batch_pings);
                if !stream.try_send_pings(self.epoch, &batch).await {
                    return;
                }
                self.next_seq += self.batch_pings;
            }
            let Some(ack) = stream.next_ack().await else {
                return;
            };
            self.note(&ack);
        }
        self.stream = Some(stream);
    }

    /// Sends what was sent and not acknowledged once more, until all of it is.
    async fn finish(&mut self, gateway: &Process) {
        self.reconnect(gateway).await;
        let mut stream = self.stream.take().unwrap();
        let mut seq = self.durable_upto + 1;
        while seq < self.next_seq {
            let batch = samples(seq, self.batch_pings);
            stream.send_pings(self.epoch, &batch).await;
            seq += self.batch_pings;
            while self.durable_upto + 1 < seq {
                let ack = stream.ack().await;
                self.note(&ack);
            }
        }
    }

    fn note(&mut self, ack: &v1::Ack) {
        let beyond = ack.ranges.iter().flat_map(|range| range.first..=range.last);
        self.acked
            .extend((self.durable_upto + 1..=ack.durable_upto).chain(beyond));
        self.durable_upto = ack.durable_upto;
        self.position = ack.position;
    }
}

/// Pings that are close together in time, so that many of them are not in the future.
fn samples(first_seq: u64, count: u64) -> Vec<Ping> {
    let at_ms = ping(0).time_ms;
    (first_seq..first_seq + count)
        .map(|seq| ping_at(seq, at_ms + seq))
        .collect()
}

async fn all_send_until(senders: Vec<Sender>, enough: u64) -> Vec<Sender> {
    let sending: Vec<_> = senders
        .into_iter()
        .map(|mut sender| {
            tokio::spawn(async move {
                sender.send_until(enough).await;
                sender
            })
        })
        .collect();
    let mut senders = Vec::new();
    for sending in sending {
        senders.push(sending.await.unwrap());
    }
    senders
}

/// The checker of these tests: what was acknowledged and is not in the store, and what is in it twice.
fn wrong(data_dir: &Path, senders: &[Sender]) -> Vec<String> {
    let store = World::open_store(data_dir);
    let mut wrong = Vec::new();
    for sender in senders {
        let stored = stored_seqs(&store, &sender.device);
        for pair in stored.windows(2) {
            if pair[0] == pair[1] {
                wrong.push(format!("{}: {:?} twice", sender.device.id, pair[0]));
            }
        }
        let stored: BTreeSet<_> = stored.into_iter().collect();
        for &seq in &sender.acked {
            if !stored.contains(&(sender.epoch, seq)) {
                wrong.push(format!("{}: {seq} lost", sender.device.id));
            }
        }
    }
    wrong
}

async fn start_on_failing(disk: &FailingDisk, more: &[(&str, &str)]) -> Process {
    let environment = disk.environment();
    let mut environment: Vec<(&str, &str)> = environment
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    environment.extend(more);
    Process::start(&environment).await
}

async fn connect_all(gateway: &Process, batch_pings: u64) -> Vec<Sender> {
    let mut senders = Vec::new();
    for number in 1..=SENDERS {
        senders.push(Sender::connect(gateway, number, batch_pings).await);
    }
    // Something that was acknowledged before the fault.
    all_send_until(senders, 10 * batch_pings).await
}

/// It stops by itself, says why, and was not ready any more before it did.
async fn stopped_because_of(gateway: &mut Process, reason: &str) {
    until(async || match gateway.readiness().await {
        Some((200, _)) => None,
        Some((code, said)) => {
            assert_eq!(code, 503);
            assert!(said.contains(reason), "{said}");
            Some(())
        }
        // It was too quick for us.
        None => Some(()),
    })
    .await;
    assert_eq!(gateway.exit_code().await, Some(1));
    let log = gateway.log();
    assert!(log.contains(reason), "{log}");
    assert!(log.contains("nothing was acknowledged after this"), "{log}");
}

/// After the fault is gone, the devices finish by themselves and everything is there once.
async fn recovers(gateway: &mut Process, senders: &mut [Sender]) {
    gateway.restart().await;
    for sender in &mut *senders {
        sender.finish(gateway).await;
    }
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let store = World::open_store(gateway.data_dir());
    for sender in senders {
        let all: Vec<_> = (1..sender.next_seq)
            .map(|seq| (sender.epoch, seq))
            .collect();
        assert_eq!(stored_seqs(&store, &sender.device), all);
    }
}

/// The gateway stops at this fault, and nothing that it acknowledged is missing.
async fn is_final(order: Order, batch_pings: u64, settings: &[(&str, &str)]) {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, settings).await;
    let senders = connect_all(&gateway, batch_pings).await;
    disk.order(order);
    let mut senders = all_send_until(senders, u64::MAX).await;
    stopped_because_of(&mut gateway, order.error.in_words()).await;
    assert!(!disk.done().is_empty(), "the fault happened");
    disk.heal();
    disk.lose_unsynced();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// So small that table files are written all the time.
const SMALL_TABLES: [(&str, &str); 2] = [
    ("WAYPOST_STORE_MEMTABLE_MIB", "4"),
    ("WAYPOST_STORE_WAL_MIB", "1"),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_of_the_log_is_final() {
    let order = Order {
        call: Call::Sync,
        text: ".log",
        nth: 1,
        times: 1,
        form: Form::Fail,
        error: DiskError::Io,
    };
    is_final(order, 20, &[]).await;
}

/// The kernel reports such a failure once; whoever asks again is told that all is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_failed_sync_of_the_log_is_final_too() {
    let order = Order {
        call: Call::Sync,
        text: ".log",
        nth: 17,
        times: 1,
        form: Form::Fail,
        error: DiskError::Io,
    };
    is_final(order, 20, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_is_final() {
    let order = Order {
        call: Call::Write,
        text: ".log",
        nth: 9,
        times: 1,
        form: Form::Fail,
        error: DiskError::Io,
    };
    is_final(order, 20, &[]).await;
}

/// A full disk takes a part of the write first.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_written_in_part_is_final() {
    let order = Order {
        call: Call::Write,
        text: ".log",
        nth: 9,
        times: 2,
        form: Form::Torn,
        error: DiskError::NoSpace,
    };
    is_final(order, 20, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_file_that_cannot_be_written_is_final() {
    let order = Order {
        call: Call::Write,
        text: ".sst",
        nth: 1,
        times: 0,
        form: Form::Fail,
        error: DiskError::NoSpace,
    };
    is_final(order, 1_000, &SMALL_TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_file_that_cannot_be_synced_is_final() {
    let order = Order {
        call: Call::Sync,
        text: ".sst",
        nth: 2,
        times: 1,
        form: Form::Fail,
        error: DiskError::Io,
    };
    is_final(order, 1_000, &SMALL_TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_cannot_be_synced_is_final() {
    let order = Order {
        call: Call::Sync,
        text: "MANIFEST",
        nth: 1,
        times: 1,
        form: Form::Fail,
        error: DiskError::Io,
    };
    is_final(order, 1_000, &SMALL_TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_became_read_only_is_final_and_a_restart_says_so() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 20).await;
    let order = Order {
        call: Call::All,
        text: "/store/",
        nth: 1,
        times: 0,
        form: Form::Fail,
        error: DiskError::ReadOnly,
    };
    disk.order(order);
    let mut senders = all_send_until(senders, u64::MAX).await;
    stopped_because_of(&mut gateway, order.error.in_words()).await;
    let said_before = gateway.log().len();
    assert_eq!(gateway.try_restart().await, Err(Some(1)));
    let said = gateway.log().split_off(said_before);
    assert!(said.contains("Read-only file system"), "{said}");
    assert!(said.contains("may write to"), "it says what to do: {said}");
    disk.heal();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// The commits decide whether the disk is good enough; the watermark is only a tripwire.
#[tokio::test(flavor = "multi_thread")]
async fn a_watermark_that_cannot_be_written_stops_nobody_and_is_told() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 20).await;
    disk.order(Order {
        call: Call::All,
        text: "/watermark",
        nth: 1,
        times: 0,
        form: Form::Fail,
        error: DiskError::Io,
    });
    let enough = senders[0].durable_upto + 200;
    let mut senders = all_send_until(senders, enough).await;
    until(async || {
        gateway
            .log()
            .contains("the watermark could not be written")
            .then_some(())
    })
    .await;
    assert!(senders.iter().all(|sender| sender.stream.is_some()));
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    gateway.kill();
    disk.heal();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// The control for all of the above: with a disk that says that it synced and did not, acknowledged
/// pings are lost. The checker of these tests sees it, and so does the gateway.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_lies_about_syncs_loses_pings_and_both_checker_and_gateway_notice() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    let senders = connect_all(&gateway, 20).await;
    let before: usize = senders.iter().map(|sender| sender.acked.len()).sum();
    disk.order(Order {
        call: Call::Sync,
        text: ".log",
        nth: 1,
        times: 0,
        form: Form::Lie,
        error: DiskError::Io,
    });
    let enough = senders[0].durable_upto + 200;
    let senders = all_send_until(senders, enough).await;
    let position = senders.iter().map(|sender| sender.position).max().unwrap();
    let watermark = gateway.data_dir().join("store/watermark");
    until(async || {
        let text = fs::read_to_string(&watermark).ok()?;
        let noted: u64 = text.split(' ').next()?.parse().ok()?;
        (position <= noted).then_some(())
    })
    .await;
    gateway.kill();
    assert_eq!(
        wrong(gateway.data_dir(), &senders),
        [""; 0],
        "a killed process loses nothing that it gave to the kernel"
    );
    assert!(0 < disk.lose_unsynced());
    disk.heal();
    let lost = wrong(gateway.data_dir(), &senders);
    let acked: usize = senders.iter().map(|sender| sender.acked.len()).sum();
    println!(
        "with a disk that lies, {} of {} acknowledged pings were lost",
        lost.len(),
        acked - before
    );
    assert!(3 * 100 < lost.len(), "{lost:?}");
    assert_eq!(gateway.try_restart().await, Err(Some(1)));
    let log = gateway.log();
    assert!(log.contains("has lost acknowledged data"), "{log}");
}

/// The control for the checker alone.
#[tokio::test(flavor = "multi_thread")]
async fn one_acknowledgement_too_many_does_not_escape_the_checker() {
    let mut gateway = Process::start(&[]).await;
    let mut senders = vec![Sender::connect(&gateway, 1, 20).await];
    senders[0].send_until(100).await;
    gateway.kill();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    let made_up = senders[0].next_seq;
    senders[0].acked.insert(made_up);
    assert_eq!(
        wrong(gateway.data_dir(), &senders),
        [format!("{}: {made_up} lost", senders[0].device.id)]
    );
}

async fn checker(gateway: &Process) -> FreshnessClient<Channel> {
    let authority = gateway.authority();
    let credentials = authority.issue_checker("dev").unwrap();
    client::connect(
        &format!("https://{}", gateway.addresses().freshness),
        authority.certificate_pem(),
        &credentials.certificate_pem,
        &credentials.private_key_pem,
        "localhost",
    )
    .await
    .unwrap()
}

async fn entry_of(gateway: &Process, device: &Device) -> v1::Entry {
    let user_ids = vec![bytes::Bytes::copy_from_slice(&device.id.user.0)];
    let found = checker(gateway)
        .await
        .get(v1::GetRequest { user_ids })
        .await;
    found.unwrap().into_inner().entries.remove(0)
}

/// Writes until the file is so large or the disk is full.
fn write_ballast(path: &Path, mib: usize) {
    let mut file = File::create(path).unwrap();
    for _ in 0..mib * 16 {
        if file.write_all(&[1; 1 << 16]).is_err() {
            // What is left of the disk.
            while file.write_all(&[1; 512]).is_ok() {}
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_pings_wait_while_the_disk_is_nearly_full_and_nobody_is_taken_for_silent() {
    let Some(mount) = Mount::small(96) else {
        return;
    };
    let settings = [
        ("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "32"),
        ("WAYPOST_STORE_MEMTABLE_MIB", "8"),
        ("WAYPOST_STORE_WAL_MIB", "8"),
    ];
    let mut gateway = Process::start_on(&mount.path().join("data"), &settings).await;
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert_eq!(live.ack().await.durable_upto, 1);
    let before = entry_of(&gateway, &device).await;

    let ballast = mount.path().join("ballast");
    write_ballast(&ballast, 70);
    let said = until(async || match gateway.readiness().await.unwrap() {
        (503, said) => Some(said),
        _ => None,
    })
    .await;
    assert!(
        said.contains("not ready: the disk is nearly full"),
        "{said}"
    );
    live.send_pings(epoch, &[ping(1), ping(2)]).await;
    let ack = live.ack().await;
    assert_eq!(ack.durable_upto, 1);
    assert_eq!((ack.accepted, ack.duplicate, ack.rejected), (1, 1, 1));
    assert_eq!(ack.rejects.len(), 1);
    assert_eq!(ack.rejects[0].seq, 2);
    assert_eq!(ack.rejects[0].code(), Code::Overloaded);
    assert!(ack.rejects[0].retryable);
    assert_eq!(ack.flow.unwrap().retry_after_ms, 30_000);
    let after = entry_of(&gateway, &device).await;
    assert!(
        before.last_contact_ms < after.last_contact_ms,
        "it was heard"
    );
    assert_eq!(after.last_sample_ms, before.last_sample_ms);
    let metrics = gateway
        .metrics_until(|metrics| metrics.value("waypost_disk_refusing") == 1.0)
        .await;
    assert!(metrics.value("waypost_disk_free_bytes") < metrics.value("waypost_disk_floor_bytes"));
    assert_eq!(
        metrics.value("waypost_pings_rejected_total{code=\"overloaded\"}"),
        1.0
    );

    fs::remove_file(ballast).unwrap();
    until(async || (gateway.admin("/readyz").await.0 == 200).then_some(())).await;
    live.send_pings(epoch, &[ping(2)]).await;
    assert_eq!(live.ack().await.durable_upto, 2);
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let store = World::open_store(gateway.data_dir());
    assert_eq!(stored_seqs(&store, &device), [(epoch, 1), (epoch, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_starts_on_a_nearly_full_disk_hears_devices_and_stores_nothing() {
    let world = World::start_with(|config| config.store.free_space_floor_mib = u32::MAX).await;
    let (code, said) = world.readiness().await;
    assert_eq!(code, 503);
    assert!(said.contains("the disk is nearly full"), "{said}");
    let device = world.device(1);
    let link = world.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    let ack = live.ack().await;
    assert_eq!((ack.accepted, ack.rejected, ack.durable_upto), (0, 1, 0));
    assert_eq!(ack.rejects[0].code(), Code::Overloaded);
    assert!(ack.receive_ms <= world.entry(&device).await.last_contact_ms);
    assert_eq!(stored_seqs(&world.stop().await, &device), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_final_and_after_room_was_made_everything_is_there() {
    let Some(mount) = Mount::small(96) else {
        return;
    };
    let settings = [
        ("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "0"),
        ("WAYPOST_STORE_MEMTABLE_MIB", "8"),
        ("WAYPOST_STORE_WAL_MIB", "8"),
    ];
    let mut gateway = Process::start_on(&mount.path().join("data"), &settings).await;
    let senders = connect_all(&gateway, 500).await;
    let ballast = mount.path().join("ballast");
    write_ballast(&ballast, 200);
    let mut senders = all_send_until(senders, u64::MAX).await;
    stopped_because_of(&mut gateway, "No space left on device").await;

    // What the end of the process has freed.
    write_ballast(&mount.path().join("more ballast"), 200);
    assert_eq!(gateway.try_restart().await, Err(Some(1)));
    fs::remove_file(ballast).unwrap();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0]);
    recovers(&mut gateway, &mut senders).await;
}

/// The largest `resolved_ms` of the Progress that come until there were so many.
async fn progress(stream: &mut tonic::Streaming<v1::WatchResponse>, count: usize) -> u64 {
    let (mut seen, mut resolved_ms) = (0, 0);
    while seen < count {
        let response = stream.message().await.unwrap().expect("the stream goes on");
        for event in response.events {
            if let Some(Kind::Progress(progress)) = event.kind {
                resolved_ms = resolved_ms.max(progress.resolved_ms);
                seen += 1;
            }
        }
    }
    resolved_ms
}

/// While the disk hangs, which it does between `hang` and the drop of what that returns.
async fn is_told_and_waited_for<Hanging>(gateway: &mut Process, hang: impl FnOnce() -> Hanging) {
    let device = gateway.device(1);
    let link = gateway.connect(&device).await;
    let mut live = link.open(hello(Lane::Live, 0)).await;
    let epoch = live.welcome().await.epoch;
    live.send_pings(epoch, &[ping(1)]).await;
    assert_eq!(live.ack().await.durable_upto, 1);
    let mut watch = checker(gateway)
        .await
        .watch(v1::WatchRequest::default())
        .await
        .unwrap()
        .into_inner();

    let hanging = hang();
    live.send_pings(epoch, &[ping(2)]).await;
    let said = tokio::select! {
        biased;
        ack = live.ack() => panic!("a disk that hangs has no {ack:?}"),
        said = until(async || match gateway.admin("/readyz").await {
            (503, said) => Some(said),
            _ => None,
        }) => said,
    };
    assert!(said.contains("the disk has not answered for"), "{said}");
    let resolved_ms = tokio::select! {
        biased;
        ack = live.ack() => panic!("a disk that hangs has no {ack:?}"),
        resolved_ms = progress(&mut watch, 5) => resolved_ms,
    };
    let metrics = gateway
        .metrics_until(|metrics| 5.0 <= metrics.value("waypost_disk_waited_seconds"))
        .await;
    assert_eq!(metrics.value("waypost_disk_stalls_total"), 1.0);
    assert!(1.0 < metrics.value("waypost_freshness_lag_seconds"));
    assert_eq!(
        gateway.admin("/healthz").await.0,
        200,
        "a restart would not help"
    );

    drop(hanging);
    let ack = live.ack().await;
    assert_eq!(ack.durable_upto, 2);
    assert!(
        resolved_ms < ack.receive_ms,
        "nobody was told that this moment was complete"
    );
    until(async || (gateway.admin("/readyz").await.0 == 200).then_some(())).await;
    let told = gateway.log().matches("has not answered").count();
    assert_eq!(told, 1, "{}", gateway.log());
    gateway.terminate();
    assert_eq!(gateway.exit_code().await, Some(0));
    let store = World::open_store(gateway.data_dir());
    assert_eq!(stored_seqs(&store, &device), [(epoch, 1), (epoch, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_disk_is_told_and_nothing_is_acknowledged_or_resolved_until_it_thaws() {
    let Some(mount) = Mount::freezable() else {
        return;
    };
    let no_floor = [("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "0")];
    let mut gateway = Process::start_on(&mount.path().join("data"), &no_floor).await;
    is_told_and_waited_for(&mut gateway, || mount.freeze()).await;
}

/// The same where nobody is root.
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_hangs_is_told_and_nothing_is_acknowledged_or_resolved_until_it_ends() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut gateway = start_on_failing(&disk, &[]).await;
    is_told_and_waited_for(&mut gateway, || {
        disk.order(Order {
            call: Call::Sync,
            text: "/store/",
            nth: 1,
            times: 0,
            form: Form::Hang,
            error: DiskError::Io,
        });
        Healing(&disk)
    })
    .await;
}

/// Withdraws the order when it is dropped.
struct Healing<'a>(&'a FailingDisk);

impl Drop for Healing<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}

/// What was tried, for the summary.
#[derive(Default)]
struct Tally {
    rounds: u64,
    stopped: u64,
    went_on: u64,
    failed_starts: u64,
    acked: u64,
}

/// Faults of any kind at any call, also while the gateway starts: whatever happens, what was
/// acknowledged is there, and when the disk is well again the devices finish by themselves.
async fn any_fault(disk: &FailingDisk, seed: u64, tally: &mut Tally) {
    let mut random = StdRng::seed_from_u64(seed);
    let settings: &[_] = if random.random() { &SMALL_TABLES } else { &[] };
    let batch_pings = if settings.is_empty() { 20 } else { 500 };
    let mut gateway = start_on_failing(disk, settings).await;
    let mut senders = connect_all(&gateway, batch_pings).await;
    disk.order(any_order(&mut random, 60));
    let enough = senders[0].durable_upto + 200 * batch_pings;
    senders = all_send_until(senders, enough).await;
    if senders.iter().all(|sender| sender.stream.is_some()) {
        tally.went_on += 1;
        gateway.kill();
    } else {
        tally.stopped += 1;
        assert_eq!(gateway.exit_code().await, Some(1), "seed {seed}");
    }
    disk.heal();
    disk.lose_unsynced();
    disk.forget();
    assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0], "seed {seed}");
    for _ in 0..random.random_range(0..4) {
        disk.order(any_order(&mut random, 90));
        match gateway.try_restart().await {
            Ok(()) => gateway.kill(),
            Err(code) => {
                tally.failed_starts += 1;
                assert_eq!(code, Some(1), "seed {seed}");
            }
        }
        disk.heal();
        disk.lose_unsynced();
        disk.forget();
        assert_eq!(wrong(gateway.data_dir(), &senders), [""; 0], "seed {seed}");
    }
    recovers(&mut gateway, &mut senders).await;
    tally.rounds += 1;
    tally.acked += senders
        .iter()
        .map(|sender| sender.acked.len() as u64)
        .sum::<u64>();
}

fn any_order(random: &mut StdRng, calls: u32) -> Order {
    let call = [Call::Sync, Call::Write, Call::Change, Call::All][random.random_range(0..4)];
    let texts = [".log", ".sst", "MANIFEST", "/store/", "/store/rocksdb/"];
    let form = match call {
        Call::Write if random.random() => Form::Torn,
        _ => Form::Fail,
    };
    Order {
        call,
        text: texts[random.random_range(0..texts.len())],
        nth: random.random_range(1..calls),
        times: random.random_range(0..4),
        form,
        error: [DiskError::Io, DiskError::NoSpace, DiskError::ReadOnly][random.random_range(0..3)],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_and_whenever_what_was_acknowledged_is_there() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let mut tally = Tally::default();
    for seed in 1..=6 {
        any_fault(&disk, seed, &mut tally).await;
    }
    assert!(0 < tally.stopped, "no fault was felt");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: make soak runs it"]
async fn soak_failing_disk() {
    let Some(disk) = FailingDisk::build() else {
        return;
    };
    let number = |name| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seconds = number("SOAK_SECONDS").unwrap_or(60);
    let seed: u64 = number("SEED").unwrap_or_else(rand::random);
    println!("seed {seed}");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut tally = Tally::default();
    while Instant::now() < end {
        any_fault(&disk, seed.wrapping_add(tally.rounds), &mut tally).await;
    }
    println!(
        "soak: no fault of a disk loses an acknowledged ping: {} rounds, {} stopped the gateway, {} did \
         not, {} starts failed, {} pings acknowledged, 0 lost; seed {seed}",
        tally.rounds, tally.stopped, tally.went_on, tally.failed_starts, tally.acked
    );
}
