//! What was measured, in numbers: one JSON object for programs, one table for people.
//!
//! Knows names, goals and layout. Must not know how anything was measured.

use std::{fmt, time::Duration};

use serde::Serialize;

use super::commit_path::CommitRound;
use crate::report::{Count, FreshnessMs, Latencies, Ms};

/// The outcome. The names are a contract: programs read them.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Which load test ran.
    pub scenario: &'static str,
    /// Connections that were open in the end, towards either server.
    pub connections: u32,
    /// Connections that had one request outstanding each.
    pub busy_connections: u32,
    /// Lone pings a second in the open loop, all connections together.
    pub rate: f64,
    /// Rounds on either side, of which the medians are.
    pub rounds: usize,
    /// The figures.
    pub limits: Limits,
}

/// Waypost and this machine's own ceilings, in one run.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// A bare echo on quinn with the gateway's TLS and transport settings, one ping outstanding on each of
    /// the busy connections.
    pub echo_pings_per_s: f64,
    /// Waypost with the same client, each ping durable when it is answered.
    pub waypost_pings_per_s: f64,
    /// The second by the first.
    pub waypost_of_echo: f64,
    /// Processor time of the echo for each of these pings.
    pub echo_cpu_us_per_ping: f64,
    /// Processor time of the gateway for each of these pings.
    pub waypost_cpu_us_per_ping: f64,
    /// The same with a hundred pings in each request.
    pub batches: Batches,
    /// Pings that come alone, at a set rate, over all connections in turn.
    pub lone: Lone,
    /// Handshakes with client certificates at the echo, until its first answer.
    pub handshakes_per_s: f64,
    /// The same at the gateway, until Welcome.
    pub storm_handshakes_per_s: f64,
    /// The second by the first.
    pub storm_of_handshakes: f64,
    /// How often the gateway turned one of them away, which then came again.
    pub storm_refusals: u64,
    /// Processor time of the echo for each handshake.
    pub echo_handshake_cpu_us: f64,
    /// Processor time of the gateway for each handshake, Welcome included.
    pub waypost_handshake_cpu_us: f64,
    /// Keys and values that RocksDB alone writes and syncs, in the groups in which the committer writes
    /// lone pings.
    pub rocksdb_bytes_per_s: f64,
    /// The same as pings.
    pub rocksdb_pings_per_s: f64,
    /// These pings through the committer, with judging, publishing and answering.
    pub committer_pings_per_s: f64,
    /// The committer's by that of RocksDB alone.
    pub waypost_of_rocksdb: f64,
    /// Requests in one of these groups.
    pub group_requests: f64,
    /// How long one of these rows and its device's record take to be sealed.
    pub sealing_us: f64,
    /// What a connection takes.
    pub memory: Memory,
    /// What a sync of 64 KiB takes on the same disk.
    pub fsync_ms: Percentiles,
}

/// What one connection takes of a server's memory, in bytes: what the process has grown by, over all of them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Of the gateway, once Hello is answered and nothing else was said.
    pub waypost_idle_bytes: f64,
    /// Of the echo, after the same.
    pub echo_idle_bytes: f64,
    /// Of the echo in the end, after tens of pings on each.
    pub echo_used_bytes: f64,
}

/// Requests with a hundred pings each.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "as in `Limits`")]
pub struct Batches {
    pub echo_pings_per_s: f64,
    pub waypost_pings_per_s: f64,
    pub waypost_of_echo: f64,
    pub rocksdb_bytes_per_s: f64,
    pub rocksdb_pings_per_s: f64,
    pub committer_pings_per_s: f64,
    pub waypost_of_rocksdb: f64,
    pub sealing_us: f64,
    /// Of the time in which Waypost takes one of these, how much is sealing it, as if nothing else were done meanwhile.
    pub sealing_of_waypost: f64,
}

/// Pings in an open loop: each is sent when it is due, and its latency counts from then.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Lone {
    /// Processor time of the echo for each ping.
    pub echo_cpu_us: f64,
    /// Processor time of the gateway for each ping, all its threads.
    pub waypost_cpu_us: f64,
    /// From due to answered by the echo.
    pub echo_ms: Percentiles,
    /// From due to acknowledged by the gateway.
    pub waypost_ms: Percentiles,
}

/// Percentiles of a latency, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Percentiles {
    pub p50: f64,
    pub p99: f64,
}

/// What one server took for one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) elapsed: Duration,
    pub(crate) processor: Duration,
}

/// Both servers' costs, round by round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Costs {
    pub(crate) waypost: Vec<Cost>,
    pub(crate) echo: Vec<Cost>,
}

/// The medians of what both took for the same pings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared {
    pub(crate) waypost_per_s: f64,
    pub(crate) echo_per_s: f64,
    pub(crate) waypost_of_echo: f64,
    pub(crate) waypost_cpu_us: f64,
    pub(crate) echo_cpu_us: f64,
}

impl Costs {
    /// What both did in the newest round, for a live display.
    pub(crate) fn newest(&self, things: f64) -> String {
        let shown = |costs: &[Cost]| {
            costs.last().map_or_else(
                || "warming up".to_owned(),
                |cost| rate(things / cost.elapsed.as_secs_f64()),
            )
        };
        format!(
            "Waypost {}, echo {}",
            shown(&self.waypost),
            shown(&self.echo)
        )
    }

    /// Per thing, of which there were `things` in each round. The ratio is that of each pair of rounds, so
    /// that a change of the machine's speed between two pairs does not count.
    pub(crate) fn compared(&self, things: f64) -> Compared {
        let per_s = |cost: &Cost| things / cost.elapsed.as_secs_f64();
        let cpu_us = |cost: &Cost| cost.processor.as_secs_f64() * 1e6 / things;
        let pairs = self.waypost.iter().zip(&self.echo);
        Compared {
            waypost_per_s: median(self.waypost.iter().map(per_s)),
            echo_per_s: median(self.echo.iter().map(per_s)),
            waypost_of_echo: median(pairs.map(|(waypost, echo)| per_s(waypost) / per_s(echo))),
            waypost_cpu_us: median(self.waypost.iter().map(cpu_us)),
            echo_cpu_us: median(self.echo.iter().map(cpu_us)),
        }
    }
}

/// The medians of the commit path's rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Committed {
    pub(crate) rocksdb_bytes_per_s: f64,
    pub(crate) rocksdb_pings_per_s: f64,
    pub(crate) committer_pings_per_s: f64,
    pub(crate) waypost_of_rocksdb: f64,
    pub(crate) group_requests: f64,
    pub(crate) sealing_us: f64,
}

impl Committed {
    /// There were `pings` in each round.
    pub(crate) fn of(rounds: &[CommitRound], pings: f64) -> Self {
        let middle = |figure: &dyn Fn(&CommitRound) -> f64| median(rounds.iter().map(figure));
        Self {
            rocksdb_bytes_per_s: middle(&|round| round.bytes as f64 / round.rocksdb.as_secs_f64()),
            rocksdb_pings_per_s: middle(&|round| pings / round.rocksdb.as_secs_f64()),
            committer_pings_per_s: middle(&|round| pings / round.committer.as_secs_f64()),
            waypost_of_rocksdb: middle(&|round| {
                round.rocksdb.as_secs_f64() / round.committer.as_secs_f64()
            }),
            group_requests: middle(&|round| round.group_requests as f64),
            sealing_us: middle(&|round| round.sealing.as_secs_f64() * 1e6 / round.rows as f64),
        }
    }
}

impl From<&Latencies> for Percentiles {
    fn from(latencies: &Latencies) -> Self {
        let FreshnessMs { p50, p99, .. } = latencies.freshness_ms();
        Self { p50, p99 }
    }
}

/// The middle one of an odd number of measurements: one disturbed round changes nothing.
fn median(measured: impl Iterator<Item = f64>) -> f64 {
    let mut measured: Vec<f64> = measured.collect();
    measured.sort_by(f64::total_cmp);
    measured
        .get(measured.len() / 2)
        .copied()
        .unwrap_or(f64::NAN)
}

/// One line of the table.
struct Line {
    what: String,
    waypost: String,
    against: String,
    ratio: Option<f64>,
    goal: Option<Goal>,
}

struct Goal {
    wording: String,
    is_met: bool,
}

impl Goal {
    fn ratio(found: f64, goal: f64) -> Option<Self> {
        Some(Self {
            wording: format!("{goal:.2}"),
            is_met: goal <= found,
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            waypost,
            against,
            ratio,
            goal,
        } = self;
        let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let goal = goal.as_ref().map_or_else(String::new, |goal| {
            let verdict = if goal.is_met { "met" } else { "missed" };
            format!("{}, {verdict}", goal.wording)
        });
        let line = format!("  {what:<52} {waypost:>10}  {against:<30} {ratio:>5}  {goal}");
        writeln!(f, "{}", line.trim_end())
    }
}

impl Figures {
    fn lines(&self) -> [Line; 10] {
        let limits = &self.limits;
        let (batches, lone, fsync) = (&limits.batches, &limits.lone, &limits.fsync_ms);
        let memory = &limits.memory;
        let ack_goal_ms = LONE_P50_GOAL_MS + fsync.p50;
        [
            Line {
                what: format!(
                    "one ping outstanding on each of {} connections",
                    Count(self.busy_connections.into())
                ),
                waypost: rate(limits.waypost_pings_per_s),
                against: format!("echo {}", rate(limits.echo_pings_per_s)),
                ratio: Some(limits.waypost_of_echo),
                goal: Goal::ratio(limits.waypost_of_echo, ECHO_GOAL),
            },
            Line {
                what: "the same with batches of 100".to_owned(),
                waypost: rate(batches.waypost_pings_per_s),
                against: format!("echo {}", rate(batches.echo_pings_per_s)),
                ratio: Some(batches.waypost_of_echo),
                goal: Some(Goal {
                    wording: rate(BATCHES_GOAL_PINGS_PER_S),
                    is_met: BATCHES_GOAL_PINGS_PER_S <= batches.waypost_pings_per_s,
                }),
            },
            Line {
                what: format!(
                    "a lone ping, {} connections, {} pings/s: CPU",
                    Count(self.connections.into()),
                    Count::of(self.rate)
                ),
                waypost: format!("{:.1} µs", lone.waypost_cpu_us),
                against: format!("echo {:.1} µs", lone.echo_cpu_us),
                ratio: Some(lone.waypost_cpu_us / lone.echo_cpu_us),
                goal: Some(Goal {
                    wording: format!("at most {LONE_CPU_GOAL_US} µs"),
                    is_met: lone.waypost_cpu_us <= LONE_CPU_GOAL_US,
                }),
            },
            Line {
                what: "    due to acknowledged, p50".to_owned(),
                waypost: Ms(lone.waypost_ms.p50).to_string(),
                against: format!("echo {}, sync {}", Ms(lone.echo_ms.p50), Ms(fsync.p50)),
                ratio: None,
                goal: Some(Goal {
                    wording: format!("at most {LONE_P50_GOAL_MS} ms + sync"),
                    is_met: lone.waypost_ms.p50 <= ack_goal_ms,
                }),
            },
            Line {
                what: "    due to acknowledged, p99".to_owned(),
                waypost: Ms(lone.waypost_ms.p99).to_string(),
                against: format!("echo {}, sync {}", Ms(lone.echo_ms.p99), Ms(fsync.p99)),
                ratio: None,
                goal: None,
            },
            Line {
                what: "handshakes in a storm, until Welcome".to_owned(),
                waypost: rate(limits.storm_handshakes_per_s),
                against: format!("echo {}", rate(limits.handshakes_per_s)),
                ratio: Some(limits.storm_of_handshakes),
                goal: Goal::ratio(limits.storm_of_handshakes, STORM_GOAL),
            },
            Line {
                what: "memory of a connection after its Hello".to_owned(),
                waypost: kilobytes(memory.waypost_idle_bytes),
                against: format!(
                    "echo {}, in the end {}",
                    kilobytes(memory.echo_idle_bytes),
                    kilobytes(memory.echo_used_bytes)
                ),
                ratio: Some(memory.waypost_idle_bytes / memory.echo_idle_bytes),
                goal: Some(Goal {
                    wording: format!("at most {} more", kilobytes(OWN_MEMORY_GOAL_BYTES)),
                    is_met: memory.waypost_idle_bytes
                        <= memory.echo_idle_bytes + OWN_MEMORY_GOAL_BYTES,
                }),
            },
            Line {
                what: format!(
                    "commit path, lone pings, groups of {}",
                    Count::of(limits.group_requests)
                ),
                waypost: rate(limits.committer_pings_per_s),
                against: format!(
                    "RocksDB {}, {}",
                    rate(limits.rocksdb_pings_per_s),
                    megabytes(limits.rocksdb_bytes_per_s)
                ),
                ratio: Some(limits.waypost_of_rocksdb),
                goal: Goal::ratio(limits.waypost_of_rocksdb, ROCKSDB_GOAL),
            },
            Line {
                what: "commit path, batches of 100".to_owned(),
                waypost: rate(batches.committer_pings_per_s),
                against: format!(
                    "RocksDB {}, {}",
                    rate(batches.rocksdb_pings_per_s),
                    megabytes(batches.rocksdb_bytes_per_s)
                ),
                ratio: Some(batches.waypost_of_rocksdb),
                goal: Goal::ratio(batches.waypost_of_rocksdb, ROCKSDB_GOAL),
            },
            Line {
                what: "sealing a batch of 100 and its device's record, of the time for one above"
                    .to_owned(),
                waypost: format!("{:.2} µs", batches.sealing_us),
                against: format!("a lone ping {:.2} µs", limits.sealing_us),
                ratio: Some(batches.sealing_of_waypost),
                goal: Some(Goal {
                    wording: format!("at most {SEALING_GOAL:.2}"),
                    is_met: batches.sealing_of_waypost <= SEALING_GOAL,
                }),
            },
        ]
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:<52} {:>10}  {:<30} {:>5}  goal",
            "what", "Waypost", "against", "ratio"
        )?;
        self.lines().iter().try_for_each(|line| line.fmt(f))?;
        if 0 < self.limits.storm_refusals {
            let refusals = Count(self.limits.storm_refusals);
            writeln!(
                f,
                "\n  In the storm {refusals} handshakes were turned away and came again."
            )?;
        }
        Ok(())
    }
}

/// A number a second, as people read it.
fn rate(per_s: f64) -> String {
    match per_s {
        small if small < 1e4 => format!("{}/s", Count::of(small)),
        middle if middle < 1e6 => format!("{:.1} k/s", middle / 1e3),
        large => format!("{:.2} M/s", large / 1e6),
    }
}

/// Bytes, as people read it.
fn kilobytes(bytes: f64) -> String {
    format!("{:.1} KB", bytes / 1e3)
}

/// Bytes a second, as people read it.
fn megabytes(bytes_per_s: f64) -> String {
    format!("{:.1} MB/s", bytes_per_s / 1e6)
}

const ECHO_GOAL: f64 = 0.75;
const BATCHES_GOAL_PINGS_PER_S: f64 = 2e6;
const LONE_CPU_GOAL_US: f64 = 32.0;
const LONE_P50_GOAL_MS: f64 = 3.0;
const STORM_GOAL: f64 = 0.8;
const OWN_MEMORY_GOAL_BYTES: f64 = 3e3;
const ROCKSDB_GOAL: f64 = 0.7;
const SEALING_GOAL: f64 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(elapsed_ms: u64, processor_ms: u64) -> Cost {
        Cost {
            elapsed: Duration::from_millis(elapsed_ms),
            processor: Duration::from_millis(processor_ms),
        }
    }

    fn example() -> Figures {
        let percentiles = Percentiles { p50: 1.0, p99: 4.0 };
        Figures {
            scenario: "limits",
            connections: 5_000,
            busy_connections: 1_000,
            rate: 10_000.0,
            rounds: 5,
            limits: Limits {
                echo_pings_per_s: 90_000.0,
                waypost_pings_per_s: 72_000.0,
                waypost_of_echo: 0.8,
                echo_cpu_us_per_ping: 10.0,
                waypost_cpu_us_per_ping: 15.0,
                batches: Batches {
                    echo_pings_per_s: 7e6,
                    waypost_pings_per_s: 1.5e6,
                    waypost_of_echo: 0.21,
                    rocksdb_bytes_per_s: 3e7,
                    rocksdb_pings_per_s: 33e6,
                    committer_pings_per_s: 22e6,
                    waypost_of_rocksdb: 0.67,
                    sealing_us: 1.0,
                    sealing_of_waypost: 0.05,
                },
                lone: Lone {
                    echo_cpu_us: 30.0,
                    waypost_cpu_us: 40.0,
                    echo_ms: percentiles,
                    waypost_ms: percentiles,
                },
                handshakes_per_s: 2_000.0,
                storm_handshakes_per_s: 1_700.0,
                storm_of_handshakes: 0.85,
                storm_refusals: 0,
                echo_handshake_cpu_us: 300.0,
                waypost_handshake_cpu_us: 350.0,
                rocksdb_bytes_per_s: 2e7,
                rocksdb_pings_per_s: 400_000.0,
                committer_pings_per_s: 300_000.0,
                waypost_of_rocksdb: 0.75,
                group_requests: 500.0,
                sealing_us: 0.4,
                memory: Memory {
                    waypost_idle_bytes: 31_000.0,
                    echo_idle_bytes: 29_000.0,
                    echo_used_bytes: 41_000.0,
                },
                fsync_ms: percentiles,
            },
        }
    }

    #[test]
    fn one_disturbed_round_changes_no_figure_and_ratios_are_those_of_pairs() {
        let costs = Costs {
            waypost: vec![cost(2_000, 40), cost(90_000, 900), cost(1_000, 20)],
            echo: vec![cost(1_000, 10), cost(1_000, 10), cost(500, 5)],
        };
        let compared = costs.compared(1_000.0);
        assert!((compared.waypost_per_s - 500.0).abs() < 1e-9);
        assert!((compared.waypost_of_echo - 0.5).abs() < 1e-9);
        assert!((compared.waypost_cpu_us - 40.0).abs() < 1e-9);
        assert!((compared.echo_cpu_us - 10.0).abs() < 1e-9);
    }

    #[test]
    fn the_json_has_every_figure_of_the_contract() {
        let json = serde_json::to_value(example()).unwrap();
        assert_eq!(json["scenario"], "limits");
        for field in [
            "echo_pings_per_s",
            "waypost_pings_per_s",
            "waypost_of_echo",
            "handshakes_per_s",
            "storm_handshakes_per_s",
            "rocksdb_bytes_per_s",
            "waypost_of_rocksdb",
        ] {
            assert!(json["limits"][field].is_f64(), "{field}");
        }
    }

    #[test]
    fn the_table_says_which_goals_are_met_and_which_are_missed() {
        let table = example().to_string();
        let line = |beginning: &str| {
            let found = table
                .lines()
                .find(|line| line.trim().starts_with(beginning));
            found.unwrap_or_else(|| panic!("no {beginning:?} in\n{table}"))
        };
        assert!(
            line("one ping outstanding").ends_with("0.75, met"),
            "{table}"
        );
        assert!(
            line("the same with batches").ends_with("2.00 M/s, missed"),
            "{table}"
        );
        assert!(
            line("a lone ping").ends_with("at most 32 µs, missed"),
            "{table}"
        );
        assert!(line("handshakes").ends_with("0.80, met"), "{table}");
        assert!(
            line("memory of a connection").ends_with("at most 3.0 KB more, met"),
            "{table}"
        );
        assert!(
            line("commit path, batches").ends_with("0.70, missed"),
            "{table}"
        );
        assert!(
            line("sealing a batch").ends_with("at most 0.10, met"),
            "{table}"
        );
    }

    #[test]
    fn rates_are_written_for_people() {
        assert_eq!(
            [950.4, 2_100.0, 41_800.0, 2.62e6].map(rate),
            ["950/s", "2,100/s", "41.8 k/s", "2.62 M/s"]
        );
        assert_eq!(megabytes(18_340_000.0), "18.3 MB/s");
    }
}
