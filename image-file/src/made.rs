//! An image file that a request makes: so that nothing is ever overwritten, and what it made is known again after a kill.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Owner, Result, SnapshotId, faults};
use serde::{Deserialize, Serialize};

/// Below this many free bytes no image is begun.
const LEAST: u64 = 1 << 20;

/// Where one new image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeFile {
    /// The image.
    pub path: PathBuf,
    /// A second link to an image at a path that the caller chose, named after the request: it proves that the image
    /// is this request's. Elsewhere the image's name proves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<PathBuf>,
}

/// What an image is for, for the texts of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Called {
    /// What it is (`fleece image`).
    pub what: &'static str,
    /// The option that names another place (`fleece.file`).
    pub option: &'static str,
    /// What fills it.
    pub filled_by: &'static str,
    /// What to do about a disk that is too large for such an image.
    pub too_large: &'static str,
}

impl MadeFile {
    /// At a path that holds the request's id, so that no other request and no user has made it.
    #[must_use]
    pub fn own(path: PathBuf) -> Self {
        Self { path, mark: None }
    }

    /// At a path that the caller chose.
    #[must_use]
    pub fn chosen(path: PathBuf, id: SnapshotId) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mark = path.with_file_name(format!(".{name}.disksnap-{}", id.short()));
        Self {
            path,
            mark: Some(mark),
        }
    }

    /// Makes it, mode 0600, owned by whoever must open it; `fill` puts into it what it begins with. Never overwrites.
    ///
    /// # Errors
    /// `AlreadyExists`, `NotFound` for a directory that is not there, `NoSpace`, `Denied`, `Io`.
    pub fn create(
        &self,
        called: Called,
        owner: Option<Owner>,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<()> {
        let failed = |e| self.refused(called, e);
        let first = self.mark.as_ref().unwrap_or(&self.path);
        let mut new = OpenOptions::new();
        new.write(true).create_new(true).mode(0o600);
        let file = faults::around("file", "create image", || new.open(first)).map_err(failed)?;
        if let Some(Owner { uid, gid }) = owner {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(failed)?;
        }
        faults::around("file", "fill image", || fill(&file)).map_err(failed)?;
        if self.mark.is_some() {
            let linked = faults::around("file", "link image", || std::fs::hard_link(first, &self.path));
            linked.map_err(failed)?;
        }
        Ok(())
    }

    fn refused(&self, called: Called, error: io::Error) -> Error {
        let Called {
            what,
            option,
            too_large,
            ..
        } = called;
        let hint = match error.kind() {
            io::ErrorKind::AlreadyExists => {
                "An existing file is never overwritten: name another, or remove it.".to_owned()
            }
            io::ErrorKind::NotFound => "The directory must exist.".to_owned(),
            io::ErrorKind::InvalidInput => too_large.to_owned(),
            io::ErrorKind::StorageFull => {
                format!("Free some space, or name a place with more of it ({option}=PATH).")
            }
            _ => format!("Name a place that disksnap may write to ({option}=PATH)."),
        };
        Error::io(format!("cannot create the {what} {}", self.path.display()), error).hint(hint)
    }

    /// Drops the proof once the record of the snapshot holds it. Idempotent.
    pub fn unmark(&self) -> Result<()> {
        self.mark.as_deref().map_or(Ok(()), remove_file)
    }

    /// Removes the image of a request that may not have come to an end: only if it is this request's. Idempotent.
    pub fn remove_if_ours(&self) -> Result<()> {
        let Some(mark) = &self.mark else {
            return remove_file(&self.path);
        };
        let identity = |path: &Path| std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        if identity(mark).is_some() && identity(mark) == identity(&self.path) {
            remove_file(&self.path)?;
        }
        remove_file(mark)
    }

    /// Removes the image and its proof, where a record says that it is ours. Idempotent.
    pub fn remove(&self) -> Result<()> {
        remove_file(&self.path)?;
        self.unmark()
    }

    /// What the operator should know about the space for `size` bytes of virtual disk, or why it cannot do.
    ///
    /// # Errors
    /// `NoSpace`; `NotFound`, `Denied`, `Io` for a directory that cannot be looked at.
    pub fn check_space(&self, called: Called, size: u64) -> Result<Option<String>> {
        let Called {
            what,
            option,
            filled_by,
            ..
        } = called;
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let free = crate::room(dir).map_err(|e| {
            Error::io(format!("cannot look at the directory {}", dir.display()), e)
                .hint(format!("The directory for the {what} must exist."))
        })?;
        if free < LEAST {
            let message = format!("only {} MiB are free in {}", free >> 20, dir.display());
            return Err(Error::new(ErrorKind::NoSpace, message).hint(format!(
                "Free some space, or name a place with more of it ({option}=PATH)."
            )));
        }
        if free >= size / 10 {
            return Ok(None);
        }
        let (free, size) = (free >> 20, size >> 20);
        Ok(Some(format!(
            "low space: {free} MiB free in {} for a disk of {size} MiB; {filled_by}",
            dir.display()
        )))
    }
}

/// Removes a file. Idempotent.
pub fn remove_file(path: &Path) -> Result<()> {
    match faults::around("file", "remove", || std::fs::remove_file(path)) {
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

    const CALLED: Called = Called {
        what: "image",
        option: "image.file",
        filled_by: "it fills up",
        too_large: "Make it smaller.",
    };

    fn given(dir: &Path) -> MadeFile {
        MadeFile {
            path: dir.join("f"),
            mark: Some(dir.join(".f.disksnap-x")),
        }
    }

    fn make(image: &MadeFile) -> Result<()> {
        image.create(CALLED, None, |file| file.set_len(4096))
    }

    #[test]
    fn an_existing_file_survives_a_refused_create_and_its_abort() {
        let dir = tempfile::tempdir().unwrap();
        let image = given(dir.path());
        std::fs::write(&image.path, "precious").unwrap();
        assert_eq!(make(&image).unwrap_err().kind(), ErrorKind::AlreadyExists);
        image.remove_if_ours().unwrap();
        assert_eq!(std::fs::read_to_string(&image.path).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_we_made_is_removed_whether_or_not_the_create_came_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let image = given(dir.path());
        make(&image).unwrap();
        let made = std::fs::metadata(&image.path).unwrap();
        assert_eq!((made.len(), made.mode() & 0o777), (4096, 0o600));
        image.remove_if_ours().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        make(&image).unwrap();
        image.unmark().unwrap();
        image.remove().unwrap();
        image.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
