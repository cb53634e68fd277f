//! What a run has shown: one JSON object for programs, one table for people.
//!
//! Knows names and layout. Must not know how anything was measured.

use std::{collections::BTreeMap, fmt, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    findings::Findings,
    timeline::{Mark, Moment},
};

/// The outcome of a run. The names are a contract: programs read them.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which load test ran.
    pub scenario: &'static str,
    /// The same with its settings, in one line for people.
    pub title: String,
    /// Repeats it exactly; absent where nothing is random.
    pub seed: Option<u64>,
    /// How many devices took part.
    pub devices: u64,
    /// How often everything was sent.
    pub passes: u32,
    /// Pings sent, each pass counted.
    pub sent: u64,
    /// Pings acknowledged, each pass counted.
    pub acked: u64,
    /// Pings that were stored, as acknowledgements counted them.
    pub accepted: u64,
    /// Pings that were stored before.
    pub duplicate: u64,
    /// Pings not stored by choice of the operator or the holder.
    pub filtered: u64,
    /// Pings refused.
    pub rejected: u64,
    /// Pings acknowledged after a broken connection, without word of their fate.
    pub untold: u64,
    /// Pings that devices had to drop, because the gateway took too few for too long.
    pub dropped: u64,
    /// Pings acknowledged, but not in the store; absent when the store was not checked.
    pub lost: Option<u64>,
    /// Pings found in the store.
    pub stored: Option<u64>,
    /// Pings found in it more than once.
    pub stored_twice: Option<u64>,
    /// Pings found in it with other values than were sent.
    pub altered: Option<u64>,
    /// Pings found in it that were never sent.
    pub unknown: Option<u64>,
    /// Pings that were too many to remember, and were not looked for.
    pub unchecked: u64,
    /// Users whose freshness was compared with what their devices know; absent when none was.
    pub freshness_checked: Option<u64>,
    /// Users whose freshness was wrong.
    pub freshness_wrong: Option<u64>,
    /// Connections that were made again after they broke.
    pub reconnects: u64,
    /// Why connections ended that should not have, or were not made, and how often.
    pub breaks: BTreeMap<String, u64>,
    /// From the first ping due to the last one acknowledged.
    pub seconds: f64,
    /// Pings acknowledged in a second.
    pub pings_per_s: f64,
    /// Devices connected in a second before anything was due; absent when none was.
    pub connects_per_s: Option<f64>,
    /// From when a ping was due until it was acknowledged.
    pub ack_ms: AckMs,
    /// From durable at the gateway to read by a checker; absent when no checker watched.
    pub freshness_ms: Option<FreshnessMs>,
    /// How many checkers watched, in a run that is about them.
    pub checkers: Option<u64>,
    /// The most memory that the gateway kept for those who read slowly, all together, by its own count; absent where
    /// nobody does, or its metrics are out of reach.
    pub slow_reader_bytes: Option<u64>,
    /// What the gateway used.
    pub gateway: GatewayUse,
    /// The most memory that the load test itself was seen to hold.
    pub own_rss_bytes: Option<u64>,
    /// What this scenario shows besides.
    #[serde(flatten)]
    pub findings: Option<Findings>,
    /// Each promise that was checked.
    pub checks: Vec<Check>,
    /// What was seen from the first connection on, about once a second.
    pub timeline: Vec<Moment>,
    /// What began meanwhile.
    pub marks: Vec<Mark>,
}

/// Percentiles of the acknowledgement's latency in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct AckMs {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// Percentiles of the freshness stream's latency in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct FreshnessMs {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// What the gateway used, as far as it could be found out.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct GatewayUse {
    /// The most memory it was seen to hold.
    pub rss_bytes: Option<u64>,
    /// Processor time since the devices began to connect.
    pub cpu_s: Option<f64>,
    /// The most connections it was seen to serve.
    pub connections: Option<u64>,
    /// The memory it held before the first connection.
    pub idle_rss_bytes: Option<u64>,
    /// How much more it held at most, by the most connections: what they, their pings and the store's
    /// memory took together.
    pub bytes_per_connection: Option<u64>,
}

/// One promise and whether it held.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The promise, as a sentence that is true if it passed.
    pub promise: &'static str,
    /// Whether it held.
    pub passed: bool,
    /// The numbers, and where it failed, the first few places.
    pub detail: String,
}

/// Latencies in microseconds, with three digits of precision also in the tail.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
}

impl Report {
    /// Whether every promise held that was checked.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed)
    }
}

impl Default for Latencies {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "constants; a test makes one")]
        let histogram =
            Histogram::new_with_bounds(1, LONGEST_US, 3).expect("bounds and digits are valid");
        Self { histogram }
    }
}

impl Latencies {
    /// Counts one. What is longer than an hour counts as an hour.
    pub fn record_us(&mut self, latency_us: u64) {
        self.histogram.saturating_record(latency_us.max(1));
    }

    /// These and others.
    #[must_use]
    pub fn and(mut self, others: Self) -> Self {
        // Both have the same bounds, so that there is a place for each.
        _ = self.histogram.add(others.histogram);
        self
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// Whether nothing was counted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.histogram.is_empty()
    }

    /// The latency that the share `quantile` did not exceed, in milliseconds.
    #[must_use]
    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        // Three digits are known; more would only look exact.
        let latency_us = self
            .histogram
            .value_at_quantile(quantile)
            .min(self.histogram.max());
        latency_us as f64 / 1_000.0
    }

    /// The percentiles of the report.
    #[must_use]
    pub fn ack_ms(&self) -> AckMs {
        AckMs {
            p50: self.quantile_ms(0.5),
            p90: self.quantile_ms(0.9),
            p99: self.quantile_ms(0.99),
            p999: self.quantile_ms(0.999),
            max: self.quantile_ms(1.0),
        }
    }

    /// The percentiles of the report.
    #[must_use]
    pub fn freshness_ms(&self) -> FreshnessMs {
        FreshnessMs {
            p50: self.quantile_ms(0.5),
            p99: self.quantile_ms(0.99),
            max: self.quantile_ms(1.0),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ack = &self.ack_ms;
        writeln!(
            f,
            "  pings      sent {}   acknowledged {}   in {}   {}/s",
            Count(self.sent),
            Count(self.acked),
            Seconds(self.seconds),
            Count::of(self.pings_per_s),
        )?;
        write!(
            f,
            "  fates      accepted {}   duplicate {}   filtered {}   rejected {}",
            Count(self.accepted),
            Count(self.duplicate),
            Count(self.filtered),
            Count(self.rejected),
        )?;
        for (what, count) in [
            ("untold", self.untold),
            ("dropped", self.dropped),
            ("unchecked", self.unchecked),
        ] {
            if 0 < count {
                write!(f, "   {what} {}", Count(count))?;
            }
        }
        writeln!(f)?;
        writeln!(
            f,
            "  ack        p50 {}   p90 {}   p99 {}   p99.9 {}   max {}   from due to acknowledged",
            Ms(ack.p50),
            Ms(ack.p90),
            Ms(ack.p99),
            Ms(ack.p999),
            Ms(ack.max),
        )?;
        if let Some(freshness) = self.freshness_ms {
            writeln!(
                f,
                "  freshness  p50 {}   p99 {}   max {}   from durable to read by a checker",
                Ms(freshness.p50),
                Ms(freshness.p99),
                Ms(freshness.max),
            )?;
        }
        let rss = self
            .gateway
            .rss_bytes
            .map_or_else(unknown, |bytes| format!("{} MiB", Count(bytes >> 20)));
        let cpu = self
            .gateway
            .cpu_s
            .map_or_else(unknown, |cpu_s| Seconds(cpu_s).to_string());
        let connections = self
            .gateway
            .connections
            .map_or_else(unknown, |count| Count(count).to_string());
        let each = self
            .gateway
            .bytes_per_connection
            .map_or_else(String::new, |bytes| {
                format!(", {:.1} KB each", bytes as f64 / 1_000.0)
            });
        writeln!(
            f,
            "  gateway    memory {rss}   cpu {cpu}   connections {connections}{each}   reconnects {}",
            Count(self.reconnects)
        )?;
        if let Some(bytes) = self.own_rss_bytes {
            writeln!(f, "  load test  memory {} MiB", Count(bytes >> 20))?;
        }
        if let Some(connects_per_s) = self.connects_per_s {
            writeln!(f, "  connecting {}/s", Count::of(connects_per_s))?;
        }
        if let Some(findings) = &self.findings {
            write!(f, "{findings}")?;
        }
        for (reason, count) in &self.breaks {
            writeln!(f, "  broken     {} x {reason}", Count(*count))?;
        }
        writeln!(f)?;
        for check in &self.checks {
            let verdict = if check.passed { "PASS" } else { "FAIL" };
            writeln!(f, "  {verdict}  {:<50}  {}", check.promise, check.detail)?;
        }
        if self.lost.is_none() {
            writeln!(f, "  ----  the store was not checked")?;
        }
        if self.freshness_checked.is_none() {
            writeln!(f, "  ----  freshness was not checked")?;
        }
        if let Some(seed) = self.seed {
            writeln!(f, "\n  The same again: --seed {seed}")?;
        }
        Ok(())
    }
}

fn unknown() -> String {
    "unknown".to_owned()
}

/// A number with its thousands apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count(pub(crate) u64);

impl Count {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "for people; casts of floats saturate"
    )]
    pub(crate) fn of(number: f64) -> Self {
        Self(number.round() as u64)
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (at, digit) in digits.chars().enumerate() {
            if 0 < at && (digits.len() - at).is_multiple_of(3) {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// Milliseconds with as many digits as tell something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ms(pub(crate) f64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ms if ms < 10.0 => write!(f, "{ms:.2} ms"),
            ms if ms < 100.0 => write!(f, "{ms:.1} ms"),
            ms if ms < 10_000.0 => write!(f, "{} ms", Count::of(ms)),
            ms => write!(f, "{}", Seconds(ms / 1_000.0)),
        }
    }
}

/// Seconds; long times in minutes as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seconds(pub(crate) f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 600.0 {
            write!(f, "{:.1} s", self.0)
        } else {
            let whole = Duration::from_secs(Duration::from_secs_f64(self.0).as_secs());
            write!(f, "{}", humantime::format_duration(whole))
        }
    }
}

/// The longest latency that is told from longer ones: an hour.
const LONGEST_US: u64 = 3_600_000_000;

/// A report for tests.
#[cfg(test)]
pub(crate) fn example() -> Report {
    Report {
        scenario: "replay",
        title: "replay: an example".to_owned(),
        seed: None,
        devices: 10_631,
        passes: 1,
        sent: 99_999,
        acked: 99_999,
        accepted: 99_999,
        duplicate: 0,
        filtered: 0,
        rejected: 0,
        untold: 0,
        dropped: 0,
        lost: Some(0),
        stored: Some(99_999),
        stored_twice: Some(0),
        altered: Some(0),
        unknown: Some(0),
        unchecked: 0,
        freshness_checked: Some(10_631),
        freshness_wrong: Some(0),
        reconnects: 0,
        breaks: BTreeMap::new(),
        seconds: 60.0,
        pings_per_s: 1_666.65,
        connects_per_s: Some(1_500.0),
        ack_ms: AckMs::default(),
        freshness_ms: Some(FreshnessMs::default()),
        checkers: None,
        slow_reader_bytes: None,
        gateway: GatewayUse::default(),
        own_rss_bytes: None,
        findings: None,
        checks: vec![Check {
            promise: "every ping was acknowledged",
            passed: true,
            detail: String::new(),
        }],
        timeline: Vec::new(),
        marks: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_every_field_of_the_contract() {
        let json = serde_json::to_value(example()).unwrap();
        for field in [
            "scenario",
            "seed",
            "devices",
            "sent",
            "acked",
            "accepted",
            "duplicate",
            "filtered",
            "rejected",
            "lost",
            "stored",
            "stored_twice",
            "freshness_checked",
            "freshness_wrong",
            "checkers",
            "slow_reader_bytes",
            "seconds",
            "pings_per_s",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for (object, fields) in [
            ("ack_ms", &["p50", "p90", "p99", "p999", "max"][..]),
            ("freshness_ms", &["p50", "p99", "max"]),
            (
                "gateway",
                &["rss_bytes", "cpu_s", "connections", "bytes_per_connection"],
            ),
        ] {
            for field in fields {
                assert!(json[object].get(field).is_some(), "{object}.{field}");
            }
        }
    }

    #[test]
    fn one_failed_check_fails_the_run_and_is_shown() {
        let mut report = example();
        assert!(report.passed());
        assert!(
            report
                .to_string()
                .contains("PASS  every ping was acknowledged")
        );
        report.checks.push(Check {
            promise: "nothing is stored twice",
            passed: false,
            detail: "3 pings".to_owned(),
        });
        assert!(!report.passed());
        assert!(report.to_string().contains("FAIL  nothing is stored twice"));
    }

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut latencies = Latencies::default();
        for latency_us in 1..=1_000 {
            latencies.record_us(latency_us * 1_000);
        }
        latencies.record_us(u64::MAX);
        let ack = latencies.ack_ms();
        let near = |found: f64, expected: f64| (found / expected - 1.0).abs() < 0.002;
        assert!(
            near(ack.p50, 501.0) && near(ack.p90, 901.0) && near(ack.p99, 991.0),
            "{ack:?}"
        );
        assert!(near(ack.max, 3_600_000.0), "{ack:?}");
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(|count| Count(count).to_string()),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [0.5, 12.34, 4_321.0, 65_000.0].map(|ms| Ms(ms).to_string()),
            ["0.50 ms", "12.3 ms", "4,321 ms", "65.0 s"]
        );
        assert_eq!(Seconds(3_725.9).to_string(), "1h 2m 5s");
    }
}
