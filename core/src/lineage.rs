//! A domain's checkpoints as a whole: which came from which, and what follows from that for each disk.
//!
//! Everything here is about records. All passes are linear in the set, and none recurses: sets of ten thousand
//! checkpoints in one line are ordinary.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::time::SystemTime;

use crate::names::nearest;
use crate::{Checkpoint, CheckpointDisk, CheckpointName, Error, ErrorKind, Mark, Result};

/// A sound set of checkpoints: names come once, parents are there, there is no cycle, and each disk has one first
/// checkpoint that all its others come from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage {
    /// Parents before their children, else by time.
    checkpoints: Vec<Checkpoint>,
    places: HashMap<CheckpointName, usize>,
    /// The place of each one's parent.
    parents: Vec<Option<usize>>,
}

/// What removing a checkpoint takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// What becomes of its marks, disk by disk.
    pub marks: Vec<Unmark>,
    /// Its children, as they are from then on.
    pub children: Vec<Checkpoint>,
}

/// What becomes of one mark of a checkpoint that is removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmark {
    /// The disk's target.
    pub target: String,
    /// The mark.
    pub mark: Mark,
    /// The bitmap before it on this disk, which takes over what this one knows; `None` where nobody asks before it, and for
    /// a kept snapshot.
    pub into: Option<Mark>,
    /// Whether it is the disk's last bitmap, so that the one before it goes on.
    pub last: bool,
}

impl Lineage {
    /// The set of these checkpoints, in whatever order they come.
    ///
    /// # Errors
    /// `Invalid`, naming the checkpoint that is wrong, where the set is not sound.
    pub fn new(checkpoints: Vec<Checkpoint>) -> Result<Self> {
        let mut names: HashMap<CheckpointName, usize> = HashMap::with_capacity(checkpoints.len());
        for (n, checkpoint) in checkpoints.iter().enumerate() {
            if names.insert(checkpoint.name.clone(), n).is_some() {
                return Err(fault(&checkpoint.name, "it comes twice"));
            }
            check_disks(checkpoint)?;
        }
        check_bitmaps(&checkpoints)?;
        let order = order(&checkpoints, &names)?;
        let mut slots: Vec<Option<Checkpoint>> = checkpoints.into_iter().map(Some).collect();
        let sorted: Vec<Checkpoint> = order.into_iter().filter_map(|n| slots[n].take()).collect();
        let lineage = Self::of_sorted(sorted);
        lineage.check_roots()?;
        Ok(lineage)
    }

    fn of_sorted(checkpoints: Vec<Checkpoint>) -> Self {
        let named = checkpoints
            .iter()
            .enumerate()
            .map(|(n, checkpoint)| (checkpoint.name.clone(), n));
        let places: HashMap<CheckpointName, usize> = named.collect();
        let parent = |checkpoint: &Checkpoint| places.get(checkpoint.parent.as_ref()?).copied();
        let parents = checkpoints.iter().map(parent).collect();
        Self {
            checkpoints,
            places,
            parents,
        }
    }

    /// All of them, parents before their children, else the older first.
    #[must_use]
    pub fn checkpoints(&self) -> &[Checkpoint] {
        &self.checkpoints
    }

    /// All of them, in that order.
    #[must_use]
    pub fn into_checkpoints(self) -> Vec<Checkpoint> {
        self.checkpoints
    }

    /// The checkpoint of this name.
    ///
    /// # Errors
    /// `NotFound`, with the names that come near.
    pub fn get(&self, name: &CheckpointName) -> Result<&Checkpoint> {
        Ok(&self.checkpoints[self.place(name)?])
    }

    fn place(&self, name: &CheckpointName) -> Result<usize> {
        self.places.get(name).copied().ok_or_else(|| {
            let known = self.checkpoints.iter().map(|c| c.name.as_str());
            Error::new(
                ErrorKind::NotFound,
                format!("the domain has no checkpoint '{name}'"),
            )
            .hint(nearest("checkpoints", name.as_str(), known))
        })
    }

    /// The one that a new checkpoint comes from: the youngest that none comes from.
    #[must_use]
    pub fn newest(&self) -> Option<&Checkpoint> {
        self.youngest_leaf(|_| true)
    }

    /// The disk's last checkpoint.
    #[must_use]
    pub fn newest_of(&self, target: &str) -> Option<&Checkpoint> {
        self.youngest_leaf(|checkpoint| checkpoint.disk(target).is_some())
    }

    /// The disk's last checkpoint that is a bitmap: the one that records.
    #[must_use]
    pub fn recording_of(&self, target: &str) -> Option<&Checkpoint> {
        self.youngest_leaf(|checkpoint| checkpoint.bitmap(target).is_some())
    }

    /// Of those that `counts`, the youngest that no other of them comes from.
    fn youngest_leaf(&self, counts: impl Fn(&Checkpoint) -> bool) -> Option<&Checkpoint> {
        // Whether one that counts comes from it, found from the youngest back.
        let mut has_heir = vec![false; self.checkpoints.len()];
        let mut best: Option<&Checkpoint> = None;
        for (n, checkpoint) in self.checkpoints.iter().enumerate().rev() {
            let counted = counts(checkpoint);
            let younger = |best: &&Checkpoint| best.created >= checkpoint.created;
            if counted && !has_heir[n] && !best.as_ref().is_some_and(younger) {
                best = Some(checkpoint);
            }
            if let Some(parent) = self.parents[n] {
                has_heir[parent] |= counted || has_heir[n];
            }
        }
        best
    }

    /// A checkpoint and those before it, the younger first.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint.
    pub fn back_from(&self, name: &CheckpointName) -> Result<impl Iterator<Item = &Checkpoint>> {
        let first = self.place(name)?;
        let places = std::iter::successors(Some(first), |&n| self.parents[n]);
        Ok(places.map(|n| &self.checkpoints[n]))
    }

    /// The checkpoint before this one that covers the disk.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint.
    pub fn before(&self, name: &CheckpointName, target: &str) -> Result<Option<&Checkpoint>> {
        Ok(self.back_from(name)?.skip(1).find(|c| c.disk(target).is_some()))
    }

    /// The checkpoint before this one whose bitmap knows what was written to the disk from then on.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint.
    pub fn bitmap_before(&self, name: &CheckpointName, target: &str) -> Result<Option<&Checkpoint>> {
        let mut before = self.back_from(name)?.skip(1);
        Ok(before.find(|c| c.bitmap(target).is_some()))
    }

    /// What knows, between them, all changes of a disk from one checkpoint on: its own mark there first, and then those
    /// of the checkpoints after it up to and with `last`.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint; `Invalid` when `from` does not cover the disk, or `last` does not
    /// come from it.
    pub fn since(
        &self,
        target: &str,
        from: &CheckpointName,
        last: &CheckpointName,
    ) -> Result<Vec<&CheckpointDisk>> {
        if self.get(from)?.disk(target).is_none() {
            let covered: Vec<&str> = self.get(from)?.disks.iter().map(|d| d.target.as_str()).collect();
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("the checkpoint '{from}' does not cover the disk"),
            )
            .with("disk", target)
            .hint(format!("It covers {}.", covered.join(", "))));
        }
        let mut marks = Vec::new();
        for checkpoint in self.back_from(last)? {
            marks.extend(checkpoint.disk(target));
            if checkpoint.name == *from {
                marks.reverse();
                return Ok(marks);
            }
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!("the checkpoint '{last}' does not come from '{from}'"),
        )
        .hint("`disksnap checkpoint list --tree` shows which comes from which."))
    }

    /// What removing this checkpoint takes, so that nothing is lost that the others can be asked.
    ///
    /// # Errors
    /// `NotFound` when there is no such checkpoint.
    pub fn removal(&self, name: &CheckpointName) -> Result<Removal> {
        let place = self.place(name)?;
        let gone = &self.checkpoints[place];
        let mut marks = Vec::with_capacity(gone.disks.len());
        for disk in &gone.disks {
            let before = self.bitmap_before(name, &disk.target)?;
            let before = before.filter(|_| disk.mark.bitmap().is_some());
            let last = self.recording_of(&disk.target).is_some_and(|c| c.name == *name);
            marks.push(Unmark {
                target: disk.target.clone(),
                mark: disk.mark.clone(),
                into: before.and_then(|c| c.disk(&disk.target)).map(|d| d.mark.clone()),
                last,
            });
        }
        let own = self.parents.iter().zip(&self.checkpoints);
        let own = own.filter(|(parent, _)| **parent == Some(place));
        let children = own.map(|(_, child)| Checkpoint {
            parent: gone.parent.clone(),
            ..child.clone()
        });
        Ok(Removal {
            children: children.collect(),
            marks,
        })
    }

    /// By checkpoint, in the order of [`Lineage::checkpoints`]: the disks that have a gap after it
    /// ([`CheckpointDisk::anew`]), so that its bitmaps there tell nothing of what came later.
    #[must_use]
    pub fn cut_off(&self) -> Vec<HashSet<&str>> {
        let mut after: Vec<HashSet<&str>> = vec![HashSet::new(); self.checkpoints.len()];
        for (n, checkpoint) in self.checkpoints.iter().enumerate().rev() {
            if let Some(parent) = self.parents[n] {
                let mut gaps = after[n].clone();
                gaps.extend(
                    checkpoint
                        .disks
                        .iter()
                        .filter(|d| d.anew)
                        .map(|d| d.target.as_str()),
                );
                after[parent].extend(gaps);
            }
        }
        after
    }

    /// The set for a form that has no place for gaps: a disk is left out of the checkpoints before one whose bitmaps tell
    /// nothing since.
    #[must_use]
    pub fn without_gaps(&self) -> Vec<Checkpoint> {
        let left = |(checkpoint, gaps): (&Checkpoint, HashSet<&str>)| {
            let mut left = checkpoint.clone();
            let useless =
                |disk: &CheckpointDisk| disk.mark.bitmap().is_some() && gaps.contains(disk.target.as_str());
            left.disks.retain(|disk| !useless(disk));
            for disk in &mut left.disks {
                disk.anew = false;
            }
            left
        };
        self.checkpoints.iter().zip(self.cut_off()).map(left).collect()
    }

    /// A disk's second first checkpoint would leave changes that none of its marks knows.
    fn check_roots(&self) -> Result<()> {
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        for disk in self.checkpoints.iter().flat_map(|c| &c.disks) {
            let next = numbers.len();
            numbers.entry(&disk.target).or_insert(next);
        }
        let words = numbers.len().div_ceil(64);
        let mut roots: Vec<Option<&CheckpointName>> = vec![None; numbers.len()];
        // Which disks each checkpoint or one before it covers.
        let mut covered: Vec<Vec<u64>> = Vec::with_capacity(self.checkpoints.len());
        for (checkpoint, parent) in self.checkpoints.iter().zip(&self.parents) {
            let mut set = parent.map_or_else(|| vec![0; words], |n| covered[n].clone());
            for disk in &checkpoint.disks {
                let n = numbers[disk.target.as_str()];
                let (word, bit) = (n / 64, 1_u64 << (n % 64));
                if set[word] & bit == 0
                    && let Some(other) = roots[n].replace(&checkpoint.name)
                {
                    let why = format!(
                        "the disk {} begins at '{other}' too, and neither comes from the other",
                        disk.target
                    );
                    return Err(fault(&checkpoint.name, why));
                }
                set[word] |= bit;
            }
            covered.push(set);
        }
        Ok(())
    }
}

fn fault(name: &CheckpointName, why: impl AsRef<str>) -> Error {
    let message = format!("the set of checkpoints is not sound: '{name}': {}", why.as_ref());
    Error::new(ErrorKind::Invalid, message).with("checkpoint", name)
}

fn check_disks(checkpoint: &Checkpoint) -> Result<()> {
    let mut seen = HashSet::new();
    match checkpoint.disks.iter().find(|disk| !seen.insert(&disk.target)) {
        Some(twice) => Err(fault(
            &checkpoint.name,
            format!("the disk {} comes twice", twice.target),
        )),
        None => Ok(()),
    }
}

/// Removing one of two that share a bitmap would end the other's.
fn check_bitmaps(checkpoints: &[Checkpoint]) -> Result<()> {
    let mut owners: HashMap<(&str, &str), &CheckpointName> = HashMap::new();
    for checkpoint in checkpoints {
        for disk in &checkpoint.disks {
            let Some(bitmap) = disk.mark.bitmap() else {
                continue;
            };
            if let Some(other) = owners.insert((&disk.target, bitmap), &checkpoint.name) {
                let why = format!(
                    "the bitmap '{bitmap}' of the disk {} is that of '{other}' too",
                    disk.target
                );
                return Err(fault(&checkpoint.name, why));
            }
        }
    }
    Ok(())
}

/// The places of the checkpoints, parents first, else the older first.
fn order(checkpoints: &[Checkpoint], names: &HashMap<CheckpointName, usize>) -> Result<Vec<usize>> {
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); checkpoints.len()];
    let mut ready: BinaryHeap<Reverse<(SystemTime, &CheckpointName, usize)>> = BinaryHeap::new();
    let entry = |n: usize| Reverse((checkpoints[n].created, &checkpoints[n].name, n));
    for (n, checkpoint) in checkpoints.iter().enumerate() {
        let Some(parent) = &checkpoint.parent else {
            ready.push(entry(n));
            continue;
        };
        let place = names.get(parent).ok_or_else(|| {
            let why = format!("its parent '{parent}' is not in the set");
            fault(&checkpoint.name, why)
        })?;
        children[*place].push(n);
    }
    let mut order = Vec::with_capacity(checkpoints.len());
    while let Some(Reverse((_, _, n))) = ready.pop() {
        order.push(n);
        ready.extend(children[n].iter().map(|&child| entry(child)));
    }
    if order.len() == checkpoints.len() {
        return Ok(order);
    }
    let reached: HashSet<usize> = order.into_iter().collect();
    Err(cycle(checkpoints, names, &reached))
}

/// The error for a set in which something comes from itself.
fn cycle(
    checkpoints: &[Checkpoint],
    names: &HashMap<CheckpointName, usize>,
    reached: &HashSet<usize>,
) -> Error {
    let parent = |n: usize| checkpoints[n].parent.as_ref().and_then(|p| names.get(p)).copied();
    let outside = (0..checkpoints.len()).find(|n| !reached.contains(n));
    let mut seen = HashSet::new();
    let mut at = outside;
    // Whatever was not reached leads into a cycle; the first that comes again is on it.
    while let Some(n) = at.filter(|&n| seen.insert(n)) {
        at = parent(n);
    }
    let Some(first) = at else {
        return Error::new(ErrorKind::Internal, "the order of the checkpoints was not found");
    };
    let around: Vec<&str> = std::iter::successors(parent(first), |&n| parent(n))
        .take_while(|&n| n != first)
        .take(8)
        .map(|n| checkpoints[n].name.as_str())
        .collect();
    let why = if around.is_empty() {
        "it is its own parent".to_owned()
    } else {
        format!("it comes from itself, by way of {}", around.join(", "))
    };
    fault(&checkpoints[first].name, why)
}

#[cfg(test)]
mod tests;
