//! The promises of Waypost, end to end. One binary, so that RocksDB is linked once.
#![allow(clippy::unwrap_used)]

mod crash;
mod freshness;
mod hostile;
mod identity;
mod ingest;
mod operations;
mod python;
mod replay;
mod shutdown;
mod watch;
