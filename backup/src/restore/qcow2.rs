//! Restoring into a new qcow2 image, which appears under its name when it is complete and on the disk, or not at all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Sink;
use super::file::{must_be_free, rename_new};
use super::worker::joined;
use crate::{Compression, ImageKeys, ImageSpec, ImageWriter, LocalStore};
use async_trait::async_trait;
use disksnap::{Error, ErrorKind, Piece, Result, UnfinishedFolder};

/// The image's name in the directory where it is written.
const IMAGE: &str = "image";

/// A qcow2 image being written in a directory beside the place where it will be. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Qcow2File {
    /// Taken when it is finished or given up.
    writer: Option<ImageWriter>,
    directory: Option<UnfinishedFolder>,
    path: PathBuf,
}

impl Qcow2File {
    /// Begins an image for `path`, where nothing may be yet.
    ///
    /// # Errors
    /// `AlreadyExists`; what the file system meets.
    pub(crate) async fn create(path: &Path, size: u64, compression: Compression) -> Result<Self> {
        must_be_free(path)?;
        let beside = path.to_owned();
        let made = tokio::task::spawn_blocking(move || {
            UnfinishedFolder::beside(&beside)
                .map_err(|e| Error::io("cannot write the file", e).with("path", beside.display()))
        });
        let directory = joined(made.await)??;
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
            writer: Some(writer.map_err(|e| told(path, e))?),
            directory: Some(directory),
            path: path.to_owned(),
        })
    }
}

#[async_trait]
impl Sink for Qcow2File {
    async fn write(&mut self, piece: Piece) -> Result<()> {
        let Some(writer) = &mut self.writer else {
            return Err(ended());
        };
        writer.write(piece).await.map_err(|e| told(&self.path, e))
    }

    async fn finish(&mut self) -> Result<Vec<String>> {
        let (Some(writer), Some(directory)) = (self.writer.take(), self.directory.take()) else {
            return Err(ended());
        };
        let path = self.path.clone();
        writer.finish().await.map_err(|e| told(&path, e))?;
        let placed = tokio::task::spawn_blocking(move || rename_new(&directory.path().join(IMAGE), &path));
        joined(placed.await)??;
        Ok(Vec::new())
    }

    async fn abandon(&mut self) {
        self.writer = None;
        let directory = self.directory.take();
        // Its end is its removal, which may take a while.
        drop(tokio::task::spawn_blocking(move || drop(directory)).await);
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Internal, "an ended image was written to")
}

fn told(path: &Path, error: Error) -> Error {
    error
        .with("target", path.display())
        .hint("There is nothing under that name; what had been written is gone again.")
}
