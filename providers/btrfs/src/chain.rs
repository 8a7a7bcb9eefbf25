//! The layers of an image: whether a snapshot of one subvolume holds them all, as a reader will find them.
//!
//! A reader of the snapshot follows the names in the images' headers. A name that leads out of the
//! snapshot leads to a live file, which will hold something else by then: such a chain is refused.

use std::path::{Path, PathBuf};

use disksnap_core::Disk;
use disksnap_image_file::{ImageFile, Layer, named};

use crate::subvolume::root_of;

/// The files below the top image, nearest first; all are in the subvolume `root`.
///
/// # Errors
/// Which layer is not, or would not be found there.
pub(crate) fn below(image: &ImageFile, disk: &Disk, root: &Path) -> Result<Vec<Layer>, String> {
    image.below(disk, |top, name| inside(top, name, root))
}

/// The file that `name` in the header of `top` leads to, here and in a snapshot alike.
fn inside(top: &Path, name: &str, root: &Path) -> Result<PathBuf, String> {
    let outside = |why: &str| {
        format!(
            "the header of {} names the backing file {name:?}{why}, so that the snapshot would read the live file; \
             keep both in one subvolume and name it from there: `qemu-img rebase -u -F FORMAT -b FILE {}` with the \
             domain off",
            top.display(),
            top.display()
        )
    };
    let relative = named(top, name).filter(|_| !Path::new(name).is_absolute());
    let Some(layer) = relative else {
        return Err(outside(", which is not relative"));
    };
    let real = layer.canonicalize();
    let real = real.map_err(|e| format!("cannot find the backing file {}: {e}", layer.display()))?;
    if real != layer {
        return Err(outside(", which goes through a symbolic link"));
    }
    let its_root = root_of(&layer).map_err(|_| outside(", which is in no subvolume that can be seen"))?;
    if its_root == root {
        Ok(layer)
    } else {
        Err(outside(", which is in another subvolume"))
    }
}
