//! How QEMU opens an image by the record of its files: every layer is named, and nothing that a header names is opened.

use std::fs::{File, FileType};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::Qcow2;

/// More layers than anyone has.
const DEEPEST: usize = 64;
/// QEMU counts a disk in these.
const SECTOR: u64 = 512;

/// One file or block device of an image: the top one, or a layer below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInImage {
    /// Where it is.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// An image as QEMU is to open it, from the files that it is made of, the top one first: the arguments of `blockdev-add`
/// (QAPI `BlockdevOptions`), or what follows `json:` in a file's name. `name` gives each layer its node's name.
///
/// Read-only. Locking is off: the hypervisor may have the lower layers open, and nobody writes to what is opened here.
///
/// # Errors
/// `NotFound` for a file that is missing; `Unsupported` for one that the record alone does not open; `Broken` for one
/// that needs a layer which the record does not have; `Invalid` for what can be no image.
pub fn opened(files: &[FileInImage], name: impl Fn(usize) -> Option<String>) -> Result<Value> {
    if files.is_empty() || files.len() > DEEPEST {
        let what = format!("an image has from one to {DEEPEST} layers, not {}", files.len());
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let mut below = None;
    for (n, file) in files.iter().enumerate().rev() {
        let mut layer =
            layer(file, below.as_ref()).map_err(|error| error.with("image", file.path.display()))?;
        if let Some(name) = name(n) {
            layer["node-name"] = name.into();
        }
        below = Some(layer);
    }
    Ok(below.unwrap_or_default())
}

impl FileInImage {
    /// How many bytes the guest's disk has whose top layer this is, as QEMU counts: in whole sectors.
    ///
    /// # Errors
    /// The operating system's, and `Broken` for what is no image of its format.
    pub fn disk_size(&self) -> Result<u64> {
        let failed = |e| Error::io("cannot look at the image", e).with("image", self.path.display());
        let (header, _) = look(self).map_err(|error| error.with("image", self.path.display()))?;
        if let Some(header) = header {
            return Ok(header.size / SECTOR * SECTOR);
        }
        let mut file = File::open(&self.path).map_err(failed)?;
        // The metadata of a device have no size.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(size.next_multiple_of(SECTOR))
    }
}

fn layer(image: &FileInImage, below: Option<&Value>) -> Result<Value> {
    let (header, kind) = look(image)?;
    let name = utf8(&image.path)?;
    let driver = if kind.is_file() { "file" } else { "host_device" };
    let file = json!({"driver": driver, "filename": name, "read-only": true, "auto-read-only": false,
        "locking": "off"});
    match (image.format.as_str(), header) {
        ("raw", _) if below.is_some() => Err(Error::new(
            ErrorKind::Invalid,
            "a raw image has no layers below, and the record names one",
        )),
        ("raw", _) => Ok(json!({"driver": "raw", "read-only": true, "file": file})),
        (_, Some(header)) => {
            check(&header, below.is_some())?;
            Ok(json!({"driver": "qcow2", "read-only": true, "file": file, "backing": below}))
        }
        (format, None) => Err(unknown_format(format)),
    }
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "the path of an image must be UTF-8"))
}

/// The error for an image of a format that cannot be opened by a record.
#[must_use]
pub fn unknown_format(format: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("images of the format {format} are not opened by a snapshot's record"),
    )
    .hint("Only raw and qcow2 are known to name no files by themselves that are not in the record.")
}

/// The header of a qcow2 layer. What is no file and no device is not even opened: it could wait, or do things.
fn look(image: &FileInImage) -> Result<(Option<Qcow2>, FileType)> {
    let failed = |e| Error::io("cannot open the image", e);
    let kind = std::fs::metadata(&image.path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::new(
            ErrorKind::Invalid,
            "the image is neither a file nor a block device",
        ));
    }
    if image.format != "qcow2" {
        return Ok((None, kind));
    }
    let file = File::open(&image.path).map_err(failed)?;
    Ok((Some(Qcow2::read(&file).map_err(failed)?), kind))
}

fn check(header: &Qcow2, has_below: bool) -> Result<()> {
    if header.external_data {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the image keeps its data in another file, which the record does not name",
        ));
    }
    if header.encrypted {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "QEMU has encrypted the image, and no record has the key",
        )
        .hint(
            "Give the image to a program that has the key: the snapshot's backupSource says where it is.",
        ));
    }
    match &header.backing {
        Some(name) if !has_below => {
            let what = format!(
                "the image's header names the backing file {name:?}, and the snapshot's record has none: it would be \
                 read without it"
            );
            Err(Error::new(ErrorKind::Broken, what).hint("Delete the snapshot, and take a new one."))
        }
        _ => Ok(()),
    }
}
