//! Columns by example and by property.

use proptest::{collection::vec, option, prelude::*, sample};
use prost::Message;

use super::*;

const LIMIT: usize = 1_000;

/// Three pings in one place, one second apart; the base that tests change.
fn three_pings() -> v1::PingBatch {
    v1::PingBatch {
        epoch: 7,
        first_seq: 1,
        count: 3,
        time: vec![1_641_168_000, 1, 1],
        time_unit_ms: 1_000,
        latitude: vec![5_990_001, 0, 0],
        longitude: vec![-1_070_000, 0, 0],
        degree_scale: 100,
        ..v1::PingBatch::default()
    }
}

fn decoded(wire: &v1::PingBatch) -> DecodedBatch {
    decode(wire, LIMIT).expect("the sequence numbers are good")
}

#[test]
fn columns_are_read_as_the_schema_says() {
    let wire = v1::PingBatch {
        first_seq: 5,
        seq_gap: vec![0, 10],
        latitude: vec![5_990_000, 1, -2],
        accuracy_dm: vec![50, 5],
        accuracy_present: vec![0, 1, 2],
        altitude_dm: vec![-12],
        altitude_present: vec![1, 2],
        speed_cm_per_s: vec![514, -14, 0],
        course_ddeg: vec![-100, 200, -101],
        heading_deg: vec![359, 1],
        heading_present: vec![1, 1, 1],
        battery_percent: vec![100, -100, 1],
        source_runs: vec![2, 1, 1, 4],
        ..three_pings()
    };
    let first = Ping {
        seq: 5,
        time_ms: 1_641_168_000_000,
        latitude_e7: 599_000_000,
        longitude_e7: -107_000_000,
        accuracy_dm: None,
        altitude_dm: Some(-12),
        speed_cm_per_s: Some(514),
        course_ddeg: Some(3_500),
        heading_deg: Some(359),
        battery_percent: Some(100),
        source: Source::Gnss,
    };
    let second = Ping {
        seq: 6,
        time_ms: 1_641_168_001_000,
        latitude_e7: 599_000_100,
        accuracy_dm: Some(50),
        altitude_dm: None,
        speed_cm_per_s: Some(500),
        course_ddeg: Some(100),
        heading_deg: None,
        battery_percent: Some(0),
        ..first
    };
    let third = Ping {
        seq: 17,
        time_ms: 1_641_168_002_000,
        latitude_e7: 598_999_900,
        accuracy_dm: Some(55),
        course_ddeg: Some(3_599),
        heading_deg: Some(0),
        battery_percent: Some(1),
        source: Source::LastKnown,
        ..second
    };
    let expected = DecodedBatch {
        epoch: 7,
        pings: vec![first, second, third],
        malformed: vec![],
    };
    assert_eq!(decoded(&wire), expected);
    assert_eq!(decoded(&encode(7, &expected.pings)), expected);
}

#[test]
fn the_encoder_leaves_out_what_it_can() {
    let pings = decoded(&three_pings()).pings;
    assert_eq!(encode(7, &pings), three_pings());

    let [first, second, third] = pings[..] else {
        panic!("three pings")
    };
    let odd = Ping {
        time_ms: third.time_ms + 1,
        longitude_e7: 1,
        ..third
    };
    let wire = encode(7, &[first, second, odd]);
    assert_eq!(
        (wire.time_unit_ms, wire.degree_scale),
        (0, 0),
        "one odd value, units of one"
    );

    let lone = encode(7, &[first]);
    assert_eq!(
        (lone.time_unit_ms, lone.degree_scale),
        (0, 0),
        "a lone ping has no differences"
    );
    assert_eq!(decoded(&lone).pings, [first]);

    let moving = |course_ddeg, ping| Ping {
        course_ddeg: Some(course_ddeg),
        ..ping
    };
    let wire = encode(
        7,
        &[
            moving(3_500, first),
            moving(100, second),
            moving(3_500, third),
        ],
    );
    assert_eq!(wire.course_ddeg, [-100, 200, -200], "the short way round");
    assert_eq!(wire.course_present, [0; 0]);
    let wire = encode(7, &[first, moving(3_500, second), third]);
    assert_eq!(wire.course_present, [0, 1, 1, 1]);
}

#[test]
fn a_batch_that_does_not_say_which_pings_it_holds_is_refused() {
    let seqs = |first_seq, count, seq_gap: &[u32]| v1::PingBatch {
        first_seq,
        count,
        seq_gap: seq_gap.to_vec(),
        ..three_pings()
    };
    let too_many = |count| {
        Err(BatchError::TooManyPings {
            count,
            limit: LIMIT,
        })
    };
    for (wire, expected) in [
        (seqs(1, 3, &[]), Ok(3)),
        (seqs(1, 1_000, &[]), Ok(1_000)),
        (seqs(1, 1_001, &[]), too_many(1_001)),
        (seqs(1, u32::MAX, &[]), too_many(u32::MAX)),
        (seqs(1, 0, &[]), Err(BatchError::BadSequence)),
        (seqs(0, 3, &[]), Err(BatchError::BadSequence)),
        (seqs(1, 3, &[1]), Err(BatchError::BadSequence)),
        (seqs(1, 3, &[1, 1, 1]), Err(BatchError::BadSequence)),
        (seqs(u64::MAX - 2, 3, &[]), Ok(3)),
        (seqs(u64::MAX - 1, 3, &[]), Err(BatchError::BadSequence)),
        (seqs(u64::MAX - 3, 3, &[0, 2]), Err(BatchError::BadSequence)),
        (seqs(1, 3, &[0, u32::MAX - 2]), Ok(3)),
        (seqs(1, 3, &[0, u32::MAX - 1]), Err(BatchError::BadSequence)),
        (
            seqs(1, 3, &[u32::MAX, u32::MAX]),
            Err(BatchError::BadSequence),
        ),
    ] {
        let found = decode(&wire, LIMIT).map(|batch| batch.pings.len() + batch.malformed.len());
        assert_eq!(
            found, expected,
            "{} pings from {}, gaps {:?}",
            wire.count, wire.first_seq, wire.seq_gap
        );
    }
}

#[test]
fn a_column_that_does_not_fit_the_count_makes_all_pings_malformed() {
    type Spoil = fn(&mut v1::PingBatch);
    let spoils: [(&str, Spoil); 12] = [
        ("no time", |wire| wire.time.clear()),
        ("a time too many", |wire| wire.time.push(1)),
        ("a latitude too few", |wire| wire.latitude.truncate(2)),
        ("no longitude", |wire| wire.longitude.clear()),
        ("too few speeds", |wire| wire.speed_cm_per_s = vec![1, 2]),
        ("presence of too few", |wire| {
            (wire.speed_cm_per_s, wire.speed_present) = (vec![1], vec![1, 1]);
        }),
        ("presence of too many", |wire| {
            (wire.speed_cm_per_s, wire.speed_present) = (vec![1], vec![1, 3]);
        }),
        ("gigantic presence", |wire| {
            (wire.speed_cm_per_s, wire.speed_present) = (vec![1], vec![u32::MAX; 1_000]);
        }),
        ("presence without values", |wire| {
            wire.battery_present = vec![1, 2]
        }),
        ("a run without its source", |wire| {
            wire.source_runs = vec![3, 1, 0]
        }),
        ("sources of too few", |wire| wire.source_runs = vec![2, 1]),
        ("gigantic sources", |wire| {
            wire.source_runs = vec![u32::MAX, 1, u32::MAX, 1]
        }),
    ];
    for (name, spoil) in spoils {
        let mut wire = three_pings();
        spoil(&mut wire);
        let malformed = [1, 2, 3].map(|seq| (seq, RejectCode::Schema)).to_vec();
        let expected = DecodedBatch {
            epoch: 7,
            pings: vec![],
            malformed,
        };
        assert_eq!(decoded(&wire), expected, "{name}");
    }
}

#[test]
fn a_value_out_of_range_costs_its_own_ping_only() {
    use RejectCode::{BadCoordinates, Schema};
    type Spoil = fn(&mut v1::PingBatch);
    let spoils: [(&str, Spoil, RejectCode); 8] = [
        ("time below 1970", |wire| wire.time = vec![0, -1, 1], Schema),
        (
            "time over 64 bits",
            |wire| wire.time = vec![0, i64::MAX, -i64::MAX],
            Schema,
        ),
        (
            "latitude over 90",
            |wire| wire.latitude = vec![0, 9_000_001, -9_000_001],
            BadCoordinates,
        ),
        (
            "latitude under -90",
            |wire| wire.latitude = vec![0, -9_000_001, 9_000_001],
            BadCoordinates,
        ),
        (
            "longitude over 180",
            |wire| wire.longitude = vec![1, 18_000_000, -1],
            BadCoordinates,
        ),
        (
            "longitude under -180",
            |wire| wire.longitude = vec![-1, -18_000_000, 1],
            BadCoordinates,
        ),
        (
            "a sum over 64 bits",
            |wire| wire.latitude = vec![1, i64::MAX, -i64::MAX],
            BadCoordinates,
        ),
        (
            "a sum under 64 bits",
            |wire| wire.longitude = vec![-1, i64::MIN, i64::MAX],
            BadCoordinates,
        ),
    ];
    for (name, spoil, code) in spoils {
        let mut wire = three_pings();
        spoil(&mut wire);
        let batch = decoded(&wire);
        let seqs: Vec<u64> = batch.pings.iter().map(|ping| ping.seq).collect();
        assert_eq!(
            (seqs, batch.malformed),
            (vec![1, 3], vec![(2, code)]),
            "{name}"
        );
    }
}

#[test]
fn an_optional_value_out_of_range_is_as_good_as_none() {
    type Spoil = fn(&mut v1::PingBatch);
    type Spare = fn(&mut Ping);
    let spoils: [(&str, Spoil, Spare); 7] = [
        (
            "accuracy below 0",
            |wire| wire.accuracy_dm = vec![0, -1, 1],
            |ping| ping.accuracy_dm = None,
        ),
        (
            "altitude over 32 bits",
            |wire| wire.altitude_dm = vec![0, 1 << 31, -1],
            |ping| ping.altitude_dm = None,
        ),
        (
            "speed over 32 bits",
            |wire| wire.speed_cm_per_s = vec![0, 1 << 32, -1],
            |ping| ping.speed_cm_per_s = None,
        ),
        (
            "battery over 100",
            |wire| wire.battery_percent = vec![100, 1, -1],
            |ping| ping.battery_percent = None,
        ),
        (
            "battery over 8 bits",
            |wire| wire.battery_percent = vec![0, 256, -256],
            |ping| ping.battery_percent = None,
        ),
        (
            "a source of the future",
            |wire| wire.source_runs = vec![1, 1, 1, 5, 1, 1],
            |ping| ping.source = Source::Unspecified,
        ),
        (
            "source over 31 bits",
            |wire| wire.source_runs = vec![1, 1, 1, u32::MAX, 1, 1],
            |ping| ping.source = Source::Unspecified,
        ),
    ];
    for (name, spoil, spare) in spoils {
        let mut wire = three_pings();
        spoil(&mut wire);
        let batch = decoded(&wire);
        assert_eq!(
            (batch.pings.len(), &batch.malformed[..]),
            (3, &[][..]),
            "{name}"
        );
        let mut expected = batch.pings[1];
        spare(&mut expected);
        assert_eq!(batch.pings[1], expected, "{name}");
    }
}

#[test]
fn huge_units_spare_only_zero() {
    let wire = v1::PingBatch {
        time: vec![0, 0, i64::MAX],
        time_unit_ms: u32::MAX,
        latitude: vec![0, 1, -1],
        longitude: vec![0, 0, 0],
        degree_scale: u32::MAX,
        ..three_pings()
    };
    let batch = decoded(&wire);
    assert_eq!(batch.pings.len(), 1);
    assert_eq!(
        batch.malformed,
        [(2, RejectCode::BadCoordinates), (3, RejectCode::Schema)]
    );
}

#[test]
fn sums_are_exact_beyond_64_bits() {
    let wire = v1::PingBatch {
        // In 64 bits these would come back to 0.
        latitude: vec![i64::MAX, i64::MAX, 2],
        course_ddeg: vec![3_599, i64::MAX, i64::MIN],
        heading_deg: vec![-1, i64::MIN, i64::MAX],
        ..three_pings()
    };
    let malformed = [1, 2, 3].map(|seq| (seq, RejectCode::BadCoordinates));
    assert_eq!(decoded(&wire).malformed, malformed);

    let batch = decoded(&v1::PingBatch {
        latitude: vec![0, 0, 0],
        ..wire
    });
    // 2^63 is 1,808 modulo 3,600 and 8 modulo 360.
    let courses = batch.pings.iter().map(|ping| ping.course_ddeg);
    assert_eq!(courses.collect::<Vec<_>>(), [3_599, 1_806, 3_598].map(Some));
    let headings = batch.pings.iter().map(|ping| ping.heading_deg);
    assert_eq!(headings.collect::<Vec<_>>(), [359, 351, 358].map(Some));
}

#[test]
fn of_two_faults_the_first_column_is_told_and_the_ping_is_listed_once() {
    let wire = v1::PingBatch {
        time: vec![0, 0, -1],
        latitude: vec![9_000_001, 0, 0],
        battery_percent: vec![101, -101, 0],
        ..three_pings()
    };
    let bad = RejectCode::BadCoordinates;
    let malformed = vec![(1, bad), (2, bad), (3, RejectCode::Schema)];
    assert_eq!(
        decoded(&wire),
        DecodedBatch {
            epoch: 7,
            pings: vec![],
            malformed
        }
    );
}

#[test]
#[should_panic(expected = "in the order of their numbers")]
fn pings_out_of_order_are_not_encoded() {
    let pings = decoded(&three_pings()).pings;
    drop(encode(7, &[pings[1], pings[0]]));
}

/// Any valid ping, its number aside. Times and places are often round, as real ones are.
fn ping() -> impl Strategy<Value = Ping> {
    let time_ms = prop_oneof![
        0..=i64::MAX as u64,
        (0..2_000_000_000_u64).prop_map(|seconds| seconds * 1_000),
        (0..5_u64).prop_map(|hours| 1_641_168_000_000 + hours * 3_600_000),
    ];
    let place = prop_oneof![
        (
            -MAX_LATITUDE_E7..=MAX_LATITUDE_E7,
            -MAX_LONGITUDE_E7..=MAX_LONGITUDE_E7
        ),
        (-90..=90, -180..=180).prop_map(|(north, east)| (north * 10_000_000, east * 10_000_000)),
    ];
    let motion = (
        option::of(any::<u32>()),
        option::of(0..COURSE_CIRCLE_DDEG),
        option::of(0..HEADING_CIRCLE_DEG),
    );
    let device = (
        option::of(any::<u32>()),
        option::of(any::<i32>()),
        option::of(0..=100_u8),
        (0..=4).prop_map(|number| Source::try_from(number).expect("a source")),
    );
    (time_ms, place, motion, device).prop_map(|(time_ms, place, motion, device)| Ping {
        seq: 1,
        time_ms,
        latitude_e7: place.0,
        longitude_e7: place.1,
        accuracy_dm: device.0,
        altitude_dm: device.1,
        speed_cm_per_s: motion.0,
        course_ddeg: motion.1,
        heading_deg: motion.2,
        battery_percent: device.2,
        source: device.3,
    })
}

/// Pings that a batch can hold, in ascending order; in some, whole columns are missing or full.
fn pings() -> impl Strategy<Value = Vec<Ping>> {
    let gap = prop_oneof![4 => Just(0), 1 => 0..100_000_000_u64];
    let same = option::of((any::<bool>(), any::<bool>()));
    (1..=u64::MAX / 2, vec((ping(), gap), 1..40), same).prop_map(|(first_seq, rows, same)| {
        let model = rows[0].0;
        let mut seq = first_seq - 1;
        let number = |(mut ping, gap): (Ping, u64)| {
            seq += 1 + gap;
            ping.seq = seq;
            if let Some((same_motion, same_device)) = same {
                if same_motion {
                    ping.speed_cm_per_s = model.speed_cm_per_s;
                    ping.course_ddeg = model.course_ddeg;
                    ping.heading_deg = model.heading_deg;
                }
                if same_device {
                    ping.accuracy_dm = model.accuracy_dm;
                    ping.altitude_dm = model.altitude_dm;
                    ping.battery_percent = model.battery_percent;
                    ping.source = model.source;
                }
            }
            ping
        };
        rows.into_iter().map(number).collect()
    })
}

/// A column of about the right length, with values from tiny to the ends of the range.
fn wire_column(count: usize) -> impl Strategy<Value = Vec<i64>> {
    let delta = prop_oneof![
        60 => -50..150_i64,
        1 => any::<i64>(),
        1 => sample::select(vec![i64::MIN, i64::MAX, 1 << 31, 1 << 32, 3_600, -360]),
    ];
    prop_oneof![
        1 => vec(delta.clone(), 0..=count + 1),
        30 => vec(delta, count),
    ]
}

/// Runs that often fit the count together with the column.
fn wire_optional(count: usize) -> impl Strategy<Value = (Vec<i64>, Vec<u32>)> {
    let runs = vec(prop_oneof![4 => 0..4_u32, 1 => any::<u32>()], 0..6);
    let fitting =
        (vec(any::<bool>(), count), vec(-50..150_i64, count)).prop_map(|(present, deltas)| {
            let mut runs = vec![0];
            for has_value in &present {
                if (runs.len() % 2 == 1) != *has_value {
                    runs.push(0);
                }
                *runs.last_mut().expect("one run") += 1;
            }
            (
                deltas
                    .into_iter()
                    .take(present.iter().filter(|has| **has).count())
                    .collect(),
                runs,
            )
        });
    prop_oneof![
        1 => (wire_column(count), runs),
        10 => fitting,
        10 => Just((Vec::new(), Vec::new())),
        10 => (wire_column(count), Just(Vec::new())),
    ]
}

fn wire() -> impl Strategy<Value = v1::PingBatch> {
    (0..12_usize).prop_flat_map(|count| {
        let said = prop_oneof![
            8 => Just(u32::try_from(count).expect("small")),
            1 => 0..20_u32,
            1 => any::<u32>(),
        ];
        let seqs = (
            prop_oneof![8 => 1..1_000_u64, 1 => any::<u64>(), 1 => u64::MAX - 20..=u64::MAX],
            prop_oneof![
                4 => Just(Vec::new()),
                4 => vec(0..5_u32, count.saturating_sub(1)),
                1 => vec(any::<u32>(), 0..=count),
            ],
            said,
        );
        let factor = || prop_oneof![4 => 0..2_000_u32, 1 => any::<u32>()];
        let places = (
            (wire_column(count), factor()),
            (wire_column(count), wire_column(count), factor()),
        );
        let optional = vec(wire_optional(count), 6);
        let sources = prop_oneof![
            2 => Just(Vec::new()),
            2 => (0..6_u32).prop_map(move |source| vec![u32::try_from(count).expect("small"), source]),
            1 => vec(any::<u32>(), 0..4),
        ];
        (seqs, places, optional, sources).prop_map(|(seqs, (times, places), optional, sources)| {
            let mut optional = optional.into_iter();
            let mut next = || optional.next().expect("six columns");
            let (accuracy_dm, accuracy_present) = next();
            let (altitude_dm, altitude_present) = next();
            let (speed_cm_per_s, speed_present) = next();
            let (course_ddeg, course_present) = next();
            let (heading_deg, heading_present) = next();
            let (battery_percent, battery_present) = next();
            v1::PingBatch {
                epoch: 7,
                first_seq: seqs.0,
                seq_gap: seqs.1,
                count: seqs.2,
                time: times.0,
                time_unit_ms: times.1,
                latitude: places.0,
                longitude: places.1,
                degree_scale: places.2,
                accuracy_dm,
                accuracy_present,
                altitude_dm,
                altitude_present,
                speed_cm_per_s,
                speed_present,
                course_ddeg,
                course_present,
                heading_deg,
                heading_present,
                battery_percent,
                battery_present,
                source_runs: sources,
            }
        })
    })
}

fn is_valid(ping: &Ping) -> bool {
    ping.seq > 0
        && ping.latitude_e7.unsigned_abs() <= MAX_LATITUDE_E7.unsigned_abs()
        && ping.longitude_e7.unsigned_abs() <= MAX_LONGITUDE_E7.unsigned_abs()
        && ping
            .course_ddeg
            .is_none_or(|course| course < COURSE_CIRCLE_DDEG)
        && ping
            .heading_deg
            .is_none_or(|heading| heading < HEADING_CIRCLE_DEG)
        && ping.battery_percent.is_none_or(|percent| percent <= 100)
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(epoch: u32, pings in pings()) {
        let bytes = encode(epoch, &pings).encode_to_vec();
        let wire = v1::PingBatch::decode(&bytes[..]).expect("a message");
        let expected = DecodedBatch { epoch, pings, malformed: vec![] };
        prop_assert_eq!(decode(&wire, LIMIT), Ok(expected));
    }

    #[test]
    fn whatever_a_batch_says_each_ping_is_valid_or_refused(wire in wire()) {
        let Ok(batch) = decode(&wire, 15) else { return Ok(()) };
        let mut seqs: Vec<u64> = batch.pings.iter().map(|ping| ping.seq).collect();
        seqs.extend(batch.malformed.iter().map(|(seq, _)| seq));
        seqs.sort_unstable();
        prop_assert!(seqs.len() <= 15);
        prop_assert_eq!(&seqs, &sequence_numbers(&wire).expect("checked").collect::<Vec<_>>());
        prop_assert!(batch.pings.iter().all(is_valid));
        prop_assert!(batch.pings.is_sorted_by_key(|ping| ping.seq));
        prop_assert!(batch.malformed.is_sorted_by_key(|(seq, _)| *seq));

        // What was admitted can be stored: any part of it makes a batch of its own.
        let kept: Vec<Ping> = batch.pings.into_iter().step_by(2).collect();
        if !kept.is_empty() {
            prop_assert_eq!(decoded(&encode(7, &kept)).pings, kept);
        }
    }
}
