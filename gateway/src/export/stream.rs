//! Exports from a running gateway: to a device, on a stream of its own, and to the operator, in chunks.
//!
//! Knows the store, the audit log and a QUIC stream; what the text looks like knows the parent, and how chunks get to
//! the operator the door of [`crate::control`]. The store is read on a thread where a slow disk or a slow reader keeps
//! nobody else waiting.
//!
//! # Bounds
//!
//! `MOST_EXPORTS` are under way; a further one is told to come later. Each holds a few chunks of `CHUNK_BYTES`, the
//! records of the user's devices and the user's transitions. A device that takes nothing for `PATIENCE` is given up.

use std::{
    fmt,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use quinn::Connection;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use waypost_proto::{
    frame::encode_frame,
    id::{DeviceId, UserId},
    v1::{self, control, control_result::Outcome},
};

use super::{
    Format,
    source::{self, NotHeld, Source, SourceError},
};
use crate::{
    audit::{
        self, Audit,
        chain::{Deed, What, Who, Whose},
    },
    clock::Clock,
    metrics::Metrics,
    store::Store,
};

/// Exports that are under way at a time: each reads as fast as whoever gets it.
const MOST_EXPORTS: usize = 4;

/// What is read ahead, in chunks.
const CHUNKS_AHEAD: usize = 4;
const CHUNK_BYTES: usize = 16 << 10;

/// How long a device may take nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// Begins exports. Clones share their number.
#[derive(Clone, Debug)]
pub struct Exports {
    store: Arc<Store>,
    audit: Audit,
    audit_log: PathBuf,
    clock: Clock,
    metrics: Metrics,
    retention: Duration,
    room: Arc<Semaphore>,
    under_way: TaskTracker,
}

/// Where exports read and are recorded.
#[derive(Debug)]
pub struct ExportParts {
    /// What is exported.
    pub store: Arc<Store>,
    /// Where it is recorded that it was.
    pub audit: Audit,
    /// The audit log's file, which knows who watched.
    pub audit_log: PathBuf,
    /// The gateway's clock.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Metrics,
    /// How old pings become at most.
    pub retention: Duration,
}

/// Why an export was not begun, or did not come to its end. What was sent then lacks its last line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    #[error(transparent)]
    NotHeld(#[from] NotHeld),
    #[error("as many exports as are made at a time are under way; try again in a minute")]
    NoRoom,
    #[error("it could not be recorded in the audit log, and so was not begun")]
    NotRecorded(#[from] audit::NotRecorded),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("whoever should get it takes nothing any more")]
    NotReading,
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// An export that is on record and under way.
#[derive(Debug)]
pub(crate) struct Reading {
    chunks: mpsc::Receiver<Bytes>,
    written: JoinHandle<Result<(), SourceError>>,
}

impl Reading {
    /// The next chunk; none when nothing more comes, for whatever reason.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.chunks.recv().await
    }

    /// Whether that was all.
    pub(crate) async fn end(self) -> Result<(), ExportError> {
        // It would wait for a place for its next chunk.
        drop(self.chunks);
        let written = self.written.await;
        Ok(written.map_err(|error| ExportError::Broken(error.to_string()))??)
    }
}

impl Exports {
    /// None under way.
    #[must_use]
    pub fn new(parts: ExportParts) -> Self {
        Self {
            store: parts.store,
            audit: parts.audit,
            audit_log: parts.audit_log,
            clock: parts.clock,
            metrics: parts.metrics,
            retention: parts.retention,
            room: Arc::new(Semaphore::new(MOST_EXPORTS)),
            under_way: TaskTracker::new(),
        }
    }

    /// Begins to send a device everything that is held on its user, on a stream that the gateway opens. False if too
    /// many are under way.
    pub(crate) fn begin(
        &self,
        connection: &Connection,
        device: DeviceId,
        id: u64,
        format: control::Format,
    ) -> bool {
        let format = match format {
            control::Format::JsonLines => Format::Jsonl,
            control::Format::Geojson => Format::Geojson,
        };
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            return false;
        };
        let (exports, connection) = (self.clone(), connection.clone());
        self.under_way.spawn(async move {
            let exported = exports.export(connection, device, id, format, room).await;
            exports.note(&format_args!("device {device}"), &exported);
        });
        true
    }

    /// Begins to read for the operator everything that is held on a user.
    pub(crate) async fn begin_for_operator(
        &self,
        user: UserId,
        format: Format,
    ) -> Result<Reading, ExportError> {
        let room = Arc::clone(&self.room).try_acquire_owned();
        let room = room.map_err(|_| ExportError::NoRoom)?;
        let store = Arc::clone(&self.store);
        let held = tokio::task::spawn_blocking(move || source::check_held(&store, user));
        held.await
            .map_err(|error| ExportError::Broken(error.to_string()))??;
        self.record(Who::Operator, user).await?;
        Ok(self.read(user, format, room))
    }

    /// Counts how an export ended, and says it.
    pub(crate) fn note(&self, whom: &dyn fmt::Display, exported: &Result<(), ExportError>) {
        let metrics = &self.metrics.exports;
        match exported {
            Ok(()) => {
                metrics.finished.increment(1);
                info!(to = %whom, "exported what is held on the user");
            }
            Err(error) => {
                metrics.failed.increment(1);
                warn!(to = %whom, %error, "an export did not come to its end");
            }
        }
    }

    /// Waits until those that are under way have ended, which they do when nobody takes what they read.
    pub async fn ended(&self) {
        self.under_way.close();
        self.under_way.wait().await;
    }

    async fn export(
        &self,
        connection: Connection,
        device: DeviceId,
        id: u64,
        format: Format,
        room: OwnedSemaphorePermit,
    ) -> Result<(), ExportError> {
        let broken = |error: &dyn fmt::Display| ExportError::Broken(error.to_string());
        let mut stream = timeout(PATIENCE, connection.open_uni())
            .await
            .map_err(|_| ExportError::NotReading)?
            .map_err(|error| broken(&error))?;
        let recorded = self
            .record(Who::Holder(device.to_string()), device.user)
            .await;
        let outcome = match recorded {
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::TryLater,
        };
        let mut send = async |chunk: Bytes| {
            timeout(PATIENCE, stream.write_chunk(chunk))
                .await
                .map_err(|_| ExportError::NotReading)?
                .map_err(|error| broken(&error))
        };
        send(first_frame(id, outcome)).await?;
        recorded?;
        let mut reading = self.read(device.user, format, room);
        while let Some(chunk) = reading.next().await {
            send(chunk).await?;
        }
        reading.end().await?;
        // An error means that the device has gone with the last chunk.
        stream.finish().map_err(|error| broken(&error))?;
        stream.stopped().await.map_err(|error| broken(&error))?;
        Ok(())
    }

    /// First on record, then on its way.
    async fn record(&self, who: Who, user: UserId) -> Result<(), audit::NotRecorded> {
        let deed = Deed {
            at_ms: self.clock.now_ms(),
            who,
            what: What::Exported,
            whose: Whose::of(&[user]),
        };
        self.audit.record(deed).await
    }

    fn read(&self, user: UserId, format: Format, room: OwnedSemaphorePermit) -> Reading {
        let (chunks, read) = mpsc::channel(CHUNKS_AHEAD);
        let exports = self.clone();
        let written = self.under_way.spawn_blocking(move || {
            // As long as it reads, also when whoever wanted it has gone meanwhile.
            let _room = room;
            let source = Source {
                store: &exports.store,
                audit_log: &exports.audit_log,
                retention: exports.retention,
            };
            source.write(user, format, exports.clock.now_ms(), Chunks::new(chunks))
        });
        Reading {
            chunks: read,
            written,
        }
    }
}

fn first_frame(id: u64, outcome: Outcome) -> Bytes {
    let result = v1::ControlResult {
        id,
        outcome: outcome.into(),
        ..v1::ControlResult::default()
    };
    let frame = v1::GatewayFrame {
        kind: Some(v1::gateway_frame::Kind::ControlResult(result)),
    };
    let mut bytes = BytesMut::new();
    encode_frame(&frame, &mut bytes);
    bytes.freeze()
}

/// Text on its way, in chunks.
struct Chunks {
    chunk: Vec<u8>,
    chunks: mpsc::Sender<Bytes>,
}

impl Chunks {
    fn new(chunks: mpsc::Sender<Bytes>) -> Self {
        Self {
            chunk: Vec::with_capacity(CHUNK_BYTES),
            chunks,
        }
    }
}

impl Write for Chunks {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.chunk.extend_from_slice(text);
        if CHUNK_BYTES <= self.chunk.len() {
            self.flush()?;
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::take(&mut self.chunk);
        let sent = self.chunks.blocking_send(chunk.into());
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
