//! What a watching checker knows, and what it says of each event.
//!
//! Takes events and times, returns reports. Must not know the connection or the terminal, nor when a user
//! is silent: that is for [`Silences`] to say.

use std::fmt;

use serde::Serialize;
use waypost_checker::{
    Change, Deadline, Entry, Event, Gap, Interruption, Silences, State, Transition, coverage,
    deadline, reset,
};

/// One line of output. Times are as in `freshness.proto`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Report {
    /// A stream has begun; from a snapshot when `position` is 0.
    Connected { position: u64 },
    /// What was known does not hold any more; a snapshot follows.
    Reset { reason: &'static str },
    /// A user's freshness.
    Entry {
        user: String,
        state: &'static str,
        last_contact_ms: u64,
        last_sample_ms: u64,
        last_fix_ms: u64,
        durable_ms: u64,
        position: u64,
        coalesced: u32,
        /// What was known already, not a change.
        is_snapshot: bool,
    },
    /// All that was known has been said.
    SnapshotEnd { count: u64, position: u64 },
    /// The stream is complete up to `resolved_ms`.
    Progress {
        resolved_ms: u64,
        position: u64,
        lag_ms: u64,
        users: usize,
        silent: usize,
    },
    /// A user has not been heard for longer than asked for.
    Silent {
        user: String,
        last_contact_ms: u64,
        resolved_ms: u64,
    },
    /// A silent user has been heard again.
    HeardAgain { user: String, last_contact_ms: u64 },
    /// The gateway could not hear, and silence means nothing. It still cannot while `until_ms` is 0.
    Coverage {
        from_ms: u64,
        until_ms: u64,
        reason: &'static str,
    },
    /// A deadline of this checker has passed.
    Late {
        user: String,
        at_ms: u64,
        last_contact_ms: u64,
        due_ms: u64,
    },
    /// A user who was late is no longer.
    Recovered {
        user: String,
        at_ms: u64,
        last_contact_ms: u64,
    },
    /// A holder has paused: from here on silence means nothing.
    Paused { user: String, at_ms: u64 },
    /// A holder shares again.
    Resumed { user: String, at_ms: u64 },
    /// A holder has erased everything.
    Erased { user: String, at_ms: u64 },
    /// A holder has withdrawn this checker's grant: nothing more is told.
    Withdrawn { user: String, at_ms: u64 },
    /// The stream does not say how far it is: nothing is known of anybody since.
    StreamStale { resolved_ms: u64 },
    /// It says so again.
    StreamLive { resolved_ms: u64 },
    /// The stream has ended; another is begun after a while.
    StreamLost { error: String, retry_in_ms: u64 },
}

#[derive(Debug)]
pub(super) struct View {
    silences: Silences,
    changes: Vec<Change>,
}

impl View {
    /// Knows nobody yet.
    pub(super) fn new(silent_after_ms: u64) -> Self {
        Self {
            silences: Silences::new(silent_after_ms),
            changes: Vec::new(),
        }
    }

    /// Takes an event; what is to be said of it goes to `reports`.
    pub(super) fn take(&mut self, event: &Event, reports: &mut Vec<Report>) {
        self.silences.take(event, &mut self.changes);
        // A user's entry comes before what it means, progress after it.
        let has_entry = matches!(event, Event::Entry { .. });
        let said = self.report(event);
        let silences = self.changes.drain(..).filter_map(Report::of_silence);
        if has_entry {
            reports.extend(said);
            reports.extend(silences);
        } else {
            reports.extend(silences);
            reports.extend(said);
        }
    }

    fn report(&self, event: &Event) -> Option<Report> {
        Some(match event {
            &Event::Connected { position } => Report::Connected { position },
            // The gateway gives no reason when a snapshot was interrupted and begins again.
            Event::Reset {
                reason: reset::Reason::Unspecified,
            } => return None,
            Event::Reset { reason } => Report::Reset {
                reason: reason.as_str_name(),
            },
            Event::Entry { entry, is_snapshot } => Report::of_entry(entry, *is_snapshot),
            &Event::SnapshotEnd {
                count, position, ..
            } => Report::SnapshotEnd { count, position },
            &Event::Progress {
                resolved_ms,
                position,
                lag_ms,
                ..
            } => Report::Progress {
                resolved_ms,
                position,
                lag_ms,
                users: self.silences.users(),
                silent: self.silences.silent(),
            },
            &Event::Stale { resolved_ms } => Report::StreamStale { resolved_ms },
            &Event::Live { resolved_ms } => Report::StreamLive { resolved_ms },
            Event::Disconnected { why, retry_in } => Report::StreamLost {
                error: with_causes(why),
                retry_in_ms: u64::try_from(retry_in.as_millis()).unwrap_or(u64::MAX),
            },
            Event::Coverage(gap) => Report::of_gap(gap),
            Event::Deadline(deadline) => return Report::of_deadline(deadline),
            Event::Transition(transition) => return Report::of_transition(transition),
        })
    }
}

/// An error and what caused it, in one line.
fn with_causes(error: &Interruption) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

impl Report {
    fn of_entry(entry: &Entry, is_snapshot: bool) -> Self {
        Self::Entry {
            user: entry.user.to_string(),
            state: entry.state.as_str_name().trim_start_matches("STATE_"),
            last_contact_ms: entry.last_contact_ms,
            last_sample_ms: entry.last_sample_ms,
            last_fix_ms: entry.last_fix_ms,
            durable_ms: entry.durable_ms,
            position: entry.position,
            coalesced: entry.coalesced,
            is_snapshot,
        }
    }

    fn of_gap(gap: &Gap) -> Self {
        Self::Coverage {
            from_ms: gap.from_ms,
            until_ms: gap.until_ms.unwrap_or_default(),
            reason: match gap.reason {
                coverage::Reason::Unspecified => "unspecified",
                coverage::Reason::Down => "down",
                coverage::Reason::Starting => "starting",
                coverage::Reason::Overloaded => "overloaded",
                coverage::Reason::DiskFailed => "disk_failed",
                coverage::Reason::ClockStepped => "clock_stepped",
            },
        }
    }

    fn of_deadline(deadline: &Deadline) -> Option<Self> {
        let &Deadline {
            at_ms,
            last_contact_ms,
            due_ms,
            ..
        } = deadline;
        let user = deadline.user.to_string();
        match deadline.kind {
            deadline::Kind::Late => Some(Self::Late {
                user,
                at_ms,
                last_contact_ms,
                due_ms,
            }),
            deadline::Kind::Recovered => Some(Self::Recovered {
                user,
                at_ms,
                last_contact_ms,
            }),
            deadline::Kind::Unspecified => None, // not of this contract
        }
    }

    fn of_transition(transition: &Transition) -> Option<Self> {
        let (user, at_ms) = (transition.user.to_string(), transition.at_ms);
        match transition.state {
            State::Paused => Some(Self::Paused { user, at_ms }),
            State::Active => Some(Self::Resumed { user, at_ms }),
            State::Erased => Some(Self::Erased { user, at_ms }),
            State::Withdrawn => Some(Self::Withdrawn { user, at_ms }),
            _ => None, // not of this contract
        }
    }

    fn of_silence(change: Change) -> Option<Self> {
        match change {
            Change::Silent {
                user,
                last_contact_ms,
                resolved_ms,
            } => Some(Self::Silent {
                user: user.to_string(),
                last_contact_ms,
                resolved_ms,
            }),
            Change::HeardAgain {
                user,
                last_contact_ms,
            } => Some(Self::HeardAgain {
                user: user.to_string(),
                last_contact_ms,
            }),
            // Its entry says the same.
            Change::Closed { .. } => None,
        }
    }

    /// For people, who read ages more easily than times. `now_ms` is this machine's clock; where it is
    /// not set as the gateway's is, ages are off by as much.
    pub(super) fn text(&self, now_ms: u64) -> String {
        let age = |since_ms| Age { since_ms, now_ms };
        match self {
            Self::Connected { position: 0 } => "connected; this is all that is known:".to_owned(),
            Self::Connected { position } => {
                format!("connected again; changes since position {position}:")
            }
            Self::Reset { reason } => {
                format!("the stream begins again ({reason}); forget what came before")
            }
            Self::Entry {
                user,
                state,
                last_contact_ms,
                last_sample_ms,
                durable_ms,
                coalesced,
                is_snapshot,
                ..
            } => {
                let mut line = format!("{user}  {state:<10}");
                if *last_contact_ms != 0 {
                    let (contact, sample) = (age(*last_contact_ms), age(*last_sample_ms));
                    line += &format!("  contact {contact}  sample {sample}");
                }
                if !is_snapshot {
                    let lag_ms = now_ms.saturating_sub(*durable_ms);
                    line += &format!("  lag {lag_ms} ms");
                }
                if *coalesced != 0 {
                    line += &format!("  ({coalesced} earlier values overtaken)");
                }
                line
            }
            Self::SnapshotEnd { count, .. } => {
                format!("that was all, users: {count}; changes follow")
            }
            Self::Progress { resolved_ms: 0, .. } => {
                "catching up; silence means nothing yet".to_owned()
            }
            Self::Progress {
                resolved_ms,
                lag_ms,
                users,
                silent,
                ..
            } => {
                let resolved = age(*resolved_ms);
                format!(
                    "complete up to {resolved} (lag {lag_ms} ms); {users} users, {silent} silent"
                )
            }
            Self::Silent {
                user,
                last_contact_ms,
                ..
            } => {
                format!("{user}  SILENT      contact {}", age(*last_contact_ms))
            }
            Self::HeardAgain {
                user,
                last_contact_ms,
            } => {
                format!("{user}  HEARD AGAIN contact {}", age(*last_contact_ms))
            }
            Self::Coverage {
                from_ms,
                until_ms: 0,
                reason,
            } => format!(
                "the gateway cannot hear since {} ({reason}); silence means nothing",
                age(*from_ms)
            ),
            Self::Coverage {
                from_ms,
                until_ms,
                reason,
            } => format!(
                "the gateway could not hear from {} to {} ({reason}); silence in it means nothing",
                age(*from_ms),
                age(*until_ms)
            ),
            Self::Late {
                user,
                last_contact_ms,
                due_ms,
                ..
            } => format!(
                "{user}  LATE        contact {}  due {}",
                age(*last_contact_ms),
                age(*due_ms)
            ),
            Self::Recovered {
                user,
                last_contact_ms,
                ..
            } => format!("{user}  RECOVERED   contact {}", age(*last_contact_ms)),
            Self::Paused { user, at_ms } => {
                format!("{user}  HAS PAUSED  {}", age(*at_ms))
            }
            Self::Resumed { user, at_ms } => {
                format!("{user}  HAS RESUMED {}", age(*at_ms))
            }
            Self::Erased { user, at_ms } => {
                format!("{user}  HAS ERASED  {}", age(*at_ms))
            }
            Self::Withdrawn { user, at_ms } => {
                format!("{user}  WITHDRAWN   {}", age(*at_ms))
            }
            Self::StreamStale { resolved_ms } => format!(
                "STREAM STALE: no progress; nothing is known of anybody since {}",
                age(*resolved_ms)
            ),
            Self::StreamLive { resolved_ms } => {
                format!("stream live again; complete up to {}", age(*resolved_ms))
            }
            Self::StreamLost { error, retry_in_ms } => {
                format!("stream lost: {error}; trying again in {retry_in_ms} ms")
            }
        }
    }
}

/// How long ago something was, to two units.
struct Age {
    since_ms: u64,
    now_ms: u64,
}

impl fmt::Display for Age {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.since_ms == 0 {
            return out.write_str("never");
        }
        let ms = self.now_ms.saturating_sub(self.since_ms);
        let (seconds, minutes, hours) = (ms / 1_000, ms / 60_000, ms / 3_600_000);
        match () {
            () if seconds < 60 => write!(out, "{seconds}.{} s ago", ms % 1_000 / 100),
            () if minutes < 60 => write!(out, "{minutes} min {} s ago", seconds % 60),
            () if hours < 24 => write!(out, "{hours} h {} min ago", minutes % 60),
            () => write!(out, "{} d {} h ago", hours / 24, hours % 24),
        }
    }
}

#[cfg(test)]
mod tests {
    use waypost_checker::{Resume, UserId};

    use super::*;

    const USER: UserId = UserId([1; 16]);

    fn entry(last_contact_ms: u64) -> Event {
        Event::Entry {
            entry: Entry {
                user: USER,
                state: State::Active,
                last_contact_ms,
                last_sample_ms: 0,
                last_fix_ms: 0,
                durable_ms: 0,
                position: 1,
                coalesced: 0,
            },
            is_snapshot: false,
        }
    }

    fn progress(resolved_ms: u64) -> Event {
        Event::Progress {
            resolved_ms,
            position: 1,
            lag_ms: 0,
            resume: Resume::from_bytes(&[1; 10]).unwrap(),
        }
    }

    /// The names of what is reported of these events.
    fn said(view: &mut View, events: impl IntoIterator<Item = Event>) -> Vec<String> {
        let mut reports = Vec::new();
        events
            .into_iter()
            .for_each(|event| view.take(&event, &mut reports));
        reports
            .iter()
            .map(|report| {
                serde_json::to_value(report).unwrap()["event"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect()
    }

    #[test]
    fn silences_are_said_between_what_shows_them_and_the_count_that_holds_them() {
        let mut view = View::new(100);
        assert_eq!(
            said(&mut view, [entry(1_000), progress(1_100), entry(1_200)]),
            ["entry", "silent", "progress", "entry", "heard_again"]
        );
    }

    #[test]
    fn a_gap_is_said_and_time_in_it_is_no_silence() {
        let mut view = View::new(1_000);
        let gap = Gap {
            from_ms: 10_500,
            until_ms: Some(60_500),
            reason: coverage::Reason::Down,
            position: 7,
        };
        let mut reports = Vec::new();
        view.take(&Event::Coverage(gap), &mut reports);
        assert_eq!(
            reports,
            [Report::Coverage {
                from_ms: 10_500,
                until_ms: 60_500,
                reason: "down"
            }]
        );
        let early = [entry(10_000), progress(60_999)];
        assert_eq!(said(&mut view, early), ["entry", "progress"]);
        assert_eq!(said(&mut view, [progress(61_000)]), ["silent", "progress"]);
    }

    #[test]
    fn events_of_deadlines_are_said_as_they_come() {
        let mut view = View::new(1_000);
        let mut told = |kind: deadline::Kind| {
            let mut reports = Vec::new();
            let deadline = Deadline {
                user: USER,
                kind,
                at_ms: 300,
                position: 1,
                last_contact_ms: 100,
                due_ms: 250,
            };
            view.take(&Event::Deadline(deadline), &mut reports);
            reports.pop().map(|report| report.text(1_300))
        };
        let late = told(deadline::Kind::Late).unwrap();
        assert!(
            late.ends_with("LATE        contact 1.2 s ago  due 1.0 s ago"),
            "{late}"
        );
        let recovered = told(deadline::Kind::Recovered).unwrap();
        assert!(
            recovered.ends_with("RECOVERED   contact 1.2 s ago"),
            "{recovered}"
        );
        assert_eq!(told(deadline::Kind::Unspecified), None);
    }

    #[test]
    fn a_pause_and_its_end_are_said_as_such() {
        let mut view = View::new(1_000);
        let mut told = |state| {
            let mut reports = Vec::new();
            let transition = Transition {
                user: USER,
                state,
                at_ms: 300,
                position: 1,
                number: 0,
            };
            view.take(&Event::Transition(transition), &mut reports);
            reports.pop().map(|report| report.text(1_300))
        };
        let paused = told(State::Paused).unwrap();
        assert!(paused.ends_with("HAS PAUSED  1.0 s ago"), "{paused}");
        let resumed = told(State::Active).unwrap();
        assert!(resumed.ends_with("HAS RESUMED 1.0 s ago"), "{resumed}");
        let withdrawn = told(State::Withdrawn).unwrap();
        assert!(withdrawn.ends_with("WITHDRAWN   1.0 s ago"), "{withdrawn}");
        assert_eq!(told(State::Unspecified), None);
    }

    #[test]
    fn a_snapshot_that_begins_again_is_no_reset_by_the_gateway() {
        let mut view = View::new(100);
        let reset = |reason| Event::Reset { reason };
        assert!(said(&mut view, [reset(reset::Reason::Unspecified)]).is_empty());
        assert_eq!(said(&mut view, [reset(reset::Reason::BadToken)]), ["reset"]);
    }

    #[test]
    fn programs_read_one_object_a_line() {
        let mut view = View::new(100);
        let mut reports = Vec::new();
        view.take(&entry(5), &mut reports);
        let json: serde_json::Value =
            serde_json::from_str(&serde_json::to_string(&reports[0]).unwrap()).unwrap();
        assert_eq!(json["event"], "entry");
        assert_eq!(json["user"], USER.to_string());
        assert_eq!(
            (&json["state"], &json["last_contact_ms"]),
            (&"ACTIVE".into(), &5.into())
        );
    }

    #[test]
    fn ages_read_well() {
        let now_ms = 1_000_000_000;
        for (ago_ms, text) in [
            (350, "0.3 s ago"),
            (59_900, "59.9 s ago"),
            (61_000, "1 min 1 s ago"),
            (3_723_000, "1 h 2 min ago"),
            (90_000_000, "1 d 1 h ago"),
        ] {
            assert_eq!(
                Age {
                    since_ms: now_ms - ago_ms,
                    now_ms
                }
                .to_string(),
                text
            );
        }
        assert_eq!(
            Age {
                since_ms: 0,
                now_ms
            }
            .to_string(),
            "never"
        );
    }
}
