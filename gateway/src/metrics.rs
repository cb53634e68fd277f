//! Every metric of the gateway: its name, unit, help and labels, and the handle that changes it.
//!
//! Knows metric names; nothing else does. Must not know what its numbers lead to: no decision is made
//! on a metric. There is no global recorder, so several gateways can run in one process.
//!
//! Names begin with `waypost_`, save for the `process_` ones that every Prometheus dashboard knows.
//! Units are base units and end the name; counters end in `_total`. Every series exists from the start
//! with 0, so that a dashboard can tell "never happened" from "not measured".
#![expect(
    clippy::disallowed_macros,
    reason = "this is the one place that names metrics"
)]

pub mod snapshot;

use std::{
    fmt::Write as _,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram, with_local_recorder,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;
use waypost_proto::ping::RejectCode;

use crate::clock::system_now_ms;

/// All metrics of one gateway. Clones share them. The handles are reached through [`Handles`].
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

/// The handles, by the part that moves them.
#[derive(Debug)]
#[expect(missing_docs, reason = "each field's type says what it is")]
pub struct Handles {
    pub connections: ConnectionMetrics,
    pub sessions: SessionMetrics,
    pub commits: CommitMetrics,
    pub freshness: FreshnessMetrics,
    pub limits: LimitMetrics,
    pub resumption: ResumptionMetrics,
}

/// Moved by handshakes and by the sessions that they are resumed from.
#[derive(Debug)]
pub struct ResumptionMetrics {
    /// Completed handshakes of devices that were let in, by kind, a label of [`HANDSHAKES`].
    pub handshakes: ByLabel,
    /// Sessions that can be resumed.
    pub stored: Gauge,
    /// Sessions that nobody came back with, by reason, a label of [`DROPS`].
    pub dropped: ByLabel,
    /// Batches that were stored before their handshake was over.
    pub early_batches: Counter,
}

impl ResumptionMetrics {
    fn register() -> Self {
        Self {
            handshakes: by_label(
                "waypost_handshakes_total",
                "Handshakes of devices that were let in: full, resumed, or resumed with early data.",
                "kind",
                &HANDSHAKES,
            ),
            stored: new_gauge(
                "waypost_sessions_stored",
                "TLS sessions that devices may resume.",
            ),
            dropped: by_label(
                "waypost_sessions_dropped_total",
                "TLS sessions dropped unused, for want of room or because they were too old.",
                "reason",
                &DROPS,
            ),
            early_batches: new_counter(
                "waypost_early_batches_total",
                "Batches that were stored before their device's handshake was over.",
            ),
        }
    }
}

/// How a connection began.
pub const HANDSHAKES: [&str; 3] = ["full", "resumed", "early_data"];

/// Why a session was dropped that nobody had resumed.
pub const DROPS: [&str; 2] = ["room", "expired"];

/// Moved by the accept loop.
#[derive(Debug)]
pub struct ConnectionMetrics {
    /// Connections with a device that are open.
    pub open: Gauge,
    /// Connections whose handshake was completed and whose device was let in.
    pub accepted: Counter,
    /// By reason, a label of [`REFUSALS`].
    pub refused: ByLabel,
    /// By the close code's name in `device.proto` in lower case, or how it ended without one; a label
    /// of [`CLOSES`].
    pub closed: ByLabel,
    /// Older connections that gave way to a newer one of the same device.
    pub taken_over: Counter,
    /// Handshakes that have begun and not ended.
    pub handshakes_in_progress: Gauge,
    /// How long completed handshakes took.
    pub handshake_duration: Histogram,
}

/// Moved by the sessions.
#[derive(Debug)]
pub struct SessionMetrics {
    /// By kind, a label of [`FRAME_KINDS`].
    pub frames_received: ByLabel,
    /// Pings in each batch that arrived.
    pub batch_size_pings: Histogram,
    /// By admission, a label of [`ADMISSIONS`].
    pub hellos: ByLabel,
    /// Acks handed to the transport.
    pub acks_sent: Counter,
    /// From a batch's receipt to its ack being handed to the transport.
    pub ack_latency: Histogram,
}

/// Moved by the committer.
#[derive(Debug)]
pub struct CommitMetrics {
    /// Batches waiting on the LIVE lane.
    pub queued_live: Gauge,
    /// Batches waiting on the BACKFILL lane.
    pub queued_backfill: Gauge,
    /// How many batches each lane's queue holds at most.
    pub queue_capacity: Gauge,
    /// Commits that are durable.
    pub commits: Counter,
    /// Pings stored by each commit.
    pub size_pings: Histogram,
    /// Bytes of each commit's write.
    pub size_bytes: Histogram,
    /// Batches of devices settled by each commit.
    pub size_batches: Histogram,
    /// From the write's beginning until it was synced.
    pub duration: Histogram,
    /// Devices whose dedup state is held.
    pub known_devices: Gauge,
    /// Sequence numbers that devices gave up before they arrived.
    pub given_up: Counter,
    /// The position of the last durable commit.
    pub position: Gauge,
    /// Times that the disk did not answer for so long that the gateway was no longer ready.
    pub stalls: Counter,
}

/// Moved by the freshness index and its service.
#[derive(Debug)]
pub struct FreshnessMetrics {
    /// Users with a known last sign of life.
    pub users: Gauge,
    /// Open Watch streams.
    pub watchers: Gauge,
    /// Entries sent on Watch streams.
    pub entries_sent: Counter,
    /// Tokens that could not be resumed, by reason, a label of [`RESETS`].
    pub resets: ByLabel,
    /// Checkers that were turned away, by reason, a label of [`REFUSALS`].
    pub refused: ByLabel,
    resolved_ms: AtomicU64,
}

impl FreshnessMetrics {
    /// Notes the moment up to which the freshness stream is complete. The lag is reckoned when it is
    /// read, so a stream that stands still shows a growing one.
    pub fn resolved(&self, resolved_ms: u64) {
        self.resolved_ms.fetch_max(resolved_ms, Ordering::Relaxed);
    }
}

/// Moved by whoever holds devices to their limits.
#[derive(Debug)]
pub struct LimitMetrics {
    /// How often a limit was reached, a label of [`LIMITS`].
    pub reached: ByLabel,
    /// Newcomers that were refused without being told.
    pub ignored: Counter,
    /// Newcomers that were sent a Retry, to prove their address.
    pub address_proofs: Counter,
    /// Addresses that admission remembers.
    pub addresses: Gauge,
    /// Devices whose allowance is remembered.
    pub devices: Gauge,
}

impl LimitMetrics {
    fn register() -> Self {
        Self {
            reached: by_label(
                "waypost_limits_reached_total",
                "How often a limit of devices or of their addresses was reached.",
                "limit",
                &LIMITS,
            ),
            ignored: new_counter(
                "waypost_newcomers_ignored_total",
                "Newcomers over a limit that were not even told so, because too many were.",
            ),
            address_proofs: new_counter(
                "waypost_address_proofs_total",
                "Newcomers that had to prove their address before their handshake began.",
            ),
            addresses: new_gauge(
                "waypost_limited_addresses",
                "Addresses with connections, or with handshakes a moment ago.",
            ),
            devices: new_gauge(
                "waypost_limited_devices",
                "Devices that are connected or have used up a part of their allowance.",
            ),
        }
    }
}

/// What can be too much: newcomers by [`crate::admission`], the rest by [`crate::allowance`].
pub const LIMITS: [&str; 8] = [
    "connections",
    "handshakes",
    "address_handshakes",
    "address_connections",
    "device_connections",
    "device_frames",
    "device_pings",
    "devices",
];

/// Why a peer was refused before it was served: by TLS, by its certificate, or for want of room.
pub const REFUSALS: [&str; 17] = [
    "no_certificate",
    "bad_certificate",
    "unknown_issuer",
    "expired",
    "not_yet_valid",
    "revoked",
    "no_identity",
    "bad_identity",
    "not_a_device",
    "not_a_checker",
    "other_trust_domain",
    "not_allowed",
    "no_shared_protocol",
    "handshake_broken",
    "overloaded",
    "timed_out",
    "shutting_down",
];

/// How a device's connection ended.
pub const CLOSES: [&str; 20] = [
    "no_error",
    "bad_frame",
    "frame_too_large",
    "batch_too_large",
    "hello_expected",
    "lane_in_use",
    "fenced_epoch",
    "taken_over",
    "first_frame_timeout",
    "frame_timeout",
    "bad_identity",
    "revoked",
    "overloaded",
    "shutting_down",
    "storage_failed",
    "not_reading",
    "peer_closed",
    "locally_closed",
    "timed_out",
    "transport_error",
];

/// The kinds of frame that a device sends.
pub const FRAME_KINDS: [&str; 4] = ["hello", "batch", "heartbeat", "control"];

/// What became of a Hello: the epoch went on, a new one was asked for, a new one was needed because the
/// store remembers less than the device was told, or the epoch was an old one.
pub const ADMISSIONS: [&str; 4] = ["resumed", "new_epoch", "lost_acknowledged", "fenced"];

/// Why a Watch began again instead of resuming; as `Reset.Reason` in `freshness.proto`.
pub const RESETS: [&str; 4] = ["other_store", "other_selector", "bad_token", "markers_gone"];

/// Reject codes in the order of [`Fates::rejected`], with their labels.
pub const REJECTS: [(RejectCode, &str); 9] = [
    (RejectCode::BadCoordinates, "bad_coordinates"),
    (RejectCode::TimeInFuture, "time_in_future"),
    (RejectCode::TooOld, "too_old"),
    (RejectCode::Schema, "schema"),
    (RejectCode::Paused, "paused"),
    (RejectCode::Erased, "erased"),
    (RejectCode::RateLimited, "rate_limited"),
    (RejectCode::Overloaded, "overloaded"),
    (RejectCode::TooSparse, "too_sparse"),
];

/// What became of pings that were received. The four fates always add up to what was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fates {
    /// Stored.
    pub accepted: u64,
    /// Settled before.
    pub duplicate: u64,
    /// Left out by the thinning rule.
    pub filtered: u64,
    /// Refused, by code in the order of [`REJECTS`]; counted with [`Fates::reject`].
    pub rejected: [u64; REJECTS.len()],
}

impl Fates {
    /// Counts `pings` more that were refused with `code`.
    pub fn reject(&mut self, code: RejectCode, pings: u64) {
        // CODE_UNSPECIFIED is never sent; were it counted here, it would be a broken schema.
        let at = REJECTS
            .iter()
            .position(|(known, _)| *known == code)
            .unwrap_or(SCHEMA_AT);
        self.rejected[at] += pings;
    }

    /// How many were refused, whatever the code.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected.iter().sum()
    }

    /// How many there were.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.accepted + self.duplicate + self.filtered + self.rejected()
    }

    fn add(&mut self, more: &Self) {
        self.accepted += more.accepted;
        self.duplicate += more.duplicate;
        self.filtered += more.filtered;
        for (total, more) in self.rejected.iter_mut().zip(more.rejected) {
            *total += more;
        }
    }
}

const SCHEMA_AT: usize = 3;
const _: () = assert!(matches!(REJECTS[SCHEMA_AT].0, RejectCode::Schema));

/// What the store says of itself, read about once a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreFigures {
    /// Bytes on disk, the log included.
    pub size_bytes: u64,
    /// Whether RocksDB has stopped writes.
    pub write_stopped: bool,
    /// The rate that RocksDB has slowed writes to; 0 when it has not.
    pub delayed_write_bytes_per_second: u64,
    /// Bytes that compaction has yet to rewrite.
    pub pending_compaction_bytes: u64,
    /// Memtables that wait to be flushed.
    pub immutable_memtables: u64,
    /// Errors of background work since the store was opened.
    pub background_errors: u64,
    /// Syncs of the write-ahead log since the store was opened.
    pub wal_syncs: u64,
    /// The time they took together.
    pub wal_sync_time: Duration,
}

/// What the watch over the disk sees, told some times a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFigures {
    /// Bytes that are free.
    pub free_bytes: u64,
    /// Bytes that must stay free.
    pub floor_bytes: u64,
    /// Whether new pings are put off because there is too little.
    pub is_refusing: bool,
    /// How long the disk has kept somebody waiting; 0 when nobody waits.
    pub waited: Duration,
}

/// A counter for each value of a label.
#[derive(Debug)]
pub struct ByLabel {
    known: Vec<(&'static str, Counter)>,
    other: Counter,
}

impl ByLabel {
    /// The counter of one value. A value that is not in the metric's list counts as `other`, so that
    /// nothing goes uncounted and no peer can invent series.
    pub fn of(&self, value: &str) -> &Counter {
        self.known
            .iter()
            .find(|(known, _)| *known == value)
            .map_or(&self.other, |(_, counter)| counter)
    }
}

struct Inner {
    handles: Handles,
    /// Changed once per commit; read by whoever renders.
    fates: Mutex<Fates>,
    store: Mutex<StoreFigures>,
    disk: Mutex<DiskFigures>,
    /// Rendering copies the figures to their handles and reads them back: one at a time.
    page: Mutex<Page>,
}

/// What only a render touches.
struct Page {
    exporter: PrometheusHandle,
    fates: FateMetrics,
    store: StoreMetrics,
    disk: DiskMetrics,
    lag: Gauge,
    started_ms: u64,
}

struct FateMetrics {
    accepted: Counter,
    duplicate: Counter,
    filtered: Counter,
    rejected: Counter,
    received: Counter,
    rejected_by_code: [Counter; REJECTS.len()],
}

struct StoreMetrics {
    size: Gauge,
    write_stopped: Gauge,
    delayed_write: Gauge,
    pending_compaction: Gauge,
    immutable_memtables: Gauge,
    background_errors: Counter,
}

struct DiskMetrics {
    free: Gauge,
    floor: Gauge,
    refusing: Gauge,
    waited: Gauge,
}

impl Metrics {
    /// Metrics that all stand at 0.
    #[must_use]
    pub fn new() -> Self {
        let recorder = exporter_settings().build_recorder();
        let (handles, fates, store, disk, lag) = with_local_recorder(&recorder, || {
            let version = env!("CARGO_PKG_VERSION");
            describe_gauge!(
                "waypost_build_info",
                "Always 1; the labels say what is running."
            );
            gauge!("waypost_build_info", "version" => version).set(1.0);
            let lag = new_gauge(
                "waypost_freshness_lag_seconds",
                "How far the moment up to which the freshness stream is complete lies behind now.",
            );
            (
                Handles::register(),
                FateMetrics::register(),
                StoreMetrics::register(),
                DiskMetrics::register(),
                lag,
            )
        });
        let page = Page {
            exporter: recorder.handle(),
            fates,
            store,
            disk,
            lag,
            started_ms: system_now_ms(),
        };
        let inner = Inner {
            handles,
            fates: Mutex::default(),
            store: Mutex::default(),
            disk: Mutex::default(),
            page: Mutex::new(page),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Counts what became of a commit's pings, all of them in one step, so that a scrape finds either
    /// all or none. Pings that are refused before they reach the committer are counted the same way.
    pub fn settled(&self, fates: &Fates) {
        self.inner.fates.lock().add(fates);
    }

    /// What became of all pings so far.
    #[must_use]
    pub fn fates(&self) -> Fates {
        *self.inner.fates.lock()
    }

    /// Takes the store's latest figures.
    pub fn store(&self, figures: StoreFigures) {
        *self.inner.store.lock() = figures;
    }

    /// Takes the latest figures of the disk.
    pub fn disk(&self, figures: DiskFigures) {
        *self.inner.disk.lock() = figures;
    }

    /// All metrics as Prometheus reads them: text format 0.0.4, in alphabetical order.
    ///
    /// What histograms observe takes memory until it is moved to their buckets here, so this is called
    /// every second or so, whether or not anybody scrapes: [`crate::admin`] sees to it.
    #[must_use]
    pub fn render(&self) -> String {
        let page = self.inner.page.lock();
        page.fates.show(&self.fates());
        let store = *self.inner.store.lock();
        page.store.show(&store);
        page.disk.show(&self.inner.disk.lock());
        let now_ms = system_now_ms();
        let resolved_ms = self
            .inner
            .handles
            .freshness
            .resolved_ms
            .load(Ordering::Relaxed);
        if resolved_ms != 0 {
            page.lag.set(seconds(now_ms.saturating_sub(resolved_ms)));
        }

        let mut text = page.exporter.render();
        write_sync_time(&mut text, &store);
        write_process(&mut text, page.started_ms);
        in_order(&text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Metrics {
    type Target = Handles;

    fn deref(&self) -> &Handles {
        &self.inner.handles
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Metrics")
            .field("fates", &self.fates())
            .finish_non_exhaustive()
    }
}

impl Handles {
    fn register() -> Self {
        let queue_help = "Batches that wait for the committer.";
        Self {
            connections: ConnectionMetrics {
                open: new_gauge("waypost_connections", "Open connections with devices."),
                accepted: new_counter(
                    "waypost_connections_accepted_total",
                    "Connections whose device proved who it is and was let in.",
                ),
                refused: by_label(
                    "waypost_connections_refused_total",
                    "Connections refused before they were served.",
                    "reason",
                    &REFUSALS,
                ),
                closed: by_label(
                    "waypost_connections_closed_total",
                    "Connections that ended, by close code or by how they ended without one.",
                    "code",
                    &CLOSES,
                ),
                taken_over: new_counter(
                    "waypost_connections_taken_over_total",
                    "Connections that gave way to a newer one of the same device.",
                ),
                handshakes_in_progress: new_gauge(
                    "waypost_handshakes_in_progress",
                    "Handshakes that have begun and not ended.",
                ),
                handshake_duration: new_histogram(
                    "waypost_handshake_duration_seconds",
                    "How long completed handshakes took.",
                ),
            },
            sessions: SessionMetrics {
                frames_received: by_label(
                    "waypost_frames_received_total",
                    "Frames read from devices.",
                    "kind",
                    &FRAME_KINDS,
                ),
                batch_size_pings: new_histogram(
                    "waypost_batch_size_pings",
                    "Pings in each batch that arrived.",
                ),
                hellos: by_label(
                    "waypost_hellos_total",
                    "Hellos answered, by what became of the device's epoch.",
                    "admission",
                    &ADMISSIONS,
                ),
                acks_sent: new_counter("waypost_acks_sent_total", "Acks handed to the transport."),
                ack_latency: new_histogram(
                    "waypost_ack_latency_seconds",
                    "From a batch's receipt to its ack being handed to the transport.",
                ),
            },
            commits: CommitMetrics {
                queued_live: labelled_gauge(
                    "waypost_commit_queue_batches",
                    queue_help,
                    "lane",
                    "live",
                ),
                queued_backfill: labelled_gauge(
                    "waypost_commit_queue_batches",
                    queue_help,
                    "lane",
                    "backfill",
                ),
                queue_capacity: new_gauge(
                    "waypost_commit_queue_capacity_batches",
                    "How many batches may wait on each lane before sessions wait.",
                ),
                commits: new_counter("waypost_commits_total", "Commits that are durable."),
                size_pings: new_histogram(
                    "waypost_commit_size_pings",
                    "Pings stored by each commit.",
                ),
                size_bytes: new_histogram(
                    "waypost_commit_size_bytes",
                    "Bytes written by each commit.",
                ),
                size_batches: new_histogram(
                    "waypost_commit_size_batches",
                    "Batches of devices settled by each commit.",
                ),
                duration: new_histogram(
                    "waypost_commit_duration_seconds",
                    "From a commit's write until it was on disk.",
                ),
                known_devices: new_gauge(
                    "waypost_known_devices",
                    "Devices whose dedup state is held in memory.",
                ),
                given_up: new_counter(
                    "waypost_pings_given_up_total",
                    "Sequence numbers that devices gave up before they arrived: recorded gaps.",
                ),
                position: new_gauge("waypost_position", "Position of the last durable commit."),
                stalls: new_counter(
                    "waypost_disk_stalls_total",
                    "Times that the disk did not answer for 5 s, and the gateway was not ready.",
                ),
            },
            freshness: FreshnessMetrics {
                users: new_gauge(
                    "waypost_freshness_users",
                    "Users with a known last sign of life.",
                ),
                watchers: new_gauge("waypost_freshness_watchers", "Open Watch streams."),
                entries_sent: new_counter(
                    "waypost_freshness_entries_sent_total",
                    "Entries sent on Watch streams.",
                ),
                resets: by_label(
                    "waypost_freshness_resets_total",
                    "Watch streams that began again because their token could not be resumed.",
                    "reason",
                    &RESETS,
                ),
                refused: by_label(
                    "waypost_freshness_refused_checkers_total",
                    "Checkers that were turned away.",
                    "reason",
                    &REFUSALS,
                ),
                resolved_ms: AtomicU64::new(0),
            },
            limits: LimitMetrics::register(),
            resumption: ResumptionMetrics::register(),
        }
    }
}

impl FateMetrics {
    fn register() -> Self {
        let fate = |fate| {
            labelled_counter(
                "waypost_pings_total",
                "Pings by what became of them. The fates add up to waypost_pings_received_total.",
                "fate",
                fate,
            )
        };
        Self {
            accepted: fate("accepted"),
            duplicate: fate("duplicate"),
            filtered: fate("filtered"),
            rejected: fate("rejected"),
            received: new_counter(
                "waypost_pings_received_total",
                "Pings received from devices whose fate is settled.",
            ),
            rejected_by_code: REJECTS.map(|(_, label)| {
                labelled_counter(
                    "waypost_pings_rejected_total",
                    "Pings refused, by reject code. The codes add up to the fate 'rejected'.",
                    "code",
                    label,
                )
            }),
        }
    }

    fn show(&self, fates: &Fates) {
        self.accepted.absolute(fates.accepted);
        self.duplicate.absolute(fates.duplicate);
        self.filtered.absolute(fates.filtered);
        self.rejected.absolute(fates.rejected());
        self.received.absolute(fates.received());
        for (counter, pings) in self.rejected_by_code.iter().zip(fates.rejected) {
            counter.absolute(pings);
        }
    }
}

impl StoreMetrics {
    fn register() -> Self {
        Self {
            size: new_gauge(
                "waypost_store_size_bytes",
                "Bytes on disk, the write-ahead log included.",
            ),
            write_stopped: new_gauge(
                "waypost_store_write_stopped",
                "1 while RocksDB has stopped writes until compaction or flushing catches up.",
            ),
            delayed_write: new_gauge(
                "waypost_store_delayed_write_bytes_per_second",
                "The rate that RocksDB has slowed writes to; 0 while it has not.",
            ),
            pending_compaction: new_gauge(
                "waypost_store_pending_compaction_bytes",
                "Bytes that compaction has yet to rewrite.",
            ),
            immutable_memtables: new_gauge(
                "waypost_store_immutable_memtables",
                "Memtables that wait to be flushed.",
            ),
            background_errors: new_counter(
                "waypost_store_background_errors_total",
                "Errors of RocksDB's background work since the start.",
            ),
        }
    }

    fn show(&self, figures: &StoreFigures) {
        self.size.set(approximate(figures.size_bytes));
        self.write_stopped
            .set(if figures.write_stopped { 1.0 } else { 0.0 });
        self.delayed_write
            .set(approximate(figures.delayed_write_bytes_per_second));
        self.pending_compaction
            .set(approximate(figures.pending_compaction_bytes));
        self.immutable_memtables
            .set(approximate(figures.immutable_memtables));
        self.background_errors.absolute(figures.background_errors);
    }
}

impl DiskMetrics {
    fn register() -> Self {
        Self {
            free: new_gauge(
                "waypost_disk_free_bytes",
                "Bytes free on the store's file system.",
            ),
            floor: new_gauge(
                "waypost_disk_floor_bytes",
                "Bytes that must stay free: store.free_space_floor_mib.",
            ),
            refusing: new_gauge(
                "waypost_disk_refusing",
                "1 while new pings are put off because the disk is nearly full.",
            ),
            waited: new_gauge(
                "waypost_disk_waited_seconds",
                "How long the disk has kept a commit waiting by now; 0 while none waits.",
            ),
        }
    }

    fn show(&self, figures: &DiskFigures) {
        self.free.set(approximate(figures.free_bytes));
        self.floor.set(approximate(figures.floor_bytes));
        self.refusing
            .set(if figures.is_refusing { 1.0 } else { 0.0 });
        self.waited.set(figures.waited.as_secs_f64());
    }
}

fn new_counter(name: &'static str, help: &'static str) -> Counter {
    describe_counter!(name, help);
    counter!(name)
}

fn labelled_counter(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    value: &'static str,
) -> Counter {
    describe_counter!(name, help);
    counter!(name, label => value)
}

fn by_label(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: &[&'static str],
) -> ByLabel {
    let counter_of = |value| labelled_counter(name, help, label, value);
    ByLabel {
        known: values
            .iter()
            .map(|value| (*value, counter_of(value)))
            .collect(),
        other: counter_of("other"),
    }
}

fn new_gauge(name: &'static str, help: &'static str) -> Gauge {
    describe_gauge!(name, help);
    gauge!(name)
}

fn labelled_gauge(
    name: &'static str,
    help: &'static str,
    label: &'static str,
    value: &'static str,
) -> Gauge {
    describe_gauge!(name, help);
    gauge!(name, label => value)
}

fn new_histogram(name: &'static str, help: &'static str) -> Histogram {
    describe_histogram!(name, help);
    histogram!(name)
}

fn exporter_settings() -> PrometheusBuilder {
    let counts = &COUNT_BUCKETS[..];
    let by_unit = [
        ("_seconds", &SECONDS_BUCKETS[..]),
        ("_bytes", &BYTES_BUCKETS[..]),
        ("_pings", counts),
        ("_batches", counts),
    ];
    by_unit
        .into_iter()
        .fold(PrometheusBuilder::new(), |builder, (unit, buckets)| {
            builder
                .set_buckets_for_metric(Matcher::Suffix(unit.to_owned()), buckets)
                .expect("only an empty list of buckets is refused")
        })
}

/// The store counts its syncs itself, so they come as a total time and a number, not in buckets.
fn write_sync_time(text: &mut String, store: &StoreFigures) {
    let name = "waypost_wal_sync_seconds";
    let help = "Syncs of the write-ahead log since the start, and the time they took together.";
    write_family(
        text,
        name,
        "summary",
        help,
        &[
            ("_sum", store.wal_sync_time.as_secs_f64().to_string()),
            ("_count", store.wal_syncs.to_string()),
        ],
    );
}

/// The process as the operating system sees it. What it does not tell is left out.
fn write_process(text: &mut String, started_ms: u64) {
    let mut write = |name, kind, help, value: Option<f64>| {
        if let Some(value) = value {
            write_family(text, name, kind, help, &[("", value.to_string())]);
        }
    };
    write(
        "process_start_time_seconds",
        "gauge",
        "When the process started, in seconds since 1970-01-01 UTC.",
        Some(seconds(started_ms)),
    );
    write(
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the process that is in RAM.",
        resident_memory_bytes().map(approximate),
    );
    write(
        "process_cpu_seconds_total",
        "counter",
        "User and system CPU time of the process.",
        cpu_seconds(),
    );
    write(
        "process_open_fds",
        "gauge",
        "Open file descriptors of the process.",
        open_file_descriptors().map(approximate),
    );
}

fn write_family(text: &mut String, name: &str, kind: &str, help: &str, lines: &[(&str, String)]) {
    let mut family = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (suffix, value) in lines {
        writeln!(family, "{name}{suffix} {value}").expect("a String takes every write");
    }
    text.push_str(&family);
    text.push('\n');
}

/// Families and their series in alphabetical order; the exporter's own order changes from scrape to
/// scrape. The buckets of a histogram stay in their order.
fn in_order(text: &str) -> String {
    let mut families: Vec<&str> = text
        .split("\n\n")
        .map(str::trim)
        .filter(|f| !f.is_empty())
        .collect();
    families.sort_unstable();
    let mut ordered = String::with_capacity(text.len());
    for family in families {
        let (head, mut series): (Vec<_>, Vec<_>) =
            family.lines().partition(|line| line.starts_with('#'));
        if !family.contains("_bucket{") {
            series.sort_unstable();
        }
        for line in head.into_iter().chain(series) {
            ordered.push_str(line);
            ordered.push('\n');
        }
        ordered.push('\n');
    }
    ordered
}

fn resident_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib * 1024)
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the command in brackets, and may hold blanks and brackets itself.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(approximate(user + system) / CLOCK_TICKS_PER_SECOND)
}

fn open_file_descriptors() -> Option<u64> {
    // One of them is the folder being read.
    std::fs::read_dir("/proc/self/fd")
        .ok()?
        .count()
        .checked_sub(1)?
        .try_into()
        .ok()
}

fn seconds(ms: u64) -> f64 {
    approximate(ms) / 1_000.0
}

/// As a float: exact up to 2^53, and Prometheus knows only floats.
fn approximate(value: u64) -> f64 {
    value as f64
}

/// The unit of times in /proc on every Linux that Rust has a tier 1 or 2 target for.
const CLOCK_TICKS_PER_SECOND: f64 = 100.0;

/// From a write to page cache or loopback up to a stall that people notice.
const SECONDS_BUCKETS: [f64; 17] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];

/// From one small row to the largest commit.
const BYTES_BUCKETS: [f64; 10] = [
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// From a lone ping to a full commit of full batches.
const COUNT_BUCKETS: [f64; 16] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];

#[cfg(test)]
mod tests {
    use std::{
        collections::{HashMap, HashSet},
        sync::atomic::AtomicBool,
        thread,
    };

    use waypost_proto::{device::Admission, session::CloseCode};

    use super::*;
    use crate::tls::Refusal;

    /// Every series of a rendered page: name with labels, value.
    fn series(page: &str) -> HashMap<String, f64> {
        page.lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
            .collect()
    }

    fn sum(page: &HashMap<String, f64>, family: &str) -> f64 {
        let matching = |name: &str| name == family || name.starts_with(&format!("{family}{{"));
        page.iter()
            .filter(|(name, _)| matching(name))
            .map(|(_, value)| value)
            .sum()
    }

    fn some_of_each() -> Fates {
        let mut fates = Fates {
            accepted: 5,
            duplicate: 3,
            filtered: 2,
            ..Fates::default()
        };
        for (code, _) in REJECTS {
            fates.reject(code, 1);
        }
        fates
    }

    #[test]
    fn every_family_is_described_and_named_by_the_rules() {
        let page = Metrics::new().render();
        let mut kinds = HashMap::new();
        let mut helps = HashSet::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(
                    kinds.insert(name, kind).is_none(),
                    "{name} has two TYPE lines"
                );
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(
                    help.ends_with('.'),
                    "the help of {name} is no sentence: {help}"
                );
                assert!(helps.insert(name), "{name} has two HELP lines");
            }
        }
        for (name, kind) in &kinds {
            assert!(helps.contains(name), "{name} has no HELP");
            assert!(
                name.starts_with("waypost_") || name.starts_with("process_"),
                "{name}"
            );
            assert_eq!(
                *kind == "counter",
                name.ends_with("_total"),
                "{name} is a {kind}"
            );
            for scaled in ["_ms", "_milliseconds", "_kb", "_mb", "_percent"] {
                assert!(!name.ends_with(scaled), "{name} is not in a base unit");
            }
        }
        for name in series(&page).keys() {
            let name = name.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .filter(|family| matches!(kinds.get(family), Some(&"histogram" | &"summary")))
                .unwrap_or(name);
            assert!(kinds.contains_key(family), "{name} has no TYPE");
        }
        assert!(kinds.len() > 40, "only {} families", kinds.len());
    }

    #[test]
    fn every_series_exists_from_the_start_with_zero() {
        let page = series(&Metrics::new().render());
        for (name, value) in &page {
            if !name.starts_with("process_") && !name.starts_with("waypost_build_info") {
                assert_eq!(*value, 0.0, "{name}");
            }
        }
        for expected in [
            r#"waypost_pings_total{fate="filtered"}"#,
            r#"waypost_pings_rejected_total{code="too_sparse"}"#,
            r#"waypost_connections_refused_total{reason="unknown_issuer"}"#,
            r#"waypost_connections_closed_total{code="fenced_epoch"}"#,
            r#"waypost_commit_queue_batches{lane="backfill"}"#,
            r#"waypost_ack_latency_seconds_bucket{le="0.0025"}"#,
            "waypost_wal_sync_seconds_count",
            "waypost_commit_size_bytes_count",
        ] {
            assert!(page.contains_key(expected), "{expected} is missing");
        }
    }

    #[test]
    fn fates_add_up_at_every_scrape() {
        let metrics = Metrics::new();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    metrics.settled(&some_of_each());
                }
            });
            for _ in 0..200 {
                let page = series(&metrics.render());
                let received = page["waypost_pings_received_total"];
                assert_eq!(sum(&page, "waypost_pings_total"), received);
                assert_eq!(
                    sum(&page, "waypost_pings_rejected_total"),
                    page[r#"waypost_pings_total{fate="rejected"}"#],
                );
            }
            done.store(true, Ordering::Relaxed);
        });
        let page = series(&metrics.render());
        assert!(0.0 < page["waypost_pings_received_total"]);
        assert_eq!(
            page["waypost_pings_received_total"],
            approximate(metrics.fates().received())
        );
    }

    /// The control for the test above: counters moved one by one do not add up at every scrape.
    #[test]
    fn counters_moved_one_by_one_would_not_add_up() {
        let metrics = Metrics::new();
        let done = AtomicBool::new(false);
        let torn = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    metrics.sessions.frames_received.of("hello").increment(1);
                    metrics.sessions.acks_sent.increment(1);
                }
            });
            let torn = (0..10_000).any(|_| {
                let page = series(&metrics.render());
                page[r#"waypost_frames_received_total{kind="hello"}"#]
                    != page["waypost_acks_sent_total"]
            });
            done.store(true, Ordering::Relaxed);
            torn
        });
        assert!(torn, "the test above would pass without its protection");
    }

    #[test]
    fn every_close_code_refusal_and_admission_has_a_series_of_its_own() {
        for code in (0..=u8::MAX).filter_map(|number| CloseCode::from_number(number.into())) {
            assert!(CLOSES.contains(&code.as_label()), "{code:?}");
        }
        for refusal in [
            Refusal::NoCertificate,
            Refusal::UnknownAuthority,
            Refusal::Expired,
            Refusal::NotYetValid,
            Refusal::BadCertificate,
            Refusal::NoSharedProtocol,
            Refusal::NoUri,
            Refusal::OtherTrustDomain,
            Refusal::NotAnIdentity,
            Refusal::NotADevice,
            Refusal::NotAChecker,
        ] {
            assert!(REFUSALS.contains(&refusal.as_label()), "{refusal:?}");
        }
        for admission in [
            Admission::Resumed,
            Admission::NewEpoch,
            Admission::LostAcknowledged,
            Admission::Fenced,
        ] {
            assert!(ADMISSIONS.contains(&admission.as_label()), "{admission:?}");
        }
    }

    #[test]
    fn an_unlisted_label_counts_as_other() {
        let metrics = Metrics::new();
        metrics.connections.refused.of("made up").increment(1);
        let page = series(&metrics.render());
        assert_eq!(
            page[r#"waypost_connections_refused_total{reason="other"}"#],
            1.0
        );
    }

    #[test]
    fn the_lag_grows_while_the_stream_stands_still() {
        let metrics = Metrics::new();
        metrics.freshness.resolved(system_now_ms() - 60_000);
        assert!(60.0 <= series(&metrics.render())["waypost_freshness_lag_seconds"]);
    }

    #[test]
    fn figures_of_the_store_are_shown_as_they_are() {
        let metrics = Metrics::new();
        metrics.store(StoreFigures {
            size_bytes: 4_096,
            write_stopped: true,
            wal_syncs: 4,
            wal_sync_time: Duration::from_millis(10),
            background_errors: 2,
            ..StoreFigures::default()
        });
        let page = series(&metrics.render());
        assert_eq!(page["waypost_store_size_bytes"], 4_096.0);
        assert_eq!(page["waypost_store_write_stopped"], 1.0);
        assert_eq!(page["waypost_store_background_errors_total"], 2.0);
        assert_eq!(page["waypost_wal_sync_seconds_count"], 4.0);
        assert_eq!(page["waypost_wal_sync_seconds_sum"], 0.01);
    }

    #[test]
    fn figures_of_the_disk_are_shown_as_they_are() {
        let metrics = Metrics::new();
        metrics.disk(DiskFigures {
            free_bytes: 100,
            floor_bytes: 200,
            is_refusing: true,
            waited: Duration::from_millis(1_500),
        });
        let page = series(&metrics.render());
        assert_eq!(page["waypost_disk_free_bytes"], 100.0);
        assert_eq!(page["waypost_disk_floor_bytes"], 200.0);
        assert_eq!(page["waypost_disk_refusing"], 1.0);
        assert_eq!(page["waypost_disk_waited_seconds"], 1.5);
    }

    #[test]
    fn observations_stay_in_their_buckets_from_scrape_to_scrape() {
        let metrics = Metrics::new();
        metrics.commits.duration.record(Duration::from_millis(2));
        assert!(
            metrics
                .render()
                .contains("waypost_commit_duration_seconds_count 1\n")
        );
        metrics.commits.duration.record(Duration::from_millis(2));
        let page = series(&metrics.render());
        assert_eq!(
            page[r#"waypost_commit_duration_seconds_bucket{le="0.001"}"#],
            0.0
        );
        assert_eq!(
            page[r#"waypost_commit_duration_seconds_bucket{le="0.0025"}"#],
            2.0
        );
        assert_eq!(page["waypost_commit_duration_seconds_count"], 2.0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_is_measured() {
        let page = series(&Metrics::new().render());
        for name in [
            "process_resident_memory_bytes",
            "process_open_fds",
            "process_start_time_seconds",
        ] {
            assert!(0.0 < page[name], "{name}");
        }
        assert!(page.contains_key("process_cpu_seconds_total"));
    }
}
