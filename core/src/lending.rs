//! What filling the disks of a guest that stands still needs of the place where it runs, and what is remembered of it.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Disk, NbdServer, Result, ServeNode, Skipped};

/// A disk that a guest has lent out: its device is on a stand-in meanwhile, and whoever fills the disk is alone with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentDisk {
    /// The disk's target.
    pub target: String,
    /// The guest's device, as the hypervisor names it (a path of QEMU's object tree).
    pub device: String,
    /// The disk's topmost node: what the device has, and is to have again.
    pub node: String,
    /// What the device has meanwhile: of the same size, and each request to it fails.
    pub stand_in: String,
    /// The thread that works for the device, where that is not the hypervisor's main one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    /// Bytes.
    pub size: u64,
    /// How it is served.
    pub export: ServeNode,
}

/// What is remembered of a filling while it is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lending {
    /// The server, with the run of the hypervisor that it belongs to.
    pub server: NbdServer,
    /// Whether the filling started it.
    pub starts: bool,
    /// In which state the guest stood still, in the hypervisor's word.
    pub stood: String,
    /// The disks, in the domain's order.
    pub disks: Vec<LentDisk>,
    /// The domain's other disks, and why they are left out.
    pub skipped: Vec<Skipped>,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// The lease of the process that fills them itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<uuid::Uuid>,
}

/// How far a filling is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FillStage {
    /// It is being begun; nobody got an answer yet.
    Starting,
    /// The disks can be written; in force until it is ended or the hypervisor is.
    Open,
    /// It is being ended.
    Ending,
}

/// Lends the disks of a guest that stands still, and takes them back.
///
/// Everything but [`Lend::look`] is idempotent, so that whoever comes after a kill can do it again. The guest stands
/// still at each call: the dispatcher makes sure of it.
#[async_trait]
pub trait Lend: fmt::Debug + Send + Sync {
    /// What lending this disk would do; changes nothing. `name` is for the stand-in and for the export's id.
    ///
    /// # Errors
    /// `Denied` for a disk that the guest has read-only; `Busy` where a job, an export or a snapshot uses the disk;
    /// `Unsupported` where its device cannot go over to a stand-in; `NotFound` when the domain has no such disk.
    async fn look(&self, disk: &Disk, name: &str) -> Result<LentDisk>;

    /// Puts the stand-in in the disk's place. What it has done by the time of an error [`Lend::give_back`] undoes.
    async fn lend(&self, disk: &LentDisk) -> Result<()>;

    /// Serves the disk writable on the running server.
    ///
    /// # Errors
    /// `AlreadyExists` when another export has the name; `Unavailable` when no server runs.
    async fn serve_writable(&self, disk: &LentDisk) -> Result<()>;

    /// Gives the guest its disk again and removes the stand-in. The disk is not served any more.
    async fn give_back(&self, disk: &LentDisk) -> Result<()>;

    /// Whether the guest's device is on the stand-in.
    async fn is_lent(&self, disk: &LentDisk) -> Result<bool>;
}
