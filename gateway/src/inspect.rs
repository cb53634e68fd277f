//! `waypost inspect`: what a store holds, beside a running gateway or without one.
//!
//! Knows how to count and print. Must not print a coordinate, whatever is asked of it. Rows that it has no key for are
//! counted as such.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use serde::Serialize;
use waypost_proto::{
    device::DeviceRecord,
    id::{DeviceId, UserId},
};

use crate::{
    config::{self, Config, ConfigError},
    console::{parse_user, print},
    hex::hex,
    store::{Day, Held, OpenError, PingKey, PingRow, ReadError, Store},
};

/// Show what a store holds: counts and times, never positions.
#[derive(Clone, Debug, Args)]
pub struct InspectArgs {
    /// The gateway's data folder. The gateway may be running.
    #[arg(long = "data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// The gateway's configuration file, which says where the master key is. Without it, and without the environment,
    /// that is the data folder. Without the key rows are counted and their pings are not, and of one user nothing is shown
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Show the devices of this user instead of the store as a whole.
    #[arg(long, value_name = "UUID", value_parser = parse_user)]
    pub user: Option<UserId>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Why nothing could be shown.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The configuration cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no store, or it cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No device of the user was ever heard.
    #[error("the store knows no device of user {0}")]
    UnknownUser(UserId),
    /// Everything was erased, or is on its way to be.
    #[error("user {user} has erased everything: nothing is taken since {since}")]
    Erased {
        /// Who.
        user: UserId,
        /// When nothing more was taken.
        since: String,
    },
    /// The output is closed.
    #[error("cannot write the report: {0}")]
    Output(#[from] io::Error),
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct StoreReport {
    incarnation: String,
    position: u64,
    users: u64,
    paused_users: u64,
    erased_users: u64,
    devices: u64,
    rows: u64,
    /// Of these there was no key: their pings are not counted.
    sealed_rows: u64,
    pings: u64,
    size_bytes: u64,
    days: Vec<DayReport>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct UserReport {
    user: String,
    /// 0 while the holder shares.
    paused_since_ms: u64,
    devices: Vec<DeviceReport>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct DeviceReport {
    device: u32,
    epoch: u32,
    position: u64,
    /// All sequence numbers of the epoch up to this one are settled, and those of `settled_above`.
    settled_upto: u64,
    settled_above: Vec<RangeReport>,
    gaps: u64,
    last_contact_ms: u64,
    last_sample_ms: u64,
    last_fix_ms: u64,
    durable_ms: u64,
    days: Vec<DayReport>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct RangeReport {
    first: u64,
    last: u64,
}

/// What was received on one day, in UTC.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct DayReport {
    day: String,
    rows: u64,
    sealed_rows: u64,
    pings: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    rows: u64,
    sealed_rows: u64,
    pings: u64,
}

/// A row of pings as it is counted.
struct Row {
    day: Day,
    key: PingKey,
    count: Count,
}

/// Reads the store and prints the report.
///
/// # Errors
/// When the store cannot be read, the user is not in it, or the output is closed.
pub fn run(args: &InspectArgs, out: &mut impl Write) -> Result<(), InspectError> {
    let data_dir = Some(args.data_dir.clone());
    let config = Config::load(args.config.as_deref(), config::environment(), data_dir)?;
    let store = Store::open_sealed_read_only(&args.data_dir, &config.store.sealing)?;
    match args.user {
        None => print(&store_report(&store)?, args.json, out)?,
        Some(user) => print(&user_report(&store, user)?, args.json, out)?,
    }
    Ok(())
}

fn store_report(store: &Store) -> Result<StoreReport, InspectError> {
    let devices = store.device_ids().collect::<Result<Vec<_>, _>>()?;
    let users: BTreeSet<UserId> = devices.iter().map(|device| device.user).collect();
    let mut days: BTreeMap<Day, Count> = store
        .days()
        .into_iter()
        .map(|day| (day, Count::default()))
        .collect();
    let mut all = Count::default();
    for row in store.rows() {
        let row = counted(row)?;
        all.add(row.count);
        days.entry(row.day).or_default().add(row.count);
    }
    let withheld = store.count_withheld()?;
    Ok(StoreReport {
        incarnation: hex(&store.incarnation()),
        position: store.last_position()?,
        users: users.len() as u64,
        paused_users: withheld.paused,
        erased_users: withheld.erased,
        devices: devices.len() as u64,
        rows: all.rows,
        sealed_rows: all.sealed_rows,
        pings: all.pings,
        size_bytes: store.statistics().size_bytes,
        days: day_reports(days),
    })
}

fn user_report(store: &Store, user: UserId) -> Result<UserReport, InspectError> {
    if let Held::Erased(erasure) = store.held_of(user)? {
        let since = Moment(erasure.fenced_ms).to_string();
        return Err(InspectError::Erased { user, since });
    }
    let mut days: BTreeMap<DeviceId, BTreeMap<Day, Count>> = BTreeMap::new();
    for row in store.rows_of(user) {
        let row = counted(row)?;
        days.entry(row.key.device)
            .or_default()
            .entry(row.day)
            .or_default()
            .add(row.count);
    }
    let mut devices = Vec::new();
    for device in store.devices_of(user) {
        let (device, record) = device?;
        devices.push(device_report(
            device,
            &record,
            days.remove(&device).unwrap_or_default(),
        ));
    }
    if devices.is_empty() {
        return Err(InspectError::UnknownUser(user));
    }
    let pause = store.withheld_of(user)?;
    Ok(UserReport {
        user: user.to_string(),
        paused_since_ms: pause.map_or(0, |pause| pause.since_ms),
        devices,
    })
}

fn device_report(
    device: DeviceId,
    record: &DeviceRecord,
    days: BTreeMap<Day, Count>,
) -> DeviceReport {
    let ranges = record.settled.above().iter();
    DeviceReport {
        device: device.device,
        epoch: record.epoch,
        position: record.position,
        settled_upto: record.settled.floor(),
        settled_above: ranges
            .map(|range| RangeReport {
                first: range.first,
                last: range.last,
            })
            .collect(),
        gaps: record.gaps,
        last_contact_ms: record.clocks.last_contact_ms,
        last_sample_ms: record.clocks.last_sample_ms,
        last_fix_ms: record.clocks.last_fix_ms,
        durable_ms: record.clocks.durable_ms,
        days: day_reports(days),
    }
}

fn day_reports(days: BTreeMap<Day, Count>) -> Vec<DayReport> {
    let report = |(day, count): (Day, Count)| DayReport {
        day: day.to_string(),
        rows: count.rows,
        sealed_rows: count.sealed_rows,
        pings: count.pings,
    };
    days.into_iter().map(report).collect()
}

fn counted(row: Result<PingRow, ReadError>) -> Result<Row, ReadError> {
    let (day, key, sealed_rows, pings) = match row {
        Ok(row) => (row.day, row.key, 0, row.record.pings.len() as u64),
        Err(ReadError::Sealed { day, key }) => (day, key, 1, 0),
        Err(error) => return Err(error),
    };
    Ok(Row {
        day,
        key,
        count: Count {
            rows: 1,
            sealed_rows,
            pings,
        },
    })
}

impl Count {
    fn add(&mut self, more: Self) {
        self.rows += more.rows;
        self.sealed_rows += more.sealed_rows;
        self.pings += more.pings;
    }
}

impl fmt::Display for StoreReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "incarnation  {}", self.incarnation)?;
        writeln!(f, "position     {}", self.position)?;
        writeln!(
            f,
            "users        {}, {} of them paused; {} erased",
            self.users, self.paused_users, self.erased_users
        )?;
        writeln!(f, "devices      {}", self.devices)?;
        write!(f, "pings        {} in {} rows", self.pings, self.rows)?;
        say_sealed(self.sealed_rows, f)?;
        writeln!(f)?;
        writeln!(f, "on disk      {} bytes", self.size_bytes)?;
        writeln!(f, "received on")?;
        self.days.iter().try_for_each(|day| writeln!(f, "  {day}"))
    }
}

impl fmt::Display for UserReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {}", self.user)?;
        match self.paused_since_ms {
            0 => writeln!(f)?,
            since_ms => writeln!(f, ", paused since {}", Moment(since_ms))?,
        }
        self.devices
            .iter()
            .try_for_each(|device| write!(f, "{device}"))
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\ndevice {}", self.device)?;
        writeln!(f, "  epoch         {}", self.epoch)?;
        write!(f, "  settled       1 to {}", self.settled_upto)?;
        for range in &self.settled_above {
            write!(f, ", {} to {}", range.first, range.last)?;
        }
        writeln!(f, "\n  given up      {}", self.gaps)?;
        writeln!(f, "  last contact  {}", Moment(self.last_contact_ms))?;
        writeln!(f, "  last sample   {}", Moment(self.last_sample_ms))?;
        writeln!(f, "  last fix      {}", Moment(self.last_fix_ms))?;
        writeln!(
            f,
            "  durable       {} at position {}",
            Moment(self.durable_ms),
            self.position
        )?;
        writeln!(f, "  received on")?;
        self.days
            .iter()
            .try_for_each(|day| writeln!(f, "    {day}"))
    }
}

impl fmt::Display for DayReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}  {} pings in {} rows",
            self.day, self.pings, self.rows
        )?;
        say_sealed(self.sealed_rows, f)
    }
}

fn say_sealed(rows: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match rows {
        0 => Ok(()),
        rows => write!(
            f,
            ", {rows} of them sealed with no key here and not counted"
        ),
    }
}

/// Milliseconds since 1970-01-01 UTC, as people read them.
pub(crate) struct Moment(pub(crate) u64);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("never");
        }
        let (seconds, ms) = (self.0 / 1_000, self.0 % 1_000);
        let (minutes, hours) = (seconds / 60, seconds / 3_600);
        write!(
            f,
            "{} {:02}:{:02}:{:02}.{ms:03} UTC",
            Day::of_ms(self.0),
            hours % 24,
            minutes % 60,
            seconds % 60
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use prost::Message;
    use tempfile::TempDir;
    use waypost_proto::{
        batch,
        device::Clocks,
        ping::{Ping, Source},
    };

    use super::*;
    use crate::{
        bulletin::News,
        grants::CheckerSet,
        sharing::{Sharing, Transition, Turn},
        store::{PingKey, StoreConfig, record},
    };

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: InspectArgs,
    }

    /// 2026-08-20 12:34:56.789 UTC.
    const NOW_MS: u64 = 1_787_229_296_789;
    const USER: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    const LATITUDE_E7: i32 = 535_123_457;
    const LONGITUDE_E7: i32 = -101_234_567;

    /// A store with two devices of one user; the gateway stays open.
    fn store() -> (TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), &StoreConfig::default(), NOW_MS).unwrap();
        for number in [7, 8] {
            let device = DeviceId {
                user: UserId::parse(USER).unwrap(),
                device: number,
            };
            let pings: Vec<Ping> = (1..=5)
                .map(|seq| Ping {
                    source: Source::Gnss,
                    ..Ping::at(seq, NOW_MS, LATITUDE_E7, LONGITUDE_E7)
                })
                .collect();
            let mut record = DeviceRecord {
                epoch: 3,
                position: u64::from(number),
                gaps: 2,
                ..DeviceRecord::default()
            };
            record.settled.close_below(6);
            record.settled.insert(9);
            record.clocks = Clocks {
                last_contact_ms: NOW_MS,
                last_sample_ms: NOW_MS,
                last_fix_ms: 0,
                durable_ms: NOW_MS,
            };
            let mut batch = store.batch();
            let columns = batch::encode(3, &pings).encode_to_vec();
            let value = record::encode_pings(NOW_MS, record.position, &columns);
            batch.put_pings(
                Day::of_ms(NOW_MS),
                &PingKey {
                    device,
                    epoch: 3,
                    first_seq: 1,
                },
                &value,
            );
            batch.put_device(&device, &record);
            store.commit(batch).unwrap();
        }
        (folder, store)
    }

    fn inspect(folder: &TempDir, options: &[&str]) -> Result<String, InspectError> {
        let data_dir = folder.path().to_str().unwrap();
        let args = Command::parse_from([&["inspect", "--data", data_dir], options].concat()).args;
        let mut out = Vec::new();
        run(&args, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn the_store_as_a_whole_is_counted_beside_its_gateway() {
        let (folder, store) = store();
        let incarnation = hex(&store.incarnation());
        let json: serde_json::Value =
            serde_json::from_str(&inspect(&folder, &["--json"]).unwrap()).unwrap();
        let mut expected = serde_json::json!({
            "incarnation": incarnation, "position": 8, "users": 1, "paused_users": 0, "erased_users": 0,
            "devices": 2, "rows": 2, "sealed_rows": 0, "pings": 10,
            "days": [{"day": "2026-08-20", "rows": 2, "sealed_rows": 0, "pings": 10}],
        });
        expected["size_bytes"] = json["size_bytes"].clone();
        assert!(0 < json["size_bytes"].as_u64().unwrap());
        assert_eq!(json, expected);
        let text = inspect(&folder, &[]).unwrap();
        for line in [
            &format!("incarnation  {incarnation}"),
            "position     8",
            "  2026-08-20  10 pings in 2 rows",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line:?} is not in\n{text}"
            );
        }
    }

    #[test]
    fn a_user_is_shown_by_device() {
        let (folder, _store) = store();
        let json: serde_json::Value =
            serde_json::from_str(&inspect(&folder, &["--user", USER, "--json"]).unwrap()).unwrap();
        let device = |number: u32| {
            serde_json::json!({
                "device": number, "epoch": 3, "position": number, "settled_upto": 5,
                "settled_above": [{"first": 9, "last": 9}], "gaps": 2,
                "last_contact_ms": NOW_MS, "last_sample_ms": NOW_MS, "last_fix_ms": 0, "durable_ms": NOW_MS,
                "days": [{"day": "2026-08-20", "rows": 1, "sealed_rows": 0, "pings": 5}],
            })
        };
        assert_eq!(
            json,
            serde_json::json!({"user": USER, "paused_since_ms": 0, "devices": [device(7), device(8)]})
        );
        let text = inspect(&folder, &["--user", USER]).unwrap();
        for line in [
            "device 8",
            "  settled       1 to 5, 9 to 9",
            "  last contact  2026-08-20 12:34:56.789 UTC",
            "  last fix      never",
            "    2026-08-20  5 pings in 1 rows",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line:?} is not in\n{text}"
            );
        }
        let stranger = inspect(&folder, &["--user", "00000000-0000-0000-0000-000000000000"]);
        assert!(
            matches!(stranger, Err(InspectError::UnknownUser(_))),
            "{stranger:?}"
        );
    }

    #[test]
    fn a_holder_who_has_paused_is_shown_as_such() {
        let (folder, store) = store();
        let mut batch = store.batch();
        batch.put_news(&News {
            transitions: vec![Transition {
                user: UserId::parse(USER).unwrap(),
                turn: Turn::Sharing(Sharing::Paused),
                checkers: CheckerSet::ALL,
                at_ms: NOW_MS,
                position: 9,
                number: 0,
            }],
            ..News::default()
        });
        store.commit(batch).unwrap();
        let whole = inspect(&folder, &[]).unwrap();
        assert!(
            whole.contains("users        1, 1 of them paused; 0 erased"),
            "{whole}"
        );
        let user = inspect(&folder, &["--user", USER]).unwrap();
        assert!(
            user.starts_with(&format!(
                "user {USER}, paused since 2026-08-20 12:34:56.789 UTC\n"
            )),
            "{user}"
        );
    }

    #[test]
    fn without_the_master_key_rows_are_counted_and_pings_are_not() {
        let (folder, _store) = store();
        let master = folder.path().join("master.key");
        let elsewhere = folder.path().join("elsewhere.key");
        std::fs::rename(&master, &elsewhere).unwrap();
        let text = inspect(&folder, &[]).unwrap();
        let line = "pings        0 in 2 rows, 2 of them sealed with no key here and not counted";
        assert!(text.lines().any(|found| found == line), "{text}");
        let config = folder.path().join("waypost.toml");
        std::fs::write(
            &config,
            "[store.sealing]\nmaster_key_file = \"elsewhere.key\"\n",
        )
        .unwrap();
        let text = inspect(&folder, &["--config", config.to_str().unwrap()]).unwrap();
        assert!(text.contains("pings        10 in 2 rows\n"), "{text}");
    }

    #[test]
    fn no_report_holds_a_coordinate() {
        let (folder, _store) = store();
        for options in [
            &[][..],
            &["--json"],
            &["--user", USER],
            &["--user", USER, "--json"],
        ] {
            let text = inspect(&folder, options).unwrap();
            for coordinate in ["535123457", "101234567", "53.5", "10.1"] {
                assert!(!text.contains(coordinate), "{coordinate} is in\n{text}");
            }
        }
    }

    #[test]
    fn the_end_of_time_can_be_printed() {
        assert_eq!(Moment(0).to_string(), "never");
        assert!(Moment(u64::MAX).to_string().ends_with(" UTC"));
    }
}
