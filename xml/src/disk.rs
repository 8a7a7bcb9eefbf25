//! `<disk>`: read from a domain's document, or written anew.

use disksnap_core::{DeviceKind, Disk, Driver, Error, ErrorKind, MethodChoice, Result};

use crate::source::{backing_store_element, data_store_element, read_backing, source_element};
use crate::tree::Elem;
use crate::write::Element;
use crate::{method, source};

/// Reads a `<disk>`. Unknown content is none of its business.
pub(crate) fn read(elem: Elem<'_, '_>) -> Result<Disk> {
    let kind = elem.attr("type").unwrap_or("file");
    let source = elem.child("source")?;
    let target = elem.required_child("target", "<target dev='vda'/>, the disk's name in the guest")?;
    let backing = elem
        .child("backingStore")?
        .map(read_backing)
        .transpose()?
        .flatten();
    Ok(Disk {
        target: target_name(target, "dev")?,
        bus: target.attr("bus").map(str::to_owned),
        device: device(elem)?,
        alias: attr_of(elem, "alias", "name")?,
        driver: Driver {
            name: attr_of(elem, "driver", "name")?,
            format: attr_of(elem, "driver", "type")?,
        },
        source: source.map(|s| source::read(s, kind)).transpose()?.flatten(),
        data_store: source.map(source::read_data_store).transpose()?.flatten(),
        backing,
        serial: elem.child("serial")?.map(Elem::text).filter(|s| !s.is_empty()),
        read_only: elem.child("readonly")?.is_some(),
        shareable: elem.child("shareable")?.is_some(),
        encrypted: encrypted(elem),
        method: own_method(elem)?,
    })
}

fn own_method(elem: Elem<'_, '_>) -> Result<Option<MethodChoice>> {
    elem.child("diskSnapshot")?.map(method::read).transpose()
}

/// Whether the hypervisor encrypts any layer: what the guest reads is secret then.
fn encrypted(elem: Elem<'_, '_>) -> bool {
    let here = |e: Elem<'_, '_>| e.all("encryption").next().is_some();
    here(elem) || elem.all("source").any(here) || elem.all("backingStore").any(encrypted)
}

fn attr_of(elem: Elem<'_, '_>, child: &str, attr: &str) -> Result<Option<String>> {
    let child = elem.child(child)?;
    let value = child.and_then(|c| c.attr(attr));
    Ok(value.filter(|v| !v.is_empty()).map(str::to_owned))
}

fn device(elem: Elem<'_, '_>) -> Result<DeviceKind> {
    let known = [
        ("disk", DeviceKind::Disk),
        ("cdrom", DeviceKind::Cdrom),
        ("floppy", DeviceKind::Floppy),
        ("lun", DeviceKind::Lun),
    ];
    match elem.attr("device") {
        None => Ok(DeviceKind::Disk),
        Some(_) => elem.choice("device", &known),
    }
}

/// The name of a disk, which is used in file names and so must not lead anywhere.
pub(crate) fn target_name(elem: Elem<'_, '_>, attr: &str) -> Result<String> {
    let name = elem.required(attr, "the disk's name in the guest, such as vda")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
    if name.chars().all(plain) && !name.starts_with(['-', '.']) && name.len() <= 64 {
        return Ok(name.to_owned());
    }
    Err(elem.attr_fault(
        attr,
        format!(
            "{attr}='{name}' cannot be a disk's name: expected up to 64 letters, digits, '_', '-', '.' or ':'"
        ),
    ))
}

/// A `<disk>` with nothing but what the value says, as libvirt's schema wants it.
///
/// For a disk of a domain whose document is at hand use [`disk_element`](crate::disk_element), which
/// keeps all that the value does not say.
///
/// # Errors
/// `Unsupported` for an encrypted disk, whose secret the value does not name, and as [`source_element`].
pub fn new_disk_element(disk: &Disk) -> Result<Element> {
    if disk.encrypted {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "an encrypted disk cannot be written without the domain's document, which names its secret",
        )
        .with("disk", &disk.target));
    }
    let mut element = Element::new("disk")
        .attr("type", disk.source.as_ref().map_or("file", |s| s.kind()))
        .attr("device", disk.device)
        .children(driver_element(&disk.driver));
    if let Some(source) = &disk.source {
        let data = disk
            .data_store
            .as_ref()
            .map(|data| data_store_element(data, &|_| None))
            .transpose()?;
        element = element.child(source_element(source)?.children(data));
    }
    if let Some(backing) = &disk.backing {
        element = element.children(backing_store_element(backing)?);
    }
    let target = Element::new("target").attr("dev", &disk.target);
    let flag = |set: bool, name: &str| set.then(|| Element::new(name));
    Ok(element
        .child(target.attr_if("bus", disk.bus.as_ref()))
        .children(flag(disk.read_only, "readonly"))
        .children(flag(disk.shareable, "shareable"))
        .children(disk.serial.as_ref().map(|s| Element::new("serial").text(s)))
        .children(disk.alias.as_ref().map(|a| Element::new("alias").attr("name", a))))
}

/// `<driver name='…' type='…'/>`, unless there is nothing to say.
pub(crate) fn driver_element(driver: &Driver) -> Option<Element> {
    let said = driver.name.is_some() || driver.format.is_some();
    said.then(|| {
        Element::new("driver")
            .attr_if("name", driver.name.as_ref())
            .attr_if("type", driver.format.as_ref())
    })
}
