//! A gateway inside the test process, with a data folder and an authority of its own.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use waypost_checker::{Config as CheckerConfig, connect, rpc::freshness_client::FreshnessClient};
use waypost_gateway::{
    clock::system_now_ms,
    config::Config,
    control::{self, Answer, Command, Outcome},
    gateway::{Addresses, Gateway, GatewayError},
    pki::{Authority, Credentials},
    store::Store,
};
use waypost_loadtest::run::Target;
use waypost_proto::v1;

use crate::{
    Device, MetricsPage, device_id,
    link::{self, Attempt, Link},
    process,
};

/// The trust domain of all tests.
const TRUST_DOMAIN: &str = "test.example";

#[derive(Debug)]
pub struct World {
    pub authority: Authority,
    config: Config,
    running: Option<Running>,
    dir: TempDir,
}

#[derive(Debug)]
struct Running {
    addresses: Addresses,
    stop: CancellationToken,
    ended: JoinHandle<Result<(), GatewayError>>,
}

impl World {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        let authority = Authority::create(&pki, TRUST_DOMAIN).unwrap();
        authority
            .issue_server(&["localhost", "127.0.0.1"])
            .unwrap()
            .write(&pki, "server")
            .unwrap();
        let any_port = "127.0.0.1:0".parse().unwrap();
        let mut config = Config {
            data_dir: dir.path().join("data"),
            ..Config::default()
        };
        config.devices.listen = any_port;
        config.freshness.listen = any_port;
        config.freshness.checkers = vec!["dev".to_owned()];
        // As with `--dev`: what most tests look at is not who may look.
        config.freshness.are_checkers_granted = true;
        config.admin.listen = any_port;
        config.enrolment.listen = any_port;
        // How much room the temporary folder has is not what most tests are about.
        config.store.free_space_floor_mib = 0;
        config.tls.certificate = pki.join("server.pem");
        config.tls.private_key = pki.join("server.key");
        config.tls.client_ca = pki.join("ca.pem");
        config.tls.trust_domain = TRUST_DOMAIN.to_owned();
        change(&mut config);
        let running = run(&config).await;
        Self {
            authority,
            config,
            running: Some(running),
            dir,
        }
    }

    /// Stops the gateway as SIGTERM would and opens its store.
    pub async fn stop(mut self) -> Store {
        self.stop_gateway().await;
        Self::open_store(&self.config.data_dir)
    }

    pub async fn restart(&mut self) {
        self.stop_gateway().await;
        self.start_gateway().await;
    }

    /// Starts the gateway again after [`Self::stop_gateway`].
    pub async fn start_gateway(&mut self) {
        self.running = Some(run(&self.config).await);
    }

    /// Stops the gateway as SIGTERM would, and leaves its folder to the test.
    pub async fn stop_gateway(&mut self) {
        let running = self.running.take().unwrap();
        running.stop.cancel();
        running.ended.await.unwrap().unwrap();
    }

    pub fn open_store(data_dir: &Path) -> Store {
        Store::open_read_only(data_dir).unwrap()
    }

    pub fn device(&self, number: u32) -> Device {
        let id = device_id(number);
        Device {
            id,
            credentials: Arc::new(self.authority.issue_device(id).unwrap()),
        }
    }

    pub async fn connect(&self, device: &Device) -> Link {
        self.attempt(Some(&device.credentials)).await.unwrap()
    }

    /// Connects to an address that leads to the gateway.
    pub async fn connect_at(&self, address: SocketAddr, device: &Device) -> Link {
        let ca_pem = self.authority.certificate_pem();
        let credentials = Some(&*device.credentials);
        link::attempt(address, ca_pem, credentials, link::ordinary())
            .await
            .unwrap()
    }

    pub async fn connect_not_reading(&self, device: &Device) -> Link {
        let ca_pem = self.authority.certificate_pem();
        let credentials = Some(&*device.credentials);
        link::attempt(
            self.addresses().devices,
            ca_pem,
            credentials,
            link::not_reading(),
        )
        .await
        .unwrap()
    }

    pub async fn attempt(&self, credentials: Option<&Credentials>) -> Attempt {
        link::attempt(
            self.addresses().devices,
            self.authority.certificate_pem(),
            credentials,
            link::ordinary(),
        )
        .await
    }

    /// Connects from another address on loopback.
    pub async fn attempt_from(&self, source: IpAddr, device: &Device) -> Attempt {
        let ca_pem = self.authority.certificate_pem();
        let config = link::client_config(ca_pem, Some(&device.credentials), link::ordinary());
        link::attempt_from(source, self.addresses().devices, config).await
    }

    pub async fn checker(&self) -> FreshnessClient<Channel> {
        self.checker_with(&self.authority.issue_checker("dev").unwrap())
            .await
    }

    pub async fn checker_with(&self, credentials: &Credentials) -> FreshnessClient<Channel> {
        connect(&self.checker_config(credentials)).await.unwrap()
    }

    /// The freshness service, as it is reached with these certificates.
    pub fn checker_config(&self, credentials: &Credentials) -> CheckerConfig {
        CheckerConfig::new(
            format!("https://{}", self.addresses().freshness),
            self.authority.certificate_pem(),
            &credentials.certificate_pem,
            &credentials.private_key_pem,
            "localhost",
        )
    }

    /// Has the gateway do what an operator wants.
    pub async fn command(&self, command: Command) -> Outcome {
        let data_dir = self.config.data_dir.clone();
        let asked = tokio::task::spawn_blocking(move || control::ask(&data_dir, &command));
        match asked.await.unwrap().unwrap() {
            Some(Answer::Done(outcome)) => outcome,
            other => panic!("not done but {other:?}"),
        }
    }

    /// What a checker is told of a device's user.
    pub async fn entry(&self, device: &Device) -> v1::Entry {
        let user_ids = vec![bytes::Bytes::copy_from_slice(&device.id.user.0)];
        let mut checker = self.checker().await;
        let response = checker
            .get(v1::GetRequest { user_ids })
            .await
            .unwrap()
            .into_inner();
        response.entries.into_iter().next().unwrap()
    }

    pub async fn metrics(&self) -> MetricsPage {
        MetricsPage(
            process::http_get(self.addresses().admin, "/metrics")
                .await
                .unwrap()
                .1,
        )
    }

    /// What the gateway says of its readiness.
    pub async fn readiness(&self) -> (u16, String) {
        process::http_get(self.addresses().admin, "/readyz")
            .await
            .unwrap()
    }

    /// Scrapes until the page is as a test wants it.
    pub async fn metrics_until(&self, is_so: impl Fn(&MetricsPage) -> bool) -> MetricsPage {
        process::until(async || Some(self.metrics().await).filter(|page| is_so(page))).await
    }

    /// Waits until the clock shows a later millisecond than now.
    pub async fn next_millisecond(&self) {
        let now_ms = system_now_ms();
        process::until(async || (now_ms < system_now_ms()).then_some(())).await;
    }

    /// The world as the load test sees it, with devices that look for the gateway elsewhere.
    pub fn target(&self, devices: SocketAddr) -> Target {
        let pki = self.scratch("pki");
        self.authority
            .issue_checker("dev")
            .unwrap()
            .write(&pki, "checker-dev")
            .unwrap();
        let addresses = self.addresses();
        Target {
            devices,
            freshness: Some(addresses.freshness),
            admin: Some(addresses.admin),
            pki,
            data: Some(self.config.data_dir.clone()),
        }
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn addresses(&self) -> Addresses {
        self.running.as_ref().unwrap().addresses
    }

    /// A folder that goes with this world.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn authority_in(dir: &Path) -> Authority {
        Authority::create(dir, TRUST_DOMAIN).unwrap()
    }
}

async fn run(config: &Config) -> Running {
    let gateway = Gateway::bind(config).await.unwrap();
    let addresses = gateway.addresses();
    let stop = CancellationToken::new();
    let ended = tokio::spawn(gateway.run(stop.clone()));
    Running {
        addresses,
        stop,
        ended,
    }
}
