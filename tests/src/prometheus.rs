//! A real Prometheus that scrapes a gateway every second.

use std::{
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use crate::{process, tool};

/// A running Prometheus. Killed when it is dropped.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    _dir: TempDir,
}

impl Prometheus {
    pub async fn start(admin: SocketAddr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("prometheus.yml");
        let targets = format!(
            "global:\n  scrape_interval: 1s\nscrape_configs:\n  - job_name: waypost\n    static_configs:\n      - targets: ['{admin}']\n"
        );
        std::fs::write(&config, targets).unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let child = Command::new(tool("prometheus"))
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.path().join("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Prometheus is not installed: run `make test`, or .ci/prometheus");
        process::until(async || {
            process::http_get(address, "/-/ready")
                .await
                .ok()
                .filter(|(status, _)| *status == 200)
        })
        .await;
        Self {
            child,
            address,
            _dir: dir,
        }
    }

    /// Asks until there is a value that is as a test wants it.
    pub async fn query_until(&self, query: &str, is_so: impl Fn(f64) -> bool) -> f64 {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let path = format!("/api/v1/query?query={encoded}");
        process::until(async || {
            let (_, body) = process::http_get(self.address, &path).await.ok()?;
            let start = body.find('{')?;
            let answer: serde_json::Value =
                serde_json::from_str(body[start..=body.rfind('}')?].trim()).ok()?;
            let value = answer["data"]["result"][0]["value"][1]
                .as_str()?
                .parse()
                .ok()?;
            is_so(value).then_some(value)
        })
        .await
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
