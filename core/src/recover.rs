//! What a killed run left: finish it or undo it. Safe at any time, and twice.

use serde::Serialize;
use uuid::Uuid;

use crate::dispatcher::{Held, is_refusal};
use crate::filling::targets;
use crate::ledger::chosen;
use crate::{Act, Control, Dispatcher, Domain, DomainId, Error, FillStage, Intent, Result, SnapshotId};

/// What was done about one thing that a killed run left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// Whose domain.
    pub domain: DomainId,
    /// What had been begun, in words.
    pub what: String,
    /// What was done about it.
    pub how: RecoveredHow,
}

/// How a left-over act ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveredHow {
    /// It was carried to its end.
    Finished,
    /// It was undone, as if it had never begun.
    Undone,
    /// It could not be settled, and why; it stays for the next try.
    Left(String),
}

impl Dispatcher {
    /// Finishes or undoes what killed runs left, of one domain or of all. Safe at any time, and twice:
    /// an act that still runs keeps its domain locked, and a reader that still reads is left alone. What
    /// cannot be settled is told, and stays for the next try.
    pub async fn recover(&self, domain: Option<&DomainId>) -> Result<Vec<Recovered>> {
        let mut domains: Vec<Domain> = Vec::new();
        for intent in self.catalog.intents(domain).await? {
            if !domains.iter().any(|d| d.id.uuid == intent.domain.id.uuid) {
                domains.push(intent.domain);
            }
        }
        let mut all = Vec::new();
        for domain in domains {
            match self.recover_one(&domain).await {
                Ok(recovered) => all.extend(recovered),
                Err(error) => all.push(Recovered {
                    domain: domain.id,
                    what: "whatever was under way".to_owned(),
                    how: RecoveredHow::Left(error.to_string()),
                }),
            }
        }
        all.extend(self.recover_image_servers(domain).await?);
        Ok(all)
    }

    async fn recover_one(&self, domain: &Domain) -> Result<Vec<Recovered>> {
        let lock = self.catalog.lock(&domain.id).await?;
        let control = self.connector.control(domain).await?;
        let held = Held::new(control, lock);
        let mut all = Vec::new();
        // Asked again under the lock: what was under way a moment ago has perhaps ended by itself.
        for intent in self.leftovers(&*held.control, &domain.id).await? {
            all.push(self.settle_one(&held, &intent).await);
        }
        self.free_unpinned(&held, &domain.id).await?;
        Ok(all)
    }

    /// Before a new act on a domain: settles what a killed one left, or refuses. But for one that is about to be taken
    /// up again.
    pub(crate) async fn settle_leftovers_but(
        &self,
        held: &Held,
        domain: &DomainId,
        but: Option<Uuid>,
    ) -> Result<()> {
        for intent in self.leftovers(&*held.control, domain).await? {
            if but == Some(intent.id) {
                continue;
            }
            self.act_on(held, &intent).await.map_err(|error| {
                error
                    .with("domain", domain)
                    .hint("A killed run left something that could not be settled: see `disksnap recover`.")
            })?;
        }
        Ok(())
    }

    /// The intents of a locked domain but for those of readers that still read, merges that are driven, and disks that
    /// are being filled.
    async fn leftovers(&self, control: &dyn Control, domain: &DomainId) -> Result<Vec<Intent>> {
        let mut left = Vec::new();
        for intent in self.catalog.intents(Some(domain)).await? {
            match &intent.act {
                Act::Read { lease, .. } | Act::Merge { lease, .. }
                    if self.catalog.lease_lives(*lease).await? => {}
                Act::Fill { lending, stage } if self.fill_goes_on(control, lending, *stage).await? => {}
                _ => left.push(intent),
            }
        }
        if !left.is_empty() {
            // Whatever else there is to be done, the guest comes first.
            control.let_go().await?;
        }
        if left.iter().any(|intent| matches!(intent.act, Act::Merge { .. })) {
            control.come_to_rest().await?;
        }
        // Before bitmaps are written to, which hides when a raw disk was written past them.
        let writes = |intent: &&Intent| matches!(intent.act, Act::Create { .. } | Act::EndMarks { .. });
        if let Some(intent) = left.iter().find(writes) {
            for warning in self.renew_past(control, &intent.domain).await? {
                tracing::warn!("{warning}");
            }
        }
        Ok(left)
    }

    async fn settle_one(&self, held: &Held, intent: &Intent) -> Recovered {
        let how = match self.act_on(held, intent).await {
            Ok(how) => how,
            Err(error) => RecoveredHow::Left(error.to_string()),
        };
        Recovered {
            domain: intent.domain.id.clone(),
            what: describe(&intent.act),
            how,
        }
    }

    /// A create, a start and a merge are undone, for nobody got their answer; a delete, a revert and a stop are
    /// finished. A merge that has ended has ended.
    async fn act_on(&self, held: &Held, intent: &Intent) -> Result<RecoveredHow> {
        let control = &*held.control;
        match &intent.act {
            Act::Create { parts, .. } => {
                self.undo_create(control, intent, parts).await.map_err(first)?;
                Ok(RecoveredHow::Undone)
            }
            Act::EndMarks { .. } => {
                self.redo_end_marks(control, intent).await?;
                Ok(RecoveredHow::Finished)
            }
            Act::Cross { crossing, changes } => {
                self.settle_crossing(control, intent, crossing, changes).await
            }
            Act::Serve { starts, exports, .. } => {
                self.undo_serve(control, intent, *starts, exports).await?;
                Ok(RecoveredHow::Undone)
            }
            Act::Delete { snapshot } => match self.redo_delete(held, intent, *snapshot).await {
                // It was killed before it could say so.
                Err(error) if is_refusal(&error) => Ok(RecoveredHow::Undone),
                done => done.map(|()| RecoveredHow::Finished),
            },
            Act::Revert { snapshot, targets } => {
                self.redo_revert(held, intent, *snapshot, targets).await?;
                Ok(RecoveredHow::Finished)
            }
            Act::Merge { .. } => {
                let ended = self.end_merge(held, intent).await?;
                Ok(if ended {
                    RecoveredHow::Finished
                } else {
                    RecoveredHow::Undone
                })
            }
            Act::Unserve { exports } => {
                self.finish_unserve(held, intent, exports).await?;
                Ok(RecoveredHow::Finished)
            }
            Act::Read { export, .. } => {
                self.finish_unserve(held, intent, std::slice::from_ref(export))
                    .await?;
                Ok(RecoveredHow::Undone)
            }
            Act::Fill { lending, stage } => self.settle_fill(control, intent, lending, *stage).await,
            Act::Attach { attached, export } | Act::Detach { attached, export } => {
                self.settle_plugging(held, intent, attached, export).await
            }
        }
    }

    async fn redo_delete(&self, held: &Held, intent: &Intent, snapshot: SnapshotId) -> Result<()> {
        let snapshots = self.all_snapshots(&intent.domain.id).await?;
        match snapshots.iter().find(|s| s.id == snapshot) {
            // The checkpoint was to go that it was kept for.
            Some(snapshot) if snapshot.pinned => self.free_unpinned(held, &intent.domain.id).await,
            Some(snapshot) => self.finish_delete(held, intent, snapshot).await,
            None => self.catalog.settle(intent.id, &intent.domain.id, &[]).await,
        }
    }

    async fn redo_revert(
        &self,
        held: &Held,
        intent: &Intent,
        snapshot: SnapshotId,
        targets: &[String],
    ) -> Result<()> {
        let snapshots = self.all_snapshots(&intent.domain.id).await?;
        match snapshots.iter().find(|s| s.id == snapshot) {
            Some(snapshot) => {
                let entries = chosen(snapshot, targets)?;
                self.finish_revert(held, intent, snapshot, &entries)
                    .await
                    .map(drop)
            }
            None => self.catalog.settle(intent.id, &intent.domain.id, &[]).await,
        }
    }
}

fn first(mut failures: Vec<Error>) -> Error {
    let error = failures.remove(0);
    error.rollback_failed(failures)
}

fn describe(act: &Act) -> String {
    match act {
        Act::Create { name, .. } => format!("create of snapshot '{name}'"),
        Act::EndMarks { .. } => "removal of checkpoints".to_owned(),
        Act::Cross { crossing, .. } if crossing.tracks() => {
            format!("tracking of the disk {}", crossing.to.target)
        }
        Act::Cross { crossing, .. } => format!("end of the tracking of the disk {}", crossing.to.target),
        Act::Delete { snapshot } => format!("delete of snapshot {snapshot}"),
        Act::Serve { exports, .. } => format!("start of {} exports", exports.len()),
        Act::Merge { name, .. } => format!("merge of snapshot '{name}'"),
        Act::Revert { snapshot, .. } => format!("revert to snapshot {snapshot}"),
        Act::Unserve { exports } => format!("stop of {} exports", exports.len()),
        Act::Read { export, .. } => format!("reading through the export '{export}'"),
        Act::Fill { lending, stage } => {
            let what = match stage {
                FillStage::Starting => "start of the filling",
                FillStage::Open => "filling, which the hypervisor has not outlived,",
                FillStage::Ending => "end of the filling",
            };
            format!("{what} of {}", targets(lending))
        }
        Act::Attach { attached, .. } => format!("attach to '{}'", attached.to.id),
        Act::Detach { attached, .. } => format!("detach from '{}'", attached.to.id),
    }
}
