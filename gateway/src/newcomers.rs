//! How many newcomers wait at a worker until it looks at them.
//!
//! quinn lets up to [`AdmissionConfig::newcomers`] wait, drops whoever comes then, and tells nobody of either. But
//! right before it lets one wait it asks TLS for keys, so whoever stands in for TLS there can count. Knows in which
//! order quinn does these things. Must not know who may begin, nor what follows when there are too many.
//!
//! [`AdmissionConfig::newcomers`]: crate::admission::AdmissionConfig::newcomers

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use quinn::crypto::{Keys, ServerConfig, Session, UnsupportedVersion};
use quinn_proto::{ConnectionId, transport_parameters::TransportParameters};

/// Those who wait at one worker. Only its own thread counts, so no order of memory is asked for.
#[derive(Debug)]
pub struct Newcomers {
    most: usize,
    waiting: AtomicUsize,
}

impl Newcomers {
    /// Nobody waits yet, and at most so many may.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            waiting: AtomicUsize::new(0),
        }
    }

    fn came(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// The next one is looked at. True if there was no room for another until now: whoever came was dropped.
    pub(crate) fn looked_at(&self) -> bool {
        let waiting = self.waiting.load(Ordering::Relaxed);
        self.waiting
            .store(waiting.saturating_sub(1), Ordering::Relaxed);
        // quinn counts the one before as well, until its handshake has begun.
        self.most <= waiting + 1
    }

    /// Nobody waits. A first packet that turned out to be noise was counted, and never waited.
    pub(crate) fn none_waits(&self) {
        self.waiting.store(0, Ordering::Relaxed);
    }
}

/// TLS, and a look at who comes.
pub(crate) struct Counting {
    pub(crate) tls: Arc<dyn ServerConfig>,
    pub(crate) newcomers: Arc<Newcomers>,
}

impl ServerConfig for Counting {
    fn initial_keys(&self, version: u32, id: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        let keys = self.tls.initial_keys(version, id)?;
        self.newcomers.came();
        Ok(keys)
    }

    fn retry_tag(&self, version: u32, id: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.tls.retry_tag(version, id, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        parameters: &TransportParameters,
    ) -> Box<dyn Session> {
        Arc::clone(&self.tls).start_session(version, parameters)
    }
}

impl fmt::Debug for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counting")
            .field("newcomers", &self.newcomers)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_room_when_so_many_wait_and_again_when_they_were_looked_at() {
        let newcomers = Newcomers::new(3);
        newcomers.came();
        assert!(!newcomers.looked_at());
        (0..2).for_each(|_| newcomers.came());
        assert!(newcomers.looked_at(), "two wait, and one has yet to begin");
        assert!(!newcomers.looked_at());
        (0..3).for_each(|_| newcomers.came());
        assert!(newcomers.looked_at());
        newcomers.none_waits();
        newcomers.came();
        assert!(!newcomers.looked_at());
        assert!(!newcomers.looked_at(), "one that was not counted");
    }
}
