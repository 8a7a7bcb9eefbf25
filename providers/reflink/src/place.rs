//! Where a clone goes, and whether one can be made there.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use disksnap_core::{DiskRequest, ErrorKind, SnapshotId};
use disksnap_image_file::{ImageFile, Unfit, file_system, room, target_in_names};
use rustix::fs::{Mode, OFlags, ioctl_ficlone, open};
use rustix::io::Errno;

/// The option that says in which directory the clone goes.
pub(crate) const CLONE_DIR: &str = "clone.dir";

/// Where the clone of `image` goes: it follows from the request alone, so that abort finds it after a kill.
///
/// The target is in the name because images of one name, from different directories, may be cloned into
/// one.
pub(crate) fn clone_path(id: SnapshotId, request: &DiskRequest, image: &Path) -> Result<PathBuf, String> {
    let target = target_in_names(&request.disk)?;
    // After a link to the image is gone, its own path is the best guess.
    let image = image.canonicalize().unwrap_or_else(|_| image.to_owned());
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{target}.{}.clone", id.short()));
    Ok(dir(request, &image)?.join(name))
}

fn dir(request: &DiskRequest, image: &Path) -> Result<PathBuf, String> {
    match request.options.get(CLONE_DIR).map(Path::new) {
        Some(dir) if dir.is_absolute() => Ok(dir.to_owned()),
        Some(dir) => Err(format!(
            "{CLONE_DIR} must be an absolute path, not {}",
            dir.display()
        )),
        None => Ok(image.parent().unwrap_or(Path::new("/")).to_owned()),
    }
}

/// Whether a clone of the image can be made where the request wants it; tried, with files that have no
/// name and are gone again, since the kind of a file system does not tell (XFS made with `reflink=0`).
pub(crate) fn can_hold_clone(request: &DiskRequest, image: &ImageFile) -> Result<(), Unfit> {
    let dir = dir(request, &image.path)?;
    let there =
        |what: &str, error: &dyn std::fmt::Display| format!("cannot {what} {}: {error}", dir.display());
    if !dir.is_dir() {
        return Err(format!("{} is not a directory", dir.display()).into());
    }
    let (of_image, of_dir) = (file_system(&image.path), file_system(&dir));
    if of_image.map_err(|e| there("look at", &e))? != of_dir.map_err(|e| there("look at", &e))? {
        return Err(format!(
            "{} is not on the file system of {}: a clone shares its extents and cannot leave it",
            dir.display(),
            image.path.display()
        )
        .into());
    }
    let nameless = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        open(&dir, flags, Mode::RUSR | Mode::WUSR).map(File::from)
    };
    let shared = nameless().and_then(|from| {
        let written = (&from).write_all(&[1; 4096]);
        written.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        ioctl_ficlone(nameless()?, &from)
    });
    match shared {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::ISDIR) => Err(format!(
            "the file system of {} cannot share extents between files (XFS with reflink=1 and btrfs can)",
            dir.display()
        )
        .into()),
        Err(error) => Err(Unfit {
            kind: ErrorKind::of_io(&error.into()),
            why: there("make files in", &error),
        }),
    }
}

/// A warning where the guest could run out of room by overwriting its disk.
pub(crate) fn short_of_room(request: &DiskRequest, image: &ImageFile) -> Option<String> {
    let room = room(&dir(request, &image.path).ok()?).ok()?;
    let allocated = image.allocated();
    (room < allocated).then(|| {
        format!(
            "while the clone is there, what the guest overwrites takes new room: {} MiB are free, the image \
             takes {} MiB; without room the guest's writes fail",
            room >> 20,
            allocated >> 20
        )
    })
}
