//! What makes a machine of its disks, where a domain's document says that it is; and the document of a machine whose disks
//! were restored elsewhere.

use std::path::{Path, PathBuf};

use disksnap_core::{Disk, Error, ErrorKind, Result, Source};
use uuid::Uuid;

use crate::domain::{DOMAIN_NAMESPACE, DomainDocument, disk_elements, metadata_disks, our_metadata};
use crate::source::{self, absolute, source_element, unicode};
use crate::splice::Edit;
use crate::tree::{Elem, Tree};
use crate::write::Element;

/// Where libvirt's system instance keeps the state of emulated TPMs whose place the document does not name.
const SWTPM: &str = "/var/lib/libvirt/swtpm";

/// The EFI variables of a domain: `<nvram>`, or `<varstore>` (libvirt ≥ 12.1), in `<os>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EfiVariables {
    /// Where they are; `None` where the document leaves that to libvirt.
    pub source: Option<Source>,
    /// What libvirt makes new ones from.
    pub template: Option<PathBuf>,
}

/// Where an emulated TPM keeps its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TpmPlace {
    /// In files of this directory.
    Directory(PathBuf),
    /// In this file.
    File(PathBuf),
}

impl TpmPlace {
    /// The directory or file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::File(path) => path,
        }
    }
}

/// A domain's TPM: `<tpm>` in `<devices>`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tpm {
    /// swtpm, which libvirt starts.
    Emulated {
        /// Where its state is. Several where the document does not say it: libvirt's own places, of which one exists.
        /// None where it can only be known from a UUID that the document does not have.
        places: Vec<TpmPlace>,
        /// Whether the document names the place (`<source>`, libvirt ≥ 10.10).
        named: bool,
    },
    /// One whose state is not a file of this host that libvirt knows of: `passthrough`, `external`.
    Other {
        /// The backend's type.
        kind: String,
    },
}

/// What a restored machine is to be: see [`DomainDocument::restored`].
#[derive(Debug, Clone, Default)]
pub struct RestoredAs {
    /// The disks that were restored. The others are kept as they are.
    pub disks: Vec<RestoredDisk>,
    /// Where the EFI variables are now.
    pub efi_variables: Option<PathBuf>,
    /// Where the TPM's state is now. It is written down where the document named the place before; elsewhere libvirt
    /// decides where it is looked for, and a warning says so.
    pub tpm: Option<TpmPlace>,
    /// Another name.
    pub name: Option<String>,
    /// Another UUID: the machine is a second one beside the first, not the first again.
    pub uuid: Option<Uuid>,
}

/// A disk that was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoredDisk {
    /// Its target.
    pub target: String,
    /// Where it is now.
    pub source: Source,
    /// In what format: `raw`, `qcow2`.
    pub format: String,
}

impl DomainDocument {
    /// Where the domain's EFI variables are; `None` where it has none.
    ///
    /// # Errors
    /// `Invalid` for a path that is not absolute, and as [`DomainDocument::parse`] for a `<source>`.
    pub fn efi_variables(&self) -> Result<Option<EfiVariables>> {
        let tree = Tree::parse(&self.text)?;
        let Some(elem) = efi_element(tree.root())? else {
            return Ok(None);
        };
        let path = |name: &str| elem.attr(name).map(|_| absolute(elem, name)).transpose();
        let template = path("template")?;
        if elem.name() == "varstore" {
            let source = path("path")?.map(|file| Source::File { file });
            return Ok(Some(EfiVariables { source, template }));
        }
        let source = match elem.child("source")? {
            Some(place) => source::read(place, elem.attr("type").unwrap_or("file"))?,
            None => plain_path(elem)?.map(|file| Source::File { file }),
        };
        Ok(Some(EfiVariables { source, template }))
    }

    /// The domain's TPM; `None` where it has none. Of several the emulated one, which is the one that has a state.
    ///
    /// # Errors
    /// `Invalid` for a place that is not absolute, or of an unknown type.
    pub fn tpm(&self) -> Result<Option<Tpm>> {
        let tree = Tree::parse(&self.text)?;
        let root = tree.root();
        if let Some(backend) = emulator(root)? {
            let named = backend.child("source")?.map(tpm_place).transpose()?;
            return Ok(Some(Tpm::Emulated {
                named: named.is_some(),
                places: match (named, root.child("uuid")?) {
                    (Some(place), _) => vec![place],
                    (None, Some(_)) => default_places(self.domain.id.uuid, backend.attr("version")),
                    (None, None) => Vec::new(),
                },
            }));
        }
        let other = tpm_backends(root)?.into_iter().next();
        Ok(other.map(|backend| Tpm::Other {
            kind: backend.attr("type").unwrap_or("unknown").to_owned(),
        }))
    }

    /// The document of this machine after its disks were restored elsewhere, and what its operator should know of it.
    ///
    /// Of each restored disk the source and format change; its backing images, encryption and authentication are gone,
    /// since what was restored stands alone and holds what the guest saw. EFI variables and TPM are found where they were
    /// restored. What only describes the former machine's state is dropped: `<diskSnapshot>`, `<checkpoint>`,
    /// `<domainblocksnapshot>`, `<blockexport>`, the methods of restored disks in `<metadata>`. `<genid>` is emptied, so that the guest learns that
    /// time has gone back. With another UUID the machine is a second one: the addresses of its network cards are dropped, so that libvirt
    /// makes new ones, and disksnap's own `<monitor>` and `<agent>`; nothing is left that both would write to
    /// but disks that were not restored, of which a warning tells.
    ///
    /// Every other byte stays.
    ///
    /// # Errors
    /// `NotFound` for a disk that the document does not have; `Invalid` for an impossible name; `Unsupported` for a path
    /// that XML cannot hold.
    pub fn restored(&self, machine: &RestoredAs) -> Result<(Self, Vec<String>)> {
        let mut warnings = Vec::new();
        let mut document = self.clone();
        for disk in &machine.disks {
            document = document.with_restored(disk, &mut warnings)?;
        }
        let tree = Tree::parse(&document.text)?;
        let root = tree.root();
        let second = machine.uuid.is_some_and(|uuid| uuid != self.domain.id.uuid);
        let mut edit = Edit::new(&document.text);
        drop_state(&mut edit, root, machine, second)?;
        rename(&mut edit, root, machine)?;
        move_efi_variables(&mut edit, root, machine, second, &mut warnings)?;
        move_tpm(&mut edit, root, machine, second, &mut warnings)?;
        if second {
            drop_addresses(&mut edit, root);
        }
        let restored = Self::parse(edit.apply())?;
        warnings.extend(not_restored(&self.domain.disks, machine, second));
        Ok((restored, warnings))
    }

    fn with_restored(&self, new: &RestoredDisk, warnings: &mut Vec<String>) -> Result<Self> {
        let mut disk = self.domain.disk(&new.target)?.clone();
        disk.source = Some(new.source.clone());
        disk.driver.format = Some(new.format.clone());
        (disk.data_store, disk.backing) = (None, None);
        disk.encrypted = false;
        let document = self.with_disk(&new.target, &disk)?;
        let tree = Tree::parse(&document.text)?;
        let elem = document.element(&tree, &new.target)?;
        let mut edit = Edit::new(&document.text);
        let within = elem.child("source")?.into_iter();
        let gone = ["encryption", "auth", "mirror"];
        for place in within.chain([elem]) {
            place
                .children()
                .filter(|child| child.namespace().is_none() && gone.contains(&child.name()))
                .for_each(|child| edit.remove(child));
        }
        if let (Some(driver), true) = (elem.child("driver")?, new.format != "qcow2") {
            driver.all("metadata_cache").for_each(|child| edit.remove(child));
            edit.remove_attr(driver, "discard_no_unref");
        }
        if elem.attr("device") == Some("lun") && new.source.kind() == "file" {
            edit.set_attr(elem, "device", "disk")?;
            edit.remove_attr(elem, "rawio");
            edit.remove_attr(elem, "sgio");
            warnings.push(format!(
                "the disk '{}' was a SCSI unit passed through; as a file it is a plain disk",
                new.target
            ));
        }
        Self::parse(edit.apply())
    }
}

/// `<nvram>` or `<varstore>`.
fn efi_element<'a, 't>(root: Elem<'a, 't>) -> Result<Option<Elem<'a, 't>>> {
    let Some(os) = root.child("os")? else {
        return Ok(None);
    };
    Ok(os.child("varstore")?.or(os.child("nvram")?))
}

fn plain_path(elem: Elem<'_, '_>) -> Result<Option<PathBuf>> {
    let text = elem.text();
    match text.as_str() {
        "" => Ok(None),
        path if path.starts_with('/') => Ok(Some(path.into())),
        other => Err(elem.fault(format!("'{other}': expected an absolute path"))),
    }
}

fn tpm_backends<'a, 't>(root: Elem<'a, 't>) -> Result<Vec<Elem<'a, 't>>> {
    let all = root.all("devices").flat_map(|devices| devices.all("tpm"));
    Ok(all
        .map(|tpm| tpm.child("backend"))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect())
}

fn emulator<'a, 't>(root: Elem<'a, 't>) -> Result<Option<Elem<'a, 't>>> {
    let backends = tpm_backends(root)?;
    Ok(backends
        .into_iter()
        .find(|backend| backend.attr("type") == Some("emulator")))
}

fn tpm_place(source: Elem<'_, '_>) -> Result<TpmPlace> {
    let place: fn(PathBuf) -> TpmPlace = source.choice(
        "type",
        &[("dir", TpmPlace::Directory as _), ("file", TpmPlace::File as _)],
    )?;
    absolute(source, "path").map(place)
}

fn default_places(uuid: Uuid, version: Option<&str>) -> Vec<TpmPlace> {
    let of = |name: &str| TpmPlace::Directory(Path::new(SWTPM).join(uuid.to_string()).join(name));
    match version {
        Some("2.0") => vec![of("tpm2")],
        Some("1.2") => vec![of("tpm1.2")],
        _ => vec![of("tpm2"), of("tpm1.2")],
    }
}

/// Takes out what only says in what state the former machine was.
fn drop_state(edit: &mut Edit<'_>, root: Elem<'_, '_>, machine: &RestoredAs, second: bool) -> Result<()> {
    for devices in root.all("devices") {
        for view in devices
            .all("blockexport")
            .chain(devices.all("domainblocksnapshot"))
        {
            edit.remove(view);
        }
    }
    for disk in disk_elements(root) {
        for view in disk.all("checkpoint").chain(disk.all("diskSnapshot")) {
            edit.remove(view);
        }
    }
    for genid in root.all("genid").filter(|genid| !genid.text().is_empty()) {
        edit.replace(genid, &[Element::new("genid")])?;
    }
    let Some(ours) = our_metadata(root)? else {
        return Ok(());
    };
    let restored = |target: Option<&str>| machine.disks.iter().any(|d| Some(d.target.as_str()) == target);
    for disk in metadata_disks(ours).filter(|disk| restored(disk.attr("target"))) {
        edit.remove(disk);
    }
    for name in ["monitor", "agent"].iter().filter(|_| second) {
        if let Some(socket) = ours.child_in(Some(DOMAIN_NAMESPACE), name)? {
            edit.remove(socket);
        }
    }
    Ok(())
}

fn rename(edit: &mut Edit<'_>, root: Elem<'_, '_>, machine: &RestoredAs) -> Result<()> {
    let name = root.required_child("name", "<name>…</name>")?;
    if let Some(new) = &machine.name {
        if new.trim() != new || new.is_empty() || new.contains('/') || new.chars().any(char::is_control) {
            let why = format!(
                "'{new}' cannot be a domain's name: expected no '/', no control character, no space at its ends"
            );
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        edit.set_text(name, new)?;
    }
    let Some(uuid) = machine.uuid else {
        return Ok(());
    };
    match root.child("uuid")? {
        Some(old) => edit.set_text(old, &uuid.to_string())?,
        None => edit.insert_after(name, &[Element::new("uuid").text(uuid)])?,
    }
    // libvirt refuses a domain whose SMBIOS tells another UUID.
    let entries = root
        .all("sysinfo")
        .flat_map(|info| info.all("system").flat_map(|system| system.all("entry")));
    for entry in entries.filter(|entry| entry.attr("name") == Some("uuid")) {
        edit.set_text(entry, &uuid.to_string())?;
    }
    Ok(())
}

fn move_efi_variables(
    edit: &mut Edit<'_>,
    root: Elem<'_, '_>,
    machine: &RestoredAs,
    second: bool,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let Some(elem) = efi_element(root)? else {
        return Ok(());
    };
    if let Some(path) = &machine.efi_variables {
        return set_efi_path(edit, elem, path);
    }
    if !second {
        return Ok(());
    }
    warnings
        .push("the EFI variables were not restored: the guest's firmware begins with new ones".to_owned());
    match (elem.name(), elem.child("source")?) {
        ("varstore", _) => edit.remove_attr(elem, "path"),
        (_, Some(source)) => {
            edit.remove(source);
            edit.remove_attr(elem, "type");
        }
        (_, None) if elem.text().is_empty() => (),
        (_, None) => edit.set_text(elem, "")?,
    }
    Ok(())
}

fn set_efi_path(edit: &mut Edit<'_>, elem: Elem<'_, '_>, path: &Path) -> Result<()> {
    match (elem.name(), elem.child("source")?) {
        ("varstore", _) => edit.set_attr(elem, "path", unicode(path)?),
        (_, None) => edit.set_text(elem, unicode(path)?),
        (_, Some(old)) => {
            let source = Source::File {
                file: path.to_owned(),
            };
            if elem.attr("type").unwrap_or("file") != "file" {
                edit.set_attr(elem, "type", "file")?;
            }
            edit.replace(old, &[source_element(&source)?])
        }
    }
}

fn move_tpm(
    edit: &mut Edit<'_>,
    root: Elem<'_, '_>,
    machine: &RestoredAs,
    second: bool,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let Some(backend) = emulator(root)? else {
        return Ok(());
    };
    match (&machine.tpm, backend.child("source")?) {
        (Some(place), Some(source)) => {
            let kind = match place {
                TpmPlace::Directory(_) => "dir",
                TpmPlace::File(_) => "file",
            };
            edit.set_attr(source, "type", kind)?;
            edit.set_attr(source, "path", unicode(place.path())?)?;
        }
        (Some(place), None) => warnings.push(format!(
            "the TPM's state is in {}; before the machine starts, move it to {} as the user of swtpm",
            place.path().display(),
            libvirts_place(root, machine, backend)?
        )),
        (None, source) => {
            if let Some(source) = source.filter(|_| second) {
                edit.remove(source);
            }
            warnings.push("the TPM's state was not restored: the guest may find its TPM new".to_owned());
        }
    }
    Ok(())
}

/// Where libvirt looks for the state of the restored machine's TPM.
fn libvirts_place(root: Elem<'_, '_>, machine: &RestoredAs, backend: Elem<'_, '_>) -> Result<String> {
    let known = root.child("uuid")?.map(|uuid| uuid.text().parse().ok());
    let uuid: Option<Uuid> = machine.uuid.or(known.flatten());
    let version = backend.attr("version").unwrap_or("2.0");
    let place = uuid.and_then(|uuid| default_places(uuid, Some(version)).pop());
    Ok(place.map_or_else(
        || format!("{SWTPM}/UUID"),
        |place| place.path().display().to_string(),
    ))
}

/// Two machines must not have one address.
fn drop_addresses(edit: &mut Edit<'_>, root: Elem<'_, '_>) {
    let cards = root.all("devices").flat_map(|devices| devices.all("interface"));
    for mac in cards.flat_map(|card| card.all("mac")) {
        edit.remove(mac);
    }
}

fn not_restored(disks: &[Disk], machine: &RestoredAs, second: bool) -> Vec<String> {
    let kept = disks.iter().filter_map(|disk| {
        let restored = machine.disks.iter().any(|new| new.target == disk.target);
        disk.source.as_ref().filter(|_| !restored).map(|at| (disk, at))
    });
    let both = if second {
        ", which both machines then use"
    } else {
        ""
    };
    kept.map(|(disk, at)| {
        format!(
            "the disk '{}' was not restored: it stays what it was, {at}{both}",
            disk.target
        )
    })
    .collect()
}
