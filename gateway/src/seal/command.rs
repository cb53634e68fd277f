//! `waypost keys`: makes a master key, and goes over from one to another.
//!
//! Knows the command line and what a person needs to read. How keys are made and wrapped is the parent's.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::{
    key_store::{self, KeyError, KeyStore, Rotated},
    master::{self, MasterKeyError, SealingConfig},
};
use crate::config::{self, Config, ConfigError};

/// Arguments of `waypost keys`.
#[derive(Args, Debug)]
#[command(after_help = "\
Example: from the key in the data folder to one in a place of its own, with the gateway stopped
  waypost keys init --file /etc/waypost/master.key
  waypost keys rotate --config /etc/waypost.toml --to-file /etc/waypost/master.key
and then, in /etc/waypost.toml,
  [store.sealing]
  master_key_file = \"/etc/waypost/master.key\"")]
pub struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Subcommand, Debug)]
enum KeysCommand {
    /// Make a master key in a file; an existing one is never overwritten
    Init {
        /// The file
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
    /// Wrap all users' keys with another master key, while no gateway runs; stored data is not touched. If it is
    /// interrupted, run it again
    Rotate {
        /// The configuration file, which says where the present master key is
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The data folder; wins over the file and the environment
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        #[command(flatten)]
        to: NewMasterKey,
    },
}

/// Where the new master key is.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct NewMasterKey {
    /// The file of the new master key
    #[arg(long, value_name = "FILE")]
    to_file: Option<PathBuf>,
    /// The environment variable that holds the new master key
    #[arg(long, value_name = "NAME")]
    to_env: Option<String>,
    /// The command that prints the new master key: its program, then an argument for each further use of this option
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    to_command: Option<Vec<String>>,
}

/// Why `waypost keys` did not do what it should.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum KeysCommandError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    MasterKey(#[from] MasterKeyError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// There is nothing to rotate.
    #[error("there are no keys in {0}: a gateway makes them when it first stores something")]
    NoKeys(PathBuf),
    /// The present master key is nowhere.
    #[error(
        "no master key is configured, and there is none in {0}: name the configuration with --config"
    )]
    NoMasterKey(PathBuf),
}

/// Runs `waypost keys`.
///
/// # Errors
/// When a key cannot be made, read or written.
#[expect(clippy::print_stdout, reason = "this is what the command is for")]
pub fn run(args: KeysArgs) -> Result<(), KeysCommandError> {
    println!("{}", args.command.run(config::environment())?);
    Ok(())
}

impl KeysCommand {
    fn run(
        self,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<String, KeysCommandError> {
        match self {
            Self::Init { file } => init(&file),
            Self::Rotate { config, data, to } => {
                rotate(&Config::load(config.as_deref(), environment, data)?, to)
            }
        }
    }
}

fn init(file: &Path) -> Result<String, KeysCommandError> {
    let key = master::make_file(file)?;
    Ok(format!(
        "Made the master key {}, for nobody else to read: {}\nKeep a copy in a safe place: without it nothing that is \
         stored can be read.",
        key.id(),
        file.display()
    ))
}

fn rotate(config: &Config, to: NewMasterKey) -> Result<String, KeysCommandError> {
    let folder = key_store::folder_in(&config.data_dir);
    if !key_store::has_keys(&folder)? {
        return Err(KeysCommandError::NoKeys(folder));
    }
    let data_dir = &config.data_dir;
    let from = config.store.sealing.master_key(data_dir)?;
    let from = from.ok_or_else(|| KeysCommandError::NoMasterKey(data_dir.clone()))?;
    let to = to.into_config();
    // As on any command line: a relative path starts here and not at the data folder.
    let new = to.master_key(Path::new(""))?;
    let new = new.ok_or_else(|| KeysCommandError::NoMasterKey(data_dir.clone()))?;
    let Rotated { wrapped, already } = KeyStore::rotate(&folder, &from, &new)?;
    Ok(format!(
        "{wrapped} keys are wrapped by the master key {} now, {already} were before.\nSay so under [store.sealing] \
         before the gateway starts. Backups of the keys still need {}: destroy it when there are none left.",
        new.id(),
        from.id()
    ))
}

impl NewMasterKey {
    fn into_config(self) -> SealingConfig {
        SealingConfig {
            master_key_file: self.to_file,
            master_key_env: self.to_env,
            master_key_command: self.to_command,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use prost::Message;
    use waypost_proto::{
        batch,
        id::{DeviceId, UserId},
        ping::Ping,
    };

    use super::*;
    use crate::store::{Day, PingKey, Store, StoreConfig, record};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: KeysArgs,
    }

    fn run(words: &[&str]) -> Result<String, String> {
        let line = Line::try_parse_from([&["keys"], words].concat());
        let line = line.map_err(|error| error.to_string())?;
        line.args.command.run([]).map_err(|error| error.to_string())
    }

    fn commit_one_ping(store: &Store) {
        let device = DeviceId {
            user: UserId([1; 16]),
            device: 1,
        };
        let key = PingKey {
            device,
            epoch: 1,
            first_seq: 1,
        };
        let columns = batch::encode(1, &[Ping::at(1, 0, 10, 20)]).encode_to_vec();
        let mut batch = store.batch();
        let value = record::encode_pings(0, 1, &columns);
        batch.put_pings(Day::of_ms(0), &key, &value);
        store.commit(batch).unwrap();
    }

    #[test]
    fn a_store_goes_over_to_a_new_master_key_and_the_old_one_opens_it_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (data, new) = (path("data"), path("new.key"));
        let open = |config: &StoreConfig| Store::open(Path::new(&data), config, 0);
        std::fs::create_dir(&data).unwrap();
        let rotate = ["rotate", "--data", &data, "--to-file", &new];
        let refused = run(&rotate).unwrap_err();
        assert!(refused.contains("there are no keys"), "{refused}");

        commit_one_ping(&open(&StoreConfig::default()).unwrap());
        let made = run(&["init", "--file", &new]).unwrap();
        assert!(made.contains(&new), "{made}");
        assert!(
            run(&["init", "--file", &new])
                .unwrap_err()
                .contains("not overwritten")
        );
        let done = run(&rotate).unwrap();
        assert!(done.starts_with("1 keys are wrapped"), "{done}");
        assert!(open(&StoreConfig::default()).is_err());
        let config = StoreConfig {
            sealing: SealingConfig {
                master_key_file: Some(new.clone().into()),
                ..SealingConfig::default()
            },
            ..StoreConfig::default()
        };
        let store = open(&config).unwrap();
        assert_eq!(store.rows().map(Result::unwrap).count(), 1);
    }

    #[test]
    fn a_rotation_needs_one_new_key() {
        for words in [
            &["rotate"][..],
            &["rotate", "--to-file", "f", "--to-env", "E"],
        ] {
            assert!(run(words).is_err(), "{words:?}");
        }
    }
}
