//! From the tables to checkpoints, and back.

use std::collections::{BTreeMap, HashMap, HashSet};

use disksnap_core::{Checkpoint, CheckpointDisk, CheckpointName, DomainId, Error, ErrorKind, Mark, Result};
use uuid::Uuid;

use super::{CheckpointRow, DiskIds, DiskRow, Table, Tables};
use crate::time;

impl Tables {
    /// The checkpoints of this domain that the tables tell, in the order of the rows. A disk that no id is known of is an
    /// error, or with `leave_out` left out; the second value tells how often each was.
    ///
    /// # Errors
    /// `Invalid` for a row of another VM, a row that comes twice, or a disk of a checkpoint that has no row; `NotFound`
    /// for a disk that `disks` does not know. The error names the table and the record, counted from 1.
    pub fn checkpoints_of(
        &self,
        domain: &DomainId,
        disks: &DiskIds,
        leave_out: bool,
    ) -> Result<(Vec<Checkpoint>, BTreeMap<Uuid, usize>)> {
        let mut places = HashMap::with_capacity(self.checkpoints.len());
        let mut checkpoints = Vec::with_capacity(self.checkpoints.len());
        for (n, row) in self.checkpoints.iter().enumerate() {
            let faulty = |why: String| fault(ErrorKind::Invalid, Table::Checkpoints, n, why);
            if row.vm_id != domain.uuid {
                let why = format!(
                    "the row is of the VM {}, and the domain is {}",
                    row.vm_id, domain.uuid
                );
                return Err(faulty(why).hint("Give the rows of this VM alone."));
            }
            if places.insert(row.checkpoint_id, n).is_some() {
                return Err(faulty(format!(
                    "the checkpoint {} comes twice",
                    row.checkpoint_id
                )));
            }
            checkpoints.push(row.checkpoint()?);
        }
        let left_out = self.cover(&mut checkpoints, &places, disks, leave_out)?;
        Ok((checkpoints, left_out))
    }

    fn cover(
        &self,
        checkpoints: &mut [Checkpoint],
        places: &HashMap<Uuid, usize>,
        disks: &DiskIds,
        leave_out: bool,
    ) -> Result<BTreeMap<Uuid, usize>> {
        let mut left_out = BTreeMap::new();
        let mut seen = HashSet::with_capacity(self.disks.len());
        for (n, row) in self.disks.iter().enumerate() {
            let faulty = |kind, why: String| Err(fault(kind, Table::Disks, n, why));
            let Some(&place) = places.get(&row.checkpoint_id) else {
                let why = format!("the checkpoint {} is not in vm_checkpoints", row.checkpoint_id);
                return faulty(ErrorKind::Invalid, why);
            };
            if !seen.insert((row.disk_id, row.checkpoint_id)) {
                let why = format!(
                    "the disk {} comes twice in the checkpoint {}",
                    row.disk_id, row.checkpoint_id
                );
                return faulty(ErrorKind::Invalid, why);
            }
            match disks.target(row.disk_id) {
                Some(target) => checkpoints[place].disks.push(row.disk(target)),
                None if leave_out => *left_out.entry(row.disk_id).or_default() += 1,
                None => {
                    let why = format!("no disk of the domain is known as {}", row.disk_id);
                    return faulty(ErrorKind::NotFound, why).map_err(|error| {
                        error.hint("Tell which it is: --disk-id TARGET=UUID; or, if it is gone, say --leave-out-missing-disks.")
                    });
                }
            }
        }
        Ok(left_out)
    }

    /// The tables that tell these checkpoints of this domain, in this order. A disk's id is the checkpoint's own record of
    /// it, else what `disks` knows.
    ///
    /// # Errors
    /// `Unsupported`, naming the checkpoint, where its name is no UUID as oVirt writes it, a bitmap is called
    /// otherwise, or a mark is a kept snapshot; `NotFound` for a disk whose id nobody knows.
    pub fn of(domain: &DomainId, checkpoints: &[Checkpoint], disks: &DiskIds) -> Result<Self> {
        let mut tables = Self::default();
        for checkpoint in checkpoints {
            time::check(checkpoint)?;
            let checkpoint_id = id_of(&checkpoint.name)?;
            tables.checkpoints.push(CheckpointRow {
                checkpoint_id,
                parent: checkpoint.parent.as_ref().map(id_of).transpose()?,
                vm_id: domain.uuid,
                creation_date: checkpoint.created,
                description: checkpoint.description.clone().filter(|text| !text.is_empty()),
            });
            for disk in &checkpoint.disks {
                let disk_id = disk_id_of(checkpoint, disk, disks)?;
                tables.disks.push(DiskRow {
                    disk_id,
                    checkpoint_id,
                });
            }
        }
        Ok(tables)
    }
}

impl CheckpointRow {
    fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint {
            name: self.checkpoint_id.to_string().parse()?,
            parent: self.parent.map(|parent| parent.to_string().parse()).transpose()?,
            created: self.creation_date,
            description: self.description.clone().filter(|text| !text.is_empty()),
            disks: Vec::new(),
        })
    }
}

impl DiskRow {
    fn disk(&self, target: &str) -> CheckpointDisk {
        CheckpointDisk {
            target: target.to_owned(),
            id: Some(self.disk_id),
            size: None,
            mark: Mark::Bitmap(self.checkpoint_id.to_string()),
            volatile: false,
            anew: false,
        }
    }
}

fn fault(kind: ErrorKind, table: Table, n: usize, why: String) -> Error {
    Error::new(kind, why)
        .with("table", table.name())
        .with("record", n + 1)
}

/// Another name would come back as another checkpoint, and oVirt would look for bitmaps that are not there.
fn id_of(name: &CheckpointName) -> Result<Uuid> {
    let id = name.as_str().parse::<Uuid>().ok();
    id.filter(|id| id.to_string() == name.as_str()).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("the name of the checkpoint '{name}' is no UUID, and oVirt knows checkpoints by UUID"),
        )
        .with("checkpoint", name)
        .hint("Only sets whose names are UUIDs, in small letters and with dashes, can be told to oVirt; the other formats tell all.")
    })
}

fn disk_id_of(checkpoint: &Checkpoint, disk: &CheckpointDisk, disks: &DiskIds) -> Result<Uuid> {
    let refuse = |kind, what: &str| {
        let message = format!(
            "the disk {} of the checkpoint '{}' {what}",
            disk.target, checkpoint.name
        );
        Error::new(kind, message)
            .with("checkpoint", &checkpoint.name)
            .with("disk", &disk.target)
    };
    match &disk.mark {
        Mark::Bitmap(name) if *name == checkpoint.name.as_str() => {}
        Mark::Bitmap(name) => {
            let what =
                format!("has the bitmap '{name}', and oVirt expects it to be called as the checkpoint");
            return Err(refuse(ErrorKind::Unsupported, &what));
        }
        Mark::Pinned(_) => {
            let what = "is kept by a snapshot, and oVirt knows bitmaps alone";
            return Err(refuse(ErrorKind::Unsupported, what));
        }
    }
    disk.id.or_else(|| disks.id(&disk.target)).ok_or_else(|| {
        refuse(ErrorKind::NotFound, "has no id that oVirt could know it by")
            .hint(format!("Tell it: --disk-id {}=UUID.", disk.target))
    })
}
