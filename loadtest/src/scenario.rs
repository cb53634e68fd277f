//! What a fleet is to send, and when: the one form that every kind of load test has.
//!
//! Knows devices, pings and due times. Must not know connections, or what became of a ping.

use std::time::Duration;

use uuid::Uuid;
use waypost_proto::{
    id::{DeviceId, UserId},
    ping::Ping,
};

use crate::{replay::Replay, report::Count, steady::Steady};

/// A load test, before it runs.
#[derive(Debug)]
pub enum Scenario {
    /// A recorded day, sent again.
    Replay(Replay),
    /// A simulated fleet at a constant rate.
    Steady(Steady),
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

impl Scenario {
    /// The name on the command line and in the report.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Replay(_) => "replay",
            Self::Steady(_) => "steady",
        }
    }

    /// What is about to happen, in one line.
    #[must_use]
    pub fn title(&self) -> String {
        match self {
            Self::Replay(replay) => {
                let pings = Count(replay.len());
                let pace = replay.speed_up.map_or_else(
                    || "as fast as acknowledged".to_owned(),
                    |speed_up| format!("{speed_up} times as fast as recorded"),
                );
                let passes = if 1 < replay.passes {
                    format!(", {} times", replay.passes)
                } else {
                    String::new()
                };
                format!(
                    "replay: {pings} pings of {} devices, {pace}{passes}",
                    Count(replay.devices().len() as u64)
                )
            }
            Self::Steady(Steady {
                devices,
                pings_per_s,
                duration,
                seed,
            }) => {
                let length = duration.map_or_else(
                    || "until Ctrl-C".to_owned(),
                    |duration| format!("for {}", humantime::format_duration(duration)),
                );
                format!(
                    "steady: {} devices, {pings_per_s} pings/s, {length}, seed {seed}",
                    Count((*devices).into())
                )
            }
        }
    }

    /// What repeats the scenario exactly, if dice are involved.
    #[must_use]
    pub fn seed(&self) -> Option<u64> {
        match self {
            Self::Replay(_) => None,
            Self::Steady(steady) => Some(steady.seed),
        }
    }

    /// Who takes part.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceId> {
        match self {
            Self::Replay(replay) => replay.devices().to_vec(),
            Self::Steady(steady) => steady.devices(),
        }
    }

    /// How many pings one pass sends; `None` if it goes on until it is told to stop.
    #[must_use]
    pub fn pings_per_pass(&self) -> Option<u64> {
        match self {
            Self::Replay(replay) => Some(replay.len()),
            Self::Steady(steady) => steady.pings_in_total(),
        }
    }

    /// How often everything is sent; each further time with the same sequence numbers over new
    /// connections, so that nothing of it is new to the gateway.
    #[must_use]
    pub fn passes(&self) -> u32 {
        match self {
            Self::Replay(replay) => replay.passes,
            Self::Steady(_) => 1,
        }
    }

    /// Whether due times hold. If not, a ping is due as soon as earlier ones are acknowledged.
    #[must_use]
    pub fn is_paced(&self) -> bool {
        match self {
            Self::Replay(replay) => replay.speed_up.is_some(),
            Self::Steady(_) => true,
        }
    }

    /// Everything that is sent in one pass, in the order it is due. `start_ms` is the wall clock at the
    /// start of the run, for pings that are sampled while it runs.
    pub fn pings(&self, start_ms: u64) -> Box<dyn Iterator<Item = DuePing> + Send + '_> {
        match self {
            Self::Replay(replay) => Box::new(replay.pings()),
            Self::Steady(steady) => Box::new(steady.pings(start_ms)),
        }
    }
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
