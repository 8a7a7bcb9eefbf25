//! Freeing the domain's disk of a snapshot: the snapshot's data goes up into the overlay, which stands from then on on
//! what was below the snapshot. The snapshot's image is not written to, and remains.

mod live;
mod off;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Affected, Command, Disk, Error, ErrorKind, Host, Merge, Peer, Progress, Result, SnapshotId, Unit,
};
use disksnap_hypervisor::{Graph, jobs};
use disksnap_image_file::room;

use crate::image::is_named_here;
use crate::layer::{self, Layer, below_by_header, disk_of, unfit};
use crate::merge::{Live, find};
use crate::record::{Kin, Record};
use crate::revert::overlays;
use crate::touched;

/// What streams. It has no state: everything is found by names and paths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExternalStream;

/// How the domain's disk stands to a snapshot.
enum Standing {
    /// A hypervisor has the overlay in the disk's chain, on the snapshot's base.
    Live(Live),
    /// The domain is off, and its disk's chain has the overlay, on the snapshot's base.
    Off {
        /// The chain, the top image first.
        layers: Vec<Layer>,
        /// Where in it the overlay is.
        at: usize,
    },
    /// The chain has the overlay, and below it what was below the snapshot.
    Done {
        /// The chain.
        layers: Vec<Layer>,
        /// The disk in a hypervisor that runs.
        live: Option<Live>,
    },
    /// The snapshot stands by itself.
    Loose,
}

impl Standing {
    async fn of(host: &dyn Host, record: &Record) -> Result<Self> {
        let Some(overlay) = &record.overlay else {
            return Ok(Self::Loose);
        };
        let disk = host.domain().disk(&record.target)?;
        if !host.state().await?.is_active() {
            return Self::off(record, disk, overlay);
        }
        let graph = Graph::read(host).await?;
        let place = find(&graph, disk, record, overlay)?;
        let at = place.position(overlay).ok_or_else(elsewhere)?;
        let layers = place.images();
        if layers.get(at + 1).is_some_and(|l| l.is_at(&record.base.path)) {
            return Ok(Self::Live(Live { graph, place, at }));
        }
        if !is_below(record, layers.get(at + 1)) {
            return Err(elsewhere());
        }
        let live = Some(Live { graph, place, at });
        Ok(Self::Done { layers, live })
    }

    /// What the overlay's own header says counts: an old document may still name the base below it.
    fn off(record: &Record, disk: &Disk, overlay: &Path) -> Result<Self> {
        let mut layers = layer::chain_of(disk)?;
        let at = layers
            .iter()
            .position(|l| l.is_at(overlay))
            .ok_or_else(elsewhere)?;
        let below = below_by_header(&layers[at]).map_err(unfit)?;
        if below.as_ref().is_some_and(|l| l.is_at(&record.base.path)) {
            return Ok(Self::Off { layers, at });
        }
        if !is_below(record, below.as_ref()) {
            return Err(elsewhere());
        }
        layers.truncate(at + 1);
        layers.extend(record.below.iter().cloned());
        Ok(Self::Done { layers, live: None })
    }
}

/// Whether this is what is below the snapshot's base.
fn is_below(record: &Record, layer: Option<&Layer>) -> bool {
    match (record.below.first(), layer) {
        (None, None) => true,
        (Some(known), Some(found)) => found.is_at(&known.path),
        _ => false,
    }
}

fn elsewhere() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "the domain's disk does not stand on the snapshot as it is recorded",
    )
    .hint("Bring the document up to date with `disksnap domain update`.")
}

#[async_trait]
impl Merge for ExternalStream {
    fn stream(&self) -> Option<Arc<dyn Merge>> {
        None
    }

    async fn check(&self, host: &dyn Host, _: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<()> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active() && live::is_under_way(host, &record.names().stream()).await? {
            return Ok(());
        }
        checked(host, &record).await.map(drop)
    }

    async fn start(&self, host: &dyn Host, _: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()> {
        let record = Record::of(unit)?;
        let kin = Kin::of(&record.target, peers)?;
        let job = record.names().stream();
        if host.state().await?.is_active() {
            if live::is_under_way(host, &job).await? {
                return Ok(());
            }
            // What a failed attempt has left.
            jobs::end(host, &job).await?;
        }
        match checked(host, &record).await? {
            Standing::Live(live) => {
                touch(&record, &kin)?;
                live::start(host, &record, &live).await
            }
            Standing::Off { .. } => touch(&record, &kin),
            Standing::Done { .. } | Standing::Loose => Ok(()),
        }
    }

    async fn progress(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Progress> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active()
            && let Some(progress) = live::progress(host, &record.names().stream()).await?
        {
            return Ok(progress);
        }
        Ok(match Standing::of(host, &record).await? {
            Standing::Live(_) => Progress::Idle,
            Standing::Off { .. } => Progress::Ready,
            Standing::Done { .. } | Standing::Loose => Progress::Finished,
        })
    }

    async fn finish(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let record = Record::of(unit)?;
        match Standing::of(host, &record).await? {
            Standing::Live(live) => {
                live::finish(host, &record, &live).await?;
                // The header as soon as can be: a domain might be started from it.
                match Standing::of(host, &record).await? {
                    Standing::Done { live: Some(live), .. } => live::conclude(host, &record, &live).await,
                    Standing::Live(_) => Err(Error::new(
                        ErrorKind::Refused,
                        "the merge failed: QEMU could not bring it to its end",
                    )),
                    _ => Ok(()),
                }
            }
            Standing::Off { layers, at } => off::finish(&layers, at).await,
            Standing::Done { .. } | Standing::Loose => Ok(()),
        }
    }

    /// The guest's disk never stands still for a stream.
    fn release(&self, _: SnapshotId, _: &Unit) -> Vec<Command> {
        Vec::new()
    }

    async fn cancel(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active() {
            jobs::end(host, &record.names().stream()).await?;
        }
        record.overlay.as_deref().map_or(Ok(()), touched::end)
    }

    async fn conclude(
        &self,
        host: &dyn Host,
        _: SnapshotId,
        unit: &Unit,
        peers: &[Peer],
    ) -> Result<Affected> {
        let record = Record::of(unit)?;
        let kin = Kin::of(&record.target, peers)?;
        match (Standing::of(host, &record).await?, &record.overlay) {
            (Standing::Done { layers, live }, Some(overlay)) => {
                match live {
                    Some(live) => live::conclude(host, &record, &live).await?,
                    None => off::conclude(&layers, overlay).await?,
                }
                touched::end(overlay)?;
                affected(host, &record, &kin, &layers, overlay)
            }
            (Standing::Loose, _) => Ok(Affected {
                unit: Some(unit.clone()),
                ..Affected::default()
            }),
            _ => Err(Error::new(
                ErrorKind::Internal,
                "the overlay still stands on the snapshot",
            )),
        }
    }
}

/// How the disk stands to the snapshot, once all was asked that stands against freeing it. Changes nothing.
async fn checked(host: &dyn Host, record: &Record) -> Result<Standing> {
    let standing = Standing::of(host, record).await?;
    match &standing {
        Standing::Live(Live { graph, place, .. }) => {
            refuse_without_room(record)?;
            place.refuse_busy(graph)?;
        }
        Standing::Off { layers, .. } => {
            refuse_without_room(record)?;
            refuse_in_use(record, layers)?;
            crate::qemu_img::program()?;
        }
        Standing::Done { .. } | Standing::Loose => {}
    }
    Ok(standing)
}

/// Says beside the overlay that a stream is going to write to it, where a snapshot is read from it.
fn touch(record: &Record, kin: &[Kin]) -> Result<()> {
    match &record.overlay {
        Some(overlay) if kin.iter().any(|peer| peer.record.base.is_at(overlay)) => touched::begin(overlay),
        _ => Ok(()),
    }
}

/// The guest's own writes would fail on a file system that a stream has filled.
fn refuse_without_room(record: &Record) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let Some(dir) = record.overlay.as_ref().and_then(|overlay| overlay.parent()) else {
        return Ok(());
    };
    // Of an image that is gone, and is open in the hypervisor still, nothing is known.
    let held = std::fs::metadata(&record.base.path);
    let held = held.map_or(0, |m| if m.is_file() { m.blocks() * 512 } else { 0 });
    let free = room(dir).map_err(|e| Error::io(format!("cannot look at {}", dir.display()), e))?;
    if free >= held {
        return Ok(());
    }
    let message = format!(
        "{} holds {} MiB, and only {} MiB are free in {}",
        record.base.path.display(),
        held >> 20,
        free >> 20,
        dir.display()
    );
    Err(Error::new(ErrorKind::NoSpace, message)
        .hint("Free some space; or merge the other way, which needs none (--into base)."))
}

/// With the domain off nobody may have the overlay open.
fn refuse_in_use(record: &Record, layers: &[Layer]) -> Result<()> {
    let top = layers.first().map(|layer| layer.path.as_path());
    let images = top.into_iter().chain(record.overlay.as_deref());
    match images.into_iter().find(|image| layer::is_in_use(image)) {
        None => Ok(()),
        Some(image) => Err(layer::in_use(image)),
    }
}

/// The snapshot by itself, the peers whose chains no longer hold its base, and the disk's chain without it.
fn affected(
    host: &dyn Host,
    record: &Record,
    kin: &[Kin],
    layers: &[Layer],
    overlay: &Path,
) -> Result<Affected> {
    let disk = host.domain().disk(&record.target)?;
    let base = &record.base;
    let ours = overlays(record, kin);
    let alone = Record {
        overlay: None,
        streamed: Some(overlay.to_owned()),
        orphan: is_named_here(&base.path) || ours.iter().any(|path| base.is_at(path)),
        ..record.clone()
    };
    let mut affected = Affected {
        unit: Some(alone.unit(disk)?),
        disks: vec![disk_of(disk, layers)],
        ..Affected::default()
    };
    if !alone.orphan {
        affected.warnings.push(format!(
            "{}: only the snapshot needs {} now; that image was not made by disksnap, and stays where it is when the \
             snapshot is deleted",
            record.target,
            base.path.display()
        ));
    }
    for peer in kin {
        let mut changed = peer.record.clone();
        if changed.base.is_at(overlay) {
            changed.stamp = touched::renewed(overlay, changed.stamp)?;
        }
        if changed.overlay.as_ref().is_some_and(|path| base.is_at(path)) {
            // It was what stood on that one, and the overlay does now.
            changed.overlay = Some(overlay.to_owned());
        }
        let chain: Vec<Layer> = changed.files().cloned().collect();
        let on_overlay = |n: usize| n > 0 && chain[n - 1].is_at(overlay) && chain[n].is_at(&base.path);
        if let Some(n) = (0..chain.len()).find(|n| on_overlay(*n)) {
            changed.below.remove(n - 1);
        }
        affected.peers.extend(peer.changed(&changed, disk)?);
    }
    Ok(affected)
}
