//! A gateway of the load test's own, in a temporary folder.
//!
//! Knows how to start the `waypost` binary, when it is ready, and how to stop it. Must not know what is
//! sent to it.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{run::Target, scenario::Restart, scrape};

/// A running gateway. It is killed and its folder removed when this is dropped.
#[derive(Debug)]
pub struct LocalGateway {
    child: Child,
    addresses: Addresses,
    folder: TempDir,
}

/// Where the gateway listens, as it writes into its data folder once it does.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Addresses {
    devices: SocketAddr,
    freshness: SocketAddr,
    admin: SocketAddr,
}

impl LocalGateway {
    /// Starts a gateway on free ports and waits until it is ready. It keeps pings of any age.
    ///
    /// # Errors
    /// When there is no `waypost` beside this program, or it does not become ready.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_in(&std::env::temp_dir()).await
    }

    /// The same in a temporary folder below `parent`, where the disk may be another one.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_in(parent: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("waypost-loadtest-")
            .tempdir_in(parent)?;
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let wished = Addresses {
            devices: any_port,
            freshness: any_port,
            admin: any_port,
        };
        let (child, addresses) = launch(folder.path(), wished).await?;
        Ok(Self {
            child,
            addresses,
            folder,
        })
    }

    /// Ends it in this way and starts it again, on the same folder and ports.
    ///
    /// # Errors
    /// When it does not end in time, or does not become ready again.
    pub async fn restart(&mut self, how: Restart) -> anyhow::Result<()> {
        match how {
            Restart::Stop => {
                self.terminate().await?;
            }
            Restart::Kill => self.child.kill().await?,
        }
        (self.child, self.addresses) = launch(self.folder.path(), self.addresses).await?;
        Ok(())
    }

    /// How the load test reaches it.
    #[must_use]
    pub fn target(&self) -> Target {
        let data = data_in(self.folder.path());
        Target {
            devices: self.addresses.devices,
            freshness: Some(self.addresses.freshness),
            admin: Some(self.addresses.admin),
            pki: data.join("pki"),
            data: Some(data),
        }
    }

    /// Whose processor time it uses.
    ///
    /// # Errors
    /// When it has ended.
    pub fn process_id(&self) -> anyhow::Result<u32> {
        self.child.id().context("the gateway has ended")
    }

    /// Stops it as an operator would and waits for its end; the folder stays until the result is dropped.
    ///
    /// # Errors
    /// When it does not end in time, or with an error.
    pub async fn stop(mut self) -> anyhow::Result<TempDir> {
        let ended = self.terminate().await?;
        ensure!(
            ended.success(),
            "the gateway ended with {ended}; its log ends:\n{}",
            log_tail(self.folder.path())
        );
        Ok(self.folder)
    }

    async fn terminate(&mut self) -> anyhow::Result<ExitStatus> {
        if let Some(ended) = self.child.try_wait()? {
            return Ok(ended);
        }
        let pid = self
            .child
            .id()
            .and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        kill_process(pid.context("the gateway has no process id")?, Signal::TERM)?;
        let ended = timeout(STOP_TIMEOUT, self.child.wait()).await;
        Ok(ended.with_context(|| {
            format!("the gateway did not stop within {STOP_TIMEOUT:?} of SIGTERM")
        })??)
    }
}

/// Starts the program on a folder, and waits until it listens and is ready.
async fn launch(folder: &Path, wished: Addresses) -> anyhow::Result<(Child, Addresses)> {
    let program = program_beside_this_one()?;
    let data = data_in(folder);
    // Those of an earlier life would be taken for the new one's.
    match std::fs::remove_file(data.join(ADDRESSES_FILE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join(LOG_FILE))?;
    let mut child = Command::new(&program)
        .args(["serve", "--dev", "--data"])
        .arg(data)
        .envs(SETTINGS)
        .env("WAYPOST_DEVICES_LISTEN", wished.devices.to_string())
        .env("WAYPOST_FRESHNESS_LISTEN", wished.freshness.to_string())
        .env("WAYPOST_ADMIN_LISTEN", wished.admin.to_string())
        // Nobody enrols in a load test, and another gateway may have the usual port.
        .env("WAYPOST_ENROLMENT_LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C at the terminal is for the load test, which then stops the gateway in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let addresses = wait_until_ready(&mut child, folder).await?;
    Ok((child, addresses))
}

fn program_beside_this_one() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("waypost");
    ensure!(
        program.is_file(),
        "there is no gateway at {}: build it with `cargo build --release`, or name a running one with --addr",
        program.display()
    );
    Ok(program)
}

async fn wait_until_ready(child: &mut Child, folder: &Path) -> anyhow::Result<Addresses> {
    let patience = Instant::now() + START_TIMEOUT;
    loop {
        if let Some(ended) = child.try_wait()? {
            bail!(
                "the gateway ended with {ended} before it was ready; its log ends:\n{}",
                log_tail(folder)
            );
        }
        let written = tokio::fs::read(data_in(folder).join(ADDRESSES_FILE))
            .await
            .ok();
        if let Some(addresses) =
            written.and_then(|json| serde_json::from_slice::<Addresses>(&json).ok())
            && scrape::get(addresses.admin, "/readyz").await.is_ok()
        {
            return Ok(addresses);
        }
        ensure!(
            Instant::now() < patience,
            "the gateway was not ready within {START_TIMEOUT:?}; its log ends:\n{}",
            log_tail(folder)
        );
        sleep(LOOK_INTERVAL).await;
    }
}

fn data_in(folder: &Path) -> PathBuf {
    folder.join("data")
}

/// The last lines that the gateway wrote, for an error message.
fn log_tail(folder: &Path) -> String {
    let log = std::fs::read_to_string(folder.join(LOG_FILE)).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// Old pings welcome, for a replay with its original times is years old; all the room that a temporary
/// folder has; more connections and watchers than a machine can hold, so that memory is the limit; and none for one
/// address, because the fleet's few are not the many that its devices would have.
const SETTINGS: [(&str, &str); 6] = [
    ("WAYPOST_STORE_RETENTION", "36500d"),
    ("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "0"),
    ("WAYPOST_DEVICES_CONNECTIONS", "1000000"),
    ("WAYPOST_FRESHNESS_MAX_CONNECTIONS", "100000"),
    ("WAYPOST_FRESHNESS_MAX_WATCHERS", "100000"),
    ("WAYPOST_DEVICES_ADMISSION_ADDRESS_HANDSHAKES_PER_S", "0"),
];
const ADDRESSES_FILE: &str = "addresses.json";
const LOG_FILE: &str = "gateway.log";
const LOG_TAIL_LINES: usize = 20;
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// It commits what is queued and closes each connection.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
