//! Failing, lying, full and frozen disks: nothing is acknowledged that is not stored, and the gateway says
//! what is the matter.

mod any_fault;
mod faults;
mod hang;
mod ledger;
mod room;
