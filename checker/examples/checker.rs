//! A checker that alerts: it runs a command or calls a webhook once when somebody has not been heard for too
//! long, and once more when they are.
//!
//!     cargo run -p waypost-checker --example checker -- \
//!         --ca waypost-data/pki/ca.pem --cert waypost-data/pki/checker-dev.pem \
//!         --key waypost-data/pki/checker-dev.key \
//!         --silent-after 10m --command 'notify-send "$WAYPOST_KIND" "$WAYPOST_USER"'
//!
//! It is written to be read. What is worth knowing:
//!
//! - **An alert is worked out once.** Where the stream was worked through, who is called silent and which
//!   alerts are still to be delivered are one file, replaced in one step: so nothing is forgotten and nothing
//!   worked out twice, whenever this process ends.
//! - **It is delivered at least once**, because between delivering and writing that down a process can end.
//!   Each alert has an id, the same each time, by which a receiver knows it again.
//! - **"Unknown" is an alert too.** A checker that says nothing because it knows nothing is the worst kind.
//!   This one is said again after a restart if it is still so.
#![allow(clippy::print_stderr, reason = "a program for a terminal")]

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};
use waypost_checker::{
    Change, Config, Deadline, Event, Gap, Resume, Selector, Silences, UserId, Watch, coverage,
    deadline,
};

/// Alerts when somebody has not been heard for too long.
#[derive(Parser)]
struct Args {
    /// The freshness service.
    #[arg(long, default_value = "https://127.0.0.1:4434")]
    addr: String,
    /// A name in the gateway's certificate.
    #[arg(long, default_value = "localhost")]
    server_name: String,
    /// The authority of the gateway's certificate, PEM.
    #[arg(long)]
    ca: PathBuf,
    /// The checker's certificate, PEM.
    #[arg(long)]
    cert: PathBuf,
    /// The checker's private key, PEM.
    #[arg(long)]
    key: PathBuf,
    /// How long nobody hears from a user before it is an alert.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    silent_after: Duration,
    /// How long it waits before it tries a receiver again that failed.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    retry_pause: Duration,
    /// Where it keeps what it must not forget.
    #[arg(long, default_value = "checker-state.json")]
    state: PathBuf,
    #[command(flatten)]
    receiver: Receiver,
}

/// Who is told. One of the two.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Receiver {
    /// A shell command, which finds the alert in WAYPOST_ID, WAYPOST_KIND, WAYPOST_USER and WAYPOST_AT_MS.
    #[arg(long)]
    command: Option<String>,
    /// Where the alert is posted, as JSON with id, kind, user and at_ms, and with the id as Idempotency-Key. Plain
    /// HTTP, so a relay on this machine is meant. It is delivered when the answer is a 2xx.
    #[arg(long)]
    webhook: Option<String>,
}

/// What a receiver gets.
#[derive(Clone, Serialize, Deserialize)]
struct Alert {
    /// The same alert has the same id, however often it is delivered.
    id: String,
    /// silent, heard, closed, late, recovered, unknown or known.
    kind: String,
    /// Empty when it is about the stream.
    user: String,
    /// The last sign of life; by a deadline, when the gateway said so; for an alert about the stream, the moment up
    /// to which all is known. 0 if nobody knows.
    at_ms: u64,
}

/// The file.
#[derive(Default, Serialize, Deserialize)]
struct State {
    resume: Vec<u8>,
    /// Each user, when last heard, and whether called silent. A checker of very many users keeps this in a
    /// database, and writes what changed and the resume in one transaction.
    users: Vec<(String, u64, bool)>,
    gaps: Vec<(u64, Option<u64>, i32, u64)>,
    /// Who is late by a deadline, with the position that said so.
    #[serde(default)]
    late: BTreeMap<String, u64>,
    /// Also a process that has not reached the gateway yet says since when it knows nothing, and so by another id
    /// each time.
    #[serde(default)]
    known_until_ms: u64,
    undelivered: VecDeque<Alert>,
}

/// The file is written before an alert leaves, and otherwise this often: what came after the last time
/// simply comes again.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);
/// A receiver that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let config = Config::new(
        &args.addr,
        read(&args.ca)?,
        read(&args.cert)?,
        read(&args.key)?,
        &args.server_name,
    );
    let mut silences = Silences::new(u64::try_from(args.silent_after.as_millis())?);
    let before = load(&args.state, &mut silences)?;
    let mut known_until_ms = before.known_until_ms;
    let mut late = before.late;
    // Who was late before a reset, and has not come again.
    let mut doubted = BTreeMap::new();
    let mut undelivered = before.undelivered;
    let mut watch = Watch::new(&config, Selector::default(), before.resume)?;
    let mut changes = Vec::new();
    let mut last_saved = Instant::now();
    let mut retry_after = Instant::now();
    loop {
        let event = watch.next().await?;
        silences.take(&event, &mut changes);
        undelivered.extend(changes.drain(..).map(alert_of));
        known_until_ms = known_until_ms.max(silences.resolved_ms());
        if let Event::SnapshotEnd { .. } = event {
            let gone = std::mem::take(&mut doubted).into_iter();
            undelivered.extend(gone.map(not_late_any_more));
        }
        match &event {
            // Only here may be gone on from. An entry in between says nothing of those before it.
            Event::SnapshotEnd { resume, .. } | Event::Progress { resume, .. } => {
                let is_due = SAVE_INTERVAL <= last_saved.elapsed();
                let has_alert = !undelivered.is_empty() && retry_after <= Instant::now();
                if is_due || has_alert {
                    let state = State::of(resume, known_until_ms, &silences, &late, &undelivered);
                    save(&args.state, &state)?;
                    last_saved = Instant::now();
                }
                if has_alert {
                    if let Err(error) = deliver_all(&args.receiver, &mut undelivered).await {
                        let pause = args.retry_pause;
                        eprintln!("not delivered, tried again in {pause:?}: {error:#}");
                        retry_after = Instant::now() + pause;
                    }
                    let state = State::of(resume, known_until_ms, &silences, &late, &undelivered);
                    save(&args.state, &state)?;
                }
            }
            // A deadline that was registered with the gateway, which works it out by itself.
            Event::Deadline(event) => {
                let (user, position) = (event.user.to_string(), event.position);
                let is_late = event.kind == deadline::Kind::Late;
                let is_told = doubted.remove(&user) == Some(position);
                if is_late {
                    late.insert(user, position);
                } else {
                    late.remove(&user);
                }
                if !is_told {
                    undelivered.push_back(by_deadline(event));
                }
            }
            // The snapshot says again who is late; of those who are not, nothing more comes.
            Event::Reset { .. } => doubted.append(&mut late),
            // These are about now, so they neither wait nor are kept for later.
            Event::Stale { .. } => tell(&args.receiver, "unknown", known_until_ms).await,
            Event::Live { resolved_ms } => tell(&args.receiver, "known", *resolved_ms).await,
            Event::Disconnected { why, retry_in } => {
                eprintln!("disconnected: {why}; trying again in {retry_in:?}");
            }
            Event::Connected { .. }
            | Event::Entry { .. }
            | Event::Coverage(_)
            // Who has paused is not silent: the user's entry says so, and closes what was called silent.
            | Event::Transition(_) => {}
        }
    }
}

fn alert_of(change: Change) -> Alert {
    let (kind, user, at_ms) = match change {
        Change::Silent {
            user,
            last_contact_ms,
            ..
        } => ("silent", user, last_contact_ms),
        Change::HeardAgain {
            user,
            last_contact_ms,
        } => ("heard", user, last_contact_ms),
        // Paused, erased or withdrawn: whoever was sent to look may come back.
        Change::Closed {
            user,
            last_contact_ms,
            ..
        } => ("closed", user, last_contact_ms),
    };
    Alert {
        // A silence is known by the last contact before it, however often it is worked out.
        id: format!("{kind}-{user}-{at_ms}"),
        kind: kind.to_owned(),
        user: user.to_string(),
        at_ms,
    }
}

fn by_deadline(event: &Deadline) -> Alert {
    let kind = match event.kind {
        deadline::Kind::Recovered => "recovered",
        _ => "late",
    };
    Alert {
        id: format!("deadline-{}-{}", event.user, event.position),
        kind: kind.to_owned(),
        user: event.user.to_string(),
        at_ms: event.at_ms,
    }
}

/// Somebody who was called late is not, and when that changed was not told.
fn not_late_any_more((user, position): (String, u64)) -> Alert {
    Alert {
        id: format!("not-late-{user}-{position}"),
        kind: "recovered".to_owned(),
        user,
        at_ms: 0,
    }
}

async fn tell(receiver: &Receiver, kind: &str, at_ms: u64) {
    let alert = Alert {
        id: format!("{kind}-{at_ms}"),
        kind: kind.to_owned(),
        user: String::new(),
        at_ms,
    };
    if let Err(error) = deliver(receiver, &alert).await {
        eprintln!("not delivered: {kind}: {error:#}");
    }
}

/// In their order, up to the first that fails.
async fn deliver_all(receiver: &Receiver, alerts: &mut VecDeque<Alert>) -> anyhow::Result<()> {
    while let Some(alert) = alerts.front() {
        deliver(receiver, alert).await?;
        alerts.pop_front();
    }
    Ok(())
}

async fn deliver(receiver: &Receiver, alert: &Alert) -> anyhow::Result<()> {
    if let Some(command) = &receiver.command {
        let mut running = tokio::process::Command::new("sh")
            .args(["-c", command])
            .env("WAYPOST_ID", &alert.id)
            .env("WAYPOST_KIND", &alert.kind)
            .env("WAYPOST_USER", &alert.user)
            .env("WAYPOST_AT_MS", alert.at_ms.to_string())
            .kill_on_drop(true)
            .spawn()?;
        let ended = tokio::time::timeout(PATIENCE, running.wait());
        let status = ended.await.context("the command takes too long")??;
        ensure!(status.success(), "the command ended with {status}");
    }
    if let Some(url) = receiver.webhook.clone() {
        let (id, body) = (alert.id.clone(), serde_json::to_vec(alert)?);
        let posting = move || {
            ureq::post(&url)
                .config()
                .timeout_global(Some(PATIENCE))
                // The relay is on this machine, whatever proxy leads out of it, and has to take it itself.
                .proxy(None)
                .max_redirects(0)
                .build()
                .header("Content-Type", "application/json")
                .header("Idempotency-Key", &id)
                .send(&body[..])
        };
        // The small client waits; the stream need not.
        let status = tokio::task::spawn_blocking(posting).await??.status();
        ensure!(status.is_success(), "the webhook answered {status}");
    }
    Ok(())
}

/// What the process before this one knew, beside whom it had heard.
#[derive(Default)]
struct Before {
    resume: Option<Resume>,
    known_until_ms: u64,
    late: BTreeMap<String, u64>,
    undelivered: VecDeque<Alert>,
}

/// Reads the file; nothing was known if there is none.
fn load(path: &Path, silences: &mut Silences) -> anyhow::Result<Before> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Before::default());
        }
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let unreadable = || format!("{} is no state of a checker", path.display());
    let state: State = serde_json::from_slice(&bytes).with_context(unreadable)?;
    for (user, last_contact_ms, is_called_silent) in state.users {
        let user = UserId::parse(&user).with_context(unreadable)?;
        silences.remember(user, last_contact_ms, is_called_silent);
    }
    for (from_ms, until_ms, reason, position) in state.gaps {
        let gap = Gap {
            from_ms,
            until_ms,
            reason: coverage::Reason::try_from(reason).unwrap_or_default(),
            position,
        };
        silences.take(&Event::Coverage(gap), &mut Vec::new());
    }
    Ok(Before {
        resume: Some(Resume::from_bytes(&state.resume)?),
        known_until_ms: state.known_until_ms,
        late: state.late,
        undelivered: state.undelivered,
    })
}

impl State {
    fn of(
        resume: &Resume,
        known_until_ms: u64,
        silences: &Silences,
        late: &BTreeMap<String, u64>,
        undelivered: &VecDeque<Alert>,
    ) -> Self {
        let users = silences.known();
        let gaps = silences.gaps();
        Self {
            resume: resume.to_bytes(),
            users: users
                .map(|(user, last_contact_ms, is_called)| {
                    (user.to_string(), last_contact_ms, is_called)
                })
                .collect(),
            gaps: gaps
                .map(|gap| (gap.from_ms, gap.until_ms, gap.reason.into(), gap.position))
                .collect(),
            late: late.clone(),
            known_until_ms,
            undelivered: undelivered.clone(),
        }
    }
}

/// Replaces the file in one step, and is not content before the disk has it.
fn save(path: &Path, state: &State) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    let write = || {
        let mut file = fs::File::create(&beside)?;
        file.write_all(&serde_json::to_vec(state)?)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        fs::File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
