//! The method `lvm`: a snapshot of the logical volume that holds a disk.
//!
//! A thin volume gets a thin snapshot, any other a classic one. The volume is found from the disk, or named by
//! the request. Here: the contract. Where a disk lives is in `find` (by way of `device` and `mount`), the snapshot
//! itself in `snapshot`, how full it is in `filling`, putting it back in `revert`, what differs between two in `compare`; lvm2's commands in `lvm2`, its
//! reports in `volume`.

mod chain;
mod compare;
mod device;
mod filling;
mod find;
#[doc(hidden)]
pub mod fuzzing;
mod lvm2;
mod mapper;
mod marker;
mod metadata;
mod mount;
mod program;
mod revert;
mod settings;
mod snapshot;
mod spool;
mod swap;
mod thin_delta;
mod volume;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, Capability, Compare, DiskRequest, DiskResult, DiskSnapshot, Error, ErrorKind, FileInside, Fit,
    Health, Host, Inside, Merge, Method, Prepared, Probe, Result, Revert, RunState, SnapshotId, Source,
    TakePlan, Taken, Unit,
};
use disksnap_image_file::{Live, Unfit};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_value, to_value};

use crate::compare::{Comparing, is_possible};
use crate::find::{Found, Place, Way, find};
use crate::lvm2::Lvm;
use crate::revert::Merging;
use crate::settings::Settings;
use crate::snapshot::{Image, Made, Planned, abort, can_be_named, rooms};
use crate::volume::Volume;

disksnap_core::register!(|| Arc::new(LogicalVolume));

/// The provider.
#[derive(Debug, Clone, Copy)]
pub struct LogicalVolume;

#[async_trait]
impl DiskSnapshot for LogicalVolume {
    fn method(&self) -> Method {
        Method {
            name: "lvm".to_owned(),
            aliases: Vec::new(),
            summary: "makes a classic or thin snapshot of the logical volume that holds the disk".to_owned(),
            options: settings::docs(),
            capabilities: best(),
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let (state, disks) = (host.state().await?, disks.to_vec());
        let live = Live::of(host, &state, disks.iter().map(|request| &request.disk)).await?;
        blocking(move || Ok(probe_all(&state, &disks, live))).await
    }

    /// Checks the room, writes back what is dirty, and makes the file that tells a late take that it is late.
    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        let (dir, disks) = (host.image_dir().to_owned(), disks.to_vec());
        blocking(move || prepare_all(id, &dir, &disks)).await
    }

    fn take_plan(&self, _: &Prepared) -> Result<TakePlan> {
        Ok(TakePlan::Host)
    }

    async fn take(&self, _: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        let planned: Planned = remembered(&prepared.data)?;
        blocking(move || planned.take()).await?;
        Ok(Taken::default())
    }

    async fn complete(&self, _: &dyn Host, _: SnapshotId, prepared: &Prepared, _: &Taken) -> Result<Unit> {
        let planned: Planned = remembered(&prepared.data)?;
        let made = blocking(move || planned.complete()).await?;
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: made.images.iter().map(|image| result(&made, image)).collect(),
            data: record(&made)?,
        })
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        _: &[DiskRequest],
        _: Option<&[Prepared]>,
    ) -> Result<()> {
        // All that a request makes bears its id, wherever it is.
        let dir = host.image_dir().to_owned();
        blocking(move || abort(id, &dir)).await
    }

    async fn inspect(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        let made: Made = remembered(&unit.data)?;
        blocking(move || made.health()).await
    }

    async fn delete(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let (made, dir) = (remembered::<Made>(&unit.data)?, host.image_dir().to_owned());
        blocking(move || made.delete(&dir)).await
    }

    /// Not for an image in a file system on the volume: whatever else is in it would go back too.
    fn revert(&self, unit: &Unit) -> Option<Arc<dyn Revert>> {
        let made: Made = remembered(&unit.data).ok()?;
        let whole = made.images.iter().all(|image| image.inside.is_none());
        whole.then(|| Arc::new(Merging) as Arc<dyn Revert>)
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    /// For thin snapshots of a volume that is the disk, or the image of one, where all was there that tells how they differ;
    /// not for an image in a file system on it.
    fn compare(&self, unit: &Unit) -> Option<Arc<dyn Compare>> {
        let made: Made = remembered(&unit.data).ok()?;
        made.comparable.then(|| Arc::new(Comparing) as Arc<dyn Compare>)
    }
}

/// What there is: no disk has all of it, for one way has what the other has not.
fn best() -> Vec<Capability> {
    let mut all = capabilities(Way::Classic, false);
    all.push(Capability::Compare);
    all
}

/// What can be done with a snapshot of a disk that is the volume, or is `inside` a file system on it.
///
/// A classic snapshot that is full breaks and lets the guest go on; a thin pool that is full does not.
fn capabilities(way: Way, inside: bool) -> Vec<Capability> {
    let mut capabilities = vec![Capability::Active, Capability::Inactive];
    if !inside {
        capabilities.extend([Capability::DirectRead, Capability::Revert]);
    }
    if way == Way::Classic {
        capabilities.push(Capability::GuestSafe);
    }
    capabilities
}

/// What the hypervisor says of a disk.
type Told = Fits<Option<Live>>;

/// What stands against a disk, or what is found of it.
type Fits<T> = std::result::Result<T, Unfit>;

/// Disks on one volume belong together, in the order of the first of each.
fn by_unit<'a>(found: impl Iterator<Item = &'a Found>) -> Vec<Vec<&'a Found>> {
    let mut units: Vec<Vec<&Found>> = Vec::new();
    for found in found {
        match units.iter_mut().find(|unit| unit[0].unit() == found.unit()) {
            Some(unit) => unit.push(found),
            None => units.push(vec![found]),
        }
    }
    units
}

fn probe_all(state: &RunState, disks: &[DiskRequest], live: Vec<Told>) -> Vec<Probe> {
    let found = find_all(disks);
    let checked: Vec<_> = found
        .into_iter()
        .zip(live)
        .map(|(found, live)| {
            let found = found?;
            suits(state, &found)?;
            Live::agrees(live?.as_ref(), &found.request.disk, found.below.len())?;
            Ok(found)
        })
        .collect();
    let units = by_unit(checked.iter().filter_map(|found| found.as_ref().ok()));
    let rooms = rooms(&units);
    let of_unit = |found: &Found| {
        let n = units.iter().position(|unit| unit[0].unit() == found.unit());
        let n = n.ok_or_else(|| "the volume has just changed".to_owned())?;
        let room = rooms[n].clone()?;
        agree(&units[n])?;
        Ok(fitting(found, &units[n], room))
    };
    let probe = |found: &Fits<Found>| match found {
        Ok(found) => of_unit(found).unwrap_or_else(|unfit: Unfit| unfit.into()),
        Err(unfit) => unfit.clone().into(),
    };
    checked.iter().map(probe).collect()
}

/// Every disk with its volume; lvm2 is asked once, and only when a disk may be on a volume.
fn find_all(disks: &[DiskRequest]) -> Vec<Fits<Found>> {
    let placed: Vec<_> = disks
        .iter()
        .map(|request| {
            let settings = Settings::read(&request.options)?;
            Place::of(&request.disk, &settings).map(|place| (request, settings, place))
        })
        .collect();
    let on_a_volume = placed.iter().any(|placed: &Fits<_>| placed.is_ok());
    let volumes: Fits<Vec<Volume>> = if on_a_volume {
        Lvm::find()
            .and_then(|lvm| lvm.volumes())
            .map_err(|error| unfit_of(&error))
    } else {
        Ok(Vec::new())
    };
    placed
        .into_iter()
        .map(|placed| {
            let (request, settings, place) = placed?;
            let volumes = volumes.as_ref().map_err(Clone::clone)?;
            let found = find(request, &settings, &place, volumes)?;
            can_be_named(&found.volume)?;
            Ok(found)
        })
        .collect()
}

/// lvm2's own failure, as what stands against a disk.
fn unfit_of(error: &Error) -> Unfit {
    let next = error
        .next_step()
        .map(|hint| format!(". {hint}"))
        .unwrap_or_default();
    Unfit {
        kind: error.kind(),
        why: format!("{}{next}", error.message()),
    }
}

/// A storage daemon cannot be paused: only what needs no pause is whole.
fn suits(state: &RunState, found: &Found) -> Fits<()> {
    if *state == RunState::Storage && (found.inside.is_some() || found.format != "raw") {
        let why = "a storage daemon holds the image, and cannot be paused while the snapshot is taken";
        return Err(why.to_owned().into());
    }
    Ok(())
}

/// Disks that share a snapshot must be told the same of it.
fn agree(unit: &[&Found]) -> Fits<()> {
    let told = |found: &&Found| (found.settings.size, found.settings.warn);
    if unit.iter().all(|found| told(found) == told(&unit[0])) {
        return Ok(());
    }
    Err(Unfit {
        kind: ErrorKind::Invalid,
        why: format!(
            "disks on {} share one snapshot, and are told different sizes or warning marks for it",
            unit[0].unit()
        ),
    })
}

/// What is told of a disk that suits, one of a unit.
fn fitting(found: &Found, unit: &[&Found], room: Option<u64>) -> Probe {
    let mut capabilities = capabilities(found.way, found.inside.is_some());
    capabilities.extend(is_possible(unit).then_some(Capability::Compare));
    let name = found.volume.full_name();
    let mut details = BTreeMap::from([
        ("volume".to_owned(), name.clone()),
        ("way".to_owned(), found.way.word().to_owned()),
    ]);
    details.extend(room.map(|bytes| ("snapshot.size".to_owned(), bytes.to_string())));
    let mut effect = match room {
        Some(bytes) => format!(
            "A classic snapshot of {name} is made, with room for {} MiB of what is overwritten; when that is full, the \
             snapshot breaks and the guest goes on. The domain keeps its disk.",
            bytes >> 20
        ),
        None => format!(
            "A thin snapshot of {name} is made in its pool {}. The domain keeps its disk; what the guest overwrites from \
             then on takes new room in the pool.",
            found.volume.pool
        ),
    };
    if let Some(inside) = &found.inside {
        let path = inside.path.display();
        details.insert("path-inside".to_owned(), path.to_string());
        let kind = &inside.kind;
        let more =
            format!(" The whole {kind} on it is in the snapshot, the image at {path}; it is not mounted.");
        effect.push_str(&more);
    }
    Probe {
        fit: match found.inside {
            Some(_) => Fit::Possible,
            None => Fit::Natural,
        },
        unit: found.unit(),
        capabilities,
        effect,
        details,
        warnings: found.warnings.clone(),
    }
}

fn prepare_all(id: SnapshotId, dir: &Path, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
    metadata::tidy(dir);
    let marker = marker::path(dir, id);
    let found = find_all(disks).into_iter().zip(disks);
    let found = found
        .map(|(found, request)| found.map_err(|unfit| Error::from(unfit).with("disk", &request.disk.target)));
    let found: Vec<Found> = found.collect::<Result<_>>()?;
    let units = by_unit(found.iter());
    let mut prepared = Vec::new();
    for (unit, room) in units.iter().zip(rooms(&units)) {
        let refused = |unfit: Unfit| Error::from(unfit).with("disk", &unit[0].request.disk.target);
        agree(unit).map_err(refused)?;
        let planned = Planned::new(id, unit, room.map_err(refused)?, marker.clone());
        let planned = planned.ok_or_else(|| Error::new(ErrorKind::Internal, "a unit without disks"))?;
        Planned::write_back(unit)?;
        prepared.push(Prepared {
            unit: unit[0].unit(),
            targets: planned.images.iter().map(|image| image.target.clone()).collect(),
            data: record(&planned)?,
            tops: BTreeMap::new(),
            warnings: unit.iter().flat_map(|found| found.warnings.clone()).collect(),
        });
    }
    marker::make(&marker)?;
    Ok(prepared)
}

fn result(made: &Made, image: &Image) -> DiskResult {
    let way = if made.thin { "thin" } else { "classic" };
    let access = match &image.inside {
        None => Access::Source {
            source: Source::Block {
                dev: made.path.clone(),
            },
            format: image.format.clone(),
            backing: None,
        },
        Some(path) => Access::Inside(inside(made, image, path)),
    };
    DiskResult {
        target: image.target.clone(),
        modified: None,
        access,
        size: image.size,
        details: BTreeMap::from([
            ("snapshot.volume".to_owned(), made.full_name()),
            ("way".to_owned(), way.to_owned()),
        ]),
    }
}

/// Why what could be mounted is not.
const OF_A_GUEST: &str =
    "a mount of this method's would outlive it, and keep the snapshot from being deleted";

fn inside(made: &Made, image: &Image, path: &Path) -> Inside {
    let kind = image.file_system.clone().unwrap_or_default();
    let (options, why) = match kind.as_str() {
        // The image is whole without the log: it was written back before the take.
        "btrfs" => (
            "ro,rescue=nologreplay",
            "a kernel takes two btrfs of one id for one, and mixes up the snapshot and the volume that it is of",
        ),
        "xfs" => (
            "ro,norecovery",
            "a kernel mounts no second XFS of the id of one that is mounted",
        ),
        "ext3" | "ext4" => ("ro,noload", OF_A_GUEST),
        _ => ("ro", OF_A_GUEST),
    };
    Inside {
        device: made.path.clone(),
        file_system: kind,
        image: FileInside {
            path: path.to_owned(),
            format: image.format.clone(),
        },
        below: image.below.clone(),
        options: options.to_owned(),
        why: why.to_owned(),
    }
}

/// Runs what blocks where it does not keep others waiting.
async fn blocking<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(act).await;
    done.map_err(|e| Error::new(ErrorKind::Internal, "the task died").because(e))?
}

fn record(made: &impl Serialize) -> Result<Value> {
    to_value(made).map_err(|e| Error::new(ErrorKind::Internal, "a snapshot cannot be recorded").because(e))
}

fn remembered<T: DeserializeOwned>(data: &Value) -> Result<T> {
    from_value(data.clone())
        .map_err(|e| Error::new(ErrorKind::Internal, "the record of a snapshot is damaged").because(e))
}
