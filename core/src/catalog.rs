//! What the dispatcher needs of the durable catalog: records, intents before acts, one lock per domain.

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    Alias, Attached, Checkpoint, CheckpointName, Crossing, Disk, DiskRequest, Domain, DomainId, Ending,
    Export, FillStage, Lending, MergeInto, NbdServer, Prepared, Result, Snapshot, SnapshotId, SnapshotName,
    Source, Start,
};

/// The durable catalog. Every method is one atomic, durable step: after a kill it has happened or not.
#[async_trait]
pub trait Catalog: fmt::Debug + Send + Sync {
    /// Locks the domain against every other process and task; freed when the lock is dropped or the
    /// process dies. `Busy` when somebody else keeps it for longer than the catalog's patience.
    async fn lock(&self, domain: &DomainId) -> Result<Box<dyn DomainLock>>;

    /// Makes a domain known by name and UUID, or replaces what is known of the same UUID.
    /// `AlreadyExists` when another UUID has the name.
    async fn define(&self, definition: &Definition) -> Result<()>;

    /// Forgets a domain's definition. `NotFound` when there is none; `Busy` while it has snapshots or checkpoints.
    async fn undefine(&self, domain: &DomainId) -> Result<()>;

    /// All definitions, by name.
    async fn definitions(&self) -> Result<Vec<Definition>>;

    /// Writes an intent, or what has become known of one since.
    async fn intend(&self, intent: &Intent) -> Result<()>;

    /// The intents that have no outcome, oldest first; of all domains without `domain`.
    async fn intents(&self, domain: Option<&DomainId>) -> Result<Vec<Intent>>;

    /// Writes the outcome of an intent and removes it, in one step. Without changes it came to nothing.
    /// An intent that is not there (the nil UUID for none) only has its changes written.
    async fn settle(&self, intent: Uuid, domain: &DomainId, changes: &[Change]) -> Result<()>;

    /// A domain's snapshots, oldest first.
    async fn snapshots(&self, domain: &DomainId) -> Result<Vec<Snapshot>>;

    /// The snapshots that were deleted and are kept because a checkpoint is them ([`Snapshot::pinned`]), oldest first.
    async fn pinned(&self, domain: &DomainId) -> Result<Vec<Snapshot>>;

    /// The snapshot of this name that was deleted last, if the catalog still remembers one.
    async fn deleted(&self, domain: &DomainId, name: &SnapshotName) -> Result<Option<SnapshotId>>;

    /// A domain's checkpoints, oldest first. Whether they are a sound set is not looked at.
    async fn checkpoints(&self, domain: &DomainId) -> Result<Vec<Checkpoint>>;

    /// Where the domain's disks have gone, the latest last.
    async fn moves(&self, domain: &DomainId) -> Result<Vec<Moved>>;

    /// A lease that lives as long as the returned value, and ends with the process.
    async fn lease(&self) -> Result<(Uuid, Box<dyn DomainLock>)>;

    /// Whether a lease still lives.
    async fn lease_lives(&self, lease: Uuid) -> Result<bool>;

    /// The domain's NBD server, as recorded.
    async fn server(&self, domain: &DomainId) -> Result<Option<NbdServer>>;

    /// The domain's exports, as recorded.
    async fn exports(&self, domain: &DomainId) -> Result<Vec<Export>>;
}

/// A held lock or lease; dropping it lets go.
pub trait DomainLock: fmt::Debug + Send + Sync {}

/// A domain made known to disksnap: its document, and what was read from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Which domain.
    pub id: DomainId,
    /// The document as it was given.
    pub document: String,
}

/// A disk of a domain that has become another: a document that names the old one is out of date.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Where its bytes were.
    pub from: Source,
    /// The disk as the domain uses it since.
    pub disk: Disk,
}

/// What is about to be done; written before the first act.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Unique; for a create the request's id.
    pub id: Uuid,
    /// The domain, with all that is needed to reach it again.
    pub domain: Domain,
    /// When it was written.
    pub since: SystemTime,
    /// What.
    pub act: Act,
}

/// What an intent is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "kebab-case")]
pub enum Act {
    /// A snapshot is being made.
    Create {
        /// Its name.
        name: SnapshotName,
        /// What each provider was asked for.
        parts: Vec<Part>,
        /// What happens to the disks' bitmaps at the instant.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        starts: Vec<Start>,
    },
    /// A snapshot is being deleted.
    Delete {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Units of a snapshot are being merged. In force for as long as the lease lives; then nobody drives it, and
    /// whoever comes next ends it.
    Merge {
        /// Which snapshot.
        snapshot: SnapshotId,
        /// Its name.
        name: SnapshotName,
        /// The targets of the units' disks.
        targets: Vec<String>,
        /// Which way it goes.
        #[serde(default)]
        into: MergeInto,
        /// The lease of the process that drives it.
        lease: Uuid,
    },
    /// Units of a snapshot are being put back.
    Revert {
        /// Which snapshot.
        snapshot: SnapshotId,
        /// The targets of the units' disks.
        targets: Vec<String>,
    },
    /// Exports are being started, and the server with them if it does not run yet.
    Serve {
        /// The server.
        server: NbdServer,
        /// Whether this act starts it.
        starts: bool,
        /// Whether this act starts the image server.
        #[serde(default)]
        starts_images: bool,
        /// The exports.
        exports: Vec<Export>,
    },
    /// A reader reads through an export of its own. In force for as long as the lease lives; then the export
    /// is to be stopped.
    Read {
        /// The reader's lease.
        lease: Uuid,
        /// The export.
        export: Alias,
    },
    /// A disk is being plugged into another domain's guest, over an export of its own.
    Attach {
        /// That domain, and what is plugged.
        attached: Box<Attached>,
        /// The export.
        export: Alias,
    },
    /// A disk is being taken out of another domain's guest, and its export stopped.
    Detach {
        /// That domain, and what is taken out.
        attached: Box<Attached>,
        /// The export.
        export: Alias,
    },
    /// A paused guest's disks are lent out to be filled. In force while it is open, in one run of the hypervisor.
    Fill {
        /// What is lent, and where it is served.
        lending: Box<Lending>,
        /// How far it is.
        stage: FillStage,
    },
    /// Bitmaps are being ended, and the records of what they were for changed.
    EndMarks {
        /// The bitmaps.
        endings: Vec<Ending>,
        /// What is written down afterwards.
        changes: Vec<Change>,
    },
    /// A raw disk gets a qcow2 that keeps its bitmaps, or gives it up.
    Cross {
        /// The disk as it was and as it is to be.
        crossing: Box<Crossing>,
        /// What is written down when it has crossed.
        changes: Vec<Change>,
    },
    /// Exports are being stopped, and the server with them if none is left.
    Unserve {
        /// The exports.
        exports: Vec<Alias>,
    },
}

/// One provider's part in a create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The provider's method.
    pub method: String,
    /// What it was asked for.
    pub disks: Vec<DiskRequest>,
    /// What it has prepared, once it has.
    pub prepared: Option<Vec<Prepared>>,
}

/// One change of the catalog's records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::large_enum_variant,
    reason = "there are a handful at a time, and they are written and gone"
)]
pub enum Change {
    /// A snapshot has come to be, or replaces the record of the same id. `AlreadyExists` when its name is another's. One
    /// that is [`Snapshot::pinned`] has no name that counts: it is deleted for its users.
    AddSnapshot(Box<Snapshot>),
    /// A snapshot is gone, or never was.
    RemoveSnapshot(SnapshotId),
    /// The domain's checkpoints are these and no others.
    SetCheckpoints(Vec<Checkpoint>),
    /// A checkpoint has come to be, or replaces the record of the same name.
    AddCheckpoint(Box<Checkpoint>),
    /// A checkpoint is gone, or never was.
    RemoveCheckpoint(CheckpointName),
    /// A disk has become another; what was known to lead away from that one is forgotten.
    Move(Box<Moved>),
    /// The domain's NBD server is this.
    SetServer(NbdServer),
    /// The domain has no NBD server.
    ClearServer,
    /// An export has come to be, or replaces the one with its alias.
    AddExport(Export),
    /// An export is gone, or never was.
    RemoveExport(Alias),
}
