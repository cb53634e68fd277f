//! The ceiling for a server on quinn: it sends back what it gets, and does nothing else.
//!
//! Knows how to serve an echo with the gateway's TLS and transport settings, and how to run it as a
//! process of its own. Must not know what is sent, or what is measured.
//!
//! # Bounds
//!
//! Only for loopback and for one client that measures: it takes as many connections as come, each with as
//! much memory as the transport settings let a peer claim.

use std::{
    io::Read,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use quinn::{Endpoint, Incoming};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};
use waypost_gateway::{
    config::Config,
    tls::{self, TlsConfig},
    worker::Workers,
};

/// Arguments of `loadtest echo-server`.
#[derive(Args, Debug)]
pub struct EchoArgs {
    /// The data folder of `waypost serve --dev`, whose certificates the echo shows and accepts
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
}

/// An echo server that runs as a process of its own, so that its processor time can be told from the
/// client's. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct EchoProcess {
    child: Child,
    address: SocketAddr,
}

impl EchoProcess {
    /// Starts one and waits for its address.
    ///
    /// # Errors
    /// When this program cannot be started again, or the echo says no address in time.
    pub(crate) async fn start(data: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("echo-server")
            .arg("--data")
            .arg(data)
            // It ends when this pipe does: also when this process is killed and can end nothing.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C at the terminal is for the load test, whose end is the echo's.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the echo server")?;
        let said = child
            .stdout
            .take()
            .context("the echo server has no output")?;
        let mut lines = BufReader::new(said).lines();
        let line = timeout(START_TIMEOUT, lines.next_line())
            .await
            .context("the echo server did not say where it listens")??
            .context("the echo server ended before it said where it listens")?;
        Ok(Self {
            child,
            address: line.parse().context("the echo server said no address")?,
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whose processor time it uses.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn process_id(&self) -> anyhow::Result<u32> {
        self.child.id().context("the echo server has ended")
    }

    /// Ends it and waits until it has.
    ///
    /// # Errors
    /// When it had ended before, or cannot be ended.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(ended) = self.child.try_wait()? {
            bail!("the echo server ended early, with {ended}");
        }
        self.child.kill().await.context("the echo server lives on")
    }
}

/// Serves until standard input ends, and says on standard output where.
///
/// # Errors
/// When the certificates cannot be used, or there is no port.
#[expect(clippy::print_stdout, reason = "how the parent learns the address")]
pub(crate) async fn serve(args: &EchoArgs) -> anyhow::Result<()> {
    let mut config = Config {
        tls: TlsConfig::default().under(&args.data),
        ..Config::default()
    };
    config.devices.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    println!("{}", start(&config)?);
    // An error is an end as well.
    _ = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await?;
    Ok(())
}

/// Starts the echo on the gateway's own workers, so that sockets, threads and the gathering of packets are the
/// same. Returns where it listens.
fn start(config: &Config) -> anyhow::Result<SocketAddr> {
    let tls = tls::device_server_config(&config.tls)?;
    // No reset and no token of it needs to outlive it.
    let workers = Workers::bind(&config.devices, tls, &[0; 32])?;
    let address = workers.local_addr()?;
    workers
        .spawn(|endpoint, _| serve_echo(endpoint))?
        .detach_all();
    Ok(address)
}

/// Accepts until the endpoint is closed.
async fn serve_echo(endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        // How one connection ends is its client's to tell.
        tokio::spawn(echo(incoming));
    }
}

async fn echo(incoming: Incoming) -> anyhow::Result<()> {
    let connection = incoming.await?;
    let (mut send, mut recv) = connection.accept_bi().await?;
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
        send.write_chunk(chunk.bytes).await?;
    }
    Ok(())
}

const START_TIMEOUT: Duration = Duration::from_secs(30);
