//! A look at what is told to be unchanged: whether a disk is the one that the last point was taken of.
//!
//! Bitmaps are called as their checkpoint is, whatever disk they are on, and record only what goes through their image.
//! A disk that has changed places with another, or was written past its bitmaps, tells changes that are not all there are. So some
//! places that are told to be unchanged are read and compared with the digests of the last point, before an increment is
//! made over it.

use std::ops::Range;

use disksnap::{ChangeStream, Result};
use uuid::Uuid;

use crate::chain::open_digests;
use crate::digests::{Has, Span, digest};
use crate::source::Source;
use crate::{CHUNK, Digest, Layer, Store};

/// So many places with data are looked at, and so many that are zero.
const DATA: usize = 64;
const ZERO: usize = 16;

/// Some unchanged chunks, each as likely as any other, and what the last point has there.
#[derive(Debug)]
struct Sample {
    most: usize,
    seen: u64,
    chosen: Vec<(u64, Digest)>,
}

/// How many of the places that were looked at differ from the last point, and how many were looked at.
pub(crate) async fn differing(store: &dyn Store, last: &[Layer], source: &Source) -> Result<(usize, usize)> {
    let Some(newest) = last.first() else {
        return Ok((0, 0));
    };
    // The chunk that either disk ends in is not the same where their sizes differ.
    let end = newest.size.min(source.size()) / CHUNK;
    let (data, zero) = samples(store, last, source.changes()?, end).await?;
    let (mut differ, mut looked) = (0, 0);
    for (chunk, was) in data.chosen.iter().chain(&zero.chosen) {
        let is = Digest::of(&source.read_at(chunk * CHUNK).await?);
        differ += usize::from(is != *was);
        looked += 1;
    }
    Ok((differ, looked))
}

/// Samples of the chunks before `end` that are not told as changed: of those with data, and of zeroes.
async fn samples(
    store: &dyn Store,
    last: &[Layer],
    changes: ChangeStream,
    end: u64,
) -> Result<(Sample, Sample)> {
    let mut overlay = open_digests(store, last).await?;
    let mut changed = Changed::new(changes);
    let mut random = Random::new();
    let (mut data, mut zero) = (Sample::new(DATA), Sample::new(ZERO));
    let nothing = Digest::of_zeroes(CHUNK);
    while let Some(Span {
        first,
        count,
        has,
        visible,
    }) = overlay.next().await?
    {
        let until = (first + count).min(end);
        let mut at = first;
        while at < until && visible.is_none() {
            let gap = changed.next_gap(at, until).await?;
            for chunk in gap.clone() {
                match &has {
                    Has::Data(_, digests) => {
                        data.offer(&mut random, chunk, || digest(digests, chunk - first));
                    }
                    Has::Zero(_) => zero.offer(&mut random, chunk, || nothing),
                    Has::Nobody | Has::Behind(_) => break,
                }
            }
            at = gap.end.max(at + 1);
        }
    }
    Ok((data, zero))
}

impl Sample {
    fn new(most: usize) -> Self {
        Self {
            most,
            seen: 0,
            chosen: Vec::new(),
        }
    }

    /// Reservoir sampling: one pass, each as likely as any other.
    fn offer(&mut self, random: &mut Random, chunk: u64, was: impl FnOnce() -> Digest) {
        self.seen += 1;
        if self.chosen.len() < self.most {
            self.chosen.push((chunk, was()));
        } else if let Some(place) = usize::try_from(random.below(self.seen))
            .ok()
            .and_then(|n| self.chosen.get_mut(n))
        {
            *place = (chunk, was());
        }
    }
}

/// The chunks that are told as changed, read along.
struct Changed {
    stream: ChangeStream,
    now: Option<Range<u64>>,
    ended: bool,
}

impl Changed {
    fn new(stream: ChangeStream) -> Self {
        Self {
            stream,
            now: None,
            ended: false,
        }
    }

    /// The next chunks from `at` on, and before `until`, that are not told as changed; empty at `until` if there are none.
    async fn next_gap(&mut self, mut at: u64, until: u64) -> Result<Range<u64>> {
        // What reaches past `until` is kept for the next call.
        while at < until {
            while !self.ended && self.now.as_ref().is_none_or(|now| now.end <= at) {
                match self.stream.next().await? {
                    None => (self.now, self.ended) = (None, true),
                    Some(extent) => {
                        let end = (extent.offset + extent.length).div_ceil(CHUNK);
                        self.now = Some(extent.offset / CHUNK..end);
                    }
                }
            }
            match &self.now {
                Some(now) if now.start <= at => at = now.end,
                Some(now) => return Ok(at..until.min(now.start)),
                None => return Ok(at..until),
            }
        }
        Ok(until..until)
    }
}

/// splitmix64, begun anywhere.
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(Uuid::new_v4().as_u64_pair().0)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }
}
