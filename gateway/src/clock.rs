//! The gateway's clock: wall time that never runs backwards, not even across restarts.
//!
//! The only file that reads the system's wall clock. Must not know what the time is used for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// Milliseconds since 1970-01-01 UTC, never less than before. Clones share one memory.
#[derive(Clone, Debug)]
pub struct Clock {
    latest_ms: Arc<AtomicU64>,
}

impl Clock {
    /// A clock that never shows less than `high_water_ms`: the newest time that the store remembers, so
    /// that a restart after the system's clock was set back does not move a sign of life into the past.
    #[must_use]
    pub fn starting_at(high_water_ms: u64) -> Self {
        Self {
            latest_ms: Arc::new(AtomicU64::new(high_water_ms)),
        }
    }

    /// Now.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        let system_ms = system_now_ms();
        self.latest_ms
            .fetch_max(system_ms, Ordering::Relaxed)
            .max(system_ms)
    }

    /// Sets it forward.
    #[cfg(test)]
    pub(crate) fn leap_to(&self, now_ms: u64) {
        self.latest_ms.fetch_max(now_ms, Ordering::Relaxed);
    }

    /// Now, by every clock there is.
    #[must_use]
    pub fn read(&self) -> Reading {
        let system_ms = system_now_ms();
        let latest_ms = self.latest_ms.fetch_max(system_ms, Ordering::Relaxed);
        Reading {
            now_ms: latest_ms.max(system_ms),
            system_ms,
            at: Instant::now(),
        }
    }
}

/// What the clocks show at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The gateway's clock, in milliseconds since 1970-01-01 UTC.
    pub now_ms: u64,
    /// The system's wall clock, which may have been set back.
    pub system_ms: u64,
    /// The clock that only says how much time passes.
    pub at: Instant,
}

/// The system's wall clock as it is, for what happens before the store is open.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn system_now_ms() -> u64 {
    // A clock before 1970 is a machine without a clock; 0 is then as good as any and never overtakes.
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_back_stands_still() {
        let high_water_ms = system_now_ms() + 3_600_000;
        let clock = Clock::starting_at(high_water_ms);
        assert_eq!(clock.now_ms(), high_water_ms);
        assert_eq!(clock.now_ms(), high_water_ms);
    }
}
