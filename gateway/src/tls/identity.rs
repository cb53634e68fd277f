//! Whom a certificate speaks for, until when, and which one it is.
//!
//! Knows where in a certificate the identity and the dates lie, and what tells it from all others. Must not know whether the certificate holds, nor what an
//! identity may do.

use std::sync::Arc;

use ring::digest;
use rustls::pki_types::CertificateDer;
use waypost_proto::id::{DeviceId, Identity, IdentityError};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::Refusal;
use crate::revocation::CertificateId;

/// Whom a certificate chain speaks for. The chain's signatures and dates are TLS' to check; this reads.
///
/// # Errors
/// When the chain names nobody in the trust domain.
pub fn identity_of(chain: &[CertificateDer<'_>], trust_domain: &str) -> Result<Identity, Refusal> {
    let own = chain.first().ok_or(Refusal::NoCertificate)?;
    let (_, certificate) = parse_x509_certificate(own).map_err(|_| Refusal::BadCertificate)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| Refusal::BadCertificate)?;
    let mut uris = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(uri),
            _ => None,
        });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(Refusal::NoUri);
    };
    Identity::from_uri(uri, trust_domain).map_err(|error| match error {
        IdentityError::OtherTrustDomain => Refusal::OtherTrustDomain,
        IdentityError::NotAnIdentity => Refusal::NotAnIdentity,
    })
}

/// The device that a certificate chain speaks for.
///
/// # Errors
/// When it speaks for nobody, or for somebody else than a device.
pub fn device_of(chain: &[CertificateDer<'_>], trust_domain: &str) -> Result<DeviceId, Refusal> {
    match identity_of(chain, trust_domain)? {
        Identity::Device(device) => Ok(device),
        Identity::Checker(_) | Identity::Operator(_) => Err(Refusal::NotADevice),
    }
}

/// The checker that a certificate chain speaks for.
///
/// # Errors
/// When it speaks for nobody, or for somebody else than a checker.
pub fn checker_of(chain: &[CertificateDer<'_>], trust_domain: &str) -> Result<String, Refusal> {
    match identity_of(chain, trust_domain)? {
        Identity::Checker(name) => Ok(name),
        Identity::Device(_) | Identity::Operator(_) => Err(Refusal::NotAChecker),
    }
}

/// The operator that a certificate chain speaks for.
///
/// # Errors
/// When it speaks for nobody, or for somebody else than an operator.
pub fn operator_of(chain: &[CertificateDer<'_>], trust_domain: &str) -> Result<String, Refusal> {
    match identity_of(chain, trust_domain)? {
        Identity::Operator(name) => Ok(name),
        Identity::Device(_) | Identity::Checker(_) => Err(Refusal::NotAnOperator),
    }
}

/// When the time of a peer's own certificate is over, in milliseconds since 1970-01-01 UTC: it holds up to and with its
/// last second, as TLS has it. The time of one that cannot be read is over.
#[must_use]
pub fn expires_ms(chain: &[CertificateDer<'_>]) -> u64 {
    let own = chain.first().map(|own| parse_x509_certificate(own));
    let Some(Ok((_, own))) = own else { return 0 };
    let last_s = own.validity().not_after.timestamp();
    u64::try_from(last_s).map_or(0, |last_s| last_s.saturating_add(1).saturating_mul(1_000))
}

/// Names the certificates of a chain, as the authorities' lists name them: by their issuer and serial number. One that
/// cannot be read has no name, and is on no list.
#[must_use]
pub fn certificate_ids(chain: &[CertificateDer<'_>]) -> Arc<[CertificateId]> {
    let ids = chain.iter().filter_map(|certificate| {
        let (_, certificate) = parse_x509_certificate(certificate).ok()?;
        let issuer = certificate.issuer().as_raw();
        Some(certificate_id(issuer, certificate.raw_serial()))
    });
    ids.collect()
}

/// Names the certificate with this serial number of the authority with this name, both in DER.
pub(super) fn certificate_id(issuer: &[u8], serial: &[u8]) -> CertificateId {
    let mut content = digest::Context::new(&digest::SHA256);
    // The name says how long it is itself, so no other name and number read the same one after the other.
    content.update(issuer);
    // However many zeros a number begins with, it is the same number.
    let first = serial.iter().take_while(|byte| **byte == 0).count();
    content.update(&serial[first..]);
    let mut id = [0; 16];
    id.copy_from_slice(&content.finish().as_ref()[..16]);
    CertificateId(id)
}

#[cfg(test)]
mod tests {
    use waypost_proto::ALPN;

    use super::*;
    use crate::{
        pki::{Purpose, Validity},
        tls::fixture::{Fixture, TRUST_DOMAIN, device, shown},
    };

    #[tokio::test]
    async fn a_device_is_known_by_its_certificate() {
        let fixture = Fixture::new();
        let credentials = fixture.authority.issue_device(device()).unwrap();
        assert_eq!(
            fixture.handshake(Some(shown(&credentials)), ALPN).await,
            Ok(device())
        );
    }

    #[test]
    fn a_certificate_holds_up_to_and_with_its_last_second() {
        let fixture = Fixture::new();
        let last_s = 1_900_000_000;
        let validity = Validity {
            not_before_s: 1_700_000_000,
            not_after_s: last_s,
        };
        let uri = Identity::Device(device()).to_uri(TRUST_DOMAIN);
        let own = fixture.issue(&[&uri], Purpose::Client, validity).0;
        assert_eq!(expires_ms(&[own]), (last_s + 1) * 1_000);
        for unreadable in [&[][..], &[vec![0x30].into()]] {
            assert_eq!(expires_ms(unreadable), 0);
        }
    }

    #[test]
    fn a_device_a_checker_and_an_operator_are_none_of_the_others() {
        let fixture = Fixture::new();
        let checker = [fixture
            .authority
            .issue_checker("night")
            .unwrap()
            .certificate_der()];
        assert_eq!(checker_of(&checker, TRUST_DOMAIN), Ok("night".to_owned()));
        let device = [fixture
            .authority
            .issue_device(device())
            .unwrap()
            .certificate_der()];
        assert_eq!(checker_of(&device, TRUST_DOMAIN), Err(Refusal::NotAChecker));
        let operator = [fixture
            .authority
            .issue_operator("office")
            .unwrap()
            .certificate_der()];
        assert_eq!(
            operator_of(&operator, TRUST_DOMAIN),
            Ok("office".to_owned())
        );
        assert_eq!(device_of(&operator, TRUST_DOMAIN), Err(Refusal::NotADevice));
        assert_eq!(
            checker_of(&operator, TRUST_DOMAIN),
            Err(Refusal::NotAChecker)
        );
        for other in [&checker, &device] {
            let refused = operator_of(other, TRUST_DOMAIN);
            assert_eq!(refused, Err(Refusal::NotAnOperator));
        }
        assert_eq!(identity_of(&[], TRUST_DOMAIN), Err(Refusal::NoCertificate));
        assert_eq!(
            identity_of(&[vec![0x30].into()], TRUST_DOMAIN),
            Err(Refusal::BadCertificate)
        );
    }
}
