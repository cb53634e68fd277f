//! Which connection a device is on: a newer one ends the older one.
//!
//! Knows devices and tokens; must not know what a connection is. Holds one entry per connected device,
//! so it is bounded by the connections.

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio_util::sync::CancellationToken;
use waypost_proto::id::DeviceId;

use crate::metrics::Metrics;

/// The current connection of each device.
#[derive(Debug)]
pub struct Takeovers {
    current: Mutex<FxHashMap<DeviceId, (usize, CancellationToken)>>,
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

    /// Makes `connection` the device's current one and cancels the one before. The token is cancelled
    /// when a newer one comes.
    #[must_use]
    pub fn claim(&self, device: DeviceId, connection: usize) -> CancellationToken {
        let token = CancellationToken::new();
        let older = self
            .current
            .lock()
            .insert(device, (connection, token.clone()));
        if let Some((_, older)) = older {
            self.metrics.connections.taken_over.increment(1);
            older.cancel();
        }
        token
    }

    /// Forgets the device, unless a newer connection has it by now.
    pub fn release(&self, device: DeviceId, connection: usize) {
        let mut current = self.current.lock();
        if current
            .get(&device)
            .is_some_and(|(held, _)| *held == connection)
        {
            current.remove(&device);
        }
    }
}

#[cfg(test)]
mod tests {
    use waypost_proto::id::UserId;

    use super::*;

    #[test]
    fn the_newer_connection_ends_the_older_and_outlives_its_release() {
        let takeovers = Takeovers::new(Metrics::new());
        let device = DeviceId {
            user: UserId([7; 16]),
            device: 1,
        };
        let older = takeovers.claim(device, 1);
        let newer = takeovers.claim(device, 2);
        assert!(older.is_cancelled());
        assert!(!newer.is_cancelled());

        takeovers.release(device, 1);
        let newest = takeovers.claim(device, 3);
        assert!(
            newer.is_cancelled(),
            "the release of the older connection must not hide the newer one"
        );
        assert!(!newest.is_cancelled());
    }
}
