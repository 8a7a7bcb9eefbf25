//! Where what goes while an image is written as a stream, and the tables that say so.
//!
//! ```text
//! header │ data … L2 │ data … L2 │ … refcounts │ data … L2 │ L1 │ refcounts │ refcount table
//! ```
//!
//! Everything goes to the end of the file, in the disk's order; a table follows when nothing more can be added to it. The
//! head is written last, so that an image is none until it is whole. What is held meanwhile: the L1 table, one L2 table, the
//! refcounts of up to 2 GiB, and where the earlier refcounts are.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{CLUSTER, COPIED, Entry, Header, L2_ENTRIES, l1_entries};
use crate::digests::{CHUNK_BYTES, to_usize};
use crate::image::Packed;

/// How many clusters of the file one block of refcounts counts: 2 GiB.
const BLOCK: usize = CHUNK_BYTES / 2;
/// The longest table of refcounts that QEMU opens (`QCOW_MAX_REFTABLE_SIZE`), in bytes.
const MAX_TABLE: usize = 8 << 20;
/// More uses than a cluster can have: each takes some bytes of it.
const MAX_USES: u16 = 1 << 14;
/// What fills clusters up.
static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// The data of chunks of one L2 table, as it is to be put down.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// The chunks that are as they are, in their order.
    pub(crate) plain: Vec<u64>,
    /// Their bytes, a cluster each.
    pub(crate) plain_bytes: Vec<u8>,
    /// The chunks that are compressed, in their order, each with how long that made it.
    pub(crate) compressed: Vec<(u64, u64)>,
    /// Their bytes, one after the other.
    pub(crate) compressed_bytes: Vec<u8>,
}

/// An image in the making.
#[derive(Debug)]
pub(crate) struct Layout {
    size: u64,
    zstd: bool,
    /// How long the file is with all that was handed out.
    end: u64,
    l1: Vec<u64>,
    /// The L2 table that is being filled: which one it is, and its entries.
    l2: Option<(u64, Vec<u64>)>,
    /// Where the full blocks of refcounts are.
    blocks: Vec<u64>,
    /// The refcounts of the file's clusters behind those.
    refcounts: Vec<u16>,
    /// What is to be appended to the file next.
    out: Vec<Bytes>,
}

/// What of a [`Layout`] must be known to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayoutState {
    end: u64,
    l1: Packed,
    l2: Option<(u64, Packed)>,
    blocks: Packed,
    refcounts: Packed,
}

impl Layout {
    /// That of an image without anything in it yet. The header's cluster is kept free.
    pub(crate) fn new(size: u64, zstd: bool) -> Self {
        let mut new = Self {
            size,
            zstd,
            end: 0,
            l1: vec![0; to_usize(l1_entries(size))],
            l2: None,
            blocks: Vec::new(),
            refcounts: Vec::new(),
            out: Vec::new(),
        };
        new.cluster(Bytes::from_static(&ZEROES));
        new
    }

    /// How long the file is with all that was handed out.
    #[cfg(test)]
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// What is to be appended to the file next.
    pub(crate) fn take(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.out)
    }

    /// Puts down chunks of one L2 table. Compressed ones first and without gaps, so that only one cluster is filled up.
    pub(crate) fn data(&mut self, stored: Stored) {
        let first = stored.compressed.first().map(|(chunk, _)| *chunk);
        let Some(first) = first.or(stored.plain.first().copied()) else {
            return;
        };
        self.enter(first / L2_ENTRIES);
        let mut host = self.end;
        for (chunk, length) in stored.compressed {
            self.count(host, length);
            self.set(chunk, Entry::compressed(host, length));
            host += length;
        }
        self.append(stored.compressed_bytes.into());
        if !stored.plain.is_empty() {
            self.align();
        }
        let mut host = self.end;
        for chunk in stored.plain {
            self.count(host, CLUSTER);
            self.set(chunk, Entry::Plain { host });
            host += CLUSTER;
        }
        self.append(stored.plain_bytes.into());
        self.full_blocks();
    }

    /// Marks chunks of one L2 table as zero.
    pub(crate) fn zero(&mut self, first: u64, count: u64) {
        self.enter(first / L2_ENTRIES);
        for chunk in first..first + count {
            self.set(chunk, Entry::Zero);
        }
    }

    /// Writes the tables that are still held, and gives the header.
    pub(crate) fn finish(&mut self, backing: Option<String>) -> Header {
        self.end_l2();
        self.align();
        let l1 = self.l1_table();
        let (refcounts, refcount_clusters) = self.refcount_table();
        Header {
            size: self.size,
            backing,
            zstd: self.zstd,
            l1,
            refcounts,
            refcount_clusters,
        }
    }

    /// What must be known to go on, when all that was handed out is in the file.
    pub(crate) fn state(&self) -> LayoutState {
        LayoutState {
            end: self.end,
            l1: Packed::of(&be_bytes(&self.l1)),
            l2: self
                .l2
                .as_ref()
                .map(|(index, entries)| (*index, Packed::of(&be_bytes(entries)))),
            blocks: Packed::of(&be_bytes(&self.blocks)),
            refcounts: Packed::of(&be_bytes_16(&self.refcounts)),
        }
    }

    /// Goes on from such a state of a file of this length; `None` for one that cannot be.
    pub(crate) fn resume(size: u64, zstd: bool, state: &LayoutState, length: u64) -> Option<Self> {
        if state.end != length || length < CLUSTER {
            return None;
        }
        let entries = l1_entries(size);
        let l1 = from_be(&state.l1.open(to_usize(entries) * 8)?);
        let l2 = match &state.l2 {
            Some((index, table)) if *index < entries => {
                Some((*index, from_be(&table.open(to_usize(CLUSTER))?)))
            }
            Some(_) => return None,
            None => None,
        };
        let used = to_usize(state.end.div_ceil(CLUSTER));
        let blocks = from_be(&state.blocks.open(MAX_TABLE)?);
        // Those that no full block counts.
        let rest = used
            .checked_sub(blocks.len() * BLOCK)
            .filter(|rest| *rest <= BLOCK)?;
        let refcounts = from_be_16(&state.refcounts.open(rest * 2)?);
        let sound = l1.len() as u64 == entries
            && l2
                .as_ref()
                .is_none_or(|(_, table)| table.len() as u64 == L2_ENTRIES)
            && refcounts.len() == rest
            && refcounts.iter().all(|uses| *uses < MAX_USES);
        sound.then(|| Self {
            size,
            zstd,
            end: state.end,
            l1,
            l2,
            blocks,
            refcounts,
            out: Vec::new(),
        })
    }

    /// Begins this L2 table, unless it is the one that is being filled.
    fn enter(&mut self, table: u64) {
        if self.l2.as_ref().is_none_or(|(index, _)| *index != table) {
            self.end_l2();
            self.l2 = Some((table, vec![0; to_usize(L2_ENTRIES)]));
        }
    }

    /// Sets an entry of the table that is being filled.
    fn set(&mut self, chunk: u64, entry: Entry) {
        if let Some((_, entries)) = &mut self.l2 {
            entries[to_usize(chunk % L2_ENTRIES)] = entry.encode();
        }
    }

    fn end_l2(&mut self) {
        if let Some((index, entries)) = self.l2.take() {
            self.align();
            let host = self.cluster(be_bytes(&entries).into());
            self.l1[to_usize(index)] = host | COPIED;
            self.full_blocks();
        }
    }

    fn append(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.end += bytes.len() as u64;
            self.out.push(bytes);
        }
    }

    /// Counts one use of the clusters of these bytes.
    fn count(&mut self, at: u64, length: u64) {
        let first = to_usize(at / CLUSTER) - self.blocks.len() * BLOCK;
        let last = to_usize((at + length - 1) / CLUSTER) - self.blocks.len() * BLOCK;
        if self.refcounts.len() <= last {
            self.refcounts.resize(last + 1, 0);
        }
        for refcount in &mut self.refcounts[first..=last] {
            *refcount += 1;
        }
    }

    /// Fills the last cluster up.
    fn align(&mut self) {
        let fill = self.end.next_multiple_of(CLUSTER) - self.end;
        if fill > 0 {
            self.append(Bytes::from_static(&ZEROES[..to_usize(fill)]));
        }
    }

    /// Appends a cluster of its own, at a cluster's beginning.
    fn cluster(&mut self, bytes: Bytes) -> u64 {
        let host = self.end;
        self.count(host, CLUSTER);
        self.append(bytes);
        self.align();
        host
    }

    /// Writes the blocks of refcounts to which nothing can be added any more.
    fn full_blocks(&mut self) {
        while to_usize(self.end / CLUSTER) >= (self.blocks.len() + 1) * BLOCK {
            self.align();
            let rest = self.refcounts.split_off(BLOCK);
            let full = std::mem::replace(&mut self.refcounts, rest);
            let host = self.end;
            self.blocks.push(host);
            self.cluster(be_bytes_16(&full).into());
        }
    }

    fn l1_table(&mut self) -> u64 {
        let table = be_bytes(&self.l1);
        if table.is_empty() {
            return 0;
        }
        let host = self.end;
        self.count(host, table.len() as u64);
        self.append(table.into());
        self.align();
        host
    }

    /// The rest of the refcounts, which count themselves and the table that says where they are, and that table.
    fn refcount_table(&mut self) -> (u64, u32) {
        self.full_blocks();
        let used = self.end / CLUSTER;
        let (mut blocks, mut clusters) = (1, 1);
        loop {
            let all = self.blocks.len() as u64 + blocks;
            let table = (all * 8).div_ceil(CLUSTER);
            let needed = (used + blocks + table).div_ceil(BLOCK as u64) - self.blocks.len() as u64;
            if (needed, table) == (blocks, clusters) {
                break;
            }
            (blocks, clusters) = (needed, table);
        }
        let first = self.end;
        self.count(first, (blocks + clusters) * CLUSTER);
        self.refcounts.resize(to_usize(blocks) * BLOCK, 0);
        let refcounts = std::mem::take(&mut self.refcounts);
        for block in refcounts.chunks(BLOCK) {
            self.blocks.push(self.end);
            self.append(be_bytes_16(block).into());
        }
        let host = self.end;
        let table = be_bytes(&self.blocks);
        self.append(table.into());
        self.align();
        (host, u32::try_from(clusters).unwrap_or(u32::MAX))
    }
}

fn be_bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

fn be_bytes_16(numbers: &[u16]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

fn from_be(bytes: &[u8]) -> Vec<u64> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|number| u64::from_be_bytes(*number))
        .collect()
}

fn from_be_16(bytes: &[u8]) -> Vec<u16> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|number| u16::from_be_bytes(*number))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::process::Command;

    use disksnap_test_support::pattern::Random;
    use disksnap_test_support::tools;

    use super::*;

    /// Puts what is to be appended into a file; what is zero becomes a hole.
    fn append(layout: &mut Layout, file: &File) {
        let parts = layout.take();
        let mut at = layout.end() - parts.iter().map(|part| part.len() as u64).sum::<u64>();
        for part in parts {
            if part
                .chunks(ZEROES.len())
                .any(|part| part != &ZEROES[..part.len()])
            {
                file.write_all_at(&part, at).unwrap();
            }
            at += part.len() as u64;
        }
        file.set_len(at).unwrap();
    }

    fn check(image: &Path) {
        let mut qemu_img = Command::new(tools::program("qemu-img"));
        let out = qemu_img
            .args(["check", "-f", "qcow2"])
            .arg(image)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// Files of several GiB, which have more than one block of refcounts, without their data.
    #[test]
    fn refcounts_are_right_beyond_the_first_block_of_them() {
        for (size, zstd) in [(3 << 30, false), (5 << 30, true)] {
            let mut random = Random::new(size);
            let image = tempfile::NamedTempFile::new().unwrap();
            let mut layout = Layout::new(size, zstd);
            for batch in 0..size / CLUSTER / 32 {
                let mut stored = Stored::default();
                for chunk in batch * 32..batch * 32 + 32 {
                    if zstd && batch % 3 > 0 {
                        stored.compressed.push((chunk, 1 + random.below(CLUSTER - 1)));
                    } else {
                        stored.plain.push(chunk);
                    }
                }
                stored.plain_bytes = vec![0; stored.plain.len() * to_usize(CLUSTER)];
                let compressed: u64 = stored.compressed.iter().map(|(_, length)| length).sum();
                stored.compressed_bytes = vec![0; to_usize(compressed)];
                layout.data(stored);
                append(&mut layout, image.as_file());
                if batch % 1000 == 17 {
                    layout = Layout::resume(size, zstd, &layout.state(), layout.end()).unwrap();
                }
            }
            let header = layout.finish(None);
            append(&mut layout, image.as_file());
            image.as_file().write_all_at(&header.encode(), 0).unwrap();
            check(image.path());
        }
    }

    #[test]
    fn the_tables_of_a_disk_of_16_tib_fit() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let size = 16 << 40;
        let mut layout = Layout::new(size, false);
        for table in (0..l1_entries(size)).step_by(100) {
            layout.zero(table * L2_ENTRIES + table % L2_ENTRIES, 1);
            append(&mut layout, image.as_file());
        }
        let state = serde_json::to_string(&layout.state()).unwrap();
        assert!(state.len() < 1 << 20, "{} bytes", state.len());
        let header = layout.finish(None);
        append(&mut layout, image.as_file());
        image.as_file().write_all_at(&header.encode(), 0).unwrap();
        check(image.path());
    }
}
