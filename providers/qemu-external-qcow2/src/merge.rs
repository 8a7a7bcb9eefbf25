//! Giving a snapshot up: what its overlay holds goes into the base, and the domain's disk stands on the base again.

mod live;
mod off;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Affected, Command, Disk, Error, ErrorKind, Host, Merge, Peer, Progress, Result, SnapshotId, Unit,
};
use disksnap_hypervisor::{Graph, jobs};
use disksnap_image_file::remove_file;
use serde_json::json;

use crate::busy;
use crate::layer::{self, Layer, Stamp, disk_of, unfit};
use crate::place::{Place, graph_of, nodes_of};
use crate::record::{Kin, Record};
use crate::stream::ExternalStream;
use crate::touched;

/// What merges. It has no state: everything is found by names and paths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExternalMerge;

/// How the domain's disk stands to a snapshot.
enum Standing {
    /// A hypervisor has the overlay in the disk's chain.
    Live(Live),
    /// The domain is off, and its disk's chain has the overlay.
    Off {
        /// The chain, the top image first.
        layers: Vec<Layer>,
        /// Where in it the overlay is.
        at: usize,
    },
    /// The disk does not stand on the snapshot (any more).
    Loose {
        /// Its chain, where it is known.
        layers: Vec<Layer>,
        /// It did, and was merged.
        merged: bool,
        /// The block graph, where a hypervisor runs.
        graph: Option<Graph>,
    },
}

/// An overlay in a running disk's chain.
pub(crate) struct Live {
    pub(crate) graph: Graph,
    pub(crate) place: Place,
    /// Which of the place's layers it is; the base is the next.
    pub(crate) at: usize,
}

impl Standing {
    async fn of(host: &dyn Host, record: &Record) -> Result<Self> {
        let active = host.state().await?.is_active();
        let Ok(disk) = host.domain().disk(&record.target) else {
            return Self::unknown(host, active).await;
        };
        let Some(overlay) = &record.overlay else {
            return Self::unknown(host, active).await;
        };
        if active {
            let graph = Graph::read(host).await?;
            let place = find(&graph, disk, record, overlay)?;
            return match place.position(overlay) {
                Some(at)
                    if place
                        .layers
                        .get(at + 1)
                        .is_some_and(|l| l.layer.is_at(&record.base.path)) =>
                {
                    Ok(Self::Live(Live { graph, place, at }))
                }
                Some(_) => Err(unfit(
                    "in the hypervisor the overlay stands on another image than in the record",
                )),
                None => {
                    // After a merge the overlay is still open, where the hypervisor was told to open it; after a start from an
                    // old document it is not.
                    let open = !nodes_of(&graph, overlay).is_empty();
                    Self::loose(record, place.images(), open, Some(graph))
                }
            };
        }
        let layers = layer::chain_of(disk)?;
        match layers.iter().position(|l| l.is_at(overlay)) {
            Some(at) => Ok(Self::Off { layers, at }),
            None => Self::loose(record, layers, false, None),
        }
    }

    /// Nothing of the disk's chain belongs to it.
    async fn unknown(host: &dyn Host, active: bool) -> Result<Self> {
        Ok(Self::Loose {
            layers: Vec::new(),
            merged: false,
            graph: graph_of(host, active).await?,
        })
    }

    fn loose(record: &Record, layers: Vec<Layer>, open: bool, graph: Option<Graph>) -> Result<Self> {
        let on_base = layers.first().is_some_and(|top| top.is_at(&record.base.path));
        let merged = match &record.overlay {
            Some(overlay) => open || !overlay.exists() || off::is_marked(overlay)?,
            None => false,
        };
        if let Some(overlay) = record.overlay.as_ref().filter(|_| on_base && !merged) {
            return Err(Error::new(
                ErrorKind::Broken,
                format!(
                    "the domain's disk is {} itself, as an old document says, while {} holds what was written after the \
                     snapshot",
                    record.base.path.display(),
                    overlay.display()
                ),
            )
            .hint("Start the domain from the document that names the overlay; or remove the overlay, and with it what \
                   it holds, and try again."));
        }
        Ok(Self::Loose {
            layers,
            merged,
            graph,
        })
    }
}

/// The disk as it is now: before and after a merge it is the same one, whatever image the document names. An overlay
/// that is merged is open still, but nothing uses it.
pub(crate) fn find(graph: &Graph, disk: &Disk, record: &Record, overlay: &Path) -> Result<Place> {
    let on = |layer: &Layer| Place::find(graph, &disk_of(disk, std::slice::from_ref(layer)));
    let found = Place::find(graph, disk);
    if found.as_ref().is_ok_and(|place| place.is_used) {
        return found;
    }
    let others = [on(&Layer::new(overlay, "qcow2")), on(&record.base)];
    let mut others: Vec<Place> = others.into_iter().flatten().collect();
    match others.iter().position(|place| place.is_used) {
        Some(used) => Ok(others.swap_remove(used)),
        None => found.or_else(|error| others.into_iter().next().ok_or(error)),
    }
}

#[async_trait]
impl Merge for ExternalMerge {
    fn stream(&self) -> Option<Arc<dyn Merge>> {
        Some(Arc::new(ExternalStream))
    }

    async fn check(&self, host: &dyn Host, _: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active() && live::is_under_way(host, &record).await? {
            return Ok(());
        }
        let kin = Kin::of(&record.target, peers)?;
        checked(host, &record, &kin).await.map(drop)
    }

    async fn start(&self, host: &dyn Host, _: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()> {
        let record = Record::of(unit)?;
        let kin = Kin::of(&record.target, peers)?;
        if host.state().await?.is_active() {
            if live::is_under_way(host, &record).await? {
                return Ok(());
            }
            // Before the graph is read: what a failed attempt has left of its job must not be seen there.
            jobs::end(host, &record.names().merge()).await?;
        }
        match checked(host, &record, &kin).await? {
            Standing::Live(live) => {
                touch(&kin, &live.place.images(), live.at)?;
                live::start(host, &record, &live).await
            }
            Standing::Off { layers, at } => touch(&kin, &layers, at),
            Standing::Loose { .. } => Ok(()),
        }
    }

    async fn progress(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Progress> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active()
            && let Some(progress) = live::progress(host, &record).await?
        {
            return Ok(progress);
        }
        match Standing::of(host, &record).await? {
            Standing::Loose { .. } => Ok(Progress::Finished),
            Standing::Off { .. } => off::progress(&record),
            Standing::Live(_) => Ok(Progress::Idle),
        }
    }

    async fn finish(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active() && live::is_under_way(host, &record).await? {
            live::end(host, &record).await?;
        }
        match Standing::of(host, &record).await? {
            Standing::Loose { .. } => Ok(()),
            Standing::Off { layers, at } => off::finish(&record, &layers, at).await,
            Standing::Live(live) => live::finish(host, &record, &live).await,
        }
    }

    fn release(&self, _: SnapshotId, unit: &Unit) -> Vec<Command> {
        let job = Record::of(unit).map(|record| record.names().merge());
        job.map_or_else(
            |_| Vec::new(),
            |id| vec![Command::new("job-cancel", json!({ "id": id }))],
        )
    }

    async fn cancel(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let record = Record::of(unit)?;
        if host.state().await?.is_active() {
            live::cancel(host, &record).await?;
        }
        let (layers, at) = match Standing::of(host, &record).await {
            Ok(Standing::Live(live)) => (live.place.images(), live.at),
            Ok(Standing::Off { layers, at }) => (layers, at),
            // Nothing above it names it.
            Ok(Standing::Loose { .. }) | Err(_) => return Ok(()),
        };
        let above = at.checked_sub(1).and_then(|above| layers.get(above));
        above.map_or(Ok(()), |above| touched::end(&above.path))
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
        live::end(host, &record).await?;
        let (layers, graph) = match Standing::of(host, &record).await? {
            Standing::Loose {
                layers,
                merged,
                graph,
            } => {
                refuse_readers(&record, &kin, merged)?;
                (layers, graph)
            }
            Standing::Off { mut layers, at } => {
                if off::progress(&record)? != Progress::Finished {
                    return Err(not_merged());
                }
                layers.remove(at);
                (layers, None)
            }
            Standing::Live(_) => return Err(not_merged()),
        };
        tidy(host, &record, graph.as_ref()).await?;
        affected(host, unit, &record, &kin, layers)
    }
}

/// How the disk stands to the snapshot, once all was asked that stands against merging it. Changes nothing.
async fn checked(host: &dyn Host, record: &Record, kin: &[Kin]) -> Result<Standing> {
    let standing = Standing::of(host, record).await?;
    match &standing {
        Standing::Loose { merged, .. } => refuse_readers(record, kin, *merged)?,
        Standing::Off { layers, .. } => {
            refuse_standing_elsewhere(record, kin, layers)?;
            refuse_without_base(record)?;
            crate::qemu_img::program()?;
        }
        Standing::Live(live) => {
            refuse_standing_elsewhere(record, kin, &live.place.images())?;
            refuse_without_base(record)?;
            live::check(live)?;
        }
    }
    Ok(standing)
}

fn not_merged() -> Error {
    Error::new(ErrorKind::Internal, "the disk still stands on the snapshot")
}

/// Says beside the image above the overlay that its header is going to name another one, where a snapshot is read from it: QEMU
/// writes its bitmaps anew with that, and the file may grow.
fn touch(kin: &[Kin], layers: &[Layer], at: usize) -> Result<()> {
    let above = at.checked_sub(1).and_then(|above| layers.get(above));
    match above {
        Some(above) if kin.iter().any(|peer| peer.record.base.is_at(&above.path)) => {
            touched::begin(&above.path)
        }
        _ => Ok(()),
    }
}

/// What is left of a snapshot that nothing stands on: idempotent.
pub(crate) async fn delete(host: &dyn Host, record: &Record) -> Result<()> {
    live::end(host, record).await?;
    match Standing::of(host, record).await? {
        Standing::Loose { graph, .. } => tidy(host, record, graph.as_ref()).await,
        Standing::Off { .. } if off::progress(record)? == Progress::Finished => {
            tidy(host, record, None).await
        }
        _ => Err(busy(
            "the domain's disk stands on the snapshot",
            "Merge it: `disksnap snapshot merge`.",
        )),
    }
}

/// Removes the overlay's nodes and file, and a base that nothing else needs. Idempotent.
async fn tidy(host: &dyn Host, record: &Record, graph: Option<&Graph>) -> Result<()> {
    let mut nodes = Vec::new();
    if let Some(graph) = graph {
        live::name_base(host, graph, record).await?;
        nodes.extend(record.overlay.iter().flat_map(|overlay| nodes_of(graph, overlay)));
    }
    if let Some(overlay) = &record.overlay {
        // The file first: an open node without a file says that the merge had ended.
        remove_file(overlay)?;
        off::unmark(overlay)?;
        touched::forget(overlay)?;
        live::remove_nodes(host, nodes).await?;
    } else if record.orphan {
        remove_file(&record.base.path)?;
    }
    touched::forget(&record.base.path)
}

/// The peers whose records change with a merge, and the disk as the domain uses it from then on.
fn affected(
    host: &dyn Host,
    unit: &Unit,
    record: &Record,
    kin: &[Kin],
    mut layers: Vec<Layer>,
) -> Result<Affected> {
    let template = host.domain().disk(&record.target).ok();
    let template = template.or(unit.disks.first().and_then(|d| d.modified.as_ref()));
    let mut affected = Affected::default();
    let (Some(disk), Some(overlay)) = (template, &record.overlay) else {
        return Ok(affected);
    };
    for peer in kin {
        let mut changed = peer.record.clone();
        if changed.base.is_at(overlay) {
            // What it was read from is in the base now.
            changed.base = record.base.clone();
            changed.below.clone_from(&record.below);
            changed.stamp = Stamp::of(&changed.base.path)?.map(|stamp| stamp.like(record.stamp.as_ref()));
            let data = changed.base.data.as_deref().map(Stamp::of).transpose()?.flatten();
            changed.data_stamp = data.map(|stamp| stamp.like(record.data_stamp.as_ref()));
        }
        if changed.below.first().is_some_and(|layer| layer.is_at(overlay)) {
            // The header of its base names the layer below it, which is another now.
            touched::end(&changed.base.path)?;
            changed.stamp = touched::renewed(&changed.base.path, changed.stamp)?;
        }
        changed.below.retain(|layer| !layer.is_at(overlay));
        affected.peers.extend(peer.changed(&changed, disk)?);
    }
    layers.retain(|layer| !layer.is_at(overlay));
    if !layers.is_empty() {
        affected.disks.push(disk_of(disk, &layers));
    }
    Ok(affected)
}

/// What is merged must go somewhere that stays.
fn refuse_without_base(record: &Record) -> Result<()> {
    let base = &record.base.path;
    if record.base.remote().is_none() && !base.exists() {
        return Err(Error::new(
            ErrorKind::Broken,
            format!("{} is gone: there is nothing to merge into", base.display()),
        )
        .hint("If the domain runs, copy its disk before it ends: the hypervisor still has the file open."));
    }
    Ok(())
}

/// Snapshots that read the base by another way than through the overlay would change with it.
fn refuse_standing_elsewhere(record: &Record, kin: &[Kin], chain: &[Layer]) -> Result<()> {
    let Some(overlay) = &record.overlay else {
        return Ok(());
    };
    let in_chain = |layer: &Layer| chain.iter().any(|l| l.is_at(&layer.path));
    for peer in kin {
        let reads = |path: &Path| peer.record.files().any(|l| l.is_at(path));
        let concerned = reads(&record.base.path) || reads(overlay);
        let through = reads(overlay) && in_chain(&peer.record.base);
        if concerned && !through {
            return Err(stands(peer, &record.base));
        }
    }
    Ok(())
}

/// Snapshots that stand on what goes with this one.
fn refuse_readers(record: &Record, kin: &[Kin], merged: bool) -> Result<()> {
    let goes = |layer: &Layer| match &record.overlay {
        // What was merged is read from the base from now on.
        Some(overlay) => !merged && layer.is_at(overlay),
        None => record.orphan && layer.is_at(&record.base.path),
    };
    match kin.iter().find(|peer| peer.record.files().any(goes)) {
        None => Ok(()),
        Some(peer) => Err(stands(peer, &record.base)),
    }
}

fn stands(peer: &Kin, base: &Layer) -> Error {
    busy(
        format!(
            "the snapshot {} stands on {} too, and would be destroyed",
            peer.snapshot,
            base.path.display()
        ),
        "Delete that snapshot first: it is read from the same image.",
    )
}
