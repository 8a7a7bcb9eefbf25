//! `<domaincheckpoint>`, in libvirt's form, and `<domaincheckpoints>`, a set of them.
//!
//! Source: libvirt's `domaincheckpoint.rng` and its page "Checkpoint XML format".

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use disksnap_core::{Checkpoint, CheckpointDisk, CheckpointName, Error, Mark, Result};

use crate::disk::target_name;
use crate::limits;
use crate::tree::{Elem, Tree};
use crate::write::Element;

/// What libvirt tells besides; it says nothing of the checkpoint.
const TOLD: [&str; 2] = ["domain", "inactiveDomain"];

/// Reads a `<domaincheckpoint>`, or a `<domaincheckpoints>` with any number of them, in the order they come in.
///
/// A disk with `checkpoint='no'` is not covered. A `<domain>` inside, as libvirt puts there, is skipped. Whether the set
/// is sound is not looked at here: [`Lineage::new`](disksnap_core::Lineage::new) does.
///
/// # Errors
/// `Invalid` for a fault of the document.
pub fn checkpoints(text: &str) -> Result<Vec<Checkpoint>> {
    let tree = Tree::parse_within(text, limits::SET)?;
    let root = tree.root();
    if root.is(None, "domaincheckpoint") {
        return Ok(vec![checkpoint(root)?]);
    }
    let root = tree.root_named("domaincheckpoints")?;
    root.only_attrs(&[])?;
    root.only_children(None, &["domaincheckpoint"])?;
    root.all("domaincheckpoint").map(checkpoint).collect()
}

fn checkpoint(root: Elem<'_, '_>) -> Result<Checkpoint> {
    root.only_attrs(&[])?;
    let known = ["name", "description", "creationTime", "parent", "disks"];
    root.only_children_and(None, &known, &TOLD)?;
    let parent = root.child("parent")?;
    let disks = root.child("disks")?;
    let name = name(root)?;
    let disks = disks.map_or_else(|| Ok(Vec::new()), |elem| covered(elem, &name))?;
    Ok(Checkpoint {
        name,
        parent: parent.map(name_of_parent).transpose()?,
        created: created(root)?,
        description: root.child("description")?.map(Elem::text),
        disks,
    })
}

fn name(parent: Elem<'_, '_>) -> Result<CheckpointName> {
    let elem = parent.required_child("name", "<name>the name of a checkpoint</name>")?;
    elem.only_attrs(&[])?;
    elem.text().parse().map_err(|error: Error| placed(elem, &error))
}

/// The same error, with its place in the document.
fn placed(elem: Elem<'_, '_>, error: &Error) -> Error {
    let placed = elem.fault(error.message().to_owned());
    match error.next_step() {
        Some(hint) => placed.hint(hint),
        None => placed,
    }
}

fn name_of_parent(elem: Elem<'_, '_>) -> Result<CheckpointName> {
    elem.only_attrs(&[])?;
    elem.only_children(None, &["name"])?;
    name(elem)
}

fn created(root: Elem<'_, '_>) -> Result<SystemTime> {
    let example = "<creationTime>seconds since 1970</creationTime>";
    let elem = root.required_child("creationTime", example)?;
    let text = elem.text();
    let seconds = text.parse().ok().map(Duration::from_secs);
    seconds
        .and_then(|seconds| UNIX_EPOCH.checked_add(seconds))
        .ok_or_else(|| elem.fault(format!("<creationTime> is {text:?}: expected {example}")))
}

fn covered(disks: Elem<'_, '_>, of: &CheckpointName) -> Result<Vec<CheckpointDisk>> {
    disks.only_attrs(&[])?;
    disks.only_children(None, &["disk"])?;
    let covered = disks.all("disk").filter_map(|elem| disk(elem, of).transpose());
    covered.collect()
}

fn disk(elem: Elem<'_, '_>, of: &CheckpointName) -> Result<Option<CheckpointDisk>> {
    elem.only_attrs(&["name", "checkpoint", "bitmap", "size"])?;
    elem.only_children(None, &[])?;
    let target = target_name(elem, "name")?;
    if elem.attr("checkpoint").is_some() && !elem.choice("checkpoint", &[("bitmap", true), ("no", false)])? {
        return Ok(None);
    }
    // As libvirt has it: a bitmap that is not named is called as its checkpoint is.
    let bitmap = match elem.attr("bitmap") {
        None => of.as_str(),
        Some(_) => elem.required("bitmap", "the name of the disk's bitmap")?,
    };
    let size = elem.attr("size").map(|text| {
        let wrong = || elem.attr_fault("size", format!("size='{text}': expected bytes, a whole number"));
        text.parse().map_err(|_| wrong())
    });
    Ok(Some(CheckpointDisk {
        target,
        id: None,
        size: size.transpose()?,
        mark: Mark::Bitmap(bitmap.to_owned()),
        volatile: false,
        anew: false,
    }))
}

/// A `<domaincheckpoints>` document of these, in this order; each `<domaincheckpoint>` in it is valid against libvirt's
/// schema, and none carries a `<domain>`.
///
/// Five things have no place in libvirt's form: fractions of a second, the id of a disk, that a bitmap is in memory
/// alone, that a disk begins anew (give it [`Lineage::without_gaps`](disksnap_core::Lineage::without_gaps)), and a
/// mark that is a kept snapshot; a disk with such a mark is `checkpoint='no'`.
///
/// # Errors
/// `Unsupported` for a description or a name that XML cannot hold.
pub fn checkpoints_document<'a>(checkpoints: impl IntoIterator<Item = &'a Checkpoint>) -> Result<String> {
    let elements = checkpoints.into_iter().map(element);
    Element::new("domaincheckpoints").children(elements).to_document()
}

fn element(checkpoint: &Checkpoint) -> Element {
    let since = checkpoint.created.duration_since(UNIX_EPOCH);
    let seconds = since.map_or(0, |since| since.as_secs());
    let named = |name: &CheckpointName| Element::new("name").text(name);
    let description = checkpoint.description.as_ref();
    let parent = checkpoint.parent.as_ref();
    let disks = checkpoint.disks.iter().map(disk_element);
    let disks = Element::new("disks").children(disks);
    Element::new("domaincheckpoint")
        .child(named(&checkpoint.name))
        .children(description.map(|text| Element::new("description").text(text)))
        .children(parent.map(|parent| Element::new("parent").child(named(parent))))
        .child(Element::new("creationTime").text(seconds))
        // The schema wants no empty <disks>.
        .children(disks.has_content().then_some(disks))
}

fn disk_element(disk: &CheckpointDisk) -> Element {
    let element = Element::new("disk").attr("name", &disk.target);
    match &disk.mark {
        Mark::Bitmap(bitmap) => element
            .attr("checkpoint", "bitmap")
            .attr("bitmap", bitmap)
            .attr_if("size", disk.size),
        Mark::Pinned(_) => element.attr("checkpoint", "no"),
    }
}
