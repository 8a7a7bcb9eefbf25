//! Locks of domains and leases: `flock` on a file of their own.
//!
//! A lock belongs to the open file, not to the process: it keeps tasks of one process apart as well
//! as processes, and the kernel lets go of it when its holder dies. A domain's lock file stays for
//! ever: whoever unlinked it could leave two holders, one of the old file and one of the new.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_core::{DomainId, DomainLock, Error, ErrorKind, Result, faults};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use uuid::Uuid;

const LEASE_PREFIX: &str = "lease-";

/// A held lock. Dropping it lets go.
#[derive(Debug)]
pub(crate) struct HeldLock {
    file: File,
    /// Set for a lease, whose file goes with it.
    lease: Option<PathBuf>,
}

impl DomainLock for HeldLock {}

impl Drop for HeldLock {
    fn drop(&mut self) {
        // Neither failure harms: a stale holder is never believed of a free lock, a dead lease is swept.
        let _ = match &self.lease {
            Some(path) => faults::around("file", "remove lease", || std::fs::remove_file(path)),
            None => self.file.set_len(0),
        };
        // Closing alone would not let go while a child that is just being started has a copy.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Locks a domain, waiting up to `patience` for whoever has it.
pub(crate) async fn domain(dir: &Path, domain: &DomainId, patience: Duration) -> Result<HeldLock> {
    let path = dir.join(format!("{}.lock", domain.uuid));
    let about = |error: Error| error.with("domain", domain).with("path", path.display());
    let mut file =
        open(&path, true).map_err(|e| about(Error::io("cannot open the domain's lock file", e)))?;
    let since = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        let locked = try_lock(&file, FlockOperation::NonBlockingLockExclusive);
        if locked.map_err(|e| about(Error::io("cannot lock the domain", e)))? {
            write_holder(&mut file);
            return Ok(HeldLock { file, lease: None });
        }
        let left = patience.saturating_sub(since.elapsed());
        if left.is_zero() {
            return Err(busy("the domain is being worked on", &mut file, patience).with("domain", domain));
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Lets one process at a time make or upgrade the database. Waits in the calling thread.
pub(crate) fn upgrade(dir: &Path, patience: Duration) -> Result<HeldLock> {
    let path = dir.join("upgrade.lock");
    let failed = |e: io::Error| Error::io("cannot lock the catalog", e).with("path", path.display());
    let mut file = open(&path, true).map_err(failed)?;
    let since = Instant::now();
    while !try_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(failed)? {
        if since.elapsed() >= patience {
            return Err(busy("the catalog is being made ready", &mut file, patience));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    write_holder(&mut file);
    Ok(HeldLock { file, lease: None })
}

/// Opens a lock file without following a link. The standard library opens it close-on-exec.
fn open(path: &Path, create: bool) -> io::Result<File> {
    let no_follow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(no_follow);
    // To open the one that there is has no effect.
    if create && !path.exists() {
        faults::around("file", "make lock", || options.open(path))
    } else {
        options.open(path)
    }
}

/// Whether the lock could be had. Never waits.
fn try_lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes who we are, for the message of those who wait. A full disk must not keep us from the lock.
fn write_holder(file: &mut File) {
    let program = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let program = program.file_name().unwrap_or_default().to_string_lossy();
    let _ = file.set_len(0);
    let _ = file.rewind();
    let _ = file.write_all(format!("{} {program}\n", std::process::id()).as_bytes());
}

fn busy(what: &str, file: &mut File, patience: Duration) -> Error {
    let mut text = String::new();
    // What cannot be read leaves the holder unnamed.
    let _ = file.rewind();
    let _ = file.take(4096).read_to_string(&mut text);
    let (holder, hint) = match holder(&text) {
        Some((pid, _)) if pid == std::process::id() => (
            "another task of this process".to_owned(),
            "Wait until that task is done, then try again.".to_owned(),
        ),
        Some((pid, program)) if lives(pid) => (
            format!("process {pid} ({program})"),
            format!("Wait until process {pid} is done, or end it (its lock goes with it); then try again."),
        ),
        _ => (
            "another process".to_owned(),
            "Wait until it is done, then try again.".to_owned(),
        ),
    };
    let waited = format!("{} s", patience.as_secs_f64());
    Error::new(
        ErrorKind::Busy,
        format!("{what} by {holder}; gave up after {waited}, nothing was changed"),
    )
    .hint(hint)
}

/// A holder that was killed leaves its name until the next one has written its own.
fn lives(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

/// The process id and the program that a lock file names.
fn holder(text: &str) -> Option<(u32, String)> {
    let (pid, program) = text.trim_end().split_once(' ')?;
    let program = program.chars().filter(|c| !c.is_control()).take(64).collect();
    Some((pid.parse().ok()?, program))
}

/// Makes a lease and removes the files of those that died.
pub(crate) fn lease(dir: &Path) -> Result<(Uuid, HeldLock)> {
    sweep(dir);
    loop {
        let id = Uuid::new_v4();
        let path = lease_path(dir, id);
        let failed = |error: io::Error| Error::io("cannot make a lease", error).with("path", path.display());
        let mut file = open(&path, true).map_err(failed)?;
        // A sweep may have come between the opening and the lock: then this file is lost, not the next.
        let ours = try_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(failed)?
            && file.metadata().map_err(failed)?.nlink() > 0;
        if ours {
            write_holder(&mut file);
            let lease = Some(path);
            return Ok((id, HeldLock { file, lease }));
        }
    }
}

/// Whether the lease's holder lives. A dead lease's file is removed.
pub(crate) fn lease_lives(dir: &Path, id: Uuid) -> Result<bool> {
    let path = lease_path(dir, id);
    probe(&path).map_err(|error| Error::io("cannot look at a lease", error).with("path", path.display()))
}

fn lease_path(dir: &Path, id: Uuid) -> PathBuf {
    dir.join(format!("{LEASE_PREFIX}{id}"))
}

/// Looks with a shared lock, so that two who look do not take each other for the holder.
fn probe(path: &Path) -> io::Result<bool> {
    let file = match open(path, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    if !try_lock(&file, FlockOperation::NonBlockingLockShared)? {
        return Ok(true);
    }
    // Safe under any lock: an id is random, nobody makes a lease of this name again.
    match faults::around("file", "remove lease", || std::fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(false),
    }
}

fn sweep(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries {
        if entry.file_name().to_string_lossy().starts_with(LEASE_PREFIX) {
            // What cannot be swept now stays for the next one.
            let _ = probe(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_lease_lives_as_long_as_its_value() {
        let temp = tempfile::tempdir().unwrap();
        let (id, held) = lease(temp.path()).unwrap();
        let (other, kept) = lease(temp.path()).unwrap();
        assert!(lease_lives(temp.path(), id).unwrap());
        drop(held);
        assert!(!lease_lives(temp.path(), id).unwrap());
        assert!(lease_lives(temp.path(), other).unwrap());
        drop(kept);
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_of_dead_leases_are_swept_and_locks_are_not() {
        let temp = tempfile::tempdir().unwrap();
        let dead = lease_path(temp.path(), Uuid::new_v4());
        let lock = temp.path().join("domain.lock");
        std::fs::write(&dead, "1 gone\n").unwrap();
        std::fs::write(&lock, "").unwrap();
        let (id, _held) = lease(temp.path()).unwrap();
        assert!(!dead.exists());
        assert!(lock.exists() && lease_path(temp.path(), id).exists());
    }

    #[test]
    fn two_who_look_at_a_dead_lease_both_see_it_dead() {
        let temp = tempfile::tempdir().unwrap();
        let id = Uuid::new_v4();
        let path = lease_path(temp.path(), id);
        std::fs::write(&path, "").unwrap();
        let looking = open(&path, false).unwrap();
        assert!(try_lock(&looking, FlockOperation::NonBlockingLockShared).unwrap());
        assert!(!lease_lives(temp.path(), id).unwrap());
    }

    #[test]
    fn a_lock_file_that_says_nonsense_names_nobody() {
        assert_eq!(holder("12 disksnap\n"), Some((12, "disksnap".to_owned())));
        assert_eq!(holder("12 a\u{1b}[2Jb\n"), Some((12, "a[2Jb".to_owned())));
        for nonsense in ["", "12", "x y", "\0\0\0", "-1 a"] {
            assert_eq!(holder(nonsense), None, "{nonsense:?}");
        }
    }
}
