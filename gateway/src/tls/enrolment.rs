//! TLS for newcomers: the gateway proves itself, and they have nothing yet to prove themselves with.
//!
//! Knows how a newcomer can know the gateway. Must not know codes. Nobody gets from here to what devices may do: it is
//! another port, another protocol name and another endpoint, and nothing of this configuration is used there.

use std::sync::Arc;

use rustls::{pki_types::CertificateDer, server::NoServerSessionStorage};
use waypost_proto::enrol::ENROLL_ALPN;
use x509_parser::parse_x509_certificate;

use super::{Files, TlsConfig, TlsError, provider, unusable};

/// TLS for the port of enrolment.
#[derive(Clone, Debug)]
pub struct EnrolmentTls {
    /// The server side. No early data, nothing to resume.
    pub server: Arc<rustls::ServerConfig>,
    /// The authority that ends the chain which it shows, if that is one of the operator's own: a newcomer can know it by
    /// its hash.
    pub authority: Option<CertificateDer<'static>>,
}

/// The server side for newcomers. `authorities` are the operator's own; the one that has signed the gateway's
/// certificate, if one has, is shown with it.
///
/// # Errors
/// When a file cannot be used; the error says which and what to do.
pub fn enrolment_tls(
    config: &TlsConfig,
    authorities: &[CertificateDer<'static>],
) -> Result<EnrolmentTls, TlsError> {
    let (mut chain, key) = Files::load(config)?.own(config)?;
    let authority = chain
        .last()
        .and_then(|last| authorities.iter().find(|one| has_signed(one, last)))
        .cloned();
    chain.extend(authority.clone());
    let mut server = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| unusable(config, source))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|source| unusable(config, source))?;
    server.alpn_protocols = vec![ENROLL_ALPN.to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server.max_early_data_size = 0;
    Ok(EnrolmentTls {
        server: Arc::new(server),
        authority,
    })
}

fn has_signed(authority: &CertificateDer<'_>, certificate: &CertificateDer<'_>) -> bool {
    let (Ok((_, authority)), Ok((_, certificate))) = (
        parse_x509_certificate(authority),
        parse_x509_certificate(certificate),
    ) else {
        return false;
    };
    let key = authority.public_key();
    authority.subject() == certificate.issuer() && certificate.verify_signature(Some(key)).is_ok()
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject;

    use super::*;
    use crate::{pki::Authority, tls::fixture::Fixture};

    fn der(authority: &Authority) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap()
    }

    #[test]
    fn the_authority_that_signed_the_gateway_is_shown_and_no_other() {
        let fixture = Fixture::new();
        let spare = tempfile::tempdir().unwrap();
        let other = der(&Authority::create(spare.path(), "waypost.local").unwrap());
        let own = der(&fixture.authority);
        let both = enrolment_tls(&fixture.config, &[other.clone(), own.clone()]).unwrap();
        assert_eq!(both.authority, Some(own));
        let none = enrolment_tls(&fixture.config, &[other]).unwrap();
        assert_eq!(none.authority, None);
    }

    #[test]
    fn newcomers_resume_nothing_and_speak_no_other_protocol() {
        let fixture = Fixture::new();
        let server = enrolment_tls(&fixture.config, &[]).unwrap().server;
        assert_eq!(server.alpn_protocols, [ENROLL_ALPN]);
        assert!(!server.session_storage.can_cache());
        assert_eq!(
            (server.send_tls13_tickets, server.max_early_data_size),
            (0, 0)
        );
    }
}
