//! What a scenario shows besides what every run shows: numbers, and the checks on them.
//!
//! Knows what a scenario promises. Must not know how anything was measured.

use std::{fmt, time::Duration};

use serde::Serialize;

use crate::{
    group::Group,
    readers::Readings,
    relay,
    report::{AckMs, Check, Count, FreshnessMs, Latencies, Ms, Seconds},
    scenario::{Audience, Storm},
};

/// The findings of a scenario. In JSON, its name is the name of an object.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Findings {
    /// Of `ramp`.
    Ramp(RampFindings),
    /// Of `storm`.
    Storm(StormFindings),
    /// Of `wake`.
    Wake(WakeFindings),
    /// Of `backlog`.
    Backlog(BacklogFindings),
    /// Of `rebind`.
    Rebind {
        /// How often each socket changed its port.
        rebinds: u64,
    },
    /// Of `lossy`.
    Lossy(LossyFindings),
    /// Of `freshness`.
    Freshness(AudienceFindings),
    /// Of `mix`.
    Mix {
        /// Each group, in the order of the file.
        groups: Vec<GroupFindings>,
    },
}

/// How devices connected while others sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RampFindings {
    /// Devices connected at the end.
    pub connected: u64,
    /// From the first that began until the last was there.
    pub seconds: f64,
    /// Devices connected in a second.
    pub connects_per_s: f64,
}

/// How a storm of reconnecting devices went.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StormFindings {
    /// Devices that stayed, or were the first to come back.
    pub established: u64,
    /// Devices that reconnected at once.
    pub storming: u64,
    /// Whether the gateway was restarted before.
    pub restarted: bool,
    /// From the end of the old gateway until the established devices were back; absent without a restart.
    pub established_back_s: Option<f64>,
    /// Storming devices connected at the end of the storm.
    pub served: u64,
    /// Whether each of them had its ping acknowledged as well.
    pub all_served: bool,
    /// Until each was connected.
    pub connected_s: f64,
    /// Until each had its ping acknowledged.
    pub served_s: f64,
    /// Devices connected in a second, all the storm.
    pub handshakes_per_s: f64,
    /// Acknowledgement latency of the established devices before the storm.
    pub before_ms: AckMs,
    /// The same while it lasted.
    pub during_ms: AckMs,
    /// The same afterwards.
    pub after_ms: AckMs,
    /// How many times the p99 grew.
    pub p99_slowdown: f64,
    #[serde(skip)]
    most_slowdown: f64,
}

/// From waking up until acknowledged, of devices that connect for each ping.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WakeFindings {
    /// Pings that devices woke up for.
    pub wakes: u64,
    /// The half of them, in milliseconds.
    pub p50_ms: f64,
    /// All but the slowest hundredth.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
    /// Those for which both sides showed certificates.
    pub full: WakeKind,
    /// Those for which a ticket took their place.
    pub resumed: WakeKind,
    /// Those for which the ping travelled with the first packet as well (0-RTT).
    pub early_data: WakeKind,
}

/// The wakes whose connections began alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WakeKind {
    /// How many.
    pub wakes: u64,
    /// From waking up until acknowledged, the half of them, in milliseconds.
    pub p50_ms: f64,
    /// All but the slowest hundredth.
    pub p99_ms: f64,
    /// The half of them again, in round trips to the gateway; none if it was not put away from the devices.
    pub p50_round_trips: Option<f64>,
}

/// How fast everybody was fresh again, and when the old pings were through.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BacklogFindings {
    /// Older pings that each device held.
    pub held_each: u32,
    /// Devices whose newest ping was acknowledged.
    pub fresh: u64,
    /// From the return of all until a device's newest ping was acknowledged: the half of them.
    pub live_p50_ms: f64,
    /// All but the slowest hundredth.
    pub live_p99_ms: f64,
    /// The slowest.
    pub live_max_ms: f64,
    /// From the return until every old ping was acknowledged.
    pub drained_s: f64,
    #[serde(skip)]
    fresh_within: Duration,
}

/// What the network did, in datagrams, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LossyFindings {
    /// Handed on, copies included.
    pub passed: u64,
    /// Thrown away.
    pub lost: u64,
    /// Handed on twice.
    pub duplicated: u64,
    /// Handed on after one that had come later.
    pub overtaken: u64,
    /// More than the relay could hold, thrown away as well.
    pub overflowed: u64,
}

/// How checkers were told of a fleet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AudienceFindings {
    /// Users that everybody watched.
    pub users: u64,
    /// Checkers. A report has it one level up.
    #[serde(skip)]
    pub checkers: u64,
    /// Those of them who read a byte a second for some time.
    pub slow_readers: u64,
    /// From durable to read, of those who are never slow, while nobody was.
    pub before_ms: FreshnessMs,
    /// The same while the slow ones were slow.
    pub during_ms: FreshnessMs,
    /// Updates that were acknowledged in a second.
    pub updates_per_s: f64,
    /// Entries that were read in a second, by all checkers together.
    pub entries_per_s: f64,
    /// Changes that each checker was told of, overtaken ones counted.
    pub changes: u64,
    /// Those of them that newer ones overtook on their way to slow readers.
    pub coalesced_for_slow: u64,
    /// The same on the way to all others.
    pub coalesced_for_others: u64,
    /// Changes that the slowest had not been told of when it read freely again.
    pub behind: u64,
    /// From when the slow readers read freely again until all were level.
    pub caught_up_s: f64,
    /// The most memory that the gateway kept for slow readers. A report has it one level up.
    #[serde(skip)]
    pub slow_reader_bytes: Option<u64>,
    #[serde(skip)]
    readings: Readings,
    /// What was wished for.
    #[serde(skip)]
    audience: Audience,
}

/// What an audience was measured by.
#[derive(Debug)]
pub(crate) struct AudienceMeasures {
    pub(crate) users: u64,
    /// From durable to read: before, and while somebody was slow.
    pub(crate) latencies: [Latencies; 2],
    pub(crate) updates_per_s: f64,
    pub(crate) entries_per_s: f64,
    pub(crate) behind: u64,
    pub(crate) caught_up: Duration,
    pub(crate) slow_reader_bytes: Option<u64>,
    pub(crate) readings: Readings,
}

/// What became of a group's pings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupFindings {
    /// Its name.
    pub name: String,
    /// How many devices.
    pub devices: u64,
    /// Pings sent.
    pub sent: u64,
    /// Pings acknowledged.
    pub acked: u64,
    /// From due to acknowledged, without what was held from before.
    pub ack_ms: AckMs,
}

impl RampFindings {
    pub(crate) fn new(connected: u64, seconds: f64) -> Self {
        Self {
            connected,
            seconds,
            connects_per_s: rate(connected, seconds),
        }
    }
}

/// What a storm was measured by.
#[derive(Debug)]
pub(crate) struct StormMeasures {
    pub(crate) established: u64,
    pub(crate) storming: u64,
    pub(crate) established_back: Option<Duration>,
    pub(crate) served: u64,
    pub(crate) all_served: bool,
    pub(crate) connected: Duration,
    pub(crate) all_answered: Duration,
    /// Of the established devices: before, during, after.
    pub(crate) latencies: [Latencies; 3],
}

impl StormFindings {
    pub(crate) fn new(storm: &Storm, measures: &StormMeasures) -> Self {
        let [before_ms, during_ms, after_ms] = measures.latencies.each_ref().map(Latencies::ack_ms);
        let connected_s = measures.connected.as_secs_f64();
        Self {
            established: measures.established,
            storming: measures.storming,
            restarted: storm.restart.is_some(),
            established_back_s: measures.established_back.map(|back| back.as_secs_f64()),
            served: measures.served,
            all_served: measures.all_served,
            connected_s,
            served_s: measures.all_answered.as_secs_f64(),
            handshakes_per_s: rate(measures.served, connected_s),
            before_ms,
            during_ms,
            after_ms,
            p99_slowdown: during_ms.p99 / before_ms.p99.max(LEAST_MS),
            most_slowdown: storm.most_slowdown,
        }
    }
}

impl WakeFindings {
    /// `by_handshake` in the order full, resumed, early data.
    pub(crate) fn new(
        all: &Latencies,
        by_handshake: &[Latencies; 3],
        round_trip: Duration,
    ) -> Self {
        let [full, resumed, early_data] = by_handshake.each_ref().map(|latencies| {
            let p50_ms = latencies.quantile_ms(0.5);
            let round_trip_ms = round_trip.as_secs_f64() * 1e3;
            WakeKind {
                wakes: latencies.count(),
                p50_ms,
                p99_ms: latencies.quantile_ms(0.99),
                p50_round_trips: (0.0 < round_trip_ms).then(|| p50_ms / round_trip_ms),
            }
        });
        Self {
            wakes: all.count(),
            p50_ms: all.quantile_ms(0.5),
            p99_ms: all.quantile_ms(0.99),
            max_ms: all.quantile_ms(1.0),
            full,
            resumed,
            early_data,
        }
    }
}

impl BacklogFindings {
    pub(crate) fn new(
        held_each: u32,
        live: &Latencies,
        drained: Duration,
        fresh_within: Duration,
    ) -> Self {
        Self {
            held_each,
            fresh: live.count(),
            live_p50_ms: live.quantile_ms(0.5),
            live_p99_ms: live.quantile_ms(0.99),
            live_max_ms: live.quantile_ms(1.0),
            drained_s: drained.as_secs_f64(),
            fresh_within,
        }
    }
}

impl AudienceFindings {
    pub(crate) fn new(audience: &Audience, measures: AudienceMeasures) -> Self {
        let [before_ms, during_ms] = measures.latencies.each_ref().map(Latencies::freshness_ms);
        let readings = measures.readings;
        Self {
            users: measures.users,
            checkers: audience.checkers.into(),
            slow_readers: audience.slow_readers.into(),
            before_ms,
            during_ms,
            updates_per_s: measures.updates_per_s,
            entries_per_s: measures.entries_per_s,
            changes: readings.changes,
            coalesced_for_slow: readings.coalesced_for_slow,
            coalesced_for_others: readings.coalesced_for_others,
            behind: measures.behind,
            caught_up_s: measures.caught_up.as_secs_f64(),
            slow_reader_bytes: measures.slow_reader_bytes,
            readings,
            audience: *audience,
        }
    }

    fn checks(&self) -> Vec<Check> {
        let Readings {
            complete,
            changes,
            faults,
            slow_still_connected,
            compared,
            different,
            ..
        } = self.readings;
        let Audience {
            updates_per_s,
            least_pace,
            most_p99,
            ..
        } = self.audience;
        let with_examples = |numbers: String| match self.readings.examples.join("; ") {
            examples if examples.is_empty() => numbers,
            examples => format!("{numbers}: {examples}"),
        };
        let mut checks = vec![
            Check {
                promise: "every checker was told of every change",
                passed: complete == self.checkers && 0 < changes,
                detail: with_examples(format!(
                    "{} of {} checkers, {} changes each",
                    Count(complete),
                    Count(self.checkers),
                    Count(changes)
                )),
            },
            Check {
                promise: "every stream kept its order",
                passed: faults == 0,
                detail: with_examples(format!("{} faults", Count(faults))),
            },
            Check {
                promise: "the streams end with what the gateway says",
                passed: 0 < compared && different == 0,
                detail: format!("{} of {} users differ", Count(different), Count(compared)),
            },
            Check {
                promise: "updates came as fast as they should",
                passed: updates_per_s * least_pace <= self.updates_per_s,
                detail: format!(
                    "{}/s of {}/s",
                    Count::of(self.updates_per_s),
                    Count::of(updates_per_s)
                ),
            },
            Check {
                promise: "checkers were told in time",
                passed: self.during_ms.p99 <= most_p99.as_secs_f64() * 1_000.0,
                detail: format!(
                    "p99 {}, {} at most",
                    Ms(self.during_ms.p99),
                    humantime::format_duration(most_p99)
                ),
            },
        ];
        if 0 < self.slow_readers {
            checks.push(Check {
                promise: "nobody was cut off for being slow",
                // Where nobody was behind, nobody was slow.
                passed: slow_still_connected == self.slow_readers && 0 < self.behind,
                detail: format!(
                    "{} of {} are connected as in the beginning, up to {} changes behind",
                    Count(slow_still_connected),
                    Count(self.slow_readers),
                    Count(self.behind)
                ),
            });
        }
        if let Some(bytes) = self.slow_reader_bytes {
            let most = self.slow_readers * (self.users * MOST_BYTES_PER_USER + MOST_BYTES_BESIDES);
            checks.push(Check {
                promise: "slow readers cost a few bytes a user",
                passed: bytes <= most,
                detail: format!("{} bytes, {} at most", Count(bytes), Count(most)),
            });
        }
        checks
    }

    fn tiles(&self) -> Vec<(String, String, String)> {
        let mut tiles = vec![(
            "told to checkers",
            format!("{}/s", Count::of(self.entries_per_s)),
            format!(
                "{} checkers, {} users",
                Count(self.checkers),
                Count(self.users)
            ),
        )];
        if 0 < self.slow_readers {
            tiles.push((
                "p99 while all read",
                Ms(self.before_ms.p99).to_string(),
                format!("p50 {}", Ms(self.before_ms.p50)),
            ));
            tiles.push((
                "overtaken for the slow",
                Count(self.coalesced_for_slow).to_string(),
                format!(
                    "of {} changes, all level again after {}",
                    Count(self.changes * self.slow_readers),
                    Seconds(self.caught_up_s)
                ),
            ));
        }
        if let Some(bytes) = self.slow_reader_bytes {
            let each = bytes as f64 / (self.users * self.slow_readers).max(1) as f64;
            tiles.push((
                "kept for the slow",
                format!("{} KB", Count(bytes / 1_000)),
                format!("{each:.0} bytes a user"),
            ));
        }
        let named = |(name, value, note): (&str, _, _)| (name.to_owned(), value, note);
        tiles.into_iter().map(named).collect()
    }
}

impl GroupFindings {
    pub(crate) fn new(group: &Group, sent: u64, acked: u64, latencies: &Latencies) -> Self {
        Self {
            name: group.name.clone(),
            devices: group.devices.into(),
            sent,
            acked,
            ack_ms: latencies.ack_ms(),
        }
    }
}

impl From<relay::Counts> for LossyFindings {
    fn from(counts: relay::Counts) -> Self {
        let relay::Counts {
            passed,
            lost,
            duplicated,
            overtaken,
            overflowed,
            ..
        } = counts;
        Self {
            passed,
            lost,
            duplicated,
            overtaken,
            overflowed,
        }
    }
}

impl Findings {
    /// What the scenario promises on top of what every run does. `devices` took part, and `breaks` of their
    /// connections ended with an error.
    #[must_use]
    pub fn checks(&self, devices: u64, breaks: u64) -> Vec<Check> {
        match self {
            Self::Ramp(ramp) => vec![Check {
                promise: "every device connected",
                passed: ramp.connected == devices,
                detail: format!("{} of {}", Count(ramp.connected), Count(devices)),
            }],
            Self::Storm(storm) => vec![
                Check {
                    promise: "every device was served again",
                    passed: storm.all_served,
                    detail: format!("{} of {}", Count(storm.served), Count(storm.storming)),
                },
                Check {
                    promise: "established devices kept their latency",
                    passed: storm.p99_slowdown <= storm.most_slowdown,
                    detail: format!(
                        "p99 {} before, {} during: {:.1} times, {} at most",
                        Ms(storm.before_ms.p99),
                        Ms(storm.during_ms.p99),
                        storm.p99_slowdown,
                        storm.most_slowdown
                    ),
                },
            ],
            Self::Backlog(backlog) => vec![Check {
                promise: "everybody was fresh again in time",
                passed: backlog.fresh == devices
                    && backlog.live_p99_ms <= backlog.fresh_within.as_secs_f64() * 1_000.0,
                detail: format!(
                    "{} of {}, p99 {}, {} at most",
                    Count(backlog.fresh),
                    Count(devices),
                    Ms(backlog.live_p99_ms),
                    humantime::format_duration(backlog.fresh_within)
                ),
            }],
            Self::Rebind { rebinds } => vec![Check {
                promise: "no new port broke a connection",
                passed: 0 < *rebinds && breaks == 0,
                detail: format!("{} broken by {} changes", Count(breaks), Count(*rebinds)),
            }],
            Self::Freshness(audience) => audience.checks(),
            Self::Wake(_) | Self::Lossy(_) | Self::Mix { .. } => Vec::new(),
        }
    }

    /// What was found out about checkers, if that is what the run was about.
    pub(crate) fn audience(&self) -> Option<&AudienceFindings> {
        match self {
            Self::Freshness(audience) => Some(audience),
            _ => None,
        }
    }

    /// The numbers of most interest, as name, value and note.
    #[must_use]
    pub fn tiles(&self) -> Vec<(String, String, String)> {
        let tile = |name: &str, value: String, note: String| (name.to_owned(), value, note);
        match self {
            Self::Ramp(ramp) => vec![tile(
                "connected",
                format!("{}/s", Count::of(ramp.connects_per_s)),
                format!("{} in {}", Count(ramp.connected), Seconds(ramp.seconds)),
            )],
            Self::Storm(storm) => vec![
                tile(
                    "handshakes",
                    format!("{}/s", Count::of(storm.handshakes_per_s)),
                    format!("{} in {}", Count(storm.served), Seconds(storm.connected_s)),
                ),
                tile(
                    "all served after",
                    Seconds(storm.served_s).to_string(),
                    storm.established_back_s.map_or_else(String::new, |back_s| {
                        format!("established back {} after the end", Seconds(back_s))
                    }),
                ),
                tile(
                    "established, p99",
                    Ms(storm.during_ms.p99).to_string(),
                    format!(
                        "{} before, {} after",
                        Ms(storm.before_ms.p99),
                        Ms(storm.after_ms.p99)
                    ),
                ),
            ],
            Self::Wake(wake) => [
                ("wake to ack, full handshake", wake.full),
                ("wake to ack, resumed", wake.resumed),
                ("wake to ack, early data", wake.early_data),
            ]
            .into_iter()
            .filter(|(_, kind)| 0 < kind.wakes)
            .map(|(name, kind)| {
                let round_trips = kind
                    .p50_round_trips
                    .map_or_else(String::new, |many| format!(", {many:.1} round trips"));
                tile(
                    name,
                    format!("p50 {}{round_trips}", Ms(kind.p50_ms)),
                    format!("p99 {}, {} wakes", Ms(kind.p99_ms), Count(kind.wakes)),
                )
            })
            .collect(),
            Self::Backlog(backlog) => vec![
                tile(
                    "fresh again, p99",
                    Ms(backlog.live_p99_ms).to_string(),
                    format!(
                        "p50 {}, max {}",
                        Ms(backlog.live_p50_ms),
                        Ms(backlog.live_max_ms)
                    ),
                ),
                tile(
                    "backlog drained",
                    Seconds(backlog.drained_s).to_string(),
                    format!("{} pings each", Count(backlog.held_each.into())),
                ),
            ],
            Self::Rebind { rebinds } => vec![tile(
                "new ports",
                Count(*rebinds).to_string(),
                "of each socket".to_owned(),
            )],
            Self::Lossy(lossy) => vec![tile(
                "datagrams lost",
                Count(lossy.lost).to_string(),
                format!(
                    "{} passed, {} doubled, {} overtaken",
                    Count(lossy.passed),
                    Count(lossy.duplicated),
                    Count(lossy.overtaken)
                ),
            )],
            Self::Freshness(audience) => audience.tiles(),
            Self::Mix { groups } => groups
                .iter()
                .map(|group| {
                    (
                        format!("{}, p99", group.name),
                        Ms(group.ack_ms.p99).to_string(),
                        format!(
                            "{} devices, {} of {} pings, p50 {}",
                            Count(group.devices),
                            Count(group.acked),
                            Count(group.sent),
                            Ms(group.ack_ms.p50)
                        ),
                    )
                })
                .collect(),
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value, note) in self.tiles() {
            writeln!(f, "  {name:<24} {value:<12} {note}")?;
        }
        Ok(())
    }
}

fn rate(count: u64, seconds: f64) -> f64 {
    if 0.0 < seconds {
        count as f64 / seconds
    } else {
        0.0
    }
}

/// The clock of the books tells microseconds; less is none.
const LEAST_MS: f64 = 0.001;
/// What the gateway may keep for a slow reader and each user: changes that are void but counted, and what the reader
/// remembers. See the bounds of `waypost_gateway::freshness`.
const MOST_BYTES_PER_USER: u64 = 128;
/// Lists grow by blocks, and tables by half.
const MOST_BYTES_BESIDES: u64 = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies(ms: u64) -> Latencies {
        let mut latencies = Latencies::default();
        latencies.record_us(ms * 1_000);
        latencies
    }

    fn storm(during_ms: u64, all_served: bool) -> Findings {
        let storm = Storm {
            calm: Duration::from_secs(1),
            restart: None,
            most_slowdown: 3.0,
        };
        let measures = StormMeasures {
            established: 10,
            storming: 100,
            established_back: None,
            served: 100,
            all_served,
            connected: Duration::from_secs(2),
            all_answered: Duration::from_secs(3),
            latencies: [latencies(10), latencies(during_ms), latencies(10)],
        };
        Findings::Storm(StormFindings::new(&storm, &measures))
    }

    fn passed(findings: &Findings, devices: u64, breaks: u64) -> bool {
        findings
            .checks(devices, breaks)
            .iter()
            .all(|check| check.passed)
    }

    #[test]
    fn a_storm_fails_when_one_is_not_served_or_the_others_are_slowed_down_too_much() {
        assert!(passed(&storm(29, true), 110, 0));
        assert!(!passed(&storm(29, false), 110, 0));
        assert!(!passed(&storm(31, true), 110, 0));
    }

    #[test]
    fn a_backlog_fails_when_one_device_is_not_fresh_or_not_in_time() {
        let within = Duration::from_secs(5);
        let backlog = |live_ms| {
            let drained = Duration::from_secs(60);
            Findings::Backlog(BacklogFindings::new(
                720,
                &latencies(live_ms),
                drained,
                within,
            ))
        };
        assert!(passed(&backlog(4_900), 1, 0));
        assert!(!passed(&backlog(4_900), 2, 0));
        assert!(!passed(&backlog(5_100), 1, 0));
    }

    #[test]
    fn a_rebind_fails_when_a_connection_broke_or_nothing_was_done() {
        assert!(passed(&Findings::Rebind { rebinds: 3 }, 1, 0));
        assert!(!passed(&Findings::Rebind { rebinds: 3 }, 1, 1));
        assert!(!passed(&Findings::Rebind { rebinds: 0 }, 1, 0));
    }

    #[test]
    fn an_audience_fails_when_it_was_told_late_or_wrong_or_somebody_was_cut_off_or_kept_too_much_for()
     {
        let audience = Audience {
            checkers: 10,
            slow_readers: 1,
            duration: Duration::from_secs(60),
            updates_per_s: 1_000.0,
            least_pace: 0.9,
            most_p99: Duration::from_millis(5),
        };
        let good = Readings {
            complete: 10,
            changes: 100,
            compared: 40,
            slow_still_connected: 1,
            ..Readings::default()
        };
        let at_pace = |updates_per_s, during_ms, bytes, readings: &Readings| {
            let measures = AudienceMeasures {
                users: 1_000,
                latencies: [latencies(1), latencies(during_ms)],
                updates_per_s,
                entries_per_s: 1_000.0,
                behind: 60,
                caught_up: Duration::ZERO,
                slow_reader_bytes: Some(bytes),
                readings: readings.clone(),
            };
            Findings::Freshness(AudienceFindings::new(&audience, measures))
        };
        let of = |during_ms, bytes, readings: &Readings| at_pace(950.0, during_ms, bytes, readings);
        assert!(passed(&of(4, 50_000, &good), 1_000, 0));
        assert!(!passed(&of(6, 50_000, &good), 1_000, 0));
        assert!(!passed(&of(4, 400_000, &good), 1_000, 0));
        assert!(!passed(&at_pace(850.0, 4, 50_000, &good), 1_000, 0));
        let faults: [fn(&mut Readings); 6] = [
            |readings| readings.complete = 9,
            |readings| readings.changes = 0,
            |readings| readings.faults = 1,
            |readings| readings.different = 1,
            |readings| readings.compared = 0,
            |readings| readings.slow_still_connected = 0,
        ];
        for (at, fault) in faults.into_iter().enumerate() {
            let mut readings = good.clone();
            fault(&mut readings);
            assert!(!passed(&of(4, 50_000, &readings), 1_000, 0), "fault {at}");
        }
    }

    #[test]
    fn a_ramp_fails_when_a_device_is_not_there() {
        assert!(passed(&Findings::Ramp(RampFindings::new(5, 1.0)), 5, 0));
        assert!(!passed(&Findings::Ramp(RampFindings::new(4, 1.0)), 5, 0));
    }

    #[test]
    fn the_name_of_the_scenario_is_the_name_of_the_object() {
        let json = serde_json::to_value(storm(20, true)).unwrap();
        assert_eq!(json["storm"]["handshakes_per_s"], 50.0);
        let slowdown = json["storm"]["p99_slowdown"].as_f64().unwrap();
        assert!((slowdown - 2.0).abs() < 0.01, "{slowdown}");
        let json = serde_json::to_value(Findings::Mix { groups: Vec::new() }).unwrap();
        assert!(json["mix"]["groups"].is_array());
    }
}
