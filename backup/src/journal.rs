//! What is written down of a point while it is being pulled, so that a later run can go on: `unfinished.json`.

use std::time::SystemTime;

use disksnap::{CheckpointName, Disks, Quiesce, SnapshotId, SnapshotName};
use disksnap::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use crate::levels::Parent;
use crate::{Compression, Digest, DiskEntry, DomainFolder, ImageState, Level, MachineEntry, Repository};

/// The journal's file in the point's folder.
pub(crate) const FILE: &str = "unfinished.json";
/// No journal is longer, in bytes.
const LIMIT: u64 = 64 << 20;

/// Which level is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WantedLevel {
    /// An increment of the disks of which it is known what has changed, and all of the others.
    #[default]
    Auto,
    /// All of every disk.
    Full,
    /// An increment of every disk, or nothing.
    Incremental,
}

/// What a point was asked to be: a run that asks for something else does not go on with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub(crate) level: WantedLevel,
    pub(crate) disks: Disks,
    pub(crate) compression: Compression,
    pub(crate) quiesce: Quiesce,
    pub(crate) mountpoints: Vec<String>,
    /// Where another host's snapshot is served, and what was said of it.
    #[serde(default)]
    pub(crate) served: Option<Served>,
}

/// What was said of a snapshot that another host serves: one of which anything else is said is another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Served {
    pub(crate) taken: SystemTime,
    pub(crate) since: Option<CheckpointName>,
    pub(crate) checkpoint: Option<CheckpointName>,
    /// The exports, as they were named.
    pub(crate) exports: Vec<String>,
}

/// A point that is being pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Journal {
    pub(crate) point: String,
    pub(crate) asked: Asked,
    pub(crate) snapshot: SnapshotName,
    /// The request that takes the snapshot, where this host takes it.
    pub(crate) id: Option<SnapshotId>,
    /// The checkpoint that begins with it.
    pub(crate) checkpoint: Option<CheckpointName>,
    /// How many runs have gone on with it.
    #[serde(default)]
    pub(crate) attempts: u32,
    #[serde(default)]
    pub(crate) machine: Option<MachineEntry>,
    /// What is to be known of what was saved beside the disks.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
    /// The disks that have been begun.
    #[serde(default)]
    pub(crate) disks: Vec<Begun>,
}

/// The file: a journal, and the digest of its text. What a bit that has tipped over makes of it could be an image that is only
/// found to be wrong when it is needed.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed<T> {
    digest: Digest,
    journal: T,
}

/// A disk that is being pulled, or has been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begun {
    pub(crate) target: String,
    pub(crate) planned: Planned,
    /// How far its image is.
    #[serde(default)]
    pub(crate) state: Option<ImageState>,
    /// What it has become.
    #[serde(default)]
    pub(crate) entry: Option<DiskEntry>,
}

/// What a disk's image is to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Planned {
    pub(crate) level: Level,
    /// The point that an increment is over, and the checkpoint that began there.
    pub(crate) parent: Option<(String, CheckpointName)>,
    pub(crate) why_full: Option<String>,
}

impl Planned {
    /// Whether it is an increment over this very point.
    pub(crate) fn is_over(&self, parent: &Parent) -> bool {
        let over = self.parent.as_ref();
        over.is_some_and(|(point, since)| *point == parent.point && *since == parent.checkpoint)
    }
}

impl Journal {
    /// The disk's part of it.
    ///
    /// # Errors
    /// `Internal` for a disk that was not begun.
    pub(crate) fn disk(&mut self, target: &str) -> Result<&mut Begun> {
        let found = self.disks.iter_mut().find(|begun| begun.target == target);
        found.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "a disk is pulled that was not begun").with("disk", target)
        })
    }

    /// Writes it down, durably.
    pub(crate) async fn save(&self, repository: &Repository, folder: &DomainFolder) -> Result<()> {
        let json = self
            .to_json()
            .map_err(|e| defect("cannot write the journal", e))?;
        let key = repository.key(folder, &self.point, FILE);
        repository.store().put(&key, &json).await
    }

    /// The journal of an unfinished point; `None` where it has none, or a damaged one: nobody can go on with that.
    pub(crate) async fn load_if_sound(
        repository: &Repository,
        folder: &DomainFolder,
        point: &str,
    ) -> Result<Option<Self>> {
        match Self::load(repository, folder, point).await {
            Err(error) if error.kind() == ErrorKind::Broken => Ok(None),
            loaded => loaded,
        }
    }

    /// # Errors
    /// `Broken` for one that is damaged.
    async fn load(repository: &Repository, folder: &DomainFolder, point: &str) -> Result<Option<Self>> {
        let key = repository.key(folder, point, FILE);
        let bytes = match repository.store().get(&key, LIMIT).await {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        match Self::from_json(&bytes) {
            Ok(journal) if journal.point == point => Ok(Some(journal)),
            Ok(_) => Err(Error::new(
                ErrorKind::Broken,
                "the journal of an unfinished backup is of another point",
            )
            .with("object", key)),
            Err(error) => Err(error.with("object", key)),
        }
    }

    pub(crate) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let journal = to_raw_value(self)?;
        let digest = Digest::of(journal.get().as_bytes());
        serde_json::to_vec(&Sealed { digest, journal })
    }

    /// # Errors
    /// `Broken` for what [`Journal::to_json`] did not write.
    pub(crate) fn from_json(text: &[u8]) -> Result<Self> {
        let broken = |what: &str| {
            Error::new(
                ErrorKind::Broken,
                format!("the journal of an unfinished backup cannot be read: {what}"),
            )
        };
        let sealed: Sealed<&RawValue> =
            serde_json::from_slice(text).map_err(|e| broken("it is damaged, or ends early").because(e))?;
        let json = sealed.journal.get();
        if Digest::of(json.as_bytes()) != sealed.digest {
            return Err(broken("what it says is not what was written, by its digest"));
        }
        serde_json::from_str(json).map_err(|e| broken("a field is missing or wrong").because(e))
    }

    /// Ends it: the point has its manifest.
    pub(crate) async fn remove(&self, repository: &Repository, folder: &DomainFolder) -> Result<()> {
        let key = repository.key(folder, &self.point, FILE);
        repository.store().remove(&key).await
    }
}

fn defect(what: &str, error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Internal, what).because(error)
}
