//! The gateway's side of the operator's door.
//!
//! Knows the socket, and which part does what a command says. Must not know how it is done.
//!
//! # Bounds
//!
//! `MOST_CALLERS` are served at a time, each for one line of [`LINE_BYTES`] and `CALL_TIMEOUT`; `BACKLOG` more wait in
//! the kernel, and who comes after those is refused by it. Some of the callers may take longer: see the file beside
//! this one. A stop waits for none of them.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net},
    },
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Answer, Command, ControlError, LINE_BYTES, Outcome, SOCKET, Target,
    long::{LongCalls, LongParts},
};
use crate::{
    audit::Audit,
    clock::Clock,
    connected::{Connected, Ending},
    erase::ErasePlaces,
    export::stream::Exports,
    metrics::Metrics,
    orders::{OrderHandle, Revoke, Revoked},
    store::Store,
};

/// What commands reach.
#[derive(Debug)]
pub struct DoorParts {
    /// The committer.
    pub orders: OrderHandle,
    /// Those whose connections are open.
    pub connected: Arc<Connected>,
    /// Who gives what is held on a user.
    pub exports: Exports,
    /// What is backed up, and where it is seen how far an erasure is.
    pub store: Arc<Store>,
    /// Where erasures wait.
    pub erase: ErasePlaces,
    /// Where they are recorded.
    pub audit: Audit,
    /// The gateway's clock.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Metrics,
}

/// What a caller reaches.
#[derive(Clone, Debug)]
struct Reach {
    orders: OrderHandle,
    connected: Arc<Connected>,
    /// It is held open by those who write to it.
    store: Weak<Store>,
    long: LongCalls,
}

/// The socket, until dropped. Nothing is answered until [`Door::run`].
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
    metrics: Metrics,
    reach: Reach,
}

impl Door {
    /// Makes the socket, within a runtime. The caller has the store open for writing: a socket that is there already
    /// was left behind by an earlier gateway.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn bind(data_dir: &Path, parts: DoorParts) -> Result<Self, ControlError> {
        let path = data_dir.join(SOCKET);
        let listener = listen(&path).map_err(|source| ControlError::Bind {
            path: path.clone(),
            source,
        })?;
        let DoorParts {
            orders,
            connected,
            exports,
            store,
            erase,
            audit,
            clock,
            metrics,
        } = parts;
        let checkpointed = Arc::downgrade(&store);
        let long = LongCalls::new(LongParts {
            orders: orders.clone(),
            connected: Arc::clone(&connected),
            exports,
            store,
            erase,
            audit,
            clock,
            metrics: metrics.clone(),
        });
        Ok(Self {
            listener,
            path,
            metrics,
            reach: Reach {
                orders,
                connected,
                store: checkpointed,
                long,
            },
        })
    }

    /// Answers until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        let mut callers = JoinSet::new();
        loop {
            let has_room = callers.len() < MOST_CALLERS;
            self.metrics.operator.callers.set(callers.len() as f64);
            tokio::select! {
                () = cancel.cancelled() => break,
                Some(_) = callers.join_next() => {}
                accepted = self.listener.accept(), if has_room => match accepted {
                    Ok((stream, _)) => {
                        callers.spawn(serve(stream, self.reach.clone()));
                    }
                    Err(error) => {
                        warn!(%error, "an operator's command could not be taken");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
        // They are broken off where they are, and hold nothing of the store any more.
        callers.shutdown().await;
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // One that stays is no harm: nobody listens at it.
        fs::remove_file(&self.path).ok();
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Before anybody can connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(net::UnixListener::from(OwnedFd::from(socket)))
}

async fn serve(mut stream: UnixStream, reach: Reach) {
    let served = async {
        let command = in_time(command(&mut stream)).await??;
        reach.obey(command, &mut stream).await
    };
    match served.await {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            warn!("an operator's command was not done or not read in time");
        }
        Err(error) => debug!(%error, "an operator's command broke off"),
    }
}

async fn command(stream: &mut UnixStream) -> io::Result<serde_json::Result<Command>> {
    let mut line = String::new();
    let (read, _) = stream.split();
    BufReader::new(read.take(LINE_BYTES))
        .read_line(&mut line)
        .await?;
    Ok(serde_json::from_str(&line))
}

/// What may take no longer than `CALL_TIMEOUT`.
async fn in_time<T>(part: impl Future<Output = T>) -> io::Result<T> {
    Ok(timeout(CALL_TIMEOUT, part).await?)
}

/// Says a line.
pub(super) async fn say(stream: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    in_time(stream.write_all(&line)).await?
}

impl Reach {
    async fn obey(
        &self,
        command: serde_json::Result<Command>,
        stream: &mut UnixStream,
    ) -> io::Result<()> {
        let answer = match command {
            Ok(Command::Revoke(target)) => in_time(self.revoke(&target, false)).await?,
            Ok(Command::Lift(target)) => in_time(self.revoke(&target, true)).await?,
            Ok(Command::Export(wanted)) => return self.long.export(&wanted, stream).await,
            Ok(Command::Erase(holder)) => return self.long.erase(&holder, stream).await,
            Ok(Command::Checkpoint) => in_time(self.checkpoint()).await?,
            Err(error) => {
                Answer::Refused(format!("this version does not know this command: {error}"))
            }
        };
        say(stream, &answer).await
    }

    /// On a thread that may wait for the disk.
    async fn checkpoint(&self) -> Answer {
        let Some(store) = self.store.upgrade() else {
            return Answer::Refused("the gateway stops".to_owned());
        };
        match tokio::task::spawn_blocking(move || store.checkpoint()).await {
            Ok(Ok(checkpoint)) => {
                info!(
                    position = checkpoint.position,
                    "a backup is made of this moment"
                );
                Answer::Checkpointed(checkpoint)
            }
            Ok(Err(error)) => Answer::Refused(error.to_string()),
            Err(error) => Answer::Refused(format!("it broke off: {error}")),
        }
    }

    async fn revoke(&self, target: &Target, is_lifted: bool) -> Answer {
        let Some(subject) = target.subject() else {
            return Answer::Refused(NO_USER.to_owned());
        };
        let revoked = self.orders.revoke(Revoke { subject, is_lifted }).await;
        let Revoked { before_ms, now_ms } = match revoked {
            Ok(revoked) => revoked,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        let ended = match now_ms {
            Some(_) => self.connected.end(subject, Ending::Revoked),
            None => 0,
        };
        match (before_ms, now_ms) {
            (None, Some(_)) => info!(%subject, ended, "revoked"),
            (Some(_), None) => info!(%subject, "the revocation was lifted"),
            _ => debug!(%subject, is_lifted, "a revocation that is so already"),
        }
        Answer::Done(Outcome {
            before_ms,
            now_ms,
            ended,
        })
    }
}

/// Why a command about nobody is refused.
pub(super) const NO_USER: &str = "the user is no UUID in lower case";
/// Commands are typed by people. Those that take long are fewer, so that a revocation finds a place.
const MOST_CALLERS: usize = 16;
const BACKLOG: i32 = 16;
/// How long a command may take, with a slow commit in it.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Without file descriptors the next attempt would fail as well, at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
