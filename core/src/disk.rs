//! A disk of a domain, and the method that it names.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{BackingStore, DataStore, Source};

/// A disk as the domain's document describes it (`<disk>` in libvirt's domain format).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The guest-side name (`<target dev='vda'/>`); identifies the disk within its domain.
    pub target: String,
    /// The bus of the target (`virtio`, `scsi`, …), when given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// What kind of device the guest sees.
    #[serde(default)]
    pub device: DeviceKind,
    /// The device's alias (`<alias name='virtio-disk0'/>`), when the domain has given it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// How the hypervisor drives it.
    #[serde(default)]
    pub driver: Driver,
    /// Where its bytes are; `None` for an empty drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Where the top image keeps the data when not in itself, as far as the document says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_store: Option<DataStore>,
    /// The layers below the top image, as far as the document says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingStore>,
    /// The serial number that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// `<readonly/>`
    #[serde(default)]
    pub read_only: bool,
    /// `<shareable/>`: other domains may write it too.
    #[serde(default)]
    pub shareable: bool,
    /// `<encryption>`: the hypervisor encrypts what it writes.
    #[serde(default)]
    pub encrypted: bool,
    /// The disk's own `<diskSnapshot>`, when it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<MethodChoice>,
}

impl Disk {
    /// A plain writable disk with this target and source and nothing else said.
    pub fn new(target: impl Into<String>, source: Source) -> Self {
        Self {
            target: target.into(),
            bus: None,
            device: DeviceKind::Disk,
            alias: None,
            driver: Driver::default(),
            source: Some(source),
            data_store: None,
            backing: None,
            serial: None,
            read_only: false,
            shareable: false,
            encrypted: false,
            method: None,
        }
    }
}

/// What the guest sees (`<disk device='…'>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A hard disk.
    #[default]
    Disk,
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A whole SCSI unit passed through.
    Lun,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
            Self::Floppy => "floppy",
            Self::Lun => "lun",
        })
    }
}

/// How the hypervisor drives a disk (`<driver name='qemu' type='qcow2'/>`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Driver {
    /// The hypervisor's name for the driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The image format: `raw`, `qcow2`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
}

/// A method and the data that it is given: `<diskSnapshot method='…'>…</diskSnapshot>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MethodChoice {
    /// The name of the method.
    pub method: String,
    /// What the method is told.
    #[serde(default, skip_serializing_if = "Options::is_empty")]
    pub options: Options,
}

/// What a method is told, as ordered key and value pairs.
///
/// A key is the path of an attribute or a text inside the method's element, joined by dots:
/// `<fleece file='/f'/>` is `fleece.file=/f`, and `<volume><id>7</id></volume>` is `volume.id=7`.
/// A key may come more than once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Options(Vec<(String, String)>);

impl Options {
    /// Whether nothing was said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first value of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// All pairs in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// Adds a pair at the end.
    pub fn push(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.0.push((key.into(), value.into()));
    }

    /// The first key that is not among `known`, or that comes twice: what a provider must refuse.
    #[must_use]
    pub fn offender(&self, known: &[&str]) -> Option<&str> {
        let twice = |n: usize, key: &str| self.0[..n].iter().any(|(k, _)| k == key);
        let bad =
            |(n, (key, _)): &(usize, &(String, String))| !known.contains(&key.as_str()) || twice(*n, key);
        self.0
            .iter()
            .enumerate()
            .find(bad)
            .map(|(_, (key, _))| key.as_str())
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Options {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect())
    }
}
