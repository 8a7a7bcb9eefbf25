//! What SQLite says, in the words of the one error: which kind, what is safe, what to do next.

use std::path::Path;

use disksnap_core::{Effect, Error, ErrorKind};
use rusqlite::ErrorCode;

/// What a step in the database came to.
pub(crate) type Outcome<T> = std::result::Result<T, Fault>;

/// Why a step in the database failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The contract says no; the message is complete.
    Said(Error),
    /// SQLite failed before the commit: nothing was changed.
    Sqlite(rusqlite::Error),
    /// The commit itself failed.
    Commit(rusqlite::Error),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Said(error)
    }
}

impl Fault {
    /// The error for the caller; `what` says what failed: "cannot record the intent".
    pub(crate) fn about(self, what: &str, database: &Path) -> Error {
        match self {
            Self::Said(error) => error,
            Self::Sqlite(error) => explain(error, what, database),
            Self::Commit(error) => {
                // After a failed flush nobody knows what is on the disk; each step may be repeated.
                let effect = match error.sqlite_error_code() {
                    Some(ErrorCode::SystemIoFailure) => Effect::Unknown,
                    _ => Effect::None,
                };
                explain(error, what, database).leaving(effect)
            }
        }
    }
}

fn explain(error: rusqlite::Error, what: &str, database: &Path) -> Error {
    let (kind, why, hint) = classify(&error, database);
    Error::new(kind, format!("{what}: {why}"))
        .with("path", database.display())
        .hint(hint)
        .because(error)
}

fn classify(error: &rusqlite::Error, database: &Path) -> (ErrorKind, &'static str, String) {
    let (code, extended) = match error {
        rusqlite::Error::SqliteFailure(error, _) => (error.code, error.extended_code),
        _ => (ErrorCode::Unknown, 0),
    };
    match code {
        ErrorCode::NotADatabase => damaged("the catalog's file is not a database", database),
        ErrorCode::DatabaseCorrupt => damaged("the catalog's file is damaged", database),
        ErrorCode::DiskFull => full(database),
        ErrorCode::SystemIoFailure
            if extended == rusqlite::ffi::SQLITE_IOERR_SHMSIZE || is_full(database) =>
        {
            full(database)
        }
        ErrorCode::ReadOnly | ErrorCode::PermissionDenied => denied(database),
        ErrorCode::CannotOpen if !may_write(database) => denied(database),
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed => (
            ErrorKind::Busy,
            "another process keeps the catalog locked; nothing was changed",
            "Look for a program that has the file open (a database browser, a backup), end it, and try again."
                .to_owned(),
        ),
        ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::OutOfMemory => (
            ErrorKind::Io,
            "the operating system failed to read or write the catalog",
            "Look in the kernel's log for errors of that file system; then try again, which is safe.".to_owned(),
        ),
        _ => (
            ErrorKind::Internal,
            "the database did not accept the step; nothing was changed",
            "This is a defect in disksnap: please report it with this message.".to_owned(),
        ),
    }
}

fn damaged(why: &'static str, database: &Path) -> (ErrorKind, &'static str, String) {
    let hint = format!(
        "Domains, their disks and images are untouched, only disksnap's records of them are. Let no \
         disksnap run; keep a copy of {0}, {0}-wal and {0}-shm; then put a backup of them in their place, or \
         salvage with: sqlite3 {0} .recover. Started without them, disksnap forgets its snapshots.",
        database.display()
    );
    (ErrorKind::Broken, why, hint)
}

fn full(database: &Path) -> (ErrorKind, &'static str, String) {
    let hint = format!(
        "Make room on the file system of {}, or delete snapshots; then try again, which is safe.",
        database.display()
    );
    (
        ErrorKind::NoSpace,
        "the file system is full; nothing was changed",
        hint,
    )
}

fn denied(database: &Path) -> (ErrorKind, &'static str, String) {
    let hint = format!(
        "See that the file system of {} is mounted for writing and that this user may write the file.",
        database.display()
    );
    (
        ErrorKind::Denied,
        "the catalog may not be written; nothing was changed",
        hint,
    )
}

/// Asked without opening the file: closing it would drop the locks that SQLite holds in this process.
fn may_write(database: &Path) -> bool {
    let dir = database.parent().unwrap_or(database);
    let may = |path: &Path| rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
    may(dir) && (may(database) || !database.exists())
}

/// SQLite tells a full disk from other failures only where the write was to a database page.
fn is_full(database: &Path) -> bool {
    let dir = database.parent().unwrap_or(database);
    rustix::fs::statvfs(dir).is_ok_and(|fs| fs.f_bavail.saturating_mul(fs.f_frsize) < 64 * 1024)
}
