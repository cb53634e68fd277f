//! What happened in a run, and the model that judges it.
//!
//! The log is written where things happen: a ping when it is pushed, a commit when it is durable, an
//! answer when the gateway writes it, a forgotten ping when the outbox lets go of it. The judge reads it
//! from the beginning with a model of its own, sets and maps, and knows neither outbox, session nor
//! device record.

use std::collections::{BTreeMap, HashMap, HashSet};

use waypost_proto::{
    device::{Admission, Clocks, is_retryable},
    ping::{MAX_LATITUDE_E7, Ping, RejectCode},
    ranges::SeqRange,
    v1,
};

/// Names one ping for the whole run; its payload carries it.
pub(crate) type Name = u32;
/// Names one connection for the whole run.
pub(crate) type LinkId = usize;

#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// A ping was handed to an outbox.
    Pushed { name: Name, ping: Ping },
    /// A full outbox dropped it, and said so.
    Dropped { name: Name },
    /// The queue that held it was thrown away.
    Wiped { name: Name },
    /// The outbox let go of it because the gateway said that it may.
    Forgotten { name: Name },
    /// A commit is on disk.
    Committed(Commit),
    /// The gateway wrote an ack.
    Acked {
        link: LinkId,
        device: u32,
        ack: v1::Ack,
        /// The session has now been told all that this commit settled.
        is_complete: bool,
    },
    /// The gateway answered Hello.
    Welcomed { device: u32, welcome: v1::Welcome },
    /// A copy of the store was put aside.
    BackedUp,
    /// The store was replaced, by an empty one or by the copy.
    Replaced { by_backup: bool },
}

#[derive(Clone, Debug)]
pub(crate) struct Commit {
    pub(crate) position: u64,
    pub(crate) commit_ms: u64,
    pub(crate) events: Vec<Judged>,
    /// The rows of pings as they lie on disk.
    pub(crate) rows: Vec<Row>,
    /// The clocks that become visible.
    pub(crate) clocks: Vec<(u32, Clocks)>,
}

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) device: u32,
    pub(crate) epoch: u32,
    pub(crate) ping: Ping,
}

/// What a commit did, in its order.
#[derive(Clone, Debug)]
pub(crate) enum Judged {
    Contact {
        device: u32,
        receive_ms: u64,
    },
    Hello {
        device: u32,
        admission: Admission,
        epoch: u32,
        /// Resumed: lower numbers were given up.
        oldest_unsent_seq: u64,
    },
    Ping {
        link: LinkId,
        device: u32,
        epoch: u32,
        seq: u64,
        receive_ms: u64,
        /// `None` for one that could not be decoded.
        ping: Option<Ping>,
        fate: Fate,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Stored,
    Duplicate,
    Filtered,
    Refused(RejectCode),
}

/// The rules that pings are judged by, as the run was told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) retention_ms: u64,
    pub(crate) future_tolerance_ms: u64,
    pub(crate) thins: bool,
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Breach {
    /// A device let go of a ping that is neither stored nor refused for ever.
    ForgottenNotStored {
        name: Name,
    },
    /// At the end nobody can say where a ping is.
    LostSight {
        name: Name,
    },
    /// A ping that was handed over is not the one that is stored.
    PayloadChanged {
        device: u32,
        epoch: u32,
        seq: u64,
    },
    StoredTwice {
        device: u32,
        epoch: u32,
        seq: u64,
    },
    /// One was called a duplicate that is not settled, or new that is, or refused without a reason.
    WrongFate {
        device: u32,
        epoch: u32,
        seq: u64,
    },
    /// An ack or Welcome names what is not durable.
    NamedNotDurable {
        device: u32,
        epoch: u32,
        seq: u64,
    },
    /// An ack names a commit that is not durable, or an earlier one than the ack before.
    WrongPosition {
        link: LinkId,
        position: u64,
    },
    TotalsDoNotAddUp {
        link: LinkId,
    },
    /// A commit's rows are not those of the pings that it says it stored.
    RowsMissing {
        position: u64,
    },
    /// A commit does not come after the one before it.
    PositionReused {
        position: u64,
    },
    EpochIssuedTwice {
        device: u32,
        epoch: u32,
    },
    ClockWentBack {
        device: u32,
    },
    /// A contact or sample of this commit is not in the clocks.
    ClockBehind {
        device: u32,
    },
}

/// Why a number is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settlement {
    Stored(Name),
    Filtered,
    Refused(RejectCode),
    GivenUp,
}

/// What the store must hold.
#[derive(Clone, Default)]
struct StoreModel {
    settled: HashMap<(u32, u32), EpochModel>,
    rows: HashSet<(u32, u32, u64)>,
    /// Stored, filtered or refused for ever: pings that a device may forget.
    done: HashSet<Name>,
    epochs: HashMap<u32, u32>,
    clocks: HashMap<u32, Clocks>,
    position: u64,
}

#[derive(Clone, Default)]
struct EpochModel {
    numbers: BTreeMap<u64, Settlement>,
    /// All up to here are settled; follows lazily.
    contiguous: u64,
}

impl EpochModel {
    fn first_missing(&mut self, range: SeqRange) -> Option<u64> {
        while self.numbers.contains_key(&(self.contiguous + 1)) {
            self.contiguous += 1;
        }
        (range.first.max(self.contiguous + 1)..=range.last)
            .find(|seq| !self.numbers.contains_key(seq))
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Totals {
    accepted: u64,
    duplicate: u64,
    filtered: u64,
    rejected: u64,
}

pub(crate) fn name_of(ping: &Ping) -> Name {
    Name::try_from(ping.longitude_e7).unwrap()
}

/// How often the log says each thing.
pub(crate) fn tally(entries: &[Entry], counts: &mut BTreeMap<&'static str, u64>) {
    for entry in entries {
        let (what, events) = match entry {
            Entry::Committed(commit) => ("commits", commit.events.as_slice()),
            Entry::Acked { .. } => ("acks", [].as_slice()),
            Entry::Forgotten { .. } => ("forgotten after an ack", [].as_slice()),
            _ => continue,
        };
        *counts.entry(what).or_default() += 1;
        for event in events {
            let what = match event {
                Judged::Contact { .. } => "contacts",
                Judged::Hello { admission, .. } => admission.as_label(),
                Judged::Ping { fate, .. } => match fate {
                    Fate::Stored => "stored",
                    Fate::Duplicate => "duplicates",
                    Fate::Filtered => "filtered",
                    Fate::Refused(code) => code.as_str_name(),
                },
            };
            *counts.entry(what).or_default() += 1;
        }
    }
}

/// Reads a whole run, and says every promise that it broke, in the order it was broken.
pub(crate) fn judge(entries: &[Entry], rules: Rules) -> Vec<Breach> {
    let mut judge = Judge {
        rules,
        pushed: HashMap::new(),
        let_go: HashSet::new(),
        store: StoreModel::default(),
        backup: StoreModel::default(),
        totals: HashMap::new(),
        acked_positions: HashMap::new(),
        breaches: Vec::new(),
    };
    for entry in entries {
        judge.read(entry);
    }
    judge.finish()
}

struct Judge {
    rules: Rules,
    pushed: HashMap<Name, Ping>,
    /// Dropped, wiped, or forgotten by the device with good reason at that time.
    let_go: HashSet<Name>,
    store: StoreModel,
    backup: StoreModel,
    totals: HashMap<LinkId, Totals>,
    acked_positions: HashMap<LinkId, u64>,
    breaches: Vec<Breach>,
}

impl Judge {
    fn read(&mut self, entry: &Entry) {
        match entry {
            Entry::Pushed { name, ping } => {
                self.pushed.insert(*name, *ping);
            }
            Entry::Dropped { name } | Entry::Wiped { name } => {
                self.let_go.insert(*name);
            }
            Entry::Forgotten { name } => {
                if !self.may_be_forgotten(*name) {
                    self.breaches
                        .push(Breach::ForgottenNotStored { name: *name });
                }
                self.let_go.insert(*name);
            }
            Entry::Committed(commit) => self.committed(commit),
            Entry::Acked {
                link,
                device,
                ack,
                is_complete,
            } => self.acked(*link, *device, ack, *is_complete),
            Entry::Welcomed { device, welcome } => {
                self.named(
                    *device,
                    welcome.epoch,
                    welcome.durable_upto,
                    &welcome.ranges,
                );
            }
            Entry::BackedUp => self.backup = self.store.clone(),
            Entry::Replaced { by_backup } => {
                self.store = if *by_backup {
                    self.backup.clone()
                } else {
                    StoreModel::default()
                };
                self.backup = self.store.clone();
                self.acked_positions.clear();
            }
        }
    }

    fn finish(mut self) -> Vec<Breach> {
        let lost = self
            .pushed
            .keys()
            .filter(|name| !self.let_go.contains(name) && !self.may_be_forgotten(**name));
        let mut lost: Vec<Breach> = lost.map(|name| Breach::LostSight { name: *name }).collect();
        lost.sort_unstable();
        self.breaches.append(&mut lost);
        self.breaches
    }

    fn may_be_forgotten(&self, name: Name) -> bool {
        // What has no coordinates cannot be named by the gateway, and is never stored.
        self.store.done.contains(&name) || MAX_LATITUDE_E7 < self.pushed[&name].latitude_e7
    }

    fn committed(&mut self, commit: &Commit) {
        if commit.position <= self.store.position {
            self.breaches.push(Breach::PositionReused {
                position: commit.position,
            });
        }
        self.store.position = commit.position;
        let mut least = HashMap::new();
        for event in &commit.events {
            self.judged(event, &mut least);
        }
        let rows_due = commit.events.iter().filter(|event| {
            let Judged::Ping { fate, .. } = event else {
                return false;
            };
            *fate == Fate::Stored
        });
        if rows_due.count() != commit.rows.len() {
            self.breaches.push(Breach::RowsMissing {
                position: commit.position,
            });
        }
        for row in &commit.rows {
            self.stored(row);
        }
        for (device, clocks) in &commit.clocks {
            let before = self.store.clocks.insert(*device, *clocks);
            if before.is_some_and(|before| clocks.newest(before) != *clocks) {
                self.breaches
                    .push(Breach::ClockWentBack { device: *device });
            }
            let due: Clocks = least.remove(device).unwrap_or_default();
            let due = Clocks {
                durable_ms: commit.commit_ms,
                ..due
            };
            if clocks.newest(due) != *clocks {
                self.breaches.push(Breach::ClockBehind { device: *device });
            }
        }
        // Whoever was heard must have been published.
        for device in least.into_keys() {
            self.breaches.push(Breach::ClockBehind { device });
        }
    }

    fn judged(&mut self, event: &Judged, least: &mut HashMap<u32, Clocks>) {
        match *event {
            Judged::Contact { device, receive_ms } => {
                let clocks = least.entry(device).or_default();
                clocks.last_contact_ms = clocks.last_contact_ms.max(receive_ms);
            }
            Judged::Hello {
                device,
                admission: Admission::NewEpoch | Admission::LostAcknowledged,
                epoch,
                ..
            } => {
                let before = self.store.epochs.insert(device, epoch);
                if before.is_some_and(|before| epoch <= before) {
                    self.breaches
                        .push(Breach::EpochIssuedTwice { device, epoch });
                }
            }
            Judged::Hello {
                device,
                admission: Admission::Resumed,
                epoch,
                oldest_unsent_seq,
            } => {
                let model = self.store.settled.entry((device, epoch)).or_default();
                for seq in 1..oldest_unsent_seq {
                    model.numbers.entry(seq).or_insert(Settlement::GivenUp);
                }
            }
            Judged::Hello { .. } => {}
            Judged::Ping {
                link,
                device,
                epoch,
                seq,
                receive_ms,
                ping,
                fate,
            } => {
                let totals = self.totals.entry(link).or_default();
                match fate {
                    Fate::Stored => totals.accepted += 1,
                    Fate::Duplicate => totals.duplicate += 1,
                    Fate::Filtered => totals.filtered += 1,
                    Fate::Refused(_) => totals.rejected += 1,
                }
                let due = self.due(ping, receive_ms);
                let numbers = &mut self
                    .store
                    .settled
                    .entry((device, epoch))
                    .or_default()
                    .numbers;
                let known = numbers.get(&seq).copied();
                let is_right = match (fate, known) {
                    (Fate::Duplicate, Some(_)) => true,
                    (Fate::Refused(code), None) if is_retryable(code) => true,
                    (Fate::Refused(code), None) => due == Some(code),
                    (Fate::Filtered, None) => self.rules.thins && due.is_none(),
                    (Fate::Stored, None) => due.is_none(),
                    _ => false,
                };
                if !is_right {
                    self.breaches.push(Breach::WrongFate { device, epoch, seq });
                }
                match fate {
                    Fate::Filtered => {
                        numbers.insert(seq, Settlement::Filtered);
                    }
                    Fate::Refused(code) if !is_retryable(code) => {
                        numbers.insert(seq, Settlement::Refused(code));
                    }
                    Fate::Stored => {
                        if let Some(ping) = ping {
                            numbers.insert(seq, Settlement::Stored(name_of(&ping)));
                        }
                    }
                    // Settled before, or as if it had never come.
                    Fate::Duplicate | Fate::Refused(_) => {}
                }
                let is_settled_for_ever = match fate {
                    Fate::Filtered => true,
                    Fate::Refused(code) => !is_retryable(code),
                    Fate::Stored | Fate::Duplicate => false,
                };
                if let Some(ping) = ping {
                    if is_settled_for_ever {
                        self.store.done.insert(name_of(&ping));
                    }
                    if matches!(fate, Fate::Stored | Fate::Filtered) {
                        let clocks = least.entry(device).or_default();
                        clocks.last_sample_ms = clocks.last_sample_ms.max(ping.time_ms);
                        if ping.is_fix() {
                            clocks.last_fix_ms = clocks.last_fix_ms.max(ping.time_ms);
                        }
                    }
                }
            }
        }
    }

    /// The reason to refuse a ping for ever, if there is one.
    fn due(&self, ping: Option<Ping>, receive_ms: u64) -> Option<RejectCode> {
        let Some(ping) = ping else {
            return Some(RejectCode::BadCoordinates);
        };
        if receive_ms + self.rules.future_tolerance_ms < ping.time_ms {
            Some(RejectCode::TimeInFuture)
        } else if ping.time_ms + self.rules.retention_ms < receive_ms {
            Some(RejectCode::TooOld)
        } else {
            None
        }
    }

    fn stored(&mut self, row: &Row) {
        let (device, epoch, seq) = (row.device, row.epoch, row.ping.seq);
        let name = name_of(&row.ping);
        let is_same = self
            .pushed
            .get(&name)
            .is_some_and(|pushed| Ping { seq, ..*pushed } == row.ping);
        if !is_same {
            self.breaches
                .push(Breach::PayloadChanged { device, epoch, seq });
        }
        let is_judged = self
            .store
            .settled
            .get(&(device, epoch))
            .is_some_and(|model| model.numbers.get(&seq) == Some(&Settlement::Stored(name)));
        let is_first = self.store.rows.insert((device, epoch, seq));
        if !is_first {
            self.breaches
                .push(Breach::StoredTwice { device, epoch, seq });
        } else if !is_judged {
            self.breaches.push(Breach::WrongFate { device, epoch, seq });
        }
        self.store.done.insert(name);
    }

    fn acked(&mut self, link: LinkId, device: u32, ack: &v1::Ack, is_complete: bool) {
        self.named(device, ack.epoch, ack.durable_upto, &ack.ranges);
        let before = self.acked_positions.insert(link, ack.position);
        if self.store.position < ack.position || before.is_some_and(|before| ack.position < before)
        {
            self.breaches.push(Breach::WrongPosition {
                link,
                position: ack.position,
            });
        }
        let told = Totals {
            accepted: ack.accepted,
            duplicate: ack.duplicate,
            filtered: ack.filtered,
            rejected: ack.rejected,
        };
        if is_complete && told != self.totals.get(&link).copied().unwrap_or_default() {
            self.breaches.push(Breach::TotalsDoNotAddUp { link });
        }
        let empty = EpochModel::default();
        let model = self
            .store
            .settled
            .get(&(device, ack.epoch))
            .unwrap_or(&empty);
        for reject in ack.rejects.iter().filter(|reject| !reject.retryable) {
            if model.numbers.get(&reject.seq) != Some(&Settlement::Refused(reject.code())) {
                self.breaches.push(Breach::NamedNotDurable {
                    device,
                    epoch: ack.epoch,
                    seq: reject.seq,
                });
            }
        }
    }

    fn named(&mut self, device: u32, epoch: u32, durable_upto: u64, ranges: &[v1::SeqRange]) {
        let model = self.store.settled.entry((device, epoch)).or_default();
        let floor = SeqRange {
            first: 1,
            last: durable_upto,
        };
        let ranges = ranges.iter().map(|range| SeqRange {
            first: range.first,
            last: range.last,
        });
        for range in std::iter::once(floor).chain(ranges) {
            if let Some(seq) = model.first_missing(range) {
                self.breaches
                    .push(Breach::NamedNotDurable { device, epoch, seq });
            }
        }
    }
}
