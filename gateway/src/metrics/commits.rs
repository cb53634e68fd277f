//! Metrics of the committer: what waits for it, and what a commit holds and takes.
//!
//! Knows their names. Must not know how a commit is made.

use metrics::{Counter, Gauge, Histogram};

use super::series::{labelled_gauge, new_counter, new_gauge, new_histogram};

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

impl CommitMetrics {
    pub(super) fn register() -> Self {
        let queue_help = "Batches that wait for the committer.";
        Self {
            queued_live: labelled_gauge("waypost_commit_queue_batches", queue_help, "lane", "live"),
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
            size_pings: new_histogram("waypost_commit_size_pings", "Pings stored by each commit."),
            size_bytes: new_histogram("waypost_commit_size_bytes", "Bytes written by each commit."),
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
        }
    }
}
