//! Whether a peer's certificate holds: when it shows it, and again when it resumes and shows none.
//!
//! Knows rustls' verifier of clients. Must not know whom a certificate speaks for, nor how the gateway proves
//! itself.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::{
        VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    time_provider::TimeProvider,
};

use super::{Files, Refusal, TlsConfig, TlsError, certificates, provider, revocation};

/// The usual verifier, with one answer made clearer: a certificate that names a known authority and
/// is not signed by it is one of an unknown authority. Without this the peer and the log would be told
/// of a decryption error, as for a client that does not have its own private key.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    webpki: Arc<dyn ClientCertVerifier>,
}

impl ClientVerifier {
    /// Lets in whom the authorities have signed and not revoked.
    pub(super) fn new(files: &Files, config: &TlsConfig) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::UnusableAuthority {
            path: config.client_ca.clone(),
            source,
        };
        let mut roots = RootCertStore::empty();
        for authority in certificates(&files.client_ca_pem, &config.client_ca, "client_ca")? {
            roots.add(authority).map_err(unusable)?;
        }
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        if let (Some(pem), Some(path)) = (&files.client_crl_pem, &config.client_crl) {
            builder = builder
                .with_crls(revocation::parse(pem, path)?)
                .allow_unknown_revocation_status();
        }
        let webpki = builder.build().map_err(|error| match error {
            VerifierBuilderError::InvalidCrl(_) => {
                revocation::malformed(config.client_crl.clone().unwrap_or_default())
            }
            other => unusable(rustls::Error::General(other.to_string())),
        })?;
        Ok(Self { webpki })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.webpki
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(|error| match error {
                rustls::Error::InvalidCertificate(CertificateError::BadSignature) => {
                    CertificateError::UnknownIssuer.into()
                }
                other => other,
            })
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

/// The check of a certificate chain that comes out of a session instead of a handshake: rustls has checked
/// it when the session began, and does not again.
#[derive(Clone, Debug)]
pub struct RestoredCheck {
    pub(super) verifier: Arc<ClientVerifier>,
    pub(super) time: Arc<dyn TimeProvider>,
}

impl RestoredCheck {
    /// Checks signatures, dates and revocation as a full handshake would now.
    ///
    /// # Errors
    /// When a full handshake would fail.
    pub fn check(&self, chain: &[CertificateDer<'_>]) -> Result<(), Refusal> {
        let (own, intermediates) = chain.split_first().ok_or(Refusal::NoCertificate)?;
        let now = self.time.current_time().ok_or(Refusal::OtherTls)?;
        match self.verifier.verify_client_cert(own, intermediates, now) {
            Ok(_) => Ok(()),
            Err(error) => Err(Refusal::from_tls_error(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
    use rustls::pki_types::pem::PemObject;
    use waypost_proto::{ALPN, id::Identity, session::CloseCode};

    use super::*;
    use crate::{
        metrics::Metrics,
        pki::{Purpose, Validity},
        tls::{
            DeviceTls, Files, device_of, device_tls,
            fixture::{Fixture, Shown, TRUST_DOMAIN, device, shown},
            sessions::{self, Sessions},
        },
    };

    /// Connects with a session of the first server to the second, which shares its sessions. Returns what
    /// the second restored: the chain, and whether it took early data.
    async fn resume(
        fixture: &Fixture,
        first: &DeviceTls,
        second: &DeviceTls,
        client: Shown,
    ) -> Vec<CertificateDer<'static>> {
        let mut roots = RootCertStore::empty();
        let ca_pem = fixture.authority.certificate_pem();
        roots
            .add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap())
            .unwrap();
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![client.0], client.1)
            .unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        tls.enable_early_data = true;
        let tls = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let mut client = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        client.set_default_client_config(tls);

        let endpoint = |tls: &DeviceTls| {
            let crypto = QuicServerConfig::try_from(tls.server.clone()).unwrap();
            let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
            quinn::Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).unwrap()
        };
        let (first, second) = (endpoint(first), endpoint(second));
        let connect = |server: &quinn::Endpoint| {
            client
                .connect(server.local_addr().unwrap(), "localhost")
                .unwrap()
        };
        let (outgoing, incoming) = tokio::join!(connect(&first), async {
            first.accept().await.unwrap().await
        });
        let (outgoing, incoming) = (outgoing.unwrap(), incoming.unwrap());
        // The ticket comes before what the server says.
        incoming
            .open_uni()
            .await
            .unwrap()
            .write_all(b".")
            .await
            .unwrap();
        outgoing.accept_uni().await.unwrap();

        let connecting = connect(&second);
        let (_early, _) = connecting.into_0rtt().expect("there is a ticket");
        let (restored, _) = second
            .accept()
            .await
            .unwrap()
            .accept()
            .unwrap()
            .into_0rtt()
            .unwrap();
        let chain = restored
            .peer_identity()
            .expect("known before the handshake is over");
        *chain.downcast::<Vec<CertificateDer<'static>>>().unwrap()
    }

    /// Two servers that share a clock and sessions.
    fn sharing(
        first: &TlsConfig,
        second: &TlsConfig,
    ) -> (DeviceTls, DeviceTls, Arc<sessions::tests::SetTime>) {
        let now_s = crate::clock::system_now_ms() / 1_000;
        let time = Arc::new(sessions::tests::SetTime(now_s.into()));
        let sessions = Arc::new(Sessions::new(64, time.clone(), Metrics::new()));
        let tls = |config| {
            let files = Files::load(config).unwrap();
            device_tls(&files, config, Some(sessions.clone()), time.clone()).unwrap()
        };
        (tls(first), tls(second), time)
    }

    #[tokio::test]
    async fn a_resumed_certificate_that_has_expired_is_refused() {
        let fixture = Fixture::new();
        let (first, second, time) = sharing(&fixture.config, &fixture.config);
        let now_s = crate::clock::system_now_ms() / 1_000;
        let an_hour = Validity {
            not_before_s: now_s - 60,
            not_after_s: now_s + 3_600,
        };
        let uri = Identity::Device(device()).to_uri(TRUST_DOMAIN);
        let client = fixture.issue(&[&uri], Purpose::Client, an_hour);
        let chain = resume(&fixture, &first, &second, client).await;
        assert_eq!(second.check.check(&chain), Ok(()));
        assert_eq!(device_of(&chain, TRUST_DOMAIN), Ok(device()));
        time.advance(2 * 3_600);
        assert_eq!(second.check.check(&chain), Err(Refusal::Expired));
        assert_eq!(Refusal::Expired.close_code(), CloseCode::Expired);
    }

    #[tokio::test]
    async fn a_resumed_certificate_that_was_revoked_is_refused() {
        let fixture = Fixture::new();
        let revoked = fixture.authority.issue_device(device()).unwrap();
        let other = fixture.authority.issue_device(device()).unwrap();
        let with_list = fixture.revoking(&revoked);
        let (first, second, _) = sharing(&fixture.config, &with_list);
        // The control: TLS itself resumes it, and so does a server that knows no list.
        let chain = resume(&fixture, &first, &second, shown(&revoked)).await;
        assert_eq!(first.check.check(&chain), Ok(()));
        assert_eq!(second.check.check(&chain), Err(Refusal::Revoked));
        assert_eq!(Refusal::Revoked.close_code(), CloseCode::Revoked);
        let chain = resume(&fixture, &first, &second, shown(&other)).await;
        assert_eq!(second.check.check(&chain), Ok(()));
    }
}
