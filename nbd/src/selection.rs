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
                *within = Some(Box::new(Allocation::new(extents, range, changed.units.unit)));
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
    units: Units,
    /// Up to where ranges were handed out.
    done: u64,
    /// The range that may still grow.
    held: Option<Range<u64>>,
    ready: VecDeque<Range<u64>>,
}

impl Changed {
    /// `dirty` covers `within`.
    pub(crate) fn new(dirty: ExtentStream, also: &[Range<u64>], within: Range<u64>, unit: u64) -> Self {
        let mut also = also.to_vec();
        also.sort_unstable_by_key(|range| range.start);
        Self {
            dirty,
            also,
            done: within.start,
            units: Units { unit, within },
            held: None,
            ready: VecDeque::new(),
        }
    }

    async fn next(&mut self) -> Result<Option<Range<u64>>> {
        loop {
            if let Some(range) = self.ready.pop_front() {
                return Ok(Some(range));
            }
            let Some(extent) = self.dirty.next_piece().await? else {
                return Ok(self.held.take());
            };
            let range = extent.offset..extent.end();
            if extent.is_dirty() {
                self.add(&range);
                continue;
            }
            for n in 0..self.also.len() {
                let also = &self.also[n];
                let common = also.start.max(range.start)..also.end.min(range.end);
                if !common.is_empty() {
                    self.add(&common);
                }
            }
        }
    }

    /// Takes a range that begins not before the ones taken earlier.
    fn add(&mut self, range: &Range<u64>) {
        let Range { start, end } = self.units.around(range);
        let start = start.max(self.done);
        if start >= end {
            return;
        }
        self.done = end;
        match &mut self.held {
            // What touches it begins where it ends, since nothing is handed out twice.
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
    units: Units,
    /// Up to where pieces were handed out.
    done: u64,
    /// Zeroes that come after what was handed out last.
    ready: Option<Piece>,
}

impl Allocation {
    /// `extents` covers `within`.
    fn new(extents: ExtentStream, within: Range<u64>, unit: u64) -> Self {
        Self {
            extents,
            done: within.start,
            units: Units { unit, within },
            ready: None,
        }
    }

    async fn next(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.ready.take() {
                return Ok(Some(piece));
            }
            let Some(extent) = self.extents.next_piece().await? else {
                let rest = self.units.within.end;
                return Ok(self.data_to(rest));
            };
            let range = extent.offset..extent.end();
            let piece = if extent.is_zero() {
                self.zeroes(&self.units.inside(&range))
            } else {
                self.data_to(self.units.up(range.end))
            };
            if piece.is_some() {
                return Ok(piece);
            }
        }
    }

    fn data_to(&mut self, end: u64) -> Option<Piece> {
        let range = self.done..end;
        if range.is_empty() {
            return None;
        }
        self.done = end;
        Some(Piece { range, zero: false })
    }

    /// These zeroes, or what lies before them.
    fn zeroes(&mut self, range: &Range<u64>) -> Option<Piece> {
        let range = range.start.max(self.done)..range.end;
        if range.is_empty() {
            return None;
        }
        let before = self.data_to(range.start);
        self.done = range.end;
        let zeroes = Some(Piece { range, zero: true });
        if before.is_none() {
            return zeroes;
        }
        self.ready = zeroes;
        before
    }
}
