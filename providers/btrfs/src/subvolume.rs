//! Subvolumes: what this method asks of btrfs itself to make, know and delete them. Only this file and `extents` name
//! `libbtrfs`.
//!
//! That crate, because it makes the system calls (btrfs-ioctl(3)) with no C and no generator: a build
//! needs nothing but Rust, which neither `btrfsutil` (libbtrfsutil's headers, libclang) nor `btrfs-uapi`
//! (libclang) can say. A system call answers with an error number where the `btrfs` program answers with
//! a sentence, and starts no process while a guest stands still. Its newer versions need a newer
//! compiler than ours.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use disksnap_core::faults;
use libbtrfs::{snap, subvol};
use rustix::fs::{Mode, OFlags, open, openat, statfs};
use uuid::Uuid;

/// The inode number of every subvolume's root directory, and of nothing else on btrfs
/// (`BTRFS_FIRST_FREE_OBJECTID`).
const ROOT_INODE: u64 = 256;
/// `f_type` of btrfs (statfs(2)).
const BTRFS: i64 = 0x9123_683e;

/// What btrfs says of a subvolume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Info {
    /// Its own id, in the whole world; nil for the top level of a file system that is old.
    pub(crate) uuid: Uuid,
    /// The subvolume that it is a snapshot of.
    pub(crate) parent: Uuid,
    /// Whether nothing can be written to it.
    pub(crate) read_only: bool,
    /// The transaction of its last change.
    pub(crate) changed: u64,
}

/// Whether a path is on btrfs.
pub(crate) fn is_btrfs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.f_type == BTRFS)
}

/// The root directory of the innermost subvolume that holds `path`, which is absolute and without links.
///
/// # Errors
/// `NotFound` where the root is not to be seen from here: only a directory in it is mounted.
pub(crate) fn root_of(path: &Path) -> io::Result<PathBuf> {
    let device = path.metadata()?.dev();
    // Every subvolume has a device number of its own.
    let within = path.ancestors().map_while(|dir| {
        let found = dir.metadata().ok().filter(|found| found.dev() == device)?;
        Some((dir, found))
    });
    let mut roots = within.filter(|(_, found)| found.is_dir() && found.ino() == ROOT_INODE);
    roots
        .next()
        .map(|(dir, _)| dir.to_owned())
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Opens a directory that is no link.
pub(crate) fn open_dir(path: &Path) -> io::Result<File> {
    Ok(open(path, flags(), Mode::empty())?.into())
}

/// Opens the subvolume of this name in a directory. `NotADirectory` where something else has the name.
pub(crate) fn open_in(dir: &File, name: &OsStr) -> io::Result<File> {
    let found = File::from(openat(dir, name, flags(), Mode::empty())?);
    if found.metadata()?.ino() == ROOT_INODE {
        Ok(found)
    } else {
        Err(io::ErrorKind::NotADirectory.into())
    }
}

fn flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// What btrfs says of an open subvolume (`BTRFS_IOC_GET_SUBVOL_INFO`, `BTRFS_IOC_SUBVOL_GETFLAGS`).
pub(crate) fn info(subvolume: &File) -> io::Result<Info> {
    let info = subvol::io::get_info(subvolume)?;
    Ok(Info {
        uuid: info.uuid(),
        parent: info.parent_uuid(),
        // The crate's `info.readonly()` looks at the wrong bit.
        read_only: subvol::io::is_readonly(subvolume)?,
        changed: info.ctransid(),
    })
}

/// Makes a read-only snapshot (`BTRFS_IOC_SNAP_CREATE_V2`): the one instant. Durable on return.
pub(crate) fn snapshot(subvolume: &File, dir: &File, name: &OsStr) -> io::Result<()> {
    faults::around("ioctl", "SNAP_CREATE", || {
        snap::io::create(subvolume, dir, name.as_bytes(), true)
    })
}

/// Deletes a read-only subvolume (`BTRFS_IOC_SNAP_DESTROY_V2`). Its room is freed in the background.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_ADMIN` and without the mount option `user_subvol_rm_allowed`.
pub(crate) fn destroy(subvolume: &File, dir: &File, name: &OsStr) -> io::Result<()> {
    let destroy = || {
        faults::around("ioctl", "SNAP_DESTROY", || {
            subvol::io::destroy(dir, name.as_bytes())
        })
    };
    let Err(error) = destroy() else {
        return Ok(());
    };
    let read_only = error.kind() == io::ErrorKind::ReadOnlyFilesystem;
    if !read_only && error.kind() != io::ErrorKind::PermissionDenied {
        return Err(error);
    }
    // Its owner may delete it only while it can be written.
    let writable = faults::around("ioctl", "SUBVOL_SETFLAGS", || {
        subvol::io::set_readonly(subvolume, false)
    });
    writable.map_err(|_| error)?;
    let again = destroy();
    if again.is_err() {
        // Best left as it was; the error that matters is the one of the delete.
        let _ = subvol::io::set_readonly(subvolume, true);
    }
    again
}
