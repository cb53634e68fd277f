//! A checker that writes down what it is told: one Watch stream after the other, over real gRPC.
//!
//! Knows how a stream is begun, resumed and read. Must not know what is true. It does what it is ordered to: it reads
//! on, or reads nothing for a while, or loses its connection and comes back with whichever token it has.

use std::{future::pending, net::SocketAddr};

use bytes::{Bytes, BytesMut};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Duration, timeout},
};
use tonic::{Status, Streaming};
use waypost_checker::rpc::freshness_client::FreshnessClient;
use waypost_proto::v1::{State, WatchRequest, WatchResponse, watch_event::Kind};

use crate::{
    judge::{Said, Selection},
    world::checker_config,
};

/// What a subscriber is like, for a whole run.
#[derive(Clone, Debug)]
pub(crate) struct Nature {
    /// Its place among the checkers.
    pub(crate) checker: usize,
    pub(crate) selection: Selection,
    /// How much HTTP/2 may bring it before it reads; none for the usual.
    pub(crate) window_bytes: Option<u32>,
}

/// What it comes back with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum With {
    Newest,
    /// One that it was given so many before the newest.
    Older(usize),
    Nothing,
    Forged,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Begins a stream, and drops the one it has.
    Begin(SocketAddr, With),
    /// Reads this many messages and no more.
    Read(usize),
    ReadOn,
    Cut,
    /// Reads on until everything is told up to here, on a new stream if it has to.
    Finish {
        address: SocketAddr,
        position: u64,
        resolved_ms: u64,
    },
}

/// A running one.
pub(crate) struct Subscriber {
    pub(crate) nature: Nature,
    orders: mpsc::Sender<Order>,
    log: JoinHandle<Vec<Said>>,
}

struct Task {
    nature: Nature,
    log: Vec<Said>,
    /// With their places in the log.
    tokens: Vec<(usize, Bytes)>,
    stream: Option<(
        FreshnessClient<tonic::transport::Channel>,
        Streaming<WatchResponse>,
    )>,
    may_read: usize,
    goal: Option<Goal>,
    is_done: bool,
}

/// Up to where a subscriber has to be told everything, and where.
#[derive(Clone, Copy, Debug)]
struct Goal {
    address: SocketAddr,
    position: u64,
    resolved_ms: u64,
}

impl Subscriber {
    pub(crate) fn start(nature: Nature) -> Self {
        let (orders, ordered) = mpsc::channel(ORDERS);
        let task = Task {
            nature: nature.clone(),
            log: Vec::new(),
            tokens: Vec::new(),
            stream: None,
            may_read: usize::MAX,
            goal: None,
            is_done: false,
        };
        Self {
            nature,
            orders,
            log: tokio::spawn(task.run(ordered)),
        }
    }

    pub(crate) async fn order(&self, order: Order) {
        self.orders
            .send(order)
            .await
            .expect("it takes orders until it has finished");
    }

    /// All that it was told, once it has finished.
    pub(crate) async fn log(self) -> Vec<Said> {
        let read = timeout(PATIENCE, self.log).await;
        read.expect("whoever reads on is told everything")
            .expect("it does not panic")
    }
}

impl Task {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) -> Vec<Said> {
        while !self.is_done {
            // Also when what was left of a stream of an earlier life has been read.
            if let (Some(goal), None) = (self.goal, &self.stream) {
                self.begin(goal.address, With::Newest).await;
            }
            tokio::select! {
                biased;
                Some(order) = orders.recv() => self.obey(order).await,
                message = next(&mut self.stream), if 0 < self.may_read => self.take(message),
                // The run has failed, and nobody gives orders any more.
                else => break,
            }
        }
        self.log
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Begin(address, with) => self.begin(address, with).await,
            Order::Read(messages) => self.may_read = messages,
            Order::ReadOn => self.may_read = usize::MAX,
            Order::Cut => self.cut(),
            Order::Finish {
                address,
                position,
                resolved_ms,
            } => {
                self.may_read = usize::MAX;
                self.goal = Some(Goal {
                    address,
                    position,
                    resolved_ms,
                });
            }
        }
    }

    async fn begin(&mut self, address: SocketAddr, with: With) {
        self.cut();
        let token = match with {
            With::Nothing => None,
            With::Newest | With::Forged => self.tokens.last(),
            With::Older(by) => {
                let at = self.tokens.len().saturating_sub(1 + by);
                self.tokens.get(at)
            }
        };
        let (began, token) = match (with, token) {
            (With::Forged, Some((_, token))) => (Said::BeganForged, forged(token)),
            (_, Some((at, token))) => (Said::Began { with: Some(*at) }, token.clone()),
            (_, None) => (Said::Began { with: None }, Bytes::new()),
        };
        // The gateway may have gone meanwhile: then this was no stream.
        let Ok((client, stream)) = self.watch(address, token).await else {
            return;
        };
        self.log.push(began);
        self.stream = Some((client, stream));
    }

    async fn watch(
        &self,
        address: SocketAddr,
        token: Bytes,
    ) -> Result<
        (
            FreshnessClient<tonic::transport::Channel>,
            Streaming<WatchResponse>,
        ),
        Box<dyn std::error::Error>,
    > {
        let Nature {
            checker,
            selection,
            window_bytes,
        } = &self.nature;
        let endpoint = checker_config(address, *checker).endpoint()?;
        let channel = endpoint
            .initial_stream_window_size(*window_bytes)
            .connect()
            .await?;
        let mut client = FreshnessClient::new(channel);
        let users = selection.users.iter().flatten();
        let request = WatchRequest {
            token,
            user_ids: users.map(|user| Bytes::copy_from_slice(&user.0)).collect(),
            states: if selection.is_active_only {
                vec![State::Active.into()]
            } else {
                Vec::new()
            },
        };
        let stream = client.watch(request).await?.into_inner();
        Ok((client, stream))
    }

    fn cut(&mut self) {
        if self.stream.take().is_some() {
            self.log.push(Said::Ended);
        }
    }

    fn take(&mut self, message: Result<Option<WatchResponse>, Status>) {
        self.may_read = self
            .may_read
            .saturating_sub(usize::from(self.may_read != usize::MAX));
        let Ok(Some(message)) = message else {
            self.cut();
            return;
        };
        for event in message.events {
            let kind = event.kind.expect("an event of a kind that we know");
            let at = self.log.len();
            match &kind {
                Kind::SnapshotEnd(end) => self.tokens.push((at, end.token.clone())),
                Kind::Progress(progress) => {
                    self.tokens.push((at, progress.token.clone()));
                    self.is_done |= self.goal.is_some_and(|goal| {
                        goal.position <= progress.position
                            && goal.resolved_ms <= progress.resolved_ms
                    });
                }
                _ => {}
            }
            self.log.push(Said::Told(kind));
        }
    }
}

async fn next<Client>(
    stream: &mut Option<(Client, Streaming<WatchResponse>)>,
) -> Result<Option<WatchResponse>, Status> {
    match stream {
        Some((_, stream)) => stream.message().await,
        None => pending().await,
    }
}

fn forged(token: &Bytes) -> Bytes {
    let mut forged = BytesMut::from(&token[..]);
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    forged.freeze()
}

/// More than are given at a time.
const ORDERS: usize = 16;
/// Only a stream that hangs takes so long.
const PATIENCE: Duration = Duration::from_secs(240);
