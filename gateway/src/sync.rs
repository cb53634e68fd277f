//! What the hand-off waits and wakes with, in one place.
//!
//! `tests/schedules` compiles [`crate::handoff`], [`crate::orders`] and [`crate::commit`] a second time against a
//! model of just these, and tries out the orders in which threads can meet. A primitive that is not named here
//! would escape it. Knows no logic.

pub(crate) use parking_lot::Mutex;
pub(crate) use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::sleep,
};
