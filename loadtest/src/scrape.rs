//! What the gateway uses, read from its admin endpoint, and the memory of this process.
//!
//! Knows four metric names and as much HTTP as they need. Must not know the device protocol.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::report::GatewayUse;

/// Watches what a gateway uses, until it is dropped.
#[derive(Debug)]
pub struct UseWatch {
    seen: Arc<Mutex<Seen>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Seen {
    newest: GatewayUse,
    most: GatewayUse,
    /// The most that was kept for streams that lag.
    most_lagging_bytes: Option<u64>,
    /// Processor time at the first look, and of processes that have ended since.
    cpu_before_s: Option<f64>,
    cpu_ended_s: f64,
}

impl UseWatch {
    /// Begins to look once a second.
    #[must_use]
    pub fn start(admin: SocketAddr) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let seen_by_task = seen.clone();
        let task = tokio::spawn(async move {
            let mut ticks = interval(Duration::from_secs(1));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                // A gateway that is being restarted does not answer; the next look finds it.
                if let Ok(page) = get(admin, "/metrics").await {
                    let mut seen = seen_by_task.lock();
                    seen.look(parse(&page));
                    seen.most_lagging_bytes = seen.most_lagging_bytes.max(lagging_bytes(&page));
                }
            }
        });
        Self { seen, task }
    }

    /// What it used when it was looked at last.
    #[must_use]
    pub fn newest(&self) -> GatewayUse {
        self.seen.lock().newest
    }

    /// The most memory that it was seen to keep for Watch streams that lag.
    #[must_use]
    pub fn most_lagging_bytes(&self) -> Option<u64> {
        self.seen.lock().most_lagging_bytes
    }

    /// What it was seen to use at most, and the processor time since the first look.
    #[must_use]
    pub fn most(&self) -> GatewayUse {
        let seen = self.seen.lock();
        let cpu_s = seen.newest.cpu_s.zip(seen.cpu_before_s);
        let grown = seen
            .most
            .rss_bytes
            .zip(seen.most.idle_rss_bytes)
            .map(|(most, idle)| most.saturating_sub(idle));
        let connections = seen.most.connections.filter(|count| 0 < *count);
        GatewayUse {
            cpu_s: cpu_s.map(|(now_s, before_s)| now_s + seen.cpu_ended_s - before_s),
            bytes_per_connection: grown.zip(connections).map(|(bytes, count)| bytes / count),
            ..seen.most
        }
    }
}

impl Drop for UseWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Seen {
    fn look(&mut self, found: GatewayUse) {
        if let (Some(before_s), Some(now_s)) = (self.newest.cpu_s, found.cpu_s)
            && now_s < before_s
        {
            // It was restarted and counts from zero.
            self.cpu_ended_s += before_s;
        }
        self.cpu_before_s = self.cpu_before_s.or(found.cpu_s);
        // The watch begins before the first device connects.
        self.most.idle_rss_bytes = self.most.idle_rss_bytes.or(found.rss_bytes);
        self.most.rss_bytes = self.most.rss_bytes.max(found.rss_bytes);
        self.most.connections = self.most.connections.max(found.connections);
        self.newest = found;
    }
}

/// One page of the admin endpoint; an error unless its status is 200.
///
/// # Errors
/// When the gateway does not answer in time, or with another status.
pub async fn get(admin: SocketAddr, path: &str) -> anyhow::Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(admin).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        stream.read_to_string(&mut response).await?;
        anyhow::Ok(response)
    };
    let response = timeout(ANSWER_TIMEOUT, exchange)
        .await
        .context("no answer in time")?
        .with_context(|| format!("cannot read http://{admin}{path}"))?;
    let (head, body) = response
        .split_once("\r\n\r\n")
        .context("the answer is not HTTP")?;
    ensure!(
        head.starts_with("HTTP/1.1 200"),
        "http://{admin}{path} answered: {body}"
    );
    Ok(body.to_owned())
}

/// The memory that this process holds; unknown where there is no `/proc`.
#[must_use]
pub fn own_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes << 10)
}

fn parse(page: &str) -> GatewayUse {
    GatewayUse {
        rss_bytes: whole(page, "process_resident_memory_bytes"),
        cpu_s: value(page, "process_cpu_seconds_total"),
        connections: whole(page, "waypost_connections"),
        ..GatewayUse::default()
    }
}

fn lagging_bytes(page: &str) -> Option<u64> {
    whole(page, "waypost_freshness_lagging_bytes")
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "Prometheus writes whole numbers as floats, too"
)]
fn whole(page: &str, name: &str) -> Option<u64> {
    value(page, name).map(|value| value as u64)
}

fn value(page: &str, name: &str) -> Option<f64> {
    page.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn looked(cpu_s: f64, rss_bytes: u64) -> GatewayUse {
        GatewayUse {
            rss_bytes: Some(rss_bytes),
            cpu_s: Some(cpu_s),
            ..GatewayUse::default()
        }
    }

    #[test]
    fn a_page_is_read_by_exact_names() {
        let page = "# HELP waypost_connections Open.\nwaypost_connections_accepted_total 9\nwaypost_connections 3\n\
                    process_resident_memory_bytes 1048576\nprocess_cpu_seconds_total 1.5\n";
        let found = parse(page);
        assert_eq!(
            (found.connections, found.rss_bytes, found.cpu_s),
            (Some(3), Some(1_048_576), Some(1.5))
        );
        assert_eq!(parse("").connections, None);
        assert_eq!(
            lagging_bytes("waypost_freshness_lagging_bytes 7\n"),
            Some(7)
        );
    }

    #[test]
    fn this_process_holds_memory() {
        assert!(own_rss_bytes().is_some_and(|bytes| 1 << 20 < bytes));
    }

    #[test]
    fn processor_time_goes_on_over_a_restart() {
        let mut seen = Seen::default();
        for found in [
            looked(10.0, 5),
            looked(12.0, 9),
            looked(1.0, 2),
            looked(4.0, 3),
        ] {
            seen.look(found);
        }
        let watch = |seen: Seen| {
            let cpu_s = seen.newest.cpu_s.unwrap() + seen.cpu_ended_s - seen.cpu_before_s.unwrap();
            (cpu_s, seen.most.rss_bytes)
        };
        assert_eq!(watch(seen), (6.0, Some(9)));
    }
}
