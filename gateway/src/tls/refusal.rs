//! Why a peer is turned away: from TLS' alerts and errors to a label, a text and a close code.
//!
//! Knows the alerts of a failed handshake. Must not know how certificates are read.

use std::fmt;

use rustls::{AlertDescription, CertificateError};
use waypost_proto::session::CloseCode;

/// Why a peer was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It showed no certificate.
    NoCertificate,
    /// Its certificate is signed by nobody in `client_ca`.
    UnknownAuthority,
    /// Its certificate's time is over.
    Expired,
    /// Its certificate's time has not come, or the gateway's clock is behind.
    NotYetValid,
    /// Its authority has revoked its certificate, or the operator its identity.
    Revoked,
    /// Its certificate cannot be read, is broken, or is not for clients.
    BadCertificate,
    /// It offered no protocol, version or cipher that the gateway has.
    NoSharedProtocol,
    /// The handshake failed for a reason that has no name here.
    OtherTls,
    /// Its certificate has not exactly one URI.
    NoUri,
    /// Its URI belongs to another trust domain.
    OtherTrustDomain,
    /// Its URI names neither a device nor a checker nor an operator.
    NotAnIdentity,
    /// It came to the device port and is not a device.
    NotADevice,
    /// It came to the freshness port and is not a checker.
    NotAChecker,
    /// It made a call for operators and is not one.
    NotAnOperator,
}

impl Refusal {
    /// The reason as a label value of metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::UnknownAuthority => "unknown_issuer",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Revoked => "revoked",
            Self::BadCertificate => "bad_certificate",
            Self::NoSharedProtocol => "no_shared_protocol",
            Self::OtherTls => "other",
            Self::NoUri => "no_identity",
            Self::OtherTrustDomain => "other_trust_domain",
            Self::NotAnIdentity => "bad_identity",
            Self::NotADevice => "not_a_device",
            Self::NotAChecker => "not_a_checker",
            Self::NotAnOperator => "not_an_operator",
        }
    }

    /// The code that a connection is closed with for this, when TLS has not ended it.
    #[must_use]
    pub fn close_code(self) -> CloseCode {
        match self {
            Self::Revoked => CloseCode::Revoked,
            Self::Expired => CloseCode::Expired,
            _ => CloseCode::BadIdentity,
        }
    }

    /// The reason for which the gateway's own side of TLS ended a connection; `None` when it did not.
    #[must_use]
    pub fn from_connection_error(error: &quinn::ConnectionError) -> Option<Self> {
        let quinn::ConnectionError::TransportError(error) = error else {
            return None;
        };
        // RFC 9001, 4.8: a TLS alert is the transport error 0x100 plus the alert's number.
        let alert = u64::from(error.code)
            .checked_sub(0x100)
            .and_then(|alert| u8::try_from(alert).ok())?;
        Some(match AlertDescription::from(alert) {
            AlertDescription::CertificateRequired => Self::NoCertificate,
            AlertDescription::UnknownCA => Self::UnknownAuthority,
            // TLS has one alert for both ends of the validity; rustls' text is all that quinn keeps.
            AlertDescription::CertificateExpired if error.reason.contains("not valid yet") => {
                Self::NotYetValid
            }
            AlertDescription::CertificateExpired => Self::Expired,
            AlertDescription::CertificateRevoked => Self::Revoked,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::DecryptError => Self::BadCertificate,
            AlertDescription::NoApplicationProtocol
            | AlertDescription::ProtocolVersion
            | AlertDescription::HandshakeFailure => Self::NoSharedProtocol,
            _ => Self::OtherTls,
        })
    }
}

impl Refusal {
    /// The reason for which TLS over TCP ended a connection.
    #[must_use]
    pub fn from_tls_error(error: &rustls::Error) -> Self {
        use rustls::Error;
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(error) => match error {
                CertificateError::UnknownIssuer => Self::UnknownAuthority,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Self::Expired
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotYetValid
                }
                CertificateError::Revoked => Self::Revoked,
                _ => Self::BadCertificate,
            },
            Error::PeerIncompatible(_) | Error::NoApplicationProtocol => Self::NoSharedProtocol,
            _ => Self::OtherTls,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoCertificate => "it showed no certificate",
            Self::UnknownAuthority => "its certificate is of an unknown authority",
            Self::Expired => "its certificate has expired",
            Self::NotYetValid => "its certificate is not valid yet",
            Self::Revoked => "it has been revoked",
            Self::BadCertificate => "its certificate is broken or not one for clients",
            Self::NoSharedProtocol => {
                "it offered no protocol, version or cipher that the gateway has"
            }
            Self::OtherTls => "the TLS handshake failed",
            Self::NoUri => "its certificate has not exactly one URI to name it",
            Self::OtherTrustDomain => "its certificate belongs to another trust domain",
            Self::NotAnIdentity => {
                "its certificate's URI names neither a device nor a checker nor an operator"
            }
            Self::NotADevice => "its certificate is not one of a device",
            Self::NotAChecker => "its certificate is not one of a checker",
            Self::NotAnOperator => "its certificate is not one of an operator",
        })
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use waypost_proto::{ALPN, id::Identity};

    use super::*;
    use crate::{
        pki::{Authority, Purpose, Validity},
        tls::fixture::{Fixture, TRUST_DOMAIN, device, shown},
    };

    #[tokio::test]
    async fn every_refusal_has_its_reason() {
        let fixture = Fixture::new();
        let now_s = crate::clock::system_now_ms() / 1_000;
        let over = Validity {
            not_before_s: now_s - 86_400,
            not_after_s: now_s - 60,
        };
        let to_come = Validity {
            not_before_s: now_s + 3_600,
            not_after_s: now_s + 86_400,
        };
        let holds = Validity::days(1);
        let own = Identity::Device(device()).to_uri(TRUST_DOMAIN);
        let own = own.as_str();
        let client = |uris: &[&str], validity| Some(fixture.issue(uris, Purpose::Client, validity));
        let other_dir = tempfile::tempdir().unwrap();
        let other_authority = Authority::create(other_dir.path(), TRUST_DOMAIN).unwrap();
        let of_other_authority = shown(&other_authority.issue_device(device()).unwrap());
        let checker = shown(&fixture.authority.issue_checker("night").unwrap());

        for (name, client, refusal) in [
            ("none", None, Refusal::NoCertificate),
            (
                "other authority",
                Some(of_other_authority),
                Refusal::UnknownAuthority,
            ),
            ("forged", Some(fixture.forged()), Refusal::UnknownAuthority),
            ("expired", client(&[own], over), Refusal::Expired),
            (
                "not yet valid",
                client(&[own], to_come),
                Refusal::NotYetValid,
            ),
            (
                "a server's",
                Some(fixture.issue(&[own], Purpose::Server, holds)),
                Refusal::BadCertificate,
            ),
            ("without URI", client(&[], holds), Refusal::NoUri),
            (
                "two URIs",
                client(&[own, "spiffe://waypost.local/checker/a"], holds),
                Refusal::NoUri,
            ),
            (
                "other domain",
                client(&["spiffe://other/checker/a"], holds),
                Refusal::OtherTrustDomain,
            ),
            (
                "nobody",
                client(&["spiffe://waypost.local/nobody"], holds),
                Refusal::NotAnIdentity,
            ),
            ("checker", Some(checker), Refusal::NotADevice),
        ] {
            assert_eq!(
                fixture.handshake(client, ALPN).await,
                Err(refusal),
                "{name}"
            );
        }
        assert_eq!(
            fixture.handshake(client(&[own], holds), b"h3").await,
            Err(Refusal::NoSharedProtocol)
        );
    }
}
