//! The method `acme-copy`: snapshots of volumes, made by the ACME storage array that holds them.
//!
//! ```xml
//! <disk type='file' device='disk'>
//!   <source file='/arrays/basement/vol-7'/>
//!   <target dev='vda'/>
//!   <diskSnapshot method='acme-copy'>
//!     <volume array='/arrays/basement'><id>vol-7</id></volume>
//!   </diskSnapshot>
//! </disk>
//! ```
//!
//! `array` is the array's address and `id` the volume on it. ACME's arrays are directories and its volumes
//! files, so that the example runs anywhere: `array` is where a vendor talks to the real thing.

mod array;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, Capability, Compare, DiskRequest, DiskResult, DiskSnapshot, Error, ErrorKind, Fit, Health, Host,
    Merge, Method, OptionDoc, Prepared, Probe, Result, Revert, RunState, SnapshotId, Source, TakePlan, Taken,
    Unit,
};
use serde::{Deserialize, Serialize};

use crate::array::{Array, Copy};

// Whoever links this crate has the method. A program says `use acme_disksnap as _;`.
disksnap_core::register!(|| Arc::new(AcmeCopy));

/// The text of the attribute `array` of the element `<volume>`.
const ARRAY: &str = "volume.array";
/// The text of the element `<id>` in `<volume>`.
const ID: &str = "volume.id";

/// The provider. It keeps nothing between two calls.
#[derive(Debug, Clone, Copy)]
pub struct AcmeCopy;

/// What we remember of one volume's snapshot: all that any later process needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    array: Array,
    copy: Copy,
    size: u64,
}

#[async_trait]
impl DiskSnapshot for AcmeCopy {
    fn method(&self) -> Method {
        let option = |key: &str, help: &str| OptionDoc {
            key: key.to_owned(),
            help: help.to_owned(),
        };
        Method {
            name: "acme-copy".to_owned(),
            aliases: Vec::new(),
            summary: "a copy of the volume, made by the ACME array that holds it".to_owned(),
            options: vec![
                option(ARRAY, "the array's address"),
                option(ID, "the volume's id on the array"),
            ],
            capabilities: capabilities(),
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let state = host.state().await?;
        Ok(disks.iter().map(|request| probe_one(&state, request)).collect())
    }

    async fn prepare(&self, _: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        let prepare = |request| prepare_one(id, request);
        disks.iter().map(prepare).collect()
    }

    /// The array makes its copy while the guest stands still.
    fn take_plan(&self, _: &Prepared) -> Result<TakePlan> {
        Ok(TakePlan::Host)
    }

    async fn take(&self, _: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        let record: Record = remembered(&prepared.data)?;
        let taken = tokio::task::spawn_blocking(move || record.array.take(&record.copy)).await;
        taken.map_err(|e| Error::new(ErrorKind::Internal, "the taking task died").because(e))??;
        Ok(Taken::default())
    }

    async fn complete(&self, _: &dyn Host, _: SnapshotId, prepared: &Prepared, _: &Taken) -> Result<Unit> {
        let record: Record = remembered(&prepared.data)?;
        let file = record.array.publish(&record.copy)?;
        let result = |target: &String| DiskResult {
            target: target.clone(),
            modified: None,
            access: Access::Source {
                source: Source::File { file: file.clone() },
                format: "raw".to_owned(),
                backing: None,
            },
            size: Some(record.size),
            details: [("volume.snapshot".to_owned(), record.copy.name())].into(),
        };
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: prepared.targets.iter().map(result).collect(),
            data: prepared.data.clone(),
        })
    }

    /// From the id and the request alone: after a kill inside `prepare` there is no record.
    async fn abort(
        &self,
        _: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        _: Option<&[Prepared]>,
    ) -> Result<()> {
        for request in disks {
            if let Ok((array, volume)) = volume_of(request) {
                array.remove(&Copy::new(volume, id))?;
            }
        }
        Ok(())
    }

    /// Asks the array, not the record.
    async fn inspect(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        let record: Record = remembered(&unit.data)?;
        Ok(match record.array.size_of(&record.copy)? {
            Some(size) if size == record.size => Health::Active,
            Some(size) => Health::Broken(format!("the array has {size} of {} bytes", record.size)),
            None => Health::Gone("the array does not have it any more".to_owned()),
        })
    }

    async fn delete(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let record: Record = remembered(&unit.data)?;
        record.array.remove(&record.copy)
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        None
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        None
    }
}

fn capabilities() -> Vec<Capability> {
    vec![
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::GuestSafe,
    ]
}

fn probe_one(state: &RunState, request: &DiskRequest) -> Probe {
    let (array, volume) = match volume_of(request) {
        Ok(found) => found,
        Err(error) => return Probe::refused(error.kind(), error.to_string()),
    };
    let source = request.disk.source.as_ref().and_then(Source::path);
    if source != Some(&array.volume(&volume)) {
        return Probe::refused(
            ErrorKind::Unsupported,
            format!("the disk is not the volume {volume}"),
        );
    }
    if request.disk.driver.format.as_deref() != Some("raw") {
        return Probe::refused(ErrorKind::Unsupported, "the array copies raw volumes only");
    }
    if *state == RunState::Storage {
        return Probe::refused(
            ErrorKind::Unsupported,
            "a storage daemon cannot be paused for the copy",
        );
    }
    Probe {
        fit: Fit::Natural,
        unit: format!("{}:{volume}", array.address()),
        capabilities: capabilities(),
        effect: "The array copies the volume; the domain keeps its disk.".to_owned(),
        details: [("volume.id".to_owned(), volume)].into(),
        warnings: Vec::new(),
    }
}

/// Which volume the caller means. The dispatcher has seen to it that no other option is there.
fn volume_of(request: &DiskRequest) -> Result<(Array, String)> {
    let told = |key| {
        let missing = || Error::new(ErrorKind::Invalid, format!("the volume's '{key}' is not told"));
        request.options.get(key).ok_or_else(missing)
    };
    let (array, id) = (told(ARRAY)?, told(ID)?);
    if id.is_empty() || id.starts_with('.') || id.contains('/') {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{id:?} cannot be a volume's id"),
        ));
    }
    Ok((Array::at(PathBuf::from(array)), id.to_owned()))
}

/// Reserves the room, so that the take cannot run out of it. The name holds the request's id: what is there
/// already is from this very request.
fn prepare_one(id: SnapshotId, request: &DiskRequest) -> Result<Prepared> {
    let (array, volume) = volume_of(request)?;
    let unit = format!("{}:{volume}", array.address());
    let copy = Copy::new(volume, id);
    let size = array.reserve(&copy)?;
    let data = serde_json::to_value(Record { array, copy, size });
    Ok(Prepared {
        unit,
        targets: vec![request.disk.target.clone()],
        data: data.map_err(|e| Error::new(ErrorKind::Internal, "cannot write the record").because(e))?,
        tops: BTreeMap::new(),
        warnings: Vec::new(),
    })
}

fn remembered(data: &serde_json::Value) -> Result<Record> {
    Record::deserialize(data).map_err(|e| Error::new(ErrorKind::Internal, "the record is damaged").because(e))
}
