//! Writing one image and the digests of what is in it, in one pass.

use std::sync::Arc;

use disksnap::{Piece, Result};
use serde::{Deserialize, Serialize};

use crate::{Digest, Store};

/// How an image's data is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// As it is.
    #[default]
    None,
    /// Each cluster by zstd at this level, where that makes it smaller. QEMU reads it since 5.1.
    Zstd(i32),
}

/// The keys of what is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageKeys {
    /// The qcow2 image.
    pub image: String,
    /// The digests of its chunks.
    pub chunks: String,
}

/// What image it is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// The disk's size in bytes; any number.
    pub size: u64,
    /// The backing file's name, as it is to stand in the header; `None` for a full image.
    pub backing: Option<String>,
    /// How its data is stored.
    pub compression: Compression,
}

/// How far a writer is, durably: what a later one needs to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageState {
    /// What image it is to be.
    pub spec: ImageSpec,
    /// Up to where the disk has been dealt with, in bytes.
    pub offset: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// The image's length as a file, in bytes.
    pub image_bytes: u64,
    /// How much of the disk it holds as data, in bytes, before compression.
    pub data: u64,
    /// How much of the disk it holds as zeroes, in bytes.
    pub zero: u64,
    /// The digest of the file of digests.
    pub chunks_digest: Digest,
}

/// Writes an image from its start to its end, and the digests of its chunks beside it.
#[derive(Debug)]
pub struct ImageWriter {}

impl ImageWriter {
    /// Begins an image, in the place of what an unfinished one of these keys had left.
    pub async fn create(store: Arc<dyn Store>, keys: ImageKeys, spec: ImageSpec) -> Result<Self> {
        let _ = (store, keys, spec);
        Err(crate::chain::unbuilt())
    }

    /// Goes on where an earlier writer of these keys was.
    ///
    /// # Errors
    /// `Broken` when what it had written is not there any more: begin anew.
    pub async fn resume(store: Arc<dyn Store>, keys: ImageKeys, state: ImageState) -> Result<Self> {
        let _ = (store, keys, state);
        Err(crate::chain::unbuilt())
    }

    /// Up to where the disk has been dealt with: the earliest place that a next piece may begin at.
    #[must_use]
    pub fn offset(&self) -> u64 {
        0
    }

    /// Takes a piece of the disk. Pieces ascend. What they leave out is left to the backing file; such a gap begins and ends at
    /// multiples of [`CHUNK`](crate::CHUNK) or at the disk's end. A full image has no gaps.
    pub async fn write(&mut self, piece: Piece) -> Result<()> {
        let _ = piece;
        Err(crate::chain::unbuilt())
    }

    /// Makes durable what was written so far.
    pub async fn checkpoint(&mut self) -> Result<ImageState> {
        Err(crate::chain::unbuilt())
    }

    /// Ends the image: both objects appear under their keys, durably; the digests first.
    ///
    /// # Errors
    /// `Internal` for a full image with a gap.
    pub async fn finish(self) -> Result<ImageSummary> {
        Err(crate::chain::unbuilt())
    }
}
