//! Whether a disk's image is to be full or an increment: decided with the snapshot at hand, and told why.

use std::sync::Arc;
use std::time::SystemTime;

use disksnap::{CheckpointName, Error, ErrorKind, Result, SnapshotName};

use crate::create::Live;
use crate::journal::Planned;
use crate::source::Source;
use crate::{ChainReader, DomainFolder, Layer, Level, Manifest, Repository, Store, WantedLevel, spot};

/// A disk that is open for pulling.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) source: Source,
    pub(crate) planned: Planned,
    /// The chain that an increment is over, the newest image first; none for a full image.
    pub(crate) below: Vec<Layer>,
}

/// What an increment could be over.
#[derive(Debug)]
pub(crate) struct Parent {
    pub(crate) point: String,
    /// The instant of its snapshot.
    pub(crate) created: SystemTime,
    pub(crate) checkpoint: CheckpointName,
    pub(crate) chain: Vec<Layer>,
}

/// Opens a disk of a snapshot for what its image is to hold: what was planned before, or what is possible now.
pub(crate) async fn open(
    live: &Live<'_>,
    repository: &Repository,
    folder: &DomainFolder,
    snapshot: &SnapshotName,
    target: &str,
    planned: Option<Planned>,
    wanted: WantedLevel,
) -> Result<Opened> {
    let whole = async |why_full: Option<String>| {
        let reader = live.of.disksnap.read(&live.domain, snapshot, target).await?;
        Ok(Opened {
            source: Source::Snapshot(Box::new(reader)),
            planned: Planned {
                level: Level::Full,
                parent: None,
                why_full,
            },
            below: Vec::new(),
        })
    };
    if let Some(Planned {
        level: Level::Full,
        why_full,
        ..
    }) = &planned
    {
        return whole(why_full.clone()).await;
    }
    if planned.is_none() && wanted == WantedLevel::Full {
        return whole(None).await;
    }
    let parent = match parent(repository, folder, target).await? {
        Ok(parent) if planned.as_ref().is_none_or(|planned| planned.is_over(&parent)) => parent,
        Ok(parent) => {
            let why = format!(
                "the disk's last point is {} now, and its increment was begun over another",
                parent.point
            );
            return not_possible(planned, wanted, why, whole).await;
        }
        Err(why) => return not_possible(planned, wanted, why, whole).await,
    };
    if let Some(why) = another_checkpoint(live, &parent).await? {
        return not_possible(planned, wanted, why, whole).await;
    }
    let since = live
        .of
        .disksnap
        .read_since(&live.domain, snapshot, target, &parent.checkpoint)
        .await;
    match since {
        Ok(reader) => {
            let source = Source::Snapshot(Box::new(reader));
            if let Some(why) = stranger(&**repository.store(), &parent, &source, planned.is_some()).await? {
                source.close().await?;
                return not_possible(planned, wanted, why, whole).await;
            }
            Ok(parent.opened(source))
        }
        Err(error) if tells_no_changes(&error) => {
            let why = format!(
                "what has changed since {} is not known: {}",
                parent.point,
                error.message()
            );
            not_possible(planned, wanted, why, whole).await
        }
        Err(error) => Err(error),
    }
}

impl Parent {
    /// An increment over it.
    pub(crate) fn opened(self, source: Source) -> Opened {
        Opened {
            source,
            planned: Planned {
                level: Level::Incremental,
                parent: Some((self.point, self.checkpoint)),
                why_full: None,
            },
            below: self.chain,
        }
    }
}

/// Why the domain's checkpoint of that name is not the one that began with the point, if it is not. Sets of checkpoints that were moved
/// know the second only.
async fn another_checkpoint(live: &Live<'_>, parent: &Parent) -> Result<Option<String>> {
    let lineage = live.dispatcher().checkpoints(&live.domain).await?;
    let Ok(known) = lineage.get(&parent.checkpoint) else {
        return Ok(None);
    };
    let second = |at: SystemTime| {
        at.duration_since(SystemTime::UNIX_EPOCH)
            .map(|since| since.as_secs())
    };
    let same = matches!((second(known.created), second(parent.created)), (Ok(a), Ok(b)) if a == b);
    Ok((!same).then(|| {
        format!(
            "the checkpoint '{}' is another one than that which began with {}",
            known.name, parent.point
        )
    }))
}

/// Why the disk is not the one that the point was taken of, if it is not. One that is gone on with was looked at when it was begun.
pub(crate) async fn stranger(
    store: &dyn Store,
    parent: &Parent,
    source: &Source,
    begun: bool,
) -> Result<Option<String>> {
    if begun {
        return Ok(None);
    }
    let (differ, looked) = spot::differing(store, &parent.chain, source).await?;
    Ok((differ > 0).then(|| {
        format!(
            "of {looked} places that are told as unchanged since {}, {differ} differ from it: it is another disk, or was written past its bitmaps",
            parent.point
        )
    }))
}

/// A full one where that may be, else an error.
async fn not_possible(
    planned: Option<Planned>,
    wanted: WantedLevel,
    why: String,
    whole: impl AsyncFnOnce(Option<String>) -> Result<Opened>,
) -> Result<Opened> {
    if planned.is_some() {
        // An increment was begun, and cannot be gone on with.
        return Err(Error::new(ErrorKind::Broken, why));
    }
    match wanted {
        WantedLevel::Incremental => Err(Error::new(
            ErrorKind::Unsupported,
            format!("no increment of the disk is possible: {why}"),
        )
        .hint("Ask for --level auto: it takes all of the disks that need it.")),
        WantedLevel::Auto | WantedLevel::Full => whole(Some(why)).await,
    }
}

/// The last point of a disk, if an increment can be over it; else why not.
pub(crate) async fn parent(
    repository: &Repository,
    folder: &DomainFolder,
    target: &str,
) -> Result<std::result::Result<Parent, String>> {
    let points = repository.points(folder).await?;
    if let Some(bad) = points.last().filter(|point| point.manifest.is_err()) {
        return Ok(Err(format!(
            "the manifest of the last point, {}, cannot be read",
            bad.name
        )));
    }
    let manifests = points.into_iter().rev().filter_map(|point| point.manifest.ok());
    let has = |manifest: &Manifest| manifest.disks.iter().any(|disk| disk.target == target);
    let Some(manifest) = manifests.into_iter().find(has) else {
        return Ok(Err("it is the first backup of the disk here".to_owned()));
    };
    let tracked = manifest
        .disks
        .iter()
        .any(|disk| disk.target == target && disk.tracked);
    let Some(checkpoint) = manifest.checkpoint.clone().filter(|_| tracked) else {
        return Ok(Err(format!(
            "no checkpoint began on the disk with {}",
            manifest.point
        )));
    };
    let chain = async {
        let chain = repository.chain(folder, &manifest, target).await?;
        // Nobody wants an increment over images that are not there: their heads and all their digests are looked at.
        ChainReader::open(Arc::clone(repository.store()), &chain).await?;
        Ok::<_, Error>(chain)
    };
    match chain.await {
        Ok(chain) => Ok(Ok(Parent {
            point: manifest.point,
            created: manifest.created,
            checkpoint,
            chain,
        })),
        Err(error) if matches!(error.kind(), ErrorKind::Broken | ErrorKind::NotFound) => Ok(Err(format!(
            "the chain of {} is not whole: {}",
            manifest.point,
            error.message()
        ))),
        Err(error) => Err(error),
    }
}

/// Whether an error says that it is not known what has changed, rather than that the snapshot cannot be read.
fn tells_no_changes(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::Broken | ErrorKind::Unsupported | ErrorKind::Invalid
    )
}
