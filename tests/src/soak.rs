//! How the long versions of tests learn their seed and their length, and say what they did.

use std::{fmt::Display, str::FromStr, time::Duration};

/// `SEED`, or a random one. Printed at once, so that a run that dies can be repeated.
#[expect(clippy::print_stdout, reason = "the soak's log is its output")]
pub fn seed() -> u64 {
    let seed = number("SEED").unwrap_or_else(rand::random);
    println!("seed {seed}");
    seed
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
