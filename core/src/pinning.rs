//! Snapshots that are kept because a checkpoint is them: which they are, what a delete leaves of them, and their end.
//!
//! Such a checkpoint's mark is the snapshot ([`Mark::Pinned`]). Deleting the snapshot takes its name and what no checkpoint
//! needs; the rest goes with the last checkpoint that needs it.

use std::collections::{BTreeSet, HashMap};

use uuid::Uuid;

use crate::dispatcher::Held;
use crate::ledger::remove;
use crate::{
    Act, Change, Checkpoint, CheckpointName, Dispatcher, Domain, DomainId, Error, ErrorKind, Mark, Result,
    Snapshot, SnapshotId, Unit, UnitRecord,
};

/// Which checkpoints are which snapshots' disks.
#[derive(Debug, Default)]
pub(crate) struct Pins(HashMap<SnapshotId, Vec<(String, CheckpointName)>>);

impl Pins {
    pub(crate) fn of(checkpoints: &[Checkpoint]) -> Self {
        let mut pins: HashMap<SnapshotId, Vec<(String, CheckpointName)>> = HashMap::new();
        for checkpoint in checkpoints {
            for disk in &checkpoint.disks {
                if let Mark::Pinned(id) = &disk.mark {
                    let pin = (disk.target.clone(), checkpoint.name.clone());
                    pins.entry(*id).or_default().push(pin);
                }
            }
        }
        Self(pins)
    }

    /// The checkpoints that a unit of a snapshot is.
    fn on(&self, id: SnapshotId, unit: &Unit) -> impl Iterator<Item = &CheckpointName> {
        let pins = self.0.get(&id).into_iter().flatten();
        let in_unit = |target: &String| unit.disks.iter().any(|disk| disk.target == *target);
        pins.filter(move |(target, _)| in_unit(target))
            .map(|(_, checkpoint)| checkpoint)
    }

    /// The checkpoints that the snapshot is, on any of its disks.
    pub(crate) fn on_any(&self, snapshot: &Snapshot) -> Vec<CheckpointName> {
        let units = snapshot.units.iter();
        let names: BTreeSet<&CheckpointName> = units.flat_map(|r| self.on(snapshot.id, &r.unit)).collect();
        names.into_iter().cloned().collect()
    }

    /// Whether a unit of a snapshot is any checkpoint.
    pub(crate) fn need(&self, id: SnapshotId, unit: &Unit) -> bool {
        self.on(id, unit).next().is_some()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What to record of a snapshot that was deleted: what is left of it, if anything is.
pub(crate) fn without_name(rest: Snapshot) -> Change {
    match rest.units.as_slice() {
        [] => Change::RemoveSnapshot(rest.id),
        _ => Change::AddSnapshot(Box::new(rest)),
    }
}

impl Dispatcher {
    /// The snapshots of a domain and what is kept of deleted ones, oldest first.
    pub(crate) async fn all_snapshots(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        let mut all = self.catalog.pinned(domain).await?;
        if all.is_empty() {
            return self.catalog.snapshots(domain).await;
        }
        all.extend(self.catalog.snapshots(domain).await?);
        all.sort_by_key(|snapshot| snapshot.created);
        Ok(all)
    }

    pub(crate) async fn pins(&self, domain: &DomainId) -> Result<Pins> {
        Ok(Pins::of(&self.catalog.checkpoints(domain).await?))
    }

    /// Deletes the units of a snapshot that no checkpoint is, the newest first; answers with what is left of it.
    pub(crate) async fn delete_units(&self, held: &Held, snapshot: &Snapshot) -> Result<Snapshot> {
        let pins = self.pins(&snapshot.domain).await?;
        let mut rest = snapshot.clone();
        for (n, UnitRecord { method, unit }) in snapshot.units.iter().enumerate().rev() {
            if pins.need(snapshot.id, unit) {
                continue;
            }
            let provider = self.registry.get(method)?;
            let deleted = provider.delete(&*held.control, snapshot.id, unit).await;
            deleted.map_err(|e| e.by(method))?;
            remove(&mut rest, n);
        }
        rest.pinned = true;
        for disk in &mut rest.disks {
            disk.written = None;
        }
        Ok(rest)
    }

    /// Before records of checkpoints change that snapshots may be kept for: where the process is killed behind that, `recover`
    /// knows by the intent that something is to end. [`Self::free_unpinned`] settles it.
    pub(crate) async fn about_to_unpin(&self, domain: &Domain) -> Result<()> {
        if let Some(kept) = self.catalog.pinned(&domain.id).await?.first() {
            let snapshot = kept.id;
            self.intend(domain, Act::Delete { snapshot }).await?;
        }
        Ok(())
    }

    /// Deletes what was kept for checkpoints that are no more. What cannot be deleted now is told, and the next act on the
    /// domain tries again: nobody waits for it, and the record without a checkpoint says that it is to be done.
    pub(crate) async fn free_unpinned(&self, held: &Held, domain: &DomainId) -> Result<()> {
        let kept = self.catalog.pinned(domain).await?;
        if kept.is_empty() {
            return Ok(());
        }
        let pins = self.pins(domain).await?;
        let ids: Vec<SnapshotId> = kept.iter().map(|snapshot| snapshot.id).collect();
        for snapshot in kept {
            let mut units = snapshot.units.iter();
            if units.all(|record| pins.need(snapshot.id, &record.unit)) {
                continue;
            }
            match self.delete_units(held, &snapshot).await {
                Ok(rest) => {
                    let change = [without_name(rest)];
                    self.catalog.settle(Uuid::nil(), domain, &change).await?;
                }
                Err(error) => tracing::warn!(
                    "what was kept of the snapshot {} for a checkpoint that is no more cannot be deleted yet: {error}",
                    snapshot.name
                ),
            }
        }
        for intent in self.catalog.intents(Some(domain)).await? {
            if matches!(intent.act, Act::Delete { snapshot } if ids.contains(&snapshot)) {
                self.catalog.settle(intent.id, domain, &[]).await?;
            }
        }
        Ok(())
    }

    /// Refuses to merge away what a checkpoint is.
    pub(crate) async fn refuse_pinned(
        &self,
        domain: &DomainId,
        id: SnapshotId,
        units: &[Unit],
    ) -> Result<()> {
        let pins = self.pins(domain).await?;
        let Some(checkpoint) = units.iter().find_map(|unit| pins.on(id, unit).next()) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Busy,
            format!("the checkpoint '{checkpoint}' is this snapshot, and merging would end it"),
        )
        .with("checkpoint", checkpoint)
        .hint("Remove the checkpoint first: `disksnap checkpoint remove`."))
    }
}
