//! Puts a store back from a backup.
//!
//! Knows the steps, and what has happened since the backup was made that must not be forgotten. Must not know how
//! backups are kept, or what a person reads of it.
//!
//! # The steps
//!
//! The files are copied and checked into `store.restoring`, beside which a gateway finds no store. There the store is opened and
//! begins another life (`store::life`), so that nothing is given out twice and no checker goes on from a moment that it
//! never had. Who was erased since, by the list beside the keys and the audit log, is erased, revocations and what holders
//! decided of checkers since then hold, and every row is opened. Only then does it get its name. Killed before that, it leaves no store.

pub mod command;
pub mod witness;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use waypost_proto::id::UserId;

use self::witness::Witness;
use crate::{
    audit::{
        self,
        chain::{Deed, What, Who, Whose},
    },
    backup::{BackupError, folder::Backups, manifest::Manifest, unusable},
    clock::Clock,
    config::ConfigError,
    durable,
    erase::{self, EraseError, Eraser, replay},
    grants::{Decisions, TooManyCheckers},
    metrics::Metrics,
    seal::{
        copy,
        key_store::{self, KeyError},
        master,
    },
    store::{Batch, CommitError, OpenError, ReadError, Store, StoreConfig},
};

/// What is put back, and where.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The folder of backups.
    pub from: &'a Path,
    /// Which; the newest if it is not said.
    pub backup: Option<u32>,
    /// A copy of the users' keys, if they are not in the data folder.
    pub keys: Option<&'a Path>,
    /// The data folder, without a store.
    pub data_dir: &'a Path,
    /// How the store is opened.
    pub store: &'a StoreConfig,
    /// Now, in milliseconds since 1970-01-01 UTC.
    pub now_ms: u64,
}

/// What was put back.
#[derive(Debug, Default)]
pub struct PutBack {
    /// The backup.
    pub backup: u32,
    /// When it was made.
    pub made_ms: u64,
    /// Up to when the gateway is known to have heard everybody who is in it.
    pub heard_until_ms: Option<u64>,
    /// Where the store goes on.
    pub position: u64,
    /// Devices that are in it.
    pub devices: u64,
    /// Pings that are in it and can be read.
    pub pings: u64,
    /// Users who were erased since.
    pub erased: usize,
    /// Who was revoked since, or is not any more.
    pub revocations: usize,
    /// Users of whom devices were enrolled since.
    pub enrolled: usize,
    /// What holders decided of checkers since.
    pub grants: usize,
}

/// Why nothing was put back. The messages are for the operator.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum RestoreError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Erase(#[from] EraseError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Checkers(#[from] TooManyCheckers),
    /// There is a store.
    #[error(
        "there is a store in {0}, and nothing is put back over one: name another data folder, or move `store` away"
    )]
    Occupied(PathBuf),
    /// There are keys in two places.
    #[error(
        "there are keys in {0} already: leave out --keys to go by them, or move them away. Those that are newer know who \
         was erased"
    )]
    TwoKeys(PathBuf),
    /// There are no keys.
    #[error(
        "there are no users' keys in {0}: put them there, or name a copy of them with --keys. Without them nothing can be \
         read, and nobody knows who was erased"
    )]
    NoKeys(PathBuf),
    /// The master key is not in its place.
    #[error(
        "there is no master key in {0}: put it there, or name the gateway's configuration with --config"
    )]
    NoMasterKey(PathBuf),
    /// The audit log in the data folder cannot be believed.
    #[error(
        "the audit log {path} does not hold together: line {line}: {problem}. Move it away to go by the one in the backup"
    )]
    AuditLog {
        /// The log.
        path: PathBuf,
        /// Where it breaks.
        line: u64,
        /// What is wrong.
        problem: String,
    },
    /// Not everybody is erased who must be.
    #[error(
        "not all who were erased since the backup was made could be erased in it (still there: {0}): look whether the disk \
         is full, then try again"
    )]
    NotErased(usize),
    /// The output is closed.
    #[error("cannot write the report: {0}")]
    Output(#[from] io::Error),
}

/// Where the keys are until they are whole.
const KEYS_PUT_BACK: &str = "keys.restoring";
const AUDIT_PUT_BACK: &str = "audit.log.restoring";
const STORE: &str = "store";

/// Puts a store back.
///
/// # Errors
/// When something is in the way, or the backup or the keys are not whole. Then there is no store in the data folder.
pub fn restore(wanted: &Wanted<'_>) -> Result<PutBack, RestoreError> {
    let data_dir = wanted.data_dir;
    let place = data_dir.join(STORE);
    if !Store::clear_place_in(data_dir) {
        return Err(RestoreError::Occupied(data_dir.to_owned()));
    }
    let backups = Backups::open_existing(wanted.from)?;
    let manifest = backups.find(wanted.backup)?;
    durable::create_folder(data_dir).map_err(unusable(data_dir))?;
    let database = Store::database_put_back_in(data_dir);
    let put_back = database.parent().unwrap_or(&database).to_owned();
    remove_folder(&put_back)?;
    put_keys_back(wanted, &manifest)?;

    durable::create_folder(&database).map_err(unusable(&database))?;
    for file in &manifest.files {
        backups.put_back(&manifest, file, &database.join(&file.name))?;
    }
    durable::sync_folder(&database).map_err(unusable(&database))?;
    let audit_log = put_audit_log_back(wanted, &backups, &manifest)?;
    let witness = witness(&audit_log, manifest.made_ms)?;
    Store::expect_put_back(data_dir, &manifest.store).map_err(unusable(&put_back))?;

    // Another life is there from the next opening on.
    open(wanted)?.begin_life(witness.life_begins_ms(wanted.now_ms))?;
    let mut done = bring_up_to_date(Arc::new(open(wanted)?), &witness, wanted.now_ms)?;
    done.backup = manifest.number;
    done.made_ms = manifest.made_ms;
    done.heard_until_ms = manifest.store.heard_until_ms;

    let deed = Deed {
        at_ms: wanted.now_ms,
        who: Who::Operator,
        what: What::Restored,
        whose: Whose::Everybody,
    };
    // It holds together, as the witness has seen, so none is set aside.
    audit::record_alone(&audit_log, &deed).map_err(unusable(&audit_log))?;
    let log = data_dir.join(audit::FILE_NAME);
    fs::rename(&audit_log, &log).map_err(unusable(&log))?;
    fs::rename(&put_back, &place).map_err(unusable(&place))?;
    durable::sync_folder(data_dir).map_err(unusable(data_dir))?;
    Ok(done)
}

/// Whatever was there is of a restore that was cut short.
fn remove_folder(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unusable(path)(error).into()),
        _ => Ok(()),
    }
}

fn put_keys_back(wanted: &Wanted<'_>, manifest: &Manifest) -> Result<(), RestoreError> {
    let data_dir = wanted.data_dir;
    let keys = key_store::folder_in(data_dir);
    let are_there = key_store::has_keys(&keys)?;
    match wanted.keys {
        Some(_) if are_there => return Err(RestoreError::TwoKeys(data_dir.to_owned())),
        Some(from) => {
            if !key_store::has_keys(from)? {
                return Err(RestoreError::NoKeys(from.to_owned()));
            }
            let whole = data_dir.join(KEYS_PUT_BACK);
            copy::copy(from, &whole)?;
            // What is in its place has no keys: at most a lock.
            remove_folder(&keys)?;
            fs::rename(&whole, &keys).map_err(unusable(&keys))?;
            durable::sync_folder(data_dir).map_err(unusable(data_dir))?;
        }
        // A store that never held a ping has used none.
        None if !are_there && 0 < manifest.store.keys_made => {
            return Err(RestoreError::NoKeys(data_dir.to_owned()));
        }
        None => {}
    }
    let sealing = &wanted.store.sealing;
    let key = data_dir.join(master::DEFAULT_FILE);
    if sealing.is_default() && !key.exists() && 0 < manifest.store.keys_made {
        return Err(RestoreError::NoMasterKey(key));
    }
    Ok(())
}

/// The log that goes on: the one in the data folder, if there is one, or the backup's. It gets its name with the store.
fn put_audit_log_back(
    wanted: &Wanted<'_>,
    backups: &Backups,
    manifest: &Manifest,
) -> Result<PathBuf, RestoreError> {
    let there = wanted.data_dir.join(audit::FILE_NAME);
    if there.exists() {
        return Ok(there);
    }
    let put_back = wanted.data_dir.join(AUDIT_PUT_BACK);
    match &manifest.audit_log {
        Some(file) => backups.put_back(manifest, file, &put_back)?,
        // A folder that was made by hand may have none.
        None => fs::write(&put_back, "").map_err(unusable(&put_back))?,
    }
    Ok(put_back)
}

fn witness(audit_log: &Path, made_ms: u64) -> Result<Witness, RestoreError> {
    let read = audit::read(audit_log, |_| ()).map_err(unusable(audit_log))?;
    if let audit::Read::Broken { line, broken } = read {
        return Err(RestoreError::AuditLog {
            path: audit_log.to_owned(),
            line,
            problem: broken.to_string(),
        });
    }
    let mut witness = Witness::of_what_followed(made_ms);
    audit::deeds(audit_log, |deed| witness.hear(&deed)).map_err(unusable(audit_log))?;
    Ok(witness)
}

fn open(wanted: &Wanted<'_>) -> Result<Store, RestoreError> {
    // What is over is dropped by the gateway, whose configuration says so.
    let config = StoreConfig {
        retention: Duration::MAX,
        ..wanted.store.clone()
    };
    Ok(Store::open_put_back(
        wanted.data_dir,
        &config,
        wanted.now_ms,
    )?)
}

/// Has hold what holders decided of checkers since; how many decisions that is. Nobody may be told by a backup of whom the
/// holder has taken that back.
fn put_grants(store: &Store, batch: &mut Batch, witness: &Witness) -> Result<usize, RestoreError> {
    let mut checkers = store.load_checkers()?;
    let by_all = checkers.are_granted_by_all();
    let mut decided: BTreeMap<UserId, Decisions> = BTreeMap::new();
    let erased: BTreeSet<_> = store.erased().into_iter().map(|(user, _)| user).collect();
    let changes = witness.grants().iter();
    // Of those nothing is kept any more.
    for change in changes.filter(|change| !erased.contains(&change.user)) {
        checkers.enrol(&change.checker)?;
        let Some(checker) = checkers.number(&change.checker) else {
            continue;
        };
        let decisions = match decided.entry(change.user) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(store.decisions_of(change.user)?),
        };
        match change.is_granted {
            true => decisions.grant(checker, by_all, change.at_ms),
            false => decisions.withdraw(checker, by_all, change.at_ms),
        };
    }
    batch.put_checkers(&checkers);
    for (&user, decisions) in &decided {
        batch.put_decisions(user, decisions);
    }
    Ok(witness.grants().len())
}

/// Does what was done since, and looks at everything.
fn bring_up_to_date(
    store: Arc<Store>,
    witness: &Witness,
    now_ms: u64,
) -> Result<PutBack, RestoreError> {
    let erased = replay::replay(&store, &witness.erased(), now_ms)?.len();
    let mut batch = store.batch();
    batch.put_position(store.last_position()? + 1);
    for (subject, since_ms) in witness.revocations() {
        batch.put_revocation(subject, since_ms);
    }
    let mut enrolled = 0;
    for device in witness.enrolled() {
        if store.last_device(device.user)? < Some(device.device) {
            batch.put_last_device(device);
            enrolled += 1;
        }
    }
    let grants = put_grants(&store, &mut batch, witness)?;
    store.commit(batch)?;

    let (_queue, jobs) = erase::queue();
    let mut eraser = Eraser::new(
        jobs,
        Arc::clone(&store),
        Clock::starting_at(now_ms),
        Metrics::new(),
        store.load_holders()?.erasures,
    );
    match eraser.finish_begun() {
        0 => {}
        left => return Err(RestoreError::NotErased(left)),
    }
    let mut done = PutBack {
        position: store.last_position()?,
        erased,
        revocations: witness.revocations().count(),
        enrolled,
        grants,
        ..PutBack::default()
    };
    read_everything(&store, &mut done)?;
    Ok(done)
}

/// Opens every row there is: one whose user's key is missing keeps the store from being put back. What is in none cannot be
/// missed: the store says itself up to which commit it must go.
fn read_everything(store: &Store, done: &mut PutBack) -> Result<(), ReadError> {
    for device in store.devices() {
        device?;
        done.devices += 1;
    }
    for row in store.rows() {
        done.pings += row?.record.pings.len() as u64;
    }
    for event in store.events() {
        event?;
    }
    store.transitions(0..u64::MAX, usize::MAX)?;
    store.load_holders()?;
    store.load_decisions()?;
    store.load_coverage()?;
    store.load_deadlines()?;
    store.load_invitations()?;
    store.load_revocations()?;
    Ok(())
}
