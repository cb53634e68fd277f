//! Which session a device is served by: that of a newer connection ends the older one.
//!
//! Knows devices and mailboxes; must not know what a connection is. Holds one entry per connected device,
//! so it is bounded by the connections.

use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use waypost_proto::id::DeviceId;

use crate::{commit::Mailbox, metrics::Metrics};

/// The current session of each device.
#[derive(Debug)]
pub struct Takeovers {
    current: Mutex<FxHashMap<DeviceId, Arc<Mailbox>>>,
    metrics: Metrics,
}

impl Takeovers {
    /// Nobody is connected.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        Self {
            current: Mutex::default(),
            metrics,
        }
    }

    /// Makes the session with this mailbox the device's current one, and tells the one before.
    pub fn claim(&self, device: DeviceId, session: &Arc<Mailbox>) {
        let older = self.current.lock().insert(device, Arc::clone(session));
        if let Some(older) = older {
            self.metrics.connections.taken_over.increment(1);
            older.take_over();
        }
    }

    /// Forgets the device, unless a newer session has it by now.
    pub fn release(&self, device: DeviceId, session: &Arc<Mailbox>) {
        let mut current = self.current.lock();
        if current
            .get(&device)
            .is_some_and(|held| Arc::ptr_eq(held, session))
        {
            current.remove(&device);
        }
    }

    /// Calls every session.
    pub fn call_all(&self) {
        for session in self.current.lock().values() {
            session.call();
        }
    }
}

#[cfg(test)]
mod tests {
    use waypost_proto::id::UserId;

    use super::*;

    #[test]
    fn the_newer_session_ends_the_older_and_outlives_its_release() {
        let takeovers = Takeovers::new(Metrics::new());
        let device = DeviceId {
            user: UserId([7; 16]),
            device: 1,
        };
        let [older, newer, newest] = [(); 3].map(|()| Mailbox::new(&Arc::default()));
        takeovers.claim(device, &older);
        takeovers.claim(device, &newer);
        assert!(older.is_taken_over());
        assert!(!newer.is_taken_over());

        takeovers.release(device, &older);
        takeovers.claim(device, &newest);
        assert!(
            newer.is_taken_over(),
            "the release of the older session must not hide the newer one"
        );
        assert!(!newest.is_taken_over());
    }
}
