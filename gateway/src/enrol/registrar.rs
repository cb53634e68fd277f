//! Signs certificates of devices: who they are is decided elsewhere, with which key is the device's choice.
//!
//! Knows the authority and how long what it signs holds. Must not know codes, connections, or what time it is.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::RwLock;
use rustls::pki_types::CertificateDer;
use tracing::error;
use waypost_proto::{
    enrol,
    id::{DeviceId, Identity, UserId},
    v1::{
        EnrollResponse, EnrolmentRefusal, IssuedCertificate, enroll_response::Outcome,
        enrolment_refusal::Code,
    },
};
use x509_parser::parse_x509_certificate;

use super::{EnrolmentConfig, EnrolmentError, address};
use crate::{
    clock::system_now_ms,
    pki::{Authority, KeyPair, PkiError, Purpose, Validity, request::RequestedKey},
    tls::{Refusal, RestoredCheck, TlsConfig},
};

/// The authority at work.
#[derive(Debug)]
pub struct Registrar {
    authority: Authority,
    /// All certificates of the authority's file, its own first.
    authorities: Vec<CertificateDer<'static>>,
    /// Those of them that a device shows behind its own.
    shown: Vec<Bytes>,
    lifetime: Duration,
    public_host: String,
    /// Where devices connect, and by whose signature they know the gateway there.
    gateway: String,
    known_by: Vec<Bytes>,
}

impl Registrar {
    /// Opens the authority of the settings, and makes sure that whom it signs is let in. `None` if there is none.
    ///
    /// # Errors
    /// When it cannot be used.
    pub(super) fn open(
        config: &EnrolmentConfig,
        tls: &TlsConfig,
        check: &RestoredCheck,
    ) -> Result<Option<Self>, EnrolmentError> {
        let (Some(certificate), Some(key)) = (&config.ca_certificate, &config.ca_key) else {
            return Ok(None);
        };
        let authority = Authority::open_files(certificate, key, &tls.trust_domain)?;
        let authorities = authority.certificates();
        let shown = authorities
            .iter()
            .filter(|authority| !is_root(authority))
            .map(|authority| Bytes::copy_from_slice(authority))
            .collect();
        let registrar = Self {
            authority,
            authorities,
            shown,
            lifetime: config.certificate_lifetime,
            public_host: config.public_host.clone(),
            gateway: String::new(),
            known_by: Vec::new(),
        };
        registrar.try_out(check)?;
        Ok(Some(registrar))
    }

    /// Whether a device that it has signed passes what devices have to pass.
    fn try_out(&self, check: &RestoredCheck) -> Result<(), EnrolmentError> {
        let key = KeyPair::generate().map_err(PkiError::from)?;
        let nobody = DeviceId {
            user: UserId([0; 16]),
            device: 0,
        };
        let names = self.authority.names_of(&Identity::Device(nobody))?;
        let validity = validity(system_now_ms(), self.lifetime);
        let certificate = self
            .authority
            .issue(names, Purpose::Client, validity, &key)?;
        let mut chain = vec![certificate.certificate_der()];
        chain.extend(
            self.shown
                .iter()
                .map(|der| CertificateDer::from(der.to_vec())),
        );
        check.check(&chain).map_err(EnrolmentError::NotLetIn)
    }

    /// The certificates of its file, the signing one first.
    pub(super) fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    /// Says where those who are enrolled go, and by which authority they know that place.
    pub(super) fn lead_to(&mut self, devices: SocketAddr, known_by: Option<CertificateDer<'_>>) {
        self.gateway = address(&self.public_host, devices.port());
        self.known_by = known_by
            .iter()
            .map(|authority| Bytes::copy_from_slice(authority))
            .collect();
    }

    /// Signs a certificate for a device that holds from an hour before `now_ms`, for clocks that are behind, until the
    /// configured life is over.
    ///
    /// # Errors
    /// When the signature fails, or the time cannot stand in a certificate.
    pub fn certify(
        &self,
        device: DeviceId,
        key: &RequestedKey,
        now_ms: u64,
    ) -> Result<IssuedCertificate, PkiError> {
        let validity = validity(now_ms, self.lifetime);
        let own = self.authority.certify_device(device, key, validity)?;
        let own = Bytes::copy_from_slice(&own);
        let expires_ms = validity.not_after_s * 1_000;
        Ok(IssuedCertificate {
            chain: [own]
                .into_iter()
                .chain(self.shown.iter().cloned())
                .collect(),
            user: Bytes::copy_from_slice(&device.user.0),
            device: device.device,
            server_ms: now_ms,
            expires_ms,
            renew_at_ms: enrol::renew_at_ms(now_ms, expires_ms),
            authorities: self.known_by.clone(),
            gateway: self.gateway.clone(),
            checkers: Vec::new(),
        })
    }
}

/// The registrar that signs now: another when the files behind it have changed.
#[derive(Debug)]
pub struct Issuing(RwLock<Arc<Registrar>>);

impl Issuing {
    pub(super) fn by(registrar: Registrar) -> Arc<Self> {
        Arc::new(Self(RwLock::new(Arc::new(registrar))))
    }

    /// Whoever is about to sign.
    #[must_use]
    pub fn registrar(&self) -> Arc<Registrar> {
        Arc::clone(&self.0.read())
    }

    /// Has another sign from now on.
    pub(super) fn replace(&self, registrar: Registrar) {
        *self.0.write() = Arc::new(registrar);
    }
}

/// Signs for devices that renew over their own connections.
#[derive(Clone, Debug)]
pub struct Renewals {
    issuing: Option<Arc<Issuing>>,
}

impl Renewals {
    /// By the registrar, if the gateway has one.
    #[must_use]
    pub fn new(issuing: Option<Arc<Issuing>>) -> Self {
        Self { issuing }
    }

    /// The answer to a request. `holds` is what a check says now of the certificate that the connection was made with:
    /// whoever was revoked or has expired meanwhile needs an invitation.
    #[must_use]
    pub fn renew(
        &self,
        device: DeviceId,
        holds: Result<(), Refusal>,
        request: &[u8],
        now_ms: u64,
    ) -> EnrollResponse {
        let (Some(issuing), Ok(())) = (&self.issuing, holds) else {
            return refused(Code::NotOffered, 0);
        };
        match RequestedKey::read(request) {
            Ok(key) => answer(issuing.registrar().certify(device, &key, now_ms)),
            Err(_) => refused(Code::BadRequest, 0),
        }
    }
}

/// Tells a device of its certificate.
pub(super) fn answer(certified: Result<IssuedCertificate, PkiError>) -> EnrollResponse {
    match certified {
        Ok(issued) => EnrollResponse {
            outcome: Some(Outcome::Issued(issued)),
        },
        Err(error) => {
            error!(%error, "a certificate could not be signed");
            refused(Code::TryLater, TRY_LATER_MS)
        }
    }
}

/// Tells a device why it has none.
pub(crate) fn refused(code: Code, retry_after_ms: u32) -> EnrollResponse {
    EnrollResponse {
        outcome: Some(Outcome::Refused(EnrolmentRefusal {
            code: code.into(),
            retry_after_ms,
        })),
    }
}

/// What came of a request, a label of [`crate::metrics::ENROLMENTS`]. `issued` is the label of a certificate.
pub(crate) fn outcome_label(response: &EnrollResponse, issued: &'static str) -> &'static str {
    match &response.outcome {
        Some(Outcome::Issued(_)) => issued,
        Some(Outcome::Refused(refusal)) => match refusal.code() {
            Code::NotValid => "code_not_valid",
            Code::BadRequest => "bad_request",
            Code::TryLater => "try_later",
            Code::NotOffered => "not_offered",
            Code::Unspecified => "other",
        },
        None => "other",
    }
}

fn validity(now_ms: u64, lifetime: Duration) -> Validity {
    let now_s = now_ms / 1_000;
    Validity {
        not_before_s: now_s.saturating_sub(CLOCK_TOLERANCE_S),
        not_after_s: now_s.saturating_add(lifetime.as_secs()),
    }
}

/// Whether a certificate is its own authority: whoever does not know it already learns nothing from being shown it.
fn is_root(certificate: &CertificateDer<'_>) -> bool {
    parse_x509_certificate(certificate)
        .is_ok_and(|(_, certificate)| certificate.subject() == certificate.issuer())
}

/// When to ask again where the fault is the gateway's.
pub(super) const TRY_LATER_MS: u32 = 5_000;
/// How far the clock of whoever checks a certificate may be behind.
const CLOCK_TOLERANCE_S: u64 = 3_600;

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyUsagePurpose};

    use super::*;
    use crate::{metrics::Metrics, tls::TlsFiles};

    fn params(constraint: BasicConstraints, name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(constraint);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    /// Opens a registrar whose authority was made elsewhere, below a root that devices are let in by, or not.
    fn open(is_let_in: bool) -> Result<Registrar, EnrolmentError> {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        Authority::create(&pki, "waypost.local")
            .unwrap()
            .issue_server(&["localhost"])
            .unwrap()
            .write(&pki, "server")
            .unwrap();
        let root_key = KeyPair::generate().unwrap();
        let root = params(BasicConstraints::Unconstrained, "root");
        let root_pem = root.self_signed(&root_key).unwrap().pem();
        let root = Issuer::new(root, root_key);
        let key = KeyPair::generate().unwrap();
        let own = params(BasicConstraints::Constrained(0), "devices")
            .signed_by(&key, &root)
            .unwrap();
        let file = |name: &str, text: String| {
            let path = pki.join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let mut tls = TlsConfig::default().under(dir.path());
        if is_let_in {
            tls.client_ca = file("root.pem", root_pem.clone());
        }
        let config = EnrolmentConfig {
            ca_certificate: Some(file("devices.pem", own.pem() + &root_pem)),
            ca_key: Some(file("devices.key", key.serialize_pem())),
            ..EnrolmentConfig::default()
        };
        let check = TlsFiles::load(&tls, &Metrics::new())
            .unwrap()
            .1
            .devices
            .check;
        Registrar::open(&config, &tls, &check).map(Option::unwrap)
    }

    #[test]
    fn an_authority_from_elsewhere_signs_and_what_is_between_it_and_the_root_is_shown() {
        let registrar = open(true).unwrap();
        let key = KeyPair::generate().unwrap();
        let request = CertificateParams::default().serialize_request(&key);
        let key = RequestedKey::read(request.unwrap().der()).unwrap();
        let device = DeviceId {
            user: UserId([7; 16]),
            device: 3,
        };
        let issued = registrar.certify(device, &key, system_now_ms()).unwrap();
        assert_eq!(issued.chain.len(), 2, "not the root, which is known");
        let chain: Vec<_> = issued
            .chain
            .iter()
            .map(|der| CertificateDer::from(der.to_vec()))
            .collect();
        assert_eq!(crate::tls::device_of(&chain, "waypost.local"), Ok(device));
    }

    #[test]
    fn an_authority_whose_devices_would_be_refused_is_refused_itself() {
        let refused = open(false).unwrap_err();
        assert!(
            matches!(refused, EnrolmentError::NotLetIn(Refusal::UnknownAuthority)),
            "{refused}"
        );
    }
}
