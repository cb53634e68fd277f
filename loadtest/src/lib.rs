//! A fleet of devices that loads a gateway, then checks that nothing was lost.
//!
//! In the order of a run: a [`scenario`] ([`replay`] or [`steady`]) says what is sent and when; [`run`]
//! takes it through the stations. [`local_gateway`] starts a gateway if there is none; the [`fleet`]
//! connects its [`device`]s over a few sockets ([`link`]) and keeps a [`ledger`] of each; a [`checker`]
//! watches freshness meanwhile and [`scrape`] what the gateway uses. Then [`verify`] compares store and
//! freshness with the ledgers, and [`verdict`] makes a [`report`] of it, which [`page`] lays out with the
//! charts of its [`timeline`]. [`limits`] is another thing: it measures what the machine can do at all.

mod chart;
pub mod checker;
pub mod device;
pub mod fleet;
pub mod ledger;
pub mod limits;
pub mod link;
pub mod local_gateway;
pub mod page;
pub mod progress;
pub mod replay;
pub mod report;
pub mod run;
pub mod scenario;
pub mod scrape;
pub mod steady;
pub mod timeline;
pub mod verdict;
pub mod verify;
