//! Where a qcow2 file has its compressed clusters (QEMU's `docs/interop/qcow2.txt`, "Compressed Clusters Descriptor"): the
//! one thing that `qemu-img map` does not tell.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::FileInImage;

/// The header, as far as it matters here.
const HEADER: usize = 105;
/// An entry of the L2 table with this bit is of a compressed cluster.
const PACKED: u64 = 1 << 62;
/// Where an entry of the L1 table has the offset of an L2 table.
const TABLE: u64 = 0x00ff_ffff_ffff_fe00;
/// Incompatible features: there is a type of compression in the header; entries of L2 tables are twice as long.
const TYPED: u64 = 1 << 3;
const EXTENDED: u64 = 1 << 4;

/// How a file packs: two that do it alike read the same from the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    cluster_bits: u32,
    compression: u8,
}

/// A qcow2 file whose compressed clusters can be looked up, best in ascending order.
#[derive(Debug)]
pub(crate) struct Packed {
    file: File,
    kind: Kind,
    l1: u64,
    l1_entries: u64,
    /// How long an entry of an L2 table is.
    entry: u64,
    /// The L2 table that was asked for last, by its place in the L1 table; empty where there is none.
    table: Option<(u64, Vec<u8>)>,
}

impl Packed {
    /// `None` for what is no qcow2 file of a kind that is known here.
    pub(crate) fn of(image: &FileInImage) -> io::Result<Option<Self>> {
        if image.format != "qcow2" {
            return Ok(None);
        }
        let file = File::open(&image.path)?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let incompatible = if number::<4>(&header, 4) == 3 {
            number::<8>(&header, 72)
        } else {
            0
        };
        let cluster_bits = u32::try_from(number::<4>(&header, 20)).unwrap_or_default();
        if !(9..=21).contains(&cluster_bits) {
            return Ok(None);
        }
        let compression = if incompatible & TYPED == 0 { 0 } else { header[104] };
        Ok(Some(Self {
            file,
            kind: Kind {
                cluster_bits,
                compression,
            },
            l1: number::<8>(&header, 40),
            l1_entries: number::<4>(&header, 36),
            entry: if incompatible & EXTENDED == 0 { 8 } else { 16 },
            table: None,
        }))
    }

    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.kind == other.kind
    }

    /// The size of a cluster in bytes.
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.kind.cluster_bits
    }

    /// Where in the file the guest's cluster at this place is; `None` where it is not compressed.
    pub(crate) fn find(&mut self, at: u64) -> io::Result<Option<Range<u64>>> {
        let cluster = at >> self.kind.cluster_bits;
        let entries = self.cluster() / self.entry;
        let (wanted, index) = (cluster / entries, cluster % entries * self.entry);
        let entry = match &self.table {
            Some((of, table)) if *of == wanted => entry_of(table, index),
            _ => {
                let table = self.read(wanted)?;
                let entry = entry_of(&table, index);
                self.table = Some((wanted, table));
                entry
            }
        };
        Ok((entry & PACKED != 0).then(|| self.place(entry)))
    }

    /// The L2 table with this place in the L1 table; nothing where there is none.
    fn read(&self, place: u64) -> io::Result<Vec<u8>> {
        if place >= self.l1_entries {
            return Ok(Vec::new());
        }
        let mut of_table = [0; 8];
        let entry = self.l1.checked_add(place * 8);
        let entry = entry.ok_or(io::ErrorKind::InvalidData)?;
        self.file.read_exact_at(&mut of_table, entry)?;
        let at = u64::from_be_bytes(of_table) & TABLE;
        let mut table = Vec::new();
        if at != 0 {
            table.resize(1 << self.kind.cluster_bits, 0);
            self.file.read_exact_at(&mut table, at)?;
        }
        Ok(table)
    }

    /// The offset is in the lower bits, however many the size of a cluster leaves it, and how many sectors of 512 bytes
    /// it goes on into is in those above.
    fn place(&self, entry: u64) -> Range<u64> {
        let bits = 62 - (self.kind.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1);
        let more = (entry & (PACKED - 1)) >> bits;
        offset..(offset / 512 + 1 + more) * 512
    }
}

/// The entry of an L2 table at this byte, 0 where the table has none.
fn entry_of(table: &[u8], at: u64) -> u64 {
    number::<8>(table, usize::try_from(at).unwrap_or(usize::MAX - 8))
}

/// The number in so many bytes at this place, the highest first.
fn number<const LENGTH: usize>(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..at + LENGTH).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}
