//! New domain documents from old ones: each differs in one place, and all other bytes stay.

use disksnap_core::{
    CheckpointName, DataStore, Disk, Error, ErrorKind, Export, MethodChoice, NbdServer, Result, Serving,
    Source,
};

use crate::block_export::{export_element, serving_elements};
use crate::block_snapshot::SnapshotView;
use crate::disk::driver_element;
use crate::domain::{DOMAIN_NAMESPACE, DomainDocument, disk_elements, metadata_disks, our_metadata};
use crate::limits::{Scanner, tag_name};
use crate::source::{Carried, backing_with, data_store_element, source_element};
use crate::splice::Edit;
use crate::tree::{Elem, Tree};
use crate::write::{Element, reindent};
use crate::{method, source};

impl DomainDocument {
    /// The active domain's document (F6): `<blockexport>` in `<devices>`, in the place of any that is there.
    ///
    /// Without a server there is none, and what was there is taken out.
    ///
    /// # Errors
    /// `Unsupported` for a path or name that XML cannot hold.
    pub fn with_exports(&self, server: Option<&NbdServer>, exports: &[Export]) -> Result<Self> {
        let new = server.map(|server| export_element(server, exports)).transpose()?;
        self.in_devices("blockexport", &Vec::from_iter(new))
    }

    /// [`DomainDocument::with_exports`] for each of a domain's servers that runs.
    ///
    /// # Errors
    /// The same.
    pub fn with_serving(&self, serving: &Serving) -> Result<Self> {
        self.in_devices("blockexport", &serving_elements(serving)?)
    }

    /// The active domain's document with its snapshots: a `<domainblocksnapshot>` each in `<devices>`, in the
    /// place of any that are there.
    ///
    /// # Errors
    /// As [`snapshot_document`](crate::snapshot_document).
    pub fn with_snapshots(&self, snapshots: &[SnapshotView<'_>]) -> Result<Self> {
        let new: Vec<Element> = snapshots
            .iter()
            .map(SnapshotView::element)
            .collect::<Result<_>>()?;
        self.in_devices("domainblocksnapshot", &new)
    }

    /// The document with these elements in `<devices>`, in the place of those of that name.
    fn in_devices(&self, name: &str, new: &[Element]) -> Result<Self> {
        let tree = Tree::parse(&self.text)?;
        let root = tree.root();
        let old: Vec<_> = root
            .all("devices")
            .flat_map(|devices| devices.all(name))
            .collect();
        let mut edit = Edit::new(&self.text);
        if !put_in_place(&mut edit, &old, new)? {
            match root.all("devices").last() {
                Some(devices) => edit.append(devices, new)?,
                None => edit.append(root, &[Element::new("devices").children(new.to_vec())])?,
            }
        }
        Self::parse(edit.apply())
    }

    /// `<checkpoint name='…'/>` elements in a disk, in the place of any that are there.
    ///
    /// # Errors
    /// `NotFound` for an unknown target; `Unsupported` for a name that XML cannot hold.
    pub fn with_checkpoints(&self, target: &str, names: &[CheckpointName]) -> Result<Self> {
        let tree = Tree::parse(&self.text)?;
        let disk = self.element(&tree, target)?;
        let new: Vec<Element> = names
            .iter()
            .map(|name| Element::new("checkpoint").attr("name", name))
            .collect();
        let old: Vec<_> = disk.all("checkpoint").collect();
        let mut edit = Edit::new(&self.text);
        if !put_in_place(&mut edit, &old, &new)? {
            edit.append(disk, &new)?;
        }
        Self::parse(edit.apply())
    }

    /// The document after a snapshot or merge has given a disk other images (`modifiedDisk`).
    ///
    /// Only the type, `<driver name='…' type='…'>`, `<source>` and `<backingStore>` of that disk change, and each
    /// only where the value differs from what the document says. A `<source>` that moves up or down
    /// the backing chain keeps its own text: its encryption, authentication and security labels. What
    /// stands beside it in the `<disk>`, such as an `<auth>` of its own, stays there.
    ///
    /// # Errors
    /// `NotFound` for an unknown target; `Invalid` when `disk` has another target; `Unsupported` as
    /// [`source_element`].
    pub fn with_disk(&self, target: &str, disk: &Disk) -> Result<Self> {
        let old = self.domain.disk(target)?;
        if disk.target != target {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the disk '{target}' cannot be replaced by the disk '{}'",
                    disk.target
                ),
            ));
        }
        let tree = Tree::parse(&self.text)?;
        let elem = self.element(&tree, target)?;
        let mut edit = Edit::new(&self.text);
        let mut missing = Vec::new();
        if disk.source.is_some()
            && disk.source.as_ref().map(Source::kind) != Some(elem.attr("type").unwrap_or("file"))
        {
            edit.set_attr(elem, "type", disk.source.as_ref().map_or("file", |s| s.kind()))?;
        }
        if disk.driver != old.driver {
            match elem.child("driver")? {
                Some(driver) => {
                    set_or_remove(&mut edit, driver, "name", disk.driver.name.as_deref())?;
                    set_or_remove(&mut edit, driver, "type", disk.driver.format.as_deref())?;
                }
                None => missing.extend(driver_element(&disk.driver)),
            }
        }
        let known = Known::of(&self.text, &edit, elem, disk)?;
        if disk.source != old.source || disk.data_store != old.data_store {
            let new = disk
                .source
                .as_ref()
                .map(|s| known.source(s, disk.data_store.as_ref()))
                .transpose()?;
            put_child(&mut edit, elem.child("source")?, new, &mut missing)?;
        }
        // What a document says of the layers below one image is not true of another.
        if disk.backing != old.backing || disk.source != old.source {
            let carry = |source: &Source| known.carry(source);
            let new = match (&disk.backing, &disk.source) {
                (Some(backing), _) => backing_with(backing, &carry)?,
                // What was the end of the chain is still its end.
                (None, Some(top)) => carry(top)
                    .filter(|known| known.last)
                    .map(|_| Element::new("backingStore")),
                (None, None) => None,
            };
            put_child(&mut edit, elem.child("backingStore")?, new, &mut missing)?;
        }
        if let (Some(place), false) = (elem.child("target")?, missing.is_empty()) {
            edit.insert_before(place, &missing)?;
        }
        Self::parse(edit.apply())
    }

    /// The document with another method for a disk (D7), or with none.
    ///
    /// The element is changed where it is: in the `<disk>`, or else in `<metadata>`. A new one goes
    /// into the `<disk>`. Without a method both are taken out.
    ///
    /// # Errors
    /// `NotFound` for an unknown target; `Unsupported` for options that XML cannot hold.
    pub fn with_method(&self, target: &str, choice: Option<&MethodChoice>) -> Result<Self> {
        let tree = Tree::parse(&self.text)?;
        let disk = self.element(&tree, target)?;
        let own = disk.child("diskSnapshot")?;
        let in_metadata = match our_metadata(tree.root())? {
            Some(ours) => metadata_disks(ours)
                .find(|d| d.attr("target") == Some(target))
                .map(|d| d.child_in(Some(DOMAIN_NAMESPACE), "diskSnapshot"))
                .transpose()?
                .flatten(),
            None => None,
        };
        let mut edit = Edit::new(&self.text);
        match (choice, own, in_metadata) {
            (None, own, other) => {
                for elem in own.into_iter().chain(other) {
                    edit.remove(elem);
                }
            }
            (Some(choice), Some(own), _) => edit.replace(own, &[method::element(choice, "")?])?,
            (Some(choice), None, Some(other)) => {
                let prefix = prefix_of(&self.text, other);
                edit.replace(other, &[method::element(choice, prefix)?])?;
            }
            (Some(choice), None, None) => edit.append(disk, &[method::element(choice, "")?])?,
        }
        Self::parse(edit.apply())
    }

    /// Whether a disk's element says where its chain of images ends: by a `<backingStore/>` without anything in it.
    ///
    /// # Errors
    /// `NotFound` for an unknown target.
    pub fn ends_chain(&self, target: &str) -> Result<bool> {
        let tree = Tree::parse(&self.text)?;
        let (mut at, mut said) = (self.element(&tree, target)?, false);
        while let Some(below) = at.child("backingStore")? {
            (at, said) = (below, true);
        }
        Ok(said && at.children().next().is_none())
    }

    pub(crate) fn element<'a, 't>(&self, tree: &'a Tree<'t>, target: &str) -> Result<Elem<'a, 't>> {
        self.domain.disk(target)?;
        for elem in disk_elements(tree.root()) {
            if elem.child("target")?.and_then(|t| t.attr("dev")) == Some(target) {
                return Ok(elem);
            }
        }
        Err(Error::new(ErrorKind::Internal, "a disk that was read is not in its text").with("disk", target))
    }
}

/// Puts new elements where the first of the old ones is; says whether nothing is left to be put anywhere.
fn put_in_place(edit: &mut Edit<'_>, old: &[Elem<'_, '_>], new: &[Element]) -> Result<bool> {
    let kept = usize::from(!new.is_empty());
    if let (Some(first), 1) = (old.first(), kept) {
        edit.replace(*first, new)?;
    }
    for elem in old.iter().skip(kept) {
        edit.remove(*elem);
    }
    Ok(!old.is_empty() || new.is_empty())
}

/// Replaces or removes a child, or leaves the new one to be put in with what else is missing.
fn put_child(
    edit: &mut Edit<'_>,
    old: Option<Elem<'_, '_>>,
    new: Option<Element>,
    missing: &mut Vec<Element>,
) -> Result<()> {
    match (old, new) {
        (Some(old), Some(new)) => edit.replace(old, &[new])?,
        (Some(old), None) => edit.remove(old),
        (None, new) => missing.extend(new),
    }
    Ok(())
}

fn set_or_remove(edit: &mut Edit<'_>, elem: Elem<'_, '_>, name: &str, value: Option<&str>) -> Result<()> {
    match value {
        Some(value) if elem.attr(name) != Some(value) => edit.set_attr(elem, name, value),
        Some(_) => Ok(()),
        None => {
            edit.remove_attr(elem, name);
            Ok(())
        }
    }
}

/// The namespace prefix of an element as the text has it, with its colon.
fn prefix_of<'t>(text: &'t str, elem: Elem<'_, '_>) -> &'t str {
    let name = tag_name(&text[elem.range().start + 1..]);
    name.find(':').map_or("", |colon| &name[..=colon])
}

/// How an element's line is indented.
fn indent_of(edit: &Edit<'_>, elem: Elem<'_, '_>) -> String {
    edit.layout(elem).map_or_else(String::new, |layout| layout.indent)
}

/// The sources that a disk's element names now, with their text.
struct Known {
    sources: Vec<(Source, Carried)>,
    /// `<encryption>` in the top source, to be kept as long as the disk stays encrypted.
    encryption: Option<(String, String)>,
}

impl Known {
    fn of(text: &str, edit: &Edit<'_>, disk: Elem<'_, '_>, new: &Disk) -> Result<Self> {
        let indent = |elem: Elem<'_, '_>| indent_of(edit, elem);
        let mut sources = Vec::new();
        let mut layer = Some(disk);
        while let Some(elem) = layer {
            let below = elem.child("backingStore")?;
            if let Some(at) = elem.child("source")?
                && let Some(source) = source::read(at, elem.attr("type").unwrap_or("file"))?
            {
                let carried = Carried {
                    text: text[at.range()].to_owned(),
                    indent: indent(at),
                    data: source::read_data_store(at)?,
                    last: below.is_some_and(|b| b.children().next().is_none()),
                };
                sources.push((source, carried));
                sources.extend(Self::data_of(text, edit, at)?);
            }
            layer = below;
        }
        let encryption = match disk.child("source")? {
            Some(top) if new.encrypted => top.child("encryption")?,
            _ => None,
        };
        let encryption = encryption.map(|e| (text[e.range()].to_owned(), indent(e)));
        Ok(Self { sources, encryption })
    }

    /// The source within the `<dataStore>` of another.
    fn data_of(text: &str, edit: &Edit<'_>, source: Elem<'_, '_>) -> Result<Option<(Source, Carried)>> {
        let Some(data) = source::read_data_store(source)? else {
            return Ok(None);
        };
        let place = source.child("dataStore")?.map(|store| store.child("source"));
        let Some(at) = place.transpose()?.flatten() else {
            return Ok(None);
        };
        let carried = Carried {
            text: text[at.range()].to_owned(),
            indent: indent_of(edit, at),
            data: None,
            last: false,
        };
        Ok(Some((data.source, carried)))
    }

    fn carry(&self, source: &Source) -> Option<Carried> {
        let mut found = self.sources.iter().filter(|(known, _)| known == source);
        let (_, first) = found.next()?;
        // Of a kind that is not looked into, two that look the same need not be.
        let unclear = matches!(source, Source::Other { .. }) && found.next().is_some();
        (!unclear).then(|| first.clone())
    }

    /// The element for the top image.
    fn source(&self, source: &Source, data: Option<&DataStore>) -> Result<Element> {
        if let Some(Carried { text, indent, .. }) = self.carry(source).filter(|c| c.data.as_ref() == data) {
            return Ok(Element::verbatim(text, indent));
        }
        let carry = |source: &Source| self.carry(source);
        let data = data.map(|data| data_store_element(data, &carry)).transpose()?;
        let element = source_element(source)?.children(data);
        Ok(match &self.encryption {
            Some((text, indent)) => element.child(Element::verbatim(text, indent)),
            None => element,
        })
    }
}

/// The `<disk>` element alone, as it is after [`DomainDocument::with_disk`], for a hypervisor that is
/// to be told of it (`modifiedDisk`). It has no newline at its end and starts at the margin.
///
/// What libvirt's schema does not know and disksnap reads, `<diskSnapshot>` and `<checkpoint>`, is left out.
///
/// # Errors
/// As [`DomainDocument::with_disk`].
pub fn disk_element(document: &DomainDocument, target: &str, disk: &Disk) -> Result<String> {
    carried_disk(document, target, disk).map(|(text, indent)| reindent(&text, &indent, ""))
}

/// The text of that element and the indentation that it has there.
pub(crate) fn carried_disk(document: &DomainDocument, target: &str, disk: &Disk) -> Result<(String, String)> {
    let mut document = document.with_disk(target, disk)?;
    {
        let tree = Tree::parse(&document.text)?;
        let elem = document.element(&tree, target)?;
        let mut edit = Edit::new(&document.text);
        for strange in elem.all("diskSnapshot").chain(elem.all("checkpoint")) {
            edit.remove(strange);
        }
        document = DomainDocument::parse(edit.apply())?;
    }
    let tree = Tree::parse(&document.text)?;
    let elem = document.element(&tree, target)?;
    let indent = Edit::new(&document.text)
        .layout(elem)
        .map_or_else(String::new, |layout| layout.indent);
    debug_assert!(Scanner::new(&document.text[elem.range()]).next().is_some());
    Ok((document.text[elem.range()].to_owned(), indent))
}
