//! A state directory, and the command run over it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// The built command.
pub(crate) fn program() -> PathBuf {
    assert_cmd::cargo::cargo_bin!("disksnap").to_path_buf()
}

/// A state directory of its own.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
}

/// How a run of the command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

/// What serves images outlives the command, and must not outlive the test.
impl Drop for Site {
    fn drop(&mut self) {
        crate::daemons::kill(&self.run_dir());
    }
}

impl Site {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A path for something that a test makes.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file for a test.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    /// The command with these arguments, not run yet.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg("--state-dir").arg(self.state()).args(arguments);
        command.env_remove("RUST_LOG").env("COLUMNS", "100");
        if let Some(daemon) = disksnap_test_support::tools::find("qemu-storage-daemon") {
            command.env("DISKSNAP_STORAGE_DAEMON", daemon);
        }
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments).output().unwrap())
    }

    /// Runs it, expects it to do what it should, and gives what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        String::from_utf8(ended.stdout).unwrap()
    }

    /// The same with `--output json`.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--output", "json"]].concat())).unwrap()
    }

    /// Runs it, expects it to fail with this code, and gives what it said, with the site's paths made short.
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(code), "{arguments:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, b"", "{arguments:?} failed and printed");
        self.short(&ended.stderr)
    }

    /// What was said, with the site's paths made short.
    pub(crate) fn short(&self, text: &str) -> String {
        let real = self.dir.path().canonicalize().unwrap();
        let text = text.replace(&*real.to_string_lossy(), "SITE");
        text.replace(&*self.dir.path().to_string_lossy(), "SITE")
    }

    /// Where the sockets are.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.state()
            .canonicalize()
            .unwrap_or_else(|_| self.state())
            .join("run")
    }

    /// The images that there are in the state directory.
    pub(crate) fn images(&self) -> Vec<PathBuf> {
        list(&self.state().join("images"))
    }
}

pub(crate) fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The path of a domain's XML as an argument.
pub(crate) fn arg(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
