//! The key store: every user's data key, wrapped, in a folder of its own beside the store.
//!
//! Knows files and the order in which they change. Must not know RocksDB, or what the keys seal. How a file looks is
//! the segment's.
//!
//! # The folder
//!
//! `keys/` holds files of at most 4,096 keys each. New keys are appended to the newest file, all of one commit
//! with one sync, before the commit that uses them. To destroy a key its file is written anew without it, put in the
//! place of the old one, and the old one's blocks are overwritten. No key is anywhere else: RocksDB, its log and its
//! backups hold none. Backups of this folder keep destroyed keys alive, so they should be short-lived. Before a key is
//! destroyed for good, its user is on the list of the erased, in the file `erased`.
//!
//! # Bounds
//!
//! In memory there is one key, some 80 bytes, for each user that was ever stored and not erased; they are those that
//! the certificate authority has admitted. On disk a key takes 68 bytes. Of each user who was ever erased there are 24
//! bytes, in memory and on disk.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use ring::rand::SystemRandom;
use rustc_hash::FxHashMap;
use waypost_proto::id::UserId;

use super::{
    DataKey, MasterId, MasterKey, NoRandomness,
    erased::{self, Erased},
    segment::{self, End, Fault, HEADER_BYTES, Header, MOST_SLOTS, SLOT_BYTES, Segment},
};
use crate::durable;

/// The keys of one store.
#[derive(Debug)]
pub struct KeyStore {
    folder: PathBuf,
    incarnation: [u8; 16],
    master: MasterKey,
    keys: FxHashMap<UserId, Kept>,
    /// How many keys were ever made.
    made: u64,
    erased: Erased,
    newest: Option<Newest>,
    /// What only the writer has.
    lock: Option<File>,
}

#[derive(Debug)]
struct Kept {
    /// The number of the file that it is in.
    segment: u32,
    key: DataKey,
}

/// The file that is appended to.
#[derive(Debug)]
struct Newest {
    segment: u32,
    slots: usize,
    file: File,
}

/// What was done to rotate the master key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotated {
    /// Keys that are wrapped by the new master key now.
    pub wrapped: usize,
    /// Keys that already were, by an earlier attempt.
    pub already: usize,
}

/// Why keys cannot be read or kept. The messages are for the operator.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The folder or a file cannot be used.
    #[error("cannot use the keys in {path}: {source}")]
    Unusable {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else has them open for writing.
    #[error("the keys in {0} are in use; stop the gateway first")]
    Locked(PathBuf),
    /// A file is not as it was written.
    #[error("{path} is damaged: {problem}; put it back from a backup of the keys")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// They are another store's.
    #[error(
        "the keys in {0} are those of another store: put back the ones that belong to this one"
    )]
    OtherStore(PathBuf),
    /// They were wrapped with another master key.
    #[error(
        "the keys in {path} were wrapped by the master key {wrapped_by}, and the one that is configured is {given}. \
         Configure the former; if a rotation from one to the other was interrupted, run `waypost keys rotate` again"
    )]
    OtherMaster {
        /// The file.
        path: PathBuf,
        /// The name of the master key that is needed.
        wrapped_by: MasterId,
        /// The name of the one that was given.
        given: MasterId,
    },
    /// Keys are missing that rows were sealed with.
    #[error(
        "keys are missing in {folder}: {found} of {needed} are known. An older copy of the folder was put in place, or \
         it was damaged; without the others some users' rows cannot be opened. Put back a newer copy"
    )]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// How many had been made when the folder was written last.
        found: u64,
        /// How many the store has used.
        needed: u64,
    },
    /// No key could be made.
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    /// It was opened for reading.
    #[error("the keys are open for reading only")]
    ReadOnly,
}

const FOLDER: &str = "keys";
const LOCK: &str = "lock";
const SUFFIX: &str = ".keys";
pub(super) const ERASED: &str = "erased";
/// Nobody else may read them, wrapped as they are.
pub(super) const MODE: u32 = 0o600;

/// The folder of the keys in a data folder.
#[must_use]
pub fn folder_in(data_dir: &Path) -> PathBuf {
    data_dir.join(FOLDER)
}

/// Whether a key was ever made in a folder.
///
/// # Errors
/// When the folder cannot be read.
pub fn has_keys(folder: &Path) -> Result<bool, KeyError> {
    Ok(!segments_of(folder)?.is_empty())
}

impl KeyStore {
    /// Opens the keys of a store for writing, and makes the folder if need be. `used` is how many keys the store has
    /// used.
    ///
    /// # Errors
    /// When they are in use, damaged, missing, of another store, or wrapped by another master key.
    pub fn open(
        folder: &Path,
        master: MasterKey,
        incarnation: [u8; 16],
        used: u64,
    ) -> Result<Self, KeyError> {
        let lock = lock(folder)?;
        let mut store = Self::load(folder, master, incarnation)?;
        if store.made < used {
            return Err(KeyError::Missing {
                folder: folder.to_owned(),
                found: store.made,
                needed: used,
            });
        }
        if let Some(newest) = segments_of(folder)?.last() {
            store.newest = Some(store.cut_torn_end(*newest)?);
        }
        store.lock = Some(lock);
        Ok(store)
    }

    /// Opens the keys of a store for reading. Works beside a gateway that has them open.
    ///
    /// # Errors
    /// As [`Self::open`], but it does not matter who else uses them.
    pub fn open_read_only(
        folder: &Path,
        master: MasterKey,
        incarnation: [u8; 16],
    ) -> Result<Self, KeyError> {
        Self::load(folder, master, incarnation)
    }

    fn load(folder: &Path, master: MasterKey, incarnation: [u8; 16]) -> Result<Self, KeyError> {
        let mut store = Self {
            folder: folder.to_owned(),
            incarnation,
            master,
            keys: FxHashMap::default(),
            made: 0,
            erased: read_erased(folder, &incarnation)?,
            newest: None,
            lock: None,
        };
        let segments = segments_of(folder)?;
        for &number in &segments {
            let path = store.path(number);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                // The writer may just have destroyed the last key in it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unusable(&path)(error)),
            };
            let header = Header::decode(&bytes).map_err(damaged(&path))?;
            if header.incarnation != incarnation {
                return Err(KeyError::OtherStore(folder.to_owned()));
            }
            let read = read(
                &path,
                &bytes,
                &header,
                &store.master,
                end_of(number, &segments),
            )?;
            store.made = store.made.max(header.made_with(read.keys.len()));
            let kept = read.keys.into_iter();
            store.keys.extend(kept.map(|(user, key)| {
                let segment = number;
                (user, Kept { segment, key })
            }));
        }
        Ok(store)
    }

    /// A user's key.
    #[must_use]
    pub fn key(&self, user: &UserId) -> Option<&DataKey> {
        self.keys.get(user).map(|kept| &kept.key)
    }

    /// How many keys were ever made, destroyed ones included.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.made
    }

    /// Makes keys for users who have none, each named once. When it returns they are on disk, and not before that they can be used.
    ///
    /// # Errors
    /// When that is not sure. Then nothing may be written any more: a failed sync cannot be tried again.
    pub fn make(&mut self, users: &[UserId]) -> Result<(), KeyError> {
        if self.lock.is_none() {
            return Err(KeyError::ReadOnly);
        }
        let random = SystemRandom::new();
        let mut users = users;
        while !users.is_empty() {
            let newest = match &mut self.newest {
                Some(newest) if newest.slots < MOST_SLOTS => newest,
                full => {
                    let number = full.as_ref().map_or(1, |full| full.segment + 1);
                    let header = Header {
                        incarnation: self.incarnation,
                        master: self.master.id(),
                        made: self.made,
                        slots: 0,
                    };
                    full.insert(begin(&self.folder, number, &header)?)
                }
            };
            let (now, later) = users.split_at(users.len().min(MOST_SLOTS - newest.slots));
            let mut bytes = Vec::with_capacity(now.len() * SLOT_BYTES);
            let mut made = Vec::with_capacity(now.len());
            for user in now {
                let key = DataKey::random(&random)?;
                let (master, incarnation) = (&self.master, &self.incarnation);
                segment::put_slot(newest.slots, user, &key, master, incarnation, &mut bytes);
                let segment = newest.segment;
                made.push((*user, Kept { segment, key }));
            }
            let appended = newest
                .file
                .write_all(&bytes)
                .and_then(|()| newest.file.sync_data());
            if let Err(error) = appended {
                // Whatever is in the file now, nothing may follow it.
                self.lock = None;
                return Err(unusable(&path_of(&self.folder, newest.segment))(error));
            }
            newest.slots += made.len();
            self.made += made.len() as u64;
            self.keys.extend(made);
            users = later;
        }
        Ok(())
    }

    /// The users who were erased, with when, in milliseconds since 1970-01-01 UTC.
    pub fn erased(&self) -> impl Iterator<Item = (UserId, u64)> {
        self.erased
            .iter()
            .map(|(user, erased_ms)| (*user, *erased_ms))
    }

    /// Whether a user was erased.
    #[must_use]
    pub fn is_erased(&self, user: &UserId) -> bool {
        self.erased.contains_key(user)
    }

    /// Puts users on the list of the erased. Who is on it stays on it, with the time that is there.
    ///
    /// # Errors
    /// When that is not sure.
    pub fn note_erased(&mut self, users: &[(UserId, u64)]) -> Result<(), KeyError> {
        if self.lock.is_none() {
            return Err(KeyError::ReadOnly);
        }
        let is_new = |(user, _): &&(UserId, u64)| !self.erased.contains_key(user);
        let new: Vec<_> = users.iter().filter(is_new).copied().collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut erased = self.erased.clone();
        erased.extend(new);
        let path = self.folder.join(ERASED);
        durable::replace_file(&path, &erased::encode(&erased, &self.incarnation), MODE)
            .map_err(unusable(&path))?;
        self.erased = erased;
        Ok(())
    }

    /// Destroys a user's key, and says whether there was one. When it returns, the key is in no file of the folder,
    /// the blocks that it was in were overwritten as far as the file system and the disk do that, it was wiped from
    /// memory, and the user is on the list of the erased. A user who is stored again later gets another key.
    ///
    /// # Errors
    /// When that is not sure. It may be tried again after a restart.
    pub fn destroy(&mut self, user: &UserId, erased_ms: u64) -> Result<bool, KeyError> {
        self.note_erased(&[(*user, erased_ms)])?;
        let Some(kept) = self.keys.get(user) else {
            return Ok(false);
        };
        let number = kept.segment;
        let path = self.path(number);
        let bytes = fs::read(&path).map_err(unusable(&path))?;
        let found = segment::without(&bytes, user).map_err(damaged(&path))?;
        let (bytes, left) = found.ok_or_else(|| KeyError::Damaged {
            path: path.clone(),
            problem: "a key of it is gone".to_owned(),
        })?;
        let newest = self
            .newest
            .as_mut()
            .filter(|newest| newest.segment == number);
        match newest {
            // The count of the keys that were made is in it.
            Some(newest) => {
                replace(&path, &bytes)?;
                newest.file = append_to(&path).map_err(unusable(&path))?;
                newest.slots = left;
            }
            None if left == 0 => remove(&path)?,
            None => replace(&path, &bytes)?,
        }
        self.keys.remove(user);
        Ok(true)
    }

    /// Wraps all keys of a folder with another master key. Data is not touched. If it is interrupted, at any moment,
    /// some keys are wrapped by the one and some by the other, and the same call finishes it; a gateway does not start
    /// meanwhile.
    ///
    /// # Errors
    /// When they are in use or damaged, or wrapped by neither of the two.
    pub fn rotate(folder: &Path, from: &MasterKey, to: &MasterKey) -> Result<Rotated, KeyError> {
        let _lock = lock(folder)?;
        let segments = segments_of(folder)?;
        let mut rotated = Rotated::default();
        for &number in &segments {
            let path = path_of(folder, number);
            let bytes = fs::read(&path).map_err(unusable(&path))?;
            let header = Header::decode(&bytes).map_err(damaged(&path))?;
            let end = end_of(number, &segments);
            if header.master == to.id() {
                rotated.already += read(&path, &bytes, &header, to, end)?.keys.len();
            } else {
                let keys = read(&path, &bytes, &header, from, end)?;
                replace(&path, &keys.wrapped_by(to))?;
                rotated.wrapped += keys.keys.len();
            }
        }
        Ok(rotated)
    }

    /// Takes away what an append left that was interrupted, so that the next one begins in its place.
    fn cut_torn_end(&self, number: u32) -> Result<Newest, KeyError> {
        let path = self.path(number);
        let failed = unusable(&path);
        let kept = self.keys.values().filter(|kept| kept.segment == number);
        let slots = kept.count();
        let whole_bytes = (HEADER_BYTES + slots * SLOT_BYTES) as u64;
        let file = append_to(&path).map_err(&failed)?;
        if whole_bytes < file.metadata().map_err(&failed)?.len() {
            file.set_len(whole_bytes).map_err(&failed)?;
        }
        // What was read may not be on disk yet, if a process was killed before it could sync.
        file.sync_all().map_err(&failed)?;
        Ok(Newest {
            segment: number,
            slots,
            file,
        })
    }

    fn path(&self, segment: u32) -> PathBuf {
        path_of(&self.folder, segment)
    }
}

/// Begins a file.
fn begin(folder: &Path, segment: u32, header: &Header) -> Result<Newest, KeyError> {
    let path = path_of(folder, segment);
    let made = durable::replace_file(&path, &header.encode(), MODE);
    let file = made.and_then(|()| append_to(&path));
    Ok(Newest {
        segment,
        slots: 0,
        file: file.map_err(unusable(&path))?,
    })
}

pub(super) fn path_of(folder: &Path, segment: u32) -> PathBuf {
    folder.join(format!("{segment:08}{SUFFIX}"))
}

fn read_erased(folder: &Path, incarnation: &[u8; 16]) -> Result<Erased, KeyError> {
    let path = folder.join(ERASED);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Erased::new()),
        Err(error) => return Err(unusable(&path)(error)),
    };
    erased::decode(&bytes, incarnation).map_err(|fault| match fault {
        erased::Fault::OtherStore => KeyError::OtherStore(folder.to_owned()),
        erased::Fault::Damaged => KeyError::Damaged {
            path,
            problem: fault.to_string(),
        },
    })
}

/// The numbers of the files of a folder, in order; what a crash left of a file that was never finished is not one.
pub(super) fn segments_of(folder: &Path) -> Result<Vec<u32>, KeyError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unusable(folder)(error)),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(unusable(folder))?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_suffix(SUFFIX)?.parse::<u32>().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn end_of(number: u32, segments: &[u32]) -> End {
    match segments.last() {
        Some(last) if number < *last => End::Whole,
        _ => End::MayBeTorn,
    }
}

fn read(
    path: &Path,
    bytes: &[u8],
    header: &Header,
    master: &MasterKey,
    end: End,
) -> Result<Segment, KeyError> {
    if header.master != master.id() {
        return Err(KeyError::OtherMaster {
            path: path.to_owned(),
            wrapped_by: header.master,
            given: master.id(),
        });
    }
    Segment::read(bytes, master, end).map_err(damaged(path))
}

/// The right to write in a folder, which is made if need be. What is in it stays: a process may have been killed
/// before it could sync the name of a file that it had begun.
fn lock(folder: &Path) -> Result<File, KeyError> {
    durable::create_folder(folder)
        .and_then(|()| durable::sync_folder(folder))
        .map_err(unusable(folder))?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join(LOCK))
        .map_err(unusable(folder))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(KeyError::Locked(folder.to_owned())),
        Err(TryLockError::Error(error)) => Err(unusable(folder)(error)),
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    File::options().append(true).open(path)
}

/// Puts a file in the place of one, and overwrites what the old one held.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
    let replaced = File::options()
        .write(true)
        .open(path)
        .and_then(|old| durable::replace_file(path, bytes, MODE).map(|()| old));
    replaced.and_then(overwrite).map_err(unusable(path))
}

/// Deletes a file and overwrites what it held: first the name, for a file of zeros is no file of keys.
pub(super) fn remove(path: &Path) -> Result<(), KeyError> {
    let removed = File::options().write(true).open(path).and_then(|old| {
        fs::remove_file(path)?;
        durable::sync_folder(path.parent().unwrap_or(path))?;
        Ok(old)
    });
    removed.and_then(overwrite).map_err(unusable(path))
}

fn overwrite(mut old: File) -> io::Result<()> {
    let length = usize::try_from(old.metadata()?.len()).unwrap_or(usize::MAX);
    old.write_all(&vec![0; length])?;
    old.sync_data()
}

pub(super) fn unusable(path: &Path) -> impl Fn(io::Error) -> KeyError {
    let path = path.to_owned();
    move |source| KeyError::Unusable {
        path: path.clone(),
        source,
    }
}

pub(super) fn damaged(path: &Path) -> impl Fn(Fault) -> KeyError {
    let path = path.to_owned();
    move |fault| KeyError::Damaged {
        path: path.clone(),
        problem: fault.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tempfile::TempDir;

    use super::*;
    use crate::seal::Identity;

    const INCARNATION: [u8; 16] = [9; 16];

    /// A folder, and the master key of its keys; opened as often as wanted.
    struct Keys {
        folder: TempDir,
        master: [u8; 32],
    }

    fn master(bytes: [u8; 32]) -> MasterKey {
        MasterKey::of(super::super::Key(Box::new(bytes)))
    }

    fn user(n: u32) -> UserId {
        let mut user = UserId([0xd0; 16]);
        user.0[12..].copy_from_slice(&n.to_be_bytes());
        user
    }

    fn users(range: std::ops::Range<u32>) -> Vec<UserId> {
        range.map(user).collect()
    }

    /// What a key is, without looking at it: what it makes of a text.
    fn print_of(key: &DataKey) -> Vec<u8> {
        let mut print = Vec::new();
        key.seal(&Identity::new("", &[], [0; 12]), b"text", &mut print);
        print
    }

    fn prints(store: &KeyStore) -> BTreeMap<UserId, Vec<u8>> {
        let keys = store.keys.iter();
        keys.map(|(user, kept)| (*user, print_of(&kept.key)))
            .collect()
    }

    impl Keys {
        fn new() -> Self {
            Self {
                folder: tempfile::tempdir().unwrap(),
                master: [7; 32],
            }
        }

        fn path(&self) -> PathBuf {
            folder_in(self.folder.path())
        }

        fn open(&self) -> Result<KeyStore, KeyError> {
            KeyStore::open(&self.path(), master(self.master), INCARNATION, 0)
        }

        fn files(&self) -> Vec<PathBuf> {
            let numbers = segments_of(&self.path()).unwrap();
            let paths = numbers.into_iter();
            paths.map(|number| path_of(&self.path(), number)).collect()
        }

        /// All bytes of all files of the folder but the list of the erased.
        fn bytes(&self) -> Vec<u8> {
            let files = fs::read_dir(self.path()).unwrap();
            let paths = files.map(|file| file.unwrap().path());
            paths
                .filter(|path| !path.ends_with(ERASED))
                .flat_map(|path| fs::read(path).unwrap())
                .collect()
        }
    }

    fn has(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn keys_come_back_after_a_restart_over_any_number_of_files() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..3)).unwrap();
        store.make(&users(3..9_000)).unwrap();
        let before = prints(&store);
        assert_eq!((before.len(), keys.files().len()), (9_000, 3));
        assert!(matches!(keys.open(), Err(KeyError::Locked(_))));
        let beside =
            KeyStore::open_read_only(&keys.path(), master(keys.master), INCARNATION).unwrap();
        assert_eq!(prints(&beside), before);
        drop(store);
        let mut store = keys.open().unwrap();
        assert_eq!((prints(&store), store.made()), (before, 9_000));
        store.make(&users(9_000..9_001)).unwrap();
        assert_eq!(keys.files().len(), 3);
        assert!(store.key(&user(9_000)).is_some() && store.key(&user(9_001)).is_none());
    }

    #[test]
    fn a_crash_at_any_byte_of_an_append_loses_no_key_of_an_earlier_one() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..4)).unwrap();
        let before = prints(&store);
        let synced = fs::read(&keys.files()[0]).unwrap();
        store.make(&users(4..7)).unwrap();
        drop(store);
        let all = fs::read(&keys.files()[0]).unwrap();
        for length in synced.len()..=all.len() {
            for filled in [&all[length..length], &vec![0; all.len() - length]] {
                fs::write(&keys.files()[0], [&all[..length], filled].concat()).unwrap();
                let mut store = keys.open().unwrap();
                let found = prints(&store);
                assert!(before.iter().all(|(user, print)| found[user] == *print));
                // What comes next is whole.
                store.make(&users(100..102)).unwrap();
                let next = prints(&store);
                drop(store);
                assert_eq!(prints(&keys.open().unwrap()), next);
            }
        }
        // The negative control: what was synced may not be missing.
        fs::write(&keys.files()[0], &synced[..synced.len() - 1]).unwrap();
        let used = KeyStore::open(&keys.path(), master(keys.master), INCARNATION, 4);
        assert!(matches!(
            used,
            Err(KeyError::Missing {
                found: 3,
                needed: 4,
                ..
            })
        ));
    }

    #[test]
    fn a_destroyed_key_is_in_no_file_and_not_in_the_blocks_of_the_old_one() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..3)).unwrap();
        // As if it were full.
        store.newest.as_mut().unwrap().slots = MOST_SLOTS;
        store.make(&users(3..6)).unwrap();
        assert_eq!(keys.files().len(), 2);
        let before = prints(&store);
        // One that is not appended to, the newest, and all that is left of the former.
        for gone in [1, 4, 0, 2] {
            let path = store.path(store.keys[&user(gone)].segment);
            let slot = slot_of(&fs::read(&path).unwrap(), &user(gone)).unwrap();
            // A second name of the old file, which stays.
            let old = keys.folder.path().join("old");
            fs::hard_link(&path, &old).unwrap();
            assert!(has(&fs::read(&old).unwrap(), &slot[20..]));
            assert!(store.destroy(&user(gone), 7).unwrap());
            assert!(store.key(&user(gone)).is_none());
            for bytes in [keys.bytes(), fs::read(&old).unwrap()] {
                assert!(!has(&bytes, &slot[20..]) && !has(&bytes, &user(gone).0));
            }
            fs::remove_file(&old).unwrap();
        }
        assert!(!store.destroy(&user(4), 7).unwrap());
        drop(store);
        assert_eq!(keys.files().len(), 1, "an empty file goes");
        let mut store = keys.open().unwrap();
        assert_eq!(store.made(), 6, "destroyed keys are not missing ones");
        let after = prints(&store);
        assert_eq!(
            after.keys().copied().collect::<Vec<_>>(),
            [user(3), user(5)]
        );
        assert!(after.iter().all(|(user, print)| before[user] == *print));
        store.make(&[user(4)]).unwrap();
        assert_ne!(print_of(store.key(&user(4)).unwrap()), before[&user(4)]);
        for gone in 3..6 {
            store.destroy(&user(gone), 7).unwrap();
        }
        drop(store);
        let store = keys.open().unwrap();
        assert_eq!(
            (store.made(), keys.files().len()),
            (7, 1),
            "the count stays"
        );
        let erased: Vec<_> = store.erased().collect();
        assert_eq!(erased, [0, 1, 2, 3, 4, 5].map(|gone| (user(gone), 7)));
        let list = fs::read(keys.path().join(ERASED)).unwrap();
        assert!(!has(&list, &keys.master[..8]) && has(&list, &user(5).0));
    }

    #[test]
    fn who_was_erased_is_on_the_list_before_the_key_is_gone_and_stays_on_it() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..2)).unwrap();
        // Also of whom nothing was ever stored, and each once.
        assert!(!store.destroy(&user(9), 5).unwrap());
        store.note_erased(&[(user(9), 6), (user(8), 6)]).unwrap();
        // A crash right behind the list leaves the key, and the erasure is begun again.
        store.note_erased(&[(user(1), 6)]).unwrap();
        drop(store);
        let mut store = keys.open().unwrap();
        let expected = [(user(1), 6), (user(8), 6), (user(9), 5)];
        assert_eq!(store.erased().collect::<Vec<_>>(), expected);
        assert!(store.destroy(&user(1), 7).unwrap());
        assert_eq!(store.erased().collect::<Vec<_>>(), expected);
        drop(store);
        let path = keys.path().join(ERASED);
        let mut list = fs::read(&path).unwrap();
        list[40] ^= 1;
        fs::write(&path, &list).unwrap();
        assert!(matches!(keys.open(), Err(KeyError::Damaged { .. })));
    }

    fn slot_of(bytes: &[u8], user: &UserId) -> Option<Vec<u8>> {
        let slots = bytes[HEADER_BYTES..].chunks_exact(SLOT_BYTES);
        let mut slots = slots.filter(|slot| slot[4..20] == user.0);
        slots.next().map(<[u8]>::to_vec)
    }

    #[test]
    fn no_key_lies_in_a_file_as_it_is() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..10)).unwrap();
        let bytes = keys.bytes();
        for kept in store.keys.values() {
            assert!(!has(&bytes, &kept.key.0.0[..8]));
        }
        assert!(!has(&bytes, &keys.master[..8]));
        // The negative control: the wrapped ones are there.
        let slot = slot_of(&bytes, &user(3)).unwrap();
        assert!(has(&bytes, &slot));
    }

    #[test]
    fn keys_of_another_store_or_master_key_are_refused_with_the_reason() {
        let keys = Keys::new();
        keys.open().unwrap().make(&users(0..1)).unwrap();
        let open = |bytes, incarnation| KeyStore::open(&keys.path(), master(bytes), incarnation, 0);
        let other = open([8; 32], INCARNATION).unwrap_err();
        assert!(matches!(other, KeyError::OtherMaster { .. }));
        let said = other.to_string();
        for id in [master([7; 32]).id(), master([8; 32]).id()] {
            assert!(said.contains(&id.to_string()), "{said}");
        }
        assert!(matches!(
            open([7; 32], [1; 16]),
            Err(KeyError::OtherStore(_))
        ));
        assert!(open([7; 32], INCARNATION).is_ok());
    }

    #[test]
    fn damage_to_a_file_that_is_not_appended_to_any_more_is_said() {
        let keys = Keys::new();
        keys.open().unwrap().make(&users(0..4_097)).unwrap();
        let path = &keys.files()[0];
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
        assert!(matches!(keys.open(), Err(KeyError::Damaged { .. })));
    }

    #[test]
    fn a_rotation_that_is_interrupted_anywhere_is_finished_by_the_next() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..10_000)).unwrap();
        let before = prints(&store);
        drop(store);
        let (old, new) = (master(keys.master), master([8; 32]));
        let files = keys.files();
        let originals: Vec<_> = files.iter().map(|path| fs::read(path).unwrap()).collect();
        for done in 0..=files.len() {
            for (path, bytes) in files.iter().zip(&originals) {
                fs::write(path, bytes).unwrap();
            }
            for path in &files[..done] {
                let bytes = fs::read(path).unwrap();
                let read = Segment::read(&bytes, &old, End::MayBeTorn).unwrap();
                replace(path, &read.wrapped_by(&new)).unwrap();
            }
            // The next file was on its way.
            if let Some(path) = files.get(done) {
                fs::write(path.with_extension("keys.new"), "a part of it").unwrap();
            }
            let with_old = keys.open();
            let with_new = KeyStore::open(&keys.path(), master([8; 32]), INCARNATION, 0);
            assert_eq!((with_old.is_ok(), with_new.is_ok()), (done == 0, done == 3));
            drop((with_old, with_new));
            let rotated = KeyStore::rotate(&keys.path(), &old, &new).unwrap();
            assert_eq!(rotated.wrapped + rotated.already, 10_000);
            assert_eq!(rotated.already, (4_096 * done).min(10_000));
            let store = KeyStore::open(&keys.path(), master([8; 32]), INCARNATION, 10_000);
            assert_eq!(prints(&store.unwrap()), before);
            assert!(matches!(keys.open(), Err(KeyError::OtherMaster { .. })));
        }
    }

    #[test]
    fn a_rotation_waits_for_no_gateway_and_knows_both_keys() {
        let keys = Keys::new();
        let mut store = keys.open().unwrap();
        store.make(&users(0..1)).unwrap();
        let rotate = |from, to| KeyStore::rotate(&keys.path(), &master(from), &master(to));
        assert!(matches!(
            rotate(keys.master, [8; 32]),
            Err(KeyError::Locked(_))
        ));
        drop(store);
        let wrong = rotate([6; 32], [8; 32]);
        assert!(matches!(wrong, Err(KeyError::OtherMaster { .. })));
        assert!(rotate(keys.master, [8; 32]).is_ok());
    }
}
