//! How a series is made, described, and told its number.
//!
//! Knows the recorder's macros; nothing else names them. Must not know which metrics there are.
#![expect(
    clippy::disallowed_macros,
    reason = "this is the one place that registers metrics"
)]

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

/// A counter for each value of a label.
#[derive(Debug)]
pub struct ByLabel {
    known: Vec<(&'static str, Counter)>,
    other: Counter,
}

impl ByLabel {
    /// The counter of one value. A value that is not in the metric's list counts as `other`, so that
    /// nothing goes uncounted and no peer can invent series.
    pub fn of(&self, value: &str) -> &Counter {
        self.known
            .iter()
            .find(|(known, _)| *known == value)
            .map_or(&self.other, |(_, counter)| counter)
    }
}

pub(super) fn new_counter(name: &'static str, help: &'static str) -> Counter {
    describe_counter!(name, help);
    counter!(name)
}

pub(super) fn labelled_counter(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    value: &'static str,
) -> Counter {
    describe_counter!(name, help);
    counter!(name, label => value)
}

pub(super) fn by_label(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: &[&'static str],
) -> ByLabel {
    let counter_of = |value| labelled_counter(name, help, label, value);
    ByLabel {
        known: values
            .iter()
            .map(|value| (*value, counter_of(value)))
            .collect(),
        other: counter_of("other"),
    }
}

pub(super) fn new_gauge(name: &'static str, help: &'static str) -> Gauge {
    describe_gauge!(name, help);
    gauge!(name)
}

pub(super) fn labelled_gauge(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    value: &'static str,
) -> Gauge {
    describe_gauge!(name, help);
    gauge!(name, label => value)
}

pub(super) fn new_histogram(name: &'static str, help: &'static str) -> Histogram {
    describe_histogram!(name, help);
    histogram!(name)
}

pub(super) fn seconds(ms: u64) -> f64 {
    approximate(ms) / 1_000.0
}

/// As a float: exact up to 2^53, and Prometheus knows only floats.
pub(super) fn approximate(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use crate::metrics::{Metrics, tests::series};

    #[test]
    fn an_unlisted_label_counts_as_other() {
        let metrics = Metrics::new();
        metrics.connections.refused.of("made up").increment(1);
        let page = series(&metrics.render());
        assert_eq!(
            page[r#"waypost_connections_refused_total{reason="other"}"#],
            1.0
        );
    }
}
