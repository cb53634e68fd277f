//! Seeds, and the long runs that take a new one each time.
//!
//! Knows the environment variables `SEED`, `SOAK_SECONDS` and `SOAK_ROUNDS`, and how a long run says what
//! it did. Must not know what is run.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a run says its seed at once and its result at the end"
)]

use std::time::{Duration, Instant};

/// Where all of a test's randomness begins. It is printed, and `SEED` sets it.
#[derive(Clone, Copy, Debug)]
pub struct Seed(u64);

/// A long run.
#[derive(Debug)]
pub struct Soak {
    seed: Seed,
    started: Instant,
}

impl Seed {
    /// The same at each run, unless `SEED` is set.
    pub fn fixed(seed: u64) -> Self {
        let seed = Self(number("SEED").unwrap_or(seed));
        // Captured, and shown when the test fails.
        eprintln!("seed {}", seed.0);
        seed
    }

    /// The seed of one part of the test.
    pub fn part(self, part: u32) -> Self {
        Self(self.0.wrapping_add(u64::from(part) << 32))
    }

    pub fn number(self) -> u64 {
        self.0
    }
}

impl Soak {
    /// Begins with a random seed, unless `SEED` is set.
    pub fn start() -> Self {
        let seed = Seed(number("SEED").unwrap_or_else(|| u64::from(rand::random::<u32>())));
        println!("soak: seed {}", seed.0);
        Self {
            seed,
            started: Instant::now(),
        }
    }

    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// How many rounds a run that is counted in rounds takes: `SOAK_ROUNDS`, or 1,000.
    pub fn rounds(&self) -> u32 {
        number("SOAK_ROUNDS").map_or(1_000, |rounds| u32::try_from(rounds).unwrap())
    }

    /// How long a run that is counted in seconds takes: `SOAK_SECONDS`, or 60.
    pub fn length(&self) -> Duration {
        Duration::from_secs(number("SOAK_SECONDS").unwrap_or(60))
    }

    /// Whether it goes on.
    pub fn has_time_left(&self) -> bool {
        self.started.elapsed() < self.length()
    }

    /// The one line at the end.
    pub fn summary(&self, claim: &str, counts: &str) {
        println!("soak: {claim}: {counts}; seed {}", self.seed.0);
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} is {text:?} and no number")))
}
