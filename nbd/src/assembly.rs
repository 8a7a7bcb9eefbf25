//! The pieces of one read's reply, put together: pure bookkeeping, no I/O.
//!
//! A server may answer a read with many chunks in any order. They must cover the request exactly
//! once, which is checked before a byte of a chunk is taken.

use std::collections::BTreeMap;

use bytes::BytesMut;

use crate::wire::{Checked, violation};

/// Pieces that lie apart from what came before them. A server that sends its chunks in order needs
/// none; one that sends them in the worst order in sectors needs as many as 64 KiB have sectors, …
const MIN_FRAGMENTS: usize = 128;

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadData {
    /// The server called the whole range a hole: it reads as zeroes.
    Hole,
    /// The bytes.
    Bytes(BytesMut),
}

/// A read's reply in the making.
#[derive(Debug)]
pub(crate) struct Assembly {
    offset: u64,
    length: usize,
    /// From the start of the request; bytes not yet delivered are zero. It ends with the furthest
    /// data so far, so that trailing holes cost nothing until the end.
    buffer: BytesMut,
    /// So many bytes from the start are accounted for.
    filled: usize,
    /// What is accounted for further on: start to end, disjoint, none touching another or `filled`.
    ahead: BTreeMap<usize, usize>,
}

impl Assembly {
    pub(crate) fn new(offset: u64, length: u32) -> Self {
        let length = length as usize;
        Self {
            offset,
            length,
            buffer: BytesMut::new(),
            filled: 0,
            ahead: BTreeMap::new(),
        }
    }

    /// Accounts for a piece of data and makes room for it: `length` bytes belong at the returned index
    /// of [`Self::buffer`], which is its end unless the server sends pieces out of order.
    pub(crate) fn data(&mut self, offset: u64, length: usize) -> Checked<usize> {
        let start = self.account(offset, length)?;
        if self.buffer.capacity() == 0 {
            self.buffer.reserve(self.length);
        }
        if start > self.buffer.len() {
            self.buffer.resize(start, 0);
        }
        Ok(start)
    }

    /// Accounts for a hole.
    pub(crate) fn hole(&mut self, offset: u64, length: usize) -> Checked<()> {
        self.account(offset, length).map(|_| ())
    }

    /// Where the data goes, of which [`Self::data`] spoke.
    pub(crate) fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The whole, if nothing is missing.
    pub(crate) fn finish(mut self) -> Checked<ReadData> {
        if self.filled != self.length {
            return violation(format!(
                "it ends the answer to a read of {} bytes at {} with bytes missing from {} on",
                self.length,
                self.offset,
                self.offset + self.filled as u64
            ));
        }
        if self.buffer.is_empty() {
            return Ok(ReadData::Hole);
        }
        self.buffer.resize(self.length, 0);
        Ok(ReadData::Bytes(self.buffer))
    }

    fn account(&mut self, offset: u64, length: usize) -> Checked<usize> {
        let start = offset
            .checked_sub(self.offset)
            .and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(length));
        let (Some(start), Some(end)) = (start, end) else {
            return violation(format!("data at {offset} for a read at {}", self.offset));
        };
        if length == 0 || end > self.length {
            return violation(format!(
                "{length} bytes at {offset} for a read of {} bytes at {}",
                self.length, self.offset
            ));
        }
        let before = self.ahead.range(..end).next_back();
        if start < self.filled || before.is_some_and(|(_, &before_end)| before_end > start) {
            return violation(format!("bytes at {offset} that it has sent before"));
        }
        self.mark(start, end)?;
        Ok(start)
    }

    fn mark(&mut self, mut start: usize, mut end: usize) -> Checked<()> {
        if let Some(next_end) = self.ahead.remove(&end) {
            end = next_end;
        }
        if start == self.filled {
            self.filled = end;
            return Ok(());
        }
        if let Some((&previous, _)) = self
            .ahead
            .range(..start)
            .next_back()
            .filter(|(_, e)| **e == start)
        {
            start = previous;
        }
        self.ahead.insert(start, end);
        if self.ahead.len() > MIN_FRAGMENTS + self.length / 512 {
            return violation("it scatters the answer to a read over too many pieces");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use proptest::prelude::*;

    use super::*;

    fn put(assembly: &mut Assembly, offset: u64, bytes: &[u8]) -> Checked<()> {
        let at = assembly.data(offset, bytes.len())?;
        let buffer = assembly.buffer();
        if at == buffer.len() {
            buffer.extend_from_slice(bytes);
        } else {
            buffer[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    #[test]
    fn a_hole_is_told_from_zero_bytes() {
        let mut hole = Assembly::new(100, 10);
        hole.hole(105, 5).unwrap();
        hole.hole(100, 5).unwrap();
        assert_eq!(hole.finish(), Ok(ReadData::Hole));
        let mut half = Assembly::new(100, 4);
        put(&mut half, 100, b"ab").unwrap();
        half.hole(102, 2).unwrap();
        assert_eq!(half.finish(), Ok(ReadData::Bytes(BytesMut::from(&b"ab\0\0"[..]))));
    }

    #[test]
    fn lies_are_refused() {
        let started = || {
            let mut assembly = Assembly::new(100, 10);
            put(&mut assembly, 104, b"xx").unwrap();
            assembly
        };
        for (offset, length) in [
            (99, 2),
            (0, 1),
            (109, 2),
            (100, 11),
            (103, 2),
            (105, 1),
            (104, 2),
            (101, 8),
            (u64::MAX, 1),
            (100, 0),
        ] {
            assert!(
                started().data(offset, length).is_err(),
                "{length} bytes at {offset}"
            );
        }
        assert!(started().finish().is_err());
        let mut scattered = Assembly::new(0, 1 << 16);
        let result = (0..1 << 15).try_for_each(|i| scattered.hole(2 * i + 1, 1));
        assert!(result.unwrap_err().0.contains("too many pieces"));
    }

    proptest! {
        /// Whatever the cuts, their order and kinds: the result is the original.
        #[test]
        fn any_order(
            pieces in proptest::collection::vec((1_usize..9, any::<bool>(), any::<u8>()), 1..40),
            seed: u64,
        ) {
            let mut expected = Vec::new();
            let mut chunks = Vec::new();
            for (length, hole, byte) in pieces {
                let at = 1000 + expected.len() as u64;
                expected.extend(vec![if hole { 0 } else { byte }; length]);
                chunks.push((at, length, hole, byte));
            }
            chunks.sort_by_key(|(at, ..)| at.wrapping_mul(seed | 1).rotate_left(17));
            let mut assembly = Assembly::new(1000, u32::try_from(expected.len()).unwrap());
            let all_holes = chunks.iter().all(|(_, _, hole, _)| *hole);
            for (at, length, hole, byte) in chunks {
                if hole {
                    assembly.hole(at, length).unwrap();
                } else {
                    put(&mut assembly, at, &vec![byte; length]).unwrap();
                }
            }
            match assembly.finish().unwrap() {
                ReadData::Hole => prop_assert!(all_holes),
                ReadData::Bytes(bytes) => prop_assert_eq!(&bytes[..], &expected[..]),
            }
        }
    }
}
