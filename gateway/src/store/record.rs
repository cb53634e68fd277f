//! The values of the store: a byte that names the format, then protobuf.
//!
//! Knows how a device's record and a row of pings are written down. Must not know keys or RocksDB. What
//! it reads may be damaged: it answers with an error, never with a panic or a large allocation.

use prost::Message;
use waypost_proto::{
    batch,
    device::{Clocks, DeviceRecord, Samples},
    ping::Ping,
    ranges::{RangeSet, SeqRange},
    v1,
};

use crate::seal::Unopened;

/// The first byte of every value; a later format takes another, and so does a sealed value.
const FORMAT: u8 = 1;

/// A row of pings, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PingRecord {
    /// When the gateway received them, in milliseconds since 1970-01-01 UTC.
    pub receive_ms: u64,
    /// The commit that made them durable.
    pub position: u64,
    /// The pings.
    pub pings: Vec<Ping>,
}

/// Why a value cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// There is not even a format byte.
    #[error("the value is empty")]
    Empty,
    /// The format is another one.
    #[error("the value has format {0}, which this version cannot read")]
    UnknownFormat(u8),
    /// The protobuf part is damaged.
    #[error("the value is cut short or damaged")]
    Malformed,
    /// The ranges of a device break their order or their bound.
    #[error("the settled ranges are out of order")]
    BadRanges,
    /// The columns of a row of pings do not give valid pings.
    #[error("the columns of the pings cannot be read")]
    BadPings,
    /// It does not open with its user's key.
    #[error(transparent)]
    Unopened(#[from] Unopened),
}

/// What stands before the columns of a row of pings.
#[derive(Clone, PartialEq, Message)]
struct PingHead {
    #[prost(uint64, tag = "1")]
    receive_ms: u64,
    #[prost(uint64, tag = "2")]
    position: u64,
}

/// A [`DeviceRecord`] as it is stored. Field numbers are for ever.
#[derive(Clone, PartialEq, Message)]
struct DeviceRow {
    #[prost(uint32, tag = "1")]
    epoch: u32,
    #[prost(uint64, tag = "2")]
    floor: u64,
    /// For each range above the floor: how far its first number is above the last settled one below
    /// it, then how far its last number is above its first.
    #[prost(uint64, repeated, tag = "3")]
    above: Vec<u64>,
    #[prost(uint64, tag = "4")]
    last_contact_ms: u64,
    #[prost(uint64, tag = "5")]
    last_sample_ms: u64,
    #[prost(uint64, tag = "6")]
    last_fix_ms: u64,
    #[prost(uint64, tag = "7")]
    durable_ms: u64,
    #[prost(uint64, tag = "8")]
    position: u64,
    #[prost(uint64, tag = "9")]
    gaps: u64,
    /// Missing in nearly every row.
    #[prost(uint64, tag = "10")]
    unproven_sample_ms: u64,
    #[prost(uint64, tag = "11")]
    unproven_fix_ms: u64,
}

/// Writes a row of pings: when they were received, in which commit, and their columns, which are an
/// encoded [`v1::PingBatch`].
#[must_use]
pub fn encode_pings(receive_ms: u64, position: u64, columns: &[u8]) -> Vec<u8> {
    let head = PingHead {
        receive_ms,
        position,
    };
    let mut value = Vec::with_capacity(2 + head.encoded_len() + columns.len());
    value.push(FORMAT);
    head.encode_length_delimited(&mut value)
        .expect("a Vec grows");
    value.extend_from_slice(columns);
    value
}

/// Reads a row of pings.
///
/// # Errors
/// When the value is damaged or of another format.
pub fn decode_pings(value: &[u8]) -> Result<PingRecord, RecordError> {
    let mut rest = body(value)?;
    let head = PingHead::decode_length_delimited(&mut rest).map_err(|_| RecordError::Malformed)?;
    let batch = v1::PingBatch::decode(rest).map_err(|_| RecordError::Malformed)?;
    // A ping takes at least a byte in the column of times: more pings than bytes are damage.
    let decoded = batch::decode(&batch, value.len()).map_err(|_| RecordError::BadPings)?;
    if !decoded.malformed.is_empty() {
        return Err(RecordError::BadPings);
    }
    Ok(PingRecord {
        receive_ms: head.receive_ms,
        position: head.position,
        pings: decoded.pings,
    })
}

/// Writes a device's record to the end of `value`.
pub fn encode_device(record: &DeviceRecord, value: &mut Vec<u8>) {
    let mut above = Vec::with_capacity(2 * record.settled.above().len());
    let mut below = record.settled.floor();
    for range in record.settled.above() {
        above.extend([range.first - below, range.last - range.first]);
        below = range.last;
    }
    let unproven = record.unproven.as_deref().copied().unwrap_or_default();
    let row = DeviceRow {
        epoch: record.epoch,
        floor: record.settled.floor(),
        above,
        last_contact_ms: record.clocks.last_contact_ms,
        last_sample_ms: record.clocks.last_sample_ms,
        last_fix_ms: record.clocks.last_fix_ms,
        durable_ms: record.clocks.durable_ms,
        position: record.position,
        gaps: record.gaps,
        unproven_sample_ms: unproven.sample_ms,
        unproven_fix_ms: unproven.fix_ms,
    };
    value.push(FORMAT);
    row.encode(value).expect("a Vec grows");
}

/// Reads a device's record.
///
/// # Errors
/// When the value is damaged or of another format.
pub fn decode_device(value: &[u8]) -> Result<DeviceRecord, RecordError> {
    let row = DeviceRow::decode(body(value)?).map_err(|_| RecordError::Malformed)?;
    let (steps, []) = row.above.as_chunks::<2>() else {
        return Err(RecordError::BadRanges);
    };
    let mut above = Vec::with_capacity(steps.len());
    let mut below = row.floor;
    for [gap, length] in steps {
        let first = below.checked_add(*gap).ok_or(RecordError::BadRanges)?;
        let last = first.checked_add(*length).ok_or(RecordError::BadRanges)?;
        above.push(SeqRange { first, last });
        below = last;
    }
    let unproven = Samples {
        sample_ms: row.unproven_sample_ms,
        fix_ms: row.unproven_fix_ms,
    };
    Ok(DeviceRecord {
        epoch: row.epoch,
        settled: RangeSet::from_parts(row.floor, above).ok_or(RecordError::BadRanges)?,
        clocks: Clocks {
            last_contact_ms: row.last_contact_ms,
            last_sample_ms: row.last_sample_ms,
            last_fix_ms: row.last_fix_ms,
            durable_ms: row.durable_ms,
        },
        position: row.position,
        gaps: row.gaps,
        unproven: (unproven != Samples::default()).then(|| Box::new(unproven)),
    })
}

/// Writes any other row to the end of `value`.
pub(super) fn encode_row(row: &impl Message, value: &mut Vec<u8>) {
    value.push(FORMAT);
    row.encode(value).expect("a Vec grows");
}

/// Reads any other row.
pub(super) fn decode_row<Row: Message + Default>(value: &[u8]) -> Result<Row, RecordError> {
    Row::decode(body(value)?).map_err(|_| RecordError::Malformed)
}

fn body(value: &[u8]) -> Result<&[u8], RecordError> {
    match value.split_first() {
        None => Err(RecordError::Empty),
        Some((&FORMAT, body)) => Ok(body),
        Some((&format, _)) => Err(RecordError::UnknownFormat(format)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use waypost_proto::{
        device::{Admission, Claim, Policy},
        ping::Source,
        ranges::MAX_RANGES,
    };

    use super::*;

    fn record() -> impl Strategy<Value = DeviceRecord> {
        let numbers = prop_oneof![0..200_u64, any::<u64>()];
        (
            any::<u32>(),
            prop::collection::vec(numbers, 0..100),
            any::<[u64; 4]>(),
            any::<u64>(),
            any::<u64>(),
            prop::option::of((1_u64.., any::<u64>())),
        )
            .prop_map(|(epoch, seqs, clocks, position, gaps, unproven)| {
                let mut settled = RangeSet::default();
                for seq in seqs {
                    settled.insert(seq);
                }
                let [last_contact_ms, last_sample_ms, last_fix_ms, durable_ms] = clocks;
                let clocks = Clocks {
                    last_contact_ms,
                    last_sample_ms,
                    last_fix_ms,
                    durable_ms,
                };
                DeviceRecord {
                    epoch,
                    settled,
                    clocks,
                    position,
                    gaps,
                    unproven: unproven
                        .map(|(sample_ms, fix_ms)| Box::new(Samples { sample_ms, fix_ms })),
                }
            })
    }

    fn encoded(record: &DeviceRecord) -> Vec<u8> {
        let mut value = Vec::new();
        encode_device(record, &mut value);
        value
    }

    fn ping(seq: u64) -> Ping {
        Ping {
            seq,
            time_ms: 1_641_168_000_000 + seq,
            latitude_e7: 10,
            longitude_e7: -20,
            accuracy_dm: Some(5),
            altitude_dm: None,
            speed_cm_per_s: None,
            course_ddeg: None,
            heading_deg: None,
            battery_percent: Some(80),
            source: Source::Gnss,
        }
    }

    /// What a device may do to its dedup state, and the restart that must not change it.
    #[derive(Clone, Debug)]
    enum Step {
        Send(u64),
        GiveUpBelow(u64),
        BeginEpoch,
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            40 => (1..300_u64).prop_map(Step::Send),
            2 => (0..300_u64).prop_map(Step::GiveUpBelow),
            1 => Just(Step::BeginEpoch),
            8 => Just(Step::Restart),
        ]
    }

    proptest! {
        #[test]
        fn dedup_over_any_number_of_restarts_agrees_with_a_set(steps in prop::collection::vec(step(), 0..400)) {
            let policy = Policy {
                retention_ms: u64::MAX,
                future_tolerance_ms: u64::MAX,
                least_interval_ms: 0,
                least_distance_m: 0.0,
            };
            let mut record = DeviceRecord { epoch: 1, ..DeviceRecord::default() };
            let mut model = HashSet::new();
            for step in steps {
                match step {
                    Step::Send(seq) => {
                        let judgement = record.judge(&[ping(seq)], &[], 1, &policy, &mut None);
                        if model.contains(&seq) {
                            prop_assert_eq!((judgement.stored.len(), judgement.duplicate), (0, 1));
                        } else if judgement.rejects.is_empty() {
                            prop_assert_eq!((judgement.stored.len(), judgement.duplicate), (1, 0));
                            model.insert(seq);
                        } else {
                            prop_assert_eq!(record.settled.above().len(), MAX_RANGES, "too sparse");
                        }
                    }
                    Step::GiveUpBelow(seq) => {
                        let claim = Claim { epoch: record.epoch, oldest_unsent_seq: seq, ..Claim::default() };
                        prop_assert_eq!(record.admit(claim), Admission::Resumed);
                        model.extend(1..seq);
                    }
                    Step::BeginEpoch => {
                        let before = record.epoch;
                        prop_assert_eq!(record.admit(Claim::default()), Admission::NewEpoch);
                        prop_assert!(before < record.epoch);
                        model.clear();
                    }
                    Step::Restart => record = decode_device(&encoded(&record)).expect("our own row"),
                }
                for seq in 1..300 {
                    prop_assert_eq!(record.settled.contains(seq), model.contains(&seq), "seq {}", seq);
                }
            }
        }

        #[test]
        fn device_records_round_trip(record in record()) {
            prop_assert_eq!(decode_device(&encoded(&record)), Ok(record));
        }

        #[test]
        fn rows_of_pings_round_trip(receive_ms: u64, position: u64, count in 1..50_u64) {
            let pings: Vec<Ping> = (1..=count).map(ping).collect();
            let value = encode_pings(receive_ms, position, &batch::encode(3, &pings).encode_to_vec());
            prop_assert_eq!(decode_pings(&value), Ok(PingRecord { receive_ms, position, pings }));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let with_format = [&[FORMAT], bytes.as_slice()].concat();
            for value in [&bytes, &with_format] {
                drop(decode_device(value));
                drop(decode_pings(value));
            }
        }

        #[test]
        fn no_damage_panics(record in record(), at: prop::sample::Index, byte: u8) {
            let mut value = encoded(&record);
            let at = at.index(value.len());
            value[at] = byte;
            drop(decode_device(&value));
            drop(decode_device(&value[..at]));

            let pings: Vec<Ping> = (1..=9).map(ping).collect();
            let mut value = encode_pings(1, 2, &batch::encode(3, &pings).encode_to_vec());
            let at = at % value.len();
            value[at] = byte;
            drop(decode_pings(&value));
            drop(decode_pings(&value[..at]));
        }
    }

    #[test]
    fn giant_lengths_are_refused_without_allocating() {
        // A packed column and a message head that claim 2^63 bytes.
        let giant = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        let column = [&[FORMAT, 3 << 3 | 2], giant.as_slice()].concat();
        assert_eq!(decode_device(&column), Err(RecordError::Malformed));
        let head = [&[FORMAT], giant.as_slice()].concat();
        assert_eq!(decode_pings(&head), Err(RecordError::Malformed));
        let count = v1::PingBatch {
            epoch: 1,
            first_seq: 1,
            count: u32::MAX,
            ..Default::default()
        };
        assert_eq!(
            decode_pings(&encode_pings(1, 1, &count.encode_to_vec())),
            Err(RecordError::BadPings)
        );
    }

    #[test]
    fn another_format_is_named() {
        assert_eq!(decode_device(&[]), Err(RecordError::Empty));
        assert_eq!(
            decode_device(&[2, 8, 1]),
            Err(RecordError::UnknownFormat(2))
        );
        assert_eq!(decode_pings(&[9]), Err(RecordError::UnknownFormat(9)));
    }

    #[test]
    fn a_device_that_sends_in_order_has_a_small_row() {
        let mut record = DeviceRecord {
            epoch: 3,
            position: 1_000_000_000,
            ..DeviceRecord::default()
        };
        record.settled.close_below(1_000_001);
        let now_ms = 1_790_000_000_000;
        record.clocks = Clocks {
            last_contact_ms: now_ms,
            last_sample_ms: now_ms,
            last_fix_ms: now_ms,
            durable_ms: now_ms,
        };
        assert!(
            encoded(&record).len() <= 48,
            "{} bytes",
            encoded(&record).len()
        );
    }
}
