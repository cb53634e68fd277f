//! Who may speak to the gateway: TLS 1.3 with a client certificate, and the identity in it.
//!
//! Here are the settings of both ports and the files behind them; that of newcomers, who have no certificate yet, is in
//! [`enrolment`]. `verifier` says whether a peer's certificate
//! holds, with the lists of `revocation`; `identity` whom it speaks for; `refusal` why a peer is turned away;
//! [`sessions`] keeps what devices resume; and `reload` reads the files again when they have changed.
//!
//! Knows certificate files and rustls. Must not know connections or what an identity may do.

pub mod enrolment;
#[cfg(test)]
mod fixture;
mod identity;
mod refusal;
mod reload;
mod revocation;
pub mod sessions;
mod verifier;

use std::{
    fs, io,
    path::{self, Path, PathBuf},
    sync::Arc,
};

use rustls::{
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::NoServerSessionStorage,
    time_provider::{DefaultTimeProvider, TimeProvider},
};
use serde::{Deserialize, Serialize};
use waypost_proto::ALPN;

use self::{sessions::Sessions, verifier::ClientVerifier};

pub use self::{
    identity::{certificate_ids, checker_of, device_of, expires_ms, identity_of, operator_of},
    refusal::Refusal,
    reload::{Loaded, TlsFiles},
    verifier::RestoredCheck,
};

/// The files and the name that the gateway proves itself with and checks its peers against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// The gateway's certificate chain, PEM, its own certificate first. A relative path, here and in
    /// the three below, starts at the data folder. All four are read again within seconds when one has changed.
    pub certificate: PathBuf,
    /// The private key of that certificate, PEM.
    pub private_key: PathBuf,
    /// The authorities whose devices and checkers are let in, PEM, one or more.
    pub client_ca: PathBuf,
    /// Revoked certificates: the authorities' revocation lists, PEM, one or more. An authority without a list
    /// has revoked nothing, and a list that is past its time still holds.
    pub client_crl: Option<PathBuf>,
    /// How many devices can take up an earlier TLS session, which is what lets them send a ping with their
    /// first packet; 0 switches that off. Each takes about 1 KB of memory once its device has connected. When
    /// there are more devices, the oldest sessions go, and cost one round trip more. A restart forgets all.
    pub sessions: usize,
    /// The `<trust-domain>` of `spiffe://<trust-domain>/user/<uuid>/device/<u32>`: certificates of any
    /// other are refused, also when their authority is a known one.
    pub trust_domain: String,
}

impl Default for TlsConfig {
    /// What `waypost pki init` and `waypost pki server` make when they are told nothing else.
    fn default() -> Self {
        Self {
            certificate: "pki/server.pem".into(),
            private_key: "pki/server.key".into(),
            client_ca: "pki/ca.pem".into(),
            client_crl: None,
            sessions: 200_000,
            trust_domain: "waypost.local".to_owned(),
        }
    }
}

impl TlsConfig {
    /// Starts the relative paths at the data folder, and makes all absolute: what is printed as being in
    /// effect can then be read back from anywhere.
    #[must_use]
    pub fn under(self, data_dir: &Path) -> Self {
        let base = path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        Self {
            certificate: base.join(self.certificate),
            private_key: base.join(self.private_key),
            client_ca: base.join(self.client_ca),
            client_crl: self.client_crl.map(|path| base.join(path)),
            sessions: self.sessions,
            trust_domain: self.trust_domain,
        }
    }
}

/// Why the gateway cannot prove itself or check its peers.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(
        "cannot read {path}, which [tls] {key} names: put it there, or make one with `waypost pki {maker}`"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The key of the configuration that names it.
        key: &'static str,
        /// The subcommand of `waypost pki` that makes such a file.
        maker: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}, which [tls] {key} names, holds no {expected} in PEM: is it the right file?")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The key of the configuration that names it.
        key: &'static str,
        /// What it should hold.
        expected: &'static str,
    },
    /// The revocation lists cannot be read. No `waypost pki` makes them.
    #[error(
        "cannot read {path}, which [tls] client_crl names: put the lists of your authority there, or leave the key out"
    )]
    NoRevocationLists {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// With such a list, rustls lets nobody in whom the authority has signed.
    #[error(
        "{path}, which [tls] client_crl names, holds a list in the name of an authority of client_ca that the authority has not signed"
    )]
    ForgedRevocationList {
        /// The file.
        path: PathBuf,
    },
    /// The private key belongs to another certificate, or one of them cannot be used.
    #[error(
        "[tls] certificate {certificate} and private_key {private_key} cannot be used together: take both from one `waypost pki server`"
    )]
    Unusable {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        private_key: PathBuf,
        /// What the TLS library said.
        source: rustls::Error,
    },
    /// The authorities cannot be used.
    #[error("{path}, which [tls] client_ca names, holds a certificate that cannot be an authority")]
    UnusableAuthority {
        /// The file.
        path: PathBuf,
        /// What the TLS library said.
        source: rustls::Error,
    },
    /// The trust domain cannot stand in a URI.
    #[error(
        "[tls] trust_domain {0:?} is not one: use 1 to 255 of a-z, 0-9, '-', '_' and '.', such as waypost.example.org"
    )]
    BadTrustDomain(String),
}

/// Whether a text can be a trust domain, as SPIFFE has it.
#[must_use]
pub fn is_trust_domain(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.'))
}

/// The one TLS provider of the gateway and its clients: never the process default, so that no other
/// crate in the process decides. AES-128 first: it is 8 to 12 % of a handshake cheaper than AES-256, and
/// QUIC needs it for its first packets anyway. X25519 only: a hybrid group would make two packets of
/// every first flight.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        kx_groups: vec![ring::kx_group::X25519],
        ..ring::default_provider()
    })
}

/// TLS for the QUIC port.
#[derive(Clone, Debug)]
pub struct DeviceTls {
    /// The server side. All endpoints share it, and with it the sessions that can be resumed.
    pub server: Arc<rustls::ServerConfig>,
    /// The check of those who resume.
    pub check: RestoredCheck,
}

/// The server side of TLS for the QUIC port, and the check that a resumed connection needs. Sessions are
/// kept on this side: rustls takes early data from no other. A device gets one ticket with each connection.
fn device_tls(
    files: &Files,
    config: &TlsConfig,
    sessions: Option<Arc<Sessions>>,
    time: Arc<dyn TimeProvider>,
) -> Result<DeviceTls, TlsError> {
    let verifier = Arc::new(ClientVerifier::new(files, config)?);
    let mut server = server_config(files, config, Arc::clone(&verifier), ALPN)?;
    server.time_provider = Arc::clone(&time);
    if let Some(sessions) = sessions {
        server.session_storage = sessions;
        server.send_tls13_tickets = 1;
        // QUIC has no other number: its own flow control bounds early data.
        server.max_early_data_size = u32::MAX;
    }
    Ok(DeviceTls {
        server: Arc::new(server),
        check: RestoredCheck { verifier, time },
    })
}

/// The same server side without resumption, for whoever has no gateway behind it: every connection does a
/// full handshake.
///
/// # Errors
/// When a file cannot be used; the error says which and what to do.
pub fn device_server_config(config: &TlsConfig) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let files = Files::load(config)?;
    let tls = device_tls(&files, config, None, Arc::new(DefaultTimeProvider))?;
    Ok(tls.server)
}

/// The server side of TLS for the gRPC port, as its files are now.
///
/// # Errors
/// When a file cannot be used; the error says which and what to do.
pub fn freshness_server_config(config: &TlsConfig) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    freshness_tls(&Files::load(config)?, config)
}

/// The server side of TLS for the gRPC port, for HTTP/2. Nothing is kept to resume from, so every
/// certificate is checked every time.
fn freshness_tls(files: &Files, config: &TlsConfig) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let verifier = Arc::new(ClientVerifier::new(files, config)?);
    Ok(Arc::new(server_config(files, config, verifier, b"h2")?))
}

fn server_config(
    files: &Files,
    config: &TlsConfig,
    verifier: Arc<ClientVerifier>,
    alpn: &[u8],
) -> Result<rustls::ServerConfig, TlsError> {
    let mut server = files.server_config(config, verifier)?;
    server.alpn_protocols = vec![alpn.to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server.max_early_data_size = 0;
    Ok(server)
}

/// The files of a [`TlsConfig`], read.
struct Files {
    certificate_pem: Vec<u8>,
    private_key_pem: Vec<u8>,
    client_ca_pem: Vec<u8>,
    client_crl_pem: Option<Vec<u8>>,
}

impl Files {
    fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        if !is_trust_domain(&config.trust_domain) {
            return Err(TlsError::BadTrustDomain(config.trust_domain.clone()));
        }
        let read = |path: &PathBuf, key, maker| {
            fs::read(path).map_err(|source| TlsError::Unreadable {
                path: path.clone(),
                key,
                maker,
                source,
            })
        };
        Ok(Self {
            certificate_pem: read(&config.certificate, "certificate", "server")?,
            private_key_pem: read(&config.private_key, "private_key", "server")?,
            client_ca_pem: read(&config.client_ca, "client_ca", "init")?,
            client_crl_pem: config
                .client_crl
                .as_deref()
                .map(revocation::read)
                .transpose()?,
        })
    }

    /// What the gateway proves itself with.
    fn own(
        &self,
        config: &TlsConfig,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let chain = certificates(&self.certificate_pem, &config.certificate, "certificate")?;
        let key = PrivateKeyDer::from_pem_slice(&self.private_key_pem).map_err(|_| {
            TlsError::Malformed {
                path: config.private_key.clone(),
                key: "private_key",
                expected: "private key",
            }
        })?;
        Ok((chain, key))
    }

    fn server_config(
        &self,
        config: &TlsConfig,
        verifier: Arc<ClientVerifier>,
    ) -> Result<rustls::ServerConfig, TlsError> {
        let (chain, key) = self.own(config)?;
        let unusable = |source| unusable(config, source);
        rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(unusable)
    }
}

fn unusable(config: &TlsConfig, source: rustls::Error) -> TlsError {
    TlsError::Unusable {
        certificate: config.certificate.clone(),
        private_key: config.private_key.clone(),
        source,
    }
}

/// At least one certificate.
fn certificates(
    pem: &[u8],
    path: &Path,
    key: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|certificates| !certificates.is_empty())
        .ok_or_else(|| TlsError::Malformed {
            path: path.to_owned(),
            key,
            expected: "certificate",
        })
}

#[cfg(test)]
mod tests {
    use super::{fixture::Fixture, *};
    use crate::pki::LOCAL_NAMES;

    #[test]
    fn checkers_resume_nothing() {
        let server = freshness_server_config(&Fixture::new().config).unwrap();
        assert!(!server.session_storage.can_cache());
        assert_eq!(
            (server.send_tls13_tickets, server.max_early_data_size),
            (0, 0)
        );
        assert!(!server.ticketer.enabled());
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let fixture = Fixture::new();
        let pki = fixture.dir.path().join("pki");
        let good = || fixture.config.clone();
        let spare = tempfile::tempdir().unwrap();
        let spare = fixture
            .authority
            .issue_server(&LOCAL_NAMES)
            .unwrap()
            .write(spare.path(), "x")
            .unwrap();
        for (config, told) in [
            (
                TlsConfig {
                    certificate: pki.join("none.pem"),
                    ..good()
                },
                "none.pem, which [tls] certificate",
            ),
            (
                TlsConfig {
                    certificate: pki.join("server.key"),
                    ..good()
                },
                "holds no certificate",
            ),
            (
                TlsConfig {
                    private_key: pki.join("server.pem"),
                    ..good()
                },
                "holds no private key",
            ),
            (
                TlsConfig {
                    private_key: pki.join("ca.key"),
                    ..good()
                },
                "cannot be used together",
            ),
            (
                TlsConfig {
                    client_ca: pki.join("ca.key"),
                    ..good()
                },
                "ca.key, which [tls] client_ca",
            ),
            (
                TlsConfig {
                    client_ca: spare.certificate.join("x"),
                    ..good()
                },
                "waypost pki init",
            ),
            (
                TlsConfig {
                    client_crl: Some(pki.join("none.crl")),
                    ..good()
                },
                "none.crl, which [tls] client_crl",
            ),
            (
                TlsConfig {
                    client_crl: Some(pki.join("ca.pem")),
                    ..good()
                },
                "holds no certificate revocation list",
            ),
            (
                TlsConfig {
                    trust_domain: "Example.org".to_owned(),
                    ..good()
                },
                "\"Example.org\"",
            ),
        ] {
            for error in [
                device_server_config(&config).err(),
                freshness_server_config(&config).err(),
            ] {
                let text = error.unwrap().to_string();
                assert!(text.contains(told), "{text}");
            }
        }
        freshness_server_config(&good()).unwrap();
    }
}
