//! Pings as columns: the only door between [`v1::PingBatch`] and [`Ping`], and the place where ranges
//! are checked.
//!
//! Knows the column format that `waypost/v1/device.proto` describes. Must not know epochs, duplicates
//! or the clock: a ping that is valid here may still be refused later.

use std::iter;

use crate::{
    ping::{
        COURSE_CIRCLE_DDEG, HEADING_CIRCLE_DEG, MAX_LATITUDE_E7, MAX_LONGITUDE_E7, Ping,
        RejectCode, Source,
    },
    v1,
};

/// What was in a batch. Each of its sequence numbers is in one of the two lists; both are in ascending
/// order of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedBatch {
    /// The epoch that the batch names.
    pub epoch: u32,
    /// The valid pings.
    pub pings: Vec<Ping>,
    /// The sequence numbers of the others, and what is wrong with them.
    pub malformed: Vec<(u64, RejectCode)>,
}

/// Why a batch cannot even be refused ping by ping. It closes the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// More pings than the limit.
    #[error("a batch of {count} pings is over the limit of {limit}; send it in parts")]
    TooManyPings {
        /// What the batch says.
        count: u32,
        /// What is allowed.
        limit: usize,
    },
    /// It does not say which pings it holds.
    #[error(
        "the sequence numbers of a batch cannot be told: count and first_seq are at least 1, seq_gap is \
         empty or one shorter than count, and the last number is less than 2^32 above the first"
    )]
    BadSequence,
}

/// Makes pings of columns.
///
/// A column whose length or presence list does not fit the count says nothing about any ping, so all
/// are malformed. A value that is out of range costs its own ping only; the next one counts on from
/// it all the same. Times range from 0 to 2^63 - 1 milliseconds. Work and memory are bounded by
/// `max_pings` and by the size of the message, whatever it says.
pub fn decode(wire: &v1::PingBatch, max_pings: usize) -> Result<DecodedBatch, BatchError> {
    if usize::try_from(wire.count).map_or(true, |count| max_pings < count) {
        return Err(BatchError::TooManyPings {
            count: wire.count,
            limit: max_pings,
        });
    }
    let seqs = sequence_numbers(wire)?;
    if !is_readable(wire) {
        let malformed = seqs.map(|seq| (seq, RejectCode::Schema)).collect();
        return Ok(DecodedBatch {
            epoch: wire.epoch,
            pings: Vec::new(),
            malformed,
        });
    }

    let mut rows = Rows {
        pings: seqs.map(|seq| Ping::at(seq, 0, 0, 0)).collect(),
        malformed: Vec::new(),
    };
    let schema = RejectCode::Schema;
    let unit_ms = i64::from(wire.time_unit_ms.max(1));
    rows.fill(schema, &[], sums(&wire.time), |ping, time| {
        ping.time_ms = u64::try_from(i64::try_from(time).ok()?.checked_mul(unit_ms)?).ok()?;
        Some(())
    });
    let scale = i64::from(wire.degree_scale.max(1));
    rows.fill(
        RejectCode::BadCoordinates,
        &[],
        sums(&wire.latitude),
        |ping, latitude| {
            ping.latitude_e7 = degrees_e7(latitude, scale, MAX_LATITUDE_E7)?;
            Some(())
        },
    );
    rows.fill(
        RejectCode::BadCoordinates,
        &[],
        sums(&wire.longitude),
        |ping, longitude| {
            ping.longitude_e7 = degrees_e7(longitude, scale, MAX_LONGITUDE_E7)?;
            Some(())
        },
    );
    // A value that is optional and out of range is as good as none: a stuck battery gauge must not cost
    // the position that came with it.
    rows.fill(
        schema,
        &wire.accuracy_present,
        sums(&wire.accuracy_dm),
        |ping, accuracy| {
            ping.accuracy_dm = u32::try_from(accuracy).ok();
            Some(())
        },
    );
    rows.fill(
        schema,
        &wire.altitude_present,
        sums(&wire.altitude_dm),
        |ping, altitude| {
            ping.altitude_dm = i32::try_from(altitude).ok();
            Some(())
        },
    );
    rows.fill(
        schema,
        &wire.speed_present,
        sums(&wire.speed_cm_per_s),
        |ping, speed| {
            ping.speed_cm_per_s = u32::try_from(speed).ok();
            Some(())
        },
    );
    let course = turns::<COURSE_CIRCLE_DDEG>(&wire.course_ddeg);
    rows.fill(schema, &wire.course_present, course, |ping, course| {
        ping.course_ddeg = Some(u16::try_from(course).ok()?);
        Some(())
    });
    let heading = turns::<HEADING_CIRCLE_DEG>(&wire.heading_deg);
    rows.fill(schema, &wire.heading_present, heading, |ping, heading| {
        ping.heading_deg = Some(u16::try_from(heading).ok()?);
        Some(())
    });
    rows.fill(
        schema,
        &wire.battery_present,
        sums(&wire.battery_percent),
        |ping, battery| {
            ping.battery_percent = u8::try_from(battery).ok().filter(|percent| *percent <= 100);
            Some(())
        },
    );
    rows.fill_sources(&wire.source_runs);
    Ok(rows.finish(wire.epoch))
}

/// Makes columns of valid pings, which must be in ascending order of their sequence numbers, with the
/// last less than 2^32 above the first. Any pings of one [`DecodedBatch`] are.
///
/// The unit of time and the scale of coordinates are the largest that lose nothing.
///
/// # Panics
///
/// If the order is another.
#[must_use]
pub fn encode(epoch: u32, pings: &[Ping]) -> v1::PingBatch {
    let unit_ms = common_factor(pings, COARSEST_UNIT_MS, |ping| [ping.time_ms]);
    let scale = common_factor(pings, COARSEST_SCALE, |ping| {
        [ping.latitude_e7, ping.longitude_e7].map(|degrees_e7| u64::from(degrees_e7.unsigned_abs()))
    });
    let time = |ping: &Ping| {
        // Beyond the range of the column is far enough in the future to be refused just the same.
        Some(i64::try_from(ping.time_ms / u64::from(unit_ms)).unwrap_or(i64::MAX))
    };
    let degrees = |degrees_e7: i32| Some(i64::from(degrees_e7) / i64::from(scale));
    let (time, _) = column(pings, time, difference);
    let (latitude, _) = column(pings, |ping| degrees(ping.latitude_e7), difference);
    let (longitude, _) = column(pings, |ping| degrees(ping.longitude_e7), difference);
    let (accuracy_dm, accuracy_present) =
        column(pings, |ping| ping.accuracy_dm.map(i64::from), difference);
    let (altitude_dm, altitude_present) =
        column(pings, |ping| ping.altitude_dm.map(i64::from), difference);
    let (speed_cm_per_s, speed_present) =
        column(pings, |ping| ping.speed_cm_per_s.map(i64::from), difference);
    let (course_ddeg, course_present) = column(
        pings,
        |ping| ping.course_ddeg.map(i64::from),
        short_way_round::<COURSE_CIRCLE_DDEG>,
    );
    let (heading_deg, heading_present) = column(
        pings,
        |ping| ping.heading_deg.map(i64::from),
        short_way_round::<HEADING_CIRCLE_DEG>,
    );
    let (battery_percent, battery_present) = column(
        pings,
        |ping| ping.battery_percent.map(i64::from),
        difference,
    );
    v1::PingBatch {
        epoch,
        first_seq: pings.first().map_or(0, |ping| ping.seq),
        seq_gap: sequence_gaps(pings),
        count: count(pings),
        time,
        // 1 is said by saying nothing.
        time_unit_ms: if unit_ms == 1 { 0 } else { unit_ms },
        latitude,
        longitude,
        degree_scale: if scale == 1 { 0 } else { scale },
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
        source_runs: source_runs(pings),
    }
}

/// The pings of a batch while its columns are poured into them.
struct Rows {
    pings: Vec<Ping>,
    /// In the order of columns, a ping once for each of its bad values.
    malformed: Vec<(u64, RejectCode)>,
}

impl Rows {
    /// Sets one field of the pings that have a value in this column. `set` gives `None` for a value out
    /// of range.
    fn fill<V>(
        &mut self,
        code: RejectCode,
        present: &[u32],
        mut values: impl Iterator<Item = V>,
        set: impl Fn(&mut Ping, V) -> Option<()>,
    ) {
        let mut fill_run = |pings: &mut [Ping]| {
            for (ping, value) in pings.iter_mut().zip(&mut values) {
                if set(ping, value).is_none() {
                    self.malformed.push((ping.seq, code));
                }
            }
        };
        if present.is_empty() {
            return fill_run(&mut self.pings);
        }
        let mut rest = &mut self.pings[..];
        for (run, has_value) in present.iter().zip([true, false].into_iter().cycle()) {
            let Some((pings, after)) = rest.split_at_mut_checked(*run as usize) else {
                return;
            };
            if has_value {
                fill_run(pings);
            }
            rest = after;
        }
    }

    /// A source that this version does not know is one that is not specified.
    fn fill_sources(&mut self, source_runs: &[u32]) {
        let mut pings = self.pings.iter_mut();
        for run in source_runs.chunks_exact(2) {
            let source = i32::try_from(run[1])
                .ok()
                .and_then(|number| Source::try_from(number).ok())
                .unwrap_or_default();
            for ping in pings.by_ref().take(run[0] as usize) {
                ping.source = source;
            }
        }
    }

    /// Parts the valid from the malformed. Of several faults the one in the first column is told.
    fn finish(self, epoch: u32) -> DecodedBatch {
        let Self {
            mut pings,
            mut malformed,
        } = self;
        if !malformed.is_empty() {
            malformed.sort_by_key(|(seq, _)| *seq);
            malformed.dedup_by_key(|(seq, _)| *seq);
            pings.retain(|ping| {
                malformed
                    .binary_search_by_key(&ping.seq, |(seq, _)| *seq)
                    .is_err()
            });
        }
        DecodedBatch {
            epoch,
            pings,
            malformed,
        }
    }
}

/// The sequence number of each ping.
fn sequence_numbers(wire: &v1::PingBatch) -> Result<impl Iterator<Item = u64>, BatchError> {
    let steps = u64::from(wire.count)
        .checked_sub(1)
        .ok_or(BatchError::BadSequence)?;
    let gaps = &wire.seq_gap;
    if !gaps.is_empty() && gaps.len() as u64 != steps {
        return Err(BatchError::BadSequence);
    }
    let span = steps + gaps.iter().copied().map(u64::from).sum::<u64>();
    // Then any of these pings may stand side by side in another batch: a gap always fits in 32 bits.
    let is_narrow = span <= u64::from(u32::MAX);
    if wire.first_seq == 0 || !is_narrow || wire.first_seq.checked_add(span).is_none() {
        return Err(BatchError::BadSequence);
    }
    let mut skipped = 0;
    let later_gaps = gaps.iter().copied().chain(iter::repeat(0));
    Ok((0..=steps)
        .zip(iter::once(0).chain(later_gaps))
        .map(move |(step, gap)| {
            skipped += u64::from(gap);
            wire.first_seq + step + skipped
        }))
}

/// Whether all columns fit the count.
fn is_readable(wire: &v1::PingBatch) -> bool {
    let count = u64::from(wire.count);
    let is_full = |column: &[i64]| column.len() as u64 == count;
    let fits = |column: &[i64], present: &[u32]| {
        if present.is_empty() {
            return column.is_empty() || is_full(column);
        }
        let runs = |first| {
            present
                .iter()
                .skip(first)
                .step_by(2)
                .copied()
                .map(u64::from)
                .sum::<u64>()
        };
        let (have, lack) = (runs(0), runs(1));
        column.len() as u64 == have && have + lack == count
    };
    let sources = wire.source_runs.chunks_exact(2);
    is_full(&wire.time)
        && is_full(&wire.latitude)
        && is_full(&wire.longitude)
        && fits(&wire.accuracy_dm, &wire.accuracy_present)
        && fits(&wire.altitude_dm, &wire.altitude_present)
        && fits(&wire.speed_cm_per_s, &wire.speed_present)
        && fits(&wire.course_ddeg, &wire.course_present)
        && fits(&wire.heading_deg, &wire.heading_present)
        && fits(&wire.battery_percent, &wire.battery_present)
        && sources.remainder().is_empty()
        && (wire.source_runs.is_empty()
            || sources.map(|run| u64::from(run[0])).sum::<u64>() == count)
}

/// The values of a delta column. They are exact: no column is long enough to overflow 128 bits.
fn sums(deltas: &[i64]) -> impl Iterator<Item = i128> {
    let mut value = 0;
    deltas.iter().map(move |delta| {
        value += i128::from(*delta);
        value
    })
}

/// The values of a delta column that goes round in a circle.
fn turns<const CIRCLE: u16>(deltas: &[i64]) -> impl Iterator<Item = i64> {
    let circle = i64::from(CIRCLE);
    let mut value = 0;
    deltas.iter().map(move |delta| {
        value = (value + delta % circle).rem_euclid(circle);
        value
    })
}

fn degrees_e7(scaled: i128, scale: i64, max_e7: i32) -> Option<i32> {
    let degrees_e7 = i64::try_from(scaled).ok()?.checked_mul(scale)?;
    i32::try_from(degrees_e7)
        .ok()
        .filter(|degrees_e7| (-max_e7..=max_e7).contains(degrees_e7))
}

fn sequence_gaps(pings: &[Ping]) -> Vec<u32> {
    let gap = |pair: &[Ping]| {
        let gap = pair[1]
            .seq
            .checked_sub(pair[0].seq)
            .and_then(|step| step.checked_sub(1));
        gap.and_then(|gap| u32::try_from(gap).ok())
            .expect("pings in the order of their numbers, not far apart")
    };
    if pings.windows(2).all(|pair| gap(pair) == 0) {
        return Vec::new();
    }
    pings.windows(2).map(gap).collect()
}

/// The greatest divisor of `coarsest` that divides all values.
///
/// A lone ping gets 1: there are no differences to make small, and naming the factor costs more than
/// it saves.
fn common_factor<const N: usize>(
    pings: &[Ping],
    coarsest: u32,
    values: impl Fn(&Ping) -> [u64; N],
) -> u32 {
    if pings.len() < 2 {
        return 1;
    }
    let mut factor = u64::from(coarsest);
    for value in pings.iter().flat_map(values) {
        let mut remainder = value % factor;
        while remainder != 0 {
            (factor, remainder) = (remainder, factor % remainder);
        }
        if factor == 1 {
            break;
        }
    }
    u32::try_from(factor).unwrap_or(1)
}

/// One column and its presence list; both are empty if no ping has the value, and the list is if all
/// have it.
fn column(
    pings: &[Ping],
    value: impl Fn(&Ping) -> Option<i64>,
    delta: impl Fn(i64, i64) -> i64,
) -> (Vec<i64>, Vec<u32>) {
    let mut deltas = Vec::new();
    let mut present = Vec::new();
    let mut before = 0;
    let mut run_has_value = true;
    let mut run = 0;
    for ping in pings {
        let value = value(ping);
        if value.is_some() != run_has_value {
            present.push(run);
            run_has_value = value.is_some();
            run = 0;
        }
        run += 1;
        if let Some(value) = value {
            if deltas.is_empty() {
                deltas.reserve_exact(pings.len());
            }
            deltas.push(delta(before, value));
            before = value;
        }
    }
    if deltas.is_empty() {
        present = Vec::new();
    } else if !present.is_empty() {
        present.push(run);
    }
    (deltas, present)
}

fn difference(before: i64, value: i64) -> i64 {
    value - before
}

fn short_way_round<const CIRCLE: u16>(before: i64, value: i64) -> i64 {
    let circle = i64::from(CIRCLE);
    (value - before + circle / 2).rem_euclid(circle) - circle / 2
}

fn source_runs(pings: &[Ping]) -> Vec<u32> {
    if pings.iter().all(|ping| ping.source == Source::Unspecified) {
        return Vec::new();
    }
    let runs = pings.chunk_by(|ping, next| ping.source == next.source);
    runs.flat_map(|run| [count(run), run[0].source as u32])
        .collect()
}

fn count(pings: &[Ping]) -> u32 {
    u32::try_from(pings.len()).expect("sequence numbers of a batch span less than 2^32")
}

/// An hour. Units that divide it are those that devices sample in.
const COARSEST_UNIT_MS: u32 = 3_600_000;
/// A whole degree. Its divisors are the decimals that receivers give.
const COARSEST_SCALE: u32 = 10_000_000;

#[cfg(test)]
mod tests;
