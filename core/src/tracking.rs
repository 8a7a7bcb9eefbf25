//! Raw disks whose bitmaps outlive the hypervisor: the disk goes through a qcow2 that keeps the bitmaps and whose data
//! the raw disk is, and back again.
//!
//! An act of its own, that nobody does unasked: the domain's document must say so from then on, and whoever writes to
//! the raw disk past the qcow2 does so past the bitmaps.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::dispatcher::Held;
use crate::recover::RecoveredHow;
use crate::window;
use crate::{
    Act, Change, CheckedMark, CheckpointName, Control, DEADLINE, Disk, Dispatcher, Domain, Effect, Error,
    ErrorKind, Host, Intent, Lineage, Mark, MarkVerdict, Moved, Result, RunState, Source, Step,
};

/// One disk, two ways to it: the raw disk itself, and through a qcow2 that keeps its bitmaps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crossing {
    /// Of this act: what it makes is known by it.
    pub id: Uuid,
    /// The disk as it was.
    pub from: Disk,
    /// The disk as it is to be.
    pub to: Disk,
    /// What the qcow2 is called in the hypervisor, where this act puts it there.
    pub node: String,
    /// Whether the qcow2 has been made: until then a file of its name may be somebody else's.
    #[serde(default)]
    pub made: bool,
}

impl Crossing {
    /// Whether the disk gets a qcow2, and does not give one up.
    #[must_use]
    pub fn tracks(&self) -> bool {
        self.to.data_store.is_some()
    }

    /// The disk through the qcow2.
    #[must_use]
    pub fn through(&self) -> &Disk {
        if self.tracks() { &self.to } else { &self.from }
    }

    /// The raw disk.
    #[must_use]
    pub fn raw(&self) -> &Disk {
        if self.tracks() { &self.from } else { &self.to }
    }
}

/// What puts a qcow2 with a raw data file between a domain and its raw disk. Of no other disk is anything known here.
///
/// Idempotent, all of it but [`RawDisks::plan`], so that whoever comes after a kill can do it again.
#[async_trait]
pub trait RawDisks: fmt::Debug + Send + Sync {
    /// The disk as it is once a qcow2 at `metadata` keeps its bitmaps, and what the operator should know. Changes nothing.
    ///
    /// # Errors
    /// `Unsupported` for a disk that cannot be reached so; `AlreadyExists` where there is a file of that name.
    async fn plan(&self, host: &dyn Host, disk: &Disk, metadata: &Path) -> Result<(Disk, Vec<String>)>;

    /// Makes the qcow2, and gives what takes the guest over while it stands still; nothing to be done so where the
    /// domain is off. The raw disk is not written to. Bitmaps that are in the hypervisor's memory come along.
    ///
    /// # Errors
    /// `Busy` where something under way stands against it; `Unsupported` where this hypervisor cannot with this disk.
    async fn prepare(&self, host: &dyn Host, crossing: &Crossing) -> Result<Vec<Step>>;

    /// Whether the guest writes to the disk as it is to be; `None` where the domain is off.
    async fn has_crossed(&self, host: &dyn Host, crossing: &Crossing) -> Result<Option<bool>>;

    /// Removes what the disk does not need where it has arrived, or where it has stayed: of the qcow2 all or nothing.
    async fn clear(&self, host: &dyn Host, crossing: &Crossing, crossed: bool) -> Result<()>;

    /// Looks whether somebody wrote to the raw disk past its qcow2, or does now. Then it makes the qcow2 anew, without
    /// bitmaps, for those do not know of it; and says why. One answer per disk, in order; `None` for one that is not
    /// reached so, or of which nothing can be told.
    async fn renew_past(&self, host: &dyn Host, disks: &[&Disk]) -> Result<Vec<Option<String>>>;
}

/// What [`Dispatcher::track`] or [`Dispatcher::untrack`] did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Crossed {
    /// The disk as the domain uses it from now on.
    pub disk: Disk,
    /// Whether it was another before.
    pub now: bool,
    /// The checkpoints that do not cover the disk any more.
    pub dropped: Vec<CheckpointName>,
    /// For how long the guest stood still.
    pub paused: Option<Duration>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

impl Crossed {
    fn before(disk: Disk, warnings: Vec<String>) -> Self {
        Self {
            disk,
            now: false,
            dropped: Vec::new(),
            paused: None,
            warnings,
        }
    }
}

impl Dispatcher {
    /// Makes the bitmaps of a raw disk durable: the disk goes through a qcow2, made at `metadata`, that keeps them from
    /// now on. The raw disk keeps all its bytes, and goes on having them. Also under a running guest, which is paused
    /// for a moment. Idempotent.
    ///
    /// The domain's document must say so from then on ([`Crossed::disk`]); one that does not is refused as out of date.
    ///
    /// # Errors
    /// `Unsupported` for a disk that is not a raw file or block device, or that this hypervisor cannot take over while
    /// the guest runs; `AlreadyExists` for a file that is there; `Busy` where something is under way on the disk.
    /// Nothing is changed then.
    pub async fn track(&self, domain: &Domain, target: &str, metadata: &Path) -> Result<Crossed> {
        let held = self.hold(domain).await.map_err(|e| e.during("track"))?;
        let tracked = self.track_held(&held, domain, target, metadata).await;
        tracked.map_err(|e| e.during("track").with("domain", &domain.id).with("disk", target))
    }

    /// Takes the qcow2 of a raw disk away again: the domain uses the raw disk itself, with all its bytes. The bitmaps
    /// end, so the checkpoints that rely on them are given up, with `drop_checkpoints`. Idempotent.
    ///
    /// # Errors
    /// `Busy` while checkpoints cover the disk and nobody said that they may go, or something is under way on it.
    /// Nothing is changed then.
    pub async fn untrack(&self, domain: &Domain, target: &str, drop_checkpoints: bool) -> Result<Crossed> {
        let held = self.hold(domain).await.map_err(|e| e.during("untrack"))?;
        let untracked = self.untrack_held(&held, domain, target, drop_checkpoints).await;
        untracked.map_err(|e| {
            e.during("untrack")
                .with("domain", &domain.id)
                .with("disk", target)
        })
    }

    async fn track_held(
        &self,
        held: &Held,
        domain: &Domain,
        target: &str,
        metadata: &Path,
    ) -> Result<Crossed> {
        let (control, disk) = (&*held.control, domain.disk(target)?);
        let raw_disks = self.raw_disks()?;
        self.refuse_while_merging(&domain.id).await?;
        let present = self.standing(&domain.id).await?.present(disk);
        if present.data_store.is_some() {
            return self.tracked_before(control, present, metadata).await;
        }
        let standing = self.standing(&domain.id).await?;
        standing.refuse_stale(&control.state().await?, [disk])?;
        let (to, warnings) = raw_disks.plan(control, disk, metadata).await?;
        let crossing = crossing(disk, to)?;
        let mut crossed = self.cross(held, domain, crossing, Vec::new()).await?;
        crossed.warnings.splice(..0, warnings);
        Ok(crossed)
    }

    /// It was done before: then only a qcow2 that was written past is mended.
    async fn tracked_before(&self, control: &dyn Control, disk: Disk, metadata: &Path) -> Result<Crossed> {
        if disk.source.as_ref().and_then(Source::path) != Some(metadata) {
            let place = disk.source.as_ref().map(ToString::to_string).unwrap_or_default();
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("the disk's bitmaps are kept in {place} already"),
            )
            .hint("`disksnap disk untrack` gives that up first."));
        }
        let past = self.raw_disks()?.renew_past(control, &[&disk]).await?;
        let warnings = past
            .into_iter()
            .flatten()
            .map(|why| past_warning(&disk.target, &why));
        Ok(Crossed::before(disk.clone(), warnings.collect()))
    }

    async fn untrack_held(
        &self,
        held: &Held,
        domain: &Domain,
        target: &str,
        drop_checkpoints: bool,
    ) -> Result<Crossed> {
        let (control, disk) = (&*held.control, domain.disk(target)?);
        self.refuse_while_merging(&domain.id).await?;
        let standing = self.standing(&domain.id).await?;
        standing.refuse_stale(&control.state().await?, [disk])?;
        let disk = &standing.present(disk);
        let Some(data) = disk.data_store.clone() else {
            if disk.driver.format.as_deref() == Some("raw") {
                return Ok(Crossed::before(disk.clone(), Vec::new()));
            }
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the domain's document names no raw disk below this one",
            )
            .hint("Only what `disksnap disk track` has put over a raw disk can be taken away."));
        };
        let mut to = disk.clone();
        to.driver.format = data.format;
        to.source = Some(data.source);
        to.data_store = None;
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        let marks = marks_of(&lineage, target);
        if !marks.is_empty() && !drop_checkpoints {
            return Err(covered(&marks));
        }
        let mut changes = Vec::new();
        let mut dropped = Vec::new();
        if !marks.is_empty() {
            changes = self.given_up(domain, &lineage, &marks).await?;
            dropped = marks.into_iter().map(|mark| mark.checkpoint).collect();
        }
        let mut crossed = self.cross(held, domain, crossing(disk, to)?, changes).await?;
        crossed.dropped = dropped;
        Ok(crossed)
    }

    /// Intent, the slow part, the moment in which the guest stands still, the outcome.
    async fn cross(
        &self,
        held: &Held,
        domain: &Domain,
        mut crossing: Crossing,
        mut changes: Vec<Change>,
    ) -> Result<Crossed> {
        let (control, raw_disks) = (&*held.control, self.raw_disks()?);
        changes.extend(moved(&crossing));
        changes.extend(self.durable(domain, &crossing).await?);
        let mut intent = Intent {
            id: crossing.id,
            domain: domain.clone(),
            since: SystemTime::now(),
            act: Act::Cross {
                crossing: Box::new(crossing.clone()),
                changes: changes.clone(),
            },
        };
        self.catalog.intend(&intent).await?;
        let state = control.state().await?;
        let prepared = raw_disks.prepare(control, &crossing).await;
        let mut taken = match prepared {
            Ok(steps) => {
                crossing.made = true;
                intent.act = Act::Cross {
                    crossing: Box::new(crossing.clone()),
                    changes: changes.clone(),
                };
                match self.catalog.intend(&intent).await {
                    Ok(()) => take_over(control, &state, &steps).await,
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            taken = Err(self.taken_back(control, &intent, &crossing, error).await);
        }
        let paused = taken?;
        raw_disks
            .clear(control, &crossing, true)
            .await
            .map_err(|e| e.leaving(Effect::Unknown).hint(AGAIN))?;
        self.catalog.settle(intent.id, &domain.id, &changes).await?;
        Ok(Crossed {
            disk: crossing.to,
            now: true,
            dropped: Vec::new(),
            paused,
            warnings: Vec::new(),
        })
    }

    /// Undoes a crossing that failed, unless the guest has crossed for all that; the error says how that went.
    async fn taken_back(
        &self,
        control: &dyn Control,
        intent: &Intent,
        crossing: &Crossing,
        error: Error,
    ) -> Error {
        let undone = async {
            let raw_disks = self.raw_disks()?;
            if raw_disks.has_crossed(control, crossing).await? == Some(true) {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "the guest uses the disk as it was to be",
                ));
            }
            raw_disks.clear(control, crossing, false).await?;
            self.catalog.settle(intent.id, &intent.domain.id, &[]).await
        };
        match undone.await {
            Ok(()) => error.leaving(Effect::RolledBack),
            Err(failure) => error.rollback_failed(vec![failure.during("undo")]).hint(AGAIN),
        }
    }

    /// What was begun and not finished: finished where the guest has crossed, or a qcow2 was to be given up with the
    /// domain off; else undone, for nobody got an answer.
    pub(crate) async fn settle_crossing(
        &self,
        control: &dyn Control,
        intent: &Intent,
        crossing: &Crossing,
        changes: &[Change],
    ) -> Result<RecoveredHow> {
        let raw_disks = self.raw_disks()?;
        let crossed = raw_disks.has_crossed(control, crossing).await?;
        let crossed = crossed.unwrap_or(!crossing.tracks());
        raw_disks.clear(control, crossing, crossed).await?;
        let changes = if crossed { changes } else { &[] };
        self.catalog.settle(intent.id, &intent.domain.id, changes).await?;
        Ok(if crossed {
            RecoveredHow::Finished
        } else {
            RecoveredHow::Undone
        })
    }

    /// Makes sure that no bitmap is trusted which does not know of what was written past it; tells of each such disk.
    pub(crate) async fn renew_past(&self, control: &dyn Control, domain: &Domain) -> Result<Vec<String>> {
        let Some(raw_disks) = self.tracker.as_deref().and_then(|tracker| tracker.raw_disks()) else {
            return Ok(Vec::new());
        };
        let standing = self.standing(&domain.id).await?;
        let present: Vec<Disk> = domain
            .disks
            .iter()
            .map(|disk| standing.present(disk))
            .filter(|disk| disk.data_store.is_some())
            .collect();
        if present.is_empty() {
            return Ok(Vec::new());
        }
        let disks: Vec<&Disk> = present.iter().collect();
        let found = raw_disks.renew_past(control, &disks).await?;
        let told = present.iter().zip(found);
        Ok(told
            .filter_map(|(disk, why)| Some(past_warning(&disk.target, &why?)))
            .collect())
    }

    /// The checkpoints whose bitmaps come along out of the hypervisor's memory are durable from then on.
    async fn durable(&self, domain: &Domain, crossing: &Crossing) -> Result<Vec<Change>> {
        if !crossing.tracks() {
            return Ok(Vec::new());
        }
        let mut changes = Vec::new();
        for mut checkpoint in self.catalog.checkpoints(&domain.id).await? {
            let its = |disk: &&mut crate::CheckpointDisk| disk.target == crossing.to.target && disk.volatile;
            if let Some(disk) = checkpoint.disks.iter_mut().find(its) {
                disk.volatile = false;
                changes.push(Change::AddCheckpoint(Box::new(checkpoint)));
            }
        }
        Ok(changes)
    }

    fn raw_disks(&self) -> Result<&dyn RawDisks> {
        self.tracker()?.raw_disks().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "what notes the writes here cannot keep the bitmaps of raw disks",
            )
        })
    }
}

/// What an error that left something behind says to do.
const AGAIN: &str =
    "The next act on the domain settles it, and so does `disksnap recover`, once the cause is mended.";

fn crossing(from: &Disk, to: Disk) -> Result<Crossing> {
    let id = Uuid::new_v4();
    if from.source == to.source {
        return Err(Error::new(
            ErrorKind::Invalid,
            "the qcow2 cannot be where the raw disk is",
        ));
    }
    Ok(Crossing {
        id,
        from: from.clone(),
        to,
        node: format!("track-{}", &id.simple().to_string()[..20]),
        made: false,
    })
}

/// A document that still names the disk as it was is out of date.
fn moved(crossing: &Crossing) -> Option<Change> {
    let from = crossing.from.source.clone()?;
    let disk = crossing.to.clone();
    Some(Change::Move(Box::new(Moved { from, disk })))
}

fn past_warning(target: &str, why: &str) -> String {
    format!(
        "{target}: {why}, past the qcow2 that keeps its bitmaps: they are given up, and the disk's next backup is a full \
         one"
    )
}

/// The marks that are bitmaps of this disk.
fn marks_of(lineage: &Lineage, target: &str) -> Vec<CheckedMark> {
    let mut marks = Vec::new();
    for checkpoint in lineage.checkpoints() {
        if let Some(Mark::Bitmap(_)) = checkpoint.disk(target).map(|disk| &disk.mark) {
            marks.push(CheckedMark {
                checkpoint: checkpoint.name.clone(),
                target: target.to_owned(),
                verdict: MarkVerdict::Missing,
            });
        }
    }
    marks
}

fn covered(marks: &[CheckedMark]) -> Error {
    let names: Vec<&str> = marks.iter().map(|mark| mark.checkpoint.as_str()).collect();
    Error::new(
        ErrorKind::Busy,
        format!(
            "what has changed in the disk since {} is known by bitmaps in the qcow2 alone",
            names.join(", ")
        ),
    )
    .hint("Say --drop-checkpoints: they do not cover the disk any more then, and its next backup is a full one.")
}

/// Takes these steps while the guest stands still, all or none; for how long it did.
///
/// The guardian lets the guest go if this process dies, and both ways lead to the same bytes: wherever it is
/// interrupted, nothing that the guest writes is lost.
async fn take_over(control: &dyn Control, state: &RunState, steps: &[Step]) -> Result<Option<Duration>> {
    if steps.is_empty() {
        return Ok(None);
    }
    window::steps_alone(control, state, DEADLINE, steps).await
}
