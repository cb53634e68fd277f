//! Many checkers at once, as lean as they can be: each reads the whole stream and checks what it promises.
//!
//! Knows the freshness stream, and what each reader was told. Must not know what was sent, or when somebody is to
//! read slowly.
//!
//! Beside the gateway on one machine, what the readers take is taken from what they measure. So they have threads of
//! their own, and only some of them remember each user; of the others it is counted what they were told, which must
//! be the same for all.
//!
//! # Bounds
//!
//! A reader that remembers takes 8 bytes a user; all together take one table of the users.

use std::{convert::Infallible, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::Semaphore;
use tonic::{Request, client::Grpc, codegen::http::uri::PathAndQuery, transport::Endpoint};
use waypost_checker::Entry;
use waypost_gateway::clock::system_now_us;
use waypost_proto::{id::UserId, v1::WatchRequest};

use crate::{
    checker,
    fleet::{CrewThreads, OwnRuntime},
    report::Latencies,
    told::{self, Told, ToldEntry, WholeMessages},
    trickle::Trickle,
};

/// All readers of a run. They stop when this is dropped.
#[derive(Debug)]
pub(crate) struct Readers {
    readers: Vec<Reader>,
    shared: Arc<Shared>,
    _threads: Vec<OwnRuntime>,
}

#[derive(Debug)]
struct Reader {
    book: Arc<Mutex<Book>>,
    /// Its line, if it is one that can be made slow.
    line: Option<Trickle>,
}

#[derive(Debug)]
struct Shared {
    /// By which number a user is remembered.
    users: FxHashMap<UserId, u32>,
    /// From durable to read, by thread and by phase.
    latencies: Vec<Mutex<Vec<Latencies>>>,
}

/// The work of one reader.
struct Reading {
    book: Arc<Mutex<Book>>,
    shared: Arc<Shared>,
    /// Where its latencies are counted; none for one that can be made slow.
    thread: Option<usize>,
}

/// What one reader was told.
#[derive(Debug, Default)]
struct Book {
    is_connected: bool,
    snapshot_entries: u64,
    has_snapshot: bool,
    /// No entry at or below may come any more.
    announced: u64,
    /// Changes that came, since they are counted.
    entries: u64,
    /// Values that these overtook.
    coalesced: u64,
    /// The newest position of each user, if this reader remembers.
    positions: Option<Vec<u64>>,
    faults: u64,
    first_fault: Option<String>,
    /// Why the stream ended.
    ended: Option<String>,
}

/// What all readers were told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readings {
    /// Readers whose stream has announced everything, and who were told of as many changes as all others.
    pub(crate) complete: u64,
    /// The changes that one of them was told of, those included that newer ones overtook.
    pub(crate) changes: u64,
    /// Entries that came to all readers together.
    pub(crate) entries: u64,
    /// Values that newer ones overtook on their way to slow readers.
    pub(crate) coalesced_for_slow: u64,
    /// The same on the way to the others.
    pub(crate) coalesced_for_others: u64,
    /// How often a stream broke its order.
    pub(crate) faults: u64,
    /// Slow readers who are still connected as they were in the beginning.
    pub(crate) slow_still_connected: u64,
    /// Last positions that were compared with what the gateway says.
    pub(crate) compared: u64,
    /// Of these, those that differ.
    pub(crate) different: u64,
    /// The first few faults in words.
    pub(crate) examples: Vec<String>,
}

impl Readers {
    /// Lets so many readers watch everybody. The last `slow` of them can be made slow.
    ///
    /// # Errors
    /// When there is no certificate, thread or socket. A reader that does not get through says so in the end.
    pub(crate) async fn start(
        service: SocketAddr,
        pki: &Path,
        users: &[UserId],
        readers: u32,
        slow: u32,
    ) -> anyhow::Result<Self> {
        let threads = (0..THREADS)
            .filter_map(|_| OwnRuntime::start(CrewThreads::Apart).transpose())
            .collect::<anyhow::Result<Vec<_>>>()?;
        let shared = Arc::new(Shared {
            users: users.iter().copied().zip(0..).collect(),
            latencies: threads.iter().map(|_| Mutex::default()).collect(),
        });
        let turns = Arc::new(Semaphore::new(HANDSHAKES_AT_ONCE));
        let mut started = Vec::new();
        for at in 0..readers {
            let is_slow = readers <= at + slow;
            let line = match is_slow {
                true => Some(Trickle::start(service).await?),
                false => None,
            };
            let address = line.as_ref().map_or(service, Trickle::address);
            let endpoint = endpoint(address, pki, is_slow)?;
            let remembers = is_slow || at < REMEMBERING;
            let book = Arc::new(Mutex::new(Book {
                positions: remembers.then(|| vec![0; users.len()]),
                ..Book::default()
            }));
            let thread = at as usize % threads.len();
            let reading = Reading {
                book: book.clone(),
                shared: shared.clone(),
                thread: (!is_slow).then_some(thread),
            };
            let turns = turns.clone();
            let _entered = threads[thread].enter();
            tokio::spawn(async move {
                let Err(ended) = reading.read(&endpoint, &turns).await;
                reading.book.lock().ended = Some(format!("{ended:#}"));
            });
            started.push(Reader { book, line });
        }
        Ok(Self {
            readers: started,
            shared,
            _threads: threads,
        })
    }

    /// How many have been told everything up to this position, snapshot included, and how many may still be.
    pub(crate) fn level(&self, position: u64) -> (u64, u64) {
        let (mut level, mut waiting) = (0, 0);
        for reader in &self.readers {
            let book = reader.book.lock();
            if book.has_snapshot && position <= book.announced {
                level += 1;
            } else if book.ended.is_none() {
                waiting += 1;
            }
        }
        (level, waiting)
    }

    /// Why the first stream ended that did.
    pub(crate) fn first_end(&self) -> Option<String> {
        self.readers
            .iter()
            .find_map(|reader| reader.book.lock().ended.clone())
    }

    /// Changes are counted from now on. All readers must be level, and nothing may happen meanwhile.
    pub(crate) fn begin_counting(&self) {
        for reader in &self.readers {
            let mut book = reader.book.lock();
            (book.entries, book.coalesced) = (0, 0);
        }
    }

    /// Latencies are of another phase from now on. Before the first, none are kept.
    pub(crate) fn begin_phase(&self) {
        for latencies in &self.shared.latencies {
            latencies.lock().push(Latencies::default());
        }
    }

    /// From durable to read, of a phase and of all readers that cannot be made slow. Reckoned from the gateway's
    /// time stamp, which is in whole milliseconds and of before the sync: up to a millisecond and a sync too long,
    /// and never too short.
    pub(crate) fn latencies(&self, phase: usize) -> Latencies {
        let of_threads = self.shared.latencies.iter().filter_map(|latencies| {
            let latencies = latencies.lock();
            latencies.get(phase).cloned()
        });
        of_threads.fold(Latencies::default(), Latencies::and)
    }

    /// Changes that came to all readers since they are counted.
    pub(crate) fn entries(&self) -> u64 {
        self.sum(|book| book.entries)
    }

    /// All that came, to see whether something still does.
    pub(crate) fn told(&self) -> u64 {
        self.sum(|book| book.entries + book.snapshot_entries)
    }

    fn sum(&self, of: fn(&Book) -> u64) -> u64 {
        let of_each = self.readers.iter().map(|reader| of(&reader.book.lock()));
        of_each.sum()
    }

    /// Those who can be slow read a byte a second from now on.
    pub(crate) fn slow_down(&self) {
        self.lines().for_each(Trickle::slow_down);
    }

    /// How many changes that somebody was told of have not come to a slow reader.
    pub(crate) fn behind(&self) -> u64 {
        let most = self.readers.iter().map(Reader::changes).max();
        let slow = self.readers.iter().filter(|reader| reader.line.is_some());
        let least = slow.map(Reader::changes).min();
        most.zip(least).map_or(0, |(most, least)| most - least)
    }

    /// They read freely again.
    pub(crate) fn let_go(&self) {
        self.lines().for_each(Trickle::let_go);
    }

    fn lines(&self) -> impl Iterator<Item = &Trickle> {
        self.readers
            .iter()
            .filter_map(|reader| reader.line.as_ref())
    }

    /// What everybody was told, against what the gateway says: `known` is everybody's entry at `position`.
    pub(crate) fn readings(&self, position: u64, known: &[Entry]) -> Readings {
        let mut readings = Readings::default();
        let most = self.readers.iter().map(Reader::changes).max();
        readings.changes = most.unwrap_or(0);
        for (at, reader) in self.readers.iter().enumerate() {
            let book = reader.book.lock();
            let mut say = |what: String| {
                if readings.examples.len() < MOST_EXAMPLES {
                    readings.examples.push(format!("checker {at}: {what}"));
                }
            };
            let is_level = position <= book.announced;
            let changes = book.changes();
            if is_level && changes == readings.changes {
                readings.complete += 1;
            } else {
                say(format!("{changes} changes up to {}", book.announced));
            }
            if let Some(ended) = &book.ended {
                say(ended.clone());
            }
            if let Some(fault) = &book.first_fault {
                say(fault.clone());
            }
            readings.faults += book.faults;
            readings.entries += book.entries;
            match &reader.line {
                Some(line) => {
                    readings.coalesced_for_slow += book.coalesced;
                    let is_same = book.ended.is_none() && line.connections() == 1;
                    readings.slow_still_connected += u64::from(is_same);
                }
                None => readings.coalesced_for_others += book.coalesced,
            }
            for (told, known) in book.positions.iter().flatten().zip(known) {
                readings.compared += 1;
                if *told != known.position {
                    readings.different += 1;
                    say(format!("{told} of {}, not {}", known.user, known.position));
                }
            }
        }
        readings
    }
}

impl Reader {
    fn changes(&self) -> u64 {
        self.book.lock().changes()
    }
}

impl Reading {
    /// Until the stream ends.
    async fn read(&self, endpoint: &Endpoint, turns: &Semaphore) -> anyhow::Result<Infallible> {
        let turn = turns.acquire().await?;
        let channel = endpoint.connect().await.context("cannot connect")?;
        let mut service = Grpc::new(channel);
        service.ready().await?;
        let request = Request::new(WatchRequest::default());
        let path = PathAndQuery::from_static("/waypost.v1.Freshness/Watch");
        let answer = service.server_streaming(request, path, WholeMessages);
        let mut stream = answer.await?.into_inner();
        drop(turn);
        while let Some(message) = stream.message().await? {
            self.take(&message, system_now_us());
        }
        bail!("the gateway ended the stream");
    }

    fn take(&self, message: &[u8], read_us: u64) {
        let latencies = self.thread.map(|thread| &self.shared.latencies[thread]);
        let mut latencies = latencies.map(Mutex::lock);
        let mut phase = latencies.as_mut().and_then(|phases| phases.last_mut());
        let mut book = self.book.lock();
        book.take(message, &self.shared.users, |durable_ms| {
            if let Some(phase) = &mut phase {
                phase.record_us(read_us.saturating_sub(durable_ms * 1_000));
            }
        });
    }
}

impl Book {
    /// Takes a message. `changed` is told of each change since when it was durable.
    fn take(
        &mut self,
        message: &[u8],
        users: &FxHashMap<UserId, u32>,
        mut changed: impl FnMut(u64),
    ) {
        for told in told::events(message) {
            match told {
                Ok(Told::Header) if std::mem::replace(&mut self.is_connected, true) => {
                    self.fault(|| "a second header".to_owned());
                }
                Ok(Told::Entry(entry)) => {
                    self.take_entry(&entry, users);
                    if self.has_snapshot {
                        changed(entry.durable_ms);
                    }
                }
                Ok(Told::SnapshotEnd { count, position }) => {
                    let came = self.snapshot_entries;
                    if std::mem::replace(&mut self.has_snapshot, true) || count != came {
                        self.fault(|| format!("a snapshot of {count} ended after {came}"));
                    }
                    self.announce(position);
                }
                Ok(Told::Progress { position }) => self.announce(position),
                Ok(Told::Reset) => self.fault(|| "the stream began again".to_owned()),
                Ok(Told::Header | Told::Other) => {}
                Err(unreadable) => self.fault(|| unreadable.to_string()),
            }
        }
    }

    fn take_entry(&mut self, entry: &ToldEntry, users: &FxHashMap<UserId, u32>) {
        let ToldEntry {
            user,
            position,
            coalesced,
            ..
        } = *entry;
        let announced = self.announced;
        if position <= announced {
            self.fault(|| format!("{user} came at {position}, after {announced} was announced"));
        }
        if self.has_snapshot {
            self.entries += 1;
            self.coalesced += coalesced;
        } else {
            self.snapshot_entries += 1;
        }
        // Of an older run's users nothing is remembered.
        let newest = self
            .positions
            .as_mut()
            .zip(users.get(&user))
            .map(|(positions, at)| &mut positions[*at as usize]);
        if let Some(newest) = newest {
            let before = std::mem::replace(newest, position);
            if position <= before {
                self.fault(|| format!("{user} went from {before} to {position}"));
            }
        }
    }

    /// The changes that came, overtaken ones counted.
    fn changes(&self) -> u64 {
        self.entries + self.coalesced
    }

    fn announce(&mut self, position: u64) {
        let before = std::mem::replace(&mut self.announced, position);
        if position < before {
            self.fault(|| format!("progress went back from {before} to {position}"));
        }
    }

    fn fault(&mut self, what: impl FnOnce() -> String) {
        self.faults += 1;
        self.first_fault.get_or_insert_with(what);
    }
}

fn endpoint(service: SocketAddr, pki: &Path, is_slow: bool) -> anyhow::Result<Endpoint> {
    // Who reads a byte a second cannot hear an answer in time, so nobody is asked.
    let endpoint = checker::config(service, pki)?
        .endpoint()?
        .http2_keep_alive_interval(NEVER);
    Ok(if is_slow {
        // What most clients have. With more, it would take longer until the gateway is felt to wait.
        endpoint
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
    } else {
        endpoint
    })
}

/// Enough for more than a hundred readers; more would only take processors from the gateway.
const THREADS: usize = 2;
/// How many readers remember each user, beside those that are slow.
const REMEMBERING: u32 = 4;
/// The gateway lets 16 of one address shake hands at a time.
const HANDSHAKES_AT_ONCE: usize = 8;
/// HTTP/2's own.
const HTTP2_WINDOW_BYTES: u32 = 65_535;
const NEVER: Duration = Duration::from_secs(365 * 24 * 3_600);
const MOST_EXAMPLES: usize = 3;

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message;
    use waypost_proto::v1::{
        self, Header, Progress, Reset, SnapshotEnd, WatchEvent, WatchResponse, watch_event::Kind,
    };

    use super::*;

    const USER: UserId = UserId([1; 16]);

    fn entry(position: u64, coalesced: u32) -> Kind {
        Kind::Entry(v1::Entry {
            user: Bytes::copy_from_slice(&USER.0),
            durable_ms: position,
            position,
            coalesced,
            ..v1::Entry::default()
        })
    }

    fn end(count: u64, position: u64) -> Kind {
        Kind::SnapshotEnd(SnapshotEnd {
            count,
            position,
            ..SnapshotEnd::default()
        })
    }

    fn progress(position: u64) -> Kind {
        Kind::Progress(Progress {
            position,
            ..Progress::default()
        })
    }

    fn header() -> Kind {
        Kind::Header(Header::default())
    }

    /// The book of a reader that remembers, after these events in one message, and since when changes were durable.
    fn after(kinds: Vec<Kind>) -> (Book, Vec<u64>) {
        let mut book = Book {
            positions: Some(vec![0]),
            ..Book::default()
        };
        let events = kinds
            .into_iter()
            .map(|kind| WatchEvent { kind: Some(kind) })
            .collect();
        let message = WatchResponse { events }.encode_to_vec();
        let users = [(USER, 0)].into_iter().collect();
        let mut durable = Vec::new();
        book.take(&message, &users, |durable_ms| durable.push(durable_ms));
        (book, durable)
    }

    #[test]
    fn changes_are_counted_with_what_they_overtook_and_a_snapshot_is_not() {
        let (book, durable) = after(vec![
            header(),
            entry(5, 0),
            end(1, 6),
            entry(8, 2),
            progress(8),
            entry(9, 0),
        ]);
        assert_eq!((book.faults, book.announced), (0, 8));
        assert_eq!((book.entries, book.coalesced), (2, 2));
        assert_eq!(durable, [8, 9]);
        assert_eq!(book.positions, Some(vec![9]));
    }

    #[test]
    fn each_broken_promise_is_a_fault() {
        for (broken, words) in [
            (header(), "second header"),
            (entry(6, 0), "after 6 was announced"),
            (end(1, 6), "a snapshot of 1"),
            (progress(5), "went back"),
            (Kind::Reset(Reset::default()), "began again"),
        ] {
            let (book, _) = after(vec![header(), entry(5, 0), end(1, 6), broken]);
            assert_eq!(book.faults, 1, "{words}");
            assert!(book.first_fault.unwrap().contains(words));
        }
        let (book, _) = after(vec![header(), end(0, 6), entry(9, 0), entry(8, 0)]);
        assert!(book.first_fault.unwrap().contains("went from 9 to 8"));
        let (book, _) = after(vec![header(), entry(5, 0), end(2, 6)]);
        assert!(book.first_fault.unwrap().contains("a snapshot of 2"));
    }

    fn readers(books: Vec<Book>) -> Readers {
        let reader = |book| Reader {
            book: Arc::new(Mutex::new(book)),
            line: None,
        };
        Readers {
            readers: books.into_iter().map(reader).collect(),
            shared: Arc::new(Shared {
                users: FxHashMap::default(),
                latencies: Vec::new(),
            }),
            _threads: Vec::new(),
        }
    }

    #[test]
    fn who_was_told_less_than_another_or_something_else_than_the_gateway_says_is_found() {
        let book = |entries, coalesced, announced, position| Book {
            entries,
            coalesced,
            announced,
            positions: Some(vec![position]),
            ..Book::default()
        };
        let known = [Entry {
            user: USER,
            state: waypost_checker::State::Active,
            last_contact_ms: 0,
            last_sample_ms: 0,
            last_fix_ms: 0,
            durable_ms: 0,
            position: 9,
            coalesced: 0,
        }];
        let readings = readers(vec![
            book(10, 0, 9, 9),
            book(3, 7, 9, 9),
            book(9, 0, 9, 9),
            book(10, 0, 8, 9),
            book(10, 0, 9, 8),
        ])
        .readings(9, &known);
        assert_eq!((readings.complete, readings.changes), (3, 10));
        assert_eq!((readings.compared, readings.different), (5, 1));
        assert_eq!((readings.entries, readings.coalesced_for_others), (42, 7));
        assert_eq!(readings.examples.len(), 3, "{:?}", readings.examples);
    }
}
