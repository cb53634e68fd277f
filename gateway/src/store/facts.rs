//! The few facts about the store itself, in the family `meta`.
//!
//! Knows how they are written and read. Must not know rows, or what follows from a fact.

use std::path::Path;

use ring::rand::{SecureRandom, SystemRandom};
use rocksdb::{DB, IteratorMode, WriteBatch};

use super::{
    DEVICES, META,
    error::{OpenError, open_error},
    life, permanent_family, settings,
};

/// What `meta` said when the store was opened.
pub(super) struct Facts {
    pub(super) incarnation: [u8; 16],
    /// The same until a restore.
    pub(super) life: [u8; 16],
    pub(super) secret: [u8; 32],
    pub(super) position: u64,
    /// Other lives of the store may have issued epochs up to this one.
    pub(super) epochs_issued: u32,
    /// How many users' keys have ever been used.
    pub(super) keys_used: u64,
    /// From the watermark's file: up to when the gateway could hear, as far as is known.
    pub(super) heard_until_ms: Option<u64>,
}

/// The format of the store as a whole: its families and keys. Values have their own. In format 1 the key of a transition
/// had no user; it is read as well, and whoever writes to it makes it this one.
pub(super) const FORMAT: u32 = 2;
const OLDEST_FORMAT: u32 = 1;
pub(super) const META_FORMAT: &[u8] = b"format";
const META_INCARNATION: &[u8] = b"incarnation";
const META_SECRET: &[u8] = b"token_key";
pub(super) const META_POSITION: &[u8] = b"position";
/// Missing in a store that has sealed nothing yet.
pub(super) const META_KEYS_USED: &[u8] = b"keys_used";

/// `Ok(None)` when the store has just been made.
pub(super) fn read(db: &DB, data_dir: &Path) -> Result<Option<Facts>, OpenError> {
    let meta = permanent_family(db, META);
    let read = |key| {
        db.get_cf(&meta, key)
            .map_err(|error| open_error(data_dir, error))
    };
    let damaged = |what: &str| OpenError::Damaged {
        path: data_dir.to_owned(),
        text: format!("{what} is missing"),
    };
    let Some(format) = read(META_FORMAT)? else {
        // All facts are written at once and before anything else.
        let is_new = db
            .iterator_cf(&permanent_family(db, DEVICES), IteratorMode::Start)
            .next()
            .is_none();
        return if is_new {
            Ok(None)
        } else {
            Err(damaged("its format"))
        };
    };
    let found = fixed(format)
        .map(u32::from_be_bytes)
        .ok_or_else(|| damaged("its format"))?;
    if !(OLDEST_FORMAT..=FORMAT).contains(&found) {
        return Err(OpenError::LaterFormat {
            path: data_dir.to_owned(),
            found,
        });
    }
    let incarnation = read(META_INCARNATION)?
        .and_then(fixed)
        .ok_or_else(|| damaged("its incarnation"))?;
    Ok(Some(Facts {
        heard_until_ms: None,
        life: match read(life::META_LIFE)? {
            None => incarnation,
            Some(life) => fixed(life).ok_or_else(|| damaged("its life"))?,
        },
        epochs_issued: match read(life::META_EPOCHS_ISSUED)? {
            None => 0,
            Some(issued) => fixed(issued)
                .map(u32::from_be_bytes)
                .ok_or_else(|| damaged("its number of epochs"))?,
        },
        keys_used: match read(META_KEYS_USED)? {
            None => 0,
            Some(used) => fixed(used)
                .map(u64::from_be_bytes)
                .ok_or_else(|| damaged("its number of keys"))?,
        },
        incarnation,
        secret: read(META_SECRET)?
            .and_then(fixed)
            .ok_or_else(|| damaged("its token key"))?,
        position: read(META_POSITION)?
            .and_then(fixed)
            .map(u64::from_be_bytes)
            .ok_or_else(|| damaged("its position"))?,
    }))
}

/// Has an earlier version know that it can no longer read this store.
pub(super) fn raise_format(db: &DB, data_dir: &Path) -> Result<(), OpenError> {
    let meta = permanent_family(db, META);
    let failed = |error| open_error(data_dir, error);
    if db.get_cf(&meta, META_FORMAT).map_err(failed)?.as_deref() == Some(&FORMAT.to_be_bytes()) {
        return Ok(());
    }
    db.put_cf_opt(
        &meta,
        META_FORMAT,
        FORMAT.to_be_bytes(),
        &settings::synced(),
    )
    .map_err(|error| open_error(data_dir, error))
}

pub(super) fn write_new(db: &DB, data_dir: &Path) -> Result<Facts, OpenError> {
    let mut facts = Facts {
        heard_until_ms: None,
        keys_used: 0,
        epochs_issued: 0,
        incarnation: [0; 16],
        life: [0; 16],
        secret: [0; 32],
        position: 0,
    };
    let random = SystemRandom::new();
    random
        .fill(&mut facts.incarnation)
        .map_err(|_| OpenError::NoRandomness)?;
    facts.life = facts.incarnation;
    random
        .fill(&mut facts.secret)
        .map_err(|_| OpenError::NoRandomness)?;
    let meta = permanent_family(db, META);
    let mut writes = WriteBatch::default();
    writes.put_cf(&meta, META_FORMAT, FORMAT.to_be_bytes());
    writes.put_cf(&meta, META_INCARNATION, facts.incarnation);
    writes.put_cf(&meta, META_SECRET, facts.secret);
    writes.put_cf(&meta, META_POSITION, facts.position.to_be_bytes());
    db.write_opt(writes, &settings::synced())
        .map_err(|error| open_error(data_dir, error))?;
    Ok(facts)
}

pub(super) fn fixed<const BYTES: usize>(value: Vec<u8>) -> Option<[u8; BYTES]> {
    value.try_into().ok()
}
