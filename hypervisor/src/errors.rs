//! How failures of the monitor's connection and refusals of the monitor become disksnap's one error.

use std::io;
use std::path::Path;

use disksnap_core::{Effect, Error, ErrorKind};
use serde_json::Value;

/// Why connecting to a monitor or agent came to nothing.
#[derive(Debug)]
pub(crate) struct ConnectFailure {
    /// Nobody listens there: for a monitor this means that the domain is off.
    pub(crate) nobody: bool,
    pub(crate) error: Error,
}

impl From<Error> for ConnectFailure {
    fn from(error: Error) -> Self {
        Self { nobody: false, error }
    }
}

/// What `connect` on a unix socket answered; `what` is "monitor" or "guest agent".
pub(crate) fn connecting(what: &'static str, path: &Path, cause: io::Error) -> ConnectFailure {
    use io::ErrorKind as Os;
    let failed = |kind, why: &str, hint: &str| {
        Error::new(kind, format!("cannot reach the {what}: {why}"))
            .with("socket", path.display())
            .hint(hint)
    };
    let (nobody, error) = match cause.kind() {
        Os::NotFound | Os::NotADirectory => {
            let hint = "Start the domain, or say where its sockets are with --monitor and --agent or in the \
                        <metadata> of its document.";
            (
                true,
                failed(ErrorKind::Unavailable, "there is no such socket", hint),
            )
        }
        Os::ConnectionRefused => {
            let hint = "Start the domain: the process that made this socket is gone.";
            (
                true,
                failed(ErrorKind::Unavailable, "nobody listens on its socket", hint),
            )
        }
        Os::PermissionDenied => {
            let hint = "Run as root or as the user that the hypervisor runs as.";
            (
                false,
                failed(ErrorKind::Denied, "its socket may not be opened", hint),
            )
        }
        Os::InvalidInput => {
            let hint = "The path of a unix socket has at most 107 bytes.";
            (
                false,
                failed(ErrorKind::Invalid, "its path is not one of a socket", hint),
            )
        }
        _ => {
            let hint = "See the cause.";
            (false, failed(ErrorKind::of_io(&cause), "connecting failed", hint))
        }
    };
    ConnectFailure {
        nobody,
        error: error.because(cause),
    }
}

/// Another client seems to hold the only connection there is.
pub(crate) fn held(what: &'static str, path: &Path) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("the {what} accepts the connection and says nothing: another client holds it"),
    )
    .with("socket", path.display())
    .hint(format!(
        "A {what}'s socket serves one client at a time. Close the other client, or give the domain a second \
         socket for disksnap."
    ))
}

/// Why a connection that once worked is over.
#[derive(Debug, Clone)]
pub(crate) enum Lost {
    /// The peer closed it, perhaps in the middle of a message.
    Closed,
    /// The operating system ended it, in its words.
    Io(io::ErrorKind, String),
    /// The peer said something that no monitor says.
    Nonsense(String),
}

impl Lost {
    /// As the error of a command that was on its way.
    pub(crate) fn error(&self, path: &Path) -> Error {
        match self {
            Self::Closed => Error::new(ErrorKind::Unavailable, "the monitor closed the connection")
                .hint("The hypervisor has probably ended; its log says why."),
            Self::Io(kind, words) => Error::new(
                ErrorKind::of_io(&io::Error::from(*kind)),
                format!("the connection to the monitor broke: {words}"),
            ),
            Self::Nonsense(what) => Error::new(
                ErrorKind::Protocol,
                format!("the monitor does not speak QMP: {what}"),
            )
            .hint("Is this really the socket of a QEMU monitor in control mode?"),
        }
        .with("socket", path.display())
    }
}

/// What the monitor's or agent's error object says about a command.
///
/// `CommandNotFound` is `Unsupported`, `DeviceNotFound` and `DeviceNotActive` are `NotFound`, all else is
/// `Refused` with QEMU's own words (QMP specification, "Error responses").
pub(crate) fn refusal(command: &str, error: &Value) -> Error {
    let text = |key: &str| error.get(key).and_then(Value::as_str);
    let kind = match text("class") {
        Some("CommandNotFound" | "KVMMissingCap") => ErrorKind::Unsupported,
        Some("DeviceNotFound" | "DeviceNotActive") => ErrorKind::NotFound,
        _ => ErrorKind::Refused,
    };
    Error::new(kind, text("desc").unwrap_or("refused without a reason")).with("command", command)
}

/// Whether a command changes something.
pub(crate) fn has_effect(command: &str) -> bool {
    effect_unanswered(command) != Effect::None
}

/// What a command may have left behind when its answer never came.
pub(crate) fn effect_unanswered(command: &str) -> Effect {
    let asks = matches!(
        command,
        "qmp_capabilities"
            | "qom-list"
            | "qom-get"
            | "x-debug-query-block-graph"
            | "guest-sync-delimited"
            | "guest-fsfreeze-status"
            | "guest-get-fsinfo"
    );
    if asks || command.starts_with("query-") {
        Effect::None
    } else {
        Effect::Unknown
    }
}

/// No answer in time.
pub(crate) fn silent(what: &'static str, command: &str, path: &Path, waited: std::time::Duration) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!("the {what} did not answer for {} ms", waited.as_millis()),
    )
    .with("command", command)
    .with("socket", path.display())
    .leaving(effect_unanswered(command))
}
