//! What a fleet is to send, when, and what happens to it meanwhile: the one form of every load test.
//!
//! Knows devices, pings and due times. Must not know connections, or what became of a ping.

use std::{ops::Range, time::Duration};

use uuid::Uuid;
use waypost_proto::{
    id::{DeviceId, UserId},
    ping::Ping,
};

use crate::{
    group::{Group, Groups, Presence},
    relay::Weather,
    replay::Replay,
    report::Count,
    steady::Steady,
};

/// A load test, before it runs.
#[derive(Debug)]
pub struct Scenario {
    /// The name on the command line and in the report.
    pub name: &'static str,
    /// What is about to happen, in one line.
    pub title: String,
    /// How often everything is sent; each further time with the same sequence numbers over new
    /// connections, so that nothing of it is new to the gateway.
    pub passes: u32,
    /// Where the pings come from.
    pub source: Source,
    /// What happens besides.
    pub course: Course,
}

/// Where pings come from.
#[derive(Debug)]
pub enum Source {
    /// A recorded day.
    Replay(Replay),
    /// A simulated fleet at a constant rate.
    Steady(Steady),
    /// Groups with rhythms of their own.
    Groups(Groups),
}

/// What happens while pings are sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Course {
    /// Nothing.
    Calm,
    /// Devices connect meanwhile.
    Ramp,
    /// Devices connect for each ping.
    Wake {
        /// Whether they resume their sessions, and send the ping as early data.
        resumes: bool,
        /// How long a datagram takes to the gateway and its answer back, made longer by a relay if it is not zero:
        /// then latencies can be counted in round trips.
        round_trip: Duration,
    },
    /// All devices return at once with what they have kept.
    Backlog {
        /// How soon after the return the newest ping of all but a hundredth must be acknowledged.
        fresh_within: Duration,
    },
    /// What befalls each group is its own, and so is what is counted.
    Mix,
    /// The clients' sockets change their ports, again and again.
    Rebind {
        /// Between two changes.
        every: Duration,
    },
    /// The network is bad all the time.
    Lossy(Weather),
    /// Group 0 stays and reports, and group 1 connects all at once.
    Storm(Storm),
    /// Many checkers watch everybody while group 0 reports. Whoever else is known to the gateway came once, before.
    Freshness(Audience),
}

/// A storm of reconnecting devices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storm {
    /// How long the established devices are measured before, and again after.
    pub calm: Duration,
    /// Whether the gateway is restarted first.
    pub restart: Option<Restart>,
    /// How many times the p99 of the established devices may grow.
    pub most_slowdown: f64,
}

/// The checkers who watch a fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Audience {
    /// How many.
    pub checkers: u32,
    /// How many of them read a byte a second after a quarter of the time.
    pub slow_readers: u32,
    /// How long devices report.
    pub duration: Duration,
    /// How many updates there are in a second, of all devices together.
    pub updates_per_s: f64,
    /// Which share of them must get through in time, so that the figures mean something.
    pub least_pace: f64,
    /// How much later than durable the others may be told, all but a hundredth of what they are told.
    pub most_p99: Duration,
}

/// How a gateway ends before it is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// In order, with SIGTERM.
    Stop,
    /// At once, with SIGKILL.
    Kill,
}

/// A ping and when its device has it to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DuePing {
    /// Time from the start of the run.
    pub due: Duration,
    /// The device, as an index into [`Scenario::devices`].
    pub device: usize,
    /// The ping. The pings of one device are numbered from 1 without gaps, in the order they are due.
    pub ping: Ping,
}

/// The group of those who storm, see [`Course::Storm`].
pub const STORMING: usize = 1;

/// The group of those who came once, before, see [`Course::Freshness`]. Nobody may have.
pub const EARLIER: usize = 1;

impl Scenario {
    /// A recorded day, sent again.
    #[must_use]
    pub fn replay(replay: Replay) -> Self {
        let pings = Count(replay.len());
        let pace = replay.speed_up.map_or_else(
            || "as fast as acknowledged".to_owned(),
            |speed_up| format!("{speed_up} times as fast as recorded"),
        );
        let passes = match replay.passes {
            1 => String::new(),
            passes => format!(", {passes} times"),
        };
        let devices = Count(replay.devices().len() as u64);
        Self {
            name: "replay",
            title: format!("replay: {pings} pings of {devices} devices, {pace}{passes}"),
            passes: replay.passes,
            source: Source::Replay(replay),
            course: Course::Calm,
        }
    }

    /// A simulated fleet at a constant rate.
    #[must_use]
    pub fn steady(steady: Steady) -> Self {
        Self::of_steady("steady", "", steady, 1, Course::Calm)
    }

    /// The same, and then all of it again, so often in all.
    #[must_use]
    pub fn duplicates(steady: Steady, passes: u32) -> Self {
        let what = format!(", all of it {passes} times");
        Self::of_steady("duplicates", &what, steady, passes, Course::Calm)
    }

    /// A steady fleet whose sockets change their ports every so often.
    #[must_use]
    pub fn rebind(steady: Steady, every: Duration) -> Self {
        let what = format!(
            ", a new port for every socket each {}",
            humantime::format_duration(every)
        );
        Self::of_steady("rebind", &what, steady, 1, Course::Rebind { every })
    }

    /// A steady fleet in a bad network.
    #[must_use]
    pub fn lossy(steady: Steady, weather: Weather) -> Self {
        let what = format!(
            ", each way {}% lost, {}% doubled, {} and up to {} more late",
            weather.loss * 100.0,
            weather.duplication * 100.0,
            humantime::format_duration(weather.delay),
            humantime::format_duration(weather.jitter),
        );
        Self::of_steady("lossy", &what, steady, 1, Course::Lossy(weather))
    }

    fn of_steady(
        name: &'static str,
        what: &str,
        steady: Steady,
        passes: u32,
        course: Course,
    ) -> Self {
        let title = format!(
            "{name}: {} devices, {} pings/s, {}{what}, seed {}",
            Count(steady.devices.into()),
            steady.pings_per_s,
            length(steady.duration),
            steady.seed
        );
        Self {
            name,
            title,
            passes,
            source: Source::Steady(steady),
            course,
        }
    }

    /// Devices connect at a set rate while those that are there already report.
    #[must_use]
    pub fn ramp(
        devices: u32,
        every: Duration,
        per_s: Option<f64>,
        duration: Duration,
        seed: u64,
    ) -> Self {
        let pace = per_s.map_or_else(
            || "as fast as they can".to_owned(),
            |per_s| format!("at {per_s}/s"),
        );
        let title = format!(
            "ramp: {} devices connect {pace}, a ping each {}, {}, seed {seed}",
            Count(devices.into()),
            humantime::format_duration(every),
            length(Some(duration)),
        );
        let group = lone_pings("ramp", devices, every, Presence::Joins { per_s });
        Self::of_group("ramp", title, group, duration, seed, Course::Ramp)
    }

    /// Devices connect for each ping and leave once it is acknowledged.
    #[must_use]
    pub fn wake(
        devices: u32,
        every: Duration,
        duration: Duration,
        resumes: bool,
        round_trip: Duration,
        seed: u64,
    ) -> Self {
        let how = if resumes {
            ""
        } else {
            " with a full handshake"
        };
        let far = match round_trip {
            Duration::ZERO => String::new(),
            _ => format!(
                ", a round trip of {} away",
                humantime::format_duration(round_trip)
            ),
        };
        let title = format!(
            "wake: {} devices connect{how}, send a ping and leave, each {}{far}, {}, seed {seed}",
            Count(devices.into()),
            humantime::format_duration(every),
            length(Some(duration)),
        );
        let group = lone_pings("wake", devices, every, Presence::Wakes);
        Self::of_group(
            "wake",
            title,
            group,
            duration,
            seed,
            Course::Wake {
                resumes,
                round_trip,
            },
        )
    }

    /// Devices that hold old pings return all at once, each with a new one.
    #[must_use]
    pub fn backlog(devices: u32, held: u32, fresh_within: Duration, seed: u64) -> Self {
        let title = format!(
            "backlog: {} devices return at once, each with {} older pings and a new one, seed {seed}",
            Count(devices.into()),
            Count(held.into()),
        );
        let after = Duration::ZERO;
        let presence = Presence::Returns { after, held };
        // The run is as long as one report of each: the one of the return.
        let group = lone_pings("backlog", devices, ONE_LAP, presence);
        let course = Course::Backlog { fresh_within };
        Self::of_group("backlog", title, group, ONE_LAP, seed, course)
    }

    /// Devices that stay, and others that reconnect all at once.
    #[must_use]
    pub fn storm(
        established: u32,
        every: Duration,
        storming: u32,
        storm: Storm,
        seed: u64,
    ) -> Self {
        let restart = match storm.restart {
            None => "",
            Some(Restart::Stop) => " after the gateway was restarted",
            Some(Restart::Kill) => " after the gateway was killed and started again",
        };
        let title = format!(
            "storm: {} devices reconnect at once{restart}, beside {} that ping each {}, seed {seed}",
            Count(storming.into()),
            Count(established.into()),
            humantime::format_duration(every),
        );
        let groups = vec![
            lone_pings("established", established, every, Presence::Stays),
            lone_pings("storming", storming, ONE_LAP, Presence::Stays),
        ];
        Self {
            name: "storm",
            title,
            passes: 1,
            source: Source::Groups(Groups {
                groups,
                duration: None,
                seed,
            }),
            course: Course::Storm(storm),
        }
    }

    /// Checkers who watch `users`, of whom `devices` are connected and report.
    #[must_use]
    pub fn freshness(users: u32, devices: u32, audience: Audience, seed: u64) -> Self {
        let updates_per_s = audience.updates_per_s;
        let slow = match audience.slow_readers {
            0 => String::new(),
            slow => format!(", {} of them a byte a second", Count(slow.into())),
        };
        let title = format!(
            "freshness: {} checkers read{slow}, of {} users, {updates_per_s} updates/s by {} devices, {}, seed {seed}",
            Count(audience.checkers.into()),
            Count(users.into()),
            Count(devices.into()),
            length(Some(audience.duration)),
        );
        let every = Duration::from_secs_f64(f64::from(devices) / updates_per_s);
        let mut groups = vec![lone_pings("present", devices, every, Presence::Stays)];
        let earlier = users.saturating_sub(devices);
        if 0 < earlier {
            groups.push(lone_pings("earlier", earlier, ONE_LAP, Presence::Wakes));
        }
        Self {
            name: "freshness",
            title,
            passes: 1,
            source: Source::Groups(Groups {
                groups,
                duration: None,
                seed,
            }),
            course: Course::Freshness(audience),
        }
    }

    /// Groups as a file describes them.
    #[must_use]
    pub fn mix(groups: Groups) -> Self {
        let devices: u64 = groups
            .groups
            .iter()
            .map(|group| u64::from(group.devices))
            .sum();
        let names: Vec<_> = groups
            .groups
            .iter()
            .map(|group| format!("{} {}", Count(group.devices.into()), group.name))
            .collect();
        let title = format!(
            "mix: {} devices ({}), {}, seed {}",
            Count(devices),
            names.join(", "),
            length(groups.duration),
            groups.seed
        );
        Self {
            name: "mix",
            title,
            passes: 1,
            source: Source::Groups(groups),
            course: Course::Mix,
        }
    }

    fn of_group(
        name: &'static str,
        title: String,
        group: Group,
        duration: Duration,
        seed: u64,
        course: Course,
    ) -> Self {
        Self {
            name,
            title,
            passes: 1,
            source: Source::Groups(Groups {
                groups: vec![group],
                duration: Some(duration),
                seed,
            }),
            course,
        }
    }

    /// What repeats the scenario exactly, if dice are involved.
    #[must_use]
    pub fn seed(&self) -> Option<u64> {
        match &self.source {
            Source::Replay(_) => None,
            Source::Steady(steady) => Some(steady.seed),
            Source::Groups(groups) => Some(groups.seed),
        }
    }

    /// Who takes part.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceId> {
        match &self.source {
            Source::Replay(replay) => replay.devices().to_vec(),
            Source::Steady(steady) => steady.devices(),
            Source::Groups(groups) => groups.devices(),
        }
    }

    /// The groups that are counted apart, by name and number of devices.
    #[must_use]
    pub fn group_sizes(&self) -> Vec<(String, usize)> {
        match &self.source {
            Source::Replay(replay) => vec![(self.name.to_owned(), replay.devices().len())],
            Source::Steady(steady) => vec![(self.name.to_owned(), steady.devices as usize)],
            Source::Groups(groups) => groups
                .groups
                .iter()
                .map(|group| (group.name.clone(), group.devices as usize))
                .collect(),
        }
    }

    /// When each group is connected.
    #[must_use]
    pub fn presences(&self) -> Vec<Presence> {
        match &self.source {
            Source::Replay(_) | Source::Steady(_) => vec![Presence::Stays],
            Source::Groups(groups) => groups.groups.iter().map(|group| group.presence).collect(),
        }
    }

    /// How many pings one pass sends; `None` if that is not known before.
    #[must_use]
    pub fn pings_per_pass(&self) -> Option<u64> {
        match &self.source {
            Source::Replay(replay) => Some(replay.len()),
            Source::Steady(steady) => steady.pings_in_total(),
            Source::Groups(groups) => groups.pings_in_total(),
        }
    }

    /// Whether it goes on until it is told to stop, so that not all of it can be remembered.
    #[must_use]
    pub fn is_endless(&self) -> bool {
        let ends_by_itself = matches!(self.course, Course::Storm(_) | Course::Freshness(_));
        self.pings_per_pass().is_none() && !ends_by_itself
    }

    /// Whether devices that wake for a ping resume their sessions.
    #[must_use]
    pub fn resumes(&self) -> bool {
        match self.course {
            Course::Wake { resumes, .. } => resumes,
            // Who comes once has nothing to come back with.
            Course::Freshness(_) => false,
            _ => true,
        }
    }

    /// Whether many devices are to come at the same time.
    #[must_use]
    pub fn is_a_rush(&self) -> bool {
        matches!(
            self.course,
            Course::Backlog { .. } | Course::Storm(_) | Course::Freshness(_)
        )
    }

    /// Whether due times hold. If not, a ping is due as soon as earlier ones are acknowledged.
    #[must_use]
    pub fn is_paced(&self) -> bool {
        match &self.source {
            Source::Replay(replay) => replay.speed_up.is_some(),
            Source::Steady(_) | Source::Groups(_) => true,
        }
    }

    /// What devices hold from before the run, by device.
    pub fn held_pings(&self, start_ms: u64) -> Box<dyn Iterator<Item = (usize, Ping)> + Send + '_> {
        match &self.source {
            Source::Replay(_) | Source::Steady(_) => Box::new(std::iter::empty()),
            Source::Groups(groups) => Box::new(groups.held_pings(start_ms)),
        }
    }

    /// Everything that some of the groups send in one pass, in the order it is due. `start_ms` is the wall
    /// clock at the start of the run, for pings that are sampled while it runs.
    pub fn pings(
        &self,
        groups: Range<usize>,
        start_ms: u64,
    ) -> Box<dyn Iterator<Item = DuePing> + Send + '_> {
        match &self.source {
            Source::Replay(replay) => Box::new(replay.pings()),
            Source::Steady(steady) => Box::new(steady.pings(start_ms)),
            Source::Groups(of) => Box::new(of.pings(groups, start_ms)),
        }
    }
}

fn lone_pings(name: &str, devices: u32, every: Duration, presence: Presence) -> Group {
    Group {
        name: name.to_owned(),
        devices,
        every,
        batch: 1,
        presence,
    }
}

fn length(duration: Option<Duration>) -> String {
    duration.map_or_else(
        || "until Ctrl-C".to_owned(),
        |duration| format!("for {}", humantime::format_duration(duration)),
    )
}

/// The one device of a simulated user, who is named by a UUID made of `name`: the same each time.
pub(crate) fn only_device_of(name: &str) -> DeviceId {
    DeviceId {
        user: UserId(Uuid::new_v5(&NAMESPACE, name.as_bytes()).into_bytes()),
        device: 1,
    }
}

/// The namespace of simulated users: a random UUID of our own, so that they are nobody else's.
const NAMESPACE: Uuid = Uuid::from_u128(0x4b0d_97c5_31c6_4d0e_9c5e_6a1f_0f3d_b8a2);
/// The time that sampled pings are apart where each device sends one a lap.
const ONE_LAP: Duration = Duration::from_secs(1);
