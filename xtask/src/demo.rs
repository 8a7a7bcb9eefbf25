//! `./x demo`: the main job end to end on a real QEMU, told step by step.

use anyhow::{Result, bail};

/// Runs the demonstration.
pub(crate) fn run() -> Result<()> {
    bail!("the demonstration is not there yet: it needs the `disksnap` command first")
}
