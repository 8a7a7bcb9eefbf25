//! Removing a checkpoint so that nothing is lost that the others can be asked.

use crate::dispatcher::Held;
use crate::{
    Access, Altered, Change, CheckpointName, Control, Dispatcher, Domain, Ending, Error, ErrorKind,
    Inherited, Lineage, Mark, MarkVerdict, Removal, Result, Snapshot, SnapshotId, Unmark, Validation,
};

impl Dispatcher {
    /// Removes a checkpoint. On each disk the bitmap before it takes over what its own knows, and goes on recording where
    /// that was the last: increments since any other checkpoint lose no block. A kept snapshot that only this checkpoint
    /// still needs is deleted.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint; `Busy` while what changed since it is being exported; `Broken` where
    /// its bitmap cannot be trusted. Nothing is changed then.
    pub async fn remove_checkpoint(&self, domain: &Domain, name: &CheckpointName) -> Result<()> {
        let held = self
            .hold(domain)
            .await
            .map_err(|e| e.during("checkpoint remove"))?;
        let removed = self.remove_held(&held, domain, name).await;
        removed.map_err(|e| {
            e.during("checkpoint remove")
                .with("domain", &domain.id)
                .with("checkpoint", name)
        })
    }

    async fn remove_held(&self, held: &Held, domain: &Domain, name: &CheckpointName) -> Result<()> {
        let control = &*held.control;
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        let removal = lineage.removal(name)?;
        self.refuse_exported_since(domain, name).await?;
        self.refuse_while_merging(&domain.id).await?;
        let validation = self.validate_held(control, domain, &lineage).await?;
        refuse_unusable(&lineage, &removal, &validation, name)?;
        let mut endings: Vec<Ending> = removal
            .marks
            .iter()
            .filter_map(|mark| ending(domain, mark, begins_anew(&lineage, name, &mark.target)))
            .collect();
        let mut changes = vec![Change::RemoveCheckpoint(name.clone())];
        for mut snapshot in self.catalog.snapshots(&domain.id).await? {
            if forget(&mut snapshot, &lineage, name, domain, &mut endings)? {
                changes.push(Change::AddSnapshot(Box::new(snapshot)));
            }
        }
        for child in reparented(&lineage, &removal, name)? {
            changes.push(Change::AddCheckpoint(Box::new(child)));
        }
        self.about_to_unpin(domain).await?;
        let ended = self.end_marks(control, domain, endings, changes).await;
        ended.and(self.free_unpinned(held, &domain.id).await)
    }

    /// Removes what a snapshot that has been merged kept for checkpoints that are no more: it is in the layer that the guest
    /// writes to now. Where that fails nothing is lost: the bitmaps are told as unknown ones.
    pub(crate) async fn drop_inherited(
        &self,
        control: &dyn Control,
        domain: &Domain,
        inherited: Vec<(String, String)>,
        altered: &mut Altered,
    ) {
        let mut endings = Vec::new();
        for (target, bitmap) in inherited {
            let now = altered.disks.iter().rfind(|disk| disk.target == target);
            let disk = now.or_else(|| domain.disk(&target).ok());
            if let Some(disk) = disk.filter(|_| altered.ended.contains(&target)) {
                endings.push(Ending {
                    disk: disk.clone(),
                    bitmap,
                    into: None,
                    record: false,
                });
            }
        }
        if let (false, Some(tracker)) = (endings.is_empty(), &self.tracker)
            && let Err(error) = tracker.end(control, &endings).await
        {
            altered.warnings.push(format!(
                "bitmaps of removed checkpoints stay in the image: {error}"
            ));
        }
    }

    async fn refuse_exported_since(&self, domain: &Domain, name: &CheckpointName) -> Result<()> {
        let exports = self.catalog.exports(&domain.id).await?;
        let told = |export: &&crate::Export| {
            export
                .changes
                .as_ref()
                .is_some_and(|changes| changes.since == *name)
        };
        match exports.iter().find(told) {
            None => Ok(()),
            Some(export) => Err(Error::new(
                ErrorKind::Busy,
                "what has changed since the checkpoint is being exported",
            )
            .with("export", &export.alias)
            .hint("Stop that export first: `disksnap export stop`.")),
        }
    }
}

fn begins_anew(lineage: &Lineage, name: &CheckpointName, target: &str) -> bool {
    lineage
        .get(name)
        .ok()
        .and_then(|checkpoint| checkpoint.disk(target))
        .is_some_and(|disk| disk.anew)
}

/// What a mark knows can be handed over only where both it and its heir can be trusted.
fn refuse_unusable(
    lineage: &Lineage,
    removal: &Removal,
    validation: &Validation,
    name: &CheckpointName,
) -> Result<()> {
    let verdict = |checkpoint: &CheckpointName, target: &str| {
        let mut marks = validation.marks.iter();
        let mark = marks.find(|mark| mark.checkpoint == *checkpoint && mark.target == target);
        mark.map_or(MarkVerdict::Missing, |mark| mark.verdict)
    };
    for mark in &removal.marks {
        let Some(before) = lineage.bitmap_before(name, &mark.target)? else {
            continue;
        };
        if mark.into.is_none() || begins_anew(lineage, name, &mark.target) {
            continue;
        }
        for checkpoint in [name, &before.name] {
            let verdict = verdict(checkpoint, &mark.target);
            // The last one's heir is going to record, and does not yet.
            if !verdict.is_usable() && verdict != MarkVerdict::CutOff {
                return Err(Error::new(
                    ErrorKind::Broken,
                    format!(
                        "what the checkpoint knows of the disk cannot be handed to '{}': '{checkpoint}' is {}",
                        before.name,
                        verdict.as_str()
                    ),
                )
                .with("disk", &mark.target)
                .hint("`disksnap checkpoint drop-broken` drops what cannot be trusted, and nothing else."));
            }
        }
    }
    Ok(())
}

/// What becomes of a mark that is a bitmap; a disk that the domain has no more took its bitmaps along. Across a gap
/// nothing is handed over.
fn ending(domain: &Domain, mark: &Unmark, anew: bool) -> Option<Ending> {
    let Mark::Bitmap(bitmap) = &mark.mark else {
        return None;
    };
    let into = match &mark.into {
        Some(Mark::Bitmap(into)) if !anew => Some(into.clone()),
        _ => None,
    };
    Some(Ending {
        disk: domain.disk(&mark.target).ok()?.clone(),
        bitmap: bitmap.clone(),
        record: mark.last && into.is_some(),
        into,
    })
}

/// The children as they are from then on: where the removed one began anew on a disk, the next one there does.
fn reparented(lineage: &Lineage, removal: &Removal, name: &CheckpointName) -> Result<Vec<crate::Checkpoint>> {
    let gone = lineage.get(name)?;
    let anew: Vec<&str> = gone
        .disks
        .iter()
        .filter(|d| d.anew)
        .map(|d| d.target.as_str())
        .collect();
    let mut changed = removal.children.clone();
    for target in anew {
        for checkpoint in lineage.checkpoints() {
            let before = lineage.before(&checkpoint.name, target)?;
            if checkpoint.disk(target).is_none() || before.is_none_or(|before| before.name != *name) {
                continue;
            }
            if !changed.iter().any(|known| known.name == checkpoint.name) {
                changed.push(checkpoint.clone());
            }
            let known = changed.iter_mut().find(|known| known.name == checkpoint.name);
            for disk in known.into_iter().flat_map(|known| &mut known.disks) {
                disk.anew |= disk.target == target;
            }
        }
    }
    Ok(changed)
}

/// Takes a checkpoint that is going to be removed out of a snapshot's record; whether that changed it.
fn forget(
    snapshot: &mut Snapshot,
    lineage: &Lineage,
    name: &CheckpointName,
    domain: &Domain,
    endings: &mut Vec<Ending>,
) -> Result<bool> {
    let mut changed = false;
    if snapshot.checkpoint.as_ref() == Some(name) {
        snapshot.checkpoint = None;
        changed = true;
    }
    let Some(after) = snapshot.after.clone().filter(|after| lineage.get(after).is_ok()) else {
        return Ok(changed);
    };
    for disk in &mut snapshot.disks {
        for inherited in disk
            .inherited
            .iter_mut()
            .filter(|i| i.heir.as_ref() == Some(name))
        {
            inherited.heir = heir(lineage, name, &disk.target)?;
            changed = true;
        }
        let mut marks = lineage
            .back_from(&after)?
            .filter(|c| c.disk(&disk.target).is_some());
        if marks.next().is_some_and(|last| last.name == *name) && begins_anew(lineage, name, &disk.target) {
            disk.untold = true;
            changed = true;
        }
        let mut covering = lineage
            .back_from(&after)?
            .filter(|c| c.bitmap(&disk.target).is_some());
        let is_last = covering.next().is_some_and(|last| last.name == *name);
        if !is_last && covering.all(|before| before.name != *name) {
            continue;
        }
        if let (Access::Source { .. }, Some(bitmap)) = (&disk.access, lineage.get(name)?.bitmap(&disk.target))
        {
            // The snapshot's own layers keep it, for nothing in them is changed.
            disk.inherited.push(Inherited {
                bitmap: bitmap.to_owned(),
                heir: heir(lineage, name, &disk.target)?,
            });
            changed = true;
        }
        // What it holds is in the mark before from now on, with what was written after the snapshot: more, never less.
        if let Some(bitmap) = disk.written.take_if(|_| is_last) {
            endings.extend(domain.disk(&disk.target).ok().map(|disk| Ending {
                disk: disk.clone(),
                bitmap,
                into: None,
                record: false,
            }));
            changed = true;
        }
    }
    if after == *name {
        snapshot.after.clone_from(&lineage.get(name)?.parent);
        changed = true;
    }
    Ok(changed)
}

/// By disk, the bitmaps of removed checkpoints that a snapshot keeps.
pub(crate) fn inherited(snapshots: &[Snapshot], of: SnapshotId) -> Vec<(String, String)> {
    let disks = snapshots.iter().filter(|s| s.id == of).flat_map(|s| &s.disks);
    let kept = disks.flat_map(|disk| {
        disk.inherited
            .iter()
            .map(|kept| (disk.target.clone(), kept.bitmap.clone()))
    });
    kept.collect()
}

/// The checkpoint that what a removed one knew counts to: across a gap there is none.
fn heir(lineage: &Lineage, name: &CheckpointName, target: &str) -> Result<Option<CheckpointName>> {
    if begins_anew(lineage, name, target) {
        return Ok(None);
    }
    let before = lineage.bitmap_before(name, target)?;
    Ok(before.map(|before| before.name.clone()))
}
