//! A look at a run about once a second, for the charts and for the live line.
//!
//! Knows where to look, and what is reckoned from two looks. Must not know what is sent or why.

use std::{ops::Range, time::Duration};

use tokio::time::Instant;

use crate::{
    checker::Watch,
    fleet::Fleet,
    report::{Count, Ms},
    scrape::{self, UseWatch},
    timeline::{Mark, Moment, Timeline},
};

/// What can be watched while a run goes on.
pub(crate) struct Watched<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) stream: Option<&'a Watch>,
    pub(crate) usage: Option<&'a UseWatch>,
    /// The groups whose latencies are shown.
    pub(crate) measured: Range<usize>,
}

/// Makes a moment of about every second, for the charts and for the live line.
#[derive(Default)]
pub(crate) struct Recorder {
    timeline: Timeline,
    last: Option<Seen>,
    /// The gateway's processor time when it last moved; it is scraped at other moments than these.
    cpu: Option<(Instant, f64)>,
    cpus: Option<f64>,
    line: String,
    marks: Vec<Mark>,
}

/// What the next moment is reckoned from.
#[derive(Clone, Copy, Default)]
struct Seen {
    at_s: f64,
    acked: u64,
}

impl Recorder {
    /// Looks, unless less than a second has passed since it last did.
    pub(crate) fn look(&mut self, watched: &Watched<'_>) {
        self.look_after(MOMENT_S, watched);
    }

    /// Looks once more, so that the end of a run is seen, however short it was.
    pub(crate) fn look_at_the_end(&mut self, watched: &Watched<'_>) {
        self.look_after(0.0, watched);
    }

    fn look_after(&mut self, least_s: f64, watched: &Watched<'_>) {
        let fleet = watched.fleet;
        let gateway = watched.usage.map(UseWatch::newest).unwrap_or_default();
        let seen = Seen {
            at_s: Duration::from_micros(fleet.now_us()).as_secs_f64(),
            acked: fleet.acked(),
        };
        self.look_at_cpu(Instant::now(), gateway.cpu_s);
        // Before the first look there was the beginning of the run.
        let last = self.last.unwrap_or_default();
        let elapsed_s = seen.at_s - last.at_s;
        if elapsed_s <= least_s {
            return;
        }
        let recent = fleet.take_recent_latencies(watched.measured.clone());
        let quantile_ms = |quantile| (!recent.is_empty()).then(|| recent.quantile_ms(quantile));
        let moment = Moment {
            at_s: seen.at_s,
            pings_per_s: (seen.acked - last.acked) as f64 / elapsed_s,
            ack_p50_ms: quantile_ms(0.5),
            ack_p99_ms: quantile_ms(0.99),
            ack_max_ms: quantile_ms(1.0),
            open: fleet.open(),
            connected: fleet.connected(),
            freshness_lag_ms: watched.stream.map(Watch::lag_ms),
            gateway_rss_bytes: gateway.rss_bytes,
            gateway_cpus: self.cpus,
            own_rss_bytes: scrape::own_rss_bytes(),
        };
        self.line = format!("{}/s", Count::of(moment.pings_per_s));
        if let Some((p50_ms, p99_ms)) = moment.ack_p50_ms.zip(moment.ack_p99_ms) {
            self.line += &format!("  ack p50 {} p99 {}", Ms(p50_ms), Ms(p99_ms));
        }
        self.timeline.push(moment);
        self.last = Some(seen);
    }

    /// Remembers that something begins now. A scenario has few such moments.
    pub(crate) fn mark(&mut self, fleet: &Fleet, what: &'static str) {
        let at_s = Duration::from_micros(fleet.now_us()).as_secs_f64();
        self.marks.push(Mark { at_s, what });
    }

    /// What has begun when.
    pub(crate) fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// All that was seen.
    pub(crate) fn into_moments(self) -> Vec<Moment> {
        self.timeline.into_moments()
    }

    fn look_at_cpu(&mut self, now: Instant, cpu_s: Option<f64>) {
        let Some(cpu_s) = cpu_s else { return };
        match self.cpu {
            Some((_, last_s)) if last_s == cpu_s => {}
            // A gateway that was restarted counts from zero.
            Some((at, last_s)) if last_s < cpu_s => {
                self.cpus = Some((cpu_s - last_s) / (now - at).as_secs_f64());
                self.cpu = Some((now, cpu_s));
            }
            _ => self.cpu = Some((now, cpu_s)),
        }
    }

    pub(crate) fn line(&self, watched: &Watched<'_>) -> String {
        let mut line = self.line.clone();
        if let Some(stream) = watched.stream {
            line += &format!("  freshness lag {} ms", Count(stream.lag_ms()));
        }
        line += &format!("  {} devices", Count(watched.fleet.connected()));
        match watched.fleet.open() {
            0 => line,
            open => line + &format!("  {} open", Count(open)),
        }
    }
}

/// Between two moments of the timeline, at least.
const MOMENT_S: f64 = 1.0;
