//! The files of TLS while the gateway runs: whether they have changed, and what is in them then.
//!
//! Knows the files and what is made of them. Must not know who uses that, nor time: how often to look is for the
//! caller to say.
//!
//! Sessions outlive a change: a device resumes the one that it has, and `RestoredCheck` of the new files is what it has
//! to pass.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustc_hash::FxHashSet;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};

use super::{
    DeviceTls, Files, Sessions, TlsConfig, TlsError, certificates, device_tls, freshness_tls,
    revocation,
};
use crate::{metrics::Metrics, revocation::CertificateId};

/// The files that a running gateway uses.
#[derive(Debug)]
pub struct TlsFiles {
    config: TlsConfig,
    /// Others that are used with them, and which somebody else reads.
    beside: Vec<PathBuf>,
    sessions: Option<Arc<Sessions>>,
    time: Arc<dyn TimeProvider>,
    /// As they were at the last look.
    seen: Stamps,
    /// As they were when they were read last.
    read: Stamps,
}

/// What the files hold.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// For the QUIC port.
    pub devices: DeviceTls,
    /// For the gRPC port.
    pub checkers: Arc<rustls::ServerConfig>,
    /// The certificates that the authorities have revoked.
    pub revoked: FxHashSet<CertificateId>,
}

/// What tells one version of each file from the next. None of a file that is not there.
type Stamps = Vec<Option<Stamp>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size_bytes: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl TlsFiles {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// When one cannot be used; the error says which and what to do.
    pub fn load(config: &TlsConfig, metrics: &Metrics) -> Result<(Self, Loaded), TlsError> {
        let time: Arc<dyn TimeProvider> = Arc::new(DefaultTimeProvider);
        let sessions = (0 < config.sessions)
            .then(|| Sessions::new(config.sessions, Arc::clone(&time), metrics.clone()));
        let stamps = stamps(config, &[]);
        let files = Self {
            config: config.clone(),
            beside: Vec::new(),
            sessions: sessions.map(Arc::new),
            time,
            seen: stamps.clone(),
            read: stamps,
        };
        let loaded = files.read()?;
        Ok((files, loaded))
    }

    /// The same files and others, which are about to be read for the first time: when one of those changes, it is news as
    /// well.
    #[must_use]
    pub fn and(mut self, others: impl IntoIterator<Item = PathBuf>) -> Self {
        self.beside.extend(others);
        let others = stamps_of(self.beside.iter().map(PathBuf::as_path));
        for stamps in [&mut self.seen, &mut self.read] {
            stamps.truncate(OWN_FILES);
            stamps.extend(&others);
        }
        self
    }

    /// What the files hold now, if that is news. They are read when they were the same at two looks in a row, since a
    /// certificate and its key are replaced one after the other, and each of them piece by piece.
    ///
    /// # Errors
    /// When one cannot be used, once for each change. What was loaded before is as good as ever.
    pub fn reload(&mut self) -> Result<Option<Loaded>, TlsError> {
        let stamps = stamps(&self.config, &self.beside);
        let is_settled = stamps == std::mem::replace(&mut self.seen, stamps.clone());
        if !is_settled || stamps == self.read {
            return Ok(None);
        }
        self.read = stamps;
        self.read().map(Some)
    }

    fn read(&self) -> Result<Loaded, TlsError> {
        let Self { config, .. } = self;
        let files = Files::load(config)?;
        let revoked = match (&files.client_crl_pem, &config.client_crl) {
            (Some(pem), Some(path)) => {
                let authorities =
                    certificates(&files.client_ca_pem, &config.client_ca, "client_ca")?;
                revocation::certificates_on(&revocation::parse(pem, path)?, &authorities, path)?
            }
            _ => FxHashSet::default(),
        };
        Ok(Loaded {
            devices: device_tls(
                &files,
                config,
                self.sessions.clone(),
                Arc::clone(&self.time),
            )?,
            checkers: freshness_tls(&files, config)?,
            revoked,
        })
    }
}

fn stamps(config: &TlsConfig, beside: &[PathBuf]) -> Stamps {
    let own = [
        Some(&config.certificate),
        Some(&config.private_key),
        Some(&config.client_ca),
        config.client_crl.as_ref(),
    ];
    let own: [Option<&Path>; OWN_FILES] = own.map(|path| path.map(PathBuf::as_path));
    let mut stamps: Stamps = own.map(|path| path.and_then(stamp)).into();
    stamps.extend(stamps_of(beside.iter().map(PathBuf::as_path)));
    stamps
}

fn stamps_of<'a>(paths: impl Iterator<Item = &'a Path>) -> Stamps {
    paths.map(stamp).collect()
}

fn stamp(path: &Path) -> Option<Stamp> {
    // Of the file itself, where the name is a link to it: some replace only the link. And when anything of it
    // changed, since the time of its content can be set.
    let file = fs::metadata(path).ok()?;
    Some(Stamp {
        inode: file.ino(),
        size_bytes: file.len(),
        changed_s: file.ctime(),
        changed_ns: file.ctime_nsec(),
    })
}

/// How many files the settings of TLS name, at most.
const OWN_FILES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pki::LOCAL_NAMES,
        tls::{
            certificate_ids,
            fixture::{Fixture, device},
        },
    };

    #[test]
    fn files_are_read_again_once_they_have_changed_and_are_at_rest() {
        let fixture = Fixture::new();
        let (mut files, _) = TlsFiles::load(&fixture.config, &Metrics::new()).unwrap();
        assert!(files.reload().unwrap().is_none());
        let pki = fixture.dir.path().join("pki");
        let renewed = fixture.authority.issue_server(&LOCAL_NAMES).unwrap();
        fs::write(pki.join("server.pem"), &renewed.certificate_pem).unwrap();
        assert!(files.reload().unwrap().is_none(), "perhaps not all of it");
        fs::write(pki.join("server.key"), &renewed.private_key_pem).unwrap();
        assert!(files.reload().unwrap().is_none(), "perhaps not all of it");
        assert!(files.reload().unwrap().is_some());
        assert!(files.reload().unwrap().is_none(), "once");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_said_once_and_read_again_when_it_changes() {
        let fixture = Fixture::new();
        let (mut files, _) = TlsFiles::load(&fixture.config, &Metrics::new()).unwrap();
        let path = fixture.dir.path().join("pki/ca.pem");
        let good = fs::read(&path).unwrap();
        for broken in [Some("torn"), None] {
            match broken {
                Some(text) => fs::write(&path, text).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            assert!(files.reload().unwrap().is_none());
            let error = files.reload().unwrap_err().to_string();
            assert!(error.contains("[tls] client_ca"), "{error}");
            assert!(files.reload().unwrap().is_none(), "once");
        }
        fs::write(&path, good).unwrap();
        assert!(files.reload().unwrap().is_none());
        assert!(files.reload().unwrap().is_some());
    }

    #[test]
    fn a_file_beside_them_that_changes_is_news_as_well() {
        let fixture = Fixture::new();
        let other = fixture.dir.path().join("other");
        let (files, _) = TlsFiles::load(&fixture.config, &Metrics::new()).unwrap();
        let mut files = files.and([other.clone()]);
        assert!(files.reload().unwrap().is_none());
        fs::write(other, "").unwrap();
        assert!(files.reload().unwrap().is_none(), "perhaps not all of it");
        assert!(files.reload().unwrap().is_some());
        assert!(files.reload().unwrap().is_none(), "once");
    }

    #[test]
    fn what_is_loaded_names_the_revoked() {
        let fixture = Fixture::new();
        let credentials = fixture.authority.issue_device(device()).unwrap();
        let (_, loaded) = TlsFiles::load(&fixture.config, &Metrics::new()).unwrap();
        assert!(loaded.revoked.is_empty());
        let (_, loaded) = TlsFiles::load(&fixture.revoking(&credentials), &Metrics::new()).unwrap();
        let id = certificate_ids(&[credentials.certificate_der()])[0];
        assert!(loaded.revoked.contains(&id));
    }
}
