//! The commit path against RocksDB alone, and what a sync costs on this disk.
//!
//! In each round the real committer with a real store takes what all devices ask, one request outstanding
//! each, as sessions make it. Then RocksDB is given the same keys and values, with the store's own settings,
//! in groups as large as the committer's were on average, each of them synced. The ratio says what
//! judging, sealing, publishing and answering cost on top; how much of that is sealing is measured by doing it once
//! more, alone.
//! Knows the committer, the store's folder and RocksDB. Must not know QUIC or other processes.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    hint::black_box,
    io::Write,
    iter,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use ring::rand::SystemRandom;
use rocksdb::{Cache, DB, Env, IteratorMode, Options, WriteBatch, WriteOptions};
use rustc_hash::FxHashMap;
use tokio::task::JoinSet;
use waypost_gateway::{
    audit::Audit,
    clock::{Clock, system_now_ms},
    commit::{Answer, Bell, CommitConfig, CommitHandle, CommitParts, Committer, Mailbox},
    enrol::invitations::Invitations,
    erase,
    freshness::{Freshness, Grants},
    metrics::Metrics,
    orders,
    seal::{DataKey, Identity, NONCE_BYTES, TAG_BYTES},
    session::SessionConfig,
    sharing::Holders,
    store::{Store, StoreConfig},
    vigil::{Vigil, VigilParts},
};
use waypost_proto::{
    id::DeviceId,
    session::{Lane, Limits, Request, Session, Step},
};

use super::load::{self, Drive, Load};
use crate::report::Latencies;

/// What one round took on either side, for the same rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CommitRound {
    /// The committer, from the first request to the last answer.
    pub(crate) committer: Duration,
    /// RocksDB alone.
    pub(crate) rocksdb: Duration,
    /// Sealing the rows and the devices' records alone, which the committer does on top.
    pub(crate) sealing: Duration,
    /// How many rows of pings that are.
    pub(crate) rows: u64,
    /// Keys and values that were written, on either side.
    pub(crate) bytes: u64,
    /// Requests in one write, on average.
    pub(crate) group_requests: u64,
}

/// Takes both through one round, in a folder of its own below `folder`.
///
/// # Errors
/// When the disk or RocksDB fails, or the committer did not accept every ping.
pub(crate) fn round(load: Load, devices: u32, folder: &Path) -> Result<CommitRound> {
    let dir = tempfile::tempdir_in(folder)?;
    let data_dir = dir.path().join("data");
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let (committer, commits) = runtime.block_on(commit(load, devices, &data_dir))?;
    let rows = rows_of(&data_dir)?;
    let group_requests = rows.len().div_ceil(usize::try_from(commits)?.max(1));
    let alone = dir.path().join("alone");
    let rocksdb = write(&rows, group_requests, &data_dir, &alone)?;
    Ok(CommitRound {
        committer,
        rocksdb,
        sealing: seal(&rows)?,
        rows: rows.len() as u64,
        bytes: rows.iter().map(Row::bytes).sum(),
        group_requests: group_requests as u64,
    })
}

/// Appends to a file and syncs it, `times` times, as a log of commits is written.
///
/// # Errors
/// When the disk fails.
pub(crate) fn syncs(times: u32, folder: &Path) -> Result<Latencies> {
    let dir = tempfile::tempdir_in(folder)?;
    let mut file = File::create(dir.path().join("log"))?;
    let mut latencies = Latencies::default();
    for _ in 0..times {
        file.write_all(&[0x5a; SYNC_BYTES])?;
        let begun = Instant::now();
        file.sync_data()?;
        latencies.record_us(u64::try_from(begun.elapsed().as_micros())?);
    }
    Ok(latencies)
}

/// Returns how long the committer took, and for how many commits.
async fn commit(load: Load, devices: u32, data_dir: &Path) -> Result<(Duration, u64)> {
    let store = Arc::new(Store::open(
        data_dir,
        &StoreConfig::default(),
        system_now_ms(),
    )?);
    let clock = Clock::starting_at(0);
    let freshness = Arc::new(Freshness::restore(
        iter::empty(),
        [],
        Grants::default(),
        clock.now_ms(),
    ));
    let metrics = Metrics::new();
    let (handle, committer) = Committer::new(
        &CommitConfig::default(),
        CommitParts {
            vigil: Vigil::new(VigilParts {
                bulletin: Arc::default(),
                deadlines: Vec::new(),
                max_deadlines: 0,
                start: None,
                metrics: metrics.clone(),
            }),
            invitations: Invitations::default(),
            orders: orders::queue().1,
            erase: erase::queue().0,
            audit: Audit::nowhere(&metrics),
            turned_away: Arc::default(),
            store,
            freshness: Arc::clone(&freshness),
            metrics,
            clock,
            devices: FxHashMap::default(),
            holders: Holders::default(),
            checkers: Arc::default(),
            revocations: Arc::default(),
            position: 0,
            retention: StoreConfig::default().retention,
        },
    );
    let ended = committer.spawn()?;
    let bell = Arc::<Bell>::default();
    let hearing = tokio::spawn({
        let bell = Arc::clone(&bell);
        async move { bell.serve().await }
    });
    let drive = Drive::since_yesterday(system_now_ms());
    let mut fleet = Vec::new();
    for number in 0..devices {
        fleet.push(Device::prepare(number, load, drive, &bell, &handle).await?);
    }

    let commits_before = freshness.head().position;
    let started = Instant::now();
    let mut running = JoinSet::new();
    for device in fleet {
        running.spawn(device.run(handle.clone()));
    }
    let accepted: u64 = running.join_all().await.into_iter().sum::<Result<u64>>()?;
    let took = started.elapsed();
    hearing.abort();
    let commits = freshness.head().position - commits_before;

    let asked = load.pings(devices.into());
    ensure!(
        accepted == asked,
        "the committer accepted {accepted} of {asked} new pings"
    );
    drop(handle);
    ended.await??;
    Ok((took, commits))
}

struct Device {
    id: DeviceId,
    mailbox: Arc<Mailbox>,
    requests: Vec<Request>,
}

impl Device {
    /// Says Hello, and takes all of the round's frames through a session.
    async fn prepare(
        number: u32,
        load: Load,
        drive: Drive,
        bell: &Arc<Bell>,
        handle: &CommitHandle,
    ) -> Result<Self> {
        let config = SessionConfig::default();
        let limits = Limits {
            frame_bytes: config.frame_bytes.get(),
            batch_pings: config.batch_pings.get(),
            credit_pings: config.credit_pings.get(),
        };
        let mut session = Session::new(limits, Bytes::new());
        let mut device = Self {
            id: load::device_id(number),
            mailbox: Mailbox::new(bell),
            requests: Vec::new(),
        };
        let Step::Ask(_, hello) = session.handle_frame(None, load::hello())? else {
            bail!("Hello is a request");
        };
        let Answer::Welcomed(welcomed) = device.ask(hello, handle).await? else {
            bail!("Hello is answered with Welcome");
        };
        session.handle_welcomed(&welcomed)?;
        for at in 0..load.requests {
            let first_seq = 1 + at * load.request_pings;
            let frame = drive.batch(welcomed.epoch, first_seq, load.request_pings);
            let Step::Ask(_, request) = session.handle_frame(Some(Lane::Live), frame)? else {
                bail!("a batch is a request");
            };
            device.requests.push(request);
        }
        Ok(device)
    }

    /// Returns how many pings were accepted.
    async fn run(mut self, handle: CommitHandle) -> Result<u64> {
        let mut accepted = 0;
        for request in std::mem::take(&mut self.requests) {
            let Answer::Settled(settled) = self.ask(request, &handle).await? else {
                bail!("a batch is answered when it is settled");
            };
            accepted += settled.accepted;
        }
        Ok(accepted)
    }

    async fn ask(&self, request: Request, handle: &CommitHandle) -> Result<Answer> {
        handle
            .submit(self.id, Lane::Live, request, None, &self.mailbox)
            .await?;
        let (_, answer) = self.mailbox.take().await.answers.remove(0);
        Ok(answer)
    }
}

/// One row of pings, and its device's record.
struct Row {
    key: Box<[u8]>,
    value: Box<[u8]>,
    device: Box<[u8]>,
}

impl Row {
    fn bytes(&self) -> u64 {
        let Self { key, value, device } = self;
        (key.len() + value.len() + DEVICE_KEY_BYTES + device.len()) as u64
    }
}

/// What the committer has written, in about the order in which it did: all devices' first, all devices'
/// second.
fn rows_of(data_dir: &Path) -> Result<Vec<Row>> {
    let database = data_dir.join(DATABASE);
    let names = DB::list_cf(&Options::default(), &database)?;
    let db = DB::open_cf_for_read_only(&Options::default(), &database, &names, false)?;
    let all = |name: &str| -> Result<Vec<_>> {
        let family = db.cf_handle(name).context("a family is missing")?;
        let rows = db.iterator_cf(&family, IteratorMode::Start);
        Ok(rows.collect::<Result<Vec<_>, _>>()?)
    };
    let devices: HashMap<_, _> = all("devices")?.into_iter().collect();
    let mut rows = Vec::new();
    for name in names.iter().filter(|name| name.starts_with("pings-")) {
        for (key, value) in all(name)? {
            let device = devices.get(&key[..DEVICE_KEY_BYTES]);
            let device = device.context("a device is missing")?.clone();
            rows.push(Row { key, value, device });
        }
    }
    // The key ends with the epoch, which is everybody's first, and the sequence number.
    rows.sort_by(|a, b| a.key[DEVICE_KEY_BYTES..].cmp(&b.key[DEVICE_KEY_BYTES..]));
    Ok(rows)
}

/// Returns how long RocksDB takes for the rows alone.
fn write(rows: &[Row], group_requests: usize, settings_of: &Path, dir: &Path) -> Result<Duration> {
    let cache = Cache::new_hyper_clock_cache(512 << 20, 0);
    let (mut options, families) =
        Options::load_latest(settings_of.join(DATABASE), Env::new()?, false, cache)?;
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.enable_statistics();
    let day = families.iter().map(|family| family.name());
    let day = day.filter(|name| name.starts_with("pings-")).max();
    let day = day.context("there is a day")?.to_owned();
    let db = DB::open_cf_descriptors(&options, dir, families)?;
    let family = |name| db.cf_handle(name).context("a family is missing");
    let (meta, devices, day) = (family("meta")?, family("devices")?, family(&day)?);
    let mut synced = WriteOptions::default();
    synced.set_sync(true);

    let started = Instant::now();
    for (position, group) in (1_u64..).zip(rows.chunks(group_requests)) {
        let mut batch = WriteBatch::default();
        for row in group {
            batch.put_cf(&day, &row.key, &row.value);
        }
        for row in group {
            batch.put_cf(&devices, &row.key[..DEVICE_KEY_BYTES], &row.device);
        }
        batch.put_cf(&meta, "position", position.to_be_bytes());
        db.write_opt(batch, &synced)?;
    }
    Ok(started.elapsed())
}

/// Returns how long it takes to seal as many bytes as each row and its device's record have, each device's with a key of
/// its own.
fn seal(rows: &[Row]) -> Result<Duration> {
    let random = SystemRandom::new();
    let mut keys = HashMap::new();
    for row in rows {
        if let Entry::Vacant(vacant) = keys.entry(&row.key[..DEVICE_KEY_BYTES]) {
            vacant.insert(DataKey::random(&random)?);
        }
    }
    let mut sealed = Vec::new();
    let started = Instant::now();
    for row in rows {
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&row.key[DEVICE_KEY_BYTES..]);
        let identity = Identity::new("pings-2026-01-01", &row.key, nonce);
        let value = &row.value[..row.value.len().saturating_sub(TAG_BYTES)];
        sealed.clear();
        let (device, key) = (
            &row.key[..DEVICE_KEY_BYTES],
            &keys[&row.key[..DEVICE_KEY_BYTES]],
        );
        key.seal(&identity, value, &mut sealed);
        black_box(&sealed);
        let identity = Identity::new("devices", device, nonce);
        let record = &row.device[..row.device.len().saturating_sub(TAG_BYTES)];
        sealed.clear();
        key.seal(&identity, record, &mut sealed);
        black_box(&sealed);
    }
    Ok(started.elapsed())
}

/// Where the store keeps RocksDB, within the data folder.
const DATABASE: &str = "store/rocksdb";
/// A row's key begins with its device's.
const DEVICE_KEY_BYTES: usize = 20;
/// About what a commit of a few hundred lone pings writes.
const SYNC_BYTES: usize = 64 << 10;
