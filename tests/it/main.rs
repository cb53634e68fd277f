//! The promises of Waypost, end to end. One binary for nearly all, so that RocksDB is linked once.
#![allow(clippy::unwrap_used)]

mod audit;
mod backup;
mod checker;
mod crash;
mod discovery;
mod disk;
mod early;
mod enrol;
mod erase;
mod expiry;
mod export;
mod freshness;
mod grants;
mod hostile;
mod identity;
mod ingest;
mod limits;
mod network;
mod operations;
mod pause;
mod power_loss;
mod python;
mod replay;
mod revocation;
mod scenarios;
mod sealing;
mod shutdown;
mod terms;
mod vigil;
mod watch;
mod workers;
