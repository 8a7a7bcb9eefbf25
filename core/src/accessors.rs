//! What only some snapshots allow: putting the instant back, merging what stands on it, and being compared with another.
//!
//! [`DiskSnapshot::revert`](crate::DiskSnapshot::revert), [`DiskSnapshot::merge`](crate::DiskSnapshot::merge) and
//! [`DiskSnapshot::compare`](crate::DiskSnapshot::compare) answer with one of these traits where the unit at hand allows
//! it, and with `None` where it does not.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::{Command, Disk, Host, Result, SnapshotId, Unit};

/// Another unit of the same method on the same domain: what a merge or a revert may affect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The snapshot that it belongs to.
    pub snapshot: SnapshotId,
    /// Its record.
    pub unit: Unit,
}

/// Everything that a merge or a revert changed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Affected {
    /// What became of the unit itself: its record from now on, or `None` where it is no more.
    pub unit: Option<Unit>,
    /// The peers whose records are others now, as they are from now on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Peer>,
    /// The disks that the domain uses otherwise than before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Why it is not done yet and when it will be (an open LVM origin takes its snapshot at its next activation).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deferred: Option<String>,
    /// What the operator should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A unit whose instant can be put back into the disks.
#[async_trait]
pub trait Revert: fmt::Debug + Send + Sync {
    /// Puts the content of the instant back; what was written since is lost.
    ///
    /// All disks of the unit go back together. Idempotent: called again after a kill it finishes and gives
    /// the same answer. `peers` are the other units of the method, oldest first.
    ///
    /// # Errors
    /// `Busy` when the domain must be off for it and is not, or when a peer stands against it; `Broken` when
    /// the snapshot cannot be trusted. Nothing is changed then.
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected>;
}

/// How far a merge is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "told", rename_all = "kebab-case")]
pub enum Progress {
    /// Nothing of it is under way.
    Idle,
    /// Data is being copied; the guest runs.
    Running {
        /// Bytes done.
        done: u64,
        /// Bytes in all, as known now; may grow while the guest writes.
        total: u64,
    },
    /// All is copied; [`Merge::finish`] ends it.
    Ready,
    /// It has ended well; [`Merge::conclude`] is what is left.
    Finished,
    /// It has ended without success, in the hypervisor's words; the disk is as it was.
    Failed(String),
}

/// Which way a merge goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeInto {
    /// What stands on the snapshot goes down into it (`block-commit`, libvirt's `blockcommit`). The snapshot is given up.
    #[default]
    Base,
    /// The snapshot's data goes up into what stands on it (`block-stream`, libvirt's `blockpull`). The disk needs the
    /// snapshot no longer; the snapshot remains, readable, by itself.
    Overlay,
}

/// A unit that the domain's disk stands on: giving it up, or freeing the disk of it, means merging.
///
/// ```text
/// check ─► start ─► progress … ─► Ready ─► ┌ guardian armed: release() if we die ┐ ─► conclude
///             │                            │  finish                             │
///             └─ cancel, at any time before └──────────────────────────────────---┘
/// ```
///
/// The merge itself goes on where the disk is (in the hypervisor), not in the caller's process. All calls
/// are idempotent, and find what runs by names derived from `id` and the unit.
///
/// One value merges one way. What [`DiskSnapshot::merge`](crate::DiskSnapshot::merge) answers with merges into the base;
/// its [`Merge::stream`] is the other way.
#[async_trait]
pub trait Merge: fmt::Debug + Send + Sync {
    /// What merges the same unit into the overlay ([`MergeInto::Overlay`]); `None` where the method cannot, and of what
    /// does that itself. Pure.
    fn stream(&self) -> Option<Arc<dyn Merge>>;

    /// Whether [`Merge::start`] would do its work now, or find what is under way. Changes nothing: it is asked for all units of a
    /// snapshot before the first is started, since a unit whose merge has begun may be spoilt when that of another is refused.
    ///
    /// # Errors
    /// Those of [`Merge::start`], as far as they can be told before.
    async fn check(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()>;

    /// Starts the merge, or finds the one that runs or has run. The disk's present content stays; the
    /// snapshot is given up, or stands by itself from then on.
    ///
    /// # Errors
    /// `Busy` when something else is at work on the disk, or a peer stands on what would be changed.
    async fn start(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()>;

    /// How far it is, from the real thing.
    async fn progress(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Progress>;

    /// Ends a merge that is [`Progress::Ready`]. The guest's disk may stand still meanwhile, so it must be short
    /// while the domain runs; with the domain off the whole of the work may be in it.
    ///
    /// On an error the disk is as it was before the merge, or the merge is still ready.
    async fn finish(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()>;

    /// The commands that let the guest's disk go if this process dies within [`Merge::finish`]. Pure.
    fn release(&self, id: SnapshotId, unit: &Unit) -> Vec<Command>;

    /// Stops it; the disk goes on as before the merge, and keeps standing on the snapshot. What was copied into the base
    /// so far may be there already, so that the snapshot no longer holds its instant: `inspect` says so. What was
    /// copied into the overlay harms nothing. Nothing to cancel is no error.
    async fn cancel(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()>;

    /// After the end: removes what is of no more use, and tells what was changed.
    async fn conclude(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        unit: &Unit,
        peers: &[Peer],
    ) -> Result<Affected>;
}

/// How the ranges that are told stand to what was really written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "precision", content = "why", rename_all = "kebab-case")]
pub enum Precision {
    /// What was written and nothing else, in whole blocks of so many bytes.
    Exact(u64),
    /// All that was written, and possibly more: why.
    Superset(String),
}

/// Ranges of a disk in bytes, as the guest counts them: ascending, none touching another. Dropping it ends what feeds it.
pub type Ranges = BoxStream<'static, Result<Range<u64>>>;

/// What differs between one disk of two snapshots.
pub struct Changed {
    /// The later disk's size in bytes. Where it is larger than the earlier's, the rest is among the ranges.
    pub size: u64,
    /// How exact the ranges are.
    pub precision: Precision,
    /// Outside of these the two disks are equal, byte for byte.
    pub ranges: Ranges,
}

impl fmt::Debug for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Changed");
        shown
            .field("size", &self.size)
            .field("precision", &self.precision);
        shown.finish_non_exhaustive()
    }
}

/// Units that can be compared with each other without reading all of their data.
///
/// A checkpoint on a disk of such a unit is the snapshot itself: it is kept for as long as the checkpoint is there, and no
/// bitmap is needed. So what a unit tells must hold for as long as both are there, whatever has become of the disk.
#[async_trait]
pub trait Compare: fmt::Debug + Send + Sync {
    /// What differs between `earlier` and `later` on the disk with this target. Both are units of the method that are there
    /// and good, in any order of time; changes neither. Costs what the differences cost, not what the disk's size does.
    ///
    /// A block that was written with what it held before may be told or not. One that was written and is zero now is told.
    ///
    /// # Errors
    /// `Unsupported` where the two cannot be compared (the disk was on another volume); `Broken` where what must be
    /// compared is not there. The same, and what goes wrong later, may come from the ranges: they then must not be used.
    async fn changed(&self, host: &dyn Host, earlier: &Peer, later: &Peer, target: &str) -> Result<Changed>;
}
