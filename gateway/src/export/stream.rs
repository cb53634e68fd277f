//! Export to a device: everything that is held on its user, on a stream of its own.
//!
//! Knows the store, the audit log and a QUIC stream; what the text looks like knows the parent. The store is read on a
//! thread where a slow disk or a slow device keeps nobody else waiting.
//!
//! # Bounds
//!
//! `MOST_EXPORTS` are under way; a further one is told to come later. Each holds a few chunks of `CHUNK_BYTES`, the
//! records of the user's devices and the user's transitions. A device that takes nothing for `PATIENCE` is given up.

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use quinn::Connection;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use waypost_proto::{
    frame::encode_frame,
    id::{DeviceId, UserId},
    v1::{self, control, control_result::Outcome},
};

use super::{Exporter, Format, Subject};
use crate::{
    audit::{
        self, Audit,
        chain::{Deed, What, Who, Whose},
    },
    clock::Clock,
    grants::Checkers,
    metrics::Metrics,
    store::{ReadError, Store},
};

/// Exports that are under way at a time: each reads as fast as its device does.
const MOST_EXPORTS: usize = 4;

/// What is read ahead of the device, in chunks.
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
    checkers: Arc<Checkers>,
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
    /// The store's checkers.
    pub checkers: Arc<Checkers>,
    /// The gateway's clock.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Metrics,
    /// How old pings become at most.
    pub retention: Duration,
}

/// Why an export did not come to its end. What was sent lacks its last line.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("it could not be recorded in the audit log, and so was not begun")]
    NotRecorded(#[from] audit::NotRecorded),
    #[error("what is held could not be read: {0}")]
    Read(#[from] ReadError),
    #[error("what is held could not be put together: {0}")]
    Text(#[from] io::Error),
    #[error("the device takes nothing any more")]
    NotReading,
    #[error("the connection broke: {0}")]
    Broken(String),
}

impl Exports {
    /// None under way.
    #[must_use]
    pub fn new(parts: ExportParts) -> Self {
        Self {
            store: parts.store,
            audit: parts.audit,
            audit_log: parts.audit_log,
            checkers: parts.checkers,
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
            let metrics = &exports.metrics.exports;
            match exported {
                Ok(()) => {
                    metrics.finished.increment(1);
                    info!(%device, "exported what is held on the user");
                }
                Err(error) => {
                    metrics.failed.increment(1);
                    warn!(%device, %error, "an export did not come to its end");
                }
            }
        });
        true
    }

    /// Waits until those that are under way have ended, which they do when their connections are closed.
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
        let broken = |error: &dyn std::fmt::Display| ExportError::Broken(error.to_string());
        let mut stream = timeout(PATIENCE, connection.open_uni())
            .await
            .map_err(|_| ExportError::NotReading)?
            .map_err(|error| broken(&error))?;
        // First on record, then on its way.
        let recorded = self
            .audit
            .record(Deed {
                at_ms: self.clock.now_ms(),
                who: Who::Holder(device.to_string()),
                what: What::Exported,
                whose: Whose::of(&[device.user]),
            })
            .await;
        let outcome = match recorded {
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::TryLater,
        };
        let (chunks, mut read) = mpsc::channel(CHUNKS_AHEAD);
        let head = chunks.send(first_frame(id, outcome)).await;
        head.expect("there is room for the first");
        let reading = recorded.map_err(ExportError::from).map(|()| {
            let exports = self.clone();
            tokio::task::spawn_blocking(move || {
                // As long as it reads, also when the device has gone meanwhile.
                let _room = room;
                exports.write(device.user, format, Chunks::new(chunks))
            })
        });
        while let Some(chunk) = read.recv().await {
            timeout(PATIENCE, stream.write_chunk(chunk))
                .await
                .map_err(|_| ExportError::NotReading)?
                .map_err(|error| broken(&error))?;
        }
        let written = reading?.await;
        written.map_err(|error| broken(&error))??;
        // An error means that the device has gone with the last chunk.
        stream.finish().map_err(|error| broken(&error))?;
        stream.stopped().await.map_err(|error| broken(&error))?;
        Ok(())
    }

    /// Writes what is held on a user, as it was at one moment.
    fn write(&self, user: UserId, format: Format, out: Chunks) -> Result<(), ExportError> {
        let view = self.store.view_of(user);
        let subject = Subject {
            user,
            at_ms: self.clock.now_ms(),
            position: view.position()?,
            sharing: view.sharing()?,
            retention_days: self.retention.as_secs().div_ceil(24 * 60 * 60),
            recipients: audit::recipients(&self.audit_log, user)?,
            decisions: view.decisions()?,
            checkers: Arc::clone(&self.checkers),
        };
        let (devices, transitions) = (view.devices()?, view.transitions()?);
        let mut exporter = Exporter::begin(out, format, &subject, &devices, &transitions)?;
        for row in view.rows() {
            let row = row?;
            for ping in &row.record.pings {
                exporter.ping(row.key.device, row.key.epoch, row.record.receive_ms, ping)?;
            }
        }
        exporter.end()?;
        Ok(())
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

/// Text on its way to a stream, in chunks.
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
        let chunk = std::mem::take(&mut self.chunk);
        let sent = self.chunks.blocking_send(chunk.into());
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
