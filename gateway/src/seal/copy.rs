//! A copy of the users' keys, also while a gateway makes and destroys some.
//!
//! Knows in which order the files of a folder of keys change, and no key: it needs no master key. Must not know what
//! the copy is for.
//!
//! Of one folder there is one copy, which the next one replaces: what was destroyed meanwhile is overwritten in the copy
//! too, so that no older copy keeps it alive. The list of the erased comes last: whoever is erased while the keys are
//! copied is on it, or the copy is from before.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
};

use super::{
    key_store::{ERASED, KeyError, MODE, damaged, path_of, remove, replace, segments_of, unusable},
    segment::Header,
};
use crate::durable;

/// How often a file is read that changes while it is read. Each change is an erasure, which takes far longer.
const ATTEMPTS: u32 = 100;

/// Copies the keys in one folder to another, which is made if need be, and says how many files of keys that were.
///
/// # Errors
/// When one cannot be read or written, or the other folder has keys of another store. Then the copy is of no use if it
/// did not exist before; otherwise it is one of some moment between the former copy and now.
pub fn copy(from: &Path, to: &Path) -> Result<usize, KeyError> {
    durable::create_folder(to).map_err(unusable(to))?;
    let mut store = None;
    for number in segments_of(to)? {
        let path = path_of(to, number);
        let bytes = fs::read(&path).map_err(unusable(&path))?;
        let header = Header::decode(&bytes).map_err(damaged(&path))?;
        store = Some(header.incarnation);
    }
    let mut copied = Vec::new();
    for number in segments_of(from)? {
        let path = path_of(from, number);
        // The last key in it was just destroyed.
        let Some(bytes) = read_whole(&path)? else {
            continue;
        };
        let header = Header::decode(&bytes).map_err(damaged(&path))?;
        if *store.get_or_insert(header.incarnation) != header.incarnation {
            return Err(KeyError::OtherStore(to.to_owned()));
        }
        put(&path_of(to, number), &bytes)?;
        copied.push(number);
    }
    if let Some(bytes) = read_whole(&from.join(ERASED))? {
        put(&to.join(ERASED), &bytes)?;
    }
    for number in segments_of(to)? {
        if !copied.contains(&number) {
            remove(&path_of(to, number))?;
        }
    }
    Ok(copied.len())
}

/// Reads a file as it was at one moment. A key is destroyed by putting another file in its place and overwriting the
/// old one after that, so what was read is good if the file was in its place until then. None if it is gone.
fn read_whole(path: &Path) -> Result<Option<Vec<u8>>, KeyError> {
    for _ in 0..ATTEMPTS {
        let read = File::open(path).and_then(|mut file| {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let (read, now) = (file.metadata()?, fs::metadata(path)?);
            Ok(((read.dev(), read.ino()) == (now.dev(), now.ino())).then_some(bytes))
        });
        match read {
            Ok(Some(bytes)) => return Ok(Some(bytes)),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unusable(path)(error)),
        }
    }
    Err(unusable(path)(io::Error::other(
        "it changes faster than it can be read",
    )))
}

fn put(path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
    if path.exists() {
        replace(path, bytes)
    } else {
        durable::replace_file(path, bytes, MODE).map_err(unusable(path))
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use waypost_proto::id::UserId;

    use super::*;
    use crate::seal::{Key, MasterKey, key_store::KeyStore};

    fn open(folder: &Path, incarnation: u8) -> KeyStore {
        let master = MasterKey::of(Key(Box::new([7; 32])));
        KeyStore::open(folder, master, [incarnation; 16], 0).unwrap()
    }

    fn users(range: std::ops::Range<u32>) -> Vec<UserId> {
        let user = |n: u32| {
            let mut user = UserId([0xd0; 16]);
            user.0[12..].copy_from_slice(&n.to_be_bytes());
            user
        };
        range.map(user).collect()
    }

    #[test]
    fn a_copy_has_every_key_and_the_next_one_none_that_was_destroyed() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, to) = (dir.path().join("keys"), dir.path().join("elsewhere/copy"));
        let mut store = open(&keys, 1);
        // The second file has one key.
        store.make(&users(0..4_097)).unwrap();
        assert_eq!(copy(&keys, &to).unwrap(), 2);
        let all = users(0..4_097);
        let copied = open(&to, 1);
        assert!(all.iter().all(|user| copied.key(user).is_some()));
        drop(copied);

        // The files of the first copy, by another name, keep nothing either.
        let slots = [(1, 5), (2, 0)].map(|(file, slot): (u32, usize)| {
            let old = dir.path().join(format!("old-{file}"));
            let file = path_of(&to, file);
            fs::hard_link(&file, &old).unwrap();
            let bytes = fs::read(&file).unwrap();
            let slot = bytes[52 + 68 * slot..][..68].to_vec();
            (old, slot)
        });
        for gone in [&all[5], &all[4_096]] {
            assert!(store.destroy(gone, 3).unwrap());
        }
        // The newest file stays, for the count that is in it.
        assert_eq!(copy(&keys, &to).unwrap(), 2);
        for (old, slot) in slots {
            let bytes = fs::read(old).unwrap();
            assert!(!bytes.windows(68).any(|part| part == slot));
        }
        let copied = open(&to, 1);
        let gone = all.iter().filter(|user| copied.key(user).is_none());
        assert_eq!(gone.collect::<Vec<_>>(), [&all[5], &all[4_096]]);
        assert_eq!(
            copied.erased().collect::<Vec<_>>(),
            store.erased().collect::<Vec<_>>()
        );
        assert_eq!(copied.made(), 4_097);
    }

    #[test]
    fn a_copy_goes_over_no_other_store_s_keys() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, to) = (dir.path().join("keys"), dir.path().join("copy"));
        open(&keys, 1).make(&users(0..1)).unwrap();
        open(&to, 2).make(&users(0..1)).unwrap();
        assert!(matches!(copy(&keys, &to), Err(KeyError::OtherStore(_))));
        assert!(open(&to, 2).key(&users(0..1)[0]).is_some());
    }

    #[test]
    fn a_copy_is_whole_whatever_is_destroyed_and_made_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, to) = (dir.path().join("keys"), dir.path().join("copy"));
        let mut store = open(&keys, 1);
        let all = users(0..600);
        store.make(&all[..400]).unwrap();
        let (stay, go) = (&all[..200], &all[200..400]);
        let (stop, stopped) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(|| {
                for (gone, made) in go.iter().zip(&all[400..]) {
                    store.destroy(gone, 3).unwrap();
                    store.make(&[*made]).unwrap();
                }
                drop(stop);
            });
            let mut copies = 0;
            while copies < 3 || stopped.try_recv() != Err(mpsc::TryRecvError::Disconnected) {
                copy(&keys, &to).unwrap();
                let copied = open(&to, 1);
                assert!(stay.iter().all(|user| copied.key(user).is_some()));
                let erased: Vec<_> = copied.erased().map(|(user, _)| user).collect();
                let is_known = |user: &UserId| copied.key(user).is_some() || erased.contains(user);
                assert!(go.iter().all(is_known), "gone and not on the list");
                copies += 1;
            }
        });
    }
}
