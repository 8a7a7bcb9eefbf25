//! A set in JSON of our own: everything that is known of a checkpoint, in a form that stays.
//!
//! ```json
//! { "checkpoints": [ {
//!     "name": "tuesday", "parent": "monday", "created": "2026-11-22T04:30:00.25Z", "description": "…",
//!     "disks": [ { "target": "vda", "id": "UUID", "size": 1073741824, "bitmap": "tuesday", "volatile": true },
//!                { "target": "vdb", "snapshot": "UUID" } ] } ] }
//! ```

use std::io::{self, Read, Write};
use std::time::SystemTime;

use disksnap_core::{Checkpoint, CheckpointDisk, CheckpointName, Mark, Result, SnapshotId};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};
use uuid::Uuid;

use crate::{input, time};

/// Reads a set, in the order it comes in.
///
/// # Errors
/// `Invalid` with line and column for what is no such set, or is longer than [`MAX_BYTES`](crate::MAX_BYTES); `Io` and
/// what the reader says.
pub fn read(from: impl Read) -> Result<Vec<Checkpoint>> {
    let set: ReadSet = input::json(from)?;
    Ok(set.checkpoints.into_iter().map(Into::into).collect())
}

/// A set that can be written. It serializes as the whole document.
#[derive(Debug, Clone, Copy)]
pub struct Set<'a> {
    checkpoints: &'a [Checkpoint],
}

impl<'a> Set<'a> {
    /// These checkpoints, in this order.
    ///
    /// # Errors
    /// `Unsupported` for a time after the year 9999.
    pub fn new(checkpoints: &'a [Checkpoint]) -> Result<Self> {
        checkpoints.iter().try_for_each(time::check)?;
        Ok(Self { checkpoints })
    }

    /// Writes the document, indented, with a newline at its end.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(self, mut to: impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut to, &self)?;
        to.write_all(b"\n")
    }
}

impl Serialize for Set<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        struct Each<'a>(&'a [Checkpoint]);
        impl Serialize for Each<'_> {
            fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
                to.collect_seq(self.0.iter().map(WrittenCheckpoint::from))
            }
        }
        let mut set = to.serialize_struct("Set", 1)?;
        set.serialize_field("checkpoints", &Each(self.checkpoints))?;
        set.end()
    }
}

#[derive(Serialize)]
struct WrittenCheckpoint<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<&'a str>,
    #[serde(serialize_with = "time::serialize")]
    created: SystemTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    disks: Vec<WrittenDisk<'a>>,
}

#[derive(Serialize)]
struct WrittenDisk<'a> {
    target: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<Uuid>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    volatile: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    anew: bool,
}

impl<'a> From<&'a Checkpoint> for WrittenCheckpoint<'a> {
    fn from(checkpoint: &'a Checkpoint) -> Self {
        Self {
            name: checkpoint.name.as_str(),
            parent: checkpoint.parent.as_ref().map(CheckpointName::as_str),
            created: checkpoint.created,
            description: checkpoint.description.as_deref(),
            disks: checkpoint.disks.iter().map(Into::into).collect(),
        }
    }
}

impl<'a> From<&'a CheckpointDisk> for WrittenDisk<'a> {
    fn from(disk: &'a CheckpointDisk) -> Self {
        let (bitmap, snapshot) = match &disk.mark {
            Mark::Bitmap(name) => (Some(name.as_str()), None),
            Mark::Pinned(id) => (None, Some(id.0)),
        };
        Self {
            target: &disk.target,
            id: disk.id,
            size: disk.size,
            bitmap,
            snapshot,
            volatile: disk.volatile,
            anew: disk.anew,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "expected an object with the list `checkpoints`"
)]
struct ReadSet {
    checkpoints: Vec<ReadCheckpoint>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "expected an object, a checkpoint")]
struct ReadCheckpoint {
    name: CheckpointName,
    parent: Option<CheckpointName>,
    #[serde(deserialize_with = "time::deserialize")]
    created: SystemTime,
    description: Option<String>,
    disks: Vec<Covered>,
}

impl From<ReadCheckpoint> for Checkpoint {
    fn from(read: ReadCheckpoint) -> Self {
        Self {
            name: read.name,
            parent: read.parent,
            created: read.created,
            description: read.description,
            disks: read.disks.into_iter().map(|disk| disk.0).collect(),
        }
    }
}

/// Checked as it is read, so that a fault has its line.
#[derive(Deserialize)]
#[serde(try_from = "ReadDisk")]
struct Covered(CheckpointDisk);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "expected an object, a disk")]
struct ReadDisk {
    target: String,
    #[serde(default, deserialize_with = "input::optional_id")]
    id: Option<Uuid>,
    size: Option<u64>,
    bitmap: Option<String>,
    #[serde(default, deserialize_with = "input::optional_id")]
    snapshot: Option<Uuid>,
    #[serde(default)]
    volatile: bool,
    #[serde(default)]
    anew: bool,
}

impl TryFrom<ReadDisk> for Covered {
    type Error = String;

    fn try_from(read: ReadDisk) -> std::result::Result<Self, String> {
        let mark = match (read.bitmap, read.snapshot) {
            (Some(bitmap), None) if !bitmap.is_empty() => Mark::Bitmap(bitmap),
            (None, Some(id)) => Mark::Pinned(SnapshotId(id)),
            _ => {
                let what = "expected either its 'bitmap', a name, or its 'snapshot', a UUID";
                return Err(format!("the disk {:?}: {what}", read.target));
            }
        };
        Ok(Self(CheckpointDisk {
            target: read.target,
            id: read.id,
            size: read.size,
            mark,
            volatile: read.volatile,
            anew: read.anew,
        }))
    }
}
