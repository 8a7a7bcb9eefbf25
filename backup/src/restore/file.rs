//! Files that appear under their name when they are complete and on the disk, or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use disksnap::{Error, ErrorKind, Result, faults, unfinished_file, write_sparse};
use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use tempfile::NamedTempFile;

use super::worker::Place;

/// Where the devices are.
const DEVICES: &str = "/dev";
/// What zeroes are written from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A raw image being written beside the place where it will be, mode 0600. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct RawFile {
    temporary: NamedTempFile,
    path: PathBuf,
    zeroes: Zeroes,
}

/// What becomes of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zeroes {
    /// They are left out; blocks of them in data too.
    Hole,
    /// The room for them is there, and reads as zeroes.
    Allocated,
    /// They are written.
    Written,
}

impl RawFile {
    /// Begins a file for `path`, where nothing may be yet.
    ///
    /// # Errors
    /// `AlreadyExists`; `NoSpace` when it is not sparse and there is no room for all of it; what the file system meets.
    pub(crate) fn create(path: &Path, size: u64, sparse: bool) -> Result<Self> {
        must_be_free(path)?;
        let temporary = beside(path)?;
        let told = |e| failed(path, e);
        let zeroes = if sparse {
            temporary.as_file().set_len(size).map_err(told)?;
            Zeroes::Hole
        } else {
            allocate(temporary.as_file(), size).map_err(told)?
        };
        Ok(Self {
            temporary,
            path: path.to_owned(),
            zeroes,
        })
    }

    fn file(&self) -> &File {
        self.temporary.as_file()
    }
}

impl Place for RawFile {
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let written = match self.zeroes {
            Zeroes::Hole => write_sparse(self.file(), offset, data),
            Zeroes::Allocated | Zeroes::Written => self.file().write_all_at(data, offset),
        };
        written.map_err(|e| failed(&self.path, e))
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        match self.zeroes {
            Zeroes::Hole | Zeroes::Allocated => Ok(()),
            Zeroes::Written => write_zeroes(self.file(), offset, length).map_err(|e| failed(&self.path, e)),
        }
    }

    fn finish(self) -> Result<Vec<String>> {
        self.file().sync_all().map_err(|e| failed(&self.path, e))?;
        publish(self.temporary, &self.path)?;
        Ok(Vec::new())
    }
}

/// Writes a small file of mode 0600, where nothing may be yet.
///
/// # Errors
/// `AlreadyExists`; what the file system meets.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    must_be_free(path)?;
    let mut temporary = beside(path)?;
    let written = temporary
        .write_all(bytes)
        .and_then(|()| temporary.as_file().sync_all());
    written.map_err(|e| failed(path, e))?;
    publish(temporary, path)
}

/// Refuses a name that something has.
///
/// # Errors
/// `AlreadyExists`.
pub(crate) fn must_be_free(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(exists(path)),
        Err(_) => Ok(()),
    }
}

/// Refuses a new file among the devices: a mistyped device would become one, in memory, until that is full.
///
/// # Errors
/// `NotFound`.
pub(crate) fn must_not_be_a_device(path: &Path) -> Result<()> {
    let existing = path
        .ancestors()
        .skip(1)
        .find_map(|folder| folder.canonicalize().ok());
    let Some((folder, devices)) = existing.zip(Path::new(DEVICES).metadata().ok()) else {
        return Ok(());
    };
    // Another file system may be mounted there, such as /dev/shm.
    let among =
        folder.starts_with(DEVICES) && folder.metadata().is_ok_and(|about| about.dev() == devices.dev());
    if !among {
        return Ok(());
    }
    Err(Error::new(ErrorKind::NotFound, "there is no device of that name")
        .with("path", path.display())
        .hint("Nothing was written. A new file is not made among the devices: it would be in memory. Correct the name, or choose another directory."))
}

/// Gives a file of this host another name in the same directory, where nothing may be yet; durable on return.
///
/// # Errors
/// `AlreadyExists`; what the file system meets.
pub(crate) fn rename_new(from: &Path, to: &Path) -> Result<()> {
    use rustix::io::Errno;
    let renamed = faults::around("file", "name new", || {
        renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
    });
    let renamed = match renamed {
        // Some file systems cannot rename so. A link is as good: it replaces nothing.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to).and_then(|()| fs::remove_file(from))
        }
        other => other.map_err(io::Error::from),
    };
    match renamed {
        Ok(()) => sync_folder(to),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(exists(to)),
        Err(e) => Err(failed(to, e)),
    }
}

/// The directory of a path.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Writes zeroes as bytes.
pub(crate) fn write_zeroes(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROES.len());
        file.write_all_at(&ZEROES[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

fn beside(path: &Path) -> Result<NamedTempFile> {
    unfinished_file(path).map_err(|e| failed(path, e))
}

fn publish(temporary: NamedTempFile, path: &Path) -> Result<()> {
    match faults::around("file", "name new", || temporary.persist_noclobber(path)) {
        Ok(_) => sync_folder(path),
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
        Err(e) => Err(failed(path, e.error)),
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    let synced = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    synced.map_err(|e| failed(path, e))
}

fn allocate(file: &File, size: u64) -> io::Result<Zeroes> {
    use rustix::io::Errno;
    if size == 0 {
        return Ok(Zeroes::Allocated);
    }
    match fallocate(file, FallocateFlags::empty(), 0, size) {
        Ok(()) => Ok(Zeroes::Allocated),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Zeroes::Written),
        Err(e) => Err(e.into()),
    }
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::io("cannot write the file", error)
        .with("path", path.display())
        .hint("There is nothing under that name; what had been written is gone again.")
}

fn exists(path: &Path) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        "there is something of that name already",
    )
    .with("path", path.display())
    .hint("Choose another name, or remove it first; no file is ever overwritten.")
}
