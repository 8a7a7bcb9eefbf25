//! Completions and manual pages, generated from the same description as the command line.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use disksnap::Error;

use crate::args::Cli;
use crate::failure::Outcome;
use crate::output::print;

pub(crate) fn completions(shell: Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "disksnap", &mut script);
    print(&script)
}

/// One page for the command and one for each subcommand; pages that are there are replaced.
pub(crate) fn man(directory: &Path) -> Outcome {
    let failed = |e| Error::io("cannot write the manual pages", e).with("path", directory.display());
    std::fs::create_dir_all(directory).map_err(failed)?;
    Ok(clap_mangen::generate_to(Cli::command(), directory).map_err(failed)?)
}
