//! A domain's document: its text as it was given, and what is read from it.

use std::collections::{HashMap, HashSet};
use std::fmt;

use disksnap_core::{Disk, Domain, DomainId, Error, MethodChoice, Result, Sockets};
use uuid::Uuid;

use crate::limits;
use crate::tree::{Elem, Tree};
use crate::{disk, method, source};

/// The namespace of what disksnap reads in a domain's `<metadata>`.
pub const DOMAIN_NAMESPACE: &str = "urn:disksnap:domain:1";

/// A libvirt `<domain>` document.
///
/// It keeps its text byte for byte. The `with_…` methods give a new document in which only the place
/// concerned differs; all that disksnap does not know goes along untouched.
#[derive(Clone, PartialEq, Eq)]
pub struct DomainDocument {
    pub(crate) text: String,
    pub(crate) domain: Domain,
    warnings: Vec<String>,
}

impl DomainDocument {
    /// Reads a domain document.
    ///
    /// Read are the name, the UUID, the disks, and in `<metadata>` the element `<domain>` of
    /// [`DOMAIN_NAMESPACE`]; see `docs/xml.md`.
    ///
    /// # Errors
    /// `Invalid`, naming line, column and element and what was expected there: for text that is not
    /// well-formed, has a DTD or is beyond the [limits](crate::MAX_BYTES); for a root that is no
    /// `<domain>`; for a missing name or target, a target twice, an impossible value.
    pub fn parse(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let (domain, warnings) = read(Tree::parse(&text)?.root_named("domain")?)?;
        Ok(Self {
            text,
            domain,
            warnings,
        })
    }

    /// [`DomainDocument::parse`] whose errors also say which document they are about.
    ///
    /// # Errors
    /// The same.
    pub fn parse_named(text: impl Into<String>, document: impl fmt::Display) -> Result<Self> {
        Self::parse(text).map_err(|error| error.with("document", document))
    }

    /// What was read.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// The document's text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the operator should know of the document: methods named for disks that are not there.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl fmt::Debug for DomainDocument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainDocument")
            .field("domain", &self.domain)
            .field("bytes", &self.text.len())
            .finish_non_exhaustive()
    }
}

fn read(root: Elem<'_, '_>) -> Result<(Domain, Vec<String>)> {
    let name = root.required_child("name", "<name>…</name>")?;
    let id = DomainId::new(
        domain_name(name)?,
        root.child("uuid")?.map(read_uuid).transpose()?,
    );
    let (mut disks, mut index) = (Vec::<Disk>::new(), HashMap::new());
    for elem in disk_elements(root) {
        let disk = disk::read(elem)?;
        if index.insert(disk.target.clone(), disks.len()).is_some() {
            let target = elem.child("target")?.unwrap_or(elem);
            return Err(target.attr_fault(
                "dev",
                format!("two disks have the target '{}': expected one", disk.target),
            ));
        }
        disks.push(disk);
    }
    let (sockets, methods) = read_metadata(root)?;
    let mut warnings = Vec::new();
    for (target, choice) in methods {
        match index.get(&target).map(|n| &mut disks[*n]) {
            // The disk's own element wins.
            Some(disk) => _ = disk.method.get_or_insert(choice),
            None => warnings.push(format!(
                "<metadata> names the method '{}' for the disk '{target}', which the domain does not have",
                choice.method
            )),
        }
    }
    Ok((Domain { id, disks, sockets }, warnings))
}

/// All `<disk>` elements of a domain.
pub(crate) fn disk_elements<'a, 't>(root: Elem<'a, 't>) -> impl Iterator<Item = Elem<'a, 't>> {
    root.all("devices").flat_map(|devices| devices.all("disk"))
}

fn domain_name(elem: Elem<'_, '_>) -> Result<String> {
    let name = elem.text();
    let fault = if name.is_empty() {
        "is empty: expected one"
    } else if name.contains('/') || name.chars().any(char::is_control) {
        "has a '/' or a control character: expected one without"
    } else {
        return Ok(name);
    };
    Err(elem.fault(format!("the domain's name {fault}")))
}

fn read_uuid(elem: Elem<'_, '_>) -> Result<Uuid> {
    let text = elem.text();
    // libvirt takes dashes wherever they are.
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let nothing_else = digits.chars().all(|c| c.is_ascii_hexdigit());
    match Uuid::try_parse(&digits) {
        Ok(uuid) if nothing_else => Ok(uuid),
        _ => Err(elem.fault(format!("'{text}' is no UUID: expected 32 hexadecimal digits"))),
    }
}

/// disksnap's own element in `<metadata>`.
pub(crate) fn our_metadata<'a, 't>(root: Elem<'a, 't>) -> Result<Option<Elem<'a, 't>>> {
    match root.child("metadata")? {
        Some(metadata) => metadata.child_in(Some(DOMAIN_NAMESPACE), "domain"),
        None => Ok(None),
    }
}

type Methods = Vec<(String, MethodChoice)>;

fn read_metadata(root: Elem<'_, '_>) -> Result<(Sockets, Methods)> {
    let Some(ours) = our_metadata(root)? else {
        return Ok((Sockets::default(), Vec::new()));
    };
    ours.only_attrs(&[])?;
    ours.only_children(Some(DOMAIN_NAMESPACE), &["monitor", "agent", "disk"])?;
    let sockets = Sockets {
        monitor: socket(ours, "monitor")?,
        agent: socket(ours, "agent")?,
    };
    let (mut seen, mut methods) = (HashSet::new(), Vec::new());
    for disk in metadata_disks(ours) {
        disk.only_attrs(&["target"])?;
        disk.only_children(Some(DOMAIN_NAMESPACE), &["diskSnapshot"])?;
        let target = disk::target_name(disk, "target")?;
        if !seen.insert(target.clone()) {
            return Err(disk.attr_fault(
                "target",
                format!("the disk '{target}' comes twice: expected it once"),
            ));
        }
        if let Some(choice) = disk.child_in(Some(DOMAIN_NAMESPACE), "diskSnapshot")? {
            methods.push((target, method::read(choice)?));
        }
    }
    Ok((sockets, methods))
}

/// The `<disk>` elements in disksnap's metadata.
pub(crate) fn metadata_disks<'a, 't>(ours: Elem<'a, 't>) -> impl Iterator<Item = Elem<'a, 't>> {
    ours.children()
        .filter(|child| child.is(Some(DOMAIN_NAMESPACE), "disk"))
}

fn socket(ours: Elem<'_, '_>, name: &str) -> Result<Option<std::path::PathBuf>> {
    let Some(elem) = ours.child_in(Some(DOMAIN_NAMESPACE), name)? else {
        return Ok(None);
    };
    elem.only_attrs(&["path"])?;
    elem.only_children(Some(DOMAIN_NAMESPACE), &[])?;
    source::absolute(elem, "path").map(Some)
}

/// The text of a file or a pipe.
///
/// # Errors
/// `Invalid` when it is longer than [`MAX_BYTES`](crate::MAX_BYTES) or not UTF-8, with the line and
/// column where it stops being that.
pub fn text_of(bytes: Vec<u8>) -> Result<String> {
    text_within(bytes, limits::ONE)
}

/// The text of a set of checkpoints.
///
/// # Errors
/// As [`text_of`], but for the length: `Invalid` when it is longer than [`MAX_SET_BYTES`](crate::MAX_SET_BYTES).
pub fn set_text_of(bytes: Vec<u8>) -> Result<String> {
    text_within(bytes, limits::SET)
}

fn text_within(bytes: Vec<u8>, bounds: limits::Bounds) -> Result<String> {
    limits::check_length(bytes.len(), bounds)?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let before = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
        let (line, column) = limits::position(&before, valid);
        Error::new(
            disksnap_core::ErrorKind::Invalid,
            "the document is not UTF-8: expected UTF-8, whatever its XML declaration says",
        )
        .with("line", line)
        .with("column", column)
    })
}
