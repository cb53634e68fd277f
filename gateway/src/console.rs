//! What the commands a person gives have in common: how a user is written, and how a report is printed.
//!
//! Knows text. Must not know any command.

use std::{
    fmt,
    io::{self, Write},
};

use serde::Serialize;
use waypost_proto::id::UserId;

/// Reads a user's id as people write it.
pub(crate) fn parse_user(text: &str) -> Result<UserId, &'static str> {
    UserId::parse(text)
        .ok_or("a user is a UUID in lower case, such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8")
}

/// Writes a report for a person, or as one JSON object.
pub(crate) fn print(
    report: &(impl Serialize + fmt::Display),
    json: bool,
    out: &mut impl Write,
) -> io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, report)?;
        writeln!(out)
    } else {
        write!(out, "{report}")
    }
}
