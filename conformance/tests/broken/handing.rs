//! A revert that hands the domain another image: whole, or with one fault.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use disksnap_core::{Affected, Disk, Host, Peer, Result, Revert, SnapshotId, Source, Unit};
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

fn path_of(data: &serde_json::Value, key: &str) -> PathBuf {
    PathBuf::from(data[key].as_str().unwrap())
}

/// The image that takes the place of this one when this snapshot is put back.
fn next(image: &Path, id: SnapshotId) -> PathBuf {
    let name = image.to_str().unwrap();
    let first = name.split_inclusive(".raw").next().unwrap();
    format!("{first}.{}", id.short()).into()
}

/// Puts the content into another image, and hands that over.
#[derive(Debug)]
pub(crate) struct HandOver(pub(crate) Hands);

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
