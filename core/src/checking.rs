//! Whether a domain's checkpoints can be trusted: each mark against what is really on the disk; and dropping what cannot.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::dispatcher::Held;
use crate::pinning::Pins;
use crate::{
    Change, Checkpoint, CheckpointName, Control, DirtyBitmap, Dispatcher, Domain, Ending, Health, Lineage,
    Mark, Result, Snapshot, SnapshotId, Trackable, Tracked, Unit, UnitRecord,
};

/// What was found of one mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarkVerdict {
    /// It is there, and as it should be.
    Ok,
    /// It is not there.
    Missing,
    /// It was in the memory of a hypervisor that has ended.
    Lost,
    /// Its image was not closed properly: what it says must not be trusted.
    Inconsistent,
    /// It should note what is written now, and does not.
    NotRecording,
    /// It is as it should be, and of no use for what comes: a later one was lost, so that nobody knows what was written since.
    CutOff,
    /// It notes what is written although a later one does: it tells more than has changed, and nothing less.
    Recording,
    /// Its disk cannot be looked at now: what is there is not known, and nothing is given up.
    Unreachable,
}

impl MarkVerdict {
    /// Whether what has changed since can be told with it.
    #[must_use]
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Ok | Self::Recording)
    }

    /// Whether it is known to be of no use for what comes.
    fn is_broken(self) -> bool {
        !self.is_usable() && self != Self::Unreachable
    }

    /// The verdict as users read it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Lost => "lost",
            Self::Inconsistent => "inconsistent",
            Self::NotRecording => "not recording",
            Self::CutOff => "cut off",
            Self::Recording => "recording",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One mark, looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckedMark {
    /// The checkpoint.
    pub checkpoint: CheckpointName,
    /// The disk's target.
    pub target: String,
    /// What was found.
    pub verdict: MarkVerdict,
}

/// A bitmap that no checkpoint knows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UnknownBitmap {
    /// The disk's target.
    pub target: String,
    /// Its name.
    pub name: String,
}

/// A domain's checkpoints against what is on its disks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Validation {
    /// Every mark, parents before their children.
    pub marks: Vec<CheckedMark>,
    /// The bitmaps that no checkpoint knows: somebody else's, or what somebody did behind disksnap's back.
    pub unknown: Vec<UnknownBitmap>,
    /// The disks that have checkpoints and not one that their next backup can be told against: it must be a full one.
    pub full: Vec<String>,
}

impl Validation {
    /// Whether nothing at all is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.unknown.is_empty() && self.marks.iter().all(|mark| mark.verdict == MarkVerdict::Ok)
    }
}

/// What [`Dispatcher::drop_broken`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dropped {
    /// The marks that are given up.
    pub marks: Vec<CheckedMark>,
    /// The checkpoints of which nothing is left.
    pub checkpoints: Vec<CheckpointName>,
    /// The bitmaps of nobody that were removed.
    pub unknown: Vec<UnknownBitmap>,
    /// The disks whose next backup must be a full one.
    pub full: Vec<String>,
}

/// What is to be dropped where it cannot be trusted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropping<'a> {
    /// Of these disks; of all when none is named.
    targets: &'a [String],
    /// Kept snapshots that are not there too, and not only those that no record knows any more.
    kept: bool,
    /// Bitmaps that no checkpoint knows too.
    unknown: bool,
}

impl<'a> Dropping<'a> {
    fn all(unknown: bool) -> Self {
        Self {
            targets: &[],
            kept: true,
            unknown,
        }
    }

    /// What a revert of these disks has ended.
    pub(crate) fn reverted(targets: &'a [String]) -> Self {
        Self {
            targets,
            kept: false,
            unknown: false,
        }
    }

    fn of(&self, target: &String) -> bool {
        self.targets.is_empty() || self.targets.contains(target)
    }

    fn means(&self, lineage: &Lineage, mark: &CheckedMark, known: &BTreeSet<SnapshotId>) -> bool {
        let disk = lineage
            .get(&mark.checkpoint)
            .ok()
            .and_then(|c| c.disk(&mark.target));
        let ended = match disk.map(|disk| &disk.mark) {
            Some(Mark::Pinned(id)) => self.kept || !known.contains(id),
            _ => true,
        };
        ended && self.of(&mark.target)
    }
}

impl Dispatcher {
    /// Looks at every mark of every checkpoint; changes nothing.
    ///
    /// # Errors
    /// What the tracker and the monitor say. A checkpoint that cannot be trusted is an answer, and no error.
    pub async fn validate(&self, domain: &Domain) -> Result<Validation> {
        let held = self.hold(domain).await.map_err(|e| e.during("validate"))?;
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        let validation = self.validate_held(&*held.control, domain, &lineage).await;
        validation.map_err(|e| e.during("validate").with("domain", &domain.id))
    }

    pub(crate) async fn validate_held(
        &self,
        control: &dyn Control,
        domain: &Domain,
        lineage: &Lineage,
    ) -> Result<Validation> {
        let disks: Vec<_> = domain.disks.iter().filter(|disk| disk.source.is_some()).collect();
        for warning in self.renew_past(control, domain).await? {
            tracing::warn!("{warning}");
        }
        // An old document would have the wrong images looked at.
        let state = control.state().await?;
        let standing = self.standing(&domain.id).await?;
        standing.refuse_stale(&state, disks.iter().copied())?;
        let looked = self.tracker()?.look(control, &disks).await?;
        for (disk, tracked) in disks.iter().zip(&looked) {
            if let Trackable::Unreachable(why) = &tracked.trackable {
                tracing::warn!("{}: its bitmaps cannot be looked at: {why}", disk.target);
            }
        }
        let found: BTreeMap<&str, Found<'_>> = disks
            .iter()
            .zip(&looked)
            .map(|(disk, tracked)| (disk.target.as_str(), Found::new(tracked)))
            .collect();
        let pinned = self.pinned_health(control, domain, lineage).await?;
        let mut validation = Validation::default();
        let targets: BTreeSet<&str> = lineage.checkpoints().iter().flat_map(targets_of).collect();
        let (mut newest, mut recording) = (HashMap::new(), HashMap::new());
        for target in targets {
            newest.extend(lineage.newest_of(target).map(|c| (target, &c.name)));
            recording.extend(lineage.recording_of(target).map(|c| (target, &c.name)));
        }
        for (checkpoint, cut_off) in lineage.checkpoints().iter().zip(lineage.cut_off()) {
            for disk in &checkpoint.disks {
                let target = disk.target.as_str();
                let last = recording.get(target) == Some(&&checkpoint.name);
                let verdict = match &disk.mark {
                    Mark::Bitmap(name) => match found.get(target) {
                        Some(found) => found.verdict(name, last, disk.volatile),
                        None => MarkVerdict::Missing,
                    },
                    Mark::Pinned(id) => {
                        let pinned = pinned.get(&(*id, target.to_owned()));
                        pinned.copied().unwrap_or(MarkVerdict::Missing)
                    }
                };
                let verdict = match (verdict, &disk.mark) {
                    (MarkVerdict::Ok, Mark::Bitmap(_)) if cut_off.contains(target) => MarkVerdict::CutOff,
                    _ => verdict,
                };
                validation.marks.push(CheckedMark {
                    checkpoint: checkpoint.name.clone(),
                    target: disk.target.clone(),
                    verdict,
                });
            }
        }
        validation.unknown = unknown(&found, lineage);
        validation.full = full(&validation.marks, &newest);
        Ok(validation)
    }

    /// The snapshots that are checkpoints' marks, looked at: by disk.
    async fn pinned_health(
        &self,
        control: &dyn Control,
        domain: &Domain,
        lineage: &Lineage,
    ) -> Result<HashMap<(SnapshotId, String), MarkVerdict>> {
        let mut found = HashMap::new();
        let pins = Pins::of(lineage.checkpoints());
        if pins.is_empty() {
            return Ok(found);
        }
        for snapshot in self.all_snapshots(&domain.id).await? {
            for UnitRecord { method, unit } in &snapshot.units {
                if !pins.need(snapshot.id, unit) {
                    continue;
                }
                let health = match self.registry.get(method) {
                    Ok(provider) => provider.inspect(control, snapshot.id, unit).await,
                    Err(error) => Err(error),
                };
                let verdict = match health {
                    Ok(Health::Active | Health::Endangered(_)) => MarkVerdict::Ok,
                    Ok(Health::Gone(_)) => MarkVerdict::Missing,
                    // It may be good again tomorrow (a volume that is not active): only who removes the checkpoint ends it.
                    Ok(Health::Broken(why)) => unreachable_kept(unit, &snapshot, &why),
                    Err(error) => unreachable_kept(unit, &snapshot, &error.by(method).to_string()),
                };
                let disks = unit.disks.iter();
                found.extend(disks.map(|disk| ((snapshot.id, disk.target.clone()), verdict)));
            }
        }
        Ok(found)
    }

    /// Gives up every mark that cannot be trusted, and the bitmaps before a bitmap like that on the same disk, which nothing
    /// can be told since; nothing else. The bitmaps go first, then the records, then snapshots that were kept for them.
    ///
    /// With `unknown`, bitmaps that no checkpoint knows are removed too. Safe to be called again.
    ///
    /// # Errors
    /// `Busy` where a bitmap is being exported. The records are as they were then.
    pub async fn drop_broken(&self, domain: &Domain, unknown: bool) -> Result<Dropped> {
        let held = self.hold(domain).await.map_err(|e| e.during("drop-broken"))?;
        let dropped = self
            .drop_broken_held(&held, domain, &Dropping::all(unknown))
            .await;
        dropped.map_err(|e| e.during("drop-broken").with("domain", &domain.id))
    }

    pub(crate) async fn drop_broken_held(
        &self,
        held: &Held,
        domain: &Domain,
        what: &Dropping<'_>,
    ) -> Result<Dropped> {
        let control = &*held.control;
        self.refuse_while_merging(&domain.id).await?;
        let lineage = Lineage::new(self.catalog.checkpoints(&domain.id).await?)?;
        let mut validation = self.validate_held(control, domain, &lineage).await?;
        let known: BTreeSet<SnapshotId> = self
            .all_snapshots(&domain.id)
            .await?
            .iter()
            .map(|s| s.id)
            .collect();
        validation.marks.retain(|mark| what.means(&lineage, mark, &known));
        validation.full.retain(|target| what.of(target));
        let marks = broken(&lineage, &validation)?;
        let mut dropped = Dropped {
            full: validation.full,
            unknown: if what.unknown {
                validation.unknown
            } else {
                Vec::new()
            },
            ..Dropped::default()
        };
        let set = without(&lineage, &marks);
        let kept: BTreeSet<&CheckpointName> = set.iter().map(|checkpoint| &checkpoint.name).collect();
        let gone = lineage.checkpoints().iter().filter(|c| !kept.contains(&c.name));
        dropped.checkpoints = gone.map(|c| c.name.clone()).collect();
        let mut endings = Vec::new();
        for mark in &marks {
            let disk = lineage.get(&mark.checkpoint)?.disk(&mark.target);
            if let Some(Mark::Bitmap(bitmap)) = disk.map(|disk| &disk.mark) {
                endings.extend(ending(domain, &mark.target, bitmap));
            }
        }
        endings.extend(
            dropped
                .unknown
                .iter()
                .filter_map(|found| ending(domain, &found.target, &found.name)),
        );
        if !marks.is_empty() || !endings.is_empty() {
            let changes = self.given_up(domain, &lineage, &marks).await?;
            self.about_to_unpin(domain).await?;
            let ended = self.end_marks(control, domain, endings, changes).await;
            ended.and(self.free_unpinned(held, &domain.id).await)?;
        }
        dropped.marks = marks;
        Ok(dropped)
    }

    /// What is to be written down when these marks are given up.
    pub(crate) async fn given_up(
        &self,
        domain: &Domain,
        lineage: &Lineage,
        marks: &[CheckedMark],
    ) -> Result<Vec<Change>> {
        let set = without(lineage, marks);
        let kept: BTreeSet<&CheckpointName> = set.iter().map(|checkpoint| &checkpoint.name).collect();
        let mut changes = self.moved_back(domain, lineage, marks, &kept).await?;
        changes.push(Change::SetCheckpoints(set));
        Ok(changes)
    }

    /// The snapshots that came after a checkpoint which is no more, as they are from then on.
    async fn moved_back(
        &self,
        domain: &Domain,
        lineage: &Lineage,
        marks: &[CheckedMark],
        kept: &BTreeSet<&CheckpointName>,
    ) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for mut snapshot in self.catalog.snapshots(&domain.id).await? {
            let Some(after) = snapshot.after.clone().filter(|name| lineage.get(name).is_ok()) else {
                continue;
            };
            for disk in &mut snapshot.disks {
                // The bitmap that recorded until the instant; those before it are asked for by their checkpoints' names.
                let last = lineage
                    .back_from(&after)?
                    .find(|c| c.bitmap(&disk.target).is_some());
                let lost = |mark: &CheckedMark| {
                    mark.target == disk.target && last.is_some_and(|last| last.name == mark.checkpoint)
                };
                disk.untold |= marks.iter().any(lost);
            }
            let mut back = lineage.back_from(&after)?;
            snapshot.after = back.find(|c| kept.contains(&c.name)).map(|c| c.name.clone());
            snapshot.checkpoint = snapshot.checkpoint.filter(|name| kept.contains(name));
            changes.push(Change::AddSnapshot(Box::new(snapshot)));
        }
        Ok(changes)
    }
}

/// Tells why a kept snapshot cannot be trusted now.
fn unreachable_kept(unit: &Unit, snapshot: &Snapshot, why: &str) -> MarkVerdict {
    let targets: Vec<&str> = unit.disks.iter().map(|disk| disk.target.as_str()).collect();
    tracing::warn!(
        "{}: the snapshot {} that is kept for a checkpoint cannot be used now: {why}",
        targets.join(", "),
        snapshot.name
    );
    MarkVerdict::Unreachable
}

fn ending(domain: &Domain, target: &str, bitmap: &str) -> Option<Ending> {
    Some(Ending {
        disk: domain.disk(target).ok()?.clone(),
        bitmap: bitmap.to_owned(),
        into: None,
        record: false,
    })
}

fn targets_of(checkpoint: &Checkpoint) -> impl Iterator<Item = &str> {
    checkpoint.disks.iter().map(|disk| disk.target.as_str())
}

/// The bitmaps of a disk, by name.
struct Found<'a> {
    reachable: bool,
    bitmaps: HashMap<&'a str, Vec<&'a DirtyBitmap>>,
}

impl<'a> Found<'a> {
    fn new(tracked: &'a Tracked) -> Self {
        let mut bitmaps: HashMap<&str, Vec<&DirtyBitmap>> = HashMap::new();
        for bitmap in &tracked.bitmaps {
            bitmaps.entry(&bitmap.name).or_default().push(bitmap);
        }
        let reachable = !matches!(tracked.trackable, Trackable::Unreachable(_));
        Self { reachable, bitmaps }
    }

    fn verdict(&self, name: &str, last: bool, volatile: bool) -> MarkVerdict {
        if !self.reachable {
            return MarkVerdict::Unreachable;
        }
        let Some(layers) = self.bitmaps.get(name) else {
            return if volatile {
                MarkVerdict::Lost
            } else {
                MarkVerdict::Missing
            };
        };
        let records = layers.iter().any(|bitmap| bitmap.layer == 0 && bitmap.recording);
        if layers.iter().any(|bitmap| bitmap.inconsistent) {
            MarkVerdict::Inconsistent
        } else if last && !records {
            MarkVerdict::NotRecording
        } else if !last && records {
            MarkVerdict::Recording
        } else {
            MarkVerdict::Ok
        }
    }
}

fn unknown(found: &BTreeMap<&str, Found<'_>>, lineage: &Lineage) -> Vec<UnknownBitmap> {
    let marks = lineage.checkpoints().iter().flat_map(|c| &c.disks);
    let known: BTreeSet<(&str, &str)> = marks
        .filter_map(|disk| match &disk.mark {
            Mark::Bitmap(name) => Some((disk.target.as_str(), name.as_str())),
            Mark::Pinned(_) => None,
        })
        .collect();
    let mut unknown = Vec::new();
    for (target, found) in found {
        let top = found
            .bitmaps
            .iter()
            .filter(|(_, all)| all.iter().any(|b| b.layer == 0));
        let names = top
            .map(|(name, _)| name)
            .filter(|name| !known.contains(&(*target, **name)));
        unknown.extend(names.map(|name| UnknownBitmap {
            target: (*target).to_owned(),
            name: (*name).to_owned(),
        }));
    }
    unknown.sort();
    unknown
}

/// The disks whose last mark is of no use.
fn full(marks: &[CheckedMark], newest: &HashMap<&str, &CheckpointName>) -> Vec<String> {
    let last = |mark: &&CheckedMark| newest.get(mark.target.as_str()) == Some(&&mark.checkpoint);
    let useless = marks.iter().filter(last).filter(|mark| mark.verdict.is_broken());
    let mut full: Vec<String> = useless.map(|mark| mark.target.clone()).collect();
    full.sort();
    full
}

/// The marks that are of no use: those that cannot be trusted, and the bitmaps before such a bitmap on the same disk.
fn broken(lineage: &Lineage, validation: &Validation) -> Result<Vec<CheckedMark>> {
    let key = |mark: &CheckedMark| (mark.checkpoint.clone(), mark.target.clone());
    let mut useless: BTreeSet<(CheckpointName, String)> = BTreeSet::new();
    for mark in validation
        .marks
        .iter()
        .rev()
        .filter(|mark| mark.verdict.is_broken())
    {
        useless.insert(key(mark));
        if lineage.get(&mark.checkpoint)?.bitmap(&mark.target).is_none() {
            continue;
        }
        for before in lineage.back_from(&mark.checkpoint)? {
            // What comes before something useless is known to be so already. A kept snapshot needs no other.
            if before.bitmap(&mark.target).is_some()
                && !useless.insert((before.name.clone(), mark.target.clone()))
                && before.name != mark.checkpoint
            {
                break;
            }
        }
    }
    let all = validation.marks.iter();
    Ok(all.filter(|mark| useless.contains(&key(mark))).cloned().collect())
}

/// The set without these marks, and without the checkpoints that cover nothing any more.
fn without(lineage: &Lineage, marks: &[CheckedMark]) -> Vec<Checkpoint> {
    let gone: BTreeSet<(&CheckpointName, &str)> = marks
        .iter()
        .map(|mark| (&mark.checkpoint, mark.target.as_str()))
        .collect();
    // For one that goes, the nearest before it that stays.
    let mut heirs: HashMap<CheckpointName, Option<CheckpointName>> = HashMap::new();
    let mut set = Vec::new();
    for checkpoint in lineage.checkpoints() {
        let mut left = checkpoint.clone();
        left.disks
            .retain(|disk| !gone.contains(&(&checkpoint.name, disk.target.as_str())));
        left.parent = left.parent.and_then(|parent| match heirs.get(&parent) {
            Some(heir) => heir.clone(),
            None => Some(parent),
        });
        if left.disks.is_empty() && !checkpoint.disks.is_empty() {
            heirs.insert(left.name, left.parent);
        } else {
            set.push(left);
        }
    }
    set
}
