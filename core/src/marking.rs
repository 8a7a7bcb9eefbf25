//! A checkpoint that begins with a snapshot: which bitmaps start, stop and are copied at the instant.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::{
    Act, Capability, Checkpoint, CheckpointDisk, CheckpointName, Control, Disk, Dispatcher, Domain, Ending,
    Error, ErrorKind, Intent, Lineage, Mark, NewCheckpoint, Part, Plan, Result, SCRATCH_BITMAP, Snapshot,
    SnapshotId, SnapshotName, SnapshotRequest, Start, Trackable, Tracked, Tracker,
};

/// What a create does about checkpoints; nothing where it is empty.
#[derive(Debug, Default)]
pub(crate) struct Marking {
    /// The checkpoint that begins at the instant.
    pub(crate) begins: Option<CheckpointName>,
    /// The one before it.
    pub(crate) after: Option<CheckpointName>,
    pub(crate) starts: Vec<Start>,
    pub(crate) warnings: Vec<String>,
    disks: Vec<CheckpointDisk>,
    /// The disks of which it is not known what was written since the checkpoint before.
    pub(crate) untold: Vec<String>,
    /// By disk: in how many layers each bitmap is.
    pub(crate) shares: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Marking {
    /// Says which node the guest writes to from the instant on, where that is another than before.
    pub(crate) fn follow(&mut self, parts: &[Part], active: bool) {
        let prepared = parts.iter().flat_map(|part| part.prepared.iter().flatten());
        for (target, node) in prepared.flat_map(|p| &p.tops) {
            for start in self
                .starts
                .iter_mut()
                .filter(|start| start.disk.target == *target)
            {
                start.top = Some(node.clone());
                // What was recorded stays below, as it is at the instant.
                start.copy = None;
            }
        }
        // With the domain off nobody but the tracker lets the bitmap go on in an image that is put on top.
        let goes_on = |start: &Start| !active && start.top.is_some() && start.recording.is_some();
        self.starts
            .retain(|start| start.starts.is_some() || start.copy.is_some() || goes_on(start));
    }

    /// The bitmap that holds, for this disk, what was written since the checkpoint before, up to the instant.
    pub(crate) fn copy_of(&self, target: &str) -> Option<String> {
        let start = self.starts.iter().find(|start| start.disk.target == target)?;
        start.copy.clone()
    }

    /// The record of the checkpoint that has begun.
    pub(crate) fn checkpoint(&self, at: SystemTime) -> Option<Checkpoint> {
        Some(Checkpoint {
            name: self.begins.clone()?,
            parent: self.after.clone(),
            created: at,
            description: None,
            disks: self.disks.clone(),
        })
    }
}

impl Dispatcher {
    pub(crate) fn tracker(&self) -> Result<&dyn Tracker> {
        self.tracker.as_deref().ok_or_else(untracked)
    }

    /// Takes back what a create has done to the disks' bitmaps.
    pub(crate) async fn abort_marks(&self, control: &dyn Control, intent: &Intent) -> Result<()> {
        match &intent.act {
            Act::Create { starts, .. } if !starts.is_empty() => {
                let aborted = self.tracker()?.abort(control, starts).await;
                aborted.map_err(|e| e.during("abort"))
            }
            _ => Ok(()),
        }
    }

    /// Removes the bitmaps that belong to a snapshot. They are in the hypervisor's memory alone.
    pub(crate) async fn drop_written(
        &self,
        control: &dyn Control,
        domain: &Domain,
        snapshot: &Snapshot,
    ) -> Result<()> {
        let mut endings = Vec::new();
        for record in &snapshot.disks {
            // A disk that the domain has no more took its bitmaps along.
            if let (Some(bitmap), Ok(disk)) = (&record.written, domain.disk(&record.target)) {
                endings.push(Ending {
                    disk: disk.clone(),
                    bitmap: bitmap.clone(),
                    into: None,
                    record: false,
                });
            }
        }
        if endings.is_empty() || !control.state().await?.is_active() {
            return Ok(());
        }
        self.tracker()?.end(control, &endings).await
    }

    /// What a create of this plan is to do about checkpoints.
    pub(crate) async fn marking(
        &self,
        control: &dyn Control,
        domain: &Domain,
        request: &SnapshotRequest,
        name: &SnapshotName,
        plan: &Plan,
    ) -> Result<Marking> {
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        let begins = match &request.checkpoint {
            None => None,
            Some(NewCheckpoint::Named(name)) => Some(name.clone()),
            Some(NewCheckpoint::AsSnapshot) => Some(CheckpointName::try_from(name)?),
        };
        let mut marking = Marking {
            after: lineage.newest().map(|newest| newest.name.clone()),
            begins,
            ..Marking::default()
        };
        // Also where no checkpoint asks: what was written past a raw disk's qcow2 is not read through it.
        marking.warnings.extend(self.renew_past(control, domain).await?);
        if marking.begins.is_none() && marking.after.is_none() {
            return Ok(marking);
        }
        if let Some(taken) = marking.begins.as_ref().filter(|name| lineage.get(name).is_ok()) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("the checkpoint '{taken}' exists already"),
            )
            .hint("Choose another name, or remove that checkpoint first; it is never replaced."));
        }
        let disks: Vec<_> = plan.disks.iter().map(|planned| &planned.request.disk).collect();
        let looked = self
            .tracker()?
            .look(control, &disks)
            .await
            .map_err(|e| e.during("checkpoint"))?;
        let active = control.state().await?.is_active();
        for ((planned, disk), tracked) in plan.disks.iter().zip(&disks).zip(&looked) {
            let shares = marking.shares.entry(disk.target.clone()).or_default();
            for bitmap in &tracked.bitmaps {
                *shares.entry(bitmap.name.clone()).or_default() += 1;
            }
            refuse_taken(marking.begins.as_ref(), &disk.target, tracked)?;
            let before = lineage.recording_of(&disk.target).is_some();
            let recording = marking.recording(&lineage, &disk.target, tracked);
            let anew = before && recording.is_none();
            if anew {
                marking.untold.push(disk.target.clone());
            }
            // A snapshot that can be compared with later ones is the checkpoint itself: it costs the guest no bitmap.
            let pinned = planned.probe.capabilities.contains(&Capability::Compare);
            let starts = marking
                .begins
                .as_ref()
                .filter(|_| !pinned)
                .map(ToString::to_string);
            let starts = match starts {
                Some(_) if request.checkpoint_where_possible && marking.left_out(disk, tracked) => None,
                starts => starts,
            };
            if marking.begins.is_some() && (pinned || starts.is_some()) {
                let (mark, volatile) = match &starts {
                    Some(bitmap) => {
                        let volatile = volatile(&disk.target, tracked, &mut marking.warnings)?;
                        (Mark::Bitmap(bitmap.clone()), volatile)
                    }
                    None => (Mark::Pinned(request.id), false),
                };
                marking.disks.push(CheckpointDisk {
                    target: disk.target.clone(),
                    id: None,
                    size: tracked.size,
                    mark,
                    volatile,
                    anew,
                });
            }
            // A bitmap that stops at the instant needs no copy, nor one that nobody changes meanwhile.
            let copied = active && starts.is_none() && recording.is_some();
            marking.starts.push(Start {
                disk: (*disk).clone(),
                top: None,
                copy: copied.then(|| scratch(request.id, &disk.target)),
                starts,
                recording,
            });
        }
        if marking.disks.is_empty() {
            marking.begins = None;
        }
        Ok(marking)
    }
}

impl Marking {
    /// Whether no bitmap can begin on this disk, which is then warned of.
    fn left_out(&mut self, disk: &Disk, tracked: &Tracked) -> bool {
        let (Trackable::No(why) | Trackable::Unreachable(why)) = &tracked.trackable else {
            return false;
        };
        self.warnings.push(format!(
            "{}: the checkpoint does not cover this disk: {why}",
            disk.target
        ));
        true
    }

    /// The bitmap of the disk's last checkpoint, if it can be trusted to have recorded until now.
    fn recording(&mut self, lineage: &Lineage, target: &str, tracked: &Tracked) -> Option<String> {
        let last = lineage.recording_of(target)?;
        let mut line = lineage.back_from(self.after.as_ref()?).ok()?;
        let on_line = line.any(|checkpoint| checkpoint.name == last.name);
        let name = last.bitmap(target)?;
        let found = tracked
            .bitmaps
            .iter()
            .find(|bitmap| bitmap.layer == 0 && bitmap.name == name);
        let why = match found {
            _ if !on_line => "it is on another line than the domain's last checkpoint",
            Some(bitmap) if bitmap.inconsistent => "its bitmap is inconsistent",
            Some(bitmap) if !bitmap.recording => "its bitmap has not been recording",
            Some(_) => return Some(name.to_owned()),
            None => "its bitmap is not there",
        };
        self.warnings.push(format!(
            "{target}: what has changed since the checkpoint '{}' cannot be told any more: {why}; `disksnap checkpoint \
             drop-broken` drops it, and the disk's next backup is a full one",
            last.name
        ));
        None
    }
}

/// A bitmap of that name that is there already is somebody else's, or a removed checkpoint's in a lower layer.
fn refuse_taken(begins: Option<&CheckpointName>, target: &str, tracked: &Tracked) -> Result<()> {
    let taken = begins.filter(|name| tracked.bitmaps.iter().any(|b| b.name == name.as_str()));
    let Some(name) = taken else { return Ok(()) };
    Err(Error::new(
        ErrorKind::AlreadyExists,
        format!("the disk has a bitmap '{name}' already"),
    )
    .with("disk", target)
    .hint("Choose another name for the checkpoint; `disksnap checkpoint validate` tells of bitmaps that nobody knows."))
}

pub(crate) fn untracked() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "nothing here notes which blocks of a disk are written",
    )
    .hint("Build the dispatcher with a tracker (`Dispatcher::tracked_by`).")
}

/// Whether the disk's bitmap will be in memory alone.
fn volatile(target: &str, tracked: &Tracked, warnings: &mut Vec<String>) -> Result<bool> {
    match &tracked.trackable {
        Trackable::Durable => Ok(false),
        Trackable::Volatile(why) => {
            warnings.push(format!(
                "{target}: the checkpoint ends when the domain is shut down: {why}"
            ));
            Ok(true)
        }
        Trackable::No(why) | Trackable::Unreachable(why) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("no checkpoint can begin on this disk: {why}"),
        )
        .with("disk", target)
        .hint("Leave the disk out, or take the snapshot without a checkpoint.")),
    }
}

/// The name of a bitmap that belongs to one snapshot of one disk.
fn scratch(id: SnapshotId, target: &str) -> String {
    format!("{SCRATCH_BITMAP}{}.{target}", id.short())
}
