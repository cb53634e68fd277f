//! What a watching checker knows, and what it says of each event.
//!
//! Takes events and times, returns reports. Must not know the connection or the terminal.
//!
//! A user is called silent only up to the moment that the stream is complete for: by the gateway's
//! clock and the stream's own progress, never because nothing came, and time in which the gateway could not hear
//! does not count.

use std::{collections::BTreeSet, fmt};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use serde::Serialize;
use waypost_proto::{
    id::UserId,
    v1::{self, Entry, State, deadline, watch_event::Kind},
};

use crate::coverage::{Coverage, Reason, Span};

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
    /// The stream does not say how far it is: nothing is known of anybody since.
    StreamStale { resolved_ms: u64 },
    /// It says so again.
    StreamLive { resolved_ms: u64 },
    /// The stream has ended; another is begun after a while.
    StreamLost { error: String, retry_in_ms: u64 },
}

#[derive(Debug)]
pub(super) struct View {
    silent_after_ms: u64,
    /// When each user was last heard, of those whose silence means something.
    contacts: FxHashMap<UserId, u64>,
    /// Those of them who have not been called silent, longest silence first.
    speaking: BTreeSet<(u64, UserId)>,
    coverage: Coverage,
    resolved_ms: u64,
    is_snapshot: bool,
    token: Bytes,
}

impl View {
    /// Knows nobody yet.
    pub(super) fn new(silent_after_ms: u64) -> Self {
        Self {
            silent_after_ms,
            contacts: FxHashMap::default(),
            speaking: BTreeSet::new(),
            coverage: Coverage::default(),
            resolved_ms: 0,
            is_snapshot: false,
            token: Bytes::new(),
        }
    }

    /// Where to resume.
    pub(super) fn token(&self) -> Bytes {
        self.token.clone()
    }

    /// The moment up to which all is known.
    pub(super) fn resolved_ms(&self) -> u64 {
        self.resolved_ms
    }

    /// Whether this event shows that the stream moves: progress does, and in a snapshot, which has no
    /// progress, everything.
    pub(super) fn is_sign_of_life(&self, event: &Kind) -> bool {
        self.is_snapshot || matches!(event, Kind::Header(_) | Kind::Progress(_))
    }

    /// Takes an event; what is to be said of it goes to `reports`.
    pub(super) fn take(&mut self, event: Kind, reports: &mut Vec<Report>) {
        match event {
            Kind::Header(header) => {
                self.is_snapshot = header.position == 0;
                if self.is_snapshot {
                    self.forget();
                }
                reports.push(Report::Connected {
                    position: header.position,
                });
            }
            Kind::Reset(reset) => {
                self.is_snapshot = true;
                self.forget();
                reports.push(Report::Reset {
                    reason: reset.reason().as_str_name(),
                });
            }
            Kind::Entry(entry) => self.take_entry(&entry, reports),
            Kind::SnapshotEnd(end) => {
                self.is_snapshot = false;
                self.token = end.token;
                reports.push(Report::SnapshotEnd {
                    count: end.count,
                    position: end.position,
                });
            }
            Kind::Progress(progress) => {
                self.token = progress.token;
                self.resolved_ms = self.resolved_ms.max(progress.resolved_ms);
                self.call_silent(reports);
                reports.push(Report::Progress {
                    resolved_ms: progress.resolved_ms,
                    position: progress.position,
                    lag_ms: progress.lag_ms,
                    users: self.contacts.len(),
                    silent: self.contacts.len() - self.speaking.len(),
                });
            }
            Kind::Coverage(coverage) => self.take_coverage(&coverage, reports),
            Kind::Deadline(deadline) => take_deadline(&deadline, reports),
        }
    }

    fn take_coverage(&mut self, coverage: &v1::Coverage, reports: &mut Vec<Report>) {
        let reason = match coverage.reason() {
            v1::coverage::Reason::Down => Reason::Down,
            v1::coverage::Reason::Starting => Reason::Starting,
            v1::coverage::Reason::Overloaded => Reason::Overloaded,
            v1::coverage::Reason::DiskFailed => Reason::DiskFailed,
            v1::coverage::Reason::ClockStepped => Reason::ClockStepped,
            v1::coverage::Reason::Unspecified => return, // not of this contract
        };
        let span = Span {
            from_ms: coverage.from_ms,
            until_ms: (coverage.until_ms != 0).then_some(coverage.until_ms),
            reason,
            position: coverage.position,
        };
        self.coverage.apply(&self.coverage.change(vec![span]));
        reports.push(Report::Coverage {
            from_ms: coverage.from_ms,
            until_ms: coverage.until_ms,
            reason: reason.as_label(),
        });
    }

    fn take_entry(&mut self, entry: &Entry, reports: &mut Vec<Report>) {
        let Ok(user) = <[u8; 16]>::try_from(entry.user.as_ref()).map(UserId) else {
            return; // not of this contract
        };
        let last_contact_ms = entry.last_contact_ms;
        reports.push(Report::Entry {
            user: user.to_string(),
            state: entry.state().as_str_name().trim_start_matches("STATE_"),
            last_contact_ms,
            last_sample_ms: entry.last_sample_ms,
            last_fix_ms: entry.last_fix_ms,
            durable_ms: entry.durable_ms,
            position: entry.position,
            coalesced: entry.coalesced,
            is_snapshot: self.is_snapshot,
        });
        let before = self.contacts.remove(&user);
        let was_speaking = before.is_some_and(|before_ms| self.speaking.remove(&(before_ms, user)));
        if entry.state() != State::Active {
            return;
        }
        self.contacts.insert(user, last_contact_ms);
        match before {
            Some(before_ms) if !was_speaking && last_contact_ms <= before_ms => {}
            Some(_) if !was_speaking => {
                self.speaking.insert((last_contact_ms, user));
                reports.push(Report::HeardAgain {
                    user: user.to_string(),
                    last_contact_ms,
                });
            }
            _ => {
                self.speaking.insert((last_contact_ms, user));
            }
        }
    }

    fn call_silent(&mut self, reports: &mut Vec<Report>) {
        let resolved_ms = self.resolved_ms;
        let heard_ms = self.coverage.heard_ms(resolved_ms);
        while let Some(&(last_contact_ms, user)) = self.speaking.first()
            && self
                .coverage
                .heard_ms(last_contact_ms)
                .saturating_add(self.silent_after_ms)
                <= heard_ms
        {
            self.speaking.pop_first();
            reports.push(Report::Silent {
                user: user.to_string(),
                last_contact_ms,
                resolved_ms,
            });
        }
    }

    fn forget(&mut self) {
        self.contacts.clear();
        self.speaking.clear();
        self.coverage = Coverage::default();
        self.resolved_ms = 0;
    }
}

fn take_deadline(deadline: &v1::Deadline, reports: &mut Vec<Report>) {
    let Ok(user) = <[u8; 16]>::try_from(deadline.user.as_ref()).map(UserId) else {
        return; // not of this contract
    };
    let (user, at_ms, last_contact_ms) =
        (user.to_string(), deadline.at_ms, deadline.last_contact_ms);
    match deadline.kind() {
        deadline::Kind::Late => reports.push(Report::Late {
            user,
            at_ms,
            last_contact_ms,
            due_ms: deadline.due_ms,
        }),
        deadline::Kind::Recovered => reports.push(Report::Recovered {
            user,
            at_ms,
            last_contact_ms,
        }),
        deadline::Kind::Unspecified => {} // not of this contract
    }
}

impl Report {
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
                format!("that was all: {count} users; changes follow")
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
    use waypost_proto::v1::{Header, Progress, Reset, SnapshotEnd};

    use super::*;

    const USER: UserId = UserId([1; 16]);

    fn entry(state: State, last_contact_ms: u64) -> Kind {
        let user = Bytes::copy_from_slice(&USER.0);
        Kind::Entry(Entry {
            user,
            state: state.into(),
            last_contact_ms,
            ..Entry::default()
        })
    }

    fn progress(resolved_ms: u64) -> Kind {
        Kind::Progress(Progress {
            resolved_ms,
            ..Progress::default()
        })
    }

    /// What is said of silence after these events, in words.
    fn said(view: &mut View, events: impl IntoIterator<Item = Kind>) -> Vec<&'static str> {
        let mut reports = Vec::new();
        events
            .into_iter()
            .for_each(|event| view.take(event, &mut reports));
        reports
            .iter()
            .filter_map(|report| match report {
                Report::Silent { .. } => Some("silent"),
                Report::HeardAgain { .. } => Some("heard again"),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn time_in_which_the_gateway_could_not_hear_is_no_silence() {
        let mut view = View::new(1_000);
        let mut take = |kind| {
            let mut reports = Vec::new();
            view.take(kind, &mut reports);
            reports
        };
        let progress = |resolved_ms| {
            Kind::Progress(Progress {
                resolved_ms,
                ..Progress::default()
            })
        };
        let is_silent = |reports: &[Report]| {
            reports
                .iter()
                .any(|report| matches!(report, Report::Silent { .. }))
        };
        take(Kind::Header(Header::default()));
        take(entry(State::Active, 10_000));
        let told = take(Kind::Coverage(v1::Coverage {
            from_ms: 10_500,
            until_ms: 60_500,
            reason: v1::coverage::Reason::Down.into(),
            position: 7,
        }));
        assert_eq!(
            told,
            [Report::Coverage {
                from_ms: 10_500,
                until_ms: 60_500,
                reason: "down"
            }]
        );
        take(Kind::SnapshotEnd(SnapshotEnd::default()));
        assert!(!is_silent(&take(progress(60_999))));
        assert!(
            is_silent(&take(progress(61_000))),
            "a second that could be heard"
        );
    }

    #[test]
    fn events_of_deadlines_are_said_as_they_come() {
        let mut view = View::new(1_000);
        let mut told = |kind: deadline::Kind| {
            let mut reports = Vec::new();
            let deadline = v1::Deadline {
                user: Bytes::copy_from_slice(&USER.0),
                kind: kind.into(),
                at_ms: 300,
                last_contact_ms: 100,
                due_ms: 250,
                ..v1::Deadline::default()
            };
            view.take(Kind::Deadline(deadline), &mut reports);
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
    }

    #[test]
    fn silence_is_said_once_and_only_up_to_where_the_stream_is_complete() {
        let mut view = View::new(100);
        assert!(said(&mut view, [entry(State::Active, 1_000), progress(1_099)]).is_empty());
        assert_eq!(
            said(&mut view, [progress(1_100), progress(1_200)]),
            ["silent"]
        );
        assert!(said(&mut view, [entry(State::Active, 1_000)]).is_empty());
        assert_eq!(
            said(&mut view, [entry(State::Active, 1_250), progress(1_300)]),
            ["heard again"]
        );
        assert_eq!(said(&mut view, [progress(1_350)]), ["silent"]);
    }

    #[test]
    fn a_pause_is_not_silence() {
        let mut view = View::new(100);
        let events = [
            entry(State::Active, 1_000),
            entry(State::Paused, 1_000),
            progress(9_000),
        ];
        assert!(said(&mut view, events).is_empty());
        assert!(said(&mut view, [entry(State::NeverSeen, 0), progress(9_100)]).is_empty());
    }

    #[test]
    fn after_a_reset_what_was_known_counts_no_more() {
        let mut view = View::new(100);
        said(
            &mut view,
            [entry(State::Active, 1_000), Kind::Reset(Reset::default())],
        );
        assert!(said(&mut view, [progress(9_000)]).is_empty());
        assert_eq!(view.contacts.len(), 0);
    }

    #[test]
    fn the_token_is_of_what_was_worked_through() {
        let mut view = View::new(100);
        let (first, second) = (Bytes::from_static(b"1"), Bytes::from_static(b"2"));
        let end = SnapshotEnd {
            token: first.clone(),
            ..SnapshotEnd::default()
        };
        said(&mut view, [Kind::SnapshotEnd(end), entry(State::Active, 1)]);
        assert_eq!(view.token(), first);
        said(
            &mut view,
            [Kind::Progress(Progress {
                token: second.clone(),
                ..Progress::default()
            })],
        );
        assert_eq!(view.token(), second);
    }

    #[test]
    fn entries_alone_do_not_show_that_the_stream_moves() {
        let mut view = View::new(100);
        said(&mut view, [Kind::Header(Header::default())]);
        assert!(
            view.is_sign_of_life(&entry(State::Active, 1)),
            "a snapshot has no progress"
        );
        said(&mut view, [Kind::SnapshotEnd(SnapshotEnd::default())]);
        assert!(!view.is_sign_of_life(&entry(State::Active, 1)));
        assert!(view.is_sign_of_life(&progress(1)));
    }

    #[test]
    fn programs_read_one_object_a_line() {
        let mut view = View::new(100);
        let mut reports = Vec::new();
        view.take(entry(State::Active, 5), &mut reports);
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
