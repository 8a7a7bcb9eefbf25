//! What a caller asks for: which disks, by which method, at what consistency, under which name.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{CheckpointName, MethodChoice, Options, SnapshotId, SnapshotName};

/// For how long a guest, or a disk of it, may stand still when nobody says otherwise. Windows holds a freeze for about
/// 10 s.
pub const DEADLINE: Duration = Duration::from_secs(8);

/// A request for a snapshot of some disks of one domain, all at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// The request's id. The same id again answers with the snapshot that the first one made.
    pub id: SnapshotId,
    /// The snapshot's name; the id where none is given.
    pub name: Option<SnapshotName>,
    /// Which disks.
    pub disks: Disks,
    /// How consistent the guest's file systems must be.
    pub quiesce: Quiesce,
    /// The guest's mount points whose file systems are frozen; all when none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mountpoints: Vec<String>,
    /// How long the guest may stay frozen or paused. Windows holds a freeze for about 10 s.
    pub deadline: Duration,
    /// The checkpoint that begins at the snapshot's instant, on all its disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<NewCheckpoint>,
    /// Leave out of the checkpoint the disks on which none can begin, and warn of it, rather than refuse. Where it can begin
    /// on no disk, none does.
    #[serde(default)]
    pub checkpoint_where_possible: bool,
}

/// What a checkpoint that begins with a snapshot is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewCheckpoint {
    /// As the snapshot is.
    AsSnapshot,
    /// So.
    Named(CheckpointName),
}

impl Default for SnapshotRequest {
    /// All disks that are snapshotted when nobody names any, not quiesced, at most 8 s frozen or paused, no checkpoint.
    fn default() -> Self {
        Self {
            id: SnapshotId::random(),
            name: None,
            disks: Disks::Writable,
            quiesce: Quiesce::None,
            mountpoints: Vec::new(),
            deadline: DEADLINE,
            checkpoint: None,
            checkpoint_where_possible: false,
        }
    }
}

/// Which disks of the domain a request means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disks {
    /// Every disk but CD-ROM and floppy drives, read-only disks, shareable disks and empty drives.
    Writable,
    /// These, whatever they are.
    Named(Vec<DiskChoice>),
}

/// One named disk and how it is to be snapshotted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskChoice {
    /// The disk's target.
    pub target: String,
    /// The method and what it is told; overrides what the disk itself names.
    pub method: Option<MethodChoice>,
    /// What the method is told when `method` is not given; added to what the disk itself says.
    pub options: Options,
}

impl DiskChoice {
    /// The disk with this target, by the method that is its own or its default.
    pub fn new(target: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            method: None,
            options: Options::default(),
        }
    }
}

/// Whether the guest's file systems are frozen around the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quiesce {
    /// No: the snapshot is what a power cut would leave.
    #[default]
    None,
    /// If the guest agent answers; the result says whether it did.
    Try,
    /// Yes, or no snapshot is taken.
    Require,
}
