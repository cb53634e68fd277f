//! A fleet of devices that loads a gateway, then checks that nothing was lost.
//!
//! In the order of a run: a [`scenario`] says what is sent, when, and what befalls the devices meanwhile: a
//! recorded day ([`replay`]), a constant rate ([`steady`]), or groups with rhythms of their own ([`group`],
//! from a file: [`mix`]). [`run`] takes it through the stations. [`local_gateway`] starts a gateway if there
//! is none; the [`fleet`] enrols its [`device`]s, which connect over a few sockets ([`link`]), through a bad
//! network perhaps ([`relay`]), and keeps a [`ledger`] of each; a course plays the scenario; a [`checker`]
//! watches freshness meanwhile, or a crowd of lean readers does, and [`scrape`] what the gateway uses. Then
//! [`verify`] compares store and freshness with the ledgers, and [`verdict`] makes a [`report`] of it and of the
//! scenario's own [`findings`], which [`page`] lays out with the charts of its [`timeline`]. [`limits`] is another
//! thing: it measures what the machine can do at all.

mod chart;
pub mod checker;
mod course;
pub mod device;
pub mod findings;
pub mod fleet;
mod give_way;
pub mod group;
pub mod ledger;
pub mod limits;
pub mod link;
pub mod local_gateway;
pub mod mix;
pub mod page;
pub mod progress;
mod readers;
mod recorder;
pub mod relay;
pub mod replay;
pub mod report;
pub mod run;
pub mod scenario;
pub mod scrape;
pub mod steady;
pub mod timeline;
mod told;
mod trickle;
pub mod verdict;
pub mod verify;
