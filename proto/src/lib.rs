//! What a device and the gateway must agree on, as pure code.
//!
//! Knows the schema, framing, columns, dedup ranges and both halves of the device protocol. Must not
//! know time, tasks, sockets or disks: `now` is an argument and bytes come from the caller, so all of
//! it can be simulated and fuzzed.
//!
//! The contract in four lines. A ping is named by `(device, epoch, seq)`. The gateway stores each name
//! once, for ever. An [`v1::Ack`] covers what is settled on disk; what it covers the device may forget.
//! Identity comes from the certificate, never from a message.

pub mod batch;
pub mod device;
pub mod enrol;
pub mod frame;
pub mod id;
pub mod outbox;
pub mod ping;
pub mod ranges;
pub mod session;
pub mod terms;

/// The messages of `waypost/v1/*.proto`, as generated. Their documentation is in the schema.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod v1 {
    include!("gen/waypost.v1.rs");
}

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"waypost/1";
