//! What the benches have in common: a fleet, what it sends, and how measurements are summed up.

use std::sync::OnceLock;

use waypost_gateway::clock::system_now_ms;
use waypost_proto::{
    batch,
    id::{DeviceId, UserId},
    ping::{Ping, Source},
    v1,
};

/// Enough to fill a group during one sync of the disk.
pub(crate) const DEVICES: u32 = 1_000;
/// How often each side of a comparison is measured; the two take turns, so that both meet the same
/// disk, the same clock rate and the same neighbours.
pub(crate) const ROUNDS: usize = 5;

/// What every device sends in a round, one request after the other.
pub(crate) struct Load {
    pub(crate) name: &'static str,
    pub(crate) request_pings: u64,
    pub(crate) requests: u64,
}

impl Load {
    /// Every load, or those that the command line names: `cargo bench --bench echo -- lone`.
    pub(crate) fn chosen() -> impl Iterator<Item = Self> {
        let words: Vec<String> = std::env::args()
            .skip(1)
            .filter(|word| !word.starts_with('-'))
            .collect();
        let loads = [
            Self {
                name: "lone pings",
                request_pings: 1,
                requests: 60,
            },
            Self {
                name: "batches of 100",
                request_pings: 100,
                requests: 20,
            },
        ];
        loads.into_iter().filter(move |load| {
            words.is_empty() || words.iter().any(|word| load.name.contains(word.as_str()))
        })
    }

    /// The pings of all devices in one round.
    pub(crate) fn pings(&self) -> u64 {
        self.fleet_requests() * self.request_pings
    }

    /// The requests of all devices in one round.
    pub(crate) fn fleet_requests(&self) -> u64 {
        u64::from(DEVICES) * self.requests
    }
}

/// Spread over the space of ids, as random ones are.
pub(crate) fn device_id(number: u32) -> DeviceId {
    let spread = u128::from(number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    DeviceId {
        user: UserId(spread.to_be_bytes()),
        device: 1,
    }
}

/// A new queue on the lane for what happens now.
pub(crate) fn hello() -> v1::DeviceFrame {
    frame(v1::device_frame::Kind::Hello(v1::Hello {
        lane: v1::Lane::Live.into(),
        ..v1::Hello::default()
    }))
}

/// A batch of pings, a second of an unsteady drive between two.
pub(crate) fn batch(epoch: u32, first_seq: u64, count: u64) -> v1::DeviceFrame {
    let pings: Vec<Ping> = (first_seq..first_seq + count).map(ping).collect();
    frame(v1::device_frame::Kind::Batch(batch::encode(epoch, &pings)))
}

fn frame(kind: v1::device_frame::Kind) -> v1::DeviceFrame {
    v1::DeviceFrame { kind: Some(kind) }
}

fn ping(seq: u64) -> Ping {
    static BEGIN_MS: OnceLock<u64> = OnceLock::new();
    let begin_ms = *BEGIN_MS.get_or_init(|| system_now_ms() - 24 * 60 * 60 * 1_000);
    let unsteady = u32::try_from(seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54).unwrap_or(0);
    let way_e7 = i32::try_from(seq * 1_000 + u64::from(unsteady)).expect("a drive of a day");
    Ping {
        accuracy_dm: Some(40 + unsteady % 32),
        speed_cm_per_s: Some(1_000 + unsteady),
        source: Source::Gnss,
        ..Ping::at(
            seq,
            begin_ms + seq * 1_000,
            541_000_000 + way_e7,
            -45_000_000 - way_e7,
        )
    }
}

/// The middle one of an odd number of measurements: one disturbed round changes nothing.
pub(crate) fn median(measured: impl Iterator<Item = f64>) -> f64 {
    let mut measured: Vec<f64> = measured.collect();
    measured.sort_by(f64::total_cmp);
    measured[measured.len() / 2]
}

/// Pings a second, as people read it.
pub(crate) fn rate(pings_per_s: f64) -> String {
    if pings_per_s < 1e6 {
        format!("{:.1} k", pings_per_s / 1e3)
    } else {
        format!("{:.2} M", pings_per_s / 1e6)
    }
}
