//! A bad network: a UDP relay that devices take for the gateway.
//!
//! Knows datagrams and what may happen to them on their way. Must not know what is in them.
//!
//! Like a NAT device, the relay has one port towards the gateway for each address that sends to it, and
//! can change it in mid-flow. What happens to a datagram is thrown with dice of its flow and direction,
//! made from one seed: the n-th datagram of a direction meets the same fate whenever the same seed and
//! the same weather are used. When it meets it depends on the machine.
//!
//! # Bounds
//!
//! At most `QUEUE_DATAGRAMS` are on their way and `FLOWS` addresses are served; more are dropped and
//! counted in [`Counts::overflowed`]. A relay that is dropped stops.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, hash_map::Entry},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use socket2::SockRef;
use tokio::{
    net::UdpSocket,
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

/// What happens to datagrams from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weather {
    /// The share that is lost.
    pub loss: f64,
    /// The share that arrives twice.
    pub duplication: f64,
    /// The share of which some bits of a byte are turned over.
    pub corruption: f64,
    /// The least time one way takes.
    pub delay: Duration,
    /// Up to this much longer, for each datagram anew: one overtakes another.
    pub jitter: Duration,
    /// How much a flow carries each way, if that is limited; the rest waits its turn.
    pub bytes_per_s: Option<NonZeroU32>,
    /// Longer ones vanish without a word, as in a tunnel whose ICMP messages are filtered.
    pub longest_datagram_bytes: usize,
    /// Nothing passes at all.
    pub is_blacked_out: bool,
}

impl Weather {
    /// Everything arrives, once, at once and in order.
    pub const FAIR: Self = Self {
        loss: 0.0,
        duplication: 0.0,
        corruption: 0.0,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        bytes_per_s: None,
        longest_datagram_bytes: usize::MAX,
        is_blacked_out: false,
    };
}

/// What the relay has done so far, in datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Handed on, copies included.
    pub passed: u64,
    /// Their lengths in bytes, summed up.
    pub passed_bytes: u64,
    /// Thrown away by [`Weather::loss`].
    pub lost: u64,
    /// Handed on a second time.
    pub duplicated: u64,
    /// Changed on their way.
    pub corrupted: u64,
    /// Handed on after one of the same flow and direction that had come later.
    pub overtaken: u64,
    /// Longer than the network could carry.
    pub too_long: u64,
    /// Sent into a blackout.
    pub blacked_out: u64,
    /// More than the relay can hold, or the system would send.
    pub overflowed: u64,
    /// How often a flow changed its port towards the gateway.
    pub rebound: u64,
    /// Sent by the gateway to a port that is not its flow's first: it has noticed the change.
    pub answered_after_rebinding: u64,
    /// The length in bytes of the longest one handed on.
    pub longest_passed_bytes: usize,
}

impl Counts {
    /// The sums of two relays.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            passed_bytes: self.passed_bytes + other.passed_bytes,
            lost: self.lost + other.lost,
            duplicated: self.duplicated + other.duplicated,
            corrupted: self.corrupted + other.corrupted,
            overtaken: self.overtaken + other.overtaken,
            too_long: self.too_long + other.too_long,
            blacked_out: self.blacked_out + other.blacked_out,
            overflowed: self.overflowed + other.overflowed,
            rebound: self.rebound + other.rebound,
            answered_after_rebinding: self.answered_after_rebinding
                + other.answered_after_rebinding,
            longest_passed_bytes: self.longest_passed_bytes.max(other.longest_passed_bytes),
        }
    }
}

/// A running relay. Dropping it stops it.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    _listener: AbortOnDropHandle<()>,
    _courier: AbortOnDropHandle<()>,
}

impl Relay {
    /// Begins to relay to a gateway, in fair weather. Devices are those of this host. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the system gives no socket.
    pub fn start(gateway: SocketAddr, seed: u64) -> io::Result<Self> {
        let front = Arc::new(open_socket(Ipv4Addr::LOCALHOST.into())?);
        let address = front.local_addr()?;
        let shared = Arc::new(Shared {
            gateway,
            front: front.clone(),
            seed,
            state: Mutex::new(State {
                air: Air::new(Weather::FAIR),
                flows: Vec::new(),
                index_of: HashMap::new(),
            }),
            changed: Notify::new(),
        });
        let listener = tokio::spawn(listen(front, shared.clone()));
        let courier = tokio::spawn(deliver(shared.clone()));
        Ok(Self {
            address,
            shared,
            _listener: AbortOnDropHandle::new(listener),
            _courier: AbortOnDropHandle::new(courier),
        })
    }

    /// Where devices find it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the weather. What is on its way already stays as it is.
    pub fn set_weather(&self, weather: Weather) {
        let air = &mut self.shared.state.lock().air;
        (air.weather_up, air.weather_down) = (weather, weather);
    }

    /// Changes the weather for what the gateway sends.
    pub fn set_weather_down(&self, weather: Weather) {
        self.shared.state.lock().air.weather_down = weather;
    }

    /// Gives each flow another port towards the gateway, as a NAT device does that was restarted: from
    /// now on nothing that is sent to the old one arrives.
    ///
    /// # Errors
    /// When the system gives no socket; flows that have a new one already keep it.
    pub fn rebind(&self) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        let State { air, flows, .. } = &mut *state;
        for (at, flow) in flows.iter_mut().enumerate() {
            flow.way_out = WayOut::open(at, true, &self.shared)?;
            air.counts.rebound += 1;
        }
        Ok(())
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.state.lock().air.counts
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Each flow's reader holds the state, which holds the reader.
        self.shared.state.lock().flows.clear();
    }
}

#[derive(Debug)]
struct Shared {
    gateway: SocketAddr,
    front: Arc<UdpSocket>,
    seed: u64,
    state: Mutex<State>,
    /// Something is due earlier than the courier knows.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    air: Air,
    flows: Vec<Flow>,
    index_of: HashMap<SocketAddr, usize>,
}

/// All that one address sends, and what comes back to it.
#[derive(Debug)]
struct Flow {
    device: SocketAddr,
    way_out: WayOut,
    up: Lane,
    down: Lane,
}

/// A flow's port towards the gateway.
#[derive(Debug)]
struct WayOut {
    socket: Arc<UdpSocket>,
    _reader: AbortOnDropHandle<()>,
}

impl WayOut {
    fn open(flow: usize, is_rebound: bool, shared: &Arc<Shared>) -> io::Result<Self> {
        let near = match shared.gateway.ip() {
            loopback if loopback.is_loopback() => loopback,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = Arc::new(open_socket(near)?);
        let reader = tokio::spawn(read_answers(
            socket.clone(),
            flow,
            is_rebound,
            shared.clone(),
        ));
        Ok(Self {
            socket,
            _reader: AbortOnDropHandle::new(reader),
        })
    }
}

impl Flow {
    fn lane(&mut self, way: Way) -> &mut Lane {
        match way {
            Way::Up(_) => &mut self.up,
            Way::Down(_) => &mut self.down,
        }
    }
}

impl State {
    /// The next datagram that has arrived, the socket that hands it on, and to whom.
    fn due(&mut self, shared: &Shared) -> Option<(Held, Arc<UdpSocket>, SocketAddr)> {
        let held = self.air.due(Instant::now())?;
        let flow = self.flows.get(held.way.flow())?;
        let (socket, target) = match held.way {
            Way::Up(_) => (flow.way_out.socket.clone(), shared.gateway),
            Way::Down(_) => (shared.front.clone(), flow.device),
        };
        Some((held, socket, target))
    }

    /// A datagram comes from a device.
    fn arrives_from(&mut self, device: SocketAddr, bytes: &[u8], shared: &Arc<Shared>) {
        let at = match self.index_of.entry(device) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let at = self.flows.len();
                let way_out = (at < FLOWS).then(|| WayOut::open(at, false, shared));
                let Some(Ok(way_out)) = way_out else {
                    self.air.counts.overflowed += 1;
                    return;
                };
                self.flows.push(Flow {
                    device,
                    way_out,
                    up: Lane::new(shared.seed, 2 * at as u64),
                    down: Lane::new(shared.seed, 2 * at as u64 + 1),
                });
                *new.insert(at)
            }
        };
        let lane = &mut self.flows[at].up;
        self.air.takes(bytes, Way::Up(at), lane, Instant::now());
    }
}

/// Takes what devices send.
async fn listen(front: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        // An error is about a datagram sent before, to a device that is gone.
        if let Ok((length, device)) = front.recv_from(&mut buffer).await {
            let mut state = shared.state.lock();
            state.arrives_from(device, &buffer[..length], &shared);
            drop(state);
            shared.changed.notify_one();
        }
    }
}

/// Takes what the gateway sends to one port.
async fn read_answers(socket: Arc<UdpSocket>, flow: usize, is_rebound: bool, shared: Arc<Shared>) {
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        let Ok((length, sender)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        if sender != shared.gateway {
            continue;
        }
        let mut state = shared.state.lock();
        let State { air, flows, .. } = &mut *state;
        let Some(known) = flows.get_mut(flow) else {
            return;
        };
        air.counts.answered_after_rebinding += u64::from(is_rebound);
        let now = Instant::now();
        air.takes(&buffer[..length], Way::Down(flow), &mut known.down, now);
        drop(state);
        shared.changed.notify_one();
    }
}

/// Hands on what is due.
async fn deliver(shared: Arc<Shared>) {
    loop {
        let (due, next_due) = {
            let mut state = shared.state.lock();
            let due = state.due(&shared);
            (due, state.air.next_due())
        };
        match (due, next_due) {
            (Some((held, socket, target)), _) => {
                let sent = socket.send_to(&held.bytes, target).await;
                let mut state = shared.state.lock();
                let State { air, flows, .. } = &mut *state;
                let Some(flow) = flows.get_mut(held.way.flow()) else {
                    return;
                };
                air.handed_on(&held, flow.lane(held.way), sent.is_ok());
            }
            (None, Some(next_due)) => tokio::select! {
                () = sleep_until(next_due) => {}
                () = shared.changed.notified() => {}
            },
            (None, None) => shared.changed.notified().await,
        }
    }
}

/// The datagrams on their way, and what becomes of them. Touches no socket and no clock.
#[derive(Debug)]
struct Air {
    weather_up: Weather,
    weather_down: Weather,
    counts: Counts,
    on_their_way: BinaryHeap<Reverse<Held>>,
    next_number: u64,
}

/// One direction of a flow.
#[derive(Debug)]
struct Lane {
    dice: SmallRng,
    /// The latest arrival that was handed on.
    handed_on: u64,
    /// Until when a narrow line is taken.
    busy_until: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Up(usize),
    Down(usize),
}

/// Ordered by when it is due, then by when it came.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    due: Instant,
    number: u64,
    way: Way,
    bytes: Bytes,
}

impl Way {
    fn flow(self) -> usize {
        match self {
            Self::Up(flow) | Self::Down(flow) => flow,
        }
    }
}

impl Lane {
    fn new(seed: u64, number: u64) -> Self {
        Self {
            // Neighbouring numbers make unlike dice: the generator mixes its seed first.
            dice: SmallRng::seed_from_u64(seed.rotate_left(32) ^ number),
            handed_on: 0,
            busy_until: None,
        }
    }
}

impl Air {
    fn new(weather: Weather) -> Self {
        Self {
            weather_up: weather,
            weather_down: weather,
            counts: Counts::default(),
            on_their_way: BinaryHeap::new(),
            next_number: 0,
        }
    }

    /// A datagram sets out.
    fn takes(&mut self, bytes: &[u8], way: Way, lane: &mut Lane, now: Instant) {
        let weather = match way {
            Way::Up(_) => self.weather_up,
            Way::Down(_) => self.weather_down,
        };
        let Weather {
            loss,
            duplication,
            corruption,
            ..
        } = weather;
        // All dice are thrown for each datagram, so that its fate does not depend on earlier weather.
        let [is_lost, is_duplicated, is_corrupted] =
            [loss, duplication, corruption].map(|share| lane.dice.random_bool(share));
        let (at_byte, flips) = (
            lane.dice.random_range(0..bytes.len().max(1)),
            lane.dice.random_range(1..=u8::MAX),
        );
        let longer = [(); 2].map(|()| weather.jitter.mul_f64(lane.dice.random()));
        if weather.is_blacked_out {
            self.counts.blacked_out += 1;
            return;
        }
        if weather.longest_datagram_bytes < bytes.len() {
            self.counts.too_long += 1;
            return;
        }
        if is_lost {
            self.counts.lost += 1;
            return;
        }
        let mut bytes = bytes.to_vec();
        if is_corrupted && !bytes.is_empty() {
            bytes[at_byte] ^= flips;
            self.counts.corrupted += 1;
        }
        let bytes = Bytes::from(bytes);
        let copies = 1 + usize::from(is_duplicated);
        self.counts.duplicated += u64::from(is_duplicated);
        for longer in longer.into_iter().take(copies) {
            if QUEUE_DATAGRAMS <= self.on_their_way.len() {
                self.counts.overflowed += 1;
                continue;
            }
            let mut sent = now;
            if let Some(rate) = weather.bytes_per_s {
                let begun = lane.busy_until.map_or(now, |until| until.max(now));
                sent = begun + Duration::from_secs(bytes.len() as u64) / rate.get();
                lane.busy_until = Some(sent);
            }
            self.next_number += 1;
            self.on_their_way.push(Reverse(Held {
                due: sent + weather.delay + longer,
                number: self.next_number,
                way,
                bytes: bytes.clone(),
            }));
        }
    }

    /// The next datagram that has arrived by now.
    fn due(&mut self, now: Instant) -> Option<Held> {
        let is_due = self.next_due().is_some_and(|due| due <= now);
        is_due.then(|| self.on_their_way.pop().map(|Reverse(held)| held))?
    }

    fn next_due(&self) -> Option<Instant> {
        self.on_their_way.peek().map(|Reverse(held)| held.due)
    }

    fn handed_on(&mut self, held: &Held, lane: &mut Lane, is_sent: bool) {
        if !is_sent {
            self.counts.overflowed += 1;
            return;
        }
        self.counts.passed += 1;
        self.counts.passed_bytes += held.bytes.len() as u64;
        self.counts.overtaken += u64::from(held.number < lane.handed_on);
        lane.handed_on = lane.handed_on.max(held.number);
        self.counts.longest_passed_bytes = self.counts.longest_passed_bytes.max(held.bytes.len());
    }
}

fn open_socket(near: IpAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind((near, 0))?;
    // What the kernel would drop is not counted here, so let it drop as little as it can.
    SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// Some ten megabytes at most, far more than congestion control lets devices have on their way.
const QUEUE_DATAGRAMS: usize = 8_192;
/// More than any test has devices.
const FLOWS: usize = 1_024;
/// No UDP datagram is longer.
const DATAGRAM_BYTES: usize = 65_536;
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH_BYTES: usize = 100;

    /// Sends numbered datagrams, a millisecond apart; what comes out, in order, and the counts.
    fn carry(weather: Weather, seed: u64, datagrams: usize) -> (Vec<Bytes>, Counts) {
        let (mut air, mut lane) = (Air::new(weather), Lane::new(seed, 0));
        let begun = Instant::now();
        for number in 0..datagrams {
            let mut bytes = [0; LENGTH_BYTES];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            let now = begun + Duration::from_millis(number as u64);
            air.takes(&bytes, Way::Up(0), &mut lane, now);
        }
        let mut arrived = Vec::new();
        while let Some(held) = air.due(begun + Duration::from_secs(3_600)) {
            air.handed_on(&held, &mut lane, true);
            arrived.push(held.bytes);
        }
        (arrived, air.counts)
    }

    #[test]
    fn fair_weather_changes_nothing() {
        let (arrived, counts) = carry(Weather::FAIR, 1, 1_000);
        assert!(arrived.is_sorted());
        let expected = Counts {
            passed: 1_000,
            passed_bytes: 1_000 * LENGTH_BYTES as u64,
            longest_passed_bytes: LENGTH_BYTES,
            ..Counts::default()
        };
        assert_eq!((arrived.len(), counts), (1_000, expected));
    }

    #[test]
    fn each_fault_happens_about_as_often_as_asked_and_is_counted() {
        let storm = Weather {
            loss: 0.2,
            duplication: 0.1,
            corruption: 0.05,
            delay: Duration::from_millis(3),
            jitter: Duration::from_millis(4),
            ..Weather::FAIR
        };
        let (arrived, counts) = carry(storm, 7, 8_000);
        assert!((1_400..1_800).contains(&counts.lost), "{counts:?}");
        assert!((550..750).contains(&counts.duplicated), "{counts:?}");
        assert!((250..400).contains(&counts.corrupted), "{counts:?}");
        assert!((1_000..6_000).contains(&counts.overtaken), "{counts:?}");
        assert_eq!(counts.passed, 8_000 - counts.lost + counts.duplicated);
        assert_eq!(arrived.len() as u64, counts.passed);
        assert!(!arrived.is_sorted());
    }

    #[test]
    fn the_same_seed_throws_the_same_dice_and_another_does_not() {
        let storm = Weather {
            loss: 0.5,
            ..Weather::FAIR
        };
        assert_eq!(carry(storm, 3, 100), carry(storm, 3, 100));
        assert_ne!(carry(storm, 3, 100).0, carry(storm, 4, 100).0);
    }

    #[test]
    fn a_corrupted_datagram_keeps_its_length_and_differs() {
        let noise = Weather {
            corruption: 1.0,
            ..Weather::FAIR
        };
        let (clean, corrupted) = (carry(Weather::FAIR, 1, 500).0, carry(noise, 1, 500).0);
        for (clean, corrupted) in clean.iter().zip(&corrupted) {
            assert_eq!(clean.len(), corrupted.len());
            assert_ne!(clean, corrupted);
        }
    }

    #[test]
    fn what_is_too_long_or_in_the_dark_vanishes() {
        let narrow = Weather {
            longest_datagram_bytes: LENGTH_BYTES - 1,
            ..Weather::FAIR
        };
        let dark = Weather {
            is_blacked_out: true,
            ..Weather::FAIR
        };
        assert_eq!(carry(narrow, 1, 10).1.too_long, 10);
        assert_eq!(carry(dark, 1, 10).1.blacked_out, 10);
        assert_eq!(
            (carry(narrow, 1, 10).0.len(), carry(dark, 1, 10).0.len()),
            (0, 0)
        );
    }

    #[test]
    fn a_narrow_line_takes_its_time() {
        let rate = NonZeroU32::new(1_000);
        let narrow = Weather {
            bytes_per_s: rate,
            ..Weather::FAIR
        };
        let (mut air, mut lane) = (Air::new(narrow), Lane::new(1, 0));
        let begun = Instant::now();
        for _ in 0..3 {
            air.takes(&[0; 500], Way::Up(0), &mut lane, begun);
        }
        let due: Vec<_> = std::iter::from_fn(|| air.due(begun + Duration::from_secs(9)))
            .map(|held| (held.due - begun).as_millis())
            .collect();
        assert_eq!(due, [500, 1_000, 1_500]);
    }

    #[test]
    fn a_full_queue_drops_the_newest_and_counts_them() {
        let (arrived, counts) = carry(Weather::FAIR, 1, QUEUE_DATAGRAMS + 5);
        assert_eq!((arrived.len(), counts.overflowed), (QUEUE_DATAGRAMS, 5));
    }
}
