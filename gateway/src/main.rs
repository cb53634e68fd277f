//! The `waypost` command: names its subcommands, and turns how they end into an exit code.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use waypost_gateway::{
    audit::command::{self as audit, AuditArgs},
    backup::command::{self as backup, BackupArgs},
    cli::{self, CheckConfigArgs, Failure, ServeArgs},
    erase::command::EraseArgs,
    export::command::{self as export, ExportArgs},
    inspect::{self, InspectArgs},
    invite::InviteArgs,
    pki::command::{self as pki, PkiArgs},
    restore::command::{self as restore, RestoreArgs},
    revoke::{self, RevokeArgs},
    seal::command::{self as keys, KeysArgs},
    watch::WatchArgs,
};

/// A batch is decoded on one thread, and freed by the committer's: glibc's allocator makes both wait for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes location pings over QUIC, acknowledges what is on disk, and tells how fresh each user's last
/// sign of life is.
#[derive(Parser)]
#[command(
    name = "waypost",
    version,
    arg_required_else_help = true,
    after_help = "\
Try it:
  waypost serve --dev      a gateway on this machine, with certificates of its own
  waypost COMMAND --help   examples for each command"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway
    Serve(ServeArgs),
    /// Check the configuration and print what is in effect
    CheckConfig(CheckConfigArgs),
    /// Make certificates for the gateway, devices, checkers and operators
    Pki(PkiArgs),
    /// Invite a device: a code that it redeems for a certificate, also as a QR code
    Invite(InviteArgs),
    /// Make the master key that everything stored is sealed with, or go over to another
    Keys(KeysArgs),
    /// Serve a device or user no more
    Revoke(RevokeArgs),
    /// Give out everything that is held on a user, for the holder
    Export(ExportArgs),
    /// Erase everything that is held on a user, as the holder wishes
    Erase(EraseArgs),
    /// Follow how fresh each user's last sign of life is
    Watch(WatchArgs),
    /// Show what is in a store: counts and times, never positions
    Inspect(InspectArgs),
    /// Copy the store to a folder of backups, beside a running gateway or without one
    Backup(BackupArgs),
    /// Put a store back from a backup
    Restore(RestoreArgs),
    /// Check the record of who did what to whose data
    Audit(AuditArgs),
}

fn main() -> ExitCode {
    let ended = match Cli::parse().command {
        Command::Serve(args) => cli::serve(&args),
        Command::CheckConfig(args) => cli::check_config(&args),
        Command::Pki(args) => pki::run(args).map_err(Failure::from),
        Command::Invite(args) => cli::invite(args),
        Command::Keys(args) => keys::run(args).map_err(Failure::from),
        Command::Revoke(args) => {
            revoke::run(&args, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
        Command::Export(args) => {
            export::run(&args, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
        Command::Erase(args) => cli::erase(&args),
        Command::Watch(args) => cli::watch(args),
        Command::Inspect(args) => {
            inspect::run(&args, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
        Command::Backup(args) => {
            backup::run(&args, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
        Command::Restore(args) => {
            restore::run(&args, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
        Command::Audit(args) => {
            audit::run(&args, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            cli::report(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}
