//! Writing data of which blocks of zeroes are to become holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Runs of zeroes of this length and alignment, in bytes, become holes.
const BLOCK: usize = 4096;

/// Writes `data` at `offset` of a file that holds nothing there yet, leaving out blocks of zeroes, counted from the data's start.
/// The file's length is the caller's affair.
///
/// # Errors
/// What writing meets.
pub fn write_sparse(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut at = 0;
    while at < data.len() {
        let zero = is_zero(block(data, at));
        let mut end = at;
        while end < data.len() && is_zero(block(data, end)) == zero {
            end += block(data, end).len();
        }
        if !zero {
            file.write_all_at(&data[at..end], offset + at as u64)?;
        }
        at = end;
    }
    Ok(())
}

fn block(data: &[u8], at: usize) -> &[u8] {
    &data[at..data.len().min(at + BLOCK)]
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}
