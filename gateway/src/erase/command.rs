//! `waypost erase`: erases everything that is held on a user, as the holder wishes, by the running gateway or in its
//! store.
//!
//! Knows the command line, who can write to the store just now, and what a person needs to read. The steps behind the
//! fence are the parent's, either way.

use std::{
    fmt,
    io::{self, BufRead, IsTerminal, Write},
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde::Serialize;
use waypost_proto::id::UserId;

use super::{EraseError, Erasure, Steps};
use crate::{
    audit::chain::{What, Whose},
    bulletin::News,
    clock::{Clock, system_now_ms},
    console::{parse_user, print},
    control::{Answer, Call, Command, ControlError},
    deadlines::{Change, Said},
    export::source::NotHeld,
    inspect::Moment,
    sharing::Transition,
    standalone::{self, StandaloneError, by_gateway_or_alone},
    store::{CommitError, Held, OpenError, ReadError, Store},
};

/// Arguments of `waypost erase`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  waypost erase --data /var/lib/waypost --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8
  waypost erase --data /var/lib/waypost --user 6ba7b810-9dad-11d1-80b4-00c04fd430c8 --yes --json

It cannot be undone. The same is done as when a device wants it: nothing more is taken of the user, the key is
destroyed, the rows and the files in which they lay go, and everything is looked for once more. Open
connections end with ERASED, and checkers are told. If this is interrupted, the erasure goes on in the gateway, or
at its next start. Called again it gives the same receipt.

Exit code: 0 nothing is left, 1 it did not come to that, 2 it was not confirmed or the command line is wrong.")]
pub struct EraseArgs {
    /// The gateway's data folder. The gateway may be running
    #[arg(long = "data", value_name = "DIR")]
    data_dir: PathBuf,
    /// The gateway's configuration file, which says where the master key is. Without a running gateway the store is
    /// opened, and not without that key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The user, a UUID in lower case
    #[arg(long, value_name = "UUID", value_parser = parse_user)]
    user: UserId,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why not everything is erased.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant is the part that failed, and says the rest itself"
)]
pub enum EraseCommandError {
    #[error(transparent)]
    NotHeld(#[from] NotHeld),
    /// Nobody can be asked.
    #[error(
        "this cannot be undone, and there is no terminal to ask on: say --yes to do it without being asked"
    )]
    NoTerminal,
    /// Somebody was asked and did not say yes.
    #[error("that is not how the user's id begins; nothing was done")]
    NotConfirmed,
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The gateway will not.
    #[error("the gateway refuses: {0}")]
    Refused(String),
    /// Nothing more is taken of the user, and something is left.
    #[error(
        "not everything is erased yet: {0}. Nothing more is taken of the user; run this again, or start the gateway, which goes on with it"
    )]
    NotFinished(#[from] EraseError),
    /// It could not be begun behind its fence.
    #[error("the operating system gives no thread: {0}; run this again")]
    NoThread(io::Error),
    /// The thread that did it has panicked.
    #[error("the erasure broke off; run this again")]
    BrokenOff,
    /// The output is closed.
    #[error("cannot write the receipt: {0}")]
    Output(#[from] io::Error),
}

impl EraseCommandError {
    /// Whether nothing was done since nobody has said that it should be.
    #[must_use]
    pub fn is_not_confirmed(&self) -> bool {
        matches!(self, Self::NoTerminal | Self::NotConfirmed)
    }
}

/// What the holder may be told.
#[derive(Serialize)]
struct Receipt {
    user: String,
    #[serde(flatten)]
    erasure: Erasure,
    /// Whether it was done by a gateway.
    is_running: bool,
    /// Whether nothing was left before this was called.
    was_erased: bool,
}

/// Erases, waits until nothing is left, and prints the receipt.
///
/// # Errors
/// When something is left, or the output is closed.
pub fn run(args: &EraseArgs, out: &mut impl Write) -> Result<(), EraseCommandError> {
    let mut progress = Progress::new(io::stderr());
    // A reader sees what is so far, whoever has the store open.
    let held = Store::open_without_keys(&args.data_dir)?.held_of(args.user)?;
    let was_erased = match held {
        Held::Nothing => return Err(NotHeld::Unknown(args.user).into()),
        Held::Erased(erasure) => erasure.finished_ms.is_some(),
        Held::Something => {
            if !args.yes {
                confirm_on_terminal(args.user)?;
            }
            false
        }
    };
    let (erasure, is_running) = by_gateway_or_alone(
        || by_gateway(args, &mut progress),
        || alone(args),
        |error| matches!(error, EraseCommandError::Standalone(error) if error.is_locked()),
    )?;
    let receipt = Receipt {
        user: args.user.to_string(),
        erasure,
        is_running,
        was_erased,
    };
    Ok(print(&receipt, args.json, out)?)
}

/// Asks whoever sits there.
fn confirm_on_terminal(user: UserId) -> Result<(), EraseCommandError> {
    let (input, asked) = (io::stdin(), io::stderr());
    if !input.is_terminal() || !asked.is_terminal() {
        return Err(EraseCommandError::NoTerminal);
    }
    confirm(user, &mut input.lock(), &mut asked.lock())
}

/// Asks for the beginning of the user's id, which nobody types by mistake.
fn confirm(
    user: UserId,
    input: &mut impl BufRead,
    asked: &mut impl Write,
) -> Result<(), EraseCommandError> {
    let user = user.to_string();
    let beginning = &user[..CONFIRMED_CHARACTERS];
    write!(
        asked,
        "Everything that is held on user {user} will be erased, for ever, and no device of the user is let in again.\n\
         Type the first {CONFIRMED_CHARACTERS} characters of the id to do it: "
    )?;
    asked.flush()?;
    let mut said = String::new();
    input.read_line(&mut said)?;
    match said.trim() == beginning {
        true => Ok(()),
        false => Err(EraseCommandError::NotConfirmed),
    }
}

/// Has a gateway do it, if one runs, and waits until it has.
fn by_gateway(
    args: &EraseArgs,
    progress: &mut Progress<impl Write>,
) -> Result<Option<Erasure>, EraseCommandError> {
    let command = Command::erase(args.user);
    let Some(call) = Call::begin(&args.data_dir, &command)? else {
        return Ok(None);
    };
    let waited = wait(call, progress);
    progress.end();
    waited.map(Some)
}

fn wait(mut call: Call, progress: &mut Progress<impl Write>) -> Result<Erasure, EraseCommandError> {
    loop {
        match call.answer()? {
            Answer::Erasure(erasure) if erasure.finished_ms.is_some() => return Ok(erasure),
            Answer::Erasure(erasure) => progress.tell(Some(&erasure)),
            Answer::Refused(reason) => return Err(EraseCommandError::Refused(reason)),
            other => return Err(EraseCommandError::Refused(format!("it answers {other:?}"))),
        }
    }
}

/// Does what committer and eraser would, in a store that nobody else has open.
fn alone(args: &EraseArgs) -> Result<Erasure, EraseCommandError> {
    let EraseArgs { data_dir, user, .. } = args;
    let store = standalone::open_store(data_dir, args.config.as_deref(), system_now_ms())?;
    // Somebody else's key that was lost keeps nobody from being erased, and the user's own is of no use any more.
    let recovered = store.recovered()?;
    let clock = Clock::starting_at(recovered.high_water_ms);
    let erasure = match store.held_of(*user)? {
        Held::Nothing => return Err(NotHeld::Unknown(*user).into()),
        Held::Erased(erasure) => erasure,
        Held::Something => {
            let said = Said {
                position: recovered.position + 1,
                at_ms: clock.now_ms(),
            };
            standalone::record(data_dir, What::Erased, Whose::of(&[*user]), said.at_ms)?;
            store.note_erased(&[(*user, said.at_ms)])?;
            fence(&store, *user, said)?
        }
    };
    if erasure.finished_ms.is_some() {
        return Ok(erasure);
    }
    finish(Steps::new(Arc::new(store), clock), *user, erasure)
}

/// From this commit on nothing more is taken of the user, and checkers are told so by the next gateway.
fn fence(store: &Store, user: UserId, said: Said) -> Result<Erasure, EraseCommandError> {
    let by_all = store.load_checkers()?.are_granted_by_all();
    let told = store.decisions_of(user)?.visibility(by_all).granted;
    let fence = Transition::erased(user, told, said);
    let expected = store.expected()?.into_iter();
    let of_user = expected.filter(|(_, expected)| *expected == user);
    let news = News {
        deadlines: of_user
            .map(|(checker, user)| Change::Removed(checker, user))
            .collect(),
        transitions: vec![fence],
        ..News::default()
    };
    let mut batch = store.batch();
    batch.put_position(said.position);
    batch.put_news(&news);
    store.commit(batch)?;
    Ok(Erasure::begun_by(&fence))
}

/// Takes the steps on a thread, so that somebody can say meanwhile that it is not stuck.
fn finish(steps: Steps, user: UserId, erasure: Erasure) -> Result<Erasure, EraseCommandError> {
    let mut progress = Progress::new(io::stderr());
    let (ended, end) = mpsc::channel();
    let worker = thread::Builder::new()
        .name("eraser".to_owned())
        .spawn(move || {
            let mut erasure = erasure;
            let carried_out = steps.carry_out(user, &mut erasure, || false);
            // The store is closed before the command says that it is done.
            drop(steps);
            // Whoever listens waits for just this.
            ended.send(carried_out.map(|()| erasure)).ok();
        })
        .map_err(EraseCommandError::NoThread)?;
    let carried_out = loop {
        match end.recv_timeout(TELL_INTERVAL) {
            Ok(carried_out) => break carried_out,
            Err(mpsc::RecvTimeoutError::Timeout) => progress.tell(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(EraseCommandError::BrokenOff),
        }
    };
    progress.end();
    worker.join().map_err(|_| EraseCommandError::BrokenOff)?;
    Ok(carried_out?)
}

/// A line that says how long it has taken so far, on a terminal.
struct Progress<Out> {
    out: Out,
    began: Instant,
    is_shown: bool,
    has_line: bool,
}

impl<Out: Write + IsTerminal> Progress<Out> {
    fn new(out: Out) -> Self {
        let is_shown = out.is_terminal();
        Self {
            out,
            began: Instant::now(),
            is_shown,
            has_line: false,
        }
    }
}

impl<Out: Write> Progress<Out> {
    fn tell(&mut self, erasure: Option<&Erasure>) {
        if !self.is_shown {
            return;
        }
        let counts = erasure.and_then(|erasure| erasure.counts);
        let what = match counts {
            Some(counts) => format!("{} pings and what belongs to them", counts.pings),
            None => "what is held".to_owned(),
        };
        let seconds = self.began.elapsed().as_secs();
        // What nobody can see is not worth ending for.
        write!(
            self.out,
            "\r\x1b[KErasing {what}: {seconds} s. It goes on if this is interrupted."
        )
        .ok();
        self.out.flush().ok();
        self.has_line = true;
    }

    fn end(&mut self) {
        if self.has_line {
            write!(self.out, "\r\x1b[K").ok();
            self.has_line = false;
        }
    }
}

impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Erasure {
            position,
            fenced_ms,
            counts,
            finished_ms,
            told: _,
        } = self.erasure;
        let counts = counts.unwrap_or_default();
        match self.was_erased {
            false => writeln!(
                f,
                "Everything that was held on user {} is erased.",
                self.user
            )?,
            true => writeln!(
                f,
                "Nothing to do: everything that was held on user {} is erased.",
                self.user
            )?,
        }
        writeln!(
            f,
            "nothing taken since  {}, commit {position}",
            Moment(fenced_ms)
        )?;
        writeln!(
            f,
            "nothing left since   {}",
            Moment(finished_ms.unwrap_or_default())
        )?;
        writeln!(
            f,
            "erased               devices: {}, pings: {}, events: {}",
            counts.devices, counts.pings, counts.events
        )
    }
}

/// As many as the first part of a UUID has.
const CONFIRMED_CHARACTERS: usize = 8;
const TELL_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use clap::Parser;
    use waypost_proto::{device::DeviceRecord, id::DeviceId};

    use super::*;
    use crate::{
        audit,
        deadlines::{Checker, Registration, Setting},
        sharing::{Sharing, Turn},
        store::StoreConfig,
    };

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: EraseArgs,
    }

    const USER: UserId = UserId([7; 16]);
    const OTHER: UserId = UserId([8; 16]);

    fn erase(folder: &tempfile::TempDir, user: UserId) -> Result<serde_json::Value, String> {
        let (data_dir, user) = (folder.path().to_str().unwrap(), user.to_string());
        let options = [
            "erase", "--data", data_dir, "--user", &user, "--json", "--yes",
        ];
        let args = Cli::try_parse_from(options).unwrap().args;
        let mut out = Vec::new();
        run(&args, &mut out).map_err(|error| error.to_string())?;
        Ok(serde_json::from_slice(&out).unwrap())
    }

    /// A store with a device and a deadline of each of two users.
    fn filled(folder: &tempfile::TempDir) {
        let store = Store::open(folder.path(), &StoreConfig::default(), system_now_ms()).unwrap();
        let mut batch = store.batch();
        let set = |user| {
            Change::Set(Registration {
                checker: Checker([1; 16]),
                user,
                setting: Setting {
                    expect_every_ms: 1_000,
                    grace_ms: 0,
                },
                since_ms: 5,
                late: None,
            })
        };
        for user in [USER, OTHER] {
            let record = DeviceRecord {
                position: 4,
                ..DeviceRecord::default()
            };
            batch.put_device(&DeviceId { user, device: 1 }, &record);
        }
        batch.put_news(&News {
            deadlines: vec![set(USER), set(OTHER)],
            ..News::default()
        });
        store.commit(batch).unwrap();
    }

    #[test]
    fn without_a_gateway_the_store_itself_is_cleared_once_and_the_receipt_stays() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            erase(&folder, USER)
                .unwrap_err()
                .contains("there is no store")
        );
        filled(&folder);
        let unknown = erase(&folder, UserId([9; 16])).unwrap_err();
        assert!(unknown.contains("never heard"), "{unknown}");
        let receipt = erase(&folder, USER).unwrap();
        assert_eq!(
            (
                &receipt["position"],
                &receipt["counts"]["devices"],
                &receipt["was_erased"]
            ),
            (&5.into(), &1.into(), &false.into())
        );
        let again = erase(&folder, USER).unwrap();
        assert_eq!(again["finished_ms"], receipt["finished_ms"]);
        assert_eq!(again["was_erased"], true);

        let store = Store::open_read_only(folder.path()).unwrap();
        assert_eq!(store.devices_of(USER).count(), 0);
        assert_eq!(store.devices_of(OTHER).count(), 1);
        let deadlines = store.load_deadlines().unwrap().registrations;
        assert_eq!(deadlines.len(), 1, "nobody expects the user any more");
        let told = store.transitions(0..u64::MAX, 10).unwrap();
        let erased = Turn::Sharing(Sharing::Erased);
        assert_eq!((told.len(), told[0].turn), (1, erased));
        assert_eq!(store.load_devices().unwrap().1.position, 5);
        let log = std::fs::read_to_string(folder.path().join(audit::FILE_NAME)).unwrap();
        assert_eq!(log.matches("\"erased\"").count(), 1, "{log}");
    }

    /// As a command that was killed right after its fence.
    #[test]
    fn an_erasure_that_was_interrupted_goes_on_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        filled(&folder);
        let store = Store::open(folder.path(), &StoreConfig::default(), system_now_ms()).unwrap();
        let said = Said {
            position: 5,
            at_ms: 77,
        };
        fence(&store, USER, said).unwrap();
        drop(store);
        let receipt = erase(&folder, USER).unwrap();
        assert_eq!(
            (&receipt["fenced_ms"], &receipt["was_erased"]),
            (&77.into(), &false.into())
        );
        let store = Store::open_read_only(folder.path()).unwrap();
        assert_eq!(store.devices_of(USER).count(), 0);
        assert_eq!(store.load_devices().unwrap().1.position, 5, "one fence");
    }

    /// A key that was lost keeps the gateway from starting, since nobody would know what was stored; not an erasure.
    #[test]
    fn whose_key_was_lost_can_be_erased_and_then_the_store_can_be_served_again() {
        let folder = tempfile::tempdir().unwrap();
        filled(&folder);
        let open = || Store::open(folder.path(), &StoreConfig::default(), system_now_ms()).unwrap();
        assert!(open().destroy_key(&USER, 1).unwrap());
        std::fs::remove_file(folder.path().join("keys/erased")).unwrap();
        let lost = open().load_devices().unwrap_err();
        assert!(
            lost.to_string().contains("there is no key for it"),
            "{lost}"
        );
        let receipt = erase(&folder, USER).unwrap();
        assert_eq!(receipt["counts"]["devices"], 1);
        let store = open();
        assert_eq!(store.load_devices().unwrap().0.len(), 1);
        assert_eq!(store.expected().unwrap(), [(Checker([1; 16]), OTHER)]);
    }

    #[test]
    fn only_the_beginning_of_the_id_confirms() {
        let said = |text: &str| confirm(USER, &mut text.as_bytes(), &mut Vec::new());
        assert!(said("07070707\n").is_ok());
        for wrong in ["", "\n", "y\n", "yes\n", "0707\n", "08080808\n"] {
            let error = said(wrong).unwrap_err();
            assert!(error.is_not_confirmed(), "{wrong:?}: {error}");
        }
    }
}
