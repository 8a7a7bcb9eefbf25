//! A qcow2 image of an empty disk with one dirty bitmap in it (QEMU's `docs/interop/qcow2.txt`, "Bitmaps"): how a QEMU is
//! told at once which blocks of a disk changed. It has no command that does, and takes one range after another only as
//! writes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::write_empty_qcow2;

/// As the empty image has them.
const CLUSTER: u64 = 1 << 16;
/// Words of a bitmap in a cluster.
const WORDS: usize = (1 << 16) / 8;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
/// Where the header ends, and its extensions begin.
const HEADER: u64 = 104;
/// Where the autoclear features are.
const AUTOCLEAR: u64 = 88;
/// The extension that tells of bitmaps, and the feature that says it is to be believed.
const BITMAPS: u32 = 0x2385_2875;
const BITMAPS_HOLD: u64 = 1;
/// A bitmap of this type is one of dirty blocks.
const DIRTY: u8 = 1;
/// The longest name that QEMU takes.
const LONGEST_NAME: usize = 1023;

/// The finest blocks that changes are kept in, and how many there are at most.
const FINEST: u64 = 4096;
const MOST: u64 = 1 << 26;

/// Which blocks of a disk changed: a bit for each, in at most 8 MiB of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedBlocks {
    size: u64,
    granularity: u64,
    /// Whole words, as QEMU counts them; the first block is the lowest bit.
    words: Vec<u64>,
}

impl ChangedBlocks {
    /// None of a disk of `size` bytes, rounded up to whole sectors as QEMU does. Blocks have 4 KiB, and more where there
    /// would be more than 2²⁶ of them.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let size = size.next_multiple_of(512);
        let mut granularity = FINEST;
        while size.div_ceil(granularity) > MOST {
            granularity *= 2;
        }
        let words = size.div_ceil(granularity).div_ceil(64);
        let words = vec![0; usize::try_from(words).unwrap_or_default()];
        Self {
            size,
            granularity,
            words,
        }
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of a block in bytes: a power of two.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// All blocks that a range touches, as far as it lies on the disk.
    pub fn mark(&mut self, range: &Range<u64>) {
        let end = range.end.min(self.size);
        if range.start >= end {
            return;
        }
        let (first, last) = (range.start / self.granularity, (end - 1) / self.granularity);
        let word = |block: u64| usize::try_from(block / 64).unwrap_or(usize::MAX);
        let from_first = u64::MAX << (first % 64);
        let to_last = u64::MAX >> (63 - last % 64);
        let words = &mut self.words[word(first)..=word(last)];
        match words {
            [] => {}
            [only] => *only |= from_first & to_last,
            [one, between @ .., other] => {
                *one |= from_first;
                between.fill(u64::MAX);
                *other |= to_last;
            }
        }
    }
}

/// Makes an empty file an image of a disk that is all zeroes, with these blocks in a bitmap of this name, which does not
/// record: what opens the image read-only can export the bitmap, or merge it into another.
///
/// # Errors
/// `InvalidInput` where the disk is larger than such an image can be (2 PiB) or the name is longer than 1023 bytes; the
/// operating system's.
pub fn write_bitmap_qcow2(file: &File, name: &str, blocks: &ChangedBlocks) -> io::Result<()> {
    if name.is_empty() || name.len() > LONGEST_NAME {
        let what = "a dirty bitmap's name has from 1 to 1023 bytes";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    write_empty_qcow2(file, blocks.size, None)?;
    let first = file.metadata()?.len().div_ceil(CLUSTER);
    let mut next = first;
    let mut put = |bytes: &[u8]| -> io::Result<u64> {
        let at = next * CLUSTER;
        next += (bytes.len() as u64).div_ceil(CLUSTER);
        file.write_all_at(bytes, at)?;
        // QEMU reads whole clusters.
        file.set_len(next * CLUSTER)?;
        Ok(at)
    };
    let mut table = Vec::new();
    for words in blocks.words.chunks(WORDS) {
        let dirty = words.iter().any(|word| *word != 0);
        let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let at = if dirty { put(&bits)? } else { 0 };
        table.extend(at.to_be_bytes());
    }
    let table_at = put(&table)?;
    let directory = entry(name, blocks, table_at, table.len() / 8);
    let directory_at = put(&directory)?;
    let counts: Vec<u8> = (first..next).flat_map(|_| 1_u16.to_be_bytes()).collect();
    file.write_all_at(&counts, REFCOUNT_BLOCK + first * 2)?;
    file.write_all_at(&extension(directory_at, directory.len()), HEADER)?;
    file.write_all_at(&BITMAPS_HOLD.to_be_bytes(), AUTOCLEAR)
}

/// The one entry of the directory. None of its flags are set: it is not in use, and does not go on recording.
fn entry(name: &str, blocks: &ChangedBlocks, table: u64, entries: usize) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend(table.to_be_bytes());
    entry.extend(number(entries));
    entry.extend([0; 4]);
    entry.extend([DIRTY, blocks.granularity.ilog2().to_be_bytes()[3]]);
    entry.extend(&number(name.len())[2..]);
    entry.extend([0; 4]);
    entry.extend(name.as_bytes());
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

fn extension(directory: u64, length: usize) -> Vec<u8> {
    let mut extension = Vec::new();
    for number in [BITMAPS, 24, 1, 0] {
        extension.extend(number.to_be_bytes());
    }
    extension.extend((length as u64).to_be_bytes());
    extension.extend(directory.to_be_bytes());
    extension
}

/// A number that is known to be small.
fn number(number: usize) -> [u8; 4] {
    u32::try_from(number).unwrap_or_default().to_be_bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::process::Command;

    use disksnap_test_support::{QemuVersion, need};
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn blocks_are_as_fine_as_8_mib_allow() {
        for (size, granularity) in [
            (0, 4096),
            (1 << 38, 4096),
            ((1 << 38) + 1, 8192),
            (1 << 40, 16 << 10),
            (1 << 51, 32 << 20),
        ] {
            let blocks = ChangedBlocks::new(size);
            assert_eq!(blocks.granularity(), granularity);
            assert!(blocks.words.len() <= 1 << 20);
        }
    }

    proptest! {
        #[test]
        fn what_a_range_touches_is_marked_and_nothing_else(
            size in 1_u64..3_000_000, ranges in proptest::collection::vec((0_u64..4_000_000, 0_u64..600_000), 0..5)
        ) {
            let mut blocks = ChangedBlocks::new(size);
            let ranges: Vec<_> = ranges.into_iter().map(|(at, length)| at..at + length).collect();
            for range in &ranges {
                blocks.mark(range);
            }
            for block in 0..blocks.words.len() as u64 * 64 {
                let marked = blocks.words[usize::try_from(block / 64).unwrap()] >> (block % 64) & 1 == 1;
                let (start, end) = (block * 4096, (block * 4096 + 4096).min(blocks.size()));
                let touched = ranges.iter().any(|range| range.start.max(start) < range.end.min(end));
                prop_assert_eq!(marked, touched, "block {}", block);
            }
        }
    }

    /// What QEMU says of such an image.
    fn qemu_likes_it(version: QemuVersion) {
        let dir = tempfile::tempdir().unwrap();
        for size in [512, 4096, (1 << 20) + 512, (2 << 30) + 512, 1 << 40, 1 << 51] {
            let path = dir.path().join(format!("{size}.qcow2"));
            let mut blocks = ChangedBlocks::new(size);
            blocks.mark(&(0..1));
            blocks.mark(&(size / 2..size));
            write_bitmap_qcow2(&File::create(&path).unwrap(), "changed", &blocks).unwrap();
            for what in ["check", "info"] {
                let mut command = Command::new(version.program("qemu-img"));
                command.args([what, "-f", "qcow2", "--output=json"]).arg(&path);
                let output = command.output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{what} {size}: {said}");
                let told: Value = serde_json::from_slice(&output.stdout).unwrap();
                if what == "info" {
                    let bitmap = &told["format-specific"]["data"]["bitmaps"][0];
                    assert_eq!(told["virtual-size"], size);
                    assert_eq!(bitmap["name"], "changed");
                    assert_eq!(bitmap["granularity"], blocks.granularity());
                    assert_eq!(bitmap["flags"].as_array().map(Vec::len), Some(0), "{bitmap}");
                }
            }
        }
    }

    #[test]
    fn qemu_finds_it_sound() {
        qemu_likes_it(QemuVersion::V10_0);
    }

    #[test]
    fn so_does_the_old_qemu() {
        need!("qemu-7.2");
        qemu_likes_it(QemuVersion::V7_2);
    }

    #[test]
    fn names_that_no_bitmap_has_are_refused() {
        let file = tempfile::tempfile().unwrap();
        for name in [String::new(), "n".repeat(1024)] {
            let refused = write_bitmap_qcow2(&file, &name, &ChangedBlocks::new(4096)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
        write_bitmap_qcow2(&file, &"n".repeat(1023), &ChangedBlocks::new(4096)).unwrap();
    }
}
