//! The world between devices and gateway: time, links that delay, cut and lose, and everything else that
//! goes wrong, all of it by one seed.
//!
//! Knows when things happen. Decides nothing about pings: that do the real [`Outbox`] in
//! [`crate::install`] and the real session and record in [`crate::gateway`].

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use waypost_proto::{
    device::Policy,
    frame::encode_frame,
    ping::{MAX_LATITUDE_E7, Ping, Source},
    session::CloseCode,
    v1::{self, gateway_frame::Kind},
};

use crate::{
    dice::Dice,
    gateway::{Disk, Gateway, Sabotage, Want},
    history::{Entry, LinkId, Name, Rules},
    install::{Install, Wish},
};

/// Names one stream of a connection.
pub(crate) type StreamId = u32;

/// The run's first moment, so that no rule about age meets the beginning of time.
const BEGINNING_MS: u64 = 1_700_000_000_000;
/// Much longer than all waiting and patience together: by then all must be settled.
const HEALING_MS: u64 = 3_600_000;

/// How bad it gets, and the rules of the run; drawn once by the seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    pub(crate) devices: u32,
    pub(crate) capacity: u64,
    pub(crate) pushes: u64,
    pub(crate) frame_bytes: u32,
    pub(crate) batch_pings: u32,
    pub(crate) credit_pings: u32,
    pub(crate) group_pings: u32,
    pub(crate) policy: Policy,
    /// Batches put off, in a thousand.
    pub(crate) defer_per_mille: u64,
    /// Frames of the gateway that are merged into later ones, or whose flow says something else.
    pub(crate) merge_per_mille: u64,
    pub(crate) flow_per_mille: u64,
    pub(crate) most_delay_ms: u64,
    pub(crate) most_sync_ms: u64,
    pub(crate) fault_every_ms: u64,
    /// Pings before which numbers are left out.
    pub(crate) gaps_per_mille: u64,
    /// Some pings are too old, of the future, or nowhere on earth.
    pub(crate) makes_odd_pings: bool,
    /// More than one install of a device at once.
    pub(crate) has_rivals: bool,
    /// The last in the list of faults that may come.
    pub(crate) last_fault: u64,
    pub(crate) duration_ms: u64,
}

impl Weather {
    fn of(dice: &mut Dice) -> Self {
        let day_ms = 86_400_000;
        Self {
            devices: u32::try_from(dice.between(1, 3)).unwrap(),
            capacity: dice.one_of(&[5, 60, 400]),
            pushes: dice.one_of(&[1, 8, 40]),
            frame_bytes: dice.one_of(&[150, 65_536]),
            batch_pings: dice.one_of(&[1, 7, 30]),
            credit_pings: dice.one_of(&[3, 20, 90]),
            group_pings: dice.one_of(&[1, 16, 1_000]),
            policy: Policy {
                retention_ms: dice.one_of(&[day_ms, 20_000]),
                future_tolerance_ms: 5_000,
                least_interval_ms: dice.one_of(&[0, 0, 200]),
                least_distance_m: 0.0,
            },
            defer_per_mille: dice.one_of(&[0, 50, 300]),
            merge_per_mille: dice.one_of(&[0, 20]),
            flow_per_mille: dice.one_of(&[0, 0, 100]),
            most_delay_ms: dice.one_of(&[2, 80, 1_500]),
            most_sync_ms: dice.one_of(&[1, 30, 400]),
            fault_every_ms: dice.one_of(&[300, 2_000, 9_000]),
            gaps_per_mille: dice.one_of(&[0, 30, 900]),
            makes_odd_pings: dice.hits(900),
            has_rivals: dice.hits(500),
            last_fault: 99,
            duration_ms: 30_000,
        }
    }

    /// Nothing goes wrong any more; the rules stay.
    fn healed(self) -> Self {
        Self {
            defer_per_mille: 0,
            merge_per_mille: 0,
            flow_per_mille: 0,
            most_delay_ms: 2,
            most_sync_ms: 2,
            ..self
        }
    }

    pub(crate) fn rules(&self) -> Rules {
        Rules {
            retention_ms: self.policy.retention_ms,
            future_tolerance_ms: self.policy.future_tolerance_ms,
            thins: self.policy.thins(),
        }
    }
}

/// How often each thing happened, so that a test can tell whether it tested anything.
pub(crate) type Counts = BTreeMap<&'static str, u64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    ToGateway,
    ToDevice,
}

#[derive(Debug)]
enum Event {
    Push(usize),
    Connect(usize),
    Wake(usize),
    Arrive(LinkId, StreamId, Way, Option<Bytes>),
    /// The device learns that its connection ended.
    DeviceNotices(LinkId, Option<CloseCode>),
    GatewayNotices(LinkId),
    TakenOver(LinkId),
    Gather,
    Synced,
    Restart,
    Fault,
}

#[derive(Debug)]
struct Link {
    install: usize,
    /// What is on its way does not arrive any more.
    is_lost: BTreeMap<Way, bool>,
    /// Streams keep their order.
    arrives_ms: BTreeMap<(StreamId, Way), u64>,
}

/// A run that is over.
pub(crate) struct Run {
    pub(crate) entries: Vec<Entry>,
    pub(crate) counts: Counts,
    pub(crate) rules: Rules,
    /// What could not be settled although nothing went wrong any more.
    pub(crate) unsettled: Vec<String>,
}

pub(crate) struct World {
    pub(crate) weather: Weather,
    pub(crate) dice: Dice,
    pub(crate) now_ms: u64,
    pub(crate) history: Vec<Entry>,
    pub(crate) counts: Counts,
    sabotage: Sabotage,
    agenda: BTreeMap<(u64, u64), Event>,
    events: u64,
    gateway: Gateway,
    backup: Disk,
    installs: Vec<Install>,
    links: Vec<Link>,
    next_name: Name,
    is_healing: bool,
    /// A clean stop is under way.
    is_draining: bool,
}

/// One whole run.
pub(crate) fn run(seed: u64, sabotage: Sabotage) -> Run {
    let mut dice = Dice::new(seed);
    let weather = Weather::of(&mut dice);
    World::new(weather, dice, sabotage).run()
}

/// One run in which connections are cut and the gateway crashes, but nobody loses a queue or a store.
pub(crate) fn run_with_faithful_queues(seed: u64) -> Run {
    let mut dice = Dice::new(seed);
    let weather = Weather {
        last_fault: 79,
        ..Weather::of(&mut dice)
    };
    World::new(weather, dice, Sabotage::Nothing).run()
}

/// One device that leaves out two numbers before each ping, on a day when nothing else goes wrong.
pub(crate) fn run_with_holes(pings: u64) -> Run {
    let mut dice = Dice::new(1);
    let drawn = Weather::of(&mut dice).healed();
    let weather = Weather {
        devices: 1,
        capacity: pings,
        credit_pings: 20,
        batch_pings: 7,
        policy: Policy {
            least_interval_ms: 0,
            ..drawn.policy
        },
        duration_ms: 0,
        makes_odd_pings: false,
        ..drawn
    };
    let mut world = World::new(weather, dice, Sabotage::Nothing);
    // The first connection gives an epoch and numbers what is held anew, without holes.
    let ping = world.ping();
    world.installs[0].push(ping, 0, &mut world.history);
    world.heal();
    while !world.is_settled() {
        world.turn();
    }
    for _ in 0..pings {
        let ping = world.ping();
        world.installs[0].push(ping, 2, &mut world.history);
    }
    world.pump(0);
    world.run()
}

impl World {
    fn new(weather: Weather, dice: Dice, sabotage: Sabotage) -> Self {
        let mut world = Self {
            weather,
            dice,
            now_ms: BEGINNING_MS,
            history: Vec::new(),
            counts: Counts::new(),
            sabotage,
            agenda: BTreeMap::new(),
            events: 0,
            gateway: Gateway::new(weather, sabotage),
            backup: Disk::default(),
            installs: Vec::new(),
            links: Vec::new(),
            next_name: 1,
            is_healing: false,
            is_draining: false,
        };
        for device in 1..=weather.devices {
            world.install(device);
        }
        world.after(weather.fault_every_ms, Event::Fault);
        world
    }

    fn run(mut self) -> Run {
        let end_ms = BEGINNING_MS + self.weather.duration_ms;
        while let Some((&(at_ms, _), _)) = self.agenda.first_key_value()
            && at_ms < end_ms
        {
            self.turn();
        }
        self.heal();
        let end_ms = self.now_ms + HEALING_MS;
        while let Some((&(at_ms, _), _)) = self.agenda.first_key_value()
            && at_ms < end_ms
            && !self.is_settled()
        {
            self.turn();
        }
        let epochs_taken = self
            .installs
            .iter()
            .map(|install| install.epochs_taken)
            .sum();
        self.count("epochs taken by others", epochs_taken);
        let unsettled = self.installs.iter().filter(|install| !install.is_settled());
        Run {
            unsettled: unsettled.map(|install| format!("{install:?}")).collect(),
            rules: self.weather.rules(),
            entries: self.history,
            counts: self.counts,
        }
    }

    fn is_settled(&self) -> bool {
        self.installs.iter().all(Install::is_settled)
    }

    fn turn(&mut self) {
        let ((at_ms, _), event) = self.agenda.pop_first().unwrap();
        self.now_ms = at_ms;
        self.happen(event);
        self.fulfil();
    }

    fn count(&mut self, what: &'static str, times: u64) {
        *self.counts.entry(what).or_default() += times;
    }

    fn after(&mut self, delay_ms: u64, event: Event) {
        self.events += 1;
        self.agenda
            .insert((self.now_ms + delay_ms, self.events), event);
    }

    /// From now on nothing goes wrong any more.
    fn heal(&mut self) {
        self.is_healing = true;
        self.weather = self.weather.healed();
        self.gateway.heal(self.weather);
        if !self.gateway.is_up {
            self.gateway.restart();
        }
        self.is_draining = false;
        // Connections that hold are kept: what waits on them must go on by itself. Those that were cut are
        // noticed in their time.
        for install in 0..self.installs.len() {
            self.after(0, Event::Connect(install));
        }
        self.fulfil();
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Push(install) => self.push(install),
            Event::Connect(install) => self.connect(install),
            Event::Wake(install) => self.pump(install),
            Event::Arrive(link, stream, way, bytes) => self.arrive(link, stream, way, bytes),
            Event::DeviceNotices(link, code) => self.device_notices(link, code),
            Event::GatewayNotices(link) => {
                self.lose(link, Way::ToGateway);
                self.gateway.gone(link);
            }
            Event::TakenOver(link) => self.gateway.close(link, CloseCode::TakenOver),
            Event::Gather => self.gateway.gather(self.now_ms, &mut self.history),
            Event::Synced => {
                self.gateway
                    .synced(self.now_ms, &mut self.history, &mut self.dice);
                self.stop_when_drained();
            }
            Event::Restart => {
                if !self.gateway.is_up {
                    self.gateway.restart();
                }
            }
            Event::Fault => {
                if !self.is_healing {
                    self.fault();
                    let every_ms = self.weather.fault_every_ms;
                    let next_ms = self.dice.between(1, 2 * every_ms);
                    self.after(next_ms, Event::Fault);
                }
            }
        }
    }

    /// Does what the gateway wants done.
    fn fulfil(&mut self) {
        for want in std::mem::take(&mut self.gateway.wants) {
            match want {
                Want::Write(link, stream, frame) => {
                    if let Some(frame) = self.changed(frame) {
                        let mut bytes = BytesMut::new();
                        encode_frame(&frame, &mut bytes);
                        self.send(link, stream, Way::ToDevice, Some(bytes.freeze()));
                    }
                }
                Want::Finish(link, stream) => self.send(link, stream, Way::ToDevice, None),
                Want::Close(link, code) => self.gateway_closes(link, code),
                Want::TakeOver(link) => {
                    self.count("take-overs", 1);
                    let delay_ms = self.dice.one_of(&[0, 20, 300]);
                    self.after(delay_ms, Event::TakenOver(link));
                }
                Want::Gather => {
                    let delay_ms = self.dice.between(0, 2);
                    self.after(delay_ms, Event::Gather);
                }
                Want::Sync => {
                    let sync_ms = self.dice.between(0, self.weather.most_sync_ms);
                    self.after(sync_ms, Event::Synced);
                }
            }
        }
    }

    /// An ack may be merged into a later one, and a gateway may want its devices to slow down.
    fn changed(&mut self, mut frame: v1::GatewayFrame) -> Option<v1::GatewayFrame> {
        let flow = match &mut frame.kind {
            Some(Kind::Ack(_)) if self.dice.hits(self.weather.merge_per_mille) => {
                self.count("acks merged", 1);
                return None;
            }
            Some(Kind::Ack(ack)) => &mut ack.flow,
            Some(Kind::Welcome(welcome)) => &mut welcome.flow,
            Some(Kind::ControlResult(_) | Kind::Flow(_) | Kind::Renewed(_)) | None => {
                return Some(frame);
            }
        };
        if self.dice.hits(self.weather.flow_per_mille) {
            *flow = Some(v1::Flow {
                credit: self.dice.one_of(&[0, 1, 30]),
                min_interval_ms: self.dice.one_of(&[0, 40]),
                retry_after_ms: self.dice.one_of(&[0, 2_000]),
                go_away: self.dice.hits(200),
            });
        }
        Some(frame)
    }

    // Links.

    fn send(&mut self, link: LinkId, stream: StreamId, way: Way, bytes: Option<Bytes>) {
        let Some(mut bytes) = bytes else {
            let delay_ms = self.delay(link, stream, way);
            return self.after(delay_ms, Event::Arrive(link, stream, way, None));
        };
        // Anywhere, also inside the length of a frame.
        while !bytes.is_empty() {
            let piece = if self.dice.hits(700) {
                bytes.split_off(0)
            } else {
                let length = self.dice.index(bytes.len()) + 1;
                bytes.split_to(length)
            };
            let delay_ms = self.delay(link, stream, way);
            self.after(delay_ms, Event::Arrive(link, stream, way, Some(piece)));
        }
    }

    /// A stream keeps its order, different ones do not wait for each other.
    fn delay(&mut self, link: LinkId, stream: StreamId, way: Way) -> u64 {
        let delay_ms = self.dice.between(0, self.weather.most_delay_ms);
        let previous_ms = self.links[link]
            .arrives_ms
            .entry((stream, way))
            .or_default();
        *previous_ms = (*previous_ms).max(self.now_ms + delay_ms);
        *previous_ms - self.now_ms
    }

    fn arrive(&mut self, link: LinkId, stream: StreamId, way: Way, bytes: Option<Bytes>) {
        if self.links[link].is_lost[&way] {
            return;
        }
        let install = self.links[link].install;
        match (way, bytes) {
            (Way::ToGateway, Some(bytes)) => {
                if self.installs[install]
                    .link
                    .is_some_and(|newest| link < newest)
                {
                    self.count("arrivals on an older connection", 1);
                }
                self.gateway
                    .receive(link, stream, &bytes, self.now_ms, &mut self.dice);
            }
            (Way::ToGateway, None) => self.gateway.finished(link, stream),
            (Way::ToDevice, bytes) => {
                if self.installs[install].link == Some(link) {
                    let now_ms = self.now_ms;
                    self.installs[install].receive(stream, bytes, now_ms, &mut self.history);
                    self.pump(install);
                }
            }
        }
    }

    fn lose(&mut self, link: LinkId, way: Way) {
        self.links[link].is_lost.insert(way, true);
    }

    /// Everything on its way is lost, and both sides find out in their own time.
    fn cut(&mut self, link: LinkId) {
        self.lose(link, Way::ToGateway);
        self.lose(link, Way::ToDevice);
        let (soon_ms, late_ms) = (self.dice.between(0, 3_000), self.dice.between(0, 9_000));
        self.after(soon_ms, Event::DeviceNotices(link, None));
        self.after(late_ms, Event::GatewayNotices(link));
    }

    /// The device gives up. What it had sent may still arrive, also after what its next connection
    /// sends.
    fn abandon(&mut self, link: LinkId) {
        self.lose(link, Way::ToDevice);
        self.device_notices(link, None);
        let late_ms = self.dice.between(0, 9_000);
        self.after(late_ms, Event::GatewayNotices(link));
    }

    fn gateway_closes(&mut self, link: LinkId, code: CloseCode) {
        self.lose(link, Way::ToGateway);
        if code == CloseCode::FencedEpoch {
            self.count("fenced connections", 1);
        }
        // The close overtakes what was written before it, or gets lost itself.
        let is_told = self.is_healing || self.dice.hits(900);
        let delay_ms = self.dice.between(0, self.weather.most_delay_ms);
        self.after(
            delay_ms,
            Event::DeviceNotices(link, is_told.then_some(code)),
        );
    }

    fn device_notices(&mut self, link: LinkId, code: Option<CloseCode>) {
        self.lose(link, Way::ToDevice);
        let at = self.links[link].install;
        if self.installs[at].link != Some(link) {
            return;
        }
        let forgets = self.sabotage == Sabotage::ForgetAtCut && code.is_none();
        self.installs[at].disconnected(code, forgets, self.now_ms);
        self.come_back(at);
    }

    // Devices.

    fn install(&mut self, device: u32) {
        let at = self.installs.len();
        self.installs
            .push(Install::new(device, self.weather.capacity));
        let delay_ms = self.dice.between(0, 500);
        self.after(delay_ms, Event::Push(at));
        self.after(delay_ms, Event::Connect(at));
    }

    fn push(&mut self, at: usize) {
        if self.is_healing {
            return;
        }
        // A heartbeat comes alone: that is when a device has nothing to report.
        self.installs[at].owes_heartbeat = self.dice.hits(200);
        let pushes = if self.installs[at].owes_heartbeat {
            0
        } else {
            self.dice.between(1, self.weather.pushes)
        };
        for _ in 0..pushes {
            let ping = self.ping();
            self.count("pushed", 1);
            let gap = if self.dice.hits(self.weather.gaps_per_mille) {
                self.dice.between(1, 3)
            } else {
                0
            };
            let dropped = self.installs[at].push(ping, gap, &mut self.history);
            self.count("dropped by a full queue", u64::from(dropped));
        }
        if self.dice.hits(100) {
            self.installs[at].push_again();
        }
        self.pump(at);
        let delay_ms = self.dice.one_of(&[10, 300, 2_000]);
        self.after(delay_ms, Event::Push(at));
    }

    fn ping(&mut self) -> Ping {
        let name = self.next_name;
        self.next_name += 1;
        let is_odd = self.weather.makes_odd_pings;
        let time_ms = match self.dice.between(0, 99) {
            0 if is_odd => self.now_ms + 60_000,
            1 if is_odd => self.now_ms - 2 * 86_400_000,
            _ => self.now_ms - self.dice.between(0, 5_000),
        };
        let latitude_e7 = if is_odd && self.dice.hits(10) {
            MAX_LATITUDE_E7 + 1
        } else {
            5
        };
        Ping {
            source: self.dice.one_of(&[Source::Gnss, Source::LastKnown]),
            battery_percent: self.dice.hits(500).then_some(50),
            ..Ping::at(0, time_ms, latitude_e7, i32::try_from(name).unwrap())
        }
    }

    fn connect(&mut self, at: usize) {
        let install = &self.installs[at];
        if install.link.is_some() || !install.wants_connection(self.is_healing) {
            return;
        }
        if !self.gateway.is_up || self.is_draining {
            return self.come_back(at);
        }
        let link = self.links.len();
        self.links.push(Link {
            install: at,
            is_lost: BTreeMap::from([(Way::ToGateway, false), (Way::ToDevice, false)]),
            arrives_ms: BTreeMap::new(),
        });
        self.count("connections", 1);
        self.gateway.open(link, self.installs[at].device);
        self.installs[at].connected(link, self.now_ms);
        self.pump(at);
    }

    fn come_back(&mut self, at: usize) {
        let wait_ms = self.installs[at].retry_after_ms() + self.dice.between(1, 1_000);
        self.after(wait_ms, Event::Connect(at));
    }

    /// Lets a device send what it may, and sets its alarm.
    fn pump(&mut self, at: usize) {
        let Some(link) = self.installs[at].link else {
            return;
        };
        let (wishes, wake_ms) = self.installs[at].fill(self.now_ms);
        for wish in wishes {
            match wish {
                Wish::Write(stream, bytes) => self.send(link, stream, Way::ToGateway, Some(bytes)),
                Wish::Finish(stream) => self.send(link, stream, Way::ToGateway, None),
                Wish::Close => return self.abandon(link),
            }
        }
        if let Some(wake_ms) = wake_ms
            && self.installs[at].set_alarm(wake_ms, self.now_ms)
        {
            self.after(wake_ms.saturating_sub(self.now_ms), Event::Wake(at));
        }
    }

    // Faults.

    fn fault(&mut self) {
        let at = self.dice.index(self.installs.len());
        let link = self.installs[at].link;
        let fault = if self.sabotage == Sabotage::RestoreKeepsEpoch && self.dice.hits(500) {
            self.dice.one_of(&[80, 87])
        } else {
            self.dice.between(0, self.weather.last_fault)
        };
        match fault {
            0..=29 => {
                if let Some(link) = link {
                    self.count("cuts", 1);
                    self.cut(link);
                }
            }
            30..=54 => {
                if let Some(link) = link {
                    self.count("connections abandoned", 1);
                    self.abandon(link);
                }
            }
            55..=74 => self.crash(),
            75..=79 => self.drain(),
            80..=83 => self.installs[at].save(),
            84..=86 => self.wipe(at),
            87..=89 => self.restore(at),
            90..=93 => {
                if self.weather.has_rivals && self.installs.len() < 6 {
                    self.count("rival queues", 1);
                    self.install(self.installs[at].device);
                }
            }
            94..=96 => {
                self.backup = self.gateway.disk.clone();
                self.history.push(Entry::BackedUp);
            }
            _ => self.replace_store(),
        }
    }

    fn crash(&mut self) {
        if !self.gateway.is_up {
            return;
        }
        let has_reached_disk = self.dice.hits(500);
        let was_writing = self.gateway.crash(has_reached_disk, &mut self.history);
        self.count("crashes", 1);
        self.count(
            "crashes that lost a group",
            u64::from(was_writing && !has_reached_disk),
        );
        self.count(
            "crashes between sync and ack",
            u64::from(was_writing && has_reached_disk),
        );
        self.is_draining = false;
        for link in 0..self.links.len() {
            self.lose(link, Way::ToGateway);
        }
        let links: Vec<LinkId> = self
            .installs
            .iter()
            .filter_map(|install| install.link)
            .collect();
        for link in links {
            // What it had written is on its way and still arrives.
            let delay_ms = self.dice.between(0, 4_000);
            self.after(delay_ms, Event::DeviceNotices(link, None));
        }
        let down_ms = self.dice.between(1, 3_000);
        self.after(down_ms, Event::Restart);
    }

    /// A clean stop.
    fn drain(&mut self) {
        if self.gateway.is_up && !self.is_draining {
            self.count("clean stops", 1);
            self.is_draining = true;
            self.gateway.drain();
            self.fulfil();
            self.stop_when_drained();
        }
    }

    fn stop_when_drained(&mut self) {
        if self.is_draining && self.gateway.is_idle() {
            self.is_draining = false;
            self.gateway.crash(true, &mut self.history);
            let down_ms = self.dice.between(1, 3_000);
            self.after(down_ms, Event::Restart);
        }
    }

    fn replace_store(&mut self) {
        self.crash();
        self.count("stores replaced", 1);
        // That takes long. What the store had acknowledged before is read by then, or never.
        for link in 0..self.links.len() {
            self.lose(link, Way::ToDevice);
        }
        let by_backup = self.dice.hits(700);
        let disk = if by_backup {
            self.backup.clone()
        } else {
            Disk::default()
        };
        // A store that loses commits and keeps its name can be told from the truth by one queue only.
        let is_other_store = !by_backup || self.weather.has_rivals || self.dice.hits(500);
        self.gateway.replace_disk(disk.clone(), is_other_store);
        self.backup = disk;
        self.history.push(Entry::Replaced { by_backup });
    }

    /// The queue is gone with all that it held: a fresh install.
    fn wipe(&mut self, at: usize) {
        if let Some(link) = self.installs[at].link {
            self.abandon(link);
        }
        self.count("queues wiped", 1);
        self.installs[at].wipe(self.weather.capacity, &mut self.history);
    }

    /// The device comes back from a copy of an older state.
    fn restore(&mut self, at: usize) {
        if !self.installs[at].is_saved() {
            return;
        }
        if let Some(link) = self.installs[at].link {
            self.abandon(link);
        }
        self.count("queues restored", 1);
        let keeps_epoch = self.sabotage == Sabotage::RestoreKeepsEpoch;
        self.installs[at].restore(keeps_epoch, &mut self.history);
        if keeps_epoch {
            // Cut off after its first batch and before Welcome, which would give it away.
            self.push(at);
            self.connect(at);
            if let Some(link) = self.installs[at].link {
                self.abandon(link);
            }
        }
    }
}
