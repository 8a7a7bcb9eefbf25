//! lvm2's program: where it is, how it is run, what its failures are. Everything goes through here.

use std::fs::File;
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Result, faults};

use crate::program::{self, Known};
use crate::volume::{FIELDS, Volume, parse};

/// It is every command of lvm2 in one: `lvm lvs …` is `lvs …`.
const PROGRAM: Known = Known {
    name: "lvm",
    package: "lvm2",
    install: "lvm2",
    elsewhere: "DISKSNAP_LVM",
};

/// Its command that changes nothing.
const LOOK: &str = "lvs";

/// An lvm2 at hand.
#[derive(Debug, Clone)]
pub(crate) struct Lvm {
    program: PathBuf,
}

impl Lvm {
    /// Finds it.
    ///
    /// # Errors
    /// `Unavailable` where there is none.
    pub(crate) fn find() -> Result<Self> {
        PROGRAM.find().map(|program| Self { program })
    }

    /// All logical volumes that this host sees, hidden ones too, as lvm2 has them (lvs(8)).
    pub(crate) fn volumes(&self) -> Result<Vec<Volume>> {
        self.list(&[])
    }

    /// Those of one group, and none where there is no such group.
    pub(crate) fn volumes_of(&self, group: &str) -> Result<Vec<Volume>> {
        match self.list(&[group]) {
            // Nothing else that is not found may pass for a group that is gone.
            Err(error)
                if error
                    .message()
                    .contains(&format!("Volume group \"{group}\" not found")) =>
            {
                Ok(Vec::new())
            }
            other => other,
        }
    }

    fn list(&self, groups: &[&str]) -> Result<Vec<Volume>> {
        let fields = FIELDS.join(",");
        let arguments = [
            "-a",
            "--reportformat",
            "json",
            "--units",
            "b",
            "--nosuffix",
            "-o",
            &fields,
        ];
        parse(&self.run(LOOK, &[&arguments, groups].concat(), None)?)
    }

    /// Runs one command to its end and gives what it printed. `held` is open in it for as long as it lives.
    ///
    /// It is never killed: it may have suspended a device that a guest waits for.
    pub(crate) fn run(&self, command: &str, arguments: &[&str], held: Option<File>) -> Result<String> {
        let all = std::iter::once(command).chain(arguments.iter().copied());
        let expression = duct::cmd(&self.program, all);
        let expression = match held {
            Some(file) => expression.stdin_file(file),
            None => expression.stdin_null(),
        };
        self.finish(&expression, command)
    }

    /// Runs several commands in one process (lvm(8), a file of commands), which ends at the first that fails, and carries them
    /// out though this process dies. They are written to `file`, which `held` has open, as the process does for as long as it
    /// lives. No word of them may hold a space or a quote.
    pub(crate) fn script(&self, commands: &[&[&str]], file: &Path, held: File) -> Result<()> {
        let lines = commands.iter().map(|words| words.join(" ") + "\n");
        let text: String = std::iter::once("#!lvm\n".to_owned()).chain(lines).collect();
        faults::around("file", "write script", || std::fs::write(file, text))
            .map_err(|e| Error::io(format!("cannot write {}", file.display()), e))?;
        let names: Vec<&str> = commands
            .iter()
            .filter_map(|words| words.first().copied())
            .collect();
        let expression = duct::cmd(&self.program, ["/proc/self/fd/0"]).stdin_file(held);
        self.finish(&expression, &names.join(", ")).map(drop)
    }

    fn finish(&self, expression: &duct::Expression, what: &str) -> Result<String> {
        let expression = expression
            // Its messages are told apart by their English words.
            .env("LC_ALL", "C")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .stdout_capture()
            .stderr_capture();
        let output = program::run(&expression, (what != LOOK).then_some(what))
            .map_err(|e| Error::io(format!("cannot run {}", self.program.display()), e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(failure(what, &String::from_utf8_lossy(&output.stderr)))
    }
}

/// What a command that failed said, as an error.
fn failure(command: &str, stderr: &str) -> Error {
    let lines = stderr.lines().map(str::trim);
    let lines: Vec<&str> = lines
        .filter(|line| !line.is_empty() && !line.starts_with("WARNING:"))
        .collect();
    let said = if lines.is_empty() {
        "it says nothing".to_owned()
    } else {
        lines.join("; ")
    };
    let (kind, hint) = kind_of(&said);
    let error = Error::new(kind, format!("{command} failed: {said}"));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn kind_of(said: &str) -> (ErrorKind, Option<&'static str>) {
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if says(&[
        "insufficient free space",
        "Insufficient free space",
        "Insufficient suitable",
    ]) {
        let hint =
            "Add a physical volume to the group (vgextend), or ask for a smaller snapshot (snapshot.size).";
        (ErrorKind::NoSpace, Some(hint))
    } else if says(&[
        "Permission denied",
        "Operation not permitted",
        "/dev/mapper/control",
    ]) {
        (ErrorKind::Denied, Some("Run disksnap as root: lvm2 needs it."))
    } else if says(&[
        " in use",
        "Device or resource busy",
        "locked by pvmove",
        "is open",
    ]) {
        (ErrorKind::Busy, None)
    } else if says(&["Failed to find logical volume", "not found", "cannot be found"]) {
        (ErrorKind::NotFound, None)
    } else if says(&["already exists"]) {
        (ErrorKind::AlreadyExists, None)
    } else {
        (ErrorKind::Refused, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_by_kind_in_lvms_words() {
        let error = failure(
            "lvcreate",
            "  WARNING: Sum of all thin volume sizes\n  Volume group \"vg\" has insufficient free space (1 extents): 2 required.\n",
        );
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(
            error.message(),
            "lvcreate failed: Volume group \"vg\" has insufficient free space (1 extents): 2 required."
        );
        assert_eq!(
            failure("lvremove", "  Logical volume vg/lv in use.").kind(),
            ErrorKind::Busy
        );
        assert_eq!(
            failure("lvs", "  /run/lock/lvm/V_vg: open failed: Permission denied").kind(),
            ErrorKind::Denied
        );
        assert_eq!(failure("lvs", "").message(), "lvs failed: it says nothing");
    }
}
