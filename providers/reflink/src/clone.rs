//! One clone: the empty file made for it, the system call that fills it, the read-only file it becomes.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Health, Result, faults};
use disksnap_image_file::{ImageFile, Qcow2, like_in_cow, remove_file, room};
use rustix::fs::{OFlags, ioctl_ficlone};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// What is remembered of a clone to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clone {
    pub(crate) image: PathBuf,
    pub(crate) file: PathBuf,
    pub(crate) format: String,
}

/// What is remembered of a finished clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// The image that it is a clone of, by its own path; empty in a record of old.
    #[serde(default)]
    pub(crate) image: PathBuf,
    pub(crate) file: PathBuf,
    pub(crate) format: String,
    /// The virtual size in bytes.
    pub(crate) size: u64,
    /// The length of the file in bytes.
    length: u64,
    /// When its content last changed: seconds and nanoseconds of the file system's clock.
    changed: (i64, i64),
}

impl Clone {
    /// Makes the empty file, and writes the image's dirty data back. Done again, it makes it anew.
    pub(crate) fn prepare(&self, image: &ImageFile) -> Result<()> {
        self.has_room(image)?;
        let shown = self.file.display();
        // The name holds the request's id: a file that is there already is from this very request.
        remove_file(&self.file)?;
        let mut made = OpenOptions::new();
        made.write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(no_follow());
        let made = faults::around("file", "create clone", || made.open(&self.file));
        let file = made.map_err(|e| Error::io(format!("cannot create {shown}"), e))?;
        like_image(&file, image).map_err(|e| Error::io(format!("cannot set up {shown}"), e))?;
        // Twice: the first may take long, and the guest goes on writing meanwhile.
        for _ in 0..2 {
            let synced = image.file.sync_data();
            synced.map_err(|e| Error::io(format!("cannot write back {}", self.image.display()), e))?;
        }
        Ok(())
    }

    /// Roughly what the file system needs to tell shared extents apart. The data takes no room.
    fn has_room(&self, image: &ImageFile) -> Result<()> {
        let needed = (1 << 20) + image.allocated() / 1024;
        let dir = self.file.parent().unwrap_or(Path::new("/"));
        let room = room(dir).map_err(|e| Error::io(format!("cannot look at {}", dir.display()), e))?;
        if room >= needed {
            return Ok(());
        }
        let short = format!(
            "{} has {room} bytes free, and a clone needs about {needed}",
            dir.display()
        );
        Err(Error::new(ErrorKind::NoSpace, short).hint("Free some space on that file system."))
    }

    /// Clones. The one thing that is done while the guest stands still.
    pub(crate) fn take(&self) -> Result<()> {
        let failed = |e: io::Error| {
            let what = format!("cannot clone {} to {}", self.image.display(), self.file.display());
            Error::io(what, e)
        };
        let image = File::open(&self.image).map_err(failed)?;
        let file = self.open(true).map_err(failed)?;
        let cloned = faults::around("ioctl", "FICLONE", || ioctl_ficlone(&file, &image));
        cloned.map_err(|errno| {
            let error = failed(errno.into());
            match errno {
                Errno::XDEV => error.hint("Say a clone.dir on the image's own file system."),
                Errno::INVAL => {
                    error.hint("The two files' attributes differ (`lsattr`), or the image is a swap file.")
                }
                _ => error,
            }
        })
    }

    /// Makes the clone durable and read-only, and looks at what it has become.
    pub(crate) fn complete(&self) -> Result<Made> {
        let failed = |e| Error::io(format!("cannot finish {}", self.file.display()), e);
        let file = self.open(false).map_err(failed)?;
        let read_only = Permissions::from_mode(0o400);
        faults::around("file", "seal clone", || file.set_permissions(read_only)).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        let dir = self.file.parent().unwrap_or(Path::new("/"));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let size = match self.format.as_str() {
            "qcow2" => Qcow2::read(&file).map_err(failed)?.size,
            _ => metadata.len(),
        };
        Ok(Made {
            image: self.image.clone(),
            file: self.file.clone(),
            format: self.format.clone(),
            size,
            length: metadata.len(),
            changed: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }

    /// The clone's file, if it is the one that was prepared and not something that took its name.
    fn open(&self, write: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(!write).write(write).custom_flags(no_follow());
        let file = options.open(&self.file)?;
        let metadata = file.metadata()?;
        if metadata.is_file() && metadata.nlink() == 1 {
            return Ok(file);
        }
        Err(io::Error::other("it is not the file that was made for the clone"))
    }
}

impl Made {
    /// What has become of the clone, from the file itself.
    pub(crate) fn health(&self) -> Health {
        let shown = self.file.display();
        let found = match std::fs::symlink_metadata(&self.file) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Health::Gone(format!("{shown} does not exist any more"));
            }
            Err(error) => return Health::Broken(format!("cannot look at {shown}: {error}")),
        };
        if !found.is_file() {
            return Health::Broken(format!("{shown} is not a file any more"));
        }
        if found.len() != self.length {
            let (is, was) = (found.len(), self.length);
            return Health::Broken(format!("{shown} has {is} bytes and should have {was}"));
        }
        if (found.mtime(), found.mtime_nsec()) != self.changed {
            return Health::Broken(format!("{shown} has been written to since it was made"));
        }
        Health::Active
    }
}

/// Gives the clone the image's owner, and on btrfs its NOCOW attribute.
fn like_image(file: &File, image: &ImageFile) -> io::Result<()> {
    match fchown(file, Some(image.metadata.uid()), Some(image.metadata.gid())) {
        // Only root gives files away; then it stays ours.
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
        _ => {}
    }
    like_in_cow(file, &image.file)
}

/// Nobody's link is followed: the directory may be somebody else's.
fn no_follow() -> i32 {
    OFlags::NOFOLLOW.bits().cast_signed()
}
