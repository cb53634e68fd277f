//! The `loadtest` command: flags to scenario, run, report.

use std::{
    io::Write,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, Subcommand};
use tokio_util::sync::CancellationToken;
use waypost_gateway::clock::system_now_ms;
use waypost_loadtest::{
    fleet::Pace,
    limits::LimitsCommand,
    mix, page,
    progress::Progress,
    relay::Weather,
    replay::Replay,
    report::Report,
    run::{self, RunSettings, Target},
    scenario::{Audience, Restart, Scenario, Storm},
    steady::Steady,
};

/// As the gateway's: what hundreds of thousands of connections allocate is small and long-lived.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Loads a Waypost gateway with simulated devices, then checks that it kept its promises: nothing lost,
/// nothing twice, freshness right for every user.
///
/// Without --addr it starts a gateway of its own in a temporary folder. Latencies are open-loop: they count
/// from when a ping was due, so a stall is not hidden. Ends with 0 when every check holds, 1 when one
/// fails, 2 when the command line is wrong.
#[derive(Debug, Parser)]
#[command(name = "loadtest", version, after_long_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    #[command(flatten)]
    Scenario(Box<Command>),
    #[command(flatten)]
    Limits(LimitsCommand),
}

const EXAMPLES: &str = "\
Examples:
  A minute of a thousand devices, with a page to look at:
    loadtest steady --devices 1000 --rate 5000 --html report.html
  As many connections as a big fleet has, a ping a minute each:
    loadtest steady --devices 200000 --rate 3333 --duration 5m --connect-rate 2000
  Everybody comes back after the gateway was killed:
    loadtest storm --devices 50000 --established 1000 --restart kill
  As many checkers as an operations centre has, one of them stuck:
    loadtest freshness --checkers 100 --slow-readers 1
  Twelve hours without coverage:
    loadtest backlog --devices 5000 --held 720
  A gateway that runs already (never one that serves real devices):
    loadtest steady --addr gateway:4433 --pki pki --admin gateway:9464 --json report.json

Exit code: 0 every check passed, 1 one failed or the run could not be made, 2 the command line is wrong, 130 interrupted
twice.";

#[derive(Debug, Subcommand)]
enum Command {
    /// A simulated fleet at a constant rate, with seeded random movement
    Steady(SteadyArgs),
    /// Devices connect one after the other at a set rate, while those that are there already ping
    ///
    /// Checks that each gets in. Example: loadtest ramp --devices 20000 --connect-rate 1000 --duration 90s
    Ramp(RampArgs),
    /// All devices reconnect at once, beside established ones that ping on; also after a restart
    ///
    /// All connect; the established ones are measured for a while. Then the others leave, the gateway is
    /// restarted if wanted, the established ones come back first, and all others connect at once, each with
    /// a ping. Checks that each is served, and that the p99 of the established ones did not grow too much.
    /// Example: loadtest storm --devices 50000 --established 1000 --restart stop
    Storm(StormArgs),
    /// Many checkers watch all users while devices ping, some of them reading a byte a second
    ///
    /// Shows how many checkers this machine can tell of how much, and how soon. The users beyond --devices connect
    /// once before, ping and leave. Then all checkers watch; after a quarter of --duration the slow ones read a byte
    /// a second, and in the end they read freely. Checks that each checker is told of every change in order, that
    /// nobody is cut off, and that the others are told in time. Checkers and devices run on this machine, the
    /// devices only when nobody else wants to.
    /// Example: loadtest freshness --checkers 100 --users 300000 --rate 10000
    Freshness(FreshnessArgs),
    /// Devices connect for each ping and leave once it is acknowledged, again and again
    ///
    /// Reports the time from wake-up to acknowledgement, and how many pings travelled in the first packet
    /// (0-RTT). Example: loadtest wake --devices 1000 --every 10s
    Wake(WakeArgs),
    /// Devices that were offline for hours return all at once, with all that they have kept
    ///
    /// Reports how soon the newest ping of each was acknowledged, counted from the return of all, and when
    /// the old ones were through. Example: loadtest backlog --devices 5000 --held 720
    Backlog(BacklogArgs),
    /// A steady fleet, and then all of it sent again with the same numbers over new connections
    Duplicates(DuplicatesArgs),
    /// A steady fleet whose sockets change their ports all the time, as behind a NAT that forgets
    Rebind(RebindArgs),
    /// A steady fleet in a bad network: loss, duplication, delay and reordering, with seeded dice
    Lossy(LossyArgs),
    /// A recorded day of AIS positions, sent again: a vessel is a user with one device
    Replay(ReplayArgs),
    /// Groups of devices with rhythms and habits of their own, from a TOML file
    ///
    /// See mix.example.toml beside this program's source. Each group has a name, devices, every (between two
    /// reports of a device), batch (pings a report) and presence: "stays", "joins" (with connect_rate),
    /// "returns" (with after and held) or "wakes".
    Mix(MixArgs),
}

#[derive(Debug, Args)]
struct ReplayArgs {
    /// CSV, or CSV in gzip, with the columns mmsi,time,lat,lon,sog_knots,cog_degrees,heading_degrees
    file: PathBuf,
    /// How many times faster than recorded; `max` or 0 for as fast as acknowledgements allow. The
    /// default sends a day in a minute
    #[arg(long, value_name = "N", default_value = "1440", value_parser = parse_speed_up)]
    speed_up: SpeedUp,
    /// Keep the recorded times. Otherwise they are shifted as a whole, so that the last one is now. The
    /// gateway refuses pings older than its retention
    #[arg(long)]
    original_times: bool,
    /// Send everything this often, each further time with the same sequence numbers over new connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct SteadyArgs {
    #[command(flatten)]
    fleet: FleetArgs,
    /// How long, such as 90s or 5m; `forever` goes on until Ctrl-C, and does not check the store, because
    /// it cannot remember all that it sent
    #[arg(long, default_value = "60s", value_parser = parse_length)]
    duration: Length,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct RampArgs {
    /// How many devices, each of a user of its own
    #[arg(long, value_name = "N", default_value = "1000")]
    devices: NonZeroU32,
    /// Between two pings of a device, from when it connects
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_interval)]
    every: Duration,
    /// How long in all
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_interval)]
    duration: Duration,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct StormArgs {
    /// How many devices reconnect at once
    #[arg(long, value_name = "N", default_value = "5000")]
    devices: NonZeroU32,
    /// How many others stay, or are the first to come back, and are measured
    #[arg(long, value_name = "M", default_value = "500")]
    established: NonZeroU32,
    /// Between two pings of an established device
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_interval)]
    every: Duration,
    /// How long the established devices are measured before the storm, and again after
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_interval)]
    calm: Duration,
    /// Restart the gateway before the storm: `stop` ends it in order, `kill` at once. Only an own one
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "stop",
          value_parser = parse_restart, conflicts_with = "addr")]
    restart: Option<Restart>,
    /// How many times the p99 of the established devices may grow in the storm
    #[arg(long, value_name = "TIMES", default_value = "3", value_parser = parse_rate)]
    most_slowdown: f64,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct FreshnessArgs {
    /// How many users the gateway knows, and every checker watches
    #[arg(long, value_name = "N", default_value = "300000")]
    users: NonZeroU32,
    /// How many of them have a device that stays connected and pings. Each connection takes memory of both ends
    #[arg(long, value_name = "N", default_value = "20000")]
    devices: NonZeroU32,
    /// Updates a second, all devices together; they take turns
    #[arg(long, value_name = "PINGS_PER_S", default_value = "10000", value_parser = parse_rate)]
    rate: f64,
    /// How many checkers watch
    #[arg(long, value_name = "N", default_value = "100")]
    checkers: NonZeroU32,
    /// How many of the checkers read a byte a second after a quarter of the time
    #[arg(long, value_name = "N", default_value_t = 1)]
    slow_readers: u32,
    /// How long devices ping
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_interval)]
    duration: Duration,
    /// How much later than durable the other checkers may be told, in 99 of 100 cases, while some are slow
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = parse_interval)]
    most_p99: Duration,
    /// Which share of --rate must be acknowledged while it lasts: if less is, the machine is too small for this load,
    /// and how soon checkers are told says nothing of it
    #[arg(long, value_name = "SHARE", default_value = "0.9", value_parser = parse_share)]
    least_pace: f64,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct WakeArgs {
    /// How many devices, each of a user of its own; they take turns
    #[arg(long, value_name = "N", default_value = "1000")]
    devices: NonZeroU32,
    /// Between two wake-ups of a device. The gateway allows a device a connection a second, unless told
    /// otherwise
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_interval)]
    every: Duration,
    /// How long in all
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_interval)]
    duration: Duration,
    /// Make a full handshake each time, for comparison: no session is resumed, nothing travels early
    #[arg(long)]
    full_handshakes: bool,
    /// Put the gateway this far away, there and back, with a relay in between, and report latencies in round trips
    /// as well
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    round_trip: Duration,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct BacklogArgs {
    /// How many devices return
    #[arg(long, value_name = "N", default_value = "1000")]
    devices: NonZeroU32,
    /// How many older pings each holds, one a minute: 720 are twelve hours
    #[arg(long, value_name = "PINGS", default_value_t = 720,
          value_parser = clap::value_parser!(u32).range(..=i64::from(mix::MOST_HELD_PINGS)))]
    held: u32,
    /// How soon after the return the newest ping of 99 of 100 devices must be acknowledged
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_interval)]
    fresh_within: Duration,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct DuplicatesArgs {
    #[command(flatten)]
    fleet: FleetArgs,
    /// How long each pass takes
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_interval)]
    duration: Duration,
    /// How often everything is sent
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..))]
    passes: u32,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct RebindArgs {
    #[command(flatten)]
    fleet: FleetArgs,
    /// How long
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_interval)]
    duration: Duration,
    /// Between two changes of all ports
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_interval)]
    every: Duration,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct LossyArgs {
    #[command(flatten)]
    fleet: FleetArgs,
    /// How long
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_interval)]
    duration: Duration,
    /// The share of datagrams that is lost each way, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value = "0.02", value_parser = parse_share)]
    loss: f64,
    /// The share that arrives twice
    #[arg(long, value_name = "SHARE", default_value = "0.01", value_parser = parse_share)]
    duplication: f64,
    /// The least time that each way takes
    #[arg(long, value_name = "TIME", default_value = "40ms", value_parser = humantime::parse_duration)]
    delay: Duration,
    /// Up to this much longer, for each datagram anew, so that one overtakes another
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration)]
    jitter: Duration,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct MixArgs {
    /// The groups, in TOML
    file: PathBuf,
    #[command(flatten)]
    seed: SeedArgs,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct FleetArgs {
    /// How many devices, each of a user of its own
    #[arg(long, value_name = "N", default_value = "1000")]
    devices: NonZeroU32,
    /// Pings a second, all devices together; they take turns
    #[arg(long, value_name = "PINGS_PER_S", default_value = "1000", value_parser = parse_rate)]
    rate: f64,
}

#[derive(Debug, Args)]
struct SeedArgs {
    /// Repeats a run exactly, users included; random if not given
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// Load the gateway that listens for devices here, such as localhost:4433, instead of an own one
    #[arg(
        long,
        value_name = "HOST:PORT",
        requires = "pki",
        help_heading = "Gateway"
    )]
    addr: Option<String>,
    /// Its freshness service, to check what checkers are told, such as localhost:4434
    #[arg(
        long,
        value_name = "HOST:PORT",
        requires = "addr",
        help_heading = "Gateway"
    )]
    freshness: Option<String>,
    /// Its admin endpoint, to see what it uses, such as localhost:9464
    #[arg(
        long,
        value_name = "HOST:PORT",
        requires = "addr",
        help_heading = "Gateway"
    )]
    admin: Option<String>,
    /// Its development authority: the folder `pki` in the data folder of `waypost serve --dev`
    #[arg(long, value_name = "DIR", requires = "addr", help_heading = "Gateway")]
    pki: Option<PathBuf>,
    /// Its data folder, to check what is stored; only read
    #[arg(long, value_name = "DIR", requires = "addr", help_heading = "Gateway")]
    data: Option<PathBuf>,
    /// How many devices begin to connect in a second. Otherwise as many as --connect-window lets
    #[arg(long, value_name = "DEVICES_PER_S", value_parser = parse_rate, help_heading = "Connecting")]
    connect_rate: Option<f64>,
    /// How many devices may be on their way in at a time: 128, or 1024 where all are to come at once
    #[arg(long, value_name = "N", help_heading = "Connecting")]
    connect_window: Option<NonZeroU64>,
    /// How many UDP sockets carry all connections. Towards 127.0.0.1 each has a loopback address of its own,
    /// so that the fleet looks like several networks
    #[arg(long, value_name = "N", default_value = "16", help_heading = "Connecting",
          value_parser = parse_sockets)]
    sockets: NonZeroUsize,
    /// How often a silent device says that it is still there, so that NAT devices do not forget it; 0s for
    /// never: then the gateway forgets those that are silent for longer than its idle timeout
    #[arg(long, value_name = "TIME", default_value = "20s", help_heading = "Connecting",
          value_parser = humantime::parse_duration)]
    keep_alive: Duration,
    /// Write the report as one JSON object; `-` for standard output, the table then goes to standard error
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    json: Option<PathBuf>,
    /// Write the report as one HTML page with charts, for a browser
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    html: Option<PathBuf>,
}

impl SeedArgs {
    /// Short enough to be typed again.
    fn number(&self) -> u64 {
        self.seed
            .unwrap_or_else(|| u64::from(rand::random::<u32>()))
    }
}

impl FleetArgs {
    fn steady(&self, duration: Option<Duration>, seed: &SeedArgs) -> Steady {
        Steady {
            devices: self.devices.get(),
            pings_per_s: self.rate,
            duration,
            seed: seed.number(),
        }
    }
}

impl CommonArgs {
    fn settings(&self, scenario: &Scenario) -> RunSettings {
        let at_once = match self.connect_window {
            Some(window) => window.get(),
            None if scenario.is_a_rush() => RUSH_WINDOW,
            None => Pace::default().at_once,
        };
        RunSettings {
            sockets: self.sockets,
            pace: Pace {
                per_s: self.connect_rate,
                at_once,
            },
            keep_alive: Some(self.keep_alive).filter(|interval| !interval.is_zero()),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct SpeedUp(Option<f64>);

#[derive(Clone, Copy, Debug)]
struct Length(Option<Duration>);

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let command = match cli.task {
        Task::Scenario(command) => command,
        Task::Limits(command) => return command.run().await,
    };
    let (scenario, common) = match prepare(*command) {
        Ok(prepared) => prepared,
        Err(error) => return fail(&error, EXIT_USAGE),
    };
    let target = match target(&common).await {
        Ok(target) => target,
        Err(error) => return fail(&error, EXIT_USAGE),
    };
    let progress = Progress::new();
    progress.say(&scenario.title);
    let settings = common.settings(&scenario);
    let stop = stop_on_ctrl_c();
    let outcome = match &target {
        Some(target) => run::against(target, scenario, &settings, &progress, &stop).await,
        None => run::on_own_gateway(scenario, &settings, &progress, &stop).await,
    };
    progress.end();
    match outcome.and_then(|report| publish(&report, &common).map(|()| report.passed())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_FAILED),
        Err(error) => fail(&error, EXIT_FAILED),
    }
}

fn prepare(command: Command) -> anyhow::Result<(Scenario, CommonArgs)> {
    Ok(match command {
        Command::Steady(args) => {
            let steady = args.fleet.steady(args.duration.0, &args.seed);
            (Scenario::steady(steady), args.common)
        }
        Command::Ramp(args) => {
            let (devices, per_s) = (args.devices.get(), args.common.connect_rate);
            let all_there_s = per_s.map_or(0.0, |per_s| f64::from(devices) / per_s);
            ensure!(
                all_there_s < args.duration.as_secs_f64(),
                "at this --connect-rate all devices are there after {all_there_s:.0} s; \
                 --duration must be longer"
            );
            let seed = args.seed.number();
            let scenario = Scenario::ramp(devices, args.every, per_s, args.duration, seed);
            (scenario, args.common)
        }
        Command::Storm(args) => {
            let storm = Storm {
                calm: args.calm,
                restart: args.restart,
                most_slowdown: args.most_slowdown,
            };
            let (established, devices) = (args.established.get(), args.devices.get());
            let seed = args.seed.number();
            let scenario = Scenario::storm(established, args.every, devices, storm, seed);
            (scenario, args.common)
        }
        Command::Freshness(args) => {
            let (users, devices) = (args.users.get(), args.devices.get());
            ensure!(
                devices <= users,
                "--devices are some of the --users, so there cannot be more of them"
            );
            ensure!(
                args.slow_readers < args.checkers.get(),
                "--slow-readers are some of the --checkers, and at least one of these must read freely"
            );
            let audience = Audience {
                checkers: args.checkers.get(),
                slow_readers: args.slow_readers,
                duration: args.duration,
                updates_per_s: args.rate,
                least_pace: args.least_pace,
                most_p99: args.most_p99,
            };
            let seed = args.seed.number();
            let scenario = Scenario::freshness(users, devices, audience, seed);
            (scenario, args.common)
        }
        Command::Wake(args) => {
            let (devices, seed) = (args.devices.get(), args.seed.number());
            let resumes = !args.full_handshakes;
            let scenario = Scenario::wake(
                devices,
                args.every,
                args.duration,
                resumes,
                args.round_trip,
                seed,
            );
            (scenario, args.common)
        }
        Command::Backlog(args) => {
            let (devices, seed) = (args.devices.get(), args.seed.number());
            let scenario = Scenario::backlog(devices, args.held, args.fresh_within, seed);
            (scenario, args.common)
        }
        Command::Duplicates(args) => {
            let steady = args.fleet.steady(Some(args.duration), &args.seed);
            (Scenario::duplicates(steady, args.passes), args.common)
        }
        Command::Rebind(args) => {
            ensure!(
                args.every < args.duration,
                "--every must be shorter than --duration, or no port would change"
            );
            let steady = args.fleet.steady(Some(args.duration), &args.seed);
            (Scenario::rebind(steady, args.every), args.common)
        }
        Command::Lossy(args) => {
            let weather = Weather {
                loss: args.loss,
                duplication: args.duplication,
                delay: args.delay,
                jitter: args.jitter,
                ..Weather::FAIR
            };
            let steady = args.fleet.steady(Some(args.duration), &args.seed);
            (Scenario::lossy(steady, weather), args.common)
        }
        Command::Replay(args) => {
            let mut replay = Replay::open(&args.file, args.speed_up.0, args.passes)?;
            if !args.original_times {
                replay.end_at(system_now_ms());
            }
            (Scenario::replay(replay), args.common)
        }
        Command::Mix(args) => {
            let groups = mix::open(&args.file, args.seed.number())?;
            (Scenario::mix(groups), args.common)
        }
    })
}

async fn target(common: &CommonArgs) -> anyhow::Result<Option<Target>> {
    let (Some(addr), Some(pki)) = (&common.addr, &common.pki) else {
        return Ok(None);
    };
    Ok(Some(Target {
        devices: resolve(addr).await?,
        freshness: resolve_if_given(common.freshness.as_deref()).await?,
        admin: resolve_if_given(common.admin.as_deref()).await?,
        pki: pki.clone(),
        data: common.data.clone(),
    }))
}

async fn resolve_if_given(host_port: Option<&str>) -> anyhow::Result<Option<SocketAddr>> {
    match host_port {
        Some(host_port) => resolve(host_port).await.map(Some),
        None => Ok(None),
    }
}

async fn resolve(host_port: &str) -> anyhow::Result<SocketAddr> {
    let found = tokio::net::lookup_host(host_port).await;
    let mut found =
        found.with_context(|| format!("{host_port:?} is not an address like localhost:4433"))?;
    // The gateway listens on IPv4 loopback unless told otherwise; localhost may name IPv6 first.
    let first = found
        .next()
        .with_context(|| format!("{host_port:?} has no address"))?;
    Ok(found
        .chain([first])
        .find(SocketAddr::is_ipv4)
        .unwrap_or(first))
}

/// The first Ctrl-C ends the sending, and the run is checked; the second ends the process.
fn stop_on_ctrl_c() -> CancellationToken {
    let stop = CancellationToken::new();
    let stop_of_task = stop.clone();
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if stop_of_task.is_cancelled() {
                std::process::exit(EXIT_INTERRUPTED);
            }
            stop_of_task.cancel();
        }
    });
    stop
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the report is what the command is for"
)]
fn publish(report: &Report, common: &CommonArgs) -> anyhow::Result<()> {
    if let Some(path) = &common.html {
        std::fs::write(path, page::render(report))
            .with_context(|| format!("cannot write the report to {}", path.display()))?;
    }
    let json = common.json.as_deref();
    let to_stdout = json == Some(Path::new("-"));
    match json {
        Some(_) if to_stdout => {
            eprint!("\n{report}");
            serde_json::to_writer(std::io::stdout().lock(), report)?;
            println!();
        }
        Some(path) => {
            print!("\n{report}");
            let mut text = serde_json::to_vec_pretty(report)?;
            text.push(b'\n');
            std::fs::write(path, text)
                .with_context(|| format!("cannot write the report to {}", path.display()))?;
        }
        None => print!("\n{report}"),
    }
    std::io::stdout().flush()?;
    Ok(())
}

#[expect(clippy::print_stderr, reason = "the end of a command line program")]
fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("loadtest: {error:#}");
    ExitCode::from(code)
}

fn parse_speed_up(text: &str) -> anyhow::Result<SpeedUp> {
    if text == "max" {
        return Ok(SpeedUp(None));
    }
    match text.parse() {
        Ok(0.0) => Ok(SpeedUp(None)),
        Ok(factor) if f64::is_finite(factor) && 0.0 < factor => Ok(SpeedUp(Some(factor))),
        _ => bail!("write a number such as 1440, or `max`"),
    }
}

fn parse_rate(text: &str) -> anyhow::Result<f64> {
    match text.parse() {
        Ok(rate) if f64::is_finite(rate) && 0.0 < rate => Ok(rate),
        _ => bail!("write a number above 0"),
    }
}

fn parse_share(text: &str) -> anyhow::Result<f64> {
    match text.parse() {
        Ok(share) if (0.0..1.0).contains(&share) => Ok(share),
        _ => bail!("write a share such as 0.02, from 0 to below 1"),
    }
}

fn parse_interval(text: &str) -> anyhow::Result<Duration> {
    let duration = humantime::parse_duration(text).context("write a time such as 90s or 5m")?;
    ensure!(!duration.is_zero(), "write a time above zero");
    Ok(duration)
}

fn parse_restart(text: &str) -> anyhow::Result<Restart> {
    match text {
        "stop" => Ok(Restart::Stop),
        "kill" => Ok(Restart::Kill),
        _ => bail!("write `stop` or `kill`"),
    }
}

fn parse_sockets(text: &str) -> anyhow::Result<NonZeroUsize> {
    match text.parse::<NonZeroUsize>() {
        Ok(sockets) if sockets.get() <= MOST_SOCKETS => Ok(sockets),
        _ => bail!("write a number from 1 to {MOST_SOCKETS}"),
    }
}

fn parse_length(text: &str) -> anyhow::Result<Length> {
    if text == "forever" {
        return Ok(Length(None));
    }
    let duration =
        humantime::parse_duration(text).context("write a time such as 90s, or `forever`")?;
    Ok(Length(Some(duration)))
}

/// More only wait for the same processors, but a gateway that is stormed must feel it.
const RUSH_WINDOW: u64 = 1_024;
/// Each costs some megabytes of buffers.
const MOST_SOCKETS: usize = 250;
const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;
/// As shells report a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_gateway_needs_its_authority_and_its_parts_need_the_gateway() {
        for (line, is_right) in [
            ("loadtest steady", true),
            ("loadtest steady --addr localhost:4433", false),
            (
                "loadtest steady --addr localhost:4433 --pki pki --freshness localhost:4434",
                true,
            ),
            ("loadtest steady --freshness localhost:4434", false),
            ("loadtest steady --duration forever --rate 0.5", true),
            ("loadtest steady --rate 0", false),
            ("loadtest replay day.csv.gz --speed-up max --passes 2", true),
            ("loadtest replay day.csv.gz --passes 0", false),
            ("loadtest ramp --devices 10 --connect-rate 5", true),
            ("loadtest storm --restart", true),
            ("loadtest storm --restart kill", true),
            ("loadtest storm --restart softly", false),
            (
                "loadtest storm --restart --addr localhost:4433 --pki pki",
                false,
            ),
            ("loadtest freshness", true),
            ("loadtest freshness --checkers 0", false),
            ("loadtest freshness --slow-readers 0 --most-p99 1s", true),
            ("loadtest wake --every 0s", false),
            ("loadtest wake --full-handshakes", true),
            ("loadtest backlog --held 720", true),
            ("loadtest backlog --held 100000", false),
            ("loadtest duplicates --passes 1", false),
            ("loadtest lossy --loss 1", false),
            ("loadtest rebind --sockets 251", false),
            ("loadtest mix fleet.toml --seed 4", true),
            ("loadtest mix", false),
            ("loadtest replay", false),
        ] {
            assert_eq!(
                Cli::try_parse_from(line.split(' ')).is_ok(),
                is_right,
                "{line}"
            );
        }
    }

    fn prepared(line: &str) -> anyhow::Result<Scenario> {
        let Task::Scenario(command) = Cli::try_parse_from(line.split(' ')).unwrap().task else {
            panic!("{line} is no scenario");
        };
        prepare(*command).map(|(scenario, _)| scenario)
    }

    #[test]
    fn a_run_that_could_not_show_anything_is_refused() {
        assert!(prepared("loadtest ramp --devices 100 --connect-rate 10 --duration 9s").is_err());
        assert!(prepared("loadtest ramp --devices 100 --connect-rate 10 --duration 11s").is_ok());
        assert!(prepared("loadtest freshness --users 10 --devices 11").is_err());
        assert!(prepared("loadtest freshness --checkers 2 --slow-readers 2").is_err());
        assert!(prepared("loadtest freshness --users 10 --devices 10 --checkers 2").is_ok());
        assert!(prepared("loadtest rebind --duration 5s --every 5s").is_err());
        assert!(prepared("loadtest rebind --duration 5s --every 1s").is_ok());
    }

    #[test]
    fn no_speed_up_is_as_fast_as_possible() {
        assert_eq!(parse_speed_up("max").unwrap().0, None);
        assert_eq!(parse_speed_up("0").unwrap().0, None);
        assert_eq!(parse_speed_up("1.5").unwrap().0, Some(1.5));
        assert!(parse_speed_up("-1").is_err() && parse_speed_up("NaN").is_err());
    }
}
