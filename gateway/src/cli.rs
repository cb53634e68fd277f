//! What `serve` and `check-config` do around the gateway: settings in, signals, exit code out.
//!
//! Knows the command line and the process. Must not know how the gateway works.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{self, Config},
    enrol::EnrolmentConfig,
    erase::command::{self as erase, EraseArgs},
    feed::FreshnessConfig,
    gateway::{Addresses, Gateway},
    invite::{self, InviteArgs},
    logging,
    metrics::Metrics,
    pki, tls,
    watch::{self, WatchArgs},
};

/// Where the settings come from.
#[derive(Args, Debug)]
pub struct SettingsArgs {
    /// The configuration file, TOML; without it, the defaults and the environment
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of the store; wins over the file and the environment
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

/// Arguments of `waypost serve`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  waypost serve --dev                        try it: makes its own certificates under ./waypost-data
  waypost serve --config /etc/waypost.toml   in earnest

SIGTERM or Ctrl-C stops it in order: what has arrived is stored and acknowledged. A second one stops it
at once.
Exit code: 0 stopped in order, 1 a part failed, 2 the configuration or the command line is wrong.")]
pub struct ServeArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Make a development authority and certificates under the data folder, or use those that are there
    #[arg(long)]
    dev: bool,
}

/// Arguments of `waypost check-config`.
#[derive(Args, Debug)]
#[command(after_help = "\
Prints what is in effect, from the defaults, the file and the environment, and ends with 0; or says what
is wrong and ends with 2. Nothing is bound or written.

Example:
  WAYPOST_LOG_LEVEL=debug waypost check-config --config /etc/waypost.toml")]
pub struct CheckConfigArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Print JSON instead of TOML
    #[arg(long)]
    json: bool,
}

/// Why a command failed, which decides the exit code.
#[derive(Debug)]
pub enum Failure {
    /// The operator has to change something: exit code 2, as for a wrong command line.
    Configuration(anyhow::Error),
    /// Something broke: exit code 1.
    Runtime(anyhow::Error),
}

impl Failure {
    /// The exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Runtime(_) => 1,
            Self::Configuration(_) => 2,
        }
    }

    /// What went wrong, with all its causes.
    #[must_use]
    pub fn error(&self) -> &anyhow::Error {
        match self {
            Self::Configuration(error) | Self::Runtime(error) => error,
        }
    }

    fn configuration(error: impl Into<anyhow::Error>) -> Self {
        Self::Configuration(error.into())
    }
}

/// An error of unknown kind is one of the running command.
impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Runtime(error.into())
    }
}

impl SettingsArgs {
    fn load(&self) -> Result<Config, Failure> {
        Config::load(
            self.config.as_deref(),
            config::environment(),
            self.data.clone(),
        )
        .map_err(Failure::configuration)
    }
}

/// Runs `waypost serve`, until a signal or a failure.
///
/// # Errors
/// When the settings are wrong, the gateway cannot start, or a part of it fails.
pub fn serve(args: &ServeArgs) -> Result<(), Failure> {
    let mut config = args.settings.load()?;
    if args.dev {
        prepare_development(&mut config)?;
    }
    check(&config)?;
    logging::start(&config.log).map_err(Failure::configuration)?;
    if config.store.sealing.is_default() && !args.dev {
        tracing::warn!(
            "the master key lies in the data folder, where it protects nothing from who can read that folder; \
             [store.sealing] names another place"
        );
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(run(&config, args.dev))
}

async fn run(config: &Config, is_development: bool) -> Result<(), Failure> {
    let stop = cancelled_by_signals()?;
    let gateway = Gateway::bind(config).await?;
    if is_development {
        welcome(config, gateway.addresses());
    }
    Ok(gateway.run(stop).await?)
}

/// Puts the development PKI under the data folder, and the settings that go with it in place of the
/// file's.
fn prepare_development(config: &mut Config) -> Result<(), Failure> {
    let dir = config.data_dir.join("pki");
    let authority = pki::prepare_development(&dir).with_context(|| {
        format!(
            "cannot prepare the development certificates in {}",
            dir.display()
        )
    })?;
    config.tls = tls::TlsConfig {
        trust_domain: authority.trust_domain().to_owned(),
        client_crl: config.tls.client_crl.take(),
        sessions: config.tls.sessions,
        ..tls::TlsConfig::default()
    }
    .under(&config.data_dir);
    if config.enrolment.ca_certificate.is_none() {
        config.enrolment = EnrolmentConfig {
            ca_certificate: Some("pki/ca.pem".into()),
            ca_key: Some("pki/ca.key".into()),
            ..config.enrolment.clone()
        }
        .under(&config.data_dir);
    }
    let operator = pki::DEVELOPMENT_OPERATOR.to_owned();
    if !config.enrolment.operators.contains(&operator) {
        config.enrolment.operators.push(operator);
    }
    let checker = pki::DEVELOPMENT_CHECKER.to_owned();
    if !config.freshness.checkers.contains(&checker) {
        config.freshness.checkers.push(checker);
    }
    config.freshness.are_checkers_granted = true;
    Ok(())
}

/// Finds what is wrong before anything is bound or opened.
fn check(config: &Config) -> Result<(), Failure> {
    config.log.filter().map_err(Failure::configuration)?;
    tls::TlsFiles::load(&config.tls, &Metrics::new()).map_err(Failure::configuration)?;
    config.freshness.check().map_err(Failure::configuration)?;
    config.enrolment.check().map_err(Failure::configuration)?;
    config
        .store
        .sealing
        .check()
        .map_err(Failure::configuration)?;
    Ok(())
}

/// Runs `waypost check-config`.
///
/// # Errors
/// When something in the configuration is wrong.
#[expect(clippy::print_stdout, reason = "this is what the command is for")]
pub fn check_config(args: &CheckConfigArgs) -> Result<(), Failure> {
    let config = args.settings.load()?;
    check(&config)?;
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&config).context("cannot print the configuration")?
        );
    } else {
        print!(
            "{}",
            toml::to_string_pretty(&config).context("cannot print the configuration")?
        );
    }
    Ok(())
}

/// Runs `waypost invite`.
///
/// # Errors
/// When a certificate cannot be read or the gateway refuses.
pub fn invite(args: InviteArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    Ok(runtime.block_on(invite::run(args))?)
}

/// Runs `waypost erase`.
///
/// # Errors
/// When it was not confirmed, or something is left.
pub fn erase(args: &EraseArgs) -> Result<(), Failure> {
    erase::run(args, &mut std::io::stdout().lock()).map_err(|error| {
        if error.is_not_confirmed() {
            Failure::configuration(error)
        } else {
            Failure::from(error)
        }
    })
}

/// Runs `waypost watch`.
///
/// # Errors
/// When a certificate cannot be read or the gateway turns this checker away.
pub fn watch(args: WatchArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    Ok(runtime.block_on(watch::run(args))?)
}

/// A token that the first SIGTERM or SIGINT cancels. The second ends the process at once: whoever sends
/// it has decided not to wait, and nothing that was acknowledged is lost by it.
fn cancelled_by_signals() -> Result<CancellationToken, Failure> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let cancel = CancellationToken::new();
    let token = cancel.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let name = next().await;
        tracing::info!(signal = name, "stopping; a second signal stops at once");
        token.cancel();
        let name = next().await;
        tracing::warn!(signal = name, "stopped at once");
        std::process::exit(1);
    });
    Ok(cancel)
}

/// Says on one line what went wrong, and on further ones why.
#[expect(clippy::print_stderr, reason = "the log may be what could not start")]
pub fn report(failure: &Failure) {
    let error = failure.error();
    let said = error.to_string();
    eprintln!("waypost: {said}");
    // Some messages say their cause themselves.
    for cause in error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .filter(|cause| !said.contains(cause))
    {
        eprintln!("  because: {cause}");
    }
}

/// The first words to a developer.
#[expect(
    clippy::print_stderr,
    reason = "for whoever typed --dev, not for the log"
)]
fn welcome(config: &Config, addresses: Addresses) {
    let (data, checker) = (config.data_dir.display(), pki::DEVELOPMENT_CHECKER);
    let Addresses {
        devices,
        freshness,
        admin,
        enrolment,
    } = addresses;
    let is_expected_there = freshness == FreshnessConfig::default().listen;
    let at = match is_expected_there {
        true => String::new(),
        false => format!(" --addr https://{freshness}"),
    };
    let enrolment = enrolment.map_or_else(
        || "off".to_owned(),
        |address| format!("{address}/udp  QUIC, waypost-enroll/1"),
    );
    eprintln!(
        "\
Waypost is running for development, on this machine only.

  devices       {devices}/udp  QUIC, waypost/1
  enrolment     {enrolment}
  freshness     {freshness}/tcp  gRPC
  admin         http://{admin}/
  data          {data}
  certificates  {data}/pki (kept and used again)

Try in a second terminal:
  loadtest steady --addr {devices} --pki {data}/pki
  waypost watch --data {data}{at}
  waypost invite --data {data}{at} --checker {checker}
  curl -s http://{admin}/metrics | grep waypost_pings

Ctrl-C stops it in order.
"
    );
}
