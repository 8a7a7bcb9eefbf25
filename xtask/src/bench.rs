//! `./x bench [NAME…]`: the benchmarks, built for release.

use anyhow::Result;

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
    suite::cargo(&[&program, &names[..]].concat())
}
