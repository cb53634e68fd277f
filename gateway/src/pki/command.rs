//! `waypost pki`: makes certificates and says what they are for.
//!
//! Knows the command line and what a person needs to read. How certificates are made is the parent's.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use waypost_proto::id::{DeviceId, Identity, UserId, is_checker_name};

use super::{
    AUTHORITY_DAYS, Authority, CERTIFICATE_DAYS, DEFAULT_TRUST_DOMAIN, KeyPair, LOCAL_NAMES,
    PkiError, Purpose, Validity, Written, host_names, stem_of,
};
use crate::tls::is_trust_domain;

/// Arguments of `waypost pki`.
#[derive(Args, Debug)]
#[command(after_help = "\
Example: everything for a gateway that is reached as gw.example.org, one device and one checker
  waypost pki init --trust-domain example.org
  waypost pki server --name gw.example.org
  waypost pki device
  waypost pki checker night-watch")]
pub struct PkiArgs {
    #[command(subcommand)]
    command: PkiCommand,
    /// The folder of the authority
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "waypost-data/pki"
    )]
    dir: PathBuf,
    /// Print one JSON object, for programs
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum PkiCommand {
    /// Make a certificate authority; an existing one is never overwritten
    Init {
        /// The trust domain of every identity that it will hand out
        #[arg(long, value_name = "NAME", default_value = DEFAULT_TRUST_DOMAIN, value_parser = trust_domain)]
        trust_domain: String,
    },
    /// Make the gateway's certificate
    Server {
        /// A host name or IP address that the gateway is reached by; may be repeated
        #[arg(long = "name", value_name = "HOST", default_values = LOCAL_NAMES)]
        names: Vec<String>,
        #[command(flatten)]
        issue: IssueArgs,
    },
    /// Make a device's certificate
    Device {
        /// The user, a UUID in lower case; a new one if not given
        #[arg(long, value_name = "UUID", value_parser = user)]
        user: Option<UserId>,
        /// The number of the device within the user
        #[arg(long, value_name = "N", default_value_t = 1)]
        device: u32,
        #[command(flatten)]
        issue: IssueArgs,
    },
    /// Make a checker's certificate, which reads freshness and never coordinates
    Checker {
        /// The checker's name: a-z, 0-9, '-', '_' and '.'
        #[arg(value_parser = checker)]
        name: String,
        #[command(flatten)]
        issue: IssueArgs,
    },
    /// Make an operator's certificate, which invites devices
    Operator {
        /// The operator's name: a-z, 0-9, '-', '_' and '.'
        #[arg(value_parser = checker)]
        name: String,
        #[command(flatten)]
        issue: IssueArgs,
    },
}

#[derive(Args, Debug)]
struct IssueArgs {
    /// For how many days the certificate holds
    #[arg(long, default_value_t = CERTIFICATE_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
    /// The folder to write to, if it is not the authority's
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What was made, for people and programs.
#[derive(Serialize)]
struct Made {
    kind: &'static str,
    trust_domain: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
    certificate: PathBuf,
    private_key: PathBuf,
    last_day: String,
    #[serde(skip)]
    title: &'static str,
    #[serde(skip)]
    next: String,
}

/// Runs `waypost pki`.
///
/// # Errors
/// When the certificate cannot be made or written.
#[expect(clippy::print_stdout, reason = "this is what the command is for")]
pub fn run(args: PkiArgs) -> Result<(), PkiError> {
    let made = args.command.run(&args.dir)?;
    if args.json {
        println!("{}", serde_json::json!(made));
    } else {
        print!("{}", made.to_text());
    }
    Ok(())
}

impl PkiCommand {
    fn run(self, dir: &Path) -> Result<Made, PkiError> {
        match self {
            Self::Init { trust_domain } => init(dir, trust_domain),
            Self::Server { names, issue } => server(dir, names, issue),
            Self::Device {
                user,
                device,
                issue,
            } => {
                let user = user.unwrap_or_else(|| UserId(*uuid::Uuid::new_v4().as_bytes()));
                client(dir, &Identity::Device(DeviceId { user, device }), issue)
            }
            Self::Checker { name, issue } => client(dir, &Identity::Checker(name), issue),
            Self::Operator { name, issue } => client(dir, &Identity::Operator(name), issue),
        }
    }
}

fn init(dir: &Path, trust_domain: String) -> Result<Made, PkiError> {
    Authority::create(dir, &trust_domain)?;
    let files = Written::named(dir, "ca");
    Ok(Made {
        kind: "authority",
        title: "Made a certificate authority",
        trust_domain,
        uri: None,
        user: None,
        device: None,
        names: Vec::new(),
        certificate: files.certificate,
        private_key: files.private_key,
        last_day: Validity::days(AUTHORITY_DAYS).last_day(),
        next: "The key can make any identity: keep it off the gateway if you can. Devices and checkers need\n\
               the certificate to know the gateway by. Next: `waypost pki server`."
            .to_owned(),
    })
}

fn server(dir: &Path, names: Vec<String>, issue: IssueArgs) -> Result<Made, PkiError> {
    let authority = Authority::open(dir)?;
    let validity = Validity::days(issue.days);
    let written = authority
        .issue(
            host_names(&names)?,
            Purpose::Server,
            validity,
            &KeyPair::generate()?,
        )?
        .write(issue.out.as_deref().unwrap_or(dir), "server")?;
    Ok(Made {
        kind: "server",
        title: "Made the gateway's certificate",
        trust_domain: authority.trust_domain().to_owned(),
        uri: None,
        user: None,
        device: None,
        names,
        next: format!(
            "In the gateway's configuration:\n[tls]\ncertificate = {:?}\nprivate_key = {:?}\nclient_ca = {:?}\ntrust_domain = {:?}",
            absolute(&written.certificate),
            absolute(&written.private_key),
            absolute(&dir.join("ca.pem")),
            authority.trust_domain(),
        ),
        certificate: written.certificate,
        private_key: written.private_key,
        last_day: validity.last_day(),
    })
}

fn client(dir: &Path, identity: &Identity, issue: IssueArgs) -> Result<Made, PkiError> {
    let authority = Authority::open(dir)?;
    let validity = Validity::days(issue.days);
    let written = authority
        .issue(
            authority.names_of(identity)?,
            Purpose::Client,
            validity,
            &KeyPair::generate()?,
        )?
        .write(issue.out.as_deref().unwrap_or(dir), &stem_of(identity))?;
    let (kind, title, user, device) = match identity {
        Identity::Device(DeviceId { user, device }) => (
            "device",
            "Made a device's certificate",
            Some(user.to_string()),
            Some(*device),
        ),
        Identity::Checker(_) => ("checker", "Made a checker's certificate", None, None),
        Identity::Operator(_) => ("operator", "Made an operator's certificate", None, None),
    };
    Ok(Made {
        kind,
        title,
        trust_domain: authority.trust_domain().to_owned(),
        uri: Some(identity.to_uri(authority.trust_domain())),
        user,
        device,
        names: Vec::new(),
        certificate: written.certificate,
        private_key: written.private_key,
        last_day: validity.last_day(),
        next: format!(
            "Give the {kind} both files, and {} to know the gateway by.",
            dir.join("ca.pem").display()
        ),
    })
}

impl Made {
    fn to_text(&self) -> String {
        let mut text = format!(
            "{} for the trust domain {}\n",
            self.title, self.trust_domain
        );
        let mut line = |name: &str, value: String| text += &format!("  {name:<12} {value}\n");
        if let Some(uri) = &self.uri {
            line("speaks for", uri.clone());
        }
        if !self.names.is_empty() {
            line("reached by", self.names.join(", "));
        }
        line("certificate", self.certificate.display().to_string());
        line(
            "private key",
            format!("{}  (secret)", self.private_key.display()),
        );
        line("last day", self.last_day.clone());
        text + &self.next + "\n"
    }
}

/// For the configuration file, which may lie elsewhere.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn trust_domain(text: &str) -> Result<String, &'static str> {
    is_trust_domain(text)
        .then(|| text.to_owned())
        .ok_or("use 1 to 255 of a-z, 0-9, '-', '_' and '.', such as waypost.example.org")
}

fn user(text: &str) -> Result<UserId, &'static str> {
    UserId::parse(text)
        .ok_or("a user is a UUID in lower case, such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8")
}

fn checker(text: &str) -> Result<String, &'static str> {
    is_checker_name(text)
        .then(|| text.to_owned())
        .ok_or("use 1 to 64 of a-z, 0-9, '-', '_' and '.'")
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rustls::pki_types::{CertificateDer, pem::PemObject};

    use super::*;
    use crate::tls::identity_of;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        pki: PkiArgs,
    }

    fn made(dir: &Path, line: &str) -> Result<Made, String> {
        let words = ["pki", "--dir", dir.to_str().unwrap()]
            .into_iter()
            .chain(line.split(' '));
        let args = Cli::try_parse_from(words)
            .map_err(|error| error.to_string())?
            .pki;
        args.command
            .run(&args.dir)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn each_certificate_speaks_for_whom_it_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let uri = |made: &Made| {
            let chain = [CertificateDer::from_pem_file(&made.certificate).unwrap()];
            identity_of(&chain, "example.org")
                .unwrap()
                .to_uri("example.org")
        };
        made(dir.path(), "init --trust-domain example.org").unwrap();
        let server = made(dir.path(), "server --name gw.example.org --name 10.0.0.1").unwrap();
        assert_eq!(server.names, ["gw.example.org", "10.0.0.1"]);
        let device = made(
            dir.path(),
            "device --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8 --device 2",
        )
        .unwrap();
        assert_eq!(
            uri(&device),
            "spiffe://example.org/user/6ba7b810-9dad-11d1-80b4-00c04fd430c8/device/2"
        );
        assert_eq!(device.uri, Some(uri(&device)));
        let checker = made(dir.path(), "checker night-watch").unwrap();
        assert_eq!(uri(&checker), "spiffe://example.org/checker/night-watch");
        let operator = made(dir.path(), "operator crew-office").unwrap();
        assert_eq!(uri(&operator), "spiffe://example.org/operator/crew-office");
    }

    #[test]
    fn a_device_without_a_user_gets_one_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path(), "init").unwrap();
        let users = [(); 2].map(|()| made(dir.path(), "device").unwrap().user.unwrap());
        assert_ne!(users[0], users[1]);
        assert!(users.iter().all(|user| UserId::parse(user).is_some()));
    }

    #[test]
    fn mistakes_are_told() {
        let dir = tempfile::tempdir().unwrap();
        for (line, told) in [
            ("device", "waypost pki init"),
            (
                "device --user 6BA7B810-9dad-11d1-80b4-00c04fd430c8",
                "lower case",
            ),
            ("init --trust-domain Example.org", "a-z"),
            ("checker Night", "a-z"),
            ("server --days 0", "1..=36500"),
        ] {
            let error = made(dir.path(), line).err().unwrap();
            assert!(error.contains(told), "{line}: {error}");
        }
    }
}
