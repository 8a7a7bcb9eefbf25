//! The fleece image as a file: where it goes, what it begins with, the room that it is given, and whether it is still whole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use disksnap_core::{Host, SnapshotId};
use disksnap_image_file::{Called, MadeFile, write_empty_qcow2};

use crate::settings::{Settings, Way};

/// What errors call it.
pub(crate) const CALLED: Called = Called {
    what: "fleece image",
    option: "fleece.file",
    filled_by: "what the guest overwrites is kept there",
    too_large: "A way with raw images has no such limit (fleece.way=filter).",
};

/// What a new fleece image holds; sizes are the disk's, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing: somebody else writes a format into it.
    Nothing,
    /// A hole, and behind the disk what tells that the file was never cut off.
    Raw(u64),
    /// An empty qcow2 image.
    Qcow2(u64),
}

impl Content {
    pub(crate) fn write(self, file: &File) -> io::Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Raw(size) => {
                file.set_len(size)?;
                file.write_all_at(UNCUT, size)
            }
            Self::Qcow2(size) => write_empty_qcow2(file, size, None),
        }
    }
}

/// What stands behind the disk in a raw image. QEMU, which is told the disk's size, leaves it alone, and reads zeroes where
/// a file ends too soon.
const UNCUT: &[u8; 512] = &[0xd5; 512];
/// What images begin with that have a format.
const QCOW2: &[u8] = b"QFI\xfb";
const LUKS: &[u8] = b"LUKS\xba\xbe";

/// Whether somebody has cut an image off that QEMU is using: the bytes that are missing would be read as zeroes. An image
/// whose name was removed cannot be looked at; QEMU has all of it.
pub(crate) fn is_cut(path: &Path, way: Way, encrypted: bool, size: u64) -> bool {
    let (at, expected) = match (way, encrypted) {
        (Way::Classic, _) => (0, QCOW2),
        (_, true) => (0, LUKS),
        (_, false) => (size, UNCUT.as_slice()),
    };
    let Ok(file) = File::open(path) else { return false };
    let mut found = vec![0; expected.len()];
    match file.read_exact_at(&mut found, at) {
        Ok(()) => found != expected,
        Err(error) => error.kind() == io::ErrorKind::UnexpectedEof,
    }
}

/// How large an image can become whose disk has so many bytes: its tables, and the header of an encrypted one.
pub(crate) fn at_most(size: u64) -> u64 {
    size.saturating_add(size / 4096).saturating_add(4 << 20)
}

/// Takes the room for all that an image can become, so that a write to it cannot fail for the lack of it. Whether the file
/// system can do that.
pub(crate) fn reserve(path: &Path, size: u64) -> io::Result<bool> {
    use rustix::fs::{FallocateFlags, fallocate};
    let file = File::options().write(true).open(path)?;
    match fallocate(&file, FallocateFlags::KEEP_SIZE, 0, at_most(size)) {
        Ok(()) => Ok(true),
        Err(error) if [rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSYS].contains(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Where the image of this request goes; follows from the request alone.
pub(crate) fn locate(host: &dyn Host, id: SnapshotId, target: &str, settings: &Settings) -> MadeFile {
    match &settings.file {
        None => {
            let name: String = target.chars().filter(char::is_ascii_alphanumeric).collect();
            MadeFile::own(host.image_dir().join(format!("{id}-{name}.fleece")))
        }
        Some(path) => MadeFile::chosen(path.clone(), id),
    }
}
