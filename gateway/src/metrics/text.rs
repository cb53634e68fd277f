//! The text that Prometheus reads: buckets by unit, families that the exporter does not know, and the order.
//!
//! Knows the text format and the exporter's settings. Must not know which metrics there are.

use std::fmt::Write as _;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};

pub(super) fn exporter_settings() -> PrometheusBuilder {
    let counts = &COUNT_BUCKETS[..];
    let by_unit = [
        ("_seconds", &SECONDS_BUCKETS[..]),
        ("_bytes", &BYTES_BUCKETS[..]),
        ("_pings", counts),
        ("_batches", counts),
    ];
    by_unit
        .into_iter()
        .fold(PrometheusBuilder::new(), |builder, (unit, buckets)| {
            builder
                .set_buckets_for_metric(Matcher::Suffix(unit.to_owned()), buckets)
                .expect("only an empty list of buckets is refused")
        })
}

pub(super) fn write_family(
    text: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    lines: &[(&str, String)],
) {
    let mut family = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (suffix, value) in lines {
        writeln!(family, "{name}{suffix} {value}").expect("a String takes every write");
    }
    text.push_str(&family);
    text.push('\n');
}

/// Families and their series in alphabetical order; the exporter's own order changes from scrape to
/// scrape. The buckets of a histogram stay in their order.
pub(super) fn in_order(text: &str) -> String {
    let mut families: Vec<&str> = text
        .split("\n\n")
        .map(str::trim)
        .filter(|f| !f.is_empty())
        .collect();
    families.sort_unstable();
    let mut ordered = String::with_capacity(text.len());
    for family in families {
        let (head, mut series): (Vec<_>, Vec<_>) =
            family.lines().partition(|line| line.starts_with('#'));
        if !family.contains("_bucket{") {
            series.sort_unstable();
        }
        for line in head.into_iter().chain(series) {
            ordered.push_str(line);
            ordered.push('\n');
        }
        ordered.push('\n');
    }
    ordered
}

/// From a write to page cache or loopback up to a stall that people notice.
const SECONDS_BUCKETS: [f64; 17] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];

/// From one small row to the largest commit.
const BYTES_BUCKETS: [f64; 10] = [
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// From a lone ping to a full commit of full batches.
const COUNT_BUCKETS: [f64; 16] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::metrics::{Metrics, tests::series};

    #[test]
    fn observations_stay_in_their_buckets_from_scrape_to_scrape() {
        let metrics = Metrics::new();
        metrics.commits.duration.record(Duration::from_millis(2));
        assert!(
            metrics
                .render()
                .contains("waypost_commit_duration_seconds_count 1\n")
        );
        metrics.commits.duration.record(Duration::from_millis(2));
        let page = series(&metrics.render());
        assert_eq!(
            page[r#"waypost_commit_duration_seconds_bucket{le="0.001"}"#],
            0.0
        );
        assert_eq!(
            page[r#"waypost_commit_duration_seconds_bucket{le="0.0025"}"#],
            2.0
        );
        assert_eq!(page["waypost_commit_duration_seconds_count"], 2.0);
    }
}
