//! The method `memory` with one slip that no case but one sees.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use disksnap_core::{
    Affected, Batch, Capability, Command, Compare, DiskRequest, DiskSnapshot, ErrorKind, Health, Host, Merge,
    Method, OptionDoc, Peer, Prepared, Probe, Progress, Result, Revert, SnapshotId, TakePlan, Taken, Unit,
};
use disksnap_memory::Memory;

use super::comparing::{Comparing, Wrong};
use super::file_of;
use super::handing::{HandOver, Hands};

const CLUSTER: usize = 64 << 10;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slip {
    /// It says nothing of what would happen.
    ProbeSaysNothing,
    /// It lists an option that it does not have.
    OptionTooMany,
    /// The key of the unit is another one once it is prepared.
    UnitRenamed,
    /// Planned a second time, the plan is another one.
    PlanTwice,
    /// The third disk of a request gets the second one's content.
    ThirdDisk,
    /// What was read once goes the way of the disk with the second write after it.
    StaleCache,
    /// What the domain zeroes is zeroed in the snapshot.
    MissesZeroes,
    /// More than half the disk written is more than there is room for, and is not told.
    Overflows,
    /// Deleting a snapshot spoils the newer ones, as far as they differ.
    SpoilsNewer,
    /// Deleting a snapshot spoils the older ones, as far as they differ.
    SpoilsOlder,
    /// Two snapshots of the same content share it, and it goes with the first of them.
    SharesTheSame,
    /// A delete changes a byte of the disk.
    DeleteTouches,
    /// The snapshot is said to be longer than the disk.
    SizeWrong,
    /// It says that the disk stands on its snapshots.
    OffersToMerge,
    /// What is deleted is called broken.
    GoneIsBroken,
    /// What somebody else removed is called active.
    BlindToDamage,
    /// A revert hands the domain another image, so.
    Reverts(Hands),
    /// It compares its copies, so.
    Compares(Wrong),
    /// Something is left lying about by this call when that befalls it.
    Litters(Call, Mishap),
}

/// A call that makes or changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Prepare,
    Delete,
    Revert,
}

/// What befalls a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    Error,
    Disconnect,
    Kill,
}

/// A provider with one slip.
#[derive(Debug)]
pub(crate) struct Subtle(pub(crate) Slip);

/// What happened to files, by path: a new instance must not hide it.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static PLANNED: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);
static TAKEN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static DELETED: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);
/// The disk as it was when a snapshot of it was last looked at, where that was after a look that found it unchanged.
static SEEN: Mutex<Vec<(PathBuf, Vec<u8>)>> = Mutex::new(Vec::new());

fn first_time(of: &Mutex<Option<HashSet<PathBuf>>>, file: PathBuf) -> bool {
    of.lock().unwrap().get_or_insert_default().insert(file)
}

fn image_of(data: &serde_json::Value) -> PathBuf {
    data["image"].as_str().unwrap().into()
}

/// The copies in this directory, oldest first.
fn copies(dir: &Path) -> Vec<PathBuf> {
    let mut copies = TAKEN.lock().unwrap().clone();
    copies.retain(|copy| copy.parent() == Some(dir) && copy.exists());
    copies
}

/// Zeroes those that differ from this one.
fn spoil(copies: &[PathBuf], from: &Path) {
    let content = std::fs::read(from).unwrap();
    for copy in copies {
        if std::fs::read(copy).unwrap() != content {
            std::fs::write(copy, vec![0; content.len()]).unwrap();
        }
    }
}

impl Subtle {
    fn is(&self, slip: Slip) -> bool {
        self.0 == slip
    }

    /// Asks the domain something, and slips where that goes wrong in this way.
    async fn littering(&self, call: Call, host: &dyn Host) -> Result<()> {
        // Another name each time: nobody tidies up what an earlier call left.
        let n = CALLS.fetch_add(1, Ordering::Relaxed);
        let litter = host.image_dir().join(format!("litter-{n}"));
        if self.is(Slip::Litters(call, Mishap::Kill)) {
            std::fs::write(&litter, "").unwrap();
        }
        let asked = host.state().await;
        drop(std::fs::remove_file(&litter));
        let kind = asked.as_ref().err().map(disksnap_core::Error::kind);
        let lost = kind == Some(ErrorKind::Timeout) && self.is(Slip::Litters(call, Mishap::Error));
        let ended = kind == Some(ErrorKind::Unavailable) && self.is(Slip::Litters(call, Mishap::Disconnect));
        if lost || ended {
            std::fs::write(&litter, "").unwrap();
        }
        asked.map(drop)
    }

    /// What a look at a snapshot does to it.
    fn looked(&self, unit: &Unit) {
        let (copy, image) = (file_of(&unit.data), image_of(&unit.data));
        let (Ok(mut kept), Ok(live)) = (std::fs::read(&copy), std::fs::read(&image)) else {
            return;
        };
        let changed = kept
            .chunks(CLUSTER)
            .zip(live.chunks(CLUSTER))
            .filter(|(a, b)| a != b)
            .count();
        match self.0 {
            Slip::Overflows if changed > live.len() / CLUSTER / 2 => kept.clone_from(&live),
            Slip::MissesZeroes if live.iter().any(|byte| *byte != 0) => {
                for (kept, live) in kept.chunks_mut(CLUSTER).zip(live.chunks(CLUSTER)) {
                    if live.iter().all(|byte| *byte == 0) {
                        kept.fill(0);
                    }
                }
            }
            Slip::StaleCache => {
                let mut seen = SEEN.lock().unwrap();
                match seen.iter_mut().find(|(of, _)| *of == copy) {
                    None if changed == 0 => seen.push((copy.clone(), live)),
                    None => {}
                    Some((_, before)) if *before != kept && *before != live => kept.clone_from(before),
                    Some((_, before)) => *before = live,
                }
            }
            _ => return,
        }
        std::fs::write(&copy, kept).unwrap();
    }
}

#[async_trait]
impl DiskSnapshot for Subtle {
    fn method(&self) -> Method {
        let mut method = Memory.method();
        if self.is(Slip::OptionTooMany) {
            method.options.push(OptionDoc {
                key: "no-such-option.of-any-method".to_owned(),
                help: "does nothing".to_owned(),
            });
        }
        if let Slip::Compares(_) = self.0 {
            method.capabilities.push(Capability::Compare);
        }
        method
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let mut probes = Memory.probe(host, disks).await?;
        if self.is(Slip::ProbeSaysNothing) {
            for probe in &mut probes {
                probe.effect.clear();
            }
        }
        if let Slip::Compares(wrong) = self.0
            && wrong != Wrong::Unpromised
        {
            let fit = probes.iter_mut().filter(|probe| !probe.capabilities.is_empty());
            fit.for_each(|probe| probe.capabilities.push(Capability::Compare));
        }
        Ok(probes)
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        self.littering(Call::Prepare, host).await?;
        let mut prepared = Memory.prepare(host, id, disks).await?;
        if self.is(Slip::UnitRenamed) {
            for unit in &mut prepared {
                unit.unit += "/prepared";
            }
        }
        if self.is(Slip::ThirdDisk) && prepared.len() > 2 {
            prepared[2].data["image"] = prepared[1].data["image"].clone();
        }
        Ok(prepared)
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        if self.is(Slip::PlanTwice) && !first_time(&PLANNED, file_of(&prepared.data)) {
            return Ok(TakePlan::Atomic(Batch {
                execute: "transaction".to_owned(),
                list: "actions".to_owned(),
                items: Vec::new(),
                undo: Vec::new(),
            }));
        }
        Memory.take_plan(prepared)
    }

    async fn take(&self, host: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        let taken = Memory.take(host, prepared).await?;
        let copy = file_of(&prepared.data);
        TAKEN.lock().unwrap().push(copy.clone());
        if self.is(Slip::SharesTheSame) {
            let content = std::fs::read(&copy).unwrap();
            let whole = |other: &PathBuf| {
                let is_link = other.symlink_metadata().unwrap().is_symlink();
                *other != copy && !is_link && std::fs::read(other).unwrap() == content
            };
            if let Some(other) = copies(copy.parent().unwrap()).into_iter().find(whole) {
                std::fs::remove_file(&copy).unwrap();
                std::os::unix::fs::symlink(other, &copy).unwrap();
            }
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
        let mut unit = Memory.complete(host, id, prepared, taken).await?;
        if self.is(Slip::SizeWrong) {
            unit.disks[0].size = unit.disks[0].size.map(|size| size + 512);
        }
        Ok(unit)
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        let files: Vec<PathBuf> = prepared.into_iter().flatten().map(|p| file_of(&p.data)).collect();
        if let Some(planned) = PLANNED.lock().unwrap().as_mut() {
            planned.retain(|file| !files.contains(file));
        }
        Memory.abort(host, id, disks, prepared).await
    }

    async fn inspect(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Health> {
        self.looked(unit);
        let health = Memory.inspect(host, id, unit).await?;
        let file = file_of(&unit.data);
        let deleted = || {
            DELETED
                .lock()
                .unwrap()
                .as_ref()
                .is_some_and(|all| all.contains(&file))
        };
        Ok(match health {
            Health::Gone(why) if self.is(Slip::GoneIsBroken) => Health::Broken(why),
            Health::Gone(_) if self.is(Slip::BlindToDamage) && !deleted() => Health::Active,
            health => health,
        })
    }

    async fn delete(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        self.littering(Call::Delete, host).await?;
        let (copy, image) = (file_of(&unit.data), image_of(&unit.data));
        let copies = copies(host.image_dir());
        let at = copies.iter().position(|other| *other == copy);
        match (self.0, at) {
            (Slip::SpoilsNewer, Some(at)) => spoil(&copies[at + 1..], &copy),
            (Slip::SpoilsOlder, Some(at)) => spoil(&copies[..at], &copy),
            (Slip::DeleteTouches, Some(_)) => {
                use std::os::unix::fs::FileExt;
                let image = std::fs::OpenOptions::new().write(true).open(image).unwrap();
                image.write_all_at(&[0x77], (20 * CLUSTER) as u64).unwrap();
            }
            _ => {}
        }
        first_time(&DELETED, copy);
        Memory.delete(host, id, unit).await
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        Some(match self.0 {
            Slip::Reverts(hands) => Arc::new(HandOver(hands)),
            slip => Arc::new(SubtleRevert(Subtle(slip))),
        })
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        self.is(Slip::OffersToMerge)
            .then(|| Arc::new(Merges) as Arc<dyn Merge>)
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        match self.0 {
            Slip::Compares(Wrong::NotOffered) => None,
            Slip::Compares(wrong) => Some(Arc::new(Comparing(wrong))),
            _ => None,
        }
    }
}

#[derive(Debug)]
struct SubtleRevert(Subtle);

#[async_trait]
impl Revert for SubtleRevert {
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        self.0.littering(Call::Revert, host).await?;
        Memory.revert(unit).unwrap().revert(host, id, unit, peers).await
    }
}

/// A merge that has nothing to do and says that all is done: deleting the snapshot then works as ever.
#[derive(Debug)]
struct Merges;

#[async_trait]
impl Merge for Merges {
    fn stream(&self) -> Option<Arc<dyn Merge>> {
        None
    }

    async fn check(&self, _: &dyn Host, _: SnapshotId, _: &Unit, _: &[Peer]) -> Result<()> {
        Ok(())
    }

    async fn start(&self, _: &dyn Host, _: SnapshotId, _: &Unit, _: &[Peer]) -> Result<()> {
        Ok(())
    }

    async fn progress(&self, _: &dyn Host, _: SnapshotId, _: &Unit) -> Result<Progress> {
        Ok(Progress::Finished)
    }

    async fn finish(&self, _: &dyn Host, _: SnapshotId, _: &Unit) -> Result<()> {
        Ok(())
    }

    fn release(&self, _: SnapshotId, _: &Unit) -> Vec<Command> {
        Vec::new()
    }

    async fn cancel(&self, _: &dyn Host, _: SnapshotId, _: &Unit) -> Result<()> {
        Ok(())
    }

    async fn conclude(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<Affected> {
        Memory.delete(host, id, unit).await?;
        Ok(Affected::default())
    }
}
