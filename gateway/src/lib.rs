//! The Waypost gateway, in the order the data meets it.
//!
//! Packets arrive at the `port` that all [`worker`]s share; `steer` says whose they are, and a busy worker
//! lets them `gather`. With the settings of [`transport`] a worker `accept`s newcomers as far as [`admission`]
//! lets them, and notices when too many wait ([`newcomers`]); each is proven in its `handshake` by [`tls`], and served by one [`session`] task, which ends the device's older one ([`takeover`]), holds it
//! to its [`allowance`] over time ([`rate`]), and hands batches over ([`handoff`]) to the one [`commit`]ter.
//! The committer judges, writes through [`store`], which seals pings with their users' keys ([`seal`]), publishes
//! to [`freshness`], and only then answers; [`feed`] tells checkers. Beside pings the committer keeps a
//! [`vigil`]: its [`lookout`] finds out when the gateway
//! could not hear, which is its [`coverage`], and its [`deadlines`] say who was not heard in time; both are on the
//! [`bulletin`] that the feed reads, and checkers set the latter by [`orders`]. So does the operator, at the door of
//! [`control`], with each [`revocation`]; the connections of the revoked are found among those that are [`connected`].
//! A holder's wishes come from a device or by that door: to [`export`] what is held, and to [`erase`] it. Commands that
//! find no gateway do these things [`standalone`]. The [`audit`] log says who did what.
//! Certificates and revocation lists that change are taken into use by `reload`.
//! Devices come by their certificates through [`enrol`], at a port of its own, if they are [invited](mod@invite).
//! [`backup`] copies the store to elsewhere and [`restore`] puts it back; an erasure outlives both, for it is on a list
//! beside the keys that [`erase`] goes by at each start.
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
//! 5. Only [`store`] knows RocksDB, and it gives it nothing of a user unsealed. Only [`worker`], [`transport`], `steer`,
//!    [`newcomers`], `accept`, `handshake`, [`session`], [`connected`] and the door of [`enrol`] speak QUIC, and only
//!    [`tls`] and [`pki`] read and make certificates. Only [`metrics`] knows metric names. `proto` knows none of them.
//! 6. Nothing a peer sends can panic the process, and no coordinate leaves it except to its holder, or to the operator
//!    at the machine for its holder.

mod accept;
pub mod admin;
pub mod admission;
pub mod allowance;
pub mod audit;
pub mod backup;
pub mod bulletin;
pub mod cli;
pub mod clock;
pub mod commit;
pub mod config;
pub mod connected;
mod console;
pub mod control;
pub mod coverage;
pub mod deadlines;
pub mod disk;
mod durable;
pub mod enrol;
pub mod erase;
pub mod export;
pub mod feed;
pub mod freshness;
pub mod gateway;
pub mod gather;
pub mod grants;
pub mod handoff;
mod handshake;
mod hex;
pub mod inspect;
pub mod invite;
pub mod logging;
pub mod lookout;
pub mod metrics;
pub mod newcomers;
pub mod orders;
pub mod pki;
mod port;
pub mod rate;
mod reload;
pub mod restore;
pub mod revocation;
pub mod revoke;
pub mod seal;
pub mod session;
pub mod sharing;
pub mod standalone;
mod steer;
pub mod store;
mod sync;
pub mod takeover;
pub mod tls;
pub mod transport;
pub mod vigil;
pub mod watch;
pub mod worker;
