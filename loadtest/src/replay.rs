//! A recorded day of AIS positions as a scenario.
//!
//! Knows the columns of the file and what their values mean. Must not know how pings are sent.

use std::{
    fs::File,
    io::{BufReader, Read},
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, bail, ensure};
use flate2::read::MultiGzDecoder;
use rustc_hash::FxHashMap;
use serde::Deserialize;
use waypost_proto::{
    id::DeviceId,
    ping::{
        COURSE_CIRCLE_DDEG, HEADING_CIRCLE_DEG, MAX_LATITUDE_E7, MAX_LONGITUDE_E7, Ping, Source,
    },
};

use crate::scenario::{DuePing, only_device_of};

/// A recording, ready to be sent.
#[derive(Debug)]
pub struct Replay {
    /// How many times faster than recorded; `None` for as fast as acknowledgements allow.
    pub speed_up: Option<f64>,
    /// How often the recording is sent.
    pub passes: u32,
    devices: Vec<DeviceId>,
    recorded: Vec<Recorded>,
    first_ms: u64,
}

#[derive(Debug)]
struct Recorded {
    device: usize,
    ping: Ping,
}

/// One row, as in the file.
#[derive(Debug, Deserialize)]
struct Row {
    mmsi: u64,
    time: String,
    lat: f64,
    lon: f64,
    sog_knots: Option<f64>,
    cog_degrees: Option<f64>,
    heading_degrees: Option<f64>,
}

impl Replay {
    /// Reads a recording, gzipped if its name ends so. The order of the file is kept; it must not go
    /// back in time.
    ///
    /// # Errors
    /// When the file cannot be read, or a row is not what its columns say.
    pub fn open(path: &Path, speed_up: Option<f64>, passes: u32) -> anyhow::Result<Self> {
        let file = File::open(path)
            .with_context(|| format!("cannot open the recording {}", path.display()))?;
        let mut replay = if path.extension().is_some_and(|extension| extension == "gz") {
            Self::read(BufReader::new(MultiGzDecoder::new(file)))
        } else {
            Self::read(BufReader::new(file))
        }
        .with_context(|| format!("cannot replay {}", path.display()))?;
        replay.speed_up = speed_up;
        replay.passes = passes;
        Ok(replay)
    }

    fn read(input: impl Read) -> anyhow::Result<Self> {
        let mut devices = Vec::new();
        let mut index_of = FxHashMap::default();
        let mut sent_by: Vec<u64> = Vec::new();
        let mut recorded: Vec<Recorded> = Vec::new();
        let mut rows = csv::Reader::from_reader(input);
        let mut previous_ms = 0;
        for row in rows.deserialize() {
            let row: Row = row.context(
                "the columns must be mmsi,time,lat,lon,sog_knots,cog_degrees,heading_degrees",
            )?;
            let line = recorded.len() + 2; // The header is line 1.
            let device = *index_of.entry(row.mmsi).or_insert_with(|| {
                devices.push(only_device_of(&format!("mmsi:{}", row.mmsi)));
                sent_by.push(0);
                devices.len() - 1
            });
            sent_by[device] += 1;
            let ping = row
                .to_ping(sent_by[device])
                .with_context(|| format!("line {line}"))?;
            ensure!(
                previous_ms <= ping.time_ms,
                "line {line}: {} is earlier than the row before; sort the file by time",
                row.time
            );
            previous_ms = ping.time_ms;
            recorded.push(Recorded { device, ping });
        }
        let Some(first) = recorded.first() else {
            bail!("the recording holds no rows")
        };
        let first_ms = first.ping.time_ms;
        Ok(Self {
            speed_up: None,
            passes: 1,
            devices,
            recorded,
            first_ms,
        })
    }

    /// Shifts all times as a whole, so that the last ping was sampled at `now_ms`, to the second: times
    /// on whole seconds stay there, as a real device's would.
    pub fn end_at(&mut self, now_ms: u64) {
        let Some(last) = self.recorded.last() else {
            return;
        };
        let to_second = |ms: u64| ms / 1_000 * 1_000;
        let (from_ms, to_ms) = (to_second(last.ping.time_ms), to_second(now_ms));
        for recorded in &mut self.recorded {
            let time_ms = &mut recorded.ping.time_ms;
            *time_ms = (*time_ms + to_ms).saturating_sub(from_ms);
        }
        self.first_ms = (self.first_ms + to_ms).saturating_sub(from_ms);
    }

    /// Who took part, in the order of appearance.
    #[must_use]
    pub fn devices(&self) -> &[DeviceId] {
        &self.devices
    }

    /// How many pings the recording holds.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an empty recording is refused")]
    pub fn len(&self) -> u64 {
        self.recorded.len() as u64
    }

    /// The pings in the file's order.
    pub fn pings(&self) -> impl Iterator<Item = DuePing> + '_ {
        self.recorded.iter().map(|Recorded { device, ping }| {
            let since_first = Duration::from_millis(ping.time_ms - self.first_ms);
            let due = self
                .speed_up
                .map_or(Duration::ZERO, |speed_up| since_first.div_f64(speed_up));
            DuePing {
                due,
                device: *device,
                ping: *ping,
            }
        })
    }
}

impl Row {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the values are below a full circle"
    )]
    fn to_ping(&self, seq: u64) -> anyhow::Result<Ping> {
        let time = humantime::parse_rfc3339_weak(&self.time)
            .with_context(|| format!("{:?} is not a time like 2022-01-03T00:00:00Z", self.time))?;
        let time_ms = time
            .duration_since(UNIX_EPOCH)
            .context("the time is before 1970")?
            .as_millis();
        Ok(Ping {
            seq,
            time_ms: u64::try_from(time_ms)?,
            latitude_e7: degrees_e7(self.lat, MAX_LATITUDE_E7)
                .context("lat is not between -90 and 90")?,
            longitude_e7: degrees_e7(self.lon, MAX_LONGITUDE_E7)
                .context("lon is not between -180 and 180")?,
            accuracy_dm: None,
            altitude_dm: None,
            speed_cm_per_s: whole_below(self.sog_knots, 102.3, KNOT_CM_PER_S),
            course_ddeg: whole_below(self.cog_degrees, 360.0, 10.0)
                .map(|ddeg| ddeg as u16 % COURSE_CIRCLE_DDEG),
            heading_deg: whole_below(self.heading_degrees, 360.0, 1.0)
                .map(|deg| deg as u16 % HEADING_CIRCLE_DEG),
            battery_percent: None,
            source: Source::Gnss,
        })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "checked on the same line")]
fn degrees_e7(degrees: f64, limit_e7: i32) -> Option<i32> {
    let e7 = (degrees * 1e7).round();
    (e7.abs() <= f64::from(limit_e7)).then_some(e7 as i32)
}

/// A value of AIS in another unit, rounded. From `not_available` on, AIS says that there is none: 511
/// for a heading, 360 for a course, 102.3 for a speed (ITU-R M.1371-5, table 46).
#[expect(clippy::cast_possible_truncation, reason = "all limits are small")]
fn whole_below(value: Option<f64>, not_available: f64, factor: f64) -> Option<u32> {
    value
        .filter(|value| (0.0..not_available).contains(value))
        .map(|value| (value * factor).round() as u32)
}

/// One nautical mile, 1,852 m, an hour.
const KNOT_CM_PER_S: f64 = 185_200.0 / 3_600.0;

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "mmsi,time,lat,lon,sog_knots,cog_degrees,heading_degrees\n";

    fn replay(rows: &str) -> Replay {
        Replay::read(format!("{HEADER}{rows}").as_bytes()).unwrap()
    }

    #[test]
    fn a_row_becomes_a_ping_in_our_units() {
        let replay = replay("205125000,2022-01-03T00:00:01Z,29.9408,-90.05819,10.5,171.5,174\n");
        let ping = replay.pings().next().unwrap().ping;
        assert_eq!(
            ping,
            Ping {
                speed_cm_per_s: Some(540),
                course_ddeg: Some(1_715),
                heading_deg: Some(174),
                source: Source::Gnss,
                ..Ping::at(1, 1_641_168_001_000, 299_408_000, -900_581_900)
            }
        );
    }

    #[test]
    fn what_ais_calls_not_available_is_absent() {
        let replay = replay(
            "1,2022-01-03T00:00:00Z,1,2,102.3,360.0,511\n1,2022-01-03T00:00:00Z,1,2,0.0,0.0,0\n",
        );
        let values: Vec<_> = replay
            .pings()
            .map(|due| {
                (
                    due.ping.speed_cm_per_s,
                    due.ping.course_ddeg,
                    due.ping.heading_deg,
                )
            })
            .collect();
        assert_eq!(values, [(None, None, None), (Some(0), Some(0), Some(0))]);
    }

    #[test]
    fn every_row_is_a_ping_also_an_exact_repeat() {
        let row = "7,2022-01-03T00:00:00Z,1,2,3,4,5\n";
        let replay = replay(&format!(
            "{row}{row}8,2022-01-03T00:00:00Z,1,2,3,4,5\n{row}"
        ));
        let named: Vec<_> = replay
            .pings()
            .map(|due| (due.device, due.ping.seq))
            .collect();
        assert_eq!(named, [(0, 1), (0, 2), (1, 1), (0, 3)]);
        assert_eq!(
            replay.devices(),
            [only_device_of("mmsi:7"), only_device_of("mmsi:8")]
        );
    }

    #[test]
    fn pings_are_due_as_recorded_but_faster() {
        let mut replay =
            replay("7,2022-01-03T00:00:00Z,1,2,3,4,5\n7,2022-01-03T00:24:00Z,1,2,3,4,5\n");
        replay.speed_up = Some(1_440.0);
        replay.end_at(1_700_000_000_999);
        let due: Vec<_> = replay
            .pings()
            .map(|due| (due.due, due.ping.time_ms))
            .collect();
        assert_eq!(
            due,
            [
                (Duration::ZERO, 1_700_000_000_000 - 24 * 60_000),
                (Duration::from_secs(1), 1_700_000_000_000)
            ]
        );
    }

    #[test]
    fn a_bad_row_is_named() {
        let bad = |row: &str| {
            format!(
                "{:#}",
                Replay::read(format!("{HEADER}{row}\n").as_bytes()).unwrap_err()
            )
        };
        assert!(bad("7,yesterday,1,2,3,4,5").contains("line 2: \"yesterday\""));
        assert!(bad("7,2022-01-03T00:00:00Z,91,2,3,4,5").contains("line 2: lat"));
        assert!(bad("7,2022-01-03T00:00:00Z,1,NaN,3,4,5").contains("line 2: lon"));
    }
}
