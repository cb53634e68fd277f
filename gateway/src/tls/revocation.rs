//! The authorities' revocation lists: a file, and what is in it.
//!
//! Knows the file and its form. Must not know how a certificate is looked up in the lists in a handshake: that is
//! rustls' business. What is named here is what is looked for among the connections that are open already.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustc_hash::FxHashSet;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{error::X509Error, parse_x509_certificate, parse_x509_crl};

use super::{TlsError, identity::certificate_id};
use crate::revocation::CertificateId;

/// What the file holds, still as PEM.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::NoRevocationLists {
        path: path.to_owned(),
        source,
    })
}

/// At least one revocation list.
pub(super) fn parse(
    pem: &[u8],
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    CertificateRevocationListDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|lists| !lists.is_empty())
        .ok_or_else(|| malformed(path.to_owned()))
}

/// The certificates on the lists. A list that says it is of one of these authorities must be signed by it: rustls
/// looks for that in each handshake, and with another one would turn everybody away.
pub(super) fn certificates_on(
    lists: &[CertificateRevocationListDer<'_>],
    authorities: &[CertificateDer<'_>],
    path: &Path,
) -> Result<FxHashSet<CertificateId>, TlsError> {
    let mut ids = FxHashSet::default();
    for list in lists {
        let (_, list) = parse_x509_crl(list).map_err(|_| malformed(path.to_owned()))?;
        let issuer = list.issuer().as_raw();
        // An authority that has changed its key is there twice under its name.
        let has_signed: Vec<bool> = authorities
            .iter()
            .filter_map(|authority| parse_x509_certificate(authority).ok())
            .filter(|(_, authority)| authority.subject().as_raw() == issuer)
            .map(|(_, authority)| list.verify_signature(authority.public_key()))
            // What x509-parser does not know, rustls may.
            .map(|verified| verified != Err(X509Error::SignatureVerificationError))
            .collect();
        if !has_signed.is_empty() && !has_signed.contains(&true) {
            return Err(TlsError::ForgedRevocationList {
                path: path.to_owned(),
            });
        }
        let revoked = list.iter_revoked_certificates();
        ids.extend(revoked.map(|revoked| certificate_id(issuer, revoked.raw_serial())));
    }
    Ok(ids)
}

/// Says that the file holds no such lists.
pub(super) fn malformed(path: PathBuf) -> TlsError {
    TlsError::Malformed {
        path,
        key: "client_crl",
        expected: "certificate revocation list",
    }
}

#[cfg(test)]
mod tests {
    use rustls::CertificateError;
    use waypost_proto::ALPN;

    use super::*;
    use crate::tls::{
        Refusal, certificate_ids,
        fixture::{Fixture, device, shown},
    };

    #[test]
    fn a_certificate_is_found_on_the_list_that_names_it_and_no_other_is() {
        let fixture = Fixture::new();
        let [revoked, other] = [(); 2].map(|()| fixture.authority.issue_device(device()).unwrap());
        let path = fixture.revoking(&revoked).client_crl.unwrap();
        let lists = parse(&read(&path).unwrap(), &path).unwrap();
        let authority =
            CertificateDer::from_pem_slice(fixture.authority.certificate_pem().as_bytes());
        let authority = [authority.unwrap()];
        let listed = certificates_on(&lists, &authority, &path).unwrap();
        let is_listed = |certificate: &crate::pki::Credentials| {
            let ids = certificate_ids(&[certificate.certificate_der()]);
            ids.iter().any(|id| listed.contains(id))
        };
        assert_eq!((is_listed(&revoked), is_listed(&other)), (true, false));
        assert_eq!(listed.len(), 1);
    }

    #[test]
    fn a_list_in_an_authoritys_name_that_it_has_not_signed_is_none() {
        let fixture = Fixture::new();
        let credentials = fixture.authority.issue_device(device()).unwrap();
        let key = crate::pki::KeyPair::generate().unwrap();
        let path = fixture.revoking_by(&credentials, key).client_crl.unwrap();
        let lists = parse(&read(&path).unwrap(), &path).unwrap();
        let certificate = |authority: &crate::pki::Authority| {
            CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap()
        };
        let authorities = [certificate(&fixture.authority)];
        let error = certificates_on(&lists, &authorities, &path).unwrap_err();
        assert!(error.to_string().contains("has not signed"), "{error}");
        // Of an authority that is not known here: perhaps one in between, whose key is not at hand.
        let authorities = [certificate(&Fixture::new().authority)];
        assert_eq!(
            certificates_on(&lists, &authorities, &path).unwrap().len(),
            1
        );
    }

    #[tokio::test]
    async fn a_revoked_certificate_is_refused_in_a_full_handshake_too() {
        let mut fixture = Fixture::new();
        let credentials = fixture.authority.issue_device(device()).unwrap();
        fixture.config = fixture.revoking(&credentials);
        assert_eq!(
            fixture.handshake(Some(shown(&credentials)), ALPN).await,
            Err(Refusal::Revoked)
        );
        let error = rustls::Error::InvalidCertificate(CertificateError::Revoked);
        assert_eq!(Refusal::from_tls_error(&error), Refusal::Revoked);
    }
}
