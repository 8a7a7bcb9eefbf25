//! What `./x` does that a shell should not: gets the external programs, builds the test guest, runs the
//! tests, the lints, the benchmarks and the demonstration.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people, who read it"
)]

mod apt;
mod bench;
mod cargo_tools;
mod demo;
mod demo_backup;
mod demo_methods;
mod demo_move;
mod demo_stage;
mod faults;
mod fuzz;
mod guest;
mod initrd;
mod kernel;
mod soak;
mod suite;
mod tools;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
./x demo             a snapshot of a running machine's disks, step by step, on a real QEMU
./x demo methods     four disks on four layers, each by its own method, at one instant; needs root
./x demo backup      four nights' backups of a machine that writes, one killed; verified, restored, pruned, started from
./x demo move        a machine with 50 checkpoints goes to another host, and its next backup is an incremental one
./x test [ARGS]      every test; ARGS go to cargo nextest (or cargo test), and only those tests run
./x lint             formatting, clippy, documentation, and the dependencies (cargo-deny)
./x bench [NAME…]    the benchmarks, or some: snapshot, take, writes, read, memory,
                     changes, redefine, backup
./x fuzz [TARGET…] [--seconds N] [--at-once N]
                     the fuzz targets, or some, each for that long (default 600)
./x faults [METHOD…] [--act ACT] [--point NAME:K] [--seed N]
                     the command killed at every point of every act, or at some; all points of a method
                     are its tables in docs/fault-points.md
./x soak [--minutes N] [--seed N]
                     eight machines, whatever can be done with them, and kills (60 minutes)
./x tools            only get the programs and the test guest that tests and demo use
./x tools --fresh    get them anew, in the versions the mirror has now
./x help             this text

Programs (QEMU 10.0 and 7.2, nbdcopy, a guest's kernel and files) come as Debian packages from this
machine's own mirror, checked by apt, and are unpacked in .tools: nothing on the system is touched.
DISKSNAP_TOOLS=DIR puts them elsewhere, so that several checkouts share them.
DISKSNAP_TOOLS=system uses what is on PATH instead (QEMU 7.2 then from DISKSNAP_QEMU_7_2=DIR).
REQUIRE=all makes tests fail that this machine cannot run, instead of saying SKIPPED.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("x: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_else(|| "help".to_owned());
    let rest: Vec<String> = args.collect();
    match (verb.as_str(), rest.as_slice()) {
        ("help" | "-h" | "--help", _) => println!("{HELP}"),
        ("tools", []) => tools::ensure()?,
        ("tools", [flag]) if flag == "--fresh" => tools::renew()?,
        ("demo", []) => {
            tools::ensure()?;
            demo::run()?;
        }
        ("demo", [which]) if which == "backup" => {
            tools::ensure()?;
            demo_backup::run()?;
        }
        ("demo", [which]) if which == "methods" => {
            tools::ensure()?;
            demo_methods::run()?;
        }
        ("demo", [which]) if which == "move" => {
            tools::ensure()?;
            demo_move::run()?;
        }
        ("test", rest) => {
            tools::ensure()?;
            suite::test(rest)?;
        }
        ("lint", []) => suite::lint()?,
        ("bench", rest) => {
            tools::ensure()?;
            bench::run(rest)?;
        }
        ("faults", rest) => {
            tools::ensure()?;
            faults::run(&faults::Plan::from_args(rest)?)?;
        }
        ("soak", rest) => {
            let plan = soak::Plan::from_args(rest)?;
            tools::ensure()?;
            soak::run(&plan)?;
        }
        ("fuzz", rest) => fuzz::run(&fuzz::Plan::from_args(rest)?)?,
        _ => bail!("`{verb} {}` is not a command\n{HELP}", rest.join(" ")),
    }
    Ok(())
}
