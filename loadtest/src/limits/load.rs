//! What is sent while limits are measured: the same drive for every server, and the same every time.
//!
//! Knows pings and frames. Must not know who takes them, or how fast.

use bytes::{Bytes, BytesMut};
use waypost_proto::{
    batch,
    frame::encode_frame,
    id::{DeviceId, UserId},
    ping::{Ping, Source},
    v1,
};

/// What every device sends in a round, one request after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// As people call it.
    pub(crate) name: &'static str,
    /// Pings in one request.
    pub(crate) request_pings: u64,
    /// Requests of each device in a round.
    pub(crate) requests: u64,
}

/// A round of about a second on a slow machine.
pub(crate) const LONE_PINGS: Load = Load {
    name: "lone pings",
    request_pings: 1,
    requests: 60,
};

/// The same with what a device sends that was offline for a while.
pub(crate) const BATCHES: Load = Load {
    name: "batches of 100",
    request_pings: 100,
    requests: 20,
};

impl Load {
    /// The pings of all devices in one round.
    pub(crate) fn pings(&self, devices: u64) -> u64 {
        devices * self.requests * self.request_pings
    }
}

/// Where every device has been, second by second, since a day before the measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drive {
    begin_ms: u64,
}

impl Drive {
    /// A drive that began a day ago, so that no ping of it is in the future.
    pub(crate) fn since_yesterday(now_ms: u64) -> Self {
        Self {
            begin_ms: now_ms.saturating_sub(DAY_S * 1_000),
        }
    }

    /// A batch of pings, a second of an unsteady drive between two.
    pub(crate) fn batch(&self, epoch: u32, first_seq: u64, count: u64) -> v1::DeviceFrame {
        let pings: Vec<Ping> = (first_seq..first_seq + count)
            .map(|seq| self.ping(seq))
            .collect();
        frame(v1::device_frame::Kind::Batch(batch::encode(epoch, &pings)))
    }

    fn ping(&self, seq: u64) -> Ping {
        let second = seq % DAY_S;
        let unsteady = u32::try_from(seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54).unwrap_or(0);
        // A day of it is 87 million: it fits.
        let way_e7 = i32::try_from(second * 1_000 + u64::from(unsteady)).unwrap_or(0);
        Ping {
            accuracy_dm: Some(40 + unsteady % 32),
            speed_cm_per_s: Some(1_000 + unsteady),
            source: Source::Gnss,
            ..Ping::at(
                seq,
                self.begin_ms + second * 1_000,
                541_000_000 + way_e7,
                -45_000_000 - way_e7,
            )
        }
    }
}

/// Spread over the space of ids, as random ones are.
pub(crate) fn device_id(number: u32) -> DeviceId {
    let spread = (u128::from(number) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
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

/// A frame as it is on the wire.
pub(crate) fn encoded(frame: &v1::DeviceFrame) -> Bytes {
    let mut bytes = BytesMut::new();
    encode_frame(frame, &mut bytes);
    bytes.freeze()
}

fn frame(kind: v1::device_frame::Kind) -> v1::DeviceFrame {
    v1::DeviceFrame { kind: Some(kind) }
}

const DAY_S: u64 = 24 * 60 * 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_ping_of_the_drive_is_in_the_future_or_off_the_earth() {
        let now_ms = 1_800_000_000_000;
        let drive = Drive::since_yesterday(now_ms);
        for seq in [1, 2, DAY_S - 1, DAY_S, DAY_S + 1, u64::MAX] {
            let ping = drive.ping(seq);
            assert!(ping.time_ms < now_ms, "{seq}");
            assert!(ping.latitude_e7.abs() < 900_000_000, "{seq}");
            assert!(ping.longitude_e7.abs() < 1_800_000_000, "{seq}");
        }
    }
}
