//! How long what is received may be kept, and which days go for that.
//!
//! Knows one promise: nothing that was received on a day is there any more when the first of that day has reached the
//! age. Days go whole, so the last of a day is kept for almost a day less. Must not know what is in a day, or how one is
//! dropped; `now` is an argument.

use std::time::Duration;

use humantime_serde::re::humantime::format_duration;
use serde::{Deserialize, Deserializer, Serializer, de::Error};

use super::keys::Day;

/// How old anything may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    most_ms: u64,
}

/// The least that can be promised by whole days: then what is received is there for at least a day, but for the
/// minute that it takes to drop it.
const LEAST: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// How long before its time a day goes. To drop it, and to delete its files, takes a busy disk some seconds, and who
/// looks whether it is time does so between two commits.
const AHEAD_MS: u64 = 60 * 1_000;

impl Retention {
    /// Nothing becomes older than this. One that is longer than there are milliseconds keeps everything.
    #[must_use]
    pub fn of(most: Duration) -> Self {
        Self {
            most_ms: u64::try_from(most.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// The first day that is kept at a moment, in milliseconds since 1970-01-01 UTC. All days before it have to go, and so
    /// has everything else that was there before it began.
    #[must_use]
    pub fn first_kept_day(self, now_ms: u64) -> Day {
        match now_ms.saturating_add(AHEAD_MS).checked_sub(self.most_ms) {
            // What was received at this moment has to go, and with it its day.
            Some(moment_ms) => Day::of_ms(moment_ms).next(),
            None => Day::of_ms(0),
        }
    }

    /// When a day has to go, in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn ends_ms(self, day: Day) -> u64 {
        day.start_ms()
            .saturating_add(self.most_ms)
            .saturating_sub(AHEAD_MS)
    }
}

/// Writes a setting as a person does.
pub(super) fn serialize<S: Serializer>(most: &Duration, to: S) -> Result<S::Ok, S::Error> {
    humantime_serde::serialize(most, to)
}

/// Reads a setting that can be kept.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let most = humantime_serde::Serde::<Duration>::deserialize(from)?.into_inner();
    if most < LEAST {
        return Err(D::Error::custom(format_args!(
            "pings are dropped by whole days and none is kept for longer than this, so the last of a day are kept for a \
             day less: set it to 2days or more, not to {}",
            format_duration(most)
        )));
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

    proptest! {
        #[test]
        fn nothing_reaches_the_age_and_all_that_is_a_day_younger_is_kept(
            received_ms in 0..200_000 * DAY_MS,
            most_ms in 2 * DAY_MS..10_000 * DAY_MS,
            age_ms in 0..20_000 * DAY_MS,
        ) {
            let retention = Retention::of(Duration::from_millis(most_ms));
            let is_kept = retention.first_kept_day(received_ms + age_ms) <= Day::of_ms(received_ms);
            if most_ms <= age_ms + AHEAD_MS {
                prop_assert!(!is_kept);
            }
            if age_ms + AHEAD_MS + DAY_MS <= most_ms {
                prop_assert!(is_kept);
            }
        }

        #[test]
        fn a_day_goes_at_its_end_and_not_before(
            now_ms in 0..200_000 * DAY_MS,
            most_ms in 2 * DAY_MS..10_000 * DAY_MS,
        ) {
            let retention = Retention::of(Duration::from_millis(most_ms));
            let first = retention.first_kept_day(now_ms);
            let ends_ms = retention.ends_ms(first);
            prop_assert!(now_ms < ends_ms);
            prop_assert_eq!(retention.first_kept_day(ends_ms - 1), first);
            prop_assert_eq!(retention.first_kept_day(ends_ms), first.next());
        }
    }

    #[test]
    fn what_is_kept_for_ever_is_kept() {
        let retention = Retention::of(Duration::MAX);
        assert_eq!(retention.first_kept_day(u64::MAX / 2), Day::of_ms(0));
    }
}
