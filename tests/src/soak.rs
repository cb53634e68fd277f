//! How the long versions of tests learn their seed and their length, and say what they did.

use std::{fmt::Display, str::FromStr, time::Duration};

/// `SEED`, or a random one. Printed at once, so that a run that dies can be repeated.
#[expect(clippy::print_stdout, reason = "the soak's log is its output")]
pub fn seed() -> u64 {
    let seed = number("SEED").unwrap_or_else(rand::random);
    println!("seed {seed}");
    seed
}

/// `SEED`, or the one that a short test always takes. Shown when the test fails.
#[expect(
    clippy::print_stderr,
    reason = "a failure that cannot be repeated is worth little"
)]
pub fn fixed_seed(seed: u64) -> u64 {
    let seed = number("SEED").unwrap_or(seed);
    eprintln!("seed {seed}");
    seed
}

/// The seed of one part of a run.
pub fn part(seed: u64, part: u32) -> u64 {
    seed.wrapping_add(u64::from(part) << 32)
}

/// `SOAK_ROUNDS`, or 1,000, for what is counted in rounds.
pub fn rounds() -> u32 {
    number("SOAK_ROUNDS").unwrap_or(1_000)
}

/// `SOAK_SECONDS`, or a minute.
pub fn length() -> Duration {
    Duration::from_secs(number("SOAK_SECONDS").unwrap_or(60))
}

/// The one line that goes into the summary of `make soak`.
#[expect(clippy::print_stdout, reason = "the soak's log is its output")]
pub fn summary(line: impl Display) {
    println!("soak: {line}");
}

fn number<T: FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    let number = text.parse().ok();
    Some(number.unwrap_or_else(|| panic!("{name} is not a number: {text:?}")))
}
