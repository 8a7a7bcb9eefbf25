//! The method `memory` with one fault.

mod comparing;
mod handing;
mod subtle;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Affected, Batch, Capability, Compare, DiskRequest, DiskSnapshot, Error, ErrorKind, Fit, Health, Host,
    Merge, Method, Peer, Prepared, Probe, Result, Revert, SnapshotId, TakePlan, Taken, Unit,
};
use disksnap_memory::Memory;
use serde_json::json;

pub(crate) use comparing::Wrong;
pub(crate) use handing::Hands;
pub(crate) use subtle::{Call, Mishap, Slip, Subtle};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    RejectsAll,
    StateInInstance,
    OptionTwice,
    CapabilityLost,
    ProbeMakes,
    UnfitIsError,
    PrepareDiffers,
    DiskLeftOut,
    PlanChanges,
    AbortLeaks,
    AbortNeedsRecord,
    AbortOnce,
    AbortTakesAll,
    Stale,
    TailForgotten,
    MixedUp,
    CompleteMakes,
    DeleteWrites,
    InspectLies,
    DeleteOnce,
    DeleteLeaks,
    RevertMissing,
    RevertForgets,
    RevertOnce,
    RevertSpoils,
    RevertMixesUp,
    Panics,
}

/// Count calls, for faults that come the second time: a new instance must not hide them.
static PREPARES: AtomicUsize = AtomicUsize::new(0);
static PLANS: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
pub(crate) struct Broken {
    fault: Fault,
    /// What this instance has prepared.
    prepared: AtomicUsize,
}

impl Broken {
    pub(crate) fn new(fault: Fault) -> Self {
        Self {
            fault,
            prepared: AtomicUsize::new(0),
        }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }
}

/// The file that a prepared unit or a unit is copied to.
fn file_of(data: &serde_json::Value) -> PathBuf {
    PathBuf::from(data["file"].as_str().unwrap())
}

fn error(kind: ErrorKind) -> Error {
    Error::new(kind, "broken on purpose")
}

#[async_trait]
impl DiskSnapshot for Broken {
    fn method(&self) -> Method {
        let mut method = Memory.method();
        if self.is(Fault::OptionTwice) {
            method.options.push(method.options[0].clone());
        }
        method
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let mut probes = Memory.probe(host, disks).await?;
        match self.fault {
            Fault::ProbeMakes if probes.iter().any(|p| matches!(p.fit, Fit::Unfit { .. })) => {
                drop(std::fs::write(host.image_dir().join("probed"), ""));
            }
            Fault::CapabilityLost => probes
                .iter_mut()
                .for_each(|p| p.capabilities.retain(|c| *c != Capability::GuestSafe)),
            Fault::UnfitIsError if probes.iter().any(|p| matches!(p.fit, Fit::Unfit { .. })) => {
                return Err(error(ErrorKind::Unsupported));
            }
            Fault::RejectsAll => return Ok(disks.iter().map(|_| Probe::unfit("never")).collect()),
            _ => {}
        }
        Ok(probes)
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        assert!(!self.is(Fault::Panics), "broken on purpose");
        self.prepared.fetch_add(1, Ordering::Relaxed);
        let mut prepared = Memory.prepare(host, id, disks).await?;
        match self.fault {
            Fault::PrepareDiffers => prepared
                .iter_mut()
                .for_each(|p| p.data["nonce"] = json!(PREPARES.fetch_add(1, Ordering::Relaxed))),
            Fault::DiskLeftOut if prepared.len() > 1 => drop(prepared.remove(0)),
            Fault::MixedUp if prepared.len() > 1 => {
                let (first, last) = (prepared[0].data.clone(), prepared.len() - 1);
                prepared[0].data = prepared[last].data.clone();
                prepared[last].data = first;
            }
            _ => {}
        }
        Ok(prepared)
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        if self.is(Fault::PlanChanges) {
            let n = PLANS.fetch_add(1, Ordering::Relaxed);
            // A create asks for one plan; two in a row differ, and the odd one comes second.
            if n % 2 == 1 {
                let (execute, list) = ("transaction".to_owned(), "actions".to_owned());
                let (items, undo) = (Vec::new(), Vec::new());
                return Ok(TakePlan::Atomic(Batch {
                    execute,
                    list,
                    items,
                    undo,
                }));
            }
        }
        Memory.take_plan(prepared)
    }

    async fn take(&self, host: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        if self.is(Fault::StateInInstance) && self.prepared.load(Ordering::Relaxed) == 0 {
            return Err(error(ErrorKind::Internal));
        }
        let taken = Memory.take(host, prepared).await?;
        if self.is(Fault::TailForgotten) {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(file_of(&prepared.data))
                .unwrap();
            let size = file.metadata().unwrap().len();
            file.set_len(size / 65536 * 65536).unwrap();
            file.set_len(size).unwrap();
        }
        if self.is(Fault::Stale) {
            let image = prepared.data["image"].as_str().unwrap();
            let copy = file_of(&prepared.data);
            std::fs::remove_file(&copy).unwrap();
            std::fs::hard_link(image, &copy).unwrap();
        }
        Ok(taken)
    }

    async fn complete(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        prepared: &Prepared,
        taken: &Taken,
    ) -> Result<Unit> {
        if self.is(Fault::CompleteMakes) {
            std::fs::write(file_of(&prepared.data).with_extension("index"), "").unwrap();
        }
        Memory.complete(host, id, prepared, taken).await
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        match self.fault {
            Fault::AbortLeaks => drop(std::fs::write(host.image_dir().join("journal"), "")),
            Fault::AbortNeedsRecord if prepared.is_none() => return Ok(()),
            Fault::AbortOnce => {
                let all = prepared.into_iter().flatten();
                if all.map(|p| file_of(&p.data)).any(|file| !file.exists()) {
                    return Err(error(ErrorKind::NotFound));
                }
            }
            Fault::AbortTakesAll => {
                for entry in std::fs::read_dir(host.image_dir()).unwrap() {
                    let path = entry.unwrap().path();
                    if path.extension().is_some_and(|e| e == "snapshot") {
                        std::fs::remove_file(path).unwrap();
                    }
                }
            }
            _ => {}
        }
        Memory.abort(host, id, disks, prepared).await
    }

    async fn inspect(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Health> {
        if self.is(Fault::InspectLies) {
            return Ok(Health::Active);
        }
        Memory.inspect(host, id, unit).await
    }

    async fn delete(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        match self.fault {
            Fault::DeleteOnce if !file_of(&unit.data).exists() => Err(error(ErrorKind::NotFound)),
            Fault::CompleteMakes => {
                drop(std::fs::remove_file(file_of(&unit.data).with_extension("index")));
                Memory.delete(host, id, unit).await
            }
            Fault::DeleteWrites => {
                let image = unit.data["image"].as_str().unwrap();
                std::fs::copy(file_of(&unit.data), image).unwrap();
                Memory.delete(host, id, unit).await
            }
            Fault::DeleteLeaks => {
                let file = file_of(&unit.data);
                drop(std::fs::rename(&file, file.with_extension("trash")));
                Ok(())
            }
            _ => Memory.delete(host, id, unit).await,
        }
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        (!self.is(Fault::RevertMissing)).then(|| Arc::new(BrokenRevert(self.fault)) as Arc<dyn Revert>)
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        None
    }
}

#[derive(Debug)]
struct BrokenRevert(Fault);

#[async_trait]
impl Revert for BrokenRevert {
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        let image = unit.data["image"].as_str().unwrap();
        let done = host.image_dir().join("reverted");
        match self.0 {
            Fault::RevertForgets => {
                let unit = Some(unit.clone());
                return Ok(Affected {
                    unit,
                    ..Affected::default()
                });
            }
            // It gives the disk the snapshot's own file: what the disk's user writes next is in both.
            Fault::RevertSpoils => {
                std::fs::remove_file(image).unwrap();
                std::fs::hard_link(file_of(&unit.data), image).unwrap();
                let unit = Some(unit.clone());
                return Ok(Affected {
                    unit,
                    ..Affected::default()
                });
            }
            Fault::RevertOnce if done.exists() => return Err(error(ErrorKind::AlreadyExists)),
            Fault::RevertOnce => std::fs::write(done, "").unwrap(),
            Fault::RevertMixesUp => {
                for peer in peers {
                    std::fs::copy(file_of(&unit.data), file_of(&peer.unit.data)).unwrap();
                }
            }
            _ => {}
        }
        Memory.revert(unit).unwrap().revert(host, id, unit, peers).await
    }
}
