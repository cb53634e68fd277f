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

use anyhow::{Context, ensure};
use bytes::Bytes;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use waypost_gateway::{
    clock::system_now_ms,
    feed::{client, rpc::freshness_client::FreshnessClient},
};
use waypost_proto::{
    id::UserId,
    v1::{Entry, GetRequest, GetResponse, WatchEvent, WatchRequest, watch_event::Kind},
};

use crate::report::Latencies;

/// A connection to the freshness service, with the development checker's certificate.
#[derive(Clone, Debug)]
pub struct Checker {
    client: FreshnessClient<Channel>,
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
    is_snapshot: bool,
    /// No entry at or below may come any more.
    announced: u64,
    newest: FxHashMap<UserId, Seen>,
    token: Bytes,
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
        let read = |name: &str| {
            let path = pki.join(name);
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let (ca, certificate, key) = (
            read("ca.pem")?,
            read("checker-dev.pem")?,
            read("checker-dev.key")?,
        );
        let client = client::connect(
            &format!("https://{freshness}"),
            ca,
            certificate,
            key,
            SERVER_NAME,
        )
        .await?;
        Ok(Self { client })
    }

    /// The entries of users, asked page by page.
    ///
    /// # Errors
    /// When the service fails or answers with too few entries.
    pub async fn get(&mut self, users: &[UserId]) -> anyhow::Result<Answer> {
        let mut entries = Vec::with_capacity(users.len());
        let mut resolved_ms = 0;
        for page in users.chunks(GET_PAGE_USERS) {
            let user_ids = page
                .iter()
                .map(|user| Bytes::copy_from_slice(&user.0))
                .collect();
            let answer = self.ask(GetRequest { user_ids }).await?;
            ensure!(
                answer.entries.len() == page.len(),
                "the gateway answered for {} users of {}",
                answer.entries.len(),
                page.len()
            );
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
    async fn ask(&mut self, request: GetRequest) -> Result<GetResponse, tonic::Status> {
        let patience = Instant::now() + ANSWER_PATIENCE;
        loop {
            match self.client.get(request.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(_not_there) if Instant::now() < patience => sleep(RECONNECT_PAUSE).await,
                Err(status) => return Err(status),
            }
        }
    }

    /// Begins to watch all users.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let state = Arc::new(WatchState::default());
        let (mut client, state_of_task) = (self.client.clone(), state.clone());
        let task = tokio::spawn(async move {
            loop {
                // The stream ends when the gateway does; a later one goes on where it was.
                if let Err(_gateway_is_gone) = state_of_task.read(&mut client).await {
                    sleep(RECONNECT_PAUSE).await;
                }
            }
        });
        Watch { state, task }
    }
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
    async fn read(&self, client: &mut FreshnessClient<Channel>) -> Result<(), tonic::Status> {
        let token = self.book.lock().token.clone();
        let request = WatchRequest {
            token,
            ..WatchRequest::default()
        };
        let mut stream = client.watch(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            let now_ms = system_now_ms();
            let mut book = self.book.lock();
            let mut latencies = self.latencies.lock();
            for event in message.events {
                if let Some(Kind::Progress(progress)) = &event.kind {
                    self.lag_ms.store(progress.lag_ms, Ordering::Relaxed);
                }
                if let Some(durable_ms) = book.take(event) {
                    latencies.record_us(now_ms.saturating_sub(durable_ms) * 1_000);
                }
            }
        }
        Ok(())
    }
}

impl WatchBook {
    /// Checks and remembers one event. When it is a change, the result says since when it was durable.
    fn take(&mut self, event: WatchEvent) -> Option<u64> {
        match event.kind? {
            Kind::Header(header) => {
                self.is_snapshot = header.position == 0;
                self.announced = header.position;
            }
            Kind::Reset(_) => {
                self.is_snapshot = true;
                self.announced = 0;
            }
            Kind::SnapshotEnd(end) => {
                self.is_snapshot = false;
                self.announced = end.position;
                self.token = end.token;
            }
            Kind::Progress(progress) => {
                if progress.position < self.announced {
                    self.fault(format!(
                        "progress went back from {} to {}",
                        self.announced, progress.position
                    ));
                }
                self.announced = progress.position;
                self.token = progress.token;
            }
            Kind::Entry(entry) => return self.take_entry(&entry),
            Kind::Coverage(_) | Kind::Deadline(_) => {}
        }
        None
    }

    fn take_entry(&mut self, entry: &Entry) -> Option<u64> {
        let Ok(user) = <[u8; 16]>::try_from(entry.user.as_ref()).map(UserId) else {
            self.fault(format!(
                "an entry names a user of {} bytes",
                entry.user.len()
            ));
            return None;
        };
        if !self.is_snapshot && entry.position <= self.announced {
            self.fault(format!(
                "{user} came at position {}, after {} was announced",
                entry.position, self.announced
            ));
        }
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
        (!self.is_snapshot).then_some(entry.durable_ms)
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
/// Progress comes at least every second.
const REACH_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use waypost_proto::v1::{Header, Progress, SnapshotEnd};

    use super::*;

    fn event(kind: Kind) -> WatchEvent {
        WatchEvent { kind: Some(kind) }
    }

    fn entry(user: u8, position: u64, sample_ms: u64) -> WatchEvent {
        event(Kind::Entry(Entry {
            user: Bytes::copy_from_slice(&[user; 16]),
            position,
            last_sample_ms: sample_ms,
            durable_ms: 77,
            ..Entry::default()
        }))
    }

    fn after(events: impl IntoIterator<Item = WatchEvent>) -> (WatchBook, Vec<u64>) {
        let mut book = WatchBook::default();
        let durable = events
            .into_iter()
            .filter_map(|event| book.take(event))
            .collect();
        (book, durable)
    }

    fn snapshot() -> Vec<WatchEvent> {
        vec![
            event(Kind::Header(Header::default())),
            entry(1, 5, 100),
            entry(2, 3, 100),
            event(Kind::SnapshotEnd(SnapshotEnd {
                count: 2,
                position: 5,
                token: Bytes::from_static(b"t"),
            })),
        ]
    }

    #[test]
    fn a_stream_in_order_has_no_fault_and_only_changes_are_timed() {
        let mut events = snapshot();
        events.extend([
            entry(1, 6, 200),
            event(Kind::Progress(Progress {
                position: 6,
                ..Progress::default()
            })),
        ]);
        let (book, durable) = after(events);
        assert_eq!((book.faults, book.announced, durable), (0, 6, vec![77]));
        assert_eq!(book.newest[&UserId([1; 16])].sample_ms, 200);
    }

    #[test]
    fn each_broken_promise_is_a_fault() {
        for (broken, words) in [
            (entry(1, 5, 100), "was announced"),
            (entry(1, 6, 99), "went back"),
            (
                event(Kind::Progress(Progress {
                    position: 4,
                    ..Progress::default()
                })),
                "progress went back",
            ),
        ] {
            let mut events = snapshot();
            events.push(broken);
            let (book, _) = after(events);
            assert_eq!(book.faults, 1);
            assert!(book.first_fault.unwrap().contains(words));
        }
    }
}
