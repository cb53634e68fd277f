//! The Waypost gateway, in the order the data meets it.
//!
//! A connection is accepted by [`worker`] as far as [`admission`] lets it, proven in the `handshake` by
//! [`tls`], and served by one [`session`] task, which ends the device's older one ([`takeover`]), holds it
//! to its [`allowance`] over time ([`rate`]), and hands batches over ([`handoff`]) to the one [`commit`]ter.
//! The committer judges, writes through [`store`], publishes to [`freshness`], and only then answers;
//! [`feed`] tells checkers.
//! [`disk`] watches whether the disk answers and has room; `durable` makes files that outlive a loss of
//! power. [`gateway`] builds the parts and owns their tasks.
//!
//! # Invariants
//!
//! 1. An acknowledgement leaves only after the batch that holds the ping, and the dedup state that
//!    remembers it, is synced. Both are in one write.
//! 2. The order of a commit is durable, then visible, then acknowledged.
//! 3. A failed commit is final: nothing more is acknowledged, the process says why and exits.
//! 4. Every queue is bounded; what happens when it is full is written where it is made.
//! 5. Only [`store`] knows RocksDB. Only [`worker`], `handshake` and [`session`] speak QUIC, and only
//!    [`tls`] and [`pki`] read and make certificates. Only [`metrics`] knows metric names. `proto` knows
//!    none of them.
//! 6. Nothing a peer sends can panic the process, and no coordinate leaves it except to its holder.

pub mod admin;
pub mod admission;
pub mod allowance;
pub mod cli;
pub mod clock;
pub mod commit;
pub mod config;
pub mod disk;
mod durable;
pub mod feed;
pub mod freshness;
pub mod gateway;
pub mod handoff;
mod handshake;
pub mod inspect;
pub mod logging;
pub mod metrics;
pub mod pki;
pub mod rate;
pub mod session;
pub mod store;
mod sync;
pub mod takeover;
pub mod tls;
pub mod watch;
pub mod worker;
