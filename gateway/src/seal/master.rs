//! Where the master key comes from: a file, an environment variable, or what a command prints.
//!
//! Knows those, and how a key is written as text. Must not know what the key is for.
//!
//! Where none of them is named, there is a file in the data folder. It is made with the first store, so that
//! everything is sealed from the first row on and a user can be forgotten by destroying a key; but it protects nothing
//! from somebody who has the whole folder, which is said at each start.

use std::{
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::rand::SystemRandom;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{KEY_BYTES, Key, MasterKey, NoRandomness};
use crate::durable;

/// Where the key is that wraps every user's own: at most one of these is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SealingConfig {
    /// A file with the key: 32 bytes, as 64 hexadecimal digits or as base64. Relative to the data folder.
    pub master_key_file: Option<PathBuf>,
    /// The name of an environment variable that holds the key in the same form.
    pub master_key_env: Option<String>,
    /// A command that prints the key in the same form, and its arguments. It is run once at the start.
    pub master_key_command: Option<Vec<String>>,
}

/// Why there is no master key. The messages are for the operator, and hold nothing of a key.
#[derive(Debug, thiserror::Error)]
pub enum MasterKeyError {
    /// More than one source.
    #[error(
        "the master key can come from one place only: set one of master_key_file, master_key_env and master_key_command"
    )]
    Ambiguous,
    /// The file cannot be read.
    #[error(
        "cannot read the master key in {path}: {source}; put it back, or name its place under [store.sealing]. Only for a \
         store that is yet to be made: `waypost keys init --file FILE` makes one"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The variable is not set.
    #[error("the environment variable {0} must hold the master key, but is not set")]
    Variable(String),
    /// The command did not print a key.
    #[error("{program} must print the master key, but {problem}")]
    Command {
        /// What was run.
        program: String,
        /// What came of it.
        problem: String,
    },
    /// It is no key.
    #[error(
        "{0} holds no master key: that is 32 random bytes, written as 64 hexadecimal digits or as base64"
    )]
    Malformed(Source),
    /// A new key cannot be written.
    #[error("cannot write a master key to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is a file already.
    #[error(
        "{0} is there already and is not overwritten: what was wrapped with the key in it would be lost"
    )]
    Exists(PathBuf),
    /// No key could be made.
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
}

/// Where a key was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The file.
    File(PathBuf),
    /// The environment variable.
    Variable(String),
    /// The command's program.
    Command(String),
}

/// The file in the data folder, where no other source is named.
pub const DEFAULT_FILE: &str = "master.key";
/// A KMS that is asked over a network answers in seconds.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Longer than any key with the comments around it.
const MOST_BYTES: u64 = 16 << 10;
/// Nobody else may read it.
const MODE: u32 = 0o600;

const DEFAULT_FILE_SAYS: &str = "\
# The master key of the Waypost store in this folder. It lies beside what it wraps, so it protects nothing from
# whoever can read the folder. `waypost keys rotate` moves to a key that is elsewhere.
";
const MADE_FILE_SAYS: &str = "\
# A master key of Waypost. Without it no stored ping can be read, and no copy of it can be made later:
# keep one in a safe place, and never in a backup of the data folder.
";

impl SealingConfig {
    /// Finds out whether it says one thing.
    ///
    /// # Errors
    /// When it says more.
    pub fn check(&self) -> Result<(), MasterKeyError> {
        let named = [
            self.master_key_file.is_some(),
            self.master_key_env.is_some(),
            self.master_key_command.is_some(),
        ];
        match named.into_iter().filter(|is_named| *is_named).count() {
            0 | 1 => Ok(()),
            _ => Err(MasterKeyError::Ambiguous),
        }
    }

    /// Whether the key lies in the data folder because no other place was named.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The master key; none if no source is named and there is no file in the data folder.
    ///
    /// # Errors
    /// When the source that is named has no key.
    pub fn master_key(&self, data_dir: &Path) -> Result<Option<MasterKey>, MasterKeyError> {
        self.check()?;
        if let Some(name) = &self.master_key_env {
            let text = std::env::var(name).map_err(|_| MasterKeyError::Variable(name.clone()));
            return parse(&Zeroizing::new(text?), || Source::Variable(name.clone())).map(Some);
        }
        if let Some(command) = &self.master_key_command {
            let text = printed_by(command, COMMAND_TIMEOUT)?;
            let program = || Source::Command(command.first().cloned().unwrap_or_default());
            return parse(&text, program).map(Some);
        }
        let path = match &self.master_key_file {
            Some(file) => data_dir.join(file),
            None => data_dir.join(DEFAULT_FILE),
        };
        match read(&path) {
            Ok(text) => parse(&text, || Source::File(path)).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.is_default() => Ok(None),
            Err(source) => Err(MasterKeyError::File { path, source }),
        }
    }
}

/// Makes the master key in the data folder.
///
/// # Errors
/// When there is one, or it cannot be written.
pub fn make_default(data_dir: &Path) -> Result<MasterKey, MasterKeyError> {
    make(&data_dir.join(DEFAULT_FILE), DEFAULT_FILE_SAYS)
}

/// Makes a master key in a file of its own.
///
/// # Errors
/// When the file is there, or cannot be written.
pub fn make_file(path: &Path) -> Result<MasterKey, MasterKeyError> {
    make(path, MADE_FILE_SAYS)
}

fn make(path: &Path, says: &str) -> Result<MasterKey, MasterKeyError> {
    if path.symlink_metadata().is_ok() {
        return Err(MasterKeyError::Exists(path.to_owned()));
    }
    let key = MasterKey::random(&SystemRandom::new())?;
    // Reserved as a whole, so that no part of the key is left behind where it grew.
    let mut text = Zeroizing::new(String::with_capacity(says.len() + 2 * KEY_BYTES + 1));
    text.push_str(says);
    for byte in key.bytes() {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
        }
    }
    text.push('\n');
    durable::replace_file(path, text.as_bytes(), MODE).map_err(|source| MasterKeyError::Write {
        path: path.to_owned(),
        source,
    })?;
    Ok(key)
}

fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    read_text(fs::File::open(path)?)
}

fn read_text(source: impl Read) -> io::Result<Zeroizing<String>> {
    let most = usize::try_from(MOST_BYTES).unwrap_or(usize::MAX);
    let mut text = Zeroizing::new(String::with_capacity(most));
    source.take(MOST_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// The one line that is no comment, as a key.
fn parse(text: &str, source: impl FnOnce() -> Source) -> Result<MasterKey, MasterKeyError> {
    let mut lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut key = Key(Box::new([0; KEY_BYTES]));
    let is_key = match (lines.next(), lines.next()) {
        (Some(line), None) => decode(line, &mut key.0),
        _ => false,
    };
    if !is_key {
        return Err(MasterKeyError::Malformed(source()));
    }
    Ok(MasterKey::of(key))
}

fn decode(line: &str, key: &mut [u8; KEY_BYTES]) -> bool {
    if line.len() == 2 * KEY_BYTES {
        let digits = line.as_bytes().as_chunks::<2>().0;
        return digits.iter().zip(key).all(|(digits, byte)| {
            let digit = |at: usize| char::from(digits[at]).to_digit(16);
            let value = digit(0).zip(digit(1)).map(|(high, low)| high << 4 | low);
            match value.and_then(|value| u8::try_from(value).ok()) {
                Some(value) => *byte = value,
                None => return false,
            }
            true
        });
    }
    // The decoder wants room for the padding as well.
    let mut bytes = Zeroizing::new([0; KEY_BYTES + 3]);
    match STANDARD.decode_slice(line, &mut bytes[..]) {
        Ok(KEY_BYTES) => {
            key.copy_from_slice(&bytes[..KEY_BYTES]);
            true
        }
        _ => false,
    }
}

fn printed_by(command: &[String], timeout: Duration) -> Result<Zeroizing<String>, MasterKeyError> {
    let failed = |problem: String| MasterKeyError::Command {
        program: command.first().cloned().unwrap_or_default(),
        problem,
    };
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| failed("no program is named".to_owned()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}")))?;
    let (sender, receiver) = mpsc::sync_channel(1);
    if let Some(output) = child.stdout.take() {
        // Nobody waits for it any more when the time is over.
        thread::spawn(move || drop(sender.send(read_text(output))));
    }
    let Ok(text) = receiver.recv_timeout(timeout) else {
        // It may have ended just now.
        drop(child.kill());
        drop(child.wait());
        return Err(failed(format!("did not finish within {timeout:?}")));
    };
    let ended = child
        .wait()
        .map_err(|error| failed(format!("cannot be waited for: {error}")))?;
    if !ended.success() {
        return Err(failed(format!("ended with {ended}")));
    }
    text.map_err(|error| failed(format!("what it printed cannot be read: {error}")))
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "the file {}", path.display()),
            Self::Variable(name) => write!(f, "the environment variable {name}"),
            Self::Command(program) => write!(f, "what {program} printed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const BASE64: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn of_file(text: &str) -> Result<Option<MasterKey>, MasterKeyError> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("key"), text).unwrap();
        let config = SealingConfig {
            master_key_file: Some("key".into()),
            ..SealingConfig::default()
        };
        config.master_key(folder.path())
    }

    fn of_command(command: &[&str]) -> Result<Option<MasterKey>, MasterKeyError> {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let config = SealingConfig {
            master_key_command: Some(command),
            ..SealingConfig::default()
        };
        config.master_key(Path::new("/nowhere"))
    }

    fn expected() -> [u8; 32] {
        std::array::from_fn(|at| u8::try_from(at).unwrap())
    }

    #[test]
    fn a_key_is_read_from_each_source_in_each_form() {
        let upper = HEX.to_uppercase();
        for text in [HEX, BASE64, &upper, &format!("# made today\n\n  {HEX}  \n")] {
            assert_eq!(of_file(text).unwrap().unwrap().bytes(), &expected());
        }
        let key = of_command(&["echo", BASE64]).unwrap().unwrap();
        assert_eq!(key.bytes(), &expected());
        // It is set everywhere, and no key.
        let config = SealingConfig {
            master_key_env: Some("PATH".to_owned()),
            ..SealingConfig::default()
        };
        let refused = config.master_key(Path::new("")).unwrap_err();
        assert!(matches!(refused, MasterKeyError::Malformed(_)), "{refused}");
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_shown() {
        let secret = &HEX[..40];
        for text in [
            "",
            "# only a comment",
            secret,
            &format!("{HEX}00"),
            &HEX.replace('f', "g"),
            &format!("{HEX}\n{HEX}"),
            &BASE64[4..],
        ] {
            let refused = of_file(text).unwrap_err();
            assert!(matches!(refused, MasterKeyError::Malformed(_)), "{text}");
            let said = format!("{refused} {refused:?}");
            assert!(!said.contains(&HEX[..8]), "{said}");
        }
    }

    #[test]
    fn a_source_that_is_named_and_not_there_is_no_reason_to_go_on_without() {
        let folder = tempfile::tempdir().unwrap();
        let file = SealingConfig {
            master_key_file: Some("missing".into()),
            ..SealingConfig::default()
        };
        let refused = file.master_key(folder.path()).unwrap_err().to_string();
        assert!(refused.contains("waypost keys init"), "{refused}");
        let variable = SealingConfig {
            master_key_env: Some("SURELY_NOT_SET_ANYWHERE".to_owned()),
            ..SealingConfig::default()
        };
        let refused = variable.master_key(folder.path()).unwrap_err();
        assert!(matches!(refused, MasterKeyError::Variable(_)));
        let both = SealingConfig {
            master_key_file: Some("missing".into()),
            ..variable
        };
        let refused = both.master_key(folder.path()).unwrap_err();
        assert!(matches!(refused, MasterKeyError::Ambiguous));
        assert!(
            SealingConfig::default()
                .master_key(folder.path())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_command_that_fails_or_hangs_is_said() {
        for (command, says) in [
            (&["sh", "-c", "echo nothing; exit 3"][..], "exit status: 3"),
            (&["/no/such/program"], "cannot be run"),
            (&["true"], "holds no master key"),
            (&[], "no program is named"),
        ] {
            let refused = of_command(command).unwrap_err().to_string();
            assert!(refused.contains(says), "{refused}");
        }
        let hangs = ["sleep".to_owned(), "1000".to_owned()];
        let refused = printed_by(&hangs, Duration::ZERO).unwrap_err().to_string();
        assert!(refused.contains("did not finish"), "{refused}");
    }

    #[test]
    fn a_new_key_is_for_its_owner_only_and_never_in_the_place_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let key = make_default(folder.path()).unwrap();
        let path = folder.path().join(DEFAULT_FILE);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = SealingConfig::default().master_key(folder.path()).unwrap();
        assert_eq!(read.unwrap().id(), key.id());
        let refused = make_file(&path).unwrap_err();
        assert!(matches!(refused, MasterKeyError::Exists(_)));
        assert!(
            fs::read_to_string(&path)
                .unwrap()
                .contains("protects nothing")
        );
    }
}
