//! What notes which blocks of a disk are written: the trait [`Tracker`] over a domain's dirty bitmaps.
//!
//! Bitmaps are the domain's and not a method's: a disk keeps them whatever method snapshots it next. So they are no part
//! of a provider's contract. Source: QEMU's `block-dirty-bitmap-*` commands; `qemu-img bitmap`.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Batch, Disk, Host, RawDisks, Result};

/// What the names of bitmaps begin with that belong to a snapshot and to no checkpoint.
pub const SCRATCH_BITMAP: &str = "disksnap.";

/// Whether a disk can have dirty bitmaps, and those it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracked {
    /// Whether a new one can be started.
    pub trackable: Trackable,
    /// The disk's size in bytes, where known.
    pub size: Option<u64>,
    /// All that have a name which does not begin with [`SCRATCH_BITMAP`], in all layers of the disk, the top layer's first.
    pub bitmaps: Vec<DirtyBitmap>,
}

/// Whether a dirty bitmap can be started on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trackable {
    /// One that the image keeps when the hypervisor ends.
    Durable,
    /// One in the hypervisor's memory alone, and why.
    Volatile(String),
    /// None, and why.
    No(String),
    /// The disk cannot be looked at, and why: what bitmaps it has is not known.
    Unreachable(String),
}

/// A dirty bitmap in one layer of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyBitmap {
    /// Its name.
    pub name: String,
    /// The layer that it is in, from the top: 0 is the one that the guest writes to.
    pub layer: usize,
    /// Whether it notes what is written now.
    pub recording: bool,
    /// Whether the image keeps it.
    pub durable: bool,
    /// Whether its image was not closed properly: what it says must not be trusted, and it can only be dropped.
    pub inconsistent: bool,
    /// Bytes per bit.
    pub granularity: u64,
}

/// What happens to the bitmaps of one disk at an instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The disk.
    pub disk: Disk,
    /// What the guest writes to from the instant on, where that is another than before: a node, or with the domain off the
    /// path of an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<String>,
    /// The bitmap that starts; `None` where only a copy is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starts: Option<String>,
    /// The bitmap that records until the instant, and stops where another starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recording: Option<String>,
    /// The bitmap that takes a copy of that one as it is at the instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<String>,
}

/// What is to become of one bitmap of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The disk.
    pub disk: Disk,
    /// The bitmap.
    pub bitmap: String,
    /// The one that takes over what it knows; `None` where that is given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<String>,
    /// Whether that one records from then on.
    pub record: bool,
}

/// What changed in a disk, as one bitmap on the node that a snapshot is read through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Union {
    /// The disk.
    pub disk: Disk,
    /// The bitmaps that know it between them.
    pub of: Vec<String>,
    /// The node.
    pub node: String,
    /// What the bitmap there is called.
    pub name: String,
    /// A node that is made to have the bitmap, where another export has one of that name on the node itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
}

impl Union {
    /// The node that has the bitmap.
    #[must_use]
    pub fn held_by(&self) -> &str {
        self.holder.as_deref().unwrap_or(&self.node)
    }
}

/// The dirty bitmaps of a domain's disks, whether it runs or not.
///
/// Idempotent, all of it: what was done before is found and left, so that whoever comes after a kill can do it again.
#[async_trait]
pub trait Tracker: fmt::Debug + Send + Sync {
    /// Looks at each disk; one answer per disk, in order. Changes nothing.
    async fn look(&self, host: &dyn Host, disks: &[&Disk]) -> Result<Vec<Tracked>>;

    /// What does all this at one instant: a share in a command of the window. With the domain off it is done at once,
    /// for nobody writes, and there is no share.
    ///
    /// # Errors
    /// `AlreadyExists` where a disk has a bitmap of a name that is to start; `NotFound` where the recording one is not
    /// there, `Broken` where it must not be trusted. Nothing is changed then.
    async fn start(&self, host: &dyn Host, starts: &[Start]) -> Result<Option<Batch>>;

    /// Takes back all that [`Tracker::start`] has done, or would have: what was written since is noted in the bitmap that
    /// recorded before. Where an image was put on top, it is there still, and whoever did that commits it afterwards.
    async fn abort(&self, host: &dyn Host, starts: &[Start]) -> Result<()>;

    /// Ends bitmaps, all together. Only the layer that the guest writes to is changed: those below it are snapshots, and
    /// their bitmaps stay; what they know is in the heir's there as well from then on.
    ///
    /// # Errors
    /// `Busy` where one is being exported. Nothing is changed then.
    async fn end(&self, host: &dyn Host, endings: &[Ending]) -> Result<()>;

    /// Makes a bitmap that does not record, of what all these know together.
    ///
    /// # Errors
    /// `NotFound` where one of them is in no layer of the disk; `Broken` where one must not be trusted; `Unsupported`
    /// where the disk's size has changed in between.
    async fn unite(&self, host: &dyn Host, union: &Union) -> Result<()>;

    /// Removes such a bitmap, and the node that was made for it.
    async fn part(&self, host: &dyn Host, node: &str, name: &str) -> Result<()>;

    /// What makes the bitmaps of raw disks durable; `None` where nothing does.
    fn raw_disks(&self) -> Option<&dyn RawDisks>;
}
