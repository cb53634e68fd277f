//! `waypost watch`: each user's last sign of life in the terminal, as it changes.
//!
//! Knows connections, when to come back, and where lines go; `view` knows what to say. It is a checker
//! like any other and sees what they see: times and states.

mod view;

use std::{
    fs,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use humantime_serde::re::humantime::parse_duration;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status, transport::Channel};
use waypost_proto::{
    id::UserId,
    v1::{WatchRequest, watch_event::Kind},
};

use self::view::{Report, View};
use crate::{
    clock::system_now_ms,
    feed::{
        client::{ClientError, connect},
        rpc::freshness_client::FreshnessClient,
    },
};

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
    /// The address or the certificates cannot be used.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The service answers, and coming back would not change the answer.
    #[error("the freshness service refuses: {0}")]
    Refused(String),
    /// Nobody reads the output any more.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

/// Watches until nobody reads the output, or the service refuses for good.
///
/// # Errors
/// When a file cannot be used, or coming back would not help.
pub async fn run(args: WatchArgs) -> Result<(), WatchError> {
    let mut screen = Screen::new(args.json);
    match Watch::new(args)?.run(&mut screen).await {
        // `waypost watch | head` has got what it wanted.
        Err(WatchError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(error),
        Ok(never) => match never {},
    }
}

/// A stream without progress for so long is stale: what it says no more is unknown, not silent.
const STALE_AFTER: Duration = Duration::from_secs(3);

/// And after so long another one is tried.
const LOST_AFTER: Duration = Duration::from_secs(15);

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// How often progress is printed where it cannot be written over.
const PROGRESS_LINE_INTERVAL: Duration = Duration::from_secs(10);

struct Watch {
    args: WatchArgs,
    ca_pem: Vec<u8>,
    certificate_pem: Vec<u8>,
    private_key_pem: Vec<u8>,
    view: View,
}

/// Why a stream came to its end.
enum Ended {
    /// It may go better next time.
    Lost(String),
    /// It will not.
    Final(WatchError),
}

impl Watch {
    fn new(args: WatchArgs) -> Result<Self, WatchError> {
        let pki = args.pki.clone().unwrap_or_else(|| args.data.join("pki"));
        let read = |given: &Option<PathBuf>, name: &str, option| {
            let path = given.clone().unwrap_or_else(|| pki.join(name));
            fs::read(&path).map_err(|source| WatchError::Unreadable {
                path,
                option,
                source,
            })
        };
        let silent_after_ms = u64::try_from(args.stale_after.as_millis()).unwrap_or(u64::MAX);
        Ok(Self {
            ca_pem: read(&args.ca, "ca.pem", "ca")?,
            certificate_pem: read(&args.cert, "checker-dev.pem", "cert")?,
            private_key_pem: read(&args.key, "checker-dev.key", "key")?,
            view: View::new(silent_after_ms),
            args,
        })
    }

    async fn run(mut self, screen: &mut Screen) -> Result<std::convert::Infallible, WatchError> {
        let mut failures = 0;
        loop {
            let error = match self.stream(screen, &mut failures).await {
                Ended::Final(error) => return Err(error),
                Ended::Lost(error) => error,
            };
            let pause = back_off(failures, random_byte());
            failures = failures.saturating_add(1);
            let retry_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            screen.show(&Report::StreamLost { error, retry_in_ms })?;
            sleep(pause).await;
        }
    }

    /// One stream, from its connection to its end.
    async fn stream(&mut self, screen: &mut Screen, failures: &mut u32) -> Ended {
        match self.connect().await {
            Ok(client) => match self.follow(client, screen, failures).await {
                Ok(never) => match never {},
                Err(ended) => ended,
            },
            // Nobody is there yet, or not any more.
            Err(error @ ClientError::Connect { .. }) => Ended::Lost(with_causes(&error)),
            Err(error) => Ended::Final(error.into()),
        }
    }

    async fn connect(&self) -> Result<FreshnessClient<Channel>, ClientError> {
        let Self {
            args,
            ca_pem,
            certificate_pem,
            private_key_pem,
            ..
        } = self;
        connect(
            &args.addr,
            ca_pem,
            certificate_pem,
            private_key_pem,
            &args.server_name,
        )
        .await
    }

    async fn follow(
        &mut self,
        mut client: FreshnessClient<Channel>,
        screen: &mut Screen,
        failures: &mut u32,
    ) -> Result<std::convert::Infallible, Ended> {
        let user_ids = self
            .args
            .users
            .iter()
            .map(|user| Bytes::copy_from_slice(&user.0))
            .collect();
        let request = WatchRequest {
            token: self.view.token(),
            user_ids,
            states: Vec::new(),
        };
        let mut stream = client.watch(request).await?.into_inner();
        let mut last_sign = Instant::now();
        let mut is_stale = false;
        let mut reports = Vec::new();
        loop {
            let patience = if is_stale { LOST_AFTER } else { STALE_AFTER };
            let Ok(message) = timeout_at(last_sign + patience, stream.message()).await else {
                if is_stale {
                    return Err(Ended::Lost(format!("no progress for {LOST_AFTER:?}")));
                }
                is_stale = true;
                screen.show(&Report::StreamStale {
                    resolved_ms: self.view.resolved_ms(),
                })?;
                continue;
            };
            let message = message?.ok_or_else(|| Ended::Lost("the gateway ended it".to_owned()))?;
            for kind in message.events.into_iter().filter_map(|event| event.kind) {
                let is_sign = self.view.is_sign_of_life(&kind);
                let is_progress = matches!(kind, Kind::Progress(_));
                self.view.take(kind, &mut reports);
                if is_sign {
                    last_sign = Instant::now();
                    if is_stale {
                        is_stale = false;
                        reports.push(Report::StreamLive {
                            resolved_ms: self.view.resolved_ms(),
                        });
                    }
                }
                if is_progress {
                    *failures = 0;
                }
            }
            for report in reports.drain(..) {
                screen.show(&report)?;
            }
        }
    }
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::PermissionDenied | Code::InvalidArgument | Code::Unimplemented => {
                Self::Final(WatchError::Refused(status.message().to_owned()))
            }
            _ => Self::Lost(status.message().to_owned()),
        }
    }
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Final(error.into())
    }
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

/// The pause before the next try: twice as long after each failure, up to a limit, and between half and
/// all of that, so that many watchers do not come back in one moment.
fn back_off(failures: u32, random: u8) -> Duration {
    let whole = FIRST_RETRY
        .saturating_mul(1 << failures.min(16))
        .min(LAST_RETRY);
    whole / 2 + whole * u32::from(random) / 510
}

fn random_byte() -> u8 {
    let mut byte = [0];
    // Without random numbers all come back in the middle.
    SystemRandom::new()
        .fill(&mut byte)
        .map_or(128, |()| byte[0])
}

/// An error and what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

fn parse_user(text: &str) -> Result<UserId, &'static str> {
    UserId::parse(text)
        .ok_or("a user is a UUID in lower case, such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_differ() {
        assert_eq!(back_off(0, u8::MAX), FIRST_RETRY);
        assert_eq!(back_off(0, 0), FIRST_RETRY / 2);
        assert_eq!(back_off(2, u8::MAX), FIRST_RETRY * 4);
        for failures in [6, 40, u32::MAX] {
            assert_eq!(back_off(failures, u8::MAX), LAST_RETRY);
            assert_eq!(back_off(failures, 0), LAST_RETRY / 2);
        }
    }
}
