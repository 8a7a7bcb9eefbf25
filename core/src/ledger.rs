//! What merges and reverts do to the records: units that end or change, and with them their snapshots.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::{
    Access, Affected, Change, Disk, DiskResult, Domain, Error, ErrorKind, Moved, Peer, Result, Snapshot,
    SnapshotId, SnapshotName, Unit,
};

/// What a merge or a revert did, for the caller.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Altered {
    /// The targets whose snapshot is given up now.
    pub ended: Vec<String>,
    /// Whether nothing is left of the snapshot.
    pub gone: bool,
    /// The disks that the domain uses otherwise than before: what its document must say from now on.
    pub disks: Vec<Disk>,
    /// What is not done yet, and when it will be.
    pub deferred: Vec<String>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// A unit of a recorded snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) method: String,
    pub(crate) unit: Unit,
}

impl Entry {
    pub(crate) fn targets(&self) -> Vec<String> {
        self.unit.disks.iter().map(|disk| disk.target.clone()).collect()
    }
}

/// The units of a snapshot that cover these disks; all of them when none is named.
///
/// # Errors
/// `NotFound` for a disk that is not in the snapshot; `Invalid` for one that shares its unit with a disk that is not named.
pub(crate) fn chosen(snapshot: &Snapshot, targets: &[String]) -> Result<Vec<Entry>> {
    for target in targets {
        crate::serve::disk_of(snapshot, target)?;
    }
    let mut entries = Vec::new();
    for record in &snapshot.units {
        let named = |target: &String| targets.is_empty() || targets.contains(target);
        let entry = Entry {
            method: record.method.clone(),
            unit: record.unit.clone(),
        };
        let (own, others): (Vec<_>, Vec<_>) = entry.targets().into_iter().partition(named);
        if own.is_empty() {
            continue;
        }
        if !others.is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{} and {} are in one and the same {} snapshot, and only go together",
                    own.join(", "),
                    others.join(", "),
                    record.method
                ),
            )
            .hint("Name all of them, or none to mean the whole snapshot."));
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// A domain's snapshots while some of their units change.
#[derive(Debug)]
pub(crate) struct Ledger<'a> {
    snapshots: Vec<Snapshot>,
    touched: BTreeSet<SnapshotId>,
    of: SnapshotId,
    /// As its document had it when the act began.
    domain: &'a Domain,
    moves: Vec<Moved>,
    altered: Altered,
}

impl<'a> Ledger<'a> {
    pub(crate) fn new(snapshots: Vec<Snapshot>, of: SnapshotId, domain: &'a Domain) -> Self {
        Self {
            snapshots,
            touched: BTreeSet::new(),
            of,
            domain,
            moves: Vec::new(),
            altered: Altered::default(),
        }
    }

    /// The other units of the method, oldest first.
    pub(crate) fn peers(&self, entry: &Entry) -> Vec<Peer> {
        let mut peers = Vec::new();
        for snapshot in &self.snapshots {
            for record in snapshot.units.iter().filter(|r| r.method == entry.method) {
                if snapshot.id != self.of || record.unit.unit != entry.unit.unit {
                    peers.push(Peer {
                        snapshot: snapshot.id,
                        unit: record.unit.clone(),
                    });
                }
            }
        }
        peers
    }

    /// Writes down what became of a unit and its peers.
    pub(crate) fn record(&mut self, entry: &Entry, affected: Affected) {
        let Affected {
            unit,
            peers,
            disks,
            deferred,
            warnings,
        } = affected;
        if unit.is_none() {
            self.altered.ended.extend(entry.targets());
        }
        if let Some(unit) = &unit {
            self.left_behind(&entry.unit, unit, &disks);
        }
        self.put(self.of, &entry.method, &entry.unit.unit, unit);
        for Peer { snapshot, unit } in peers {
            if let Some(old) = self.unit(snapshot, &entry.method, &unit.unit).cloned() {
                self.left_behind(&old, &unit, &disks);
            }
            let key = unit.unit.clone();
            self.put(snapshot, &entry.method, &key, Some(unit));
        }
        for disk in &disks {
            self.moved(entry, disk);
        }
        self.altered.disks.extend(disks);
        self.altered.deferred.extend(deferred);
        self.altered.warnings.extend(warnings);
    }

    /// Remembers what a document may still name: what it named when this began, and what the unit had made of that.
    fn moved(&mut self, entry: &Entry, disk: &Disk) {
        let said = self.domain.disks.iter().find(|d| d.target == disk.target);
        let made = entry.unit.disks.iter().find(|d| d.target == disk.target);
        let made = made.and_then(|result| result.modified.as_ref());
        let former = [said, made]
            .into_iter()
            .flatten()
            .filter_map(|d| d.source.clone());
        for from in former.filter(|from| Some(from) != disk.source.as_ref()) {
            let disk = disk.clone();
            self.moves.push(Moved { from, disk });
        }
    }

    /// Remembers what the disks stood on, and stand on no longer: a document may still name it, and a domain started from
    /// that would write to the snapshot.
    fn left_behind(&mut self, old: &Unit, new: &Unit, disks: &[Disk]) {
        for result in &old.disks {
            let left = |r: &DiskResult| r.target == result.target && r.modified.is_none();
            let now = disks.iter().find(|disk| disk.target == result.target);
            if let (Some(_), Access::Source { source, .. }, Some(disk)) =
                (&result.modified, &result.access, now)
                && new.disks.iter().any(left)
            {
                let (from, disk) = (source.clone(), disk.clone());
                self.moves.push(Moved { from, disk });
            }
        }
    }

    fn unit(&self, id: SnapshotId, method: &str, key: &str) -> Option<&Unit> {
        let snapshot = self.snapshots.iter().find(|s| s.id == id)?;
        let mut units = snapshot.units.iter();
        let record = units.find(|r| r.method == method && r.unit.unit == key);
        record.map(|record| &record.unit)
    }

    fn put(&mut self, id: SnapshotId, method: &str, key: &str, unit: Option<Unit>) {
        let Some(snapshot) = self.snapshots.iter_mut().find(|s| s.id == id) else {
            return;
        };
        let of = |r: &crate::UnitRecord| r.method == method && r.unit.unit == key;
        let Some(n) = snapshot.units.iter().position(of) else {
            return;
        };
        match unit {
            Some(unit) => replace(snapshot, n, unit),
            None => remove(snapshot, n),
        }
        self.touched.insert(id);
    }

    /// What to write into the catalog, and what to tell the caller.
    pub(crate) fn close(mut self) -> (Vec<Change>, Altered) {
        let mut changes: Vec<Change> = self
            .moves
            .drain(..)
            .map(|moved| Change::Move(Box::new(moved)))
            .collect();
        self.altered.gone = !self
            .snapshots
            .iter()
            .any(|s| s.id == self.of && !s.units.is_empty());
        for snapshot in self.snapshots {
            if self.touched.contains(&snapshot.id) {
                changes.push(if snapshot.units.is_empty() {
                    Change::RemoveSnapshot(snapshot.id)
                } else {
                    Change::AddSnapshot(Box::new(snapshot))
                });
            }
        }
        (changes, self.altered)
    }
}

fn replace(snapshot: &mut Snapshot, n: usize, unit: Unit) {
    for disk in snapshot.disks.iter_mut().filter(|disk| disk.unit == n) {
        if let Some(result) = unit.disks.iter().find(|result| result.target == disk.target) {
            disk.modified_disk.clone_from(&result.modified);
            disk.access.clone_from(&result.access);
            disk.size = result.size;
            disk.details.clone_from(&result.details);
        }
    }
    snapshot.units[n].unit = unit;
}

/// Takes a unit and its disks out of a snapshot's record.
pub(crate) fn remove(snapshot: &mut Snapshot, n: usize) {
    snapshot.units.remove(n);
    snapshot.disks.retain(|disk| disk.unit != n);
    for disk in snapshot.disks.iter_mut().filter(|disk| disk.unit > n) {
        disk.unit -= 1;
    }
}

/// The snapshot's exports that stand against changing it.
pub(crate) fn refuse_exported(name: &SnapshotName, exports: &[crate::Export], of: SnapshotId) -> Result<()> {
    let served: Vec<&str> = exports
        .iter()
        .filter(|export| export.snapshot == of)
        .map(|export| export.alias.0.as_str())
        .collect();
    if served.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Busy,
        format!("the snapshot is being served: {}", served.join(", ")),
    )
    .hint(format!("Stop that first: `disksnap export stop {name}`.")))
}
