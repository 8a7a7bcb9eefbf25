//! The method `memory` with a revert that hands the domain another image: whole, or with one fault.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Affected, Disk, DiskRequest, DiskSnapshot, Health, Host, Merge, Method, Peer, Prepared, Probe, Result,
    Revert, SnapshotId, Source, TakePlan, Taken, Unit,
};
use disksnap_memory::Memory;
use serde_json::json;

/// What is wrong with the disks that a revert hands over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hands {
    /// Nothing.
    TheRight,
    /// It says that the disk is the snapshot's own file: what the domain writes next is in both.
    TheSnapshots,
    /// It puts the content into a new image, and says that the disk is the old one, which stays.
    TheOld,
    /// It says that the disk is an image that lacks what lies behind the first 64 KiB.
    AHalf,
    /// It does not say that the other snapshots' image is another one now.
    WithoutPeers,
    /// The old image stays beside the new one.
    AndKeepsTheOld,
}

/// A provider whose revert moves the domain to another image.
#[derive(Debug)]
pub(crate) struct Handing(pub(crate) Hands);

fn path_of(data: &serde_json::Value, key: &str) -> PathBuf {
    PathBuf::from(data[key].as_str().unwrap())
}

/// The image that takes the place of this one when this snapshot is put back.
fn next(image: &Path, id: SnapshotId) -> PathBuf {
    let name = image.to_str().unwrap();
    let first = name.split_inclusive(".raw").next().unwrap();
    format!("{first}.{}", id.short()).into()
}

#[async_trait]
impl DiskSnapshot for Handing {
    fn method(&self) -> Method {
        Memory.method()
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        Memory.probe(host, disks).await
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        Memory.prepare(host, id, disks).await
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        Memory.take_plan(prepared)
    }

    async fn take(&self, host: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        Memory.take(host, prepared).await
    }

    async fn complete(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        prepared: &Prepared,
        taken: &Taken,
    ) -> Result<Unit> {
        Memory.complete(host, id, prepared, taken).await
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        Memory.abort(host, id, disks, prepared).await
    }

    async fn inspect(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Health> {
        Memory.inspect(host, id, unit).await
    }

    async fn delete(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        Memory.delete(host, id, unit).await
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        Some(Arc::new(HandOver(self.0)))
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }
}

#[derive(Debug)]
struct HandOver(Hands);

#[async_trait]
impl Revert for HandOver {
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        let (old, copy) = (path_of(&unit.data, "image"), path_of(&unit.data, "file"));
        let new = next(&old, id);
        std::fs::copy(&copy, &new).unwrap();
        let mut handed = new.clone();
        match self.0 {
            Hands::TheSnapshots => handed = copy,
            Hands::TheOld => handed.clone_from(&old),
            Hands::AHalf => {
                let file = std::fs::OpenOptions::new().write(true).open(&new).unwrap();
                let size = file.metadata().unwrap().len();
                file.set_len(64 << 10).unwrap();
                file.set_len(size).unwrap();
            }
            _ => {}
        }
        if new != old && !matches!(self.0, Hands::TheOld | Hands::AndKeepsTheOld) {
            // Gone already where a kill came after this.
            drop(std::fs::remove_file(&old));
        }
        let onto = |unit: &Unit| {
            let mut unit = unit.clone();
            if path_of(&unit.data, "image") == old {
                unit.data["image"] = json!(handed.to_str().unwrap());
            }
            unit
        };
        let told = |peer: &Peer| Peer {
            snapshot: peer.snapshot,
            unit: onto(&peer.unit),
        };
        let changed = peers.iter().map(told).filter(|peer| !peers.contains(peer));
        let disk = host.domain().disk(&unit.disks[0].target)?;
        Ok(Affected {
            unit: Some(onto(unit)),
            peers: match self.0 {
                Hands::WithoutPeers => Vec::new(),
                _ => changed.collect(),
            },
            disks: vec![Disk {
                source: Some(Source::File { file: handed.clone() }),
                ..disk.clone()
            }],
            ..Affected::default()
        })
    }
}
