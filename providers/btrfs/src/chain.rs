//! The layers of an image: whether a snapshot of one subvolume holds them all, as a reader will find them.
//!
//! A reader of the snapshot follows the names in the images' headers. A name that leads out of the
//! snapshot leads to a live file, which will hold something else by then: such a chain is refused.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use disksnap_core::{BackingStore, Disk};
use disksnap_image_file::{ImageFile, Qcow2, path_of};

use crate::subvolume::root_of;

/// More layers than anyone has; a header is not trusted to end the chain.
const DEEPEST: usize = 64;

/// A file below the top image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    /// `raw` or `qcow2`.
    pub(crate) format: &'static str,
}

/// The files below the top image, nearest first; all are in the subvolume `root`.
///
/// # Errors
/// Which layer is not, or would not be found there.
pub(crate) fn below(image: &ImageFile, disk: &Disk, root: &Path) -> Result<Vec<Layer>, String> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut document = disk.backing.as_ref();
    let mut header = image.qcow2.clone();
    let mut top = image.path.clone();
    while let Some(this) = header.filter(|_| layers.len() < DEEPEST) {
        sound(&top, &this)?;
        let Some(name) = this.backing else {
            break;
        };
        if layers.is_empty() {
            named_where_it_is(disk, image)?;
        }
        let layer = inside(&top, &name, root)?;
        document = same_in_document(document, &layer)?;
        header = match this.backing_format.as_deref() {
            Some("raw") => None,
            Some("qcow2") => Some(header_of(&layer)?),
            Some(other) => return Err(format!("{} has the format {other}", layer.display())),
            None => {
                return Err(format!(
                    "the header of {} does not say the format of its backing file",
                    top.display()
                ));
            }
        };
        top.clone_from(&layer);
        let format = if header.is_some() { "qcow2" } else { "raw" };
        layers.push(Layer { path: layer, format });
    }
    if layers.len() >= DEEPEST {
        return Err(format!("the image has more than {DEEPEST} layers"));
    }
    match document {
        None => Ok(layers),
        Some(BackingStore { source, .. }) => Err(format!(
            "the domain's document names the backing file {source}, and the header of {} does not: the snapshot \
             would be read without it",
            top.display()
        )),
    }
}

fn sound(path: &Path, header: &Qcow2) -> Result<(), String> {
    if header.external_data {
        return Err(format!("{} keeps its data in another file", path.display()));
    }
    if header.corrupt {
        return Err(format!(
            "QEMU has marked {} as corrupt; mend it with `qemu-img check -r all`",
            path.display()
        ));
    }
    Ok(())
}

/// A relative name counts from where the image is named, and in the snapshot from where it is.
fn named_where_it_is(disk: &Disk, image: &ImageFile) -> Result<(), String> {
    let named = path_of(disk)?.parent().and_then(|dir| dir.canonicalize().ok());
    if named.as_deref() == image.path.parent() {
        return Ok(());
    }
    Err(format!(
        "the image has a backing file and is named by a link to {}: name it by its own path",
        image.path.display()
    ))
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
    let scheme = name.split('/').next().is_some_and(|first| first.contains(':'));
    if scheme || Path::new(name).is_absolute() {
        return Err(outside(", which is not relative"));
    }
    let layer = plain(&top.parent().unwrap_or(root).join(name));
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

/// The path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            part => plain.push(part),
        }
    }
    plain
}

/// What the document says of this layer, if anything, must be this file. Gives what it says below.
fn same_in_document<'a>(
    said: Option<&'a BackingStore>,
    layer: &Path,
) -> Result<Option<&'a BackingStore>, String> {
    let Some(said) = said else {
        return Ok(None);
    };
    let path = said.source.path().and_then(|path| path.canonicalize().ok());
    if path.as_deref() == Some(layer) {
        return Ok(said.backing.as_deref());
    }
    Err(format!(
        "the domain's document names the backing file {}, and the image's header {}",
        said.source,
        layer.display()
    ))
}

fn header_of(path: &Path) -> Result<Qcow2, String> {
    let failed = |e| format!("cannot read the backing file {}: {e}", path.display());
    if !path.metadata().map_err(failed)?.is_file() {
        return Err(format!("the backing file {} is not a file", path.display()));
    }
    Qcow2::read(&File::open(path).map_err(failed)?).map_err(failed)
}
