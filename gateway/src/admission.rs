//! Who may begin a connection: what is asked before any cryptography is spent on a newcomer.
//!
//! Knows addresses and counts. Must not know QUIC, certificates or what time it is. [`State`] decides;
//! [`Admission`] is what the accept loop holds: the state behind a lock, and a guard for each connection.
//!
//! # The ladder
//!
//! From the cheapest answer to the dearest (13 to 330 µs of a core each):
//!
//! 0. More newcomers wait at a worker than it can look at soon: quinn drops what comes then, and how many that is
//!    nobody knows ([`crate::newcomers`]).
//! 1. All connections are taken, or all places for handshakes: the newcomer is refused and comes back. Saying
//!    so costs nearly twice as much as not saying it, so beyond `REFUSALS_PER_S` newcomers are ignored: they come
//!    back as well, each time after twice as long.
//! 2. Anybody can write anybody's address on a packet. While many handshakes are in progress, many are
//!    begun, or many come from one address, a newcomer that has not shown that it gets what is sent to its
//!    address is sent a Retry, which costs it one round trip and the gateway no memory. Not always:
//!    the round trip is dear for a device that wakes up for one ping.
//! 3. An address that has shown it and still begins too many, or holds a sixteenth of all places for handshakes,
//!    is refused: it is itself what is too much.
//!
//! # Bounds
//!
//! An IPv4 address counts as one, and an IPv6 network of 64 bits, which is the least that anybody is given.
//! One entry is held for each that has connections, or has begun handshakes a moment ago; at most two for
//! each connection that may be open. Beyond that, which takes as many real networks, new ones share one entry.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    metrics::Metrics,
    rate::{Bucket, Rate},
};

/// How many handshakes there may be, in all and from one address.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct AdmissionConfig {
    /// How many newcomers may wait at a worker until it looks at them: a second of work, more or less. More are
    /// dropped unseen, which costs 13 µs each, and come back by themselves after a second.
    pub newcomers: NonZeroUsize,
    /// How many handshakes may be in progress, and a sixteenth of it from one address that has proved to be
    /// its peer's own; more are refused. Each takes about 40 KB, and two cores complete some 5,000 in a
    /// second, so this is less than a second of work.
    pub handshakes: NonZeroUsize,
    /// From how many handshakes in progress on a newcomer must prove its address (QUIC's Retry). A handshake
    /// that nobody finishes holds its place until its timeout, so a few hundred are a sign of one; those
    /// that begin from then on have no more than 3 s.
    pub prove_address_from_handshakes: usize,
    /// How many handshakes a second may be begun with addresses that are not proved, and as many at once
    /// after a pause; 0 is no limit. A third of what one core can do.
    pub unproved_per_s: u32,
    /// How many handshakes a second may be begun from one address; 0 is no limit. Thousands of devices may
    /// share one behind a carrier's network address translation.
    pub address_handshakes_per_s: u32,
    /// How many at once after a pause: all those devices come back together when the gateway was away.
    pub address_handshakes_burst: u32,
    /// How many connections of one address may be open or shaking hands; 0 is no limit but that of all. Off,
    /// because a carrier may put any number of devices behind one address.
    pub address_connections: usize,
    /// How many devices a second should come back after a planned stop; 0 lets all come back at once. Each is
    /// told a time of its own, so that the gateway does not meet a storm when it starts again.
    pub returns_per_s: u32,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            newcomers: const { NonZeroUsize::new(4_096).expect("not zero") },
            handshakes: const { NonZeroUsize::new(2_048).expect("not zero") },
            prove_address_from_handshakes: 256,
            unproved_per_s: 1_000,
            address_handshakes_per_s: 500,
            address_handshakes_burst: 5_000,
            address_connections: 0,
            returns_per_s: 2_000,
        }
    }
}

/// What is done with a newcomer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may shake hands.
    Accept,
    /// It must prove its address and come again.
    Prove,
    /// It must come back later, because this limit is reached.
    Refuse(Limit),
    /// The same, and too many were told so a moment ago.
    Ignore(Limit),
}

/// What there is too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Newcomers that wait to be looked at.
    Newcomers,
    /// Connections.
    Connections,
    /// Handshakes in progress.
    Handshakes,
    /// Handshakes of this address, begun or in progress.
    AddressHandshakes,
    /// Connections of this address.
    AddressConnections,
}

impl Limit {
    /// Whether it is the gateway as a whole that has no room, and not one address that takes too much.
    fn is_of_all(self) -> bool {
        matches!(self, Self::Newcomers | Self::Connections | Self::Handshakes)
    }

    /// Its name in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Newcomers => "newcomers",
            Self::Connections => "connections",
            Self::Handshakes => "handshakes",
            Self::AddressHandshakes => "address_handshakes",
            Self::AddressConnections => "address_connections",
        }
    }
}

/// What counts as one address: an IPv4 address, or the IPv6 network of 64 bits, which is the least that
/// anybody is given.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let bits = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(bits))
        }
        address @ IpAddr::V4(_) => address,
    }
}

/// Whose entry it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Network {
    One(IpAddr),
    /// All that there was no room for.
    Others,
}

#[derive(Clone, Copy, Debug, Default)]
struct Address {
    connections: usize,
    /// In progress, and its own for sure.
    proved_handshakes: usize,
    /// Apart from the other, or whoever writes somebody's address on his packets could lock him out.
    unproved: Bucket,
    proved: Bucket,
}

impl Address {
    fn says_nothing(&self, now: Instant) -> bool {
        self.connections == 0 && self.unproved.is_full(now) && self.proved.is_full(now)
    }
}

/// Decides, and remembers what it must for that.
#[derive(Debug)]
pub struct State {
    config: AdmissionConfig,
    most_connections: usize,
    connections: usize,
    handshakes: usize,
    unproved: Bucket,
    /// What may still be said of refusals.
    refusals: Bucket,
    /// Keyed by what peers can choose, so hashed with a secret.
    addresses: HashMap<Network, Address>,
    swept_at: Option<Instant>,
}

impl State {
    /// Nobody is there. `most_connections` is how many may be open or shaking hands.
    #[must_use]
    pub fn new(config: AdmissionConfig, most_connections: usize) -> Self {
        Self {
            config,
            most_connections,
            connections: 0,
            handshakes: 0,
            unproved: Bucket::default(),
            refusals: Bucket::default(),
            addresses: HashMap::new(),
            swept_at: None,
        }
    }

    /// Decides about a newcomer. If it is accepted, [`Self::shaken_hands`] and [`Self::left`] follow, in
    /// this order, with the network that is returned, and what it had proved.
    fn judge(&mut self, address: IpAddr, is_proved: bool, now: Instant) -> (Verdict, Network) {
        let network = self.place_for(Network::One(network(address)), now);
        let config = &self.config;
        let per_address = Rate::new(
            config.address_handshakes_per_s,
            SECOND,
            config.address_handshakes_burst,
        );
        let unproved = Rate::new(config.unproved_per_s, SECOND, config.unproved_per_s);
        let address = self.addresses.entry(network).or_default();
        let is_crowded =
            config.address_connections != 0 && config.address_connections <= address.connections;
        let verdict = if self.most_connections <= self.connections {
            Verdict::Refuse(Limit::Connections)
        } else if !is_proved
            && (config.prove_address_from_handshakes <= self.handshakes
                || is_crowded
                || address.unproved.take(&per_address, 1, now).is_err()
                || self.unproved.take(&unproved, 1, now).is_err())
        {
            Verdict::Prove
        } else if config.handshakes.get() <= self.handshakes {
            Verdict::Refuse(Limit::Handshakes)
        } else if is_crowded {
            Verdict::Refuse(Limit::AddressConnections)
        } else if is_proved
            && (config.handshakes.get() <= address.proved_handshakes.saturating_mul(ADDRESS_SHARE)
                || address.proved.take(&per_address, 1, now).is_err())
        {
            Verdict::Refuse(Limit::AddressHandshakes)
        } else {
            address.connections += 1;
            address.proved_handshakes += usize::from(is_proved);
            self.connections += 1;
            self.handshakes += 1;
            Verdict::Accept
        };
        if address.says_nothing(now) {
            self.addresses.remove(&network);
        }
        let refusals = Rate::new(REFUSALS_PER_S, SECOND, REFUSALS_PER_S);
        let verdict = match verdict {
            Verdict::Refuse(limit) if self.refusals.take(&refusals, 1, now).is_err() => {
                Verdict::Ignore(limit)
            }
            verdict => verdict,
        };
        (verdict, network)
    }

    fn shaken_hands(&mut self, network: Network, is_proved: bool) {
        self.handshakes -= 1;
        if let Some(address) = self.addresses.get_mut(&network) {
            address.proved_handshakes -= usize::from(is_proved);
        }
    }

    fn left(&mut self, network: Network, now: Instant) {
        self.connections -= 1;
        if let Some(address) = self.addresses.get_mut(&network) {
            address.connections -= 1;
            if address.says_nothing(now) {
                self.addresses.remove(&network);
            }
        }
    }

    /// The entry for a network: its own if it has one or there is room for one.
    fn place_for(&mut self, network: Network, now: Instant) -> Network {
        let most = self.most_connections.saturating_mul(2);
        if self.addresses.len() < most || self.addresses.contains_key(&network) {
            return network;
        }
        let is_swept = self
            .swept_at
            .is_some_and(|at| now.saturating_duration_since(at) < SECOND);
        if !is_swept {
            self.swept_at = Some(now);
            self.addresses
                .retain(|_, address| !address.says_nothing(now));
            self.addresses.shrink_to(most / 2);
        }
        if self.addresses.len() < most {
            network
        } else {
            Network::Others
        }
    }
}

/// The state as the accept loop and its connections share it.
#[derive(Clone, Debug)]
pub struct Admission {
    state: Arc<Mutex<State>>,
    turned_away: Arc<AtomicU64>,
    metrics: Metrics,
}

impl Admission {
    /// Nobody is there. `most_connections` is how many may be open or shaking hands.
    #[must_use]
    pub fn new(config: &AdmissionConfig, most_connections: usize, metrics: Metrics) -> Self {
        let state = State::new(config.clone(), most_connections);
        Self {
            state: Arc::new(Mutex::new(state)),
            turned_away: Arc::default(),
            metrics,
        }
    }

    /// How many newcomers were turned away so far because the gateway as a whole had no room: whoever that was could
    /// not be heard.
    #[must_use]
    pub fn turned_away(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.turned_away)
    }

    /// Over how long the devices that are connected should come back after a stop. Zero if that is less than a
    /// second, for devices that all wait a little by themselves are no storm.
    #[must_use]
    pub fn return_spread(&self) -> Duration {
        let state = self.state.lock();
        let connections = u32::try_from(state.connections).unwrap_or(u32::MAX);
        let one_each = SECOND.checked_div(state.config.returns_per_s);
        let spread = one_each.unwrap_or_default().saturating_mul(connections);
        if spread < SECOND {
            Duration::ZERO
        } else {
            spread
        }
    }

    /// There was no room for newcomers to wait, so some may have been dropped unseen.
    pub fn had_no_room_to_wait(&self) {
        let limits = &self.metrics.limits;
        limits.reached.of(Limit::Newcomers.as_label()).increment(1);
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// Decides about a newcomer, and gives it its place if it is accepted.
    ///
    /// # Errors
    /// When it is not; the verdict is then not [`Verdict::Accept`].
    pub fn admit(&self, address: IpAddr, is_proved: bool) -> Result<Place, Verdict> {
        let mut state = self.state.lock();
        let (verdict, network) = state.judge(address, is_proved, Instant::now());
        if let Verdict::Refuse(limit) | Verdict::Ignore(limit) = verdict
            && limit.is_of_all()
        {
            self.turned_away.fetch_add(1, Ordering::Relaxed);
        }
        if verdict != Verdict::Accept {
            return Err(verdict);
        }
        self.metrics
            .limits
            .addresses
            .set(state.addresses.len() as f64);
        let is_crowded = state.config.prove_address_from_handshakes < state.handshakes;
        drop(state);
        Ok(Place {
            admission: self.clone(),
            network,
            is_proved,
            is_crowded,
            is_shaking_hands: true,
        })
    }
}

/// The place of one connection, from its first packet to its end.
#[derive(Debug)]
pub struct Place {
    admission: Admission,
    network: Network,
    is_proved: bool,
    is_crowded: bool,
    is_shaking_hands: bool,
}

impl Place {
    /// How long the handshake may take, of what it may usually take: less when many others want a place.
    #[must_use]
    pub fn patience(&self, usual: Duration) -> Duration {
        if self.is_crowded {
            usual.min(CROWDED_PATIENCE)
        } else {
            usual
        }
    }

    /// The handshake is over, well or not.
    pub fn shaken_hands(&mut self) {
        if std::mem::take(&mut self.is_shaking_hands) {
            let mut state = self.admission.state.lock();
            state.shaken_hands(self.network, self.is_proved);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shaken_hands();
        let Admission { state, metrics, .. } = &self.admission;
        let mut state = state.lock();
        state.left(self.network, Instant::now());
        metrics.limits.addresses.set(state.addresses.len() as f64);
    }
}

/// A tenth of a core.
const REFUSALS_PER_S: u32 = 2_000;
const SECOND: Duration = Duration::from_secs(1);
/// What share of all handshakes one address may have: so that it takes many to keep others out, and a
/// carrier's address still gets a thousand done in a second.
const ADDRESS_SHARE: usize = 16;
/// Several round trips by satellite. Whoever stalls is gone three times as fast.
const CROWDED_PATIENCE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::metrics::LIMITS;

    const HOME: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    fn nth(number: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number))
    }

    /// Limits so far away that a test meets only the one that it moves near.
    fn state(change: impl FnOnce(&mut AdmissionConfig)) -> State {
        let mut config = AdmissionConfig {
            newcomers: NonZeroUsize::MAX,
            handshakes: NonZeroUsize::new(1_000_000).unwrap(),
            prove_address_from_handshakes: 1_000_000,
            unproved_per_s: 0,
            address_handshakes_per_s: 0,
            address_handshakes_burst: 0,
            address_connections: 0,
            returns_per_s: 0,
        };
        change(&mut config);
        State::new(config, 1_000_000)
    }

    fn judge(state: &mut State, address: IpAddr, is_proved: bool, now: Instant) -> Verdict {
        state.judge(address, is_proved, now).0
    }

    /// A whole handshake and a farewell, if it is let in.
    fn visit(state: &mut State, address: IpAddr, is_proved: bool, now: Instant) -> Verdict {
        let (verdict, network) = state.judge(address, is_proved, now);
        if verdict == Verdict::Accept {
            state.shaken_hands(network, is_proved);
            state.left(network, now);
        }
        verdict
    }

    #[test]
    fn nobody_must_prove_an_address_while_little_happens() {
        let mut state = State::new(AdmissionConfig::default(), 1_000);
        let now = Instant::now();
        for number in 0..200 {
            assert_eq!(judge(&mut state, nth(number), false, now), Verdict::Accept);
        }
    }

    #[test]
    fn handshakes_that_nobody_finishes_make_newcomers_prove_their_address_and_take_no_more_places()
    {
        let mut state = state(|config| config.prove_address_from_handshakes = 10);
        let now = Instant::now();
        for number in 0..10 {
            assert_eq!(judge(&mut state, nth(number), false, now), Verdict::Accept);
        }
        for number in 10..10_000 {
            assert_eq!(judge(&mut state, nth(number), false, now), Verdict::Prove);
        }
        assert_eq!(state.handshakes, 10);
        assert_eq!(
            state.addresses.len(),
            10,
            "who must prove itself leaves no trace"
        );
        assert_eq!(
            judge(&mut state, HOME, true, now),
            Verdict::Accept,
            "who has proved its address gets in all the same"
        );
    }

    #[test]
    fn handshakes_begun_too_fast_make_newcomers_prove_their_address() {
        let mut state = state(|config| config.unproved_per_s = 10);
        let now = Instant::now();
        for number in 0..10 {
            assert_eq!(visit(&mut state, nth(number), false, now), Verdict::Accept);
        }
        assert_eq!(visit(&mut state, nth(10), false, now), Verdict::Prove);
        assert_eq!(visit(&mut state, nth(10), true, now), Verdict::Accept);
        assert_eq!(
            visit(&mut state, nth(11), false, now + SECOND),
            Verdict::Accept
        );
    }

    #[test]
    fn handshakes_have_a_most_also_for_those_with_proved_addresses() {
        let mut state = state(|config| config.handshakes = NonZeroUsize::new(2).unwrap());
        let now = Instant::now();
        let (_, other) = state.judge(nth(0), true, now);
        let (verdict, network) = state.judge(nth(1), true, now);
        assert_eq!(verdict, Verdict::Accept);
        assert_eq!(
            judge(&mut state, nth(2), true, now),
            Verdict::Refuse(Limit::Handshakes)
        );
        state.shaken_hands(network, true);
        assert_eq!(judge(&mut state, nth(2), true, now), Verdict::Accept);
        state.shaken_hands(other, true);
        state.left(other, now);
        assert_eq!((state.connections, state.handshakes), (2, 1));
    }

    #[test]
    fn refusals_have_a_rate_and_beyond_it_newcomers_are_ignored() {
        let mut state = State::new(AdmissionConfig::default(), 0);
        let now = Instant::now();
        let told = (0..10_000)
            .filter(|number| {
                let verdict = judge(&mut state, nth(*number), true, now);
                assert!(
                    matches!(
                        verdict,
                        Verdict::Refuse(Limit::Connections) | Verdict::Ignore(Limit::Connections)
                    ),
                    "{verdict:?}"
                );
                verdict == Verdict::Refuse(Limit::Connections)
            })
            .count();
        assert_eq!(told, REFUSALS_PER_S as usize);
        assert_eq!(
            judge(&mut state, HOME, true, now + SECOND),
            Verdict::Refuse(Limit::Connections)
        );
    }

    #[test]
    fn newcomers_that_there_is_no_room_for_are_counted_and_those_over_their_own_limit_are_not() {
        let config = AdmissionConfig {
            address_connections: 1,
            ..AdmissionConfig::default()
        };
        let admission = Admission::new(&config, 2, Metrics::new());
        let turned_away = admission.turned_away();
        let _first = admission.admit(HOME, true).unwrap();
        assert!(admission.admit(HOME, true).is_err());
        assert_eq!(turned_away.load(Ordering::Relaxed), 0);
        let _second = admission.admit(nth(1), true).unwrap();
        assert!(admission.admit(nth(2), true).is_err());
        assert_eq!(turned_away.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn one_address_that_begins_too_many_is_refused_and_others_are_not() {
        let mut state = state(|config| {
            config.address_handshakes_per_s = 10;
            config.address_handshakes_burst = 20;
        });
        let now = Instant::now();
        for _ in 0..20 {
            assert_eq!(visit(&mut state, HOME, true, now), Verdict::Accept);
        }
        let refused = Verdict::Refuse(Limit::AddressHandshakes);
        assert_eq!(visit(&mut state, HOME, true, now), refused);
        assert_eq!(visit(&mut state, nth(1), true, now), Verdict::Accept);
        assert_eq!(
            visit(&mut state, HOME, true, now + SECOND / 10),
            Verdict::Accept
        );
    }

    #[test]
    fn one_address_holds_a_sixteenth_of_the_places_for_handshakes_and_no_more() {
        let mut state = state(|config| config.handshakes = NonZeroUsize::new(160).unwrap());
        let now = Instant::now();
        let (_, network) = state.judge(HOME, true, now);
        for _ in 1..10 {
            assert_eq!(judge(&mut state, HOME, true, now), Verdict::Accept);
        }
        let refused = Verdict::Refuse(Limit::AddressHandshakes);
        assert_eq!(judge(&mut state, HOME, true, now), refused);
        assert_eq!(judge(&mut state, nth(1), true, now), Verdict::Accept);
        state.shaken_hands(network, true);
        assert_eq!(judge(&mut state, HOME, true, now), Verdict::Accept);
    }

    #[test]
    fn whoever_comes_when_many_shake_hands_has_less_time_for_it() {
        let config = AdmissionConfig {
            prove_address_from_handshakes: 2,
            ..AdmissionConfig::default()
        };
        let admission = Admission::new(&config, 100, Metrics::new());
        let places: Vec<_> = (0..4)
            .map(|number| admission.admit(nth(number), true).unwrap())
            .collect();
        let usual = Duration::from_secs(10);
        let patience: Vec<_> = places.iter().map(|place| place.patience(usual)).collect();
        assert_eq!(patience, [usual, usual, CROWDED_PATIENCE, CROWDED_PATIENCE]);
    }

    #[test]
    fn writing_somebodys_address_on_packets_does_not_lock_him_out() {
        let mut state = state(|config| {
            config.address_handshakes_per_s = 10;
            config.address_handshakes_burst = 20;
        });
        let now = Instant::now();
        let forged = (0..1_000).map(|_| visit(&mut state, HOME, false, now));
        assert_eq!(
            forged.filter(|verdict| *verdict == Verdict::Prove).count(),
            980
        );
        assert_eq!(visit(&mut state, HOME, true, now), Verdict::Accept);
    }

    #[test]
    fn connections_of_one_address_have_a_most_if_wanted() {
        let mut state = state(|config| config.address_connections = 2);
        let now = Instant::now();
        assert_eq!(judge(&mut state, HOME, true, now), Verdict::Accept);
        let (_, network) = state.judge(HOME, false, now);
        let refused = Verdict::Refuse(Limit::AddressConnections);
        assert_eq!(judge(&mut state, HOME, true, now), refused);
        assert_eq!(judge(&mut state, HOME, false, now), Verdict::Prove);
        state.shaken_hands(network, false);
        state.left(network, now);
        assert_eq!(judge(&mut state, HOME, true, now), Verdict::Accept);
    }

    #[test]
    fn connections_have_a_most_whoever_comes() {
        let mut state = State::new(AdmissionConfig::default(), 2);
        let now = Instant::now();
        let (_, network) = state.judge(nth(0), false, now);
        assert_eq!(judge(&mut state, nth(1), true, now), Verdict::Accept);
        let refused = Verdict::Refuse(Limit::Connections);
        assert_eq!(judge(&mut state, nth(2), true, now), refused);
        assert_eq!(judge(&mut state, nth(2), false, now), refused);
        state.shaken_hands(network, false);
        state.left(network, now);
        assert_eq!(judge(&mut state, nth(2), false, now), Verdict::Accept);
    }

    #[test]
    fn after_a_planned_stop_devices_come_back_at_the_rate_that_is_wished() {
        let spread = |returns_per_s, connections| {
            let config = AdmissionConfig {
                returns_per_s,
                ..AdmissionConfig::default()
            };
            let admission = Admission::new(&config, 100, Metrics::new());
            let _places: Vec<_> = (0..connections)
                .map(|number| admission.admit(nth(number), true).unwrap())
                .collect();
            admission.return_spread()
        };
        assert_eq!(spread(20, 40), 2 * SECOND);
        assert_eq!(spread(20, 19), Duration::ZERO);
        assert_eq!(spread(0, 40), Duration::ZERO, "all at once");
    }

    #[test]
    fn every_limit_has_a_series_of_its_own() {
        for limit in [
            Limit::Connections,
            Limit::Handshakes,
            Limit::AddressHandshakes,
            Limit::AddressConnections,
        ] {
            assert!(LIMITS.contains(&limit.as_label()), "{limit:?}");
        }
    }

    #[test]
    fn a_network_of_64_bits_is_one_address_and_an_embedded_address_is_itself() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("::ffff:192.0.2.1"), of("::ffff:192.0.2.2"));
        assert_ne!(network(Ipv6Addr::LOCALHOST.into()), of("127.0.0.1"));
    }

    #[test]
    fn addresses_are_forgotten_when_they_are_gone_and_have_an_upper_bound() {
        let mut state = State::new(
            AdmissionConfig {
                unproved_per_s: 0,
                address_handshakes_per_s: 10,
                address_handshakes_burst: 10,
                ..AdmissionConfig::default()
            },
            50,
        );
        let now = Instant::now();
        for number in 0..1_000 {
            assert_eq!(
                visit(&mut state, nth(number), true, now),
                match number {
                    // Those that have no entry of their own share one.
                    0..110 => Verdict::Accept,
                    _ => Verdict::Refuse(Limit::AddressHandshakes),
                }
            );
        }
        assert_eq!(state.addresses.len(), 101);
        assert_eq!(
            visit(&mut state, HOME, true, now + 2 * SECOND),
            Verdict::Accept
        );
        assert_eq!(state.addresses.len(), 1, "all others had filled up again");
    }
}
