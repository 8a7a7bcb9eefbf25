//! What lies unfinished beside the place where a file is to be. Its maker holds a lock on it for as long as it lives, so that whoever
//! writes to the same place next knows what a killed one has left there, and removes it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use disksnap_core::faults;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::process::geteuid;
use tempfile::{NamedTempFile, TempDir};

/// What its name begins with, before that of the place.
const PREFIX: &str = ".disksnap-";
/// No more of the place's name is in it, in bytes: a name has at most 255.
const LONGEST: usize = 200;
/// How often another one is made where somebody took it for a dead one's.
const TRIES: u32 = 16;

/// A directory in which a file is being written beside the place where it will be. Dropping it removes it.
#[derive(Debug)]
pub struct UnfinishedFolder {
    directory: TempDir,
    /// Given up after the directory is gone.
    _lock: File,
}

impl UnfinishedFolder {
    /// Makes one beside a place, and removes what killed ones have left there.
    ///
    /// # Errors
    /// The operating system's.
    pub fn beside(path: &Path) -> io::Result<Self> {
        sweep(path);
        for _ in 0..TRIES {
            let directory = builder(path, |builder| builder.tempdir_in(folder_of(path)))?;
            let lock = File::open(directory.path())?;
            if is_held(&lock, directory.path())? {
                return Ok(Self {
                    directory,
                    _lock: lock,
                });
            }
        }
        Err(taken())
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Makes a file of mode 0600 beside a place, and removes what killed ones have left there. Dropping it removes it.
///
/// # Errors
/// The operating system's.
pub fn unfinished_file(path: &Path) -> io::Result<NamedTempFile> {
    sweep(path);
    for _ in 0..TRIES {
        let file = builder(path, |builder| builder.tempfile_in(folder_of(path)))?;
        if is_held(file.as_file(), file.path())? {
            return Ok(file);
        }
    }
    Err(taken())
}

fn builder<T>(
    path: &Path,
    make: impl FnOnce(&mut tempfile::Builder<'_, '_>) -> io::Result<T>,
) -> io::Result<T> {
    faults::around("file", "create unfinished", || {
        make(tempfile::Builder::new().prefix(&prefix(path)))
    })
}

/// What the names of all that is unfinished for a place begin with.
fn prefix(path: &Path) -> OsString {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let kept = &name[..name.len().min(LONGEST)];
    OsString::from_vec([PREFIX.as_bytes(), kept, b"."].concat())
}

/// Locks what was just made; whether it is still there: until it was locked it looked like a dead one's.
fn is_held(made: &File, path: &Path) -> io::Result<bool> {
    match flock(made, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        // No locks on this file system: then nobody ever takes it for a dead one's.
        Err(_) => Ok(true),
        Ok(()) => match path.symlink_metadata() {
            Ok(there) => Ok(there.ino() == made.metadata()?.ino()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        },
    }
}

/// The directory of a path.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Removes what killed ones have left beside a place. What cannot be removed is in nobody's way.
fn sweep(path: &Path) {
    let prefix = prefix(path);
    for entry in fs::read_dir(folder_of(path)).into_iter().flatten().flatten() {
        if entry.file_name().as_bytes().starts_with(prefix.as_bytes()) {
            let _ = remove_dead(&entry.path());
        }
    }
}

/// Removes one of them, where nobody holds it.
fn remove_dead(path: &Path) -> io::Result<()> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    let about = opened.metadata()?;
    if about.uid() != geteuid().as_raw() || !(about.is_file() || about.is_dir()) {
        return Ok(());
    }
    match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(()),
        locked => locked?,
    }
    faults::around("file", "remove unfinished", || {
        if about.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        }
    })
}

fn taken() -> io::Error {
    io::Error::other("others remove what is being written there")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_the_dead_left_goes_and_what_the_living_hold_stays() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("vda.raw");
        let live = [unfinished_file(&place).unwrap(), unfinished_file(&place).unwrap()];
        let folder = UnfinishedFolder::beside(&place).unwrap();
        fs::write(folder.path().join("image"), "mine").unwrap();
        // As a killed process leaves them.
        fs::write(dir.path().join(".disksnap-vda.raw.dead01"), "theirs").unwrap();
        fs::create_dir(dir.path().join(".disksnap-vda.raw.dead02")).unwrap();
        fs::write(dir.path().join(".disksnap-vda.raw.dead02/image"), "theirs").unwrap();
        // None of this place.
        fs::write(dir.path().join(".disksnap-vdb.raw.other1"), "another's").unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join(".disksnap-vda.raw.link01")).unwrap();
        drop(unfinished_file(&place).unwrap());
        let left = names(dir.path());
        assert!(!left.iter().any(|name| name.contains("dead")), "{left:?}");
        assert_eq!(left.len(), 5, "{left:?}");
        assert_eq!(fs::read_to_string(folder.path().join("image")).unwrap(), "mine");
        drop((live, folder));
        assert_eq!(
            names(dir.path()),
            [".disksnap-vda.raw.link01", ".disksnap-vdb.raw.other1"]
        );
    }

    #[test]
    fn a_long_name_has_room() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("x".repeat(255));
        drop((
            unfinished_file(&place).unwrap(),
            UnfinishedFolder::beside(&place).unwrap(),
        ));
    }
}
