//! The fleece image as a file: where it goes, and what it begins with.

use std::fs::File;
use std::io;

use disksnap_core::{Host, SnapshotId};
use disksnap_image_file::{Called, MadeFile, write_empty_qcow2};

use crate::settings::Settings;

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
    /// A hole.
    Raw(u64),
    /// An empty qcow2 image.
    Qcow2(u64),
}

impl Content {
    pub(crate) fn write(self, file: &File) -> io::Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Raw(size) => file.set_len(size),
            Self::Qcow2(size) => write_empty_qcow2(file, size, None),
        }
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
