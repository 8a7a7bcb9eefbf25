//! Writing a file of digests as a stream.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::format::{self, KIND_DATA, KIND_ZERO, Record};
use super::tree_hash::TreeHash;
use super::{Digest, format::DIGEST};
use crate::image::Packed;

/// How many digests a record holds at the most: 64 MiB of the disk.
const RUN: usize = 1024;

/// A file of digests in the making.
#[derive(Debug)]
pub(crate) struct ChunksWriter {
    hash: TreeHash,
    run: Pending,
    /// What is to be appended to the file next.
    out: Vec<u8>,
}

/// The record that may still grow.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pending {
    None,
    Zero { first: u64, count: u64 },
    Data { first: u64, digests: Vec<u8> },
}

impl Pending {
    /// Whether it is a run of these chunks.
    fn is_within(&self, chunks: u64) -> bool {
        let (first, count, whole) = match self {
            Self::None => return true,
            Self::Zero { first, count } => (*first, *count, true),
            Self::Data { first, digests } => {
                let count = (digests.len() / DIGEST) as u64;
                (*first, count, digests.len().is_multiple_of(DIGEST))
            }
        };
        whole && count > 0 && first.checked_add(count).is_some_and(|end| end <= chunks)
    }
}

/// What of a [`ChunksWriter`] must be known to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunksState {
    hash: TreeHash,
    tail: Packed,
    zero: Option<(u64, u64)>,
    data: Option<(u64, Packed)>,
}

impl ChunksWriter {
    /// That of a disk of this size, of which nothing is known yet.
    pub(crate) fn new(size: u64) -> Self {
        let mut new = Self {
            hash: TreeHash::default(),
            run: Pending::None,
            out: Vec::new(),
        };
        new.append(&format::header(size));
        new
    }

    /// These chunks are zero.
    pub(crate) fn zero(&mut self, first: u64, count: u64) {
        match &mut self.run {
            Pending::Zero {
                first: begun,
                count: so_far,
            } if *begun + *so_far == first => *so_far += count,
            _ => {
                self.end_run();
                self.run = Pending::Zero { first, count };
            }
        }
    }

    /// This chunk has this digest.
    pub(crate) fn data(&mut self, chunk: u64, digest: &Digest) {
        match &mut self.run {
            Pending::Data { first, digests }
                if *first + (digests.len() / DIGEST) as u64 == chunk && digests.len() < RUN * DIGEST =>
            {
                digests.extend_from_slice(&digest.0);
            }
            _ => {
                self.end_run();
                self.run = Pending::Data {
                    first: chunk,
                    digests: digest.0.to_vec(),
                };
            }
        }
    }

    /// What is to be appended to the file next.
    pub(crate) fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.out).into()
    }

    /// How much that is.
    pub(crate) fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Ends the file; its digest.
    pub(crate) fn finish(&mut self) -> Digest {
        self.end_run();
        self.append(&Record::END.encode());
        self.hash.finish()
    }

    /// What must be known to go on, when all that was taken is in the file.
    pub(crate) fn state(&self) -> ChunksState {
        let (zero, data) = match &self.run {
            Pending::None => (None, None),
            Pending::Zero { first, count } => (Some((*first, *count)), None),
            Pending::Data { first, digests } => (None, Some((*first, Packed::of(digests)))),
        };
        ChunksState {
            hash: self.hash.clone(),
            tail: Packed::of(self.hash.tail()),
            zero,
            data,
        }
    }

    /// Goes on from such a state of a file of this length, which tells of the disk's first `chunks`; `None` for one that cannot be.
    pub(crate) fn resume(state: ChunksState, chunks: u64, length: u64) -> Option<Self> {
        let hash = state.hash.resume(state.tail.open(1 << 20)?)?;
        let run = match (state.zero, state.data) {
            (None, None) => Pending::None,
            (Some((first, count)), None) => Pending::Zero { first, count },
            (None, Some((first, digests))) => Pending::Data {
                first,
                digests: digests.open(RUN * DIGEST)?,
            },
            (Some(_), Some(_)) => return None,
        };
        let sound = hash.length() == Some(length) && run.is_within(chunks);
        sound.then_some(Self {
            hash,
            run,
            out: Vec::new(),
        })
    }

    fn append(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.out.extend_from_slice(bytes);
    }

    fn end_run(&mut self) {
        match std::mem::replace(&mut self.run, Pending::None) {
            Pending::None => {}
            Pending::Zero { mut first, mut count } => {
                while count > 0 {
                    let now = u32::try_from(count).unwrap_or(u32::MAX);
                    self.append(
                        &Record {
                            first,
                            count: now,
                            kind: KIND_ZERO,
                        }
                        .encode(),
                    );
                    first += u64::from(now);
                    count -= u64::from(now);
                }
            }
            Pending::Data { first, digests } => {
                let count = u32::try_from(digests.len() / DIGEST).unwrap_or(u32::MAX);
                self.append(
                    &Record {
                        first,
                        count,
                        kind: KIND_DATA,
                    }
                    .encode(),
                );
                self.append(&digests);
            }
        }
    }
}

/// The header, which stands at the file's beginning from the first.
pub(crate) fn head(size: u64) -> Bytes {
    Bytes::copy_from_slice(&format::header(size))
}
