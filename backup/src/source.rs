//! Where a disk is pulled from: a snapshot that this host took, or one that another host serves.

use std::ops::Range;

use disksnap::{ChangeStream, DiskReader, Pieces, RemoteDisk, Result, SnapshotReader};

use crate::CHUNK;
use crate::digests::CHUNK_BYTES;

/// A disk that is pulled.
#[derive(Debug)]
pub(crate) enum Source {
    Snapshot(Box<SnapshotReader>),
    Remote(RemoteDisk),
}

impl Source {
    fn disk(&self) -> &DiskReader {
        match self {
            Self::Snapshot(reader) => reader,
            Self::Remote(disk) => disk,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.disk().size()
    }

    pub(crate) fn warnings(&self) -> &[String] {
        match self {
            Self::Snapshot(reader) => reader.warnings(),
            Self::Remote(_) => &[],
        }
    }

    /// Why more is told as changed than was written, where it is.
    pub(crate) fn excess(&self) -> Option<&str> {
        match self {
            Self::Snapshot(reader) => reader.excess(),
            Self::Remote(_) => None,
        }
    }

    /// All of the disk from `offset` on.
    pub(crate) fn whole(&self, offset: u64) -> Result<Pieces<'_>> {
        self.disk().pieces(offset, self.size().saturating_sub(offset))
    }

    /// The chunks from `offset` on that have changed, or lie in `also`.
    pub(crate) fn changed(&self, offset: u64, also: Option<Range<u64>>) -> Result<Pieces<'_>> {
        self.disk().changed_pieces(offset..self.size(), CHUNK, also)
    }

    /// The ranges that are told as changed.
    pub(crate) fn changes(&self) -> Result<ChangeStream> {
        self.disk().changes()
    }

    /// A whole chunk.
    pub(crate) async fn read_at(&self, offset: u64) -> Result<Vec<u8>> {
        self.disk().read_at(offset, CHUNK_BYTES).await
    }

    /// How much has changed, in bytes, as far as it is told.
    pub(crate) async fn changed_bytes(&self) -> Result<u64> {
        let mut extents = self.disk().changes()?;
        let mut total = 0;
        while let Some(extent) = extents.next().await? {
            total += extent.length;
        }
        Ok(total)
    }

    pub(crate) async fn close(self) -> Result<()> {
        match self {
            Self::Snapshot(reader) => reader.close().await,
            Self::Remote(disk) => {
                disk.close().await;
                Ok(())
            }
        }
    }
}
