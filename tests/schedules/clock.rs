//! A model of the gateway's clock that stands still until a schedule moves it. Knows nothing else.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use shuttle::sync::atomic::{AtomicU64, Ordering};
use waypost_gateway::clock::Reading;

/// Milliseconds that only [`Clock::tick`] moves, so that many things happen in one of them.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    now_ms: Arc<AtomicU64>,
}

impl Clock {
    pub(crate) fn starting_at(now_ms: u64) -> Self {
        Self {
            now_ms: Arc::new(AtomicU64::new(now_ms)),
        }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::SeqCst)
    }

    /// All clocks agree.
    pub(crate) fn read(&self) -> Reading {
        let now_ms = self.now_ms();
        Reading {
            now_ms,
            system_ms: now_ms,
            at: *BEGINNING + Duration::from_millis(now_ms),
        }
    }

    pub(crate) fn tick(&self) {
        self.now_ms.fetch_add(1, Ordering::SeqCst);
    }
}

static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
