//! The dispatcher's acts on the records of checkpoints: list, redefine, forget. No disk is touched here.
//!
//! Source: `seeds/bulk-checkpoint-redefine.txt`; libvirt's `virDomainCheckpointCreateXML` with `REDEFINE`, done for a
//! whole set at once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;
use uuid::Uuid;

use crate::{
    Change, CheckedMark, Checkpoint, CheckpointDisk, CheckpointName, Dispatcher, Domain, Error, ErrorKind,
    Lineage, MarkVerdict, Result, Validation,
};

/// How many names an error tells of those that stand against something.
const TOLD: usize = 5;

/// What a redefine may do besides adding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Redefine {
    /// The set takes the place of what is known: what is not in it is forgotten, what is said otherwise in it replaced.
    pub replace: bool,
    /// Nothing is done where a mark is not as it should be on the domain's disks.
    pub validate: bool,
    /// Disks that the domain does not have are left out of the checkpoints, in place of an error.
    pub leave_out: bool,
}

/// What a redefine did, in the order of the set: parents before their children.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Redefined {
    /// They were not known before.
    pub added: Vec<CheckpointName>,
    /// They were known, and something else or less was known of them.
    pub replaced: Vec<CheckpointName>,
    /// They were known just so.
    pub kept: Vec<CheckpointName>,
    /// They were known, and are not in the set.
    pub forgotten: Vec<CheckpointName>,
    /// The disks that were left out, with the number of checkpoints that covered them.
    pub left_out: BTreeMap<String, usize>,
}

impl Dispatcher {
    /// All checkpoints of a domain, as a sound set.
    ///
    /// # Errors
    /// `Broken` when what is recorded is not one, naming the checkpoint that is wrong.
    pub async fn checkpoints(&self, domain: &Domain) -> Result<Lineage> {
        let known = self.catalog.checkpoints(&domain.id).await?;
        Lineage::new(known).map_err(|unsound| {
            Error::new(ErrorKind::Broken, unsound.message())
                .with("domain", &domain.id)
                .hint("Define the set anew from a good copy: `disksnap checkpoint redefine --replace`.")
        })
    }

    /// Makes a whole set of checkpoints known, in one step: all of it or, with an error, none. Neither the disks nor their
    /// bitmaps are touched, or looked at.
    ///
    /// The set comes in any order. It has all that is known already, unless [`Redefine::replace`] is said. Where it says
    /// less of a checkpoint than is known (no id of a disk, no size, no fraction of the second, no description, nothing of a
    /// disk whose checkpoint is a kept snapshot) what is known stays. Idempotent.
    ///
    /// # Errors
    /// `Invalid` for a set that is not sound ([`Lineage::new`]); `NotFound` for a disk that the domain does not have;
    /// `AlreadyExists` for a set that lacks checkpoints which are known, or contradicts them.
    pub async fn redefine(
        &self,
        domain: &Domain,
        checkpoints: Vec<Checkpoint>,
        how: Redefine,
    ) -> Result<Redefined> {
        self.redefine_locked(domain, checkpoints, how)
            .await
            .map_err(|e| e.during("redefine").with("domain", &domain.id))
    }

    async fn redefine_locked(
        &self,
        domain: &Domain,
        checkpoints: Vec<Checkpoint>,
        how: Redefine,
    ) -> Result<Redefined> {
        // What is wrong by itself is told without waiting for the lock.
        let mut set = Lineage::new(checkpoints)?.into_checkpoints();
        let held = self.hold(domain).await?;
        let known = self.catalog.checkpoints(&domain.id).await?;
        let mut done = Redefined::default();
        let known: HashMap<&CheckpointName, &Checkpoint> = known.iter().map(|c| (&c.name, c)).collect();
        if how.leave_out {
            done.left_out = leave_out(&mut set, domain, &known);
        }
        if !how.replace {
            refuse_lacking(&set, &known)?;
        }
        for checkpoint in &mut set {
            let Some(old) = known.get(&checkpoint.name) else {
                refuse_missing_disks(checkpoint, domain)?;
                done.added.push(checkpoint.name.clone());
                continue;
            };
            carry_kept(checkpoint, old);
            if !how.replace {
                complete(checkpoint, old)?;
            }
            if *checkpoint == **old {
                done.kept.push(checkpoint.name.clone());
            } else {
                refuse_missing_disks(checkpoint, domain)?;
                done.replaced.push(checkpoint.name.clone());
            }
        }
        done.forgotten = lacking(&set, &known).cloned().collect();
        done.forgotten.sort();
        if how.validate {
            let lineage = Lineage::new(set.clone())?;
            let found = self.validate_held(&*held.control, domain, &lineage).await?;
            refuse_unsound(&found)?;
        }
        if !(done.added.is_empty() && done.replaced.is_empty() && done.forgotten.is_empty()) {
            drop(known);
            let change = [Change::SetCheckpoints(set)];
            self.about_to_unpin(domain).await?;
            let changed = self.catalog.settle(Uuid::nil(), &domain.id, &change).await;
            changed.and(self.free_unpinned(&held, &domain.id).await)?;
        }
        Ok(done)
    }

    /// Forgets all checkpoints of a domain, and tells which. The disks keep their bitmaps: this is for a domain that has
    /// gone to another host with them. Snapshots that were deleted and kept for the checkpoints end. Idempotent.
    ///
    /// # Errors
    /// Those of the catalog.
    pub async fn forget_checkpoints(&self, domain: &Domain) -> Result<Vec<CheckpointName>> {
        let how = Redefine {
            replace: true,
            ..Redefine::default()
        };
        Ok(self.redefine(domain, Vec::new(), how).await?.forgotten)
    }
}

/// Takes the disks that the domain does not have out of the checkpoints, but for what is known already.
fn leave_out(
    set: &mut [Checkpoint],
    domain: &Domain,
    known: &HashMap<&CheckpointName, &Checkpoint>,
) -> BTreeMap<String, usize> {
    let has: HashSet<&str> = domain.disks.iter().map(|disk| disk.target.as_str()).collect();
    let mut gone = BTreeMap::new();
    for checkpoint in set {
        let old = known.get(&checkpoint.name);
        let missing = |disk: &mut CheckpointDisk| {
            !has.contains(disk.target.as_str()) && old.is_none_or(|old| old.disk(&disk.target).is_none())
        };
        for disk in checkpoint.disks.extract_if(.., missing) {
            *gone.entry(disk.target).or_default() += 1;
        }
    }
    gone
}

fn refuse_missing_disks(checkpoint: &Checkpoint, domain: &Domain) -> Result<()> {
    let missing = |disk: &&CheckpointDisk| !domain.disks.iter().any(|d| d.target == disk.target);
    let Some(disk) = checkpoint.disks.iter().find(missing) else {
        return Ok(());
    };
    let targets: Vec<&str> = domain.disks.iter().map(|d| d.target.as_str()).collect();
    let hint = format!(
        "The domain's disks: {}. --leave-out-missing-disks defines the checkpoints without the disks that are gone.",
        targets.join(", ")
    );
    Err(Error::new(
        ErrorKind::NotFound,
        format!(
            "the checkpoint '{}' covers the disk '{}', which the domain does not have",
            checkpoint.name, disk.target
        ),
    )
    .with("checkpoint", &checkpoint.name)
    .with("disk", &disk.target)
    .hint(hint))
}

/// Those that are known and are not in the set.
fn lacking<'k>(
    set: &[Checkpoint],
    known: &HashMap<&'k CheckpointName, &Checkpoint>,
) -> impl Iterator<Item = &'k CheckpointName> {
    let given: HashSet<&CheckpointName> = set.iter().map(|c| &c.name).collect();
    let lacking: Vec<&'k CheckpointName> = known
        .keys()
        .filter(|name| !given.contains(**name))
        .copied()
        .collect();
    lacking.into_iter()
}

/// Nobody loses a set by giving a smaller one.
fn refuse_lacking(set: &[Checkpoint], known: &HashMap<&CheckpointName, &Checkpoint>) -> Result<()> {
    let mut lacking: Vec<&CheckpointName> = lacking(set, known).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    lacking.sort();
    let told: Vec<String> = lacking
        .iter()
        .take(TOLD)
        .map(|name| format!("'{name}'"))
        .collect();
    let more = match lacking.len() - told.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let message = format!(
        "the domain has checkpoints that are not in this set: {}{more}",
        told.join(", ")
    );
    Err(Error::new(ErrorKind::AlreadyExists, message)
        .with("checkpoint", lacking[0])
        .hint("Give the whole set; or say --replace, and they are forgotten."))
}

/// Most forms have no words for a kept snapshot: what they do not say of it is no wish to give it up.
fn carry_kept(given: &mut Checkpoint, known: &Checkpoint) {
    let untold = |disk: &&CheckpointDisk| disk.mark.bitmap().is_none() && given.disk(&disk.target).is_none();
    let untold: Vec<CheckpointDisk> = known.disks.iter().filter(untold).cloned().collect();
    given.disks.extend(untold);
}

/// Fills in what is known of a checkpoint and was not said; refuses what contradicts it.
fn complete(given: &mut Checkpoint, known: &Checkpoint) -> Result<()> {
    let mut wrong = None;
    if given.parent != known.parent {
        wrong = Some("another parent".to_owned());
    }
    // Some forms know whole seconds only.
    let whole = Duration::from_secs(
        known
            .created
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
    );
    if given.created == UNIX_EPOCH + whole {
        given.created = known.created;
    } else if given.created != known.created {
        wrong = Some("another time".to_owned());
    }
    if !agree(&mut given.description, known.description.as_ref()) {
        wrong = Some("another description".to_owned());
    }
    for disk in &mut given.disks {
        match known.disk(&disk.target) {
            Some(known) if complete_disk(disk, known) => {}
            Some(_) => wrong = Some(format!("something else of the disk {}", disk.target)),
            None => wrong = Some(format!("the disk {} besides", disk.target)),
        }
    }
    if let Some(gone) = known.disks.iter().find(|disk| given.disk(&disk.target).is_none()) {
        wrong = Some(format!("nothing of the disk {}", gone.target));
    }
    // The same disks in another order are the same disks.
    let place = |disk: &CheckpointDisk| known.disks.iter().position(|d| d.target == disk.target);
    given.disks.sort_by_key(place);
    wrong.map_or(Ok(()), |what| {
        let message = format!(
            "the domain has the checkpoint '{}', and the set says {what}",
            given.name
        );
        Err(Error::new(ErrorKind::AlreadyExists, message)
            .with("checkpoint", &given.name)
            .hint(
                "`disksnap checkpoint dump` shows what is known. To have it as the set says, say --replace.",
            ))
    })
}

/// Refuses a set whose marks are not on the disks as they should be, or where there are others.
fn refuse_unsound(found: &Validation) -> Result<()> {
    // What a gap in the set cuts off is so by the set itself.
    let as_said = |mark: &CheckedMark| matches!(mark.verdict, MarkVerdict::Ok | MarkVerdict::CutOff);
    let wrong = found.marks.iter().filter(|mark| !as_said(mark));
    let wrong = wrong.map(|mark| {
        format!(
            "{} of {}: {}",
            mark.target,
            mark.checkpoint,
            mark.verdict.as_str()
        )
    });
    let unknown = found.unknown.iter();
    let unknown = unknown.map(|bitmap| format!("{}: unknown bitmap '{}'", bitmap.target, bitmap.name));
    let all: Vec<String> = wrong.chain(unknown).collect();
    if all.is_empty() {
        return Ok(());
    }
    let more = all.len().saturating_sub(TOLD);
    let told: Vec<&str> = all.iter().take(TOLD).map(String::as_str).collect();
    let more = if more == 0 {
        String::new()
    } else {
        format!(", and {more} more")
    };
    let message = format!(
        "the set does not match the bitmaps of the disks: {}{more}",
        told.join("; ")
    );
    Err(Error::new(ErrorKind::Broken, message).hint(
        "Nothing was changed. Redefine without --validate, then `disksnap checkpoint drop-broken` drops what cannot be trusted.",
    ))
}

fn complete_disk(given: &mut CheckpointDisk, known: &CheckpointDisk) -> bool {
    // No form but our own tells that a mark is volatile.
    given.volatile |= known.volatile;
    given.anew |= known.anew;
    agree(&mut given.id, known.id.as_ref())
        && agree(&mut given.size, known.size.as_ref())
        && given.mark == known.mark
}

/// Takes what is known where nothing is given; says whether both are then the same or nothing was known.
fn agree<T: Clone + PartialEq>(given: &mut Option<T>, known: Option<&T>) -> bool {
    if given.is_none() {
        *given = known.cloned();
    }
    known.is_none() || given.as_ref() == known
}
