//! A disk's image file on this host, as it lies there: for the methods that take it whole, below the
//! hypervisor.
//!
//! [`ImageFile::of`] looks at the file; [`ImageFile::stands_alone`] says whether the one file is all of
//! the disk, [`ImageFile::below`] which others are, [`check_said`] whether the document names them, [`Live`] what the hypervisor that has it open says. [`file_system`],
//! [`mount_options`] and [`room`] tell of the place it is in; [`put_back`] makes images again what a snapshot has of them.
//!
//! [`MadeFile`] and [`write_empty_qcow2`] make new ones, [`write_raw_data_qcow2`] one for a raw disk that is there
//! already, [`write_bitmap_qcow2`] one that tells a QEMU which blocks of a disk changed. [`opened`] is how QEMU opens an
//! image by the record of its files, [`guest_ranges`] what differs in the disks of two such images, and [`QemuImg`] works on
//! those that no hypervisor has open.

mod alike;
mod bitmap_qcow2;
mod chain;
mod compared;
mod empty_qcow2;
pub mod export;
#[doc(hidden)]
pub mod fuzzing;
mod live;
mod made;
mod map;
mod opened;
mod packed;
mod place;
mod put_back;
mod qcow2;
mod qemu_img;
mod raw_data_qcow2;
mod said;

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use disksnap_core::{BackingStore, Disk, Error, ErrorKind, Probe, Source};

pub use bitmap_qcow2::{ChangedBlocks, write_bitmap_qcow2};
pub use chain::{Layer, named, plain};
pub use compared::{SameFile, guest_ranges};
pub use empty_qcow2::{Backing, qcow2_holds_data, write_empty_qcow2};
pub use live::Live;
pub use made::{Called, MadeFile, remove_file};
pub use opened::{FileInImage, opened, unknown_format};
pub use place::{file_system, mount_options, room};
pub use put_back::{PutBack, can_put_back, forget, like_in_cow, put_back};
pub use qcow2::Qcow2;
pub use qemu_img::QemuImg;
pub use raw_data_qcow2::{
    can_tell_written_past, is_in_use, raw_data_of, raw_data_qcow2_is_new, raw_data_qcow2_size,
    renew_raw_data_qcow2, write_raw_data_qcow2, written_past,
};

pub use said::{ByHeaders, check_said};

/// What stands against a disk: what a probe answers with, and what a create fails with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// Its class.
    pub kind: ErrorKind,
    /// Why, for people.
    pub why: String,
}

/// It is so with this disk, whoever asks.
impl From<String> for Unfit {
    fn from(why: String) -> Self {
        Self {
            kind: ErrorKind::Unsupported,
            why,
        }
    }
}

impl From<Unfit> for Probe {
    fn from(Unfit { kind, why }: Unfit) -> Self {
        Self::refused(kind, why)
    }
}

impl From<Unfit> for Error {
    fn from(Unfit { kind, why }: Unfit) -> Self {
        Self::new(kind, why)
    }
}

/// An image file, open for reading.
#[derive(Debug)]
pub struct ImageFile {
    /// Its path, absolute and without symbolic links.
    pub path: PathBuf,
    /// The file, read-only.
    pub file: File,
    /// What the file system says of it.
    pub metadata: Metadata,
    /// The header of a qcow2 image; `None` for a raw one.
    pub qcow2: Option<Qcow2>,
}

impl ImageFile {
    /// Opens and looks at the image of a disk, by the format that the domain's document gives it. Changes
    /// nothing.
    ///
    /// # Errors
    /// Why this is no image file that could be taken whole.
    pub fn of(disk: &Disk) -> Result<Self, String> {
        let named = path_of(disk)?;
        let failed = |what: &str, error| format!("cannot {what} {}: {error}", named.display());
        let path = named.canonicalize().map_err(|e| failed("find", e))?;
        let metadata = path.metadata().map_err(|e| failed("look at", e))?;
        if !metadata.is_file() {
            return Err(format!("{} is not a file", named.display()));
        }
        let file = File::open(&path).map_err(|e| failed("open", e))?;
        let qcow2 = match disk.driver.format.as_deref() {
            Some("raw") => None,
            Some("qcow2") => Some(Qcow2::read(&file).map_err(|e| failed("read", e))?),
            Some(other) => return Err(format!("images of the format {other} are not known to be whole")),
            None => return Err("the domain's document does not say the image's format".to_owned()),
        };
        Ok(Self {
            path,
            file,
            metadata,
            qcow2,
        })
    }

    /// `raw` or `qcow2`.
    #[must_use]
    pub fn format(&self) -> &'static str {
        if self.qcow2.is_some() { "qcow2" } else { "raw" }
    }

    /// The virtual size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.qcow2
            .as_ref()
            .map_or(self.metadata.len(), |header| header.size)
    }

    /// How many bytes it takes up.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.metadata.blocks().saturating_mul(512)
    }

    /// Whether this one file holds all of the disk.
    ///
    /// A layer below it is named by the header and by the document, and goes on being written, merged or
    /// removed under its own name: a copy of the top alone would read it as it is by then.
    ///
    /// # Errors
    /// Which other file it needs.
    pub fn stands_alone(&self, disk: &Disk) -> Result<(), String> {
        let lacks = |what: String| Err(format!("{what}, which the snapshot would not hold"));
        if let Some(BackingStore { source, .. }) = &disk.backing {
            return lacks(format!("the disk has the backing file {source}"));
        }
        let Some(header) = &self.qcow2 else {
            return Ok(());
        };
        if let Some(name) = &header.backing {
            return lacks(format!("the image's header names the backing file {name:?}"));
        }
        if header.external_data {
            return lacks("the image keeps its data in another file".to_owned());
        }
        if header.corrupt {
            return Err(
                "QEMU has marked the image as corrupt; mend it with `qemu-img check -r all`".to_owned(),
            );
        }
        Ok(())
    }

    /// What whoever takes this image while it is in use should know of it.
    #[must_use]
    pub fn lazy_warning(&self) -> Option<String> {
        let lazy = self.qcow2.as_ref().is_some_and(|header| header.lazy_refcounts);
        lazy.then(|| {
            "the image has lazy_refcounts=on: taken while the domain runs, its content is right and \
             `qemu-img check` finds errors, which `qemu-img check -r all` mends on a copy"
                .to_owned()
        })
    }
}

/// The path of a disk's image file, as the document gives it.
///
/// # Errors
/// Why the disk has none.
pub fn path_of(disk: &Disk) -> Result<&Path, String> {
    match &disk.source {
        Some(Source::File { file }) if file.is_absolute() => Ok(file),
        Some(Source::File { .. }) => Err("the image's path is not absolute".to_owned()),
        _ => Err("the disk is not an image file".to_owned()),
    }
}

/// Whether a disk's target can be part of a file name; what derives names from targets asks it.
///
/// # Errors
/// Says so where it cannot.
pub fn target_in_names(disk: &Disk) -> Result<&str, String> {
    let plain = |c: char| c.is_alphanumeric() || "-_.:".contains(c);
    if disk.target.chars().all(plain) && disk.target.len() <= 64 {
        Ok(&disk.target)
    } else {
        Err(format!(
            "the disk's target {:?} cannot be part of a file name",
            disk.target
        ))
    }
}
