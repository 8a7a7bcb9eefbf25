//! `./x bench [NAME…]`: the benchmarks, built for release.

use anyhow::{Result, ensure};
use disksnap_test_support::tools::workspace_root;

use crate::suite;

/// All benchmarks, or those named.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let program = [
        "run",
        "--release",
        "-q",
        "-p",
        "disksnap-benches",
        "--bin",
        "disksnap-bench",
        "--",
    ];
    suite::cargo(&["build", "--release", "-q", "-p", "disksnap-benches"])?;
    holds_no_fault_points()?;
    suite::cargo(&[&program, &names[..]].concat())
}

/// What is built for release cannot be told to end itself: the benchmarks' program holds all of disksnap.
fn holds_no_fault_points() -> Result<()> {
    suite::cargo(&[
        "test",
        "--release",
        "-q",
        "-p",
        "disksnap-core",
        "--test",
        "faults",
    ])?;
    let name = b"DISKSNAP_FAULT";
    let program = workspace_root().join("target/release/disksnap-bench");
    let bytes = std::fs::read(&program)?;
    let found = bytes.windows(name.len()).any(|part| part == name);
    ensure!(!found, "{} knows of fault points", program.display());
    Ok(())
}
