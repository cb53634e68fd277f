//! `waypost invite`: asks a running gateway for an invitation, and shows it so that a telephone can read it.
//!
//! Knows the options and what is printed. It is a client like an operator's own backend, and can do no more.

use std::{
    fs, io,
    io::{IsTerminal as _, Write},
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use humantime_serde::re::humantime::{format_duration, parse_duration};
use qrcode::{QrCode, render::unicode::Dense1x2};
use serde::Serialize;
use tonic::{Code, Status};
use waypost_checker::{CheckerError, Config};
use waypost_proto::{
    id::UserId,
    v1::{InviteRequest, InviteResponse},
};

use crate::{
    clock::system_now_ms, console::parse_user, enrol::rpc::enrolment_client::EnrolmentClient,
};

/// Arguments of `waypost invite`.
#[derive(Args, Debug)]
#[command(after_help = "\
The gateway must have an authority under [enrolment], and the name of the operator's certificate in
enrolment.operators; `waypost serve --dev` has both.

Examples:
  waypost invite --checker dev           a new user, whom the checker dev may be told of, with a code for a day
  waypost invite --expires 10m           for somebody who is in the room
  waypost invite --user UUID             a further device of a user, also when one was lost")]
pub struct InviteArgs {
    /// The user whose further device it is; a new user if not given
    #[arg(long, value_name = "UUID", value_parser = parse_user)]
    user: Option<UserId>,
    /// A checker that the holder is asked to let see signs of life, never places; may be given again. Without, nobody is
    /// told of the user until the holder says so on the device
    #[arg(long = "checker", value_name = "NAME")]
    checkers: Vec<String>,
    /// For how long the code works, at most 30 days [default: what the gateway is set to, mostly a day]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    expires: Option<Duration>,
    /// Print one JSON object, for programs
    #[arg(long)]
    json: bool,
    /// The gateway's gRPC port
    #[arg(long, value_name = "URL", default_value = "https://127.0.0.1:4434")]
    addr: String,
    /// The data folder of a gateway run with --dev, whose operator's certificate is used
    #[arg(long, value_name = "DIR", default_value = "waypost-data")]
    data: PathBuf,
    /// The folder with ca.pem, operator-dev.pem and operator-dev.key [default: pki in the data folder]
    #[arg(long, value_name = "DIR")]
    pki: Option<PathBuf>,
    /// The authority of the gateway's certificate, PEM
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The operator's certificate, PEM
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// The operator's private key, PEM
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// A name in the gateway's certificate
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    server_name: String,
}

/// Why nobody was invited.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// A certificate or key cannot be read.
    #[error(
        "cannot read {path}: {source}; name the file with --{option}. `waypost pki operator NAME` makes an operator's \
         certificate and key, and a gateway that is started with --dev has its own in its data folder"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The address or the certificates cannot be used.
    #[error(transparent)]
    Endpoint(#[from] CheckerError),
    /// Nobody answers there.
    #[error("cannot connect to the gateway at {address}")]
    Connect {
        /// Where it should be.
        address: String,
        /// What went wrong.
        source: tonic::transport::Error,
    },
    /// It issues no certificates.
    #[error(
        "the gateway issues no certificates: set enrolment.ca_certificate and enrolment.ca_key, or make a device's certificate with `waypost pki device`"
    )]
    NotOffered,
    /// It says no.
    #[error("the gateway refuses: {0}")]
    Refused(String),
    /// What it answered cannot be shown.
    #[error("the gateway's answer makes no QR code: {0}")]
    NoPicture(#[from] qrcode::types::QrError),
    /// The output is closed.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

/// An invitation, for programs.
#[derive(Serialize)]
struct Invited {
    code: String,
    uri: String,
    user: String,
    device: u32,
    /// Those that it names.
    checkers: Vec<String>,
    expires_ms: u64,
}

/// Runs `waypost invite`.
///
/// # Errors
/// When the gateway cannot be asked, or refuses.
pub async fn run(args: InviteArgs) -> Result<(), InviteError> {
    let endpoint = connection(&args)?.endpoint()?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|source| InviteError::Connect {
            address: args.addr.clone(),
            source,
        })?;
    let user = args.user.map(|user| Bytes::copy_from_slice(&user.0));
    let valid_for = args.expires.unwrap_or_default().as_millis();
    let request = InviteRequest {
        user: user.unwrap_or_default(),
        valid_for_ms: u64::try_from(valid_for).unwrap_or(u64::MAX),
        checkers: args.checkers.clone(),
    };
    let response = EnrolmentClient::new(channel).invite(request).await;
    let response = response.map_err(|status| refusal(&status))?.into_inner();
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(
            out,
            "{}",
            serde_json::json!(invited(response, args.checkers))
        )?;
    } else {
        let is_terminal = out.is_terminal();
        let invited = invited(response, args.checkers);
        show(&invited, system_now_ms(), is_terminal, &mut out)?;
    }
    Ok(())
}

fn connection(args: &InviteArgs) -> Result<Config, InviteError> {
    let pki = args.pki.clone().unwrap_or_else(|| args.data.join("pki"));
    let read = |given: &Option<PathBuf>, name: &str, option| {
        let path = given.clone().unwrap_or_else(|| pki.join(name));
        fs::read(&path).map_err(|source| InviteError::Unreadable {
            path,
            option,
            source,
        })
    };
    Ok(Config::new(
        &args.addr,
        read(&args.ca, "ca.pem", "ca")?,
        read(&args.cert, "operator-dev.pem", "cert")?,
        read(&args.key, "operator-dev.key", "key")?,
        &args.server_name,
    ))
}

fn refusal(status: &Status) -> InviteError {
    match status.code() {
        Code::Unimplemented => InviteError::NotOffered,
        _ => InviteError::Refused(status.message().to_owned()),
    }
}

fn invited(response: InviteResponse, checkers: Vec<String>) -> Invited {
    let user: Option<[u8; 16]> = response.user[..].try_into().ok();
    Invited {
        code: response.code,
        uri: response.uri,
        user: UserId(user.unwrap_or_default()).to_string(),
        device: response.device,
        checkers,
        expires_ms: response.expires_ms,
    }
}

/// Black on white where there are colours, for a reader expects the dark parts dark, whatever the terminal's are.
fn show(
    invited: &Invited,
    now_ms: u64,
    is_terminal: bool,
    out: &mut impl Write,
) -> Result<(), InviteError> {
    let picture = QrCode::new(&invited.uri)?.render::<Dense1x2>().build();
    let (before, after) = if is_terminal {
        ("\x1b[38;5;16;48;5;231m", "\x1b[0m")
    } else {
        ("", "")
    };
    for line in picture.lines() {
        writeln!(out, "{before}{line}{after}")?;
    }
    let checkers = match &*invited.checkers {
        [] => "none that this invitation names".to_owned(),
        named => named.join(", "),
    };
    let left = Duration::from_secs(invited.expires_ms.saturating_sub(now_ms) / 1_000);
    writeln!(
        out,
        "\nCode       {}\nInvitation {}\nUser       {}, device {}\nCheckers   {checkers}\nWorks for  {}, and once",
        invited.code,
        invited.uri,
        invited.user,
        invited.device,
        in_words(left),
    )?;
    Ok(())
}

/// A time with its units apart from its numbers: `1 day`, `10 m 30 s`.
fn in_words(time: Duration) -> String {
    let text = format_duration(time).to_string();
    let mut words = String::new();
    for (at, character) in text.char_indices() {
        if character.is_ascii_alphabetic()
            && text[..at].ends_with(|last: char| last.is_ascii_digit())
        {
            words.push(' ');
        }
        words.push(character);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_its_units_apart_from_its_numbers() {
        for (seconds, words) in [
            (24 * 60 * 60, "1 day"),
            (24 * 60 * 60 - 1, "23 h 59 m 59 s"),
            (49 * 60 * 60, "2 days 1 h"),
            (0, "0 s"),
        ] {
            assert_eq!(in_words(Duration::from_secs(seconds)), words);
        }
    }

    #[test]
    fn an_invitation_is_shown_as_a_picture_and_as_text() {
        let invited = Invited {
            code: "7K3M-XW9T-0VQF-HN2C".to_owned(),
            uri: "waypost://enroll?server=localhost:4435&code=7K3M-XW9T-0VQF-HN2C".to_owned(),
            user: UserId([7; 16]).to_string(),
            device: 1,
            checkers: vec!["ops".to_owned(), "night-watch".to_owned()],
            expires_ms: 600_500,
        };
        let mut out = Vec::new();
        show(&invited, 500, false, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        for told in [
            &invited.code,
            &invited.uri,
            &invited.user,
            "Works for  10 m, and once",
            "ops, night-watch",
            "\u{2580}",
        ] {
            assert!(text.contains(told), "{told} is not in:\n{text}");
        }
        let mut out = Vec::new();
        show(&invited, 500, true, &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("\x1b[0m"));
    }
}
