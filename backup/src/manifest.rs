//! What is written down of a point in time: `manifest.json`, schema 1 (`docs/backup-format.md`).

use std::time::SystemTime;

use disksnap::{CheckpointName, Consistency, DomainId, SnapshotName};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Compression, Digest};

/// One point in time of a domain. Its file is written last: a point without one does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The repository's id.
    pub repository: Uuid,
    /// The point's name: its instant, `20261122T021500Z`; `-2` and so on for a second one of that second.
    pub point: String,
    /// Whose.
    pub domain: DomainId,
    /// The instant of the snapshot, by the clock of the domain's host.
    #[serde(with = "crate::manifest::instant")]
    pub created: SystemTime,
    /// How consistent the guest's file systems are in it.
    pub consistency: Consistency,
    /// The snapshot that it was pulled from.
    pub snapshot: SnapshotName,
    /// The checkpoint that began at the instant, on the disks that say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointName>,
    /// The disks, in the domain's order.
    pub disks: Vec<DiskEntry>,
    /// The domain's document and what belongs to its firmware.
    pub machine: MachineEntry,
    /// What the operator was told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What wrote it: `disksnap 0.1.0`.
    pub tool: String,
}

/// Whether an image stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// It holds the whole disk.
    Full,
    /// It holds what changed since an earlier point.
    Incremental,
}

/// One disk at a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskEntry {
    /// Its target.
    pub target: String,
    /// Its size in bytes.
    pub size: u64,
    /// The method that took the snapshot.
    pub method: String,
    /// Whether the image stands alone.
    pub level: Level,
    /// Why it is a full one although an increment was wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_full: Option<String>,
    /// Why more may be in it than was written since the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excess: Option<String>,
    /// The point whose image this one is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The image's file in the point's folder.
    pub image: String,
    /// Its length as a file, in bytes.
    pub image_bytes: u64,
    /// How its data is stored.
    pub compression: Compression,
    /// How much of the disk it holds as data, in bytes.
    pub data: u64,
    /// How much of the disk it holds as zeroes, in bytes.
    pub zero: u64,
    /// The file of its chunks' digests.
    pub chunks: String,
    /// That file's digest.
    pub chunks_digest: Digest,
    /// The digest of the disk's whole content at this point; see [`content_digest`](crate::content_digest).
    pub content: Digest,
    /// Whether the point's checkpoint covers this disk: the next backup of it can be an increment.
    #[serde(default)]
    pub tracked: bool,
}

/// A small file that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileEntry {
    /// Its name in the point's folder.
    pub file: String,
    /// Where it was on the host, if it was a file there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its digest.
    pub digest: Digest,
}

/// What makes a machine of the disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MachineEntry {
    /// The domain's document.
    pub domain_xml: FileEntry,
    /// The EFI variables, where the domain has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<FileEntry>,
    /// The files of the TPM's state, where the domain has an emulated one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tpm: Vec<FileEntry>,
}

/// Instants as RFC 3339 in UTC.
pub(crate) mod instant {
    use std::time::SystemTime;

    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de, ser};

    pub(crate) fn serialize<S: Serializer>(at: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        let at = Timestamp::try_from(*at).map_err(ser::Error::custom)?;
        to.collect_str(&at)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(from)?;
        let at: Timestamp = text.parse().map_err(de::Error::custom)?;
        Ok(at.into())
    }
}
