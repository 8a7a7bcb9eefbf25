//! Reading a piece of a disk from the images that have it, and checking each chunk.

use bytes::Bytes;
use disksnap::{Piece, Result};
use tokio::task::spawn_blocking;

use super::died;
use crate::CHUNK;
use crate::digests::{CHUNK_BYTES, Digest, is_zero, to_usize};
use crate::object::Object;
use crate::qcow2::{CLUSTER, Entry};

/// How much is read from an image at once, in bytes: a little more than a piece.
const READ: u64 = 1 << 20;

/// A chunk, and where it is.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) image: Object,
    /// Data, plain or compressed.
    pub(super) entry: Entry,
    pub(super) chunk: u64,
    /// The digest of what the image has of it.
    pub(super) digest: Digest,
    /// How much the image has of it, in bytes: less than a chunk where its disk ended there.
    pub(super) stored: u64,
    /// How much of that shows; what is behind it is zero.
    pub(super) shown: u64,
    /// How long the chunk is on the disk.
    pub(super) length: u64,
}

/// Neighbouring chunks that are read together.
#[derive(Debug)]
pub(super) struct Fetch {
    parts: Vec<Part>,
}

/// Chunks that lie side by side in one image.
struct Group {
    /// Which of the parts.
    parts: std::ops::Range<usize>,
    start: u64,
    end: u64,
}

impl Fetch {
    pub(super) fn of(part: Part) -> Self {
        Self { parts: vec![part] }
    }

    /// Whether this chunk can come next, with so many at the most.
    pub(super) fn takes(&self, chunk: u64, most: usize) -> bool {
        self.parts.len() < most && self.parts.last().is_some_and(|last| last.chunk + 1 == chunk)
    }

    pub(super) fn push(&mut self, part: Part) {
        self.parts.push(part);
    }

    /// Reads and checks it.
    pub(super) async fn read(self) -> Result<Piece> {
        let groups = self.groups();
        let mut read = Vec::with_capacity(groups.len());
        for group in groups {
            let image = &self.parts[group.parts.start].image;
            let length = to_usize(group.end - group.start);
            let bytes = image.read(group.start, length).await?;
            read.push((group, bytes));
        }
        spawn_blocking(move || self.checked(read)).await.map_err(died)?
    }

    fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (n, part) in self.parts.iter().enumerate() {
            let Some((start, end)) = part.entry.extent() else {
                continue;
            };
            let last = groups.last_mut().filter(|last| {
                let same = self.parts[last.parts.start].image.key() == part.image.key();
                same && start >= last.start && start <= last.end && end.saturating_sub(last.start) <= READ
            });
            match last {
                Some(group) => {
                    group.parts.end = n + 1;
                    group.end = group.end.max(end);
                }
                None => groups.push(Group {
                    parts: n..n + 1,
                    start,
                    end,
                }),
            }
        }
        groups
    }

    fn checked(self, mut read: Vec<(Group, Bytes)>) -> Result<Piece> {
        let offset = self.parts.first().map_or(0, |part| part.chunk * CHUNK);
        let length: u64 = self.parts.iter().map(|part| part.length).sum();
        if let [(group, bytes)] = read.as_mut_slice()
            && (0..)
                .zip(&self.parts)
                .all(|(n, part)| part.is_as_stored(group.start + n * CLUSTER))
        {
            for (n, part) in self.parts.iter().enumerate() {
                let at = n * CHUNK_BYTES;
                part.check(&bytes[at..at + CHUNK_BYTES])?;
            }
            let bytes = std::mem::take(bytes);
            let mut data = Vec::from(bytes);
            data.truncate(to_usize(length));
            return Ok(Piece::Data { offset, data });
        }
        let mut data = Vec::with_capacity(to_usize(length));
        let mut unpacked = vec![0; CHUNK_BYTES];
        for (group, bytes) in read {
            for part in &self.parts[group.parts] {
                part.add(group.start, &bytes, &mut unpacked, &mut data)?;
            }
        }
        Ok(Piece::Data { offset, data })
    }
}

impl Part {
    /// Whether the image's bytes from there on are the disk's.
    fn is_as_stored(&self, at: u64) -> bool {
        self.entry == (Entry::Plain { host: at }) && self.shown == self.length && self.stored == self.length
    }

    /// Checks the chunk, which is in what was read from `start` on, and adds it to the piece.
    fn add(&self, start: u64, read: &[u8], unpacked: &mut [u8], to: &mut Vec<u8>) -> Result<()> {
        let (from, end) = self.entry.extent().unwrap_or((start, start));
        let bytes = &read[to_usize(from - start)..to_usize(end - start)];
        let cluster = if let Entry::Compressed { .. } = self.entry {
            self.unpack(bytes, unpacked)?;
            unpacked
        } else {
            bytes
        };
        self.check(cluster)?;
        let filled = to.len() + to_usize(self.length);
        to.extend_from_slice(&cluster[..to_usize(self.shown.min(self.stored))]);
        to.resize(filled, 0);
        Ok(())
    }

    /// Takes the one frame that begins here, and that the table gave the right room.
    fn unpack(&self, bytes: &[u8], to: &mut [u8]) -> Result<()> {
        let Some((host, _)) = self.entry.extent() else {
            return Ok(());
        };
        let length = zstd::zstd_safe::find_frame_compressed_size(bytes);
        let length = length.map_err(|_| self.broken("what should be compressed data is none"))?;
        if Entry::compressed(host, length.max(1) as u64) != self.entry {
            return Err(self.broken("its compressed data has another length than its tables say"));
        }
        match zstd::bulk::decompress_to_buffer(&bytes[..length], to) {
            Ok(length) if length == to.len() => Ok(()),
            _ => Err(self.broken("its compressed data does not make a cluster")),
        }
    }

    /// Compares a cluster of the image with the digest. What is behind the disk's end in it is zero.
    fn check(&self, cluster: &[u8]) -> Result<()> {
        let (bytes, rest) = cluster.split_at(to_usize(self.stored));
        if Digest::of(bytes) != self.digest {
            return Err(self.broken("its data is not what was written: the digest differs"));
        }
        if !is_zero(rest) {
            return Err(self.broken("there is something behind the disk's end"));
        }
        Ok(())
    }

    fn broken(&self, what: &str) -> disksnap::Error {
        let at = self.entry.extent().map_or(0, |(start, _)| start);
        self.image
            .broken(at, what)
            .with("disk offset", self.chunk * CHUNK)
    }
}
