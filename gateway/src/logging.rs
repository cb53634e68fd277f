//! Where log lines go: standard error, for people or for programs.
//!
//! The only file that knows the subscriber. What is worth a line is decided where it happens.

use std::io::{self, IsTerminal};

use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// What is logged, and how it looks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// The least level that is shown: off, error, warn, info, debug or trace. A part may have its own,
    /// as in `info,waypost_gateway::session=debug`. `info` is silent about single devices.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text, coloured on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Human,
        }
    }
}

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level cannot be read.
    #[error(
        "[log] level {0:?} is not one: use off, error, warn, info, debug or trace, or with parts of their own, info,waypost_gateway::session=debug"
    )]
    BadLevel(String),
    /// The process logs already.
    #[error("something in this process has set up logging before")]
    AlreadySet,
}

impl LogConfig {
    /// The filter that the level describes.
    ///
    /// # Errors
    /// When it describes none.
    pub fn filter(&self) -> Result<EnvFilter, LogError> {
        // A bare word that is no level would be taken for the name of a part, and all else go silent.
        let is_level = |text: &str| !text.is_empty() && text.parse::<LevelFilter>().is_ok();
        let is_clear = |directive: &str| directive.contains('=') || is_level(directive);
        if !self.level.split(',').all(is_clear) {
            return Err(LogError::BadLevel(self.level.clone()));
        }
        EnvFilter::try_new(&self.level).map_err(|_| LogError::BadLevel(self.level.clone()))
    }
}

/// Sends the log lines of the whole process where they belong. Call it once, in `main`.
///
/// # Errors
/// When the level is not one, or it was called before.
pub fn start(config: &LogConfig) -> Result<(), LogError> {
    let lines = tracing_subscriber::fmt()
        .with_env_filter(config.filter()?)
        .with_writer(io::stderr);
    match config.format {
        LogFormat::Human => {
            let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            lines
                .compact()
                .with_target(false)
                .with_ansi(colours)
                .try_init()
        }
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .try_init(),
    }
    .map_err(|_| LogError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_one_or_an_error() {
        for (level, is_one) in [
            ("info", true),
            ("off", true),
            ("warn,waypost_gateway::session=debug", true),
            ("inof", false),
            ("", false),
            ("info,waypost_gateway=loud", false),
        ] {
            let config = LogConfig {
                level: level.to_owned(),
                ..LogConfig::default()
            };
            assert_eq!(config.filter().is_ok(), is_one, "{level}");
        }
    }
}
