//! Restoring into a new qcow2 image, which appears under its name when it is complete and on the disk, or not at all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap::{Error, Piece, Result};
use tempfile::TempDir;

use super::Sink;
use super::file::{UNFINISHED, folder_of, must_be_free, rename_new};
use super::worker::joined;
use crate::{Compression, ImageKeys, ImageSpec, ImageWriter, LocalStore};

/// The image's name in the directory where it is written.
const IMAGE: &str = "image";

/// A qcow2 image being written in a directory beside the place where it will be. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Qcow2File {
    writer: ImageWriter,
    directory: TempDir,
    path: PathBuf,
}

impl Qcow2File {
    /// Begins an image for `path`, where nothing may be yet.
    ///
    /// # Errors
    /// `AlreadyExists`; what the file system meets.
    pub(crate) async fn create(path: &Path, size: u64, compression: Compression) -> Result<Self> {
        must_be_free(path)?;
        let directory = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(folder_of(path))
            .map_err(|e| Error::io("cannot write the file", e).with("path", path.display()))?;
        let keys = ImageKeys {
            image: IMAGE.to_owned(),
            chunks: "chunks".to_owned(),
        };
        let spec = ImageSpec {
            size,
            backing: None,
            compression,
        };
        let store = Arc::new(LocalStore::at(directory.path()));
        let writer = ImageWriter::create(store, keys, spec).await;
        Ok(Self {
            writer: writer.map_err(|e| told(path, e))?,
            directory,
            path: path.to_owned(),
        })
    }
}

#[async_trait]
impl Sink for Qcow2File {
    async fn write(&mut self, piece: Piece) -> Result<()> {
        self.writer.write(piece).await.map_err(|e| told(&self.path, e))
    }

    async fn finish(self: Box<Self>) -> Result<Vec<String>> {
        let Self {
            writer,
            directory,
            path,
        } = *self;
        writer.finish().await.map_err(|e| told(&path, e))?;
        let placed = tokio::task::spawn_blocking(move || rename_new(&directory.path().join(IMAGE), &path));
        joined(placed.await)??;
        Ok(Vec::new())
    }
}

fn told(path: &Path, error: Error) -> Error {
    error
        .with("target", path.display())
        .hint("There is nothing under that name; what had been written is gone again.")
}
