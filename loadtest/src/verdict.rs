//! From what was found to what is reported: each promise as a check that passed or failed.
//!
//! Knows the promises in words. Must not know how anything was measured.

use std::collections::BTreeMap;

use waypost_proto::outbox::Totals;

use crate::{
    findings::Findings,
    ledger::DeviceLedger,
    report::{Check, Count, GatewayUse, Latencies, Report},
    timeline::{Mark, Moment},
    verify::{FreshnessFindings, StoreFindings},
};

/// All that a run has found out.
#[derive(Debug)]
pub struct Outcome {
    /// Which load test ran.
    pub scenario: &'static str,
    /// The same with its settings, in one line for people.
    pub title: String,
    /// What repeats it.
    pub seed: Option<u64>,
    /// How often everything was sent.
    pub passes: u32,
    /// From the first ping due to the last one acknowledged.
    pub seconds: f64,
    /// Devices connected in a second before anything was due, if any was.
    pub connects_per_s: Option<f64>,
    /// What the scenario has shown besides.
    pub findings: Option<Findings>,
    /// From due to acknowledged.
    pub ack_latencies: Latencies,
    /// From durable to read, if a checker watched.
    pub freshness_latencies: Option<Latencies>,
    /// What the gateway used.
    pub gateway: GatewayUse,
    /// Why connections ended that should not have, and how often.
    pub breaks: BTreeMap<String, u64>,
    /// The books of all devices.
    pub ledgers: Vec<DeviceLedger>,
    /// What checkers were told when they asked, if one did.
    pub freshness: Option<FreshnessFindings>,
    /// What the stream told, if a checker watched.
    pub stream: Option<FreshnessFindings>,
    /// What the store holds, if it was read.
    pub store: Option<StoreFindings>,
    /// What was seen from the first connection on.
    pub timeline: Vec<Moment>,
    /// What began meanwhile.
    pub marks: Vec<Mark>,
    /// How our own gateway ended: with an error, perhaps.
    pub gateway_end: Option<Option<String>>,
}

/// Judges a run.
#[must_use]
pub fn report(outcome: &Outcome) -> Report {
    let ledgers = &outcome.ledgers;
    let sum = |of: fn(&DeviceLedger) -> u64| ledgers.iter().map(of).sum::<u64>();
    let (sent, acked) = (sum(|ledger| ledger.sent), sum(|ledger| ledger.acked));
    let store = outcome.store.as_ref();
    let freshness = outcome.freshness.as_ref();
    let audience = outcome.findings.as_ref().and_then(Findings::audience);
    Report {
        scenario: outcome.scenario,
        title: outcome.title.clone(),
        seed: outcome.seed,
        devices: ledgers.len() as u64,
        passes: outcome.passes,
        sent,
        acked,
        accepted: sum(|ledger| ledger.fates.accepted),
        duplicate: sum(|ledger| ledger.fates.duplicate),
        filtered: sum(|ledger| ledger.fates.filtered),
        rejected: sum(|ledger| ledger.fates.rejected),
        untold: sum(DeviceLedger::untold),
        dropped: sum(|ledger| ledger.dropped),
        lost: store.map(|store| store.lost),
        stored: store.map(|store| store.stored),
        stored_twice: store.map(|store| store.stored_twice),
        altered: store.map(|store| store.altered),
        unknown: store.map(|store| store.unknown),
        unchecked: sum(|ledger| ledger.epochs.iter().map(|epoch| epoch.forgotten).sum()),
        freshness_checked: freshness.map(|freshness| freshness.checked),
        freshness_wrong: freshness.map(|freshness| freshness.wrong),
        reconnects: sum(|ledger| ledger.breaks),
        breaks: outcome.breaks.clone(),
        seconds: outcome.seconds,
        pings_per_s: if 0.0 < outcome.seconds {
            acked as f64 / outcome.seconds
        } else {
            0.0
        },
        connects_per_s: outcome.connects_per_s,
        ack_ms: outcome.ack_latencies.ack_ms(),
        freshness_ms: outcome
            .freshness_latencies
            .as_ref()
            .map(Latencies::freshness_ms),
        checkers: audience.map(|audience| audience.checkers),
        slow_reader_bytes: audience.and_then(|audience| audience.slow_reader_bytes),
        gateway: gateway_use(outcome),
        own_rss_bytes: outcome
            .timeline
            .iter()
            .filter_map(|moment| moment.own_rss_bytes)
            .max(),
        findings: outcome.findings.clone(),
        checks: checks(outcome, sent, acked),
        timeline: outcome.timeline.clone(),
        marks: outcome.marks.clone(),
    }
}

/// Memory by connection says something only where most devices were connected at the same time.
fn gateway_use(outcome: &Outcome) -> GatewayUse {
    let most_were = outcome
        .gateway
        .connections
        .is_some_and(|connections| outcome.ledgers.len() as u64 <= 2 * connections);
    GatewayUse {
        bytes_per_connection: outcome.gateway.bytes_per_connection.filter(|_| most_were),
        ..outcome.gateway
    }
}

fn checks(outcome: &Outcome, sent: u64, acked: u64) -> Vec<Check> {
    let ledgers = &outcome.ledgers;
    let mut checks = vec![Check {
        promise: "every ping was acknowledged",
        passed: 0 < sent && sent == acked,
        detail: format!("{} of {}", Count(acked), Count(sent)),
    }];
    let uneven = ledgers.iter().filter(|ledger| !adds_up(ledger)).count() as u64;
    checks.push(none_of(
        "the four fates add up to what was acknowledged",
        uneven,
        "devices",
        &[],
    ));
    let epochs_lost = ledgers
        .iter()
        .map(|ledger| u64::from(ledger.epochs_lost))
        .sum();
    checks.push(none_of(
        "the gateway remembered each device's queue",
        epochs_lost,
        "devices forgotten",
        &[],
    ));
    checks.extend(nothing_new_in_later_passes(outcome, sent));
    if let Some(findings) = &outcome.findings {
        let breaks = ledgers.iter().map(|ledger| ledger.breaks).sum();
        checks.extend(findings.checks(ledgers.len() as u64, breaks));
    }
    if let Some(StoreFindings {
        stored,
        lost,
        stored_twice,
        altered,
        unknown,
        examples,
        ..
    }) = &outcome.store
    {
        checks.push(Check {
            promise: "every acknowledged ping is stored",
            passed: *lost == 0,
            detail: with_examples(
                format!("{} lost, {} stored", Count(*lost), Count(*stored)),
                *lost,
                examples,
            ),
        });
        checks.push(none_of(
            "no ping is stored twice",
            *stored_twice,
            "stored twice",
            examples,
        ));
        checks.push(none_of(
            "every stored ping is as it was sent",
            *altered,
            "altered",
            examples,
        ));
        checks.push(none_of(
            "nothing is stored that was not sent",
            *unknown,
            "unknown",
            examples,
        ));
    }
    if let Some(FreshnessFindings {
        checked,
        wrong,
        examples,
    }) = &outcome.freshness
    {
        checks.push(Check {
            promise: "every user's freshness is right",
            passed: *wrong == 0,
            detail: with_examples(
                format!("{} wrong of {} users", Count(*wrong), Count(*checked)),
                *wrong,
                examples,
            ),
        });
    }
    if let Some(FreshnessFindings {
        checked,
        wrong,
        examples,
    }) = &outcome.stream
    {
        checks.push(Check {
            promise: "the freshness stream told everything in order",
            passed: *wrong == 0,
            detail: with_examples(
                format!("{} faults, {} users", Count(*wrong), Count(*checked)),
                *wrong,
                examples,
            ),
        });
    }
    if let Some(error) = &outcome.gateway_end {
        checks.push(Check {
            promise: "the gateway stopped in order",
            passed: error.is_none(),
            detail: error.clone().unwrap_or_default(),
        });
    }
    checks
}

/// What is sent again is settled already. Where a connection breaks, an ack is lost and there are more
/// duplicates, or nobody is told.
fn nothing_new_in_later_passes(outcome: &Outcome, sent: u64) -> Option<Check> {
    if outcome.passes < 2 {
        return None;
    }
    let sum = |of: fn(&DeviceLedger) -> u64| outcome.ledgers.iter().map(of).sum::<u64>();
    let (duplicate, untold) = (
        sum(|ledger| ledger.fates.duplicate),
        sum(DeviceLedger::untold),
    );
    let refused = sum(|ledger| ledger.fates.rejected + ledger.fates.filtered);
    let first = sent / u64::from(outcome.passes);
    let again = sent - first;
    Some(Check {
        promise: "what was sent again was a duplicate",
        passed: again <= duplicate + untold + refused,
        detail: format!("{} duplicates of {}", Count(duplicate), Count(again)),
    })
}

/// A device that stayed connected was told of each ping once; one that lost its connection may not have
/// been told of some.
fn adds_up(ledger: &DeviceLedger) -> bool {
    let Totals {
        accepted,
        duplicate,
        filtered,
        rejected,
    } = ledger.fates;
    let told = accepted + duplicate + filtered + rejected;
    if ledger.breaks == 0 {
        told == ledger.acked + ledger.retried
    } else {
        told <= ledger.acked + ledger.retried
    }
}

fn none_of(promise: &'static str, count: u64, what: &str, examples: &[String]) -> Check {
    let detail = with_examples(format!("{} {what}", Count(count)), count, examples);
    Check {
        promise,
        passed: count == 0,
        detail,
    }
}

fn with_examples(numbers: String, count: u64, examples: &[String]) -> String {
    if count == 0 || examples.is_empty() {
        numbers
    } else {
        format!("{numbers}: {}", examples.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use waypost_proto::{
        id::{DeviceId, UserId},
        outbox::Event,
        ranges::SeqRange,
    };

    use super::*;
    use crate::ledger::example_ping;

    /// A device that sent one ping, which was stored and acknowledged.
    fn outcome() -> Outcome {
        let mut ledger = DeviceLedger::new(
            DeviceId {
                user: UserId([7; 16]),
                device: 1,
            },
            usize::MAX,
        );
        ledger.connected();
        ledger.book(
            &Event::Renumbered {
                epoch: 1,
                previous_seqs: Vec::new(),
            },
            |_| (),
        );
        ledger.send(&example_ping(1), 0);
        ledger.book(&Event::Settled(SeqRange { first: 1, last: 1 }), |_| ());
        let totals = Totals {
            accepted: 1,
            duplicate: 0,
            filtered: 0,
            rejected: 0,
        };
        ledger.book(
            &Event::Acknowledged {
                receive_ms: 1,
                commit_ms: 2,
                position: 3,
                totals,
            },
            |_| (),
        );
        Outcome {
            title: "an example".to_owned(),
            timeline: Vec::new(),
            marks: Vec::new(),
            scenario: "steady",
            seed: Some(1),
            passes: 1,
            seconds: 0.5,
            connects_per_s: None,
            findings: None,
            ack_latencies: Latencies::default(),
            freshness_latencies: None,
            gateway: GatewayUse::default(),
            breaks: BTreeMap::new(),
            ledgers: vec![ledger],
            freshness: Some(FreshnessFindings {
                checked: 1,
                ..FreshnessFindings::default()
            }),
            stream: Some(FreshnessFindings::default()),
            store: Some(StoreFindings {
                stored: 1,
                ..StoreFindings::default()
            }),
            gateway_end: Some(None),
        }
    }

    fn passes_with(change: impl FnOnce(&mut Outcome)) -> bool {
        let mut outcome = outcome();
        change(&mut outcome);
        report(&outcome).passed()
    }

    #[test]
    fn a_right_run_passes_and_is_counted() {
        let report = report(&outcome());
        assert!(report.passed(), "{report}");
        assert_eq!(
            (
                report.sent,
                report.acked,
                report.accepted,
                report.pings_per_s
            ),
            (1, 1, 1, 2.0)
        );
        assert_eq!(
            (report.lost, report.freshness_wrong, report.reconnects),
            (Some(0), Some(0), 0)
        );
    }

    #[test]
    fn each_broken_promise_fails_the_run() {
        fn store(outcome: &mut Outcome) -> &mut StoreFindings {
            outcome.store.get_or_insert_default()
        }
        assert!(!passes_with(|outcome| outcome.ledgers[0].sent = 2));
        assert!(!passes_with(|outcome| outcome.ledgers.clear()));
        assert!(!passes_with(
            |outcome| outcome.ledgers[0].fates.duplicate = 1
        ));
        assert!(!passes_with(|outcome| outcome.ledgers[0].epochs_lost = 1));
        assert!(!passes_with(|outcome| outcome.passes = 2));
        assert!(!passes_with(
            |outcome| outcome.findings = Some(Findings::Rebind { rebinds: 0 })
        ));
        assert!(!passes_with(|outcome| store(outcome).lost = 1));
        assert!(!passes_with(|outcome| store(outcome).stored_twice = 1));
        assert!(!passes_with(|outcome| store(outcome).altered = 1));
        assert!(!passes_with(|outcome| store(outcome).unknown = 1));
        assert!(!passes_with(|outcome| outcome
            .freshness
            .get_or_insert_default()
            .wrong = 1));
        assert!(!passes_with(|outcome| outcome
            .stream
            .get_or_insert_default()
            .wrong = 1));
        assert!(!passes_with(
            |outcome| outcome.gateway_end = Some(Some("killed".to_owned()))
        ));
    }

    #[test]
    fn what_was_not_checked_is_absent_and_no_failure() {
        let mut outcome = outcome();
        (
            outcome.store,
            outcome.freshness,
            outcome.stream,
            outcome.gateway_end,
        ) = (None, None, None, None);
        let report = report(&outcome);
        assert!(report.passed());
        assert_eq!((report.lost, report.freshness_checked), (None, None));
    }

    #[test]
    fn a_device_that_lost_its_connection_may_not_have_been_told_of_all() {
        assert!(!passes_with(|outcome| outcome.ledgers[0].fates.accepted = 0));
        assert!(passes_with(|outcome| {
            outcome.ledgers[0].fates.accepted = 0;
            outcome.ledgers[0].broke();
        }));
    }
}
