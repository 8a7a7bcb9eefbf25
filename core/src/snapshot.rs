//! A finished snapshot, as the catalog keeps it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::{Access, Alias, CheckpointName, Disk, DomainId, Skipped, SnapshotId, SnapshotName, Unit, Why};

/// One consistent instant of some disks of one domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The id of the request that made it.
    pub id: SnapshotId,
    /// Its name, unique within the domain.
    pub name: SnapshotName,
    /// Whose disks.
    pub domain: DomainId,
    /// The instant, by the host's clock.
    pub created: SystemTime,
    /// How consistent the guest's file systems are in it.
    pub consistency: Consistency,
    /// How long the guest stood still for it.
    pub window: WindowReport,
    /// Its disks, in the domain's order.
    pub disks: Vec<DiskSnapshotRecord>,
    /// What the providers made.
    pub units: Vec<UnitRecord>,
    /// The domain's disks that are not in it, and why.
    pub skipped: Vec<Skipped>,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// The checkpoint that began at the instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointName>,
    /// The domain's last checkpoint before the instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<CheckpointName>,
    /// It was deleted, and what is left of it is kept because a checkpoint is it ([`Mark::Pinned`](crate::Mark::Pinned)):
    /// its name is free, and it ends with the last such checkpoint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
}

impl Snapshot {
    /// The record of the disk with this target, if it is part of the snapshot.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&DiskSnapshotRecord> {
        self.disks.iter().find(|disk| disk.target == target)
    }
}

/// One disk in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSnapshotRecord {
    /// The disk's target.
    pub target: String,
    /// Its alias in this snapshot: what exports call it.
    pub alias: Alias,
    /// The method that took it.
    pub method: String,
    /// Why that method.
    pub why: Why,
    /// Index of its unit in [`Snapshot::units`].
    pub unit: usize,
    /// The disk as the domain now uses it; `None` where the domain keeps its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified_disk: Option<Disk>,
    /// How its data is reached.
    pub access: Access,
    /// Virtual size in bytes, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// What the method says of itself for this disk.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
    /// The bitmap that holds what was written to the disk between the last checkpoint before the instant and the instant,
    /// where the checkpoint's own went on recording.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<String>,
    /// What was written to the disk between the last checkpoint before the instant and the instant is not known.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub untold: bool,
    /// The bitmaps of checkpoints that have been removed since, in the layers of the snapshot's image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inherited: Vec<Inherited>,
    /// In how many layers each bitmap was at the instant, where the data is in images: those whose image keeps fewer were
    /// never saved there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shares: BTreeMap<String, usize>,
}

/// A bitmap of a checkpoint that has been removed, where it could not be merged into the one before: in the image of a
/// snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inherited {
    /// The bitmap.
    pub bitmap: String,
    /// The checkpoint that it counts to; `None` where none is left before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heir: Option<CheckpointName>,
}

/// What one provider made for one unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitRecord {
    /// The provider's method.
    pub method: String,
    /// Its record.
    #[serde(flatten)]
    pub unit: Unit,
}

/// How consistent the guest's file systems are in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "level", rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut: nobody asked for more.
    Crash,
    /// As after a power cut: a freeze was tried and did not come about.
    Unquiesced {
        /// Why not.
        reason: String,
    },
    /// The guest agent froze the file systems around the instant.
    Filesystem {
        /// How many file systems.
        filesystems: u64,
        /// Where the guest has them mounted; empty where its agent did not tell.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        mountpoints: Vec<String>,
    },
    /// The domain was off.
    Inactive,
}

/// How long the guest stood still, in microseconds; zero where it never did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WindowReport {
    /// From the order to freeze until the thaw was confirmed.
    pub frozen_us: u64,
    /// From the order to pause until the guest ran again.
    pub paused_us: u64,
    /// From the first take to the last.
    pub taken_us: u64,
}
