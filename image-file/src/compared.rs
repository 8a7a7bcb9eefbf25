//! From what differs in the files of two images to what differs in the guest's disk.
//!
//! A copy of a qcow2 file tells which of the file's blocks are others, and a guest knows nothing of the file: a cluster
//! may be new there, or an entry in a table. So both images are mapped, and walked together with what differs in their
//! files: what both take from the same place of files that are alike there is equal, and all else is told.

use std::collections::VecDeque;
use std::ops::Range;

use disksnap_core::{Changed, Precision, Ranges, Result};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::alike::Alike;
use crate::map::{Map, Piece};
use crate::{FileInImage, QemuImg, opened};

const WHY: &str = "what changed in a qcow2 image is told in whole clusters, also those that were only moved";

/// A file that is in both images: where, and what differs in it.
#[derive(Debug)]
pub struct SameFile {
    /// Which of the earlier image's files it is, counted from the top one, which is 0.
    pub earlier: usize,
    /// Which of the later image's files it is.
    pub later: usize,
    /// What differs between the two, in the file's own bytes, and the size of the later one's file. What the longer one has
    /// beyond the other's end is among it: an image reads zeros beyond its file's end.
    pub changed: Changed,
}

/// What differs between the guest's disks of two images, each made of these files, the top one first, from what differs
/// in the files that they have in common. The files must stay as they are for as long as the ranges are read.
///
/// A range is not told where both images take it from the same place in the same file which does not differ there, or
/// where it is zero in both; a compressed cluster is at the same place where all of it is. All else is told. So what was
/// written anew only in a qcow2's own tables is not told, and a cluster that has moved is. Between two raw files it is
/// what differs in the file, as precisely.
///
/// Memory goes with the number of differences in the files, not with the disk's size or with what is on it.
///
/// # Errors
/// `NotFound` for a file that is missing; `Unsupported` for one that the record alone does not open; `Broken` for one
/// that needs a layer which is not given; those of the differences given. The ranges also say `Io` where `qemu-img` fails.
pub async fn guest_ranges(
    qemu_img: &QemuImg,
    earlier: &[FileInImage],
    later: &[FileInImage],
    mut same: Vec<SameFile>,
) -> Result<Changed> {
    let images = [earlier, later].map(<[FileInImage]>::to_vec);
    for image in &images {
        opened(image, |_| None)?;
    }
    let sizes = [images[0][0].disk_size()?, images[1][0].disk_size()?];
    if let ([before], [after]) = (earlier, later)
        && before.format == "raw"
        && after.format == "raw"
        && let Some(pair) = same.iter().position(|pair| (pair.earlier, pair.later) == (0, 0))
    {
        let changed = same.swap_remove(pair).changed;
        return Ok(Changed {
            size: sizes[1],
            precision: changed.precision,
            ranges: whole(changed.ranges, sizes),
        });
    }
    let walk = Walk {
        qemu_img: qemu_img.clone(),
        alike: Alike::read(same, &images).await?,
        images,
        sizes,
        maps: None,
        pieces: None,
        ready: VecDeque::new(),
    };
    let walked = stream::try_unfold(walk, |mut walk| async {
        Ok(walk.next().await?.map(|range| (range, walk)))
    });
    Ok(Changed {
        size: sizes[1],
        precision: Precision::Superset(WHY.to_owned()),
        ranges: whole(walked.boxed(), sizes),
    })
}

/// These ranges up to where the smaller disk ends, and then all that the later one has beyond; none touching another.
fn whole(ranges: Ranges, sizes: [u64; 2]) -> Ranges {
    let both = sizes[0].min(sizes[1]);
    let clipped = ranges.map_ok(move |range| range.start.min(both)..range.end.min(both));
    let grown = stream::iter([Ok(both..sizes[1])]);
    let all = clipped.chain(grown).boxed();
    let joined = stream::try_unfold(
        (all, None),
        |(mut all, mut last): (Ranges, Option<Range<u64>>)| async {
            while let Some(range) = all.try_next().await? {
                match &mut last {
                    _ if range.is_empty() => {}
                    Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                    Some(last) => {
                        let told = std::mem::replace(last, range);
                        let last = Some(last.clone());
                        return Ok(Some((told, (all, last))));
                    }
                    None => last = Some(range),
                }
            }
            Ok(last.map(|last| (last, (all, None))))
        },
    );
    joined.boxed()
}

/// Two maps, walked together.
#[derive(Debug)]
struct Walk {
    qemu_img: QemuImg,
    images: [Vec<FileInImage>; 2],
    sizes: [u64; 2],
    /// None before the first step.
    maps: Option<[Map; 2]>,
    /// The pieces that the walk is in.
    pieces: Option<[Piece; 2]>,
    alike: Alike,
    ready: VecDeque<Range<u64>>,
}

impl Walk {
    async fn next(&mut self) -> Result<Option<Range<u64>>> {
        loop {
            if let Some(range) = self.ready.pop_front() {
                return Ok(Some(range));
            }
            if !self.step().await? {
                return Ok(None);
            }
        }
    }

    /// On to the end of the nearer piece. False at the end of the smaller disk.
    async fn step(&mut self) -> Result<bool> {
        let mut maps = match self.maps.take() {
            Some(maps) => maps,
            None => self.start()?,
        };
        let pieces = match self.pieces {
            None => [maps[0].next().await?, maps[1].next().await?],
            Some([a, b]) => {
                let end = a.end.min(b.end);
                let a = if a.end > end {
                    Some(a)
                } else {
                    maps[0].next().await?
                };
                let b = if b.end > end {
                    Some(b)
                } else {
                    maps[1].next().await?
                };
                [a, b]
            }
        };
        let [Some(a), Some(b)] = pieces else {
            // Only a map that has come to its end is known to be one.
            for map in &mut maps {
                while map.next().await?.is_some() {}
            }
            return Ok(false);
        };
        let range = a.start.max(b.start)..a.end.min(b.end);
        self.alike.differing(&range, [a, b], &mut self.ready).await?;
        (self.maps, self.pieces) = (Some(maps), Some([a, b]));
        Ok(true)
    }

    fn start(&self) -> Result<[Map; 2]> {
        let start = |n: usize| Map::start(&self.qemu_img, &self.images[n], self.sizes[n]);
        Ok([start(0)?, start(1)?])
    }
}
