//! What two images have in common: files of which it is known where they differ.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use disksnap_core::{Error, Ranges, Result};
use futures_util::TryStreamExt;

use crate::map::{From, Piece};
use crate::packed::Packed;
use crate::{FileInImage, SameFile};

/// How many compressed clusters are looked at before others are let on.
const AT_ONCE: usize = 1024;

/// The files that both images have, by their places in the two.
#[derive(Debug)]
pub(crate) struct Alike(BTreeMap<(usize, usize), Pair>);

#[derive(Debug)]
struct Pair {
    /// Ascending, none touching another.
    differs: Vec<Range<u64>>,
    /// Where either has its compressed clusters, where they have such and in the same way.
    packed: Option<[Packed; 2]>,
}

impl Alike {
    /// Reads all that differs in the files. One that is of another format in the other image is not the same.
    pub(crate) async fn read(same: Vec<SameFile>, images: &[Vec<FileInImage>; 2]) -> Result<Self> {
        let mut pairs = BTreeMap::new();
        for same in same {
            let files = (images[0].get(same.earlier), images[1].get(same.later));
            let (Some(earlier), Some(later)) = files else {
                continue;
            };
            if earlier.format == later.format {
                let pair = Pair {
                    differs: collected(same.changed.ranges).await?,
                    packed: packed(earlier, later)?,
                };
                pairs.insert((same.earlier, same.later), pair);
            }
        }
        Ok(Self(pairs))
    }

    /// Which parts of `range` of the guest's disk, that lies in a piece of either image, are not known to be equal.
    pub(crate) async fn differing(
        &mut self,
        range: &Range<u64>,
        pieces: [Piece; 2],
        told: &mut VecDeque<Range<u64>>,
    ) -> Result<()> {
        let [earlier, later] = match pieces.map(|piece| piece.at(range.start)) {
            [From::Zero, From::Zero] => return Ok(()),
            [
                From::Layer {
                    layer: a,
                    offset: in_a,
                },
                From::Layer {
                    layer: b,
                    offset: in_b,
                },
            ] => [(a, in_a), (b, in_b)],
            _ => {
                told.push_back(range.clone());
                return Ok(());
            }
        };
        match (self.0.get_mut(&(earlier.0, later.0)), earlier.1, later.1) {
            // One image by itself, with all its tables.
            (Some(pair), _, _) if pair.differs.is_empty() => {}
            (Some(pair), Some(offset), Some(in_later)) if offset == in_later => pair.at(offset, range, told),
            (Some(pair), None, None) => pair.packed(range, told).await.map_err(unread)?,
            _ => told.push_back(range.clone()),
        }
        Ok(())
    }
}

impl Pair {
    /// What differs of a range of the guest's that both have at this offset.
    fn at(&self, offset: u64, range: &Range<u64>, told: &mut VecDeque<Range<u64>>) {
        let end = offset.saturating_add(range.end - range.start);
        let of_guest = |at: u64| at.clamp(offset, end) - offset + range.start;
        let within = within(&self.differs, offset..end);
        told.extend(within.map(|differs| of_guest(differs.start)..of_guest(differs.end)));
    }

    /// What differs of a range of the guest's that both have compressed: by whole clusters.
    ///
    /// A range may be all of the disk, so that this lets others on from time to time.
    async fn packed(&mut self, range: &Range<u64>, told: &mut VecDeque<Range<u64>>) -> std::io::Result<()> {
        let Some([earlier, later]) = &mut self.packed else {
            told.push_back(range.clone());
            return Ok(());
        };
        let cluster = earlier.cluster();
        let (mut at, mut looked_at) = (range.start, 0_usize);
        while at < range.end {
            let end = (at / cluster + 1).saturating_mul(cluster).min(range.end);
            let (was, is) = (earlier.find(at)?, later.find(at)?);
            let stays = was.filter(|was| Some(was) == is.as_ref());
            let is_equal = stays.is_some_and(|place| within(&self.differs, place).next().is_none());
            match told.back_mut() {
                _ if is_equal => {}
                Some(last) if last.end == at => last.end = end,
                _ => told.push_back(at..end),
            }
            at = end;
            looked_at += 1;
            if looked_at.is_multiple_of(AT_ONCE) {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }
}

/// Those of these that lie in a range, in part at least.
fn within(differs: &[Range<u64>], range: Range<u64>) -> impl Iterator<Item = &Range<u64>> {
    let first = differs.partition_point(|differs| differs.end <= range.start);
    differs[first..]
        .iter()
        .take_while(move |differs| differs.start < range.end)
}

async fn collected(mut ranges: Ranges) -> Result<Vec<Range<u64>>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    while let Some(range) = ranges.try_next().await? {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all.shrink_to_fit();
    Ok(all)
}

fn packed(earlier: &FileInImage, later: &FileInImage) -> Result<Option<[Packed; 2]>> {
    let both = (
        Packed::of(earlier).map_err(unread)?,
        Packed::of(later).map_err(unread)?,
    );
    Ok(match both {
        (Some(earlier), Some(later)) if earlier.is_like(&later) => Some([earlier, later]),
        _ => None,
    })
}

fn unread(error: std::io::Error) -> Error {
    Error::io("cannot read where an image has its clusters", error)
}
