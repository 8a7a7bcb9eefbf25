//! What this method remembers of a snapshot of one disk, and what it answers from that.

use std::collections::BTreeMap;
use std::path::PathBuf;

use disksnap_core::{Access, Disk, DiskResult, Error, ErrorKind, Peer, Result, SnapshotId, Unit};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layer::{Layer, Stamp, backing_store, disk_of};
use crate::names::Names;

/// One disk in a finished snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: SnapshotId,
    pub(crate) target: String,
    /// What was the disk's top image: the snapshot's data.
    pub(crate) base: Layer,
    /// The layers below it, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) below: Vec<Layer>,
    /// The overlay by which the domain's disk stands on the base; `None` since a revert has led the disk elsewhere.
    pub(crate) overlay: Option<PathBuf>,
    /// The base was once an overlay of ours, and nothing but snapshots needs it any more: it goes with this one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) orphan: bool,
    /// The overlay that the base's data has gone into: one of ours too, which the disk stands on by itself since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) streamed: Option<PathBuf>,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// What tells whether the base was written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stamp: Option<Stamp>,
    /// The same of its data file, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data_stamp: Option<Stamp>,
}

impl Record {
    /// What was remembered of a unit.
    pub(crate) fn of(unit: &Unit) -> Result<Self> {
        remembered(&unit.data)
    }

    pub(crate) fn names(&self) -> Names {
        Names::new(self.id, &self.target)
    }

    /// All files that the snapshot is read from.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Layer> {
        std::iter::once(&self.base).chain(&self.below)
    }

    /// The unit, as core keeps it; `disk` is the domain's disk, whose source is going to be this record's.
    pub(crate) fn unit(&self, disk: &Disk) -> Result<Unit> {
        let path = |path: &PathBuf| path.display().to_string();
        let mut details = BTreeMap::from([("base".to_owned(), path(&self.base.path))]);
        details.extend(
            self.base
                .data
                .as_ref()
                .map(|data| ("base data".to_owned(), path(data))),
        );
        details.extend(
            self.overlay
                .as_ref()
                .map(|overlay| ("overlay".to_owned(), path(overlay))),
        );
        details.extend(
            self.streamed
                .as_ref()
                .map(|overlay| ("merged into".to_owned(), path(overlay))),
        );
        Ok(Unit {
            unit: self.target.clone(),
            disks: vec![DiskResult {
                target: self.target.clone(),
                modified: self.overlay.as_ref().map(|overlay| self.modified(disk, overlay)),
                access: Access::Source {
                    source: self.base.source(),
                    format: self.base.format.clone(),
                    backing: backing_store(&self.below),
                },
                size: Some(self.size),
                details,
            }],
            data: written(self)?,
        })
    }

    /// The disk right after this snapshot.
    fn modified(&self, disk: &Disk, overlay: &PathBuf) -> Disk {
        let mut layers = vec![Layer::new(overlay, "qcow2")];
        layers.extend(self.files().cloned());
        disk_of(disk, &layers)
    }
}

/// Another snapshot of the same disk.
#[derive(Debug, Clone)]
pub(crate) struct Kin {
    pub(crate) snapshot: SnapshotId,
    pub(crate) record: Record,
}

impl Kin {
    /// The peers of a disk's snapshot that are of the same disk, oldest first.
    pub(crate) fn of(target: &str, peers: &[Peer]) -> Result<Vec<Self>> {
        let kin = |peer: &Peer| {
            Ok(Self {
                snapshot: peer.snapshot,
                record: Record::of(&peer.unit)?,
            })
        };
        let same = |kin: &Result<Self>| kin.as_ref().map_or(true, |kin| kin.record.target == target);
        peers.iter().map(kin).filter(same).collect()
    }

    /// The peer with another record; `None` where nothing changed.
    pub(crate) fn changed(&self, record: &Record, disk: &Disk) -> Result<Option<Peer>> {
        if *record == self.record {
            return Ok(None);
        }
        Ok(Some(Peer {
            snapshot: self.snapshot,
            unit: record.unit(disk)?,
        }))
    }
}

/// A record as core keeps it.
pub(crate) fn written(record: &impl Serialize) -> Result<Value> {
    serde_json::to_value(record)
        .map_err(|e| Error::new(ErrorKind::Internal, "the record of a snapshot cannot be written").because(e))
}

/// A record read back.
pub(crate) fn remembered<T: serde::de::DeserializeOwned>(data: &Value) -> Result<T> {
    serde_json::from_value(data.clone())
        .map_err(|e| Error::new(ErrorKind::Internal, "the record of a snapshot is damaged").because(e))
}
