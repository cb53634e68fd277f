//! The status page: the last seconds of a gateway, for a person who looks at it.
//!
//! Knows how numbers are shown. Must not know metric names or where the numbers come from.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use super::{Stage, in_words};
use crate::metrics::snapshot::{Distribution, Snapshot};

/// The snapshots of the last [`WINDOW`], oldest first.
#[derive(Default)]
pub(super) struct History {
    snapshots: VecDeque<(Instant, Snapshot)>,
}

impl History {
    /// Adds a snapshot and forgets those that are no longer needed to look back over the window.
    pub(super) fn note(&mut self, at: Instant, snapshot: Snapshot) {
        self.snapshots.push_back((at, snapshot));
        while self
            .snapshots
            .get(1)
            .is_some_and(|(second, _)| WINDOW <= at - *second)
        {
            self.snapshots.pop_front();
        }
    }
}

/// The page as HTML that needs nothing else.
pub(super) fn page(stage: &Stage, uptime: Duration, history: &History) -> String {
    let nothing = (Instant::now(), Snapshot::default());
    let (first_at, first) = history.snapshots.front().unwrap_or(&nothing);
    let (last_at, last) = history.snapshots.back().unwrap_or(&nothing);
    let window = *last_at - *first_at;
    let rate = |first: f64, last: f64| {
        if window.is_zero() {
            NOTHING.to_owned()
        } else {
            decimal((last - first) / window.as_secs_f64())
        }
    };
    let pings_rate = |first: u64, last: u64| rate(first as f64, last as f64);
    let commits = last.commit_duration.since(&first.commit_duration);
    let acks = last.ack_latency.since(&first.ack_latency);
    let syncs = last.wal_syncs - first.wal_syncs;
    let sync_mean = (0.0 < syncs).then(|| (last.wal_sync_seconds - first.wal_sync_seconds) / syncs);
    let cores = first
        .cpu_seconds
        .zip(last.cpu_seconds)
        .filter(|_| !window.is_zero());
    let cores = cores.map(|(first, last)| (last - first) / window.as_secs_f64());
    let mood = match stage {
        Stage::Ready => "good",
        Stage::Starting | Stage::Draining => "busy",
        Stage::Hindered(_) | Stage::Failed(_) => "bad",
    };
    let (then, now) = (&first.fates, &last.fates);

    fill(&[
        ("stage", escaped(&in_words(stage))),
        ("mood", mood.to_owned()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("uptime", span(uptime)),
        ("accepted", whole(now.accepted)),
        ("accepted_rate", pings_rate(then.accepted, now.accepted)),
        ("duplicate", whole(now.duplicate)),
        ("duplicate_rate", pings_rate(then.duplicate, now.duplicate)),
        ("filtered", whole(now.filtered)),
        ("filtered_rate", pings_rate(then.filtered, now.filtered)),
        ("rejected", whole(now.rejected())),
        ("rejected_rate", pings_rate(then.rejected(), now.rejected())),
        ("received", whole(now.received())),
        ("received_rate", pings_rate(then.received(), now.received())),
        ("connections", decimal(last.connections)),
        ("handshakes", decimal(last.handshakes_in_progress)),
        ("connections_accepted", decimal(last.connections_accepted)),
        ("connections_refused", decimal(last.connections_refused)),
        ("known_devices", decimal(last.known_devices)),
        ("commit_p50", quantile(&commits, 0.5)),
        ("commit_p99", quantile(&commits, 0.99)),
        ("ack_p50", quantile(&acks, 0.5)),
        ("ack_p99", quantile(&acks, 0.99)),
        (
            "sync_mean",
            sync_mean.map_or_else(|| NOTHING.to_owned(), moment),
        ),
        ("commit_rate", rate(first.commits, last.commits)),
        ("queued", decimal(last.queued_batches)),
        ("users", decimal(last.users)),
        ("watchers", decimal(last.watchers)),
        ("lag", moment(last.lag_seconds)),
        ("store_size", bytes(last.store_size_bytes)),
        (
            "writes",
            (if last.write_stopped {
                "stopped"
            } else {
                "flowing"
            })
            .to_owned(),
        ),
        (
            "memory",
            last.memory_bytes.map_or_else(|| NOTHING.to_owned(), bytes),
        ),
        (
            "cpu",
            cores.map_or_else(|| NOTHING.to_owned(), |cores| format!("{cores:.2} cores")),
        ),
        ("window", span(window)),
    ])
}

fn fill(values: &[(&str, String)]) -> String {
    let mut page = String::with_capacity(TEMPLATE.len() + 1_024);
    let mut rest = TEMPLATE;
    while let Some((before, (name, after))) = rest
        .split_once("{{")
        .and_then(|(before, after)| Some((before, after.split_once("}}")?)))
    {
        page.push_str(before);
        if let Some((_, value)) = values.iter().find(|(known, _)| *known == name) {
            page.push_str(value);
        }
        rest = after;
    }
    page.push_str(rest);
    page
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn quantile(distribution: &Distribution, quantile: f64) -> String {
    distribution
        .quantile(quantile)
        .map_or_else(|| NOTHING.to_owned(), moment)
}

/// A whole number in groups of three: 1,234,567.
fn whole(value: u64) -> String {
    grouped(&value.to_string())
}

/// Whole from 100 on, with one decimal below unless that is 0.
fn decimal(value: f64) -> String {
    let value = value.max(0.0);
    if 100.0 <= value || value.fract() == 0.0 {
        grouped(&format!("{value:.0}"))
    } else {
        format!("{value:.1}")
    }
}

fn grouped(digits: &str) -> String {
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if 0 < at && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A short time: 0.42 ms, 12.3 ms, 1.5 s.
fn moment(seconds: f64) -> String {
    let ms = seconds * 1_000.0;
    if ms < 10.0 {
        format!("{ms:.2} ms")
    } else if ms < 1_000.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{seconds:.1} s")
    }
}

/// A long time in its two largest units: 3 d 4 h, 5 min 6 s.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    if 0 < days {
        format!("{days} d {hours} h")
    } else if 0 < hours {
        format!("{hours} h {minutes} min")
    } else if 0 < minutes {
        format!("{minutes} min {} s", seconds % 60)
    } else {
        format!("{seconds} s")
    }
}

fn bytes(value: f64) -> String {
    let mut value = value;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1_024.0 {
            return format!("{} {unit}", decimal(value));
        }
        value /= 1_024.0;
    }
    format!("{} TiB", decimal(value))
}

/// How far back the page looks.
const WINDOW: Duration = Duration::from_secs(10);
/// Shown where there is no number yet.
const NOTHING: &str = "–";
const TEMPLATE: &str = include_str!("status.html");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Fates, Metrics};

    fn accepted(accepted: u64) -> Snapshot {
        Snapshot {
            fates: Fates {
                accepted,
                ..Fates::default()
            },
            ..Snapshot::default()
        }
    }

    #[test]
    fn every_place_in_the_template_is_filled() {
        let mut history = History::default();
        let filled = page(&Stage::Starting, Duration::ZERO, &history);
        history.note(Instant::now(), Metrics::new().snapshot());
        for page in [
            filled,
            page(&Stage::Ready, Duration::from_secs(1), &history),
        ] {
            assert!(!page.contains("{{"), "{page}");
            assert!(
                !page.contains("<td></td>") && !page.contains("<td> "),
                "{page}"
            );
        }
    }

    #[test]
    fn rates_are_of_the_window() {
        let start = Instant::now();
        let mut history = History::default();
        for second in 0..60 {
            // 100 a second, and 300 a second in the last ten.
            let accepted_until = 100 * second + 200 * u64::saturating_sub(second, 49);
            history.note(
                start + Duration::from_secs(second),
                accepted(accepted_until),
            );
        }
        assert_eq!(history.snapshots.len(), 11);
        let page = page(&Stage::Ready, Duration::from_secs(60), &history);
        assert!(
            page.contains("<th>accepted</th><td>7,900</td><td>300 /s</td>"),
            "{page}"
        );
    }

    #[test]
    fn a_reason_cannot_bring_in_markup() {
        let stage = Stage::Failed("<script>alert(1)</script>".to_owned());
        let page = page(&stage, Duration::ZERO, &History::default());
        assert!(
            !page.contains("<script>") && page.contains("&lt;script&gt;"),
            "{page}"
        );
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(whole(0), "0");
        assert_eq!(whole(999), "999");
        assert_eq!(whole(1_234_567), "1,234,567");
        assert_eq!(decimal(7.25), "7.2");
        assert_eq!(decimal(4.0), "4");
        assert_eq!(decimal(12_345.6), "12,346");
        assert_eq!(moment(0.000_42), "0.42 ms");
        assert_eq!(moment(0.0123), "12.3 ms");
        assert_eq!(moment(1.5), "1.5 s");
        assert_eq!(span(Duration::from_secs(59)), "59 s");
        assert_eq!(span(Duration::from_secs(306)), "5 min 6 s");
        assert_eq!(span(Duration::from_secs(3_600 * 76 + 59)), "3 d 4 h");
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(bytes(1_572_864.0), "1.5 MiB");
    }
}
