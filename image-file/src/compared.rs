//! From what differs in the files of two images to what differs in the guest's disk.
//!
//! A copy of a qcow2 file tells which of the file's blocks are others, and a guest knows nothing of the file: a cluster
//! may be new there, or an entry in a table. So both images are mapped, and walked together with what differs in their
//! files: what both take from the same place of files that are alike there is equal, and all else is told.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use disksnap_core::{Changed, Precision, Ranges, Result};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::map::{From, Map, Piece};
use crate::{FileInImage, QemuImg, opened};

const WHY: &str =
    "what changed in a qcow2 image is told in whole clusters, also those that were only moved or packed";

/// A file that is in both images: where, and what differs in it.
#[derive(Debug)]
pub struct SameFile {
    /// Which of the earlier image's files it is, counted from the top one, which is 0.
    pub earlier: usize,
    /// Which of the later image's files it is.
    pub later: usize,
    /// What differs between the two, in the file's own bytes, and the size of the later one's file.
    pub changed: Changed,
}

/// What differs between the guest's disks of two images, each made of these files, the top one first, from what differs
/// in the files that they have in common. The files must stay as they are for as long as the ranges are read.
///
/// A range is not told where both images take it from the same place in the same file which does not differ there, or
/// where it is zero in both. A file with no differences at all is the same image too, so that what it has packed
/// (compressed clusters) is not told either. All else is told. So what was written anew only in a qcow2's own tables is
/// not told, and a cluster that has moved is. Between two raw files it is what differs in the file, as precisely.
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
    same.retain(|pair| {
        let format = |image: &[FileInImage], n| image.get(n).map(|file: &FileInImage| file.format.clone());
        format(earlier, pair.earlier) == format(later, pair.later)
    });
    let walk = Walk {
        qemu_img: qemu_img.clone(),
        images,
        sizes,
        maps: None,
        pieces: None,
        differs: Differs::read(same).await?,
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

/// What differs in the files that both images have, by their places in the two.
#[derive(Debug, Default)]
struct Differs(BTreeMap<(usize, usize), Vec<Range<u64>>>);

impl Differs {
    async fn read(same: Vec<SameFile>) -> Result<Self> {
        let mut files = BTreeMap::new();
        for SameFile {
            earlier,
            later,
            changed,
        } in same
        {
            let mut ranges = changed.ranges;
            let mut all: Vec<Range<u64>> = Vec::new();
            while let Some(range) = ranges.try_next().await? {
                match all.last_mut() {
                    Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                    _ => all.push(range),
                }
            }
            all.shrink_to_fit();
            files.insert((earlier, later), all);
        }
        Ok(Self(files))
    }

    /// Which parts of `range` of the guest's disk, that lies in a piece of either image, are not known to be equal.
    fn within(&self, range: &Range<u64>, pieces: [Piece; 2], told: &mut VecDeque<Range<u64>>) {
        let (earlier, later) = match pieces.map(|piece| piece.at(range.start)) {
            [From::Zero, From::Zero] => return,
            [
                From::Layer { layer, offset },
                From::Layer {
                    layer: of_later,
                    offset: in_later,
                },
            ] => ((layer, offset), (of_later, in_later)),
            _ => return told.push_back(range.clone()),
        };
        match (self.0.get(&(earlier.0, later.0)), earlier.1, later.1) {
            // One image by itself, with all its tables.
            (Some(differs), _, _) if differs.is_empty() => {}
            (Some(differs), Some(offset), Some(in_later)) if offset == in_later => {
                let end = offset.saturating_add(range.end - range.start);
                let first = differs.partition_point(|differs| differs.end <= offset);
                let here = differs[first..].iter().take_while(|differs| differs.start < end);
                told.extend(here.map(|differs| {
                    let of_guest = |at: u64| at.clamp(offset, end) - offset + range.start;
                    of_guest(differs.start)..of_guest(differs.end)
                }));
            }
            _ => told.push_back(range.clone()),
        }
    }
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
    differs: Differs,
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
        self.differs.within(&range, [a, b], &mut self.ready);
        (self.maps, self.pieces) = (Some(maps), Some([a, b]));
        Ok(true)
    }

    fn start(&self) -> Result<[Map; 2]> {
        let start = |n: usize| Map::start(&self.qemu_img, &self.images[n], self.sizes[n]);
        Ok([start(0)?, start(1)?])
    }
}
