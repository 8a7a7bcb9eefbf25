//! What a merge, a revert or a deletion changed, as a document that is only written.

use disksnap_core::{Altered, Result, SnapshotName};

use crate::domain::DomainDocument;
use crate::edit::carried_disk;
use crate::write::Element;

/// An element that tells what became of a snapshot: `<modifiedDisk>` for each disk that the domain uses otherwise
/// from now on, `<ended>`, `<deferred>` and `<warning>`.
///
/// # Errors
/// `Unsupported` for text that XML cannot hold.
pub fn altered_element(
    what: &str,
    snapshot: &SnapshotName,
    altered: &Altered,
    document: &DomainDocument,
) -> Result<Element> {
    let mut disks = Vec::new();
    for disk in &altered.disks {
        let (text, indent) = carried_disk(document, &disk.target, disk)?;
        disks.push(Element::new("modifiedDisk").child(Element::verbatim(text, indent)));
    }
    let texts = |name: &'static str, all: &[String]| {
        let each = all.iter().map(|text| Element::new(name).text(text));
        each.collect::<Vec<_>>()
    };
    let ended = altered.ended.iter();
    Ok(Element::new(what)
        .attr("name", snapshot)
        .attr("gone", if altered.gone { "yes" } else { "no" })
        .children(ended.map(|target| Element::new("ended").attr("disk", target)))
        .children(disks)
        .children(texts("deferred", &altered.deferred))
        .children(texts("warning", &altered.warnings)))
}
