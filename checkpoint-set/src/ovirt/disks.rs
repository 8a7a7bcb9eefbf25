//! Which of a domain's disks oVirt means by an id.

use std::collections::HashMap;
use std::path::{Component, Path};

use disksnap_core::{Disk, Domain, Error, ErrorKind, Result, Source};
use uuid::Uuid;

/// The ids of a domain's disks, both ways.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskIds {
    targets: HashMap<Uuid, String>,
    ids: HashMap<String, Uuid>,
}

impl DiskIds {
    /// The ids that the caller tells, as target and id; for other disks the `<serial>` where it is a UUID, as oVirt sets
    /// it; else the UUID after `images` in the path of the disk's source (`…/images/DISK/VOLUME`). A disk with neither has
    /// none.
    ///
    /// # Errors
    /// `NotFound` for a target that the domain does not have; `Invalid` for two disks with one id.
    pub fn new(domain: &Domain, told: &[(String, Uuid)]) -> Result<Self> {
        let mut found = Self::default();
        for (target, id) in told {
            domain.disk(target)?;
            found.put(target, *id)?;
        }
        for disk in &domain.disks {
            if !found.ids.contains_key(&disk.target)
                && let Some(id) = by_serial(disk).or_else(|| by_path(disk))
            {
                found.put(&disk.target, id)?;
            }
        }
        Ok(found)
    }

    fn put(&mut self, target: &str, id: Uuid) -> Result<()> {
        let other = self.targets.insert(id, target.to_owned());
        let before = self.ids.insert(target.to_owned(), id);
        let message = match (other, before) {
            (Some(other), _) if other != target => {
                format!("the disks {other} and {target} have the same id, {id}")
            }
            (_, Some(before)) if before != id => {
                format!("two ids are told for the disk {target}, {before} and {id}")
            }
            _ => return Ok(()),
        };
        Err(Error::new(ErrorKind::Invalid, message)
            .with("disk", target)
            .hint("Tell each disk's id: --disk-id TARGET=UUID."))
    }

    /// The target of the disk with this id.
    #[must_use]
    pub fn target(&self, id: Uuid) -> Option<&str> {
        self.targets.get(&id).map(String::as_str)
    }

    /// The id of the disk with this target.
    #[must_use]
    pub fn id(&self, target: &str) -> Option<Uuid> {
        self.ids.get(target).copied()
    }
}

fn by_serial(disk: &Disk) -> Option<Uuid> {
    disk.serial.as_deref().and_then(hyphenated)
}

fn by_path(disk: &Disk) -> Option<Uuid> {
    let path = match disk.source.as_ref()? {
        Source::Network { name, .. } => Path::new(name.as_deref()?),
        source => source.path()?,
    };
    let mut parts = path.components();
    parts.find(|part| *part == Component::Normal("images".as_ref()))?;
    hyphenated(parts.next()?.as_os_str().to_str()?)
}

/// Only in the form that oVirt writes: 32 digits alone may well be another thing's serial number.
fn hyphenated(text: &str) -> Option<Uuid> {
    (text.len() == 36).then(|| text.parse().ok()).flatten()
}
