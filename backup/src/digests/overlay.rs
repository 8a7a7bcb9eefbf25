//! Several files of digests over each other: which of the images has what of the disk. The newest one that tells of a chunk
//! wins. Where an older image's disk was shorter, what is behind its end is zero, whatever still older ones have there.

use bytes::Bytes;
use disksnap::Result;

use super::reader::{ChunksReader, Kind, Run};
use super::{chunk_length, chunks, to_usize};

/// Neighbouring chunks that are in the same place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    /// The first of them.
    pub(crate) first: u64,
    /// How many; never zero.
    pub(crate) count: u64,
    /// Where they are.
    pub(crate) has: Has,
    /// How much of the chunk's beginning shows through the layers above, where that is not all of it; then it is one chunk.
    pub(crate) visible: Option<u64>,
}

impl Span {
    /// One chunk of it.
    pub(crate) fn at(&self, n: u64) -> Self {
        Self {
            first: self.first + n,
            count: 1,
            has: Has::Nobody,
            visible: self.visible,
        }
    }

    /// What is behind its first `done` chunks.
    pub(crate) fn rest(&self, done: u64) -> Self {
        let has = match &self.has {
            Has::Data(layer, digests) => Has::Data(*layer, digests.slice(digests_length(done)..)),
            other => other.clone(),
        };
        Self {
            first: self.first + done,
            count: self.count - done,
            has,
            visible: self.visible,
        }
    }

    /// Its first `count` chunks.
    pub(crate) fn beginning(&self, count: u64) -> Self {
        let has = match &self.has {
            Has::Data(layer, digests) => Has::Data(*layer, digests.slice(..digests_length(count))),
            other => other.clone(),
        };
        Self {
            first: self.first,
            count,
            has,
            visible: self.visible,
        }
    }
}

fn digests_length(chunks: u64) -> usize {
    to_usize(chunks) * size_of::<super::Digest>()
}

/// Which layer tells of a span; layers are counted from the newest, 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Has {
    /// None does.
    Nobody,
    /// One says that it is zero.
    Zero(usize),
    /// It is behind the end of this layer's disk, and so zero; no layer above it tells of it.
    Behind(usize),
    /// One has data of these digests.
    Data(usize, Bytes),
}

/// The files of a chain, read together.
#[derive(Debug)]
pub(crate) struct Overlay {
    /// The newest layer's size.
    size: u64,
    layers: Vec<OverlayLayer>,
    at: u64,
}

#[derive(Debug)]
struct OverlayLayer {
    reader: ChunksReader,
    size: u64,
    /// What it says next; `None` at its end.
    run: Option<Run>,
}

impl Overlay {
    /// Of these files and their disks' sizes, the newest first.
    pub(crate) async fn new(readers: Vec<(ChunksReader, u64)>) -> Result<Self> {
        let size = readers.first().map_or(0, |(_, size)| *size);
        let mut layers = Vec::with_capacity(readers.len());
        for (mut reader, size) in readers {
            let run = reader.next().await?;
            layers.push(OverlayLayer { reader, size, run });
        }
        Ok(Self { size, layers, at: 0 })
    }

    /// The next chunks, up to the disk's end.
    pub(crate) async fn next(&mut self) -> Result<Option<Span>> {
        let (first, mut end) = (self.at, chunks(self.size));
        if first == end {
            return self.drain().await;
        }
        let (mut has, mut visible) = (Has::Nobody, self.size - first * crate::CHUNK);
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.pass(first).await?;
            visible = visible.min(layer.size.saturating_sub(first * crate::CHUNK));
            if visible == 0 {
                has = Has::Behind(index);
                break;
            }
            // A span ends before the chunk that a layer ends in, and behind it.
            end = end.min(if first < layer.size / crate::CHUNK {
                layer.size / crate::CHUNK
            } else {
                first + 1
            });
            match &layer.run {
                Some(run) if run.first <= first => {
                    end = end.min(run.end());
                    has = run.has(index, first, end - first);
                    break;
                }
                Some(run) => end = end.min(run.first),
                None => {}
            }
        }
        self.at = end;
        let length = chunk_length(self.size, first);
        Ok(Some(Span {
            first,
            count: end - first,
            has,
            visible: Some(visible).filter(|some| *some < length),
        }))
    }

    /// At the end: what a layer of a larger disk still says must be sound, too.
    async fn drain(&mut self) -> Result<Option<Span>> {
        for layer in &mut self.layers {
            layer.pass(u64::MAX).await?;
        }
        Ok(None)
    }
}

impl OverlayLayer {
    /// Goes on to what is said of `chunk`, or next behind it.
    async fn pass(&mut self, chunk: u64) -> Result<()> {
        while let Some(run) = &mut self.run {
            if run.end() > chunk {
                if run.first < chunk {
                    run.skip_to(chunk);
                }
                break;
            }
            self.run = self.reader.next().await?;
        }
        Ok(())
    }
}

impl Run {
    fn has(&self, layer: usize, first: u64, count: u64) -> Has {
        let mut here = self.clone();
        here.skip_to(first);
        match here.kind {
            Kind::Zero => Has::Zero(layer),
            Kind::Data(digests) => Has::Data(layer, digests.slice(..digests_length(count))),
        }
    }
}
