//! What differs between two thin snapshots of a volume: by `thin_delta` over the metadata of their pool, which reads no data.
//!
//! A thin pool maps chunks. Two devices that map the same chunk have the same content there, for what is shared is never
//! written to; where neither maps any both read zeros; all else is told. So the answer is about the contents, whatever
//! became of the volume between the two: reverts give it other devices, and extending it or taking it back changes its size.
//!
//! Where the volume is an image of the disk, `qemu-img` tells besides where in the disk what differs is.

use std::fmt;
use std::path::Path;

use async_trait::async_trait;
use disksnap_core::{Changed, Compare, Error, ErrorKind, Host, Peer, Precision, Result};
use disksnap_image_file::{FileInImage, QemuImg, SameFile, guest_ranges, opened};

use crate::find::{Found, Way};
use crate::lvm2::Lvm;
use crate::mapper::{Dmsetup, Thin};
use crate::metadata::Held;
use crate::snapshot::Made;
use crate::spool::Spool;
use crate::thin_delta::ThinDelta;
use crate::volume::Volume;
use crate::{blocking, remembered};

/// The comparison of two thin snapshots.
#[derive(Debug)]
pub(crate) struct Comparing;

/// Whether a snapshot of these disks could be compared with others of the volume: all of them, or none. Tried, not guessed:
/// what keeps all comparisons from succeeding is known before a snapshot is kept for one.
pub(crate) fn is_possible(unit: &[&Found]) -> bool {
    let on_thin = |found: &&Found| found.way == Way::Thin && found.inside.is_none();
    let mapped = |found: &&Found| {
        // qemu-img would need a secret to map it; of a raw one, the guest's disk begins behind a header.
        let plain = !found.encrypted && !found.request.disk.encrypted;
        plain
            && (found.format == "raw"
                || QemuImg::find().is_some() && opened(&[image(found)], |_| None).is_ok())
    };
    unit.iter().all(on_thin)
        && unit.iter().all(mapped)
        && Dmsetup::find().is_ok()
        && ThinDelta::find().is_ok()
}

fn image(found: &Found) -> FileInImage {
    FileInImage {
        path: found.volume.path.clone().into(),
        format: found.format.clone(),
    }
}

#[async_trait]
impl Compare for Comparing {
    /// Reads all of the pool's mappings of the two before it answers, and keeps them in a file without a name in the image
    /// directory where they are many: whoever reads the ranges slowly does not hold the pool's metadata.
    async fn changed(&self, host: &dyn Host, earlier: &Peer, later: &Peer, target: &str) -> Result<Changed> {
        let [earlier, later]: [Made; 2] = [remembered(&earlier.unit.data)?, remembered(&later.unit.data)?];
        let files = [file(&earlier, target)?, file(&later, target)?];
        if files.iter().all(|file| file.format == "raw") {
            return volumes(earlier, later, host).await;
        }
        let qemu_img = QemuImg::find().ok_or_else(|| {
            let what = format!("without qemu-img nothing tells where in the disk {target} its image differs");
            QemuImg::missing(ErrorKind::Unavailable, what)
        })?;
        let same = SameFile {
            earlier: 0,
            later: 0,
            changed: volumes(earlier, later, host).await?,
        };
        let [earlier, later] = files;
        guest_ranges(&qemu_img, &[earlier], &[later], vec![same]).await
    }
}

/// The image that is on the snapshot: all of a disk, for such an image has no layers below.
fn file(made: &Made, target: &str) -> Result<FileInImage> {
    let name = made.full_name();
    let image = made.images.iter().find(|image| image.target == target);
    match image {
        Some(image) if made.comparable => Ok(FileInImage {
            path: made.path.clone(),
            format: image.format.clone(),
        }),
        Some(_) => Err(unsupported(format!(
            "the snapshot {name} cannot be compared: it is no thin one of a volume that is the disk {target} or its image, or \
             what tells how two differ was not there when it was taken"
        ))),
        None => Err(unsupported(format!(
            "the snapshot {name} is not of the disk {target}"
        ))),
    }
}

/// What differs between the volumes.
async fn volumes(earlier: Made, later: Made, host: &dyn Host) -> Result<Changed> {
    let dir = host.image_dir().to_owned();
    blocking(move || changed(&Pair::of(&earlier, &later)?, &dir)).await
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what).hint("Only reading both tells what differs.")
}

/// Two snapshots, as device-mapper has them.
struct Pair {
    dmsetup: Dmsetup,
    /// Group's and volume's, as in the ids of device-mapper.
    ids: [String; 2],
    thins: [Thin; 2],
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair")
            .field("thins", &self.thins)
            .finish_non_exhaustive()
    }
}

impl Pair {
    fn of(earlier: &Made, later: &Made) -> Result<Self> {
        if earlier.group != later.group {
            return Err(unsupported(format!(
                "the snapshots {} and {} are in different volume groups",
                earlier.full_name(),
                later.full_name()
            )));
        }
        let volumes = Lvm::find()?.volumes_of(&earlier.group)?;
        let made = [earlier, later];
        let found = [listed(earlier, &volumes)?, listed(later, &volumes)?];
        must_be_of_one_volume(made, found)?;
        let dmsetup = Dmsetup::find()?;
        let ids = found.map(Volume::id);
        let thins = [
            active(&dmsetup, &ids[0], found[0])?,
            active(&dmsetup, &ids[1], found[1])?,
        ];
        if thins[0].pool != thins[1].pool || !thins[0].reads_alike(&thins[1]) {
            return Err(in_different(found));
        }
        Ok(Self { dmsetup, ids, thins })
    }

    /// They are what they were: a number in the pool may be given to another when a snapshot is removed.
    fn must_be_unchanged(&self) -> Result<()> {
        for (id, thin) in self.ids.iter().zip(&self.thins) {
            if self.dmsetup.thin(id)?.as_ref() != Some(thin) {
                let what = "a snapshot was changed or removed while it was compared";
                return Err(Error::new(ErrorKind::Busy, what).hint("Try again."));
            }
        }
        Ok(())
    }
}

fn listed<'a>(made: &Made, volumes: &'a [Volume]) -> Result<&'a Volume> {
    made.among(volumes).ok_or_else(|| {
        let what = format!("there is no logical volume {} any more", made.full_name());
        Error::new(ErrorKind::Broken, what)
    })
}

fn must_be_of_one_volume(made: [&Made; 2], found: [&Volume; 2]) -> Result<()> {
    if found[0].pool != found[1].pool {
        return Err(in_different(found));
    }
    // It may have been renamed in between; and LVM forgets what a snapshot is of when another is put back.
    let named_alike = made[0].origin == made[1].origin;
    let tied_alike = !found[0].origin.is_empty() && found[0].origin == found[1].origin;
    if named_alike || tied_alike {
        return Ok(());
    }
    Err(unsupported(format!(
        "the snapshots {} and {} are of different volumes, {} and {}",
        found[0].full_name(),
        found[1].full_name(),
        made[0].origin_name(),
        made[1].origin_name()
    )))
}

fn in_different(found: [&Volume; 2]) -> Error {
    unsupported(format!(
        "the snapshots {} and {} are in different thin pools, or of different external origins",
        found[0].full_name(),
        found[1].full_name()
    ))
}

fn active(dmsetup: &Dmsetup, id: &str, volume: &Volume) -> Result<Thin> {
    dmsetup.thin(id)?.ok_or_else(|| {
        let name = volume.full_name();
        Error::new(ErrorKind::Broken, format!("{name} is not active"))
            .hint(format!("`lvchange -ay -K {name}` activates it."))
    })
}

fn changed(pair: &Pair, dir: &Path) -> Result<Changed> {
    let [earlier, later] = &pair.thins;
    let mut spool = Spool::new(later.size, dir);
    let thin_delta = ThinDelta::find()?;
    let pool = pair.dmsetup.pool(&later.pool)?;
    // What the volume has grown by is told as a whole, from the chunk on in which it ended.
    let grown = if later.size > earlier.size {
        earlier.size / pool.chunk * pool.chunk
    } else {
        later.size
    };
    let held = Held::reserve(&pair.dmsetup, &pool, dir)?;
    pair.must_be_unchanged()?;
    let ids = [earlier.id, later.id];
    let read = thin_delta.differing(&pool, ids, held.lock(), |range| {
        spool.push(range.start..range.end.min(grown))
    });
    let released = held.release();
    read.and(released)?;
    spool.push(grown..later.size)?;
    Ok(Changed {
        size: later.size,
        precision: Precision::Exact(pool.chunk),
        ranges: spool.ranges()?,
    })
}
