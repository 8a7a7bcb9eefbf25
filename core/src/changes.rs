//! What changed in a disk between a checkpoint and a snapshot: what knows it.

use std::sync::Arc;

use crate::names::nearest;
use crate::{
    Access, Changed, CheckpointDisk, CheckpointName, Compare, Control, DiskSnapshotRecord, Dispatcher,
    Domain, DomainId, Error, ErrorKind, Export, Health, Lineage, Mark, Peer, Precision, Result, Snapshot,
    SnapshotId, Told, UnitRecord,
};

/// What knows what changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Known {
    /// These bitmaps between them; and why they tell more than that, where they do.
    Bitmaps(Vec<String>, Option<String>),
    /// The method, which compares the snapshot with this one.
    ByComparing(SnapshotId),
}

impl Dispatcher {
    /// What knows what changed in a disk of a snapshot since a checkpoint.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint; `Invalid` when it does not cover the disk, or is not before the
    /// snapshot; `Broken` when what changed in between is not known any more; `Unsupported` for a method that cannot tell.
    pub(crate) async fn known_since(
        &self,
        domain: &Domain,
        snapshot: &Snapshot,
        disk: &DiskSnapshotRecord,
        since: &CheckpointName,
    ) -> Result<Known> {
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        let known = async {
            let mark = covering(&lineage, snapshot, disk, since)?;
            if let Mark::Pinned(id) = &mark.mark
                && self.comparer(&domain.id, *id, snapshot, disk).await?.is_some()
            {
                return Ok(Known::ByComparing(*id));
            }
            bitmaps_since(&lineage, snapshot, disk, since)
        };
        known.await.map_err(|error: Error| {
            error
                .with("snapshot", &snapshot.name)
                .with("disk", &disk.target)
                .with("checkpoint", since)
        })
    }

    /// What compares this disk of a snapshot with that of an earlier one, and the earlier unit; `None` where the two are not
    /// of one method.
    async fn comparer(
        &self,
        domain: &DomainId,
        earlier: SnapshotId,
        snapshot: &Snapshot,
        disk: &DiskSnapshotRecord,
    ) -> Result<Option<(Arc<dyn Compare>, Peer)>> {
        let all = self.all_snapshots(domain).await?;
        let kept = all.iter().find(|kept| kept.id == earlier);
        let Some((kept, its)) = kept.and_then(|kept| Some((kept, kept.disk(&disk.target)?))) else {
            return Err(Error::new(
                ErrorKind::Broken,
                "the snapshot that the checkpoint is, is not known here",
            )
            .hint("Take a full backup of this disk; `disksnap checkpoint drop-broken` drops what cannot be told since."));
        };
        let UnitRecord { method, unit } = &kept.units[its.unit];
        let same = *method == disk.method && matches!(disk.access, Access::Source { .. });
        let later = &snapshot.units[disk.unit].unit;
        let compare = if same {
            self.registry.get(method)?.compare(later)
        } else {
            None
        };
        let peer = Peer {
            snapshot: earlier,
            unit: unit.clone(),
        };
        Ok(compare.map(|compare| (compare, peer)))
    }

    /// Has the method tell what changed, where an export is to tell that.
    pub(crate) async fn compared(
        &self,
        control: &dyn Control,
        domain: &DomainId,
        export: &Export,
    ) -> Result<Option<Changed>> {
        let Some(Told::Compared(earlier)) = export.changes.as_ref().map(|changes| &changes.told) else {
            return Ok(None);
        };
        let all = self.all_snapshots(domain).await?;
        let found = all.iter().find(|snapshot| snapshot.id == export.snapshot);
        let found = found.and_then(|snapshot| Some((snapshot, snapshot.disk(&export.target)?)));
        let gone = || {
            Error::new(
                ErrorKind::NotFound,
                "the snapshot that is exported is not there any more",
            )
        };
        let (snapshot, disk) = found.ok_or_else(gone)?;
        let (compare, earlier) = self
            .comparer(domain, *earlier, snapshot, disk)
            .await?
            .ok_or_else(gone)?;
        let method = &disk.method;
        let health = self
            .registry
            .get(method)?
            .inspect(control, earlier.snapshot, &earlier.unit);
        if let Health::Broken(why) | Health::Gone(why) = health.await.map_err(|e| e.by(method))? {
            return Err(Error::new(
                ErrorKind::Broken,
                format!("the snapshot that the checkpoint is, cannot be used: {why}"),
            )
            .with("disk", &disk.target)
            .hint("Mend that, or take a full backup of this disk."));
        }
        let later = Peer {
            snapshot: snapshot.id,
            unit: snapshot.units[disk.unit].unit.clone(),
        };
        let changed = compare.changed(control, &earlier, &later, &disk.target).await;
        changed
            .map(Some)
            .map_err(|e| e.by(method).with("disk", &disk.target))
    }
}

/// Why an export tells more than has changed, where it does.
pub(crate) fn excess(precision: &Precision) -> Option<String> {
    match precision {
        Precision::Exact(_) => None,
        Precision::Superset(why) => Some(why.clone()),
    }
}

/// The checkpoint's own record of the disk.
fn covering<'a>(
    lineage: &'a Lineage,
    snapshot: &Snapshot,
    disk: &DiskSnapshotRecord,
    since: &CheckpointName,
) -> Result<&'a CheckpointDisk> {
    lineage.get(since)?;
    let Some(last) = &snapshot.after else {
        return Err(not_before(lineage, snapshot, since));
    };
    if lineage
        .back_from(last)?
        .all(|checkpoint| checkpoint.name != *since)
    {
        return Err(not_before(lineage, snapshot, since));
    }
    lineage.since(&disk.target, since, last).map(|marks| marks[0])
}

/// The bitmaps that know it, where the snapshots in between are told by bitmaps.
fn bitmaps_since(
    lineage: &Lineage,
    snapshot: &Snapshot,
    disk: &DiskSnapshotRecord,
    since: &CheckpointName,
) -> Result<Known> {
    let target = disk.target.as_str();
    let Some(last) = &snapshot.after else {
        return Err(not_before(lineage, snapshot, since));
    };
    // A checkpoint that is a kept snapshot has no bitmap: the one before it recorded on.
    let Some(from) = lineage.back_from(since)?.find(|c| c.bitmap(target).is_some()) else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the checkpoint is a kept snapshot, which this one, by {}, cannot be compared with",
                disk.method
            ),
        )
        .hint("Take the snapshot by the method that the checkpoint's was taken by, or a full backup of this disk."));
    };
    let marks = lineage.since(target, &from.name, last)?;
    let bitmaps = marks.iter().filter(|mark| mark.mark.bitmap().is_some());
    if marks.iter().skip(1).any(|mark| mark.anew) || disk.untold {
        return Err(Error::new(
            ErrorKind::Broken,
            "what has changed between the checkpoint and the snapshot is not known: a bitmap in between was lost",
        )
        .hint("Take a full backup of this disk; later ones can be incremental again."));
    }
    let mut names: Vec<String> = bitmaps
        .filter_map(|mark| mark.mark.bitmap())
        .map(str::to_owned)
        .collect();
    if let (Some(written), Some(last)) = (&disk.written, names.last_mut()) {
        // The last bitmap went on recording after the snapshot; this is how it stood at the instant.
        last.clone_from(written);
    }
    for inherited in &disk.inherited {
        let Some(heir) = &inherited.heir else { continue };
        let mut told = lineage
            .back_from(last)?
            .take_while(|c| Some(&c.name) != from.parent.as_ref());
        if told.any(|checkpoint| checkpoint.name == *heir) {
            names.push(inherited.bitmap.clone());
        }
    }
    let more = (from.name != *since).then(|| {
        format!(
            "all since the checkpoint '{}' is told, which is earlier",
            from.name
        )
    });
    Ok(Known::Bitmaps(names, more))
}

fn not_before(lineage: &Lineage, snapshot: &Snapshot, since: &CheckpointName) -> Error {
    if snapshot.checkpoint.as_ref() == Some(since) {
        return Error::new(
            ErrorKind::Invalid,
            "the checkpoint began with this very snapshot: nothing has changed in between",
        )
        .hint("Name the checkpoint of an earlier snapshot.");
    }
    let before = snapshot
        .after
        .as_ref()
        .and_then(|last| lineage.back_from(last).ok());
    let names: Vec<&str> = before.into_iter().flatten().map(|c| c.name.as_str()).collect();
    Error::new(ErrorKind::Invalid, "the checkpoint is not before the snapshot").hint(nearest(
        "checkpoints before it",
        since.as_str(),
        names.into_iter(),
    ))
}
