//! `qemu-img`, for what is done to images beside the hypervisor: found in fixed places, run with an argument vector.

use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Result, faults};

/// Where `qemu-img` is looked for.
const PLACES: [&str; 2] = ["/usr/bin/qemu-img", "/usr/local/bin/qemu-img"];
/// Names another `qemu-img`, by absolute path.
const ELSEWHERE: &str = "DISKSNAP_QEMU_IMG";
/// Its commands that change nothing.
const LOOKS: [&str; 4] = ["info", "map", "measure", "compare"];

/// The `qemu-img` at hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuImg {
    program: PathBuf,
}

impl QemuImg {
    /// The one that `DISKSNAP_QEMU_IMG` names, else the one that is installed; `None` where there is none.
    #[must_use]
    pub fn find() -> Option<Self> {
        let named = std::env::var_os(ELSEWHERE)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute());
        let mut all = named.into_iter().chain(PLACES.map(PathBuf::from));
        let program = all.find(|path| path.is_file())?;
        Some(Self { program })
    }

    /// The one at this absolute path.
    #[must_use]
    pub fn at(program: PathBuf) -> Self {
        Self { program }
    }

    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// The error where there is none, and what it would have been needed for.
    #[must_use]
    pub fn missing(kind: ErrorKind, why: impl Into<String>) -> Error {
        Error::new(kind, why).hint(format!(
            "Install qemu-img (Debian: qemu-utils), or name it in {ELSEWHERE}."
        ))
    }

    /// Runs it; what it printed is the answer. `input` is what it reads on its standard input: a key must not be an
    /// argument, which every user of the host could read.
    ///
    /// # Errors
    /// `Busy` when an image is locked by whoever has it open; `Io`, with what it said, when it fails otherwise.
    pub async fn run<A: Into<String>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        input: &str,
    ) -> Result<String> {
        let arguments: Vec<String> = arguments.into_iter().map(Into::into).collect();
        let verb = arguments.first().map_or("", String::as_str);
        let (what, looks) = (format!("qemu-img {verb}"), LOOKS.contains(&verb));
        let command = duct::cmd(&self.program, arguments)
            .stdin_bytes(input)
            .stdout_capture()
            .stderr_capture()
            .unchecked();
        let command = faults::VARIABLES
            .iter()
            .fold(command, |command, variable| command.env_remove(variable));
        let called = what.clone();
        let output = tokio::task::spawn_blocking(move || {
            if looks {
                return command.run();
            }
            faults::before("program", &called);
            let running = command.start()?;
            faults::amid("program", &called);
            let output = running.into_output();
            faults::after("program", &called);
            output
        })
        .await;
        let output = output
            .map_err(|e| Error::new(ErrorKind::Internal, "the task that runs qemu-img died").because(e))?
            .map_err(|e| Error::io("cannot run qemu-img", e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        // QEMU locks the images that it has open.
        let kind = if said.contains("\" lock") {
            ErrorKind::Busy
        } else {
            ErrorKind::Io
        };
        Err(Error::new(kind, format!("{what} failed: {said}")))
    }
}
