//! Where two files differ that share extents: pure, from the pieces that they lie in.

use std::ops::Range;

use crate::extents::Piece;

/// Where two files may differ between `from` and `to`, both of which have pieces for all of that.
///
/// Elsewhere they are the same: both hold zeros there, or the same part of the same extent.
pub(crate) fn differences((earlier, later): (&[Piece], &[Piece]), (from, to): (u64, u64)) -> Vec<Range<u64>> {
    let (mut earlier, mut later) = (earlier.iter().peekable(), later.iter().peekable());
    let (mut found, mut at) = (Vec::new(), from);
    while at < to {
        while earlier.next_if(|piece| piece.end <= at).is_some() {}
        while later.next_if(|piece| piece.end <= at).is_some() {}
        let (Some(was), Some(is)) = (earlier.peek(), later.peek()) else {
            found.push(at..to);
            break;
        };
        let end = was.end.min(is.end).min(to);
        if !was.held.same_as(&is.held) {
            found.push(at..end);
        }
        at = end;
    }
    found
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

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init, reason = "what is told may be one range")]
    use super::*;
    use crate::extents::Held;

    fn stored(address: u64, origin: u64) -> Held {
        Held::Stored {
            address,
            length: 1 << 17,
            compression: 1,
            origin,
        }
    }

    fn pieces<const N: usize>(all: [(u64, Held); N]) -> Vec<Piece> {
        let mut start = 0;
        let piece = |(end, held)| Piece {
            start: std::mem::replace(&mut start, end),
            end,
            held,
        };
        all.into_iter().map(piece).collect()
    }

    fn differ(earlier: &[Piece], later: &[Piece]) -> Vec<Range<u64>> {
        differences((earlier, later), (0, 100))
    }

    #[test]
    fn the_same_part_of_an_extent_is_the_same_however_it_is_cut() {
        let whole = pieces([(100, stored(7, 0))]);
        let cut = pieces([(10, stored(7, 0)), (90, stored(7, 0)), (100, stored(7, 0))]);
        assert_eq!(differ(&whole, &cut), []);
        let hole = pieces([(10, stored(7, 0)), (90, Held::Zeros), (100, stored(7, 0))]);
        assert_eq!(differ(&cut, &hole), [10..90]);
        assert_eq!(differ(&hole, &whole), [10..90]);
    }

    #[test]
    fn another_part_of_the_same_extent_is_a_difference() {
        let (one, other) = (pieces([(100, stored(7, 0))]), pieces([(100, stored(7, 50))]));
        assert_eq!(differ(&one, &other), [0..100]);
        assert_eq!(differ(&one, &pieces([(100, stored(8, 0))])), [0..100]);
    }

    #[test]
    fn what_is_not_known_is_a_difference() {
        let unknown = pieces([(100, Held::Unknown)]);
        assert_eq!(differ(&unknown, &unknown), [0..100]);
        assert_eq!(differ(&unknown, &[]), [0..100]);
        assert_eq!(
            differ(&pieces([(40, Held::Zeros)]), &pieces([(100, Held::Zeros)])),
            [40..100]
        );
    }

    #[test]
    fn ranges_that_touch_are_one() {
        let mut joining = Joining::default();
        let told: Vec<_> = [0..2, 2..4, 5..5, 6..7, 7..9]
            .map(|range| joining.add(range))
            .into();
        assert_eq!(told, [None, None, None, Some(0..4), None]);
        assert_eq!(joining.end(), Some(6..9));
    }
}
