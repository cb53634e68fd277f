//! `waypost audit`: says whether the audit log holds together.
//!
//! Knows the command line and what a person needs to read. What a chain is knows the parent.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{FILE_NAME, Read, chain::Broken, read};

/// Arguments of `waypost audit`.
#[derive(Args, Debug)]
pub struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Subcommand, Debug)]
enum AuditCommand {
    /// Check that no entry was changed, removed or put in
    #[command(after_help = "\
Each line of the log is HASH JSON; HASH is the SHA-256 of the HASH before it, a space, and the JSON. So whoever
changes one has to write all later ones anew, and the last HASH is another. The gateway says each HASH in its
own log as well: keep one elsewhere, and pass it with --contains.

Examples:
  waypost audit verify --data waypost-data
  waypost audit verify --data waypost-data --contains d37981a3bf874dce56b6b09f1d7e29a63b0c6fc7f495eb00a6cbb245146d1f0d

Exit code: 0 it holds together, 1 it does not or cannot be read, 2 the command line is wrong.")]
    Verify {
        /// The folder of the store, in which the log is
        #[arg(long, value_name = "DIR", default_value = "waypost-data")]
        data: PathBuf,
        /// A copy of the log elsewhere
        #[arg(long, value_name = "FILE", conflicts_with = "data")]
        file: Option<PathBuf>,
        /// A hash that was noted earlier and must be in the log
        #[arg(long, value_name = "HASH", value_parser = hash)]
        contains: Option<String>,
        /// Print JSON, for programs
        #[arg(long)]
        json: bool,
    },
}

/// Reads a hash as it is noted, so that a mistake is not taken for a log that was changed.
fn hash(text: &str) -> Result<String, String> {
    let is_hash = text.len() == HASH_DIGITS && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    match is_hash {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(format!(
            "a hash is {HASH_DIGITS} hexadecimal digits, as in the gateway's log"
        )),
    }
}

/// SHA-256.
const HASH_DIGITS: usize = 64;

/// Why a log cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is not there, or cannot be read.
    #[error(
        "cannot read {path}: {source}; name the data folder with --data, or a copy of the log with --file"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not hold together.
    #[error("{path}, line {line}: {broken}. The {before} lines before it hold together")]
    Broken {
        /// The file.
        path: PathBuf,
        /// Which line does not follow.
        line: u64,
        /// Why.
        broken: Broken,
        /// How many do.
        before: u64,
    },
    /// It holds together and is not the log that somebody has seen.
    #[error(
        "{path} holds together, but the hash {hash} is not in it: it was written anew or cut off since that was noted"
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// What was noted.
        hash: String,
    },
    /// The output is closed.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    entries: u64,
    head: &'a str,
    first_ms: Option<u64>,
    last_ms: Option<u64>,
}

/// Runs `waypost audit`.
///
/// # Errors
/// When the log cannot be relied on.
pub fn run(args: &AuditArgs, out: &mut impl Write) -> Result<(), VerifyError> {
    let AuditCommand::Verify {
        data,
        file,
        contains,
        json,
    } = &args.command;
    let path = file.clone().unwrap_or_else(|| data.join(FILE_NAME));
    let mut is_found = contains.is_none();
    let found = read(&path, |hash| {
        is_found |= contains.as_deref() == Some(hash);
    });
    let found = found.map_err(|source| VerifyError::Unreadable {
        path: path.clone(),
        source,
    })?;
    let (chain, times_ms) = match found {
        Read::Broken { line, broken } => {
            return Err(VerifyError::Broken {
                path,
                line,
                broken,
                before: line - 1,
            });
        }
        Read::Whole {
            chain, times_ms, ..
        } => (chain, times_ms),
    };
    if let Some(hash) = contains.clone().filter(|_| !is_found) {
        return Err(VerifyError::Missing { path, hash });
    }
    let report = Report {
        entries: chain.entries(),
        head: chain.head(),
        first_ms: times_ms.map(|(first_ms, _)| first_ms),
        last_ms: times_ms.map(|(_, last_ms)| last_ms),
    };
    if *json {
        serde_json::to_writer(&mut *out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        writeln!(out, "{} entries hold together", report.entries)?;
        writeln!(out, "head  {}", report.head)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::audit::chain::{Chain, Deed, What, Who, Whose};

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: AuditArgs,
    }

    fn verify(lines: &[String], options: &[&str]) -> Result<String, VerifyError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE_NAME), lines.concat()).unwrap();
        let data = folder.path().to_str().unwrap();
        let words = [&["audit", "verify", "--data", data], options].concat();
        let mut out = Vec::new();
        run(&Command::parse_from(words).args, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_log_is_verified_also_against_what_was_noted() {
        let mut chain = Chain::default();
        let deed = |at_ms| Deed {
            at_ms,
            who: Who::Gateway,
            what: What::Started,
            whose: Whose::Nobody,
        };
        let lines: Vec<_> = (10..14).map(|at_ms| chain.append(&deed(at_ms))).collect();
        let said = verify(&lines, &[]).unwrap();
        assert_eq!(
            said,
            format!("4 entries hold together\nhead  {}\n", chain.head())
        );
        let json: serde_json::Value =
            serde_json::from_str(&verify(&lines, &["--json"]).unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"entries": 4, "head": chain.head(), "first_ms": 10, "last_ms": 13})
        );

        // Cut off, it holds together; only whoever has noted a later hash knows.
        let noted = ["--contains", chain.head()];
        assert!(verify(&lines, &noted).is_ok());
        assert!(verify(&lines[..3], &[]).is_ok());
        let error = verify(&lines[..3], &noted).unwrap_err();
        assert!(matches!(error, VerifyError::Missing { .. }), "{error}");

        let removed = [&lines[..1], &lines[2..]].concat();
        let error = verify(&removed, &[]).unwrap_err();
        assert!(
            matches!(error, VerifyError::Broken { line: 2, .. }),
            "{error}"
        );
    }
}
