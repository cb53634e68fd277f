//! A checker's end of Waypost: what an author needs to follow how fresh users are.
//!
//! [`Checker`] asks; [`Watch`] follows the stream over gateways that stop and networks that break, and says
//! by its [`Event`]s what came and what is not known; [`Silences`] makes of them who has been silent for how
//! long. The cores (`follow`, [`Silences`]) take events and times and know no connection; [`Watch`] is the
//! shell around them.
//!
//! # What a consumer may rely on
//!
//! - **At least once, and once if it likes.** What was given out up to a [`Event::Progress`] or
//!   [`Event::SnapshotEnd`] is never given again to a watch that begins with that event's [`Resume`].
//!   Whoever stores the resume together with the effects of all events before it, in one write, has each
//!   effect exactly once. Within one watch, a change is given once, also when the connection broke.
//! - **A [`Event::Reset`] forgets**: all that came before may be wrong, a snapshot follows. A user who does
//!   not come again is gone, and one who was late and does not come as late again is not any more.
//! - **[`Event::Stale`] is unknown, not silent.** Of a moment after its `resolved_ms` nothing is known of
//!   anybody, until [`Event::Live`].
//! - **A gateway that breaks the order of its stream is not believed**: the stream is given up with
//!   [`Interruption::Violation`] and begins again with a snapshot.
//!
//! # Example
//!
//! ```no_run
//! use waypost_checker::{Change, CheckerError, Config, Event, Selector, Silences, Watch};
//!
//! /// Says who has been silent for ten minutes. `examples/checker.rs` forgets nothing between two runs, either.
//! async fn follow(config: &Config) -> Result<(), CheckerError> {
//!     let mut silences = Silences::new(10 * 60 * 1_000);
//!     let mut changes = Vec::new();
//!     let mut watch = Watch::new(config, Selector::default(), None)?;
//!     loop {
//!         let event = watch.next().await?;
//!         silences.take(&event, &mut changes);
//!         for change in changes.drain(..) {
//!             match change {
//!                 Change::Silent { user, .. } => println!("no word from {user}"),
//!                 Change::HeardAgain { user, .. } => println!("{user} is back"),
//!                 Change::Closed { user, .. } => println!("nothing to say of {user} any more"),
//!             }
//!         }
//!         if let Event::Stale { resolved_ms } = event {
//!             println!("since {resolved_ms} nothing is known of anybody");
//!         }
//!     }
//! }
//! ```

mod checker;
mod connection;
mod event;
mod follow;
mod resume;
mod silence;
mod watch;

pub use waypost_proto::{
    id::UserId,
    v1::{ListStaleRequest, State, coverage, deadline, reset},
};

pub use self::{
    checker::{Answer, Checker, DeadlinePage, DeadlineSetting, DeadlineState, StalePage},
    connection::{CheckerError, Config, connect},
    event::{Deadline, Entry, Event, Gap, Interruption, Transition},
    follow::Violation,
    resume::{BadResume, Resume},
    silence::{Change, Silences},
    watch::{Selector, Watch},
};

/// The generated client of `waypost.v1.Freshness`, for whoever wants the calls as they are.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
pub mod rpc {
    include!("gen/waypost.v1.rs");
}
