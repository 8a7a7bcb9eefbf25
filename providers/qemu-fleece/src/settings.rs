//! What the caller told for one disk, read once and checked.

use std::path::PathBuf;
use std::str::FromStr;

use disksnap_core::{DiskRequest, Error, ErrorKind, OptionDoc, Result};
use serde::{Deserialize, Serialize};

const FILE: &str = "fleece.file";
const WAY: &str = "fleece.way";
pub(crate) const TIMEOUT: &str = "fleece.timeout";

/// The three ways to fleece, the safest for the guest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Way {
    /// A `copy-before-write` filter of our own, which breaks the snapshot and never the guest.
    Filter,
    /// A `blockdev-backup` job into a raw image, read through `snapshot-access`.
    Job,
    /// A `blockdev-backup` job into a qcow2 image whose backing file is the disk.
    Classic,
}

impl Way {
    /// All, the safest for the guest first.
    pub(crate) const ALL: [Self; 3] = [Self::Filter, Self::Job, Self::Classic];

    /// As users write it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Job => "job",
            Self::Classic => "classic",
        }
    }
}

impl FromStr for Way {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|way| way.as_str() == text).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("there is no way {text:?} to fleece"))
                .hint("Available ways: filter, job, classic. Leave it out for the safest that the QEMU at hand offers.")
        })
    }
}

/// What was told for one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Where the fleece image goes; in disksnap's own directory when not given.
    pub(crate) file: Option<PathBuf>,
    /// The wished way; the safest one on offer when not given.
    pub(crate) way: Option<Way>,
    /// How long, in seconds, one guest write may wait for the fleece image before the snapshot is given up.
    pub(crate) timeout: u32,
}

impl Settings {
    /// The guest's own time-out is 30 s (Linux, SCSI): the snapshot must give way well before.
    const TIMEOUT_DEFAULT: u32 = 20;
    const TIMEOUT_MAX: u32 = 29;

    /// What can be told.
    pub(crate) fn docs() -> Vec<OptionDoc> {
        let doc = |key: &str, help: &str| OptionDoc {
            key: key.to_owned(),
            help: help.to_owned(),
        };
        vec![
            doc(
                FILE,
                "absolute path of the fleece image; must not exist; in the state directory when not given",
            ),
            doc(
                WAY,
                "filter, job or classic; the safest that this QEMU offers when not given",
            ),
            doc(
                TIMEOUT,
                "seconds, 1 to 29, that a guest's write may wait for the fleece image; 20 when not given",
            ),
        ]
    }

    /// Reads a request's options.
    pub(crate) fn read(request: &DiskRequest) -> Result<Self> {
        let options = &request.options;
        let file = options.get(FILE).map(PathBuf::from);
        if let Some(path) = file
            .as_ref()
            .filter(|path| !path.is_absolute() || path.file_name().is_none())
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("'{}' is not the absolute path of a file", path.display()),
            )
            .hint("Say where the fleece image goes with an absolute path, or leave it out."));
        }
        let way = options.get(WAY).map(str::parse).transpose()?;
        let timeout = match options.get(TIMEOUT).map(str::parse) {
            None => Self::TIMEOUT_DEFAULT,
            Some(Ok(seconds)) if (1..=Self::TIMEOUT_MAX).contains(&seconds) => seconds,
            Some(_) => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "fleece.timeout is not a number of seconds from 1 to 29",
                )
                .hint("Guests give up on a disk after about 30 s; the snapshot must give way before."));
            }
        };
        Ok(Self { file, way, timeout })
    }
}
