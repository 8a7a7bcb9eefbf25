//! Space kept back: on a file system that its own fleece images have filled, the catalog must still
//! be able to write that they are being deleted.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use disksnap_core::faults;
use rustix::fs::{FallocateFlags, OFlags, fallocate};

/// How much is kept back, in bytes: room for hundreds of acts.
pub(crate) const SIZE: u64 = 1024 * 1024;

/// Keeps space back if that is not done yet. Where it cannot be had nothing is kept back.
pub(crate) fn keep(path: &Path) {
    if path.metadata().is_ok_and(|found| found.len() >= SIZE) {
        return;
    }
    if faults::around("file", "make reserve", || allocate(path)).is_err() {
        // A part of it would keep the rest from being allocated later.
        let _ = std::fs::remove_file(path);
    }
}

fn allocate(path: &Path) -> io::Result<()> {
    // What a link leads to would grow.
    let no_follow = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let mut options = OpenOptions::new();
    let file: File = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(no_follow)
        .open(path)?;
    Ok(fallocate(&file, FallocateFlags::empty(), 0, SIZE)?)
}

/// Gives the space back; says whether there was any.
pub(crate) fn give(path: &Path) -> bool {
    faults::around("file", "give reserve", || std::fs::remove_file(path)).is_ok()
}
