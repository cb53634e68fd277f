//! What the tests of TLS share: an authority, the gateway's files, and certificates good and bad.
//!
//! Knows how certificates are made and how a client connects. Must not know what a test expects.

use std::{fs, net::Ipv4Addr, sync::Arc};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use waypost_proto::id::{DeviceId, UserId};
use x509_parser::parse_x509_certificate;

use super::{Refusal, TlsConfig, device_of, device_server_config, provider};
use crate::pki::{Authority, Credentials, KeyPair, LOCAL_NAMES, Purpose, SanType, Validity};

pub(super) const TRUST_DOMAIN: &str = "waypost.local";

/// What a client shows.
pub(super) type Shown = (CertificateDer<'static>, PrivateKeyDer<'static>);

pub(super) fn shown(credentials: &Credentials) -> Shown {
    (credentials.certificate_der(), credentials.private_key_der())
}

/// A folder with an authority, the server's certificate and the configuration that names them.
pub(super) struct Fixture {
    pub(super) dir: tempfile::TempDir,
    pub(super) authority: Authority,
    pub(super) config: TlsConfig,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        let authority = Authority::create(&pki, TRUST_DOMAIN).unwrap();
        authority
            .issue_server(&LOCAL_NAMES)
            .unwrap()
            .write(&pki, "server")
            .unwrap();
        let config = TlsConfig::default().under(dir.path());
        Self {
            dir,
            authority,
            config,
        }
    }

    pub(super) fn issue(&self, uris: &[&str], purpose: Purpose, validity: Validity) -> Shown {
        let names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        shown(
            &self
                .authority
                .issue(names, purpose, validity, &KeyPair::generate().unwrap())
                .unwrap(),
        )
    }

    /// The configuration with a list that revokes one certificate.
    pub(super) fn revoking(&self, credentials: &Credentials) -> TlsConfig {
        let key = fs::read_to_string(self.dir.path().join("pki/ca.key")).unwrap();
        self.revoking_by(credentials, KeyPair::from_pem(&key).unwrap())
    }

    /// The same, in this authority's name and signed with a key that need not be its own.
    pub(super) fn revoking_by(&self, credentials: &Credentials, key: KeyPair) -> TlsConfig {
        let certificate = credentials.certificate_der();
        let (_, certificate) = parse_x509_certificate(&certificate).unwrap();
        let year = |year| rcgen::date_time_ymd(year, 1, 1);
        let list = rcgen::CertificateRevocationListParams {
            this_update: year(2_020),
            next_update: year(2_100),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![rcgen::RevokedCertParams {
                serial_number: rcgen::SerialNumber::from_slice(certificate.raw_serial()),
                revocation_time: year(2_020),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let issuer =
            rcgen::Issuer::from_ca_cert_pem(self.authority.certificate_pem(), key).unwrap();
        let path = self.dir.path().join("pki/revoked.pem");
        fs::write(&path, list.signed_by(&issuer).unwrap().pem().unwrap()).unwrap();
        TlsConfig {
            client_crl: Some(path),
            ..self.config.clone()
        }
    }

    /// A device's certificate that names this authority and was signed with another key.
    pub(super) fn forged(&self) -> Shown {
        let authority = self.authority.certificate_pem();
        let forger =
            rcgen::Issuer::from_ca_cert_pem(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default()
            .signed_by(&key, &forger)
            .unwrap();
        (
            certificate.der().clone(),
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
    }

    /// Connects over QUIC on the loopback, and says whom the gateway let in, or why not.
    pub(super) async fn handshake(
        &self,
        client: Option<Shown>,
        alpn: &[u8],
    ) -> Result<DeviceId, Refusal> {
        let server = device_server_config(&self.config).unwrap();
        let server =
            quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).unwrap()));
        let server = quinn::Endpoint::server(server, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();

        let mut roots = RootCertStore::empty();
        roots
            .add(
                CertificateDer::from_pem_slice(self.authority.certificate_pem().as_bytes())
                    .unwrap(),
            )
            .unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut tls = match client {
            Some((certificate, key)) => builder
                .with_client_auth_cert(vec![certificate], key)
                .unwrap(),
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![alpn.to_vec()];
        let mut client = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        client.set_default_client_config(quinn::ClientConfig::new(Arc::new(
            QuicClientConfig::try_from(tls).unwrap(),
        )));

        let connecting = client
            .connect(server.local_addr().unwrap(), "localhost")
            .unwrap();
        let accepting = async { server.accept().await.unwrap().await };
        let (_outgoing, incoming) = tokio::join!(connecting, accepting);
        let incoming = incoming.map_err(|error| Refusal::from_connection_error(&error).unwrap())?;
        let chain = incoming
            .peer_identity()
            .unwrap()
            .downcast::<Vec<CertificateDer<'static>>>()
            .unwrap();
        device_of(&chain, TRUST_DOMAIN)
    }
}

pub(super) fn device() -> DeviceId {
    DeviceId {
        user: UserId([7; 16]),
        device: 3,
    }
}
