//! The method `btrfs`: a read-only snapshot of the subvolume that holds a disk's image.
//!
//! The subvolume is found from the image; disks whose images are in one subvolume share one snapshot. Here:
//! the contract. Which subvolume and where its snapshot goes is in `place`, the layers of an image in
//! `chain`, the snapshot itself in `snapshot`, putting it back in `revert`, what differs from another one in `compare`
//! (by way of `file_changes`, `extents` and `differences`), btrfs's system calls in `subvolume`.

mod chain;
mod compare;
mod differences;
mod extents;
mod file_changes;
#[doc(hidden)]
pub mod fuzzing;
mod place;
mod revert;
mod snapshot;
mod subvolume;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, BackingStore, Capability, Compare, DiskRequest, DiskResult, DiskSnapshot, Error, ErrorKind, Fit,
    Health, Host, Merge, Method, OptionDoc, Prepared, Probe, Result, Revert, RunState, SnapshotId, Source,
    TakePlan, Taken, Unit,
};
use disksnap_image_file::{FileInImage, ImageFile, Layer, Live, Unfit, forget, room};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_value, to_value};

use crate::compare::CompareImages;
use crate::place::{Group, SNAPSHOT_DIR, groups, root};
use crate::revert::PutBackImages;
use crate::snapshot::{Image, Made, MadeImage, Planned, remove};

disksnap_core::register!(|| Arc::new(Btrfs));

/// The provider.
#[derive(Debug, Clone, Copy)]
pub struct Btrfs;

#[async_trait]
impl DiskSnapshot for Btrfs {
    fn method(&self) -> Method {
        let help =
            "the directory for the snapshot, on the image's file system; beside the subvolume when not given";
        Method {
            name: "btrfs".to_owned(),
            aliases: Vec::new(),
            summary: "makes a read-only snapshot of the btrfs subvolume that holds the image".to_owned(),
            options: vec![OptionDoc {
                key: SNAPSHOT_DIR.to_owned(),
                help: help.to_owned(),
            }],
            capabilities: capabilities(),
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let (state, disks) = (host.state().await?, disks.to_vec());
        let live = Live::of(host, &state, disks.iter().map(|request| &request.disk)).await?;
        let probed = move || {
            let groups = groups(&disks);
            let one = |(request, live)| probe_one(&state, &groups, request, live).unwrap_or_else(Probe::from);
            Ok(disks.iter().zip(live).map(one).collect())
        };
        blocking(probed).await
    }

    /// Makes the directory for each snapshot, and writes back what is dirty.
    async fn prepare(&self, _: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        let disks = disks.to_vec();
        let prepared = move || {
            for request in &disks {
                root(request).map_err(|why| refused(request, why.into()))?;
            }
            let groups = groups(&disks);
            groups.iter().map(|group| prepare_one(id, group)).collect()
        };
        blocking(prepared).await
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
        let at = made.dir.join(&made.name).display().to_string();
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: made.images.iter().map(|image| result(image, &at)).collect(),
            data: record(&made)?,
        })
    }

    async fn abort(
        &self,
        _: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        let of_record = prepared
            .unwrap_or_default()
            .iter()
            .map(|unit| remembered(&unit.data));
        let (planned, disks) = (of_record.collect::<Result<Vec<Planned>>>()?, disks.to_vec());
        let aborted = move || {
            // The record knows the place even where a directory has become another since.
            for planned in &planned {
                remove(&planned.place(), |found| found.parent == planned.of)?;
            }
            for group in groups(&disks) {
                let of = group.info().map(|info| info.uuid).ok();
                if let Ok(place) = group.place(id) {
                    remove(&place, |found| of.is_none_or(|of| found.parent == of))?;
                }
            }
            Ok(())
        };
        blocking(aborted).await
    }

    async fn inspect(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        let made: Made = remembered(&unit.data)?;
        blocking(move || Ok(made.health())).await
    }

    async fn delete(&self, _: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        let made: Made = remembered(&unit.data)?;
        let deleted = move || {
            for file in made.files() {
                forget(&file.image, id)?;
            }
            remove(&made.place(), |found| found.uuid == made.uuid)
        };
        blocking(deleted).await
    }

    fn revert(&self, unit: &Unit) -> Option<Arc<dyn Revert>> {
        Some(Arc::new(PutBackImages::of(unit)?))
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    fn compare(&self, unit: &Unit) -> Option<Arc<dyn Compare>> {
        Some(Arc::new(CompareImages::of(unit)?))
    }
}

/// Not `GuestSafe`: what the guest overwrites takes new room, and without room its write fails.
fn capabilities() -> Vec<Capability> {
    vec![
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::Revert,
        Capability::Compare,
    ]
}

/// What the hypervisor says of a disk.
type Told = std::result::Result<Option<Live>, Unfit>;

fn probe_one(
    state: &RunState,
    groups: &[Group<'_>],
    request: &DiskRequest,
    live: Told,
) -> std::result::Result<Probe, Unfit> {
    if *state == RunState::Storage {
        let why = "a storage daemon holds the image, and cannot be paused while the snapshot is taken";
        return Err(why.to_owned().into());
    }
    let root = root(request)?;
    let group = groups.iter().find(|group| group.root == root);
    let group = group.ok_or_else(|| "the image has just moved".to_owned())?;
    let Examined { image, below } = examine(group, request)?;
    Live::agrees(live?.as_ref(), &request.disk, below.len())?;
    Ok(fitting(state, group, &image))
}

/// What can be done with a snapshot of these disks: they are compared all, or none.
fn capabilities_of(group: &Group<'_>) -> Vec<Capability> {
    let comparable = |request: &&DiskRequest| {
        let examined = examine(group, request);
        !request.disk.encrypted && examined.is_ok_and(|examined| compare::is_possible(&examined.files()))
    };
    let mut all = capabilities();
    all.retain(|one| *one != Capability::Compare || group.requests.iter().all(comparable));
    all
}

fn fitting(state: &RunState, group: &Group<'_>, image: &ImageFile) -> Probe {
    let root = group.root.display();
    let mut warnings: Vec<String> = short_of_room(image).into_iter().collect();
    warnings.extend(image.lazy_warning().filter(|_| state.is_active()));
    Probe {
        fit: Fit::Possible,
        unit: group.unit(),
        capabilities: capabilities_of(group),
        effect: format!(
            "The subvolume {root} is snapshotted, with all that is in it; the domain keeps its disk. What the guest \
             overwrites from then on takes new room."
        ),
        details: [
            ("subvolume".to_owned(), root.to_string()),
            ("image".to_owned(), image.path.display().to_string()),
        ]
        .into(),
        warnings,
    }
}

/// An image, and the layers below it, nearest first.
struct Examined {
    image: ImageFile,
    below: Vec<Layer>,
}

impl Examined {
    /// The files of the image, the top one first.
    fn files(&self) -> Vec<FileInImage> {
        let top = (&self.image.path, self.image.format());
        let below = self.below.iter().map(|layer| (&layer.path, layer.format));
        let file = |(path, format): (&PathBuf, &str)| FileInImage {
            path: path.clone(),
            format: format.to_owned(),
        };
        std::iter::once(top).chain(below).map(file).collect()
    }
}

/// The image, if the snapshot of its subvolume will hold all of the disk; else why not. Changes nothing.
fn examine(group: &Group<'_>, request: &DiskRequest) -> std::result::Result<Examined, Unfit> {
    let image = ImageFile::of(&request.disk)?;
    let below = chain::below(&image, &request.disk, &group.root)?;
    group.place(SnapshotId(uuid::Uuid::nil()))?;
    group.can_hold_snapshot()?;
    group.permitted().map_err(|why| Unfit {
        kind: ErrorKind::Denied,
        why,
    })?;
    Ok(Examined { image, below })
}

/// A warning where the guest could run out of room by overwriting its disk.
fn short_of_room(image: &ImageFile) -> Option<String> {
    let (room, allocated) = (room(&image.path).ok()?, image.allocated());
    (room < allocated).then(|| {
        format!(
            "while the snapshot is there, what the guest overwrites takes new room: {} MiB are free, the image takes \
             {} MiB; without room the guest's writes fail",
            room >> 20,
            allocated >> 20
        )
    })
}

fn prepare_one(id: SnapshotId, group: &Group<'_>) -> Result<Prepared> {
    let mut images = Vec::new();
    for request in &group.requests {
        let Examined { image, below } = examine(group, request).map_err(|why| refused(request, why))?;
        let inside = |path: &Path| path.strip_prefix(&group.root).unwrap_or(path).to_owned();
        let layer = |layer: &Layer| (inside(&layer.path), layer.format.to_owned());
        images.push(Image {
            target: request.disk.target.clone(),
            path: inside(&image.path),
            format: image.format().to_owned(),
            below: below.iter().map(layer).collect(),
            encrypted: request.disk.encrypted,
        });
    }
    let place = group
        .place(id)
        .map_err(|why| Error::new(ErrorKind::Unsupported, why))?;
    let info = group.info().map_err(|e| {
        Error::io(
            format!("cannot look at the subvolume {}", group.root.display()),
            e,
        )
    })?;
    let planned = Planned {
        root: group.root.clone(),
        of: info.uuid,
        dir: place.dir,
        name: place.name.into(),
        images,
    };
    planned.prepare()?;
    Ok(Prepared {
        unit: group.unit(),
        targets: planned.images.iter().map(|image| image.target.clone()).collect(),
        data: record(&planned)?,
        tops: BTreeMap::new(),
        warnings: Vec::new(),
    })
}

fn result(image: &MadeImage, snapshot: &str) -> DiskResult {
    DiskResult {
        target: image.target.clone(),
        modified: None,
        access: Access::Source {
            source: Source::File {
                file: image.file.clone(),
            },
            format: image.format.clone(),
            backing: backing(&image.below),
        },
        size: Some(image.size),
        details: [("snapshot.subvolume".to_owned(), snapshot.to_owned())].into(),
    }
}

/// The layers below an image in the snapshot, nearest first, as a chain.
fn backing(below: &[(PathBuf, String)]) -> Option<Box<BackingStore>> {
    below.iter().rev().fold(None, |backing, (file, format)| {
        Some(Box::new(BackingStore {
            format: Some(format.clone()),
            source: Source::File { file: file.clone() },
            data_store: None,
            backing,
        }))
    })
}

fn refused(request: &DiskRequest, unfit: Unfit) -> Error {
    Error::from(unfit).with("disk", &request.disk.target)
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
