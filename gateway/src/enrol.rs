//! Enrolment: how devices come by their certificates, and by the next ones.
//!
//! Knows the settings and which part does what: `invitations` says who may enrol (the committer asks it), `guesses` how
//! often anybody may try, `registrar` signs, `door` is the port for newcomers, `service` what operators call, and `reload`
//! has all of them change with their files. Must
//! not know connections of devices: their sessions ask the [`Registrar`] themselves.
//!
//! Without an authority in the settings there is none of it: the operator brings certificates from elsewhere.

mod door;
mod guesses;
pub mod invitations;
mod registrar;
mod reload;
mod service;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    num::NonZeroU32,
    path::{self, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use waypost_proto::id::is_checker_name;

use crate::{
    grants::CheckerNumber,
    metrics::Metrics,
    orders::OrderHandle,
    pki::{PkiError, host_names},
    tls::{
        Refusal, RestoredCheck, TlsConfig, TlsError,
        enrolment::{self, EnrolmentTls},
    },
};

use self::door::Door;
pub(crate) use self::registrar::{outcome_label, refused};
pub use self::{
    registrar::{Issuing, Registrar, Renewals},
    reload::{Changed, EnrolmentReload},
    service::{Inviter, LONGEST_INVITATION},
};

/// Both halves of `waypost.v1.Enrolment`, as generated.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
pub mod rpc {
    include!("gen/enrolment.rs");
}

/// Whether the gateway issues certificates, and to whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EnrolmentConfig {
    /// The UDP address that newcomers connect to. Loopback until somebody decides otherwise.
    pub listen: SocketAddr,
    /// The host name or address by which devices reach this gateway, for invitations: one that is in its certificate.
    pub public_host: String,
    /// The authority that signs, PEM: its own certificate first, then what devices have to show with theirs.
    /// Devices that it has signed must be let in by `tls.client_ca`. A relative path, here and below, starts
    /// at the data folder. Both files are read again within seconds when one has changed, or one of `tls`. Without it
    /// nobody can enrol.
    pub ca_certificate: Option<PathBuf>,
    /// The private key of that authority, PEM. Whoever has it can be anybody, so let it be one for devices only.
    pub ca_key: Option<PathBuf>,
    /// For how long a certificate holds. A device renews it at two thirds of that, so a third of it is how long a device
    /// may be away.
    #[serde(with = "humantime_serde")]
    pub certificate_lifetime: Duration,
    /// For how long a code works, unless the operator says otherwise.
    #[serde(with = "humantime_serde")]
    pub invitation_lifetime: Duration,
    /// The names of the operators that may invite. A certificate alone does not let anybody do that.
    pub operators: Vec<String>,
    /// How many invitations are kept until they expire. Each takes about 120 bytes.
    pub max_invitations: usize,
    /// How many tries a minute are taken from one address; 0 is no limit.
    pub tries_per_minute: u32,
    /// And how many at once after a pause: a crew that enrols in one room.
    pub tries_burst: u32,
    /// How many tries a second are taken in all: what they may cost those who are enrolled. Each is a handshake.
    pub all_tries_per_s: NonZeroU32,
}

impl Default for EnrolmentConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4435)),
            public_host: "localhost".to_owned(),
            ca_certificate: None,
            ca_key: None,
            certificate_lifetime: Duration::from_secs(7 * 24 * 3_600),
            invitation_lifetime: Duration::from_secs(24 * 3_600),
            operators: Vec::new(),
            max_invitations: 10_000,
            tries_per_minute: 60,
            tries_burst: 60,
            all_tries_per_s: const { NonZeroU32::new(50).expect("not zero") },
        }
    }
}

impl EnrolmentConfig {
    /// Starts the relative paths at the data folder, as [`TlsConfig::under`].
    #[must_use]
    pub fn under(self, data_dir: &Path) -> Self {
        let base = path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        Self {
            ca_certificate: self.ca_certificate.map(|path| base.join(path)),
            ca_key: self.ca_key.map(|path| base.join(path)),
            ..self
        }
    }

    /// The files of the authority, if it is named.
    pub(crate) fn files(&self) -> impl Iterator<Item = PathBuf> {
        let files = [&self.ca_certificate, &self.ca_key];
        files.into_iter().flatten().cloned()
    }

    /// Whether the settings can be used, before a port is bound.
    ///
    /// # Errors
    /// When one cannot; the error says which.
    pub fn check(&self) -> Result<(), EnrolmentError> {
        if self.ca_certificate.is_some() != self.ca_key.is_some() {
            return Err(EnrolmentError::HalfAnAuthority);
        }
        if let Some(name) = self.operators.iter().find(|name| !is_checker_name(name)) {
            return Err(EnrolmentError::OperatorName { name: name.clone() });
        }
        if host_names(&[&self.public_host]).is_err() {
            return Err(EnrolmentError::PublicHost {
                host: self.public_host.clone(),
            });
        }
        let lifetime = self.certificate_lifetime;
        if lifetime < SHORTEST_LIFETIME || LONGEST_LIFETIME < lifetime {
            return Err(EnrolmentError::CertificateLifetime { lifetime });
        }
        let lifetime = self.invitation_lifetime;
        if lifetime.is_zero() || LONGEST_INVITATION < lifetime {
            return Err(EnrolmentError::InvitationLifetime { lifetime });
        }
        Ok(())
    }
}

/// Why nobody can enrol.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// One file is of no use without the other.
    #[error(
        "enrolment.ca_certificate and enrolment.ca_key go together: set both, or neither if certificates come from elsewhere"
    )]
    HalfAnAuthority,
    /// A name that no certificate can have.
    #[error(
        "enrolment.operators: {name:?} is no name of an operator: use 1 to 64 of a-z, 0-9, '-', '_' and '.'"
    )]
    OperatorName {
        /// The name.
        name: String,
    },
    /// No device could find it.
    #[error("enrolment.public_host is {host:?}, which is neither a host name nor an IP address")]
    PublicHost {
        /// What was set.
        host: String,
    },
    /// Too short to be renewed in time, or so long that it would never end.
    #[error("enrolment.certificate_lifetime is {lifetime:?}: set it to between 3s and 3650days")]
    CertificateLifetime {
        /// What was set.
        lifetime: Duration,
    },
    /// A code that does not work, or one that lies around.
    #[error(
        "enrolment.invitation_lifetime is {lifetime:?}: set it to at most 30days, and more than 0s"
    )]
    InvitationLifetime {
        /// What was set.
        lifetime: Duration,
    },
    /// The authority cannot be used.
    #[error("the authority of enrolment.ca_certificate and enrolment.ca_key cannot be used: {0}")]
    Authority(#[from] PkiError),
    /// Devices would enrol and then be refused.
    #[error(
        "the gateway would not let in whom the authority of enrolment.ca_certificate has signed, since {0}: is it in the file that [tls] client_ca names?"
    )]
    NotLetIn(Refusal),
    /// The gateway cannot prove itself to newcomers.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// QUIC needs a cipher that the TLS settings do not have.
    #[error("the TLS settings cannot be used for QUIC: {0}")]
    Quic(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The address is taken, not ours, or not allowed.
    #[error(
        "cannot listen for newcomers on udp {listen}: {source}; is another gateway running, or is enrolment.listen wrong?"
    )]
    Bind {
        /// The address.
        listen: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// What enrolment works with.
#[derive(Debug)]
pub struct EnrolmentParts<'a> {
    /// How the gateway proves itself, and the trust domain.
    pub tls: &'a TlsConfig,
    /// What newcomers will have to pass as devices.
    pub check: &'a RestoredCheck,
    /// Where devices connect.
    pub devices: SocketAddr,
    /// Whom an invitation may name.
    pub checkers: &'a BTreeMap<String, CheckerNumber>,
    /// The way to the committer.
    pub order: OrderHandle,
    /// What is counted with.
    pub metrics: Metrics,
    /// Cancelled when the gateway stops.
    pub draining: CancellationToken,
}

/// Enrolment, bound.
#[derive(Debug)]
pub struct Enrolment {
    /// Signs for newcomers and for those who renew.
    pub issuing: Arc<Issuing>,
    /// Has all of it changed when the files behind it have.
    pub reload: Arc<EnrolmentReload>,
    /// What operators call.
    pub inviter: Inviter,
    door: Door,
    listen: SocketAddr,
}

impl Enrolment {
    /// Opens the port and the authority, within a runtime. `None` where the settings name no authority.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn bind(
        config: &EnrolmentConfig,
        parts: EnrolmentParts<'_>,
    ) -> Result<Option<Self>, EnrolmentError> {
        config.check()?;
        let Some((registrar, tls)) = open(config, parts.tls, parts.check, parts.devices)? else {
            return Ok(None);
        };
        let issuing = Issuing::by(registrar);
        let (servers, server) = watch::channel(None);
        let door = Door::bind(config, &tls, server, Arc::clone(&issuing), &parts)?;
        let listen = door.local_addr().map_err(|source| EnrolmentError::Bind {
            listen: config.listen,
            source,
        })?;
        let inviter = Inviter::new(config, listen, tls.authority.as_deref(), &parts);
        let reload = EnrolmentReload {
            config: config.clone(),
            tls: parts.tls.clone(),
            devices: parts.devices,
            server: address(&config.public_host, listen.port()),
            issuing: Arc::clone(&issuing),
            servers,
            inviter: inviter.clone(),
        };
        Ok(Some(Self {
            issuing,
            reload: Arc::new(reload),
            inviter,
            door,
            listen,
        }))
    }

    /// Where newcomers connect.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.listen
    }

    /// Serves newcomers until the gateway drains, and those who have come by then for a second more.
    pub async fn run(self) {
        self.door.run().await;
    }
}

/// The authority, as its files are now, and how the gateway proves itself to newcomers. `None` where the settings name none.
fn open(
    config: &EnrolmentConfig,
    tls: &TlsConfig,
    check: &RestoredCheck,
    devices: SocketAddr,
) -> Result<Option<(Registrar, EnrolmentTls)>, EnrolmentError> {
    let Some(mut registrar) = Registrar::open(config, tls, check)? else {
        return Ok(None);
    };
    let tls = enrolment::enrolment_tls(tls, registrar.authorities())?;
    registrar.lead_to(devices, tls.authority.clone());
    Ok(Some((registrar, tls)))
}

/// `host:port`, as it is written for a device.
fn address(host: &str, port: u16) -> String {
    match host.parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]:{port}"),
        Err(_) => format!("{host}:{port}"),
    }
}

/// Less could not be renewed at two thirds of it, in whole seconds.
const SHORTEST_LIFETIME: Duration = Duration::from_secs(3);
/// As long as an authority of `waypost pki init`.
const LONGEST_LIFETIME: Duration = Duration::from_secs(3_650 * 24 * 3_600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_used_are_told() {
        let good = EnrolmentConfig::default;
        good().check().unwrap();
        for (config, told) in [
            (
                EnrolmentConfig {
                    ca_key: Some("x".into()),
                    ..good()
                },
                "go together",
            ),
            (
                EnrolmentConfig {
                    operators: vec!["Office".to_owned()],
                    ..good()
                },
                "\"Office\"",
            ),
            (
                EnrolmentConfig {
                    public_host: "gw example".to_owned(),
                    ..good()
                },
                "\"gw example\"",
            ),
            (
                EnrolmentConfig {
                    certificate_lifetime: Duration::from_secs(1),
                    ..good()
                },
                "certificate_lifetime",
            ),
            (
                EnrolmentConfig {
                    invitation_lifetime: Duration::ZERO,
                    ..good()
                },
                "invitation_lifetime",
            ),
        ] {
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn an_address_is_written_so_that_it_can_be_read() {
        assert_eq!(address("gw.example.org", 4435), "gw.example.org:4435");
        assert_eq!(address("::1", 4435), "[::1]:4435");
    }
}
