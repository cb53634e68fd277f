//! What was sent and what the gateway said of it: the fleet's own books, against which the gateway is
//! checked afterwards.
//!
//! Knows pings, the outbox's events and epochs. Must not know connections, or how the gateway is asked.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
};

use waypost_proto::{
    id::DeviceId,
    outbox::{Event, Totals},
    ping::Ping,
    ranges::SeqRange,
};

/// The books of one device.
#[derive(Debug)]
pub struct DeviceLedger {
    /// Whose they are.
    pub device: DeviceId,
    /// What checkers must see, and no less.
    pub newest: Newest,
    /// Pings handed to the device, each pass counted.
    pub sent: u64,
    /// Pings that were acknowledged, each pass counted.
    pub acked: u64,
    /// Pings that the device had to drop.
    pub dropped: u64,
    /// What became of the pings, as acknowledgements counted them.
    pub fates: Totals,
    /// Refusals that were not for ever: the ping was sent again and had another fate then.
    pub retried: u64,
    /// Connections made.
    pub connections: u64,
    /// Connections that ended with an error: an acknowledgement may have been lost with each.
    pub breaks: u64,
    /// How often the gateway began a new epoch though the device had one: the gateway had lost what it
    /// had acknowledged.
    pub epochs_lost: u32,
    /// The epochs, oldest first; the last is the current one.
    pub epochs: Vec<EpochLedger>,
    /// Due times of pings sent again in a further pass, oldest first.
    repeats_due_us: VecDeque<u64>,
    /// What this connection's acknowledgements have counted so far.
    told: Totals,
    /// How many settled pings are kept for the check of the store.
    keep: usize,
}

/// The newest of what the gateway has told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Newest {
    /// When the gateway received something, by its clock.
    pub receive_ms: u64,
    /// The newest sample among what is settled and not refused.
    pub sample_ms: u64,
    /// The newest sample that was a fix.
    pub fix_ms: u64,
    /// The newest commit.
    pub position: u64,
}

/// What was sent in one epoch.
#[derive(Debug, Default)]
pub struct EpochLedger {
    /// The epoch, or 0 before the gateway has issued one.
    pub number: u32,
    /// How many pings were forgotten because they are too many to keep. They are the lowest.
    pub forgotten: u64,
    /// The pings after those, by sequence number.
    pub sent: VecDeque<Sent>,
}

/// One ping, as small as it can be and still be told from any other.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// All its values as one number.
    pub digest: u64,
    /// What its device knows of it.
    pub fate: Fate,
    /// Whether the check has found it in the store.
    pub is_found: bool,
    is_fix: bool,
    time_ms: u64,
    due_us: u64,
}

/// What a device knows of a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Not acknowledged yet.
    Open,
    /// Acknowledged.
    Settled,
    /// Refused for ever.
    Refused,
    /// Dropped by the device; it may have arrived.
    Dropped,
}

impl DeviceLedger {
    /// Empty books that keep at most about `keep` settled pings.
    #[must_use]
    pub fn new(device: DeviceId, keep: usize) -> Self {
        Self {
            device,
            newest: Newest::default(),
            sent: 0,
            acked: 0,
            dropped: 0,
            fates: Totals::default(),
            retried: 0,
            connections: 0,
            breaks: 0,
            epochs_lost: 0,
            epochs: vec![EpochLedger::default()],
            repeats_due_us: VecDeque::new(),
            told: Totals::default(),
            keep,
        }
    }

    /// A ping goes to the device, the next in order; `due_us` counts from the start of the run.
    pub fn send(&mut self, ping: &Ping, due_us: u64) {
        self.sent += 1;
        self.current().sent.push_back(Sent {
            digest: digest(ping),
            fate: Fate::Open,
            is_found: false,
            is_fix: ping.is_fix(),
            time_ms: ping.time_ms,
            due_us,
        });
    }

    /// A ping goes out again, after everything that went out again before.
    pub fn send_again(&mut self, due_us: u64) {
        self.sent += 1;
        self.repeats_due_us.push_back(due_us);
    }

    /// A ping that the device had to drop, because the gateway took too few for too long.
    pub fn dropped(&mut self, seq: u64) {
        self.dropped += 1;
        if let Some(sent) = self.current().get_mut(seq) {
            // Nothing more is expected of it, and nothing is known of it.
            sent.fate = Fate::Dropped;
        }
    }

    /// A new connection begins; its acknowledgements count from zero.
    pub fn connected(&mut self) {
        self.connections += 1;
        self.told = Totals::default();
    }

    /// The connection ended with an error.
    pub fn broke(&mut self) {
        self.breaks += 1;
    }

    /// Books what the gateway said. `acked` is told the due time of each ping that is thereby
    /// acknowledged.
    pub fn book(&mut self, event: &Event, acked: impl FnMut(u64)) {
        match event {
            Event::Welcomed {
                server_ms,
                position,
            } => self.heard(*server_ms, *position),
            Event::Renumbered { epoch, .. } => self.renumber(*epoch),
            Event::Rejected {
                retryable: true, ..
            } => self.retried += 1,
            Event::Rejected {
                seq,
                retryable: false,
                ..
            } => {
                // The event that settles it follows.
                if let Some(sent) = self.current().get_mut(*seq) {
                    sent.fate = Fate::Refused;
                }
            }
            Event::Settled(range) => self.settle(*range, acked),
            Event::Repeated(range) => {
                let again = usize::try_from(range.len())
                    .unwrap_or(usize::MAX)
                    .min(self.repeats_due_us.len());
                self.acked += again as u64;
                self.repeats_due_us.drain(..again).for_each(acked);
            }
            Event::Acknowledged {
                receive_ms,
                position,
                totals,
                ..
            } => {
                self.heard(*receive_ms, *position);
                self.count(*totals);
            }
            Event::ControlAnswered { .. } | Event::Leaving(_) => {}
        }
    }

    /// Pings of which an answer is still to come.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.sent - self.acked - self.dropped
    }

    /// Pings that were acknowledged, but by no acknowledgement that counted them: the connection broke
    /// between the commit and the acknowledgement.
    #[must_use]
    pub fn untold(&self) -> u64 {
        self.acked.saturating_sub(self.fates.sum() - self.retried)
    }

    fn heard(&mut self, receive_ms: u64, position: u64) {
        self.newest.receive_ms = self.newest.receive_ms.max(receive_ms);
        self.newest.position = self.newest.position.max(position);
    }

    /// Running totals may arrive late, on the other lane; an older one adds nothing.
    fn count(&mut self, totals: Totals) {
        for (sum, told, total) in [
            (
                &mut self.fates.accepted,
                &mut self.told.accepted,
                totals.accepted,
            ),
            (
                &mut self.fates.duplicate,
                &mut self.told.duplicate,
                totals.duplicate,
            ),
            (
                &mut self.fates.filtered,
                &mut self.told.filtered,
                totals.filtered,
            ),
            (
                &mut self.fates.rejected,
                &mut self.told.rejected,
                totals.rejected,
            ),
        ] {
            *sum += total.saturating_sub(*told);
            *told = total.max(*told);
        }
    }

    fn current(&mut self) -> &mut EpochLedger {
        let last = self.epochs.len() - 1;
        &mut self.epochs[last]
    }

    /// What is open is numbered anew, also what is still on its way to the outbox; what was settled stays
    /// where it was.
    fn renumber(&mut self, epoch: u32) {
        let current = self.current();
        let open = current
            .sent
            .iter()
            .filter(|sent| sent.fate == Fate::Open)
            .copied()
            .collect();
        let begun = EpochLedger {
            number: epoch,
            sent: open,
            forgotten: 0,
        };
        if current.number == 0 {
            *current = begun;
        } else {
            self.epochs_lost += 1;
            self.epochs.push(begun);
        }
    }

    fn settle(&mut self, range: SeqRange, mut acked: impl FnMut(u64)) {
        let keep = self.keep;
        let mut newest = self.newest;
        let current = self.current();
        let mut newly = 0;
        for seq in range.first..=range.last.min(current.highest()) {
            let Some(sent) = current.get_mut(seq) else {
                continue;
            };
            if sent.fate != Fate::Refused {
                sent.fate = Fate::Settled;
                newest.sample_ms = newest.sample_ms.max(sent.time_ms);
                if sent.is_fix {
                    newest.fix_ms = newest.fix_ms.max(sent.time_ms);
                }
            }
            acked(sent.due_us);
            newly += 1;
        }
        while keep < current.sent.len()
            && current
                .sent
                .front()
                .is_some_and(|sent| sent.fate != Fate::Open)
        {
            current.sent.pop_front();
            current.forgotten += 1;
        }
        self.newest = newest;
        self.acked += newly;
    }
}

impl EpochLedger {
    /// The ping of a sequence number, if it was sent and is not forgotten.
    pub fn get_mut(&mut self, seq: u64) -> Option<&mut Sent> {
        let at = seq.checked_sub(self.forgotten + 1)?;
        self.sent.get_mut(usize::try_from(at).ok()?)
    }

    /// The highest sequence number sent.
    #[must_use]
    pub fn highest(&self) -> u64 {
        self.forgotten + self.sent.len() as u64
    }
}

/// All values of a ping as one number, its sequence number excepted: that is its place in the ledger.
#[must_use]
pub fn digest(ping: &Ping) -> u64 {
    // Named one by one, so that a field that is added to Ping cannot be forgotten here.
    let Ping {
        seq: _,
        time_ms,
        latitude_e7,
        longitude_e7,
        accuracy_dm,
        altitude_dm,
        speed_cm_per_s,
        course_ddeg,
        heading_deg,
        battery_percent,
        source,
    } = *ping;
    let mut hasher = DefaultHasher::new();
    (
        time_ms,
        latitude_e7,
        longitude_e7,
        accuracy_dm,
        altitude_dm,
        speed_cm_per_s,
    )
        .hash(&mut hasher);
    (course_ddeg, heading_deg, battery_percent, source as i32).hash(&mut hasher);
    hasher.finish()
}

/// A ping for tests of the books: the source is a repetition for each fifth.
#[cfg(test)]
pub(crate) fn example_ping(seq: u64) -> Ping {
    use waypost_proto::ping::Source;
    let is_repeated = seq.is_multiple_of(5);
    Ping {
        source: if is_repeated {
            Source::LastKnown
        } else {
            Source::Gnss
        },
        ..Ping::at(seq, 1_000 * seq, 1, 2)
    }
}

#[cfg(test)]
mod tests {
    use waypost_proto::{id::UserId, ping::RejectCode};

    use super::*;

    /// Books of a device in epoch 1 that has sent pings; each is due at its number.
    fn ledger(sent: u64, keep: usize) -> DeviceLedger {
        let mut ledger = DeviceLedger::new(
            DeviceId {
                user: UserId([7; 16]),
                device: 1,
            },
            keep,
        );
        for seq in 1..=sent {
            ledger.send(&example_ping(seq), seq);
        }
        ledger.connected();
        book(
            &mut ledger,
            &Event::Renumbered {
                epoch: 1,
                previous_seqs: (1..=sent).collect(),
            },
        );
        ledger
    }

    /// The due times that an event acknowledges.
    fn book(ledger: &mut DeviceLedger, event: &Event) -> Vec<u64> {
        let mut due = Vec::new();
        ledger.book(event, |due_us| due.push(due_us));
        due
    }

    fn settled(first: u64, last: u64) -> Event {
        Event::Settled(SeqRange { first, last })
    }

    fn counted(accepted: u64, duplicate: u64, rejected: u64) -> Event {
        let totals = Totals {
            accepted,
            duplicate,
            filtered: 0,
            rejected,
        };
        Event::Acknowledged {
            receive_ms: 1,
            commit_ms: 2,
            position: 3,
            totals,
        }
    }

    #[test]
    fn settled_pings_are_acknowledged_with_their_due_times() {
        let mut ledger = ledger(10, usize::MAX);
        assert_eq!(book(&mut ledger, &settled(9, 10)), [9, 10]);
        assert_eq!(book(&mut ledger, &settled(1, 2)), [1, 2]);
        assert_eq!((ledger.acked, ledger.open()), (4, 6));
        assert_eq!(ledger.newest.sample_ms, 10_000);
        assert_eq!(ledger.newest.fix_ms, 9_000, "the tenth was no fix");
    }

    #[test]
    fn totals_count_per_connection_and_a_late_one_adds_nothing() {
        let mut ledger = ledger(9, usize::MAX);
        book(&mut ledger, &counted(3, 0, 0));
        book(&mut ledger, &counted(5, 1, 0));
        book(&mut ledger, &counted(4, 0, 0));
        ledger.connected();
        book(&mut ledger, &counted(2, 0, 1));
        assert_eq!(
            ledger.fates,
            Totals {
                accepted: 7,
                duplicate: 1,
                filtered: 0,
                rejected: 1
            }
        );
    }

    #[test]
    fn a_refused_ping_is_acknowledged_but_no_sign_of_a_sample() {
        let mut ledger = ledger(2, usize::MAX);
        let rejected = |seq, retryable| Event::Rejected {
            seq,
            code: RejectCode::TooOld,
            retryable,
        };
        book(&mut ledger, &rejected(1, true));
        book(&mut ledger, &rejected(2, false));
        assert_eq!(book(&mut ledger, &settled(2, 2)), [2]);
        book(&mut ledger, &counted(0, 0, 2));
        assert_eq!((ledger.newest.sample_ms, ledger.untold()), (0, 0));
        book(&mut ledger, &settled(1, 1));
        book(&mut ledger, &counted(1, 0, 2));
        assert_eq!(
            (ledger.newest.sample_ms, ledger.untold(), ledger.open()),
            (1_000, 0, 0)
        );
        assert_eq!(
            ledger.epochs[0]
                .sent
                .iter()
                .map(|sent| sent.fate)
                .collect::<Vec<_>>(),
            [Fate::Settled, Fate::Refused]
        );
    }

    #[test]
    fn what_was_settled_behind_a_broken_connection_is_untold() {
        let mut ledger = ledger(5, usize::MAX);
        book(&mut ledger, &settled(1, 2));
        book(&mut ledger, &counted(2, 0, 0));
        ledger.connected();
        book(&mut ledger, &settled(3, 4));
        book(&mut ledger, &settled(5, 5));
        book(&mut ledger, &counted(1, 0, 0));
        assert_eq!(
            (ledger.fates.accepted, ledger.untold(), ledger.open()),
            (3, 2, 0)
        );
    }

    #[test]
    fn a_new_epoch_numbers_the_open_pings_anew() {
        let mut ledger = ledger(5, usize::MAX);
        book(&mut ledger, &settled(1, 2));
        book(&mut ledger, &settled(4, 4));
        book(
            &mut ledger,
            &Event::Renumbered {
                epoch: 3,
                previous_seqs: vec![3, 5],
            },
        );
        assert_eq!(book(&mut ledger, &settled(1, 2)), [3, 5]);
        assert_eq!((ledger.epochs_lost, ledger.open()), (1, 0));
        assert_eq!(
            ledger.epochs[1].get_mut(2).unwrap().digest,
            digest(&example_ping(5))
        );
        assert_eq!(ledger.epochs[0].get_mut(4).unwrap().fate, Fate::Settled);
    }

    #[test]
    fn settled_pings_are_forgotten_when_they_are_too_many() {
        let mut ledger = ledger(10, 3);
        book(&mut ledger, &settled(2, 10));
        assert_eq!(
            ledger.epochs[0].sent.len(),
            10,
            "an open ping is never forgotten"
        );
        book(&mut ledger, &settled(1, 1));
        let epoch = &mut ledger.epochs[0];
        assert_eq!(
            (epoch.forgotten, epoch.sent.len(), epoch.highest()),
            (7, 3, 10)
        );
        assert_eq!(epoch.get_mut(8).unwrap().digest, digest(&example_ping(8)));
        assert!(epoch.get_mut(7).is_none());
    }

    #[test]
    fn pings_sent_again_are_acknowledged_in_turn() {
        let mut ledger = ledger(2, usize::MAX);
        book(&mut ledger, &settled(1, 2));
        ledger.send_again(101);
        ledger.send_again(102);
        assert_eq!(
            book(
                &mut ledger,
                &Event::Repeated(SeqRange { first: 1, last: 1 })
            ),
            [101]
        );
        assert_eq!((ledger.sent, ledger.acked, ledger.open()), (4, 3, 1));
    }

    #[test]
    fn a_dropped_ping_is_not_waited_for() {
        let mut ledger = ledger(2, usize::MAX);
        ledger.dropped(1);
        book(&mut ledger, &settled(2, 2));
        assert_eq!((ledger.open(), ledger.dropped), (0, 1));
    }

    #[test]
    fn any_other_value_is_another_digest() {
        let one = example_ping(1);
        assert_eq!(digest(&one), digest(&Ping { seq: 2, ..one }));
        assert_ne!(
            digest(&one),
            digest(&Ping {
                heading_deg: Some(0),
                ..one
            })
        );
        assert_ne!(
            digest(&Ping {
                course_ddeg: Some(9),
                ..one
            }),
            digest(&Ping {
                heading_deg: Some(9),
                ..one
            }),
            "the same number in another column"
        );
    }
}
