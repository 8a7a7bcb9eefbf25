//! The place a file is in: which file system, how it is mounted, how much room there is.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statvfs, statx};

/// What tells one file system from another: the device of its mount, `MAJOR:MINOR` as in
/// `/proc/self/mountinfo`.
///
/// Whatever subvolume of it a path is in, and however often it is mounted; the device that `stat` tells is
/// one of the subvolume.
///
/// # Errors
/// The operating system's.
pub fn file_system(path: &Path) -> io::Result<String> {
    let found = statx(
        CWD,
        path,
        AtFlags::empty(),
        StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
    )?;
    let of_mount = mount(found.stx_mnt_id).and_then(|line| Some(line.split(' ').nth(2)?.to_owned()));
    Ok(of_mount.unwrap_or_else(|| format!("{}:{}", found.stx_dev_major, found.stx_dev_minor)))
}

/// The options of the file system that a path is on, as the kernel tells them; none where it cannot be looked
/// at.
#[must_use]
pub fn mount_options(path: &Path) -> Vec<String> {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok();
    let line = found
        .and_then(|found| mount(found.stx_mnt_id))
        .unwrap_or_default();
    let options = line.split(' ').next_back().unwrap_or_default();
    options.split(',').map(str::to_owned).collect()
}

/// Room in bytes for those who are not root.
///
/// # Errors
/// The operating system's.
pub fn room(path: &Path) -> io::Result<u64> {
    let fs = statvfs(path)?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
}

/// The line of a mount in `/proc/self/mountinfo` (see proc(5)): its id comes first, the device third, the
/// options of the file system last.
fn mount(id: u64) -> Option<String> {
    let (mounts, id) = (
        std::fs::read_to_string("/proc/self/mountinfo").ok()?,
        id.to_string(),
    );
    let of_id = mounts.lines().find(|line| line.split(' ').next() == Some(&id));
    of_id.map(str::to_owned)
}
