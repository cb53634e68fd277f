//! The gateway's side of the operator's door.
//!
//! Knows the socket, and which part does what a command says. Must not know how it is done.
//!
//! # Bounds
//!
//! `MOST_CALLERS` are served at a time, each for one line of [`LINE_BYTES`] and `CALL_TIMEOUT`; `BACKLOG` more wait in
//! the kernel, and who comes after those is refused by it.

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

use super::{Answer, Command, ControlError, LINE_BYTES, Outcome, SOCKET, Target};
use crate::{
    connected::Connected,
    orders::{OrderHandle, Revoke, Revoked},
    store::Store,
};

/// What commands reach.
#[derive(Clone, Debug)]
pub struct DoorParts {
    /// The committer.
    pub orders: OrderHandle,
    /// Those whose connections are open.
    pub connected: Arc<Connected>,
    /// What is backed up. It is held open by those who write to it.
    pub store: Weak<Store>,
}

/// The socket, until dropped. Nothing is answered until [`Door::run`].
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
    parts: DoorParts,
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
        Ok(Self {
            listener,
            path,
            parts,
        })
    }

    /// Answers until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        let mut callers = JoinSet::new();
        loop {
            let has_room = callers.len() < MOST_CALLERS;
            tokio::select! {
                () = cancel.cancelled() => return,
                Some(_) = callers.join_next() => {}
                accepted = self.listener.accept(), if has_room => match accepted {
                    Ok((stream, _)) => {
                        callers.spawn(serve(stream, self.parts.clone()));
                    }
                    Err(error) => {
                        warn!(%error, "an operator's command could not be taken");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
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

async fn serve(stream: UnixStream, parts: DoorParts) {
    match timeout(CALL_TIMEOUT, answer(stream, &parts)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "an operator's command broke off"),
        Err(_) => warn!("an operator's command was not done in time"),
    }
}

async fn answer(mut stream: UnixStream, parts: &DoorParts) -> io::Result<()> {
    let mut line = String::new();
    let (read, _) = stream.split();
    BufReader::new(read.take(LINE_BYTES))
        .read_line(&mut line)
        .await?;
    let answer = match serde_json::from_str(&line) {
        Ok(command) => parts.obey(command).await,
        Err(error) => Answer::Refused(format!("this version does not know this command: {error}")),
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

impl DoorParts {
    async fn obey(&self, command: Command) -> Answer {
        match command {
            Command::Revoke(target) => self.revoke(&target, false).await,
            Command::Lift(target) => self.revoke(&target, true).await,
            Command::Checkpoint => self.checkpoint().await,
        }
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
            return Answer::Refused("the user is no UUID in lower case".to_owned());
        };
        let revoked = self.orders.revoke(Revoke { subject, is_lifted }).await;
        let Revoked { before_ms, now_ms } = match revoked {
            Ok(revoked) => revoked,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        let ended = match now_ms {
            Some(_) => self.connected.end(subject),
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

/// Commands are typed by people.
const MOST_CALLERS: usize = 8;
const BACKLOG: i32 = 16;
/// How long a command may take, with a slow commit in it.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Without file descriptors the next attempt would fail as well, at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
