//! How often something may happen: a rate with room for bursts, and what is left of it.
//!
//! Knows arithmetic. Must not know the time, which is an argument, nor what is counted. A [`Bucket`] is one
//! moment in time, the one at which it will be full again (the generic cell rate algorithm of ATM
//! networks): nothing has to run to fill it, and a full one says nothing that a new one would not, so
//! that a map of buckets can forget those that have filled up.

use std::time::{Duration, Instant};

/// So many in a second on average, and so many at once after a pause. Without limit when either is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How long one of them takes to come back.
    each: Duration,
    /// How many there are at most.
    burst: u32,
}

impl Rate {
    /// `number` in each `period`, and `burst` at once.
    #[must_use]
    pub fn new(number: u32, period: Duration, burst: u32) -> Self {
        let each = period.checked_div(number).unwrap_or_default();
        Self { each, burst }
    }

    /// Whether it limits anything.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        !self.each.is_zero() && 0 < self.burst
    }

    fn time_for(&self, amount: u32) -> Duration {
        self.each.saturating_mul(amount)
    }
}

/// What is left of a [`Rate`]. A new one is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    full_at: Option<Instant>,
}

impl Bucket {
    /// Takes `amount`, or nothing and says how long it will be until there is as much. More than ever fits
    /// can be taken from a full bucket, and is then owed.
    ///
    /// # Errors
    /// When there is not enough; the time after which there will be.
    pub fn take(&mut self, rate: &Rate, amount: u32, now: Instant) -> Result<(), Duration> {
        let before = *self;
        let debt = self.charge(rate, amount, now);
        let is_larger_than_all = rate.burst < amount && before.is_full(now);
        if debt.is_zero() || is_larger_than_all {
            return Ok(());
        }
        *self = before;
        let beyond = rate.time_for(amount.saturating_sub(rate.burst));
        Err(debt.saturating_sub(beyond))
    }

    /// Takes `amount` whether or not there is as much: for what has happened already. Returns how long it
    /// will be until nothing is owed, zero when there was enough.
    pub fn charge(&mut self, rate: &Rate, amount: u32, now: Instant) -> Duration {
        if !rate.is_limit() {
            return Duration::ZERO;
        }
        let until_full = self.until_full(now).saturating_add(rate.time_for(amount));
        // A moment that no clock will ever show is as good as this.
        self.full_at = now.checked_add(until_full).or(self.full_at);
        until_full.saturating_sub(rate.time_for(rate.burst))
    }

    /// Whether it is as good as a new one.
    #[must_use]
    pub fn is_full(&self, now: Instant) -> bool {
        self.until_full(now).is_zero()
    }

    fn until_full(&self, now: Instant) -> Duration {
        self.full_at.map_or(Duration::ZERO, |full_at| {
            full_at.saturating_duration_since(now)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn per_s(number: u32, burst: u32) -> Rate {
        Rate::new(number, Duration::from_secs(1), burst)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let rate = per_s(10, 3);
        let mut bucket = Bucket::default();
        let now = Instant::now();
        for _ in 0..3 {
            assert_eq!(bucket.take(&rate, 1, now), Ok(()));
        }
        assert_eq!(bucket.take(&rate, 1, now), Err(100 * MS));
        assert_eq!(bucket.take(&rate, 1, now + 40 * MS), Err(60 * MS));
        assert_eq!(bucket.take(&rate, 1, now + 100 * MS), Ok(()));
        assert!(!bucket.is_full(now + 399 * MS));
        assert!(bucket.is_full(now + 400 * MS));
    }

    #[test]
    fn what_was_refused_costs_nothing() {
        let rate = per_s(10, 1);
        let mut bucket = Bucket::default();
        let now = Instant::now();
        assert_eq!(bucket.take(&rate, 1, now), Ok(()));
        for _ in 0..1_000 {
            assert!(bucket.take(&rate, 1, now).is_err());
        }
        assert_eq!(bucket.take(&rate, 1, now + 100 * MS), Ok(()));
    }

    #[test]
    fn more_than_ever_fits_is_taken_from_a_full_bucket_and_owed() {
        let rate = per_s(10, 3);
        let mut bucket = Bucket::default();
        let now = Instant::now();
        assert_eq!(bucket.take(&rate, 10, now), Ok(()));
        assert_eq!(bucket.take(&rate, 1, now), Err(800 * MS));
        assert_eq!(
            bucket.take(&rate, 10, now),
            Err(1_000 * MS),
            "not before it is full again, or it would never pass"
        );
        assert_eq!(bucket.take(&rate, 10, now + 1_000 * MS), Ok(()));
    }

    #[test]
    fn what_is_charged_is_owed() {
        let rate = per_s(10, 2);
        let mut bucket = Bucket::default();
        let now = Instant::now();
        assert_eq!(bucket.charge(&rate, 2, now), Duration::ZERO);
        assert_eq!(bucket.charge(&rate, 1, now), 100 * MS);
        assert_eq!(bucket.charge(&rate, 1, now), 200 * MS);
        assert_eq!(bucket.take(&rate, 1, now + 200 * MS), Err(100 * MS));
        assert_eq!(bucket.take(&rate, 1, now + 300 * MS), Ok(()));
    }

    #[test]
    fn zero_is_no_limit() {
        for rate in [per_s(0, 5), per_s(5, 0)] {
            let mut bucket = Bucket::default();
            let now = Instant::now();
            for _ in 0..1_000 {
                assert_eq!(bucket.take(&rate, u32::MAX, now), Ok(()));
                assert_eq!(bucket.charge(&rate, u32::MAX, now), Duration::ZERO);
            }
            assert!(bucket.is_full(now));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_when_no_more_passes_than_burst_and_rate(
            number in 1..1_000_u32,
            burst in 1..100_u32,
            asked in prop::collection::vec((0..200_u64, 1..50_u32), 1..200),
        ) {
            let rate = per_s(number, burst);
            let mut bucket = Bucket::default();
            let begun = Instant::now();
            let mut now = begun;
            let mut passed = 0_u64;
            for (wait_ms, amount) in asked {
                now += Duration::from_millis(wait_ms);
                let amount = amount.min(burst);
                match bucket.take(&rate, amount, now) {
                    Ok(()) => passed += u64::from(amount),
                    Err(wait) => {
                        prop_assert!(!wait.is_zero());
                        prop_assert_eq!(bucket.clone().take(&rate, amount, now + wait), Ok(()));
                    }
                }
                // The rate is kept in whole nanoseconds, which are cut off in the peer's favour.
                let most = f64::from(burst) + (now - begun).as_secs_f64() * f64::from(number) * 1.000_001;
                prop_assert!(passed as f64 <= most + 1e-6, "{} of {}", passed, most);
            }
        }
    }
}
