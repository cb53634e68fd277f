//! What a ping costs on the wire, measured on a day of real ship movements.
//!
//! The file is not part of the repository: `AIS_FILE` names it, or it lies where the project keeps
//! it. Without it the measurement says so and is skipped; the lone ping is always measured.

#![expect(
    clippy::print_stdout,
    reason = "the figures are the point; cargo shows them with --nocapture"
)]

use std::{collections::BTreeMap, env, fs::File, io::Read, path::PathBuf};

use bytes::BytesMut;
use flate2::read::GzDecoder;
use waypost_proto::{
    batch,
    frame::{FrameReader, encode_frame},
    ping::{Ping, Source},
    v1::{DeviceFrame, device_frame::Kind},
};

/// The goal of the design, framing included.
const MAX_BYTES_PER_PING: f64 = 12.0;
/// The headers of UDP and QUIC and the authentication tag add less than as much again.
const MAX_LONE_PING_BYTES: usize = 64;
const MAX_FRAME_BYTES: usize = 65_536;
const MAX_BATCH_PINGS: usize = 1_000;
/// Vessels that were heard less often say little about a day.
const LEAST_PINGS: usize = 10;

/// Each vessel's day as one batch, split at the limit: what a device sends that has been out of reach.
#[test]
fn a_vessels_day_costs_at_most_12_bytes_a_ping() {
    let path = env::var_os("AIS_FILE").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../shared/data/ais-2022-01-03.csv.gz"
            ))
        },
        PathBuf::from,
    );
    let Ok(file) = File::open(&path) else {
        println!(
            "SKIPPED: no AIS file at {}; name one with AIS_FILE",
            path.display()
        );
        return;
    };
    let vessels = read_vessels(GzDecoder::new(file));

    let (mut vessel_count, mut batch_count, mut ping_count, mut byte_count) =
        (0_u32, 0_u32, 0_u32, 0_u32);
    for pings in vessels.values().filter(|pings| LEAST_PINGS <= pings.len()) {
        vessel_count += 1;
        for pings in pings.chunks(MAX_BATCH_PINGS) {
            batch_count += 1;
            ping_count += u32::try_from(pings.len()).expect("a batch is small");
            byte_count += u32::try_from(frame_bytes(pings)).expect("a frame is small");
        }
    }
    assert!(
        0 < ping_count,
        "the file holds vessels with {LEAST_PINGS} pings"
    );
    let bytes_per_ping = f64::from(byte_count) / f64::from(ping_count);
    println!(
        "{bytes_per_ping:.2} bytes a ping: {ping_count} pings of {vessel_count} vessels in {batch_count} \
         frames, {byte_count} bytes with their length prefixes"
    );
    assert!(
        bytes_per_ping <= MAX_BYTES_PER_PING,
        "{bytes_per_ping:.2} bytes a ping"
    );
}

/// One ping in a frame of its own, as a device sends it while all is well. Every number is as long as
/// it gets in practice: the corner of the globe, a day in 2100, the hundred-millionth ping.
#[test]
fn a_lone_ping_fits_one_small_packet() {
    let moving = Ping {
        speed_cm_per_s: Some(5_144),
        course_ddeg: Some(1_799),
        heading_deg: Some(179),
        ..Ping::at(100_000_000, 4_102_444_800_001, -899_999_999, -1_799_999_999)
    };
    let frame = frame_bytes(&[moving]);
    let complete = frame_bytes(&[Ping {
        accuracy_dm: Some(1_000),
        altitude_dm: Some(88_480),
        battery_percent: Some(100),
        source: Source::Gnss,
        ..moving
    }]);
    println!(
        "a lone ping: {frame} bytes with time, position, speed, course and heading; {complete} with \
         accuracy, altitude, battery and source as well"
    );
    assert!(frame <= MAX_LONE_PING_BYTES, "{frame} bytes");
}

/// The size of the frame that carries these pings, its prefix included; checks that it does carry them.
fn frame_bytes(pings: &[Ping]) -> usize {
    let mut bytes = BytesMut::new();
    encode_frame(
        &DeviceFrame {
            kind: Some(Kind::Batch(batch::encode(1, pings))),
        },
        &mut bytes,
    );

    let mut reader = FrameReader::new(MAX_FRAME_BYTES);
    reader.extend(&bytes);
    let frame: DeviceFrame = reader.next().expect("a good frame").expect("a whole frame");
    assert!(!reader.is_inside_frame());
    let Some(Kind::Batch(wire)) = frame.kind else {
        panic!("a batch")
    };
    let decoded = batch::decode(&wire, MAX_BATCH_PINGS).expect("a good batch");
    assert_eq!(
        (decoded.pings.as_slice(), decoded.malformed.as_slice()),
        (pings, &[][..])
    );
    bytes.len()
}

/// The pings of each vessel by its number, in the order of the file, which is that of time.
fn read_vessels(file: impl Read) -> BTreeMap<u32, Vec<Ping>> {
    let mut vessels: BTreeMap<u32, Vec<Ping>> = BTreeMap::new();
    for row in csv::Reader::from_reader(file).into_records() {
        let row = row.expect("a CSV row");
        let pings = vessels.entry(row[0].parse().expect("an MMSI")).or_default();
        pings.push(ping(pings.len() as u64 + 1, &row));
    }
    vessels
}

/// A row of mmsi, time, lat, lon, sog_knots, cog_degrees, heading_degrees. AIS has a value for "not
/// available" in each of the last three.
fn ping(seq: u64, row: &csv::StringRecord) -> Ping {
    let number = |at: usize| row[at].parse::<f64>().expect("a number");
    let (speed_knots, course_degrees, heading_degrees) = (number(4), number(5), number(6));
    Ping {
        speed_cm_per_s: (speed_knots < 102.3).then(|| whole(speed_knots * CM_PER_S_PER_KNOT)),
        course_ddeg: (course_degrees < 360.0).then(|| whole(course_degrees * 10.0)),
        heading_deg: (heading_degrees < 360.0).then(|| whole(heading_degrees)),
        ..Ping::at(
            seq,
            time_ms(&row[1]),
            whole(number(2) * 1e7),
            whole(number(3) * 1e7),
        )
    }
}

/// The nearest whole number, which must fit.
fn whole<T: TryFrom<i64, Error: std::fmt::Debug>>(value: f64) -> T {
    #[expect(clippy::cast_possible_truncation, reason = "far below 2^53")]
    let nearest = value.round() as i64;
    T::try_from(nearest).expect("a value in range")
}

/// The moment that a time of the file's day names.
fn time_ms(text: &str) -> u64 {
    let time_of_day = text
        .strip_prefix("2022-01-03T")
        .and_then(|rest| rest.strip_suffix('Z'));
    let seconds = time_of_day
        .expect("a time of 2022-01-03 in UTC")
        .split(':')
        .fold(0, |sum, part| {
            sum * 60 + part.parse::<u64>().expect("hours, minutes or seconds")
        });
    (SECONDS_UNTIL_2022_01_03 + seconds) * 1_000
}

/// 1,852 metres an hour.
const CM_PER_S_PER_KNOT: f64 = 185_200.0 / 3_600.0;
const SECONDS_UNTIL_2022_01_03: u64 = 1_641_168_000;
