//! Everything that is held on a user, for the holder: as JSON Lines, or as GeoJSON that a map shows.
//!
//! Takes what a store holds, in one order, and writes text. Must not know where it comes from, who may have it, or
//! where it goes.
//!
//! JSON Lines hold one object a line, each with its `kind`: first the user, then each checker, each device, each pause and
//! its end and what was granted or withdrawn, what each checker expects and what it was told of that, each ping, and at last
//! `end` with what there was of each, so that a copy that was cut short is known as such. GeoJSON holds the pings as points,
//! and the rest beside them under `waypost`.

pub mod command;
pub mod source;
pub mod stream;

use std::{
    fmt,
    io::{self, Write},
};

use clap::ValueEnum;
use serde::{Deserialize, Serialize, Serializer};
use waypost_proto::{
    device::DeviceRecord,
    id::{DeviceId, UserId},
    ping::{Ping, Source},
    v1::CheckerGrant,
};

use crate::{
    audit::Recipient,
    deadlines::{Checker, Event, Registration},
    grants::{CheckerSet, Checkers, Decisions},
    sharing::{Sharing, Transition, Turn},
    store::Day,
};

/// How it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One object a line; everything, with nothing rounded
    Jsonl,
    /// For maps: pings are points
    Geojson,
}

/// What is said of the user as a whole.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Who.
    pub user: UserId,
    /// When this was written, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// The last commit that is in it.
    pub position: u64,
    /// Whether the holder shares.
    pub sharing: Sharing,
    /// How old pings become at most, in days.
    pub retention_days: u64,
    /// Who has watched those whom they may be told of.
    pub recipients: Vec<Recipient>,
    /// Whom the holder has let be told of the user.
    pub decisions: Decisions,
    /// The store's checkers.
    pub checkers: Checkers,
}

/// What is held on a user beside pings.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// The user's devices.
    pub devices: Vec<(DeviceId, DeviceRecord)>,
    /// When the holder paused and resumed, granted and withdrew.
    pub transitions: Vec<Transition>,
    /// What checkers expect.
    pub deadlines: Vec<Registration>,
    /// What they were told of that.
    pub events: Vec<Event>,
}

/// Writes one user's data.
#[derive(Debug)]
pub struct Exporter<Out> {
    out: Out,
    format: Format,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Counts {
    checkers: u64,
    devices: u64,
    transitions: u64,
    deadlines: u64,
    deadline_events: u64,
    pings: u64,
}

/// A line, or what stands beside the points.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line {
    User {
        user: String,
        exported: Moment,
        position: u64,
        state: &'static str,
        /// No ping becomes older.
        kept_days: u64,
        told: Vec<Told>,
    },
    Checker {
        checker: String,
        granted: Moment,
        withdrawn: Moment,
    },
    Device {
        device: u32,
        epoch: u32,
        last_contact: Moment,
        last_sample: Moment,
        last_fix: Moment,
        durable: Moment,
        given_up: u64,
    },
    Transition {
        state: &'static str,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        checkers: Vec<String>,
        at: Moment,
    },
    Deadline {
        checker: Option<String>,
        expect_every_ms: u64,
        grace_ms: u64,
        since: Moment,
        /// While the user is late: since when that is known.
        late: Moment,
    },
    DeadlineEvent {
        checker: Option<String>,
        event: &'static str,
        at: Moment,
        last_contact: Moment,
        due: Moment,
    },
    Ping(Box<PingLine>),
    End(Counts),
}

#[derive(Serialize)]
struct Told {
    checker: String,
    first: Moment,
    last: Moment,
}

#[derive(Serialize)]
struct PingLine {
    device: u32,
    epoch: u32,
    seq: u64,
    sampled: Moment,
    received: Moment,
    #[serde(skip_serializing_if = "Option::is_none")]
    latitude: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    longitude: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accuracy_m: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    altitude_m: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    speed_m_per_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    course_deg: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    heading_deg: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    battery_percent: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'static str>,
}

#[derive(Serialize)]
struct Feature {
    r#type: &'static str,
    geometry: Geometry,
    properties: PingLine,
}

#[derive(Serialize)]
struct Geometry {
    r#type: &'static str,
    /// Longitude first, then latitude, and altitude if it is known (RFC 7946, section 3.1.1).
    coordinates: Vec<f64>,
}

/// A time as people write it, in UTC; none for 0, which is never.
#[derive(Clone, Copy, Debug)]
struct Moment(u64);

impl<Out: Write> Exporter<Out> {
    /// Begins with the user as a whole and all that is not pings.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(
        mut out: Out,
        format: Format,
        subject: &Subject,
        beside: &Beside,
    ) -> io::Result<Self> {
        let shown = subject.decisions.shown(&subject.checkers);
        let checkers = &subject.checkers;
        let mut lines = vec![user_line(subject, &shown)];
        lines.extend(shown.iter().map(checker_line));
        let devices = beside.devices.iter();
        lines.extend(devices.map(|(device, record)| device_line(*device, record)));
        let transitions = beside.transitions.iter();
        lines.extend(transitions.map(|transition| transition_line(transition, checkers)));
        let deadlines = beside.deadlines.iter();
        lines.extend(deadlines.map(|deadline| deadline_line(deadline, checkers)));
        let events = beside.events.iter();
        lines.extend(events.map(|event| event_line(event, checkers)));
        match format {
            Format::Jsonl => {
                for line in &lines {
                    write_line(&mut out, line)?;
                }
            }
            Format::Geojson => {
                write!(out, "{{\"type\":\"FeatureCollection\",\"waypost\":")?;
                serde_json::to_writer(&mut out, &lines)?;
                write!(out, ",\"features\":[")?;
            }
        }
        Ok(Self {
            out,
            format,
            counts: Counts {
                checkers: shown.len() as u64,
                devices: beside.devices.len() as u64,
                transitions: beside.transitions.len() as u64,
                deadlines: beside.deadlines.len() as u64,
                deadline_events: beside.events.len() as u64,
                pings: 0,
            },
        })
    }

    /// Adds a ping.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn ping(
        &mut self,
        device: DeviceId,
        epoch: u32,
        receive_ms: u64,
        ping: &Ping,
    ) -> io::Result<()> {
        let is_first = self.counts.pings == 0;
        self.counts.pings += 1;
        let line = ping_line(device, epoch, receive_ms, ping);
        match self.format {
            Format::Jsonl => write_line(&mut self.out, &Line::Ping(Box::new(line))),
            Format::Geojson => {
                self.out.write_all(if is_first { b"\n" } else { b",\n" })?;
                serde_json::to_writer(&mut self.out, &feature(line))?;
                Ok(())
            }
        }
    }

    /// Ends it, and gives back what it was written to.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn end(mut self) -> io::Result<Out> {
        match self.format {
            Format::Jsonl => write_line(&mut self.out, &Line::End(self.counts))?,
            Format::Geojson => writeln!(self.out, "\n]}}")?,
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

fn write_line(out: &mut impl Write, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    out.write_all(b"\n")
}

fn user_line(subject: &Subject, shown: &[CheckerGrant]) -> Line {
    // Whoever watches everybody is told of those only who have granted it.
    let could_be_told =
        |recipient: &&Recipient| shown.iter().any(|grant| grant.name == recipient.checker);
    let recipients = subject.recipients.iter().filter(could_be_told);
    let told = recipients.map(|recipient| Told {
        checker: recipient.checker.clone(),
        first: Moment(recipient.watched_ms.0),
        last: Moment(recipient.watched_ms.1),
    });
    Line::User {
        user: subject.user.to_string(),
        exported: Moment(subject.at_ms),
        position: subject.position,
        state: subject.sharing.as_label(),
        kept_days: subject.retention_days,
        told: told.collect(),
    }
}

fn device_line(device: DeviceId, record: &DeviceRecord) -> Line {
    Line::Device {
        device: device.device,
        epoch: record.epoch,
        last_contact: Moment(record.clocks.last_contact_ms),
        last_sample: Moment(record.clocks.last_sample_ms),
        last_fix: Moment(record.clocks.last_fix_ms),
        durable: Moment(record.clocks.durable_ms),
        given_up: record.gaps,
    }
}

fn checker_line(grant: &CheckerGrant) -> Line {
    Line::Checker {
        checker: grant.name.clone(),
        granted: Moment(grant.granted_ms),
        withdrawn: Moment(grant.withdrawn_ms),
    }
}

fn transition_line(transition: &Transition, checkers: &Checkers) -> Line {
    let concerned = match transition.turn {
        // All who could be told then.
        Turn::Sharing(_) => CheckerSet::default(),
        Turn::Granted | Turn::Withdrawn => transition.checkers,
    };
    Line::Transition {
        state: transition.turn.as_label(),
        checkers: checkers.names(concerned).map(str::to_owned).collect(),
        at: Moment(transition.at_ms),
    }
}

/// A checker's name; none if this store has never known it by one.
fn name_of(checker: Checker, checkers: &Checkers) -> Option<String> {
    let mut names = checkers.iter().map(|(_, name)| name);
    let name = names.find(|name| Checker::named(name) == checker);
    name.map(str::to_owned)
}

fn deadline_line(deadline: &Registration, checkers: &Checkers) -> Line {
    Line::Deadline {
        checker: name_of(deadline.checker, checkers),
        expect_every_ms: deadline.setting.expect_every_ms,
        grace_ms: deadline.setting.grace_ms,
        since: Moment(deadline.since_ms),
        late: Moment(deadline.late.map_or(0, |late| late.at_ms)),
    }
}

fn event_line(event: &Event, checkers: &Checkers) -> Line {
    Line::DeadlineEvent {
        checker: name_of(event.checker, checkers),
        event: event.kind.as_label(),
        at: Moment(event.at_ms),
        last_contact: Moment(event.last_contact_ms),
        due: Moment(event.due_ms),
    }
}

fn ping_line(device: DeviceId, epoch: u32, receive_ms: u64, ping: &Ping) -> PingLine {
    PingLine {
        device: device.device,
        epoch,
        seq: ping.seq,
        sampled: Moment(ping.time_ms),
        received: Moment(receive_ms),
        latitude: Some(f64::from(ping.latitude_e7) / 1e7),
        longitude: Some(f64::from(ping.longitude_e7) / 1e7),
        accuracy_m: ping.accuracy_dm.map(|dm| f64::from(dm) / 10.0),
        altitude_m: ping.altitude_dm.map(|dm| f64::from(dm) / 10.0),
        speed_m_per_s: ping.speed_cm_per_s.map(|cm| f64::from(cm) / 100.0),
        course_deg: ping.course_ddeg.map(|ddeg| f64::from(ddeg) / 10.0),
        heading_deg: ping.heading_deg,
        battery_percent: ping.battery_percent,
        source: match ping.source {
            Source::Unspecified => None,
            Source::Gnss => Some("gnss"),
            Source::Network => Some("network"),
            Source::Manual => Some("manual"),
            Source::LastKnown => Some("last_known"),
        },
    }
}

fn feature(mut ping: PingLine) -> Feature {
    let place = [ping.longitude.take(), ping.latitude.take(), ping.altitude_m];
    Feature {
        r#type: "Feature",
        geometry: Geometry {
            r#type: "Point",
            coordinates: place.into_iter().flatten().collect(),
        },
        properties: ping,
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, ms) = (self.0 / 1_000, self.0 % 1_000);
        write!(
            f,
            "{}T{:02}:{:02}:{:02}.{ms:03}Z",
            Day::of_ms(self.0),
            seconds / 3_600 % 24,
            seconds / 60 % 60,
            seconds % 60
        )
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            0 => serializer.serialize_none(),
            _ => serializer.collect_str(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use waypost_proto::device::Clocks;

    use super::*;
    use crate::deadlines::{Kind, Setting};

    const USER: UserId = UserId([0x11; 16]);
    /// 2026-08-20 12:34:56.789 UTC.
    const NOON_MS: u64 = 1_787_229_296_789;

    fn export(format: Format) -> String {
        let device = DeviceId {
            user: USER,
            device: 7,
        };
        let record = DeviceRecord {
            epoch: 3,
            clocks: Clocks {
                last_contact_ms: NOON_MS,
                ..Clocks::default()
            },
            ..DeviceRecord::default()
        };
        let names = ["somebody-else", "night-watch"];
        let checkers = Checkers::restore(names.map(str::to_owned).into());
        let night_watch = checkers.number("night-watch").unwrap();
        let mut decisions = Decisions::default();
        decisions.grant(night_watch, CheckerSet::default(), NOON_MS);
        decisions.withdraw(night_watch, CheckerSet::default(), NOON_MS + 1_000);
        let subject = Subject {
            user: USER,
            at_ms: NOON_MS,
            position: 9,
            sharing: Sharing::Paused,
            retention_days: 30,
            recipients: ["night-watch", "somebody-else"]
                .map(|checker| Recipient {
                    checker: checker.to_owned(),
                    watched_ms: (NOON_MS, NOON_MS + 1_000),
                })
                .into(),
            decisions,
            checkers,
        };
        let withdrawn = Transition {
            user: USER,
            turn: Turn::Withdrawn,
            checkers: night_watch.into(),
            at_ms: NOON_MS + 1_000,
            position: 8,
            number: 0,
        };
        let paused = Transition {
            turn: Turn::Sharing(Sharing::Paused),
            number: 1,
            ..withdrawn
        };
        let deadline = Registration {
            checker: Checker::named("night-watch"),
            user: USER,
            setting: Setting {
                expect_every_ms: 60_000,
                grace_ms: 5,
            },
            since_ms: NOON_MS,
            late: None,
        };
        let late = Event {
            checker: Checker::named("of before there were numbers"),
            user: USER,
            kind: Kind::Late,
            position: 7,
            at_ms: NOON_MS + 1_000,
            last_contact_ms: 0,
            due_ms: NOON_MS,
        };
        let beside = Beside {
            devices: vec![(device, record)],
            transitions: vec![withdrawn, paused],
            deadlines: vec![deadline],
            events: vec![late],
        };
        let mut exporter = Exporter::begin(Vec::new(), format, &subject, &beside).unwrap();
        let full = Ping {
            accuracy_dm: Some(35),
            altitude_dm: Some(-123),
            speed_cm_per_s: Some(140),
            course_ddeg: Some(3_599),
            heading_deg: Some(91),
            battery_percent: Some(55),
            source: Source::Gnss,
            ..Ping::at(1, NOON_MS, 535_123_457, -101_234_567)
        };
        exporter.ping(device, 3, NOON_MS + 5, &full).unwrap();
        let plain = Ping::at(2, NOON_MS, -1, 0);
        exporter.ping(device, 3, NOON_MS + 6, &plain).unwrap();
        String::from_utf8(exporter.end().unwrap()).unwrap()
    }

    #[test]
    fn lines_hold_everything_and_say_at_the_end_how_much_that_was() {
        let text = export(Format::Jsonl);
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let (noon, later) = ("2026-08-20T12:34:56.789Z", "2026-08-20T12:34:57.789Z");
        assert_eq!(
            lines,
            [
                json!({"kind": "user", "user": USER.to_string(), "exported": noon, "position": 9,
                    "state": "paused", "kept_days": 30, "told": [{"checker": "night-watch",
                    "first": noon, "last": later}]}),
                json!({"kind": "checker", "checker": "night-watch", "granted": noon,
                    "withdrawn": later}),
                json!({"kind": "device", "device": 7, "epoch": 3, "last_contact": noon,
                    "last_sample": null, "last_fix": null, "durable": null, "given_up": 0}),
                json!({"kind": "transition", "state": "withdrawn", "checkers": ["night-watch"],
                    "at": later}),
                json!({"kind": "transition", "state": "paused", "at": later}),
                json!({"kind": "deadline", "checker": "night-watch", "expect_every_ms": 60_000,
                    "grace_ms": 5, "since": noon, "late": null}),
                json!({"kind": "deadline_event", "checker": null, "event": "late", "at": later,
                    "last_contact": null, "due": noon}),
                json!({"kind": "ping", "device": 7, "epoch": 3, "seq": 1, "sampled": noon,
                    "received": "2026-08-20T12:34:56.794Z", "latitude": 53.512_345_7,
                    "longitude": -10.123_456_7, "accuracy_m": 3.5, "altitude_m": -12.3,
                    "speed_m_per_s": 1.4, "course_deg": 359.9, "heading_deg": 91,
                    "battery_percent": 55, "source": "gnss"}),
                json!({"kind": "ping", "device": 7, "epoch": 3, "seq": 2, "sampled": noon,
                    "received": "2026-08-20T12:34:56.795Z", "latitude": -1e-7, "longitude": 0.0}),
                json!({"kind": "end", "checkers": 1, "devices": 1, "transitions": 2,
                    "deadlines": 1, "deadline_events": 1, "pings": 2}),
            ]
        );
    }

    #[test]
    fn a_map_finds_points_with_longitude_first() {
        let map: Value = serde_json::from_str(&export(Format::Geojson)).unwrap();
        assert_eq!(map["type"], "FeatureCollection");
        assert_eq!(map["waypost"].as_array().unwrap().len(), 7);
        let features = map["features"].as_array().unwrap();
        assert_eq!(features.len(), 2);
        assert_eq!(
            features[0]["geometry"],
            json!({"type": "Point", "coordinates": [-10.123_456_7, 53.512_345_7, -12.3]})
        );
        assert_eq!(features[0]["properties"]["seq"], 1);
        assert_eq!(features[0]["properties"].get("latitude"), None);
        assert_eq!(
            features[1]["geometry"]["coordinates"],
            json!([0.0, -1e-7]),
            "no altitude that is not known"
        );
    }
}
