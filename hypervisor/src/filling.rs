//! Taking a disk from a guest that stands still, for somebody to fill, and giving it back (`qom-set` of `drive`,
//! `block-export-add` with `writable`).
//!
//! The device goes over to a stand-in of the same size. Were the guest let run all the same, each of its requests
//! fails there: writes into the void would be lost in silence, and what `ENOSPC` stops is sent again to the disk that
//! comes back, so the error is `EIO`.
//!
//! QEMU 10.0 ends in a failed assertion when a device goes over to a node of another thread, and 7.2 does when a
//! client leaves an export in another thread than the main one. virtio-blk is in the main thread whenever the guest
//! stands still; a SCSI disk stays in the thread of its controller. There the stand-in is moved to that thread before
//! the device goes over to it, the disk to the main one while it is filled, and back before the device has it again.

use async_trait::async_trait;
use disksnap_core::{Command, Disk, Error, ErrorKind, Host, Lend, LentDisk, Result, ServeNode};
use serde_json::{Value, json};

use crate::control::QemuControl;
use crate::graph::{Device, DiskNodes, Graph, Node};

/// Nodes of snapshots and jobs, in the way of a disk's own.
const OTHERS: [&str; 4] = ["copy-before-write", "snapshot-access", "commit_top", "mirror_top"];
/// All that a guest can ask of a disk (`BlkdebugIOType`).
const REQUESTS: [&str; 6] = [
    "read",
    "write",
    "write-zeroes",
    "discard",
    "flush",
    "block-status",
];
/// What a request to the stand-in fails with: EIO.
const EIO: i32 = 5;

#[async_trait]
impl Lend for QemuControl {
    async fn look(&self, disk: &Disk, name: &str) -> Result<LentDisk> {
        let graph = Graph::read(self).await?;
        let nodes = graph.root_of_disk(disk)?;
        let looked = async {
            let (device, top) = free(&graph, &nodes)?;
            Ok(LentDisk {
                target: disk.target.clone(),
                device: device.qom_path.clone(),
                node: top.name.clone(),
                stand_in: name.to_owned(),
                thread: self.thread_of(device).await?,
                size: top.size,
                export: ServeNode {
                    id: name.to_owned(),
                    node: top.name.clone(),
                    name: disk.target.clone(),
                    bitmap: None,
                },
            })
        };
        looked
            .await
            .map_err(|error: Error| error.with("disk", &disk.target))
    }

    async fn lend(&self, disk: &LentDisk) -> Result<()> {
        let graph = Graph::read(self).await?;
        if !has_stand_in(&graph, disk) {
            if graph.node(&disk.stand_in).is_none() {
                self.monitor(Command::new("blockdev-add", stand_in(disk))).await?;
            }
            if let Some(thread) = &disk.thread {
                self.move_to(&disk.stand_in, json!(thread)).await?;
            }
            self.attach(disk, &disk.stand_in).await?;
        }
        match &disk.thread {
            Some(_) => self.move_to(&disk.node, Value::Null).await,
            None => Ok(()),
        }
    }

    async fn serve_writable(&self, disk: &LentDisk) -> Result<()> {
        self.nbd()?.serve_writable(&disk.export).await
    }

    /// A device that somebody has taken out meanwhile has nothing to get.
    async fn give_back(&self, disk: &LentDisk) -> Result<()> {
        let graph = Graph::read(self).await?;
        if has_stand_in(&graph, disk) {
            if let Some(thread) = &disk.thread {
                self.move_to(&disk.node, json!(thread)).await?;
            }
            self.attach(disk, &disk.node).await?;
        }
        if graph.node(&disk.stand_in).is_none() {
            return Ok(());
        }
        let delete = json!({ "node-name": disk.stand_in });
        let deleted = self.monitor(Command::new("blockdev-del", delete)).await;
        deleted.map(drop).map_err(|e| e.with("node", &disk.stand_in))
    }

    async fn is_lent(&self, disk: &LentDisk) -> Result<bool> {
        Ok(has_stand_in(&Graph::read(self).await?, disk))
    }
}

impl QemuControl {
    async fn attach(&self, disk: &LentDisk, node: &str) -> Result<()> {
        let attach = json!({"path": disk.device, "property": "drive", "value": node});
        let attached = self.monitor(Command::new("qom-set", attach)).await;
        attached
            .map(drop)
            .map_err(|e| e.with("device", &disk.device).with("node", node))
    }

    /// Lets a node that no device has work in this thread; null for the main one.
    async fn move_to(&self, node: &str, thread: Value) -> Result<()> {
        let arguments = json!({"node-name": node, "iothread": thread});
        let moved = self
            .monitor(Command::new("x-blockdev-set-iothread", arguments))
            .await;
        moved.map(drop).map_err(|error| {
            let error = error.with("node", node);
            if error.kind() == ErrorKind::Unsupported {
                return error.hint("Start the domain without an iothread for the disk's SCSI controller.");
            }
            error
        })
    }

    /// The thread that a device's node is in while the guest stands still, unless it is the main one.
    async fn thread_of(&self, device: &Device) -> Result<Option<String>> {
        if self.property(&device.qom_path, "type").await? == json!("virtio-blk-device") {
            return Ok(None);
        }
        if let Some(thread) = self.thread_at(&device.qom_path).await? {
            return Err(in_thread(device, &thread));
        }
        let bus = self.property(&device.qom_path, "parent_bus").await?;
        let Some((controller, _)) = bus.as_str().and_then(|bus| bus.rsplit_once('/')) else {
            return Ok(None);
        };
        let thread = self.thread_at(controller).await?;
        let several = self.property(controller, "iothread-vq-mapping").await?;
        if several.as_array().is_some_and(|list| !list.is_empty()) {
            return Err(in_thread(device, "of iothread-vq-mapping"));
        }
        match thread {
            None => Ok(None),
            Some(path) => match path.strip_prefix("/objects/") {
                Some(id) => Ok(Some(id.to_owned())),
                None => Err(in_thread(device, &path)),
            },
        }
    }

    async fn thread_at(&self, path: &str) -> Result<Option<String>> {
        let thread = self.property(path, "iothread").await?;
        Ok(thread.as_str().filter(|path| !path.is_empty()).map(str::to_owned))
    }

    /// A property of an object; null where it has none of the name.
    async fn property(&self, path: &str, property: &str) -> Result<Value> {
        let get = json!({"path": path, "property": property});
        match self.monitor(Command::new("qom-get", get)).await {
            Err(error) if error.message().contains("not found") => Ok(Value::Null),
            answer => answer,
        }
    }
}

/// The device and the topmost node of a disk that nobody but the guest uses.
fn free<'a>(graph: &'a Graph, nodes: &'a DiskNodes) -> Result<(&'a Device, &'a Node)> {
    let (Some(device), Some(top)) = (&nodes.device, graph.node(&nodes.top)) else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "no device of the guest has the disk: there is nothing to take it from",
        ));
    };
    if top.read_only {
        return Err(Error::new(
            ErrorKind::Denied,
            "the guest has the disk read-only, and nobody writes to it",
        )
        .hint("Leave it out; or write to its image while no domain runs that uses it."));
    }
    match in_the_way(graph, nodes, device) {
        None => Ok((device, top)),
        Some(what) => Err(Error::new(ErrorKind::Busy, what).hint(
            "Delete the disk's snapshots and stop its exports first, or wait until the job has ended.",
        )),
    }
}

fn in_the_way(graph: &Graph, nodes: &DiskNodes, device: &Device) -> Option<String> {
    let on_chain = |name: &String| nodes.chain.contains(name);
    let chain = || nodes.chain.iter().filter_map(|name| graph.node(name));
    if let Some(job) = graph.jobs_on(&nodes.chain).next() {
        return Some(format!("the {} job '{}' works on the disk", job.kind, job.id));
    }
    if let Some(node) = chain().find(|node| OTHERS.contains(&node.driver.as_str())) {
        return Some(format!(
            "a snapshot or job stands on the disk: there is the node '{}' ({}) over it",
            node.name, node.driver
        ));
    }
    if let Some(export) = graph.exports.iter().find(|e| on_chain(&e.node)) {
        return Some(format!("the export '{}' serves the disk", export.id));
    }
    let above = chain().flat_map(|node| graph.parents(&node.name));
    if let Some((parent, role)) = above.into_iter().find(|(parent, _)| !on_chain(&parent.name)) {
        return Some(format!(
            "the node '{}' ({}) has the disk as its {role}, as a snapshot's does",
            parent.name, parent.driver
        ));
    }
    let other = |d: &&Device| d.qom_path != device.qom_path && d.node.as_ref().is_some_and(on_chain);
    let shared = graph.devices.iter().find(other);
    shared.map(|other| format!("the device '{}' has the same disk", other.label()))
}

fn in_thread(device: &Device, thread: &str) -> Error {
    let what = format!(
        "the disk's device {} works in the thread {thread}, from where this QEMU cannot take the disk safely",
        device.label()
    );
    Error::new(ErrorKind::Unsupported, what)
        .hint("Start the domain without that iothread; or write to the disk's image while the domain is off.")
}

fn has_stand_in(graph: &Graph, disk: &LentDisk) -> bool {
    let on_it =
        |device: &Device| device.qom_path == disk.device && device.node.as_ref() == Some(&disk.stand_in);
    graph.devices.iter().any(on_it)
}

fn stand_in(disk: &LentDisk) -> Value {
    let fails = |request: &&str| json!({"event": "none", "iotype": request, "errno": EIO});
    let rules: Vec<Value> = REQUESTS.iter().map(fails).collect();
    json!({"driver": "blkdebug", "node-name": disk.stand_in, "inject-error": rules,
        "image": {"driver": "null-co", "size": disk.size}})
}
