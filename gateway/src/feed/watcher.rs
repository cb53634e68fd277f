//! One Watch stream: a cursor into the freshness index and a place for one message.
//!
//! Knows the order of events on a stream, which is the contract:
//!
//! - An entry is read only when there is room to send it. A checker that reads slowly therefore gets
//!   newer values, not more of them, and no queue grows for it.
//! - Entries and progress travel in one queue. `resolved_ms` is announced only after every user's state
//!   of that moment has been put into it, and a position only when no entry at or below it can come.
//! - A stream that is level passes on each commit in the words that were found for it once, for all streams.
//!   One that is behind reads the users themselves, and gets its own words for newer and fewer values.
//! - Spans of coverage, transitions and events of deadlines come before the first announcement at or beyond their
//!   position, after the entries of the step ([`super::notices`]).
//! - Of a user who has not granted its checker, nothing comes. That is looked up where an entry is read, so that none is
//!   read after the withdrawal was told.
//! - Whoever cannot be brought level by following the changes within a progress interval, because users
//!   change faster than it reads, is brought level by a sweep; so `resolved_ms` moves on under any load.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use metrics::Gauge;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use waypost_proto::{
    id::UserId,
    v1::{self, Header, Progress, Reset, SnapshotEnd, State, reset::Reason, watch_event::Kind},
};

use super::{
    message::Message,
    notices::{self, NoticeError, Notices, Told},
    token::{Scope, Tokens},
    wire::{self, Selector},
};
use crate::{
    clock::Clock,
    deadlines::Checker,
    freshness::{Commit, Freshness, Glimpse, Head, LastSeen, Reader, Step, Update},
    grants::CheckerNumber,
    metrics::Metrics,
    revocation::{CertificateId, Revocations},
    sharing::{Transition, Turn},
};

/// A message is sent with this many entries, or fewer when the reader is level. Some 40 KB.
const ENTRIES_PER_MESSAGE: usize = 512;

/// How often the index is read for one message that does not fill, before other tasks get their turn.
const READS_PER_TURN: usize = 64;

/// Entries that come within this time of each other share a message, at least. With a thousand commits a second
/// and a hundred watchers, a message for each commit would be most of the gateway's work.
const LEAST_GATHER: Duration = Duration::from_millis(1);

/// With many streams they gather for longer, so that the messages of all together take half a processor at most: one
/// takes some 10 µs, whatever is in it.
const GATHER_PER_STREAM: Duration = Duration::from_micros(20);

/// Beyond, an entry could not be with everybody within 5 ms. From 150 streams on, more of them take more processors.
const MOST_GATHER: Duration = Duration::from_millis(3);

pub(super) struct Watcher {
    pub(super) scope: Scope,
    pub(super) selector: Selector,
    pub(super) tokens: Tokens,
    pub(super) freshness: Arc<Freshness>,
    pub(super) notices: Notices,
    pub(super) checker: Checker,
    /// The same, as users have granted it.
    pub(super) number: CheckerNumber,
    /// What it has shown.
    pub(super) certificates: Arc<[CertificateId]>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) clock: Clock,
    pub(super) metrics: Metrics,
    pub(super) progress_interval: Duration,
    pub(super) cancel: CancellationToken,
    pub(super) messages: mpsc::Sender<Result<Message, Status>>,
    pub(super) _room: OwnedSemaphorePermit,
}

/// Why a stream ends. A stream has no end of its own.
enum Ended {
    ReaderGone,
    ShuttingDown,
    Revoked,
    Untold(NoticeError),
}

/// Where the stream stands.
struct Progressing {
    reader: Reader,
    told: Told,
    /// The entries of the snapshot so far, while it lasts.
    snapshot_count: Option<u64>,
    resolved_ms: u64,
    level_at: Instant,
    progress_due: Instant,
    lagging: Option<Lagging>,
}

/// Counts a stream among those that lag, until it is dropped.
struct Lagging(Gauge);

impl Lagging {
    fn new(lagging: &Gauge) -> Self {
        lagging.increment(1.0);
        Self(lagging.clone())
    }
}

impl Drop for Lagging {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

impl Watcher {
    /// Streams until the reader is gone or the gateway shuts down.
    pub(super) async fn run(self, token: Bytes) {
        let watchers = &self.metrics.freshness.watchers;
        watchers.increment(1.0);
        let Err(ended) = self.stream(&token).await;
        let farewell = match ended {
            Ended::ReaderGone => None,
            Ended::ShuttingDown => Some(Status::unavailable(
                "the gateway is shutting down: come back with your token",
            )),
            Ended::Revoked => Some(Status::permission_denied(
                "the authority has revoked this checker's certificate",
            )),
            Ended::Untold(error) => Some(error.into()),
        };
        if let Some(farewell) = farewell {
            // A reader that has gone meanwhile needs no farewell.
            self.messages.send(Err(farewell)).await.ok();
        }
        watchers.decrement(1.0);
    }

    async fn stream(&self, token: &Bytes) -> Result<std::convert::Infallible, Ended> {
        let mut heads = self.freshness.subscribe();
        let mut at = self.begin(token).await?;
        let mut entries = Vec::new();
        let mut send_after = Instant::now();
        loop {
            self.wait(sleep_until(send_after)).await?;
            // Each progress interval comes by here.
            if self.revocations.lists(&self.certificates) {
                return Err(Ended::Revoked);
            }
            let mut room = self.room_to_go_on(&mut at).await?;
            // First the head, then what belongs to it: a commit in between is told of again.
            heads.mark_unchanged();
            let mut message = Message::default();
            let (step, count) = match self.freshness.read_recent(&mut at.reader) {
                Some((commits, head)) => {
                    let count = self.forward(&commits, &mut message);
                    (Step::Level(head), count)
                }
                None => self.read(&mut at, &mut entries, &mut message),
            };
            self.metrics.freshness.entries_sent.increment(count);
            if count != 0 && step != Step::Behind {
                send_after = Instant::now() + gather(self.freshness.subscribers());
            }
            if let Some(snapshot_count) = &mut at.snapshot_count {
                *snapshot_count += count;
            }
            let mut notices = Vec::new();
            while !self.tell_notices(&mut at, &mut notices).await? {
                message.push(wire::encode(notices.drain(..)));
                room.send(Ok(std::mem::take(&mut message)));
                room = self.room().await?;
            }
            message.push(wire::encode(notices));
            message.push(wire::encode(self.say_how_far(&mut at, step)));
            if !message.is_empty() {
                room.send(Ok(message));
            } else if step == Step::Behind {
                tokio::task::yield_now().await;
            } else {
                drop(room);
                self.wait(news(&mut heads, at.progress_due)).await?;
            }
        }
    }

    /// Decides where the stream starts and says so.
    async fn begin(&self, token: &Bytes) -> Result<Progressing, Ended> {
        let head = self.freshness.head();
        // After position 0 comes everything, and that is a snapshot.
        let resume = (!token.is_empty())
            .then(|| self.tokens.read(token, self.scope, head.position))
            .filter(|read| *read != Ok(0))
            .map(|read| {
                let forgotten = self.notices.forgotten(self.checker);
                match read {
                    Ok(position) if position < forgotten => Err(Reason::MarkersGone),
                    read => read,
                }
            });
        let incarnation = self.tokens.incarnation();
        let position = resume.and_then(Result::ok).unwrap_or_default();
        let mut events = vec![Kind::Header(Header {
            incarnation,
            position,
        })];
        if let Some(Err(reason)) = resume {
            self.metrics.freshness.resets.of(label(reason)).increment(1);
            events.push(Kind::Reset(Reset {
                reason: reason.into(),
            }));
        }
        self.send(events).await?;
        let (told, reader, snapshot_count) = match resume {
            Some(Ok(position)) => (
                Notices::after(self.checker, position),
                self.freshness.reader_after(position),
                None,
            ),
            Some(Err(_)) | None => {
                let (told, position) = self
                    .notices
                    .told_from_start(self.checker, |user| self.may_tell(user));
                self.published(position).await?;
                let never_seen = self.say_who_was_never_seen().await?;
                (told, self.freshness.reader_from_start(), Some(never_seen))
            }
        };
        let now = Instant::now();
        Ok(Progressing {
            reader,
            told,
            snapshot_count,
            resolved_ms: 0,
            level_at: now,
            progress_due: now,
            lagging: None,
        })
    }

    /// Waits until what is on the bulletin is in the freshness as well: it is there a moment later.
    async fn published(&self, position: u64) -> Result<(), Ended> {
        let mut heads = self.freshness.subscribe();
        let published = heads.wait_for(|head| position <= head.position);
        self.wait(async { drop(published.await) }).await
    }

    /// Entries for the users that were asked for by name and of whom nothing is told. They come before the others,
    /// so that one who is first seen meanwhile ends as seen.
    async fn say_who_was_never_seen(&self) -> Result<u64, Ended> {
        let mut count = 0;
        for users in self.selector.users().chunks(ENTRIES_PER_MESSAGE) {
            let (glimpses, _) = self.freshness.get(self.number, users);
            let untold = users.iter().zip(&glimpses).filter(|(_, glimpse)| {
                let state = match glimpse {
                    Glimpse::NeverSeen => State::NeverSeen,
                    Glimpse::Withdrawn => State::Withdrawn,
                    Glimpse::Seen(_) => return false,
                };
                self.selector.wants_state(state)
            });
            let events: Vec<_> = untold
                .map(|(user, glimpse)| Kind::Entry(wire::glimpse(user, glimpse)))
                .collect();
            if !events.is_empty() {
                count += events.len() as u64;
                self.metrics
                    .freshness
                    .entries_sent
                    .increment(events.len() as u64);
                self.send(events).await?;
            }
        }
        Ok(count)
    }

    /// Passes on what commits changed, in words that all streams share. How many entries that is.
    fn forward(&self, commits: &[Arc<Commit>], message: &mut Message) -> u64 {
        let mut count = 0;
        for commit in commits {
            // Asked for only when something of it is wanted.
            let encoded = || commit.encoded(wire::encode_commit);
            if self.selector.wants_all() && commit.granted_by_all().contains(self.number) {
                count += commit.seen().len();
                message.push(encoded().bytes.clone());
                continue;
            }
            let mut selected = BytesMut::new();
            for (at, seen) in commit.seen().iter().enumerate() {
                if self.wants(seen) {
                    count += 1;
                    selected.extend_from_slice(encoded().of(at));
                }
            }
            message.push(selected.freeze());
        }
        count as u64
    }

    /// Reads a message's worth. How many entries that is.
    fn read(
        &self,
        at: &mut Progressing,
        entries: &mut Vec<Update>,
        message: &mut Message,
    ) -> (Step, u64) {
        let wanted = |seen: &LastSeen| self.wants(seen);
        let mut step = Step::Behind;
        for _ in 0..READS_PER_TURN {
            step = self.freshness.read(&mut at.reader, wanted, entries);
            if step != Step::Behind || ENTRIES_PER_MESSAGE <= entries.len() {
                break;
            }
        }
        let coalesced = entries.iter().map(|update| u64::from(update.coalesced));
        self.metrics.freshness.coalesced.increment(coalesced.sum());
        message.push(wire::encode(wire::updates(entries)));
        let count = entries.len() as u64;
        entries.clear();
        (step, count)
    }

    fn wants(&self, seen: &LastSeen) -> bool {
        seen.granted.contains(self.number)
            && self.selector.wants_state(wire::state(seen.sharing))
            && self.selector.wants_user(&seen.user)
    }

    /// Whether something may be told of a user beside entries.
    fn may_tell(&self, user: &UserId) -> bool {
        self.selector.wants_user(user) && {
            let granted = self.freshness.visibility(user).granted;
            granted.contains(self.number)
        }
    }

    /// Adds what is to be told before the next announcement, or a part of it. True if that was all.
    async fn tell_notices(
        &self,
        at: &mut Progressing,
        notices: &mut Vec<Kind>,
    ) -> Result<bool, Ended> {
        let upto = at.reader.settled();
        let is_all = self
            .notices
            .tell(&mut at.told, upto, |user| self.may_tell(user), notices)
            .await
            .map_err(Ended::Untold)?;
        let turns = at.told.take_turns();
        if let Some(last) = turns.last() {
            self.published(last.position).await?;
            self.tell_turns(at, &turns, notices);
        }
        Ok(is_all)
    }

    /// Adds what holders have turned, as far as it concerns this checker and still may be told.
    fn tell_turns(&self, at: &mut Progressing, turns: &[Transition], notices: &mut Vec<Kind>) {
        let mut entries = 0;
        let concerned = turns.iter().filter(|transition| {
            transition.checkers.contains(self.number) && self.selector.wants_user(&transition.user)
        });
        for transition in concerned {
            let (user, position) = (&transition.user, transition.position);
            let entry = match (transition.turn, self.freshness.glimpse(self.number, user)) {
                (Turn::Sharing(sharing), Glimpse::Seen(_)) => {
                    let state = wire::state(sharing);
                    notices.push(notices::transition_event(transition, state));
                    continue;
                }
                (Turn::Withdrawn, Glimpse::Withdrawn) => {
                    let state = State::Withdrawn;
                    notices.push(notices::transition_event(transition, state));
                    wire::untold(user, state, position)
                }
                // Whoever has changed since comes by that.
                (Turn::Granted, Glimpse::Seen(seen)) if seen.position < position => v1::Entry {
                    position,
                    ..wire::entry(&seen)
                },
                // What was not yet told has been taken back since.
                _ => continue,
            };
            if self.selector.wants_state(entry.state()) {
                entries += 1;
                notices.push(Kind::Entry(entry));
            }
        }
        self.metrics.freshness.entries_sent.increment(entries);
        if let Some(count) = &mut at.snapshot_count {
            *count += entries;
        }
    }

    /// What may be said after the entries of this step, and never before.
    fn say_how_far(&self, at: &mut Progressing, step: Step) -> Vec<Kind> {
        let mut events = Vec::new();
        let now = Instant::now();
        match step {
            Step::Level(Head { resolved_ms, .. }) => {
                at.resolved_ms = resolved_ms;
                at.level_at = now;
                at.lagging = None;
                if let Some(count) = at.snapshot_count.take() {
                    let position = at.reader.settled();
                    let token = self.tokens.issue(position, self.scope);
                    events.push(Kind::SnapshotEnd(SnapshotEnd {
                        count,
                        position,
                        token,
                    }));
                }
            }
            Step::Behind if at.level_at + self.progress_interval <= now => {
                self.lags(at);
                self.freshness.sweep(&mut at.reader);
            }
            Step::Behind => {}
        }
        if at.snapshot_count.is_none() && at.progress_due <= now {
            at.progress_due = now + self.progress_interval;
            let position = at.reader.settled();
            events.push(Kind::Progress(Progress {
                resolved_ms: at.resolved_ms,
                position,
                lag_ms: self.clock.now_ms().saturating_sub(at.resolved_ms),
                token: self.tokens.issue(position, self.scope),
            }));
        }
        events
    }

    async fn send(&self, events: Vec<Kind>) -> Result<(), Ended> {
        let mut message = Message::default();
        message.push(wire::encode(events));
        self.room().await?.send(Ok(message));
        Ok(())
    }

    async fn room(&self) -> Result<mpsc::Permit<'_, Result<Message, Status>>, Ended> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Ended::ShuttingDown),
            room = self.messages.reserve() => room.map_err(|_| Ended::ReaderGone),
        }
    }

    /// Waits for room for the next message. Whoever waits for long lags.
    async fn room_to_go_on(
        &self,
        at: &mut Progressing,
    ) -> Result<mpsc::Permit<'_, Result<Message, Status>>, Ended> {
        tokio::select! {
            biased;
            room = self.room() => return room,
            () = sleep_until(at.level_at + self.progress_interval) => {}
        }
        self.lags(at);
        self.room().await
    }

    fn lags(&self, at: &mut Progressing) {
        at.lagging
            .get_or_insert_with(|| Lagging::new(&self.metrics.freshness.lagging));
    }

    async fn wait(&self, until: impl Future<Output = ()>) -> Result<(), Ended> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Ended::ShuttingDown),
            // A stream without a reader gives its place back though there is nothing to send.
            () = self.messages.closed() => Err(Ended::ReaderGone),
            () = until => Ok(()),
        }
    }
}

/// How long entries gather for one message where so many streams are open.
fn gather(streams: usize) -> Duration {
    let streams = u32::try_from(streams).unwrap_or(u32::MAX);
    GATHER_PER_STREAM
        .saturating_mul(streams)
        .clamp(LEAST_GATHER, MOST_GATHER)
}

/// Waits for a new head, or until progress is due.
async fn news(heads: &mut watch::Receiver<Head>, progress_due: Instant) {
    tokio::select! {
        // An error means that nothing will be published any more; progress goes on saying so.
        Ok(()) = heads.changed() => {}
        () = sleep_until(progress_due) => {}
    }
}

fn label(reason: Reason) -> &'static str {
    match reason {
        Reason::Unspecified => "unspecified",
        Reason::OtherStore => "other_store",
        Reason::OtherSelector => "other_selector",
        Reason::BadToken => "bad_token",
        Reason::MarkersGone => "markers_gone",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_gather_for_longer_the_more_there_are_but_never_for_too_long() {
        assert_eq!([0, 1, 50].map(gather), [LEAST_GATHER; 3]);
        assert_eq!(gather(100), Duration::from_millis(2));
        assert_eq!([150, usize::MAX].map(gather), [MOST_GATHER; 2]);
    }
}
