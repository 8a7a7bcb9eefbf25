//! What the caller told for one disk, read once and checked.

use std::path::PathBuf;

use disksnap_core::{DiskRequest, Error, ErrorKind, OptionDoc, Result};

/// As libvirt's `<domainsnapshot>` spells it: `<diskSnapshot method='qemu'><source file='…'/></diskSnapshot>`.
const FILE: &str = "source.file";

/// What was told for one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Where the overlay goes; beside the image when not given.
    pub(crate) file: Option<PathBuf>,
}

impl Settings {
    /// What can be told.
    pub(crate) fn docs() -> Vec<OptionDoc> {
        vec![OptionDoc {
            key: FILE.to_owned(),
            help: "absolute path of the overlay, which the domain writes to from then on; must not exist; beside the \
                   image, as IMAGE.ID, when not given"
                .to_owned(),
        }]
    }

    /// Reads a request's options.
    pub(crate) fn read(request: &DiskRequest) -> Result<Self> {
        let file = request.options.get(FILE).map(PathBuf::from);
        match &file {
            Some(path) if !path.is_absolute() || path.file_name().is_none() => Err(Error::new(
                ErrorKind::Invalid,
                format!("'{}' is not the absolute path of a file", path.display()),
            )
            .hint("Say where the overlay goes with an absolute path, or leave it out.")),
            _ => Ok(Self { file }),
        }
    }
}
