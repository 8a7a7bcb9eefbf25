//! The layers below an image, found by the names in their headers, each as the document has it too.
//!
//! Whether a name leads to the same file in a snapshot is for the method to say that takes it.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use disksnap_core::{BackingStore, Disk};

use crate::{ImageFile, Qcow2, path_of};

/// More layers than anyone has; a header is not trusted to end the chain.
const DEEPEST: usize = 64;

/// A file below the top image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its path, absolute and without symbolic links.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: &'static str,
}

impl ImageFile {
    /// The files below the image, nearest first, by the headers; what the document says of them must be the same.
    ///
    /// `find` is given the path of a layer and the name that its header has for the one below, and says which file that
    /// is, here and in the snapshot that is to hold it, or why it will not be in it. [`named`] helps it.
    ///
    /// # Errors
    /// Which layer would not be read as it is now.
    pub fn below(
        &self,
        disk: &Disk,
        find: impl Fn(&Path, &str) -> Result<PathBuf, String>,
    ) -> Result<Vec<Layer>, String> {
        walk(self, disk, find)
    }
}

fn walk(
    image: &ImageFile,
    disk: &Disk,
    find: impl Fn(&Path, &str) -> Result<PathBuf, String>,
) -> Result<Vec<Layer>, String> {
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
        let layer = find(&top, &name)?;
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

/// The path that a name in the header of `top` leads to, without `.` and `..`; `None` for a name that is no path.
#[must_use]
pub fn named(top: &Path, name: &str) -> Option<PathBuf> {
    let scheme = name.split('/').next().is_some_and(|first| first.contains(':'));
    (!scheme).then(|| plain(&top.parent().unwrap_or(top).join(name)))
}

/// The path without `.` and `..`, by its text alone.
#[must_use]
pub fn plain(path: &Path) -> PathBuf {
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
