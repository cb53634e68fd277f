//! The hand-off between sessions and committer, under every order in which threads can meet.
//!
//! The gateway's own `handoff.rs`, `orders.rs` and `commit.rs` are compiled here a second time (see `build.rs`), with models in the
//! place of what they wait with, the clock, the store and the freshness index. Shuttle then chooses, at
//! every step, who goes on. Random and PCT schedules are many and prove nothing about those that were not
//! tried; the small kernels are tried out completely. What is assumed is said in `sync.rs`.
//!
//! Each negative control is the same three files with one line made wrong (see `build.rs`), under the same
//! scenario: it must be caught.
//!
//! A failure prints shuttle's schedule, which `shuttle::replay` plays again, and the seed, which `SEED`
//! sets.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "all of this is a test, also what is not in a function marked as one"
)]

mod clock;
mod conformance;
mod freshness;
mod kernel;
mod plan;
mod store;
mod sync;

// The watch over the disk only looks on, the rate is one of log lines, requests gather in no schedule, nobody erases
// anything, is revoked or enrols, and the vigil and those who share have no threads: all of these are used as they are.
use waypost_gateway::{
    audit, bulletin, coverage, deadlines, disk, enrol, erase, gather, grants, lookout, rate,
    revocation, sharing, vigil,
};

use std::{panic, sync::Arc, time::Instant};

use parking_lot::Mutex;
use shuttle::{
    Config, MaxSteps, Runner,
    scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler},
};
use waypost_gateway::metrics;
use waypost_tests::soak;

use as_it_is::scenario;
use plan::{Plan, Tally};

/// The gateway's three files and the scenario, as `build.rs` has written them.
macro_rules! variant {
    ($name:ident) => {
        #[allow(
            dead_code,
            unreachable_pub,
            unused_imports,
            reason = "files of the gateway, of which not all is played"
        )]
        mod $name {
            pub(crate) mod commit {
                include!(concat!(
                    env!("OUT_DIR"),
                    "/",
                    stringify!($name),
                    "/commit.rs"
                ));
            }
            pub(crate) mod handoff {
                include!(concat!(
                    env!("OUT_DIR"),
                    "/",
                    stringify!($name),
                    "/handoff.rs"
                ));
            }
            pub(crate) mod orders {
                include!(concat!(
                    env!("OUT_DIR"),
                    "/",
                    stringify!($name),
                    "/orders.rs"
                ));
            }
            pub(crate) mod scenario {
                include!(concat!(
                    env!("OUT_DIR"),
                    "/",
                    stringify!($name),
                    "/scenario.rs"
                ));
            }
        }
    };
}

variant!(as_it_is);

/// A variant that must be caught, by a test of its name, and what must be said of it.
macro_rules! control {
    ($name:ident, $plan:expr, $says:literal) => {
        variant!($name);

        #[test]
        fn $name() {
            must_say($says, || {
                try_out($plan, $name::scenario::play, SCHEDULES);
            });
        }
    };
}

#[test]
fn in_no_order_is_an_answer_missing_or_twice_or_too_early() {
    let tally = try_out(Plan::sound, scenario::play, SCHEDULES);
    assert!(
        tally.settled > 0 && tally.fenced > 0 && tally.held_back > 0,
        "{tally:?}"
    );
    assert_eq!((tally.lost, tally.refused), (0, 0), "{tally:?}");
    assert!(
        tally.ordered > 0 && tally.too_many > 0 && tally.orders_lost > 0,
        "{tally:?}"
    );
}

#[test]
fn in_no_order_does_a_failing_disk_leave_a_session_or_a_checker_waiting() {
    let tally = try_out(Plan::failing, scenario::play, SCHEDULES);
    assert!(
        tally.settled > 0 && tally.lost > 0 && tally.refused > 0,
        "{tally:?}"
    );
    assert!(tally.ordered > 0 && tally.orders_lost > 0, "{tally:?}");
}

#[test]
fn in_no_order_does_a_committer_that_is_cut_off_leave_a_session_or_a_checker_waiting() {
    let tally = try_out(Plan::abandoned, scenario::play, SCHEDULES);
    assert!(
        tally.settled > 0 && tally.lost > 0 && tally.refused > 0,
        "{tally:?}"
    );
    assert!(tally.ordered > 0 && tally.orders_lost > 0, "{tally:?}");
}

#[test]
fn in_no_order_does_a_session_that_is_cut_off_hold_up_the_others() {
    let tally = try_out(Plan::leaving, scenario::play, SCHEDULES);
    assert!(tally.settled > 0 && tally.cut_off > 0, "{tally:?}");
}

#[test]
fn in_every_order_a_request_that_meets_a_stopping_committer_is_refused_or_answered() {
    exhaust(kernel::a_request_meets_a_committer_that_stops);
}

#[test]
fn in_every_order_two_answers_reach_the_session_that_waits_for_them() {
    exhaust(kernel::two_answers_meet_a_session_that_waits);
}

#[test]
fn in_every_order_a_full_queue_wakes_the_session_that_waits_for_a_place() {
    exhaust(kernel::a_full_queue_meets_a_session_that_waits);
}

#[test]
#[ignore = "long: make soak runs it"]
fn soak_schedules() {
    let seed = soak::seed();
    let until = Instant::now() + soak::length();
    let mut next_seed = seed;
    let mut schedules = 0;
    let mut settled = 0;
    while schedules == 0 || Instant::now() < until {
        for plan in PLANS {
            settled += try_out_from(next_seed, plan, scenario::play, SCHEDULES).settled;
            schedules += SCHEDULES;
        }
        next_seed = next_seed.wrapping_add(1);
    }
    soak::summary(format_args!(
        "no answer is missing, twice or too early, and nothing announced comes later: {schedules} \
         schedules, {settled} batches acknowledged; seed {seed}"
    ));
}

control!(wakes_before_it_posts, Plan::sound, "deadlock");
control!(wakes_only_the_first_of_a_group, Plan::sound, "deadlock");
control!(a_dropped_request_is_silent, Plan::failing, "deadlock");
control!(
    does_not_look_whether_the_committer_is_gone,
    Plan::failing,
    "deadlock"
);
control!(
    backfill_does_not_wait_for_hello,
    Plan::sound,
    "before its Hello"
);
control!(
    announces_the_current_millisecond,
    Plan::sound,
    "handed over between"
);
control!(
    announces_what_is_left_in_a_queue,
    Plan::sound,
    "handed over between"
);
control!(
    does_not_move_a_late_request_past_the_announced,
    Plan::sound,
    "announced as complete"
);
// Not durable, or durable and not yet visible: as it happens.
control!(answers_before_the_commit, Plan::sound, "acknowledged");
control!(
    publishes_before_the_commit,
    Plan::sound,
    "visible before it was durable"
);
control!(
    answers_before_it_publishes,
    Plan::sound,
    "before it was visible"
);

control!(
    answers_an_order_before_the_commit,
    Plan::sound,
    "what it set is not durable"
);
control!(
    publishes_a_position_before_its_news,
    Plan::sound,
    "visible before it was on the bulletin"
);
control!(hears_of_no_order_while_it_waits, Plan::sound, "deadlock");
control!(
    an_order_does_not_look_whether_the_committer_is_gone,
    Plan::abandoned,
    "deadlock"
);

/// Half of the schedules at random, half by PCT, which finds what needs few but unlikely switches.
fn try_out(plan: fn() -> Plan, play: fn(Plan, &Arc<Mutex<Tally>>), schedules: usize) -> Tally {
    let seed =
        std::env::var("SEED").map_or(FIXED_SEED, |seed| seed.parse().expect("SEED is a number"));
    println!("seed {seed}");
    let tally = try_out_from(seed, plan, play, schedules);
    println!("{schedules} schedules: {tally:?}");
    tally
}

fn try_out_from(
    seed: u64,
    plan: fn() -> Plan,
    play: fn(Plan, &Arc<Mutex<Tally>>),
    schedules: usize,
) -> Tally {
    let tally = Arc::default();
    let half = schedules / 2;
    let random = RandomScheduler::new_from_seed(seed, half);
    run(random, plan, play, &tally);
    let pct = PctScheduler::new_from_seed(seed, PCT_DEPTH, half);
    run(pct, plan, play, &tally);
    *tally.lock()
}

fn run(
    scheduler: impl Scheduler + 'static,
    plan: fn() -> Plan,
    play: fn(Plan, &Arc<Mutex<Tally>>),
    tally: &Arc<Mutex<Tally>>,
) {
    let tally = Arc::clone(tally);
    Runner::new(scheduler, config()).run(move || play(plan(), &tally));
}

/// Every order there is.
fn exhaust(kernel: fn()) {
    let orders = Runner::new(DfsScheduler::new(None, false), config()).run(kernel);
    println!("{orders} orders, and there are no more");
    assert!(orders > 100, "the kernel has no choice of order");
}

/// A control must fail, and for its own reason.
fn must_say(reason: &str, tried_out: impl FnOnce() + panic::UnwindSafe) {
    let payload = panic::catch_unwind(tried_out).expect_err("the control was not caught");
    let said = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or_default();
    assert!(said.contains(reason), "caught for another reason: {said}");
    println!("caught: {said}");
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = MaxSteps::FailAfter(MOST_STEPS);
    config.silence_warnings = true;
    config
}

const PLANS: [fn() -> Plan; 4] = [Plan::sound, Plan::failing, Plan::abandoned, Plan::leaving];
/// On each plan.
const SCHEDULES: usize = 10_000;
const FIXED_SEED: u64 = 20_260_301;
/// How many unlikely switches PCT puts into a schedule.
const PCT_DEPTH: usize = 4;
const STACK_BYTES: usize = 512 * 1024;
/// Far more than any scenario needs: who gets there goes round in circles.
const MOST_STEPS: usize = 200_000;
