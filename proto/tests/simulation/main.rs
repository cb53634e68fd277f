//! The whole protocol under everything that can go wrong, by seed, against a model.
//!
//! The real outbox talks to the real session and device record over links that delay, cut, lose and
//! repeat, to a gateway that crashes between judging and syncing. What happened is written to a log, and
//! a model that knows none of the three judges the log: see [`history`].
//!
//! What is assumed, and proven elsewhere: that a group is written whole or not at all, and that streams
//! keep their order.
//!
//! `SEED=n` runs one seed. Seeds that once failed are in `simulation-seeds.txt` and run always.

#![allow(clippy::unwrap_used)]

mod dice;
mod gateway;
mod history;
mod install;
mod world;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use gateway::Sabotage;
use history::{Breach, Entry, judge, tally};
use world::{Counts, Run, run, run_with_faithful_queues, run_with_holes};

/// How many seeds `make test` runs.
const SEEDS: u64 = 300;

/// Fails with all that is needed to run it again. Adds up what happened.
fn assert_promises_hold(seed: u64, counts: &mut Counts) {
    let run = std::panic::catch_unwind(|| run(seed, Sabotage::Nothing))
        .unwrap_or_else(|_| panic!("the run itself failed; run it again with SEED={seed}"));
    assert_kept(&run, &format!("run it again with SEED={seed}"));
    for (what, times) in run.counts {
        *counts.entry(what).or_default() += times;
    }
    tally(&run.entries, counts);
}

fn assert_kept(run: &Run, hint: &str) {
    let breaches = judge(&run.entries, run.rules);
    assert!(
        breaches.is_empty() && run.unsettled.is_empty(),
        "{} promises were broken, first {:?}; not settled at the end: {:#?}; {hint}",
        breaches.len(),
        &breaches[..breaches.len().min(5)],
        run.unsettled
    );
}

fn seed_of_environment() -> Option<u64> {
    let seed = std::env::var("SEED").ok()?;
    Some(seed.parse().expect("SEED is a number"))
}

#[test]
fn whatever_goes_wrong_every_promise_of_the_protocol_holds() {
    let mut counts = Counts::new();
    if let Some(seed) = seed_of_environment() {
        return assert_promises_hold(seed, &mut counts);
    }
    for seed in 0..SEEDS {
        assert_promises_hold(seed, &mut counts);
    }
    // A fault that never came has proven nothing.
    for what in [
        "cuts",
        "connections abandoned",
        "arrivals on an older connection",
        "crashes that lost a group",
        "crashes between sync and ack",
        "clean stops",
        "stores replaced",
        "queues wiped",
        "queues restored",
        "rival queues",
        "take-overs",
        "fenced connections",
        "acks merged",
        "dropped by a full queue",
        "duplicates",
        "filtered",
        "new_epoch",
        "resumed",
        "lost_acknowledged",
        "fenced",
        "BAD_COORDINATES",
        "TIME_IN_FUTURE",
        "TOO_OLD",
        "OVERLOADED",
        "RATE_LIMITED",
        "TOO_SPARSE",
    ] {
        let times = counts.get(what).copied().unwrap_or_default();
        assert!(0 < times, "{what:?} never happened: {counts:?}");
    }
}

#[test]
fn seeds_that_once_failed_hold() {
    let lines = include_str!("../simulation-seeds.txt").lines();
    for line in lines.filter(|line| !line.starts_with('#')) {
        let seed = line.split_whitespace().next().expect("a seed on each line");
        let seed = seed.parse().expect("a seed is a number");
        assert_promises_hold(seed, &mut Counts::new());
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    let log = |seed| format!("{:?}", run(seed, Sabotage::Nothing).entries);
    assert_eq!(log(7), log(7));
    assert_ne!(log(7), log(8));
}

#[test]
fn a_queue_that_is_no_copy_never_takes_itself_for_one() {
    for seed in 0..60 {
        let run = run_with_faithful_queues(seed);
        assert_kept(&run, &format!("seed {seed}"));
        assert_eq!(run.counts["epochs taken by others"], 0, "seed {seed}");
    }
}

#[test]
fn a_thousand_holes_are_settled_as_well() {
    let run = run_with_holes(1_000);
    assert_kept(&run, "there is no chance in it");
    let mut counts = Counts::new();
    tally(&run.entries, &mut counts);
    assert_eq!(counts["stored"], 1_001);
    assert!(0 < counts["TOO_SPARSE"]);
}

#[test]
#[ignore = "long: make soak runs it"]
#[expect(clippy::print_stdout, reason = "the summary that make soak collects")]
fn soak_simulation() {
    let seconds = std::env::var("SOAK_SECONDS").map_or(60, |seconds| {
        seconds.parse().expect("SOAK_SECONDS is a number")
    });
    let first = seed_of_environment().unwrap_or_else(chosen_by_chance);
    println!("seed {first}");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut counts = Counts::new();
    let mut seed = first;
    while Instant::now() < end {
        assert_promises_hold(seed, &mut counts);
        seed = seed.wrapping_add(1);
    }
    println!(
        "soak: every promise of the protocol holds in simulation: {} runs, {} pings, {} commits, \
         {} connections, {} crashes; seed {first}",
        seed.wrapping_sub(first),
        counts["pushed"],
        counts["commits"],
        counts["connections"],
        counts["crashes"],
    );
}

/// The standard library's only source of chance: the keys of a new hash map. Small enough to type.
fn chosen_by_chance() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) >> 24
}

// Negative controls: with a protection taken away, the same runs and the same model must tell.

/// What the model says of the first seeds under sabotage, each kind of breach once.
fn breaches_with(sabotage: Sabotage) -> BTreeSet<String> {
    let mut kinds = BTreeSet::new();
    for seed in 0..40 {
        let run = run(seed, sabotage);
        for breach in judge(&run.entries, run.rules) {
            let text = format!("{breach:?}");
            let kind = text.split([' ', '{']).next().unwrap_or_default();
            kinds.insert(kind.to_owned());
        }
    }
    kinds
}

#[test]
fn an_ack_before_the_sync_is_caught() {
    let breaches = breaches_with(Sabotage::AckBeforeSync);
    assert!(breaches.contains("NamedNotDurable"), "{breaches:?}");
    assert!(breaches.contains("ForgottenNotStored"), "{breaches:?}");
}

#[test]
fn dedup_state_outside_the_batch_of_its_pings_is_caught() {
    let breaches = breaches_with(Sabotage::DedupApart);
    assert!(breaches.contains("StoredTwice"), "{breaches:?}");
}

#[test]
fn an_outbox_that_forgets_what_is_in_flight_at_a_cut_is_caught() {
    let breaches = breaches_with(Sabotage::ForgetAtCut);
    assert!(breaches.contains("LostSight"), "{breaches:?}");
}

#[test]
fn a_restored_queue_that_keeps_its_epoch_is_caught() {
    let breaches = breaches_with(Sabotage::RestoreKeepsEpoch);
    assert!(breaches.contains("ForgottenNotStored"), "{breaches:?}");
    // Though most copies notice by themselves what they are.
    let noticed = (0..40).map(|seed| {
        let run = run(seed, Sabotage::RestoreKeepsEpoch);
        run.counts["epochs taken by others"]
    });
    assert!(0 < noticed.sum::<u64>());
}

#[test]
fn a_log_without_one_commit_is_caught() {
    let mut run = run(3, Sabotage::Nothing);
    assert_kept(&run, "the log is whole");
    let stored =
        |entry: &Entry| matches!(entry, Entry::Committed(commit) if !commit.rows.is_empty());
    let at = run
        .entries
        .iter()
        .position(stored)
        .expect("something was stored");
    run.entries.remove(at);
    let breaches = judge(&run.entries, run.rules);
    let is_loss = |breach: &Breach| matches!(breach, Breach::NamedNotDurable { .. });
    assert!(breaches.iter().any(is_loss), "{breaches:?}");
}
