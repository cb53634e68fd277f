//! Enrolment when the files behind it have changed: those who enrol and renew from then on are met and signed by what is
//! in them.
//!
//! Knows which part of enrolment uses what. Must not know when files change.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::watch;

use super::{
    EnrolmentConfig, EnrolmentError, Inviter, Registrar, door::server_config, open,
    registrar::Issuing,
};
use crate::tls::{RestoredCheck, TlsConfig};

/// What reads the files again, and whoever uses what is in them.
#[derive(Debug)]
pub struct EnrolmentReload {
    pub(super) config: EnrolmentConfig,
    pub(super) tls: TlsConfig,
    /// Where devices connect.
    pub(super) devices: SocketAddr,
    /// Where newcomers connect, as it is written for them.
    pub(super) server: String,
    pub(super) issuing: Arc<Issuing>,
    pub(super) servers: watch::Sender<Option<quinn::ServerConfig>>,
    pub(super) inviter: Inviter,
}

/// What the files hold now.
#[derive(Debug)]
pub struct Changed {
    registrar: Registrar,
    server: quinn::ServerConfig,
    /// The authority by which newcomers know the gateway, in DER.
    known_by: Option<Vec<u8>>,
}

impl EnrolmentReload {
    /// Reads the files. `check` is what devices have to pass from now on.
    ///
    /// # Errors
    /// When one cannot be used, or devices would enrol and then be refused. What was in use before is as good as ever.
    pub fn read(&self, check: &RestoredCheck) -> Result<Option<Changed>, EnrolmentError> {
        let opened = open(&self.config, &self.tls, check, self.devices)?;
        let Some((registrar, tls)) = opened else {
            return Ok(None);
        };
        Ok(Some(Changed {
            registrar,
            server: server_config(&tls)?,
            known_by: tls.authority.map(|authority| authority.to_vec()),
        }))
    }

    /// Takes into use what was read. Who is in the midst of a conversation ends it as it began, but for the signature.
    pub fn take_into_use(&self, changed: Changed) {
        let Changed {
            registrar,
            server,
            known_by,
        } = changed;
        self.issuing.replace(registrar);
        self.servers.send_replace(Some(server));
        self.inviter.lead_to(&self.server, known_by.as_deref());
    }
}
