//! A disk in the hypervisor that runs it: its chain of images as nodes, and where an overlay can go on top.

use std::path::Path;

use disksnap_core::{Command, Disk, DiskNode, Error, ErrorKind, Host, Result, RunState, Source};
use disksnap_hypervisor::Graph;
use disksnap_hypervisor::graph::{Bitmap, Node, same_file};
use serde_json::{Value, json};

use crate::layer::{self, Layer, unfit};
use crate::names::{FLEECES, OURS};
use crate::remote;

/// One image of a running disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveLayer {
    pub(crate) layer: Layer,
    /// The node that what is above it stands on: a wrapper, or the format.
    pub(crate) node: String,
    /// The node of its format, where bitmaps live.
    pub(crate) format: String,
}

/// A disk in the block graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The node that the guest's device, or the export, is attached to.
    pub(crate) root: String,
    /// Whether a device or an export is.
    pub(crate) is_used: bool,
    /// Its images, the top one first.
    pub(crate) layers: Vec<LiveLayer>,
    /// The nodes of all of them, filters and files included.
    pub(crate) nodes: Vec<String>,
}

impl Place {
    /// Finds a disk's chain as it is now; a document from before an overlay still tells which disk is meant.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` as [`Graph::root_of_disk`]; `Unsupported` for a chain whose images are not all files or
    /// devices of this host.
    pub(crate) fn find(graph: &Graph, disk: &Disk) -> Result<Self> {
        let found = graph.root_of_disk(disk)?;
        let by_device = found.device.is_some();
        let root = if by_device {
            found.top
        } else {
            // Known by its file alone, it may be what an overlay stands on.
            climb(graph, found.top)
        };
        let mut place = Self {
            layers: Vec::new(),
            nodes: Vec::new(),
            is_used: by_device || graph.exports.iter().any(|export| export.node == root),
            root: root.clone(),
        };
        let mut at = Some(root.as_str());
        while let Some(name) = at.filter(|name| place.layers.iter().all(|l| l.node != *name)) {
            at = place.push(graph, name, &disk.target)?;
        }
        if let (Some(top), Some(Source::File { file: path } | Source::Block { dev: path })) =
            (place.layers.first_mut(), &disk.source)
            && top.layer.is_at(path)
        {
            // The user's own name for it.
            top.layer.path.clone_from(path);
        }
        Ok(place)
    }

    /// Adds the image whose topmost node this is; answers with the node below it.
    fn push<'g>(&mut self, graph: &'g Graph, name: &'g str, target: &str) -> Result<Option<&'g str>> {
        let chain = graph.primary_chain(name);
        let gone = || Error::new(ErrorKind::NotFound, "a node of the disk has just gone").retryable(true);
        let (protocol, images) = chain.split_last().ok_or_else(gone)?;
        let images: Vec<&&Node> = images.iter().filter(|n| !n.is_filter()).collect();
        let format = images
            .iter()
            .find(|n| n.driver != "raw")
            .or(images.last())
            .map_or(*protocol, |n| **n);
        // Filters stay above an overlay, a wrapper below it.
        let node = images.first().map_or(*protocol, |n| **n);
        let odd = |why: String| Err(unfit(why).with("disk", target));
        let remote = (protocol.driver == "nbd").then(|| remote::uri_of(Path::new(&protocol.filename)));
        let path = match &protocol.path {
            None if let Some(uri) = remote.flatten() => uri.to_string().into(),
            Some(path) if path.is_absolute() && !path.starts_with("/dev/fdset") => path.clone(),
            _ => {
                return odd(format!(
                    "the image {} is no file or device that can be named on this host",
                    protocol.filename
                ));
            }
        };
        let driver = if format.name == protocol.name {
            "raw"
        } else {
            format.driver.as_str()
        };
        self.nodes.extend(chain.iter().map(|n| n.name.clone()));
        let mut layer = Layer::new(path, driver);
        if let Some(child) = format.children.iter().find(|c| c.role == "data-file") {
            let chain = graph.primary_chain(&child.node);
            let file = chain.last().and_then(|node| node.path.as_deref());
            let Some(file) = file.filter(|_| layer.remote().is_none()) else {
                return odd("its image keeps its data where no file of this host is".to_owned());
            };
            layer.data = Some(layer::same_data(&layer, file).map_err(|why| unfit(why).with("disk", target))?);
            self.nodes.extend(chain.iter().map(|n| n.name.clone()));
        }
        self.layers.push(LiveLayer {
            layer,
            node: node.name.clone(),
            format: format.name.clone(),
        });
        Ok(chain.into_iter().find_map(Node::backing))
    }

    /// Which layer the file at this path is.
    pub(crate) fn position(&self, path: &Path) -> Option<usize> {
        self.layers.iter().position(|l| l.layer.is_at(path))
    }

    /// The images alone.
    pub(crate) fn images(&self) -> Vec<Layer> {
        self.layers.iter().map(|l| l.layer.clone()).collect()
    }

    /// What brings the header of a layer right after a job has led it to another one below: QEMU takes the driver of the
    /// node below for the format, and writes `raw` for a qcow2 image behind a wrapper. `None` where it is right.
    ///
    /// `change-backing-file` in turn writes the image's own format, which is that of a qcow2 image below an overlay. QEMU
    /// takes it once no job has the disk any more.
    pub(crate) fn name_below(&self, image: usize, below: usize) -> Option<Command> {
        let (image, below) = (self.layers.get(image)?, self.layers.get(below)?);
        let wrapped = below.node != below.format && below.layer.format == "qcow2";
        wrapped.then(|| {
            let name = below.layer.name_from(&image.layer.path);
            let change =
                json!({ "device": self.root, "image-node-name": image.format, "backing-file": name });
            Command::new("change-backing-file", change)
        })
    }

    /// Refuses what works on the disk besides: a job, a fleecing snapshot, somebody else's overlay.
    pub(crate) fn refuse_busy(&self, graph: &Graph) -> Result<()> {
        let busy = |why: String| Err(Error::new(ErrorKind::Busy, why));
        if let Some(node) = self.nodes.iter().find(|name| name.starts_with(FLEECES)) {
            return busy(format!(
                "a fleecing snapshot is active on the disk (node '{node}')"
            ))
            .map_err(|e| e.hint("Delete that snapshot first: what it reads would be written to."));
        }
        if let Some(job) = graph.jobs_on(&self.nodes).next() {
            return busy(format!(
                "the block job '{}' ({}, {}) works on it",
                job.id, job.kind, job.status
            ))
            .map_err(|e| e.hint("Wait until the job has ended, or cancel it."));
        }
        let mut images = self.layers.iter().flat_map(|l| [&l.node, &l.format]);
        let own = |node: &Node| self.nodes.contains(&node.name) || is_overlay(&node.name);
        let other = images.find_map(|image| {
            let mut above = graph.parents(image);
            above.find(|(parent, role)| *role == "backing" && !own(parent))
        });
        match other {
            None => Ok(()),
            Some((node, _)) => busy(format!(
                "the node '{}' ({}) stands on one of its images",
                node.name, node.driver
            ))
            .map_err(|e| e.hint("End the snapshot or the job that it belongs to.")),
        }
    }

    /// Whether the guest's side may be moved onto an overlay, and back again by a commit.
    pub(crate) async fn refuse_unless_movable(
        &self,
        host: &dyn Host,
        graph: &Graph,
        state: &RunState,
    ) -> Result<()> {
        let Some(top) = self.layers.first() else {
            return Err(unfit("the disk has no image"));
        };
        let node = |name: &str| {
            graph.node(name).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "a node of the disk has just gone").retryable(true)
            })
        };
        let (image, format) = (node(&top.node)?, node(&top.format)?);
        if image.read_only || format.read_only {
            return Err(unfit("the disk is read-only: it does not change"));
        }
        if self
            .nodes
            .iter()
            .filter_map(|n| graph.node(n))
            .any(|n| n.encrypted)
        {
            return Err(encrypted());
        }
        if !matches!(top.layer.format.as_str(), "raw" | "qcow2") {
            return Err(unfit(format!("its image has the format {}", top.layer.format)));
        }
        if *state == RunState::Storage && top.layer.remote().is_some() {
            return Err(unfit(
                "it is an NBD export that a storage daemon has open: after a merge it could not be found again",
            ));
        }
        let whole = graph
            .primary_chain(&top.format)
            .last()
            .map_or(0, |n| n.size)
            .next_multiple_of(512);
        if image.size != format.size || (top.layer.format == "raw" && image.size != whole) {
            return Err(unfit("the guest sees only a part of its image"));
        }
        // The exports of a storage daemon may hold what a commit needs; devices never do.
        if *state == RunState::Storage && may_resize(host, &self.root).await? {
            return Err(unfit(
                "an export of it may resize the disk (as every writable FUSE export), and no overlay could ever be \
                 merged under that",
            )
            .hint("Export it otherwise (vhost-user-blk, NBD), or snapshot it with the storage daemon off."));
        }
        Ok(())
    }
}

/// What is encrypted must not come to rest in plain.
pub(crate) fn encrypted() -> Error {
    unfit("QEMU encrypts this disk, and an overlay would hold what the guest writes in plain")
        .hint("Use a method that copies the encrypted image as it is, or qemu-fleece.")
}

/// Brings what QEMU still has of an image in memory to its file: before a job is made final that leads the disk to it.
///
/// Jobs leave tables of a qcow2 image in QEMU's cache. A QEMU that is killed later would take them along, and with them
/// what was copied, when the image that it was copied from is out of the chain or removed.
pub(crate) async fn flush(host: &dyn Host, target: &str, layer: &LiveLayer) -> Result<()> {
    let node = DiskNode {
        target: target.to_owned(),
        node: layer.format.clone(),
    };
    disksnap_hypervisor::flush(host, &[node]).await
}

/// Whether a node is an overlay that this method has made and QEMU not been restarted since.
pub(crate) fn is_overlay(name: &str) -> bool {
    name.starts_with(OURS)
}

/// From a node up along the overlays of ours that stand on it, to the one that is used.
///
/// After a merge its overlay stands there still, and nothing uses it any more.
fn climb(graph: &Graph, from: String) -> String {
    let is_used = |name: &str| graph.exports.iter().any(|export| export.node == name);
    if is_used(&from) {
        return from;
    }
    let chain = graph.primary_chain(&from);
    let above = chain.iter().flat_map(|node| graph.parents(&node.name));
    let overlays = above.filter(|(parent, role)| *role == "backing" && is_overlay(&parent.name));
    let mut tops: Vec<String> = overlays
        .map(|(overlay, _)| climb(graph, overlay_root(graph, &overlay.name).to_owned()))
        .collect();
    match tops.iter().position(|top| is_used(top)) {
        Some(used) => tops.swap_remove(used),
        None => tops.into_iter().next().unwrap_or(from),
    }
}

/// The topmost filter over an overlay.
pub(crate) fn overlay_root<'g>(graph: &'g Graph, name: &'g str) -> &'g str {
    let mut at = name;
    while let Some(filter) = graph.nodes().find(|n| n.is_filter() && n.primary() == Some(at)) {
        at = &filter.name;
    }
    at
}

/// Whether a user of this node holds the permission to resize it (`x-debug-query-block-graph`).
async fn may_resize(host: &dyn Host, node: &str) -> Result<bool> {
    let graph = match host.monitor(Command::bare("x-debug-query-block-graph")).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(false),
        graph => graph?,
    };
    let items = |key: &str| graph[key].as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |id: &Value| items("nodes").iter().find(|n| n["id"] == *id);
    let users = items("edges").iter().filter(|edge| {
        of(&edge["child"]).is_some_and(|n| n["name"] == node)
            && of(&edge["parent"]).is_some_and(|n| n["type"] == "block-backend")
    });
    let resizes = |edge: &Value| {
        edge["perm"]
            .as_array()
            .is_some_and(|perm| perm.iter().any(|p| p == "resize"))
    };
    Ok(users.into_iter().any(resizes))
}

/// The block graph, where a hypervisor runs.
pub(crate) async fn graph_of(host: &dyn Host, active: bool) -> Result<Option<Graph>> {
    if active {
        Graph::read(host).await.map(Some)
    } else {
        Ok(None)
    }
}

/// The bitmaps of a layer that record what is written to it.
pub(crate) fn recording(graph: &Graph, layer: &LiveLayer) -> Vec<Bitmap> {
    let bitmaps = graph
        .node(&layer.format)
        .map(|n| n.bitmaps.clone())
        .unwrap_or_default();
    bitmaps
        .into_iter()
        .filter(|b| b.recording && !b.inconsistent)
        .collect()
}

/// The nodes that have the file at this path open as an image, with that image's own file node.
pub(crate) fn nodes_of(graph: &Graph, path: &Path) -> Vec<(String, String)> {
    let files = graph
        .nodes()
        .filter(|n| n.path.as_deref().is_some_and(|p| same_file(p, path)));
    let image = |file: &Node| {
        let mut parents = graph.parents(&file.name);
        let above = parents.find(|(_, role)| *role == "file")?;
        Some((above.0.name.clone(), file.name.clone()))
    };
    files.filter_map(image).collect()
}
