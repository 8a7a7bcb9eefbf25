//! The block graph of a hypervisor, as it is now: which node serves which disk, through filters and backing chains.
//!
//! Nodes come from `query-named-block-nodes`, their edges from `x-debug-query-block-graph` (or from `children` of
//! the nodes, which newer QEMUs tell), devices from `query-block`, jobs from `query-block-jobs` and exports from
//! `query-block-exports`. All of them answer in QEMU and in the storage daemon, in 7.2 and in 10.0.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use disksnap_core::{Command, Error, ErrorKind, Host, Result};
use serde_json::{Value, json};

mod lookup;
mod read;

pub use lookup::{DiskNodes, same_file};

/// A node of the block graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Its name; QEMU makes one up (`#block…`) where the user gave none.
    pub name: String,
    /// Its driver (`qcow2`, `raw`, `file`, `copy-before-write`, …).
    pub driver: String,
    /// What it opens, as QEMU writes it: a path, a URI, or `json:{…}`.
    pub filename: String,
    /// The path that it opens itself, where its driver is `file` or a host device.
    pub path: Option<PathBuf>,
    /// Virtual size in bytes.
    pub size: u64,
    /// Whether QEMU encrypts what it writes (LUKS, or encryption in qcow2).
    pub encrypted: bool,
    /// Whether it is open read-only.
    pub read_only: bool,
    /// The nodes that it is built on.
    pub children: Vec<Child>,
    /// Its dirty bitmaps that have a name.
    pub bitmaps: Vec<Bitmap>,
    /// All that QEMU says of it (`BlockDeviceInfo`).
    pub info: Value,
}

impl Node {
    /// Whether it only passes data through to one child, and could be left out without changing a byte.
    #[must_use]
    pub fn is_filter(&self) -> bool {
        FILTERS.contains(&self.driver.as_str())
    }

    /// The child that the data comes from: a filter's filtered node, an image's file.
    #[must_use]
    pub fn primary(&self) -> Option<&str> {
        let role = |role: &str| self.children.iter().find(|c| c.role == role);
        let child = if BACKED_FILTERS.contains(&self.driver.as_str()) {
            role("backing")
        } else {
            role("file").or_else(|| role("image"))
        };
        child.map(|c| c.node.as_str())
    }

    /// The image below this one.
    #[must_use]
    pub fn backing(&self) -> Option<&str> {
        let mut children = self.children.iter();
        let below = children.find(|c| c.role == "backing" && !self.is_filter());
        below.map(|c| c.node.as_str())
    }
}

/// Drivers that filter (`is_filter` in QEMU's block drivers). `snapshot-access` is none: it shows other data.
const FILTERS: [&str; 10] = [
    "copy-before-write",
    "copy-on-read",
    "throttle",
    "compress",
    "preallocate",
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "commit_top",
    "mirror_top",
];

/// The filters of jobs, whose filtered node is their backing child.
const BACKED_FILTERS: [&str; 2] = ["commit_top", "mirror_top"];

/// An edge to a node below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// What it is to the parent (`file`, `backing`, `target`, …).
    pub role: String,
    /// The child's name.
    pub node: String,
}

/// A dirty bitmap (`BlockDirtyInfo`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "these are QEMU's own flags")]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
    /// Dirty bytes.
    pub count: u64,
    /// Whether new writes are marked in it.
    pub recording: bool,
    /// Whether it is kept in the image.
    pub persistent: bool,
    /// Whether a job or an export uses it.
    pub busy: bool,
    /// Whether it was not saved when its image was last closed; it can only be removed.
    pub inconsistent: bool,
}

/// A device of the guest that a node is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The device's id, where the user gave it one: libvirt's alias of the disk.
    pub id: Option<String>,
    /// Its path for `qom-set … drive`.
    pub qom_path: String,
    /// The node it is attached to; `None` when the drive is empty.
    pub node: Option<String>,
}

impl Device {
    /// The id, or else the path.
    #[must_use]
    pub fn label(&self) -> &str {
        self.id.as_deref().unwrap_or(&self.qom_path)
    }
}

/// A block job that has not been dismissed (`BlockJobInfo`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `backup`, `mirror`, `commit`, `stream`, …
    pub kind: String,
    /// `running`, `ready`, `pending`, `concluded`, …
    pub status: String,
    /// The nodes it works on; empty where QEMU does not tell.
    pub nodes: Vec<String>,
}

/// An export of a node (`BlockExportInfo`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedNode {
    /// Its id.
    pub id: String,
    /// `nbd`, `fuse`, `vhost-user-blk`, …
    pub kind: String,
    /// The node.
    pub node: String,
    /// Whether it is on its way out.
    pub shutting_down: bool,
}

/// The block graph at one moment.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    nodes: BTreeMap<String, Node>,
    /// The guest's devices.
    pub devices: Vec<Device>,
    /// The jobs.
    pub jobs: Vec<Job>,
    /// The exports.
    pub exports: Vec<ExportedNode>,
}

impl Graph {
    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The nodes that are built on this one, with what it is to them.
    pub fn parents<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Node, &'a str)> {
        let roles = move |node: &'a Node| {
            let children = node.children.iter().filter(move |c| c.node == name);
            children.map(move |c| (node, c.role.as_str()))
        };
        self.nodes.values().flat_map(roles)
    }

    /// From a node down along [`Node::primary`], the node itself first, to the file or connection at the end.
    #[must_use]
    pub fn primary_chain(&self, from: &str) -> Vec<&Node> {
        let mut chain: Vec<&Node> = Vec::new();
        let mut at = self.node(from);
        // A graph has no circles; a lying peer's might.
        while let Some(node) = at.filter(|n| !chain.iter().any(|c| c.name == n.name)) {
            chain.push(node);
            at = node.primary().and_then(|name| self.node(name));
        }
        chain
    }

    /// The jobs that work on any of these nodes, or on some that QEMU does not tell. One that has ended, and only
    /// waits to be dismissed, works on nothing.
    pub fn jobs_on<'a>(&'a self, nodes: &'a [String]) -> impl Iterator<Item = &'a Job> {
        let concerned = |job: &&Job| {
            let ended = matches!(job.status.as_str(), "concluded" | "null");
            !ended && (job.nodes.is_empty() || job.nodes.iter().any(|n| nodes.contains(n)))
        };
        self.jobs.iter().filter(concerned)
    }
}
