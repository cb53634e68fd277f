//! A downstream checker: asks the gateway for freshness, and watches the stream while a run goes on.
//!
//! Knows the freshness service and the promises of its order. Must not know what was sent.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::time::{Instant, sleep};
use waypost_checker::{CheckerError, Config, Entry, Event, Interruption, Selector, UserId};
use waypost_gateway::clock::system_now_ms;

use crate::report::Latencies;

/// A connection to the freshness service, with the development checker's certificate.
#[derive(Clone, Debug)]
pub struct Checker {
    service: waypost_checker::Checker,
}

/// An answer and the latest moment it can speak of.
#[derive(Clone, Debug)]
pub struct Answer {
    /// One entry for each user, in the order asked.
    pub entries: Vec<Entry>,
    /// The gateway's clock was at most here.
    pub at_most_ms: u64,
}

/// A Watch stream that is read until this is dropped.
#[derive(Debug)]
pub struct Watch {
    state: Arc<WatchState>,
    task: tokio::task::JoinHandle<()>,
}

/// What the stream has said so far.
#[derive(Debug, Default)]
struct WatchState {
    latencies: Mutex<Latencies>,
    book: Mutex<WatchBook>,
    lag_ms: AtomicU64,
}

/// The stream's promises, checked entry by entry.
#[derive(Debug, Default)]
struct WatchBook {
    /// No entry at or below may come any more.
    announced: u64,
    newest: FxHashMap<UserId, Seen>,
    faults: u64,
    first_fault: Option<String>,
}

/// What the stream said last of a user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The commit.
    pub position: u64,
    /// The gateway's last contact.
    pub contact_ms: u64,
    /// The newest sample.
    pub sample_ms: u64,
}

impl Checker {
    /// Connects.
    ///
    /// # Errors
    /// When the certificate folder lacks the development checker, or the service cannot be reached.
    pub async fn connect(freshness: SocketAddr, pki: &Path) -> anyhow::Result<Self> {
        let service = waypost_checker::Checker::connect(config(freshness, pki)?).await?;
        Ok(Self { service })
    }

    /// The newest commit that can be asked about.
    ///
    /// # Errors
    /// When the service fails.
    pub async fn position(&mut self) -> anyhow::Result<u64> {
        Ok(self.ask(&[]).await?.position)
    }

    /// The entries of users, asked page by page.
    ///
    /// # Errors
    /// When the service fails.
    pub async fn get(&mut self, users: &[UserId]) -> anyhow::Result<Answer> {
        let mut entries = Vec::with_capacity(users.len());
        let mut resolved_ms = 0;
        for page in users.chunks(GET_PAGE_USERS) {
            let answer = self.ask(page).await?;
            entries.extend(answer.entries);
            resolved_ms = resolved_ms.max(answer.resolved_ms);
        }
        // The gateway's clock is ahead of ours only if ours was set back.
        Ok(Answer {
            entries,
            at_most_ms: system_now_ms().max(resolved_ms),
        })
    }

    /// Asks again for a while: a gateway that was just restarted is not there at once.
    async fn ask(&mut self, users: &[UserId]) -> Result<waypost_checker::Answer, CheckerError> {
        let patience = Instant::now() + ANSWER_PATIENCE;
        loop {
            match self.service.get(users).await {
                Err(_not_there) if Instant::now() < patience => sleep(RECONNECT_PAUSE).await,
                answered => return answered,
            }
        }
    }

    /// Begins to watch all users.
    ///
    /// # Errors
    /// When the address or the certificates cannot be used.
    pub fn watch(&self) -> Result<Watch, CheckerError> {
        let state = Arc::new(WatchState::default());
        let mut stream = self.service.watch(Selector::default(), None)?;
        let state_of_task = state.clone();
        let task = tokio::spawn(async move {
            loop {
                match stream.next().await {
                    Ok(event) => state_of_task.take(&event),
                    Err(refusal) => break state_of_task.book.lock().fault(refusal.to_string()),
                }
            }
        });
        Ok(Watch { state, task })
    }
}

/// How the development checker reaches a freshness service.
///
/// # Errors
/// When the certificate folder lacks it.
pub(crate) fn config(freshness: SocketAddr, pki: &Path) -> anyhow::Result<Config> {
    let read = |name: &str| {
        let path = pki.join(name);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let (ca, certificate, key) = (
        read("ca.pem")?,
        read("checker-dev.pem")?,
        read("checker-dev.key")?,
    );
    let address = format!("https://{freshness}");
    Ok(Config::new(address, ca, certificate, key, SERVER_NAME))
}

impl Watch {
    /// From durable at the gateway to read here.
    #[must_use]
    pub fn latencies(&self) -> Latencies {
        self.state.latencies.lock().clone()
    }

    /// How far the stream was behind when it last said so.
    #[must_use]
    pub fn lag_ms(&self) -> u64 {
        self.state.lag_ms.load(Ordering::Relaxed)
    }

    /// Waits until the stream has announced that it is complete up to a commit. False if it did not in
    /// time.
    pub async fn reaches(&self, position: u64) -> bool {
        let patience = Instant::now() + REACH_TIMEOUT;
        while self.state.book.lock().announced < position {
            if patience < Instant::now() {
                return false;
            }
            sleep(LOOK_INTERVAL).await;
        }
        true
    }

    /// What the stream said last of a user.
    #[must_use]
    pub fn seen(&self, user: UserId) -> Option<Seen> {
        self.state.book.lock().newest.get(&user).copied()
    }

    /// How often the stream broke its promised order, and the first time in words.
    #[must_use]
    pub fn faults(&self) -> (u64, Option<String>) {
        let book = self.state.book.lock();
        (book.faults, book.first_fault.clone())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl WatchState {
    fn take(&self, event: &Event) {
        if let Event::Progress { lag_ms, .. } = event {
            self.lag_ms.store(*lag_ms, Ordering::Relaxed);
        }
        let Some(durable_ms) = self.book.lock().take(event) else {
            return;
        };
        let took_ms = system_now_ms().saturating_sub(durable_ms);
        self.latencies.lock().record_us(took_ms * 1_000);
    }
}

impl WatchBook {
    /// Checks and remembers one event. When it is a change, the result says since when it was durable.
    fn take(&mut self, event: &Event) -> Option<u64> {
        match event {
            Event::Connected { position } => self.announced = *position,
            Event::Reset { .. } => self.announced = 0,
            Event::SnapshotEnd { position, .. } | Event::Progress { position, .. } => {
                self.announced = *position;
            }
            Event::Entry { entry, is_snapshot } => {
                self.take_entry(entry);
                return (!is_snapshot).then_some(entry.durable_ms);
            }
            // The order within one stream is looked after by whoever reads it.
            Event::Disconnected {
                why: Interruption::Violation(violation),
                ..
            } => self.fault(violation.to_string()),
            Event::Disconnected { .. }
            | Event::Coverage(_)
            | Event::Deadline(_)
            | Event::Transition(_)
            | Event::Stale { .. }
            | Event::Live { .. } => {}
        }
        None
    }

    fn take_entry(&mut self, entry: &Entry) {
        let user = entry.user;
        let seen = Seen {
            position: entry.position,
            contact_ms: entry.last_contact_ms,
            sample_ms: entry.last_sample_ms,
        };
        let before = self.newest.insert(user, seen).unwrap_or_default();
        if seen.position < before.position
            || seen.contact_ms < before.contact_ms
            || seen.sample_ms < before.sample_ms
        {
            self.fault(format!("{user} went back from {before:?} to {seen:?}"));
        }
    }

    fn fault(&mut self, what: String) {
        self.faults += 1;
        self.first_fault.get_or_insert(what);
    }
}

/// A name in the development server's certificate.
const SERVER_NAME: &str = "localhost";
/// The service's limit.
const GET_PAGE_USERS: usize = 1_000;
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Progress comes at least every second, on a stream that may take ten to come back to a new gateway.
const REACH_TIMEOUT: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use waypost_checker::{State, Violation};

    use super::*;

    fn entry(position: u64, sample_ms: u64, is_snapshot: bool) -> Event {
        Event::Entry {
            entry: Entry {
                user: UserId([1; 16]),
                state: State::Active,
                last_contact_ms: 0,
                last_sample_ms: sample_ms,
                last_fix_ms: 0,
                durable_ms: 77,
                position,
                coalesced: 0,
            },
            is_snapshot,
        }
    }

    fn after(events: impl IntoIterator<Item = Event>) -> (WatchBook, Vec<u64>) {
        let mut book = WatchBook::default();
        let durable = events
            .into_iter()
            .filter_map(|event| book.take(&event))
            .collect();
        (book, durable)
    }

    #[test]
    fn a_stream_in_order_has_no_fault_and_only_changes_are_timed() {
        let events = [
            Event::Connected { position: 0 },
            entry(5, 100, true),
            Event::Connected { position: 5 },
            entry(6, 200, false),
        ];
        let (book, durable) = after(events);
        assert_eq!((book.faults, book.announced, durable), (0, 5, vec![77]));
        assert_eq!(book.newest[&UserId([1; 16])].sample_ms, 200);
    }

    #[test]
    fn each_broken_promise_is_a_fault() {
        let violation = Violation::WentBack {
            announced: 6,
            position: 4,
        };
        let disconnected = Event::Disconnected {
            why: violation.into(),
            retry_in: Duration::ZERO,
        };
        for (broken, words) in [
            (entry(6, 99, false), "went back"),
            (entry(4, 100, false), "went back"),
            (disconnected, "progress went back"),
        ] {
            let (book, _) = after([entry(5, 100, true), broken]);
            assert_eq!(book.faults, 1);
            assert!(book.first_fault.unwrap().contains(words));
        }
    }
}
