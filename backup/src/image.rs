//! Writing one image and the digests of what is in it, in one pass.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `regroup` | pieces of any alignment become batches of chunks |
//! | `pipeline` | batches are hashed and compressed side by side, and put down in their order |
//! | `written` | the two objects as they grow, and what must be known to go on with them |
//! | `packed` | bytes in a state that is kept as JSON |

mod packed;
mod pipeline;
mod regroup;
mod written;

use std::sync::Arc;

use disksnap::{Error, ErrorKind, Piece, Result};
use serde::{Deserialize, Serialize};

pub(crate) use packed::Packed;
use pipeline::Pipeline;
use regroup::Regroup;
use written::{Written, WrittenState};

use crate::qcow2::{MAX_BACKING, MAX_L1_ENTRIES, l1_entries};
use crate::{CHUNK, Digest, Store};

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
    /// The disk's size in bytes; any number. The image's virtual size is that of whole sectors, as QEMU gives a raw file.
    pub size: u64,
    /// The backing file's name, as it is to stand in the header; `None` for a full image.
    pub backing: Option<String>,
    /// How its data is stored.
    pub compression: Compression,
}

/// How far a writer is, durably: what a later one needs to go on. At most some hundred kilobytes as JSON, whatever the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageState {
    /// What image it is to be.
    pub spec: ImageSpec,
    /// Up to where the disk has been dealt with, in bytes.
    pub offset: u64,
    /// What was written up to there.
    written: WrittenState,
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
///
/// Reading the disk, hashing and compressing it, and writing it go on at the same time; up to some 25 MiB are held for that. What was
/// written is read back and compared, where the store can.
#[derive(Debug)]
pub struct ImageWriter {
    spec: ImageSpec,
    regroup: Regroup,
    pipeline: Pipeline,
}

impl ImageWriter {
    /// Begins an image, in the place of what an unfinished one of these keys had left.
    ///
    /// # Errors
    /// `Invalid` for a backing file's name that no header can hold; `Unsupported` for a disk that no image can.
    pub async fn create(store: Arc<dyn Store>, keys: ImageKeys, spec: ImageSpec) -> Result<Self> {
        check(&spec)?;
        let image = store.write(&keys.image, None).await?;
        let chunks = store.write(&keys.chunks, None).await?;
        let written = Written::new(keys, &spec, image, chunks);
        Ok(Self::start(spec, 0, written))
    }

    /// Goes on where an earlier writer of these keys was.
    ///
    /// # Errors
    /// `Broken` when what it had written is not there any more: begin anew.
    pub async fn resume(store: Arc<dyn Store>, keys: ImageKeys, state: ImageState) -> Result<Self> {
        let ImageState {
            spec,
            offset,
            written,
        } = state;
        check(&spec)?;
        if offset > spec.size || (offset < spec.size && !offset.is_multiple_of(CHUNK)) {
            return Err(written::unsound(&keys).with("offset", offset));
        }
        let image = store.write(&keys.image, Some(written.image_length())).await?;
        let chunks = store.write(&keys.chunks, Some(written.chunks_length())).await?;
        let written = Written::resume(keys, &spec, offset, written, image, chunks)?;
        Ok(Self::start(spec, offset, written))
    }

    fn start(spec: ImageSpec, offset: u64, written: Written) -> Self {
        let regroup = Regroup::new(spec.size, spec.backing.is_none(), offset);
        let pipeline = Pipeline::start(spec.compression, written);
        Self {
            spec,
            regroup,
            pipeline,
        }
    }

    /// Up to where the disk has been dealt with: the earliest place that a next piece may begin at.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.regroup.offset()
    }

    /// Takes a piece of the disk. Pieces ascend. What they leave out is left to the backing file; such a gap begins and ends at
    /// multiples of [`CHUNK`] or at the disk's end. A full image has no gaps.
    ///
    /// Not to be gone on with after an error, or after a call that was not waited for: go on from the last
    /// [`ImageWriter::checkpoint`].
    ///
    /// # Errors
    /// `Invalid` for a piece that comes too early, goes beyond the disk or leaves a gap that is no chunks'; `Internal` for a full
    /// image with a gap; what writing the pieces before it met; `Broken` where what was written is not read back.
    pub async fn write(&mut self, piece: Piece) -> Result<()> {
        let mut rest = self.regroup.begin(piece)?;
        while let Some(batch) = self.regroup.next(&mut rest) {
            self.pipeline.send(batch).await?;
        }
        Ok(())
    }

    /// Makes durable what was written, and tells what a later writer needs. Its offset may lie before
    /// [`ImageWriter::offset`] by up to 1 MiB of data and what is zero or left out around these: a later writer is given the disk
    /// from that offset, and what becomes of it is the same file to the byte.
    pub async fn checkpoint(&mut self) -> Result<ImageState> {
        let (offset, written) = self.pipeline.checkpoint().await?;
        Ok(ImageState {
            spec: self.spec.clone(),
            offset,
            written,
        })
    }

    /// Ends the image: both objects appear under their keys, durably; the digests first. What of the disk was not given is left to
    /// the backing file.
    ///
    /// # Errors
    /// `Internal` for a full image with a gap.
    pub async fn finish(mut self) -> Result<ImageSummary> {
        if let Some(last) = self.regroup.finish()? {
            self.pipeline.send(last).await?;
        }
        self.pipeline.finish().await
    }
}

fn check(spec: &ImageSpec) -> Result<()> {
    let name = spec.backing.as_deref();
    if name.is_some_and(|name| name.is_empty() || name.len() > MAX_BACKING) {
        let what = format!("an image's backing file has a name of 1 to {MAX_BACKING} bytes");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    if l1_entries(spec.size) > MAX_L1_ENTRIES {
        let what = format!(
            "a disk of {} bytes is too large for an image of 64 KiB clusters",
            spec.size
        );
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    Ok(())
}
