//! The parts of a file of digests (little-endian): a header, records of ascending chunks, and an end.

use super::Digest;
use crate::CHUNK;

/// What the file begins with.
pub(super) const MAGIC: &[u8; 8] = b"dskchnk1";
/// The header's length.
pub(super) const HEADER: usize = 32;
/// A record's length without its digests.
pub(super) const RECORD: usize = 16;
/// A digest's length.
pub(super) const DIGEST: usize = size_of::<Digest>();
pub(super) const KIND_ZERO: u32 = 0;
pub(super) const KIND_DATA: u32 = 1;
pub(super) const KIND_END: u32 = 2;

/// The header of the file for a disk of this size.
pub(super) fn header(size: u64) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(MAGIC);
    out[8..16].copy_from_slice(&CHUNK.to_le_bytes()); // u32 and a reserved u32 of zero
    out[16..24].copy_from_slice(&size.to_le_bytes());
    out
}

/// The size of the disk that a file of digests is of, by its header.
pub(crate) fn content_size(file: &[u8]) -> Option<u64> {
    let size = file.get(16..24)?.try_into().ok()?;
    Some(u64::from_le_bytes(size))
}

/// A record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) first: u64,
    pub(super) count: u32,
    pub(super) kind: u32,
}

impl Record {
    /// The last one.
    pub(super) const END: Self = Self {
        first: u64::MAX,
        count: 0,
        kind: KIND_END,
    };

    pub(super) fn encode(self) -> [u8; RECORD] {
        let mut out = [0; RECORD];
        out[..8].copy_from_slice(&self.first.to_le_bytes());
        out[8..12].copy_from_slice(&self.count.to_le_bytes());
        out[12..].copy_from_slice(&self.kind.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8; RECORD]) -> Self {
        let (mut first, mut count, mut kind) = ([0; 8], [0; 4], [0; 4]);
        first.copy_from_slice(&bytes[..8]);
        count.copy_from_slice(&bytes[8..12]);
        kind.copy_from_slice(&bytes[12..]);
        Self {
            first: u64::from_le_bytes(first),
            count: u32::from_le_bytes(count),
            kind: u32::from_le_bytes(kind),
        }
    }
}
