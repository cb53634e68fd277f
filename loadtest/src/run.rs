//! A run from start to verdict: the stations of a load test in their order.
//!
//! Knows the order. Must not know how any station does its work.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use waypost_gateway::{clock::system_now_ms, store::Store};
use waypost_proto::id::UserId;

use crate::{
    checker::{Checker, Watch},
    course::{Played, Stage},
    findings::Findings,
    fleet::{CrewConfig, CrewThreads, Fleet, FleetConfig, Pace},
    group::Presence,
    ledger::DeviceLedger,
    local_gateway::LocalGateway,
    progress::Progress,
    recorder::{Recorder, Watched},
    relay::{Relay, Weather},
    report::Report,
    scenario::{Course, STORMING, Scenario},
    scrape::UseWatch,
    verdict::{self, Outcome},
    verify::{self, Expected, FreshnessFindings, StoreFindings},
};

/// A gateway, and what of it can be reached.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where devices connect.
    pub devices: SocketAddr,
    /// Where checkers connect; without it, freshness is not checked.
    pub freshness: Option<SocketAddr>,
    /// Where it shows its metrics; without it, what it uses is unknown.
    pub admin: Option<SocketAddr>,
    /// The folder of its development authority.
    pub pki: PathBuf,
    /// Its data folder; without it, the store is not checked.
    pub data: Option<PathBuf>,
}

/// How the fleet reaches its gateway.
#[derive(Clone, Copy, Debug)]
pub struct RunSettings {
    /// How many UDP sockets carry the connections of each group.
    pub sockets: NonZeroUsize,
    /// How fast devices connect.
    pub pace: Pace,
    /// How often a silent device says that it is still there; `None` for never.
    pub keep_alive: Option<Duration>,
}

/// Runs a load test against a gateway that runs already, and checks what it promised. When `stop` is
/// cancelled, nothing more is sent, and what was sent is checked.
///
/// # Errors
/// When the run could not be made. A broken promise is not an error but a failed check of the report.
pub async fn against(
    target: &Target,
    scenario: Scenario,
    settings: &RunSettings,
    progress: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<Report> {
    let mut outcome = load(target, scenario, settings, None, progress, stop).await?;
    outcome.store = check_store(target, &mut outcome.ledgers, progress).await?;
    Ok(verdict::report(&outcome))
}

/// Runs a load test like [`against`], on a gateway of its own that is stopped before its store is read.
///
/// # Errors
/// When the gateway could not be started, or the run could not be made.
pub async fn on_own_gateway(
    scenario: Scenario,
    settings: &RunSettings,
    progress: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<Report> {
    let mut gateway = LocalGateway::start().await?;
    let target = gateway.target();
    progress.say(format_args!(
        "  gateway    started for this run; devices on udp {}",
        target.devices
    ));
    let own = Some(&mut gateway);
    let loaded = load(&target, scenario, settings, own, progress, stop).await;
    progress.begin("stopping", None);
    let stopped = gateway.stop().await;
    let mut outcome = match (loaded, &stopped) {
        // What ended the gateway is then likely what ended the run.
        (Err(error), Err(gateway_end)) => return Err(error.context(format!("{gateway_end:#}"))),
        (loaded, _) => loaded?,
    };
    outcome.store = check_store(&target, &mut outcome.ledgers, progress).await?;
    outcome.gateway_end = Some(stopped.err().map(|error| format!("{error:#}")));
    Ok(verdict::report(&outcome))
}

async fn load(
    target: &Target,
    scenario: Scenario,
    settings: &RunSettings,
    gateway: Option<&mut LocalGateway>,
    progress: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<Outcome> {
    let scenario = Arc::new(scenario);
    let devices = scenario.devices();
    let users: Vec<UserId> = devices.iter().map(|device| device.user).collect();
    let mut checker = match target.freshness {
        Some(freshness) => Some(Checker::connect(freshness, &target.pki).await?),
        None => None,
    };
    let before = match &mut checker {
        Some(checker) => checker.get(&users).await?.entries,
        None => Vec::new(),
    };
    let usage = target.admin.map(UseWatch::start);

    let weather = match scenario.course {
        Course::Lossy(weather) => Some(weather),
        Course::Wake { round_trip, .. } if !round_trip.is_zero() => Some(Weather {
            delay: round_trip / 2,
            ..Weather::FAIR
        }),
        _ => None,
    };
    let relay = match weather {
        Some(weather) => {
            let relay = Relay::start(target.devices, scenario.seed().unwrap_or_default())?;
            relay.set_weather(weather);
            Some(relay)
        }
        None => None,
    };
    let near = Target {
        devices: relay.as_ref().map_or(target.devices, Relay::address),
        ..target.clone()
    };
    let is_storm = matches!(scenario.course, Course::Storm(_));
    let is_about_checkers = matches!(scenario.course, Course::Freshness(_));
    let group_sizes = scenario.group_sizes();
    let mut config = FleetConfig {
        keep_each: match scenario.is_endless() {
            true => 0,
            false => MOST_KEPT_PINGS / devices.len().max(1),
        },
        sockets: settings.sockets,
        keep_alive: settings.keep_alive,
        crews: group_sizes
            .iter()
            .zip(scenario.presences())
            .map(|((_, devices), presence)| CrewConfig {
                devices: *devices,
                resumes: presence == Presence::Wakes && scenario.resumes(),
                threads: CrewThreads::Shared,
            })
            .collect(),
    };
    if is_storm && let [established, storming] = &mut config.crews[..] {
        established.threads = CrewThreads::Apart;
        storming.threads = CrewThreads::GivingWay;
    }
    if is_about_checkers {
        // What is measured is how long checkers wait.
        let all = config.crews.iter_mut();
        all.for_each(|crew| crew.threads = CrewThreads::GivingWay);
    }
    let fleet = Arc::new(Fleet::enrol(&devices, &near, &config, progress).await?);
    // Where many watch, one more would only be in their way.
    let watch = checker
        .as_ref()
        .filter(|_| !is_about_checkers)
        .map(Checker::watch)
        .transpose()?;
    let mut recorder = Recorder::default();
    let mut stage = Stage {
        scenario: &scenario,
        fleet: &fleet,
        checker: checker.as_mut(),
        target: &near,
        watched: Watched {
            fleet: &fleet,
            stream: watch.as_ref(),
            usage: usage.as_ref(),
            measured: if is_storm {
                0..STORMING
            } else {
                0..group_sizes.len()
            },
        },
        recorder: &mut recorder,
        gateway,
        progress,
        stop,
        pace: settings.pace,
        start_ms: system_now_ms(),
    };
    let Played {
        took_us,
        connects_per_s,
        findings,
        freshness_latencies,
    } = stage.play().await?;

    progress.begin("checking", None);
    let expected = fleet.expected();
    let freshness = match &mut checker {
        Some(checker) => Some(verify::check_freshness(
            &expected,
            &before,
            &checker.get(&users).await?,
        )),
        None => None,
    };
    let stream = match &watch {
        Some(watch) => Some(check_stream(watch, &expected).await),
        None => None,
    };
    let gateway = usage.as_ref().map(UseWatch::most).unwrap_or_default();
    let (ack_latencies, breaks) = (fleet.ack_latencies(), fleet.breaks());
    let fleet = Arc::into_inner(fleet).context("a sender still holds the fleet")?;
    let ledgers = fleet.close().await;
    progress.end();
    Ok(Outcome {
        scenario: scenario.name,
        title: scenario.title.clone(),
        marks: recorder.marks().to_vec(),
        timeline: recorder.into_moments(),
        seed: scenario.seed(),
        passes: scenario.passes,
        seconds: Duration::from_micros(took_us).as_secs_f64(),
        connects_per_s,
        findings: findings.or_else(|| relay.map(|relay| Findings::Lossy(relay.counts().into()))),
        ack_latencies,
        freshness_latencies: freshness_latencies.or_else(|| watch.map(|watch| watch.latencies())),
        gateway,
        breaks,
        ledgers,
        freshness,
        stream,
        store: None,
        gateway_end: None,
    })
}

/// The stream must have told of each user what is known now, in the promised order.
async fn check_stream(watch: &Watch, expected: &[Expected]) -> FreshnessFindings {
    let last_position = expected
        .iter()
        .map(|expected| expected.newest.position)
        .max()
        .unwrap_or(0);
    let is_level = watch.reaches(last_position).await;
    verify::check_stream(
        expected,
        |user| watch.seen(user),
        is_level.then_some(last_position),
        watch.faults(),
    )
}

async fn check_store(
    target: &Target,
    ledgers: &mut Vec<DeviceLedger>,
    progress: &Progress,
) -> anyhow::Result<Option<StoreFindings>> {
    let Some(data) = target.data.clone() else {
        return Ok(None);
    };
    if ledgers
        .iter()
        .flat_map(|ledger| &ledger.epochs)
        .all(|epoch| epoch.sent.is_empty())
    {
        return Ok(None);
    }
    progress.begin("reading", None);
    let mut taken = std::mem::take(ledgers);
    let (findings, taken) = tokio::task::spawn_blocking(move || {
        let store = Store::open_read_only(&data)
            .with_context(|| format!("cannot read the store in {}", data.display()))?;
        anyhow::Ok((verify::check_store(&store, &mut taken)?, taken))
    })
    .await
    .context("the check of the store has failed")??;
    *ledgers = taken;
    progress.end();
    Ok(Some(findings))
}

/// How many pings are remembered for the check of the store: about a gigabyte.
const MOST_KEPT_PINGS: usize = 24_000_000;
