//! Making an overlay and putting it on top of a disk; taking that back.

use disksnap_core::{
    Batch, Command, Disk, DiskRequest, Error, ErrorKind, Host, Owner, Result, RunState, SnapshotId, TakePlan,
};
use disksnap_hypervisor::{Graph, jobs};
use disksnap_image_file::{MadeFile, qcow2_holds_data};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::image::{CALLED, fill_in, locate};
use crate::layer::{self, Layer, Stamp, unfit};
use crate::names::Names;
use crate::place::{self, Place, nodes_of};
use crate::qemu_img;
use crate::record::Record;

/// How one disk is going to be snapshotted; what `prepare` returns and everything up to `complete` gets back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Choice {
    pub(crate) id: SnapshotId,
    pub(crate) target: String,
    /// The domain's disk, as the request has it.
    pub(crate) disk: Disk,
    /// The disk's images, the top one first.
    pub(crate) layers: Vec<Layer>,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    pub(crate) image: MadeFile,
    /// Where the overlay goes in the hypervisor; `None` with the domain off.
    pub(crate) seat: Option<Seat>,
    /// The document is from before another overlay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) stale: bool,
}

/// Where an overlay goes in the block graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seat {
    /// The node that it goes on top of.
    pub(crate) node: String,
    /// The node of the format below, where the bitmaps are.
    pub(crate) format: String,
    /// `direct` and `no-flush` of the image's cache mode.
    cache: (bool, bool),
    detect_zeroes: String,
    /// Name, granularity and persistence of the bitmaps that record.
    bitmaps: Vec<(String, u64, bool)>,
}

impl Choice {
    pub(crate) fn names(&self) -> Names {
        Names::new(self.id, &self.target)
    }

    /// The image that becomes the snapshot.
    pub(crate) fn base(&self) -> Result<&Layer> {
        self.layers
            .first()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the record of a snapshot has no base"))
    }
}

/// The choice for each disk in order, or why it cannot be snapshotted. Reads everything, changes nothing.
pub(crate) async fn choose(
    host: &dyn Host,
    id: SnapshotId,
    disks: &[DiskRequest],
) -> Result<Vec<std::result::Result<Choice, Error>>> {
    let images: Vec<MadeFile> = disks
        .iter()
        .map(|request| locate(host, id, request))
        .collect::<Result<_>>()?;
    let state = host.state().await?;
    let graph = place::graph_of(host, state.is_active()).await?;
    let mut all = Vec::with_capacity(disks.len());
    for (request, image) in disks.iter().zip(images) {
        all.push(match &graph {
            Some(graph) => choose_live(host, &state, graph, id, request, image).await,
            None => choose_off(id, request, image).await,
        });
    }
    Ok(all)
}

/// What stands against an overlay whether the domain runs or not.
fn refuse(disk: &Disk) -> Result<()> {
    if disk.encrypted {
        return Err(place::encrypted());
    }
    if disk.shareable {
        return Err(unfit(
            "other domains may write to the disk, and would go on writing to its base",
        ));
    }
    if disk.read_only {
        return Err(unfit("the disk is read-only: it does not change"));
    }
    Ok(())
}

async fn choose_live(
    host: &dyn Host,
    state: &RunState,
    graph: &Graph,
    id: SnapshotId,
    request: &DiskRequest,
    image: MadeFile,
) -> Result<Choice> {
    let disk = &request.disk;
    refuse(disk)?;
    let place = Place::find(graph, disk)?;
    place.refuse_unless_movable(host, graph, state).await?;
    place.refuse_busy(graph)?;
    let [top, ..] = place.layers.as_slice() else {
        return Err(unfit("the disk has no image"));
    };
    let info = |key: &str| {
        graph
            .node(&top.format)
            .map_or(Value::Null, |n| n.info[key].clone())
    };
    let (cache, zeroes) = (info("cache"), info("detect_zeroes"));
    let bitmaps = place::recording(graph, top);
    let named = disk.source.as_ref().and_then(|source| source.path());
    Ok(Choice {
        id,
        target: disk.target.clone(),
        disk: disk.clone(),
        size: graph.node(&top.node).map_or(0, |n| n.size),
        stale: named.is_some_and(|path| !top.layer.is_at(path)),
        seat: Some(Seat {
            node: top.node.clone(),
            format: top.format.clone(),
            cache: (cache["direct"] == true, cache["no-flush"] == true),
            detect_zeroes: zeroes.as_str().unwrap_or("off").to_owned(),
            bitmaps: bitmaps
                .into_iter()
                .map(|b| (b.name, b.granularity, b.persistent))
                .collect(),
        }),
        layers: place.images(),
        image,
    })
}

async fn choose_off(id: SnapshotId, request: &DiskRequest, image: MadeFile) -> Result<Choice> {
    let disk = &request.disk;
    refuse(disk)?;
    let layers = layer::chain_of(disk)?;
    let base = layers.first().ok_or_else(|| unfit("the disk has no image"))?;
    for layer in layers.iter().filter(|layer| layer.remote().is_none()) {
        if layer::is_encrypted(layer).map_err(unfit)? {
            return Err(place::encrypted());
        }
        layer.path.metadata().map_err(|e| {
            Error::io(format!("cannot look at the image {}", layer.path.display()), e)
                .with("disk", &disk.target)
        })?;
    }
    if layer::is_in_use(&base.path) {
        return Err(layer::in_use(&base.path));
    }
    let size = match base.remote() {
        Some(_) => qemu_img::size_of(base).await?,
        None => layer::size_of(base).map_err(unfit)?,
    };
    Ok(Choice {
        id,
        target: disk.target.clone(),
        disk: disk.clone(),
        size,
        layers,
        image,
        seat: None,
        stale: false,
    })
}

/// Makes the overlays of all disks, and opens them in the hypervisor that runs the domain.
pub(crate) async fn build(host: &dyn Host, choices: &[Choice]) -> Result<()> {
    let owner = host.image_owner().await?;
    for choice in choices {
        let base = choice.base()?;
        let owner = match choice.seat {
            Some(_) => owner,
            None => owner_of(base),
        };
        choice
            .image
            .create(CALLED, owner, |file| {
                fill_in(file, &choice.image.path, base, choice.size)
            })
            .map_err(|e| e.with("disk", &choice.target))?;
    }
    let seated = choices.iter().filter_map(|c| Some((c, c.seat.as_ref()?)));
    let (asked, commands): (Vec<&Choice>, Vec<Command>) = seated
        .map(|(choice, seat)| (choice, Command::new("blockdev-add", node(choice, seat))))
        .unzip();
    if commands.is_empty() {
        return Ok(());
    }
    let answers = host.monitor_each(commands).await?;
    for (choice, answer) in asked.into_iter().zip(answers) {
        answer.map_err(|e| explain_owner(e, owner).with("disk", &choice.target))?;
    }
    Ok(())
}

/// Who owns the base of a domain that is off, and will have to open the overlay too; nobody but root can give it.
fn owner_of(base: &Layer) -> Option<Owner> {
    use std::os::unix::fs::MetadataExt;
    let metadata = base.path.metadata().ok().filter(std::fs::Metadata::is_file)?;
    rustix::process::geteuid().is_root().then(|| Owner {
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

/// A QEMU that runs as somebody else opens the image, which is its own, but not every directory on the way.
fn explain_owner(error: Error, owner: Option<Owner>) -> Error {
    match owner {
        Some(Owner { uid, .. }) if error.message().contains("Permission denied") => error.hint(format!(
            "QEMU runs as the user {uid} and cannot reach the directory: name a place that it can (source.file=PATH)."
        )),
        _ => error,
    }
}

/// The overlay in the block graph, not yet above anything.
fn node(choice: &Choice, seat: &Seat) -> Value {
    let names = choice.names();
    let cache = json!({ "direct": seat.cache.0, "no-flush": seat.cache.1 });
    json!({
        "driver": "qcow2",
        "node-name": names.overlay(),
        "backing": null,
        "discard": "unmap",
        "detect-zeroes": seat.detect_zeroes,
        "cache": cache,
        "file": {
            "driver": "file",
            "node-name": names.file(),
            "filename": choice.image.path,
            "discard": "unmap",
            "cache": cache,
        },
    })
}

/// What fixes the instant of one disk: each bitmap that records goes on under its name on the overlay, from the
/// same instant on.
pub(crate) fn take(choice: &Choice) -> TakePlan {
    let Some(seat) = &choice.seat else {
        return TakePlan::Host;
    };
    let overlay = choice.names().overlay();
    let mut items: Vec<Value> = seat
        .bitmaps
        .iter()
        .map(|(name, granularity, persistent)| {
            json!({ "type": "block-dirty-bitmap-add", "data": {
                "node": overlay, "name": name, "granularity": granularity, "persistent": persistent,
            }})
        })
        .collect();
    items.push(json!({ "type": "blockdev-snapshot", "data": { "node": seat.node, "overlay": overlay } }));
    TakePlan::Atomic(Batch {
        execute: "transaction".to_owned(),
        list: "actions".to_owned(),
        items,
        // What the guest writes to the overlay must not be lost: abort commits it.
        undo: Vec::new(),
    })
}

/// With the domain off the instant is whenever nobody writes: it must still be off.
pub(crate) async fn take_off(host: &dyn Host) -> Result<()> {
    if host.state().await?.is_active() {
        return Err(Error::new(
            ErrorKind::Busy,
            "the domain was started while its snapshot was made",
        )
        .hint("Create the snapshot again: it will be taken of the running domain."));
    }
    Ok(())
}

/// The record of a snapshot that was taken.
pub(crate) async fn complete(host: &dyn Host, choice: &Choice) -> Result<Record> {
    let base = choice.base()?.clone();
    let mut stamp = Stamp::of(&base.path)?;
    if let Some(seat) = &choice.seat
        && will_be_written(host, &seat.format).await?
    {
        // Below a wrapper QEMU keeps the image open for writing, and writes its own metadata when it closes it.
        stamp = stamp.map(Stamp::timeless);
    }
    let data = base.data.as_deref().map(Stamp::of).transpose()?.flatten();
    // What stays open for writing may be written to, as its image may.
    let data_stamp = data.map(|data| data.like(stamp.as_ref()));
    choice.image.unmark()?;
    Ok(Record {
        id: choice.id,
        target: choice.target.clone(),
        base,
        below: choice.layers.get(1..).unwrap_or_default().to_vec(),
        overlay: Some(choice.image.path.clone()),
        orphan: false,
        streamed: None,
        data_stamp,
        size: choice.size,
        stamp,
    })
}

/// Whether QEMU has this node open for writing, and something to write into it when it closes it.
async fn will_be_written(host: &dyn Host, node: &str) -> Result<bool> {
    let nodes = host
        .monitor(Command::new("query-named-block-nodes", json!({ "flat": true })))
        .await?;
    let mut nodes = nodes.as_array().into_iter().flatten();
    let will = |n: &Value| {
        let bitmaps = n["dirty-bitmaps"].as_array().is_some_and(|all| !all.is_empty());
        let lazy = n["image"]["format-specific"]["data"]["lazy-refcounts"] == true;
        n["ro"] == false && (bitmaps || lazy)
    };
    Ok(nodes.any(|n| n["node-name"] == node && will(n)))
}

/// Undoes what a request has done to one disk, by its id and, where there is one, its record.
pub(crate) async fn abort(
    host: &dyn Host,
    id: SnapshotId,
    requests: &[DiskRequest],
    prepared: &[Choice],
) -> Result<()> {
    let state = host.state().await?;
    let graph = place::graph_of(host, state.is_active()).await?;
    for request in requests {
        let target = &request.disk.target;
        let known = prepared.iter().find(|choice| choice.target == *target);
        let image = match known {
            Some(choice) => choice.image.clone(),
            None => locate(host, id, request)?,
        };
        let undone = match &graph {
            Some(graph) => abort_live(host, graph, &Names::new(id, target), &image).await,
            None => abort_off(request, &image, known.is_some()).await,
        };
        undone.map_err(|e| e.with("disk", target))?;
        // What `prepare` answered was made by it.
        match known {
            Some(_) => image.remove()?,
            None => image.remove_if_ours()?,
        }
    }
    Ok(())
}

async fn abort_live(host: &dyn Host, graph: &Graph, names: &Names, image: &MadeFile) -> Result<()> {
    let overlay = names.overlay();
    if let Some(node) = graph.node(&overlay) {
        if node.backing().is_some() {
            take_back(host, graph, names).await?;
        } else {
            // The commit had ended, and nobody knew yet.
            jobs::end(host, &names.undo()).await?;
        }
        let delete = json!({ "node-name": overlay });
        return host.monitor(Command::new("blockdev-del", delete)).await.map(drop);
    }
    if let Some((node, _)) = nodes_of(graph, &image.path).first() {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("the domain was started again and has the overlay open (node '{node}')"),
        )
        .hint("Bring the domain's document back to the disk's former image, with the domain off."));
    }
    Ok(())
}

/// Commits the overlay of a snapshot that did not come to be: what the guest has written since the take stays.
///
/// The bitmaps of the base go on recording, so that they also hold what the commit writes: all that has changed.
async fn take_back(host: &dyn Host, graph: &Graph, names: &Names) -> Result<()> {
    let (overlay, job) = (names.overlay(), names.undo());
    if jobs::find(host, &job).await?.is_none_or(|job| job.has_ended()) {
        jobs::end(host, &job).await?;
        let base = graph.node(&overlay).and_then(|n| n.backing()).unwrap_or_default();
        let commit = json!({
            "job-id": job, "device": place::overlay_root(graph, &overlay), "top-node": overlay, "base-node": base,
            "auto-dismiss": false,
        });
        host.monitor(Command::new("block-commit", commit)).await?;
    }
    let settled = |job: &jobs::Job| job.status == "ready" || job.has_ended();
    if jobs::wait(host, &job, settled)
        .await?
        .is_some_and(|job| !job.has_ended())
    {
        // Refused when it has been told so before.
        let told = jobs::tell(host, &job, "job-complete").await;
        jobs::wait(host, &job, jobs::Job::has_ended).await?;
        drop(told);
    }
    match jobs::end(host, &job).await?.and_then(|job| job.error) {
        None => Ok(()),
        Some(error) => Err(Error::new(
            ErrorKind::Refused,
            format!("the overlay cannot be committed back: {error}"),
        )),
    }
}

/// What a hypervisor wrote to the overlay before it ended belongs to the disk: nobody was told of the overlay.
async fn abort_off(request: &DiskRequest, image: &MadeFile, was_prepared: bool) -> Result<()> {
    let ours = was_prepared || image.mark.as_ref().is_none_or(|mark| mark.exists());
    if !ours || !image.path.exists() {
        return Ok(());
    }
    let cannot = |e| Error::io(format!("cannot look at the overlay {}", image.path.display()), e);
    if !qcow2_holds_data(&image.path).map_err(cannot)? {
        return Ok(());
    }
    let chain = layer::chain_of(&request.disk)?;
    let time = |path: &std::path::Path| path.metadata().and_then(|m| m.modified());
    let base = chain.first().ok_or_else(|| unfit("the disk has no image"))?;
    if base.remote().is_none()
        && base.path.metadata().map_err(cannot)?.is_file()
        && time(&base.path).map_err(cannot)? > time(&image.path).map_err(cannot)?
    {
        // The domain has been started from its base since, and has gone on from there.
        return Ok(());
    }
    let mut layers = vec![Layer::new(&image.path, "qcow2")];
    layers.extend(chain);
    qemu_img::run(qemu_img::commit(&layers)).await.map(drop)
}
