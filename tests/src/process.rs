//! The real binary as a process, to be signalled, killed and started again on the same folder.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde::Deserialize;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use waypost_gateway::pki::{Authority, Credentials};

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
    dir: TempDir,
}

impl Process {
    pub async fn start(environment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
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
        let (child, addresses) = spawn(dir.path(), &environment).await;
        Self {
            child,
            environment,
            addresses,
            dir,
        }
    }

    /// Starts it again after it was killed or has ended.
    pub async fn restart(&mut self) {
        (self.child, self.addresses) = spawn(self.dir.path(), &self.environment).await;
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
        self.dir.path()
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
        Authority::open(&self.dir.path().join("pki")).unwrap()
    }

    pub async fn connect(&self, device: &Device) -> Link {
        self.attempt(Some(&device.credentials)).await.unwrap()
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

async fn spawn(dir: &Path, environment: &[(String, String)]) -> (Child, Addresses) {
    let addresses_file = dir.join("addresses.json");
    drop(std::fs::remove_file(&addresses_file));
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log_file(dir))
        .unwrap();
    let mut child = Command::new(binary("waypost"))
        .args(["serve", "--dev", "--data"])
        .arg(dir)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let addresses = until(async || {
        if let Some(status) = child.try_wait().unwrap() {
            panic!(
                "the gateway ended with {status}: {}",
                std::fs::read_to_string(log_file(dir)).unwrap()
            );
        }
        let addresses: Addresses =
            serde_json::from_slice(&std::fs::read(&addresses_file).ok()?).ok()?;
        let ready = http_get(addresses.admin, "/readyz")
            .await
            .is_ok_and(|(status, _)| status == 200);
        ready.then_some(addresses)
    })
    .await;
    (child, addresses)
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
