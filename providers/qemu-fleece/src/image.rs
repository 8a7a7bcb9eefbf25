//! The fleece image as a file: where it is, making it so that nothing is ever overwritten, removing it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Host, Owner, Result, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::qcow2;
use crate::settings::Settings;

/// What a new fleece image holds; sizes are the disk's, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing: somebody else writes a format into it.
    Nothing,
    /// A hole.
    Raw(u64),
    /// An empty qcow2 image.
    Qcow2(u64),
}

/// Where one fleece image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// The image.
    pub(crate) path: PathBuf,
    /// A second link to the image at a path that the caller chose, named after the request: it proves
    /// that the image is this request's. In our own directory the image's name proves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<PathBuf>,
}

impl Image {
    /// Where the image of this request goes; follows from the request alone.
    pub(crate) fn locate(host: &dyn Host, id: SnapshotId, target: &str, settings: &Settings) -> Self {
        match &settings.file {
            None => {
                let name: String = target.chars().filter(char::is_ascii_alphanumeric).collect();
                Self {
                    path: host.image_dir().join(format!("{id}-{name}.fleece")),
                    mark: None,
                }
            }
            Some(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let mark = path.with_file_name(format!(".{name}.disksnap-{}", id.short()));
                Self {
                    path: path.clone(),
                    mark: Some(mark),
                }
            }
        }
    }

    /// Makes an image, mode 0600, owned by whoever must open it. Never overwrites.
    pub(crate) fn create(&self, content: Content, owner: Option<Owner>) -> Result<()> {
        let first = self.mark.as_ref().unwrap_or(&self.path);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(first);
        let file = file.map_err(|e| self.refused("cannot create the fleece image", e))?;
        self.fill_in(&file, content, owner)
            .map_err(|e| self.refused("cannot set up the fleece image", e))?;
        if self.mark.is_some() {
            std::fs::hard_link(first, &self.path)
                .map_err(|e| self.refused("cannot create the fleece image", e))?;
        }
        Ok(())
    }

    #[expect(clippy::unused_self, reason = "reads as what is done to the image")]
    fn fill_in(&self, file: &File, content: Content, owner: Option<Owner>) -> io::Result<()> {
        if let Some(Owner { uid, gid }) = owner {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        match content {
            Content::Nothing => Ok(()),
            Content::Raw(size) => file.set_len(size),
            Content::Qcow2(size) => qcow2::write_empty(file, size),
        }
    }

    fn refused(&self, what: &str, error: io::Error) -> Error {
        let hint = match error.kind() {
            io::ErrorKind::AlreadyExists => {
                "An existing file is never overwritten: name another, or remove it."
            }
            io::ErrorKind::NotFound => "The directory must exist.",
            io::ErrorKind::InvalidInput => "A way with raw images has no such limit (fleece.way=filter).",
            io::ErrorKind::StorageFull => {
                "Free some space, or name a place with more of it (fleece.file=PATH)."
            }
            _ => "Name a place that disksnap may write to (fleece.file=PATH).",
        };
        Error::io(format!("{what} {}", self.path.display()), error).hint(hint)
    }

    /// Drops the proof once the record of the snapshot holds it. Idempotent.
    pub(crate) fn unmark(&self) -> Result<()> {
        self.mark.as_deref().map_or(Ok(()), remove)
    }

    /// Removes the image of a request that may not have come to an end: only if it is this request's.
    pub(crate) fn remove_if_ours(&self) -> Result<()> {
        let Some(mark) = &self.mark else {
            return remove(&self.path);
        };
        let identity = |path: &Path| std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        if identity(mark).is_some() && identity(mark) == identity(&self.path) {
            remove(&self.path)?;
        }
        remove(mark)
    }

    /// Removes the image of a finished snapshot. Idempotent.
    pub(crate) fn remove(&self) -> Result<()> {
        remove(&self.path)?;
        self.unmark()
    }

    /// What the operator should know about the space for `size` bytes of virtual disk, or why it cannot do.
    pub(crate) fn check_space(&self, size: u64) -> Result<Option<String>> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let space = rustix::fs::statvfs(dir).map_err(|e| {
            Error::io(
                format!("cannot look at the directory {}", dir.display()),
                e.into(),
            )
            .hint("The directory for the fleece image must exist.")
        })?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < LEAST {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("only {} MiB are free in {}", free >> 20, dir.display()),
            )
            .hint("Free some space, or name a place with more of it (fleece.file=PATH)."));
        }
        if free >= size / 10 {
            return Ok(None);
        }
        let (free, size) = (free >> 20, size >> 20);
        Ok(Some(format!(
            "low space: {free} MiB free in {} for a disk of {size} MiB; what the guest overwrites is kept there",
            dir.display()
        )))
    }
}

/// Below this many free bytes no fleece is begun.
const LEAST: u64 = 1 << 20;

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn given(dir: &Path) -> Image {
        Image {
            path: dir.join("f"),
            mark: Some(dir.join(".f.disksnap-x")),
        }
    }

    #[test]
    fn an_existing_file_survives_a_refused_create_and_its_abort() {
        let dir = tempfile::tempdir().unwrap();
        let image = given(dir.path());
        std::fs::write(&image.path, "precious").unwrap();
        assert_eq!(
            image.create(Content::Raw(4096), None).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        image.remove_if_ours().unwrap();
        assert_eq!(std::fs::read_to_string(&image.path).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_we_made_is_removed_whether_or_not_the_create_came_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let image = given(dir.path());
        image.create(Content::Raw(4096), None).unwrap();
        let made = std::fs::metadata(&image.path).unwrap();
        assert_eq!((made.len(), made.mode() & 0o777), (4096, 0o600));
        image.remove_if_ours().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        image.create(Content::Raw(4096), None).unwrap();
        image.unmark().unwrap();
        image.remove().unwrap();
        image.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
