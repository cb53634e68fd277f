//! `loadtest limits`: what this machine can do at most, and how much of it Waypost makes, in one run.
//!
//! In the order of a run: a gateway and an [`echo`] server start as processes of their own. A crew of client
//! threads for each plays the same devices, one request outstanding on each of its wires; then it connects
//! many more at once; then it keeps a pace on all of them. The processor time of either server is read around each round.
//! Last comes the commit path against RocksDB alone. [`figures`] says it all.
//! Knows the order, and what is compared with what. Must not know how anything is measured.
//!
//! Rounds of the two sides take turns, so that both meet the same disk, the same clock rate and the same
//! neighbours. The first of each warms up and does not count.

mod commit_path;
mod crew;
pub mod echo;
pub mod figures;
mod load;
mod owed;
mod pace;
mod processor;
mod wire;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::{Args, Subcommand};
use rustix::fs::statfs;
use waypost_gateway::{clock::system_now_ms, pki::Authority};

use crate::{local_gateway::LocalGateway, progress::Progress, report::Latencies};

use self::{
    crew::{Crew, Papers},
    echo::{EchoArgs, EchoProcess},
    figures::{Batches, Committed, Cost, Costs, Figures, Limits, Lone, Memory},
    load::{BATCHES, Drive, LONE_PINGS, Load},
    pace::Pace,
    wire::Server,
};

/// What belongs to the measurement of limits on the command line.
#[derive(Debug, Subcommand)]
pub enum LimitsCommand {
    /// Measures this machine's own ceilings, and Waypost as a ratio of each
    Limits(LimitsArgs),
    /// Sends back what it gets, for `limits`
    #[command(hide = true)]
    EchoServer(EchoArgs),
}

/// Arguments of `loadtest limits`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loadtest limits --dir /var/lib --json limits.json      on the disk that the store will be on
  loadtest limits --connections 500 --rate 1000 --seconds 1 --rounds 1      a quick look

Starts a gateway and a bare echo server on loopback, and ends both. Client and servers share this machine, so
build with --release and let it do nothing else meanwhile.
Exit code: 0 measured, whether or not the goals are met; 1 something could not be measured, or an answer was
wrong; 2 the command line is wrong.")]
pub struct LimitsArgs {
    /// Connections to either server in the open loop; a fifth of them are the busy ones with a request
    /// outstanding on each
    #[arg(long, value_name = "N", default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Lone pings a second in the open loop, all connections together
    #[arg(long, value_name = "PINGS_PER_S", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// How long a round of the open loop takes
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Rounds on either side, after one that warms up; an odd number, for there is one in the middle
    #[arg(long, value_name = "N", default_value = "5", value_parser = parse_rounds)]
    rounds: usize,
    /// Where the stores are written, on the disk to be measured; removed in the end. The system's folder for
    /// temporary files if not given
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Write the figures as one JSON object; `-` for standard output, the table then goes to standard error
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl LimitsCommand {
    /// Does what the command says.
    pub async fn run(self) -> ExitCode {
        let done = match self {
            Self::EchoServer(args) => echo::serve(&args).await,
            Self::Limits(args) => {
                let progress = Progress::new();
                let measured = tokio::select! {
                    measured = measure(&args, &progress) => measured,
                    // Both servers are killed as they are dropped.
                    _ = tokio::signal::ctrl_c() => {
                        progress.end();
                        return ExitCode::from(EXIT_INTERRUPTED);
                    }
                };
                progress.end();
                measured.and_then(|figures| publish(&figures, args.json.as_deref()))
            }
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        }
    }
}

/// Measures everything, in the order of the module's documentation.
///
/// # Errors
/// When something could not be measured, or an answer was wrong.
pub async fn measure(args: &LimitsArgs, progress: &Progress) -> anyhow::Result<Figures> {
    let folder = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    if is_in_memory(&folder)? {
        progress.say(format_args!(
            "  {} is in memory, where a sync costs nothing: name a folder on a disk with --dir",
            folder.display()
        ));
    }
    let gateway = LocalGateway::start_in(&folder).await?;
    let served = serve_both(args, &gateway, progress).await;
    progress.begin("stopping", None);
    let stopped = gateway.stop().await;
    let served = unless_ended(served, stopped.map(drop))?;
    let lone_commits = commit(LONE_PINGS, args, &folder, "commits", progress).await?;
    let batch_commits = commit(BATCHES, args, &folder, "commits of batches", progress).await?;
    progress.begin("syncs of the disk", None);
    let syncs = tokio::task::spawn_blocking(move || commit_path::syncs(SYNCS, &folder)).await??;
    Ok(figures(args, &served, lone_commits, batch_commits, &syncs))
}

/// What was measured at the two servers.
struct Served {
    plan: Plan,
    lone: Costs,
    batches: Costs,
    handshakes: Costs,
    storm_refusals: u64,
    sparse: Costs,
    /// At Waypost and at the echo.
    sparse_latencies: [Latencies; 2],
    /// Of Waypost and of the echo, for each connection that has said Hello and nothing more.
    idle_bytes: [f64; 2],
    /// Of the echo, for each connection at the end. Waypost's has grown by its store as well.
    echo_used_bytes: f64,
}

/// How the devices come, to either server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Those that have a request outstanding each, before there are others.
    busy: u32,
    /// Those that join in each round of handshakes.
    joining: u32,
    /// All of them, in the end.
    total: u32,
    /// Lone pings of each in one round of the open loop.
    sparse_pings: u32,
}

/// One server with the client's threads that play devices towards it.
struct Side {
    crew: Crew,
    process_id: u32,
}

/// Both servers, which take turns.
struct Sides {
    waypost: Side,
    echo: Side,
    drive: Drive,
    rounds: usize,
}

impl LimitsArgs {
    fn plan(&self) -> Plan {
        let rounds = u32::try_from(self.rounds).unwrap_or(u32::MAX);
        let busy = self.connections.div_ceil(BUSY_SHARE);
        // At least one each time; the number is then a little larger than asked for.
        let joining = ((self.connections - busy) / rounds).max(1);
        let total = busy + joining * rounds;
        let pings = u64::from(self.rate) * u64::from(self.seconds);
        let sparse_pings = pings.div_ceil(total.into());
        Plan {
            busy,
            joining,
            total,
            sparse_pings: u32::try_from(sparse_pings).unwrap_or(u32::MAX),
        }
    }
}

async fn serve_both(
    args: &LimitsArgs,
    gateway: &LocalGateway,
    progress: &Progress,
) -> anyhow::Result<Served> {
    let target = gateway.target();
    let echo = EchoProcess::start(&target.data.context("the gateway has no folder")?).await?;
    progress.say(format_args!(
        "Waypost on udp {}, a bare echo on udp {}; medians of {} rounds, in turn",
        target.devices,
        echo.address(),
        args.rounds
    ));
    let plan = args.plan();
    progress.begin("certificates", None);
    let papers = tokio::task::spawn_blocking(move || {
        Papers::issue(&Authority::open(&target.pki)?, plan.total)
    });
    let papers = Arc::new(papers.await??);
    let threads = thread::available_parallelism()?;
    let sides = Sides {
        waypost: Side {
            crew: Crew::start(Server::Waypost, target.devices, &papers, threads).await?,
            process_id: gateway.process_id()?,
        },
        echo: Side {
            crew: Crew::start(Server::Echo, echo.address(), &papers, threads).await?,
            process_id: echo.process_id()?,
        },
        drive: Drive::since_yesterday(system_now_ms()),
        rounds: args.rounds,
    };
    let served = sides.measure(plan, args.rate.into(), progress).await;
    drop(sides);
    unless_ended(served, echo.stop().await)
}

/// What came of the work with a server. When that failed and the server had ended, then that is likely why.
fn unless_ended<T>(outcome: anyhow::Result<T>, stopped: anyhow::Result<()>) -> anyhow::Result<T> {
    match (outcome, stopped) {
        (Err(error), Err(end)) => Err(error.context(format!("{end:#}"))),
        (outcome, stopped) => stopped.and(outcome),
    }
}

impl Sides {
    async fn measure(
        &self,
        plan: Plan,
        pings_per_s: f64,
        progress: &Progress,
    ) -> anyhow::Result<Served> {
        let busy = 0..plan.busy as usize;
        progress.begin("connecting", None);
        let [_, echo_before] = self.resident_bytes()?;
        self.waypost.crew.connect(busy.clone()).await?;
        self.echo.crew.connect(busy).await?;
        let lone = self.exchange(LONE_PINGS, plan, progress).await?;
        let batches = self.exchange(BATCHES, plan, progress).await?;
        // By now whatever a server takes for itself, it has taken.
        let before = self.resident_bytes()?;
        let (handshakes, storm_refusals) = self.shake_hands(plan, progress).await?;
        let after = self.resident_bytes()?;
        let idle_bytes = [0, 1].map(|at| {
            let grown = after[at].saturating_sub(before[at]);
            grown as f64 / f64::from(plan.total - plan.busy)
        });
        let (sparse, sparse_latencies) = self.keep_pace(plan, pings_per_s, progress).await?;
        let [_, echo_after] = self.resident_bytes()?;
        let echo_used_bytes = echo_after.saturating_sub(echo_before) as f64 / f64::from(plan.total);
        Ok(Served {
            plan,
            lone,
            batches,
            handshakes,
            storm_refusals,
            sparse,
            sparse_latencies,
            idle_bytes,
            echo_used_bytes,
        })
    }

    fn resident_bytes(&self) -> anyhow::Result<[u64; 2]> {
        Ok([
            processor::resident_bytes(self.waypost.process_id)?,
            processor::resident_bytes(self.echo.process_id)?,
        ])
    }

    /// The two sides in turn, each with the place for what it costs.
    fn turns<'a>(&'a self, costs: &'a mut Costs) -> [(&'a Side, &'a mut Vec<Cost>); 2] {
        [
            (&self.waypost, &mut costs.waypost),
            (&self.echo, &mut costs.echo),
        ]
    }

    /// All connections send, each when it has its answer, as often as the load says.
    async fn exchange(&self, load: Load, plan: Plan, progress: &Progress) -> anyhow::Result<Costs> {
        let mut costs = Costs::default();
        let pings = load.pings(plan.busy.into()) as f64;
        progress.begin(load.name, Some(self.rounds as u64 + 1));
        for round in 0..=self.rounds {
            progress.at(round as u64, || costs.newest(pings));
            for (side, costs) in self.turns(&mut costs) {
                side.crew.prepare(self.drive, load).await?;
                let (cost, ()) = side.cost_of(side.crew.exchange()).await?;
                if 0 < round {
                    costs.push(cost);
                }
            }
        }
        Ok(costs)
    }

    /// More devices join those that are connected, whose own handshakes were for warming up. Also returns how
    /// often the gateway turned one away.
    async fn shake_hands(&self, plan: Plan, progress: &Progress) -> anyhow::Result<(Costs, u64)> {
        let mut costs = Costs::default();
        let mut refusals = 0;
        progress.begin("handshakes", Some(self.rounds as u64));
        for round in 0..self.rounds {
            progress.at(round as u64, || costs.newest(plan.joining.into()));
            let first = plan.busy as usize + round * plan.joining as usize;
            for (side, costs) in self.turns(&mut costs) {
                let joining = side.crew.connect(first..first + plan.joining as usize);
                let (cost, turned_away) = side.cost_of(joining).await?;
                refusals += turned_away;
                costs.push(cost);
            }
        }
        Ok((costs, refusals))
    }

    /// All connections send when it is their turn. Also returns the latencies at Waypost and at the echo.
    async fn keep_pace(
        &self,
        plan: Plan,
        pings_per_s: f64,
        progress: &Progress,
    ) -> anyhow::Result<(Costs, [Latencies; 2])> {
        let mut costs = Costs::default();
        let mut latencies = <[Latencies; 2]>::default();
        let load = Load {
            name: "open loop",
            request_pings: 1,
            requests: plan.sparse_pings.into(),
        };
        progress.begin(load.name, Some(self.rounds as u64 + 1));
        for round in 0..=self.rounds {
            progress.at(round as u64, String::new);
            for ((side, costs), latencies) in self.turns(&mut costs).into_iter().zip(&mut latencies)
            {
                side.crew.prepare(self.drive, load).await?;
                let pace = Pace {
                    begin: Instant::now() + HEAD_START,
                    pings_per_s,
                    each: plan.sparse_pings as usize,
                    wires: plan.total as usize,
                    threads: 1,
                    thread: 0,
                };
                let (cost, took_us) = side.cost_of(side.crew.keep(pace)).await?;
                if 0 < round {
                    costs.push(cost);
                    took_us.into_iter().for_each(|us| latencies.record_us(us));
                }
            }
        }
        Ok((costs, latencies))
    }
}

impl Side {
    /// What something costs, and what comes of it.
    async fn cost_of<T>(
        &self,
        something: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<(Cost, T)> {
        let used_before = processor::used_by(self.process_id)?;
        let begun = Instant::now();
        let outcome = something.await?;
        let elapsed = begun.elapsed();
        let used = processor::used_by(self.process_id)?;
        let processor = used.saturating_sub(used_before);
        Ok((Cost { elapsed, processor }, outcome))
    }
}

async fn commit(
    load: Load,
    args: &LimitsArgs,
    folder: &Path,
    step: &'static str,
    progress: &Progress,
) -> anyhow::Result<Committed> {
    let devices = args.plan().busy;
    let mut rounds = Vec::new();
    progress.begin(step, Some(args.rounds as u64));
    for round in 0..args.rounds {
        progress.at(round as u64, String::new);
        let folder = folder.to_owned();
        let round = tokio::task::spawn_blocking(move || commit_path::round(load, devices, &folder));
        rounds.push(round.await??);
    }
    Ok(Committed::of(&rounds, load.pings(devices.into()) as f64))
}

fn figures(
    args: &LimitsArgs,
    served: &Served,
    lone_commits: Committed,
    batch_commits: Committed,
    syncs: &Latencies,
) -> Figures {
    let Plan {
        busy,
        joining,
        total,
        sparse_pings,
    } = served.plan;
    let pings_of = |load: Load| load.pings(busy.into()) as f64;
    let lone = served.lone.compared(pings_of(LONE_PINGS));
    let batches = served.batches.compared(pings_of(BATCHES));
    let handshakes = served.handshakes.compared(joining.into());
    let sparse = served
        .sparse
        .compared(f64::from(total) * f64::from(sparse_pings));
    let [sparse_waypost, sparse_echo] = &served.sparse_latencies;
    Figures {
        scenario: "limits",
        connections: total,
        busy_connections: busy,
        rate: args.rate.into(),
        rounds: args.rounds,
        limits: Limits {
            echo_pings_per_s: lone.echo_per_s,
            waypost_pings_per_s: lone.waypost_per_s,
            waypost_of_echo: lone.waypost_of_echo,
            echo_cpu_us_per_ping: lone.echo_cpu_us,
            waypost_cpu_us_per_ping: lone.waypost_cpu_us,
            batches: Batches {
                echo_pings_per_s: batches.echo_per_s,
                waypost_pings_per_s: batches.waypost_per_s,
                waypost_of_echo: batches.waypost_of_echo,
                rocksdb_bytes_per_s: batch_commits.rocksdb_bytes_per_s,
                rocksdb_pings_per_s: batch_commits.rocksdb_pings_per_s,
                committer_pings_per_s: batch_commits.committer_pings_per_s,
                waypost_of_rocksdb: batch_commits.waypost_of_rocksdb,
                sealing_us: batch_commits.sealing_us,
                sealing_of_waypost: batch_commits.sealing_us * batches.waypost_per_s
                    / BATCHES.request_pings as f64
                    / 1e6,
            },
            lone: Lone {
                echo_cpu_us: sparse.echo_cpu_us,
                waypost_cpu_us: sparse.waypost_cpu_us,
                echo_ms: sparse_echo.into(),
                waypost_ms: sparse_waypost.into(),
            },
            handshakes_per_s: handshakes.echo_per_s,
            storm_handshakes_per_s: handshakes.waypost_per_s,
            storm_of_handshakes: handshakes.waypost_of_echo,
            storm_refusals: served.storm_refusals,
            echo_handshake_cpu_us: handshakes.echo_cpu_us,
            waypost_handshake_cpu_us: handshakes.waypost_cpu_us,
            rocksdb_bytes_per_s: lone_commits.rocksdb_bytes_per_s,
            rocksdb_pings_per_s: lone_commits.rocksdb_pings_per_s,
            committer_pings_per_s: lone_commits.committer_pings_per_s,
            waypost_of_rocksdb: lone_commits.waypost_of_rocksdb,
            group_requests: lone_commits.group_requests,
            sealing_us: lone_commits.sealing_us,
            memory: Memory {
                waypost_idle_bytes: served.idle_bytes[0],
                echo_idle_bytes: served.idle_bytes[1],
                echo_used_bytes: served.echo_used_bytes,
            },
            fsync_ms: syncs.into(),
        },
    }
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the figures are what the command is for"
)]
fn publish(figures: &Figures, json: Option<&Path>) -> anyhow::Result<()> {
    if json == Some(Path::new("-")) {
        eprint!("\n{figures}");
        println!("{}", serde_json::to_string(figures)?);
        return Ok(());
    }
    print!("\n{figures}");
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(figures)? + "\n";
        std::fs::write(path, text)
            .with_context(|| format!("cannot write the figures to {}", path.display()))?;
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a command says why it failed")]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("loadtest: {error:#}");
    ExitCode::FAILURE
}

fn is_in_memory(folder: &Path) -> anyhow::Result<bool> {
    let found =
        statfs(folder).with_context(|| format!("cannot use the folder {}", folder.display()))?;
    Ok(found.f_type == TMPFS_MAGIC)
}

fn parse_rounds(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(rounds) if rounds % 2 == 1 && rounds <= MOST_ROUNDS => Ok(rounds),
        _ => Err(format!("an odd number up to {MOST_ROUNDS} is needed")),
    }
}

/// One of so many connections is busy.
const BUSY_SHARE: u32 = 5;
/// A device's allowance of pings at once lasts for more than these.
const MOST_ROUNDS: usize = 15;
/// In which the client's threads get ready for the first ping.
const HEAD_START: Duration = Duration::from_millis(50);
/// Enough for a p99.
const SYNCS: u32 = 500;
/// As in linux/magic.h.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const EXIT_INTERRUPTED: u8 = 130;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: LimitsCommand,
    }

    fn plan(line: &str) -> Plan {
        match Line::try_parse_from(line.split(' ')).unwrap().command {
            LimitsCommand::Limits(args) => args.plan(),
            LimitsCommand::EchoServer(args) => panic!("{args:?}"),
        }
    }

    #[test]
    fn the_plan_is_the_goals_case_unless_told_otherwise() {
        let goal = Plan {
            busy: 1_000,
            joining: 800,
            total: 5_000,
            sparse_pings: 10,
        };
        assert_eq!(plan("loadtest limits"), goal);
    }

    #[test]
    fn a_small_plan_still_has_somebody_in_every_part() {
        let least = plan("loadtest limits --connections 1 --rate 1 --seconds 1 --rounds 3");
        let all_there = Plan {
            busy: 1,
            joining: 1,
            total: 4,
            sparse_pings: 1,
        };
        assert_eq!(least, all_there);
    }

    #[test]
    fn a_median_needs_an_odd_number_of_rounds() {
        for (rounds, is_right) in [
            ("1", true),
            ("15", true),
            ("0", false),
            ("4", false),
            ("17", false),
        ] {
            assert_eq!(parse_rounds(rounds).is_ok(), is_right, "{rounds}");
        }
    }

    #[test]
    fn the_end_of_a_server_is_told_before_what_it_caused() {
        let broken = || Err::<(), _>(anyhow::anyhow!("connection lost"));
        let ended = || Err(anyhow::anyhow!("the server ended"));
        let said = |error: anyhow::Error| format!("{error:#}");
        assert_eq!(
            unless_ended(broken(), ended()).map_err(said),
            Err("the server ended: connection lost".to_owned())
        );
        assert_eq!(
            unless_ended(broken(), Ok(())).map_err(said),
            Err("connection lost".to_owned())
        );
        assert_eq!(
            unless_ended(Ok(()), ended()).map_err(said),
            Err("the server ended".to_owned())
        );
        assert_eq!(unless_ended(Ok(7), Ok(())).map_err(said), Ok(7));
    }
}
