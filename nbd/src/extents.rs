//! The status of a range: extents of one metadata context, as a stream whose memory does not grow
//! with the range.

use std::collections::VecDeque;
use std::ops::Range;

use crate::client::{Client, PendingStatus};
use crate::error::Result;

/// The context of every server that knows any: which parts are holes, which read as zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";

const STATE_HOLE: u32 = 1 << 0;
const STATE_ZERO: u32 = 1 << 1;
const STATE_DIRTY: u32 = 1 << 0;

/// One request asks for the part of the range up to the next multiple of this, in bytes.
const WINDOW: u64 = 1 << 30;
/// So many windows are asked for at once.
const AHEAD: usize = 2;

/// The context of a dirty bitmap in QEMU (`docs/interop/nbd.txt`): `qemu:dirty-bitmap:NAME`.
#[must_use]
pub fn dirty_bitmap_context(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

/// A stretch of the export with one status. What the flags mean is the context's affair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never zero.
    pub length: u64,
    /// The status, as the server sent it.
    pub flags: u32,
}

impl Extent {
    /// Where the next one begins.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// In [`BASE_ALLOCATION`]: nothing is allocated here.
    #[must_use]
    pub fn is_hole(&self) -> bool {
        self.flags & STATE_HOLE != 0
    }

    /// In [`BASE_ALLOCATION`]: reads as zeroes. A hole need not.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.flags & STATE_ZERO != 0
    }

    /// In `qemu:dirty-bitmap:…`: written since the bitmap began. Written may mean zeroed.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.flags & STATE_DIRTY != 0
    }
}

/// The extents of a range, in order, from [`Client::extents`].
#[derive(Debug)]
pub struct ExtentStream {
    client: Client,
    context: u32,
    /// What has not been asked for.
    rest: Range<u64>,
    /// What a short answer left open: it comes before everything in `asked`.
    left: Range<u64>,
    asked: VecDeque<(Range<u64>, PendingStatus)>,
    ready: std::vec::IntoIter<Extent>,
    /// The extent that may still grow.
    current: Option<Extent>,
}

impl ExtentStream {
    pub(crate) fn new(client: Client, context: u32, range: Range<u64>) -> Self {
        Self {
            client,
            context,
            rest: range,
            left: 0..0,
            asked: VecDeque::new(),
            ready: Vec::new().into_iter(),
            current: None,
        }
    }

    /// The next extent, as long as it goes, or `None` at the end of the range. The extents are
    /// sorted and disjoint, cover the range, and neighbours differ in their flags.
    ///
    /// The future may be dropped and the call repeated: no extent is lost.
    ///
    /// # Errors
    /// [`Error::Server`](crate::Error::Server) and whatever ends the connection. The range has then
    /// not been covered; start anew.
    pub async fn next(&mut self) -> Result<Option<Extent>> {
        while let Some(piece) = self.next_piece().await? {
            match &mut self.current {
                Some(current) if current.flags == piece.flags => current.length += piece.length,
                Some(current) => return Ok(Some(std::mem::replace(current, piece))),
                None => self.current = Some(piece),
            }
        }
        Ok(self.current.take())
    }

    /// Another context's extents over the same connection.
    pub(crate) fn other(&self, context: &str, range: Range<u64>) -> Result<Self> {
        self.client.extents(context, range)
    }

    /// The next extent as far as it is known: a later one may continue it with the same flags.
    pub(crate) async fn next_piece(&mut self) -> Result<Option<Extent>> {
        loop {
            if let Some(extent) = self.ready.next() {
                return Ok(Some(extent));
            }
            self.ask().await?;
            let Some((range, status)) = self.asked.front_mut() else {
                return Ok(None);
            };
            let extents = status.wait().await?;
            let answered = extents.last().map_or(range.start, Extent::end);
            self.left = answered..range.end;
            self.asked.pop_front();
            self.ready = extents.into_iter();
        }
    }

    async fn ask(&mut self) -> Result<()> {
        if !self.left.is_empty() {
            let status = self.client.start_status(self.left.clone(), self.context).await?;
            self.asked.push_front((std::mem::take(&mut self.left), status));
        }
        while self.asked.len() < AHEAD && !self.rest.is_empty() {
            let end = self.rest.end.min((self.rest.start / WINDOW + 1) * WINDOW);
            let window = self.rest.start..end;
            let status = self.client.start_status(window.clone(), self.context).await?;
            self.asked.push_back((window, status));
            self.rest.start = end;
        }
        Ok(())
    }
}

/// The extents that a server's descriptors make from `at` on, within `range`, merged.
pub(crate) fn clipped(
    mut at: u64,
    descriptors: impl Iterator<Item = (u32, u32)>,
    range: &Range<u64>,
) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (length, flags) in descriptors {
        let end = at.saturating_add(u64::from(length));
        let (offset, within) = (at.max(range.start), end.min(range.end));
        at = end;
        if offset >= within {
            continue;
        }
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.length += within - offset,
            _ => extents.push(Extent {
                offset,
                length: within - offset,
                flags,
            }),
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn clipped_on_both_sides_and_merged() {
        let descriptors = [(10, 1), (5, 0), (5, 0), (20, 3)];
        let extents = clipped(100, descriptors.into_iter(), &(104..130));
        let extent = |offset, length, flags| Extent {
            offset,
            length,
            flags,
        };
        assert_eq!(
            extents,
            [extent(104, 6, 1), extent(110, 10, 0), extent(120, 10, 3)]
        );
    }

    proptest! {
        #[test]
        fn extents_are_in_order_and_within(
            at in 0..1000_u64,
            start in 0..1000_u64,
            length in 0..1000_u64,
            descriptors in proptest::collection::vec((1..50_u32, 0..3_u32), 0..60),
        ) {
            let range = start..start + length;
            let extents = clipped(at, descriptors.into_iter(), &range);
            prop_assert!(extents.iter().all(|e| e.length > 0 && e.offset >= start && e.end() <= range.end));
            for pair in extents.windows(2) {
                prop_assert!(pair[0].end() == pair[1].offset && pair[0].flags != pair[1].flags);
            }
        }
    }
}
