//! The authorities' revocation lists: a file, and what is in it.
//!
//! Knows the file and its form. Must not know how a certificate is looked up in the lists.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject};

use super::TlsError;

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

    use crate::tls::{
        Refusal,
        fixture::{Fixture, device, shown},
    };

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
