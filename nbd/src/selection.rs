//! What of an export is read, and which of it is known to be zero without reading: everything, or what has changed, in
//! whole units where that is asked for.

use std::collections::VecDeque;
use std::ops::Range;

use crate::client::Client;
use crate::error::Result;
use crate::extents::{BASE_ALLOCATION, ExtentStream};

/// A changed range shorter than this is read without asking where it is zero: one round trip instead of two.
const WORTH_ASKING: u64 = 256 << 10;
/// A changed range is handed out when it is this long, and not only when its end is known.
const LONG: u64 = 64 << 20;

/// A stretch that is to be read, or is known to be zero.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) range: Range<u64>,
    pub(crate) zero: bool,
}

/// The pieces of what is read: ascending and disjoint, beginning and ending at multiples of the unit, or where the range
/// does. The futures may be dropped: nothing is skipped.
#[derive(Debug)]
pub(crate) enum Selection {
    Whole(Range<u64>),
    Allocation(Allocation),
    Changed {
        changed: Changed,
        /// What is known of a long changed range.
        within: Option<Box<Allocation>>,
        /// To ask for it.
        allocation: bool,
    },
}

impl Selection {
    /// All of a range.
    pub(crate) fn whole(client: &Client, range: Range<u64>, unit: u64, allocation: bool) -> Result<Self> {
        Ok(if allocation {
            Self::Allocation(Allocation::new(
                client.extents(BASE_ALLOCATION, range.clone())?,
                range,
                unit,
            ))
        } else {
            Self::Whole(range)
        })
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Piece>> {
        match self {
            Self::Whole(range) if range.is_empty() => Ok(None),
            Self::Whole(range) => Ok(Some(Piece {
                range: std::mem::take(range),
                zero: false,
            })),
            Self::Allocation(allocation) => allocation.next().await,
            Self::Changed {
                changed,
                within,
                allocation,
            } => loop {
                if let Some(known) = within {
                    if let Some(piece) = known.next().await? {
                        return Ok(Some(piece));
                    }
                    *within = None;
                }
                let Some(range) = changed.next().await? else {
                    return Ok(None);
                };
                if !*allocation || range.end - range.start < WORTH_ASKING {
                    return Ok(Some(Piece { range, zero: false }));
                }
                let extents = changed.dirty.other(BASE_ALLOCATION, range.clone())?;
                *within = Some(Box::new(Allocation::new(
                    extents,
                    range,
                    changed.rounded.units.unit,
                )));
            },
        }
    }
}

/// Units within a range: all have one length, but the first and the last may be cut by the range's ends.
#[derive(Debug)]
struct Units {
    unit: u64,
    within: Range<u64>,
}

impl Units {
    fn down(&self, at: u64) -> u64 {
        (at / self.unit * self.unit).max(self.within.start)
    }

    fn up(&self, at: u64) -> u64 {
        let up = at.checked_next_multiple_of(self.unit).unwrap_or(u64::MAX);
        up.min(self.within.end)
    }

    /// Every unit that the range touches.
    fn around(&self, range: &Range<u64>) -> Range<u64> {
        self.down(range.start)..self.up(range.end)
    }

    /// The units that lie wholly in the range; empty if there is none.
    fn inside(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end == self.within.end {
            range.end
        } else {
            self.down(range.end)
        };
        let start = if range.start == self.within.start {
            range.start
        } else {
            self.up(range.start)
        };
        start..end.max(start)
    }
}

/// The ranges that have changed, and those that are to be read as if they had.
#[derive(Debug)]
pub(crate) struct Changed {
    dirty: ExtentStream,
    also: Vec<Range<u64>>,
    rounded: Rounded,
}

impl Changed {
    /// `dirty` covers `within`.
    pub(crate) fn new(dirty: ExtentStream, also: &[Range<u64>], within: Range<u64>, unit: u64) -> Self {
        let mut also = also.to_vec();
        also.sort_unstable_by_key(|range| range.start);
        Self {
            dirty,
            also,
            rounded: Rounded::new(Units { unit, within }),
        }
    }

    async fn next(&mut self) -> Result<Option<Range<u64>>> {
        loop {
            if let Some(range) = self.rounded.ready.pop_front() {
                return Ok(Some(range));
            }
            let Some(extent) = self.dirty.next_piece().await? else {
                return Ok(self.rounded.held.take());
            };
            let range = extent.offset..extent.end();
            if extent.is_dirty() {
                self.rounded.add(&range);
            } else {
                self.rounded.add_common(&self.also, &range);
            }
        }
    }
}

/// Ranges that are added in ascending order, as units: each unit once, neighbours in one range.
#[derive(Debug)]
struct Rounded {
    units: Units,
    /// Up to where ranges were taken.
    done: u64,
    /// The range that may still grow.
    held: Option<Range<u64>>,
    ready: VecDeque<Range<u64>>,
}

impl Rounded {
    fn new(units: Units) -> Self {
        Self {
            done: units.within.start,
            units,
            held: None,
            ready: VecDeque::new(),
        }
    }

    /// What of the ranges, which are sorted by where they begin, lies in the other.
    fn add_common(&mut self, ranges: &[Range<u64>], other: &Range<u64>) {
        for range in ranges {
            let common = range.start.max(other.start)..range.end.min(other.end);
            if !common.is_empty() {
                self.add(&common);
            }
        }
    }

    fn add(&mut self, range: &Range<u64>) {
        let Range { start, end } = self.units.around(range);
        let start = start.max(self.done);
        if start >= end {
            return;
        }
        self.done = end;
        match &mut self.held {
            // What touches it begins where it ends, since no unit is taken twice.
            Some(held) if held.end == start => held.end = end,
            held => self.ready.extend(held.replace(start..end)),
        }
        if self
            .held
            .as_ref()
            .is_some_and(|held| held.end - held.start >= LONG)
        {
            self.ready.extend(self.held.take());
        }
    }
}

/// What is known of a range: which units are zero, and which are to be read.
#[derive(Debug)]
pub(crate) struct Allocation {
    extents: ExtentStream,
    known: Known,
}

impl Allocation {
    /// `extents` covers `within`.
    fn new(extents: ExtentStream, within: Range<u64>, unit: u64) -> Self {
        let known = Known::new(Units { unit, within });
        Self { extents, known }
    }

    async fn next(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.known.ready.take() {
                return Ok(Some(piece));
            }
            let Some(extent) = self.extents.next_piece().await? else {
                return Ok(self.known.rest());
            };
            let piece = self.known.add(&(extent.offset..extent.end()), extent.is_zero());
            if piece.is_some() {
                return Ok(piece);
            }
        }
    }
}

/// Extents that cover a range and are added in order, as units: zero where all of the unit is.
#[derive(Debug)]
struct Known {
    units: Units,
    /// Up to where pieces were handed out.
    done: u64,
    /// Zeroes that come after what was handed out last.
    ready: Option<Piece>,
}

impl Known {
    fn new(units: Units) -> Self {
        Self {
            done: units.within.start,
            units,
            ready: None,
        }
    }

    /// The piece that is known now; [`Known::ready`] comes after it.
    fn add(&mut self, range: &Range<u64>, zero: bool) -> Option<Piece> {
        if !zero {
            return self.data_to(self.units.up(range.end));
        }
        let zeroes = self.units.inside(range);
        let zeroes = zeroes.start.max(self.done)..zeroes.end;
        if zeroes.is_empty() {
            return None;
        }
        let before = self.data_to(zeroes.start);
        self.done = zeroes.end;
        let zeroes = Some(Piece {
            range: zeroes,
            zero: true,
        });
        if before.is_none() {
            return zeroes;
        }
        self.ready = zeroes;
        before
    }

    /// What was too little to be told as zero.
    fn rest(&mut self) -> Option<Piece> {
        self.data_to(self.units.within.end)
    }

    fn data_to(&mut self, end: u64) -> Option<Piece> {
        let range = self.done..end;
        if range.is_empty() {
            return None;
        }
        self.done = end;
        Some(Piece { range, zero: false })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Extents of these lengths from `start` on, and the units within what they cover.
    fn covered(start: u64, lengths: &[(u64, bool)], unit: u64) -> (Vec<(Range<u64>, bool)>, Units) {
        let mut at = start;
        let extents = lengths.iter().map(|(length, flag)| {
            at += length;
            (at - length..at, *flag)
        });
        let extents: Vec<_> = extents.collect();
        let within = start..at;
        (extents, Units { unit, within })
    }

    /// Whether a range begins and ends where units do.
    fn is_whole(units: &Units, range: &Range<u64>) -> bool {
        units.around(range) == *range && !range.is_empty()
    }

    fn lengths() -> impl Strategy<Value = Vec<(u64, bool)>> {
        proptest::collection::vec((1..40_u64, any::<bool>()), 1..40)
    }

    proptest! {
        #[test]
        fn exactly_the_units_that_changed(
            start in 0..50_u64,
            lengths in lengths(),
            unit in 1..20_u64,
            also in proptest::collection::vec((0..900_u64, 0..100_u64), 0..4),
        ) {
            let (extents, units) = covered(start, &lengths, unit);
            let mut also: Vec<Range<u64>> = also.iter().map(|(at, length)| *at..at + length).collect();
            also.sort_unstable_by_key(|range| range.start);
            let within = units.within.clone();
            let touched = |at: u64| {
                let one = units.around(&(at..at + 1));
                let meets = |range: &Range<u64>| range.start < one.end && one.start < range.end && !range.is_empty();
                extents.iter().any(|(range, dirty)| *dirty && meets(range)) || also.iter().any(meets)
            };
            let wanted: Vec<u64> = within.clone().filter(|at| touched(*at)).collect();
            let mut rounded = Rounded::new(Units { unit, within });
            for (range, dirty) in &extents {
                if *dirty {
                    rounded.add(range);
                } else {
                    rounded.add_common(&also, range);
                }
            }
            let mut found: Vec<Range<u64>> = rounded.ready.into();
            found.extend(rounded.held);
            prop_assert!(found.iter().all(|range| is_whole(&units, range)));
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(found.into_iter().flatten().collect::<Vec<u64>>(), wanted);
        }

        #[test]
        fn zero_is_what_is_zero_all_through_and_nothing_is_left_out(
            start in 0..50_u64,
            lengths in lengths(),
            unit in 1..20_u64,
        ) {
            let (extents, units) = covered(start, &lengths, unit);
            let mut known = Known::new(Units { unit, within: units.within.clone() });
            let mut found = Vec::new();
            for (range, zero) in &extents {
                found.extend(known.add(range, *zero));
                found.extend(known.ready.take());
            }
            found.extend(known.rest());
            let mut at = start;
            for piece in &found {
                prop_assert_eq!(piece.range.start, at);
                prop_assert!(is_whole(&units, &piece.range), "{:?}", piece);
                at = piece.range.end;
                let overlap = |range: &Range<u64>| range.start < piece.range.end && piece.range.start < range.end;
                prop_assert!(!piece.zero || extents.iter().all(|(range, zero)| *zero || !overlap(range)));
            }
            prop_assert_eq!(at, units.within.end);
            // A unit within one extent of zeroes is never read.
            for piece in found.iter().filter(|piece| !piece.zero) {
                for at in piece.range.clone().filter(|at| at % unit == 0) {
                    let one = units.around(&(at..at + 1));
                    let within = |range: &Range<u64>| range.start <= one.start && one.end <= range.end;
                    prop_assert!(!extents.iter().any(|(range, zero)| *zero && within(range)), "{one:?}");
                }
            }
        }
    }
}
