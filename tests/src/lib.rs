//! The harness: real gateways, real certificates, devices that say exactly what a test wants.
//!
//! [`World`] runs a gateway inside the test process; [`Process`] runs the real binary, to be signalled
//! and killed. Both have their own data folder and ports. [`Relay`] is a bad network on the way to either.
//! [`link`] is a device without manners: it is written against the wire alone, so that it does not share
//! a mistake with the load test's device. A [`newcomer`] is one that has no certificate yet.
//!
//! For crashes, a [`fleet`] of [`Survivor`]s keeps a [`ledger`], which an [`audit`] compares with the store;
//! [`power_cut`] and [`FailingDisk`] stand between a process and its disk, and [`Mount`] is a small disk that
//! can be filled and frozen. For abuse, a [`crowd`] sends [`packets`] and worse. [`silence`] judges what a
//! checker was told. A [`command`] is what an operator types, and [`files`] are what is left on disk. [`soak`] says how long all of that goes on, and from which seed.
#![allow(clippy::unwrap_used, missing_docs, clippy::missing_panics_doc)]

pub mod audit;
pub mod command;
pub mod crowd;
mod failing_disk;
pub mod files;
pub mod fleet;
pub mod ledger;
pub mod link;
mod metrics_page;
mod mounts;
pub mod newcomer;
pub mod packets;
pub mod power_cut;
mod preload;
mod process;
mod prometheus;
mod revocation_list;
pub mod silence;
pub mod soak;
mod survivor;
mod world;

use std::path::{Path, PathBuf};

use waypost_gateway::{clock::system_now_ms, pki::Credentials, store::Store};
use waypost_proto::{
    id::{DeviceId, UserId},
    ping::{Ping, Source},
    session::Lane,
    v1,
};

pub use failing_disk::{Call, DiskError, Done, FailingDisk, Form, Order};
pub use link::{Attempt, Link, Stream};
pub use metrics_page::MetricsPage;
pub use mounts::{Frozen, Mount};
pub use process::{Addresses, Process, until, within_minutes};
pub use prometheus::Prometheus;
pub use revocation_list::revocation_list;
pub use survivor::Survivor;
pub use waypost_loadtest::relay::{Counts, Relay, Weather};
pub use world::World;

/// A device with its certificate.
#[derive(Clone, Debug)]
pub struct Device {
    pub id: DeviceId,
    pub credentials: std::sync::Arc<Credentials>,
}

impl Device {
    /// Another device of the same user.
    pub fn sibling(&self, world: &World, device: u32) -> Self {
        let id = DeviceId {
            user: self.id.user,
            device,
        };
        Self {
            id,
            credentials: std::sync::Arc::new(world.authority.issue_device(id).unwrap()),
        }
    }
}

/// The device 1 of a user that a test knows by a number.
pub(crate) fn device_id(number: u32) -> DeviceId {
    let mut user = [0x11; 16];
    user[12..].copy_from_slice(&number.to_be_bytes());
    DeviceId {
        user: UserId(user),
        device: 1,
    }
}

/// A ping sampled `seq` seconds after a fixed moment of today, so that later numbers are later samples.
pub fn ping(seq: u64) -> Ping {
    ping_at(seq, base_ms() + seq * 1_000)
}

/// A ping with a time of its own.
pub fn ping_at(seq: u64, time_ms: u64) -> Ping {
    Ping {
        accuracy_dm: Some(40),
        speed_cm_per_s: Some(150),
        source: Source::Gnss,
        ..Ping::at(
            seq,
            time_ms,
            541_000_000 + i32::try_from(seq).unwrap_or_default() * 100,
            -45_000_000,
        )
    }
}

/// Pings of which no part looks like anything else.
pub fn telling_pings() -> Vec<Ping> {
    let mut pings: Vec<_> = (1..=40).map(ping).collect();
    for (at, ping) in (1_i32..).zip(&mut pings) {
        ping.latitude_e7 = at.wrapping_mul(0x1234_5677) % 800_000_000;
        ping.longitude_e7 = at.wrapping_mul(0x0765_4321) % 800_000_000;
    }
    pings
}

/// An hour ago when the process began: within any retention, never in the future.
fn base_ms() -> u64 {
    static BASE_MS: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *BASE_MS.get_or_init(|| system_now_ms() / 1_000 * 1_000 - 3_600_000)
}

pub fn hello(lane: Lane, epoch: u32) -> v1::Hello {
    let lane = match lane {
        Lane::Live => v1::Lane::Live,
        Lane::Backfill => v1::Lane::Backfill,
    };
    v1::Hello {
        epoch,
        lane: lane.into(),
        ..v1::Hello::default()
    }
}

/// Every `(epoch, seq)` that the store holds of a device, in key order, as often as it holds it.
pub fn stored_seqs(store: &Store, device: &Device) -> Vec<(u32, u64)> {
    let mut seqs: Vec<_> = store
        .rows_of(device.id.user)
        .map(Result::unwrap)
        .filter(|row| row.key.device == device.id)
        .flat_map(|row| {
            row.record
                .pings
                .into_iter()
                .map(move |ping| (row.key.epoch, ping.seq))
        })
        .collect();
    seqs.sort_unstable();
    seqs
}

/// A binary of this workspace. `make test` builds them before it runs the tests.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(
        built.exists(),
        "{} is not built: run `make test`, or `cargo build --workspace --bins --examples`",
        built.display()
    );
    built
}

/// A program that `.ci/prometheus` fetches, or that the system has.
pub fn tool(name: &str) -> PathBuf {
    let fetched = root().join("target/prometheus/bin").join(name);
    if fetched.exists() {
        fetched
    } else {
        name.into()
    }
}

/// The real AIS day, or `None` with a message where it is not at hand.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub fn ais_file() -> Option<PathBuf> {
    let file = std::env::var_os("AIS_FILE").map_or_else(
        || root().join("../shared/data/ais-2022-01-03.csv.gz"),
        PathBuf::from,
    );
    if file.exists() {
        return Some(file);
    }
    eprintln!(
        "skipped: there is no AIS file at {}; set AIS_FILE to one",
        file.display()
    );
    None
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}
