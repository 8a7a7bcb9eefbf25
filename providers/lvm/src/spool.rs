//! Ranges put by until somebody asks for them: few in memory, many in a file without a name.
//!
//! So what they come from need not be kept as long as their reader takes. In it goes what comes in ascending order; what
//! touches is joined, and what lies beyond the disk's end is left out.

use std::io::{self, BufReader, Read, Seek, Write};
use std::ops::Range;
use std::path::Path;

use disksnap_core::{Error, Ranges, Result};
use futures_util::StreamExt;
use futures_util::stream::iter;
use tempfile::{SpooledTempFile, spooled_tempfile_in};

/// What is kept in memory: 64 Ki ranges.
const IN_MEMORY: usize = 1 << 20;

/// Ranges in bytes, being put by.
pub(crate) struct Spool {
    file: SpooledTempFile,
    count: u64,
    /// The last, which the next may touch.
    last: Option<Range<u64>>,
    /// Where the disk ends.
    end: u64,
}

impl Spool {
    /// For a disk of so many bytes; a file, should there be one, is in this directory.
    pub(crate) fn new(end: u64, dir: &Path) -> Self {
        Self {
            file: spooled_tempfile_in(IN_MEMORY, dir),
            count: 0,
            last: None,
            end,
        }
    }

    /// Puts one by. None begins before another that came earlier.
    pub(crate) fn push(&mut self, range: Range<u64>) -> Result<()> {
        let range = range.start..range.end.min(self.end);
        if range.is_empty() {
            return Ok(());
        }
        if let Some(last) = &mut self.last
            && range.start <= last.end
        {
            last.end = last.end.max(range.end);
            return Ok(());
        }
        self.write().map_err(failed)?;
        self.last = Some(range);
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        if let Some(last) = self.last.take() {
            self.file.write_all(&last.start.to_le_bytes())?;
            self.file.write_all(&last.end.to_le_bytes())?;
            self.count += 1;
        }
        Ok(())
    }

    /// All of them, as they went in.
    pub(crate) fn ranges(mut self) -> Result<Ranges> {
        self.write().map_err(failed)?;
        self.file.rewind().map_err(failed)?;
        let mut file = BufReader::new(self.file);
        let all = (0..self.count).map(move |_| read(&mut file).map_err(failed));
        Ok(iter(all).boxed())
    }
}

fn read(file: &mut impl Read) -> io::Result<Range<u64>> {
    let (mut start, mut end) = ([0; 8], [0; 8]);
    file.read_exact(&mut start)?;
    file.read_exact(&mut end)?;
    Ok(u64::from_le_bytes(start)..u64::from_le_bytes(end))
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot keep what has changed in a temporary file", error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    fn put_by(end: u64, ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(end, dir.path());
        ranges.into_iter().for_each(|range| spool.push(range).unwrap());
        let ranges = spool.ranges().unwrap();
        let all = futures_util::FutureExt::now_or_never(ranges.map(Result::unwrap).collect());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        all.unwrap()
    }

    #[test]
    fn what_touches_is_joined_and_the_end_is_kept() {
        assert_eq!(put_by(100, []), []);
        assert_eq!(put_by(100, [0..10, 10..20, 30..40]), [0..20, 30..40]);
        assert_eq!(put_by(100, [0..10, 90..110]), [0..10, 90..100]);
        assert_eq!(put_by(100, [0..9, 90..100, 100..110, 120..130]), [0..9, 90..100]);
    }

    #[test]
    fn more_than_memory_is_to_hold_is_kept_in_a_file() {
        let many: Vec<Range<u64>> = (0..200_000).map(|n| n * 10..n * 10 + 3).collect();
        assert_eq!(put_by(u64::MAX, many.clone()), many);
    }
}
