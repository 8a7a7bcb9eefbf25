//! Restoring disks of a point, each to a place of its own.

use std::sync::Arc;

use disksnap::{Error, ErrorKind, Result};

use super::point::wanted;
use super::{RestoredDisk, Sink, Target, Task, as_locked, check_size, of_disk, open, with_complete};
use crate::{ChainReader, DiskEntry, DomainFolder, Event, Manifest, Repository, Watcher};

/// Restores disks of a point to these places, one after the other. All places are looked at before anything is written to one of
/// them; the point cannot be merged or pruned meanwhile.
///
/// # Errors
/// `Invalid` for a disk or a place that comes twice; `NotFound` for a disk that the point does not have, or a point that is dropped by now; `Busy` while the
/// point's chain is being changed; those of [`restore_disk`](crate::restore_disk). Disks before the one that failed are complete, and the
/// error names them.
pub async fn restore_disks(
    repository: &Repository,
    folder: &DomainFolder,
    point: &Manifest,
    to: &[(String, Target)],
    overwrite: bool,
    watcher: &dyn Watcher,
) -> Result<Vec<RestoredDisk>> {
    let told = |error: Error| error.during("restore").with("point", &point.point);
    let _lock = repository.lock(folder, true).await.map_err(told)?;
    let point = &as_locked(repository, folder, point).await.map_err(told)?;
    let mut complete = Vec::new();
    let restored = async {
        check(to)?;
        let mut ready = Vec::new();
        for (name, target) in to {
            let disk = wanted(point, std::slice::from_ref(name))?[0];
            let opened = prepare(repository, folder, point, disk, target, overwrite).await;
            ready.push((disk, target, opened.map_err(|e| of_disk(e, disk))?));
        }
        for (disk, target, (chain, sink)) in ready {
            let task = Task {
                disk,
                target: &target.to_string(),
                overwritten: target.is_overwritten(),
                watcher,
            };
            let restored = task.run(chain, sink).await?;
            for message in &restored.notes {
                watcher.event(&Event::Warning { message });
            }
            complete.push(RestoredDisk {
                target: disk.target.clone(),
                place: target.to_string(),
                restored,
            });
        }
        Ok(())
    };
    match restored.await {
        Ok(()) => Ok(complete),
        Err(error) => Err(told(with_complete(error, &complete))),
    }
}

fn check(to: &[(String, Target)]) -> Result<()> {
    for (n, (disk, target)) in to.iter().enumerate() {
        let why = if to[..n].iter().any(|(other, _)| other == disk) {
            format!("the disk '{disk}' is to be restored twice")
        } else if to[..n]
            .iter()
            .any(|(_, other)| other.to_string() == target.to_string())
        {
            format!("two disks are to be restored to {target}")
        } else {
            continue;
        };
        return Err(Error::new(ErrorKind::Invalid, why));
    }
    Ok(())
}

async fn prepare(
    repository: &Repository,
    folder: &DomainFolder,
    point: &Manifest,
    disk: &DiskEntry,
    target: &Target,
    overwrite: bool,
) -> Result<(ChainReader, Box<dyn Sink>)> {
    let layers = repository.chain(folder, point, &disk.target).await?;
    let chain = ChainReader::open(Arc::clone(repository.store()), &layers).await?;
    let size = check_size(&chain, disk)?;
    let sink = open(target, size, overwrite).await?;
    Ok((chain, sink))
}
