//! The dispatcher: one request over many disks and methods, all at one instant or not at all.
//!
//! Here: the plan, the create, the list, the look at one, the delete. Exports are in `serve`, what a
//! killed run left is in `recover`, the instant itself is in `window`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use crate::marking::Marking;
use crate::names::nearest;
use crate::pinning::without_name;
use crate::resolve::resolve;
use crate::standing::Standing;
use crate::window::{self, Instantly, Take};
use crate::{
    Access, Act, Altered, Catalog, Change, CheckpointName, Connector, Consistency, Control, DiskRequest,
    DiskSnapshotRecord, Domain, DomainLock, Effect, Error, ErrorKind, Fit, Health, Intent, JobUnit,
    MergeOptions, Part, Plan, PlannedDisk, Registry, Result, RunState, Snapshot, SnapshotId, SnapshotName,
    SnapshotRequest, Tracker, Unit, UnitRecord,
};

/// Finds each disk's provider and drives it. Cheap to clone; every method may be called at any time,
/// from any number of tasks and processes: the catalog's lock keeps those on one domain apart.
#[derive(Debug, Clone)]
pub struct Dispatcher {
    pub(crate) registry: Arc<Registry>,
    pub(crate) catalog: Arc<dyn Catalog>,
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) tracker: Option<Arc<dyn Tracker>>,
}

/// A snapshot and whether it can be trusted now.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Inspected {
    /// The record.
    pub snapshot: Snapshot,
    /// The health of each disk, in the order of [`Snapshot::disks`].
    pub health: Vec<Health>,
}

impl Inspected {
    /// The worst health of any disk: a snapshot is as good as its weakest part.
    #[must_use]
    pub fn overall(&self) -> &Health {
        let rank = |health: &&Health| match health {
            Health::Active => 0,
            Health::Endangered(_) => 1,
            Health::Broken(_) => 2,
            Health::Gone(_) => 3,
        };
        self.health.iter().max_by_key(rank).unwrap_or(&Health::Active)
    }
}

/// What a delete did.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Deletion {
    /// Whether there was anything to delete.
    pub deleted: Deleted,
    /// What merging the disks that stood on the snapshot has changed.
    pub altered: Altered,
    /// The checkpoints that the snapshot is on some of its disks: its data there is kept until they are removed.
    pub kept_for: Vec<CheckpointName>,
}

/// What a delete found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deleted {
    /// It was there, and is deleted.
    Now,
    /// It had been deleted before.
    Before,
}

/// A domain that is locked and reached: what every act needs.
pub(crate) struct Held {
    pub(crate) control: Arc<dyn Control>,
    _lock: Box<dyn DomainLock>,
}

impl Held {
    pub(crate) fn new(control: Arc<dyn Control>, lock: Box<dyn DomainLock>) -> Self {
        Self { control, _lock: lock }
    }
}

impl Dispatcher {
    /// A dispatcher over these methods, this catalog and these domains.
    pub fn new(registry: Registry, catalog: Arc<dyn Catalog>, connector: Arc<dyn Connector>) -> Self {
        Self {
            registry: Arc::new(registry),
            catalog,
            connector,
            tracker: None,
        }
    }

    /// Lets checkpoints begin: this notes which blocks of the disks are written.
    #[must_use]
    pub fn tracked_by(mut self, tracker: Arc<dyn Tracker>) -> Self {
        self.tracker = Some(tracker);
        self
    }

    /// The methods it can use.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The catalog it writes to.
    #[must_use]
    pub fn catalog(&self) -> &Arc<dyn Catalog> {
        &self.catalog
    }

    /// What a request would do; changes nothing, takes no lock, and needs no running domain.
    pub async fn plan(&self, domain: &Domain, request: &SnapshotRequest) -> Result<Plan> {
        let control = self.connector.control(domain).await?;
        let existing = self.catalog.snapshots(&domain.id).await?;
        self.plan_on(&*control, &control.state().await?, request, &existing)
            .await
            .map_err(|e| e.during("plan"))
    }

    /// Takes a snapshot: all disks at one instant, or an error and nothing left behind.
    ///
    /// Idempotent by the request's id: a second call answers with the snapshot that the first made.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken; `Unsupported` when a disk's method does not suit it;
    /// `Busy` when the domain is locked or migrating; what the providers and the monitor say.
    pub async fn create(&self, domain: &Domain, request: &SnapshotRequest) -> Result<Snapshot> {
        let held = self.hold(domain).await.map_err(|e| e.during("create"))?;
        self.create_held(&held, domain, request)
            .await
            .map_err(|e| e.during("create").with("domain", &domain.id))
    }

    /// All snapshots of a domain, oldest first, each looked at.
    pub async fn list(&self, domain: &Domain) -> Result<Vec<Inspected>> {
        let control = self.connector.control(domain).await?;
        let mut list = Vec::new();
        for snapshot in self.catalog.snapshots(&domain.id).await? {
            list.push(self.look(&*control, snapshot).await?);
        }
        Ok(list)
    }

    /// One snapshot by name, looked at. `NotFound`, with the names that come near, when there is none.
    pub async fn show(&self, domain: &Domain, name: &SnapshotName) -> Result<Inspected> {
        let control = self.connector.control(domain).await?;
        let snapshot = self.find(domain, name).await?;
        self.look(&*control, snapshot).await
    }

    /// Deletes a snapshot and all that was made for it: exports, jobs, nodes, images. The disks keep their content:
    /// where they stand on the snapshot, it is merged first. What a checkpoint is, is kept without its name until the
    /// checkpoint is removed ([`Deletion::kept_for`]). Idempotent: a name deleted before answers
    /// [`Deleted::Before`]; a name that never was is `NotFound`.
    pub async fn delete(&self, domain: &Domain, name: &SnapshotName) -> Result<Deletion> {
        let deleted = self.delete_inner(domain, name).await;
        deleted.map_err(|e| {
            e.during("delete")
                .with("domain", &domain.id)
                .with("snapshot", name)
        })
    }

    async fn delete_inner(&self, domain: &Domain, name: &SnapshotName) -> Result<Deletion> {
        let mut deletion = Deletion {
            deleted: Deleted::Now,
            altered: Altered::default(),
            kept_for: Vec::new(),
        };
        let held = self.hold(domain).await?;
        let snapshot = match self.find(domain, name).await {
            Ok(snapshot) => snapshot,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                deletion.deleted = Deleted::Before;
                let known = self.catalog.deleted(&domain.id, name).await?;
                return known.map(|_| deletion).ok_or(error);
            }
            Err(error) => return Err(error),
        };
        self.refuse_while_merging(&domain.id).await?;
        deletion.kept_for = self.pins(&domain.id).await?.on_any(&snapshot);
        let stood_on = self.stood_on(&snapshot);
        if stood_on.is_empty() {
            self.delete_held(&held, domain, &snapshot).await?;
            return Ok(deletion);
        }
        self.refuse_attached(&domain.id, |export| export.snapshot == snapshot.id)
            .await?;
        // Whoever reads it goes on where it cannot be merged.
        self.check_merge(&held, domain, &snapshot, &stood_on).await?;
        let stopped = self
            .unserve_snapshot(&*held.control, &domain.id, snapshot.id)
            .await?;
        self.catalog.settle(Uuid::nil(), &domain.id, &stopped).await?;
        // A merge is long, and locks the domain by itself at both its ends.
        drop(held);
        let mut go_on = |_: &[JobUnit]| ControlFlow::Continue(());
        let options = MergeOptions {
            targets: stood_on,
            ..MergeOptions::default()
        };
        deletion.altered = self.merge(domain, name, &options, &mut go_on).await?;
        if !deletion.altered.gone {
            let held = self.hold(domain).await?;
            let rest = self.find(domain, name).await?;
            self.delete_held(&held, domain, &rest).await?;
        }
        Ok(deletion)
    }

    /// Locks and reaches the domain, and settles what a killed run left of it. Refuses while its disks are being filled.
    pub(crate) async fn hold(&self, domain: &Domain) -> Result<Held> {
        let held = self.hold_filling(domain, None).await?;
        self.refuse_while_filling(&domain.id).await?;
        Ok(held)
    }

    /// The same for what goes on while disks are being filled, with one act that is about to be taken up again.
    pub(crate) async fn hold_filling(&self, domain: &Domain, but: Option<Uuid>) -> Result<Held> {
        let lock = self.catalog.lock(&domain.id).await?;
        let control = self.connector.control(domain).await?;
        let held = Held::new(control, lock);
        self.settle_leftovers_but(&held, &domain.id, but).await?;
        // A kill between the end of a checkpoint and that of what was kept for it.
        self.free_unpinned(&held, &domain.id).await?;
        Ok(held)
    }

    pub(crate) async fn find(&self, domain: &Domain, name: &SnapshotName) -> Result<Snapshot> {
        let mut snapshots = self.catalog.snapshots(&domain.id).await?;
        if let Some(n) = snapshots.iter().position(|s| s.name == *name) {
            return Ok(snapshots.swap_remove(n));
        }
        let known = snapshots.iter().map(|s| s.name.as_str());
        Err(Error::new(
            ErrorKind::NotFound,
            format!("the domain has no snapshot '{name}'"),
        )
        .with("domain", &domain.id)
        .hint(nearest("snapshots", name.as_str(), known)))
    }

    async fn create_held(&self, held: &Held, domain: &Domain, request: &SnapshotRequest) -> Result<Snapshot> {
        let control = &*held.control;
        let existing = self.catalog.snapshots(&domain.id).await?;
        if let Some(snapshot) = existing.iter().find(|s| s.id == request.id) {
            return Ok(snapshot.clone());
        }
        if self
            .catalog
            .pinned(&domain.id)
            .await?
            .iter()
            .any(|s| s.id == request.id)
        {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                "the snapshot of this request was deleted, and is kept for a checkpoint",
            )
            .with("id", request.id)
            .hint("Ask with a new id."));
        }
        let name = request.name.clone().unwrap_or_else(|| request.id.into());
        if existing.iter().any(|s| s.name == name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("the snapshot '{name}' exists already"),
            )
            .hint("Choose another name, or delete that snapshot first; it is never replaced."));
        }
        let state = control.state().await?;
        if let RunState::Migrating(word) = &state {
            return Err(
                Error::new(ErrorKind::Busy, format!("a migration is under way ({word})"))
                    .hint("Wait until the migration has ended."),
            );
        }
        let plan = self.plan_on(control, &state, request, &existing).await?;
        let mut marking = self.marking(control, domain, request, &name, &plan).await?;
        let mut parts = parts(&plan)?;
        let mut intent = Intent {
            id: request.id.0,
            domain: domain.clone(),
            since: SystemTime::now(),
            act: Act::Create {
                name: name.clone(),
                parts: parts.clone(),
                starts: marking.starts.clone(),
            },
        };
        self.catalog.intend(&intent).await?;
        let made = self
            .make(control, request, &state, &mut parts, &mut marking, &mut intent)
            .await;
        let (instant, units) = match made {
            Ok(made) => made,
            Err(error) => return Err(self.roll_back(control, &intent, &parts, error).await),
        };
        let checkpoint = marking.checkpoint(instant.at);
        let snapshot = match assemble(request.id, name, domain, plan, &parts, instant, units) {
            Ok(snapshot) => marked(snapshot, marking),
            Err(error) => return Err(self.roll_back(control, &intent, &parts, error).await),
        };
        let mut changes = vec![Change::AddSnapshot(Box::new(snapshot.clone()))];
        changes.extend(checkpoint.map(|new| Change::AddCheckpoint(Box::new(new))));
        match self.catalog.settle(intent.id, &domain.id, &changes).await {
            Ok(()) => Ok(snapshot),
            Err(error) => Err(self.roll_back(control, &intent, &parts, error).await),
        }
    }

    async fn plan_on(
        &self,
        control: &dyn Control,
        state: &RunState,
        request: &SnapshotRequest,
        existing: &[Snapshot],
    ) -> Result<Plan> {
        let plan = resolve(control, &self.registry, request, &aliases(existing)).await?;
        let disks = plan.disks.iter().map(|planned| &planned.request.disk);
        let moves = self.catalog.moves(&control.domain().id).await?;
        let snapshots = existing.to_vec();
        Standing { snapshots, moves }.refuse_stale(state, disks)?;
        Ok(plan)
    }

    /// Prepares, takes and completes; whatever it did by the time of an error is the caller's to undo.
    async fn make(
        &self,
        control: &dyn Control,
        request: &SnapshotRequest,
        state: &RunState,
        parts: &mut [Part],
        marking: &mut Marking,
        intent: &mut Intent,
    ) -> Result<(Instantly, Vec<UnitRecord>)> {
        for part in parts.iter_mut() {
            let provider = self.registry.get(&part.method)?;
            let prepared = provider.prepare(control, request.id, &part.disks).await;
            part.prepared = Some(prepared.map_err(|e| e.by(&part.method).during("prepare"))?);
        }
        marking.follow(parts, state.is_active());
        if let Act::Create {
            parts: recorded,
            starts,
            ..
        } = &mut intent.act
        {
            recorded.clone_from_slice(parts);
            starts.clone_from(&marking.starts);
        }
        self.catalog.intend(intent).await?;
        let takes = self.takes(parts)?;
        let marks = match marking.starts.as_slice() {
            [] => None,
            starts => self
                .tracker()?
                .start(control, starts)
                .await
                .map_err(|e| e.during("checkpoint"))?,
        };
        let instant = window::open(control, state, request, &takes, marks.as_ref()).await?;
        let mut units = Vec::with_capacity(takes.len());
        for (take, taken) in takes.iter().zip(&instant.taken) {
            let method = take.provider.method().name;
            let unit = take
                .provider
                .complete(control, request.id, take.prepared, taken)
                .await;
            let unit = unit.map_err(|e| e.by(&method).during("complete"))?;
            units.push(UnitRecord { method, unit });
        }
        Ok((instant, units))
    }

    fn takes<'a>(&'a self, parts: &'a [Part]) -> Result<Vec<Take<'a>>> {
        let mut takes = Vec::new();
        for part in parts {
            let provider = self.registry.get(&part.method)?;
            for prepared in part.prepared.iter().flatten() {
                let plan = provider.take_plan(prepared).map_err(|e| e.by(&part.method))?;
                takes.push(Take {
                    provider,
                    prepared,
                    plan,
                });
            }
        }
        Ok(takes)
    }

    /// Undoes a create; the error says how that went.
    async fn roll_back(&self, control: &dyn Control, intent: &Intent, parts: &[Part], error: Error) -> Error {
        match self.undo_create(control, intent, parts).await {
            Ok(()) => error.leaving(Effect::RolledBack),
            Err(failures) => error
                .rollback_failed(failures)
                .hint("Something may be left behind: run `disksnap recover` once the cause is mended."),
        }
    }

    /// Aborts every part, newest first, and settles the intent when nothing is left.
    pub(crate) async fn undo_create(
        &self,
        control: &dyn Control,
        intent: &Intent,
        parts: &[Part],
    ) -> std::result::Result<(), Vec<Error>> {
        let mut failures = Vec::new();
        // Before the disks are again what they were: what was written to an overlay is noted in it, and goes with it.
        let mut marks = self.abort_marks(control, intent).await;
        for part in parts.iter().rev() {
            let abort = match self.registry.get(&part.method) {
                Ok(provider) => {
                    provider
                        .abort(
                            control,
                            SnapshotId(intent.id),
                            &part.disks,
                            part.prepared.as_deref(),
                        )
                        .await
                }
                Err(error) => Err(error),
            };
            failures.extend(abort.err().map(|e| e.by(&part.method).during("abort")));
        }
        if marks.is_err() {
            // What stood in the way may be gone with what the methods had put there.
            marks = self.abort_marks(control, intent).await;
        }
        failures.extend(marks.err());
        if failures.is_empty() {
            failures.extend(self.catalog.settle(intent.id, &intent.domain.id, &[]).await.err());
        }
        if failures.is_empty() {
            Ok(())
        } else {
            Err(failures)
        }
    }

    async fn delete_held(&self, held: &Held, domain: &Domain, snapshot: &Snapshot) -> Result<()> {
        self.refuse_attached(&domain.id, |export| export.snapshot == snapshot.id)
            .await?;
        let intent = Intent {
            id: Uuid::new_v4(),
            domain: domain.clone(),
            since: SystemTime::now(),
            act: Act::Delete {
                snapshot: snapshot.id,
            },
        };
        self.catalog.intend(&intent).await?;
        self.finish_delete(held, &intent, snapshot)
            .await
            .map_err(|error| {
                if is_refusal(&error) {
                    return error;
                }
                error
                    .leaving(Effect::Unknown)
                    .hint("Delete it again, or run `disksnap recover`, once the cause is mended.")
            })
    }

    /// Everything that a delete does after its intent; also what finishes one that was killed. One that is refused leaves no intent:
    /// what it has to wait for may be another act on this very domain.
    pub(crate) async fn finish_delete(
        &self,
        held: &Held,
        intent: &Intent,
        snapshot: &Snapshot,
    ) -> Result<()> {
        let control = &*held.control;
        let mut changes = self
            .unserve_snapshot(control, &intent.domain.id, snapshot.id)
            .await?;
        let rest = match self.delete_units(held, snapshot).await {
            Err(error) if is_refusal(&error) => {
                self.catalog
                    .settle(intent.id, &intent.domain.id, &changes)
                    .await?;
                return Err(error);
            }
            rest => rest?,
        };
        self.drop_written(control, &intent.domain, snapshot).await?;
        changes.push(without_name(rest));
        self.catalog.settle(intent.id, &intent.domain.id, &changes).await
    }

    pub(crate) async fn look(&self, control: &dyn Control, snapshot: Snapshot) -> Result<Inspected> {
        let mut units = Vec::with_capacity(snapshot.units.len());
        for UnitRecord { method, unit } in &snapshot.units {
            units.push(match self.registry.get(method) {
                Ok(provider) => provider
                    .inspect(control, snapshot.id, unit)
                    .await
                    .map_err(|e| e.by(method))?,
                Err(error) => Health::Broken(error.to_string()),
            });
        }
        let health = snapshot
            .disks
            .iter()
            .map(|disk| units[disk.unit].clone())
            .collect();
        Ok(Inspected { snapshot, health })
    }

    /// The health of the unit that a disk of a snapshot belongs to.
    pub(crate) async fn health(
        &self,
        control: &dyn Control,
        snapshot: &Snapshot,
        disk: &DiskSnapshotRecord,
    ) -> Result<Health> {
        let UnitRecord { method, unit } = &snapshot.units[disk.unit];
        self.registry
            .get(method)?
            .inspect(control, snapshot.id, unit)
            .await
            .map_err(|e| e.by(method))
    }
}

/// Whether a method will not do now what it is asked for, and has changed nothing.
pub(crate) fn is_refusal(error: &Error) -> bool {
    error.kind() == ErrorKind::Busy && error.effect() == Effect::None
}

fn aliases(snapshots: &[Snapshot]) -> BTreeSet<String> {
    snapshots
        .iter()
        .flat_map(|s| &s.disks)
        .map(|d| d.alias.0.clone())
        .collect()
}

/// The plan's disks by method, or an error that names the first disk that cannot be snapshotted.
fn parts(plan: &Plan) -> Result<Vec<Part>> {
    let mut by_method: BTreeMap<&str, Vec<DiskRequest>> = BTreeMap::new();
    for disk in &plan.disks {
        by_method
            .entry(fit(disk)?)
            .or_default()
            .push(disk.request.clone());
    }
    let part = |(method, disks): (&str, _)| Part {
        method: method.to_owned(),
        disks,
        prepared: None,
    };
    Ok(by_method.into_iter().map(part).collect())
}

fn fit(disk: &PlannedDisk) -> Result<&str> {
    let error = match (&disk.method, &disk.probe.fit) {
        (Some(method), Fit::Natural | Fit::Possible) => return Ok(method),
        (Some(method), Fit::Unfit { kind, why }) => Error::new(*kind, why.clone()).by(method),
        (None, Fit::Unfit { kind, why }) => Error::new(*kind, format!("no method suits this disk: {why}")),
        (None, _) => Error::new(
            ErrorKind::Internal,
            "a method suits this disk, and none was chosen",
        ),
    };
    Err(error
        .with("disk", &disk.request.disk.target)
        .hint("`disksnap plan` tells for each disk which method is chosen, and why."))
}

/// The record of a finished snapshot.
fn assemble(
    id: SnapshotId,
    name: SnapshotName,
    domain: &Domain,
    plan: Plan,
    parts: &[Part],
    instant: Instantly,
    units: Vec<UnitRecord>,
) -> Result<Snapshot> {
    let mut disks = Vec::with_capacity(plan.disks.len());
    let mut warnings = instant.warnings;
    if instant.consistency == Consistency::Inactive && domain.sockets.monitor.is_none() {
        warnings.push("nobody said where the domain's monitor is, so it was taken to be off".to_owned());
    }
    for planned in plan.disks {
        let target = &planned.request.disk.target;
        let (unit, result) = result_of(&units, target).ok_or_else(|| {
            Error::new(ErrorKind::Internal, "the provider gave no result for the disk").with("disk", target)
        })?;
        disks.push(DiskSnapshotRecord {
            target: target.clone(),
            alias: planned.request.alias.clone(),
            method: units[unit].method.clone(),
            why: planned.why,
            unit,
            modified_disk: result.modified.clone(),
            access: result.access.clone(),
            size: result.size,
            details: result.details.clone(),
            written: None,
            untold: false,
            inherited: Vec::new(),
            shares: BTreeMap::new(),
        });
        warnings.extend(planned.probe.warnings.iter().map(|w| format!("{target}: {w}")));
    }
    let prepared = parts.iter().flat_map(|part| part.prepared.iter().flatten());
    warnings.extend(prepared.flat_map(|p| {
        p.warnings
            .iter()
            .map(|w| format!("{}: {w}", p.targets.join(", ")))
    }));
    warnings.dedup();
    Ok(Snapshot {
        id,
        name,
        domain: domain.id.clone(),
        created: instant.at,
        consistency: instant.consistency,
        window: instant.report,
        disks,
        units,
        skipped: plan.skipped,
        warnings,
        checkpoint: None,
        after: None,
        pinned: false,
    })
}

/// The record of a snapshot, with what was done about checkpoints.
fn marked(mut snapshot: Snapshot, marking: Marking) -> Snapshot {
    for disk in &mut snapshot.disks {
        disk.written = marking.copy_of(&disk.target);
        disk.untold = marking.untold.contains(&disk.target);
        if matches!(disk.access, Access::Source { .. }) {
            disk.shares = marking.shares.get(&disk.target).cloned().unwrap_or_default();
        }
    }
    snapshot.warnings.extend(marking.warnings);
    snapshot.checkpoint = marking.begins;
    snapshot.after = marking.after;
    snapshot
}

fn result_of<'a>(units: &'a [UnitRecord], target: &str) -> Option<(usize, &'a crate::DiskResult)> {
    let find = |unit: &'a Unit| unit.disks.iter().find(|disk| disk.target == target);
    units
        .iter()
        .enumerate()
        .find_map(|(n, record)| find(&record.unit).map(|disk| (n, disk)))
}
