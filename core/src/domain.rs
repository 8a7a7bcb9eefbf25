//! A domain: one virtual machine, its disks, and where it answers.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Disk, Error, ErrorKind, Result};

/// What tells one domain from all others: its UUID; the name is for people.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DomainId {
    /// `<uuid>`; derived from the name where the document has none.
    pub uuid: Uuid,
    /// `<name>`
    pub name: String,
}

impl DomainId {
    /// The id of a domain whose document has a name and perhaps no UUID.
    ///
    /// Without a UUID one is derived from the name, the same each time.
    #[must_use]
    pub fn new(name: impl Into<String>, uuid: Option<Uuid>) -> Self {
        let name = name.into();
        let uuid = uuid
            .unwrap_or_else(|| Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("urn:disksnap:{name}").as_bytes()));
        Self { uuid, name }
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Where a domain answers on this host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sockets {
    /// The unix socket of the hypervisor's monitor (QMP).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<PathBuf>,
    /// The unix socket of the guest agent's channel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
}

/// A virtual machine as its document describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Which domain it is.
    pub id: DomainId,
    /// Its disks, in the document's order. Targets are unique.
    pub disks: Vec<Disk>,
    /// Where it answers.
    #[serde(default)]
    pub sockets: Sockets,
}

impl Domain {
    /// The disk with this target.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], naming the disks that come near.
    pub fn disk(&self, target: &str) -> Result<&Disk> {
        self.disks.iter().find(|d| d.target == target).ok_or_else(|| {
            let known = self.disks.iter().map(|d| d.target.as_str());
            Error::new(ErrorKind::NotFound, format!("the domain has no disk '{target}'"))
                .with("domain", &self.id)
                .hint(crate::names::nearest("disks", target, known))
        })
    }

    /// Puts a disk in the place of the one with its target, where there is one (`modifiedDisk`).
    pub fn replace_disk(&mut self, disk: Disk) {
        if let Some(old) = self.disks.iter_mut().find(|old| old.target == disk.target) {
            *old = disk;
        }
    }
}
