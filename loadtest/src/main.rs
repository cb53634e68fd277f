//! The `loadtest` command: flags to scenario, run, report.

use std::{
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use tokio_util::sync::CancellationToken;
use waypost_gateway::clock::system_now_ms;
use waypost_loadtest::{
    limits::LimitsCommand,
    page,
    progress::Progress,
    replay::Replay,
    report::Report,
    run::{self, Target},
    scenario::Scenario,
    steady::Steady,
};

/// Loads a Waypost gateway with simulated devices, then checks that it kept its promises: nothing lost,
/// nothing twice, freshness right for every user.
///
/// Without --addr it starts a gateway of its own in a temporary folder. Ends with 0 when every check
/// holds, 1 when one fails, 2 when the command line is wrong.
#[derive(Debug, Parser)]
#[command(name = "loadtest", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    #[command(flatten)]
    Scenario(Command),
    #[command(flatten)]
    Limits(LimitsCommand),
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sends a recorded day of AIS positions again: a vessel is a user with one device.
    Replay(ReplayArgs),
    /// Sends from a simulated fleet at a constant rate, with seeded random movement.
    Steady(SteadyArgs),
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
    /// How many devices, each of a user of its own
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    devices: u32,
    /// Pings a second, all devices together
    #[arg(long, value_name = "PINGS_PER_S", default_value = "1000", value_parser = parse_rate)]
    rate: f64,
    /// How long, such as 90s or 5m; `forever` goes on until Ctrl-C, and does not check the store, because
    /// it cannot remember all that it sent
    #[arg(long, default_value = "60s", value_parser = parse_length)]
    duration: Length,
    /// Repeats a run exactly, users included; random if not given
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// Load the gateway that listens for devices here, such as localhost:4433, instead of an own one
    #[arg(long, value_name = "HOST:PORT", requires = "pki")]
    addr: Option<String>,
    /// Its freshness service, to check what checkers are told, such as localhost:4434
    #[arg(long, value_name = "HOST:PORT", requires = "addr")]
    freshness: Option<String>,
    /// Its admin endpoint, to see what it uses, such as localhost:9464
    #[arg(long, value_name = "HOST:PORT", requires = "addr")]
    admin: Option<String>,
    /// Its development authority: the folder `pki` in the data folder of `waypost serve --dev`
    #[arg(long, value_name = "DIR", requires = "addr")]
    pki: Option<PathBuf>,
    /// Its data folder, to check what is stored; only read
    #[arg(long, value_name = "DIR", requires = "addr")]
    data: Option<PathBuf>,
    /// Write the report as one JSON object; `-` for standard output, the table then goes to standard error
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as one HTML page with charts, for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
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
    let (scenario, common) = match prepare(command) {
        Ok(prepared) => prepared,
        Err(error) => return fail(&error, EXIT_USAGE),
    };
    let target = match target(&common).await {
        Ok(target) => target,
        Err(error) => return fail(&error, EXIT_USAGE),
    };
    let progress = Progress::new();
    progress.say(format_args!("{}", scenario.title()));
    let stop = stop_on_ctrl_c();
    let outcome = match &target {
        Some(target) => run::against(target, scenario, &progress, &stop).await,
        None => run::on_own_gateway(scenario, &progress, &stop).await,
    };
    progress.end();
    match outcome.and_then(|report| publish(&report, &common).map(|()| report.passed())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_FAILED),
        Err(error) => fail(&error, EXIT_FAILED),
    }
}

fn prepare(command: Command) -> anyhow::Result<(Scenario, CommonArgs)> {
    match command {
        Command::Replay(ReplayArgs {
            file,
            speed_up,
            original_times,
            passes,
            common,
        }) => {
            let mut replay = Replay::open(&file, speed_up.0, passes)?;
            if !original_times {
                replay.end_at(system_now_ms());
            }
            Ok((Scenario::Replay(replay), common))
        }
        Command::Steady(SteadyArgs {
            devices,
            rate,
            duration,
            seed,
            common,
        }) => {
            let seed = seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
            let steady = Steady {
                devices,
                pings_per_s: rate,
                duration: duration.0,
                seed,
            };
            Ok((Scenario::Steady(steady), common))
        }
    }
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
        _ => bail!("write a number of pings a second above 0"),
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
            ("loadtest replay", false),
        ] {
            assert_eq!(
                Cli::try_parse_from(line.split(' ')).is_ok(),
                is_right,
                "{line}"
            );
        }
    }

    #[test]
    fn no_speed_up_is_as_fast_as_possible() {
        assert_eq!(parse_speed_up("max").unwrap().0, None);
        assert_eq!(parse_speed_up("0").unwrap().0, None);
        assert_eq!(parse_speed_up("1.5").unwrap().0, Some(1.5));
        assert!(parse_speed_up("-1").is_err() && parse_speed_up("NaN").is_err());
    }
}
