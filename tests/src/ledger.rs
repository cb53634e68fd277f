//! What devices were told is settled, on a file of its own.
//!
//! A line is written only after the acknowledgement was read, and is synced before the device forgets the
//! ping: whatever becomes of the gateway, the ledger never says more than was acknowledged. Knows lines.
//! Must not know the store that it will be compared with.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    str::FromStr,
};

use prost::Message;
use waypost_proto::{batch, ping::Ping};

/// One ping that a device was told is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    /// The number of the device, as in [`crate::Process::device`].
    pub device: u32,
    pub epoch: u32,
    pub seq: u64,
    /// Of the ping as it was sent.
    pub digest: u64,
    /// The commit that the gateway named.
    pub position: u64,
    /// When the gateway said that it had heard the device.
    pub receive_ms: u64,
}

/// The file, open for writing.
#[derive(Debug)]
pub struct Ledger {
    file: File,
}

impl Ledger {
    pub fn create(path: &Path) -> Self {
        Self {
            file: File::create_new(path).unwrap(),
        }
    }

    /// Appends, and returns when it is on disk.
    pub fn note(&mut self, acked: &[Acked]) {
        let lines: String = acked.iter().map(line).collect();
        self.file.write_all(lines.as_bytes()).unwrap();
        self.file.sync_data().unwrap();
    }
}

/// Reads a ledger.
pub fn read(path: &Path) -> Vec<Acked> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(parse).collect()
}

/// Tells pings apart: all fields as they go over the wire.
pub fn digest(ping: &Ping) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    // `DefaultHasher::new` has no random keys.
    let mut hasher = DefaultHasher::new();
    hasher.write(&batch::encode(1, &[*ping]).encode_to_vec());
    hasher.finish()
}

fn line(acked: &Acked) -> String {
    let Acked {
        device,
        epoch,
        seq,
        digest,
        position,
        receive_ms,
    } = acked;
    format!("{device} {epoch} {seq} {digest} {position} {receive_ms}\n")
}

fn parse(line: &str) -> Acked {
    fn next<T: FromStr>(fields: &mut std::str::Split<'_, char>) -> T {
        fields
            .next()
            .and_then(|field| field.parse().ok())
            .expect("a line of a ledger")
    }
    let mut fields = line.split(' ');
    Acked {
        device: next(&mut fields),
        epoch: next(&mut fields),
        seq: next(&mut fields),
        digest: next(&mut fields),
        position: next(&mut fields),
        receive_ms: next(&mut fields),
    }
}
