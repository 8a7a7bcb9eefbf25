//! What tells a late take that its request has been undone: a file that prepare makes and abort removes.
//!
//! A take that was given up for late may still be on its way, in this process or in an `lvcreate` that has
//! outlived it. Each take, and its `lvcreate`, hold a shared lock on the file; abort waits for them, looks what
//! they have made, and removes the file, without which no later take begins.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_core::{Error, ErrorKind, Result, SnapshotId, faults};
use rustix::fs::{FlockOperation, flock};

/// How long abort waits for a take; an `lvcreate` takes a second.
const PATIENCE: Duration = Duration::from_mins(1);

/// The file of a request.
pub(crate) fn path(dir: &Path, id: SnapshotId) -> PathBuf {
    dir.join(format!("lvm-{id}.take"))
}

/// Makes it, or finds it made.
pub(crate) fn make(path: &Path) -> Result<()> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600);
    let made = faults::around("file", "make marker", || options.open(path));
    made.map(drop)
        .map_err(|e| Error::io(format!("cannot create {}", path.display()), e))
}

/// The file, held for a take. Who holds it on, holds abort up.
///
/// # Errors
/// `NotFound` when the request has been undone.
pub(crate) fn hold(path: &Path) -> Result<File> {
    let undone = || {
        Error::new(
            ErrorKind::NotFound,
            "the request has been undone meanwhile; no snapshot is taken for it",
        )
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(undone()),
        other => other.map_err(|e| Error::io(format!("cannot open {}", path.display()), e))?,
    };
    let failed = |e: io::Error| Error::io(format!("cannot lock {}", path.display()), e);
    flock(&file, FlockOperation::LockShared).map_err(|e| failed(e.into()))?;
    if file.metadata().map_err(failed)?.nlink() == 0 {
        return Err(undone());
    }
    Ok(file)
}

/// Waits until no take is under way any more; none begins until what it gives is dropped. `None` where there is no file.
pub(crate) fn close(path: &Path) -> Result<Option<File>> {
    let failed = |e| Error::io(format!("cannot lock {}", path.display()), e);
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(error) if error != rustix::io::Errno::WOULDBLOCK => return Err(failed(error.into())),
            Err(_) if begun.elapsed() > PATIENCE => {
                let what = "a command of lvm2 for this request does not end";
                return Err(Error::new(ErrorKind::Busy, what)
                    .with("path", path.display())
                    .hint("See what it waits for (`ps`, `dmsetup info`), then run `disksnap recover`."));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Removes it. Idempotent.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match faults::around("file", "remove marker", || std::fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    #[test]
    fn a_take_is_waited_for_and_none_begins_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), SnapshotId::random());
        assert_eq!(hold(&path).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(close(&path).unwrap().is_none());
        make(&path).unwrap();
        make(&path).unwrap();
        let (one, other) = (hold(&path).unwrap(), hold(&path).unwrap());
        let theirs = path.clone();
        let abort = std::thread::spawn(move || {
            let closed = close(&theirs).unwrap();
            remove(&theirs).unwrap();
            drop(closed);
        });
        drop(one);
        std::thread::sleep(Duration::from_millis(30));
        assert!(path.exists(), "the other is still held");
        drop(other);
        abort.join().unwrap();
        assert_eq!(hold(&path).unwrap_err().kind(), ErrorKind::NotFound);
        remove(&path).unwrap();
    }
}
