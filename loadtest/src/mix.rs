//! A mix of groups, read from a TOML file.
//!
//! Knows the file's keys and what they may say. Must not know how the groups are played.

use std::{collections::HashSet, num::NonZeroU32, path::Path, time::Duration};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use crate::group::{Group, Groups, Presence};

/// The file. A key that is not here is refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MixFile {
    seed: Option<u64>,
    #[serde(with = "humantime_serde")]
    duration: Duration,
    #[serde(rename = "group", default)]
    groups: Vec<GroupTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupTable {
    name: String,
    devices: NonZeroU32,
    #[serde(with = "humantime_serde")]
    every: Duration,
    #[serde(default = "one")]
    batch: NonZeroU32,
    #[serde(default)]
    presence: PresenceName,
    connect_rate: Option<f64>,
    #[serde(default, with = "humantime_serde")]
    after: Option<Duration>,
    held: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PresenceName {
    #[default]
    Stays,
    Joins,
    Returns,
    Wakes,
}

/// Reads a mix. `seed` is taken where the file names none.
///
/// # Errors
/// When the file cannot be read, or says what is not possible.
pub fn open(path: &Path, seed: u64) -> anyhow::Result<Groups> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the mix {}", path.display()))?;
    parse(&text, seed).with_context(|| format!("cannot play {}", path.display()))
}

fn parse(text: &str, seed: u64) -> anyhow::Result<Groups> {
    let file: MixFile = toml::from_str(text)?;
    ensure!(!file.groups.is_empty(), "it has no [[group]]");
    ensure!(!file.duration.is_zero(), "duration must be above zero");
    let mut names = HashSet::new();
    let mut groups = Vec::with_capacity(file.groups.len());
    for table in file.groups {
        let name = table.name.clone();
        let group = Group::try_from(table).with_context(|| format!("group {name:?}"))?;
        ensure!(names.insert(name.clone()), "two groups are named {name:?}");
        groups.push(group);
    }
    Ok(Groups {
        groups,
        duration: Some(file.duration),
        seed: file.seed.unwrap_or(seed),
    })
}

impl TryFrom<GroupTable> for Group {
    type Error = anyhow::Error;

    fn try_from(table: GroupTable) -> anyhow::Result<Self> {
        let GroupTable {
            name,
            devices,
            every,
            batch,
            presence,
            connect_rate,
            after,
            held,
        } = table;
        ensure!(!every.is_zero(), "every must be above zero");
        ensure!(
            batch.get() <= MOST_BATCH_PINGS,
            "batch is at most {MOST_BATCH_PINGS}"
        );
        for (key, is_given, belongs_to) in [
            ("connect_rate", connect_rate.is_some(), PresenceName::Joins),
            ("after", after.is_some(), PresenceName::Returns),
            ("held", held.is_some(), PresenceName::Returns),
        ] {
            ensure!(
                !is_given || presence == belongs_to,
                "{key} says something only with presence = {:?}",
                format!("{belongs_to:?}").to_lowercase()
            );
        }
        if connect_rate.is_some_and(|per_s| !(per_s.is_finite() && 0.0 < per_s)) {
            bail!("connect_rate must be a number above zero");
        }
        ensure!(
            held.unwrap_or(0) <= MOST_HELD_PINGS,
            "held is at most {MOST_HELD_PINGS}: a device keeps no more"
        );
        let presence = match presence {
            PresenceName::Stays => Presence::Stays,
            PresenceName::Joins => Presence::Joins {
                per_s: connect_rate,
            },
            PresenceName::Returns => Presence::Returns {
                after: after.unwrap_or_default(),
                held: held.unwrap_or(0),
            },
            PresenceName::Wakes => Presence::Wakes,
        };
        Ok(Self {
            name,
            devices: devices.get(),
            every,
            batch: batch.get(),
            presence,
        })
    }
}

fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

/// What the gateway takes in one batch.
const MOST_BATCH_PINGS: u32 = 1_000;
/// Two months at one a minute; a device holds a little more before it drops its oldest.
pub const MOST_HELD_PINGS: u32 = 90_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_file_shows_every_presence() {
        let mix = parse(include_str!("../mix.example.toml"), 1).unwrap();
        let has = |is: fn(&Presence) -> bool| mix.groups.iter().any(|group| is(&group.presence));
        assert!(has(|presence| matches!(presence, Presence::Stays)));
        assert!(has(|presence| matches!(presence, Presence::Joins { .. })));
        assert!(has(|presence| matches!(
            presence,
            Presence::Returns { held: 1.., .. }
        )));
        assert!(has(|presence| matches!(presence, Presence::Wakes)));
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let mix = parse(
            "duration = '1m'\n[[group]]\nname = 'vans'\ndevices = 3\nevery = '10s'\n",
            77,
        )
        .unwrap();
        assert_eq!(
            (mix.seed, mix.duration),
            (77, Some(Duration::from_secs(60)))
        );
        assert_eq!(
            mix.groups,
            [Group {
                name: "vans".to_owned(),
                devices: 3,
                every: Duration::from_secs(10),
                batch: 1,
                presence: Presence::Stays,
            }]
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let group = "[[group]]\nname = 'vans'\ndevices = 3\nevery = '10s'\n";
        for (text, word) in [
            ("duration = '1m'".to_owned(), "group"),
            (group.to_owned(), "duration"),
            (format!("duration = '0s'\n{group}"), "duration"),
            (format!("duration = '1m'\n{group}{group}"), "two groups"),
            (format!("duration = '1m'\n{group}colour = 'red'"), "colour"),
            (format!("duration = '1m'\n{group}held = 5"), "returns"),
            (format!("duration = '1m'\n{group}connect_rate = 5"), "joins"),
            (
                format!("duration = '1m'\n{group}presence = 'joins'\nconnect_rate = -1.0"),
                "connect_rate",
            ),
            (
                format!("duration = '1m'\n{group}presence = 'sleeps'"),
                "sleeps",
            ),
            (format!("duration = '1m'\n{group}batch = 1001"), "batch"),
            (
                format!("duration = '1m'\n{group}presence = 'returns'\nheld = 90001"),
                "held",
            ),
            (
                "duration = '1m'\n[[group]]\nname = 'vans'\ndevices = 0\nevery = '1s'".to_owned(),
                "devices",
            ),
            (
                "duration = '1m'\n[[group]]\nname = 'vans'\ndevices = 1\nevery = '0s'".to_owned(),
                "every",
            ),
        ] {
            let error = format!("{:#}", parse(&text, 1).unwrap_err());
            assert!(error.contains(word), "{word} in {error}");
        }
    }
}
