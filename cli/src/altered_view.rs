//! How the outcome of a merge or a revert looks.

use disksnap::xml::{self, Element};
use disksnap::{Altered, Disk, DomainDocument, Result, SnapshotName};
use serde::Serialize;

use crate::output::Text;
use crate::source_view::{SourceView, line};

/// What became of a snapshot and its disks.
#[derive(Debug, Serialize)]
pub(crate) struct AlteredView {
    snapshot: String,
    /// `merged`, `reverted`
    what: &'static str,
    ended: Vec<String>,
    gone: bool,
    disks: Vec<DiskView>,
    deferred: Vec<String>,
    warnings: Vec<String>,
}

/// A disk as the domain uses it from now on.
#[derive(Debug, Serialize)]
struct DiskView {
    target: String,
    source: Option<SourceView>,
    /// The `<disk>` element.
    xml: String,
    #[serde(skip)]
    line: String,
}

impl AlteredView {
    pub(crate) fn new(
        what: &'static str,
        name: &SnapshotName,
        altered: &Altered,
        document: &DomainDocument,
    ) -> Result<Self> {
        let disks = altered.disks.iter().map(|disk| DiskView::new(disk, document));
        Ok(Self {
            snapshot: name.to_string(),
            what,
            ended: altered.ended.clone(),
            gone: altered.gone,
            disks: disks.collect::<Result<_>>()?,
            deferred: altered.deferred.clone(),
            warnings: altered.warnings.clone(),
        })
    }
}

impl DiskView {
    fn new(disk: &Disk, document: &DomainDocument) -> Result<Self> {
        let format = disk.driver.format.as_deref();
        Ok(Self {
            target: disk.target.clone(),
            source: disk.source.as_ref().map(|s| SourceView::new(s, format)),
            xml: xml::disk_element(document, &disk.target, disk)?,
            line: disk.source.as_ref().map(line).unwrap_or_default(),
        })
    }
}

impl Text for AlteredView {
    fn text(&self) -> String {
        let mut lines = vec![format!("{} {}", self.what, self.snapshot)];
        lines.extend(self.deferred.iter().map(|why| format!("not yet: {why}")));
        let disk = |disk: &DiskView| format!("{}: the disk is now {}", disk.target, disk.line);
        lines.extend(self.disks.iter().map(disk));
        if self.ended.is_empty() {
            lines.push("the snapshot remains".to_owned());
        } else if !self.gone {
            lines.push(format!("the snapshot remains, without {}", self.ended.join(", ")));
        }
        lines.join("\n") + "\n"
    }
}

/// The same in XML.
pub(crate) fn document(
    what: &'static str,
    name: &SnapshotName,
    altered: &Altered,
    document: &DomainDocument,
) -> Result<String> {
    let element: Element = xml::altered_element(what, name, altered, document)?;
    element.to_document()
}
