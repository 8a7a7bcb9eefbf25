//! Reading a file of digests as a stream, in memory that does not depend on what it claims.

use bytes::{Buf, Bytes};
use disksnap::Result;

use super::format::{self, DIGEST, HEADER, KIND_DATA, KIND_END, KIND_ZERO, RECORD, Record};
use super::{Digest, chunks, to_usize};
use crate::object::Object;

/// How much of the file is read at once, in bytes.
const WINDOW: u64 = 256 << 10;
/// How many digests are given at once, at the most.
const RUN: u64 = 2048;

/// Neighbouring chunks of which the file says the same kind of thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first of them.
    pub(crate) first: u64,
    /// How many; never zero.
    pub(crate) count: u64,
    /// What it says.
    pub(crate) kind: Kind,
}

/// What a file of digests says of chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// They are zero.
    Zero,
    /// They have these digests, one after the other.
    Data(Bytes),
}

impl Run {
    /// Where it ends.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.count
    }

    /// Drops what is before `chunk`, which lies in it.
    pub(crate) fn skip_to(&mut self, chunk: u64) {
        let skipped = chunk - self.first;
        if let Kind::Data(digests) = &mut self.kind {
            digests.advance(to_usize(skipped) * DIGEST);
        }
        self.first += skipped;
        self.count -= skipped;
    }
}

/// A file of digests that is read from its start to its end.
#[derive(Debug)]
pub(crate) struct ChunksReader {
    object: Object,
    /// How many chunks the disk has.
    total: u64,
    /// What was read and not used yet, and where it ends in the file.
    window: Bytes,
    window_end: u64,
    /// The first chunk that the next record may tell of.
    next: u64,
    /// What is left of a record of data.
    left: u64,
    ended: bool,
}

impl ChunksReader {
    /// Begins to read.
    ///
    /// # Errors
    /// `Broken` for a file that is not one of digests of a disk of this size.
    pub(crate) async fn open(object: Object, size: u64) -> Result<Self> {
        let mut new = Self {
            object,
            total: chunks(size),
            window: Bytes::new(),
            window_end: 0,
            next: 0,
            left: 0,
            ended: false,
        };
        if new.take(HEADER).await? != format::header(size).as_slice() {
            let what = format!("it is no file of the digests of a disk of {size} bytes");
            return Err(new.object.broken(0, what));
        }
        Ok(new)
    }

    /// What the file says next, or `None` at its end.
    ///
    /// # Errors
    /// `Broken` where it is not what it should be.
    pub(crate) async fn next(&mut self) -> Result<Option<Run>> {
        if self.left > 0 {
            return Ok(Some(self.digests().await?));
        }
        if self.ended {
            return Ok(None);
        }
        let at = self.at();
        let mut record = [0; RECORD];
        record.copy_from_slice(&self.take(RECORD).await?);
        let record = Record::decode(&record);
        if record == Record::END {
            return self.end(at);
        }
        let (first, count) = (record.first, u64::from(record.count));
        let end = first.checked_add(count).filter(|end| *end <= self.total);
        let Some(end) = end.filter(|_| first >= self.next && count > 0 && record.kind != KIND_END) else {
            let what = format!(
                "a record of {count} chunks from chunk {first} cannot follow chunk {}",
                self.next
            );
            return Err(self.object.broken(at, what));
        };
        match record.kind {
            KIND_ZERO => {
                self.next = end;
                Ok(Some(Run {
                    first,
                    count,
                    kind: Kind::Zero,
                }))
            }
            KIND_DATA => {
                (self.next, self.left) = (first, count);
                Ok(Some(self.digests().await?))
            }
            kind => Err(self
                .object
                .broken(at, format!("a record is of kind {kind}, which is not known"))),
        }
    }

    async fn digests(&mut self) -> Result<Run> {
        let (first, count) = (self.next, self.left.min(RUN));
        let digests = self.take(to_usize(count) * DIGEST).await?;
        self.next += count;
        self.left -= count;
        Ok(Run {
            first,
            count,
            kind: Kind::Data(digests),
        })
    }

    fn end(&mut self, at: u64) -> Result<Option<Run>> {
        self.ended = true;
        if self.at() != self.object.length() {
            return Err(self.object.broken(at, "there is something behind its end"));
        }
        Ok(None)
    }

    /// Where in the file it is.
    fn at(&self) -> u64 {
        self.window_end - self.window.len() as u64
    }

    /// The next bytes.
    async fn take(&mut self, length: usize) -> Result<Bytes> {
        if self.window.len() < length {
            let at = self.at();
            let rest = self.object.length().saturating_sub(at);
            if rest < length as u64 {
                return Err(self.object.broken(at, "it is torn off"));
            }
            self.window = self.object.read(at, to_usize(rest.min(WINDOW))).await?;
            self.window_end = at + self.window.len() as u64;
        }
        Ok(self.window.split_to(length))
    }
}

/// One of the digests that a run has.
pub(crate) fn digest(digests: &Bytes, index: u64) -> Digest {
    let mut digest = [0; DIGEST];
    let at = to_usize(index) * DIGEST;
    digest.copy_from_slice(&digests[at..at + DIGEST]);
    Digest(digest)
}

/// The digest of a whole object.
pub(crate) async fn digest_of(object: &Object) -> Result<Digest> {
    const STEP: u64 = 1 << 20;
    let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
    while at < object.length() {
        let bytes = object.read(at, to_usize(STEP.min(object.length() - at))).await?;
        at += bytes.len() as u64;
        let hashed = tokio::task::spawn_blocking(move || {
            hasher.update(&bytes);
            hasher
        });
        hasher = hashed.await.map_err(crate::chain::died)?;
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}
