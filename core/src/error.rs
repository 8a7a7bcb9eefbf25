//! The one error: what failed, on what, what was left as it was, and what to do next.

use std::fmt;

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The class of a failure; decides the command's exit code and whether a caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request itself is wrong: a malformed document, an impossible value, a disk named twice.
    Invalid,
    /// The named thing (domain, disk, snapshot, export, method, file) does not exist.
    NotFound,
    /// The named thing exists already and is never overwritten.
    AlreadyExists,
    /// What was asked cannot be done with this disk, method or hypervisor.
    Unsupported,
    /// Something under way (a block job, a migration, another request, an export) stands against it.
    Busy,
    /// The operating system or the hypervisor does not permit it.
    Denied,
    /// The hypervisor was asked and said no, in its own words.
    Refused,
    /// The domain, its monitor or its agent is not there.
    Unavailable,
    /// An answer did not come in time.
    Timeout,
    /// There is no room for what would be written.
    NoSpace,
    /// The snapshot is broken; its data must not be trusted.
    Broken,
    /// The other side said something that it must not.
    Protocol,
    /// An operating system call failed for a reason of its own.
    Io,
    /// A defect in disksnap or a provider.
    Internal,
}

impl ErrorKind {
    /// The kind as users read it, in exit-code tables and machine-readable output.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not-found",
            Self::AlreadyExists => "already-exists",
            Self::Unsupported => "unsupported",
            Self::Busy => "busy",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::NoSpace => "no-space",
            Self::Broken => "broken",
            Self::Protocol => "protocol",
            Self::Io => "io",
            Self::Internal => "internal",
        }
    }

    /// The kind that fits an operating system error.
    #[must_use]
    pub fn of_io(error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Os;
        match error.kind() {
            Os::NotFound => Self::NotFound,
            Os::AlreadyExists => Self::AlreadyExists,
            Os::PermissionDenied | Os::ReadOnlyFilesystem => Self::Denied,
            Os::StorageFull | Os::QuotaExceeded | Os::FileTooLarge => Self::NoSpace,
            Os::TimedOut => Self::Timeout,
            Os::ConnectionRefused | Os::ConnectionReset | Os::BrokenPipe => Self::Unavailable,
            _ => Self::Io,
        }
    }
}

/// What the failed operation left behind. A retry is unsafe without knowing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// Nothing was changed.
    #[default]
    None,
    /// Something was changed and has been changed back.
    RolledBack,
    /// Something may have been changed; `disksnap recover` settles it.
    Unknown,
}

/// A failure: its kind, what failed on what, what was left behind, and the next step.
///
/// `Display` prints one line without the source; walk [`std::error::Error::source`] for the cause.
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    operation: Option<&'static str>,
    provider: Option<String>,
    context: Vec<(&'static str, String)>,
    retryable: bool,
    effect: Effect,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    rollback: Vec<Error>,
}

impl Error {
    /// An error of `kind`; `message` says what failed and why, without a final stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            operation: None,
            provider: None,
            context: Vec::new(),
            retryable: matches!(
                kind,
                ErrorKind::Busy | ErrorKind::Timeout | ErrorKind::Unavailable
            ),
            effect: Effect::None,
            hint: None,
            source: None,
            rollback: Vec::new(),
        }))
    }

    /// An operating system error met while doing `what`; the kind follows from the error.
    pub fn io(what: impl Into<String>, error: std::io::Error) -> Self {
        Self::new(ErrorKind::of_io(&error), what).because(error)
    }

    /// Names the operation that failed (`create`, `delete`, …). The innermost name stays.
    #[must_use]
    pub fn during(mut self, operation: &'static str) -> Self {
        self.0.operation.get_or_insert(operation);
        self
    }

    /// Names the provider that failed. The innermost name stays.
    #[must_use]
    pub fn by(mut self, provider: impl Into<String>) -> Self {
        self.0.provider.get_or_insert_with(|| provider.into());
        self
    }

    /// Adds what it failed on: `("disk", "vda")`. A key that is there already is left as it is.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        if !self.0.context.iter().any(|(k, _)| *k == key) {
            self.0.context.push((key, value.to_string()));
        }
        self
    }

    /// Says what the user can do next, as a sentence.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Attaches the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says what the failed operation left behind.
    #[must_use]
    pub fn leaving(mut self, effect: Effect) -> Self {
        self.0.effect = effect;
        self
    }

    /// Says whether the same request may succeed later without a change.
    #[must_use]
    pub fn retryable(mut self, retryable: bool) -> Self {
        self.0.retryable = retryable;
        self
    }

    /// Records failures met while undoing; the effect is then unknown.
    #[must_use]
    pub fn rollback_failed(mut self, failures: Vec<Error>) -> Self {
        if !failures.is_empty() {
            self.0.effect = Effect::Unknown;
            self.0.rollback.extend(failures);
        }
        self
    }

    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was left behind.
    #[must_use]
    pub fn effect(&self) -> Effect {
        self.0.effect
    }

    /// Whether the same request may succeed later without a change.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.retryable
    }

    /// The message alone, without operation and context.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The operation that failed, when known.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The provider that failed, when one did.
    #[must_use]
    pub fn provider(&self) -> Option<&str> {
        self.0.provider.as_deref()
    }

    /// What it failed on, in the order it was added.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(k, v)| (*k, v.as_str()))
    }

    /// The next step, when there is one to name.
    #[must_use]
    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Failures of the rollback itself.
    #[must_use]
    pub fn rollback_failures(&self) -> &[Error] {
        &self.0.rollback
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(operation) = self.0.operation {
            write!(f, "{operation}: ")?;
        }
        f.write_str(&self.0.message)?;
        let provider = self.0.provider.iter().map(|p| ("method", p.as_str()));
        let mut context = provider.chain(self.context()).peekable();
        if context.peek().is_some() {
            f.write_str(" (")?;
            for (n, (key, value)) in context.enumerate() {
                write!(f, "{}{key} {value}", if n == 0 { "" } else { ", " })?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn display_names_operation_provider_and_context_but_not_the_source() {
        let error = Error::io(
            "cannot create the fleece image",
            std::io::Error::from_raw_os_error(28),
        )
        .during("create")
        .by("qemu-fleece")
        .with("disk", "vda")
        .with("disk", "ignored, the innermost stays")
        .hint("Free some space.");
        assert_eq!(
            error.to_string(),
            "create: cannot create the fleece image (method qemu-fleece, disk vda)"
        );
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(
            error
                .source()
                .is_some_and(|s| s.to_string().contains("No space left"))
        );
        assert_eq!(error.next_step(), Some("Free some space."));
    }

    #[test]
    fn a_failed_rollback_makes_the_effect_unknown() {
        let error = Error::new(ErrorKind::Busy, "a").leaving(Effect::RolledBack);
        assert_eq!(error.effect(), Effect::RolledBack);
        let error = error.rollback_failed(vec![Error::new(ErrorKind::Io, "b")]);
        assert_eq!(error.effect(), Effect::Unknown);
        assert_eq!(error.rollback_failures().len(), 1);
    }
}
