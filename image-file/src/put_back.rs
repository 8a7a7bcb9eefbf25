//! Putting images back as a snapshot has them: a new file beside each image shares the snapshot's extents
//! (FICLONE) and takes the image's place by a rename.
//!
//! So no image is ever half old and half new, whatever dies in between, and nothing but the images of the
//! snapshot's disks is touched. A file system, a subvolume or a directory put back as a whole would take along
//! whatever else lies there.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use disksnap_core::{Disk, Effect, Error, ErrorKind, Host, Result, RunState, SnapshotId, faults};
use rustix::fs::{
    FlockOperation, IFlags, OFlags, XattrFlags, fcntl_lock, fgetxattr, flistxattr, fsetxattr, ioctl_ficlone,
    ioctl_getflags, ioctl_setflags,
};
use rustix::io::Errno;

use crate::{path_of, remove_file};

/// The longest list of attributes, and the longest attribute (`XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 64 << 10;

/// One image and what it is to be again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutBack {
    /// The file as the snapshot has it.
    pub from: PathBuf,
    /// The image, by its own path (no links).
    pub image: PathBuf,
}

/// Whether the images of a snapshot can be put back under this domain: it is off, and its disks still use them.
///
/// # Errors
/// `Busy` while the domain is not off, or where a disk uses another image by now (an overlay, most likely, which
/// would lose its base); `NotFound` where the domain has the disk no more. Each says what to do next.
pub async fn can_put_back<'a>(
    host: &dyn Host,
    images: impl Iterator<Item = (&'a str, &'a Path)> + Send,
) -> Result<()> {
    let state = host.state().await?;
    if state != RunState::Off {
        let next = match state {
            RunState::Storage => "End the storage daemon",
            RunState::Migrating(_) => "Wait until the migration has ended and shut the domain down",
            _ => "Shut the domain down",
        };
        return Err(Error::new(
            ErrorKind::Busy,
            format!("the images can be put back only while the domain is off, and it is not: {state}"),
        )
        .hint(format!("{next}, then revert again.")));
    }
    for (target, image) in images {
        uses(host.domain().disk(target)?, image).map_err(|error| error.with("disk", target))?;
    }
    Ok(())
}

fn uses(disk: &Disk, image: &Path) -> Result<()> {
    let named = path_of(disk).ok();
    // The image itself may be gone; what leads to it is compared then.
    let found = named.map(|path| {
        let beside = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
        path.canonicalize().ok().or_else(beside)
    });
    if found.flatten().as_deref() == Some(image) {
        return Ok(());
    }
    let now = disk
        .source
        .as_ref()
        .map_or_else(|| "nothing".to_owned(), ToString::to_string);
    Err(Error::new(
        ErrorKind::Busy,
        format!(
            "the snapshot is of the image {}, and the disk uses {now} now",
            image.display()
        ),
    )
    .hint(
        "Where that is an overlay of the image, merge or revert the snapshots that brought it first. The snapshot \
         stays, and can be read.",
    ))
}

/// Puts all images back, and returns what the operator should know. Idempotent: called again after a kill, it
/// finishes.
///
/// The new files keep owner, mode and extended attributes of the images, and the NOCOW attribute of what they are
/// made from. Meanwhile the images are locked as QEMU locks them, so that none can start on one.
///
/// # Errors
/// `Busy` where a program has an image open (QEMU, qemu-img and qemu-nbd lock theirs); the operating system's.
/// Nothing is changed then, unless the effect is `Unknown`: then another call goes on where this one stopped.
pub fn put_back(all: &[PutBack], id: SnapshotId) -> Result<Vec<String>> {
    let mut locks = Vec::with_capacity(all.len());
    for one in all {
        locks.push(lock(&one.image)?);
    }
    let mut warnings = Vec::new();
    let made = all
        .iter()
        .zip(&locks)
        .try_for_each(|(one, image)| one.make(id, image.as_ref(), &mut warnings));
    if let Err(error) = made {
        let failed = all.iter().filter_map(|one| forget(&one.image, id).err());
        return Err(error.rollback_failed(failed.collect()));
    }
    for (n, one) in all.iter().enumerate() {
        one.replace(id).map_err(|error| match n {
            0 => error.rollback_failed(
                all.iter()
                    .filter_map(|one| forget(&one.image, id).err())
                    .collect(),
            ),
            _ => error
                .leaving(Effect::Unknown)
                .hint("Some images are put back and some are not: revert again once the cause is mended."),
        })?;
    }
    sync_dirs(all)?;
    Ok(warnings)
}

/// Removes what a [`put_back`] that was killed left beside an image. Idempotent.
///
/// # Errors
/// The operating system's.
pub fn forget(image: &Path, id: SnapshotId) -> Result<()> {
    remove_file(&beside(image, id))
}

/// Gives an empty file the NOCOW attribute of another, or takes it away: files that differ in it cannot share
/// extents (btrfs), and it can be set on an empty file only. Does nothing where the file system has none.
///
/// # Errors
/// The operating system's.
pub fn like_in_cow(file: &File, model: &File) -> io::Result<()> {
    let (Ok(wanted), Ok(is)) = (ioctl_getflags(model), ioctl_getflags(file)) else {
        return Ok(());
    };
    if (wanted ^ is).contains(IFlags::NOCOW) {
        ioctl_setflags(file, (is - IFlags::NOCOW) | (wanted & IFlags::NOCOW))?;
    }
    Ok(())
}

/// The file that is to take the image's place. The name follows from image and id, so that another process finds it.
fn beside(image: &Path, id: SnapshotId) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(image.file_name().unwrap_or_default());
    name.push(format!(".{}.revert", id.short()));
    image.with_file_name(name)
}

/// The image, locked against QEMU for as long as it is open; `None` where there is none any more.
fn lock(image: &Path) -> Result<Option<File>> {
    let shown = image.display();
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(image);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| Error::io(format!("cannot open {shown} to lock it"), e))?,
    };
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::AGAIN | Errno::ACCESS) => Err(Error::new(
            ErrorKind::Busy,
            format!("{shown} is in use by another program, which holds a lock on it"),
        )
        .hint(format!("`fuser {shown}` says which; end it, then revert again."))),
        Err(error) => Err(Error::io(format!("cannot lock {shown}"), error.into())),
    }
}

impl PutBack {
    /// Makes the new file, whole and durable. Done again, it makes it anew.
    fn make(&self, id: SnapshotId, image: Option<&File>, warnings: &mut Vec<String>) -> Result<()> {
        let new = beside(&self.image, id);
        let failed = |e| {
            let (image, from) = (self.image.display(), self.from.display());
            Error::io(format!("cannot make {image} anew from {from}"), e)
        };
        forget(&self.image, id)?;
        let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
        let from = OpenOptions::new()
            .read(true)
            .custom_flags(no_follow)
            .open(&self.from)
            .map_err(failed)?;
        let mut made = OpenOptions::new();
        made.read(true).write(true).create_new(true).mode(0o600);
        let file = faults::around("file", "create image", || made.open(&new)).map_err(failed)?;
        like_in_cow(&file, &from).map_err(failed)?;
        let cloned = faults::around("ioctl", "FICLONE", || ioctl_ficlone(&file, &from));
        cloned.map_err(|errno| {
            let error = failed(errno.into());
            match errno {
                Errno::XDEV => error.hint(
                    "This kernel shares extents only within one mount, and the two are on different mounts of the \
                     file system.",
                ),
                _ => error,
            }
        })?;
        let model = image.unwrap_or(&from);
        let metadata = model.metadata().map_err(failed)?;
        like(&file, model, &metadata, &self.image, warnings).map_err(failed)?;
        if image.is_some() && metadata.nlink() > 1 {
            let shown = self.image.display();
            warnings.push(format!(
                "{shown} has other names (hard links), which keep what it held until now"
            ));
        }
        file.sync_all().map_err(failed)
    }

    fn replace(&self, id: SnapshotId) -> Result<()> {
        let new = beside(&self.image, id);
        faults::around("file", "rename image", || std::fs::rename(new, &self.image))
            .map_err(|e| Error::io(format!("cannot replace {}", self.image.display()), e))
    }
}

/// Gives the new file owner, mode and attributes of the one that it replaces.
fn like(
    file: &File,
    model: &File,
    metadata: &Metadata,
    shown: &Path,
    warnings: &mut Vec<String>,
) -> io::Result<()> {
    let is = file.metadata()?;
    if (is.uid(), is.gid()) != (metadata.uid(), metadata.gid()) {
        fchown(file, Some(metadata.uid()), Some(metadata.gid()))?;
    }
    file.set_permissions(Permissions::from_mode(metadata.mode() & 0o7777))?;
    for name in xattrs(model)? {
        let kept = xattr(model, &name).and_then(|value| {
            let set = fsetxattr(file, &*name, &value, XattrFlags::empty());
            set.map_err(io::Error::from)
        });
        if let Err(error) = kept {
            warnings.push(format!(
                "{} has lost its attribute {}: {error}",
                shown.display(),
                name.display()
            ));
        }
    }
    Ok(())
}

/// The names of a file's extended attributes; none where the file system has none.
fn xattrs(file: &File) -> io::Result<Vec<OsString>> {
    let mut list = vec![0_u8; XATTR_MAX];
    let length = match flistxattr(file, list.as_mut_slice()) {
        Err(Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let names = list[..length].split(|byte| *byte == 0);
    let names = names.filter(|name| !name.is_empty());
    Ok(names.map(|name| OsStr::from_bytes(name).to_owned()).collect())
}

fn xattr(file: &File, name: &OsStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; XATTR_MAX];
    let length = fgetxattr(file, name, value.as_mut_slice())?;
    value.truncate(length);
    Ok(value)
}

/// Makes the renames durable.
fn sync_dirs(all: &[PutBack]) -> Result<()> {
    let dirs: BTreeSet<&Path> = all.iter().filter_map(|one| one.image.parent()).collect();
    for dir in dirs {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| {
            Error::io(format!("cannot write back {}", dir.display()), e).leaving(Effect::Unknown)
        })?;
    }
    Ok(())
}
