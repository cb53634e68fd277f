//! The steps of an erasure behind its fence, on whichever thread, in a gateway or where none runs.
//!
//! Knows the store and the order of the steps. Must not know who wants an erasure, or who waits for it.

use std::{io, sync::Arc};

use waypost_proto::id::UserId;

use super::{Counts, Erasure};
use crate::{
    clock::Clock,
    store::{CommitError, ReadError, Store},
};

/// Why an erasure has not come to its end. It is begun again at the next start.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    /// What there is could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It could not be deleted.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// It was deleted, and the files in which it lay could not be written anew.
    #[error("the files in which it lay could not be written anew: {0}")]
    Files(#[from] io::Error),
    /// The gateway stops, and may have kept the files from being written anew.
    #[error("the gateway stops")]
    Stopping,
    /// It was deleted and is still there.
    #[error(
        "{} devices, {} pings and {} events of the user are still there",
        .0.devices, .0.pings, .0.events
    )]
    StillThere(Counts),
}

/// What the steps are done on.
#[derive(Clone, Debug)]
pub struct Steps {
    store: Arc<Store>,
    clock: Clock,
}

impl Steps {
    /// On a store that is open for writing.
    #[must_use]
    pub fn new(store: Arc<Store>, clock: Clock) -> Self {
        Self { store, clock }
    }

    /// Does what is left to do behind a fence, and notes in `erasure` how far that is, also when it fails.
    ///
    /// # Errors
    /// When something is left, or may be.
    pub fn carry_out(
        &self,
        user: UserId,
        erasure: &mut Erasure,
        is_stopping: impl Fn() -> bool,
    ) -> Result<(), EraseError> {
        let store = &self.store;
        let events = store.events_of_user(user)?;
        if erasure.counts.is_none() {
            // Kept before anything is deleted, so that one that is begun again does not count less.
            erasure.counts = Some(self.count(user)?);
            self.note(user, erasure)?;
        }
        // From here on whatever copy there is of a row, in a file or a backup, cannot be read any more.
        store.destroy_key(&user, erasure.fenced_ms)?;
        let mut batch = store.batch();
        batch.delete_user(user, &store.days(), &events);
        store.commit(batch)?;
        store.purge_user(user)?;
        if is_stopping() {
            return Err(EraseError::Stopping);
        }
        self.find_nothing(user)?;
        erasure.finished_ms = Some(self.clock.now_ms());
        self.note(user, erasure)
    }

    /// Has the files written anew in which events lay that were forgotten.
    pub(super) fn purge_events(&self) -> io::Result<()> {
        self.store.purge_events()
    }

    pub(super) fn find_nothing(&self, user: UserId) -> Result<(), EraseError> {
        match self.count(user)? {
            Counts {
                devices: 0,
                pings: 0,
                events: 0,
            } => Ok(()),
            left => Err(EraseError::StillThere(left)),
        }
    }

    pub(super) fn count(&self, user: UserId) -> Result<Counts, ReadError> {
        Ok(Counts {
            events: self.store.events_of_user(user)?.len() as u64,
            ..self.store.count_user(user)?
        })
    }

    pub(super) fn note(&self, user: UserId, erasure: &Erasure) -> Result<(), EraseError> {
        let mut batch = self.store.batch();
        batch.put_erasure(user, erasure);
        Ok(self.store.commit(batch)?)
    }
}
