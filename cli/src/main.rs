//! The `disksnap` command: a thin shell over the library. Here: the entry, and which room does what.

mod altered_view;
mod args;
mod attach;
mod backup;
mod bring;
mod changes;
mod checkpoint;
mod checkpoint_args;
mod checkpoint_files;
mod checkpoint_marks;
mod checkpoint_view;
mod conform;
mod context;
mod disk;
mod disk_track;
mod domain;
mod export;
mod export_view;
mod failure;
mod fill;
mod inside_view;
mod job;
mod methods;
mod output;
mod pages;
mod plan;
mod read;
mod recover;
mod signals;
mod snapshot;
mod snapshot_view;
mod source_view;
mod values;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as ClapKind;
use disksnap::{Error, ErrorKind};

use crate::args::{Cli, Command, Form};
use crate::context::Context;
use crate::failure::{Failure, Outcome};

fn main() -> ExitCode {
    // A second process of this program may be asked to watch over a guest that stands still.
    disksnap::run_if_asked();
    // Or to serve a point of a backup, for as long as the first one lives.
    disksnap_backup::run_if_asked();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &arguments),
    };
    log(cli.global.verbose, cli.global.quiet);
    let context = Context::new(cli.global);
    match start(&context, cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ExitCode::from(failure.conclude(context.out.form)),
    }
}

fn start(context: &Context, command: Command) -> Outcome {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|e| Failure::Error(Error::io("cannot start the runtime", e)))?;
    let outcome = runtime.block_on(run(context, command));
    // What still waits for a file or a pipe must not hold up the end.
    runtime.shutdown_background();
    outcome
}

async fn run(context: &Context, command: Command) -> Outcome {
    match command {
        Command::Methods { method } => methods::run(context, method.as_deref()),
        Command::Domain(command) => domain::run(context, command).await,
        Command::Disk(command) => disk::run(context, command).await,
        Command::Plan(wanted) => plan::run(context, wanted).await,
        Command::Snapshot(command) => snapshot::run(context, command).await,
        Command::Checkpoint(command) => checkpoint::run(context, command).await,
        Command::Job(command) => job::run(context, command).await,
        Command::Export(command) => export::run(context, command).await,
        Command::Read(read) => read::run(context, read).await,
        Command::Changes(changes) => changes::run(context, changes).await,
        Command::Attach(attach) => attach::attach(context, attach).await,
        Command::Detach(detach) => attach::detach(context, detach).await,
        Command::Backup(command) => backup::run(context, command).await,
        Command::Fill(command) => fill::run(context, command).await,
        Command::Recover => recover::run(context).await,
        Command::Conform(conform) => conform::run(context, conform).await,
        Command::Completions { shell } => pages::completions(shell),
        Command::Man { directory } => pages::man(&directory),
    }
}

/// Help and version, or what is wrong with the command line: in JSON where JSON was asked for.
fn usage(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    let json = arguments.iter().any(|a| a == "--output=json")
        || arguments
            .windows(2)
            .any(|pair| pair[0] == "--output" && pair[1] == "json");
    let missing = error.kind() == ClapKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if json && error.use_stderr() && !missing {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        let message = first.strip_prefix("error: ").unwrap_or(first);
        let told = Error::new(ErrorKind::Invalid, message).hint("`disksnap help` tells what can be said.");
        return ExitCode::from(Failure::Error(told).conclude(Form::Json));
    }
    // Where nobody reads there is nobody to be told.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// What the libraries tell of their doing goes to standard error.
fn log(verbose: u8, quiet: bool) {
    let level = match verbose {
        _ if quiet => tracing::Level::ERROR,
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(verbose > 1)
        .init();
}
