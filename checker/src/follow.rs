//! Following the stream: what each event of it means for a consumer who was told the ones before.
//!
//! Takes events and moments, gives [`Event`]s. Must not know connections, tasks or clocks.
//!
//! Two positions are kept apart. `announced` is what *this* stream has promised: an entry at or below it
//! breaks the contract, and a stream that does so is not believed any further. `position` is what was worked
//! through by the consumer, over all streams: what comes again at or below it is dropped. Between two
//! announcements entries come in no particular order, so an entry says nothing of the position below it, and
//! only an announcement can be resumed from.
//!
//! # Bounds
//!
//! What was given out since the last announcement is remembered, so that it is not given again after the
//! connection broke: up to [`MAX_GIVEN`] changes. Beyond, a change may be given a second time; a consumer
//! sees by its position that it is the same.

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    time::{Duration, Instant},
};

use bytes::Bytes;
use waypost_proto::{
    id::UserId,
    v1::{Progress, Reset, SnapshotEnd, coverage, deadline, reset, watch_event::Kind},
};

use crate::{Deadline, Entry, Event, Gap, Resume, Transition};

/// Some 2 MB. A gateway announces twice a second, so this is reached beyond 100,000 changes a second.
pub(crate) const MAX_GIVEN: usize = 65_536;

/// How a stream broke the contract of `freshness.proto`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// An event came after one that it may not come after.
    #[error("{event} came out of turn")]
    OutOfTurn {
        /// Which.
        event: &'static str,
    },
    /// A change came that was promised not to come any more.
    #[error("{event} came at position {position}, after {announced} was announced")]
    AfterAnnouncement {
        /// What it was, and of whom.
        event: String,
        /// Its commit.
        position: u64,
        /// What was announced.
        announced: u64,
    },
    /// An announcement took back an earlier one.
    #[error("progress went back from {announced} to {position}")]
    WentBack {
        /// What was announced.
        announced: u64,
        /// And then.
        position: u64,
    },
    /// The stream goes on behind the place that was asked for, so something is missing.
    #[error("the stream goes on after {position}, not after {wanted}")]
    Skipped {
        /// Where it goes on.
        position: u64,
        /// Where it should.
        wanted: u64,
    },
    /// Entries of a snapshot are missing, or there are too many.
    #[error("the snapshot held {count} entries, but {came} came")]
    Count {
        /// What the gateway counted.
        count: u64,
        /// What came.
        came: u64,
    },
    /// A user is 16 bytes.
    #[error("a user is named by {bytes} bytes")]
    User {
        /// How many there were.
        bytes: usize,
    },
}

/// What there is to do when nothing comes.
#[derive(Debug)]
pub(crate) enum Overdue {
    /// Tell the consumer.
    Stale(Event),
    /// Give the stream up.
    Motionless,
}

/// How long nothing may come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) stale_after: Duration,
    pub(crate) lost_after: Duration,
}

/// A change, to recognise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Given {
    position: u64,
    what: What,
}

/// Of one commit, each of these can come once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum What {
    Entry(UserId),
    Deadline(UserId, deadline::Kind),
    Gap(u64, coverage::Reason),
    Transition(UserId, u32),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry(user) => write!(f, "{user}"),
            Self::Deadline(user, kind) => write!(f, "{} of {user}", kind.as_str_name()),
            Self::Transition(user, number) => write!(f, "transition {number}, of {user}"),
            Self::Gap(from_ms, reason) => write!(f, "{} from {from_ms}", reason.as_str_name()),
        }
    }
}

/// Where a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There is none.
    None,
    /// Its header is next.
    Header,
    /// A snapshot begins; the next event may say why.
    Anew,
    /// So many entries of a snapshot have come.
    Snapshot(u64),
    /// Changes come.
    Changes,
}

#[derive(Debug)]
pub(crate) struct Follower {
    /// Everything at or below was given out.
    position: u64,
    /// Of that position; empty when nothing can be resumed from.
    token: Bytes,
    /// What was given out above it.
    given: HashSet<Given>,
    /// Something was given out, by this watch or the one that it resumes.
    has_given: bool,
    resolved_ms: u64,
    stage: Stage,
    /// This stream has nothing at or below any more.
    announced: u64,
    patience: Patience,
    /// When something was last learned.
    learned_at: Instant,
    /// When the stream last moved.
    moved_at: Instant,
    is_stale: bool,
}

impl Follower {
    pub(crate) fn new(from: Option<Resume>, patience: Patience, now: Instant) -> Self {
        Self {
            position: from.as_ref().map_or(0, Resume::position),
            token: from.as_ref().map_or_else(Bytes::new, Resume::token),
            given: HashSet::new(),
            has_given: from.is_some(),
            resolved_ms: 0,
            stage: Stage::None,
            announced: 0,
            patience,
            learned_at: now,
            moved_at: now,
            is_stale: false,
        }
    }

    /// To ask for the next stream with; empty for a snapshot.
    pub(crate) fn token(&self) -> Bytes {
        self.token.clone()
    }

    /// A stream was asked for with [`Self::token`].
    pub(crate) fn begin(&mut self, now: Instant) {
        self.stage = Stage::Header;
        self.announced = 0;
        self.moved_at = now;
    }

    /// The stream is no more.
    pub(crate) fn end(&mut self) {
        self.stage = Stage::None;
    }

    /// The next stream begins with a snapshot.
    pub(crate) fn distrust(&mut self) {
        self.token = Bytes::new();
        self.position = 0;
    }

    /// The moment at which [`Self::overdue`] has something to say, if nothing comes before.
    pub(crate) fn due(&self) -> Option<Instant> {
        let stale = (!self.is_stale).then_some(self.learned_at + self.patience.stale_after);
        let lost = (self.stage != Stage::None).then_some(self.moved_at + self.patience.lost_after);
        [stale, lost].into_iter().flatten().min()
    }

    /// What there is to do at this moment.
    pub(crate) fn overdue(&mut self, now: Instant) -> Option<Overdue> {
        if !self.is_stale && self.learned_at + self.patience.stale_after <= now {
            self.is_stale = true;
            return Some(Overdue::Stale(Event::Stale {
                resolved_ms: self.resolved_ms,
            }));
        }
        let is_lost = self.stage != Stage::None && self.moved_at + self.patience.lost_after <= now;
        is_lost.then_some(Overdue::Motionless)
    }

    /// Takes the stream's next event; what a consumer is to be told goes to `events`.
    pub(crate) fn take(
        &mut self,
        kind: Kind,
        now: Instant,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Violation> {
        self.enter(&kind, now, events)?;
        match kind {
            Kind::Header(header) => self.take_header(header.position, now, events),
            Kind::Reset(reset) => {
                self.take_reset(reset, events);
                Ok(())
            }
            Kind::Entry(entry) => self.take_entry(entry.try_into()?, events),
            Kind::SnapshotEnd(end) => self.take_snapshot_end(end, events),
            Kind::Progress(progress) => self.take_progress(progress, now, events),
            Kind::Coverage(span) => {
                let gap = Gap::from(span);
                let what = What::Gap(gap.from_ms, gap.reason);
                self.give(gap.position, what, Event::Coverage(gap), events)
            }
            Kind::Deadline(deadline) => {
                let deadline = Deadline::try_from(deadline)?;
                let what = What::Deadline(deadline.user, deadline.kind);
                self.give(deadline.position, what, Event::Deadline(deadline), events)
            }
            Kind::Transition(transition) => {
                let transition = Transition::try_from(transition)?;
                let what = What::Transition(transition.user, transition.number);
                let position = transition.position;
                self.give(position, what, Event::Transition(transition), events)
            }
        }
    }

    /// What the stage says of any event but a header.
    fn enter(
        &mut self,
        kind: &Kind,
        now: Instant,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Violation> {
        if matches!(kind, Kind::Header(_)) {
            return Ok(());
        }
        match self.stage {
            Stage::None | Stage::Header => {
                return Err(Violation::OutOfTurn {
                    event: "an event before the header",
                });
            }
            Stage::Anew => {
                self.stage = Stage::Snapshot(0);
                if self.has_given && !matches!(kind, Kind::Reset(_)) {
                    self.reset(reset::Reason::Unspecified, events);
                }
            }
            Stage::Snapshot(_) | Stage::Changes => {}
        }
        if let Stage::Snapshot(_) = self.stage {
            // A snapshot has no progress: that it comes is progress.
            self.moved_at = now;
            if !self.is_stale {
                self.learned_at = now;
            }
        }
        Ok(())
    }

    fn take_header(
        &mut self,
        position: u64,
        now: Instant,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Violation> {
        if self.stage != Stage::Header {
            return Err(Violation::OutOfTurn {
                event: "a second header",
            });
        }
        if self.position < position {
            return Err(Violation::Skipped {
                position,
                wanted: self.position,
            });
        }
        self.moved_at = now;
        self.announced = position;
        self.stage = match position {
            0 => Stage::Anew,
            _ => Stage::Changes,
        };
        if position == 0 {
            // Should this stream break, half a snapshot is nothing to go on from.
            self.distrust();
        }
        events.push_back(Event::Connected { position });
        Ok(())
    }

    fn take_reset(&mut self, reset: Reset, events: &mut VecDeque<Event>) {
        self.stage = Stage::Snapshot(0);
        self.announced = 0;
        self.distrust();
        self.reset(reset.reason(), events);
    }

    fn reset(&mut self, reason: reset::Reason, events: &mut VecDeque<Event>) {
        self.given.clear();
        self.has_given = false;
        self.resolved_ms = 0;
        events.push_back(Event::Reset { reason });
    }

    fn take_entry(&mut self, entry: Entry, events: &mut VecDeque<Event>) -> Result<(), Violation> {
        let is_snapshot = if let Stage::Snapshot(came) = &mut self.stage {
            *came += 1;
            true
        } else {
            false
        };
        let (position, what) = (entry.position, What::Entry(entry.user));
        self.give(position, what, Event::Entry { entry, is_snapshot }, events)
    }

    /// Gives what is part of a snapshot, or a change that was not given out yet.
    fn give(
        &mut self,
        position: u64,
        what: What,
        event: Event,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Violation> {
        let is_snapshot = matches!(self.stage, Stage::Snapshot(_));
        if is_snapshot || self.is_news(Given { position, what })? {
            self.has_given = true;
            events.push_back(event);
        }
        Ok(())
    }

    /// Whether a change was not given out yet.
    fn is_news(&mut self, change: Given) -> Result<bool, Violation> {
        if change.position <= self.announced {
            return Err(Violation::AfterAnnouncement {
                event: change.what.to_string(),
                position: change.position,
                announced: self.announced,
            });
        }
        if change.position <= self.position || self.given.contains(&change) {
            return Ok(false);
        }
        if self.given.len() < MAX_GIVEN {
            self.given.insert(change);
        }
        Ok(true)
    }

    fn take_snapshot_end(
        &mut self,
        end: SnapshotEnd,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Violation> {
        let Stage::Snapshot(came) = self.stage else {
            return Err(Violation::OutOfTurn {
                event: "the end of a snapshot",
            });
        };
        if came != end.count {
            return Err(Violation::Count {
                count: end.count,
                came,
            });
        }
        self.stage = Stage::Changes;
        self.announced = end.position;
        self.has_given = true;
        self.settle(end.position, end.token);
        events.push_back(Event::SnapshotEnd {
            count: end.count,
            position: end.position,
            resume: self.resume(),
        });
        Ok(())
    }

    fn take_progress(
        &mut self,
        progress: Progress,
        now: Instant,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Violation> {
        if self.stage != Stage::Changes {
            return Err(Violation::OutOfTurn {
                event: "progress within a snapshot",
            });
        }
        if progress.position < self.announced {
            return Err(Violation::WentBack {
                announced: self.announced,
                position: progress.position,
            });
        }
        self.moved_at = now;
        self.announced = progress.position;
        // One that started further back than was asked for is still catching up.
        if self.position <= progress.position {
            self.settle(progress.position, progress.token);
        }
        events.push_back(Event::Progress {
            resolved_ms: progress.resolved_ms,
            position: self.position,
            lag_ms: progress.lag_ms,
            resume: self.resume(),
        });
        // Progress that stands still teaches nothing.
        if self.resolved_ms < progress.resolved_ms {
            self.resolved_ms = progress.resolved_ms;
            self.learned_at = now;
            if self.is_stale {
                self.is_stale = false;
                events.push_back(Event::Live {
                    resolved_ms: self.resolved_ms,
                });
            }
        }
        Ok(())
    }

    fn settle(&mut self, position: u64, token: Bytes) {
        self.position = position;
        self.token = token;
        self.given.retain(|change| position < change.position);
    }

    fn resume(&self) -> Resume {
        Resume::new(self.position, self.token())
    }
}

#[cfg(test)]
mod tests;
