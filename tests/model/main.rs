//! Everything at once, against a model: whatever devices, checkers and restarts do, each checker is told what is true.
//!
//! A run has the real store, committer, freshness, sessions' core and feed in this process, devices that ping on both
//! lanes, resend, reconnect and are replayed, and checkers that read slowly, are cut off and come back with any token.
//! What the committer answered makes the model ([`history`]); what each checker was told is written down and judged by
//! it in the end ([`judge`]). So at every announcement it is known what should have been told before.
//!
//! Each negative control is the same feed with one thing made wrong (see `build.rs`), in the same runs: it must be
//! caught, for its own reason.
//!
//! It does not have: QUIC, which `tests/it` has; kills in the middle of a write; so many users that a reader must sweep
//! to get level, which the property tests of the index do; erasure, and deadlines of users who withdraw grants, which
//! `tests/it` has.
//!
//! `SEED=n` runs one seed. What happens in it is the same each time; how threads meet is not.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "all of this is a test, also what is not in a function marked as one"
)]

mod device;
mod history;
mod judge;
mod play;
mod subscriber;
mod world;

use std::time::Instant;

use waypost_tests::soak;

use play::{Counts, play};
use world::{OpenFeed, open_feed};

/// A feed that is made wrong, as `build.rs` has written it, and a test that it is caught.
macro_rules! control {
    ($name:ident, $reasons:expr) => {
        #[allow(
            dead_code,
            elided_lifetimes_in_paths,
            missing_debug_implementations,
            missing_docs,
            unnameable_types,
            unreachable_pub,
            unused_imports,
            unused_qualifications,
            clippy::all,
            clippy::restriction,
            reason = "files of the gateway, of which not all is used"
        )]
        mod $name {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".rs"));
        }

        #[test]
        fn $name() {
            must_say(&$reasons, open_feed!(crate::$name));
        }
    };
}

#[test]
fn whatever_happens_every_checker_is_told_what_is_true() {
    let seed = soak::fixed_seed(FIXED_SEED);
    let is_repeated = std::env::var_os("SEED").is_some();
    let mut counts = Counts::default();
    for run in 0..MOST_RUNS {
        counts.add(&hold(seed + run, open_feed!(waypost_gateway::feed)));
        // Some of it depends on how threads meet, and on a busy machine takes longer to come.
        let is_enough = RUNS <= run + 1 && never_came(&counts).is_empty();
        if is_repeated || is_enough {
            println!("{} runs: {counts:?}", run + 1);
            return;
        }
    }
    panic!("there were no {:?}: {counts:?}", never_came(&counts));
}

#[test]
#[ignore = "long: make soak runs it"]
fn soak_model() {
    let seed = soak::seed();
    let until = Instant::now() + soak::length();
    let mut counts = Counts::default();
    let mut runs = 0;
    while runs == 0 || Instant::now() < until {
        counts.add(&hold(
            seed.wrapping_add(runs),
            open_feed!(waypost_gateway::feed),
        ));
        runs += 1;
    }
    soak::summary(format_args!(
        "every checker is told what is true, whatever happens: {runs} runs, {} requests, {} entries, {} announcements, \
         {} streams resumed, {} restarts, {} crashes; seed {seed}",
        counts.requests,
        counts.told.entries,
        counts.told.announced,
        counts.told.resumed,
        counts.restarts,
        counts.crashes
    ));
}

// What is announced too early is first missed where it first differs: entries, or what comes beside them.
control!(
    progress_goes_past_the_queue,
    [
        "was announced, and",
        "should have been told",
        "it was not told that",
        "came after position"
    ]
);
// Whom the skipped commit changed is told too late, or with one value too few that were overtaken.
control!(
    resumes_a_commit_too_late,
    [
        "was announced, and",
        "values overtaken",
        // It announces a commit that is about to be made, and so what that says beside entries.
        "should have been told",
        "it was not told that"
    ]
);
control!(forgets_what_was_overtaken, ["values overtaken"]);
control!(
    tells_those_who_want_everybody_of_everybody,
    ["and has withdrawn", "said to have withdrawn"]
);
control!(forgets_that_a_grant_was_withdrawn, ["it was not told that"]);
control!(
    forgets_what_was_said_while_a_checker_was_away,
    // Spans, events and pauses; or that a grant was withdrawn.
    ["should have been told", "it was not told that"]
);

/// Plays a run in which nothing may be wrong.
fn hold(seed: u64, open_feed: OpenFeed) -> Counts {
    match run(seed, open_feed) {
        Ok(counts) => counts,
        Err(wrong) => panic!("seed {seed}: {wrong}"),
    }
}

/// A control must be caught, and for a reason of its own.
fn must_say(reasons: &[&str], open_feed: OpenFeed) {
    let seed = soak::fixed_seed(FIXED_SEED);
    for run_seed in (seed..).take(MOST_CONTROL_RUNS) {
        if let Err(wrong) = run(run_seed, open_feed) {
            let first = wrong.lines().next().unwrap_or_default();
            assert!(
                reasons.iter().any(|reason| first.contains(reason)),
                "caught for another reason: {wrong}"
            );
            println!("caught with seed {run_seed}: {first}");
            return;
        }
    }
    panic!("the control was not caught");
}

fn run(seed: u64, open_feed: OpenFeed) -> Result<Counts, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let outcome = runtime.block_on(play(seed, open_feed));
    runtime.shutdown_background();
    outcome
}

/// What has proven nothing, since it never came.
fn never_came(counts: &Counts) -> Vec<&'static str> {
    let Counts {
        told,
        requests: _,
        stored,
        duplicates,
        rejected,
        early,
        turns,
        lost,
        restarts,
        crashes,
        rushes: _,
    } = *counts;
    let all = [
        ("values that were overtaken", told.coalesced),
        ("snapshots", told.snapshots),
        ("streams that were resumed", told.resumed),
        ("resets", told.resets),
        ("spans", told.spans),
        ("users who were called late", told.late),
        ("users who recovered", told.recovered),
        ("pings stored", stored),
        ("duplicates", duplicates),
        ("pings refused", rejected),
        ("early data", early),
        ("pauses", turns),
        ("transitions told", told.transitions),
        ("withdrawn grants told", told.withdrawals),
        ("users told of again after that", told.grants),
        ("requests that went with a committer", lost),
        ("restarts", restarts),
        ("crashes", crashes),
    ];
    let never = all.into_iter().filter(|(_, times)| *times == 0);
    never.map(|(what, _)| what).collect()
}

/// How many runs `make test` makes, at least and at most.
const RUNS: u64 = 4;
const MOST_RUNS: u64 = 16;
const FIXED_SEED: u64 = 20_261_126;
/// In how many a control must be caught.
const MOST_CONTROL_RUNS: usize = 20;
