//! The nouns and the contract of disksnap.
//!
//! A [`Domain`] has [`Disk`]s. A disk names, or is given, a *method*; a provider implements the
//! method as [`DiskSnapshot`]. A [`SnapshotRequest`] names disks; the [`Dispatcher`] finds each
//! one's provider, prepares them all, opens one short window, takes all the snapshots, closes the
//! window and writes the result in the [`Catalog`].
//!
//! This crate runs no program, parses no XML and knows no hypervisor: it reaches a domain through
//! [`Host`] and [`Control`], which another crate implements.

mod accessors;
mod attach;
mod catalog;
mod changes;
mod checking;
mod checkpoint;
mod checkpoints;
mod disk;
mod dispatcher;
mod domain;
mod ending;
mod error;
mod export;
pub mod faults;
mod filling;
mod host;
mod hotplug;
mod image_server;
mod ledger;
mod lending;
mod lineage;
mod marking;
mod merging;
mod names;
mod pinning;
mod place;
mod provider;
mod reading;
mod recover;
mod registry;
mod removing;
mod request;
mod resolve;
mod reverting;
mod serve;
mod snapshot;
mod source;
mod standing;
mod tracker;
mod tracking;
mod wanted;
mod window;

pub use accessors::{
    Affected, Changed, Compare, Merge, MergeInto, Peer, Precision, Progress, Ranges, Revert,
};
pub use catalog::{Act, Catalog, Change, Definition, DomainLock, Intent, Moved, Part};
pub use checking::{CheckedMark, Dropped, MarkVerdict, UnknownBitmap, Validation};
pub use checkpoint::{Checkpoint, CheckpointDisk, CheckpointName, Mark};
pub use checkpoints::{Redefine, Redefined};
pub use disk::{DeviceKind, Disk, Driver, MethodChoice, Options};

pub use dispatcher::{Deleted, Deletion, Dispatcher, Inspected};
pub use domain::{Domain, DomainId, Sockets};
pub use error::{Effect, Error, ErrorKind, Result};
pub use export::{
    Changes, ClientName, Export, ExportDisk, ExportRequest, Listen, NbdServer, ServedBy, Tls, Told,
};
pub use filling::{FillDisk, FillEnd, FillEnded, FillHealth, FillRequest, Filling};
pub use host::{
    Command, Connector, Control, DiskNode, Freeze, Guard, Host, NodeBitmap, Owner, RunState, ServeNode,
    Verdict, Watch,
};
pub use hotplug::{Attached, Hotplug, PlugDisk, PlugTls};
pub use image_server::{Image, ImageServer};
pub use ledger::Altered;
pub use lending::{FillStage, Lend, Lending, LentDisk};
pub use lineage::{Lineage, Removal, Unmark};
pub use merging::{Job, JobUnit, MergeOptions, Watcher};
pub use names::{Alias, SnapshotId, SnapshotName};
pub use provider::{
    Access, Batch, Capability, DiskRequest, DiskResult, DiskSnapshot, FileInside, Fit, Health, Inside,
    Method, OptionDoc, Prepared, Probe, Step, TakePlan, Taken, Unit,
};

pub use reading::Opened;
pub use recover::{Recovered, RecoveredHow};
pub use registry::{Registration, Registry};
pub use request::{DEADLINE, DiskChoice, Disks, NewCheckpoint, Quiesce, SnapshotRequest};
pub use resolve::{Plan, PlannedDisk, Skipped, Why};
pub use serve::{Serving, StopExports};
pub use snapshot::{Consistency, DiskSnapshotRecord, Inherited, Snapshot, UnitRecord, WindowReport};
pub use source::{BackingStore, DataStore, NetworkHost, Source};
pub use tracker::{DirtyBitmap, Ending, SCRATCH_BITMAP, Start, Trackable, Tracked, Tracker, Union};
pub use tracking::{Crossed, Crossing, RawDisks};

/// What a crate that registers a provider with [`register!`] needs to name.
#[doc(hidden)]
pub mod private {
    pub use inventory;
}
