//! Any message with columns through the decoder and back; for the fuzzer and for the replay of its corpus.
//!
//! Says how much it got through, so that a corpus that reaches nothing is noticed.

use std::collections::HashSet;

use prost::Message;
use waypost_proto::{
    batch,
    ping::{COURSE_CIRCLE_DDEG, HEADING_CIRCLE_DEG, MAX_LATITUDE_E7, MAX_LONGITUDE_E7, Ping},
    session::batch_len,
    v1,
};

/// One message with columns. Gives the valid pings that were in it.
pub(crate) fn run(data: &[u8]) -> usize {
    let Ok(wire) = v1::PingBatch::decode(data) else {
        return 0;
    };
    let Ok(decoded) = batch::decode(&wire, MAX_BATCH_PINGS) else {
        return 0;
    };
    assert_eq!(batch_len(&decoded), wire.count, "each ping has its place");
    assert!(decoded.pings.iter().all(is_valid));
    assert!(decoded.pings.is_sorted_by(|one, next| one.seq < next.seq));
    assert!(decoded.malformed.is_sorted_by(|one, next| one.0 < next.0));
    let malformed: HashSet<u64> = decoded.malformed.iter().map(|(seq, _)| *seq).collect();
    assert!(
        !decoded
            .pings
            .iter()
            .any(|ping| malformed.contains(&ping.seq))
    );
    if !decoded.pings.is_empty() {
        let again = batch::encode(decoded.epoch, &decoded.pings);
        let again = batch::decode(&again, MAX_BATCH_PINGS).expect("our own columns are good");
        assert_eq!(again.pings, decoded.pings, "what was read can be stored");
        assert!(again.malformed.is_empty());
    }
    decoded.pings.len()
}

fn is_valid(ping: &Ping) -> bool {
    0 < ping.seq
        && ping.latitude_e7.abs() <= MAX_LATITUDE_E7
        && ping.longitude_e7.abs() <= MAX_LONGITUDE_E7
        && ping
            .course_ddeg
            .is_none_or(|course| course < COURSE_CIRCLE_DDEG)
        && ping
            .heading_deg
            .is_none_or(|heading| heading < HEADING_CIRCLE_DEG)
        && ping.battery_percent.is_none_or(|percent| percent <= 100)
}

const MAX_BATCH_PINGS: usize = 1_000;
