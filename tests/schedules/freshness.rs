//! A model of the freshness index that refuses whatever would break a promise to checkers. Knows the
//! model of the store and the bulletin, to see that nothing is visible before it is durable, nor a position before
//! what else it says.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use waypost_gateway::{
    grants::{CheckerSet, Visibility},
    sharing::Transition,
};
use waypost_proto::{device::Clocks, id::UserId};

use crate::{bulletin::Bulletin, store::Store};

/// What checkers were told.
#[derive(Debug)]
pub(crate) struct Freshness {
    store: Arc<Store>,
    bulletin: Arc<Bulletin>,
    // No model: looking is no step of the schedule.
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    position: u64,
    resolved_ms: u64,
    contacts_ms: HashMap<UserId, u64>,
}

impl Freshness {
    pub(crate) fn new(store: Arc<Store>, bulletin: Arc<Bulletin>) -> Self {
        Self {
            store,
            bulletin,
            told: Mutex::default(),
        }
    }

    pub(crate) fn publish(
        &self,
        position: u64,
        resolved_ms: u64,
        changes: &[(UserId, Clocks)],
        transitions: &[Transition],
    ) {
        assert!(transitions.is_empty(), "nobody pauses in a schedule");
        assert!(
            position <= self.store.durable_position(),
            "visible before it was durable: position {position}"
        );
        for (checker, newest) in self.store.newest_events() {
            assert!(
                newest <= self.bulletin.newest_event(checker),
                "visible before it was on the bulletin: position {newest}"
            );
        }
        let mut told = self.told.lock();
        assert_eq!(position, told.position + 1, "a position was left out");
        told.position = position;
        for (user, clocks) in changes {
            let contact_ms = clocks.last_contact_ms;
            let before_ms = told.contacts_ms.insert(*user, contact_ms);
            assert!(
                before_ms == Some(contact_ms) || told.resolved_ms < contact_ms,
                "a contact at {contact_ms} came after {} had been announced as complete",
                told.resolved_ms
            );
        }
        told.resolve(resolved_ms);
    }

    pub(crate) fn resolve(&self, resolved_ms: u64) {
        self.told.lock().resolve(resolved_ms);
    }

    pub(crate) fn last_contact_ms(&self, user: &UserId) -> u64 {
        let told = self.told.lock();
        told.contacts_ms.get(user).copied().unwrap_or_default()
    }

    /// Everybody has granted everything in a schedule.
    pub(crate) fn visibility(&self, _user: &UserId) -> Visibility {
        Visibility {
            granted: CheckerSet::ALL,
            ..Visibility::default()
        }
    }

    pub(crate) fn position(&self) -> u64 {
        self.told.lock().position
    }

    pub(crate) fn resolved_ms(&self) -> u64 {
        self.told.lock().resolved_ms
    }
}

impl Told {
    fn resolve(&mut self, resolved_ms: u64) {
        assert!(
            self.resolved_ms <= resolved_ms,
            "the announced moment went back"
        );
        self.resolved_ms = resolved_ms;
    }
}
