//! What the demonstrations share: a running machine, the disksnap command for its disks, and the telling of steps.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use disksnap_test_support::{Qemu, tools};

/// A running guest, and the command to snapshot its disks with.
pub(crate) struct Stage {
    disksnap: PathBuf,
    pub(crate) machine: Qemu,
    domain: PathBuf,
    dir: tempfile::TempDir,
}

impl Stage {
    /// Builds nothing: see [`build`].
    pub(crate) fn new(disksnap: PathBuf, machine: Qemu) -> Result<Self> {
        let domain = machine.domain_xml_file();
        Ok(Self {
            disksnap,
            machine,
            domain,
            dir: tempfile::tempdir()?,
        })
    }

    /// A place for something of the demonstration's.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command, with what it needs always; shows what it runs and what it prints.
    pub(crate) fn disksnap<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let shown: Vec<_> = arguments.iter().map(|a| a.as_ref().to_string_lossy()).collect();
        println!("$ disksnap -d vm.xml {}", shown.join(" "));
        let text = self.disksnap_quiet(arguments)?;
        print!("{text}");
        Ok(text)
    }

    pub(crate) fn disksnap_quiet<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let mut command = Command::new(&self.disksnap);
        command
            .arg("-d")
            .arg(&self.domain)
            .arg("--state-dir")
            .arg(self.path("state"));
        run_quiet(command.args(arguments), "disksnap")
    }
}

/// Builds the command; its path.
pub(crate) fn build() -> Result<PathBuf> {
    step("Build the disksnap command");
    let root = tools::workspace_root();
    let status = Command::new("cargo")
        .args(["build", "-q", "-p", "disksnap-cli"])
        .current_dir(&root)
        .status()?;
    if !status.success() {
        bail!("the command does not build");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join("debug/disksnap"))
}

pub(crate) fn step(what: &str) {
    println!("\n== {what}");
}

pub(crate) fn run_shown(command: &mut Command, what: &str) -> Result<String> {
    let text = run_quiet(command, what)?;
    print!("{text}");
    Ok(text)
}

pub(crate) fn run_quiet(command: &mut Command, what: &str) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {what}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{what} failed ({}): {}", output.status, stderr.trim());
    }
    eprint!("{stderr}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
