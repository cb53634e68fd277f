//! A run from start to verdict: the stations of a load test in their order.
//!
//! Knows the order and the pace. Must not know how any station does its work.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, thread, time::Duration};

use anyhow::Context;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use waypost_gateway::{clock::system_now_ms, store::Store};
use waypost_proto::id::UserId;

use crate::{
    checker::{Checker, Watch},
    fleet::Fleet,
    ledger::DeviceLedger,
    local_gateway::LocalGateway,
    progress::Progress,
    report::{Count, Ms, Report},
    scenario::Scenario,
    scrape::UseWatch,
    timeline::{Moment, Timeline},
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

/// Runs a load test against a gateway that runs already, and checks what it promised. When `stop` is
/// cancelled, nothing more is sent, and what was sent is checked.
///
/// # Errors
/// When the run could not be made. A broken promise is not an error but a failed check of the report.
pub async fn against(
    target: &Target,
    scenario: Scenario,
    progress: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<Report> {
    let mut outcome = load(target, scenario, progress, stop).await?;
    outcome.store = check_store(target, &mut outcome.ledgers, progress).await?;
    Ok(verdict::report(&outcome))
}

/// Runs a load test like [`against`], on a gateway of its own that is stopped before its store is read.
///
/// # Errors
/// When the gateway could not be started, or the run could not be made.
pub async fn on_own_gateway(
    scenario: Scenario,
    progress: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<Report> {
    let gateway = LocalGateway::start().await?;
    let target = gateway.target();
    progress.say(format_args!(
        "  gateway    started for this run; devices on udp {}",
        target.devices
    ));
    let loaded = load(&target, scenario, progress, stop).await;
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

    let keep_each = scenario
        .pings_per_pass()
        .map_or(0, |_| MOST_KEPT_PINGS / devices.len().max(1));
    let fleet = Arc::new(Fleet::enrol(&devices, target, keep_each, progress).await?);
    fleet.connect(progress, stop).await?;
    let watch = checker.as_ref().map(Checker::watch);
    let mut recorder = Recorder::default();
    let mut took_us = 0;
    for pass in 1..=scenario.passes() {
        if 1 < pass && !stop.is_cancelled() {
            fleet.reconnect(progress, stop).await?;
        }
        let begun_us = fleet.now_us();
        let watched = Watched {
            fleet: &fleet,
            stream: watch.as_ref(),
            usage: usage.as_ref(),
        };
        let sender = tokio::task::spawn_blocking({
            let (fleet, scenario, stop) = (fleet.clone(), scenario.clone(), stop.clone());
            move || hand_out(&fleet, &scenario, pass, &stop)
        });
        progress.begin(
            if pass == 1 { "sending" } else { "again" },
            scenario.pings_per_pass(),
        );
        follow(sender, &watched, &mut recorder, progress).await?;
        took_us += fleet
            .last_acked_us()
            .map_or(0, |last_us| last_us.saturating_sub(begun_us));
    }

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
        scenario: scenario.name(),
        title: scenario.title(),
        timeline: recorder.timeline.into_moments(),
        seed: scenario.seed(),
        passes: scenario.passes(),
        seconds: Duration::from_micros(took_us).as_secs_f64(),
        ack_latencies,
        freshness_latencies: watch.map(|watch| watch.latencies()),
        gateway,
        breaks,
        ledgers,
        freshness,
        stream,
        store: None,
        gateway_end: None,
    })
}

/// Waits until a pass is sent and settled, or until nothing moves any more.
async fn follow(
    mut sender: tokio::task::JoinHandle<()>,
    watched: &Watched<'_>,
    recorder: &mut Recorder,
    progress: &Progress,
) -> anyhow::Result<()> {
    let fleet = watched.fleet;
    let acked_before = fleet.acked();
    let mut ticks = interval(LIVE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_sent = false;
    let mut moved = (fleet.acked(), Instant::now());
    loop {
        tokio::select! {
            sent = &mut sender, if !is_sent => {
                sent.context("the sender has failed")?;
                is_sent = true;
                moved.1 = Instant::now();
            }
            _ = ticks.tick() => {}
        }
        let acked = fleet.acked();
        if acked != moved.0 {
            moved = (acked, Instant::now());
        }
        if is_sent && (fleet.open() == 0 || SETTLE_PATIENCE <= moved.1.elapsed()) {
            return Ok(());
        }
        recorder.look(watched);
        progress.at(acked - acked_before, || recorder.line(watched));
    }
}

/// Hands each ping to its device when it is due. On a thread of its own, because tokio's timers wake only
/// once a millisecond, which would be seen in every latency.
fn hand_out(fleet: &Fleet, scenario: &Scenario, pass: u32, stop: &CancellationToken) {
    let begun_us = fleet.now_us();
    for due_ping in scenario.pings(system_now_ms()) {
        let due_us = if scenario.is_paced() {
            let due_us = begun_us + u64::try_from(due_ping.due.as_micros()).unwrap_or(u64::MAX / 2);
            while fleet.now_us() < due_us && !stop.is_cancelled() {
                thread::sleep(
                    Duration::from_micros(due_us - fleet.now_us().min(due_us)).min(STOP_LATENCY),
                );
            }
            due_us
        } else {
            while MOST_OPEN_PINGS <= fleet.open() && !stop.is_cancelled() {
                thread::sleep(ROOM_INTERVAL);
            }
            fleet.now_us()
        };
        if stop.is_cancelled() {
            return;
        }
        if pass == 1 {
            fleet.send(due_ping.device, due_ping.ping, due_us);
        } else {
            fleet.send_again(due_ping.device, due_ping.ping, due_us);
        }
    }
}

/// What can be watched while a run goes on.
struct Watched<'a> {
    fleet: &'a Fleet,
    stream: Option<&'a Watch>,
    usage: Option<&'a UseWatch>,
}

/// Makes a moment of about every second, for the charts and for the live line.
#[derive(Default)]
struct Recorder {
    timeline: Timeline,
    last: Option<Seen>,
    /// The gateway's processor time when it last moved; it is scraped at other moments than these.
    cpu: Option<(Instant, f64)>,
    cpus: Option<f64>,
    line: String,
}

/// What the next moment is reckoned from.
struct Seen {
    at: Instant,
    acked: u64,
}

impl Recorder {
    /// Looks, unless less than a second has passed since it last did.
    fn look(&mut self, watched: &Watched<'_>) {
        let fleet = watched.fleet;
        let gateway = watched.usage.map(UseWatch::newest).unwrap_or_default();
        let seen = Seen {
            at: Instant::now(),
            acked: fleet.acked(),
        };
        self.look_at_cpu(seen.at, gateway.cpu_s);
        let Some(last) = &self.last else {
            self.last = Some(seen);
            return;
        };
        let elapsed_s = (seen.at - last.at).as_secs_f64();
        if elapsed_s < MOMENT_S {
            return;
        }
        let recent = fleet.take_recent_latencies();
        let quantile_ms = |quantile| (!recent.is_empty()).then(|| recent.quantile_ms(quantile));
        let moment = Moment {
            at_s: Duration::from_micros(fleet.now_us()).as_secs_f64(),
            pings_per_s: (seen.acked - last.acked) as f64 / elapsed_s,
            ack_p50_ms: quantile_ms(0.5),
            ack_p99_ms: quantile_ms(0.99),
            ack_max_ms: quantile_ms(1.0),
            open: fleet.open(),
            connected: fleet.connected(),
            freshness_lag_ms: watched.stream.map(Watch::lag_ms),
            gateway_rss_bytes: gateway.rss_bytes,
            gateway_cpus: self.cpus,
        };
        self.line = format!("{}/s", Count::of(moment.pings_per_s));
        if let Some((p50_ms, p99_ms)) = moment.ack_p50_ms.zip(moment.ack_p99_ms) {
            self.line += &format!("  ack p50 {} p99 {}", Ms(p50_ms), Ms(p99_ms));
        }
        self.timeline.push(moment);
        self.last = Some(seen);
    }

    fn look_at_cpu(&mut self, now: Instant, cpu_s: Option<f64>) {
        let Some(cpu_s) = cpu_s else { return };
        match self.cpu {
            Some((_, last_s)) if last_s == cpu_s => {}
            // A gateway that was restarted counts from zero.
            Some((at, last_s)) if last_s < cpu_s => {
                self.cpus = Some((cpu_s - last_s) / (now - at).as_secs_f64());
                self.cpu = Some((now, cpu_s));
            }
            _ => self.cpu = Some((now, cpu_s)),
        }
    }

    fn line(&self, watched: &Watched<'_>) -> String {
        let mut line = self.line.clone();
        if let Some(stream) = watched.stream {
            line += &format!("  freshness lag {} ms", Count(stream.lag_ms()));
        }
        line += &format!("  {} devices", Count(watched.fleet.connected()));
        match watched.fleet.open() {
            0 => line,
            open => line + &format!("  {} open", Count(open)),
        }
    }
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
/// How many pings wait for acknowledgement at a time when nothing is paced.
const MOST_OPEN_PINGS: u64 = 2_000;
/// A run is given up when nothing was acknowledged for this long: a gateway that was killed has time to
/// come back.
const SETTLE_PATIENCE: Duration = Duration::from_secs(60);
/// Between two moments of the timeline, at least.
const MOMENT_S: f64 = 1.0;
const LIVE_INTERVAL: Duration = Duration::from_millis(200);
const STOP_LATENCY: Duration = Duration::from_millis(100);
const ROOM_INTERVAL: Duration = Duration::from_micros(200);
