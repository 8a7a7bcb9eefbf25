//! The database: opened, checked, upgraded; and steps in it, each one transaction off the executor.
//!
//! Write-ahead log with `synchronous=FULL`: a commit is one append and one `fsync`, and readers
//! in other processes never stand in its way. A rollback journal would cost three flushes. The log is
//! not folded in when the last connection closes, which would cost each short command three more; it
//! is folded in every [`CHECKPOINT_PAGES`] instead.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use disksnap_core::{Error, ErrorKind, Result, faults};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use tokio::sync::Mutex;

use crate::fault::{Fault, Outcome};
use crate::{StateDir, lock, reserve};

/// "dsnp": marks the file as ours (SQLite's `application_id`).
const APPLICATION_ID: i32 = 0x6473_6e70;

/// What makes version n+1 of the schema of version n. Never edit one that was released: add one.
const MIGRATIONS: &[&str] = &[
    include_str!("schema/1.sql"),
    include_str!("schema/2.sql"),
    include_str!("schema/3.sql"),
    include_str!("schema/4.sql"),
];

/// The log is folded into the database after so many pages (4 KiB each).
const CHECKPOINT_PAGES: i32 = 256;

/// How long a step waits for other processes' commits, which take milliseconds.
const COMMIT_PATIENCE: Duration = Duration::from_secs(30);

/// Whether a step may use the space kept back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// It makes things: it must fail on a full file system.
    Ordinary,
    /// It ends things, or records what was done already.
    Reserve,
}

/// The open database. Clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    path: Arc<PathBuf>,
    reserve: Arc<PathBuf>,
    connection: Arc<Mutex<Connection>>,
}

impl Database {
    /// Opens the database in the state directory; makes or upgrades it when needed.
    pub(crate) async fn open(dir: StateDir) -> Result<Self> {
        let (path, kept) = (dir.database(), dir.reserve());
        let connection = off_executor(move || {
            let opened = match open(&dir) {
                // SQLite needs a little room even to read: it shares an index of the log with others.
                Err(error) if error.kind() == ErrorKind::NoSpace && reserve::give(&dir.reserve()) => {
                    open(&dir)
                }
                opened => opened,
            };
            if opened.is_ok() {
                reserve::keep(&dir.reserve());
            }
            opened
        })
        .await?;
        Ok(Self {
            path: Arc::new(path),
            reserve: Arc::new(kept),
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// Reads; `step` should be one query, or else may see several states.
    pub(crate) async fn read<T, F>(&self, what: &'static str, step: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Outcome<T> + Send + 'static,
    {
        let (path, connection) = (Arc::clone(&self.path), self.connection.clone().lock_owned().await);
        off_executor(move || step(&connection).map_err(|fault| fault.about(what, &path))).await
    }

    /// Runs `step` in one transaction: all of it is durable when this answers, or none of it happens.
    ///
    /// Goes on to its end when the caller stops waiting for it.
    pub(crate) async fn write<T, F>(&self, what: &'static str, space: Space, step: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Transaction<'_>) -> Outcome<T> + Send + 'static,
    {
        let (path, kept) = (Arc::clone(&self.path), Arc::clone(&self.reserve));
        let mut connection = self.connection.clone().lock_owned().await;
        off_executor(move || {
            let mut attempt = || commit(&mut connection, &step).map_err(|fault| fault.about(what, &path));
            // It is what an error says.
            let act = what.trim_start_matches("cannot ");
            faults::before("catalog", act);
            let written = match attempt() {
                Err(error)
                    if error.kind() == ErrorKind::NoSpace
                        && space == Space::Reserve
                        && reserve::give(&kept) =>
                {
                    attempt()
                }
                result => result,
            };
            faults::after("catalog", act);
            written
        })
        .await
    }
}

fn commit<T>(connection: &mut Connection, step: impl Fn(&Transaction<'_>) -> Outcome<T>) -> Outcome<T> {
    // Taking the write lock at once: a read that turns into a write could not wait for another writer.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let value = step(&transaction)?;
    transaction.commit().map_err(Fault::Commit)?;
    Ok(value)
}

async fn off_executor<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        Err(Error::new(
            ErrorKind::Internal,
            "a step in the catalog did not come to its end",
        )
        .because(error))
    })
}

fn open(dir: &StateDir) -> Result<Connection> {
    let path = dir.database();
    refuse_a_lost_database(&path)?;
    let failed = |fault: Fault| fault.about("cannot open the catalog", &path);
    let mut connection = connect(&path).map_err(|error| failed(error.into()))?;
    make_private(&path)?;
    if !is_current(&connection).map_err(failed)? {
        let _lock = lock::upgrade(&dir.locks(), COMMIT_PATIENCE)?;
        upgrade(&mut connection).map_err(|fault| fault.about("cannot make the catalog ready", &path))?;
    }
    if connection
        .is_readonly(rusqlite::MAIN_DB)
        .map_err(|error| failed(error.into()))?
    {
        return Err(Error::new(
            ErrorKind::Denied,
            "the catalog may only be read; nothing was changed",
        )
        .with("path", path.display())
        .hint("See that its file system is mounted for writing and that this user may write the file."));
    }
    Ok(connection)
}

/// SQLite would take an empty file for a new database and throw the log away with all records in it.
fn refuse_a_lost_database(path: &Path) -> Result<()> {
    let size = |path: &Path| path.metadata().map_or(0, |found| found.len());
    let mut log = path.to_path_buf().into_os_string();
    log.push("-wal");
    // In this order: a log is begun only after the database has its first page.
    if size(Path::new(&log)) == 0 || size(path) > 0 {
        return Ok(());
    }
    let hint = format!(
        "Nothing was changed. Put a backup of {0}, {0}-wal and {0}-shm in their place; or, to begin anew and \
         forget all snapshots, remove {0}-wal.",
        path.display()
    );
    Err(Error::new(
        ErrorKind::Broken,
        "the catalog's file is empty or gone, but its log is there",
    )
    .with("path", path.display())
    .hint(hint))
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW
        | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(COMMIT_PATIENCE)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    Ok(connection)
}

/// SQLite makes the file as the umask says; the log takes its mode from it.
///
/// By its path: opening the file and closing it again would drop the locks of this process on it.
fn make_private(path: &Path) -> Result<()> {
    let failed =
        |error| Error::io("cannot make the catalog's file private", error).with("path", path.display());
    let mode = path.metadata().map_err(failed)?.permissions().mode();
    if mode & 0o7777 == 0o600 {
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)
}

fn versions(connection: &Connection) -> rusqlite::Result<(i32, i64)> {
    let application = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let schema = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    Ok((application, schema))
}

fn newest() -> i64 {
    i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX)
}

fn is_current(connection: &Connection) -> Outcome<bool> {
    Ok(versions(connection)? == (APPLICATION_ID, newest()))
}

fn upgrade(connection: &mut Connection) -> Outcome<()> {
    let done = checked_version(connection)?;
    // Another process may have upgraded it while this one waited.
    if done == MIGRATIONS.len() {
        return Ok(());
    }
    let mode: String = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        let message = "the catalog's file system cannot hold it: it has no shared memory maps";
        return Err(Error::new(ErrorKind::Unsupported, message)
            .hint("Choose a state directory on a local file system.")
            .into());
    }
    let step = |transaction: &Transaction<'_>| {
        for migration in &MIGRATIONS[done..] {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", newest())?;
        Ok(())
    };
    faults::around("catalog", "upgrade", || commit(connection, step))
}

/// The schema's version, when the file is ours to upgrade.
fn checked_version(connection: &Connection) -> Outcome<usize> {
    let (application, version) = versions(connection)?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", (), |row| row.get(0))?;
    let is_new = application == 0 && version == 0 && tables == 0;
    let path = connection.path().unwrap_or_default();
    if application != APPLICATION_ID && !is_new {
        let message = "the catalog's file is another program's database; nothing was changed";
        return Err(Error::new(ErrorKind::Invalid, message)
            .with("path", path)
            .hint("Move that file away, or name another state directory.")
            .into());
    }
    match usize::try_from(version) {
        Ok(version) if version <= MIGRATIONS.len() => Ok(version),
        _ => {
            let known = newest();
            let message = format!(
                "the catalog has version {version}, and this disksnap knows versions up to {known}; nothing was changed"
            );
            Err(Error::new(ErrorKind::Unsupported, message)
                .with("path", path)
                .hint("A newer disksnap has upgraded it: use that one, or name another state directory.")
                .into())
        }
    }
}

/// Looks for damage in all of the file.
pub(crate) fn integrity(connection: &Connection) -> Outcome<()> {
    let mut query = connection.prepare("PRAGMA integrity_check(8)")?;
    let lines: Vec<String> = query
        .query_map((), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    if lines == ["ok"] {
        return Ok(());
    }
    let damage = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    Err(rusqlite::Error::SqliteFailure(damage, Some(lines.join("; "))).into())
}
