//! What backups leave with the domain: their snapshots and checkpoints, told by their names, and their end. All of it can be
//! done at any time, and twice.

use std::collections::BTreeSet;

use disksnap::{CheckpointName, ErrorKind, Result, Snapshot, SnapshotName};

use crate::create::{Live, Subject};
use crate::journal::Journal;
use crate::{DomainFolder, Event, Repository, Watcher};

/// How what belongs to a repository's backups is called.
#[derive(Debug, Clone)]
pub(crate) struct Ours {
    prefix: String,
}

impl Ours {
    pub(crate) fn of(repository: &Repository) -> Self {
        let id = repository.id().simple().to_string();
        Self {
            prefix: format!("backup-{}-", &id[..8]),
        }
    }

    /// The name of the snapshot and the checkpoint of a point.
    pub(crate) fn name(&self, point: &str) -> String {
        format!("{}{point}", self.prefix)
    }

    fn is(&self, name: &str) -> bool {
        name.starts_with(&self.prefix)
    }

    /// The points whose snapshot or checkpoint the domain still has: those of an abandoned one may have to stay for a while.
    pub(crate) async fn held(&self, live: &Live<'_>) -> Result<Vec<String>> {
        let catalog = live.dispatcher().catalog();
        let snapshots = catalog.snapshots(&live.domain.id).await?;
        let checkpoints = catalog.checkpoints(&live.domain.id).await?;
        let names = snapshots.iter().map(|snapshot| snapshot.name.as_str());
        let names = names.chain(checkpoints.iter().map(|checkpoint| checkpoint.name.as_str()));
        let points = names.filter_map(|name| name.strip_prefix(&self.prefix));
        Ok(points.map(str::to_owned).collect())
    }

    pub(crate) async fn snapshot(&self, live: &Live<'_>, name: &SnapshotName) -> Result<Option<Snapshot>> {
        let catalog = live.dispatcher().catalog();
        let all = catalog.snapshots(&live.domain.id).await?;
        Ok(all.into_iter().find(|snapshot| snapshot.name == *name))
    }

    /// Deletes a snapshot, if it is there; the document follows.
    pub(crate) async fn delete_snapshot(&self, live: &mut Live<'_>, name: &SnapshotName) -> Result<()> {
        match live.dispatcher().delete(&live.domain, name).await {
            Ok(deletion) => live.follow(&deletion.altered.disks).await?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // What a killed run had done of it, and not written down, is known since then.
        live.catch_up().await
    }
}

/// Gives up a point that never came to be: its snapshot, its checkpoint, whose bitmaps the one before takes over, and its folder.
pub(crate) async fn abandon_point(
    live: &mut Live<'_>,
    repository: &Repository,
    folder: &DomainFolder,
    point: &str,
) -> Result<()> {
    let ours = Ours::of(repository);
    let name: SnapshotName = ours.name(point).parse()?;
    ours.delete_snapshot(live, &name).await?;
    let checkpoint = CheckpointName::try_from(&name)?;
    match live
        .dispatcher()
        .remove_checkpoint(&live.domain, &checkpoint)
        .await
    {
        // Broken: the one before it is, and both go with the next full backup.
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Broken) => return Err(error),
        _ => {}
    }
    repository
        .store()
        .remove(&repository.folder_of(folder, point))
        .await
}

/// Deletes the snapshots of backups that have ended, and removes the checkpoints that no disk's next increment needs; but for what
/// belongs to the point that is being gone on with.
pub(crate) async fn tidy(
    live: &mut Live<'_>,
    repository: &Repository,
    folder: &DomainFolder,
    going_on: Option<&Journal>,
    watcher: &dyn Watcher,
) -> Result<()> {
    let ours = Ours::of(repository);
    for snapshot in live.dispatcher().catalog().snapshots(&live.domain.id).await? {
        let needed = going_on.is_some_and(|journal| journal.snapshot == snapshot.name);
        if ours.is(snapshot.name.as_str()) && !needed {
            ours.delete_snapshot(live, &snapshot.name).await?;
        }
    }
    let mut needed = needed(repository, folder, &ours).await?;
    needed.extend(going_on.and_then(|journal| journal.checkpoint.clone()));
    let dispatcher = live.dispatcher();
    let lineage = dispatcher.checkpoints(&live.domain).await?;
    let past = lineage.checkpoints().iter().map(|checkpoint| &checkpoint.name);
    for name in past.filter(|name| ours.is(name.as_str()) && !needed.contains(name)) {
        if let Err(error) = dispatcher.remove_checkpoint(&live.domain, name).await {
            let message = format!(
                "the checkpoint '{name}' is not needed any more and could not be removed: {error}; the next backup tries again"
            );
            watcher.event(&Event::Warning { message: &message });
        }
    }
    Ok(())
}

/// The checkpoints that the next increments are since: of each disk that of its last point. That of a point whose manifest is damaged may be
/// one: the manifest can be put back.
async fn needed(
    repository: &Repository,
    folder: &DomainFolder,
    ours: &Ours,
) -> Result<BTreeSet<CheckpointName>> {
    let (mut seen, mut needed) = (BTreeSet::new(), BTreeSet::new());
    for point in repository.points(folder).await?.into_iter().rev() {
        let manifest = match point.manifest {
            Ok(manifest) => manifest,
            Err(error) if error.kind() == ErrorKind::Broken => {
                needed.extend(ours.name(&point.name).parse::<CheckpointName>());
                continue;
            }
            Err(error) => return Err(error),
        };
        for disk in &manifest.disks {
            if seen.insert(disk.target.clone()) && disk.tracked {
                needed.extend(manifest.checkpoint.clone());
            }
        }
    }
    Ok(needed)
}

/// Gives up whatever interrupted backups of a domain have left, in the repository and with the domain.
///
/// # Errors
/// `Busy` while a backup is under way; what deleting a snapshot meets.
pub async fn abandon(of: Subject<'_>, repository: &Repository, watcher: &dyn Watcher) -> Result<Vec<String>> {
    let Some(folder) = repository.folder(&of.domain.id).await? else {
        return Ok(Vec::new());
    };
    let _lock = repository.lock(&folder, false).await?;
    let mut live = Live::new(of);
    live.catch_up().await?;
    let unfinished = repository.unfinished(&folder).await?;
    for point in &unfinished {
        abandon_point(&mut live, repository, &folder, point).await?;
    }
    tidy(&mut live, repository, &folder, None, watcher).await?;
    Ok(unfinished)
}
