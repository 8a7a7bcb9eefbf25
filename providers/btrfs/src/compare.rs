//! What differs between a disk of two snapshots, without reading its data: by the extents that its files lie in.
//!
//! Nobody writes to an extent that two read-only snapshots have: whatever wrote to a file in between, with holes, reflinks
//! and NOCOW among it, left another extent in one of them, or none. So a place of a file is the same in both if both have
//! the same part of the same extent there, or zeros. That is so whichever of them is the older one, also where the file was
//! another one meanwhile (a revert makes it a clone), by whatever name and in whatever subvolume of the file system. For
//! images that are no raw ones, what differs in the files is then brought to the guest's disk (`guest_ranges`).
//!
//! The extents are found by searching the tree of each snapshot for those of the one file (`extents`, `file_changes`), which
//! costs what their number does. The other ways were tried, and each takes five times as long. FIEMAP looks up who else has each
//! extent, and of a compressed one it does not tell which part of it the file has, so that all but whole ones must be
//! told: of an image written at random, a dozen times what was written. A send stream without data tells of all that is
//! in the subvolume, by names that change on the way, and all of an image that was put back. It takes `CAP_SYS_ADMIN`,
//! as searching does.

use std::path::Path;

use async_trait::async_trait;
use disksnap_core::{Changed, Compare, Error, ErrorKind, Health, Host, Peer, Ranges, Result, Unit};
use disksnap_image_file::{FileInImage, QemuImg, SameFile, guest_ranges, opened};
use futures_util::future::ready;
use futures_util::stream::once;
use futures_util::{StreamExt, TryStreamExt};

use crate::extents::Extents;
use crate::file_changes::{SECTOR, TwoStates};
use crate::snapshot::{Made, MadeImage};
use crate::{blocking, remembered};

/// What tells how two snapshots differ.
#[derive(Debug)]
pub(crate) struct CompareImages;

impl CompareImages {
    pub(crate) fn of(unit: &Unit) -> Option<Self> {
        let made: Made = remembered(&unit.data).ok()?;
        made.comparable.then_some(Self)
    }
}

#[async_trait]
impl Compare for CompareImages {
    async fn changed(&self, _: &dyn Host, earlier: &Peer, later: &Peer, target: &str) -> Result<Changed> {
        let both = Snapshots {
            earlier: remembered(&earlier.unit.data)?,
            later: remembered(&later.unit.data)?,
        };
        let (wanted, of) = (target.to_owned(), both.clone());
        let found = blocking(move || of.find(&wanted)).await;
        let changed = match found {
            Ok(found) => found.changed().await,
            Err(error) => Err(error),
        };
        let changed = changed.map_err(|e| e.with("disk", target))?;
        Ok(Changed {
            ranges: if_good(changed.ranges, both),
            ..changed
        })
    }
}

/// Two snapshots, on one file system.
#[derive(Debug, Clone)]
struct Snapshots {
    earlier: Made,
    later: Made,
}

/// A disk of two snapshots: the files of its image in both, the top one first.
#[derive(Debug)]
struct Found {
    earlier: Vec<FileInImage>,
    later: Vec<FileInImage>,
    /// Those that are in both, by their places there.
    same: Vec<(usize, usize, TwoStates)>,
}

impl Snapshots {
    /// Looks whether the disk can be compared, and what of it with what.
    fn find(&self, target: &str) -> Result<Found> {
        for made in [&self.earlier, &self.later] {
            if !made.comparable {
                let shown = made.dir.join(&made.name);
                let what = format!("{} is a snapshot that cannot be compared", shown.display());
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        }
        self.are_good()?;
        let images = [image(&self.earlier, target)?, image(&self.later, target)?];
        let [earlier, later] = images.map(files);
        let name = |of: &Made, file: &FileInImage| {
            let snapshot = of.dir.join(&of.name);
            file.path.strip_prefix(snapshot).map(Path::to_owned).ok()
        };
        let was: Vec<_> = earlier.iter().map(|file| name(&self.earlier, file)).collect();
        let is: Vec<_> = later.iter().map(|file| name(&self.later, file)).collect();
        let mut same = Vec::new();
        for (to, from) in pairs(&was, &is) {
            same.push((to, from, TwoStates::open(&earlier[to].path, &later[from].path)?));
        }
        Ok(Found { earlier, later, same })
    }

    /// Both hold their instants, so nobody can have written to what they have in common.
    fn are_good(&self) -> Result<()> {
        for made in [&self.earlier, &self.later] {
            if let Health::Broken(why) | Health::Gone(why) = made.health() {
                return Err(Error::new(ErrorKind::Broken, why).hint("Take all of the disk instead."));
            }
        }
        Ok(())
    }
}

/// Which of the earlier files goes with which of the later ones: that of the same name, else the one that is as deep.
/// Any two can be compared; those that have most in common should be.
fn pairs<T: PartialEq>(earlier: &[T], later: &[T]) -> Vec<(usize, usize)> {
    let named = |name: &T| earlier.iter().position(|was| was == name);
    let mut pairs: Vec<(usize, usize)> = (0..)
        .zip(later)
        .filter_map(|(n, name)| Some((named(name)?, n)))
        .collect();
    for n in 0..earlier.len().min(later.len()) {
        if pairs.iter().all(|(was, is)| *was != n && *is != n) {
            pairs.push((n, n));
        }
    }
    pairs
}

/// Whether a disk whose image is made of these files could be compared with another one. Tried, not guessed.
pub(crate) fn is_possible(files: &[FileInImage]) -> bool {
    let raw = matches!(files, [only] if only.format == "raw");
    // Nothing that is encrypted is opened by its record alone.
    let mapped = || QemuImg::find().is_some() && opened(files, |_| None).is_ok();
    (raw || mapped()) && files.iter().all(|file| Extents::open(&file.path).is_ok())
}

/// The files of an image in a snapshot, the top one first.
pub(crate) fn files(image: &MadeImage) -> Vec<FileInImage> {
    let top = (image.file.clone(), image.format.clone());
    let all = std::iter::once(top).chain(image.below.iter().cloned());
    all.map(|(path, format)| FileInImage { path, format }).collect()
}

fn image<'a>(made: &'a Made, target: &str) -> Result<&'a MadeImage> {
    let found = made.images.iter().find(|image| image.target == target);
    found.ok_or_else(|| {
        let shown = made.dir.join(&made.name);
        let what = format!("the disk is not in the snapshot {}", shown.display());
        Error::new(ErrorKind::Unsupported, what)
    })
}

impl Found {
    async fn changed(mut self) -> Result<Changed> {
        let raw = |files: &[FileInImage]| matches!(files, [only] if only.format == "raw");
        if raw(&self.earlier) && raw(&self.later) && self.same.len() == 1 {
            let (_, _, files) = self.same.remove(0);
            return Ok(of_disk(files.changed()));
        }
        let qemu_img = QemuImg::find().ok_or_else(|| {
            let why =
                "what differs in a qcow2 file is brought to the guest's disk by qemu-img, which is not there";
            QemuImg::missing(ErrorKind::Unsupported, why)
        })?;
        let same = self.same.into_iter().map(|(earlier, later, files)| SameFile {
            earlier,
            later,
            changed: files.changed(),
        });
        guest_ranges(&qemu_img, &self.earlier, &self.later, same.collect()).await
    }
}

/// Of what differs in a raw file, what a guest sees: up to the end of its last sector.
fn of_disk(changed: Changed) -> Changed {
    let end = changed.size.next_multiple_of(SECTOR);
    let clipped = changed
        .ranges
        .map_ok(move |range| range.start..range.end.min(end));
    Changed {
        ranges: clipped.try_filter(|range| ready(!range.is_empty())).boxed(),
        ..changed
    }
}

/// The same ranges, if both snapshots were there to their end.
fn if_good(ranges: Ranges, both: Snapshots) -> Ranges {
    let end = once(blocking(move || both.are_good())).filter_map(|good| ready(good.err().map(Err)));
    ranges.chain(end).boxed()
}
