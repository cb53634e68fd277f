//! Compares what a store holds with what devices were told, and with what they sent.
//!
//! Knows the promises 1, 2 and 5 as a list of [`Fault`]s. Must not know what was done to the gateway.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use waypost_gateway::store::{OpenError, PingRow, Store};
use waypost_proto::{
    device::{Clocks, DeviceRecord},
    id::DeviceId,
    v1,
};

use crate::{Survivor, device_id, ledger::Acked, ledger::digest, survivor::is_refused};

/// All that a store holds at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub rows: Vec<PingRow>,
    pub devices: BTreeMap<DeviceId, DeviceRecord>,
    /// The last commit.
    pub position: u64,
}

/// A broken promise. The text is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Acknowledged, and not in the store.
    Lost(String),
    /// In the store more than once.
    Twice(String),
    /// In the store otherwise than it was sent.
    Altered(String),
    /// In the store although nobody sent it, or although it was refused.
    MadeUp(String),
    /// The dedup state does not fit the stored pings.
    Dedup(String),
    /// A clock of a sign of life is wrong.
    Clock(String),
    /// A commit number was used twice or went back, or a commit changed after it was seen.
    Position(String),
    /// What the gateway said contradicts itself.
    Told(String),
}

type Name = (DeviceId, u32, u64);

impl Snapshot {
    /// What a data folder holds: nothing, if the store is not there or was never finished.
    ///
    /// # Panics
    /// When there is a store that cannot be read.
    pub fn of(data_dir: &Path) -> Self {
        match Store::open_read_only(data_dir) {
            Err(OpenError::NoStore { .. }) => Self::default(),
            store => Self::read(&store.unwrap()),
        }
    }

    fn read(store: &Store) -> Self {
        let (devices, recovered) = store.load_devices().unwrap();
        Self {
            rows: store.rows().map(Result::unwrap).collect(),
            devices: devices.into_iter().collect(),
            position: recovered.position,
        }
    }

    pub fn pings(&self) -> usize {
        self.rows.iter().map(|row| row.record.pings.len()).sum()
    }

    /// Every ping: its digest, and the commit that it came with.
    fn by_name(&self) -> (BTreeMap<Name, (u64, u64)>, Vec<Fault>) {
        let mut pings = BTreeMap::new();
        let mut faults = Vec::new();
        for row in &self.rows {
            for ping in &row.record.pings {
                let name = (row.key.device, row.key.epoch, ping.seq);
                let found = (digest(ping), row.record.position);
                if pings.insert(name, found).is_some() {
                    faults.push(Fault::Twice(said(&name)));
                }
            }
        }
        (pings, faults)
    }
}

/// Compares a store with what it held `before`, the ledger, and the memory of the devices.
pub fn compare(
    now: &Snapshot,
    before: &Snapshot,
    acked: &[Acked],
    survivors: &[Survivor],
) -> Vec<Fault> {
    let (stored, mut faults) = now.by_name();
    let (stored_before, _) = before.by_name();
    let by_device: BTreeMap<DeviceId, &Survivor> = survivors
        .iter()
        .map(|survivor| (survivor.device().id, survivor))
        .collect();

    // The ledger is part of the store.
    for line in acked {
        let device = device_id(line.device);
        let name = (device, line.epoch, line.seq);
        let sent = by_device
            .get(&device)
            .and_then(|survivor| survivor.sent().get(&(line.epoch, line.seq)));
        let Some(record) = now.devices.get(&device) else {
            faults.push(Fault::Lost(format!("the record of {device}")));
            continue;
        };
        if record.clocks.last_contact_ms < line.receive_ms {
            let text = format!(
                "{device} was heard at {}, last contact is {}",
                line.receive_ms, record.clocks.last_contact_ms
            );
            faults.push(Fault::Clock(text));
        }
        let is_settled = line.epoch < record.epoch
            || (line.epoch == record.epoch && record.settled.contains(line.seq));
        if !is_settled {
            faults.push(Fault::Dedup(format!("{} may be stored again", said(&name))));
        }
        match (stored.get(&name), sent) {
            (None, Some(ping)) if is_refused(ping) => {}
            (None, _) => faults.push(Fault::Lost(said(&name))),
            (Some(&(digest, _)), _) if digest != line.digest => {
                faults.push(Fault::Altered(said(&name)));
            }
            (Some(&(_, position)), _) if line.position < position => {
                let text = format!(
                    "{} was acknowledged with {} and stored with {position}",
                    said(&name),
                    line.position
                );
                faults.push(Fault::Position(text));
            }
            _ => {}
        }
    }

    // What is stored was sent like this, and may be stored.
    for (name, &(found, position)) in &stored {
        let &(device, epoch, seq) = name;
        let sent = by_device
            .get(&device)
            .and_then(|survivor| survivor.sent().get(&(epoch, seq)));
        match sent {
            None => faults.push(Fault::MadeUp(said(name))),
            Some(ping) if is_refused(ping) => {
                faults.push(Fault::MadeUp(format!("{}, which is refused", said(name))));
            }
            Some(ping) if digest(ping) != found => faults.push(Fault::Altered(said(name))),
            Some(_) => {}
        }
        if position <= before.position && stored_before.get(name) != Some(&(found, position)) {
            let text = format!(
                "{} appeared in commit {position}, which was seen without it",
                said(name)
            );
            faults.push(Fault::Position(text));
        }
        if now.position < position {
            let text = format!("{} is in commit {position} of {}", said(name), now.position);
            faults.push(Fault::Position(text));
        }
    }
    for name in stored_before.keys() {
        if !stored.contains_key(name) {
            faults.push(Fault::Lost(format!("{}, which was there", said(name))));
        }
    }
    if now.position < before.position {
        let text = format!("{} came after {}", now.position, before.position);
        faults.push(Fault::Position(text));
    }

    for (device, record) in &now.devices {
        compare_device(
            *device,
            record,
            before,
            by_device.get(device),
            &stored,
            &mut faults,
        );
    }
    for survivor in survivors {
        if now.position < survivor.told_position() {
            let text = format!("{} was told of {}", now.position, survivor.told_position());
            faults.push(Fault::Position(text));
        }
    }
    faults
}

/// One device's record against the pings that are stored of it and against what it was before.
fn compare_device(
    device: DeviceId,
    record: &DeviceRecord,
    before: &Snapshot,
    survivor: Option<&&Survivor>,
    stored: &BTreeMap<Name, (u64, u64)>,
    faults: &mut Vec<Fault>,
) {
    let Some(survivor) = survivor else {
        return faults.push(Fault::MadeUp(format!("the record of {device}")));
    };
    let of_device = stored.range((device, 0, 0)..=(device, u32::MAX, u64::MAX));
    let seqs: BTreeSet<(u32, u64)> = of_device
        .map(|(&(_, epoch, seq), _)| (epoch, seq))
        .collect();
    for &(epoch, seq) in &seqs {
        if record.epoch < epoch || !survivor.has_used_epoch(epoch) {
            faults.push(Fault::MadeUp(format!("epoch {epoch} of {device}")));
        }
        if epoch == record.epoch && !record.settled.contains(seq) {
            faults.push(Fault::Dedup(format!(
                "{seq} of {device} may be stored again"
            )));
        }
    }
    for seq in 1..=record.settled.highest() {
        let epoch = record.epoch;
        let is_refused = survivor.sent().get(&(epoch, seq)).is_some_and(is_refused);
        if record.settled.contains(seq)
            && !(seqs.contains(&(epoch, seq)) || is_refused || survivor.has_skipped(epoch, seq))
        {
            faults.push(Fault::Dedup(format!(
                "{seq} of {device} is settled and not stored"
            )));
        }
    }

    let clocks = record.clocks;
    let (last_sample_ms, last_fix_ms) = newest_samples(survivor, &seqs);
    if (clocks.last_sample_ms, clocks.last_fix_ms) != (last_sample_ms, last_fix_ms) {
        let text = format!("{device}: {clocks:?}, stored: {last_sample_ms}, {last_fix_ms}");
        faults.push(Fault::Clock(text));
    }
    if clocks.last_contact_ms < survivor.told_contact_ms() {
        let text = format!("{device}: {clocks:?}, told: {}", survivor.told_contact_ms());
        faults.push(Fault::Clock(text));
    }
    if let Some(before) = before.devices.get(&device) {
        if record.epoch < before.epoch || record.position < before.position {
            faults.push(Fault::Position(format!("the record of {device} went back")));
        }
        if clocks.newest(before.clocks) != clocks {
            faults.push(Fault::Clock(format!("the clocks of {device} went back")));
        }
    }
}

/// The newest sample and the newest fix of what is stored of a device.
fn newest_samples(survivor: &Survivor, stored: &BTreeSet<(u32, u64)>) -> (u64, u64) {
    let pings = stored.iter().filter_map(|name| survivor.sent().get(name));
    pings.fold((0, 0), |(sample_ms, fix_ms), ping| {
        let fixed_ms = if ping.is_fix() { ping.time_ms } else { 0 };
        (sample_ms.max(ping.time_ms), fix_ms.max(fixed_ms))
    })
}

/// Compares what checkers are told with what the store holds; `entries` are in the order of the devices.
pub fn compare_entries(
    held: &Snapshot,
    entries: &[v1::Entry],
    survivors: &[Survivor],
) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (survivor, entry) in survivors.iter().zip(entries) {
        let record = held.devices.get(&survivor.device().id);
        let expected = record.map(|record| (record.clocks, record.position));
        let told = Clocks {
            last_contact_ms: entry.last_contact_ms,
            last_sample_ms: entry.last_sample_ms,
            last_fix_ms: entry.last_fix_ms,
            durable_ms: entry.durable_ms,
        };
        if (told, entry.position) != expected.unwrap_or_default() {
            let text = format!("checkers are told {entry:?} of {expected:?}");
            faults.push(Fault::Clock(text));
        }
    }
    if entries.len() != survivors.len() {
        faults.push(Fault::Clock(format!("{} entries", entries.len())));
    }
    faults
}

fn said((device, epoch, seq): &Name) -> String {
    format!("{device} epoch {epoch} number {seq}")
}
