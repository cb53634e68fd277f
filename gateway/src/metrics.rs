//! Every metric of the gateway: its name, unit, help and labels, and the handle that changes it.
//!
//! Knows metric names; nothing else does. Must not know what its numbers lead to: no decision is made
//! on a metric. There is no global recorder, so several gateways can run in one process.
//!
//! Names begin with `waypost_`, save for the `process_` ones that every Prometheus dashboard knows.
//! Units are base units and end the name; counters end in `_total`. Every series exists from the start
//! with 0, so that a dashboard can tell "never happened" from "not measured".
//!
//! # Where a metric is
//!
//! Beside its handle, in the file of its subject:
//!
//! - `connections`: devices let in, refused, gone.
//! - `resumption`: how connections begin, and the TLS sessions that they begin from.
//! - `limits`: which limits were reached, and what is remembered for them.
//! - `sessions`: frames, Hellos and acks.
//! - `fates`: what became of pings.
//! - `commits`: the committer's queues, its commits, and how often the disk stalled them.
//! - `store` and `disk`: what the store says of itself; room, and whether the disk answers.
//! - `freshness`: users, those who watch them, and the lag.
//! - `enrolment`: who was invited, who has come, who was turned away.
//! - `trust`: who is revoked, and certificate files that were read again.
//! - `vigil`: when the gateway could not hear, and who is late by a deadline.
//! - `process`: what the system says of the process.
//!
//! `waypost_build_info` is here. `series` makes what those files name, `text` is what Prometheus reads, and
//! [`snapshot`] has the same as numbers for people.

mod audit;
mod commits;
mod connections;
mod disk;
mod enrolment;
mod erasures;
mod exports;
mod fates;
mod freshness;
mod limits;
mod operator;
mod process;
mod resumption;
mod series;
mod sessions;
pub mod snapshot;
mod store;
mod text;
mod trust;
mod vigil;

use std::{ops::Deref, sync::Arc};

use metrics::with_local_recorder;
use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;

use self::{
    disk::DiskMetrics,
    fates::FateMetrics,
    freshness::LagMetrics,
    process::write_process,
    series::labelled_gauge,
    store::{StoreMetrics, write_sync_time},
    text::{exporter_settings, in_order},
};
use crate::clock::system_now_ms;

pub use self::{
    audit::AuditMetrics,
    commits::CommitMetrics,
    connections::{CLOSES, ConnectionMetrics, REFUSALS},
    disk::DiskFigures,
    enrolment::{ENROLMENTS, EnrolmentMetrics, INVITATIONS},
    erasures::ErasureMetrics,
    exports::ExportMetrics,
    fates::{Fates, REJECTS},
    freshness::{FreshnessMetrics, RESETS, TURNS},
    limits::{LIMITS, LimitMetrics},
    operator::OperatorMetrics,
    resumption::{DROPS, HANDSHAKES, ResumptionMetrics},
    series::ByLabel,
    sessions::{ADMISSIONS, FRAME_KINDS, SessionMetrics},
    store::StoreFigures,
    trust::{RELOADS, TrustMetrics},
    vigil::{BLINDNESSES, DEADLINE_EVENTS, VigilMetrics},
};

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
    pub trust: TrustMetrics,
    pub vigil: VigilMetrics,
    pub enrolment: EnrolmentMetrics,
    pub audit: AuditMetrics,
    pub erasures: ErasureMetrics,
    pub exports: ExportMetrics,
    pub operator: OperatorMetrics,
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
    lag: LagMetrics,
    started_ms: u64,
}

impl Metrics {
    /// Metrics that all stand at 0.
    #[must_use]
    pub fn new() -> Self {
        let recorder = exporter_settings().build_recorder();
        let (handles, fates, store, disk, lag) = with_local_recorder(&recorder, || {
            labelled_gauge(
                "waypost_build_info",
                "Always 1; the labels say what is running.",
                "version",
                env!("CARGO_PKG_VERSION"),
            )
            .set(1.0);
            (
                Handles::register(),
                FateMetrics::register(),
                StoreMetrics::register(),
                DiskMetrics::register(),
                LagMetrics::register(),
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
        page.lag
            .show(&self.inner.handles.freshness, system_now_ms());

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
        Self {
            connections: ConnectionMetrics::register(),
            sessions: SessionMetrics::register(),
            commits: CommitMetrics::register(),
            freshness: FreshnessMetrics::register(),
            limits: LimitMetrics::register(),
            resumption: ResumptionMetrics::register(),
            trust: TrustMetrics::register(),
            vigil: VigilMetrics::register(),
            enrolment: EnrolmentMetrics::register(),
            audit: AuditMetrics::register(),
            erasures: ErasureMetrics::register(),
            exports: ExportMetrics::register(),
            operator: OperatorMetrics::register(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use waypost_proto::{device::Admission, session::CloseCode};

    use super::*;
    use crate::tls::Refusal;

    /// Every series of a rendered page: name with labels, value.
    pub(super) fn series(page: &str) -> HashMap<String, f64> {
        page.lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
            .collect()
    }

    pub(super) fn sum(page: &HashMap<String, f64>, family: &str) -> f64 {
        let matching = |name: &str| name == family || name.starts_with(&format!("{family}{{"));
        page.iter()
            .filter(|(name, _)| matching(name))
            .map(|(_, value)| value)
            .sum()
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
    fn every_close_code_refusal_and_admission_has_a_series_of_its_own() {
        for code in (0..=u8::MAX).filter_map(|number| CloseCode::from_number(number.into())) {
            assert!(CLOSES.contains(&code.as_label()), "{code:?}");
        }
        for refusal in [
            Refusal::NoCertificate,
            Refusal::UnknownAuthority,
            Refusal::Expired,
            Refusal::NotYetValid,
            Refusal::Revoked,
            Refusal::BadCertificate,
            Refusal::NoSharedProtocol,
            Refusal::NoUri,
            Refusal::OtherTrustDomain,
            Refusal::NotAnIdentity,
            Refusal::NotADevice,
            Refusal::NotAChecker,
            Refusal::NotAnOperator,
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
}
