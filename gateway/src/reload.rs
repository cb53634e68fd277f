//! Certificates and revocation lists that change while the gateway runs: they are taken into use, and nobody who may
//! stay is disturbed.
//!
//! Knows who uses what is in the files. Must not know the files, nor QUIC's streams or gRPC's.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{
    enrol::EnrolmentReload,
    session::SessionParts,
    tls::{Loaded, TlsFiles},
    transport,
    worker::{DevicesConfig, WorkerError},
};

/// Who uses what is in the files.
#[derive(Debug)]
pub(crate) struct Reload {
    pub(crate) files: TlsFiles,
    /// What QUIC's settings are made of, beside TLS'.
    pub(crate) config: DevicesConfig,
    pub(crate) secret: [u8; 32],
    /// The endpoints of all workers.
    pub(crate) devices: watch::Sender<Option<quinn::ServerConfig>>,
    /// The freshness service.
    pub(crate) checkers: watch::Sender<Arc<rustls::ServerConfig>>,
    /// Those who enrol, where anybody can.
    pub(crate) enrolment: Option<Arc<EnrolmentReload>>,
    pub(crate) sessions: Arc<SessionParts>,
}

impl Reload {
    /// Looks for changes until cancelled.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut ticks = interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let (mut files, enrolment) = (self.files, self.enrolment.clone());
            // A disk may hang, and a long list takes its time.
            let looking = spawn_blocking(move || {
                let reloaded = files.reload();
                let enrolment = match (&reloaded, enrolment) {
                    (Ok(Some(loaded)), Some(enrolment)) => {
                        enrolment.read(&loaded.devices.check).transpose()
                    }
                    _ => None,
                };
                (files, reloaded, enrolment)
            });
            let looked = tokio::select! {
                () = cancel.cancelled() => return,
                looked = looking => looked,
            };
            let (reloaded, enrolment) = match looked {
                Ok((files, reloaded, enrolment)) => {
                    self.files = files;
                    (reloaded, enrolment)
                }
                Err(error) => {
                    error!(%error, "the certificate files cannot be looked at any more");
                    return;
                }
            };
            let used = match reloaded {
                Ok(None) => continue,
                Ok(Some(loaded)) => self
                    .take_into_use(loaded)
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            // Who is connected or revoked does not wait for those who enrol, nor for an authority that cannot be used.
            let enrolled = match (&used, enrolment, &self.enrolment) {
                (Ok(()), Some(Ok(changed)), Some(enrolment)) => {
                    enrolment.take_into_use(changed);
                    Ok(())
                }
                (Ok(()), Some(Err(error)), _) => Err(error),
                _ => Ok(()),
            };
            let reloads = &self.sessions.metrics.trust.reloads;
            match used {
                Ok(()) => reloads.of("used").increment(1),
                Err(error) => {
                    reloads.of("failed").increment(1);
                    error!(%error, "changed certificate files cannot be used; those before stay in use");
                }
            }
            if let Err(error) = enrolled {
                reloads.of("failed").increment(1);
                error!(%error, "changed certificate files cannot be used for enrolment, where those before stay in use");
            }
        }
    }

    /// For newcomers first, then for those who are connected: whoever comes in between is checked by the new lists.
    fn take_into_use(&self, loaded: Loaded) -> Result<(), WorkerError> {
        let tls = loaded.devices.server;
        let server = transport::server_config(&self.config, tls, &self.secret)?;
        self.devices.send_replace(Some(server));
        let sessions = &self.sessions;
        *sessions.restored_check.write() = loaded.devices.check;
        self.checkers.send_replace(loaded.checkers);
        let revoked = loaded.revoked.len();
        sessions.revocations.set_listed(loaded.revoked);
        let trust = &sessions.metrics.trust;
        trust.revoked(sessions.revocations.counts());
        let ended = sessions
            .connected
            .end_listed(|certificates| sessions.revocations.lists(certificates));
        info!(
            revoked,
            ended,
            "certificate files have changed and are in use; connections of revoked certificates were ended"
        );
        Ok(())
    }
}

/// Files change a few times a day; and a revoked certificate should not be let in for much longer than this.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
