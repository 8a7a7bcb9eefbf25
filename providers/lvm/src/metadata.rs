//! The metadata snapshot of a thin pool, which `thin_delta` reads: reserved, recognised, released.
//!
//! A pool has one at a time, and nothing in it says whose it is. While it is there the pool frees no metadata, so it is held
//! for as long as `thin_delta` runs and no longer. A file in the image directory tells what is ours, of each pool:
//!
//! - it is locked (flock) while a comparison is at work, also by the programs that it runs, which may outlive it: others wait;
//! - it is empty from before a snapshot is reserved until after, then it holds the snapshot's first block, byte for byte.
//!
//! So what a killed comparison left is known by that block. It is a copy of the pool's superblock of that moment, with
//! the number of the block itself: any later snapshot has another, unless nothing at all has changed in the pool since.
//! It is released by the next comparison in the pool, or create, delete or abort in any, if nobody reads the metadata. Whatever else is
//! found there is somebody else's and left alone: also our own where we were killed in the moment between the two, and
//! where the kill and the next comparison have different image directories. The error says how an operator releases it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_core::{Error, ErrorKind, Result, faults};
use rustix::fs::{FlockOperation, OFlags, flock};

use crate::mapper::{Dmsetup, Pool};
use crate::marker;

/// How long a comparison waits for another in the same pool.
const PATIENCE: Duration = Duration::from_mins(1);
/// The size in bytes of the metadata's blocks, always (`THIN_METADATA_BLOCK_SIZE`).
const BLOCK: usize = 4096;
/// What dmsetup says where the pool has one already (the kernel's `EBUSY`).
const TAKEN: &str = "Device or resource busy";

/// A metadata snapshot that is ours. Dropping it releases it.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    dmsetup: &'a Dmsetup,
    pool: &'a Pool,
    path: PathBuf,
    /// The file, locked.
    file: File,
    /// The snapshot's first block.
    block: Vec<u8>,
    released: bool,
}

impl<'a> Held<'a> {
    /// Reserves it.
    ///
    /// # Errors
    /// `Busy` where somebody else has one.
    pub(crate) fn reserve(dmsetup: &'a Dmsetup, pool: &'a Pool, dir: &Path) -> Result<Self> {
        let path = file_of(pool, dir);
        let file = lock(&path, pool, PATIENCE)?;
        let reserved = clear(dmsetup, pool, &file).and_then(|()| {
            file.set_len(0).map_err(|e| cannot_note(&path, e))?;
            match dmsetup.message(pool, "reserve_metadata_snap", &file) {
                Err(error) if error.message().contains(TAKEN) => Err(somebody_elses(pool)),
                // There was none just now: it is ours, and dmsetup has died after the kernel made it.
                Err(_) if dmsetup.held_root(pool)?.is_some() => Ok(()),
                other => other,
            }
        });
        if let Err(error) = reserved {
            // What is noted is still to be released, by the next comparison.
            if !is_noted(&file) {
                marker::remove(&path)?;
            }
            return Err(error);
        }
        let mut held = Self {
            dmsetup,
            pool,
            path,
            file,
            block: Vec::new(),
            released: false,
        };
        let root = dmsetup.held_root(pool)?.ok_or_else(|| taken_away(pool))?;
        held.block = read_block(pool, root)?;
        faults::before("file", "note metadata");
        let noted = held
            .file
            .write_all_at(&held.block, 0)
            .and_then(|()| held.file.sync_all());
        faults::after("file", "note metadata");
        noted.map_err(|e| cannot_note(&held.path, e))?;
        Ok(held)
    }

    /// The file that is locked for as long as anyone has it open.
    pub(crate) fn lock(&self) -> &File {
        &self.file
    }

    /// Releases it.
    ///
    /// # Errors
    /// `Busy` where somebody has taken it away meanwhile: what was read of it must not be used then.
    pub(crate) fn release(mut self) -> Result<()> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<()> {
        self.released = true;
        // What was never read can only be ours: it was reserved in this very call.
        if !self.block.is_empty() && !self.is_there()? {
            marker::remove(&self.path)?;
            return Err(taken_away(self.pool));
        }
        self.dmsetup
            .message(self.pool, "release_metadata_snap", &self.file)?;
        marker::remove(&self.path)
    }

    /// Whether the one that the pool has is the one that was read.
    fn is_there(&self) -> Result<bool> {
        let root = self.dmsetup.held_root(self.pool)?;
        root.map_or(Ok(false), |root| Ok(read_block(self.pool, root)? == self.block))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.released {
            // There is an error on its way already; what is left, the next comparison finds by the file.
            let _ = self.give_back();
        }
    }
}

/// Releases what killed comparisons left in any pool, where that is known to be ours. Runs nothing where none was killed.
pub(crate) fn tidy(dir: &Path) {
    for file in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if let Some(id) = file.file_name().to_str().and_then(pool_of) {
            // It is no matter of the act that is at hand; the next comparison says what stands against it.
            let _ = tidy_pool(id, &file.path());
        }
    }
}

fn tidy_pool(id: &str, path: &Path) -> Result<()> {
    let dmsetup = Dmsetup::find()?;
    // One that is not active keeps what it has.
    let Some(pool) = dmsetup.pool_with_id(id)? else {
        return Ok(());
    };
    let file = lock(path, &pool, Duration::ZERO)?;
    let cleared = clear(&dmsetup, &pool, &file);
    if cleared.is_ok() || !is_noted(&file) {
        marker::remove(path)?;
    }
    cleared
}

/// The id of the pool whose file has this name.
fn pool_of(name: &str) -> Option<&str> {
    name.strip_prefix("lvm-")?.strip_suffix(NOTED)?.strip_suffix('.')
}

/// What the names of the files end with.
const NOTED: &str = "metadata";

fn file_of(pool: &Pool, dir: &Path) -> PathBuf {
    dir.join(format!("lvm-{}.{NOTED}", pool.id))
}

/// Waits until no other comparison is at work in the pool.
fn lock(path: &Path, pool: &Pool, patience: Duration) -> Result<File> {
    let failed = |e| Error::io(format!("cannot lock {}", path.display()), e);
    let begun = Instant::now();
    loop {
        let mut options = OpenOptions::new();
        options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600);
        let file = options.open(path).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            // Whoever held it has removed it: the next to come would not find it.
            Ok(()) if file.metadata().map_err(failed)?.nlink() == 0 => {}
            Ok(()) => return Ok(file),
            Err(error) if error != rustix::io::Errno::WOULDBLOCK => return Err(failed(error.into())),
            Err(_) if begun.elapsed() >= patience => {
                let what = format!("another comparison is at work in the thin pool {}", pool.name);
                return Err(Error::new(ErrorKind::Busy, what)
                    .with("path", path.display())
                    .hint("See what it does (`ps`: disksnap, thin_delta, dmsetup), then try again."));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Sees to it that none is reserved: releases what a killed comparison left.
fn clear(dmsetup: &Dmsetup, pool: &Pool, file: &File) -> Result<()> {
    let Some(root) = dmsetup.held_root(pool)? else {
        return Ok(());
    };
    let mut noted = Vec::new();
    let mut reader = file;
    reader
        .read_to_end(&mut noted)
        .map_err(|e| Error::io("cannot read what was reserved", e))?;
    if noted.is_empty() || read_block(pool, root)? != noted {
        file.set_len(0).map_err(|e| Error::io("cannot empty a file", e))?;
        return Err(somebody_elses(pool));
    }
    if dmsetup.readers(pool)? > 1 {
        let what = format!(
            "the metadata of the thin pool {} is being read, by a metadata snapshot that a killed disksnap left",
            pool.name
        );
        let hint = format!(
            "See who reads it (`fuser -v {}`), then try again.",
            pool.metadata().display()
        );
        return Err(Error::new(ErrorKind::Busy, what).hint(hint));
    }
    dmsetup.message(pool, "release_metadata_snap", file)
}

fn is_noted(file: &File) -> bool {
    file.metadata().is_ok_and(|found| found.len() > 0)
}

fn cannot_note(path: &Path, error: io::Error) -> Error {
    Error::io(format!("cannot write {}", path.display()), error)
}

fn somebody_elses(pool: &Pool) -> Error {
    let name = &pool.name;
    let what = format!(
        "somebody else holds the metadata snapshot of the thin pool {name}, of which there is one at a time"
    );
    Error::new(ErrorKind::Busy, what).hint(format!(
        "Try again when it is released. thin_delta, thin_dump and other backup programs hold it while they work (`fuser -v {}`); \
         one that nobody uses any more is released by `dmsetup message {name} 0 release_metadata_snap`.",
        pool.metadata().display()
    ))
}

fn taken_away(pool: &Pool) -> Error {
    let what = format!(
        "somebody released the metadata snapshot of the thin pool {} while it was read",
        pool.name
    );
    Error::new(ErrorKind::Busy, what).hint("What was read is given up. Try again.")
}

/// One block of the metadata as it is on the disk: what the kernel's cache of the device has may be older.
fn read_block(pool: &Pool, number: u64) -> Result<Vec<u8>> {
    let path = pool.metadata();
    let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap_or_default();
    let mut options = OpenOptions::new();
    let device = options
        .read(true)
        .custom_flags(direct)
        .open(&path)
        .map_err(failed)?;
    let offset = number.checked_mul(BLOCK as u64);
    let offset = offset.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    // Such a read wants memory that begins where a block may.
    let mut room = vec![0; 2 * BLOCK];
    let begin = room.as_ptr().align_offset(BLOCK).min(BLOCK);
    let block = &mut room[begin..begin + BLOCK];
    device.read_exact_at(block, offset).map_err(failed)?;
    Ok(block.to_vec())
}
