//! A fake method's units that the disks stand on: merged and put back as they are told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use disksnap_core::{
    Access, Affected, Command, Disk, DiskResult, Host, Merge, Peer, Progress, Result, Revert, SnapshotId,
    Source, Unit,
};
use serde_json::json;

use super::{Log, disk};

/// The merges that are under way, by target. What is to be seen of a merge next is put in here.
pub(crate) type Merges = Arc<Mutex<BTreeMap<String, Progress>>>;

#[derive(Debug, Clone)]
pub(crate) struct Standing {
    pub(crate) name: &'static str,
    pub(crate) merges: Merges,
    pub(crate) log: Arc<Log>,
}

impl Standing {
    fn note(&self, event: &str, unit: &Unit) -> Result<()> {
        self.log.note(format!("{}.{event} {}", self.name, unit.unit))
    }

    fn set(&self, unit: &Unit, progress: Progress) {
        self.merges.lock().unwrap().insert(unit.unit.clone(), progress);
    }
}

/// The disk after a snapshot: it stands on the former one.
pub(crate) fn overlay(target: &str, snapshot: SnapshotId) -> Disk {
    let file = format!("/images/{target}.{snapshot}").into();
    Disk {
        source: Some(Source::File { file }),
        ..disk(target)
    }
}

/// What an overlay method says of a disk.
pub(crate) fn stood_on(target: &str, snapshot: SnapshotId) -> DiskResult {
    DiskResult {
        target: target.to_owned(),
        modified: Some(overlay(target, snapshot)),
        access: Access::Source {
            source: disk(target).source.unwrap(),
            format: "raw".to_owned(),
            backing: None,
        },
        size: Some(1 << 20),
        details: [].into(),
    }
}

#[async_trait]
impl Merge for Standing {
    fn stream(&self) -> Option<Arc<dyn Merge>> {
        None
    }

    async fn check(&self, _: &dyn Host, _: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<()> {
        self.log.ask(&format!("{}.check {}", self.name, unit.unit))
    }

    async fn start(&self, _: &dyn Host, _: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<()> {
        self.note("start", unit)?;
        let mut merges = self.merges.lock().unwrap();
        merges.entry(unit.unit.clone()).or_insert(Progress::Ready);
        Ok(())
    }

    async fn progress(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Progress> {
        let merges = self.merges.lock().unwrap();
        Ok(merges.get(&unit.unit).cloned().unwrap_or(Progress::Idle))
    }

    async fn finish(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        self.note("finish", unit)?;
        self.set(unit, Progress::Finished);
        Ok(())
    }

    fn release(&self, _: SnapshotId, unit: &Unit) -> Vec<Command> {
        vec![Command::new("release", json!(unit.unit))]
    }

    async fn cancel(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        self.note("cancel", unit)?;
        self.merges.lock().unwrap().remove(&unit.unit);
        Ok(())
    }

    async fn conclude(&self, _: &dyn Host, _: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<Affected> {
        self.note("conclude", unit)?;
        Ok(Affected {
            disks: vec![disk(&unit.unit)],
            ..Affected::default()
        })
    }
}

#[async_trait]
impl Revert for Standing {
    async fn revert(&self, _: &dyn Host, _: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        self.note(&format!("revert beside {}", peers.len()), unit)?;
        let fresh = overlay(&unit.unit, SnapshotId::random());
        let mut unit = unit.clone();
        unit.disks[0].modified = Some(fresh.clone());
        Ok(Affected {
            unit: Some(unit),
            disks: vec![fresh],
            ..Affected::default()
        })
    }
}
