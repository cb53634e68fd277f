//! The folder of backups: each file once, however many backups have it, and a manifest for each backup.
//!
//! Knows files, and the order in which they are written. Must not know how a store comes to be in a folder, or keys.
//!
//! # The folder
//!
//! `files/` holds each file under its SHA-256, so that `sha256sum` can check it. `backup-N.json` is the manifest of backup N,
//! and is written when all of its files are on disk: what was killed before has none, and its files are removed by the
//! next backup. A table file never changes within one life of a store, so one that an earlier backup has is not
//! copied and not read again.
//!
//! # Bounds
//!
//! Who makes a backup says how many are kept; without that all of them are. One byte of memory for each 16 or so that
//! the manifests take, and a piece of a file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File as Handle, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ring::digest::{Context, SHA256};

use super::{
    BackupError,
    manifest::{self, File, Manifest},
    unusable,
};
use crate::{durable, hex::hex, store::Checkpoint};

const FILES: &str = "files";
/// What is being copied, before its digest is known.
const COPYING: &str = "copying";
const LOCK: &str = "lock";
const PREFIX: &str = "backup-";
const SUFFIX: &str = ".json";
/// Nobody else may read them: ids are in clear, and all that the audit log says.
const MODE: u32 = 0o600;
const PIECE_BYTES: usize = 1 << 20;
/// How much is copied between two syncs, so that the gateway's own need not wait for all of it.
const BETWEEN_SYNCS_BYTES: u64 = 8 << 20;
/// A table file of RocksDB.
const TABLE: &str = ".sst";

/// The folder, for reading or, with the lock, for writing.
#[derive(Debug)]
pub struct Backups {
    path: PathBuf,
    _lock: Handle,
}

/// What was added.
#[derive(Debug)]
pub struct Added {
    /// The backup.
    pub manifest: Manifest,
    /// How many of its files no earlier backup had.
    pub new_files: usize,
    /// How much those take.
    pub new_bytes: u64,
}

impl Backups {
    /// Takes the folder for itself, and makes it if need be.
    ///
    /// # Errors
    /// When it cannot be used, or somebody else uses it.
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        durable::create_folder(&path.join(FILES)).map_err(unusable(path))?;
        Self::lock(path)
    }

    /// Takes a folder for itself that must be there.
    ///
    /// # Errors
    /// When there is none, or somebody else uses it.
    pub fn open_existing(path: &Path) -> Result<Self, BackupError> {
        if !path.join(FILES).is_dir() {
            return Err(BackupError::None(path.to_owned()));
        }
        Self::lock(path)
    }

    fn lock(path: &Path) -> Result<Self, BackupError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(MODE)
            .open(path.join(LOCK))
            .map_err(unusable(path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_owned(),
                _lock: file,
            }),
            Err(TryLockError::WouldBlock) => Err(BackupError::FolderBusy(path.to_owned())),
            Err(TryLockError::Error(error)) => Err(unusable(path)(error)),
        }
    }

    /// The numbers of the backups, in order.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn numbers(&self) -> Result<Vec<u32>, BackupError> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unusable(&self.path))? {
            let name = entry.map_err(unusable(&self.path))?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
            numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A backup, or the newest.
    ///
    /// # Errors
    /// When there is no such one, or its manifest is damaged.
    pub fn find(&self, number: Option<u32>) -> Result<Manifest, BackupError> {
        let there = self.numbers()?;
        let newest = there.last().copied();
        let newest = newest.ok_or_else(|| BackupError::None(self.path.clone()))?;
        let number = number.unwrap_or(newest);
        if !there.contains(&number) {
            let there: Vec<_> = there.iter().map(ToString::to_string).collect();
            return Err(BackupError::NoSuch {
                folder: self.path.clone(),
                number,
                there: there.join(", "),
            });
        }
        self.read(number)
    }

    /// Copies what a checkpoint holds, and an audit log, as a new backup.
    ///
    /// # Errors
    /// When it cannot be copied. Then there is no such backup.
    pub fn add(
        &self,
        from: &Path,
        checkpoint: Checkpoint,
        audit_log: &Path,
        made_ms: u64,
    ) -> Result<Added, BackupError> {
        let numbers = self.numbers()?;
        // One that is damaged is no help, and no hindrance.
        let kept = numbers.iter().filter_map(|&number| self.read(number).ok());
        let kept: Vec<_> = kept.collect();
        let is_other = |kept: &Manifest| kept.store.incarnation != checkpoint.incarnation;
        if kept.iter().any(is_other) {
            return Err(BackupError::OtherStore(self.path.clone()));
        }
        let known: BTreeMap<_, _> = kept
            .iter()
            .filter(|kept| kept.store.life == checkpoint.life)
            .flat_map(|kept| &kept.files)
            .filter(|file| file.name.ends_with(TABLE))
            .map(|file| ((file.name.as_str(), file.bytes), file))
            .collect();
        let number = numbers.last().map_or(1, |last| last.saturating_add(1));
        let mut manifest = Manifest::new(number, made_ms, checkpoint);
        let (mut new_files, mut new_bytes) = (0, 0);
        let mut copied = |file: File, is_new: bool| {
            if is_new {
                new_files += 1;
                new_bytes += file.bytes;
            }
            file
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(from).map_err(unusable(from))? {
            names.push(entry.map_err(unusable(from))?.file_name());
        }
        names.sort_unstable();
        for name in names {
            let (path, name) = (from.join(&name), name.to_string_lossy().into_owned());
            let bytes = fs::metadata(&path).map_err(unusable(&path))?.len();
            let file = match known.get(&(name.as_str(), bytes)) {
                Some(known) if self.has(known) => copied((*known).clone(), false),
                _ => {
                    let (file, is_new) = self.copy(&path, name, u64::MAX)?;
                    copied(file, is_new)
                }
            };
            manifest.files.push(file);
        }
        if let Some(whole_bytes) = whole_lines(audit_log).map_err(unusable(audit_log))? {
            let (file, is_new) = self.copy(audit_log, "audit.log".to_owned(), whole_bytes)?;
            manifest.audit_log = Some(copied(file, is_new));
        }
        let files = self.path.join(FILES);
        durable::sync_folder(&files).map_err(unusable(&files))?;
        let path = self.manifest(number);
        durable::replace_file(&path, manifest.encode().as_bytes(), MODE).map_err(unusable(path))?;
        Ok(Added {
            manifest,
            new_files,
            new_bytes,
        })
    }

    /// Removes all but the newest backups, if it is said how many are kept, and the files that none of the rest has. Gives
    /// the numbers of those that were removed.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn clean(&self, keep: Option<usize>) -> Result<Vec<u32>, BackupError> {
        let numbers = self.numbers()?;
        let surplus = numbers.len().saturating_sub(keep.unwrap_or(usize::MAX));
        let (gone, kept) = numbers.split_at(surplus);
        for &number in gone {
            let path = self.manifest(number);
            fs::remove_file(&path).map_err(unusable(path))?;
        }
        durable::sync_folder(&self.path).map_err(unusable(&self.path))?;
        let mut needed = BTreeSet::new();
        for &number in kept {
            // What one needs that cannot be read is not known, so everything stays.
            let Ok(manifest) = self.read(number) else {
                return Ok(gone.to_vec());
            };
            needed.extend(manifest.all_files().map(|file| file.sha256.clone()));
        }
        let files = self.path.join(FILES);
        for entry in fs::read_dir(&files).map_err(unusable(&files))? {
            let entry = entry.map_err(unusable(&files))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_ours = name == COPYING || manifest::is_sha256(&name);
            if is_ours && !needed.contains(&name) {
                fs::remove_file(entry.path()).map_err(unusable(entry.path()))?;
            }
        }
        Ok(gone.to_vec())
    }

    /// Copies a file of a backup to where it belongs, and checks it on the way.
    ///
    /// # Errors
    /// When it is missing, or is not as it was written, or the copy cannot be written.
    pub fn put_back(&self, manifest: &Manifest, file: &File, to: &Path) -> Result<(), BackupError> {
        let from = self.path.join(FILES).join(&file.sha256);
        let damaged = |problem: &str| BackupError::Damaged {
            number: manifest.number,
            path: from.clone(),
            problem: problem.to_owned(),
        };
        let found = match copy_file(&from, to, u64::MAX) {
            Ok(found) => found,
            Err(Failed::Reading(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged("is missing"));
            }
            Err(Failed::Reading(error)) => return Err(unusable(&from)(error)),
            Err(Failed::Writing(error)) => return Err(unusable(to)(error)),
        };
        match found {
            (bytes, _) if bytes != file.bytes => Err(damaged(&format!(
                "has {bytes} bytes and had {} when it was written",
                file.bytes
            ))),
            (_, sha256) if sha256 != file.sha256 => Err(damaged(&format!(
                "is not as it was written: its SHA-256 is {sha256}"
            ))),
            _ => Ok(()),
        }
    }

    fn read(&self, number: u32) -> Result<Manifest, BackupError> {
        let path = self.manifest(number);
        let text = fs::read(&path).map_err(unusable(&path))?;
        match Manifest::decode(&text) {
            Ok(manifest) if manifest.number == number => Ok(manifest),
            Ok(_) => Err(BackupError::Damaged {
                number,
                path,
                problem: "is the manifest of another one".to_owned(),
            }),
            Err(fault) => Err(BackupError::Damaged {
                number,
                path,
                problem: fault.to_string(),
            }),
        }
    }

    fn manifest(&self, number: u32) -> PathBuf {
        self.path.join(format!("{PREFIX}{number}{SUFFIX}"))
    }

    /// Whether a file is there, by its length: it is read when it is put back.
    fn has(&self, file: &File) -> bool {
        let path = self.path.join(FILES).join(&file.sha256);
        fs::metadata(path).is_ok_and(|there| there.len() == file.bytes)
    }

    /// Copies the beginning of a file under its digest, and says whether it was not there.
    fn copy(&self, from: &Path, name: String, most: u64) -> Result<(File, bool), BackupError> {
        let copying = self.path.join(FILES).join(COPYING);
        let (bytes, sha256) = match copy_file(from, &copying, most) {
            Ok(copied) => copied,
            Err(Failed::Reading(error)) => return Err(unusable(from)(error)),
            Err(Failed::Writing(error)) => return Err(unusable(copying)(error)),
        };
        let file = File {
            name,
            bytes,
            sha256,
        };
        let is_new = !self.has(&file);
        // Also over one that is there: should that have gone bad, it is good again.
        let path = self.path.join(FILES).join(&file.sha256);
        fs::rename(&copying, &path).map_err(unusable(path))?;
        Ok((file, is_new))
    }
}

enum Failed {
    Reading(io::Error),
    Writing(io::Error),
}

/// Copies at most so many bytes to a file that is made anew and synced: how many those were, and their digest.
fn copy_file(from: &Path, to: &Path, most: u64) -> Result<(u64, String), Failed> {
    let mut read = Handle::open(from).map_err(Failed::Reading)?.take(most);
    let mut write = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(MODE)
        .open(to)
        .map_err(Failed::Writing)?;
    let mut digest = Context::new(&SHA256);
    let mut piece = vec![0; PIECE_BYTES];
    let (mut bytes, mut unsynced) = (0, 0);
    loop {
        let length = match read.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failed::Reading(error)),
        };
        digest.update(&piece[..length]);
        write.write_all(&piece[..length]).map_err(Failed::Writing)?;
        bytes += length as u64;
        unsynced += length as u64;
        if BETWEEN_SYNCS_BYTES <= unsynced {
            write.sync_data().map_err(Failed::Writing)?;
            unsynced = 0;
        }
    }
    write.sync_all().map_err(Failed::Writing)?;
    Ok((bytes, hex(digest.finish().as_ref())))
}

/// How many bytes of a log are whole lines: a writer at work may be in the middle of one. None without a log.
fn whole_lines(log: &Path) -> io::Result<Option<u64>> {
    let mut file = match Handle::open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let (mut whole, mut read) = (0, 0);
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let length = file.read(&mut piece)?;
        if length == 0 {
            return Ok(Some(whole));
        }
        if let Some(end) = piece[..length].iter().rposition(|&byte| byte == b'\n') {
            whole = read + end as u64 + 1;
        }
        read += length as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(life: u8) -> Checkpoint {
        Checkpoint {
            incarnation: "01".repeat(16),
            life: format!("{life:02x}").repeat(16),
            position: 7,
            heard_until_ms: None,
            keys_made: 0,
        }
    }

    struct Places {
        dir: tempfile::TempDir,
    }

    impl Places {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["from", "to"] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            Self { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn write(&self, files: &[(&str, &str)]) {
            for (name, text) in files {
                fs::write(self.path("from").join(name), text).unwrap();
            }
        }

        fn backups(&self) -> Backups {
            Backups::open(&self.path("backups")).unwrap()
        }

        fn add(&self, life: u8) -> Result<Added, BackupError> {
            let (from, log) = (self.path("from"), self.path("audit.log"));
            self.backups().add(&from, checkpoint(life), &log, 9)
        }

        fn files(&self) -> usize {
            fs::read_dir(self.path("backups/files")).unwrap().count()
        }

        fn put_back(&self, number: u32) -> Result<BTreeMap<String, String>, BackupError> {
            let backups = self.backups();
            let manifest = backups.find(Some(number))?;
            let mut found = BTreeMap::new();
            for file in manifest.all_files() {
                let to = self.path("to").join(&file.name);
                backups.put_back(&manifest, file, &to)?;
                found.insert(file.name.clone(), fs::read_to_string(to).unwrap());
            }
            Ok(found)
        }
    }

    fn files(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        files.iter().map(owned).collect()
    }

    const FIRST: [(&str, &str); 3] = [("1.sst", "one"), ("2.sst", "two"), ("CURRENT", "m1")];

    #[test]
    fn each_backup_comes_back_as_it_was_and_files_that_are_the_same_are_there_once() {
        let places = Places::new();
        places.write(&FIRST);
        let added = places.add(1).unwrap();
        assert_eq!(
            (added.manifest.number, added.new_files, added.new_bytes),
            (1, 3, 8)
        );
        places.write(&[("3.sst", "three"), ("CURRENT", "m2")]);
        fs::remove_file(places.path("from/1.sst")).unwrap();
        fs::write(places.path("audit.log"), "a line\nhalf a li").unwrap();
        let added = places.add(1).unwrap();
        assert_eq!((added.manifest.number, added.new_files), (2, 3));
        // In another life a table of the same name is another one, even of the same length.
        places.write(&[("2.sst", "TWO")]);
        assert_eq!(places.add(2).unwrap().new_files, 1);
        assert_eq!(places.put_back(1).unwrap(), files(&FIRST));
        let second = [
            ("2.sst", "two"),
            ("3.sst", "three"),
            ("CURRENT", "m2"),
            ("audit.log", "a line\n"),
        ];
        assert_eq!(places.put_back(2).unwrap(), files(&second));
        assert_eq!(places.put_back(3).unwrap()["2.sst"], "TWO");
        assert_eq!(places.files(), 7);

        assert_eq!(places.backups().clean(Some(2)).unwrap(), [1]);
        assert_eq!(places.files(), 5, "what only the first had");
        assert_eq!(places.put_back(2).unwrap(), files(&second));
        let gone = places.put_back(1).unwrap_err().to_string();
        assert!(gone.contains("those that are there: 2, 3"), "{gone}");
        // Numbers are not given anew.
        assert_eq!(places.add(2).unwrap().manifest.number, 4);
    }

    #[test]
    fn a_backup_that_was_cut_short_is_none_and_leaves_nothing() {
        let places = Places::new();
        places.write(&FIRST);
        places.add(1).unwrap();
        // Killed with one file copied, another on its way, and the manifest not yet in its place.
        for name in ["ab".repeat(32).as_str(), COPYING] {
            fs::write(places.path("backups/files").join(name), "of a second").unwrap();
        }
        fs::write(places.path("backups/backup-2.json.new"), "{").unwrap();
        fs::write(places.path("backups/files/theirs"), "somebody else's").unwrap();
        assert_eq!(places.backups().find(None).unwrap().number, 1);
        assert!(places.backups().clean(None).unwrap().is_empty());
        assert_eq!(places.files(), 4, "three, and somebody else's");
        assert_eq!(places.put_back(1).unwrap(), files(&FIRST));
    }

    #[test]
    fn damage_is_said_with_the_file_and_no_damage_is_not() {
        let places = Places::new();
        places.write(&FIRST);
        let added = places.add(1).unwrap();
        let manifest = places.path("backups/backup-1.json");
        let stored = added.manifest.files.iter();
        let stored = stored.map(|file| places.path("backups/files").join(&file.sha256));
        for path in stored.chain([manifest]) {
            let good = fs::read(&path).unwrap();
            for bad in [
                [&[good[0] ^ 1], &good[1..]].concat(),
                good[1..].to_vec(),
                [&good[..], b"x"].concat(),
            ] {
                fs::write(&path, bad).unwrap();
                let said = places.put_back(1).unwrap_err();
                assert!(
                    matches!(said, BackupError::Damaged { number: 1, .. }),
                    "{said}"
                );
                assert!(said.to_string().contains(path.to_str().unwrap()), "{said}");
            }
            fs::write(&path, good).unwrap();
            assert_eq!(places.put_back(1).unwrap(), files(&FIRST));
        }
        // Nothing is removed on behalf of a backup that cannot be read.
        fs::write(places.path("backups/backup-1.json"), "x").unwrap();
        assert!(places.backups().clean(None).unwrap().is_empty());
        assert_eq!(places.files(), 3);
    }

    #[test]
    fn a_folder_has_backups_of_one_store_and_one_user() {
        let places = Places::new();
        places.write(&FIRST);
        let empty = places.path("empty");
        assert!(matches!(
            Backups::open_existing(&empty),
            Err(BackupError::None(_))
        ));
        places.add(1).unwrap();
        let other = Checkpoint {
            incarnation: "09".repeat(16),
            ..checkpoint(1)
        };
        let (from, log) = (places.path("from"), places.path("audit.log"));
        let backups = places.backups();
        let refused = backups.add(&from, other, &log, 9);
        assert!(matches!(refused, Err(BackupError::OtherStore(_))));
        let second = Backups::open(&places.path("backups"));
        assert!(matches!(second, Err(BackupError::FolderBusy(_))));
    }
}
