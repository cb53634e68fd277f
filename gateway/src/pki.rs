//! A small certificate authority in a folder, for development, tests and fleets without one of their own.
//!
//! Knows certificates and the files they lie in. Must not know TLS sessions, or who is allowed what.
//! An authority made elsewhere does as well, as long as its certificates carry the URIs that
//! [`waypost_proto::id`] reads.

pub mod command;
pub mod request;

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PublicKeyData, SerialNumber,
};
pub use rcgen::{KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use waypost_proto::id::{DeviceId, Identity, is_checker_name};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use self::request::RequestedKey;
use crate::{clock, durable, tls::is_trust_domain};

/// How long an authority lives: replacing it means visiting every device.
pub const AUTHORITY_DAYS: u32 = 3_650;

/// How long other certificates live unless told otherwise: long enough not to be a chore, short enough
/// that a lost device does not keep its identity for ever.
pub const CERTIFICATE_DAYS: u32 = 365;

/// The names by which the gateway is reached on its own machine.
pub const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// The trust domain of an authority that is told no other.
pub const DEFAULT_TRUST_DOMAIN: &str = "waypost.local";

/// The checker that has a certificate in a development folder.
pub const DEVELOPMENT_CHECKER: &str = "dev";

/// The operator that has one.
pub const DEVELOPMENT_OPERATOR: &str = "dev";

/// Why a certificate was not made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// There is an authority already, and devices may trust it.
    #[error(
        "there is already an authority, {0}, and it is never overwritten: certificates made with it would be worthless; use another folder, or move it away"
    )]
    AuthorityExists(PathBuf),
    /// There is no authority.
    #[error("there is no authority in {0}: make one with `waypost pki init`")]
    NoAuthority(PathBuf),
    /// The file of a certificate or key is there already.
    #[error(
        "{0} is there already and is not overwritten: move it away, or choose another folder with --out"
    )]
    Exists(PathBuf),
    /// A file or folder cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or folder cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The authority's certificate or key is not one that `waypost pki init` made.
    #[error("{path} {problem}: restore it from a copy, or begin a new authority in another folder")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The trust domain cannot stand in a URI.
    #[error(
        "{0:?} is no trust domain: use 1 to 255 of a-z, 0-9, '-', '_' and '.', such as waypost.example.org"
    )]
    BadTrustDomain(String),
    /// The host name cannot stand in a certificate.
    #[error("{0:?} is neither a host name nor an IP address")]
    BadHostName(String),
    /// The checker's or operator's name cannot stand in a URI.
    #[error(
        "{0:?} cannot name a checker or an operator: use 1 to 64 of a-z, 0-9, '-', '_' and '.'"
    )]
    BadName(String),
    /// The dates cannot stand in a certificate.
    #[error(
        "a certificate cannot be valid from {not_before_s} to {not_after_s} (seconds since 1970)"
    )]
    BadValidity {
        /// When it would begin.
        not_before_s: u64,
        /// When it would end.
        not_after_s: u64,
    },
    /// The signature failed.
    #[error("cannot make the certificate")]
    Signing(#[from] rcgen::Error),
}

/// From when until when a certificate holds, in seconds since 1970-01-01 UTC, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before_s: u64,
    /// The last second.
    pub not_after_s: u64,
}

impl Validity {
    /// The next `days` days. It begins an hour ago: the clock of whoever checks it may be behind.
    #[must_use]
    pub fn days(days: u32) -> Self {
        let now_s = clock::system_now_ms() / 1_000;
        Self {
            not_before_s: now_s.saturating_sub(3_600),
            not_after_s: now_s.saturating_add(u64::from(days) * 86_400),
        }
    }

    fn apply(self, params: &mut CertificateParams) -> Result<(), PkiError> {
        let date = |seconds| {
            let since_1970 = Duration::from_secs(seconds).try_into().ok()?;
            rcgen::date_time_ymd(1970, 1, 1).checked_add(since_1970)
        };
        let Self {
            not_before_s,
            not_after_s,
        } = self;
        let (Some(not_before), Some(not_after), true) = (
            date(not_before_s),
            date(not_after_s),
            not_before_s <= not_after_s,
        ) else {
            return Err(PkiError::BadValidity {
                not_before_s,
                not_after_s,
            });
        };
        params.not_before = not_before;
        params.not_after = not_after;
        Ok(())
    }

    /// The last day, as people write it.
    fn last_day(self) -> String {
        let last = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(self.not_after_s);
        last.date().to_string()
    }
}

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be connected to.
    Server,
    /// To connect.
    Client,
}

/// A certificate and its private key.
#[derive(Clone)]
pub struct Credentials {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key. A secret.
    pub private_key_pem: String,
    certificate: CertificateDer<'static>,
    private_key: Vec<u8>,
}

impl Credentials {
    /// The certificate, for rustls.
    #[must_use]
    pub fn certificate_der(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The private key, for rustls.
    #[must_use]
    pub fn private_key_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.private_key.clone()).into()
    }

    /// Writes `<stem>.pem` and `<stem>.key`, the key for its owner's eyes only.
    ///
    /// # Errors
    /// When one of them is there already, or cannot be written.
    pub fn write(&self, dir: &Path, stem: &str) -> Result<Written, PkiError> {
        let written = Written::named(dir, stem);
        create_dir(dir)?;
        // Both names are tried before anything is written, so that no half pair is left behind.
        if let Some(taken) = [&written.certificate, &written.private_key]
            .into_iter()
            .find(|path| path.exists())
        {
            return Err(PkiError::Exists(taken.clone()));
        }
        write_new(&written.private_key, &self.private_key_pem, SECRET)?;
        write_new(&written.certificate, &self.certificate_pem, PUBLIC)?;
        Ok(written)
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("certificate_pem", &self.certificate_pem)
            .finish_non_exhaustive()
    }
}

/// Where a certificate and its key lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The private key's file.
    pub private_key: PathBuf,
}

impl Written {
    fn named(dir: &Path, stem: &str) -> Self {
        Self {
            certificate: dir.join(format!("{stem}.pem")),
            private_key: dir.join(format!("{stem}.key")),
        }
    }
}

/// A certificate authority, opened.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    trust_domain: String,
}

impl Authority {
    /// Makes an authority in a folder: `ca.pem` and `ca.key`.
    ///
    /// # Errors
    /// When there is one already, the trust domain is not one, or the files cannot be written.
    pub fn create(dir: &Path, trust_domain: &str) -> Result<Self, PkiError> {
        if !is_trust_domain(trust_domain) {
            return Err(PkiError::BadTrustDomain(trust_domain.to_owned()));
        }
        let files = Written::named(dir, "ca");
        create_dir(dir)?;
        if let Some(taken) = [&files.certificate, &files.private_key]
            .into_iter()
            .find(|path| path.exists())
        {
            return Err(PkiError::AuthorityExists(taken.clone()));
        }

        let key = KeyPair::generate()?;
        write_new(&files.private_key, &key.serialize_pem(), SECRET)?;
        Self::certify(&files, key, trust_domain)
    }

    /// Makes the certificate of an authority whose key is there. It comes last: an authority without it
    /// was never used.
    fn certify(files: &Written, key: KeyPair, trust_domain: &str) -> Result<Self, PkiError> {
        let mut params = CertificateParams::default();
        // The number keeps two authorities of one domain apart: who trusts one of them can say of the
        // other's certificates that their authority is unknown, and not only that the signature is wrong.
        let serial = random_serial();
        let number = u32::from_be_bytes([serial[0], serial[1], serial[2], serial[3]]);
        params.distinguished_name = common_name(&format!(
            "Waypost authority of {trust_domain}, {number:08x}"
        ));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&authority_uri(trust_domain))?];
        Validity::days(AUTHORITY_DAYS).apply(&mut params)?;
        let certificate_pem = params.self_signed(&key)?.pem();

        write_new(&files.certificate, &certificate_pem, PUBLIC)?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate_pem,
            trust_domain: trust_domain.to_owned(),
        })
    }

    /// Opens the authority in a folder.
    ///
    /// # Errors
    /// When there is none, or its files are damaged.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        let files = Written::named(dir, "ca");
        if !files.certificate.exists() {
            return Err(PkiError::NoAuthority(dir.to_owned()));
        }
        let (issuer, certificate_pem) = issuer(&files)?;
        let trust_domain = trust_domain_of(certificate_pem.as_bytes())
            .ok_or_else(|| damaged(&files.certificate, "does not name its trust domain"))?;
        Ok(Self {
            issuer,
            certificate_pem,
            trust_domain,
        })
    }

    /// Opens an authority that signs for a trust domain, and may have been made elsewhere: the first certificate of its
    /// file is that of the key.
    ///
    /// # Errors
    /// When the files cannot be used, or the authority is one of another trust domain.
    pub fn open_files(
        certificate: &Path,
        private_key: &Path,
        trust_domain: &str,
    ) -> Result<Self, PkiError> {
        let files = Written {
            certificate: certificate.to_owned(),
            private_key: private_key.to_owned(),
        };
        let (issuer, certificate_pem) = issuer(&files)?;
        let named = trust_domain_of(certificate_pem.as_bytes());
        if named.is_some_and(|named| named != trust_domain) {
            return Err(damaged(certificate, "is one of another trust domain"));
        }
        Ok(Self {
            issuer,
            certificate_pem,
            trust_domain: trust_domain.to_owned(),
        })
    }

    /// The trust domain whose identities it hands out.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Its certificate: what peers must know to trust what it signs.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// All certificates of its file, its own first.
    #[must_use]
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        // They could be read when it was opened.
        CertificateDer::pem_slice_iter(self.certificate_pem.as_bytes())
            .flatten()
            .collect()
    }

    /// A certificate for a gateway that is reached by these host names and addresses.
    ///
    /// # Errors
    /// When one of the names is not one.
    pub fn issue_server(&self, names: &[impl AsRef<str>]) -> Result<Credentials, PkiError> {
        let validity = Validity::days(CERTIFICATE_DAYS);
        self.issue(
            host_names(names)?,
            Purpose::Server,
            validity,
            &KeyPair::generate()?,
        )
    }

    /// A certificate for a device, with a key of its own.
    ///
    /// # Errors
    /// When the signature fails.
    pub fn issue_device(&self, device: DeviceId) -> Result<Credentials, PkiError> {
        self.issue_device_with_key(device, &KeyPair::generate()?)
    }

    /// A certificate for a device with a key that others have as well: a simulated fleet is one holder.
    ///
    /// # Errors
    /// When the signature fails.
    pub fn issue_device_with_key(
        &self,
        device: DeviceId,
        key: &KeyPair,
    ) -> Result<Credentials, PkiError> {
        let names = self.names_of(&Identity::Device(device))?;
        self.issue(
            names,
            Purpose::Client,
            Validity::days(CERTIFICATE_DAYS),
            key,
        )
    }

    /// A certificate for a checker.
    ///
    /// # Errors
    /// When the name cannot be a checker's.
    pub fn issue_checker(&self, name: &str) -> Result<Credentials, PkiError> {
        let names = self.names_of(&Identity::Checker(name.to_owned()))?;
        self.issue(
            names,
            Purpose::Client,
            Validity::days(CERTIFICATE_DAYS),
            &KeyPair::generate()?,
        )
    }

    /// A certificate for an operator's backend.
    ///
    /// # Errors
    /// When the name cannot be an operator's.
    pub fn issue_operator(&self, name: &str) -> Result<Credentials, PkiError> {
        let names = self.names_of(&Identity::Operator(name.to_owned()))?;
        self.issue(
            names,
            Purpose::Client,
            Validity::days(CERTIFICATE_DAYS),
            &KeyPair::generate()?,
        )
    }

    /// A certificate for a device that keeps its private key to itself.
    ///
    /// # Errors
    /// When the dates are not dates, or the signature fails.
    pub fn certify_device(
        &self,
        device: DeviceId,
        key: &RequestedKey,
        validity: Validity,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let names = self.names_of(&Identity::Device(device))?;
        let certificate = self.sign(names, Purpose::Client, validity, &key.key)?;
        Ok(certificate.der().clone())
    }

    /// The name that an identity has in its certificate.
    ///
    /// # Errors
    /// When a checker's or operator's name is not one.
    pub fn names_of(&self, identity: &Identity) -> Result<Vec<SanType>, PkiError> {
        if let Identity::Checker(name) | Identity::Operator(name) = identity
            && !is_checker_name(name)
        {
            return Err(PkiError::BadName(name.clone()));
        }
        Ok(vec![uri(&identity.to_uri(&self.trust_domain))?])
    }

    /// Signs any certificate: with these names, for this purpose and time, for the holder of this key.
    ///
    /// # Errors
    /// When the dates are not dates, or the signature fails.
    pub fn issue(
        &self,
        names: Vec<SanType>,
        purpose: Purpose,
        validity: Validity,
        key: &KeyPair,
    ) -> Result<Credentials, PkiError> {
        let certificate = self.sign(names, purpose, validity, key)?;
        Ok(Credentials {
            certificate_pem: certificate.pem(),
            private_key_pem: key.serialize_pem(),
            certificate: certificate.der().clone(),
            private_key: key.serialize_der(),
        })
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        purpose: Purpose,
        validity: Validity,
        key: &impl PublicKeyData,
    ) -> Result<Certificate, PkiError> {
        let mut params = CertificateParams::default();
        let (name, usage) = match purpose {
            Purpose::Server => ("Waypost gateway", ExtendedKeyUsagePurpose::ServerAuth),
            Purpose::Client => ("Waypost client", ExtendedKeyUsagePurpose::ClientAuth),
        };
        params.distinguished_name = common_name(name);
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.subject_alt_names = names;
        params.use_authority_key_identifier_extension = true;
        validity.apply(&mut params)?;
        Ok(params.signed_by(key, &self.issuer)?)
    }
}

/// An authority's key, and the text of the certificate that goes with it.
fn issuer(files: &Written) -> Result<(Issuer<'static, KeyPair>, String), PkiError> {
    let certificate_pem = read(&files.certificate)?;
    let key = read_key(&files.private_key)?;
    let no_certificate = || damaged(&files.certificate, "is no certificate");
    let all: Vec<_> = CertificateDer::pem_slice_iter(certificate_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| no_certificate())?;
    let der = all.first().ok_or_else(no_certificate)?;
    let (_, certificate) = parse_x509_certificate(der).map_err(|_| no_certificate())?;
    if certificate.public_key().raw != key.subject_public_key_info() {
        return Err(damaged(
            &files.private_key,
            "is not the key of the certificate beside it",
        ));
    }
    Ok((Issuer::from_ca_cert_der(der, key)?, certificate_pem))
}

/// The trust domain that the certificate of an authority names, as `waypost pki init` has it do.
fn trust_domain_of(certificate_pem: &[u8]) -> Option<String> {
    let der = CertificateDer::from_pem_slice(certificate_pem).ok()?;
    let (_, certificate) = parse_x509_certificate(&der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("spiffe://"),
            _ => None,
        })
        .filter(|text| is_trust_domain(text))
        .map(ToOwned::to_owned)
}

fn damaged(path: &Path, problem: &'static str) -> PkiError {
    PkiError::Damaged {
        path: path.to_owned(),
        problem,
    }
}

/// Makes sure that a folder has all that a development gateway needs: an authority, the gateway's
/// certificate for this machine, and those of a checker and an operator. What is there is used as it is; a key without its
/// certificate is of an earlier start that was cut short, and gets one.
///
/// # Errors
/// When what is there is damaged, or files cannot be written.
pub fn prepare_development(dir: &Path) -> Result<Authority, PkiError> {
    let authority = match Authority::open(dir) {
        Err(PkiError::NoAuthority(_)) => {
            let files = Written::named(dir, "ca");
            if files.private_key.exists() {
                let key = read_key(&files.private_key)?;
                Authority::certify(&files, key, DEFAULT_TRUST_DOMAIN)?
            } else {
                Authority::create(dir, DEFAULT_TRUST_DOMAIN)?
            }
        }
        opened => opened?,
    };
    // As long as the authority: a development folder should not stop working one day.
    let validity = Validity::days(AUTHORITY_DAYS);
    let checker = Identity::Checker(DEVELOPMENT_CHECKER.to_owned());
    let operator = Identity::Operator(DEVELOPMENT_OPERATOR.to_owned());
    for (stem, names, purpose) in [
        (
            "server".to_owned(),
            host_names(&LOCAL_NAMES)?,
            Purpose::Server,
        ),
        (
            stem_of(&checker),
            authority.names_of(&checker)?,
            Purpose::Client,
        ),
        (
            stem_of(&operator),
            authority.names_of(&operator)?,
            Purpose::Client,
        ),
    ] {
        let files = Written::named(dir, &stem);
        match (files.private_key.exists(), files.certificate.exists()) {
            (true, true) => {}
            (true, false) => {
                let key = read_key(&files.private_key)?;
                let issued = authority.issue(names, purpose, validity, &key)?;
                write_new(&files.certificate, &issued.certificate_pem, PUBLIC)?;
            }
            (false, _) => {
                authority
                    .issue(names, purpose, validity, &KeyPair::generate()?)?
                    .write(dir, &stem)?;
            }
        }
    }
    Ok(authority)
}

/// The file name, without its ending, of an identity's certificate.
#[must_use]
pub fn stem_of(identity: &Identity) -> String {
    match identity {
        Identity::Device(DeviceId { user, device }) => format!("device-{user}-{device}"),
        Identity::Checker(name) => format!("checker-{name}"),
        Identity::Operator(name) => format!("operator-{name}"),
    }
}

/// Host names and addresses, as they stand in a certificate.
///
/// # Errors
/// When one of them is neither.
pub fn host_names(names: &[impl AsRef<str>]) -> Result<Vec<SanType>, PkiError> {
    let host_name = |name: &str| {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(SanType::IpAddress(address));
        }
        // What TLS clients accept as a name; anything else would only fail later, at the device.
        rustls::pki_types::DnsName::try_from(name)
            .ok()
            .and_then(|_| name.try_into().ok())
            .map(SanType::DnsName)
            .ok_or_else(|| PkiError::BadHostName(name.to_owned()))
    };
    names.iter().map(|name| host_name(name.as_ref())).collect()
}

fn uri(text: &str) -> Result<SanType, PkiError> {
    Ok(SanType::URI(text.try_into()?))
}

fn authority_uri(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

fn common_name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

/// A number that no other certificate has. Without it, all certificates of one key would share theirs.
fn random_serial() -> [u8; 16] {
    *uuid::Uuid::new_v4().as_bytes()
}

const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

fn create_dir(dir: &Path) -> Result<(), PkiError> {
    durable::create_folder(dir).map_err(|source| PkiError::Write {
        path: dir.to_owned(),
        source,
    })
}

/// Writes a file that must not be there yet: as a whole, and on disk when this returns. A key that is
/// lost takes all of its certificates with it.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    if path.exists() {
        return Err(PkiError::Exists(path.to_owned()));
    }
    durable::replace_file(path, text.as_bytes(), mode).map_err(|source| PkiError::Write {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_key(path: &Path) -> Result<KeyPair, PkiError> {
    KeyPair::from_pem(&read(path)?).map_err(|_| PkiError::Damaged {
        path: path.to_owned(),
        problem: "is no private key",
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, os::unix::fs::PermissionsExt};

    use waypost_proto::id::UserId;

    use super::*;
    use crate::tls::identity_of;

    fn device(number: u32) -> DeviceId {
        DeviceId {
            user: UserId([7; 16]),
            device: number,
        }
    }

    #[test]
    fn an_opened_authority_goes_on_where_it_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let made = Authority::create(dir.path(), "crew.example.org").unwrap();
        let opened = Authority::open(dir.path()).unwrap();
        assert_eq!(opened.trust_domain(), "crew.example.org");
        assert_eq!(opened.certificate_pem(), made.certificate_pem());

        let credentials = opened.issue_device(device(3)).unwrap();
        let chain = [credentials.certificate_der()];
        assert_eq!(
            identity_of(&chain, "crew.example.org"),
            Ok(Identity::Device(device(3)))
        );
        let (_, certificate) = parse_x509_certificate(&chain[0]).unwrap();
        let authority = CertificateDer::from_pem_slice(made.certificate_pem().as_bytes()).unwrap();
        let (_, authority) = parse_x509_certificate(&authority).unwrap();
        certificate
            .verify_signature(Some(authority.public_key()))
            .unwrap();
        assert_eq!(certificate.issuer(), authority.subject());
    }

    #[test]
    fn an_authority_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let made = Authority::create(dir.path(), "waypost.local").unwrap();
        let again = Authority::create(dir.path(), "waypost.local");
        assert!(matches!(again, Err(PkiError::AuthorityExists(path)) if path.ends_with("ca.pem")));
        fs::remove_file(dir.path().join("ca.pem")).unwrap();
        let over_the_key = Authority::create(dir.path(), "waypost.local");
        assert!(
            matches!(over_the_key, Err(PkiError::AuthorityExists(path)) if path.ends_with("ca.key"))
        );
        fs::write(dir.path().join("ca.pem"), made.certificate_pem()).unwrap();
        Authority::open(dir.path()).unwrap();
    }

    #[test]
    fn files_are_not_overwritten_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path(), "waypost.local").unwrap();
        let credentials = authority.issue_checker("night").unwrap();
        let written = credentials.write(dir.path(), "checker-night").unwrap();
        for key in [&written.private_key, &dir.path().join("ca.key")] {
            assert_eq!(
                fs::metadata(key).unwrap().permissions().mode() & 0o777,
                0o600,
                "{key:?}"
            );
        }
        assert!(matches!(
            credentials.write(dir.path(), "checker-night"),
            Err(PkiError::Exists(_))
        ));
        assert_eq!(
            fs::read_to_string(&written.certificate).unwrap(),
            credentials.certificate_pem
        );
    }

    #[test]
    fn a_key_that_belongs_to_another_authority_is_noticed() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Authority::create(one.path(), "waypost.local").unwrap();
        Authority::create(other.path(), "waypost.local").unwrap();
        fs::copy(other.path().join("ca.key"), one.path().join("ca.key")).unwrap();
        assert!(
            matches!(Authority::open(one.path()), Err(PkiError::Damaged { path, .. }) if path.ends_with("ca.key"))
        );
        fs::remove_file(one.path().join("ca.key")).unwrap();
        assert!(
            matches!(Authority::open(one.path()), Err(PkiError::Read { path, .. }) if path.ends_with("ca.key"))
        );
        assert!(matches!(
            Authority::open(&one.path().join("nowhere")),
            Err(PkiError::NoAuthority(_))
        ));
    }

    #[test]
    fn ten_thousand_devices_share_a_key_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path(), "waypost.local").unwrap();
        let key = KeyPair::generate().unwrap();
        let mut serials = HashSet::new();
        for number in 0..10_000 {
            let credentials = authority
                .issue_device_with_key(device(number), &key)
                .unwrap();
            let chain = [credentials.certificate_der()];
            assert_eq!(
                identity_of(&chain, "waypost.local"),
                Ok(Identity::Device(device(number)))
            );
            serials.insert(
                parse_x509_certificate(&chain[0])
                    .unwrap()
                    .1
                    .tbs_certificate
                    .serial
                    .clone(),
            );
        }
        assert_eq!(serials.len(), 10_000);
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for trust_domain in ["", "Example.org", "example.org/x", "a b"] {
            let made = Authority::create(dir.path(), trust_domain);
            assert!(
                matches!(made, Err(PkiError::BadTrustDomain(_))),
                "{trust_domain}"
            );
        }
        let authority = Authority::create(dir.path(), "waypost.local").unwrap();
        assert!(matches!(
            authority.issue_server(&["a host"]),
            Err(PkiError::BadHostName(_))
        ));
        assert!(matches!(
            authority.issue_checker("a/b"),
            Err(PkiError::BadName(_))
        ));
        for (not_before_s, not_after_s) in [(2, 1), (0, u64::MAX)] {
            let validity = Validity {
                not_before_s,
                not_after_s,
            };
            let issued = authority.issue(
                vec![],
                Purpose::Client,
                validity,
                &KeyPair::generate().unwrap(),
            );
            assert!(matches!(issued, Err(PkiError::BadValidity { .. })));
        }
    }

    #[test]
    fn a_development_folder_is_completed_and_then_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        let files = [
            "ca.pem",
            "ca.key",
            "server.pem",
            "server.key",
            "checker-dev.pem",
            "checker-dev.key",
        ];
        let contents = || files.map(|file| fs::read_to_string(pki.join(file)).unwrap());
        prepare_development(&pki).unwrap();
        let first = contents();
        prepare_development(&pki).unwrap();
        assert_eq!(contents(), first);
    }

    #[test]
    fn a_development_folder_whose_making_was_cut_short_is_completed() {
        // In the order in which they are written.
        let files = [
            "ca.key",
            "ca.pem",
            "server.key",
            "server.pem",
            "checker-dev.key",
            "checker-dev.pem",
        ];
        for made in 0..files.len() {
            let dir = tempfile::tempdir().unwrap();
            let authority = prepare_development(dir.path()).unwrap();
            for file in &files[made..] {
                fs::remove_file(dir.path().join(file)).unwrap();
            }
            fs::write(dir.path().join(files[made]).with_extension("new"), "a pa").unwrap();
            let completed = prepare_development(dir.path()).unwrap();
            assert_eq!(
                completed.certificate_pem() == authority.certificate_pem(),
                1 < made,
                "{made} files were there"
            );
            for stem in ["server", "checker-dev"] {
                let files = Written::named(dir.path(), stem);
                let pem = fs::read(files.certificate).unwrap();
                let der = CertificateDer::from_pem_slice(&pem).unwrap();
                let (_, certificate) = parse_x509_certificate(&der).unwrap();
                let key = read_key(&files.private_key).unwrap();
                assert_eq!(certificate.public_key().raw, key.subject_public_key_info());
            }
        }
    }
}
