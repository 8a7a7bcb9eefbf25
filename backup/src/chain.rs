//! Reading a disk as it was at a point, from the images of its chain, each chunk checked against its digest.

use std::sync::Arc;

use disksnap::{Error, ErrorKind, Piece, Result};

use crate::{Digest, Store};

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The point that it belongs to, for messages.
    pub point: String,
    /// The key of the qcow2 image.
    pub image: String,
    /// The key of its chunks' digests.
    pub chunks: String,
    /// What the manifest says that file's digest is.
    pub chunks_digest: Digest,
    /// The disk's size at that point, in bytes.
    pub size: u64,
}

/// Reads what the images of a chain hold, from the disk's start to its end.
///
/// With all layers down to a full image that is the whole disk; with fewer, what these hold together: what an increment over
/// the layer below them would hold.
#[derive(Debug)]
pub struct ChainReader {}

impl ChainReader {
    /// Opens the layers, the newest first.
    ///
    /// The chain is the one that is given: no image's header is trusted to name another file; one that names a backing file
    /// which is not the next layer's is told.
    ///
    /// # Errors
    /// `Broken`, naming point and object, for an image or a file of digests that is missing or is not what it should be.
    pub async fn open(store: Arc<dyn Store>, layers: &[Layer]) -> Result<Self> {
        let _ = (store, layers);
        Err(unbuilt())
    }

    /// The disk's size, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        0
    }

    /// The next piece, or `None` at the end. Pieces ascend, and begin and end at chunks' ends. Every byte in one has been
    /// compared with the digest that was taken of the snapshot.
    ///
    /// # Errors
    /// `Broken`, naming point, image and offset, where they differ.
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        Err(unbuilt())
    }
}

/// The digest of a disk's whole content: BLAKE3 over the digests of all its chunks in order. From the files of digests alone;
/// no image is read.
///
/// # Errors
/// `Broken` for a file of digests that is missing or is not what it should be, or where the layers do not cover the disk.
pub async fn content_digest(store: &dyn Store, layers: &[Layer]) -> Result<Digest> {
    let _ = (store, layers);
    Err(unbuilt())
}

pub(crate) fn unbuilt() -> Error {
    Error::new(ErrorKind::Internal, "not built yet")
}
