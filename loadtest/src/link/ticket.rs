//! What a device keeps of its last connection, to begin the next one sooner.
//!
//! Knows rustls' two hooks: where a ticket lies, and whether a certificate had to be looked at. Must not know
//! connections.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use rustls::{
    DigitallySignedStruct, NamedGroup, SignatureScheme,
    client::{
        ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};

/// Room for one ticket, the newest: a ticket serves one connection and each connection brings one. About
/// 2 KB while it is full.
#[derive(Default)]
pub(super) struct Ticket(Mutex<Option<Tls13ClientSessionValue>>);

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").finish_non_exhaustive()
    }
}

impl ClientSessionStore for Ticket {
    fn set_kx_hint(&self, _name: ServerName<'static>, _group: NamedGroup) {}

    fn kx_hint(&self, _name: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _name: ServerName<'static>, _value: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _name: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _name: ServerName<'static>, value: Tls13ClientSessionValue) {
        *self.0.lock() = Some(value);
    }

    fn take_tls13_ticket(&self, _name: &ServerName<'_>) -> Option<Tls13ClientSessionValue> {
        self.0.lock().take()
    }
}

/// The usual verifier, which notes that it was asked: a resumed handshake shows no certificate.
#[derive(Debug)]
pub(super) struct Witness {
    webpki: Arc<WebPkiServerVerifier>,
    was_asked: AtomicBool,
}

impl Witness {
    pub(super) fn new(webpki: Arc<WebPkiServerVerifier>) -> Self {
        Self {
            webpki,
            was_asked: AtomicBool::new(false),
        }
    }

    /// Whether it was asked since the last time this was called.
    pub(super) fn take(&self) -> bool {
        self.was_asked.swap(false, Ordering::Relaxed)
    }
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.was_asked.store(true, Ordering::Relaxed);
        self.webpki
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}
