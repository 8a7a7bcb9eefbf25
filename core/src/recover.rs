//! What a killed run left: finish it or undo it. Safe at any time, and twice.

use serde::Serialize;

use crate::dispatcher::Held;
use crate::{Act, Change, Dispatcher, DomainId, Error, Intent, Result, SnapshotId};

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
    /// an act that still runs keeps its domain locked.
    pub async fn recover(&self, domain: Option<&DomainId>) -> Result<Vec<Recovered>> {
        let mut domains: Vec<crate::Domain> = Vec::new();
        for intent in self.catalog.intents(domain).await? {
            if !domains.iter().any(|d| d.id.uuid == intent.domain.id.uuid) {
                domains.push(intent.domain);
            }
        }
        let mut all = Vec::new();
        for domain in domains {
            let lock = self.catalog.lock(&domain.id).await?;
            let control = self.connector.control(&domain).await?;
            let held = Held::new(control, lock);
            // Asked again under the lock: what was under way a moment ago has perhaps ended by itself.
            for intent in self.catalog.intents(Some(&domain.id)).await? {
                all.push(self.settle_one(&held, &intent).await);
            }
            self.end_dead_leases(&held, &domain.id).await?;
        }
        Ok(all)
    }

    /// Before a new act on a domain: settles what a killed one left, or refuses.
    pub(crate) async fn settle_leftovers(&self, held: &Held, domain: &DomainId) -> Result<()> {
        for intent in self.catalog.intents(Some(domain)).await? {
            self.act_on(held, &intent).await.map_err(|error| {
                error
                    .with("domain", domain)
                    .hint("A killed run left something that could not be settled: see `disksnap recover`.")
            })?;
        }
        self.end_dead_leases(held, domain).await
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

    /// A create and a start are undone, for nobody got their answer; a delete and a stop are finished.
    async fn act_on(&self, held: &Held, intent: &Intent) -> Result<RecoveredHow> {
        let control = &*held.control;
        match &intent.act {
            Act::Create { parts, .. } => {
                self.undo_create(control, intent, parts).await.map_err(first)?;
                Ok(RecoveredHow::Undone)
            }
            Act::Serve { starts, exports, .. } => {
                self.undo_serve(control, intent, *starts, exports).await?;
                Ok(RecoveredHow::Undone)
            }
            Act::Delete { snapshot } => {
                self.redo_delete(held, intent, *snapshot).await?;
                Ok(RecoveredHow::Finished)
            }
            Act::Unserve { exports } => {
                self.finish_unserve(held, intent, exports).await?;
                Ok(RecoveredHow::Finished)
            }
        }
    }

    async fn redo_delete(&self, held: &Held, intent: &Intent, snapshot: SnapshotId) -> Result<()> {
        let snapshots = self.catalog.snapshots(&intent.domain.id).await?;
        match snapshots.iter().find(|s| s.id == snapshot) {
            Some(snapshot) => self.finish_delete(held, intent, snapshot).await,
            None => self.catalog.settle(intent.id, &intent.domain.id, &[]).await,
        }
    }

    /// Stops the exports that were made for readers which have died.
    async fn end_dead_leases(&self, held: &Held, domain: &DomainId) -> Result<()> {
        let mut dead = Vec::new();
        for export in self.catalog.exports(domain).await? {
            if let Some(lease) = export.lease
                && !self.catalog.lease_lives(lease).await?
            {
                dead.push(export.alias);
            }
        }
        if dead.is_empty() {
            return Ok(());
        }
        let (_, changes): (_, Vec<Change>) = self
            .unserve(&*held.control, domain, |export| dead.contains(&export.alias))
            .await?;
        self.catalog.settle(uuid::Uuid::nil(), domain, &changes).await
    }
}

fn first(mut failures: Vec<Error>) -> Error {
    let error = failures.remove(0);
    error.rollback_failed(failures)
}

fn describe(act: &Act) -> String {
    match act {
        Act::Create { name, .. } => format!("create of snapshot '{name}'"),
        Act::Delete { snapshot } => format!("delete of snapshot {snapshot}"),
        Act::Serve { exports, .. } => format!("start of {} exports", exports.len()),
        Act::Unserve { exports } => format!("stop of {} exports", exports.len()),
    }
}
