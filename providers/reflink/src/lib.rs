//! The method `reflink`: snapshots of image files by cloning them where the file system lets files share
//! their extents (FICLONE, `ioctl_ficlone(2)`): XFS and btrfs.
//!
//! A clone is made in one system call and takes no room at first; whatever the guest then overwrites
//! takes new room. The call takes longer the more pieces the image lies in. Here: the contract. Where a
//! clone goes is in `place`, the clone itself in `clone`, putting it back in `revert`.

mod clone;
mod place;
mod revert;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, Capability, Compare, DiskRequest, DiskResult, DiskSnapshot, Error, ErrorKind, Fit, Health, Host,
    Merge, Method, OptionDoc, Prepared, Probe, Result, Revert, RunState, SnapshotId, Source, TakePlan, Taken,
    Unit,
};
use disksnap_image_file::{ImageFile, Live, Unfit, forget, path_of, remove_file};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_value, to_value};

use crate::clone::{Clone as ImageClone, Made};
use crate::place::CLONE_DIR;
use crate::revert::PutBackClone;

disksnap_core::register!(|| Arc::new(Reflink));

/// What a snapshot does, for the operator.
const EFFECT: &str = "The image is cloned while the guest is paused: for milliseconds, or for seconds where it lies \
    in tens of thousands of pieces. The domain keeps its disk; what the guest overwrites from then on takes new room.";

/// The provider.
#[derive(Debug, Clone, Copy)]
pub struct Reflink;

#[async_trait]
impl DiskSnapshot for Reflink {
    fn method(&self) -> Method {
        let help = "the directory for the clone, on the image's file system; beside the image when not given";
        Method {
            name: "reflink".to_owned(),
            aliases: Vec::new(),
            summary: "clones an image file that shares its extents with the clone (XFS, btrfs)".to_owned(),
            options: vec![OptionDoc {
                key: CLONE_DIR.to_owned(),
                help: help.to_owned(),
            }],
            capabilities: capabilities(),
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let (state, disks) = (host.state().await?, disks.to_vec());
        let live = Live::of(host, &state, disks.iter().map(|request| &request.disk)).await?;
        let probed = move || {
            let one = |(request, live)| probe_one(&state, request, live).unwrap_or_else(Probe::from);
            Ok(disks.iter().zip(live).map(one).collect())
        };
        blocking(probed).await
    }

    /// Makes the empty clone, and writes the image's dirty data back: a take that had to do it would keep
    /// the guest waiting.
    async fn prepare(&self, _: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        let disks = disks.to_vec();
        let prepared = move || {
            let one = |request| prepare_one(id, request);
            disks.iter().map(one).collect()
        };
        blocking(prepared).await
    }

    fn take_plan(&self, _: &Prepared) -> Result<TakePlan> {
        Ok(TakePlan::Host)
    }

    async fn take(&self, _: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        let clone: ImageClone = remembered(&prepared.data)?;
        blocking(move || clone.take()).await?;
        Ok(Taken::default())
    }

    async fn complete(&self, _: &dyn Host, _: SnapshotId, prepared: &Prepared, _: &Taken) -> Result<Unit> {
        let clone: ImageClone = remembered(&prepared.data)?;
        let made = blocking(move || clone.complete()).await?;
        let access = Access::Source {
            source: Source::File {
                file: made.file.clone(),
            },
            format: made.format.clone(),
            backing: None,
        };
        let disks = prepared.targets.iter().map(|target| DiskResult {
            target: target.clone(),
            modified: None,
            access: access.clone(),
            size: Some(made.size),
            details: [("clone.file".to_owned(), made.file.display().to_string())].into(),
        });
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: disks.collect(),
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
        // The record knows the place even where a directory has become another since.
        for unit in prepared.unwrap_or_default() {
            remove_file(&remembered::<ImageClone>(&unit.data)?.file)?;
        }
        for request in disks {
            if let Ok(Ok(file)) = path_of(&request.disk).map(|image| place::clone_path(id, request, image)) {
                remove_file(&file)?;
            }
        }
        Ok(())
    }

    async fn inspect(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        let made: Made = remembered(&unit.data)?;
        Ok(made.health())
    }

    async fn delete(&self, _: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        let made: Made = remembered(&unit.data)?;
        forget(&made.image, id)?;
        remove_file(&made.file)
    }

    fn revert(&self, unit: &Unit) -> Option<Arc<dyn Revert>> {
        Some(Arc::new(PutBackClone::of(unit)?))
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        None
    }
}

/// Not `GuestSafe`: what the guest overwrites takes new room, and without room its write fails.
fn capabilities() -> Vec<Capability> {
    vec![
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::Revert,
    ]
}

/// What the hypervisor says of a disk.
type Told = std::result::Result<Option<Live>, Unfit>;

fn probe_one(state: &RunState, request: &DiskRequest, live: Told) -> std::result::Result<Probe, Unfit> {
    if *state == RunState::Storage {
        let why = "a storage daemon holds the image, and cannot be paused while it is cloned";
        return Err(why.to_owned().into());
    }
    let image = examine(request)?;
    Live::agrees(live?.as_ref(), &request.disk, 0)?;
    let mut warnings: Vec<String> = place::short_of_room(request, &image).into_iter().collect();
    warnings.extend(image.lazy_warning().filter(|_| state.is_active()));
    Ok(Probe {
        fit: Fit::Possible,
        unit: unit_of(&image),
        capabilities: capabilities(),
        effect: EFFECT.to_owned(),
        details: [("image".to_owned(), image.path.display().to_string())].into(),
        warnings,
    })
}

/// The image, if it can be cloned to where the request wants it; else why not. Changes nothing.
fn examine(request: &DiskRequest) -> std::result::Result<ImageFile, Unfit> {
    let image = ImageFile::of(&request.disk)?;
    image.stands_alone(&request.disk)?;
    disksnap_image_file::target_in_names(&request.disk)?;
    place::can_hold_clone(request, &image)?;
    Ok(image)
}

fn prepare_one(id: SnapshotId, request: &DiskRequest) -> Result<Prepared> {
    let target = &request.disk.target;
    let refused = |unfit: Unfit| Error::from(unfit).with("disk", target);
    let image = examine(request).map_err(refused)?;
    let clone = ImageClone {
        file: place::clone_path(id, request, &image.path).map_err(|why| refused(why.into()))?,
        image: image.path.clone(),
        format: image.format().to_owned(),
    };
    clone.prepare(&image).map_err(|e| e.with("disk", target))?;
    Ok(Prepared {
        unit: unit_of(&image),
        targets: vec![target.clone()],
        data: record(&clone)?,
        tops: BTreeMap::new(),
        warnings: Vec::new(),
    })
}

fn unit_of(image: &ImageFile) -> String {
    image.path.display().to_string()
}

/// Runs what blocks where it does not keep others waiting.
async fn blocking<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(act).await;
    done.map_err(|e| Error::new(ErrorKind::Internal, "the task died").because(e))?
}

fn record(made: &impl Serialize) -> Result<Value> {
    to_value(made).map_err(|e| Error::new(ErrorKind::Internal, "a clone cannot be recorded").because(e))
}

fn remembered<T: DeserializeOwned>(data: &Value) -> Result<T> {
    from_value(data.clone())
        .map_err(|e| Error::new(ErrorKind::Internal, "the record of a clone is damaged").because(e))
}
