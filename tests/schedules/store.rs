//! A model of the store: a commit is durable from one moment on, in the midst of the call. Knows which
//! pings and deadlines are durable; must not know who asked.

use std::collections::HashMap;

use parking_lot::Mutex;
use waypost_proto::{
    device::DeviceRecord,
    id::{DeviceId, UserId},
};

use waypost_gateway::{
    bulletin::News,
    deadlines::{Change, Checker, Registration, Setting},
    enrol::invitations,
    grants::Decisions,
    revocation::Subject,
};

pub(crate) use waypost_gateway::store::{Day, PingKey, Retention, Space, record};

/// Rows in memory, with a disk that may fail once and for all.
#[derive(Debug)]
pub(crate) struct Store {
    /// The number of the commit that fails, counted from 1.
    failing_commit: Option<u64>,
    // No model: looking is no step of the schedule.
    durable: Mutex<Durable>,
}

#[derive(Debug, Default)]
struct Durable {
    commits: u64,
    position: u64,
    /// How often each ping was stored.
    pings: HashMap<(DeviceId, u32, u64), u32>,
    deadlines: HashMap<(Checker, UserId), Setting>,
    /// The newest event of each checker.
    events: HashMap<Checker, u64>,
}

/// What becomes durable at once.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    position: u64,
    pings: Vec<(DeviceId, u32, u64)>,
    deadlines: Vec<Change>,
}

#[derive(Debug, thiserror::Error)]
#[error("the disk failed")]
pub(crate) struct CommitError;

impl Store {
    pub(crate) fn new(failing_commit: Option<u64>, deadlines: &[Registration]) -> Self {
        let of = |set: &Registration| ((set.checker, set.user), set.setting);
        let durable = Durable {
            deadlines: deadlines.iter().map(of).collect(),
            ..Durable::default()
        };
        Self {
            failing_commit,
            durable: Mutex::new(durable),
        }
    }

    /// Always enough: what is put off is no business of the hand-off.
    pub(crate) fn space(&self) -> Space {
        Space::default()
    }

    pub(crate) fn batch(&self) -> Batch {
        Batch::default()
    }

    pub(crate) fn commit(&self, batch: Batch) -> Result<(), CommitError> {
        // While the disk is at work, everybody else goes on.
        shuttle::thread::yield_now();
        {
            let mut durable = self.durable.lock();
            durable.commits += 1;
            if Some(durable.commits) == self.failing_commit {
                return Err(CommitError);
            }
            durable.position = batch.position;
            for ping in batch.pings {
                *durable.pings.entry(ping).or_default() += 1;
            }
            for change in batch.deadlines {
                durable.change(change);
            }
        }
        shuttle::thread::yield_now();
        Ok(())
    }

    pub(crate) fn open_day(&self, _day: Day) -> Result<(), CommitError> {
        Ok(())
    }

    pub(crate) fn drop_days_before(&self, _first_kept: Day) -> Result<usize, CommitError> {
        Ok(0)
    }

    pub(crate) fn events_before(
        &self,
        _moment_ms: u64,
    ) -> Result<Vec<(Checker, u64)>, CommitError> {
        Ok(Vec::new())
    }

    pub(crate) fn newest_transition_before(
        &self,
        _moment_ms: u64,
    ) -> Result<Option<u64>, CommitError> {
        Ok(None)
    }

    pub(crate) fn last_device(&self, _user: UserId) -> Result<Option<u32>, CommitError> {
        Ok(None)
    }

    pub(crate) fn decisions_of(&self, user: UserId) -> Result<Decisions, CommitError> {
        panic!("{user} decides nothing in a schedule");
    }

    pub(crate) fn note_heard(&self, _until_ms: u64) {}

    /// It was never put back from a backup.
    pub(crate) fn epochs_issued(&self) -> u32 {
        0
    }

    pub(crate) fn durable_position(&self) -> u64 {
        self.durable.lock().position
    }

    pub(crate) fn times_stored(&self, device: DeviceId, epoch: u32, seq: u64) -> u32 {
        let durable = self.durable.lock();
        durable
            .pings
            .get(&(device, epoch, seq))
            .copied()
            .unwrap_or_default()
    }

    /// A checker's deadlines.
    pub(crate) fn deadlines_of(&self, checker: Checker) -> HashMap<UserId, Setting> {
        let durable = self.durable.lock();
        let deadlines = durable.deadlines.iter();
        deadlines
            .filter(|((of, _), _)| *of == checker)
            .map(|(&(_, user), &setting)| (user, setting))
            .collect()
    }

    /// The newest event of each checker that has one.
    pub(crate) fn newest_events(&self) -> Vec<(Checker, u64)> {
        let durable = self.durable.lock();
        durable.events.iter().map(|(&of, &at)| (of, at)).collect()
    }

    pub(crate) fn has_failed(&self) -> bool {
        let commits = self.durable.lock().commits;
        self.failing_commit
            .is_some_and(|failing| failing <= commits)
    }
}

impl Durable {
    fn change(&mut self, change: Change) {
        match change {
            Change::Set(set) => {
                self.deadlines.insert((set.checker, set.user), set.setting);
            }
            Change::Removed(checker, user) => {
                self.deadlines.remove(&(checker, user));
            }
            Change::Event(event) => {
                self.events.insert(event.checker, event.position);
            }
        }
    }
}

impl Batch {
    pub(crate) fn put_pings(&mut self, _day: Day, key: &PingKey, value: &[u8]) {
        let row = record::decode_pings(value).expect("a row that was just encoded");
        let pings = row.pings.iter();
        self.pings
            .extend(pings.map(|ping| (key.device, key.epoch, ping.seq)));
    }

    pub(crate) fn put_position(&mut self, position: u64) {
        self.position = self.position.max(position);
    }

    pub(crate) fn put_device(&mut self, _device: &DeviceId, record: &DeviceRecord) {
        self.position = record.position;
    }

    pub(crate) fn put_news(&mut self, news: &News) {
        assert_eq!(news.coverage, None, "nothing is missed in a schedule");
        self.deadlines.extend(&news.deadlines);
    }

    pub(crate) fn put_revocation(&mut self, subject: Subject, _since_ms: Option<u64>) {
        panic!("{subject} is not revoked in a schedule");
    }

    pub(crate) fn put_invitations(&mut self, _change: &invitations::Change) {
        panic!("nobody enrols in a schedule");
    }

    pub(crate) fn put_decisions(&mut self, user: UserId, _decisions: &Decisions) {
        panic!("{user} decides nothing in a schedule");
    }

    pub(crate) fn forget_events(&mut self, _checker: Checker, _upto: u64) {}

    pub(crate) fn forget_transitions(&mut self, _upto: u64) {}

    pub(crate) fn size_bytes(&self) -> usize {
        self.pings.len()
    }
}
