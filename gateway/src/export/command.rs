//! `waypost export`: gives the operator everything that is held on a user, for the holder who has asked for it, from the
//! running gateway or from its store.
//!
//! Knows the command line, who can read the store just now, and where the text goes. What it holds is the parent's.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use waypost_proto::id::UserId;

use super::{
    Format,
    source::{self, NotHeld, Source, SourceError},
};
use crate::{
    audit::{
        self,
        chain::{What, Whose},
    },
    clock::system_now_ms,
    console::parse_user,
    control::{Answer, Call, Command, ControlError},
    durable::NewFile,
    seal::key_store::{self, KeyError},
    standalone::{self, StandaloneError, by_gateway_or_alone},
    store::{OpenError, Store},
};

/// Arguments of `waypost export`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  waypost export --data /var/lib/waypost --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8 --output alice.jsonl
  waypost export --data /var/lib/waypost --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8 --format geojson > map.json

It holds positions: give it to the holder and to nobody else. It is what a device of the user can get by itself, as
it is at one moment, and each time it is made is in the audit log. The last of the JSON Lines says how many there
are. A file is there only when it is whole; of the standard output the exit code says whether it is. A reader
that takes nothing for 30 seconds is given up, so do not pipe it into a pager.

Exit code: 0 it is whole, 1 it is not, 2 the command line is wrong.")]
pub struct ExportArgs {
    /// The gateway's data folder. The gateway may be running
    #[arg(long = "data", value_name = "DIR")]
    data_dir: PathBuf,
    /// The gateway's configuration file, which says where the master key is and how long pings are kept. Only needed
    /// without a running gateway
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The user, a UUID in lower case
    #[arg(long, value_name = "UUID", value_parser = parse_user)]
    user: UserId,
    /// How it is written
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    format: Format,
    /// The file to write, which nobody else may read; an older one is replaced. Without it, the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Why there is no export that is whole.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum ExportCommandError {
    #[error(transparent)]
    NotHeld(#[from] NotHeld),
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The gateway will not.
    #[error("the gateway refuses: {0}")]
    Refused(String),
    /// It could not be read or written to its end.
    #[error("cut off: {0}. What was written is not everything that is held, so do not hand it on")]
    CutOff(#[from] SourceError),
    /// The file cannot be written.
    #[error("cannot write {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The output is closed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Writes everything that is held on a user.
///
/// # Errors
/// When it is not held, or not written to its end.
pub fn run(args: &ExportArgs, out: &mut impl Write) -> Result<(), ExportCommandError> {
    let (held, _) = by_gateway_or_alone(
        || of_gateway(args),
        || of_store(args),
        |error| matches!(error, ExportCommandError::Standalone(error) if error.is_locked()),
    )?;
    let Some(path) = &args.output else {
        let mut out = BufWriter::new(out);
        held.write(args, &mut out)?;
        return Ok(out.flush()?);
    };
    let failed = |source| ExportCommandError::File {
        path: path.clone(),
        source,
    };
    let mut file = BufWriter::new(NewFile::begin(path, MODE).map_err(failed)?);
    held.write(args, &mut file)?;
    let file = file
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.finish().map_err(failed)?;
    Ok(writeln!(
        out,
        "Everything that is held on user {} is in {}.",
        args.user,
        path.display()
    )?)
}

/// An export that is on record, and of which nothing is written yet.
enum Begun {
    ByGateway(Call),
    FromStore {
        store: Box<Store>,
        retention: Duration,
    },
}

/// Has the gateway begin, if one runs.
fn of_gateway(args: &ExportArgs) -> Result<Option<Begun>, ExportCommandError> {
    let command = Command::export(args.user, args.format);
    let Some(mut call) = Call::begin(&args.data_dir, &command)? else {
        return Ok(None);
    };
    match call.answer()? {
        Answer::Follows => Ok(Some(Begun::ByGateway(call))),
        Answer::Refused(reason) => Err(ExportCommandError::Refused(reason)),
        other => Err(ExportCommandError::Refused(format!("it answers {other:?}"))),
    }
}

/// Opens the store for reading. Gateways are kept from it only until the export is on record: once everything is open,
/// nothing that they do changes what is read.
fn of_store(args: &ExportArgs) -> Result<Begun, ExportCommandError> {
    let ExportArgs { data_dir, user, .. } = args;
    let config = standalone::load_config(data_dir, args.config.as_deref())?;
    let claim = Store::claim(data_dir).map_err(StandaloneError::from)?;
    let sealing = &config.store.sealing;
    let store = Store::open_sealed_read_only(data_dir, sealing).map_err(StandaloneError::from)?;
    check_keys(&store, data_dir)?;
    source::check_held(&store, *user)?;
    standalone::record(
        data_dir,
        What::Exported,
        Whose::of(&[*user]),
        system_now_ms(),
    )?;
    drop(claim);
    Ok(Begun::FromStore {
        store: Box::new(store),
        retention: config.store.retention,
    })
}

/// Without the master key the pings could not be read; better to say so than to begin.
fn check_keys(store: &Store, data_dir: &Path) -> Result<(), ExportCommandError> {
    if store.has_keys() || !key_store::has_keys(&key_store::folder_in(data_dir))? {
        return Ok(());
    }
    let path = data_dir.join(crate::seal::master::DEFAULT_FILE);
    Err(StandaloneError::from(OpenError::MasterKeyMissing { path }).into())
}

impl Begun {
    fn write(self, args: &ExportArgs, out: &mut impl Write) -> Result<(), ExportCommandError> {
        match self {
            Self::ByGateway(mut call) => {
                call.copy(out)?;
            }
            Self::FromStore { store, retention } => {
                let source = Source {
                    store: &store,
                    audit_log: &args.data_dir.join(audit::FILE_NAME),
                    retention,
                };
                source.write(args.user, args.format, system_now_ms(), out)?;
            }
        }
        Ok(())
    }
}

/// It holds positions.
const MODE: u32 = 0o600;

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use clap::Parser;
    use prost::Message;
    use waypost_proto::{batch, device::DeviceRecord, id::DeviceId, ping::Ping};

    use super::*;
    use crate::store::{Day, PingKey, StoreConfig, record};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ExportArgs,
    }

    const USER: UserId = UserId([7; 16]);

    fn export(folder: &Path, options: &[&str]) -> Result<String, String> {
        let (data_dir, user) = (folder.to_str().unwrap(), USER.to_string());
        let all = [&["export", "--data", data_dir, "--user", &user], options].concat();
        let args = Cli::try_parse_from(all)
            .map_err(|error| error.to_string())?
            .args;
        let mut out = Vec::new();
        run(&args, &mut out).map_err(|error| error.to_string())?;
        Ok(String::from_utf8(out).unwrap())
    }

    /// A store with a device and two pings.
    fn filled(folder: &Path) {
        let now_ms = system_now_ms();
        let store = Store::open(folder, &StoreConfig::default(), now_ms).unwrap();
        let device = DeviceId {
            user: USER,
            device: 1,
        };
        let key = PingKey {
            device,
            epoch: 1,
            first_seq: 1,
        };
        let pings = [Ping::at(1, now_ms, 10, 20), Ping::at(2, now_ms, 30, 40)];
        let columns = batch::encode(1, &pings).encode_to_vec();
        let mut batch = store.batch();
        let row = record::encode_pings(now_ms, 1, &columns);
        batch.put_pings(Day::of_ms(now_ms), &key, &row);
        batch.put_device(&device, &DeviceRecord::default());
        store.commit(batch).unwrap();
    }

    #[test]
    fn without_a_gateway_the_store_is_read_and_it_is_on_record() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("data");
        assert!(
            export(&data_dir, &[])
                .unwrap_err()
                .contains("there is no store")
        );
        filled(&data_dir);
        let text = export(&data_dir, &[]).unwrap();
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(
            text.ends_with(
                "\"transitions\":0,\"deadlines\":0,\"deadline_events\":0,\"pings\":2}\n"
            ),
            "{text}"
        );
        let output = folder.path().join("map.json");
        fs::write(&output, "an older one").unwrap();
        let options = ["--format", "geojson", "--output", output.to_str().unwrap()];
        let said = export(&data_dir, &options).unwrap();
        assert!(
            said.starts_with("Everything that is held on user"),
            "{said}"
        );
        let map: serde_json::Value = serde_json::from_slice(&fs::read(&output).unwrap()).unwrap();
        assert_eq!(map["features"].as_array().unwrap().len(), 2);
        let mode = fs::metadata(&output).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let log = fs::read_to_string(data_dir.join(audit::FILE_NAME)).unwrap();
        assert_eq!(log.matches("\"exported\"").count(), 2, "{log}");
    }

    #[test]
    fn an_export_that_cannot_be_whole_leaves_no_file_and_one_that_cannot_begin_no_record() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("data");
        filled(&data_dir);
        let output = folder.path().join("held.jsonl");
        let options = ["--output", output.to_str().unwrap()];
        let master_key = data_dir.join(crate::seal::master::DEFAULT_FILE);
        let hidden = folder.path().join("hidden");
        fs::rename(&master_key, &hidden).unwrap();
        let error = export(&data_dir, &options).unwrap_err();
        assert!(error.contains("master key"), "{error}");
        assert!(!data_dir.join(audit::FILE_NAME).exists());
        fs::rename(&hidden, &master_key).unwrap();
        // As if the user's key was lost: the row does not open.
        let keys = key_store::folder_in(&data_dir).join("00000001.keys");
        let mut bytes = fs::read(&keys).unwrap();
        let kept = bytes.len() - 1;
        bytes.truncate(kept);
        fs::write(&keys, &bytes).unwrap();
        let error = export(&data_dir, &options).unwrap_err();
        assert!(error.starts_with("cut off"), "{error}");
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "no file, whole or not"
        );
    }

    #[test]
    fn of_an_unknown_user_there_is_neither_an_export_nor_a_record() {
        let folder = tempfile::tempdir().unwrap();
        let now_ms = system_now_ms();
        drop(Store::open(folder.path(), &StoreConfig::default(), now_ms).unwrap());
        let error = export(folder.path(), &[]).unwrap_err();
        assert!(error.contains("never heard"), "{error}");
        assert!(!folder.path().join(audit::FILE_NAME).exists());
    }
}
