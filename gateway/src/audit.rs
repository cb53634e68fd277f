//! The audit log: who did what to whose data, and when. Never where anybody was.
//!
//! Knows the deeds and the file that holds them; [`chain`] knows how its lines hold together. Must not know who may
//! do what.
//!
//! A thread of its own writes, so that a disk that hangs keeps no checker waiting. What has to be on record before it
//! is done waits for [`Audit::record`]; what must go on in any case is only told. Where no gateway runs, a command
//! writes to the file itself, with [`record_alone`].
//!
//! # Bounds
//!
//! 1,024 deeds wait to be written. More are not recorded, which is logged and counted: a safety service must
//! not stand still for its records. The file grows by some 250 bytes a deed; a checker's watch is one deed an hour,
//! however often it connects. Nothing is ever deleted from it.

pub mod chain;
pub mod command;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
};

use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use self::chain::{Broken, Chain, Deed, What, Who, Whose};
use waypost_proto::id::UserId;

use crate::{durable, metrics::Metrics};

/// The file in the data folder.
pub const FILE_NAME: &str = "audit.log";

/// Deeds that wait for the disk.
const MOST_WAITING: usize = 1_024;

/// For how long a deed that is done again and again is one deed.
const SAME_DEED_MS: u64 = 60 * 60 * 1_000;

/// Deeds that are remembered as done within that time; beyond it, one may be recorded more often.
const MOST_REMEMBERED: usize = 4_096;

/// The longest line that is read. The longest that is written names [`chain::MOST_NAMED`] users.
const LONGEST_LINE_BYTES: u64 = 64 << 10;

/// Why a deed is not on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the audit log cannot be written; see the gateway's log")]
pub struct NotRecorded;

/// Has deeds recorded. Clones share one file; when the last is gone, what waits is written and the thread ends.
#[derive(Clone, Debug)]
pub struct Audit {
    waiting: mpsc::Sender<Waiting>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Waiting {
    deed: Deed,
    recorded: oneshot::Sender<()>,
}

/// What a file held.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Every line follows from the one before it.
    Whole {
        /// The end of it.
        chain: Chain,
        /// When the first and the last deed were done; none without a deed.
        times_ms: Option<(u64, u64)>,
        /// How many bytes its lines take. What is beyond is a line that was not finished.
        bytes: u64,
    },
    /// One does not.
    Broken {
        /// Its number, from 1.
        line: u64,
        /// What is wrong with it.
        broken: Broken,
    },
}

/// Reads a file to its end. `seen` is told the hash of each line.
///
/// # Errors
/// When it cannot be read.
pub fn read(path: &Path, mut seen: impl FnMut(&str)) -> io::Result<Read> {
    let mut lines = BufReader::new(File::open(path)?);
    let (mut chain, mut times_ms, mut bytes) = (Chain::default(), None, 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = io::Read::take(&mut lines, LONGEST_LINE_BYTES).read_until(b'\n', &mut line)?;
        let is_whole = line.pop() == Some(b'\n');
        if !is_whole && length as u64 == LONGEST_LINE_BYTES {
            let (line, broken) = (chain.entries() + 1, Broken::Form);
            return Ok(Read::Broken { line, broken });
        }
        if !is_whole {
            // Nothing, or what a crash or a writer at work has left.
            return Ok(Read::Whole {
                chain,
                times_ms,
                bytes,
            });
        }
        match chain.follow(&line) {
            Ok(at_ms) => {
                times_ms = Some((times_ms.map_or(at_ms, |(first_ms, _)| first_ms), at_ms));
                bytes += length as u64;
                seen(chain.head());
            }
            Err(broken) => {
                let line = chain.entries() + 1;
                return Ok(Read::Broken { line, broken });
            }
        }
    }
}

/// Gives all deeds of a log, in order. One of a later version is passed over.
///
/// # Errors
/// When the log cannot be read.
pub fn deeds(path: &Path, mut each: impl FnMut(Deed)) -> io::Result<()> {
    for line in BufReader::new(File::open(path)?).lines() {
        let line = line?;
        let json = line.split_once(' ').map_or("", |(_, json)| json);
        if let Ok(deed) = serde_json::from_str(json) {
            each(deed);
        }
    }
    Ok(())
}

fn open_to_append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// A checker that was told when a user was heard, never where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    /// Its name.
    pub checker: String,
    /// When it began to watch first and last, in milliseconds since 1970-01-01 UTC.
    pub watched_ms: (u64, u64),
}

/// The checkers that a log has as having watched a user, or all, and when they began to, first and last. Of a watch of
/// more users than can be named it is not known whether this one was among them; then it is taken to be.
///
/// # Errors
/// When the log cannot be read.
pub fn recipients(path: &Path, user: UserId) -> io::Result<Vec<Recipient>> {
    let name = user.to_string();
    let mut found: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    deeds(path, |deed| {
        let (Who::Checker(checker), What::WatchStarted) = (deed.who, deed.what) else {
            return;
        };
        let is_of_user = match deed.whose {
            Whose::Everybody | Whose::Many { .. } => true,
            Whose::Users(users) => users.contains(&name),
            Whose::Device(_) | Whose::Nobody => false,
        };
        if is_of_user {
            let (_, last_ms) = found.entry(checker).or_insert((deed.at_ms, deed.at_ms));
            *last_ms = deed.at_ms;
        }
    })?;
    let recipient = |(checker, watched_ms)| Recipient {
        checker,
        watched_ms,
    };
    Ok(found.into_iter().map(recipient).collect())
}

impl Audit {
    /// Opens the log of a data folder and starts its thread. A log that does not hold together is kept under another
    /// name, and another is begun: the gateway goes on, and says so. The receiver hears when the thread has ended.
    ///
    /// # Errors
    /// When the file cannot be opened or written, or there is no thread.
    pub fn start(
        data_dir: &Path,
        now_ms: u64,
        metrics: &Metrics,
    ) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let writer = Writer::open(&data_dir.join(FILE_NAME), now_ms, metrics)?;
        let (waiting, deeds) = mpsc::channel(MOST_WAITING);
        let (ended, receiver) = oneshot::channel();
        thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || {
                writer.serve(deeds);
                // Nobody listens only when the gateway is gone already.
                ended.send(()).ok();
            })?;
        let metrics = metrics.clone();
        Ok((Self { waiting, metrics }, receiver))
    }

    /// One that keeps nothing, and counts what it is told as lost: for a committer that has no gateway around it.
    #[must_use]
    pub fn nowhere(metrics: &Metrics) -> Self {
        let (waiting, _) = mpsc::channel(1);
        let metrics = metrics.clone();
        Self { waiting, metrics }
    }

    /// Has a deed recorded and does not wait for it.
    pub fn tell(&self, deed: Deed) {
        self.hand_over(deed);
    }

    /// Has a deed recorded, and returns when it is on disk.
    ///
    /// # Errors
    /// When it is not.
    pub async fn record(&self, deed: Deed) -> Result<(), NotRecorded> {
        let recorded = self.hand_over(deed).ok_or(NotRecorded)?;
        recorded.await.map_err(|_| NotRecorded)
    }

    /// How many deeds wait for the disk.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.waiting.max_capacity() - self.waiting.capacity()
    }

    fn hand_over(&self, deed: Deed) -> Option<oneshot::Receiver<()>> {
        let (recorded, receiver) = oneshot::channel();
        let waiting = Waiting { deed, recorded };
        if let Err(refused) = self.waiting.try_send(waiting) {
            let deed = refused.into_inner().deed;
            error!(deed = %deed.to_json(), "not recorded: too many deeds wait for the audit log");
            self.metrics.audit.lost.increment(1);
            return None;
        }
        Some(receiver)
    }
}

/// What a log was that did not hold together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// The number of the line that does not follow, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub broken: Broken,
    /// The name under which it is kept.
    pub kept: PathBuf,
}

/// Puts a deed on record where no gateway runs, and returns when it is on disk. The caller keeps gateways away from the
/// data folder meanwhile, for two writers would each follow from a line that is not the last. A log that does not hold
/// together is kept under another name, as a gateway would do at its start, and another is begun.
///
/// # Errors
/// When the deed is not on record for sure.
pub fn record_alone(path: &Path, deed: &Deed) -> io::Result<Option<SetAside>> {
    let opened = LogFile::open(path, deed.at_ms)?;
    let mut log = opened.log;
    log.append(deed)?;
    Ok(opened.set_aside)
}

/// The file, and the end of its chain.
#[derive(Debug)]
struct LogFile {
    file: File,
    chain: Chain,
}

/// A file that can be appended to, and what was found in its place.
struct Opened {
    log: LogFile,
    set_aside: Option<SetAside>,
    /// Whether there was a line that was not finished.
    is_torn: bool,
}

impl LogFile {
    fn open(path: &Path, now_ms: u64) -> io::Result<Opened> {
        let (mut chain, mut kept_bytes, mut set_aside) = (Chain::default(), 0, None);
        match read(path, |_| ()) {
            Ok(Read::Whole {
                chain: whole,
                bytes,
                ..
            }) => (chain, kept_bytes) = (whole, bytes),
            Ok(Read::Broken { line, broken }) => {
                let kept = broken_name(path, now_ms);
                fs::rename(path, &kept)?;
                set_aside = Some(SetAside { line, broken, kept });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = open_to_append(path)?;
        let is_torn = kept_bytes < file.metadata()?.len();
        if is_torn {
            file.set_len(kept_bytes)?;
        }
        file.sync_all()?;
        durable::sync_folder(path.parent().unwrap_or_else(|| Path::new(".")))?;
        Ok(Opened {
            log: Self { file, chain },
            set_aside,
            is_torn,
        })
    }

    fn append(&mut self, deed: &Deed) -> io::Result<()> {
        let line = self.chain.append(deed);
        self.file.write_all(line.as_bytes())?;
        self.file.sync_data()
    }
}

/// The gateway's hand on the file.
#[derive(Debug)]
struct Writer {
    log: LogFile,
    metrics: Metrics,
}

impl Writer {
    fn open(path: &Path, now_ms: u64, metrics: &Metrics) -> io::Result<Self> {
        let Opened {
            log,
            set_aside,
            is_torn,
        } = LogFile::open(path, now_ms)?;
        match set_aside {
            None => info!(
                entries = log.chain.entries(),
                head = log.chain.head(),
                "the audit log is whole"
            ),
            Some(SetAside { line, broken, kept }) => {
                metrics.audit.broken.increment(1);
                error!(
                    line, %broken, kept = %kept.display(),
                    "somebody has changed the audit log; it is kept under another name, and a new one is begun"
                );
            }
        }
        if is_torn {
            warn!("the last line of the audit log was not finished; nobody was told that it was");
        }
        let mut writer = Self {
            log,
            metrics: metrics.clone(),
        };
        writer.write(&Deed {
            at_ms: now_ms,
            who: Who::Gateway,
            what: What::Started,
            whose: Whose::Nobody,
        })?;
        Ok(writer)
    }

    /// Writes what is told until nobody can tell any more, or until the file cannot be written: whether a line is in
    /// it is then not known, so none may follow.
    fn serve(mut self, mut deeds: mpsc::Receiver<Waiting>) {
        while let Some(Waiting { deed, recorded }) = deeds.blocking_recv() {
            if let Err(error) = self.write(&deed) {
                self.metrics.audit.lost.increment(1);
                error!(%error, deed = %deed.to_json(), "not recorded: the audit log cannot be written until the gateway is started again");
                return;
            }
            // Whoever only told it does not listen.
            recorded.send(()).ok();
        }
    }

    fn write(&mut self, deed: &Deed) -> io::Result<()> {
        self.log.append(deed)?;
        self.metrics.audit.entries.increment(1);
        // Beside the file there is then a second witness of it, wherever the log goes.
        info!(
            entry = self.log.chain.entries(),
            head = self.log.chain.head(),
            deed = %deed.to_json(),
            "audit"
        );
        Ok(())
    }
}

fn broken_name(path: &Path, now_ms: u64) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".broken-{now_ms}"));
    name.into()
}

/// What was done within the last hour, so that a deed that is done again and again is recorded once.
#[derive(Debug, Default)]
pub struct Repeats {
    done_ms: FxHashMap<[u8; 16], u64>,
}

impl Repeats {
    /// Whether a deed, known by a digest, is not a repetition at this moment.
    pub fn is_news(&mut self, deed: [u8; 16], now_ms: u64) -> bool {
        let is_repeated = |&done_ms: &u64| now_ms < done_ms.saturating_add(SAME_DEED_MS);
        if self.done_ms.get(&deed).is_some_and(is_repeated) {
            return false;
        }
        if MOST_REMEMBERED <= self.done_ms.len() {
            self.done_ms.retain(|_, done_ms| is_repeated(done_ms));
            if MOST_REMEMBERED <= self.done_ms.len() {
                self.done_ms.clear();
            }
        }
        self.done_ms.insert(deed, now_ms);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON_MS: u64 = 1_767_268_800_000;

    fn watched(name: &str) -> Deed {
        Deed {
            at_ms: NOON_MS,
            who: Who::Checker(name.to_owned()),
            what: What::WatchStarted,
            whose: Whose::of(&[UserId([7; 16])]),
        }
    }

    async fn record(folder: &Path, names: &[&str]) -> Metrics {
        let metrics = Metrics::new();
        let (audit, ended) = Audit::start(folder, NOON_MS, &metrics).unwrap();
        for name in names {
            audit.record(watched(name)).await.unwrap();
        }
        drop(audit);
        ended.await.unwrap();
        metrics
    }

    fn whole(folder: &Path) -> Chain {
        match read(&folder.join(FILE_NAME), |_| ()).unwrap() {
            Read::Whole { chain, .. } => chain,
            Read::Broken { line, broken } => panic!("{line}: {broken}"),
        }
    }

    #[tokio::test]
    async fn what_is_recorded_is_in_the_file_and_goes_on_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        record(folder.path(), &["a", "b"]).await;
        record(folder.path(), &["c"]).await;
        let chain = whole(folder.path());
        assert_eq!(chain.entries(), 5, "and two starts");
        let text = fs::read_to_string(folder.path().join(FILE_NAME)).unwrap();
        assert_eq!(text.lines().count(), 5);
        assert!(text.contains(r#""who":{"checker":"b"},"what":"watch_started""#));
    }

    #[tokio::test]
    async fn who_has_watched_a_user_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let metrics = Metrics::new();
        let (audit, ended) = Audit::start(folder.path(), NOON_MS, &metrics).unwrap();
        let watch = |name: &str, at_ms, whose| Deed {
            at_ms,
            whose,
            ..watched(name)
        };
        for deed in [
            watch("all", 10, Whose::Everybody),
            watch("other", 11, Whose::of(&[UserId([8; 16])])),
            watch("one", 12, Whose::of(&[UserId([7; 16])])),
            watch("all", 13, Whose::Everybody),
        ] {
            audit.record(deed).await.unwrap();
        }
        drop(audit);
        ended.await.unwrap();
        let found = recipients(&folder.path().join(FILE_NAME), UserId([7; 16])).unwrap();
        let recipient = |checker: &str, watched_ms| Recipient {
            checker: checker.to_owned(),
            watched_ms,
        };
        assert_eq!(
            found,
            [recipient("all", (10, 13)), recipient("one", (12, 12))]
        );
    }

    #[tokio::test]
    async fn a_line_that_a_crash_cut_short_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        record(folder.path(), &["a"]).await;
        let path = folder.path().join(FILE_NAME);
        let before = fs::read(&path).unwrap();
        record(folder.path(), &[]).await;
        let after = fs::read(&path).unwrap();
        for length in before.len()..after.len() {
            fs::write(&path, &after[..length]).unwrap();
            record(folder.path(), &["b"]).await;
            assert_eq!(whole(folder.path()).entries(), 4, "cut at {length}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[tokio::test]
    async fn a_log_that_was_changed_is_kept_aside_and_said() {
        let folder = tempfile::tempdir().unwrap();
        record(folder.path(), &["alice"]).await;
        let path = folder.path().join(FILE_NAME);
        let forged = fs::read_to_string(&path).unwrap().replace("alice", "mallo");
        fs::write(&path, &forged).unwrap();
        let metrics = record(folder.path(), &["bob"]).await;
        assert!(metrics.render().contains("waypost_audit_broken_total 1"));
        let kept = fs::read_to_string(broken_name(&path, NOON_MS)).unwrap();
        assert_eq!(kept, forged);
        assert_eq!(whole(folder.path()).entries(), 2);
    }

    #[tokio::test]
    async fn a_line_that_never_ends_is_no_crash_and_nothing_after_it_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        record(folder.path(), &["a"]).await;
        let path = folder.path().join(FILE_NAME);
        let mut long = fs::read(&path).unwrap();
        long.resize(
            long.len() + 2 * usize::try_from(LONGEST_LINE_BYTES).unwrap(),
            b'x',
        );
        fs::write(&path, &long).unwrap();
        record(folder.path(), &[]).await;
        assert_eq!(fs::read(broken_name(&path, NOON_MS)).unwrap(), long);
    }

    #[tokio::test]
    async fn what_a_command_records_alone_is_in_the_same_chain_whatever_was_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        assert_eq!(
            record_alone(&folder.path().join(FILE_NAME), &watched("a")).unwrap(),
            None
        );
        record(folder.path(), &["b"]).await;
        let mut torn = fs::read_to_string(&path).unwrap();
        torn.push_str("0123");
        fs::write(&path, &torn).unwrap();
        assert_eq!(
            record_alone(&folder.path().join(FILE_NAME), &watched("c")).unwrap(),
            None
        );
        record(folder.path(), &[]).await;
        assert_eq!(whole(folder.path()).entries(), 5, "and two starts");

        let forged = fs::read_to_string(&path).unwrap().replace("\"c\"", "\"d\"");
        fs::write(&path, &forged).unwrap();
        let set_aside = record_alone(&folder.path().join(FILE_NAME), &watched("e"))
            .unwrap()
            .unwrap();
        assert_eq!((set_aside.line, set_aside.broken), (4, Broken::Hash));
        assert_eq!(fs::read_to_string(set_aside.kept).unwrap(), forged);
        assert_eq!(whole(folder.path()).entries(), 1);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_counted_and_whoever_waits_is_told() {
        let metrics = Metrics::new();
        let (waiting, deeds) = mpsc::channel(1);
        let audit = Audit {
            waiting,
            metrics: metrics.clone(),
        };
        audit.tell(watched("a"));
        assert_eq!(audit.depth(), 1);
        assert_eq!(audit.record(watched("b")).await, Err(NotRecorded));
        assert!(metrics.render().contains("waypost_audit_lost_total 1"));
        drop(deeds);
        assert_eq!(audit.record(watched("c")).await, Err(NotRecorded));
    }

    #[test]
    fn a_deed_that_is_done_again_and_again_is_one_an_hour() {
        let mut repeats = Repeats::default();
        assert!(repeats.is_news([1; 16], 0));
        assert!(repeats.is_news([2; 16], 0));
        assert!(!repeats.is_news([1; 16], SAME_DEED_MS - 1));
        assert!(repeats.is_news([1; 16], SAME_DEED_MS));
        for n in 0..3 * MOST_REMEMBERED as u128 {
            repeats.is_news(n.to_be_bytes(), SAME_DEED_MS);
        }
        assert!(repeats.done_ms.len() <= MOST_REMEMBERED);
    }
}
