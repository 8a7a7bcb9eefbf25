//! Bringing a domain's document up to date where it is kept: in its file, or in the catalog.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use disksnap_core::{Disk, Error, Result, faults};
use disksnap_xml::DomainDocument;

use crate::Disksnap;
use crate::disk::run_blocking;
use crate::domain::is_path;
use crate::unfinished::unfinished_file;

impl Disksnap {
    /// Writes into a domain's document that it uses these disks now (`modifiedDisk`), where `given` leads, as for
    /// [`Disksnap::load`]. All else in it stays, byte for byte. Idempotent.
    ///
    /// # Errors
    /// As [`Disksnap::rewrite`].
    pub async fn update(&self, given: &str, disks: &[Disk]) -> Result<DomainDocument> {
        self.rewrite(given, |mut document| {
            for disk in disks {
                document = document.with_disk(&disk.target, disk)?;
            }
            Ok(document)
        })
        .await
    }

    /// Changes a domain's document where it is kept. The file is replaced as a whole or not at all, with the mode and
    /// owner that it had; the domain is locked meanwhile.
    ///
    /// # Errors
    /// As [`Disksnap::load`], and `Denied`, `NoSpace`, `Io` when it cannot be written: it is then as it was.
    pub async fn rewrite(
        &self,
        given: &str,
        change: impl FnOnce(DomainDocument) -> Result<DomainDocument>,
    ) -> Result<DomainDocument> {
        let id = self.load(given).await?.domain().id.clone();
        let _lock = self.dispatcher().catalog().lock(&id).await?;
        // Read again under the lock: nobody's change is lost.
        let old = self.load(given).await?;
        let before = old.text().to_owned();
        let new = change(old)?;
        if new.text() == before {
            return Ok(new);
        }
        if is_path(given) {
            let (path, text) = (given.to_owned(), new.text().to_owned());
            run_blocking(move || {
                replace(Path::new(&path), text.as_bytes())
                    .map_err(|e| Error::io("cannot write the domain's document", e).with("document", path))
            })
            .await?;
        } else {
            self.define(&new).await?;
        }
        Ok(new)
    }
}

/// Puts new content in the place of a file's; a link stays a link.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let path = path.canonicalize()?;
    let old = path.metadata()?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    let mut new = unfinished_file(&path)?;
    faults::around("file", "write document", || new.write_all(content))?;
    let file = new.as_file();
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (old.uid(), old.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    file.set_permissions(Permissions::from_mode(old.mode() & 0o7777))?;
    file.sync_all()?;
    faults::around("file", "rename document", || new.persist(&path)).map_err(|e| e.error)?;
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;

    #[test]
    fn a_file_keeps_its_mode_and_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real.xml"), dir.path().join("link.xml"));
        std::fs::write(&real, "old").unwrap();
        std::fs::set_permissions(&real, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        replace(&link, b"new").unwrap();
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "new");
        assert_eq!(real.metadata().unwrap().mode() & 0o7777, 0o640);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone.xml");
        let error = replace(&gone, b"new").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
