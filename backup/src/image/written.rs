//! The two objects as they grow, and what must be known to go on with them.

use bytes::Bytes;
use disksnap::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::{Compression, ImageKeys, ImageSpec, ImageSummary};
use crate::BlobWriter;
use crate::digests::{self, ChunksState, ChunksWriter, Digest, chunk_length, chunks};
use crate::qcow2::{Layout, LayoutState, Stored};

/// How many bytes of digests are held before they are written.
const DIGESTS_HELD: usize = 256 << 10;

/// A batch, hashed and compressed.
#[derive(Debug)]
pub(super) struct Ready {
    /// What it holds, in the disk's order.
    pub(super) parts: Vec<ReadyPart>,
    /// The data of it.
    pub(super) stored: Stored,
    /// Up to where the disk is dealt with then, in bytes.
    pub(super) end: u64,
}

/// What the digests' file is to say.
#[derive(Debug)]
pub(super) enum ReadyPart {
    /// A chunk of data.
    Data {
        /// Which one.
        chunk: u64,
        /// Its digest.
        digest: Digest,
        /// Its length in bytes.
        length: u64,
    },
    /// Chunks of zeroes.
    Zero {
        /// The first.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// An image and its digests as far as they are written.
#[derive(Debug)]
pub(super) struct Written {
    keys: ImageKeys,
    size: u64,
    backing: Option<String>,
    image: Box<dyn BlobWriter>,
    chunks: Box<dyn BlobWriter>,
    layout: Layout,
    digests: ChunksWriter,
    end: u64,
    data: u64,
    zero: u64,
}

/// What of a [`Written`] must be known to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrittenState {
    image_length: u64,
    chunks_length: u64,
    layout: LayoutState,
    digests: ChunksState,
    data: u64,
    zero: u64,
}

impl WrittenState {
    /// How long the image is, at least.
    pub(super) fn image_length(&self) -> u64 {
        self.image_length
    }

    /// How long the digests' file is, at least.
    pub(super) fn chunks_length(&self) -> u64 {
        self.chunks_length
    }
}

impl Written {
    /// Nothing is written.
    pub(super) fn new(
        keys: ImageKeys,
        spec: &ImageSpec,
        image: Box<dyn BlobWriter>,
        chunks: Box<dyn BlobWriter>,
    ) -> Self {
        Self {
            keys,
            size: spec.size,
            backing: spec.backing.clone(),
            image,
            chunks,
            layout: Layout::new(spec.size, is_zstd(spec)),
            digests: ChunksWriter::new(spec.size),
            end: 0,
            data: 0,
            zero: 0,
        }
    }

    /// So much is written.
    pub(super) fn resume(
        keys: ImageKeys,
        spec: &ImageSpec,
        end: u64,
        state: WrittenState,
        image: Box<dyn BlobWriter>,
        chunks: Box<dyn BlobWriter>,
    ) -> Result<Self> {
        let layout = Layout::resume(spec.size, is_zstd(spec), &state.layout, state.image_length);
        let digests = ChunksWriter::resume(state.digests, end.div_ceil(crate::CHUNK), state.chunks_length);
        let known = state.data.checked_add(state.zero).filter(|known| *known <= end);
        let (Some(layout), Some(digests), Some(_)) = (layout, digests, known) else {
            return Err(unsound(&keys));
        };
        let (size, backing, data, zero) = (spec.size, spec.backing.clone(), state.data, state.zero);
        Ok(Self {
            keys,
            size,
            backing,
            image,
            chunks,
            layout,
            digests,
            end,
            data,
            zero,
        })
    }

    /// Puts a batch down.
    pub(super) async fn put(&mut self, batch: Ready) -> Result<()> {
        for part in batch.parts {
            match part {
                ReadyPart::Data {
                    chunk,
                    digest,
                    length,
                } => {
                    self.digests.data(chunk, &digest);
                    self.data += length;
                }
                ReadyPart::Zero { first, count } => self.zero(first, count),
            }
        }
        self.layout.data(batch.stored);
        self.end = batch.end;
        self.write_image().await?;
        if self.digests.waiting() >= DIGESTS_HELD {
            self.write_digests().await?;
        }
        Ok(())
    }

    /// Makes it durable.
    pub(super) async fn checkpoint(&mut self) -> Result<(u64, WrittenState)> {
        self.write_image().await?;
        self.write_digests().await?;
        let image_length = self
            .image
            .sync()
            .await
            .map_err(|error| error.with("object", &self.keys.image))?;
        let chunks_length = self
            .chunks
            .sync()
            .await
            .map_err(|error| error.with("object", &self.keys.chunks))?;
        let state = WrittenState {
            image_length,
            chunks_length,
            layout: self.layout.state(),
            digests: self.digests.state(),
            data: self.data,
            zero: self.zero,
        };
        Ok((self.end, state))
    }

    /// Ends both objects, the digests first: an image that is there has its digests.
    pub(super) async fn finish(mut self) -> Result<ImageSummary> {
        let chunks_digest = self.digests.finish();
        self.write_digests().await?;
        let header = self.layout.finish(self.backing.take()).encode();
        self.write_image().await?;
        let image_bytes = self.image.length();
        let done = self.chunks.finish(digests::head(self.size)).await;
        done.map_err(|error| error.with("object", &self.keys.chunks))?;
        let done = self.image.finish(header.into()).await;
        done.map_err(|error| error.with("object", &self.keys.image))?;
        Ok(ImageSummary {
            image_bytes,
            data: self.data,
            zero: self.zero,
            chunks_digest,
        })
    }

    fn zero(&mut self, first: u64, count: u64) {
        self.digests.zero(first, count);
        // Where nothing lies below, what is not there is zero.
        if self.backing.is_some() {
            self.layout.zero(first, count);
        }
        let last = first + count - 1;
        debug_assert!(last < chunks(self.size), "a chunk behind the disk's end");
        self.zero += (last - first) * crate::CHUNK + chunk_length(self.size, last);
    }

    async fn write_image(&mut self) -> Result<()> {
        for bytes in self.layout.take() {
            append(self.image.as_mut(), bytes)
                .await
                .map_err(|error| error.with("object", &self.keys.image))?;
        }
        Ok(())
    }

    async fn write_digests(&mut self) -> Result<()> {
        let bytes = self.digests.take();
        append(self.chunks.as_mut(), bytes)
            .await
            .map_err(|error| error.with("object", &self.keys.chunks))
    }
}

/// Appends, and looks whether it is there.
async fn append(to: &mut dyn BlobWriter, bytes: Bytes) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let at = to.length();
    to.append(bytes.clone()).await?;
    to.read_back(at, bytes).await
}

/// A state that no writer of these keys gave.
pub(super) fn unsound(keys: &ImageKeys) -> Error {
    let what = "what was written down of the unfinished image is not sound";
    Error::new(ErrorKind::Broken, what)
        .with("object", &keys.image)
        .hint("Begin the image anew.")
}

fn is_zstd(spec: &ImageSpec) -> bool {
    matches!(spec.compression, Compression::Zstd(_))
}
