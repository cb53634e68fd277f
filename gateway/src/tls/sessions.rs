//! The TLS sessions that devices may resume: what the gateway remembers between two connections.
//!
//! Knows keys, bytes and their age. Must not know what a session holds or whom it belongs to.
//!
//! rustls' own cache looks through all of its entries at each resumption, 4.7 ms with 600,000 of them, and
//! the whole endpoint waits meanwhile. Here storing and taking cost the same however many there are.
//!
//! # Bounds
//!
//! [`Sessions::new`] says how many; each may be `SESSION_BYTES` long, and all together half of that in the
//! mean. When there is no room, the oldest goes: its device does one full handshake more. Nothing is kept for
//! longer than `LIFETIME_S`.

use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use rustls::{server::StoresServerSessions, time_provider::TimeProvider};

use crate::metrics::{Metrics, ResumptionMetrics};

/// A bounded store of sessions, each of which can be taken once.
#[derive(Debug)]
pub struct Sessions {
    shards: Box<[Mutex<Shard>]>,
    time: Arc<dyn TimeProvider>,
    metrics: Metrics,
}

impl Sessions {
    /// A store for at most `most` sessions, rounded up to a multiple of the number of shards. It takes about
    /// 1 KB for each that it holds, and nothing for those that it does not.
    #[must_use]
    pub fn new(most: usize, time: Arc<dyn TimeProvider>, metrics: Metrics) -> Self {
        let most_of_shard = most.div_ceil(SHARDS);
        let shards = (0..SHARDS)
            .map(|_| Mutex::new(Shard::new(most_of_shard)))
            .collect();
        Self {
            shards,
            time,
            metrics,
        }
    }

    fn now_s(&self) -> Option<u64> {
        self.time.current_time().map(|now| now.as_secs())
    }

    fn shard(&self, key: &Key) -> &Mutex<Shard> {
        // The key is made of random bytes here; whoever offers another finds nothing under it.
        &self.shards[usize::from(key[0]) % SHARDS]
    }
}

impl StoresServerSessions for Sessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let (Ok(key), Some(now_s)) = (Key::try_from(key), self.now_s()) else {
            return false;
        };
        if SESSION_BYTES < value.len() {
            return false;
        }
        let mut shard = self.shard(&key).lock();
        shard.put(key, value, now_s, &self.metrics.resumption);
        true
    }

    /// TLS 1.2 alone looks without taking.
    fn get(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        let key = Key::try_from(key).ok()?;
        let now_s = self.now_s()?;
        let mut shard = self.shard(&key).lock();
        shard.take(&key, now_s, &self.metrics.resumption)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// rustls makes them of 32 random bytes.
type Key = [u8; 32];

/// A part of the sessions, in the order in which they were stored: a list through the slots of a slab.
#[derive(Debug)]
struct Shard {
    most: usize,
    at: FxHashMap<Key, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    ends: Option<Ends>,
    bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    oldest: u32,
    newest: u32,
}

#[derive(Debug)]
struct Slot {
    key: Key,
    value: Vec<u8>,
    stored_s: u64,
    older: Option<u32>,
    newer: Option<u32>,
}

impl Slot {
    fn is_expired(&self, now_s: u64) -> bool {
        self.stored_s.saturating_add(LIFETIME_S) <= now_s
    }
}

impl Shard {
    fn new(most: usize) -> Self {
        Self {
            most,
            at: FxHashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            ends: None,
            bytes: 0,
        }
    }

    fn put(&mut self, key: Key, value: Vec<u8>, now_s: u64, metrics: &ResumptionMetrics) {
        if let Some(at) = self.at.remove(&key) {
            self.unlink(at, metrics);
        }
        // Each is dropped once, so this costs no more than storing it did.
        while let Some(ends) = self.ends {
            let reason = if self.slots[ends.oldest as usize].is_expired(now_s) {
                "expired"
            } else if self.most <= self.at.len()
                || self.most * MEAN_BYTES < self.bytes + value.len()
            {
                "room"
            } else {
                break;
            };
            metrics.dropped.of(reason).increment(1);
            let oldest = self.slots[ends.oldest as usize].key;
            self.at.remove(&oldest);
            self.unlink(ends.oldest, metrics);
        }
        self.link(key, value, now_s, metrics);
    }

    fn take(&mut self, key: &Key, now_s: u64, metrics: &ResumptionMetrics) -> Option<Vec<u8>> {
        let at = self.at.remove(key)?;
        let is_expired = self.slots[at as usize].is_expired(now_s);
        let value = self.unlink(at, metrics);
        if is_expired {
            metrics.dropped.of("expired").increment(1);
        }
        (!is_expired).then_some(value)
    }

    /// Appends a session as the newest.
    fn link(&mut self, key: Key, value: Vec<u8>, stored_s: u64, metrics: &ResumptionMetrics) {
        let Some(at) = self
            .free
            .pop()
            .or_else(|| u32::try_from(self.slots.len()).ok())
        else {
            return;
        };
        self.bytes += value.len();
        let newest = self.ends.map(|ends| ends.newest);
        let slot = Slot {
            key,
            value,
            stored_s,
            older: newest,
            newer: None,
        };
        match self.slots.get_mut(at as usize) {
            Some(freed) => *freed = slot,
            None => self.slots.push(slot),
        }
        if let Some(newest) = newest {
            self.slots[newest as usize].newer = Some(at);
        }
        self.ends = Some(Ends {
            oldest: self.ends.map_or(at, |ends| ends.oldest),
            newest: at,
        });
        self.at.insert(key, at);
        metrics.stored.increment(1.0);
    }

    /// Takes a session out of the order, wherever it is, and frees its slot. The caller has removed its key.
    fn unlink(&mut self, at: u32, metrics: &ResumptionMetrics) -> Vec<u8> {
        let slot = &mut self.slots[at as usize];
        let (value, older, newer) = (std::mem::take(&mut slot.value), slot.older, slot.newer);
        if let Some(older) = older {
            self.slots[older as usize].newer = newer;
        }
        if let Some(newer) = newer {
            self.slots[newer as usize].older = older;
        }
        self.ends = self.ends.and_then(|ends| {
            Some(Ends {
                oldest: if older.is_none() { newer? } else { ends.oldest },
                newest: if newer.is_none() { older? } else { ends.newest },
            })
        });
        self.bytes -= value.len();
        self.free.push(at);
        metrics.stored.decrement(1.0);
        value
    }
}

/// Handshakes of all cores meet here. With as many locks, two of them seldom want the same.
const SHARDS: usize = 64;
/// What rustls tells devices: they do not come with an older one.
const LIFETIME_S: u64 = 24 * 60 * 60;
/// A session holds the device's certificate chain, about 500 bytes a certificate. A longer one is not kept.
const SESSION_BYTES: usize = 4_096;
/// What the bound in bytes reckons for each session of the bound in number.
const MEAN_BYTES: usize = SESSION_BYTES / 2;

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    use rustls::pki_types::UnixTime;

    use super::*;

    /// A clock that tests set.
    #[derive(Debug, Default)]
    pub(crate) struct SetTime(pub(crate) AtomicU64);

    impl SetTime {
        pub(crate) fn advance(&self, seconds: u64) {
            self.0.fetch_add(seconds, Ordering::Relaxed);
        }
    }

    impl TimeProvider for SetTime {
        fn current_time(&self) -> Option<UnixTime> {
            let seconds = self.0.load(Ordering::Relaxed);
            Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
        }
    }

    fn sessions(most: usize) -> (Sessions, Arc<SetTime>) {
        let time = Arc::new(SetTime::default());
        (Sessions::new(most, time.clone(), Metrics::new()), time)
    }

    /// A key of the first shard.
    fn key(number: u32) -> Vec<u8> {
        let mut key = vec![0; 32];
        key[1..5].copy_from_slice(&number.to_be_bytes());
        key
    }

    fn counted(sessions: &Sessions, line: &str) -> bool {
        sessions.metrics.render().contains(line)
    }

    #[test]
    fn a_session_is_taken_once() {
        let (sessions, _) = sessions(SHARDS);
        assert!(sessions.put(key(1), vec![7]));
        assert!(counted(&sessions, "waypost_sessions_stored 1"));
        assert_eq!(sessions.get(&key(1)), None);
        assert_eq!(sessions.take(&key(2)), None);
        assert_eq!(sessions.take(&key(1)), Some(vec![7]));
        assert_eq!(sessions.take(&key(1)), None);
        assert!(counted(&sessions, "waypost_sessions_stored 0"));
    }

    #[test]
    fn the_oldest_goes_first_and_what_was_taken_leaves_room() {
        let (sessions, _) = sessions(3 * SHARDS);
        for number in 0..3 {
            sessions.put(key(number), vec![0]);
        }
        sessions.take(&key(1));
        sessions.put(key(3), vec![0]);
        let dropped_for_room = "waypost_sessions_dropped_total{reason=\"room\"}";
        assert!(counted(&sessions, &format!("{dropped_for_room} 0")));
        sessions.put(key(4), vec![0]);
        assert!(counted(&sessions, &format!("{dropped_for_room} 1")));
        let left: Vec<u32> = (0..5)
            .filter(|number| sessions.take(&key(*number)).is_some())
            .collect();
        assert_eq!(left, [2, 3, 4]);
    }

    #[test]
    fn the_bytes_are_bounded_too() {
        let (sessions, _) = sessions(8 * SHARDS);
        assert!(!sessions.put(key(0), vec![0; SESSION_BYTES + 1]));
        for number in 0..8 {
            assert!(sessions.put(key(number), vec![0; SESSION_BYTES]));
        }
        let left = (0..8)
            .filter(|number| sessions.take(&key(*number)).is_some())
            .count();
        assert_eq!(left, 4);
        assert_eq!(sessions.shards[0].lock().bytes, 0);
    }

    #[test]
    fn nothing_is_older_than_a_day() {
        let (sessions, time) = sessions(8 * SHARDS);
        sessions.put(key(1), vec![1]);
        sessions.put(key(2), vec![2]);
        time.advance(LIFETIME_S - 1);
        assert_eq!(sessions.take(&key(1)), Some(vec![1]));
        time.advance(1);
        assert_eq!(sessions.take(&key(2)), None);
        sessions.put(key(3), vec![3]);
        time.advance(LIFETIME_S);
        sessions.put(key(4), vec![4]);
        assert_eq!(sessions.shards[0].lock().at.len(), 1, "3 made way for 4");
        assert!(counted(
            &sessions,
            "waypost_sessions_dropped_total{reason=\"expired\"} 2"
        ));
    }

    #[test]
    fn whatever_the_order_of_storing_and_taking_the_newest_stay() {
        let (sessions, _) = sessions(16 * SHARDS);
        let mut expected: Vec<u32> = Vec::new();
        let mut dice = 1_u32;
        for number in 0..5_000 {
            dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if dice >> 31 == 0 && !expected.is_empty() {
                let taken = expected.remove(dice as usize % expected.len());
                assert_eq!(sessions.take(&key(taken)), Some(taken.to_be_bytes().into()));
            } else {
                sessions.put(key(number), number.to_be_bytes().into());
                expected.push(number);
                if 16 < expected.len() {
                    let oldest = expected.remove(0);
                    assert_eq!(sessions.take(&key(oldest)), None);
                }
            }
        }
        let shard = sessions.shards[0].lock();
        assert!(shard.slots.len() <= 16, "slots are used again");
        let mut order = Vec::new();
        let mut at = shard.ends.map(|ends| ends.oldest);
        while let Some(slot) = at.map(|at| &shard.slots[at as usize]) {
            order.push(u32::from_be_bytes(slot.value[..].try_into().unwrap()));
            at = slot.newer;
        }
        assert_eq!(order, expected);
    }
}
