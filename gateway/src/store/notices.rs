//! Coverage and deadlines in the store: their keys, their values, and how they are read back.
//!
//! Knows the layout of three families. Must not know when a span begins or who is late.
//!
//! # Families
//!
//! - `coverage`: `from | reason` → the rest of a span; and under one zero byte, which is no such key, what is
//!   forgotten of older ones.
//! - `deadlines`: `checker | user` → a deadline and whether the user is late; and under `checker` alone the newest
//!   event of it that is no longer kept.
//! - `deadline_events`: `checker | position | user` → an event.

use std::{ops::Range, sync::Arc};

use prost::Message;
use rocksdb::{
    BoundColumnFamily, DB, DBIteratorWithThreadMode, Direction, IteratorMode, PrefixRange,
};
use waypost_proto::id::UserId;

use super::{
    Batch, ReadError, Store, bad_key, bad_value,
    record::{self, RecordError},
    settings,
};
use crate::{
    bulletin::News,
    coverage::{self, Coverage, Forgotten, Reason, Span, SpanId},
    deadlines::{self, Checker, Event, Kind, Late, Registration, Setting},
};

pub(super) const COVERAGE: &str = "coverage";
pub(super) const DEADLINES: &str = "deadlines";
pub(super) const EVENTS: &str = "deadline_events";

const FORGOTTEN_SPANS_KEY: [u8; 1] = [0];
const SPAN_KEY_BYTES: usize = 8 + 1;
const CHECKER_BYTES: usize = 16;
const DEADLINE_KEY_BYTES: usize = CHECKER_BYTES + 16;
const EVENT_KEY_BYTES: usize = CHECKER_BYTES + 8 + 16;

/// A [`Span`] without its key. Field numbers are for ever, here and below.
#[derive(Clone, PartialEq, Message)]
struct SpanRow {
    /// Missing while it lasts.
    #[prost(uint64, optional, tag = "1")]
    until_ms: Option<u64>,
    #[prost(uint64, tag = "2")]
    position: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ForgottenRow {
    #[prost(uint64, tag = "1")]
    until_ms: u64,
    #[prost(uint64, tag = "2")]
    position: u64,
}

#[derive(Clone, PartialEq, Message)]
struct DeadlineRow {
    #[prost(uint64, tag = "1")]
    expect_every_ms: u64,
    #[prost(uint64, tag = "2")]
    grace_ms: u64,
    #[prost(uint64, tag = "3")]
    since_ms: u64,
    /// The position of the commit that called the user late; 0 while it is not, and then the rest is as well.
    #[prost(uint64, tag = "4")]
    late_position: u64,
    #[prost(uint64, tag = "5")]
    late_at_ms: u64,
    #[prost(uint64, tag = "6")]
    late_last_contact_ms: u64,
    #[prost(uint64, tag = "7")]
    late_due_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
struct EventRow {
    /// 1 is LATE, 2 is RECOVERED.
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint64, tag = "2")]
    at_ms: u64,
    #[prost(uint64, tag = "3")]
    last_contact_ms: u64,
    #[prost(uint64, tag = "4")]
    due_ms: u64,
}

/// All deadlines of a store, and for each checker the newest event that is no longer kept.
#[derive(Debug, Default)]
pub struct KeptDeadlines {
    /// By checker and user.
    pub registrations: Vec<Registration>,
    /// By checker.
    pub forgotten: Vec<(Checker, u64)>,
}

type Row = Result<(Box<[u8]>, Box<[u8]>), rocksdb::Error>;

impl Batch {
    /// Adds what a commit says beside pings.
    pub fn put_news(&mut self, news: &News) {
        if let Some(change) = &news.coverage {
            self.put_coverage(change);
        }
        self.put_deadlines(&news.deadlines);
        self.put_transitions(&news.transitions);
    }

    fn put_coverage(&mut self, change: &coverage::Change) {
        for span in &change.spans {
            let row = SpanRow {
                until_ms: span.until_ms,
                position: span.position,
            };
            self.put(COVERAGE, &span_key(span.id()), &row);
        }
        for &id in &change.gone {
            self.delete(COVERAGE, &span_key(id));
        }
        if !change.gone.is_empty() {
            let row = ForgottenRow {
                until_ms: change.forgotten.until_ms,
                position: change.forgotten.position,
            };
            self.put(COVERAGE, &FORGOTTEN_SPANS_KEY, &row);
        }
    }

    fn put_deadlines(&mut self, changes: &[deadlines::Change]) {
        for change in changes {
            match change {
                deadlines::Change::Set(registration) => {
                    let late = registration.late;
                    let row = DeadlineRow {
                        expect_every_ms: registration.setting.expect_every_ms,
                        grace_ms: registration.setting.grace_ms,
                        since_ms: registration.since_ms,
                        late_position: late.map_or(0, |late| late.position),
                        late_at_ms: late.map_or(0, |late| late.at_ms),
                        late_last_contact_ms: late.map_or(0, |late| late.last_contact_ms),
                        late_due_ms: late.map_or(0, |late| late.due_ms),
                    };
                    let key = deadline_key(registration.checker, registration.user);
                    self.put_of_user(DEADLINES, &key, &row);
                }
                deadlines::Change::Removed(checker, user) => {
                    self.delete(DEADLINES, &deadline_key(*checker, *user));
                }
                deadlines::Change::Event(event) => {
                    let row = EventRow {
                        kind: match event.kind {
                            Kind::Late => 1,
                            Kind::Recovered => 2,
                        },
                        at_ms: event.at_ms,
                        last_contact_ms: event.last_contact_ms,
                        due_ms: event.due_ms,
                    };
                    let key = event_key(event.checker, event.position, event.user);
                    self.put_of_user(EVENTS, &key, &row);
                }
            }
        }
    }

    /// Deletes a checker's events up to a position, and says so.
    pub fn forget_events(&mut self, checker: Checker, upto: u64) {
        let row = ForgottenRow {
            until_ms: 0,
            position: upto,
        };
        self.put(DEADLINES, &checker.0, &row);
        let lowest = UserId([0; 16]);
        let first = event_key(checker, 0, lowest);
        let end = event_key(checker, upto.saturating_add(1), lowest);
        self.delete_range(EVENTS, &first..&end);
    }
}

impl Store {
    /// When the gateway could not hear.
    ///
    /// # Errors
    /// When a span cannot be read: silence could not be told from blindness.
    pub fn load_coverage(&self) -> Result<Coverage, ReadError> {
        let mut spans = Vec::new();
        let mut forgotten = Forgotten::default();
        for row in self.scan(&self.family(COVERAGE), None) {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            let bad_value = |source| bad_value(COVERAGE, &key, source);
            if *key == FORGOTTEN_SPANS_KEY {
                let row: ForgottenRow = record::decode_row(&value).map_err(bad_value)?;
                forgotten = Forgotten {
                    until_ms: row.until_ms,
                    position: row.position,
                };
                continue;
            }
            let id = span_id(&key).ok_or_else(|| bad_key(COVERAGE, &key))?;
            let row: SpanRow = record::decode_row(&value).map_err(bad_value)?;
            spans.push(Span {
                from_ms: id.from_ms,
                until_ms: row.until_ms,
                reason: id.reason,
                position: row.position,
            });
        }
        Ok(Coverage::restore(spans, forgotten))
    }

    /// All deadlines.
    ///
    /// # Errors
    /// When one cannot be read: somebody would be missed by nobody.
    pub fn load_deadlines(&self) -> Result<KeptDeadlines, ReadError> {
        let mut kept = KeptDeadlines::default();
        for row in self.scan(&self.family(DEADLINES), None) {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            if let Ok(checker) = <[u8; CHECKER_BYTES]>::try_from(&*key) {
                let row: ForgottenRow = record::decode_row(&value)
                    .map_err(|source| bad_value(DEADLINES, &key, source))?;
                kept.forgotten.push((Checker(checker), row.position));
                continue;
            }
            let (checker, user) = deadline_of(&key)?;
            let registration = self.registration(checker, user, &key, &value);
            if let Some(registration) = self.unless_erased(registration) {
                kept.registrations.push(registration?);
            }
        }
        Ok(kept)
    }

    /// Which checker expects whom. No row is opened.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn expected(&self) -> Result<Vec<(Checker, UserId)>, ReadError> {
        let mut expected = Vec::new();
        for row in self.scan(&self.family(DEADLINES), None) {
            let (key, _) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            // Under a checker alone is what is no longer kept.
            if key.len() != CHECKER_BYTES {
                expected.push(deadline_of(&key)?);
            }
        }
        Ok(expected)
    }

    /// All events, by checker and position.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn events(&self) -> impl Iterator<Item = Result<Event, ReadError>> {
        let rows = self.scan(&self.family(EVENTS), None);
        rows.filter_map(|row| self.event(row))
    }

    /// A checker's deadlines after a user, by user, at most `limit`.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn deadlines_of(
        &self,
        checker: Checker,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<Vec<Registration>, ReadError> {
        let mut first = deadline_key(checker, after.unwrap_or(UserId([0; 16]))).to_vec();
        if after.is_some() {
            // The key that comes next in the order of bytes.
            first.push(0);
        }
        let rows = self.rows_from(&self.family(DEADLINES), &first, &checker.0);
        let registrations = rows.map(|row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            let (checker, user) = deadline_of(&key)?;
            self.registration(checker, user, &key, &value)
        });
        let registrations = registrations.filter_map(|read| self.unless_erased(read));
        registrations.take(limit).collect()
    }

    /// A checker's events at the positions in a range, by position, at most `limit`, and those of one position
    /// always together.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn events_of(
        &self,
        checker: Checker,
        positions: Range<u64>,
        limit: usize,
    ) -> Result<Vec<Event>, ReadError> {
        let first = event_key(checker, positions.start, UserId([0; 16]));
        let mut events: Vec<Event> = Vec::new();
        let rows = self.rows_from(&self.family(EVENTS), &first, &checker.0);
        for event in rows.filter_map(|row| self.event(row)) {
            let event = event?;
            let is_of_next = events
                .last()
                .is_none_or(|last| last.position < event.position);
            if positions.end <= event.position || (limit <= events.len() && is_of_next) {
                break;
            }
            events.push(event);
        }
        Ok(events)
    }

    /// For each checker that has events of before a moment, the newest position of those.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn events_before(&self, moment_ms: u64) -> Result<Vec<(Checker, u64)>, ReadError> {
        let mut found = Vec::new();
        let mut next = Some(Checker([0; CHECKER_BYTES]));
        while let Some(from) = next {
            let Some(first) = self.first_event(&event_key(from, 0, UserId([0; 16])))? else {
                break;
            };
            let checker = first.checker;
            let old = newest_before(first.position, moment_ms, |from| {
                let event = self.first_event(&event_key(checker, from, UserId([0; 16])))?;
                let event = event.filter(|event| event.checker == checker);
                Ok(event.map(|event| (event.position, event.at_ms)))
            })?;
            found.extend(old.map(|old| (checker, old)));
            next = after(checker);
        }
        Ok(found)
    }

    fn first_event(&self, from: &[u8]) -> Result<Option<Event>, ReadError> {
        let family = self.family(EVENTS);
        let mode = IteratorMode::From(from, Direction::Forward);
        let rows = self.db.iterator_cf(&family, mode);
        rows.filter_map(|row| self.event(row)).next().transpose()
    }

    /// Reads a row of events; none for one of a user who was erased.
    fn event(&self, row: Row) -> Option<Result<Event, ReadError>> {
        let read = || {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            let (checker, position, user) = event_of(&key)?;
            let value = self.opened(EVENTS, user, &key, &value)?;
            event(&key, checker, position, user, &value)
        };
        self.unless_erased(read())
    }

    /// Reads a row of deadlines; none for one of another user.
    pub(super) fn registration_of(
        &self,
        key: &[u8],
        value: &[u8],
        of: UserId,
    ) -> Result<Option<Registration>, ReadError> {
        if key.len() == CHECKER_BYTES {
            return Ok(None);
        }
        let (checker, user) = deadline_of(key)?;
        let is_wanted = (user == of).then(|| self.registration(checker, user, key, value));
        is_wanted.transpose()
    }

    /// Reads a row of events; none for one of another user.
    pub(super) fn event_of_user(
        &self,
        key: &[u8],
        value: &[u8],
        of: UserId,
    ) -> Result<Option<Event>, ReadError> {
        let (checker, position, user) = event_of(key)?;
        if user != of {
            return Ok(None);
        }
        let value = self.opened(EVENTS, user, key, value)?;
        event(key, checker, position, user, &value).map(Some)
    }

    fn registration(
        &self,
        checker: Checker,
        user: UserId,
        key: &[u8],
        value: &[u8],
    ) -> Result<Registration, ReadError> {
        let value = self.opened(DEADLINES, user, key, value)?;
        registration(key, checker, user, &value)
    }

    /// The rows from a key on that begin with a prefix.
    fn rows_from(
        &self,
        family: &Arc<BoundColumnFamily<'_>>,
        first: &[u8],
        prefix: &[u8],
    ) -> DBIteratorWithThreadMode<'_, DB> {
        let mut options = settings::scan();
        options.set_iterate_range(PrefixRange(prefix));
        self.db.iterator_cf_opt(
            family,
            options,
            IteratorMode::From(first, Direction::Forward),
        )
    }
}

/// The newest position of before a moment, among those from `first` on. `from` gives the first position at or beyond
/// another, and its moment.
pub(super) fn newest_before(
    first: u64,
    moment_ms: u64,
    from: impl Fn(u64) -> Result<Option<(u64, u64)>, ReadError>,
) -> Result<Option<u64>, ReadError> {
    // Positions and moments ascend together.
    let (mut old, mut young) = (None, u64::MAX);
    let mut probe = first;
    loop {
        match from(probe)? {
            Some((position, at_ms)) if at_ms < moment_ms => old = Some(position),
            _ => young = probe,
        }
        let low = old.map_or(first, |old| old + 1);
        if young <= low {
            return Ok(old);
        }
        // Doubling first, so that the search does not depend on how large a position could be.
        probe = if young == u64::MAX {
            low + (low - first)
        } else {
            low + (young - low) / 2
        };
    }
}

fn span_key(id: SpanId) -> [u8; SPAN_KEY_BYTES] {
    let mut key = [0; SPAN_KEY_BYTES];
    key[..8].copy_from_slice(&id.from_ms.to_be_bytes());
    key[8] = match id.reason {
        Reason::Down => 1,
        Reason::Starting => 2,
        Reason::Overloaded => 3,
        Reason::DiskFailed => 4,
        Reason::ClockStepped => 5,
    };
    key
}

fn span_id(key: &[u8]) -> Option<SpanId> {
    let (from_ms, reason) = key.split_first_chunk()?;
    let reason = match reason {
        [1] => Reason::Down,
        [2] => Reason::Starting,
        [3] => Reason::Overloaded,
        [4] => Reason::DiskFailed,
        [5] => Reason::ClockStepped,
        _ => return None,
    };
    Some(SpanId {
        from_ms: u64::from_be_bytes(*from_ms),
        reason,
    })
}

pub(super) fn deadline_key(checker: Checker, user: UserId) -> [u8; DEADLINE_KEY_BYTES] {
    let mut key = [0; DEADLINE_KEY_BYTES];
    key[..CHECKER_BYTES].copy_from_slice(&checker.0);
    key[CHECKER_BYTES..].copy_from_slice(&user.0);
    key
}

fn event_key(checker: Checker, position: u64, user: UserId) -> [u8; EVENT_KEY_BYTES] {
    let mut key = [0; EVENT_KEY_BYTES];
    key[..CHECKER_BYTES].copy_from_slice(&checker.0);
    key[CHECKER_BYTES..CHECKER_BYTES + 8].copy_from_slice(&position.to_be_bytes());
    key[CHECKER_BYTES + 8..].copy_from_slice(&user.0);
    key
}

/// The checker that comes next in the order of keys; none after the last.
fn after(checker: Checker) -> Option<Checker> {
    u128::from_be_bytes(checker.0)
        .checked_add(1)
        .map(|next| Checker(next.to_be_bytes()))
}

/// Whose deadline it is, and of whom.
fn deadline_of(key: &[u8]) -> Result<(Checker, UserId), ReadError> {
    key.split_first_chunk()
        .and_then(|(checker, user)| Some((Checker(*checker), UserId(user.try_into().ok()?))))
        .ok_or_else(|| bad_key(DEADLINES, key))
}

fn registration(
    key: &[u8],
    checker: Checker,
    user: UserId,
    value: &[u8],
) -> Result<Registration, ReadError> {
    let row: DeadlineRow =
        record::decode_row(value).map_err(|source| bad_value(DEADLINES, key, source))?;
    let late = (row.late_position != 0).then_some(Late {
        position: row.late_position,
        at_ms: row.late_at_ms,
        last_contact_ms: row.late_last_contact_ms,
        due_ms: row.late_due_ms,
    });
    Ok(Registration {
        checker,
        user,
        setting: Setting {
            expect_every_ms: row.expect_every_ms,
            grace_ms: row.grace_ms,
        },
        since_ms: row.since_ms,
        late,
    })
}

/// Who is told of it, by which commit it is known, and of whom it is.
fn event_of(key: &[u8]) -> Result<(Checker, u64, UserId), ReadError> {
    key.split_first_chunk()
        .and_then(|(checker, rest)| {
            let (position, user) = rest.split_first_chunk()?;
            Some((
                Checker(*checker),
                u64::from_be_bytes(*position),
                UserId(user.try_into().ok()?),
            ))
        })
        .ok_or_else(|| bad_key(EVENTS, key))
}

fn event(
    key: &[u8],
    checker: Checker,
    position: u64,
    user: UserId,
    value: &[u8],
) -> Result<Event, ReadError> {
    let bad_value = |source| bad_value(EVENTS, key, source);
    let row: EventRow = record::decode_row(value).map_err(bad_value)?;
    let kind = match row.kind {
        1 => Kind::Late,
        2 => Kind::Recovered,
        _ => return Err(bad_value(RecordError::Malformed)),
    };
    Ok(Event {
        checker,
        user,
        kind,
        position,
        at_ms: row.at_ms,
        last_contact_ms: row.last_contact_ms,
        due_ms: row.due_ms,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{coverage::MOST_SPANS, store::StoreConfig};

    const NOON_MS: u64 = 1_767_268_800_000;

    fn open(data_dir: &Path) -> Store {
        Store::open(data_dir, &StoreConfig::default(), NOON_MS).unwrap()
    }

    fn checker(n: u8) -> Checker {
        Checker([n; CHECKER_BYTES])
    }

    fn user(n: u8) -> UserId {
        UserId([n; 16])
    }

    fn event_at(n: u8, position: u64) -> Event {
        Event {
            checker: checker(n),
            user: user(7),
            kind: if position.is_multiple_of(2) {
                Kind::Recovered
            } else {
                Kind::Late
            },
            position,
            at_ms: NOON_MS + 10 * position,
            last_contact_ms: NOON_MS,
            due_ms: NOON_MS + 5,
        }
    }

    fn commit(store: &Store, news: &News) {
        let mut batch = store.batch();
        batch.put_news(news);
        store.commit(batch).unwrap();
    }

    fn say(store: &Store, deadlines: Vec<deadlines::Change>) {
        let news = News {
            deadlines,
            ..News::default()
        };
        commit(store, &news);
    }

    #[test]
    fn spans_come_back_with_what_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let mut kept = store.load_coverage().unwrap();
        let most = MOST_SPANS as u64;
        let mut say = |store: &Store, spans: Vec<Span>| {
            let change = kept.change(spans);
            let news = News {
                coverage: Some(change.clone()),
                ..News::default()
            };
            commit(store, &news);
            kept.apply(&change);
        };
        let span = |number: u64, until_ms| Span {
            from_ms: NOON_MS + 10 * number,
            until_ms,
            reason: Reason::ALL[usize::try_from(number).unwrap() % Reason::ALL.len()],
            position: number,
        };
        let ended = |number| span(number, Some(NOON_MS + 10 * number + 3));
        say(&store, (1..=most).map(ended).collect());
        say(&store, vec![span(most + 1, None), span(most + 2, None)]);
        say(&store, vec![ended(most + 1)]);
        drop(store);
        let back = open(folder.path()).load_coverage().unwrap();
        assert_eq!(
            back.said_between(0, u64::MAX),
            kept.said_between(0, u64::MAX)
        );
        assert_eq!(back.forgotten(), kept.forgotten());
        assert_eq!(back.forgotten().position, 2);
        assert_eq!(back.lasting().collect::<Vec<_>>(), [span(most + 2, None)]);
    }

    #[test]
    fn deadlines_come_back_as_they_were_set_last() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let set = |n, m, late| Registration {
            checker: checker(n),
            user: user(m),
            setting: Setting {
                expect_every_ms: 60_000,
                grace_ms: 1,
            },
            since_ms: NOON_MS,
            late,
        };
        let late = Some(Late {
            position: 9,
            at_ms: NOON_MS + 3,
            last_contact_ms: 0,
            due_ms: NOON_MS + 2,
        });
        let rows = [
            set(1, 1, None),
            set(1, 2, late),
            set(1, 3, None),
            set(2, 1, None),
        ];
        say(&store, rows.map(deadlines::Change::Set).into());
        say(
            &store,
            vec![
                deadlines::Change::Removed(checker(1), user(3)),
                deadlines::Change::Set(set(2, 1, late)),
            ],
        );
        let mut batch = store.batch();
        batch.forget_events(checker(1), 44);
        store.commit(batch).unwrap();
        drop(store);
        let store = open(folder.path());
        let kept = store.load_deadlines().unwrap();
        assert_eq!(kept.registrations, [rows[0], rows[1], set(2, 1, late)]);
        assert_eq!(kept.forgotten, [(checker(1), 44)]);
        let page = |after, limit| store.deadlines_of(checker(1), after, limit).unwrap();
        assert_eq!(page(None, 1), [rows[0]]);
        assert_eq!(page(Some(user(1)), 10), [rows[1]]);
        assert_eq!(page(Some(user(2)), 10), []);
    }

    #[test]
    fn events_are_read_by_position_and_never_in_the_midst_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let mut of_one: Vec<_> = (1..=20).map(|position| event_at(1, position)).collect();
        // Three users in one commit.
        for n in [8, 9] {
            of_one.push(Event {
                user: user(n),
                ..event_at(1, 20)
            });
        }
        let events = of_one.iter().copied().chain([event_at(2, 5)]);
        say(&store, events.map(deadlines::Change::Event).collect());
        let read = |positions, limit| store.events_of(checker(1), positions, limit).unwrap();
        assert_eq!(read(0..u64::MAX, 100), of_one);
        assert_eq!(read(3..8, 100), of_one[2..7]);
        assert_eq!(read(19..21, 2), of_one[18..], "a commit as a whole");
        assert_eq!(read(5..21, 3), of_one[4..7]);
        assert_eq!(store.events_of(checker(3), 0..u64::MAX, 9).unwrap(), []);
    }

    #[test]
    fn old_events_are_found_and_deleted_for_each_checker_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let positions = |n: u8| (u64::from(n)..1_000).step_by(3 * usize::from(n));
        let events = (1..=3).flat_map(|n| positions(n).map(move |at| event_at(n, at)));
        say(&store, events.map(deadlines::Change::Event).collect());
        say(&store, vec![deadlines::Change::Event(event_at(0xff, 999))]);
        for moment in [0, 1, 2, 3, 4, 500, 998, 999, 1_000, 5_000] {
            let expected: Vec<_> = [1, 2, 3, 0xff]
                .into_iter()
                .filter_map(|n| {
                    let before = |&position: &u64| position < moment;
                    let newest = if n == 0xff {
                        Some(999).filter(before)
                    } else {
                        positions(n).filter(before).max()
                    };
                    Some((checker(n), newest?))
                })
                .collect();
            let found = store.events_before(NOON_MS + 10 * moment).unwrap();
            assert_eq!(found, expected, "before {moment}");
        }
        let mut batch = store.batch();
        for (checker, upto) in store.events_before(NOON_MS + 5_000).unwrap() {
            batch.forget_events(checker, upto);
        }
        store.commit(batch).unwrap();
        for n in 1..=3 {
            let kept = store
                .events_of(checker(n), 0..u64::MAX, usize::MAX)
                .unwrap();
            let expected: Vec<_> = positions(n)
                .filter(|&position| 500 <= position)
                .map(|position| event_at(n, position))
                .collect();
            assert_eq!(kept, expected);
        }
        assert_eq!(store.events_before(NOON_MS + 5_000).unwrap(), []);
    }
}
