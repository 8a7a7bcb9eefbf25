//! What changed in a disk between a checkpoint and a snapshot: which bitmaps know it between them.

use crate::names::nearest;
use crate::{
    CheckpointName, DiskSnapshotRecord, Dispatcher, Domain, Error, ErrorKind, Lineage, Mark, Result, Snapshot,
};

impl Dispatcher {
    /// The bitmaps that know, between them, what changed in a disk of a snapshot since a checkpoint.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint; `Invalid` when it does not cover the disk, or is not before the
    /// snapshot; `Broken` when what changed in between is not known any more; `Unsupported` for a method that cannot tell.
    pub(crate) async fn bitmaps_since(
        &self,
        domain: &Domain,
        snapshot: &Snapshot,
        disk: &DiskSnapshotRecord,
        since: &CheckpointName,
    ) -> Result<Vec<String>> {
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        bitmaps_since(&lineage, snapshot, disk, since).map_err(|error| {
            error
                .with("snapshot", &snapshot.name)
                .with("disk", &disk.target)
                .with("checkpoint", since)
        })
    }
}

fn bitmaps_since(
    lineage: &Lineage,
    snapshot: &Snapshot,
    disk: &DiskSnapshotRecord,
    since: &CheckpointName,
) -> Result<Vec<String>> {
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
    let marks = lineage.since(&disk.target, since, last)?;
    let lost = marks.iter().skip(1).any(|mark| mark.anew);
    if lost || disk.untold {
        return Err(Error::new(
            ErrorKind::Broken,
            "what has changed between the checkpoint and the snapshot is not known: a bitmap in between was lost",
        )
        .hint("Take a full backup of this disk; later ones can be incremental again."));
    }
    let mut names = Vec::with_capacity(marks.len());
    for mark in marks {
        match &mark.mark {
            Mark::Bitmap(name) => names.push(name.clone()),
            Mark::Pinned(_) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the checkpoint is a kept snapshot, and what changed since it is not told as a bitmap",
                ));
            }
        }
    }
    if let (Some(written), Some(last)) = (&disk.written, names.last_mut()) {
        // The last bitmap went on recording after the snapshot; this is how it stood at the instant.
        last.clone_from(written);
    }
    names.extend(disk.inherited.iter().cloned());
    Ok(names)
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
