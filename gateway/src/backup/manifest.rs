//! What one backup is made of, as the text of a file.
//!
//! Plain data. Knows the layout. Must not know files.
//!
//! Two lines: JSON, and the SHA-256 of it in hexadecimal digits. The file is written last, so a backup that has one is
//! whole, and each of the files that it names can be checked by it.

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::{hex::hex, store::Checkpoint};

/// The only form that this version knows.
const FORM: u32 = 1;

/// A file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Its name in the database.
    pub name: String,
    /// How long it is.
    pub bytes: u64,
    /// The SHA-256 of it, in hexadecimal digits; under this name it lies in the folder of backups.
    pub sha256: String,
}

/// A backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    form: u32,
    /// Counts up in a folder, from 1.
    pub number: u32,
    /// When the store was as it is here, in milliseconds since 1970-01-01 UTC.
    pub made_ms: u64,
    /// The version of the gateway that made it.
    pub made_by: String,
    /// What the store was at that moment.
    pub store: Checkpoint,
    /// The files of the database.
    pub files: Vec<File>,
    /// The audit log up to then; none if there was none.
    pub audit_log: Option<File>,
}

/// What is wrong with a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It was changed or cut short.
    #[error("is not as it was written")]
    Damaged,
    /// A later version wrote it.
    #[error("was written by a later version, which is needed to read it")]
    LaterForm,
}

#[derive(Deserialize)]
struct Form {
    form: u32,
}

impl Manifest {
    /// One without files.
    #[must_use]
    pub fn new(number: u32, made_ms: u64, store: Checkpoint) -> Self {
        Self {
            form: FORM,
            number,
            made_ms,
            made_by: env!("CARGO_PKG_VERSION").to_owned(),
            store,
            files: Vec::new(),
            audit_log: None,
        }
    }

    /// All files that it names.
    pub fn all_files(&self) -> impl Iterator<Item = &File> {
        self.files.iter().chain(&self.audit_log)
    }

    /// How much it takes, whoever else has the same files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.all_files().map(|file| file.bytes).sum()
    }

    /// As it stands in a file.
    #[must_use]
    pub fn encode(&self) -> String {
        let json = serde_json::to_string(self).expect("text and numbers");
        let check = sha256(json.as_bytes());
        format!("{json}\n{check}\n")
    }

    /// Reads one.
    ///
    /// # Errors
    /// When it is not whole, or of a later version.
    pub fn decode(text: &[u8]) -> Result<Self, Fault> {
        let text = std::str::from_utf8(text).map_err(|_| Fault::Damaged)?;
        let (json, check) = text.split_once('\n').ok_or(Fault::Damaged)?;
        if check.strip_suffix('\n') != Some(&sha256(json.as_bytes())) {
            return Err(Fault::Damaged);
        }
        let Form { form } = serde_json::from_str(json).map_err(|_| Fault::Damaged)?;
        if form != FORM {
            return Err(Fault::LaterForm);
        }
        let manifest: Self = serde_json::from_str(json).map_err(|_| Fault::Damaged)?;
        // Names lead nowhere else.
        let is_plain = |file: &File| {
            is_sha256(&file.sha256)
                && !file.name.is_empty()
                && !file.name.contains('/')
                && !file.name.starts_with('.')
        };
        if !manifest.all_files().all(is_plain) {
            return Err(Fault::Damaged);
        }
        Ok(manifest)
    }
}

/// Whether a text is a SHA-256 as it is written here.
#[must_use]
pub fn is_sha256(text: &str) -> bool {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() == 64 && text.bytes().all(is_digit)
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let store = Checkpoint {
            incarnation: "01".repeat(16),
            life: "02".repeat(16),
            position: 7,
            heard_until_ms: Some(8),
            keys_made: 1,
        };
        let mut manifest = Manifest::new(3, 9, store);
        manifest.files.push(File {
            name: "000004.sst".to_owned(),
            bytes: 10,
            sha256: "ab".repeat(32),
        });
        manifest
    }

    #[test]
    fn a_manifest_comes_back_and_no_damage_to_it_is_taken_for_one() {
        let text = manifest().encode();
        assert_eq!(Manifest::decode(text.as_bytes()), Ok(manifest()));
        for at in 0..text.len() {
            let mut bad = text.clone().into_bytes();
            bad[at] ^= 1;
            assert_eq!(Manifest::decode(&bad), Err(Fault::Damaged), "byte {at}");
            assert_eq!(
                Manifest::decode(&text.as_bytes()[..at]),
                Err(Fault::Damaged)
            );
        }
        let later = Manifest {
            form: 2,
            ..manifest()
        };
        assert_eq!(
            Manifest::decode(later.encode().as_bytes()),
            Err(Fault::LaterForm)
        );
    }

    #[test]
    fn a_manifest_names_no_file_that_lies_elsewhere() {
        for (name, sha256) in [
            ("../CURRENT", "ab".repeat(32)),
            ("", "ab".repeat(32)),
            ("CURRENT", "../".repeat(22)),
            ("CURRENT", "AB".repeat(32)),
        ] {
            let mut manifest = manifest();
            manifest.files[0].name = name.to_owned();
            manifest.files[0].sha256 = sha256;
            let read = Manifest::decode(manifest.encode().as_bytes());
            assert_eq!(read, Err(Fault::Damaged), "{name}");
        }
    }
}
