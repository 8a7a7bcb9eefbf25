//! The contract a provider signs: the trait [`DiskSnapshot`] and the records that cross it.
//!
//! Everything that crosses the trait is a plain, serializable record. A provider keeps no state
//! between calls: what it must remember it returns (`data`), opaque to core, and gets back.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Alias, BackingStore, Command, Compare, Disk, Error, ErrorKind, Host, Merge, Options, Result, Revert,
    SnapshotId, Source,
};

/// A snapshot method.
///
/// The order of calls for one request:
///
/// ```text
/// probe ─► prepare ─► take_plan ─► ┌ window: guest frozen or paused where a plan needs it ┐ ─► complete
///             │                    │   Atomic, Paused: core sends the commands            │
///             │ error              │   Host: core calls take                              │
///             ▼                    └──────────────┬──────────────────────────────────────-┘
///           abort ◄────────────────────────── error
/// later, in any process: inspect, delete; revert and merge where the unit allows them
/// ```
///
/// The wrapper guarantees: the domain is locked against other requests; options hold only keys from
/// [`Method::options`], each once; `prepare` gets disks that `probe` found fit; the request is in the
/// journal before `prepare`, and what `prepare` returned is there before anything is taken.
///
/// A provider must not panic, and must not block the executor for long.
#[async_trait]
pub trait DiskSnapshot: fmt::Debug + Send + Sync {
    /// What the method is and what it can be told. Pure.
    fn method(&self) -> Method;

    /// Looks whether and how each disk can be snapshotted; changes nothing. One answer per disk, in order.
    ///
    /// Also called when the domain is off. An error means that nothing could be found out at all; what
    /// stands against one disk belongs in its [`Fit`].
    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>>;

    /// Does all that may be slow, reversibly: allocate, check space, write back. One answer per unit.
    ///
    /// Called again with the same id after a crash it gives the same answer. An error leaves whatever
    /// it leaves: core calls `abort` next.
    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>>;

    /// What fixes the instant for a prepared unit. Pure.
    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan>;

    /// Fixes the instant; called inside the window, for [`TakePlan::Host`] only. Must be short.
    async fn take(&self, host: &dyn Host, prepared: &Prepared) -> Result<Taken>;

    /// Builds what reading needs, after the guest runs again.
    async fn complete(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        prepared: &Prepared,
        taken: &Taken,
    ) -> Result<Unit>;

    /// Undoes whatever a request has done so far, before, during or after its take. Idempotent.
    ///
    /// `prepared` is `None` when a kill came before `prepare` answered: names are derived from the id,
    /// so that what it made can be found. What another request or the user made is never touched.
    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()>;

    /// Whether the snapshot can be trusted, from the real thing and not from the record.
    async fn inspect(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Health>;

    /// Deletes a unit and all that was made for it. Idempotent; also when broken or gone.
    ///
    /// A unit that [`DiskSnapshot::merge`] answers for is merged instead, and this is called only where nothing stands on
    /// it any more.
    async fn delete(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()>;

    /// What puts this unit's instant back into its disks; `None` where that cannot be done. Pure.
    fn revert(&self, unit: &Unit) -> Option<Arc<dyn Revert>>;

    /// What merges this unit, where the domain's disks stand on it; `None` where the domain keeps its disks, so that
    /// there is nothing to merge. Pure.
    fn merge(&self, unit: &Unit) -> Option<Arc<dyn Merge>>;

    /// What tells how this unit's disks differ from those of another unit of the method; `None` where only reading both
    /// would tell. Pure.
    fn compare(&self, unit: &Unit) -> Option<Arc<dyn Compare>>;
}

/// What a method is: for lists, help and checking what it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Method {
    /// Its name: lower-case letters, digits and dashes.
    pub name: String,
    /// Other names that it is asked for by (`qemu` in `seeds/live-disk-snapshot-rfc.txt`); records hold its name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// One line: what it does.
    pub summary: String,
    /// What it can be told.
    pub options: Vec<OptionDoc>,
    /// What it offers on the disks that suit it best; a disk's own are in its [`Probe`].
    pub capabilities: Vec<Capability>,
}

/// One key that a method understands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OptionDoc {
    /// The key, as in [`Options`].
    pub key: String,
    /// What values it takes and what they mean, in one line.
    pub help: String,
}

/// What can be done with a snapshot of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Capability {
    /// Taken while the domain runs.
    Active,
    /// Taken while the domain is off.
    Inactive,
    /// Served over NBD by the hypervisor that holds the disk.
    Export,
    /// `backupSource` can be opened, read-only, by any program on the host.
    DirectRead,
    /// The guest's writes never fail because of the snapshot.
    GuestSafe,
    /// The instant can be put back into the disk.
    Revert,
    /// The disk stands on the snapshot, and giving the snapshot up merges the two.
    Merge,
    /// What differs from another snapshot of the disk is told without reading both: a checkpoint needs no bitmap.
    Compare,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Inactive => "inactive",
            Self::Export => "export",
            Self::DirectRead => "direct-read",
            Self::GuestSafe => "guest-safe",
            Self::Revert => "revert",
            Self::Merge => "merge",
            Self::Compare => "compare",
        })
    }
}

/// One disk of a request, as its provider sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRequest {
    /// The disk.
    pub disk: Disk,
    /// The alias that this disk will have in this snapshot.
    pub alias: Alias,
    /// What the method is told for this disk.
    pub options: Options,
}

/// How well a method suits a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// This is the layer that the disk lives on: the default.
    Natural,
    /// It works when asked for.
    Possible,
    /// It does not work with this disk as it is now.
    Unfit {
        /// The class of what stands against it: what a create would fail with.
        kind: ErrorKind,
        /// Why, for people.
        why: String,
    },
}

/// What a provider found out about one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Whether the method suits the disk.
    pub fit: Fit,
    /// Disks with the same key are covered by one and the same snapshot.
    pub unit: String,
    /// What can be done with a snapshot of this very disk.
    pub capabilities: Vec<Capability>,
    /// What a snapshot would do, in one or two sentences for the operator.
    pub effect: String,
    /// Details, for programs (`way`: `filter`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
    /// What the operator should know before going on: low space, a risk for the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Probe {
    /// The answer for a disk that the method cannot work with, and why.
    pub fn unfit(why: impl Into<String>) -> Self {
        Self::refused(ErrorKind::Unsupported, why)
    }

    /// The answer for a disk that the method does not work with as things are now, and why.
    pub fn refused(kind: ErrorKind, why: impl Into<String>) -> Self {
        Self {
            fit: Fit::Unfit {
                kind,
                why: why.into(),
            },
            unit: String::new(),
            capabilities: Vec::new(),
            effect: String::new(),
            details: BTreeMap::new(),
            warnings: Vec::new(),
        }
    }
}

/// A unit that is ready to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The unit's key, as probed.
    pub unit: String,
    /// The targets of the disks in it.
    pub targets: Vec<String>,
    /// The provider's own memory.
    pub data: Value,
    /// By target: what the guest writes to from the instant on, where that is another than before: the node that holds the
    /// image's format, or with the domain off the image's path.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tops: BTreeMap<String, String>,
    /// What the operator should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What fixes the instant of one unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TakePlan {
    /// Items of one all-or-nothing monitor command that all plans naming that command share.
    Atomic(Batch),
    /// Commands that are one instant only while the guest stands still.
    Paused(Vec<Step>),
    /// The provider's own [`DiskSnapshot::take`], while the guest stands still.
    Host,
}

/// A share in one monitor command that takes a list and does all of it or nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// The command (`transaction`).
    pub execute: String,
    /// The argument that takes the list (`actions`).
    pub list: String,
    /// This unit's items.
    pub items: Vec<Value>,
    /// What takes this unit's items back, should a later take of the request fail.
    pub undo: Vec<Command>,
}

/// One command and what takes it back, should a later one of the request fail.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The command.
    pub command: Command,
    /// Its undo; `None` where abort does all that is needed.
    pub undo: Option<Command>,
}

/// What a take left to remember.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Taken {
    /// The provider's own memory; null where core sent the commands.
    pub data: Value,
}

/// A unit of a finished snapshot: one thing that covers one disk or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// The unit's key, as probed.
    pub unit: String,
    /// What came out for each disk in it.
    pub disks: Vec<DiskResult>,
    /// The provider's own memory.
    pub data: Value,
}

/// What came out for one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskResult {
    /// The disk's target.
    pub target: String,
    /// The disk as the domain now uses it, where that changed (`modifiedDisk`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<Disk>,
    /// How the snapshot's data is reached.
    pub access: Access,
    /// The virtual size in bytes, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// What the method says of itself for this disk (`way`: `filter`, `fleece.file`: …).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

/// How a snapshot's data is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Through an export of this node of the hypervisor's block graph.
    Node(String),
    /// By opening this source read-only; `format` is the image format.
    Source {
        /// Where the bytes are.
        source: Source,
        /// `raw`, `qcow2`, …
        format: String,
        /// The layers below, each with its format, as they are in the snapshot; `None` where it stands alone.
        /// What the image's own header says of them is never followed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backing: Option<Box<BackingStore>>,
    },
    /// As a file of a file system that is on the snapshot, and that nobody mounts on this host. It is not served or read
    /// here; the device can be another machine's disk.
    Inside(Inside),
}

/// An image that is a file of the file system on a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inside {
    /// The device on this host, which holds all of the file system as it was.
    pub device: PathBuf,
    /// `ext4`, `btrfs`, …
    pub file_system: String,
    /// The image.
    pub image: FileInside,
    /// The layers below it, nearest first, all in the same file system. What the image's own header says of them is a
    /// name on the host that it was written on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub below: Vec<FileInside>,
    /// How another machine mounts it without writing to it: the options.
    #[serde(default)]
    pub options: String,
    /// Why it is not mounted here, in one sentence without its full stop.
    pub why: String,
}

/// One file of an image's chain, in a file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInside {
    /// The path from the root of the file system, with a leading slash; of a btrfs from its top-level subvolume.
    pub path: PathBuf,
    /// `raw`, `qcow2`, …
    pub format: String,
}

impl Inside {
    /// The answer to whoever wants the disk's bytes served or read on this host, whose disk it is by `target`.
    #[must_use]
    pub fn not_here(&self, target: &str) -> Error {
        let (path, device) = (self.image.path.display(), self.device.display());
        let (format, kind, options) = (&self.image.format, &self.file_system, &self.options);
        let what = format!(
            "the disk is the {format} image {path} in the {kind} on {device}, which is not mounted on this host: {}",
            self.why
        );
        Error::new(ErrorKind::Unsupported, what)
            .with("disk", target)
            .hint(format!(
                "Give the device to another machine: `disksnap attach -d DOMAIN NAME {target} --to APPLIANCE`; there, mount \
                 the {kind} (`-o {options}`) and open {path} in it."
            ))
    }
}

/// Whether a snapshot can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "health", content = "reason", rename_all = "lowercase")]
pub enum Health {
    /// It is there and readable.
    Active,
    /// It is there and readable, but will not be for long unless something is done, and what: its room runs out.
    Endangered(String),
    /// It is there and must not be trusted, and why.
    Broken(String),
    /// It is not there any more, and why.
    Gone(String),
}

impl Health {
    /// Whether its data can be trusted now.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Active | Self::Endangered(_))
    }
}
