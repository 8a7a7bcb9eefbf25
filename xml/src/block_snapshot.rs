//! `<domainblocksnapshot>`: what is to be snapshotted, and what came out.

use std::collections::{BTreeMap, HashSet};
use std::time::UNIX_EPOCH;

use disksnap_core::{
    Access, Consistency, DiskChoice, DiskSnapshotRecord, Disks, Health, MethodChoice, NewCheckpoint, Options,
    Quiesce, Result, Snapshot, SnapshotName, SnapshotRequest, Source,
};

use crate::disk::{new_disk_element, target_name};
use crate::domain::DomainDocument;
use crate::edit::carried_disk;
use crate::method;
use crate::source::source_element;
use crate::tree::{Elem, Tree};
use crate::write::Element;

/// The method that `<fleece>` stands for.
const FLEECE: &str = "qemu-fleece";

/// What only the output has; a request may carry it, and it means nothing there.
const TOLD: [&str; 6] = [
    "creationTime",
    "domain",
    "consistency",
    "window",
    "skipped",
    "warning",
];
const TOLD_OF_DISK: [&str; 7] = [
    "alias",
    "size",
    "health",
    "detail",
    "modifiedDisk",
    "backupSource",
    "inside",
];

/// Reads a `<domainblocksnapshot>` as a request (`seeds/fleecing-pull-backup-rfc.txt`, section 1).
///
/// What [`snapshot_document`] tells besides the request is skipped, so that its output asks for the
/// same snapshot again. The request's id is a fresh one, the deadline the default.
///
/// # Errors
/// `Invalid` for a fault of the document.
pub fn snapshot_request(text: &str) -> Result<SnapshotRequest> {
    let tree = Tree::parse(text)?;
    let root = tree.root_named("domainblocksnapshot")?;
    root.only_attrs(&[])?;
    root.only_children_and(None, &["name", "snapshot", "quiesce", "checkpoint"], &TOLD)?;
    let (mut choices, mut seen) = (Vec::new(), HashSet::new());
    for elem in root.all("snapshot") {
        let choice = choice(elem)?;
        if !seen.insert(choice.target.clone()) {
            return Err(elem.attr_fault(
                "disk",
                format!("the disk '{}' comes twice: expected it once", choice.target),
            ));
        }
        choices.push(choice);
    }
    let (quiesce, mountpoints) = match root.child("quiesce")? {
        Some(elem) => (quiesce(elem)?, mountpoints(elem)?),
        None => (Quiesce::default(), Vec::new()),
    };
    Ok(SnapshotRequest {
        name: root.child("name")?.map(name).transpose()?,
        disks: if choices.is_empty() {
            Disks::Writable
        } else {
            Disks::Named(choices)
        },
        quiesce,
        mountpoints,
        checkpoint: root.child("checkpoint")?.map(checkpoint).transpose()?,
        ..SnapshotRequest::default()
    })
}

fn name(elem: Elem<'_, '_>) -> Result<SnapshotName> {
    elem.only_attrs(&[])?;
    if let Some(child) = elem.children().next() {
        return Err(child.fault(format!("<{}> in <name>: expected text alone", child.name())));
    }
    let text = elem.text();
    text.parse().map_err(|error: disksnap_core::Error| {
        let placed = elem.fault(error.message().to_owned());
        match error.next_step() {
            Some(hint) => placed.hint(hint),
            None => placed,
        }
    })
}

/// `<checkpoint/>`, called as the snapshot is, or `<checkpoint name='…'/>`.
fn checkpoint(elem: Elem<'_, '_>) -> Result<NewCheckpoint> {
    elem.only_attrs(&["name"])?;
    elem.only_children(None, &[])?;
    let Some(name) = elem.attr("name") else {
        return Ok(NewCheckpoint::AsSnapshot);
    };
    let wrong = |error: disksnap_core::Error| elem.attr_fault("name", error.message().to_owned());
    name.parse().map(NewCheckpoint::Named).map_err(wrong)
}

fn quiesce(elem: Elem<'_, '_>) -> Result<Quiesce> {
    elem.only_attrs(&["mode"])?;
    elem.only_children(None, &["filesystem"])?;
    elem.required("mode", "'none', 'try' or 'require'")?;
    let known = [
        ("none", Quiesce::None),
        ("try", Quiesce::Try),
        ("require", Quiesce::Require),
    ];
    elem.choice("mode", &known)
}

/// `<filesystem mountpoint='…'/>` in `<quiesce>`: those alone are frozen.
fn mountpoints(elem: Elem<'_, '_>) -> Result<Vec<String>> {
    let mut points = Vec::new();
    for filesystem in elem.all("filesystem") {
        filesystem.only_attrs(&["mountpoint"])?;
        filesystem.only_children(None, &[])?;
        points.push(
            filesystem
                .required("mountpoint", "where the guest has it mounted")?
                .to_owned(),
        );
    }
    Ok(points)
}

fn choice(elem: Elem<'_, '_>) -> Result<DiskChoice> {
    elem.only_attrs(&["disk"])?;
    elem.only_children_and(None, &["fleece", "diskSnapshot"], &TOLD_OF_DISK)?;
    let target = target_name(elem, "disk")?;
    let method = match (elem.child("fleece")?, elem.child("diskSnapshot")?) {
        (Some(_), Some(other)) => {
            return Err(other.fault(
                "<diskSnapshot> beside <fleece>: expected one of them, since each names the method"
                    .to_owned(),
            ));
        }
        (Some(fleece), None) => Some(MethodChoice {
            method: FLEECE.to_owned(),
            options: fleece_options(fleece)?,
        }),
        (None, Some(other)) => Some(method::read(other)?),
        (None, None) => None,
    };
    Ok(DiskChoice {
        method,
        ..DiskChoice::new(target)
    })
}

fn fleece_options(elem: Elem<'_, '_>) -> Result<Options> {
    let nothing_said = elem.attrs().next().is_none() && elem.children().next().is_none();
    if nothing_said && elem.text().is_empty() {
        return Ok(Options::default());
    }
    method::flatten(elem, "fleece", &[])
}

/// A snapshot and what else is to be told of it.
#[derive(Debug, Clone)]
pub struct SnapshotView<'a> {
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// The health of each disk, in the order of [`Snapshot::disks`]; empty where nobody looked.
    pub health: &'a [Health],
    /// Where each disk's data is or will be (`backupSource`), by target. For a disk that is not in here it
    /// is told only where the record itself says it.
    pub backup_sources: BTreeMap<String, Source>,
    /// The domain's document, so that `<modifiedDisk>` keeps all that the record does not say.
    pub document: Option<&'a DomainDocument>,
}

impl<'a> SnapshotView<'a> {
    /// The snapshot alone.
    #[must_use]
    pub fn new(snapshot: &'a Snapshot) -> Self {
        Self {
            snapshot,
            health: &[],
            backup_sources: BTreeMap::new(),
            document: None,
        }
    }

    pub(crate) fn element(&self) -> Result<Element> {
        let snapshot = self.snapshot;
        let domain = Element::new("domain")
            .attr("name", &snapshot.domain.name)
            .attr("uuid", snapshot.domain.uuid);
        let window = Element::new("window")
            .attr("unit", "us")
            .attr("frozen", snapshot.window.frozen_us)
            .attr("paused", snapshot.window.paused_us)
            .attr("taken", snapshot.window.taken_us);
        let disks = snapshot.disks.iter().enumerate();
        let disks = disks.map(|(n, disk)| self.disk(disk, self.health.get(n)));
        let skipped = snapshot
            .skipped
            .iter()
            .map(|s| Element::new("skipped").attr("disk", &s.target).text(&s.reason));
        let checkpoint = snapshot.checkpoint.as_ref();
        let checkpoint = checkpoint.map(|name| Element::new("checkpoint").attr("name", name));
        Ok(Element::new("domainblocksnapshot")
            .child(Element::new("name").text(&snapshot.name))
            .children(checkpoint)
            .child(Element::new("creationTime").text(seconds(snapshot)))
            .child(domain)
            .child(consistency_element(&snapshot.consistency))
            .child(window)
            .children(disks.collect::<Result<Vec<_>>>()?)
            .children(skipped)
            .children(snapshot.warnings.iter().map(|w| Element::new("warning").text(w))))
    }

    fn disk(&self, disk: &DiskSnapshotRecord, health: Option<&Health>) -> Result<Element> {
        let details = disk.details.iter().filter(|(key, _)| !is_fleece_file(disk, key));
        let size = disk
            .size
            .map(|size| Element::new("size").attr("unit", "bytes").text(size));
        Ok(Element::new("snapshot")
            .attr("disk", &disk.target)
            .child(method_element(disk))
            .child(Element::new("alias").attr("name", &disk.alias))
            .children(size)
            .children(health.map(health_element))
            .children(details.map(|(key, value)| detail_element(key, value)))
            .children(self.modified_disk(disk)?)
            .children(self.backup_source(disk)?)
            .children(inside_element(disk)))
    }

    fn modified_disk(&self, disk: &DiskSnapshotRecord) -> Result<Option<Element>> {
        let Some(modified) = &disk.modified_disk else {
            return Ok(None);
        };
        let known = |d: &&DomainDocument| d.domain().disk(&disk.target).is_ok();
        let inner = match self.document.filter(known) {
            Some(document) => {
                let (text, indent) = carried_disk(document, &disk.target, modified)?;
                Element::verbatim(text, indent)
            }
            None => new_disk_element(modified)?,
        };
        Ok(Some(Element::new("modifiedDisk").child(inner)))
    }

    /// Written as libvirt writes a `<backingStore>`, since a `<source>` does not say its own type.
    fn backup_source(&self, disk: &DiskSnapshotRecord) -> Result<Option<Element>> {
        let (own, format) = match &disk.access {
            Access::Node(_) | Access::Inside(_) => (None, "raw"),
            Access::Source { source, format, .. } => (Some(source), format.as_str()),
        };
        let Some(source) = self.backup_sources.get(&disk.target).or(own) else {
            return Ok(None);
        };
        // What older records say of a file in a file system: the details say where it is.
        if matches!(source, Source::Other { .. }) {
            return Ok(None);
        }
        // An export gives the disk's own bytes, whatever the image's format.
        let format = if own.is_some_and(|own| own == source) {
            format
        } else {
            "raw"
        };
        Ok(Some(
            Element::new("backupSource")
                .attr("type", source.kind())
                .child(Element::new("format").attr("type", format))
                .child(source_element(source)?),
        ))
    }
}

/// Instead of a `<backupSource>`, where nothing on this host gives the disk's bytes.
fn inside_element(disk: &DiskSnapshotRecord) -> Option<Element> {
    let Access::Inside(inside) = &disk.access else {
        return None;
    };
    let format = |format: &str| Element::new("format").attr("type", format);
    let below = inside.below.iter().map(|layer| {
        Element::new("layer")
            .attr("path", layer.path.display())
            .child(format(&layer.format))
    });
    let element = Element::new("inside")
        .attr("device", inside.device.display())
        .attr("filesystem", &inside.file_system)
        .attr("options", &inside.options)
        .attr("path", inside.image.path.display())
        .child(format(&inside.image.format))
        .children(below)
        .child(Element::new("reason").text(&inside.why));
    Some(element)
}

fn seconds(snapshot: &Snapshot) -> u64 {
    let since = snapshot.created.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn is_fleece_file(disk: &DiskSnapshotRecord, key: &str) -> bool {
    disk.method == FLEECE && key == "fleece.file"
}

fn method_element(disk: &DiskSnapshotRecord) -> Element {
    let file = disk.details.get("fleece.file").filter(|_| disk.method == FLEECE);
    match file {
        Some(file) => Element::new("fleece").attr("file", file),
        None => Element::new("diskSnapshot").attr("method", &disk.method),
    }
}

pub(crate) fn detail_element(key: &str, value: &str) -> Element {
    Element::new("detail").attr("name", key).attr("value", value)
}

fn health_element(health: &Health) -> Element {
    let element = Element::new("health");
    match health {
        Health::Active => element.attr("state", "active"),
        Health::Endangered(why) => element.attr("state", "active").text(why),
        Health::Broken(why) => element.attr("state", "broken").text(why),
        Health::Gone(why) => element.attr("state", "gone").text(why),
    }
}

fn consistency_element(consistency: &Consistency) -> Element {
    let element = Element::new("consistency");
    match consistency {
        Consistency::Crash => element.attr("level", "crash"),
        Consistency::Unquiesced { reason } => element.attr("level", "unquiesced").text(reason),
        Consistency::Filesystem {
            filesystems,
            mountpoints,
        } => {
            let each = mountpoints.iter();
            element
                .attr("level", "filesystem")
                .attr("filesystems", filesystems)
                .children(each.map(|point| Element::new("filesystem").attr("mountpoint", point)))
        }
        Consistency::Inactive => element.attr("level", "inactive"),
    }
}

/// The `<domainblocksnapshot>` of a snapshot. Read by [`snapshot_request`] it asks for the same disks
/// by the same methods under the same name.
///
/// # Errors
/// `Unsupported` for a source that cannot be written and text that XML cannot hold.
pub fn snapshot_document(view: &SnapshotView<'_>) -> Result<String> {
    view.element()?.to_document()
}

/// A `<domainblocksnapshots>` document of several snapshots, in the order given.
///
/// # Errors
/// As [`snapshot_document`].
pub fn snapshots_document(views: &[SnapshotView<'_>]) -> Result<String> {
    let elements: Vec<Element> = views.iter().map(SnapshotView::element).collect::<Result<_>>()?;
    Element::new("domainblocksnapshots")
        .children(elements)
        .to_document()
}
