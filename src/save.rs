//! A new file that appears under its name when it is complete, or not at all.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disksnap_core::{Error, ErrorKind, Result, faults};
use tempfile::NamedTempFile;

use crate::disk::run_blocking;
use crate::sparse::write_sparse;
use crate::unfinished::unfinished_file;

/// A file being written beside the place where it will be. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct NewFile {
    temporary: NamedTempFile,
    writer: Arc<File>,
    path: PathBuf,
}

impl NewFile {
    /// Begins a file of mode 0600 for `path`, where nothing may be yet.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        let begin = || {
            let temporary = unfinished_file(path)?;
            let writer = Arc::new(temporary.as_file().try_clone()?);
            Ok((temporary, writer))
        };
        let (temporary, writer) = begin().map_err(|e| failed(path, e))?;
        Ok(Self {
            temporary,
            writer,
            path: path.to_owned(),
        })
    }

    /// Writes `data` at `offset`, leaving out blocks of zeroes. No place is written twice.
    pub(crate) async fn write(&mut self, offset: u64, data: Vec<u8>) -> Result<()> {
        let (file, path) = (Arc::clone(&self.writer), self.path.clone());
        run_blocking(move || {
            let written = faults::around("file", "write new", || write_sparse(&file, offset, &data));
            written.map_err(|e| failed(&path, e))
        })
        .await
    }

    /// Gives the file its length, puts it on disk and gives it its name.
    pub(crate) async fn finish(self, length: u64) -> Result<()> {
        run_blocking(move || {
            let told = |e| failed(&self.path, e);
            self.writer.set_len(length).map_err(told)?;
            self.writer.sync_all().map_err(told)?;
            let temporary = self.temporary;
            match faults::around("file", "name new", || temporary.persist_noclobber(&self.path)) {
                Ok(_) => Ok(()),
                Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(&self.path)),
                Err(e) => Err(told(e.error)),
            }
        })
        .await
    }
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::io("cannot write the file", error).with("path", path.display())
}

fn exists(path: &Path) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        "there is something of that name already",
    )
    .with("path", path.display())
    .hint("Choose another name, or remove it first; nothing is ever overwritten.")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn zeroes_become_holes_and_nothing_else_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut data = vec![0; 1 << 20];
        data[70_000] = 1;
        *data.last_mut().unwrap() = 2;
        let mut file = NewFile::create(&path).unwrap();
        file.write(0, data.clone()).await.unwrap();
        file.finish(3 << 20).await.unwrap();
        data.resize(3 << 20, 0);
        assert!(std::fs::read(&path).unwrap() == data);
        let found = path.metadata().unwrap();
        assert_eq!(found.mode() & 0o777, 0o600);
        assert!(found.blocks() * 512 <= 64 << 10, "{} blocks", found.blocks());
    }

    #[tokio::test]
    async fn what_exists_stays_and_what_failed_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut late = NewFile::create(&path).unwrap();
        late.write(0, vec![1; 10]).await.unwrap();
        std::fs::write(&path, "mine").unwrap();
        assert_eq!(
            NewFile::create(&path).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        assert_eq!(
            late.finish(10).await.unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        drop(NewFile::create(&dir.path().join("unfinished")).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
