//! Weeks in the life of a gateway's store, on a clock that is set: after each step nothing is there that is older than was
//! promised, and everything that is a day younger.
//!
//! The store, the committer and the files are real; the clock goes where the plan says, which a seed draws (`SEED`, or the
//! same ones always). It has pings that come late, queue over midnight or never come for days, pauses, stops, kills,
//! downtimes longer than anything is kept, and a system's clock that was set back. What is there is looked for by a scan of
//! the store, in what a holder would be given, and byte by byte in every file.

use std::{collections::BTreeMap, sync::Arc};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::oneshot;
use waypost_proto::{
    batch::DecodedBatch,
    device::Claim,
    session::{Lane, Request, Wish},
    terms::Density,
};

use super::*;
use crate::{
    audit::Audit,
    bulletin::Bulletin,
    clock::{Clock, system_now_ms},
    commit::{Answer, Bell, CommitConfig, CommitHandle, CommitParts, Committer, Mailbox},
    enrol::invitations::Invitations,
    erase,
    freshness::{Freshness, Grants},
    metrics::Metrics,
    orders,
    sharing::Holders,
    vigil::{Start, Vigil, VigilParts},
};

const HOUR_MS: u64 = 3_600_000;
/// How long before its time a day goes.
const AHEAD_MS: u64 = 60_000;
/// For how long is played.
const DAYS: u64 = 42;
const USERS: u8 = 3;
/// How much of the end of a sealed row is looked for: it is like no other.
const NEEDLE_BYTES: usize = 16;

/// What a sealed row ends with.
type Needle = [u8; NEEDLE_BYTES];

/// Rows that were acknowledged, by their needles: when each was received.
type Acknowledged = BTreeMap<Needle, u64>;

struct Play {
    dice: StdRng,
    /// What was promised.
    promised_ms: u64,
    /// What the store is told to keep: the same, but in the controls.
    kept: Duration,
    folder: TempDir,
    now_ms: u64,
    /// By device: its epoch, and the number of its next ping.
    queues: BTreeMap<DeviceId, (u32, u64)>,
    acknowledged: Acknowledged,
    /// When somebody paused or resumed.
    turns: Vec<u64>,
    /// Of rows that had to be there, how many were found in a file, and how many there were.
    found: (usize, usize),
    dropped: usize,
}

/// From a start to a stop or a kill.
struct Life {
    handle: CommitHandle,
    store: Arc<Store>,
    freshness: Arc<Freshness>,
    clock: Clock,
    bell: Arc<Bell>,
    ended: oneshot::Receiver<Result<(), CommitError>>,
}

/// What is wrong, in words.
type Checked = Result<(), String>;

impl Play {
    fn new(seed: u64, promised: Duration, kept: Duration) -> Self {
        let mut dice = StdRng::seed_from_u64(seed);
        // Ahead of the system's clock, so that the clock goes only where it is set.
        let now_ms = system_now_ms() + 10 * DAY_MS + dice.random_range(0..DAY_MS);
        let devices = (0..USERS).flat_map(|user| [1, 2].map(|number| device(user, number)));
        Self {
            promised_ms: u64::try_from(promised.as_millis()).unwrap(),
            kept,
            folder: tempfile::tempdir().unwrap(),
            now_ms,
            queues: devices.map(|device| (device, (0, 1))).collect(),
            acknowledged: BTreeMap::new(),
            turns: Vec::new(),
            found: (0, 0),
            dropped: 0,
            dice,
        }
    }

    async fn play(&mut self) -> Checked {
        let until_ms = self.now_ms + DAYS * DAY_MS;
        let mut life = self.begin(0, 0).await?;
        while self.now_ms < until_ms {
            let day = Day::of_ms(self.now_ms);
            let mut began = false;
            match self.dice.random_range(0..100) {
                0..50 => {
                    for _ in 0..self.dice.random_range(1..5) {
                        self.ping(&life).await?;
                    }
                }
                50..57 => self.turn(&life).await,
                57..75 => self.wait(&life, 14 * HOUR_MS).await,
                75..86 => self.wait_for_an_edge(&life).await,
                chance => {
                    let (away_ms, back_ms) = match chance {
                        86..95 => (self.dice.random_range(0..6 * HOUR_MS), 0),
                        95..97 => (self.dice.random_range(0..self.promised_ms + DAY_MS), 0),
                        _ => (0, self.dice.random_range(0..3 * DAY_MS)),
                    };
                    if (90..95).contains(&chance) {
                        self.folder = life.kill(&self.folder).await;
                    } else {
                        life.stop().await;
                    }
                    life = self.begin(away_ms, back_ms).await?;
                    began = true;
                }
            }
            self.check_rows(&life.store)?;
            self.check_turns(&life.store)?;
            if began || day != Day::of_ms(self.now_ms) {
                self.check_files().await?;
            }
        }
        life.stop().await;
        self.check_files().await
    }

    /// Starts after some time, with a system's clock that is behind by some, as the gateway does. Before anybody is
    /// served, what is too old is gone.
    async fn begin(&mut self, away_ms: u64, behind_ms: u64) -> Result<Life, String> {
        self.now_ms += away_ms;
        let config = StoreConfig {
            retention: self.kept,
            free_space_floor_mib: 0,
            ..StoreConfig::default()
        };
        let began_ms = self.now_ms - behind_ms;
        let store = Arc::new(Store::open(self.folder.path(), &config, began_ms).unwrap());
        self.check_rows(&store)?;
        let (devices, recovered) = store.load_devices().unwrap();
        let clock = Clock::starting_at(recovered.high_water_ms);
        clock.leap_to(self.now_ms);
        let holders = store.load_holders().unwrap();
        let deadlines = store.load_deadlines().unwrap();
        let heard_until_ms = (recovered.high_water_ms != 0).then_some(recovered.high_water_ms);
        let records = devices.iter();
        let freshness = Freshness::restore(
            records.map(|(device, record)| (*device, record.clocks, record.position)),
            holders.withheld.iter().copied(),
            Grants::everything(),
            heard_until_ms.unwrap_or_else(|| clock.now_ms() - 1),
        );
        let freshness = Arc::new(freshness.at_least(recovered.position));
        let metrics = Metrics::new();
        let bulletin = Bulletin::restore(
            store.load_coverage().unwrap(),
            &deadlines.registrations,
            deadlines.forgotten,
            holders.forgotten,
            recovered.position,
        );
        let (handle, committer) = Committer::new(
            &CommitConfig::default(),
            CommitParts {
                checkers: Arc::default(),
                store: Arc::clone(&store),
                freshness: Arc::clone(&freshness),
                metrics: metrics.clone(),
                clock: clock.clone(),
                devices: devices.into_iter().collect(),
                holders: Holders::restore(holders.withheld),
                revocations: Arc::default(),
                position: recovered.position,
                retention: self.kept,
                vigil: Vigil::new(VigilParts {
                    bulletin: Arc::new(bulletin),
                    deadlines: Vec::new(),
                    max_deadlines: 0,
                    start: heard_until_ms.map(|heard_until_ms| Start {
                        heard_until_ms,
                        began_ms,
                    }),
                    metrics: metrics.clone(),
                }),
                invitations: Invitations::default(),
                orders: orders::queue().1,
                erase: erase::queue().0,
                audit: Audit::nowhere(&metrics),
                turned_away: Arc::default(),
            },
        );
        // What is queued now waits until the committer runs: perhaps until another day.
        let bell: Arc<Bell> = Arc::default();
        let waiting = Mailbox::new(&bell);
        let is_known = self.queues.values().all(|(epoch, _)| *epoch != 0);
        let queued = (is_known && self.dice.random_bool(0.5)).then(|| self.some_ping());
        if let Some((device, request, _)) = &queued {
            let queued = handle.try_submit(*device, Lane::Live, request.clone(), None, &waiting);
            queued.unwrap();
            let hours = [0, 7, 30, 60][self.dice.random_range(0..4)];
            self.now_ms += hours * HOUR_MS;
            clock.leap_to(self.now_ms);
        }
        let life = Life {
            handle,
            store,
            freshness,
            clock,
            bell,
            ended: committer.spawn().unwrap(),
        };
        if let Some((device, _, seq)) = queued {
            let answer = life.answer(&waiting).await;
            self.told(&life, device, seq, answer)?;
        }
        for device in self.queues.keys().copied().collect::<Vec<_>>() {
            let (epoch, next_seq) = self.queues[&device];
            let claim = Claim {
                epoch,
                oldest_unsent_seq: next_seq,
                last_acked: next_seq - 1,
                is_foreign: false,
            };
            match life.ask(device, Request::Hello(claim)).await {
                Answer::Welcomed(welcomed) => {
                    assert!(epoch == 0 || welcomed.epoch == epoch, "{welcomed:?}");
                    self.queues.insert(device, (welcomed.epoch, next_seq));
                }
                other => panic!("{other:?}"),
            }
        }
        Ok(life)
    }

    /// A device's next ping, sampled at some time that is taken.
    fn some_ping(&mut self) -> (DeviceId, Request, u64) {
        let devices: Vec<_> = self.queues.keys().copied().collect();
        let device = devices[self.dice.random_range(0..devices.len())];
        let (epoch, seq) = self.queues[&device];
        self.queues.insert(device, (epoch, seq + 1));
        let age_ms = self.dice.random_range(0..self.promised_ms - 3 * HOUR_MS);
        let ping = Ping::at(seq, self.now_ms - age_ms, self.dice.random(), 100_000_000);
        let pings = vec![Ping {
            latitude_e7: ping.latitude_e7 % 900_000_000,
            ..ping
        }];
        let request = Request::Batch {
            columns: batch::encode(epoch, &pings).encode_to_vec(),
            batch: DecodedBatch {
                epoch,
                pings,
                malformed: Vec::new(),
            },
            density: Density::default(),
        };
        (device, request, seq)
    }

    async fn ping(&mut self, life: &Life) -> Checked {
        let (device, request, seq) = self.some_ping();
        let answer = life.ask(device, request).await;
        self.told(life, device, seq, answer)
    }

    /// Notes what was acknowledged, if it was.
    fn told(&mut self, life: &Life, device: DeviceId, seq: u64, answer: Answer) -> Checked {
        let settled = match answer {
            Answer::Settled(settled) if settled.accepted == 1 => settled,
            // In the control that keeps too little, some samples are too old.
            Answer::Settled(_) => return Ok(()),
            other => panic!("{other:?}"),
        };
        let key = PingKey {
            device,
            epoch: settled.epoch,
            first_seq: seq,
        };
        let family = Day::of_ms(settled.receive_ms).family_name();
        let sealed = life.store.db.cf_handle(&family).and_then(|family| {
            let row = life.store.db.get_cf(&family, key.to_bytes());
            row.unwrap()
        });
        match sealed {
            Some(sealed) => {
                let needle = sealed.last_chunk().copied().unwrap();
                self.acknowledged.insert(needle, settled.receive_ms);
                Ok(())
            }
            // It has waited until its time was over.
            None if self.is_past_keeping(settled.receive_ms) => Ok(()),
            None => Err("what was just acknowledged is not there".to_owned()),
        }
    }

    /// Somebody pauses and resumes.
    async fn turn(&mut self, life: &Life) {
        let user = self.dice.random_range(0..USERS);
        for (id, wish) in [(1, Wish::Pause), (2, Wish::Resume)] {
            let request = Request::Control { id, wish };
            let answer = life.ask(device(user, 1), request).await;
            assert!(matches!(answer, Answer::Granted(_)), "{answer:?}");
            self.turns.push(self.now_ms);
        }
    }

    async fn wait(&mut self, life: &Life, most_ms: u64) {
        let moment_ms = self.now_ms + self.dice.random_range(0..most_ms);
        self.wait_until(life, moment_ms).await;
    }

    /// Until just before, at or just after a midnight or the end of a day's time.
    async fn wait_for_an_edge(&mut self, life: &Life) {
        let retention = Retention::of(Duration::from_millis(self.promised_ms));
        let edge_ms = if self.dice.random() {
            Day::of_ms(self.now_ms).next().start_ms()
        } else {
            retention.ends_ms(retention.first_kept_day(self.now_ms))
        };
        let moment_ms = edge_ms + self.dice.random_range(0..3) - 1;
        self.wait_until(life, moment_ms.max(self.now_ms)).await;
    }

    /// With somebody who is heard then, or nobody.
    async fn wait_until(&mut self, life: &Life, moment_ms: u64) {
        self.now_ms = moment_ms;
        life.clock.leap_to(moment_ms);
        if self.dice.random_bool(0.8) {
            life.ask(device(0, 1), Request::Heartbeat).await;
        } else {
            let is_there = || moment_ms <= life.freshness.head().resolved_ms + 1;
            patiently(async || is_there()).await;
        }
    }

    fn is_too_old(&self, moment_ms: u64) -> bool {
        moment_ms + self.promised_ms <= self.now_ms
    }

    /// Whether it need not be there any more: a day before it must not.
    fn is_past_keeping(&self, moment_ms: u64) -> bool {
        moment_ms + self.promised_ms < self.now_ms + DAY_MS + AHEAD_MS
    }

    fn check_rows(&mut self, store: &Store) -> Checked {
        let mut scanned: Vec<u64> = Vec::new();
        for row in store.rows() {
            scanned.push(row.map_err(|error| error.to_string())?.record.receive_ms);
        }
        let mut given = Vec::new();
        for user in 0..USERS {
            let view = store.view_of(UserId([user; 16]));
            given.extend(view.rows().map(|row| row.unwrap().record.receive_ms));
        }
        let expected = self.acknowledged.values();
        let mut expected: Vec<_> = expected
            .copied()
            .filter(|moment_ms| !self.is_past_keeping(*moment_ms))
            .collect();
        for rows in [&mut scanned, &mut given] {
            rows.sort_unstable();
        }
        if scanned != given {
            return Err("a holder is not given what a scan finds".to_owned());
        }
        let old = scanned
            .iter()
            .find(|moment_ms| self.is_too_old(**moment_ms));
        if let Some(old) = old {
            return Err(self.older("a row", *old));
        }
        scanned.retain(|moment_ms| !self.is_past_keeping(*moment_ms));
        expected.sort_unstable();
        if scanned != expected {
            let (scanned, expected) = (scanned.len(), expected.len());
            return Err(format!(
                "{scanned} rows are there that have to be, of {expected}"
            ));
        }
        self.dropped = self.acknowledged.len() - given.len();
        Ok(())
    }

    fn check_turns(&self, store: &Store) -> Checked {
        let kept = store.transitions(0..u64::MAX, usize::MAX).unwrap();
        let kept: Vec<_> = kept.iter().map(|turn| turn.at_ms).collect();
        if let Some(old) = kept.iter().find(|moment_ms| self.is_too_old(**moment_ms)) {
            return Err(self.older("an event", *old));
        }
        let young = |moments: &[u64]| {
            let moments = moments.iter();
            moments
                .filter(|at_ms| !self.is_past_keeping(**at_ms))
                .count()
        };
        if young(&kept) != young(&self.turns) {
            return Err("an event is gone before its time".to_owned());
        }
        Ok(())
    }

    /// Looks for every row that there ever was in every file. RocksDB deletes what is no longer needed in the background.
    async fn check_files(&mut self) -> Checked {
        let (old, young): (Acknowledged, Acknowledged) = self
            .acknowledged
            .iter()
            .partition(|(_, moment_ms)| self.is_too_old(**moment_ms));
        let young: Acknowledged = young
            .into_iter()
            .filter(|(_, moment_ms)| !self.is_past_keeping(*moment_ms))
            .collect();
        // A file that goes between two looks may have moved into one that was not there yet.
        let mut found = 0;
        for _ in 0..5 {
            found = found.max(found_in(self.folder.path(), &young));
            if found == young.len() {
                break;
            }
        }
        self.found.0 += found;
        self.found.1 += young.len();
        let folder = self.folder.path();
        let is_gone = patiently(async || found_in(folder, &old) == 0).await;
        if is_gone {
            return Ok(());
        }
        Err(self.older("the bytes of a row", *old.values().next().unwrap()))
    }

    fn older(&self, what: &str, moment_ms: u64) -> String {
        format!(
            "{what} is there that is older than was promised, by up to {} hours",
            (self.now_ms - moment_ms - self.promised_ms) / HOUR_MS
        )
    }
}

impl Life {
    async fn ask(&self, device: DeviceId, request: Request) -> Answer {
        let mailbox = Mailbox::new(&self.bell);
        let queued = self
            .handle
            .submit(device, Lane::Live, request, None, &mailbox);
        queued.await.unwrap();
        self.answer(&mailbox).await
    }

    async fn answer(&self, mailbox: &Mailbox) -> Answer {
        loop {
            tokio::select! {
                mut mail = mailbox.take() => if let Some((_, answer)) = mail.answers.pop() {
                    return answer;
                },
                () = self.bell.hear() => {}
            }
        }
    }

    async fn stop(self) {
        drop(self.handle);
        self.ended.await.unwrap().unwrap();
        Arc::into_inner(self.store).expect("nobody else has it");
    }

    /// What is left is in another folder.
    async fn kill(self, folder: &TempDir) -> TempDir {
        let left = loop {
            let before = sizes(folder.path());
            let left = killed(folder);
            // RocksDB tidies up meanwhile, which a kill does not wait for and a copy has to.
            if before == sizes(folder.path()) && before == sizes(left.path()) {
                break left;
            }
        };
        self.stop().await;
        left
    }
}

/// Waits until something is so, but not for ever.
async fn patiently(is_so: impl AsyncFn() -> bool) -> bool {
    for _ in 0..2_000 {
        if is_so().await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    false
}

/// All files under a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn sizes(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let named = files(folder).into_iter().map(|path| {
        let bytes = fs::metadata(&path).map_or(0, |file| file.len());
        (path.strip_prefix(folder).unwrap().to_owned(), bytes)
    });
    // RocksDB's own log grows by itself, and holds nothing.
    named.filter(|(path, _)| !path.ends_with("LOG")).collect()
}

/// How many of these are in some file.
fn found_in(folder: &Path, needles: &Acknowledged) -> usize {
    let mut begins = vec![false; 1 << 16];
    for needle in needles.keys() {
        begins[usize::from(u16::from_be_bytes([needle[0], needle[1]]))] = true;
    }
    let mut found = BTreeSet::new();
    for path in files(folder) {
        // One that went meanwhile holds nothing.
        let bytes = fs::read(path).unwrap_or_default();
        for window in bytes.windows(NEEDLE_BYTES) {
            if begins[usize::from(u16::from_be_bytes([window[0], window[1]]))]
                && let Some((needle, _)) = needles.get_key_value(window)
            {
                found.insert(*needle);
            }
        }
    }
    found.len()
}

fn seeds() -> Vec<u64> {
    match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => vec![2, 3],
    }
}

fn play(seed: u64, promised: Duration, kept: Duration) -> (Play, Checked) {
    let mut play = Play::new(seed, promised, kept);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .unwrap();
    let checked = runtime.block_on(play.play());
    (play, checked)
}

const fn days(days: u64) -> Duration {
    Duration::from_secs(days * 24 * 3_600)
}

#[test]
#[expect(clippy::print_stdout, reason = "a failure shows its seed")]
fn nothing_is_ever_older_than_was_promised_and_all_that_is_a_day_younger_is_there() {
    for seed in seeds() {
        let dice = &mut StdRng::seed_from_u64(seed);
        let hours = dice.random_range(48..10 * 24);
        println!("SEED={seed}: kept for {hours} hours");
        let kept = Duration::from_secs(hours * 3_600);
        let (play, checked) = play(seed, kept, kept);
        assert_eq!(checked, Ok(()), "SEED={seed}");
        let all = play.acknowledged.len();
        println!(
            "{all} pings, {} dropped, found {:?}",
            play.dropped, play.found
        );
        assert!(
            100 < all && all / 2 < play.dropped,
            "{all} {}",
            play.dropped
        );
        // Where a row lies across two blocks of the log, it is not seen.
        let (found, sought) = play.found;
        assert!(sought - sought / 20 <= found, "{found} of {sought}");
    }
}

#[test]
fn a_store_that_keeps_a_day_too_long_is_found_out() {
    // As if a day went when its last ping is as old as promised, and not its first; or never.
    for kept in [days(5) + Duration::from_millis(AHEAD_MS), days(3_000)] {
        let (_, checked) = play(7, days(4), kept);
        let told = checked.unwrap_err();
        assert!(told.contains("older than was promised"), "{told}");
    }
}

#[test]
fn a_store_that_keeps_a_day_too_little_is_found_out() {
    let (_, checked) = play(7, days(5), days(4));
    let told = checked.unwrap_err();
    assert!(
        told.contains("have to be") || told.contains("before its time"),
        "{told}"
    );
}
