//! Who has paused or erased everything, and each change of that, in the store: keys, values, and how they are read back.
//!
//! Knows the layout of two families, and where in all families a user's rows are. Must not know when anybody may pause or
//! erase, or what checkers make of it.
//!
//! # Families
//!
//! - `users`: `user` → what holds for all devices of a user. There is a row while the holder has paused, and for ever
//!   once everything was erased: it is the fence.
//! - `transitions`: `position | number within the commit | user` → a transition; and under one zero byte, which is no such
//!   key, the newest one that is no longer kept. Before transitions were sealed the user was in the value.
//!
//! The fence and the transition that says it are in clear, since there is no key any more; so whatever is sealed is
//! neither.

use std::{collections::BTreeSet, io, ops::Range};

use prost::Message;
use rocksdb::{BottommostLevelCompaction, CompactOptions, Direction, IteratorMode};
use waypost_proto::id::UserId;

use super::{
    Batch, DEVICES, Family, ReadError, Store, bad_key, bad_value,
    grants::GRANTS,
    keys, notices,
    record::{self, RecordError},
    sealed,
};
use crate::{
    erase::{Counts, Erasure},
    grants::CheckerSet,
    sharing::{Sharing, Transition, Turn, Withheld},
};

pub(super) const USERS: &str = "users";
pub(super) const TRANSITIONS: &str = "transitions";

const FORGOTTEN_KEY: [u8; 1] = [0];
/// What orders transitions: a key without its user.
const TRANSITION_ORDER_BYTES: usize = 8 + 4;
const USER_BYTES: usize = 16;
const TRANSITION_KEY_BYTES: usize = TRANSITION_ORDER_BYTES + USER_BYTES;

/// What is kept of a user. Field numbers are for ever, here and below.
#[derive(Clone, PartialEq, Message)]
struct UserRow {
    #[prost(uint64, tag = "1")]
    paused_position: u64,
    #[prost(uint64, tag = "2")]
    paused_since_ms: u64,
    /// 0 as long as nothing was erased; then the pause is 0.
    #[prost(uint64, tag = "3")]
    erased_position: u64,
    #[prost(uint64, tag = "4")]
    erased_since_ms: u64,
    /// Missing until it was counted what there is to remove.
    #[prost(message, optional, tag = "5")]
    counts: Option<CountsRow>,
    /// 0 until nothing was left.
    #[prost(uint64, tag = "6")]
    finished_ms: u64,
    /// Of an erasure: a bit for each checker that is told of it.
    #[prost(fixed64, tag = "7")]
    told: u64,
}

#[derive(Clone, PartialEq, Message)]
struct CountsRow {
    #[prost(uint64, tag = "1")]
    devices: u64,
    #[prost(uint64, tag = "2")]
    pings: u64,
    #[prost(uint64, tag = "3")]
    events: u64,
}

#[derive(Clone, PartialEq, Message)]
struct TransitionRow {
    /// Where it is not in the key.
    #[prost(bytes = "vec", tag = "1")]
    user: Vec<u8>,
    /// 1 is active, 2 is paused, 3 is erased, as `State` in `freshness.proto`; 4 is granted, 5 is withdrawn.
    #[prost(uint32, tag = "2")]
    to: u32,
    #[prost(uint64, tag = "3")]
    at_ms: u64,
    /// A bit for each checker that it concerns.
    #[prost(fixed64, tag = "4")]
    checkers: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ForgottenRow {
    #[prost(uint64, tag = "1")]
    position: u64,
}

/// A transition's value says this, and is in clear.
const TO_ERASED: u32 = 3;

/// How many users do not share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WithheldCounts {
    /// Users who have paused.
    pub paused: u64,
    /// Users who have erased everything.
    pub erased: u64,
}

/// Who does not share, as a store has it.
#[derive(Debug, Default)]
pub struct KeptHolders {
    /// Those who have paused or erased everything.
    pub withheld: Vec<(UserId, Withheld)>,
    /// How far each erasure has come.
    pub erasures: Vec<(UserId, Erasure)>,
    /// The newest transition that is no longer kept; 0 for none.
    pub forgotten: u64,
}

impl Batch {
    /// Adds the transitions of one commit, in the order in which they came to be.
    pub(super) fn put_transitions(&mut self, transitions: &[Transition]) {
        for transition in transitions {
            match transition.turn {
                Turn::Granted | Turn::Withdrawn => {}
                Turn::Sharing(Sharing::Paused) => {
                    let row = UserRow {
                        paused_position: transition.position,
                        paused_since_ms: transition.at_ms,
                        ..UserRow::default()
                    };
                    self.put_of_user(USERS, &transition.user.0, &row);
                }
                Turn::Sharing(Sharing::Active) => self.delete(USERS, &transition.user.0),
                Turn::Sharing(Sharing::Erased) => {
                    self.put_erasure(transition.user, &Erasure::begun_by(transition));
                }
            }
            let row = TransitionRow {
                user: Vec::new(),
                to: match transition.turn {
                    Turn::Sharing(Sharing::Active) => 1,
                    Turn::Sharing(Sharing::Paused) => 2,
                    Turn::Sharing(Sharing::Erased) => TO_ERASED,
                    Turn::Granted => 4,
                    Turn::Withdrawn => 5,
                },
                at_ms: transition.at_ms,
                checkers: transition.checkers.bits(),
            };
            let order = transition_order(transition.position, transition.number);
            let key = [&order[..], &transition.user.0].concat();
            match row.to {
                TO_ERASED => self.put(TRANSITIONS, &key, &row),
                _ => self.put_of_user(TRANSITIONS, &key, &row),
            }
        }
    }

    /// Notes how far an erasure has come.
    pub fn put_erasure(&mut self, user: UserId, erasure: &Erasure) {
        let row = UserRow {
            erased_position: erasure.position,
            erased_since_ms: erasure.fenced_ms,
            counts: erasure.counts.map(|counts| CountsRow {
                devices: counts.devices,
                pings: counts.pings,
                events: counts.events,
            }),
            finished_ms: erasure.finished_ms.unwrap_or_default(),
            told: erasure.told.bits(),
            ..UserRow::default()
        };
        self.put(USERS, &user.0, &row);
    }

    /// Deletes a user's devices and pings, and these events of the user.
    pub fn delete_user(&mut self, user: UserId, days: &[keys::Day], events: &UserEvents) {
        let (first, end) = keys::user_range(user);
        self.delete_range_of(Family::Devices, &first..&end);
        for &day in days {
            self.delete_range_of(Family::Day(day), &first..&end);
        }
        for (family, key) in &events.0 {
            self.delete(family, key);
        }
    }

    /// Deletes the transitions up to a position, and says so.
    pub fn forget_transitions(&mut self, upto: u64) {
        self.put(
            TRANSITIONS,
            &FORGOTTEN_KEY,
            &ForgottenRow { position: upto },
        );
        let (first, end) = (
            transition_order(0, 0),
            transition_order(upto.saturating_add(1), 0),
        );
        self.delete_range(TRANSITIONS, &first..&end);
    }
}

impl Store {
    /// Who has paused.
    ///
    /// # Errors
    /// When a row cannot be read: somebody would be called silent who is not.
    pub fn load_holders(&self) -> Result<KeptHolders, ReadError> {
        let mut kept = KeptHolders::default();
        for row in self.scan(&self.family(USERS), None) {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            let user = <[u8; USER_BYTES]>::try_from(&*key).map_err(|_| bad_key(USERS, &key))?;
            let user = UserId(user);
            let Some(read) = self.unless_erased(self.withheld(user, &value)) else {
                continue;
            };
            let (withheld, erasure) = read?;
            kept.withheld.push((user, withheld));
            kept.erasures.extend(erasure.map(|erasure| (user, erasure)));
        }
        let family = self.family(TRANSITIONS);
        let forgotten = self
            .db
            .get_cf(&family, FORGOTTEN_KEY)
            .map_err(|error| ReadError::RocksDb(error.into_string()))?;
        if let Some(value) = forgotten {
            let row: ForgottenRow = record::decode_row(&value)
                .map_err(|source| bad_value(TRANSITIONS, &FORGOTTEN_KEY, source))?;
            kept.forgotten = row.position;
        }
        Ok(kept)
    }

    /// Whose erasure has begun.
    pub(super) fn fenced(&self) -> Result<BTreeSet<UserId>, ReadError> {
        let mut fenced = BTreeSet::new();
        for row in self.scan(&self.family(USERS), None) {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            if !sealed::is_sealed(&value) && withheld(&key, &value)?.1.is_some() {
                fenced.extend(sealed::first_user(&key));
            }
        }
        Ok(fenced)
    }

    /// How one user does not share; none of one who does.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn withheld_of(&self, user: UserId) -> Result<Option<Withheld>, ReadError> {
        let row = self.db.get_cf(&self.family(USERS), user.0);
        let row = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
        let read = row.map(|value| Ok(self.withheld(user, &value)?.0));
        read.transpose()
    }

    /// How many users have paused or erased everything. No row is opened.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn count_withheld(&self) -> Result<WithheldCounts, ReadError> {
        let mut counts = WithheldCounts::default();
        for row in self.scan(&self.family(USERS), None) {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            match sealed::is_sealed(&value) || withheld(&key, &value)?.1.is_none() {
                true => counts.paused += 1,
                false => counts.erased += 1,
            }
        }
        Ok(counts)
    }

    /// How one user does not share, by the value of the row of users, and how far the erasure has come, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn withheld(
        &self,
        user: UserId,
        value: &[u8],
    ) -> Result<(Withheld, Option<Erasure>), ReadError> {
        withheld(&user.0, &self.opened(USERS, user, &user.0, value)?)
    }

    /// The transitions at the positions in a range, in order, at most `limit`, and those of one position always
    /// together.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn transitions(
        &self,
        positions: Range<u64>,
        limit: usize,
    ) -> Result<Vec<Transition>, ReadError> {
        let mut found: Vec<Transition> = Vec::new();
        let mut next = self.transitions_from(positions.start);
        while let Some(transition) = next.next().transpose()? {
            let is_of_next = found
                .last()
                .is_none_or(|last| last.position < transition.position);
            if positions.end <= transition.position || (limit <= found.len() && is_of_next) {
                break;
            }
            found.push(transition);
        }
        Ok(found)
    }

    /// The newest position of a transition of before a moment; none if there is no such transition.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn newest_transition_before(&self, moment_ms: u64) -> Result<Option<u64>, ReadError> {
        let first = |from| {
            let transition = self.transitions_from(from).next().transpose()?;
            Ok(transition.map(|transition| (transition.position, transition.at_ms)))
        };
        match first(0)? {
            None => Ok(None),
            Some((oldest, _)) => notices::newest_before(oldest, moment_ms, first),
        }
    }

    /// How much there is of a user: devices and pings. A row of pings that is sealed with a key that is gone counts as one
    /// ping; there is at least one in it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn count_user(&self, user: UserId) -> Result<Counts, ReadError> {
        let mut counts = Counts::default();
        for device in self.device_ids_of(user) {
            device?;
            counts.devices += 1;
        }
        for row in self.rows_of(user) {
            counts.pings += match row {
                Err(ReadError::Sealed { .. }) => 1,
                row => row?.record.pings.len() as u64,
            };
        }
        Ok(counts)
    }

    /// The events that checkers were told of a user, but for the one that says that everything was erased, what was decided
    /// of checkers, and what they expect. Looks at the events of all users.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn events_of_user(&self, user: UserId) -> Result<UserEvents, ReadError> {
        let mut events = UserEvents(Vec::new());
        if self.has_decisions(user)? {
            events.0.push((GRANTS, user.0.to_vec()));
        }
        // The fence has removed them; this is for what may have come otherwise.
        let deadlines = self.expected()?.into_iter();
        let of_user = deadlines.filter(|(_, expected)| *expected == user);
        let keys = of_user.map(|(checker, user)| notices::deadline_key(checker, user).into());
        events.0.extend(keys.map(|key| (notices::DEADLINES, key)));
        for row in self.scan(&self.family(notices::EVENTS), None) {
            let (key, _) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            if key.ends_with(&user.0) {
                events.0.push((notices::EVENTS, key.into()));
            }
        }
        for row in self.scan(&self.family(TRANSITIONS), None) {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            if *key == FORGOTTEN_KEY || transition_user(&key, &value)? != user {
                continue;
            }
            let erased = Turn::Sharing(Sharing::Erased);
            if sealed::is_sealed(&value) || transition(&key, user, &value)?.turn != erased {
                events.0.push((TRANSITIONS, key.into()));
            }
        }
        Ok(events)
    }

    /// Makes what was deleted of a user go from the files as well: all that is in memory is written to tables, so that
    /// the log is not needed any more, the tables in which rows of the user could be are written anew, and copies of the
    /// log from before a recovery and what is left of a backup are removed.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn purge_user(&self, user: UserId) -> io::Result<()> {
        let failed = |error: rocksdb::Error| io::Error::other(error.into_string());
        self.flush(true).map_err(failed)?;

        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        let (first, end) = keys::user_range(user);
        let days = self.days().into_iter();
        let days = days.filter_map(|day| self.db.cf_handle(&day.family_name()));
        for family in [self.family(DEVICES)].into_iter().chain(days) {
            self.db
                .compact_range_cf_opt(&family, Some(&first), Some(&end), &options);
        }
        self.rewrite(&[
            USERS,
            GRANTS,
            TRANSITIONS,
            notices::DEADLINES,
            notices::EVENTS,
        ]);
        self.folder.drop_abandoned_checkpoint()?;
        self.folder
            .drop_recoveries_before(keys::Day::of_ms(u64::MAX))
    }

    /// Makes events that were forgotten go from the files as well, and from the log.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn purge_events(&self) -> io::Result<()> {
        self.flush(true)
            .map_err(|error| io::Error::other(error.into_string()))?;
        self.rewrite(&[TRANSITIONS, notices::EVENTS]);
        Ok(())
    }

    /// Writes all tables of these families anew.
    fn rewrite(&self, families: &[&str]) {
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for name in families {
            let everything = None::<&[u8]>;
            self.db
                .compact_range_cf_opt(&self.family(name), everything, everything, &options);
        }
    }

    /// Has what [`Self::purge_user`] does end soon, undone. Nothing is compacted any more until the store is opened
    /// again.
    pub fn stop_compactions(&self) {
        self.db.cancel_all_background_work(false);
    }

    fn transitions_from(
        &self,
        position: u64,
    ) -> impl Iterator<Item = Result<Transition, ReadError>> {
        let order = transition_order(position, 0);
        let mode = IteratorMode::From(&order, Direction::Forward);
        let rows = self.db.iterator_cf(&self.family(TRANSITIONS), mode);
        rows.map(|row| {
            let (key, value) = row.map_err(|error| ReadError::RocksDb(error.into_string()))?;
            self.transition_row(&key, &value, None)
        })
        .filter_map(Result::transpose)
        .filter_map(|transition| self.unless_erased(transition))
    }

    /// Reads a row of transitions; none for one of another user than `of`, and for the row that says what is no longer
    /// kept.
    pub(super) fn transition_row(
        &self,
        key: &[u8],
        value: &[u8],
        of: Option<UserId>,
    ) -> Result<Option<Transition>, ReadError> {
        if *key == FORGOTTEN_KEY {
            return Ok(None);
        }
        let user = transition_user(key, value)?;
        if of.is_some_and(|of| of != user) {
            return Ok(None);
        }
        let value = self.opened(TRANSITIONS, user, key, value)?;
        transition(key, user, &value).map(Some)
    }
}

/// Reads a row of users: how the user does not share, and how far its erasure has come, if there is one.
fn withheld(key: &[u8], value: &[u8]) -> Result<(Withheld, Option<Erasure>), ReadError> {
    let row: UserRow = record::decode_row(value).map_err(|source| bad_value(USERS, key, source))?;
    if row.erased_position == 0 {
        let paused = Withheld {
            sharing: Sharing::Paused,
            position: row.paused_position,
            since_ms: row.paused_since_ms,
            told: CheckerSet::default(),
        };
        return Ok((paused, None));
    }
    let erased = Withheld {
        sharing: Sharing::Erased,
        position: row.erased_position,
        since_ms: row.erased_since_ms,
        told: CheckerSet::from_bits(row.told),
    };
    Ok((erased, Some(erasure(&row))))
}

/// The keys of the events of one user.
#[derive(Debug, PartialEq, Eq)]
pub struct UserEvents(Vec<(&'static str, Vec<u8>)>);

impl UserEvents {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn erasure(row: &UserRow) -> Erasure {
    Erasure {
        position: row.erased_position,
        fenced_ms: row.erased_since_ms,
        counts: row.counts.as_ref().map(|counts| Counts {
            devices: counts.devices,
            pings: counts.pings,
            events: counts.events,
        }),
        finished_ms: (row.finished_ms != 0).then_some(row.finished_ms),
        told: CheckerSet::from_bits(row.told),
    }
}

fn transition_order(position: u64, number: u32) -> [u8; TRANSITION_ORDER_BYTES] {
    let mut order = [0; TRANSITION_ORDER_BYTES];
    order[..8].copy_from_slice(&position.to_be_bytes());
    order[8..].copy_from_slice(&number.to_be_bytes());
    order
}

/// Whose transition it is.
fn transition_user(key: &[u8], value: &[u8]) -> Result<UserId, ReadError> {
    match key.len() {
        TRANSITION_KEY_BYTES => sealed::last_user(key).ok_or_else(|| bad_key(TRANSITIONS, key)),
        TRANSITION_ORDER_BYTES => {
            let bad_value = |source| bad_value(TRANSITIONS, key, source);
            let row: TransitionRow = record::decode_row(value).map_err(bad_value)?;
            let user = <[u8; USER_BYTES]>::try_from(&*row.user);
            user.map(UserId)
                .map_err(|_| bad_value(RecordError::Malformed))
        }
        _ => Err(bad_key(TRANSITIONS, key)),
    }
}

fn transition(key: &[u8], user: UserId, value: &[u8]) -> Result<Transition, ReadError> {
    let (position, number) = key
        .split_first_chunk()
        .and_then(|(position, rest)| {
            let number = u32::from_be_bytes(*rest.first_chunk()?);
            Some((u64::from_be_bytes(*position), number))
        })
        .ok_or_else(|| bad_key(TRANSITIONS, key))?;
    let bad_value = |source| bad_value(TRANSITIONS, key, source);
    let row: TransitionRow = record::decode_row(value).map_err(bad_value)?;
    let turn = match row.to {
        1 => Turn::Sharing(Sharing::Active),
        2 => Turn::Sharing(Sharing::Paused),
        TO_ERASED => Turn::Sharing(Sharing::Erased),
        4 => Turn::Granted,
        5 => Turn::Withdrawn,
        _ => return Err(bad_value(RecordError::Malformed)),
    };
    Ok(Transition {
        user,
        turn,
        checkers: CheckerSet::from_bits(row.checkers),
        at_ms: row.at_ms,
        position,
        number,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        bulletin::News,
        deadlines::{Change, Checker, Event, Kind},
        store::StoreConfig,
    };

    const NOON_MS: u64 = 1_767_268_800_000;

    fn open(data_dir: &Path) -> Store {
        Store::open(data_dir, &StoreConfig::default(), NOON_MS).unwrap()
    }

    fn change(n: u8, position: u64, number: u32, to: Sharing) -> Transition {
        Transition {
            user: UserId([n; 16]),
            turn: Turn::Sharing(to),
            checkers: CheckerSet::from_bits(u64::from(n)),
            at_ms: NOON_MS + 10 * position,
            position,
            number,
        }
    }

    fn say(store: &Store, transitions: Vec<Transition>) {
        let mut batch = store.batch();
        batch.put_news(&News {
            transitions,
            ..News::default()
        });
        store.commit(batch).unwrap();
    }

    #[test]
    fn who_has_paused_comes_back_and_each_change_in_its_order() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        use Sharing::{Active, Paused};
        let first = vec![change(1, 3, 0, Paused), change(2, 3, 1, Paused)];
        // In one commit, to and fro.
        let second = vec![
            change(1, 4, 0, Active),
            change(3, 4, 1, Paused),
            change(1, 4, 2, Paused),
            change(3, 4, 3, Active),
        ];
        let third = vec![change(2, 9, 0, Active)];
        let all = [first.clone(), second.clone(), third.clone()].concat();
        for transitions in [first, second.clone(), third] {
            say(&store, transitions);
        }
        drop(store);
        let store = open(folder.path());
        let kept = store.load_holders().unwrap();
        let withheld = Withheld {
            sharing: Paused,
            position: 4,
            since_ms: NOON_MS + 40,
            told: CheckerSet::default(),
        };
        assert_eq!(kept.withheld, [(UserId([1; 16]), withheld)]);
        assert_eq!((kept.erasures.len(), kept.forgotten), (0, 0));
        let read = |positions, limit| store.transitions(positions, limit).unwrap();
        assert_eq!(read(0..u64::MAX, 100), all);
        assert_eq!(read(4..9, 1), second, "a commit as a whole");
        assert_eq!(read(5..9, 100), []);
    }

    #[test]
    fn old_transitions_are_found_and_deleted_and_nobody_resumes_by_that() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        for position in (2..100).step_by(3) {
            say(&store, vec![change(1, position, 0, Sharing::Paused)]);
        }
        for (moment, expected) in [(0, None), (2, None), (3, Some(2)), (50, Some(47))] {
            let found = store
                .newest_transition_before(NOON_MS + 10 * moment)
                .unwrap();
            assert_eq!(found, expected, "before {moment}");
        }
        let mut batch = store.batch();
        batch.forget_transitions(47);
        store.commit(batch).unwrap();
        drop(store);
        let store = open(folder.path());
        let kept = store.load_holders().unwrap();
        assert_eq!((kept.withheld.len(), kept.forgotten), (1, 47));
        let left = store.transitions(0..u64::MAX, usize::MAX).unwrap();
        assert_eq!((left[0].position, left.len()), (50, 17));
    }

    #[test]
    fn what_was_forgotten_is_in_no_file() {
        fn is_in(folder: &Path, user: UserId) -> bool {
            std::fs::read_dir(folder).unwrap().any(|entry| {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    return is_in(&path, user);
                }
                // One that went meanwhile holds nothing.
                let bytes = std::fs::read(path).unwrap_or_default();
                bytes.windows(user.0.len()).any(|window| window == user.0)
            })
        }
        let (alice, bob) = (UserId(*b"alice's own name"), UserId(*b"bob's, another's"));
        let checker = Checker([7; 16]);
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        // The users' keys stay, and are known by whose they are.
        let files = folder.path().join("store");
        for (user, position) in [(alice, 3), (bob, 4)] {
            let late = Event {
                checker,
                user,
                kind: Kind::Late,
                position,
                at_ms: NOON_MS,
                last_contact_ms: NOON_MS,
                due_ms: NOON_MS,
            };
            let mut batch = store.batch();
            batch.put_news(&News {
                deadlines: vec![Change::Event(late)],
                ..News::default()
            });
            store.commit(batch).unwrap();
        }
        let mut batch = store.batch();
        batch.forget_events(checker, 3);
        store.commit(batch).unwrap();
        assert_eq!(store.events_of(checker, 0..u64::MAX, 9).unwrap().len(), 1);
        assert!(is_in(&files, alice), "the control");
        store.purge_events().unwrap();
        // Files that are no longer needed go in the background.
        let is_gone = (0..2_000).any(|_| {
            let is_gone = !is_in(&files, alice);
            if !is_gone {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            is_gone
        });
        assert!(is_gone);
        assert!(is_in(&files, bob));
    }
}
