//! The operator's commands that take longer than a line: an export that is read as fast as its reader reads, and an
//! erasure that takes as long as the disk needs.
//!
//! Knows what is said while they last. Must not know how it is done.
//!
//! # Bounds
//!
//! `MOST_LONG_CALLS` are under way; a further one is refused before anything has changed. An export keeps what its own
//! bounds say, and is given up when its reader takes nothing for `READER_PATIENCE`. Whoever waits for an erasure is told
//! of it every `TELL_INTERVAL`, so that one who has gone is noticed; the erasure goes on without.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::info;
use waypost_proto::id::UserId;

use super::{
    Answer, Holder, Wanted, chunks,
    door::{NO_USER, say},
};
use crate::{
    audit::{
        Audit, NotRecorded,
        chain::{Deed, What, Who, Whose},
    },
    clock::Clock,
    connected::{Connected, Ending},
    erase::{ErasePlaces, Erasure, NoPlace},
    export::{
        source::NotHeld,
        stream::{ExportError, Exports, Reading},
    },
    metrics::Metrics,
    orders::OrderHandle,
    revocation::Subject,
    store::{Held, Store},
};

/// What long commands reach. Clones share how many there may be.
#[derive(Clone, Debug)]
pub(super) struct LongCalls {
    parts: Arc<LongParts>,
    places: Places,
}

/// How many more there may be.
#[derive(Clone, Debug)]
struct Places {
    free: Arc<Semaphore>,
    metrics: Metrics,
}

/// The place of one that is under way.
struct Place {
    metrics: Metrics,
    _permit: OwnedSemaphorePermit,
}

/// Who does it.
#[derive(Debug)]
pub(super) struct LongParts {
    pub(super) orders: OrderHandle,
    pub(super) connected: Arc<Connected>,
    pub(super) exports: Exports,
    pub(super) store: Arc<Store>,
    pub(super) erase: ErasePlaces,
    pub(super) audit: Audit,
    pub(super) clock: Clock,
    pub(super) metrics: Metrics,
}

impl LongCalls {
    pub(super) fn new(parts: LongParts) -> Self {
        Self {
            places: Places::new(parts.metrics.clone()),
            parts: Arc::new(parts),
        }
    }

    /// Gives everything that is held on a user.
    pub(super) async fn export(&self, wanted: &Wanted, stream: &mut UnixStream) -> io::Result<()> {
        let begun = match (UserId::parse(&wanted.user), self.places.take()) {
            (None, _) => Err(NO_USER.to_owned()),
            (_, None) => Err(NO_PLACE.to_owned()),
            (Some(user), Some(place)) => self
                .parts
                .exports
                .begin_for_operator(user, wanted.format)
                .await
                .map(|reading| (user, place, reading))
                .map_err(|error| error.to_string()),
        };
        let (user, _place, mut reading) = match begun {
            Ok(begun) => begun,
            Err(reason) => return say(stream, &Answer::Refused(reason)).await,
        };
        let whom = format!("the operator, of user {user}");
        let exports = &self.parts.exports;
        let bytes = match give(&mut reading, stream).await {
            Ok(bytes) => bytes,
            // In the midst of a chunk nothing else can be said: what is missing says it.
            Err(error) => {
                exports.note(&whom, &Err(error));
                return Ok(());
            }
        };
        let read = reading.end().await;
        let last = match &read {
            Ok(()) => Answer::Whole { bytes },
            Err(error) => Answer::Refused(error.to_string()),
        };
        exports.note(&whom, &read);
        within(stream.write_all(&chunks::END)).await?;
        say(stream, &last).await
    }

    /// Erases everything that is held on a user, and tells how far that is.
    pub(super) async fn erase(&self, holder: &Holder, stream: &mut UnixStream) -> io::Result<()> {
        let begun = match (UserId::parse(&holder.user), self.places.take()) {
            (None, _) => Err(NO_USER.to_owned()),
            (_, None) => Err(NO_PLACE.to_owned()),
            (Some(user), Some(place)) => Ok((user, place)),
        };
        let (user, _place) = match begun {
            Ok(begun) => begun,
            Err(reason) => return say(stream, &Answer::Refused(reason)).await,
        };
        let is_begun = match self.held(user).await {
            Ok(Held::Erased(erasure)) if erasure.finished_ms.is_some() => {
                return say(stream, &Answer::Erasure(erasure)).await;
            }
            Ok(Held::Erased(_)) => true,
            Ok(Held::Something) => false,
            Ok(Held::Nothing) => {
                let reason = NotHeld::Unknown(user).to_string();
                return say(stream, &Answer::Refused(reason)).await;
            }
            Err(reason) => return say(stream, &Answer::Refused(reason)).await,
        };
        let Ok(place) = self.parts.erase.place() else {
            return say(stream, &Answer::Refused(NoPlace.to_string())).await;
        };
        // First on record, then done. A restore does what is on record, so nothing may refuse it from here on.
        if !is_begun && let Err(error) = self.record_erasure(user).await {
            return say(stream, &Answer::Refused(error.to_string())).await;
        }
        let mut erasing = match self.parts.orders.erase(user, place).await {
            Ok(erasing) => erasing,
            Err(error) => return say(stream, &Answer::Refused(error.to_string())).await,
        };
        if erasing.is_new {
            // The fence is on disk. Who says Hello from now on is told by the committer.
            let ended = self
                .parts
                .connected
                .end(Subject::User(user), Ending::Erased);
            info!(%user, ended, "the operator has everything erased that is held on this user");
        }
        let mut ticks = interval(TELL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_finished = tokio::select! {
                is_finished = erasing.finished.wait() => Some(is_finished),
                _ = ticks.tick() => None,
            };
            let answer = match (is_finished, self.erasure(user).await) {
                (Some(false), _) => Answer::Refused(NOT_FINISHED.to_owned()),
                (_, Ok(erasure)) => Answer::Erasure(erasure),
                (_, Err(reason)) => Answer::Refused(reason),
            };
            say(stream, &answer).await?;
            if is_finished.is_some() || matches!(answer, Answer::Refused(_)) {
                return Ok(());
            }
        }
    }

    async fn record_erasure(&self, user: UserId) -> Result<(), NotRecorded> {
        let deed = Deed {
            at_ms: self.parts.clock.now_ms(),
            who: Who::Operator,
            what: What::Erased,
            whose: Whose::of(&[user]),
        };
        self.parts.audit.record(deed).await
    }

    async fn erasure(&self, user: UserId) -> Result<Erasure, String> {
        match self.held(user).await? {
            Held::Erased(erasure) => Ok(erasure),
            Held::Nothing | Held::Something => Err("the fence of the erasure is gone".to_owned()),
        }
    }

    /// Asks the store, on a thread where a slow disk keeps nobody waiting.
    async fn held(&self, user: UserId) -> Result<Held, String> {
        let store = Arc::clone(&self.parts.store);
        let held = tokio::task::spawn_blocking(move || store.held_of(user)).await;
        match held {
            Ok(Ok(held)) => Ok(held),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Places {
    fn new(metrics: Metrics) -> Self {
        Self {
            free: Arc::new(Semaphore::new(MOST_LONG_CALLS)),
            metrics,
        }
    }

    /// A place, if one is free.
    fn take(&self) -> Option<Place> {
        let operator = &self.metrics.operator;
        let Ok(permit) = Arc::clone(&self.free).try_acquire_owned() else {
            operator.refused.increment(1);
            return None;
        };
        operator.long_calls.increment(1.0);
        Some(Place {
            metrics: self.metrics.clone(),
            _permit: permit,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.operator.long_calls.decrement(1.0);
    }
}

/// Sends an export but for its end, and says how much that was.
async fn give(reading: &mut Reading, stream: &mut UnixStream) -> Result<u64, ExportError> {
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::TimedOut => ExportError::NotReading,
        _ => ExportError::Broken(error.to_string()),
    };
    say(stream, &Answer::Follows).await.map_err(broken)?;
    let mut bytes = 0;
    while let Some(chunk) = reading.next().await {
        let length = chunks::length_of(&chunk);
        within(stream.write_all(&length)).await.map_err(broken)?;
        within(stream.write_all(&chunk)).await.map_err(broken)?;
        bytes += chunk.len() as u64;
    }
    Ok(bytes)
}

/// What a reader may not hold up for longer than `READER_PATIENCE`.
async fn within(written: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    timeout(READER_PATIENCE, written).await?
}

/// Fewer than there are places for callers.
const MOST_LONG_CALLS: usize = 8;
/// How long a reader may take nothing.
const READER_PATIENCE: Duration = Duration::from_secs(30);
/// Well within what a caller waits for a line.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
const NO_PLACE: &str = "as many exports and erasures are under way as the gateway takes from an operator at a time; try again in a minute";
const NOT_FINISHED: &str = "the erasure has not come to its end; the gateway's log says why. Nothing more is taken of the user, and the rest is begun again at the gateway's next start";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_end_to_long_calls_and_it_is_counted() {
        let metrics = Metrics::new();
        let places = Places::new(metrics.clone());
        let mut taken: Vec<_> = std::iter::from_fn(|| places.take()).collect();
        assert_eq!(taken.len(), MOST_LONG_CALLS);
        taken.truncate(3);
        let page = metrics.render();
        for line in [
            "waypost_operator_long_calls 3",
            "waypost_operator_long_calls_refused_total 1",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
        assert!(places.take().is_some());
    }
}
