//! Merging: the disks keep their present content, and the snapshot they stand on is given up.
//!
//! The work goes on where the disk is; here it is started, watched and brought to its end, by a process that holds
//! a lease meanwhile. The domain is locked only at both ends: a merge may take hours. Others see it as a job.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use uuid::Uuid;

use crate::dispatcher::{Held, is_refusal};
use crate::ledger::{Altered, Entry, Ledger, chosen, refuse_exported};
use crate::removing::inherited;
use crate::{
    Act, Command, Control, DEADLINE, Dispatcher, Domain, DomainId, DomainLock, Effect, Error, ErrorKind,
    Guard, Intent, Merge, MergeInto, Progress, Result, Snapshot, SnapshotId, SnapshotName, Watch,
};

/// Between two looks at a merge that runs.
const LOOKS: Duration = Duration::from_millis(100);

/// What is to be merged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeOptions {
    /// The targets of the disks; all of the snapshot's when none is named.
    pub targets: Vec<String>,
    /// Which way.
    pub into: MergeInto,
    /// Bounds the moment at the end in which a running guest's disk may stand still.
    pub deadline: Duration,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            targets: Vec::new(),
            into: MergeInto::Base,
            deadline: DEADLINE,
        }
    }
}

/// A merge that is under way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Job {
    /// Unique.
    pub id: Uuid,
    /// Whose disks.
    pub domain: DomainId,
    /// The snapshot that is merged.
    pub snapshot: SnapshotName,
    /// Which way.
    pub into: MergeInto,
    /// When it was begun.
    pub since: SystemTime,
    /// Whether a process brings it to its end; else `merge` takes it up again, and `recover` cancels it.
    pub driven: bool,
    /// Its disks.
    pub units: Vec<JobUnit>,
}

/// One unit of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobUnit {
    /// Its disks.
    pub targets: Vec<String>,
    /// How far it is.
    pub progress: Progress,
}

/// A unit and what merges it.
#[derive(Debug)]
struct Part {
    entry: Entry,
    merge: Arc<dyn Merge>,
}

/// Told how far a merge is, again and again; it is cancelled when that breaks off.
pub type Watcher<'a> = &'a mut (dyn FnMut(&[JobUnit]) -> ControlFlow<()> + Send);

impl Dispatcher {
    /// Merges a snapshot, or its part on the disks that are named; the disks keep their present content, and a running
    /// guest goes on. Takes up again what a process that died has left.
    ///
    /// Merged into its base the snapshot is given up. Merged into the overlay it remains, and stands by itself:
    /// doing that again changes nothing.
    ///
    /// # Errors
    /// `Unsupported` for a method whose disks do not stand on the snapshot: there is nothing to merge; `Busy` when
    /// the snapshot is served, another merge runs or something else is at work on a disk: all are asked before any is begun,
    /// and everything is as it was. `Refused` when it failed or was cancelled: the disks are then as they were; the snapshot is
    /// too, unless a part of it was merged by then.
    pub async fn merge(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        options: &MergeOptions,
        watcher: Watcher<'_>,
    ) -> Result<Altered> {
        let merged = self.merge_inner(domain, name, options, watcher).await;
        merged.map_err(|e| {
            e.during("merge")
                .with("domain", &domain.id)
                .with("snapshot", name)
        })
    }

    /// The merges that are under way, of one domain or of all.
    pub async fn jobs(&self, domain: Option<&DomainId>) -> Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for intent in self.catalog.intents(domain).await? {
            if let Act::Merge {
                snapshot,
                name,
                into,
                lease,
                ..
            } = &intent.act
            {
                let control = self.connector.control(&intent.domain).await?;
                let parts = self.parts_of(&intent).await?;
                jobs.push(Job {
                    id: intent.id,
                    domain: intent.domain.id.clone(),
                    snapshot: name.clone(),
                    into: *into,
                    since: intent.since,
                    driven: self.catalog.lease_lives(*lease).await?,
                    units: look(&*control, *snapshot, &parts).await?,
                });
            }
        }
        Ok(jobs)
    }

    /// Cancels a merge: the disks go on as before it. A snapshot that has been merged in part no longer holds its
    /// instant, and says so; it can only be merged to the end. Idempotent while the job is known.
    ///
    /// # Errors
    /// `NotFound` for a job that is not, or not any more, under way.
    pub async fn cancel_job(&self, id: Uuid) -> Result<Job> {
        let job = self.jobs(None).await?.into_iter().find(|job| job.id == id);
        let intent = self.catalog.intents(None).await?.into_iter().find(|i| i.id == id);
        let (Some(job), Some(intent)) = (job, intent) else {
            return Err(
                Error::new(ErrorKind::NotFound, format!("no job {id} is under way"))
                    .hint("`disksnap job list` tells the jobs that there are."),
            );
        };
        if job.driven {
            // Its own process notices, and settles it.
            let Act::Merge { snapshot, .. } = &intent.act else {
                return Ok(job);
            };
            let control = self.connector.control(&intent.domain).await?;
            let parts = self.parts_of(&intent).await?;
            cancel(&*control, *snapshot, &parts).await?;
        } else {
            drop(self.hold(&intent.domain).await.map_err(|e| e.during("cancel"))?);
        }
        Ok(job)
    }

    /// Refuses to change a domain's snapshots while one of them is being merged.
    pub(crate) async fn refuse_while_merging(&self, domain: &DomainId) -> Result<()> {
        for intent in self.catalog.intents(Some(domain)).await? {
            if let Act::Merge { name, lease, .. } = &intent.act
                && self.catalog.lease_lives(*lease).await?
            {
                return Err(
                    Error::new(ErrorKind::Busy, format!("the snapshot '{name}' is being merged")).hint(
                        format!(
                            "Wait until it has ended, or cancel it: `disksnap job cancel {}`.",
                            intent.id
                        ),
                    ),
                );
            }
        }
        Ok(())
    }

    /// Whether a snapshot has units that are given up by merging.
    pub(crate) fn stood_on(&self, snapshot: &Snapshot) -> Vec<String> {
        let stands = |record: &&crate::UnitRecord| {
            let provider = self.registry.get(&record.method);
            provider.is_ok_and(|provider| provider.merge(&record.unit).is_some())
        };
        let units = snapshot.units.iter().filter(stands);
        units
            .flat_map(|record| record.unit.disks.iter().map(|disk| disk.target.clone()))
            .collect()
    }

    async fn merge_inner(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        options: &MergeOptions,
        watcher: Watcher<'_>,
    ) -> Result<Altered> {
        let started = self.start_merge(domain, name, options).await?;
        let watched = started.watch(watcher).await;
        // The lock is taken without settling what was left: that this is under way, its lease says.
        let lock = self.catalog.lock(&domain.id).await?;
        let held = Held::new(Arc::clone(&started.control), lock);
        let ended = match watched {
            Ok(()) => started.finish(options.deadline).await,
            // It may still be under way: its intent stays, for whoever takes it up or cancels it.
            Err(error) if error.effect() == Effect::Unknown => return Err(error),
            stopped => stopped,
        };
        let settled = self
            .settle_merge(&held, &started.intent, started.id, started.parts)
            .await;
        match (ended, settled) {
            (Ok(()), Ok(settled)) => match settled.refused {
                Some(refused) => Err(refused),
                None if settled.left.is_empty() => Ok(settled.altered),
                None => Err(stopped(&settled.left, options.into)),
            },
            (Err(error), Ok(_)) => Err(error.leaving(Effect::RolledBack)),
            (Ok(()), Err(failure)) => Err(failure),
            (Err(error), Err(failure)) => Err(error.rollback_failed(vec![failure])),
        }
    }

    async fn start_merge(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        options: &MergeOptions,
    ) -> Result<Started> {
        let MergeOptions { targets, into, .. } = options;
        let lock = self.catalog.lock(&domain.id).await?;
        let control = self.connector.control(domain).await?;
        let held = Held::new(Arc::clone(&control), lock);
        self.refuse_while_merging(&domain.id).await?;
        let snapshot = self.find(domain, name).await?;
        let (id, since) = match self.abandoned(&domain.id, snapshot.id, options).await? {
            Some(found) => found,
            None => (Uuid::new_v4(), SystemTime::now()),
        };
        self.settle_leftovers_but(&held, &domain.id, Some(id)).await?;
        refuse_exported(name, &self.catalog.exports(&domain.id).await?, snapshot.id)?;
        let (parts, ledger) = self.checked(&*control, domain, &snapshot, targets, *into).await?;
        let (lease, guard) = self.catalog.lease().await?;
        let act = Act::Merge {
            snapshot: snapshot.id,
            name: name.clone(),
            targets: parts.iter().flat_map(|part| part.entry.targets()).collect(),
            into: *into,
            lease,
        };
        let intent = Intent {
            id,
            domain: domain.clone(),
            since,
            act,
        };
        self.catalog.intend(&intent).await?;
        let mut begun = Ok(());
        for part in &parts {
            let peers = ledger.peers(&part.entry);
            let start = part.merge.start(&*control, snapshot.id, &part.entry.unit, &peers);
            begun = start.await.map_err(|e| e.by(&part.entry.method));
            if begun.is_err() {
                break;
            }
        }
        if let Err(error) = begun {
            let settled = self.settle_merge(&held, &intent, snapshot.id, parts).await;
            return Err(match settled {
                Ok(_) => error.leaving(Effect::RolledBack),
                Err(failure) => error.rollback_failed(vec![failure]),
            });
        }
        Ok(Started {
            control,
            intent,
            id: snapshot.id,
            into: *into,
            parts,
            _lease: guard,
        })
    }

    /// What is to be merged, and the records beside it, once each unit's method was asked whether it would: all of them
    /// before any is begun, since a unit whose merge has begun no longer holds its instant. Changes nothing.
    async fn checked<'a>(
        &self,
        control: &dyn Control,
        domain: &'a Domain,
        snapshot: &Snapshot,
        targets: &[String],
        into: MergeInto,
    ) -> Result<(Vec<Part>, Ledger<'a>)> {
        let own = domain.disks.iter().filter(|d| snapshot.disk(&d.target).is_some());
        let standing = self.standing(&domain.id).await?;
        standing.refuse_stale(&control.state().await?, own)?;
        let parts = self.merging(chosen(snapshot, targets)?, into)?;
        if into == MergeInto::Base {
            let units: Vec<_> = parts.iter().map(|part| part.entry.unit.clone()).collect();
            self.refuse_pinned(&domain.id, snapshot.id, &units).await?;
        }
        let ledger = Ledger::new(standing.snapshots, snapshot.id, domain);
        for Part { entry, merge } in &parts {
            let peers = ledger.peers(entry);
            let checked = merge.check(control, snapshot.id, &entry.unit, &peers).await;
            checked.map_err(|e| e.by(&entry.method).with("disk", entry.targets().join(", ")))?;
        }
        Ok((parts, ledger))
    }

    /// Whether a snapshot's part on these disks can be merged into its base now; what is asked before anything of it is
    /// ended.
    pub(crate) async fn check_merge(
        &self,
        held: &Held,
        domain: &Domain,
        snapshot: &Snapshot,
        targets: &[String],
    ) -> Result<()> {
        let checked = self.checked(&*held.control, domain, snapshot, targets, MergeInto::Base);
        checked.await.map(drop).map_err(|e| e.during("merge"))
    }

    /// The merge of just these disks, the same way, that nobody drives any more.
    async fn abandoned(
        &self,
        domain: &DomainId,
        of: SnapshotId,
        options: &MergeOptions,
    ) -> Result<Option<(Uuid, SystemTime)>> {
        let wanted = &options.targets;
        let same = |intent: &Intent| match &intent.act {
            Act::Merge {
                snapshot,
                targets,
                into,
                ..
            } => {
                *snapshot == of
                    && *into == options.into
                    && (wanted.is_empty() || targets.iter().all(|t| wanted.contains(t)))
            }
            _ => false,
        };
        let intents = self.catalog.intents(Some(domain)).await?;
        Ok(intents.iter().find(|i| same(i)).map(|i| (i.id, i.since)))
    }

    fn merging(&self, entries: Vec<Entry>, into: MergeInto) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(entries.len());
        for entry in entries {
            let Some(down) = self.registry.get(&entry.method)?.merge(&entry.unit) else {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "there is nothing to merge: the domain does not stand on a {} snapshot",
                        entry.method
                    ),
                )
                .with("disk", entry.targets().join(", "))
                .hint(
                    "`disksnap snapshot delete` gives the snapshot up and keeps the disk's content; `disksnap snapshot \
                     revert` puts the snapshot's content back.",
                ));
            };
            let merge = match into {
                MergeInto::Base => down,
                MergeInto::Overlay => down.stream().ok_or_else(|| no_stream(&entry))?,
            };
            parts.push(Part { entry, merge });
        }
        Ok(parts)
    }

    /// The units that a merge is about, as far as they are still recorded.
    async fn parts_of(&self, intent: &Intent) -> Result<Vec<Part>> {
        let Act::Merge {
            snapshot: id,
            targets,
            into,
            ..
        } = &intent.act
        else {
            return Ok(Vec::new());
        };
        let snapshots = self.catalog.snapshots(&intent.domain.id).await?;
        let Some(snapshot) = snapshots.iter().find(|s| s.id == *id) else {
            return Ok(Vec::new());
        };
        let known: Vec<String> = targets
            .iter()
            .filter(|t| snapshot.disk(t).is_some())
            .cloned()
            .collect();
        if known.is_empty() {
            return Ok(Vec::new());
        }
        self.merging(chosen(snapshot, &known)?, *into)
    }

    /// What a dead process left of a merge: what has ended is recorded, the rest is cancelled. Says whether all had ended.
    pub(crate) async fn end_merge(&self, held: &Held, intent: &Intent) -> Result<bool> {
        let Act::Merge { snapshot, .. } = &intent.act else {
            return Ok(true);
        };
        let parts = self.parts_of(intent).await?;
        let settled = self.settle_merge(held, intent, *snapshot, parts).await?;
        Ok(settled.left.is_empty())
    }

    /// Records the units whose merge has ended, and cancels the others.
    async fn settle_merge(
        &self,
        held: &Held,
        intent: &Intent,
        id: SnapshotId,
        parts: Vec<Part>,
    ) -> Result<Settled> {
        let (control, domain) = (&*held.control, &intent.domain.id);
        let snapshots = self.all_snapshots(domain).await?;
        let inherited = inherited(&snapshots, id);
        let mut ledger = Ledger::new(snapshots, id, &intent.domain);
        let (mut left, mut refused) = (Vec::new(), None);
        for Part { entry, merge } in parts {
            let named = |error: Error| error.by(&entry.method).leaving(Effect::Unknown);
            let progress = merge.progress(control, id, &entry.unit).await.map_err(named)?;
            if progress == Progress::Finished {
                let peers = ledger.peers(&entry);
                match merge.conclude(control, id, &entry.unit, &peers).await {
                    // There was nothing to merge, and what is left must stay for now: no reason to hold the domain up.
                    Err(error) if is_refusal(&error) => {
                        left.push((entry.targets().join(", "), progress));
                        refused = refused.or(Some(error.by(&entry.method)));
                    }
                    affected => ledger.record(&entry, affected.map_err(named)?),
                }
            } else {
                merge.cancel(control, id, &entry.unit).await.map_err(named)?;
                left.push((entry.targets().join(", "), progress));
            }
        }
        let (changes, mut altered) = ledger.close();
        self.catalog.settle(intent.id, domain, &changes).await?;
        self.drop_inherited(control, &intent.domain, inherited, &mut altered)
            .await;
        Ok(Settled {
            altered,
            left,
            refused,
        })
    }
}

/// A merge whose units have been started, before it is brought to its end.
#[derive(Debug)]
struct Started {
    control: Arc<dyn Control>,
    intent: Intent,
    id: SnapshotId,
    into: MergeInto,
    parts: Vec<Part>,
    _lease: Box<dyn DomainLock>,
}

/// How a merge was settled.
#[derive(Debug)]
struct Settled {
    altered: Altered,
    /// The disks whose merge came to nothing, and how far it was.
    left: Vec<(String, Progress)>,
    /// Why one of those has to stay for now that had nothing to merge.
    refused: Option<Error>,
}

impl Started {
    /// Until all units are ready, or one has failed or is gone.
    async fn watch(&self, watcher: Watcher<'_>) -> Result<()> {
        loop {
            let units = look(&*self.control, self.id, &self.parts)
                .await
                .map_err(|error| {
                    error.leaving(Effect::Unknown).hint(
                    "The merge may still be under way: `disksnap job list` tells. Merging again takes it up.",
                )
                })?;
            let over = |unit: &&JobUnit| matches!(unit.progress, Progress::Idle | Progress::Failed(_));
            if let Some(unit) = units.iter().find(over) {
                return Err(stopped(
                    &[(unit.targets.join(", "), unit.progress.clone())],
                    self.into,
                ));
            }
            if watcher(&units).is_break() {
                return Err(Error::new(ErrorKind::Refused, "the merge was cancelled"));
            }
            if !units
                .iter()
                .any(|unit| matches!(unit.progress, Progress::Running { .. }))
            {
                return Ok(());
            }
            tokio::time::sleep(LOOKS).await;
        }
    }

    /// Ends the units that are ready, with the guardian armed while a running guest's disk may stand still.
    async fn finish(&self, deadline: Duration) -> Result<()> {
        if !self.control.state().await?.is_active() {
            return self.finish_all().await;
        }
        let release: Vec<Command> = self
            .parts
            .iter()
            .flat_map(|part| part.merge.release(self.id, &part.entry.unit))
            .collect();
        let guard = self.guard(&release, deadline).await?;
        let finished = tokio::time::timeout(deadline, self.finish_all()).await;
        let result = finished.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "the disk would have stood still for longer than {} ms",
                    deadline.as_millis()
                ),
            )
            .hint("Merge again when the host is less busy, or allow more time with a longer deadline."))
        });
        if result.is_err() && !release.is_empty() {
            // Each is refused where there is nothing to let go.
            self.control.monitor_each(release).await?;
        }
        if let Some(guard) = guard {
            // Whether it has fired: what it cancelled, and what had ended before, is told apart when it is settled.
            guard.disarm().await.map_err(|e| e.during("guard"))?;
        }
        result
    }

    /// A guardian that lets the disks go; none where they never stand still.
    async fn guard(&self, release: &[Command], deadline: Duration) -> Result<Option<Box<dyn Guard>>> {
        if release.is_empty() {
            return Ok(None);
        }
        let watch = Watch {
            release: release.to_vec(),
            deadline,
            ..Watch::default()
        };
        let guard = self.control.guard(watch).await;
        guard.map(Some).map_err(|e| e.during("guard"))
    }

    async fn finish_all(&self) -> Result<()> {
        for part in &self.parts {
            let unit = &part.entry.unit;
            let finished = part.merge.finish(&*self.control, self.id, unit).await;
            finished.map_err(|e| e.by(&part.entry.method))?;
        }
        Ok(())
    }
}

async fn look(control: &dyn Control, id: SnapshotId, parts: &[Part]) -> Result<Vec<JobUnit>> {
    let mut units = Vec::with_capacity(parts.len());
    for part in parts {
        let progress = part.merge.progress(control, id, &part.entry.unit).await;
        units.push(JobUnit {
            targets: part.entry.targets(),
            progress: progress.map_err(|e| e.by(&part.entry.method))?,
        });
    }
    Ok(units)
}

async fn cancel(control: &dyn Control, id: SnapshotId, parts: &[Part]) -> Result<()> {
    for part in parts {
        let cancelled = part.merge.cancel(control, id, &part.entry.unit).await;
        cancelled.map_err(|e| e.by(&part.entry.method))?;
    }
    Ok(())
}

fn stopped(left: &[(String, Progress)], into: MergeInto) -> Error {
    let each = left.iter().map(|(targets, progress)| match progress {
        Progress::Failed(why) => format!("the merge of {targets} failed: {why}"),
        // Such a job leaves no word behind.
        Progress::Idle if into == MergeInto::Overlay => {
            format!("the merge of {targets} has ended early: it was cancelled, or an image could not be read or written")
        }
        _ => format!("the merge of {targets} was cancelled"),
    });
    Error::new(ErrorKind::Refused, each.collect::<Vec<_>>().join("; ")).hint(match into {
        MergeInto::Base => {
            "The disks go on as before, and nothing of theirs is lost. The snapshot may hold later data by now, and says \
             so then: merge it again once the cause is mended."
        }
        MergeInto::Overlay => {
            "The disks and the snapshot are as before, and nothing is lost. Merge again once the cause is mended."
        }
    })
}

fn no_stream(entry: &Entry) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "a {} snapshot cannot be merged into what stands on it",
            entry.method
        ),
    )
    .with("disk", entry.targets().join(", "))
    .hint("Merge it into its base.")
}
