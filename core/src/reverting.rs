//! Putting the instant of a snapshot back into its disks.

use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use crate::checking::Dropping;
use crate::dispatcher::Held;
use crate::ledger::{Altered, Entry, Ledger, chosen, refuse_exported};
use crate::{
    Act, Change, CheckpointName, Disk, Dispatcher, Domain, DomainId, Effect, Error, ErrorKind, Intent,
    Lineage, Result, Revert, Snapshot, SnapshotName,
};

impl Dispatcher {
    /// Puts the content of a snapshot back into its disks, or into those with these targets: what was written
    /// since is lost. The answer tells everything that it changed.
    ///
    /// Idempotent: what a kill interrupts, the next act on the domain, or `recover`, finishes.
    ///
    /// # Errors
    /// `Unsupported` for a method that cannot; `Busy` when the domain must be off for it and is not, or the
    /// snapshot is being served or merged; `Broken` when it cannot be trusted. Nothing is changed then.
    pub async fn revert(&self, domain: &Domain, name: &SnapshotName, targets: &[String]) -> Result<Altered> {
        let held = self.hold(domain).await.map_err(|e| e.during("revert"))?;
        self.revert_held(&held, domain, name, targets).await.map_err(|e| {
            e.during("revert")
                .with("domain", &domain.id)
                .with("snapshot", name)
        })
    }

    async fn revert_held(
        &self,
        held: &Held,
        domain: &Domain,
        name: &SnapshotName,
        targets: &[String],
    ) -> Result<Altered> {
        let snapshot = self.find(domain, name).await?;
        self.refuse_while_merging(&domain.id).await?;
        refuse_exported(name, &self.catalog.exports(&domain.id).await?, snapshot.id)?;
        let entries = chosen(&snapshot, targets)?;
        let state = held.control.state().await?;
        let own = domain.disks.iter().filter(|d| snapshot.disk(&d.target).is_some());
        let standing = self.standing(&domain.id).await?;
        standing.refuse_stale(&state, own.clone())?;
        let reverted: Vec<String> = entries.iter().flat_map(Entry::targets).collect();
        // A document may have lost where a disk's data is, and an overlay does not say it.
        let moved = standing.moves.iter().map(|moved| &moved.disk);
        let mut all = own
            .clone()
            .chain(moved)
            .filter(|disk| reverted.contains(&disk.target));
        all.try_for_each(|disk| refuse_tracked(&snapshot, disk))?;
        for entry in &entries {
            self.reverting(entry)?;
            let disk = &entry.unit.disks[0].target;
            let disk = crate::serve::disk_of(&snapshot, disk)?;
            self.refuse_unless_healthy(&*held.control, &snapshot, disk)
                .await?;
        }
        let intent = Intent {
            id: Uuid::new_v4(),
            domain: domain.clone(),
            since: SystemTime::now(),
            act: Act::Revert {
                snapshot: snapshot.id,
                targets: reverted,
            },
        };
        self.catalog.intend(&intent).await?;
        self.finish_revert(held, &intent, &snapshot, &entries).await
    }

    /// The kept snapshots that are of a content which the revert has taken back: a bitmap from before, which is put back with
    /// the image, knows nothing of what was written until them.
    async fn overtaken(
        &self,
        domain: &DomainId,
        snapshot: &Snapshot,
        targets: &[String],
    ) -> Result<Vec<Change>> {
        let lineage = Lineage::new(self.catalog.checkpoints(domain).await?)?;
        let mut before: Vec<&CheckpointName> = snapshot.checkpoint.iter().collect();
        if let Some(after) = snapshot.after.as_ref().filter(|name| lineage.get(name).is_ok()) {
            before.extend(lineage.back_from(after)?.map(|checkpoint| &checkpoint.name));
        }
        let mut changes = Vec::new();
        for checkpoint in lineage
            .checkpoints()
            .iter()
            .filter(|c| !before.contains(&&c.name))
        {
            let mut cut = checkpoint.clone();
            for disk in cut.disks.iter_mut().filter(|disk| targets.contains(&disk.target)) {
                disk.anew |= disk.mark.bitmap().is_none();
            }
            if cut != *checkpoint {
                changes.push(Change::AddCheckpoint(Box::new(cut)));
            }
        }
        Ok(changes)
    }

    /// What the disks' bitmaps tell is of a content that is no more: the checkpoints that cannot be trusted after a revert are
    /// dropped, and told.
    async fn cut_off_by_revert(
        &self,
        held: &Held,
        domain: &Domain,
        targets: &[String],
        altered: &mut Altered,
    ) {
        match self.catalog.checkpoints(&domain.id).await {
            Ok(known) if known.is_empty() => return,
            _ => {}
        }
        let mut now = domain.clone();
        for disk in &altered.disks {
            now.replace_disk(disk.clone());
        }
        let dropped = match self.tracker {
            Some(_) if altered.deferred.is_empty() => {
                let what = Dropping::reverted(targets);
                self.drop_broken_held(held, &now, &what).await
            }
            Some(_) => {
                let warning = "which checkpoints outlive the revert is known once it is done: see `disksnap checkpoint validate` then";
                return altered.warnings.push(warning.to_owned());
            }
            None => return,
        };
        match dropped {
            Ok(dropped) => altered.warnings.extend(dropped.marks.iter().map(|mark| {
                format!(
                    "{}: the revert ended the checkpoint '{}' of this disk ({})",
                    mark.target,
                    mark.checkpoint,
                    mark.verdict.as_str()
                )
            })),
            Err(error) => altered.warnings.push(format!(
                "whether the checkpoints outlived the revert is not known ({error}): see `disksnap checkpoint validate`"
            )),
        }
    }

    /// Everything that a revert does after its intent; also what finishes one that was killed.
    ///
    /// A unit that is refused ends it: those before it are put back and recorded so, and the error says which.
    pub(crate) async fn finish_revert(
        &self,
        held: &Held,
        intent: &Intent,
        snapshot: &Snapshot,
        entries: &[Entry],
    ) -> Result<Altered> {
        let domain = &intent.domain.id;
        let mut ledger = Ledger::new(self.all_snapshots(domain).await?, snapshot.id, &intent.domain);
        let mut done = Vec::new();
        for entry in entries {
            let peers = ledger.peers(entry);
            let revert = self.reverting(entry)?;
            match revert
                .revert(&*held.control, snapshot.id, &entry.unit, &peers)
                .await
            {
                Ok(affected) => ledger.record(entry, affected),
                // Whoever waited in vain does not know what was done either.
                Err(error) if error.effect() == Effect::Unknown || error.kind() == ErrorKind::Timeout => {
                    return Err(error.by(&entry.method).leaving(Effect::Unknown));
                }
                Err(error) => {
                    let (mut changes, _) = ledger.close();
                    changes.extend(self.overtaken(domain, snapshot, &done).await?);
                    self.catalog.settle(intent.id, domain, &changes).await?;
                    return Err(partly(error.by(&entry.method), &done));
                }
            }
            done.extend(entry.targets());
        }
        let (mut changes, mut altered) = ledger.close();
        changes.extend(self.overtaken(domain, snapshot, &done).await?);
        self.catalog.settle(intent.id, domain, &changes).await?;
        self.cut_off_by_revert(held, &intent.domain, &done, &mut altered)
            .await;
        Ok(altered)
    }

    fn reverting(&self, entry: &Entry) -> Result<Arc<dyn Revert>> {
        let provider = self.registry.get(&entry.method)?;
        provider.revert(&entry.unit).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("a {} snapshot cannot be put back into its disk", entry.method),
            )
            .with("disk", entry.targets().join(", "))
            .hint("`disksnap read` gets its data, which can be copied over the disk while the domain is off.")
        })
    }
}

/// What a qcow2 says reads as zeroes goes on reading so, whatever is put back into the raw disk below it.
fn refuse_tracked(snapshot: &Snapshot, disk: &Disk) -> Result<()> {
    let below = snapshot
        .disk(&disk.target)
        .is_some_and(|record| record.modified_disk.is_none());
    let Some(data) = disk.data_store.as_ref().filter(|_| below) else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "the snapshot is of {}, which the domain reaches through a qcow2 that keeps its bitmaps",
            data.source
        ),
    )
    .with("disk", &disk.target)
    .hint("Give up the qcow2 first, with `disksnap disk untrack`; then revert, and track the disk anew."))
}

fn partly(error: Error, done: &[String]) -> Error {
    if done.is_empty() {
        return error;
    }
    error.leaving(Effect::Unknown).hint(format!(
        "{} went back before this; the others are as they were. Mend the cause, then revert again.",
        done.join(", ")
    ))
}
