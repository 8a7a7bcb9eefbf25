//! disksnap's benchmarks against real QEMUs: `./x bench` runs all, `./x bench NAME…` some of them.
//!
//! Every figure is a ratio within one run, so that it means the same on another machine. Nothing here
//! fails because it was slow.

#![allow(clippy::print_stdout, reason = "a program for people, who read it")]

mod backup;
mod bare;
mod changes;
mod child;
mod lvm;
mod memory;
mod off;
mod race;
mod read;
mod redefine;
mod report;
mod scene;
mod snapshot;
mod stopwatch;
mod take;
mod writes;

use std::path::Path;

use anyhow::{Result, bail};

/// A part: its name, and what runs it with a directory for all its files.
type Part = (&'static str, fn(&Path) -> Result<()>);

const PARTS: [Part; 8] = [
    ("snapshot", snapshot::run),
    ("take", take::run),
    ("writes", writes::run),
    ("read", read::run),
    ("memory", memory::run),
    ("changes", changes::run),
    ("redefine", redefine::run),
    ("backup", backup::run),
];

fn main() -> Result<()> {
    disksnap_hypervisor::guardian::run_if_asked();
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if child::run_if_asked(&wanted)? {
        return Ok(());
    }
    let names = PARTS.map(|(name, _)| name);
    if let Some(unknown) = wanted.iter().find(|name| !names.contains(&name.as_str())) {
        bail!(
            "there is no benchmark {unknown:?}; there are {}",
            names.join(", ")
        );
    }
    let scratch = tempfile::Builder::new().prefix("dsnap-bench-").tempdir()?;
    report::print_machine(scratch.path());
    println!(
        "\nA figure is the median over the rounds of the ratio within a round, with its quartiles; `best` is the ratio \
         of the best rounds, which other programs on the machine disturb least."
    );
    for (name, run) in PARTS {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            run(scratch.path())?;
        }
    }
    Ok(())
}
