//! Pieces of any alignment become batches of chunks. What a batch holds depends on the disk's content alone, never on how it
//! was cut into pieces: a writer that goes on later makes the same file.

use bytes::Bytes;
use disksnap::{Error, ErrorKind, Piece, Result};

use crate::CHUNK;
use crate::digests::{CHUNK_BYTES, chunk_length, chunks, is_zero, to_usize};
use crate::qcow2::L2_ENTRIES;

/// How many chunks of data are put down together: 1 MiB.
const BATCH: usize = 16;

/// What is put down together: what one L2 table tells of, and of a full image zeroes beyond it.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// What it holds, in the disk's order.
    pub(super) parts: Vec<Part>,
    /// Up to where the disk has been dealt with when it is put down, in bytes.
    pub(super) end: u64,
    /// The L2 table that its parts belong to, where they need one.
    table: Option<u64>,
    data: usize,
}

impl Batch {
    /// How much room its data takes as clusters, in bytes.
    pub(super) fn data_bytes(&self) -> usize {
        self.data * CHUNK_BYTES
    }
}

/// Neighbouring chunks of one kind.
#[derive(Debug)]
pub(super) enum Part {
    /// A chunk that is not zero.
    Data {
        /// Which one.
        chunk: u64,
        /// Its bytes; of the disk's last one fewer.
        bytes: Bytes,
    },
    /// Chunks that are zero.
    Zero {
        /// The first.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// What is left of a piece.
#[derive(Debug)]
pub(super) enum Rest {
    /// Bytes. Chunks of them are copied where some of them are zero: a chunk that waits must not hold a whole piece.
    Data {
        /// These.
        bytes: Bytes,
        /// Whether chunks are copied.
        copy: bool,
    },
    /// So many zeroes.
    Zero(u64),
}

/// Cuts and joins pieces.
#[derive(Debug)]
pub(super) struct Regroup {
    size: u64,
    /// Nothing lies below: zeroes need no entry, and there can be no gap.
    full: bool,
    offset: u64,
    /// The beginning of the chunk that `offset` is in.
    partial: Vec<u8>,
    batch: Batch,
    /// A batch that is whole.
    ready: Option<Batch>,
}

impl Regroup {
    pub(super) fn new(size: u64, full: bool, offset: u64) -> Self {
        let batch = Batch {
            end: offset,
            ..Batch::default()
        };
        Self {
            size,
            full,
            offset,
            partial: Vec::new(),
            batch,
            ready: None,
        }
    }

    /// Up to where there were pieces.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Looks at where a piece is, and gives what is to be taken of it.
    pub(super) fn begin(&mut self, piece: Piece) -> Result<Rest> {
        let (offset, rest) = match piece {
            Piece::Data { offset, data } => (offset, Rest::data(offset, data.into())),
            Piece::Zero { offset, length } => (offset, Rest::Zero(length)),
        };
        let place = |what: String| Error::new(ErrorKind::Invalid, what).with("offset", offset);
        if offset < self.offset {
            return Err(place(format!(
                "a piece of the disk came after what is at {}",
                self.offset
            )));
        }
        if offset
            .checked_add(rest.length())
            .is_none_or(|end| end > self.size)
        {
            return Err(place(format!(
                "a piece goes beyond the disk's {} bytes",
                self.size
            )));
        }
        if offset > self.offset && rest.length() > 0 {
            self.gap(offset)?;
        }
        Ok(rest)
    }

    /// Takes from a piece until a batch is whole; `None` when nothing of the piece is left.
    pub(super) fn next(&mut self, rest: &mut Rest) -> Option<Batch> {
        while self.ready.is_none() && rest.length() > 0 {
            self.take(rest);
        }
        self.ready.take()
    }

    /// The last batch.
    pub(super) fn finish(&mut self) -> Result<Option<Batch>> {
        if self.offset < self.size {
            self.gap(self.size)?;
        }
        self.end_batch();
        Ok(self.ready.take())
    }

    fn gap(&mut self, to: u64) -> Result<()> {
        let place = |error: Error| error.with("offset", self.offset);
        if self.full {
            let what = format!("a full image lacks what is from {} to {to}", self.offset);
            return Err(place(Error::new(ErrorKind::Internal, what)));
        }
        if !self.partial.is_empty() || (to < self.size && !to.is_multiple_of(CHUNK)) {
            let what = format!("what is left to the backing file up to {to} is not whole chunks");
            return Err(place(Error::new(ErrorKind::Invalid, what)));
        }
        self.offset = to;
        self.batch.end = to;
        Ok(())
    }

    /// Takes a part of one kind, at most to the end of an L2 table.
    fn take(&mut self, rest: &mut Rest) {
        let length = chunk_length(self.size, self.offset / CHUNK);
        let missing = length - self.partial.len() as u64;
        let take = rest.length().min(missing);
        if take < length {
            self.fill(rest, take, length);
            return;
        }
        let chunk = self.offset / CHUNK;
        match rest {
            Rest::Data { bytes, copy } => {
                let whole = bytes.split_to(to_usize(length));
                let whole = if *copy {
                    Bytes::copy_from_slice(&whole)
                } else {
                    whole
                };
                self.offset += length;
                self.chunk(chunk, whole);
            }
            Rest::Zero(left) => {
                let mut end = if self.offset + *left == self.size {
                    chunks(self.size)
                } else {
                    (self.offset + *left) / CHUNK
                };
                if !self.full {
                    end = end.min((chunk / L2_ENTRIES + 1) * L2_ENTRIES);
                }
                let taken = (end * CHUNK).min(self.size) - self.offset;
                self.offset += taken;
                *left -= taken;
                self.zero(chunk, end - chunk);
            }
        }
    }

    /// Puts the beginning of a chunk together.
    fn fill(&mut self, rest: &mut Rest, take: u64, length: u64) {
        let filled = self.partial.len() + to_usize(take);
        match rest {
            Rest::Data { bytes, .. } => self.partial.extend_from_slice(&bytes.split_to(to_usize(take))),
            Rest::Zero(left) => {
                self.partial.resize(filled, 0);
                *left -= take;
            }
        }
        let chunk = self.offset / CHUNK;
        self.offset += take;
        if filled as u64 == length {
            let whole = std::mem::take(&mut self.partial);
            self.chunk(chunk, whole.into());
        }
    }

    fn chunk(&mut self, chunk: u64, bytes: Bytes) {
        if is_zero(&bytes) {
            self.zero(chunk, 1);
            return;
        }
        self.enter(chunk);
        self.batch.parts.push(Part::Data { chunk, bytes });
        self.batch.data += 1;
        self.batch.end = self.offset;
        if self.batch.data == BATCH {
            self.end_batch();
        }
    }

    fn zero(&mut self, chunk: u64, more: u64) {
        if !self.full {
            self.enter(chunk);
        }
        match self.batch.parts.last_mut() {
            Some(Part::Zero { first, count }) if *first + *count == chunk => *count += more,
            _ => self.batch.parts.push(Part::Zero {
                first: chunk,
                count: more,
            }),
        }
        self.batch.end = self.offset;
    }

    /// Ends the batch when this chunk is in another L2 table.
    fn enter(&mut self, chunk: u64) {
        let table = chunk / L2_ENTRIES;
        if self.batch.table.is_some_and(|other| other != table) {
            self.end_batch();
        }
        self.batch.table = Some(table);
    }

    fn end_batch(&mut self) {
        if !self.batch.parts.is_empty() {
            let end = self.batch.end;
            let whole = std::mem::replace(
                &mut self.batch,
                Batch {
                    end,
                    ..Batch::default()
                },
            );
            self.ready = Some(whole);
        }
    }
}

impl Rest {
    fn data(offset: u64, bytes: Bytes) -> Self {
        let head = to_usize(offset.next_multiple_of(CHUNK) - offset).min(bytes.len());
        let copy = bytes[head..].chunks(CHUNK_BYTES).any(is_zero);
        Self::Data { bytes, copy }
    }

    fn length(&self) -> u64 {
        match self {
            Self::Data { bytes, .. } => bytes.len() as u64,
            Self::Zero(length) => *length,
        }
    }
}
