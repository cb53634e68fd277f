//! A run second by second: for the live line, the JSON and the charts.
//!
//! Knows how moments become fewer when there are too many. Must not know how they are measured or drawn.

use serde::Serialize;

/// What was seen at one moment. Rates and percentiles are of the time since the moment before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Moment {
    /// Seconds since the run began.
    pub at_s: f64,
    /// Pings acknowledged a second.
    pub pings_per_s: f64,
    /// From due to acknowledged, the half of them, in milliseconds; absent when none was.
    pub ack_p50_ms: Option<f64>,
    /// The slowest hundredth.
    pub ack_p99_ms: Option<f64>,
    /// The slowest.
    pub ack_max_ms: Option<f64>,
    /// Pings due and not acknowledged.
    pub open: u64,
    /// Devices connected.
    pub connected: u64,
    /// How far the freshness stream was behind; absent when no checker watched.
    pub freshness_lag_ms: Option<u64>,
    /// The gateway's memory, as far as it could be seen.
    pub gateway_rss_bytes: Option<u64>,
    /// How many processors the gateway kept busy.
    pub gateway_cpus: Option<f64>,
    /// The load test's own memory, as far as it could be seen.
    pub own_rss_bytes: Option<u64>,
}

/// Something that began while a run went on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mark {
    /// Seconds since the run began.
    pub at_s: f64,
    /// What began.
    pub what: &'static str,
}

/// The moments of a run, at most 2,048: when there are more, two become one.
#[derive(Clone, Debug)]
pub struct Timeline {
    moments: Vec<Moment>,
    /// Each of them stands for so many.
    stride: usize,
    /// Waits until there are enough for one.
    gathered: Vec<Moment>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            moments: Vec::new(),
            stride: 1,
            gathered: Vec::new(),
        }
    }
}

impl Timeline {
    /// Adds a moment; they come at even distances.
    pub fn push(&mut self, moment: Moment) {
        self.gathered.push(moment);
        if self.gathered.len() < self.stride {
            return;
        }
        self.moments.extend(merge(&self.gathered));
        self.gathered.clear();
        if MOST_MOMENTS < self.moments.len() {
            self.moments = self.moments.chunks(2).filter_map(merge).collect();
            self.stride *= 2;
        }
    }

    /// All of them, in order.
    #[must_use]
    pub fn into_moments(mut self) -> Vec<Moment> {
        self.moments.extend(merge(&self.gathered));
        self.moments
    }
}

/// One for several: rates in the mean, all else at its worst, so that no outlier is smoothed away.
fn merge(moments: &[Moment]) -> Option<Moment> {
    let last = moments.last()?;
    let worst = |of: fn(&Moment) -> Option<f64>| moments.iter().filter_map(of).reduce(f64::max);
    let mean = |of: fn(&Moment) -> Option<f64>| {
        let found: Vec<f64> = moments.iter().filter_map(of).collect();
        (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
    };
    Some(Moment {
        at_s: last.at_s,
        pings_per_s: mean(|moment| Some(moment.pings_per_s)).unwrap_or_default(),
        ack_p50_ms: worst(|moment| moment.ack_p50_ms),
        ack_p99_ms: worst(|moment| moment.ack_p99_ms),
        ack_max_ms: worst(|moment| moment.ack_max_ms),
        open: moments.iter().map(|moment| moment.open).max()?,
        connected: last.connected,
        freshness_lag_ms: moments
            .iter()
            .filter_map(|moment| moment.freshness_lag_ms)
            .max(),
        gateway_rss_bytes: moments
            .iter()
            .filter_map(|moment| moment.gateway_rss_bytes)
            .max(),
        gateway_cpus: mean(|moment| moment.gateway_cpus),
        own_rss_bytes: moments
            .iter()
            .filter_map(|moment| moment.own_rss_bytes)
            .max(),
    })
}

/// More than a chart has pixels for.
const MOST_MOMENTS: usize = 2_048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_takes_no_more_memory_and_hides_no_outlier() {
        let mut timeline = Timeline::default();
        let count = 100_000;
        for at in 0..count {
            timeline.push(Moment {
                at_s: f64::from(at),
                pings_per_s: 10.0,
                ack_max_ms: Some(if at == 777 { 5_000.0 } else { 1.0 }),
                ..Moment::default()
            });
            assert!(timeline.moments.len() <= MOST_MOMENTS);
        }
        let moments = timeline.into_moments();
        assert!(MOST_MOMENTS / 2 < moments.len() && moments.len() <= MOST_MOMENTS + 1);
        assert!(moments.is_sorted_by(|one, next| one.at_s < next.at_s));
        assert_eq!(moments.last().unwrap().at_s, f64::from(count - 1));
        assert!(moments.iter().all(|moment| moment.pings_per_s == 10.0));
        let worst = moments.iter().filter_map(|moment| moment.ack_max_ms);
        assert_eq!(worst.reduce(f64::max), Some(5_000.0));
    }

    #[test]
    fn a_short_run_keeps_every_moment() {
        let mut timeline = Timeline::default();
        let moment = |at_s| Moment {
            at_s,
            ..Moment::default()
        };
        timeline.push(moment(1.0));
        timeline.push(moment(2.0));
        assert_eq!(timeline.into_moments(), [moment(1.0), moment(2.0)]);
        assert_eq!(Timeline::default().into_moments(), []);
    }
}
