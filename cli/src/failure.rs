//! How a command ends when it does not end well: what is printed, and the exit code.

use std::error::Error as _;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use disksnap::{Effect, Error, ErrorKind};
use serde_json::{Map, Value, json};

use crate::args::Form;
use crate::output::plain;

/// The end of a command that did not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An error, still to be told.
    Error(Error),
    /// Several errors, still to be told; the first decides the exit code.
    Several(Vec<Error>),
    /// Nobody reads standard output any more.
    Pipe,
    /// A signal asked to stop, and the command did.
    Stopped(Signal),
}

/// The result of a command or a part of it.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// A signal that asks to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Interrupt,
    Terminate,
}

impl Signal {
    /// 128 and the signal's number, as shells have it.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Failure {
    /// A failed write to standard output: quiet when its reader has gone.
    pub(crate) fn output(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::Pipe
        } else {
            Self::Error(Error::io("cannot write to standard output", error))
        }
    }

    /// Tells what is to be told, and gives the exit code.
    pub(crate) fn conclude(&self, form: Form) -> u8 {
        match self {
            Self::Error(error) => tell(error, form),
            Self::Several(errors) => {
                let codes: Vec<u8> = errors.iter().map(|error| tell(error, form)).collect();
                codes.first().copied().unwrap_or(1)
            }
            Self::Pipe => 141,
            Self::Stopped(signal) => signal.exit_code(),
        }
    }
}

/// The exit code of each kind of error. The table is part of the interface: see docs/operator.md.
pub(crate) fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::AlreadyExists => 4,
        ErrorKind::Unsupported => 5,
        ErrorKind::Busy => 6,
        ErrorKind::Denied => 7,
        ErrorKind::Unavailable => 8,
        ErrorKind::Timeout => 9,
        ErrorKind::NoSpace => 10,
        ErrorKind::Broken => 11,
        ErrorKind::Protocol => 12,
        ErrorKind::Refused => 13,
        _ => 1,
    }
}

fn tell(error: &Error, form: Form) -> u8 {
    let text = match form {
        Form::Json => format!("{}\n", json(error)),
        Form::Text | Form::Xml => text(error),
    };
    // Where standard error is gone there is nobody to be told.
    let _ = anstream::stderr().write_all(text.as_bytes());
    exit_code(error.kind())
}

/// The error, its causes, what it left behind and the next step, each on a line of its own.
fn text(error: &Error) -> String {
    let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
    let mut lines = vec![error.to_string()];
    lines.extend(causes(error).into_iter().map(|cause| format!("  cause: {cause}")));
    for failure in error.rollback_failures() {
        lines.push(format!("  undoing failed: {failure}"));
        lines.extend(
            causes(failure)
                .into_iter()
                .map(|cause| format!("    cause: {cause}")),
        );
    }
    lines.push(format!("  effect: {}", effect(error.effect())));
    lines.push(format!("  next: {}", next_step(error)));
    format!("{red}error:{red:#} {}\n", plain(&lines.join("\n")))
}

fn effect(effect: Effect) -> &'static str {
    match effect {
        Effect::None => "nothing was changed",
        Effect::RolledBack => "what had been done was undone",
        Effect::Unknown => "something may have been left behind; `disksnap recover` settles it",
    }
}

/// The causes, outermost first. One that says only what the error above it says is left out.
fn causes(error: &Error) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if causes.last() != Some(&text) {
            causes.push(text);
        }
        next = cause.source();
    }
    causes
}

/// The error's own next step, or else the one that fits its kind.
fn next_step(error: &Error) -> &str {
    error.next_step().unwrap_or(match error.kind() {
        ErrorKind::Invalid => "Correct that and try again.",
        ErrorKind::NotFound => "Check the spelling, and that it has not been deleted or moved.",
        ErrorKind::AlreadyExists => "Choose another name, or remove that one first.",
        ErrorKind::Unsupported => "`disksnap plan` tells for each disk what is possible.",
        ErrorKind::Busy => "Wait until that has ended, then try again.",
        ErrorKind::Denied => {
            "Run it as a user who may do that: root, or the one that the hypervisor runs as."
        }
        ErrorKind::Unavailable => {
            "Check that the domain runs, and that its sockets are where its XML or --monitor says."
        }
        ErrorKind::Timeout => "Try again when the host is less busy; -vv tells what was waited for.",
        ErrorKind::NoSpace => "Make room there, or name another place.",
        ErrorKind::Broken => "Its data must not be used: delete it, and take a new one.",
        ErrorKind::Protocol => {
            "Check that the socket is the one it should be, and that nothing else answers there."
        }
        ErrorKind::Refused => "The hypervisor's own words say why; mend that and try again.",
        ErrorKind::Io => "See the cause; the kernel's log may tell more.",
        _ => "This is a defect in disksnap: please report it, with what -vv tells.",
    })
}

/// The error as one line of JSON.
fn json(error: &Error) -> Value {
    let context: Map<String, Value> = error.context().map(|(k, v)| (k.to_owned(), v.into())).collect();
    let rollback: Vec<Value> = error
        .rollback_failures()
        .iter()
        .map(|e| json!({ "kind": e.kind().as_str(), "message": e.to_string(), "causes": causes(e) }))
        .collect();
    json!({ "error": {
        "kind": error.kind().as_str(),
        "exitCode": exit_code(error.kind()),
        "message": error.message(),
        "operation": error.operation(),
        "method": error.provider(),
        "context": context,
        "causes": causes(error),
        "effect": error.effect(),
        "retryable": error.is_retryable(),
        "hint": next_step(error),
        "rollbackFailures": rollback,
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ErrorKind; 14] = [
        ErrorKind::Invalid,
        ErrorKind::NotFound,
        ErrorKind::AlreadyExists,
        ErrorKind::Unsupported,
        ErrorKind::Busy,
        ErrorKind::Denied,
        ErrorKind::Refused,
        ErrorKind::Unavailable,
        ErrorKind::Timeout,
        ErrorKind::NoSpace,
        ErrorKind::Broken,
        ErrorKind::Protocol,
        ErrorKind::Io,
        ErrorKind::Internal,
    ];

    #[test]
    fn each_kind_has_the_exit_code_of_the_operators_guide() {
        let guide = include_str!("../../docs/operator.md");
        for kind in KINDS {
            let row = format!("| {} | {kind} |", exit_code(kind), kind = kind.as_str());
            assert!(guide.contains(&row), "docs/operator.md has no row {row:?}");
        }
    }

    #[test]
    fn an_error_is_told_with_cause_effect_and_next_step() {
        let error = Error::io("cannot write the image", io::Error::from_raw_os_error(28))
            .during("create")
            .with("disk", "vda")
            .leaving(Effect::RolledBack)
            .hint("Name another place.")
            .rollback_failed(vec![Error::new(ErrorKind::Refused, "no").during("abort")]);
        let plain = anstream::adapter::strip_str(&text(&error)).to_string();
        insta::assert_snapshot!(plain, @r"
        error: create: cannot write the image (disk vda)
          cause: No space left on device (os error 28)
          undoing failed: abort: no
          effect: something may have been left behind; `disksnap recover` settles it
          next: Name another place.
        ");
        insta::assert_snapshot!(json(&error), @r#"{"error":{"causes":["No space left on device (os error 28)"],"context":{"disk":"vda"},"effect":"unknown","exitCode":10,"hint":"Name another place.","kind":"no-space","message":"cannot write the image","method":null,"operation":"create","retryable":false,"rollbackFailures":[{"causes":[],"kind":"refused","message":"abort: no"}]}}"#);
    }

    #[test]
    fn every_error_has_a_next_step() {
        for kind in KINDS {
            assert!(!next_step(&Error::new(kind, "x")).is_empty());
        }
    }
}
