//! `waypost watch`: each user's last sign of life in the terminal, as it changes.
//!
//! Knows the options and where lines go; `view` knows what to say, and `waypost_checker` how to follow the
//! stream. It is a checker like any other and sees what they see: times and states.

mod view;

use std::{
    convert::Infallible,
    fs,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use humantime_serde::re::humantime::parse_duration;
use tokio::time::Instant;
use waypost_checker::{CheckerError, Config, Selector, UserId, Watch};

use self::view::{Report, View};
use crate::{clock::system_now_ms, console::parse_user};

/// Watch how fresh users are.
#[derive(Clone, Debug, clap::Args)]
pub struct WatchArgs {
    /// The freshness service.
    #[arg(long, value_name = "URL", default_value = "https://127.0.0.1:4434")]
    pub addr: String,
    /// The data folder of a gateway run with --dev, whose checker's certificate is used.
    #[arg(long, value_name = "DIR", default_value = "waypost-data")]
    pub data: PathBuf,
    /// The folder with ca.pem, checker-dev.pem and checker-dev.key [default: pki in the data folder].
    #[arg(long, value_name = "DIR")]
    pub pki: Option<PathBuf>,
    /// The authority of the gateway's certificate, PEM.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The checker's certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The checker's private key, PEM.
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// A name in the gateway's certificate.
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub server_name: String,
    /// Watch this user only; may be given more than once.
    #[arg(long = "user", value_name = "UUID", value_parser = parse_user)]
    pub users: Vec<UserId>,
    /// Call a user silent who has not been heard for this long.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub stale_after: Duration,
    /// Print one JSON object a line.
    #[arg(long)]
    pub json: bool,
}

/// Why there is nothing to watch.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// A certificate or key cannot be read.
    #[error(
        "cannot read {path}: {source}; start a gateway with --dev, or name the file with --{option}"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The address or the certificates cannot be used, or the service refuses.
    #[error(transparent)]
    Checker(#[from] CheckerError),
    /// Nobody reads the output any more.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

/// Watches until nobody reads the output, or the service refuses for good.
///
/// # Errors
/// When a file cannot be used, or coming back would not help.
pub async fn run(args: WatchArgs) -> Result<(), WatchError> {
    match follow(&args).await {
        // `waypost watch | head` has got what it wanted.
        Err(WatchError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(error),
        Ok(never) => match never {},
    }
}

/// How often progress is printed where it cannot be written over.
const PROGRESS_LINE_INTERVAL: Duration = Duration::from_secs(10);

async fn follow(args: &WatchArgs) -> Result<Infallible, WatchError> {
    let silent_after_ms = u64::try_from(args.stale_after.as_millis()).unwrap_or(u64::MAX);
    let selector = Selector {
        users: args.users.clone(),
        states: Vec::new(),
    };
    let mut watch = Watch::new(&config(args)?, selector, None)?;
    let mut view = View::new(silent_after_ms);
    let mut screen = Screen::new(args.json);
    let mut reports = Vec::new();
    loop {
        view.take(&watch.next().await?, &mut reports);
        for report in reports.drain(..) {
            screen.show(&report)?;
        }
    }
}

fn config(args: &WatchArgs) -> Result<Config, WatchError> {
    let pki = args.pki.clone().unwrap_or_else(|| args.data.join("pki"));
    let read = |given: &Option<PathBuf>, name: &str, option| {
        let path = given.clone().unwrap_or_else(|| pki.join(name));
        fs::read(&path).map_err(|source| WatchError::Unreadable {
            path,
            option,
            source,
        })
    };
    Ok(Config::new(
        &args.addr,
        read(&args.ca, "ca.pem", "ca")?,
        read(&args.cert, "checker-dev.pem", "cert")?,
        read(&args.key, "checker-dev.key", "key")?,
        &args.server_name,
    ))
}

/// Where reports go.
struct Screen {
    is_json: bool,
    is_terminal: bool,
    /// The last line is a status that the next one is written over.
    has_status: bool,
    progress_line_due: Instant,
}

impl Screen {
    fn new(is_json: bool) -> Self {
        let is_terminal = io::stdout().is_terminal();
        Self {
            is_json,
            is_terminal,
            has_status: false,
            progress_line_due: Instant::now(),
        }
    }

    fn show(&mut self, report: &Report) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.is_json {
            serde_json::to_writer(&mut out, report)?;
            writeln!(out)?;
            return out.flush();
        }
        let is_status = matches!(report, Report::Progress { .. });
        if is_status && !self.is_terminal {
            let now = Instant::now();
            if now < self.progress_line_due {
                return Ok(());
            }
            self.progress_line_due = now + PROGRESS_LINE_INTERVAL;
        }
        if self.has_status {
            write!(out, "\r\x1b[2K")?;
        }
        write!(out, "{}", report.text(system_now_ms()))?;
        self.has_status = is_status && self.is_terminal;
        if !self.has_status {
            writeln!(out)?;
        }
        out.flush()
    }
}
