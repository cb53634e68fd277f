//! What a command needs that does by itself, where no gateway runs, what a gateway would do.
//!
//! Knows who can write to a data folder just now, and what has to be on record. Must not know any command.

use std::{
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use crate::{
    audit::{
        self,
        chain::{Deed, What, Who, Whose},
    },
    config::{self, Config, ConfigError},
    store::{OpenError, Store, StoreConfig},
};

/// Why a command cannot do without a gateway what it should.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum StandaloneError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The audit log cannot be written.
    #[error("cannot write the audit log {path}: {source}; nothing was done")]
    NotRecorded {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl StandaloneError {
    /// Whether somebody else has the store: a gateway that starts or stops has it, and does not listen yet or any more.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Open(OpenError::Locked { .. }))
    }
}

/// Has the gateway do something, or does it alone where none runs; again and again while one starts or stops. Says
/// whether it was the gateway.
pub(crate) fn by_gateway_or_alone<Done, Failed>(
    mut by_gateway: impl FnMut() -> Result<Option<Done>, Failed>,
    mut alone: impl FnMut() -> Result<Done, Failed>,
    is_locked: impl Fn(&Failed) -> bool,
) -> Result<(Done, bool), Failed> {
    let mut attempt = 1;
    loop {
        if let Some(done) = by_gateway()? {
            return Ok((done, true));
        }
        match alone() {
            Ok(done) => return Ok((done, false)),
            Err(error) if is_locked(&error) && attempt < ATTEMPTS => {
                attempt += 1;
                thread::sleep(BETWEEN_ATTEMPTS);
            }
            Err(error) => return Err(error),
        }
    }
}

/// The gateway's settings, as far as a command needs them.
pub(crate) fn load_config(
    data_dir: &Path,
    config: Option<&Path>,
) -> Result<Config, StandaloneError> {
    let data_dir = Some(data_dir.to_owned());
    Ok(Config::load(config, config::environment(), data_dir)?)
}

/// Opens a store that is there for writing. No ping goes by this, also if these are not the gateway's settings.
pub(crate) fn open_store(
    data_dir: &Path,
    config: Option<&Path>,
    now_ms: u64,
) -> Result<Store, StandaloneError> {
    // To open it for writing would make one where there is none.
    drop(Store::open_without_keys(data_dir)?);
    let config = StoreConfig {
        retention: Duration::MAX,
        ..load_config(data_dir, config)?.store
    };
    Ok(Store::open(data_dir, &config, now_ms)?)
}

/// Puts on record what the operator is about to do: first on record, then done, so that nothing is done of which there
/// is no record. The caller has the store open for writing, or a claim to it.
#[expect(
    clippy::print_stderr,
    reason = "a command has no log, and its output may be for a program"
)]
pub(crate) fn record(
    data_dir: &Path,
    what: What,
    whose: Whose,
    at_ms: u64,
) -> Result<(), StandaloneError> {
    let deed = Deed {
        at_ms,
        who: Who::Operator,
        what,
        whose,
    };
    let path = data_dir.join(audit::FILE_NAME);
    let set_aside = audit::record_alone(&path, &deed)
        .map_err(|source| StandaloneError::NotRecorded { path, source })?;
    if let Some(set_aside) = set_aside {
        eprintln!(
            "waypost: somebody has changed the audit log: line {}: {}. It is kept as {}, and a new one is begun",
            set_aside.line,
            set_aside.broken,
            set_aside.kept.display()
        );
    }
    Ok(())
}

/// A start takes seconds, and so does a stop in order.
const ATTEMPTS: u32 = 150;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(200);
