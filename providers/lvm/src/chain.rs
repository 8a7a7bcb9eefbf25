//! The layers of an image in a file system on a volume: a snapshot of the volume holds those in the same file system.
//!
//! Whoever reads the image in the snapshot is told each layer's path there, so that it matters not how the headers name
//! them: but a layer elsewhere would be read as it is by then, and such a chain is refused.

use std::path::{Path, PathBuf};

use disksnap_core::{Disk, FileInside};
use disksnap_image_file::{ImageFile, named};

use crate::mount::{self, Inside};

/// The files below the top image, nearest first, by their paths in the file system.
///
/// # Errors
/// Which layer is not in it, or would not be read as it is now.
pub(crate) fn below(image: &ImageFile, disk: &Disk, place: &Inside) -> Result<Vec<FileInside>, String> {
    let layers = image.below(disk, |top, name| find(top, name, place))?;
    layers
        .iter()
        .map(|layer| {
            let found = mount::inside(&layer.path)?;
            Ok(FileInside {
                path: found.path,
                format: layer.format.to_owned(),
            })
        })
        .collect()
}

fn find(top: &Path, name: &str, place: &Inside) -> Result<PathBuf, String> {
    let outside = |why: &str| {
        format!(
            "the header of {} names the backing file {name:?}, which {why}: the snapshot would not hold it; keep the whole \
             chain in one file system",
            top.display()
        )
    };
    let path = named(top, name).ok_or_else(|| outside("is no file of this host"))?;
    let real = path.canonicalize();
    let real = real.map_err(|e| format!("cannot find the backing file {}: {e}", path.display()))?;
    let found = mount::inside(&real).map_err(|why| outside(&format!("lies elsewhere ({why})")))?;
    if found.number == place.number {
        Ok(real)
    } else {
        Err(outside("lies in another file system"))
    }
}
