//! Which node serves which disk: by the device's alias, else by the disk's source file.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use disksnap_core::{Disk, Error, ErrorKind, Result};

use super::{Device, Graph, Node};

/// How many disks or nodes an error names at most.
const NAMED: usize = 12;

/// The nodes that serve one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskNodes {
    /// The guest's device; `None` in a storage daemon, or while no device uses the node.
    pub device: Option<Device>,
    /// The node that the device is attached to, or the topmost one: a filter, a wrapper, or the image itself.
    pub top: String,
    /// The node of the top image's format (`qcow2`, `luks`, `raw`): where bitmaps live. The same as `protocol`
    /// where the image is opened without a format node.
    pub format: String,
    /// The node that opens the top image's file, device or connection.
    pub protocol: String,
    /// All nodes from `top` to `protocol`, both included: filters, wrappers, the format.
    pub chain: Vec<String>,
    /// The nodes below `format` in the backing chain, nearest first.
    pub backing: Vec<String>,
    /// The document names a lower image of the chain and not the top one: it is older than an overlay.
    pub stale: bool,
}

impl Graph {
    /// The nodes that serve a disk.
    ///
    /// A disk is known by its alias, which is the id of its device (with or without libvirt's `ua-`); a disk without
    /// one, or in a storage daemon, by the file that it names, compared as files and not as names.
    ///
    /// # Errors
    /// `NotFound`, naming the disks there are; `Invalid` when the alias and the file belong to different disks, or
    /// several disks use the file.
    pub fn root_of_disk(&self, disk: &Disk) -> Result<DiskNodes> {
        let path = disk.source.as_ref().and_then(|s| s.path());
        let found = match self.device_of_alias(disk) {
            Some(device) => self.of_device(device, path),
            None => self.of_path(disk, path),
        };
        found.map_err(|error| error.with("disk", &disk.target))
    }

    fn device_of_alias(&self, disk: &Disk) -> Option<&Device> {
        let bare = |id: &str| id.strip_prefix("ua-").unwrap_or(id).to_owned();
        let alias = disk.alias.as_deref()?;
        let exact = self.devices.iter().find(|d| d.id.as_deref() == Some(alias));
        exact.or_else(|| {
            let near = |d: &&Device| d.id.as_deref().is_some_and(|id| bare(id) == bare(alias));
            self.devices.iter().find(near)
        })
    }

    fn of_device(&self, device: &Device, path: Option<&Path>) -> Result<DiskNodes> {
        let Some(top) = &device.node else {
            return Err(Error::new(ErrorKind::NotFound, "the drive is empty")
                .with("device", device.label())
                .hint("Leave it out, or insert a medium."));
        };
        let mut nodes = self.disk_nodes(top)?;
        nodes.device = Some(device.clone());
        if let Some(path) = path {
            nodes.stale = match self.place(&nodes, path) {
                Place::Top | Place::Hidden => false,
                Place::Below => true,
                Place::Elsewhere(actual) => return Err(another_file(device, path, &actual)),
            };
        }
        Ok(nodes)
    }

    /// The nodes from `top` down.
    fn disk_nodes(&self, top: &str) -> Result<DiskNodes> {
        let chain = self.primary_chain(top);
        let Some((protocol, images)) = chain.split_last() else {
            return Err(Error::new(ErrorKind::NotFound, "the block node is gone")
                .with("node", top)
                .retryable(true));
        };
        let images: Vec<&&Node> = images.iter().filter(|n| !n.is_filter()).collect();
        // A raw node may also be a wrapper above the format, or a slice of the file below it.
        let format = images
            .iter()
            .find(|n| n.driver != "raw")
            .or(images.last())
            .map_or(*protocol, |n| **n);
        Ok(DiskNodes {
            device: None,
            top: top.to_owned(),
            format: format.name.clone(),
            protocol: protocol.name.clone(),
            chain: chain.iter().map(|n| n.name.clone()).collect(),
            backing: self.backing_chain(format),
            stale: false,
        })
    }

    fn backing_chain(&self, format: &Node) -> Vec<String> {
        let mut chain: Vec<String> = Vec::new();
        // Below a filter the image itself has the backing.
        let below = |name: &str| self.primary_chain(name).into_iter().find_map(Node::backing);
        let mut at = below(&format.name);
        while let Some(name) = at.filter(|name| !chain.iter().any(|c| c == name)) {
            chain.push(name.to_owned());
            at = below(name);
        }
        chain
    }

    fn place(&self, nodes: &DiskNodes, path: &Path) -> Place {
        let file = |name: &str| self.primary_chain(name).last().and_then(|n| n.path.clone());
        let Some(top) = file(&nodes.top).filter(|p| !p.starts_with("/dev/fdset")) else {
            return Place::Hidden;
        };
        if same_file(&top, path) {
            return Place::Top;
        }
        let mut below = nodes.backing.iter().filter_map(|name| file(name));
        if below.any(|p| same_file(&p, path)) {
            return Place::Below;
        }
        Place::Elsewhere(top.display().to_string())
    }

    fn of_path(&self, disk: &Disk, path: Option<&Path>) -> Result<DiskNodes> {
        let Some(path) = path else {
            return Err(self.unknown(disk, "the disk has no alias that a device has, and names no file"));
        };
        let protocols: Vec<&Node> = self
            .nodes()
            .filter(|n| n.path.as_deref().is_some_and(|p| same_file(p, path)))
            .collect();
        if protocols.is_empty() {
            return Err(self.unknown(disk, "the hypervisor has no disk with this alias or file"));
        }
        if let Some(image) = protocols.iter().find_map(|p| self.holder_of(&p.name)) {
            return Err(data_of_another(path, image));
        }
        let mut found: Vec<DiskNodes> = self
            .devices
            .iter()
            .filter_map(|d| self.of_device(d, Some(path)).ok())
            .collect();
        // Devices whose file cannot be seen say nothing about this file.
        found.retain(|nodes| nodes.stale || protocols.iter().any(|p| p.name == nodes.protocol));
        // A base image may have several overlays; the disk that has the file on top is the one meant.
        if found.iter().any(|nodes| !nodes.stale) {
            found.retain(|nodes| !nodes.stale);
        }
        if found.is_empty() {
            let tops: BTreeSet<&str> = protocols.iter().flat_map(|p| self.tops(&p.name)).collect();
            found = self
                .likely(tops)
                .into_iter()
                .map(|top| self.disk_nodes(top))
                .collect::<Result<_>>()?;
        }
        if found.len() > 1 {
            return Err(ambiguous(path, &found));
        }
        found
            .pop()
            .ok_or_else(|| self.unknown(disk, "no node serves the disk's file"))
    }

    /// The qcow2 that keeps its data in this node or in one above it.
    fn holder_of<'a>(&'a self, name: &'a str) -> Option<&'a Node> {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![name]);
        while let Some(name) = todo.pop() {
            if !seen.insert(name) {
                continue;
            }
            for (parent, role) in self.parents(name) {
                if role == "data-file" {
                    return Some(parent);
                }
                if parent.primary() == Some(name) {
                    todo.push(&parent.name);
                }
            }
        }
        None
    }

    /// The topmost nodes that show the data of this one.
    fn tops<'a>(&'a self, name: &'a str) -> BTreeSet<&'a str> {
        let (mut tops, mut seen, mut todo) = (BTreeSet::new(), BTreeSet::new(), vec![name]);
        while let Some(name) = todo.pop() {
            if !seen.insert(name) {
                continue;
            }
            // A snapshot-access node shows the past, and what is someone's backing image is a disk of its own.
            let above = |n: &&Node| n.primary() == Some(name) && n.driver != "snapshot-access";
            let parents: Vec<&Node> = self.parents(name).map(|(node, _)| node).filter(above).collect();
            if parents.is_empty() {
                tops.insert(name);
            }
            todo.extend(parents.iter().map(|n| n.name.as_str()));
        }
        tops
    }

    /// Without the filters that nothing uses yet or any more, where something else is left.
    fn likely<'a>(&self, tops: BTreeSet<&'a str>) -> BTreeSet<&'a str> {
        let used = |name: &str| self.exports.iter().any(|e| e.node == name && e.kind != "nbd");
        let solid = |name: &&&str| used(name) || self.node(name).is_some_and(|n| !n.is_filter());
        let left: BTreeSet<&str> = tops.iter().filter(solid).copied().collect();
        if left.is_empty() { tops } else { left }
    }

    fn unknown(&self, disk: &Disk, why: &str) -> Error {
        let wanted = disk.alias.as_deref().unwrap_or(&disk.target);
        let path = disk.source.as_ref().map(ToString::to_string);
        let mut known: Vec<(usize, String)> = self.named_disks(wanted, path.as_deref().unwrap_or_default());
        known.sort();
        let more = known.len().saturating_sub(NAMED);
        let names: Vec<String> = known.into_iter().take(NAMED).map(|(_, name)| name).collect();
        let hint = match (names.is_empty(), more) {
            (true, _) => "It has no disks.".to_owned(),
            (false, 0) => format!("It has, nearest first: {}.", names.join(", ")),
            (false, more) => format!("It has, nearest first: {}, and {more} more.", names.join(", ")),
        };
        let error = Error::new(ErrorKind::NotFound, why).hint(hint);
        let error = disk
            .alias
            .iter()
            .fold(error, |error, alias| error.with("alias", alias));
        path.iter().fold(error, |error, path| error.with("source", path))
    }

    /// Every device, or else every file that is open, with how far it is from what was wanted.
    fn named_disks(&self, wanted: &str, path: &str) -> Vec<(usize, String)> {
        if self.devices.is_empty() {
            let files = self
                .nodes()
                .filter_map(|n| n.path.as_ref())
                .map(|p| p.display().to_string());
            return files
                .map(|file| (strsim::levenshtein(path, &file), file))
                .collect();
        }
        let describe = |device: &Device| {
            let top = device.node.as_deref().unwrap_or_default();
            let file = self
                .primary_chain(top)
                .last()
                .map_or("empty", |n| n.filename.as_str())
                .to_owned();
            let far = strsim::levenshtein(wanted, device.label()).min(strsim::levenshtein(path, &file));
            (far, format!("{} ({file})", device.label()))
        };
        self.devices.iter().map(describe).collect()
    }
}

/// Where in a disk's chain a file is.
enum Place {
    Top,
    Below,
    /// The disk's file cannot be compared: a network source, or a descriptor handed to the hypervisor.
    Hidden,
    /// Nowhere; the disk's top image is this.
    Elsewhere(String),
}

fn another_file(device: &Device, wanted: &Path, actual: &str) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!(
            "the device '{}' uses {actual}, and not {} as the document says",
            device.label(),
            wanted.display()
        ),
    )
    .hint("Use the domain's present document: this one is of another time or of another domain.")
}

fn data_of_another(path: &Path, image: &Node) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!(
            "the hypervisor reaches {} through the qcow2 image {}, and not by itself as the document says",
            path.display(),
            image.filename
        ),
    )
    .hint("Use the domain's present document: this one is of another time or of another domain.")
}

fn ambiguous(path: &Path, found: &[DiskNodes]) -> Error {
    let label = |n: &DiskNodes| {
        n.device
            .as_ref()
            .map_or_else(|| format!("node {}", n.top), |d| d.label().to_owned())
    };
    let names: Vec<String> = found.iter().map(label).collect();
    Error::new(
        ErrorKind::Invalid,
        format!("several disks use this file: {}", names.join(", ")),
    )
    .with("source", path.display())
    .hint("Say which with the disk's <alias name='…'/>.")
}

/// Whether two paths lead to one file or device, as far as can be seen from here. A device may have several nodes: a
/// hypervisor can have a `/dev` of its own.
#[must_use]
pub fn same_file(a: &Path, b: &Path) -> bool {
    if a == b {
        return true;
    }
    let (Ok(a), Ok(b)) = (fs::metadata(a), fs::metadata(b)) else {
        return false;
    };
    let device = |m: &fs::Metadata| m.file_type().is_block_device();
    (a.dev(), a.ino()) == (b.dev(), b.ino()) || (device(&a) && device(&b) && a.rdev() == b.rdev())
}
