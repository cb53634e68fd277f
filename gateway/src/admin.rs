//! The operators' endpoint: metrics for Prometheus, health for a supervisor, a page for people.
//!
//! Plain HTTP on its own listener, on loopback unless configured; it holds no secret and no position.
//! Must not know devices, checkers or the store: all that it says comes from [`Metrics`] and
//! [`Readiness`].

mod listener;
mod status;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{Html, IntoResponse},
    routing::get,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{listener::BoundedListener, status::History},
    metrics::Metrics,
};

/// Where operators find the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// Address and port of `/metrics`, `/healthz`, `/readyz` and the status page. Loopback, because
    /// nothing here asks who is reading; 9464 is the port that Prometheus exporters of this kind use.
    pub listen: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 9464)),
        }
    }
}

/// Why the endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address is taken, not ours, or not allowed.
    #[error(
        "cannot listen on {listen} for metrics and health: {source}; set admin.listen to a free address"
    )]
    Bind {
        /// The address as configured.
        listen: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// How far the gateway has come. It only goes forward, save for hindrances, which come and go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The parts are being built; nobody is served yet.
    Starting,
    /// Devices and checkers are served.
    Ready,
    /// Ready, were it not for something that passes; with what it is. Devices and checkers are answered,
    /// but better off elsewhere.
    Hindered(String),
    /// No new connection is taken; what is queued is being committed.
    Draining,
    /// A commit failed or a part ended, so nothing more is acknowledged; with what it was.
    Failed(String),
}

/// The gateway's stage, set by whoever wires the parts and read by the endpoint. Clones share it.
#[derive(Clone, Debug)]
pub struct Readiness {
    stage: watch::Sender<Stage>,
}

impl Readiness {
    /// Of a gateway that is starting.
    #[must_use]
    pub fn starting() -> Self {
        Self {
            stage: watch::Sender::new(Stage::Starting),
        }
    }

    /// Goes forward to `stage`. Never back: a gateway that drains does not become ready again, and a
    /// failure is final, so its first reason stays.
    pub fn advance(&self, stage: Stage) {
        self.stage.send_if_modified(|current| {
            let forward = match (&*current, &stage) {
                (Stage::Failed(_), _) => false,
                (current, next) => current < next,
            };
            if forward {
                *current = stage;
            }
            forward
        });
    }

    /// Says what hinders a gateway that would be ready, or that nothing does any more. Says nothing of
    /// one that has not come so far yet, or further.
    pub fn hinder(&self, reason: Option<String>) {
        self.stage.send_if_modified(|current| {
            if !matches!(current, Stage::Ready | Stage::Hindered(_)) {
                return false;
            }
            let next = reason.map_or(Stage::Ready, Stage::Hindered);
            let is_news = *current != next;
            *current = next;
            is_news
        });
    }

    /// Tells of every new stage.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// The stage now.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage.borrow().clone()
    }
}

/// The endpoint, listening. Nothing is answered until [`Admin::run`].
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    local_addr: SocketAddr,
    metrics: Metrics,
    readiness: Readiness,
}

impl Admin {
    /// Takes the configured address.
    ///
    /// # Errors
    ///
    /// When it cannot be taken.
    pub async fn bind(
        config: &AdminConfig,
        metrics: Metrics,
        readiness: Readiness,
    ) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Bind {
            listen: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        Ok(Self {
            listener,
            local_addr,
            metrics,
            readiness,
        })
    }

    /// Where it listens, with the port that the system chose if the configured one was 0.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Answers until cancelled, then lets requests that have begun finish.
    pub async fn run(self, cancel: CancellationToken) {
        let shown = Arc::new(Shown {
            metrics: self.metrics,
            readiness: self.readiness,
            started: Instant::now(),
            history: Mutex::default(),
        });
        let routes = Router::new()
            .route("/", get(status_page))
            .route("/metrics", get(metrics_page))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(Arc::clone(&shown));
        let serving = axum::serve(BoundedListener::new(self.listener), routes)
            .with_graceful_shutdown(cancel.clone().cancelled_owned());
        let ended = async {
            cancel.cancelled().await;
            tokio::time::sleep(REQUEST_GRACE).await;
        };
        tokio::select! {
            () = take_snapshots(&shown) => {}
            () = ended => {}
            served = serving => {
                if let Err(error) = served {
                    tracing::warn!(%error, "the admin endpoint stopped listening");
                }
            }
        }
    }
}

/// What the routes read.
struct Shown {
    metrics: Metrics,
    readiness: Readiness,
    started: Instant,
    history: Mutex<History>,
}

/// Also keeps the histograms small, see [`Metrics::render`].
async fn take_snapshots(shown: &Shown) {
    let mut ticks = interval(SNAPSHOT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let snapshot = shown.metrics.snapshot();
        shown.history.lock().note(Instant::now(), snapshot);
    }
}

async fn metrics_page(State(shown): State<Arc<Shown>>) -> impl IntoResponse {
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        shown.metrics.render(),
    )
}

/// Whether the process is worth keeping: restart it when this fails.
async fn healthz(State(shown): State<Arc<Shown>>) -> (StatusCode, String) {
    match shown.readiness.stage() {
        stage @ Stage::Failed(_) => (StatusCode::SERVICE_UNAVAILABLE, in_words(&stage) + "\n"),
        // A restart makes no room on a disk, and wakes none that hangs.
        Stage::Starting | Stage::Ready | Stage::Hindered(_) | Stage::Draining => {
            (StatusCode::OK, "alive\n".to_owned())
        }
    }
}

/// Whether devices and checkers should be sent here.
async fn readyz(State(shown): State<Arc<Shown>>) -> (StatusCode, String) {
    let stage = shown.readiness.stage();
    let code = match stage {
        Stage::Ready => StatusCode::OK,
        Stage::Starting | Stage::Hindered(_) | Stage::Draining | Stage::Failed(_) => {
            StatusCode::SERVICE_UNAVAILABLE
        }
    };
    (code, in_words(&stage) + "\n")
}

async fn status_page(State(shown): State<Arc<Shown>>) -> Html<String> {
    let stage = shown.readiness.stage();
    Html(status::page(
        &stage,
        shown.started.elapsed(),
        &shown.history.lock(),
    ))
}

fn in_words(stage: &Stage) -> String {
    match stage {
        Stage::Starting => "starting".to_owned(),
        Stage::Ready => "ready".to_owned(),
        Stage::Hindered(reason) => format!("not ready: {reason}"),
        Stage::Draining => "draining".to_owned(),
        Stage::Failed(reason) => format!("failed: {reason}"),
    }
}

/// How often the page's numbers are taken.
const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// How long requests that have begun may take when the gateway stops.
const REQUEST_GRACE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        task::JoinHandle,
    };

    use super::*;
    use crate::metrics::Fates;

    struct Running {
        addr: SocketAddr,
        metrics: Metrics,
        readiness: Readiness,
        cancel: CancellationToken,
        task: JoinHandle<()>,
    }

    async fn start() -> Running {
        let (metrics, readiness) = (Metrics::new(), Readiness::starting());
        let config = AdminConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        let admin = Admin::bind(&config, metrics.clone(), readiness.clone())
            .await
            .unwrap();
        let (addr, cancel) = (admin.local_addr(), CancellationToken::new());
        let task = tokio::spawn(admin.run(cancel.clone()));
        Running {
            addr,
            metrics,
            readiness,
            cancel,
            task,
        }
    }

    /// The status code, the head and the body.
    async fn fetch(addr: SocketAddr, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, head.to_lowercase(), body.to_owned())
    }

    #[tokio::test]
    async fn metrics_come_in_the_text_format() {
        let running = start().await;
        running.metrics.settled(&Fates {
            accepted: 7,
            ..Fates::default()
        });
        let (code, head, body) = fetch(running.addr, "/metrics").await;
        assert_eq!(code, 200);
        assert!(
            head.contains("content-type: text/plain; version=0.0.4"),
            "{head}"
        );
        assert!(
            body.contains("waypost_pings_total{fate=\"accepted\"} 7\n"),
            "{body}"
        );
    }

    #[tokio::test]
    async fn readiness_and_health_follow_the_stage() {
        let running = start().await;
        let probes = async || {
            let (ready, _, reason) = fetch(running.addr, "/readyz").await;
            let (healthy, _, _) = fetch(running.addr, "/healthz").await;
            (ready, healthy, reason)
        };
        assert_eq!(probes().await, (503, 200, "starting\n".to_owned()));
        running.readiness.advance(Stage::Ready);
        assert_eq!(probes().await, (200, 200, "ready\n".to_owned()));
        running.readiness.hinder(Some("a full disk".to_owned()));
        assert_eq!(
            probes().await,
            (503, 200, "not ready: a full disk\n".to_owned())
        );
        running.readiness.hinder(None);
        assert_eq!(probes().await, (200, 200, "ready\n".to_owned()));
        running.readiness.advance(Stage::Draining);
        assert_eq!(probes().await, (503, 200, "draining\n".to_owned()));
        running
            .readiness
            .advance(Stage::Failed("no space left".to_owned()));
        assert_eq!(
            probes().await,
            (503, 503, "failed: no space left\n".to_owned())
        );
    }

    #[test]
    fn a_stage_never_goes_back() {
        let readiness = Readiness::starting();
        readiness.advance(Stage::Draining);
        readiness.advance(Stage::Ready);
        assert_eq!(readiness.stage(), Stage::Draining);
        let first = Stage::Failed("a disk died".to_owned());
        readiness.advance(first.clone());
        readiness.advance(Stage::Failed("its neighbour too".to_owned()));
        readiness.advance(Stage::Draining);
        assert_eq!(readiness.stage(), first);
    }

    #[test]
    fn only_a_gateway_that_would_be_ready_is_hindered() {
        let readiness = Readiness::starting();
        let hinder = |reason: &str| readiness.hinder(Some(reason.to_owned()));
        hinder("too early");
        assert_eq!(readiness.stage(), Stage::Starting);
        readiness.advance(Stage::Ready);
        hinder("z: a full disk");
        hinder("a: a slow disk");
        assert_eq!(
            readiness.stage(),
            Stage::Hindered("a: a slow disk".to_owned())
        );
        readiness.advance(Stage::Ready);
        assert_eq!(
            readiness.stage(),
            Stage::Hindered("a: a slow disk".to_owned()),
            "a hindrance ends only when it is said to"
        );
        readiness.advance(Stage::Draining);
        hinder("too late");
        readiness.hinder(None);
        assert_eq!(readiness.stage(), Stage::Draining);
    }

    #[tokio::test]
    async fn the_status_page_stands_alone() {
        let running = start().await;
        running.readiness.advance(Stage::Ready);
        let (code, head, body) = fetch(running.addr, "/").await;
        assert_eq!(code, 200);
        assert!(head.contains("content-type: text/html"), "{head}");
        assert!(
            body.contains("ready") && body.contains(env!("CARGO_PKG_VERSION")),
            "{body}"
        );
        for fetched_from_elsewhere in ["http://", "https://", "<script", "<link", "url("] {
            assert!(
                !body.contains(fetched_from_elsewhere),
                "{fetched_from_elsewhere} in {body}"
            );
        }
    }

    #[tokio::test]
    async fn cancelling_ends_it_even_with_a_request_half_sent() {
        let running = start().await;
        let mut stalled = TcpStream::connect(running.addr).await.unwrap();
        stalled
            .write_all(b"GET /metrics HTTP/1.1\r\nhost:")
            .await
            .unwrap();
        assert_eq!(fetch(running.addr, "/healthz").await.0, 200);
        running.cancel.cancel();
        running.task.await.unwrap();
        assert!(TcpStream::connect(running.addr).await.is_err());
    }

    #[tokio::test]
    async fn a_taken_address_says_which_one_and_what_to_set() {
        let running = start().await;
        let config = AdminConfig {
            listen: running.addr,
        };
        let error = Admin::bind(&config, Metrics::new(), Readiness::starting())
            .await
            .unwrap_err();
        let message = error.to_string();
        assert!(message.contains(&running.addr.to_string()), "{message}");
        assert!(message.contains("admin.listen"), "{message}");
    }
}
