//! The real binary as a process, to be signalled, killed and started again on the same folder.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;
use waypost_checker::{Config, connect, rpc::freshness_client::FreshnessClient};
use waypost_gateway::pki::{Authority, Credentials, DEVELOPMENT_CHECKER};
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
    pub enrolment: SocketAddr,
}

/// A `waypost serve --dev` and its folder. Killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Option<Child>,
    addresses: Option<Addresses>,
    environment: Vec<(String, String)>,
    data_dir: PathBuf,
    dir: TempDir,
}

/// The settings that say where it listens.
const LISTEN: [&str; 4] = [
    "WAYPOST_DEVICES_LISTEN",
    "WAYPOST_FRESHNESS_LISTEN",
    "WAYPOST_ADMIN_LISTEN",
    "WAYPOST_ENROLMENT_LISTEN",
];

impl Process {
    /// Starts one. Its ports are chosen once, so that devices find it again after a restart.
    pub async fn start(environment: &[(&str, &str)]) -> Self {
        let mut process = Self::prepared(environment);
        // Nobody knows them yet, so they are chosen anew if somebody else is given one meanwhile.
        let choose_ports = |process: &mut Self| {
            for name in LISTEN {
                process.set(name, &free_address(name).to_string());
            }
        };
        process.start_until_ready(choose_ports).await;
        process
    }

    /// A folder in which nothing has been started yet, and a gateway that takes other ports at each start.
    pub fn prepared(environment: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("disk/data");
        std::fs::create_dir(dir.path().join("disk")).unwrap();
        let mut process = Self {
            child: None,
            addresses: None,
            environment: Vec::new(),
            data_dir,
            dir,
        };
        for name in LISTEN {
            process.set(name, "127.0.0.1:0");
        }
        // How much room the temporary folder has is not what most tests are about.
        process.set("WAYPOST_STORE_FREE_SPACE_FLOOR_MIB", "0");
        for (name, value) in environment {
            process.set(name, value);
        }
        process
    }

    /// As [`Self::prepared`], with its data on a disk of the test's own. The log is not on it, as with a
    /// supervisor's journal: what becomes of that disk is still told.
    pub fn prepared_on(disk: &Path, environment: &[(&str, &str)]) -> Self {
        let mut process = Self::prepared(environment);
        process.data_dir = disk.join("data");
        process
    }

    /// Sets a variable of its environment, from the next start on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.unset(name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Takes a variable out of its environment, from the next start on.
    pub fn unset(&mut self, name: &str) {
        self.environment.retain(|(known, _)| known != name);
    }

    /// Starts it, also again after it was killed or has ended, and waits until it is ready.
    pub async fn restart(&mut self) {
        self.start_until_ready(|_| ()).await;
    }

    async fn start_until_ready(&mut self, prepare: impl Fn(&mut Self)) {
        let starting = async {
            loop {
                prepare(self);
                let said_before = self.log_so_far().len();
                let Err(status) = self.try_restart().await else {
                    return;
                };
                let said = self.log().split_off(said_before);
                // While it was down, somebody else was given a port that it had.
                assert!(said.contains("in use"), "it ended with {status}: {said}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        within_minutes(starting).await;
    }

    /// As [`Self::restart`], but it may end before it is ready.
    pub async fn try_restart(&mut self) -> Result<(), ExitStatus> {
        let addresses_file = self.data_dir.join("addresses.json");
        // Kept from the start on, so that it ends with the test whatever happens.
        self.child = Some(self.spawn());
        let child = self.child.as_mut().expect("it was started");
        let addresses = until(async || {
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
        self.addresses = Some(addresses?);
        Ok(())
    }

    /// Starts it and kills it after a time, ready or not.
    pub async fn start_and_kill(&mut self, after: Duration) {
        let mut child = self.spawn();
        tokio::time::sleep(after).await;
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(ended.is_none(), "it ended by itself: {}", self.log());
    }

    /// SIGKILL: nothing is flushed, nobody is told.
    pub fn kill(&mut self) {
        let child = self.child();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGSTOP: it keeps its connections and says nothing. Killed all the same when it is dropped.
    pub fn suspend(&self) {
        kill_process(self.pid(), Signal::STOP).unwrap();
        // All its threads, and not only the one that is told.
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(self.pid()), stopped).unwrap();
    }

    /// SIGTERM: drain.
    pub fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
    }

    /// Whether it has ended, by itself or not.
    pub fn has_ended(&self) -> bool {
        // Leaves the end to be seen again.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        !matches!(waitid(WaitId::Pid(self.pid()), look), Ok(None))
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("it was started"))
    }

    pub async fn exit_code(&mut self) -> Option<i32> {
        let child = self.child();
        until(async || child.try_wait().unwrap()).await.code()
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("it was started")
    }

    fn spawn(&mut self) -> Child {
        drop(std::fs::remove_file(self.data_dir.join("addresses.json")));
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file())
            .unwrap();
        Command::new(binary("waypost"))
            .args(["serve", "--dev", "--data"])
            .arg(&self.data_dir)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The folder that the data folder is in: nothing else is there.
    pub fn disk(&self) -> &Path {
        self.data_dir.parent().unwrap()
    }

    /// A folder that goes with this process, beside its disk.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Leaves everything on disk when this is dropped, for somebody to look at, and says where.
    pub fn leave_behind(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    pub fn addresses(&self) -> Addresses {
        self.addresses.expect("it was started")
    }

    /// Everything it has logged, over all its starts.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap()
    }

    /// The same, also before its first start.
    fn log_so_far(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("log.txt")
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
        connect(&self.checker_config()).await.unwrap()
    }

    /// The freshness service, as the development checker reaches it.
    pub fn checker_config(&self) -> Config {
        let authority = self.authority();
        let credentials = authority.issue_checker(DEVELOPMENT_CHECKER).unwrap();
        Config::new(
            format!("https://{}", self.addresses().freshness),
            authority.certificate_pem(),
            &credentials.certificate_pem,
            &credentials.private_key_pem,
            "localhost",
        )
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
            self.addresses().devices,
            ca_pem,
            credentials,
            link::ordinary(),
        )
        .await
    }

    pub async fn admin(&self, path: &str) -> (u16, String) {
        http_get(self.addresses().admin, path).await.unwrap()
    }

    /// What it says of its readiness; `None` when nobody answers any more.
    pub async fn readiness(&self) -> Option<(u16, String)> {
        http_get(self.addresses().admin, "/readyz").await.ok()
    }

    pub async fn metrics_until(&self, is_so: impl Fn(&MetricsPage) -> bool) -> MetricsPage {
        until(async || Some(MetricsPage(self.admin("/metrics").await.1)).filter(|page| is_so(page)))
            .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// A port that was free a moment ago.
fn free_address(name: &str) -> SocketAddr {
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    if name.contains("DEVICES") || name.contains("ENROLMENT") {
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
    within_minutes(looking).await
}

/// Waits, and panics after minutes, which only a hang takes.
pub async fn within_minutes<T>(happening: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(300), happening)
        .await
        .expect("it happens within five minutes")
}
