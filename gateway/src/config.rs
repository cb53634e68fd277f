//! The configuration: gathers each part's own, from a file and the environment.
//!
//! Knows where settings come from and how to tell a mistake in them. What a setting means, and its
//! default, is written beside the part that it belongs to. Later sources win: the defaults, the file,
//! the environment, the command line.

mod keys;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::{Spanned, Table, Value, de::DeTable};

use crate::{
    admin::AdminConfig, commit::CommitConfig, enrol::EnrolmentConfig, feed::FreshnessConfig,
    logging::LogConfig, store::StoreConfig, tls::TlsConfig, worker::DevicesConfig,
};

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of the store, and of the development PKI.
    pub data_dir: PathBuf,
    /// Where devices connect, and what each may do.
    pub devices: DevicesConfig,
    /// The gateway's certificate and whose it accepts.
    pub tls: TlsConfig,
    /// What is admitted and how it is gathered into commits.
    pub commit: CommitConfig,
    /// The store.
    pub store: StoreConfig,
    /// Where checkers connect, and which may.
    pub freshness: FreshnessConfig,
    /// How devices come by their certificates.
    pub enrolment: EnrolmentConfig,
    /// Where operators look.
    pub admin: AdminConfig,
    /// The log.
    pub log: LogConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "waypost-data".into(),
            devices: DevicesConfig::default(),
            tls: TlsConfig::default(),
            commit: CommitConfig::default(),
            store: StoreConfig::default(),
            freshness: FreshnessConfig::default(),
            enrolment: EnrolmentConfig::default(),
            admin: AdminConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML, or a value has not the type or range of its key.
    #[error("{path}: {message}")]
    BadFile {
        /// The file.
        path: PathBuf,
        /// Where and why, with the line shown.
        message: String,
    },
    /// The file has keys that mean nothing here.
    #[error("{}", lines(.0))]
    UnknownKeys(Vec<UnknownKey>),
    /// An environment variable with our prefix means nothing here.
    #[error("{}", lines(.0))]
    UnknownVariables(Vec<UnknownVariable>),
    /// An environment variable's value has not the type or range of its key.
    #[error("the environment variable {name} cannot set {key}: {message}")]
    BadVariable {
        /// The variable.
        name: String,
        /// The key that it names.
        key: String,
        /// Why.
        message: String,
    },
}

/// A key of a file that means nothing here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The key, with its sections.
    pub key: String,
    /// The key that was probably meant.
    pub suggestion: Option<String>,
}

impl fmt::Display for UnknownKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}: there is no key {}",
            self.path.display(),
            self.line,
            self.key
        )?;
        did_you_mean(f, self.suggestion.as_deref())
    }
}

/// An environment variable that means nothing here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownVariable {
    /// Its name.
    pub name: String,
    /// The name that was probably meant.
    pub suggestion: Option<String>,
}

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the environment variable {} sets nothing", self.name)?;
        did_you_mean(f, self.suggestion.as_deref())
    }
}

/// What the names of all environment variables that set something begin with.
const PREFIX: &str = "WAYPOST_";

impl Config {
    /// Reads the file, if there is one, and the environment; `data_dir`, if given, wins over both.
    ///
    /// # Errors
    /// When a source cannot be read, has a key that is not one, or a value that its key cannot have.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        data_dir: Option<PathBuf>,
    ) -> Result<Self, ConfigError> {
        let known = keys::keys_of::<Self>();
        let mut table = match file {
            Some(path) => read_file(path, &known)?,
            None => Table::new(),
        };
        let mut config = read_environment(&mut table, environment, &known)?;
        if let Some(data_dir) = data_dir {
            config.data_dir = data_dir;
        }
        config.tls = config.tls.under(&config.data_dir);
        config.enrolment = config.enrolment.under(&config.data_dir);
        Ok(config)
    }
}

/// The process's environment, as [`Config::load`] takes it.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    std::env::vars_os().map(move |(name, value)| (text(name), text(value)))
}

fn read_file(path: &Path, known: &[keys::Path]) -> Result<Table, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let bad_file = |error: toml::de::Error| ConfigError::BadFile {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    };
    let document = DeTable::parse(&text).map_err(bad_file)?;
    let mut unknown = Vec::new();
    find_unknown(
        document.get_ref(),
        &mut Vec::new(),
        known,
        &mut |key: &Spanned<_>, within: &[&str]| {
            let key_path = [within, &[AsRef::<str>::as_ref(key.get_ref())]].concat();
            unknown.push(UnknownKey {
                path: path.to_owned(),
                line: text[..key.span().start].matches('\n').count() + 1,
                suggestion: suggest_key(&key_path, known),
                key: key_path.join("."),
            });
        },
    );
    if !unknown.is_empty() {
        unknown.sort_by_key(|key| key.line);
        return Err(ConfigError::UnknownKeys(unknown));
    }
    // Read as the whole for its types, which tells mistakes with their place in the text.
    toml::from_str::<Config>(&text).map_err(bad_file)?;
    toml::from_str(&text).map_err(bad_file)
}

/// Calls `report` for every key that is not known, with the sections that it lies in.
fn find_unknown<'t>(
    table: &'t DeTable<'_>,
    within: &mut Vec<&'t str>,
    known: &[keys::Path],
    report: &mut impl FnMut(&Spanned<std::borrow::Cow<'_, str>>, &[&str]),
) {
    for (key, value) in table {
        within.push(key.get_ref());
        let is_key = known.iter().any(|path| path == within);
        let is_section = known.iter().any(|path| path.starts_with(within));
        match value.get_ref().as_table() {
            Some(section) if is_section && !is_key => find_unknown(section, within, known, report),
            _ if is_section => {}
            _ => report(key, &within[..within.len() - 1]),
        }
        within.pop();
    }
}

/// The configuration of a file's table and the variables on top of it.
fn read_environment(
    table: &mut Table,
    environment: impl IntoIterator<Item = (String, String)>,
    known: &[keys::Path],
) -> Result<Config, ConfigError> {
    let named: Vec<(String, &keys::Path)> =
        known.iter().map(|path| (variable_of(path), path)).collect();
    let mut ours: Vec<(String, String)> = environment
        .into_iter()
        .filter(|(name, _)| name.starts_with(PREFIX) && !is_of_kubernetes(name))
        .collect();
    ours.sort();

    let mut unknown = Vec::new();
    for (name, text) in ours {
        let Some((_, path)) = named.iter().find(|(known, _)| *known == name) else {
            let suggestion = closest(&name, named.iter().map(|(known, _)| known.as_str()));
            unknown.push(UnknownVariable { name, suggestion });
            continue;
        };
        *table = with_variable(table, path, &text).map_err(|error| ConfigError::BadVariable {
            name,
            key: path.join("."),
            message: error.message().to_owned(),
        })?;
    }
    if !unknown.is_empty() {
        return Err(ConfigError::UnknownVariables(unknown));
    }
    // Each source was read as a whole before, so this cannot fail; if it does, say it as it is.
    table
        .clone()
        .try_into()
        .map_err(|error: toml::de::Error| ConfigError::BadVariable {
            name: PREFIX.to_owned() + "*",
            key: "the configuration".to_owned(),
            message: error.message().to_owned(),
        })
}

/// The table with one key set: to the TOML value that the text is, or else to the text itself.
fn with_variable(
    table: &Table,
    path: &[&'static str],
    text: &str,
) -> Result<Table, toml::de::Error> {
    let attempt = |value| {
        let mut changed = table.clone();
        set(&mut changed, path, value);
        changed.clone().try_into::<Config>().map(|_| changed)
    };
    let as_text = || attempt(Value::String(text.to_owned()));
    let Some(value) = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
    else {
        return as_text();
    };
    // "7" may be meant for a key that takes text.
    attempt(value).or_else(|error| as_text().map_err(|_| error))
}

fn set(table: &mut Table, path: &[&'static str], value: Value) {
    let Some((key, rest)) = path.split_first() else {
        return;
    };
    if rest.is_empty() {
        table.insert((*key).to_owned(), value);
        return;
    }
    let section = table
        .entry(*key)
        .or_insert_with(|| Value::Table(Table::new()));
    if let Value::Table(section) = section {
        set(section, rest, value);
    }
}

/// `devices.listen` is set by `WAYPOST_DEVICES_LISTEN`.
fn variable_of(path: &[&'static str]) -> String {
    PREFIX.to_owned() + &path.join("_").to_uppercase()
}

/// Kubernetes sets these in every container beside a service that is called `waypost`.
fn is_of_kubernetes(name: &str) -> bool {
    let name = &name[PREFIX.len()..];
    name == "PORT"
        || ["PORT_", "SERVICE_HOST", "SERVICE_PORT"]
            .iter()
            .any(|start| name.starts_with(start))
}

/// The known key that was probably meant: one with a similar name, or this name in another section.
fn suggest_key(unknown: &[&str], known: &[keys::Path]) -> Option<String> {
    let (last, within) = unknown.split_last()?;
    // A section counts as well: `[devcies]` is a key of the whole.
    let beside = known
        .iter()
        .filter(|path| path.len() > within.len() && path.starts_with(within));
    let similar = closest(last, beside.map(|path| path[within.len()])).map(|name| {
        within
            .iter()
            .copied()
            .chain([name.as_str()])
            .collect::<Vec<_>>()
            .join(".")
    });
    similar.or_else(|| {
        known
            .iter()
            .find(|path| path.ends_with(&[last]))
            .map(|path| path.join("."))
    })
}

/// The name that differs least, if the difference can be a slip.
fn closest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|known| (strsim::damerau_levenshtein(name, known), known))
        .filter(|(distance, known)| *distance <= 1 + known.len() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known.to_owned())
}

fn did_you_mean(f: &mut fmt::Formatter<'_>, suggestion: Option<&str>) -> fmt::Result {
    match suggestion {
        Some(suggestion) => write!(f, "; did you mean {suggestion}?"),
        None => write!(f, "; waypost.example.toml lists all"),
    }
}

fn lines(mistakes: &[impl fmt::Display]) -> String {
    mistakes
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::logging::LogFormat;

    const EXAMPLE: &str = include_str!("../waypost.example.toml");

    fn load(file: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("waypost.toml");
        fs::write(&path, file).unwrap();
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::load(Some(&path), variables, None)
    }

    fn message(file: &str, variables: &[(&str, &str)]) -> String {
        load(file, variables).unwrap_err().to_string()
    }

    #[test]
    fn the_example_is_the_default() {
        assert_eq!(
            toml::from_str::<Config>(EXAMPLE).unwrap(),
            Config::default()
        );
    }

    /// Keys whose default is "none" stand in it as `#key = value`, without a space; prose has one.
    #[test]
    fn the_example_names_every_key() {
        let is_commented_key =
            |line: &str| line.starts_with('#') && !line[1..].starts_with(['#', ' ']);
        let all_keys: String = EXAMPLE
            .lines()
            .map(|line| {
                if is_commented_key(line) {
                    &line[1..]
                } else {
                    line
                }
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        toml::from_str::<Config>(&all_keys).unwrap();
        let known: BTreeSet<String> = keys::keys_of::<Config>()
            .iter()
            .map(|path| path.join("."))
            .collect();
        assert_eq!(named_in(&toml::from_str(&all_keys).unwrap()), known);
    }

    fn named_in(table: &Table) -> BTreeSet<String> {
        let mut named = BTreeSet::new();
        for (key, value) in table {
            match value {
                Value::Table(section) => {
                    named.extend(
                        named_in(section)
                            .iter()
                            .map(|inner| format!("{key}.{inner}")),
                    );
                }
                _ => drop(named.insert(key.clone())),
            }
        }
        named
    }

    #[test]
    fn no_two_keys_share_a_variable() {
        let known = keys::keys_of::<Config>();
        let variables: BTreeSet<String> = known.iter().map(|path| variable_of(path)).collect();
        assert_eq!(variables.len(), known.len());
        assert!(!variables.iter().any(|name| is_of_kubernetes(name)));
    }

    #[test]
    fn a_misspelt_key_is_told_with_its_line_and_what_was_meant() {
        let error = load(
            "data_dir = \"d\"\n\n[tls]\ncertifcate = \"x\"\n[lgo]\nlevel = \"info\"\n",
            &[],
        );
        let Err(ConfigError::UnknownKeys(unknown)) = error else {
            panic!("{error:?}")
        };
        let told: Vec<(usize, &str, Option<&str>)> = unknown
            .iter()
            .map(|key| (key.line, key.key.as_str(), key.suggestion.as_deref()))
            .collect();
        assert_eq!(
            told,
            [
                (4, "tls.certifcate", Some("tls.certificate")),
                (5, "lgo", Some("log"))
            ]
        );
    }

    #[test]
    fn a_key_in_the_wrong_section_is_told_its_own() {
        let text = message("trust_domain = \"example.org\"\n", &[]);
        assert!(text.ends_with(
            "waypost.toml:1: there is no key trust_domain; did you mean tls.trust_domain?"
        ));
        let text = message("[log]\nvolume = 11\n", &[]);
        assert!(
            text.ends_with(":2: there is no key log.volume; waypost.example.toml lists all"),
            "{text}"
        );
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_shown_in_its_place() {
        for file in [
            "[log]\nlevel = 3\n",
            "[log]\nformat = \"xml\"\n",
            "\ntls = 3\n",
            "\n[log\n",
        ] {
            let text = message(file, &[]);
            assert!(
                text.contains("waypost.toml: ") && text.contains("line 2"),
                "{text}"
            );
        }
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let file =
            "data_dir = \"/file\"\n[log]\nlevel = \"warn\"\n[tls]\ntrust_domain = \"file\"\n";
        let config = load(
            file,
            &[
                ("WAYPOST_DATA_DIR", "/environment"),
                ("WAYPOST_LOG_FORMAT", "json"),
                ("WAYPOST_TLS_TRUST_DOMAIN", "7"),
                ("PATH", "/bin"),
                ("WAYPOST_PORT_4433_UDP", "udp://10.0.0.1:4433"),
            ],
        )
        .unwrap();
        assert_eq!(config.data_dir, Path::new("/environment"));
        assert_eq!(
            config.log,
            LogConfig {
                level: "warn".to_owned(),
                format: LogFormat::Json
            }
        );
        assert_eq!(
            config.tls.trust_domain, "7",
            "a number is text where text is wanted"
        );
        assert_eq!(
            config.tls.certificate,
            Path::new("/environment/pki/server.pem")
        );
    }

    #[test]
    fn a_variable_that_sets_nothing_is_refused() {
        let text = message("", &[("WAYPOST_LOG_LEVLE", "info"), ("WAYPOST_OTHER", "1")]);
        assert_eq!(
            text,
            "the environment variable WAYPOST_LOG_LEVLE sets nothing; did you mean WAYPOST_LOG_LEVEL?\n\
             the environment variable WAYPOST_OTHER sets nothing; waypost.example.toml lists all"
        );
        let text = message("", &[("WAYPOST_LOG_FORMAT", "xml")]);
        assert!(
            text.contains("WAYPOST_LOG_FORMAT cannot set log.format"),
            "{text}"
        );
    }

    #[test]
    fn the_command_line_wins_over_all() {
        let variables = [("WAYPOST_DATA_DIR".to_owned(), "/environment".to_owned())];
        let config = Config::load(None, variables, Some("/line".into())).unwrap();
        assert_eq!(config.data_dir, Path::new("/line"));
        assert_eq!(config.tls.client_ca, Path::new("/line/pki/ca.pem"));
    }

    #[test]
    fn what_is_printed_can_be_read_back() {
        let config = Config::load(None, [], Some("somewhere".into())).unwrap();
        assert_eq!(
            load(&toml::to_string_pretty(&config).unwrap(), &[]).unwrap(),
            config
        );
    }
}
