//! Where two files differ that share extents: pure, from the pieces that they lie in.

use std::ops::Range;

use crate::extents::Piece;

/// Tells where two files may differ between `from` and `to`, both of which have pieces for all of that.
///
/// What it does not tell is the same in both: both hold zeros there, or the same part of the same extent.
pub(crate) fn differences(
    (earlier, later): (&[Piece], &[Piece]),
    (from, to): (u64, u64),
    mut tell: impl FnMut(Range<u64>),
) {
    let (mut earlier, mut later) = (earlier.iter().peekable(), later.iter().peekable());
    let mut at = from;
    while at < to {
        while earlier.next_if(|piece| piece.end <= at).is_some() {}
        while later.next_if(|piece| piece.end <= at).is_some() {}
        let (Some(was), Some(is)) = (earlier.peek(), later.peek()) else {
            return tell(at..to);
        };
        let end = was.end.min(is.end).min(to);
        if !was.held.same_as(&is.held) {
            tell(at..end);
        }
        at = end;
    }
}

/// Makes one range of those that touch.
#[derive(Debug, Default)]
pub(crate) struct Joining(Option<Range<u64>>);

impl Joining {
    /// Takes the next range; gives the one before it, where nothing more will touch that.
    pub(crate) fn add(&mut self, next: Range<u64>) -> Option<Range<u64>> {
        match &mut self.0 {
            _ if next.is_empty() => None,
            Some(last) if next.start <= last.end => {
                last.end = last.end.max(next.end);
                None
            }
            last => last.replace(next),
        }
    }

    /// The last one.
    pub(crate) fn end(self) -> Option<Range<u64>> {
        self.0
    }
}
