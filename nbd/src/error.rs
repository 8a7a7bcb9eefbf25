//! What can go wrong with an NBD server, told apart by what the caller can do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::wire::Command;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an NBD operation failed.
///
/// `target` is always the URI of the export, so a text names both the address and the export. The
/// error can be cloned, because one broken connection fails every request that was in flight on it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is no NBD URI as the NBD project's `doc/uri.md` defines it. Nothing was connected.
    #[error("{uri:?} is no usable NBD URI: {reason}")]
    InvalidUri {
        /// The text as given.
        uri: String,
        /// What is wrong with it, and what was expected.
        reason: String,
    },

    /// The credentials for TLS cannot be used. Nothing was connected.
    #[error("cannot use the TLS credentials {}: {reason}", path.display())]
    Credentials {
        /// The file or directory that is missing, unreadable or wrong.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// Nothing answers at the address: no such socket, connection refused, no route, no such host.
    #[error("cannot connect to {target}: is the server running, and does it listen there?")]
    Connect {
        /// The export's URI.
        target: Arc<str>,
        /// What the operating system said.
        source: Arc<io::Error>,
    },

    /// TLS was agreed on, but no secure channel came of it: a certificate was not accepted by one of
    /// the sides, or their TLS versions do not meet. Nothing was read or written.
    #[error("no secure channel to {target}: check the certificates of both sides")]
    Tls {
        /// The export's URI.
        target: Arc<str>,
        /// What the TLS library said.
        source: Arc<io::Error>,
    },

    /// The server answered the handshake, and will not serve this export to us.
    #[error("the server refuses {target}: {refusal}{}", Said(message.as_deref()))]
    Refused {
        /// The export's URI.
        target: Arc<str>,
        /// Why.
        refusal: Refusal,
        /// The server's own words, when it had any.
        message: Option<Box<str>>,
    },

    /// The server did not carry out one request, and said so with an error number. The connection
    /// goes on. After a failed write the range holds the old data, the new, or a mix.
    #[error("{command} of {length} bytes at {offset} failed on {target}: {errno}{}", Said(message.as_deref()))]
    Server {
        /// The export's URI.
        target: Arc<str>,
        /// The request.
        command: Command,
        /// Where the request began, in bytes.
        offset: u64,
        /// How long the request was, in bytes.
        length: u64,
        /// The server's error number.
        errno: Errno,
        /// The server's own words, when it had any.
        message: Option<Box<str>>,
    },

    /// The server broke the protocol. The connection is closed, since nothing further that it sends
    /// can be trusted.
    #[error("the server at {target} broke the NBD protocol: {violation}")]
    Protocol {
        /// The export's URI.
        target: Arc<str>,
        /// Which rule, and how.
        violation: Box<str>,
    },

    /// The server was silent for too long. The connection is closed.
    #[error("no answer from {target} within {after:?} while {during}")]
    Timeout {
        /// The export's URI.
        target: Arc<str>,
        /// What we were waiting for.
        during: &'static str,
        /// How long we waited.
        after: Duration,
    },

    /// The connection is gone. Requests that were in flight may or may not have been carried out;
    /// connect anew to go on.
    #[error("the connection to {target} is closed: {reason}")]
    Disconnected {
        /// The export's URI.
        target: Arc<str>,
        /// Who closed it, and at which point.
        reason: &'static str,
        /// What the operating system said, when it said anything.
        source: Option<Arc<io::Error>>,
    },

    /// The range does not lie within the export. Nothing was sent.
    #[error(
        "{command} of {length} bytes at {offset} reaches past the end of {target}, which has {size} bytes"
    )]
    OutOfBounds {
        /// The export's URI.
        target: Arc<str>,
        /// The request.
        command: Command,
        /// Where the request would have begun, in bytes.
        offset: u64,
        /// How long the request would have been, in bytes.
        length: u64,
        /// The size of the export, in bytes.
        size: u64,
    },

    /// The export is read-only. Nothing was sent.
    #[error("{command} refused: {target} is exported read-only")]
    ReadOnly {
        /// The export's URI.
        target: Arc<str>,
        /// The request.
        command: Command,
    },

    /// The request cannot be made of this export as it stands, such as a write that is not aligned
    /// to the server's minimum block size. Nothing was sent.
    #[error("{command} of {length} bytes at {offset} cannot be made on {target}: {reason}")]
    InvalidRequest {
        /// The export's URI.
        target: Arc<str>,
        /// The request.
        command: Command,
        /// Where the request would have begun, in bytes.
        offset: u64,
        /// How long the request would have been, in bytes.
        length: u64,
        /// Why not.
        reason: &'static str,
    },

    /// The server does not offer what the request needs. Nothing was sent.
    #[error("the server at {target} does not offer {feature}")]
    Unsupported {
        /// The export's URI.
        target: Arc<str>,
        /// What is missing.
        feature: &'static str,
    },

    /// The metadata context was not granted on this connection. Nothing was sent.
    #[error(
        "no metadata context {context:?} on the connection to {target}, only [{}]: name it in \
         ConnectOptions::meta_contexts, and check that the server exports it",
        granted.join(", ")
    )]
    MissingContext {
        /// The export's URI.
        target: Arc<str>,
        /// The context asked for.
        context: String,
        /// The contexts that the server granted.
        granted: Vec<String>,
    },
}

/// Why a server refuses an export during the handshake (`NBD_REP_ERR_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// `NBD_REP_ERR_UNKNOWN`: it has no export of that name.
    UnknownExport,
    /// `NBD_REP_ERR_POLICY`: it knows the request, and its configuration forbids it.
    Policy,
    /// `NBD_REP_ERR_TLS_REQD`: it talks about this export only over TLS.
    TlsRequired,
    /// TLS was required by us, and the server cannot do it or does not want to.
    NoTls,
    /// `NBD_REP_ERR_SHUTDOWN`: it is about to stop.
    ShuttingDown,
    /// `NBD_REP_ERR_UNSUP` or `NBD_REP_ERR_PLATFORM`: it does not know the request.
    Unsupported,
    /// `NBD_REP_ERR_INVALID`, `NBD_REP_ERR_TOO_BIG` or `NBD_REP_ERR_BLOCK_SIZE_REQD`: it does not
    /// like the request's form.
    Invalid,
    /// Any other error code.
    Other(u32),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownExport => f.write_str(
                "it has no export of that name (disksnap_nbd::list_exports or `nbdinfo --list` shows what it has)",
            ),
            Self::Policy => f.write_str("its configuration forbids it"),
            Self::TlsRequired => {
                f.write_str("it requires TLS (use nbds:// or nbds+unix:// and give credentials)")
            }
            Self::NoTls => f.write_str("it does not offer TLS, which this connection requires"),
            Self::ShuttingDown => f.write_str("it is shutting down"),
            Self::Unsupported => f.write_str("it does not know the request"),
            Self::Invalid => f.write_str("it calls the request invalid"),
            Self::Other(code) => write!(f, "error {code:#x}"),
        }
    }
}

/// A server's error number for one request (`NBD_E…` of the protocol, which are Linux's numbers).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Errno {
    /// 1: operation not permitted, as a write to a read-only export.
    Perm,
    /// 5: the storage below failed.
    Io,
    /// 12: the server has no memory.
    NoMem,
    /// 22: the server does not like the request.
    Inval,
    /// 28: no space left below the export.
    NoSpc,
    /// 75: too large to be answered in one piece.
    Overflow,
    /// 95: not supported, or not fast, as asked for.
    NotSup,
    /// 108: the server is about to stop.
    Shutdown,
    /// Any other number. The protocol says to take it for [`Errno::Inval`].
    Other(u32),
}

impl Errno {
    /// The meaning of the number on the wire.
    #[must_use]
    pub fn from_raw(raw: u32) -> Self {
        match raw {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            other => Self::Other(other),
        }
    }

    /// The number on the wire.
    #[must_use]
    pub fn raw(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
            Self::Other(raw) => raw,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Perm => "operation not permitted (EPERM)",
            Self::Io => "input/output error (EIO)",
            Self::NoMem => "the server is out of memory (ENOMEM)",
            Self::Inval => "invalid argument (EINVAL)",
            Self::NoSpc => "no space left (ENOSPC)",
            Self::Overflow => "value too large (EOVERFLOW)",
            Self::NotSup => "operation not supported (ENOTSUP)",
            Self::Shutdown => "the server is shutting down (ESHUTDOWN)",
            Self::Other(raw) => return write!(f, "error number {raw}"),
        })
    }
}

/// The server's own words at the end of a text, or nothing.
struct Said<'a>(Option<&'a str>);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(words) if !words.is_empty() => write!(f, " (it says: {words})"),
            _ => Ok(()),
        }
    }
}
