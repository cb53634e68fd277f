//! How often anybody may try a code: from one network, and all together.
//!
//! Knows addresses and rates. Must not know QUIC, codes, or what time it is. The addresses are their peers' own, since
//! a newcomer proves its own first. Tries are counted and not failures: nobody who is turned away learns whether the
//! last code was a good one.
//!
//! # Bounds
//!
//! One entry for each network that has tried a moment ago, at most [`MOST_NETWORKS`] of some 50 bytes. Beyond that,
//! which takes as many real networks, new ones share one entry.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::{
    admission::network,
    rate::{Bucket, Rate},
};

/// The rates, and what is left of them.
#[derive(Debug)]
pub(super) struct Guesses {
    of_one: Rate,
    of_all: Rate,
    all: Bucket,
    /// Keyed by what peers can choose, so hashed with a secret. `None` is for all that there was no room for.
    networks: HashMap<Option<IpAddr>, Bucket>,
    swept_at: Option<Instant>,
}

impl Guesses {
    /// So many tries a minute from one network, with `burst` at once after a pause, and so many a second in all.
    pub(super) fn new(per_minute: u32, burst: u32, all_per_s: u32) -> Self {
        Self {
            of_one: Rate::new(per_minute, MINUTE, burst),
            of_all: Rate::new(all_per_s, SECOND, all_per_s),
            all: Bucket::default(),
            networks: HashMap::new(),
            swept_at: None,
        }
    }

    /// Counts a try from this address. False when it is one too many; then it is not counted.
    pub(super) fn take(&mut self, address: IpAddr, now: Instant) -> bool {
        let entry = self.entry_for(network(address), now);
        let bucket = self.networks.entry(entry).or_default();
        // First its own: one network alone must not use up what there is for all.
        bucket.take(&self.of_one, 1, now).is_ok() && self.all.take(&self.of_all, 1, now).is_ok()
    }

    fn entry_for(&mut self, network: IpAddr, now: Instant) -> Option<IpAddr> {
        let network = Some(network);
        if self.networks.len() < MOST_NETWORKS || self.networks.contains_key(&network) {
            return network;
        }
        let is_swept = self
            .swept_at
            .is_some_and(|at| now.saturating_duration_since(at) < SECOND);
        if !is_swept {
            self.swept_at = Some(now);
            self.networks.retain(|_, bucket| !bucket.is_full(now));
        }
        network.filter(|_| self.networks.len() < MOST_NETWORKS)
    }
}

const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);
const MOST_NETWORKS: usize = 10_000;

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn host(number: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    #[test]
    fn one_network_is_held_to_its_rate_and_others_are_not() {
        let mut guesses = Guesses::new(60, 5, 1_000);
        let now = Instant::now();
        assert_eq!((0..9).filter(|_| guesses.take(host(1), now)).count(), 5);
        assert!(guesses.take(host(2), now));
        assert!(guesses.take(host(1), now + SECOND), "one a second");
        assert!(!guesses.take(host(1), now + SECOND));
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let mut guesses = Guesses::new(60, 5, 1_000);
        let now = Instant::now();
        let address = |n| Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, n).into();
        assert_eq!((0..9).filter(|&n| guesses.take(address(n), now)).count(), 5);
    }

    #[test]
    fn all_together_are_held_to_a_rate_and_one_network_cannot_use_it_up() {
        let mut guesses = Guesses::new(60, 5, 20);
        let now = Instant::now();
        for _ in 0..1_000 {
            guesses.take(host(1), now);
        }
        let others = (2..100).filter(|&n| guesses.take(host(n), now)).count();
        assert_eq!(others, 15);
    }

    #[test]
    fn what_is_remembered_has_an_end_and_those_beyond_it_share_one_rate() {
        let mut guesses = Guesses::new(60, 5, 0);
        let now = Instant::now();
        let most = u32::try_from(MOST_NETWORKS).unwrap();
        assert!((0..most).all(|n| guesses.take(host(n), now)));
        let beyond = (most..2 * most).filter(|&n| guesses.take(host(n), now));
        assert_eq!(beyond.count(), 5);
        assert_eq!(guesses.networks.len(), MOST_NETWORKS + 1);
        let later = now + MINUTE;
        assert!((most..2 * most).all(|n| guesses.take(host(n), later)));
        assert!(guesses.networks.len() <= MOST_NETWORKS + 1);
    }
}
