//! Checkpoints: instants that later changes are told against.
//!
//! Sources: `seeds/bulk-checkpoint-redefine.txt`; libvirt's `<domaincheckpoint>`; QEMU's dirty bitmaps
//! (`block-dirty-bitmap-add`).

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Error, ErrorKind, Result, SnapshotId, SnapshotName};

/// The name of a checkpoint, unique within its domain; its bitmaps are called the same.
///
/// As libvirt's schema has it: letters, digits, `_`, `-` and `.`, and no `.` at the beginning; and no longer than what
/// QEMU takes as the name of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckpointName(String);

impl CheckpointName {
    /// Longest name, in bytes (QEMU's `BDRV_BITMAP_MAX_NAME_SIZE`).
    pub const MAX: usize = 1023;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CheckpointName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let may = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let fault = if name.is_empty() {
            "is empty".to_owned()
        } else if name.len() > Self::MAX {
            format!("is longer than {} bytes", Self::MAX)
        } else if name.starts_with('.') {
            "starts with '.'".to_owned()
        } else if let Some(bad) = name.chars().find(|c| !may(*c)) {
            format!("has {bad:?}")
        } else {
            return Ok(Self(name.to_owned()));
        };
        let mut shown: String = name.chars().take(64).collect();
        if shown.len() < name.len() {
            shown.push('…');
        }
        Err(Error::new(ErrorKind::Invalid, format!("the checkpoint name {shown:?} {fault}"))
            .hint("Names of checkpoints have letters, digits, '_', '-' and '.', do not start with '.', and have at most 1023 bytes."))
    }
}

impl TryFrom<String> for CheckpointName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl TryFrom<&SnapshotName> for CheckpointName {
    type Error = Error;

    /// The checkpoint that is called as its snapshot is.
    fn try_from(name: &SnapshotName) -> Result<Self> {
        name.as_str().parse().map_err(|_| {
            let message = format!("no checkpoint can be called '{name}', as the snapshot is");
            Error::new(ErrorKind::Invalid, message).hint(
                "Give the checkpoint a name of its own, or the snapshot one that both can have: letters, digits, '_', '-' and '.'.",
            )
        })
    }
}

impl From<CheckpointName> for String {
    fn from(name: CheckpointName) -> Self {
        name.0
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An instant of some disks, kept so that what has changed since can be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its name, unique within the domain.
    pub name: CheckpointName,
    /// The one before it; `None` for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<CheckpointName>,
    /// The instant, by the clock of the host that made it.
    pub created: SystemTime,
    /// The user's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The disks that it covers, each once.
    pub disks: Vec<CheckpointDisk>,
}

impl Checkpoint {
    /// Its record of the disk with this target, if it covers it.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&CheckpointDisk> {
        self.disks.iter().find(|disk| disk.target == target)
    }

    /// The bitmap that keeps the instant of this disk, if one does.
    #[must_use]
    pub fn bitmap(&self, target: &str) -> Option<&str> {
        self.disk(target)?.mark.bitmap()
    }
}

/// One disk at a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDisk {
    /// The disk's target.
    pub target: String,
    /// What systems that know disks by UUID call it (oVirt's `disk_id`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// The disk's size at the instant, in bytes, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// What keeps the instant.
    pub mark: Mark,
    /// The mark is in the hypervisor's memory alone, and ends with that hypervisor: the disk's format has no place for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub volatile: bool,
    /// The bitmap before was lost, or is of a content that was put back since, so that what changed in between is not known.
    /// A kept snapshot is compared for all that; only what bitmaps tell does not reach across it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub anew: bool,
}

/// What keeps a disk's instant, so that later changes are known.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// A dirty bitmap of this name, which records what is written after the instant and until the next checkpoint's.
    Bitmap(String),
    /// This snapshot, which is kept: its content and a later one's are compared.
    Pinned(SnapshotId),
}

impl Mark {
    /// The bitmap, where it is one.
    #[must_use]
    pub fn bitmap(&self) -> Option<&str> {
        match self {
            Self::Bitmap(name) => Some(name),
            Self::Pinned(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_libvirt_and_qemu_take() {
        for bad in ["", ".a", "a/b", "a\nb", "a b", "ä", &"x".repeat(1024)] {
            let error = bad.parse::<CheckpointName>().expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
        }
        for good in [
            "a",
            "-a",
            "_.-",
            "5768a388-c1c4-414c-ac4e-eab216ba7c0c",
            &"x".repeat(1023),
        ] {
            assert!(good.parse::<CheckpointName>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_snapshot_whose_name_no_checkpoint_can_have_is_told() {
        let name: SnapshotName = "nightly 3".parse().expect("a snapshot can be called so");
        let error = CheckpointName::try_from(&name).expect_err("no checkpoint can");
        assert!(error.next_step().is_some_and(|hint| hint.contains("of its own")));
    }
}
