//! A door for a fuzz target: the pieces that a tree's items make. Not part of the interface.

use crate::differences::{Joining, differences};
use crate::extents::{Held, Piece, joined};

/// Takes the two halves of `data` as the items of a file in two snapshots, in any order and however damaged.
///
/// # Panics
/// If what differs is told out of order, or beyond the file.
pub fn differing(data: &[u8]) {
    const END: u64 = 1 << 20;
    let (earlier, later) = data.split_at(data.len() / 2);
    let [earlier, later] = [earlier, later].map(|half| joined(items(half), 0, END));
    let (mut joining, mut told) = (Joining::default(), Vec::new());
    for range in differences((&earlier, &later), (0, END)) {
        told.extend(joining.add(range));
    }
    told.extend(joining.end());
    let mut at = 0;
    for range in told {
        assert!(
            range.start >= at && range.start < range.end && range.end <= END,
            "{range:?} after {at}"
        );
        at = range.end;
    }
    assert!(
        differences((&earlier, &earlier), (0, END))
            .iter()
            .all(|range| unknown(&earlier, range))
    );
}

/// Whether a piece that is not known, or no piece at all, is at the beginning of the range.
fn unknown(pieces: &[Piece], range: &std::ops::Range<u64>) -> bool {
    let there = pieces.iter().find(|piece| piece.end > range.start);
    there.is_none_or(|piece| piece.held == Held::Unknown)
}

/// Eighteen bytes are an item: its kind, where it begins, how long it is.
fn items(data: &[u8]) -> Vec<Piece> {
    let item = |bytes: &[u8]| {
        let number = |at: usize| {
            bytes[at..at + 8]
                .iter()
                .fold(0, |n, byte| n << 8 | u64::from(*byte))
        };
        let (start, length) = (number(2), number(10));
        let held = match bytes[0] % 4 {
            0 => Held::Zeros,
            1 => Held::Inline(vec![bytes[1]]),
            2 => Held::Unknown,
            _ => Held::Stored {
                address: u64::from(bytes[1]),
                length,
                compression: 0,
                origin: start,
            },
        };
        Piece {
            start,
            end: start.saturating_add(length),
            held,
        }
    };
    data.chunks_exact(18).map(item).collect()
}
