//! The power goes: what of a killed gateway's disk had not been synced is taken away.
//!
//! SIGKILL alone loses nothing that was written, because the system still has it in memory. A library
//! that is loaded before libc (`tests/preload/power_loss.c`) keeps a journal of what was synced, and here
//! the disk is put into a state that a machine could have found after its power came back. Knows files,
//! names and syncs. Must not know what is in the files.
//!
//! # The model
//!
//! A file keeps what it held when it was synced last; what was appended after that is lost, or kept in
//! part, or reads as zeros. A name (of a new, a renamed or a deleted file, or of a folder) changes for good
//! when the folder that it is in is synced, which a sync of the file alone does not do; changes after that
//! are undone, or the first few of them are kept, or all. This is what POSIX promises, and less than most
//! file systems keep.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rand::{RngExt, rngs::StdRng};

use crate::{Process, preload};

/// The interposed library and its journal, for one [`Process`].
#[derive(Debug)]
pub struct PowerCut {
    disk: PathBuf,
    journal: PathBuf,
    graves: PathBuf,
    /// What was on disk when the journal began; all of it durable.
    found: Tree,
}

/// What happens to that which was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsynced {
    /// It is all gone.
    Lost,
    /// Each file and the names keep a part, by chance.
    KeptInPart,
}

/// What a power cut took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Bytes at the ends of files.
    pub bytes: u64,
    /// Names that came, went or changed.
    pub names: usize,
}

/// Names, and how far the contents behind them are safe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tree {
    names: BTreeMap<PathBuf, Entry>,
    synced_bytes: HashMap<u64, u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Folder,
    /// By inode number.
    File(u64),
}

/// One change of names, not durable before `folder` is synced.
#[derive(Debug)]
struct Change {
    folder: PathBuf,
    gone: Option<PathBuf>,
    come: Option<(PathBuf, Entry)>,
}

/// What a journal says.
struct Journal {
    /// As the running system saw it at the end.
    seen: Tree,
    durable: Tree,
    /// The names that differ, in the order of their changes.
    pending: Vec<Change>,
}

impl PowerCut {
    /// Compiles the library and has the process load it from its next start on. `None` with a message
    /// where there is no C compiler.
    pub fn install(process: &mut Process) -> Option<Self> {
        let library = process.scratch("power_loss.so");
        if !preload::compile("power_loss.c", &library) {
            return None;
        }
        let cut = Self {
            disk: process.disk().to_owned(),
            journal: process.scratch("power_loss.journal"),
            graves: process.scratch("power_loss.graves"),
            found: Tree::scan(process.disk()),
        };
        fs::create_dir(&cut.graves).unwrap();
        for (name, path) in [
            ("LD_PRELOAD", &library),
            ("POWER_LOSS_FOLDER", &cut.disk),
            ("POWER_LOSS_JOURNAL", &cut.journal),
            ("POWER_LOSS_GRAVES", &cut.graves),
        ] {
            process.set(name, path.to_str().unwrap());
        }
        Some(cut)
    }

    /// Takes the unsynced away from the disk of a process that was killed, and begins a new journal.
    pub fn cut(&mut self, unsynced: Unsynced, dice: &mut StdRng) -> Taken {
        let mut journal = self.read_journal();
        let contents = self.contents();
        let mut taken = Taken::default();

        let kept = match unsynced {
            Unsynced::Lost => 0,
            Unsynced::KeptInPart => dice.random_range(0..=journal.pending.len()),
        };
        taken.names = journal.pending.len() - kept;
        for change in journal.pending.drain(..kept) {
            journal.durable.apply(&change);
        }

        let rebuilt = self.disk.with_extension("rebuilt");
        fs::create_dir(&rebuilt).unwrap();
        for (path, entry) in &journal.durable.names {
            let target = rebuilt.join(path.strip_prefix(&self.disk).unwrap());
            // A name in a folder that is gone is gone with it. One file is deleted by the harness itself
            // before each start, unseen by the journal.
            if !target.parent().unwrap().is_dir() || path.ends_with("data/addresses.json") {
                continue;
            }
            match entry {
                Entry::Folder => fs::create_dir(&target).unwrap(),
                Entry::File(inode) => {
                    let content = contents.get(inode).unwrap_or_else(|| {
                        panic!("{} went away unseen: {}", inode, path.display())
                    });
                    let synced_bytes = journal.durable.synced_bytes.get(inode);
                    let synced_bytes = synced_bytes.copied().unwrap_or_default();
                    let mut bytes = fs::read(content).unwrap();
                    let written = bytes.len() as u64;
                    lose_tail(&mut bytes, synced_bytes, unsynced, dice);
                    taken.bytes += written.saturating_sub(synced_bytes);
                    fs::write(&target, bytes).unwrap();
                    let permissions = fs::metadata(content).unwrap().permissions();
                    fs::set_permissions(&target, permissions).unwrap();
                }
            }
        }
        fs::remove_dir_all(&self.disk).unwrap();
        fs::rename(&rebuilt, &self.disk).unwrap();
        self.begin();
        taken
    }

    /// An empty disk, as before the first start.
    pub fn empty(&mut self) {
        fs::remove_dir_all(&self.disk).unwrap();
        fs::create_dir(&self.disk).unwrap();
        self.begin();
    }

    /// Forgets the past: all that is on disk now is durable.
    pub fn begin(&mut self) {
        drop(fs::remove_file(&self.journal));
        fs::remove_dir_all(&self.graves).unwrap();
        fs::create_dir(&self.graves).unwrap();
        self.found = Tree::scan(&self.disk);
    }

    /// Names that the journal and the disk do not agree on. There are none after a process that ended by
    /// itself, if the library sees every call that it has to see.
    pub fn unseen(&self) -> Vec<PathBuf> {
        let seen = self.read_journal().seen.names;
        let disk = Tree::scan(&self.disk).names;
        let names = seen.keys().chain(disk.keys());
        names
            .filter(|name| seen.get(*name) != disk.get(*name))
            .cloned()
            .collect()
    }

    /// Where the content behind each inode number is now.
    fn contents(&self) -> HashMap<u64, PathBuf> {
        let mut contents = HashMap::new();
        for folder in [&self.graves, &self.disk] {
            for (path, entry) in Tree::scan(folder).names {
                if let Entry::File(inode) = entry {
                    contents.insert(inode, path);
                }
            }
        }
        contents
    }

    fn read_journal(&self) -> Journal {
        let mut journal = Journal {
            seen: self.found.clone(),
            durable: self.found.clone(),
            pending: Vec::new(),
        };
        // The process may have been killed before its first change.
        let text = fs::read_to_string(&self.journal).unwrap_or_default();
        for line in text.lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            journal.read(&fields);
        }
        journal
    }
}

impl Journal {
    fn read(&mut self, fields: &[&str]) {
        let number = |text: &str| text.parse::<u64>().unwrap();
        match *fields {
            ["create", inode, path] => self.come(path, Entry::File(number(inode))),
            ["mkdir", path] => self.come(path, Entry::Folder),
            ["remove", path] => self.change(Change {
                folder: folder_of(path),
                gone: Some(path.into()),
                come: None,
            }),
            ["rename", from, to] => {
                assert_eq!(folder_of(from), folder_of(to), "a move is two changes");
                let entry = self.seen.names.get(Path::new(from));
                let entry = *entry.unwrap_or_else(|| panic!("{from} came unseen"));
                self.change(Change {
                    folder: folder_of(from),
                    gone: Some(from.into()),
                    come: Some((to.into(), entry)),
                });
            }
            ["truncate", inode, bytes] => {
                let synced_bytes = self.durable.synced_bytes.entry(number(inode)).or_default();
                *synced_bytes = number(bytes).min(*synced_bytes);
            }
            ["sync", inode, bytes] => {
                let synced_bytes = self.durable.synced_bytes.entry(number(inode)).or_default();
                // Two threads may write their lines in the other order.
                *synced_bytes = number(bytes).max(*synced_bytes);
            }
            ["syncdir", path] => {
                let path = Path::new(path);
                let (safe, pending) = std::mem::take(&mut self.pending)
                    .into_iter()
                    .partition(|change| change.folder == path);
                self.pending = pending;
                let safe: Vec<Change> = safe;
                for change in &safe {
                    self.durable.apply(change);
                }
            }
            _ => panic!("not a line of the journal: {fields:?}"),
        }
    }

    fn come(&mut self, path: &str, entry: Entry) {
        self.change(Change {
            folder: folder_of(path),
            gone: None,
            come: Some((path.into(), entry)),
        });
    }

    fn change(&mut self, change: Change) {
        self.seen.apply(&change);
        self.pending.push(change);
    }
}

impl Tree {
    fn apply(&mut self, change: &Change) {
        if let Some(gone) = &change.gone {
            self.names.remove(gone);
        }
        if let Some((path, entry)) = &change.come {
            self.names.insert(path.clone(), *entry);
        }
    }

    fn scan(folder: &Path) -> Self {
        let mut tree = Self::default();
        tree.add(folder);
        tree
    }

    fn add(&mut self, folder: &Path) {
        for item in fs::read_dir(folder).unwrap() {
            let item = item.unwrap();
            let metadata = item.metadata().unwrap();
            let entry = if metadata.is_dir() {
                self.add(&item.path());
                Entry::Folder
            } else if !metadata.is_file() {
                // A socket holds nothing, and is made anew at each start.
                continue;
            } else {
                self.synced_bytes.insert(metadata.ino(), metadata.len());
                Entry::File(metadata.ino())
            };
            self.names.insert(item.path(), entry);
        }
    }
}

fn folder_of(path: &str) -> PathBuf {
    Path::new(path).parent().unwrap().to_owned()
}

/// What was appended after the last sync is cut off, kept in part, or reads as zeros.
fn lose_tail(bytes: &mut Vec<u8>, synced_bytes: u64, unsynced: Unsynced, dice: &mut StdRng) {
    let synced = usize::try_from(synced_bytes).unwrap().min(bytes.len());
    if unsynced == Unsynced::Lost {
        return bytes.truncate(synced);
    }
    let written = bytes.len();
    let kept = dice.random_range(synced..=written);
    bytes.truncate(kept);
    if dice.random() {
        bytes.resize(dice.random_range(kept..=written), 0);
    }
}
