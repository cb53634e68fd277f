//! x
#![allow(missing_docs)]
pub mod ledger;
pub mod replay;
pub mod report;
pub mod scenario;
pub mod scrape;
pub mod steady;
