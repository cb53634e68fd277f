//! The devices of a run and their books.
//!
//! Knows who is connected and what was acknowledged when. Must not know what is sent or why, nor QUIC.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use parking_lot::Mutex;
use rcgen::KeyPair;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use waypost_gateway::pki::Authority;
use waypost_proto::{id::DeviceId, outbox::Event, ping::Ping};

use crate::{
    device::Device,
    ledger::DeviceLedger,
    link::Links,
    progress::Progress,
    report::Latencies,
    run::Target,
    verify::Expected,
};

/// All devices of a run.
#[derive(Debug)]
pub struct Fleet {
    devices: Vec<Device>,
    books: Arc<Books>,
}

/// What all devices write into.
#[derive(Debug)]
struct Books {
    begun: Instant,
    ledgers: Vec<Mutex<DeviceLedger>>,
    latencies: Mutex<AckLatencies>,
    sent: AtomicU64,
    acked: AtomicU64,
    dropped: AtomicU64,
    connected: AtomicU64,
    last_acked_us: AtomicU64,
}

#[derive(Debug, Default)]
struct AckLatencies {
    all: Latencies,
    recent: Latencies,
}
