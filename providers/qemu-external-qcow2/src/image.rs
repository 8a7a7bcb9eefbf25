//! The overlay as a file: where it is, making it so that nothing is ever overwritten, removing it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use disksnap_core::{DiskRequest, Error, ErrorKind, Host, Owner, Result, SnapshotId, Source};
use serde::{Deserialize, Serialize};

use crate::layer::Layer;
use crate::qcow2;
use crate::settings::Settings;

/// Where one overlay is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// The image.
    pub(crate) path: PathBuf,
    /// A second link to an image at a path that the caller chose, named after the request: it proves that the
    /// image is this request's. Elsewhere the image's name proves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<PathBuf>,
}

impl Image {
    /// Where the overlay of this request goes; follows from the request alone.
    pub(crate) fn locate(host: &dyn Host, id: SnapshotId, request: &DiskRequest) -> Result<Self> {
        if let Some(path) = Settings::read(request)?.file {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let mark = path.with_file_name(format!(".{name}.disksnap-{}", id.short()));
            return Ok(Self {
                path,
                mark: Some(mark),
            });
        }
        let path = if let Some(Source::File { file }) = &request.disk.source {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            file.with_file_name(format!("{}.{}", original(&name), id.short()))
        } else {
            // Nobody wants an image among devices.
            let target = request.disk.target.chars();
            let plain: String = target.filter(char::is_ascii_alphanumeric).collect();
            host.image_dir().join(format!("{id}-{plain}.qcow2"))
        };
        Ok(Self { path, mark: None })
    }

    /// Makes an empty overlay of `size` bytes over the base, mode 0600, owned by whoever must open it. Never
    /// overwrites.
    pub(crate) fn create(&self, base: &Layer, size: u64, owner: Option<Owner>) -> Result<()> {
        let first = self.mark.as_ref().unwrap_or(&self.path);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(first);
        let file = file.map_err(|e| self.refused("cannot create the overlay", e))?;
        fill_in(&file, &self.path, base, size, owner)
            .map_err(|e| self.refused("cannot set up the overlay", e))?;
        if self.mark.is_some() {
            std::fs::hard_link(first, &self.path)
                .map_err(|e| self.refused("cannot create the overlay", e))?;
        }
        Ok(())
    }

    fn refused(&self, what: &str, error: io::Error) -> Error {
        let hint = match error.kind() {
            io::ErrorKind::AlreadyExists => {
                "An existing file is never overwritten: name another, or remove it."
            }
            io::ErrorKind::NotFound => "The directory must exist.",
            io::ErrorKind::StorageFull => {
                "Free some space, or name a place with more of it (source.file=PATH)."
            }
            _ => "Name a place that disksnap may write to (source.file=PATH).",
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

    /// Removes the image and its proof, where a record says that it is ours. Idempotent.
    pub(crate) fn remove(&self) -> Result<()> {
        remove(&self.path)?;
        self.unmark()
    }

    /// What the operator should know about the space for `size` bytes of virtual disk, or why it cannot do.
    pub(crate) fn check_space(&self, size: u64) -> Result<Option<String>> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let free = disksnap_image_file::room(dir).map_err(|e| {
            Error::io(format!("cannot look at the directory {}", dir.display()), e)
                .hint("The directory for the overlay must exist.")
        })?;
        if free < LEAST {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("only {} MiB are free in {}", free >> 20, dir.display()),
            )
            .hint("Free some space, or name a place with more of it (source.file=PATH)."));
        }
        if free >= size / 10 {
            return Ok(None);
        }
        let (free, size) = (free >> 20, size >> 20);
        Ok(Some(format!(
            "low space: {free} MiB free in {} for a disk of {size} MiB; all that the guest writes from now on goes \
             there, and its writes fail when it is full",
            dir.display()
        )))
    }
}

/// Below this many free bytes no overlay is begun.
const LEAST: u64 = 1 << 20;

/// The name without the id of an earlier snapshot: names must not grow with each.
fn original(name: &str) -> &str {
    let is_id = |text: &str| text.len() == 12 && text.chars().all(|c| c.is_ascii_hexdigit());
    match name.rsplit_once('.') {
        Some((first, last)) if is_id(last) && !first.is_empty() => first,
        _ => name,
    }
}

/// Makes the empty file `file` an overlay that is going to be at `path`.
pub(crate) fn fill_in(
    file: &File,
    path: &Path,
    base: &Layer,
    size: u64,
    owner: Option<Owner>,
) -> io::Result<()> {
    if let Some(Owner { uid, gid }) = owner {
        std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    qcow2::write_overlay(file, size, &base.name_from(path), &base.format)?;
    // QEMU flushes what it writes; that the image exists at all must be as durable.
    file.sync_all()
}

/// Removes a file. Idempotent.
pub(crate) fn remove(path: &Path) -> Result<()> {
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

    fn given(dir: &Path) -> (Image, Layer) {
        let image = Image {
            path: dir.join("f"),
            mark: Some(dir.join(".f.disksnap-x")),
        };
        (image, Layer::new(dir.join("base"), "raw"))
    }

    #[test]
    fn an_existing_file_survives_a_refused_create_and_its_abort() {
        let dir = tempfile::tempdir().unwrap();
        let (image, base) = given(dir.path());
        std::fs::write(&image.path, "precious").unwrap();
        let error = image.create(&base, 4096, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        image.remove_if_ours().unwrap();
        assert_eq!(std::fs::read_to_string(&image.path).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_we_made_is_removed_whether_or_not_the_create_came_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let (image, base) = given(dir.path());
        image.create(&base, 4096, None).unwrap();
        assert_eq!(std::fs::metadata(&image.path).unwrap().mode() & 0o777, 0o600);
        image.remove_if_ours().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        image.create(&base, 4096, None).unwrap();
        image.unmark().unwrap();
        image.remove().unwrap();
        image.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn names_do_not_grow_with_each_snapshot() {
        assert_eq!(original("vda.qcow2"), "vda.qcow2");
        assert_eq!(original("vda.qcow2.0123456789ab"), "vda.qcow2");
        assert_eq!(original(".0123456789ab"), ".0123456789ab");
    }
}
