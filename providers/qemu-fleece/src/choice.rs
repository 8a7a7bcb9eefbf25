//! Which way each disk is fleeced: what this QEMU offers, where the disk is in its block graph, what the
//! caller wishes. Reads everything, changes nothing.

use disksnap_core::{DiskRequest, Error, ErrorKind, Host, Result, RunState, SnapshotId};
use disksnap_hypervisor::graph::Node;
use disksnap_hypervisor::{DiskNodes, Graph};
use disksnap_image_file::{MadeFile, QemuImg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::encrypted;
use crate::image::locate;
use crate::names::Names;
use crate::offers::{Offers, Sparing};
use crate::settings::{Settings, Way};

/// Where a filter can be put in, so that all writes of the guest pass it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Seat {
    /// Between a device and the node it is attached to (`qom-set` of `drive`).
    Device {
        /// The device's path in QOM.
        path: String,
        /// The node it is attached to.
        root: String,
    },
    /// Below a raw node that stays (`blockdev-reopen`).
    Wrapper {
        /// The options to reopen it with, but for its `file`.
        options: Value,
        /// The node below it.
        below: String,
    },
}

impl Seat {
    /// The node that the filter goes on top of.
    pub(crate) fn below(&self) -> &str {
        match self {
            Self::Device { root, .. } => root,
            Self::Wrapper { below, .. } => below,
        }
    }
}

/// How one disk is going to be fleeced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Choice {
    pub(crate) way: Way,
    /// Where the filter goes; `None` where a job puts in its own.
    pub(crate) seat: Option<Seat>,
    /// The node of the disk's image: what a job backs up.
    pub(crate) source: String,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Whether QEMU encrypts the disk, and so must encrypt the fleece image.
    pub(crate) encrypted: bool,
    pub(crate) read_only: bool,
    pub(crate) sparing: Sparing,
    pub(crate) timeout: u32,
    pub(crate) image: MadeFile,
}

/// The choice for each disk in order, or why it cannot be fleeced.
pub(crate) async fn choose(
    host: &dyn Host,
    id: SnapshotId,
    disks: &[DiskRequest],
) -> Result<Vec<std::result::Result<Choice, Error>>> {
    let settings: Vec<Settings> = disks.iter().map(Settings::read).collect::<Result<_>>()?;
    if host.state().await? == RunState::Off {
        let off = || off(host);
        return Ok(disks.iter().map(|_| Err(off())).collect());
    }
    let (offers, graph) = (Offers::of(host).await?, Graph::read(host).await?);
    let choice = |(request, settings)| choose_one(host, id, request, settings, &offers, &graph);
    Ok(disks.iter().zip(&settings).map(choice).collect())
}

fn off(host: &dyn Host) -> Error {
    if host.domain().sockets.monitor.is_none() {
        return Error::new(
            ErrorKind::Unavailable,
            "nobody said where the domain's monitor is, and fleecing needs it",
        )
        .hint("Name its QMP socket with --monitor, or in the <metadata> of its document.");
    }
    Error::new(
        ErrorKind::Unavailable,
        "the domain is off; fleecing is done by the QEMU that runs it",
    )
}

fn choose_one(
    host: &dyn Host,
    id: SnapshotId,
    request: &DiskRequest,
    settings: &Settings,
    offers: &Offers,
    graph: &Graph,
) -> Result<Choice> {
    let disk = &request.disk;
    let place = graph.root_of_disk(disk)?;
    refuse_jobs(graph, &place)?;
    let source = graph.node(&place.format).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "the node of its image has just gone")
            .with("node", &place.format)
            .retryable(true)
    })?;
    let in_chain = |name: &String| graph.node(name).is_some_and(|node| node.encrypted);
    let encrypted = disk.encrypted || place.chain.iter().chain(&place.backing).any(in_chain);
    if encrypted {
        refuse_plain(offers)?;
    }
    let seat = seat(
        graph,
        place.device.as_ref().map(|d| d.qom_path.as_str()),
        &place.top,
    );
    let way = pick(settings.way, offers, seat.is_some())?;
    Ok(Choice {
        way,
        seat: seat.filter(|_| way == Way::Filter),
        source: source.name.clone(),
        size: source.size,
        encrypted,
        read_only: source.read_only,
        sparing: offers.sparing(way),
        timeout: settings.timeout,
        image: locate(host, id, &disk.target, settings),
    })
}

/// What is encrypted must not come to rest in plain.
fn refuse_plain(offers: &Offers) -> Result<()> {
    if !offers.encryption {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "QEMU encrypts this disk, and cannot encrypt a fleece image",
        )
        .hint("Use a method that copies the encrypted image as it is."));
    }
    QemuImg::find().map(drop).ok_or_else(encrypted::missing)
}

fn pick(wish: Option<Way>, offers: &Offers, has_seat: bool) -> Result<Way> {
    let works = |way: Way| offers.has(way) && (way != Way::Filter || has_seat);
    match wish {
        Some(way) if works(way) => Ok(way),
        Some(Way::Filter) if offers.has(Way::Filter) => Err(Error::new(
            ErrorKind::Unsupported,
            "no filter can be put in: the disk is neither a device with an id nor behind a raw wrapper node",
        )
        .hint("Give the device an id, or choose fleece.way=job.")),
        Some(way) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("this QEMU cannot fleece by '{}'", way.as_str()),
        )
        .hint("Leave fleece.way out for the safest that it offers.")),
        None => Way::ALL.into_iter().find(|way| works(*way)).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "this QEMU has no way to fleece")
                .hint("Fleecing needs blockdev-backup in a transaction: QEMU 4.2 or later.")
        }),
    }
}

/// Where a filter can go, if anywhere.
fn seat(graph: &Graph, device: Option<&str>, top: &str) -> Option<Seat> {
    if let Some(path) = device.filter(|path| path.starts_with('/')) {
        return Some(Seat::Device {
            path: path.to_owned(),
            root: top.to_owned(),
        });
    }
    let node = graph.node(top).filter(|node| node.driver == "raw")?;
    Some(Seat::Wrapper {
        options: reopen_options(node),
        below: node.primary()?.to_owned(),
    })
}

/// What a raw node is reopened with, its `file` aside, so that nothing else about it changes.
///
/// QEMU does not tell a node's `discard`. The wrapper passes discards on; the node below has the last word.
pub(crate) fn reopen_options(node: &Node) -> Value {
    let cache = &node.info["cache"];
    json!({
        "driver": "raw",
        "node-name": node.name,
        "read-only": node.read_only,
        "discard": "unmap",
        "detect-zeroes": node.info["detect_zeroes"].as_str().unwrap_or("off"),
        "cache": { "direct": cache["direct"] == true, "no-flush": cache["no-flush"] == true },
    })
}

/// The disk's nodes must be free of jobs, those of our own fleeces aside.
fn refuse_jobs(graph: &Graph, place: &DiskNodes) -> Result<()> {
    let nodes: Vec<String> = place.chain.iter().chain(&place.backing).cloned().collect();
    match graph.jobs_on(&nodes).find(|job| !Names::is_ours(&job.id)) {
        None => Ok(()),
        Some(job) => Err(Error::new(
            ErrorKind::Busy,
            format!(
                "the block job '{}' ({}, {}) works on it",
                job.id, job.kind, job.status
            ),
        )
        .hint("Wait until the job has ended, or cancel it.")),
    }
}
