//! The method `memory`: snapshots of raw images that live in memory (tmpfs), by copying them.
//!
//! It is the reference provider: the smallest complete example of the contract in
//! [`disksnap_core::DiskSnapshot`]. It keeps no state; what it must remember is in its records, and
//! where its files are follows from the request alone.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, Affected, Capability, Compare, DiskRequest, DiskResult, DiskSnapshot, Error, ErrorKind, Fit,
    Health, Host, Merge, Method, OptionDoc, Peer, Prepared, Probe, Result, Revert, RunState, SnapshotId,
    Source, TakePlan, Taken, Unit, faults,
};
use rustix::fs::{FallocateFlags, fallocate, statfs};
use serde::{Deserialize, Serialize};
use serde_json::{from_value, json, to_value};

disksnap_core::register!(|| Arc::new(Memory));

/// The option that says in which directory the copy goes.
const COPY_DIR: &str = "copy.dir";
/// `f_type` of tmpfs and ramfs (statfs(2)).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// The provider.
#[derive(Debug, Clone, Copy)]
pub struct Memory;

/// What is remembered of one copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Copy {
    image: PathBuf,
    file: PathBuf,
    size: u64,
}

#[async_trait]
impl DiskSnapshot for Memory {
    fn method(&self) -> Method {
        let help = "the directory for the copy; beside the image when not given";
        Method {
            name: "memory".to_owned(),
            aliases: Vec::new(),
            summary: "copies a raw image that lives in memory (tmpfs), while the guest is paused".to_owned(),
            options: vec![OptionDoc {
                key: COPY_DIR.to_owned(),
                help: help.to_owned(),
            }],
            capabilities: capabilities(),
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let state = host.state().await?;
        Ok(disks.iter().map(|request| probe_one(&state, request)).collect())
    }

    /// Reserves the room for each copy, so that the take cannot run out of it.
    async fn prepare(&self, _: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        disks
            .iter()
            .map(|request| reserve(id, request).map_err(|e| e.with("disk", &request.disk.target)))
            .collect()
    }

    fn take_plan(&self, _: &Prepared) -> Result<TakePlan> {
        Ok(TakePlan::Host)
    }

    async fn take(&self, _: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        let copy: Copy = remembered(&prepared.data)?;
        copied(copy.image, copy.file).await?;
        Ok(Taken::default())
    }

    async fn complete(&self, _: &dyn Host, _: SnapshotId, prepared: &Prepared, _: &Taken) -> Result<Unit> {
        let copy: Copy = remembered(&prepared.data)?;
        let source = Source::File {
            file: copy.file.clone(),
        };
        let disks = prepared.targets.iter().map(|target| DiskResult {
            target: target.clone(),
            modified: None,
            access: Access::Source {
                source: source.clone(),
                format: "raw".to_owned(),
                backing: None,
            },
            size: Some(copy.size),
            details: [("copy.file".to_owned(), copy.file.display().to_string())].into(),
        });
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: disks.collect(),
            data: prepared.data.clone(),
        })
    }

    async fn abort(
        &self,
        _: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        _: Option<&[Prepared]>,
    ) -> Result<()> {
        for request in disks {
            if let Some(image) = image_of(request) {
                remove(&copy_path(id, request, image))?;
            }
        }
        Ok(())
    }

    async fn inspect(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        let copy: Copy = remembered(&unit.data)?;
        Ok(match std::fs::metadata(&copy.file) {
            Ok(found) if found.len() == copy.size => Health::Active,
            Ok(found) => Health::Broken(format!(
                "the copy has {} bytes and should have {}",
                found.len(),
                copy.size
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Health::Gone(format!("{} does not exist any more", copy.file.display()))
            }
            Err(error) => Health::Broken(format!("cannot look at {}: {error}", copy.file.display())),
        })
    }

    async fn delete(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        remove(&remembered(&unit.data)?.file)
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        Some(Arc::new(CopyBack))
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        None
    }
}

/// What puts a copy back into its image.
#[derive(Debug, Clone, Copy)]
struct CopyBack;

#[async_trait]
impl Revert for CopyBack {
    /// Copies all of it. Killed half way it leaves half of each; called again it copies all of it again.
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<Affected> {
        let copy: Copy = remembered(&unit.data)?;
        if host.state().await?.is_active() {
            return Err(
                Error::new(ErrorKind::Busy, "the domain is not off, and its image is in use")
                    .hint("Shut the domain down, then revert again."),
            );
        }
        if let Health::Broken(why) | Health::Gone(why) = Memory.inspect(host, id, unit).await? {
            return Err(Error::new(ErrorKind::Broken, why));
        }
        let image = OpenOptions::new().write(true).open(&copy.image);
        // The room first: what was sparse is so no more, and an image half put back would be worse than none.
        let ready = image.and_then(|image| {
            faults::around("file", "enlarge image", || {
                fallocate(&image, FallocateFlags::empty(), 0, copy.size)?;
                image.set_len(copy.size)
            })
        });
        ready.map_err(|e| Error::io(format!("cannot put back {}", copy.image.display()), e))?;
        copied(copy.file, copy.image).await?;
        Ok(Affected {
            unit: Some(unit.clone()),
            ..Affected::default()
        })
    }
}

fn capabilities() -> Vec<Capability> {
    vec![
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::GuestSafe,
        Capability::Revert,
    ]
}

fn probe_one(state: &RunState, request: &DiskRequest) -> Probe {
    let Some(image) = image_of(request) else {
        return Probe::unfit("the disk is not an image file");
    };
    if request.disk.driver.format.as_deref() != Some("raw") || request.disk.backing.is_some() {
        return Probe::unfit(
            "the image is not raw, or has a backing file: a copy of it alone would not be complete",
        );
    }
    match statfs(image) {
        Ok(fs) if IN_MEMORY.contains(&fs.f_type) => {}
        Ok(_) => return Probe::unfit(format!("{} is not on a file system in memory", image.display())),
        Err(error) => return Probe::unfit(format!("cannot look at {}: {error}", image.display())),
    }
    if *state == RunState::Storage {
        return Probe::unfit("a storage daemon holds the image, and cannot be paused while it is copied");
    }
    let running = *state == RunState::Running;
    Probe {
        fit: Fit::Possible,
        unit: image.display().to_string(),
        capabilities: capabilities(),
        effect: "The image is copied within memory; the domain keeps its disk.".to_owned(),
        details: [("image".to_owned(), image.display().to_string())].into(),
        warnings: if running {
            vec!["the guest is paused for the whole copy".to_owned()]
        } else {
            Vec::new()
        },
    }
}

fn image_of(request: &DiskRequest) -> Option<&Path> {
    match &request.disk.source {
        Some(Source::File { file }) => Some(file),
        _ => None,
    }
}

/// Where the copy goes: it follows from the request alone, so that abort finds it after a kill. The target
/// is in it because images of one name, from different directories, may be copied into one.
fn copy_path(id: SnapshotId, request: &DiskRequest, image: &Path) -> PathBuf {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let dir = request
        .options
        .get(COPY_DIR)
        .map(Path::new)
        .or(image.parent())
        .unwrap_or(Path::new("/"));
    dir.join(format!("{name}.{}.{}.snapshot", request.disk.target, id.short()))
}

fn reserve(id: SnapshotId, request: &DiskRequest) -> Result<Prepared> {
    let image =
        image_of(request).ok_or_else(|| Error::new(ErrorKind::Invalid, "the disk is not an image file"))?;
    let size = std::fs::metadata(image)
        .map_err(|e| Error::io(format!("cannot read {}", image.display()), e))?
        .len();
    let copy = copy_path(id, request, image);
    // The name holds the request's id, so a file that is there already is from this very request.
    let mut new = OpenOptions::new();
    new.write(true).create(true).truncate(true).mode(0o600);
    let opened = faults::around("file", "create copy", || new.open(&copy));
    let file = opened.map_err(|e| Error::io(format!("cannot create {}", copy.display()), e))?;
    let reserved = faults::around("file", "reserve copy", || {
        fallocate(&file, FallocateFlags::empty(), 0, size)
    });
    reserved.map_err(|e| {
        Error::io(
            format!("cannot reserve {size} bytes for {}", copy.display()),
            e.into(),
        )
        .hint("Free some memory, or take the snapshot by another method.")
    })?;
    let unit = image.display().to_string();
    let record = Copy {
        image: image.to_owned(),
        file: copy,
        size,
    };
    Ok(Prepared {
        unit,
        targets: vec![request.disk.target.clone()],
        data: to_value(record).unwrap_or(json!(null)),
        tops: BTreeMap::new(),
        warnings: Vec::new(),
    })
}

/// Copies the content of one file into another, where that does not keep others waiting.
async fn copied(from: PathBuf, to: PathBuf) -> Result<()> {
    let copied = tokio::task::spawn_blocking(move || copy_file(&from, &to)).await;
    copied.map_err(|e| Error::new(ErrorKind::Internal, "the copying task died").because(e))?
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("cannot copy {} to {}", from.display(), to.display()), e);
    let mut source = File::open(from).map_err(failed)?;
    let mut target = OpenOptions::new().write(true).open(to).map_err(failed)?;
    let copied = faults::around("file", "copy", || io::copy(&mut source, &mut target));
    copied.map(drop).map_err(failed)
}

fn remove(path: &Path) -> Result<()> {
    match faults::around("file", "remove", || std::fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn remembered(data: &serde_json::Value) -> Result<Copy> {
    from_value(data.clone())
        .map_err(|e| Error::new(ErrorKind::Internal, "the record of a copy is damaged").because(e))
}
