//! The real binary as a process, to be signalled, killed and started again on the same folder.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use serde::Deserialize;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;
use waypost_gateway::{
    feed::{client, rpc::freshness_client::FreshnessClient},
    pki::{Authority, Credentials, DEVELOPMENT_CHECKER},
};
use waypost_proto::v1;

use crate::{
    Device, MetricsPage, binary, device_id,
    link::{self, Attempt, Link},
};

/// Where the process can be reached, from its `addresses.json`.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Addresses {
    pub devices: SocketAddr,
    pub freshness: SocketAddr,
    pub admin: SocketAddr,
}

/// A running `waypost serve --dev`. Killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    environment: Vec<(String, String)>,
    addresses: Addresses,
    data_dir: PathBuf,
    dir: TempDir,
}

impl Process {
    pub async fn start(environment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().to_owned();
        Self::start_in(dir, data_dir, environment).await
    }

    /// On a data folder of the test's own. The log is not in it, as with a supervisor's journal: what
    /// becomes of that disk is still told.
    pub async fn start_on(data_dir: &Path, environment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, data_dir.to_owned(), environment).await
    }

    async fn start_in(dir: TempDir, data_dir: PathBuf, environment: &[(&str, &str)]) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let mut environment: Vec<_> = environment.iter().map(owned).collect();
        // Ports are chosen once, so that devices find the gateway again after a restart.
        for name in [
            "WAYPOST_DEVICES_LISTEN",
            "WAYPOST_FRESHNESS_LISTEN",
            "WAYPOST_ADMIN_LISTEN",
        ] {
            environment.push((name.to_owned(), free_address(name).to_string()));
        }
        let (child, addresses) = spawn(&data_dir, dir.path(), &environment).await;
        Self {
            child,
            environment,
            addresses,
            data_dir,
            dir,
        }
    }

    /// Starts it again after it was killed or has ended.
    pub async fn restart(&mut self) {
        (self.child, self.addresses) =
            spawn(&self.data_dir, self.dir.path(), &self.environment).await;
    }

    /// Starts it again although it may not be able to, and then gives its exit code.
    pub async fn try_restart(&mut self) -> Result<(), Option<i32>> {
        match try_spawn(&self.data_dir, self.dir.path(), &self.environment).await {
            Ok(running) => {
                (self.child, self.addresses) = running;
                Ok(())
            }
            Err(status) => Err(status.code()),
        }
    }

    /// SIGKILL: nothing is flushed, nobody is told.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM: drain.
    pub fn terminate(&self) {
        let sent = Command::new("kill")
            .args(["-TERM", &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    pub async fn exit_code(&mut self) -> Option<i32> {
        until(async || self.child.try_wait().unwrap()).await.code()
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Everything it has logged, over all its starts.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log_file(self.dir.path())).unwrap()
    }

    pub fn device(&self, number: u32) -> Device {
        let id = device_id(number);
        Device {
            id,
            credentials: std::sync::Arc::new(self.authority().issue_device(id).unwrap()),
        }
    }

    pub fn authority(&self) -> Authority {
        Authority::open(&self.data_dir.join("pki")).unwrap()
    }

    pub async fn connect(&self, device: &Device) -> Link {
        self.attempt(Some(&device.credentials)).await.unwrap()
    }

    /// Connects to an address that leads to the gateway.
    pub async fn connect_at(&self, address: SocketAddr, device: &Device) -> Link {
        let authority = self.authority();
        let credentials = Some(&*device.credentials);
        link::attempt(
            address,
            authority.certificate_pem(),
            credentials,
            link::ordinary(),
        )
        .await
        .unwrap()
    }

    pub async fn checker(&self) -> FreshnessClient<Channel> {
        let authority = self.authority();
        let credentials = authority.issue_checker(DEVELOPMENT_CHECKER).unwrap();
        client::connect(
            &format!("https://{}", self.addresses.freshness),
            authority.certificate_pem(),
            &credentials.certificate_pem,
            &credentials.private_key_pem,
            "localhost",
        )
        .await
        .unwrap()
    }

    /// What a checker is told of a device's user.
    pub async fn entry(&self, device: &Device) -> v1::Entry {
        let user_ids = vec![bytes::Bytes::copy_from_slice(&device.id.user.0)];
        let mut checker = self.checker().await;
        let found = checker.get(v1::GetRequest { user_ids }).await;
        found.unwrap().into_inner().entries.remove(0)
    }

    pub async fn attempt(&self, credentials: Option<&Credentials>) -> Attempt {
        let authority = self.authority();
        let ca_pem = authority.certificate_pem();
        link::attempt(
            self.addresses.devices,
            ca_pem,
            credentials,
            link::ordinary(),
        )
        .await
    }

    pub async fn admin(&self, path: &str) -> (u16, String) {
        http_get(self.addresses.admin, path).await.unwrap()
    }

    /// What it says of its readiness; `None` when nobody answers any more.
    pub async fn readiness(&self) -> Option<(u16, String)> {
        http_get(self.addresses.admin, "/readyz").await.ok()
    }

    pub async fn metrics_until(&self, is_so: impl Fn(&MetricsPage) -> bool) -> MetricsPage {
        until(async || Some(MetricsPage(self.admin("/metrics").await.1)).filter(|page| is_so(page)))
            .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

async fn spawn(
    data_dir: &Path,
    log_dir: &Path,
    environment: &[(String, String)],
) -> (Child, Addresses) {
    match try_spawn(data_dir, log_dir, environment).await {
        Ok(running) => running,
        Err(status) => panic!(
            "the gateway ended with {status}: {}",
            std::fs::read_to_string(log_file(log_dir)).unwrap()
        ),
    }
}

async fn try_spawn(
    data_dir: &Path,
    log_dir: &Path,
    environment: &[(String, String)],
) -> Result<(Child, Addresses), ExitStatus> {
    let addresses_file = data_dir.join("addresses.json");
    drop(std::fs::remove_file(&addresses_file));
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log_file(log_dir))
        .unwrap();
    let mut child = Command::new(binary("waypost"))
        .args(["serve", "--dev", "--data"])
        .arg(data_dir)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let started = until(async || {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(Err(status));
        }
        let addresses: Addresses =
            serde_json::from_slice(&std::fs::read(&addresses_file).ok()?).ok()?;
        let ready = http_get(addresses.admin, "/readyz")
            .await
            .is_ok_and(|(status, _)| status == 200);
        ready.then_some(Ok(addresses))
    })
    .await;
    started.map(|addresses| (child, addresses))
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("log.txt")
}

/// A port that was free a moment ago.
fn free_address(name: &str) -> SocketAddr {
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    if name.contains("DEVICES") {
        std::net::UdpSocket::bind(loopback)
            .unwrap()
            .local_addr()
            .unwrap()
    } else {
        std::net::TcpListener::bind(loopback)
            .unwrap()
            .local_addr()
            .unwrap()
    }
}

/// A plain HTTP request: the status and the body.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut connection = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::InvalidData)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
}

/// Looks again and again until there is something; panics after minutes, which only a hang takes.
pub async fn until<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(300), looking)
        .await
        .expect("it happens within five minutes")
}
