//! One snapshot of one volume: planned, taken, looked at, removed.

use std::fs::File;
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, FileInside, Health, Result, SnapshotId};
use disksnap_image_file::Unfit;
use serde::{Deserialize, Serialize};

use crate::compare::is_possible;
use crate::device::{Named, of_path};
use crate::filling::{danger, pool_fault};
use crate::find::{Found, Way};
use crate::lvm2::Lvm;
use crate::marker;
use crate::metadata;
use crate::settings::MARK;
use crate::volume::Volume;

/// On every volume that this method makes.
const TAG: &str = "disksnap";
/// How many letters of a volume's id in device-mapper are its group's.
const GROUP_ID: usize = 32;
/// The longest name of a device-mapper device.
const LONGEST: usize = 127;

/// What is remembered of a snapshot to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Planned {
    id: SnapshotId,
    group: String,
    origin: String,
    /// The id of the origin, as device-mapper has it.
    origin_id: String,
    name: String,
    /// The room of a classic snapshot in bytes; `None` for a thin one.
    room: Option<u64>,
    #[serde(default = "default_mark")]
    warn: u8,
    marker: PathBuf,
    /// A file of the file system on the volume, where the images are in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(default)]
    comparable: bool,
    pub(crate) images: Vec<Image>,
}

/// A disk on the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) target: String,
    pub(crate) format: String,
    pub(crate) size: Option<u64>,
    /// Where it is in the file system on the volume; `None` where it is the volume.
    pub(crate) inside: Option<PathBuf>,
    /// The file system, where it is in one.
    pub(crate) file_system: Option<String>,
    /// The layers below it there, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) below: Vec<FileInside>,
}

/// What is remembered of a finished snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    pub(crate) id: SnapshotId,
    pub(crate) group: String,
    pub(crate) origin: String,
    pub(crate) name: String,
    /// The snapshot's own id, without dashes.
    pub(crate) uuid: String,
    pub(crate) path: PathBuf,
    pub(crate) thin: bool,
    /// The percentage from which on its filling is told.
    #[serde(default = "default_mark")]
    warn: u8,
    /// Whether others of the volume can be compared with it; tried, since that takes more than making one. A record of old
    /// does not say so.
    #[serde(default)]
    pub(crate) comparable: bool,
    pub(crate) images: Vec<Image>,
}

fn default_mark() -> u8 {
    MARK
}

/// The tag that says which request made a volume.
fn tag(id: SnapshotId) -> String {
    format!("disksnap.id={id}")
}

fn is_ours(volume: &Volume, id: SnapshotId) -> bool {
    volume.has_tag(TAG) && volume.has_tag(&tag(id))
}

/// The snapshot's name: of letters, digits and dots, 32 of them; from the request and the origin alone.
fn name(id: SnapshotId, origin: &Volume) -> String {
    let origin: String = origin.uuid.chars().take(10).collect();
    format!("disksnap.{}.{origin}", id.short())
}

/// Whether device-mapper has room for the names that a snapshot of this origin brings.
pub(crate) fn can_be_named(origin: &Volume) -> std::result::Result<(), Unfit> {
    let mapped = |name: &str| name.len() + name.matches('-').count();
    // The longest that is made of it in a revert.
    let own = format!("{}.back", name(SnapshotId(uuid::Uuid::nil()), origin));
    // The longest that lvm2 appends to either.
    let suffix = "-real".len();
    let longest = mapped(&own).max(mapped(&origin.name));
    if mapped(&origin.group) + 1 + longest + suffix <= LONGEST {
        return Ok(());
    }
    Err(format!(
        "the names of the volume group {} and of a snapshot in it are together longer than device-mapper allows",
        origin.group
    )
    .into())
}

/// How much room each snapshot of these takes from its group, in order; each leaves the next what it does not take.
///
/// # Errors
/// `NoSpace` for the first that does not fit.
pub(crate) fn rooms(units: &[Vec<&Found>]) -> Vec<std::result::Result<Option<u64>, Unfit>> {
    let mut taken: Vec<(String, u64)> = Vec::new();
    let mut rooms = Vec::new();
    for found in units.iter().filter_map(|unit| unit.first()) {
        let group = &found.volume.group;
        let before = taken
            .iter()
            .filter(|(of, _)| of == group)
            .map(|(_, bytes)| bytes)
            .sum();
        let room = room(found, found.volume.free.saturating_sub(before));
        if let Ok(Some(bytes)) = room {
            taken.push((group.clone(), bytes));
        }
        rooms.push(room);
    }
    rooms
}

fn room(found: &Found, free: u64) -> std::result::Result<Option<u64>, Unfit> {
    let volume = &found.volume;
    if found.way == Way::Thin {
        return Ok(None);
    }
    let needed = found.settings.size.unwrap_or_default().of(volume, free);
    if needed > 0 && needed <= free {
        return Ok(Some(needed));
    }
    Err(Unfit {
        kind: ErrorKind::NoSpace,
        why: format!(
            "the volume group {} has {free} bytes free, and the snapshot of {} is to have {}; `vgextend` enlarges it, \
             snapshot.size asks for less",
            volume.group,
            volume.name,
            needed.max(volume.extent)
        ),
    })
}

impl Planned {
    pub(crate) fn new(id: SnapshotId, unit: &[&Found], room: Option<u64>, marker: PathBuf) -> Option<Self> {
        let volume = &unit.first()?.volume;
        let image = |found: &&Found| Image {
            target: found.request.disk.target.clone(),
            format: found.format.clone(),
            size: found.size,
            inside: found.inside.as_ref().map(|inside| inside.path.clone()),
            file_system: found.inside.as_ref().map(|inside| inside.kind.clone()),
            below: found.below.clone(),
        };
        Some(Self {
            id,
            group: volume.group.clone(),
            origin: volume.name.clone(),
            origin_id: format!("{}{}", volume.group_uuid, volume.uuid),
            name: name(id, volume),
            room,
            warn: unit.first()?.settings.warn,
            marker,
            file: file_in(unit).map(Path::to_owned),
            comparable: is_possible(unit),
            images: unit.iter().map(image).collect(),
        })
    }

    /// Writes back what is dirty, so that the take has little to write. The snapshot itself is made whole in any case.
    pub(crate) fn write_back(unit: &[&Found]) -> Result<()> {
        // Twice: the first may take long, and the guest goes on writing meanwhile.
        for _ in 0..2 {
            if let Some(path) = file_in(unit) {
                write_back_file_system(path)?;
            } else if let Some(found) = unit.first() {
                let path = &found.volume.path;
                let synced = File::open(path).and_then(|device| device.sync_all());
                synced.map_err(|e| Error::io(format!("cannot write back {path}"), e))?;
            }
        }
        Ok(())
    }

    /// Takes it: one `lvcreate -s` (lvcreate(8)). The one thing that is done while the guest stands still.
    pub(crate) fn take(&self) -> Result<()> {
        let held = marker::hold(&self.marker)?;
        let origin = format!("{}/{}", self.group, self.origin);
        let device = PathBuf::from(format!("/dev/{origin}"));
        let is_same = of_path(&device).is_ok_and(|found| found == Named::Id(self.origin_id.clone()));
        if !is_same {
            let what = format!("the logical volume {origin} is not the one that was prepared (any more)");
            return Err(Error::new(ErrorKind::NotFound, what).with("path", device.display()));
        }
        // LVM freezes an ext4 or XFS while it takes it. A btrfs it does not: what the guest has flushed may be in its log
        // alone, which whoever reads the snapshot without writing to it does without.
        if let Some(file) = &self.file {
            write_back_file_system(file)?;
        }
        let tag = tag(self.id);
        let common = [
            "-y", "-s", "-pr", "--addtag", TAG, "--addtag", &tag, "-n", &self.name,
        ];
        let room = self.room.map(|bytes| format!("{bytes}b"));
        let of_way: &[&str] = match &room {
            Some(bytes) => &["-L", bytes],
            // Without -kn it would not be activated.
            None => &["-kn", "-ay"],
        };
        Lvm::find()?.run("lvcreate", &[&common, of_way, &[&origin]].concat(), Some(held))?;
        Ok(())
    }

    /// Looks at what it has become. After this no take is late any more.
    pub(crate) fn complete(&self) -> Result<Made> {
        marker::remove(&self.marker)?;
        let path = PathBuf::from(format!("/dev/{}/{}", self.group, self.name));
        let (uuid, path) = match self.shown_by_kernel(&path) {
            Some(uuid) => (uuid, path),
            None => self.listed()?,
        };
        Ok(Made {
            id: self.id,
            group: self.group.clone(),
            origin: self.origin.clone(),
            name: self.name.clone(),
            uuid,
            path,
            thin: self.room.is_none(),
            warn: self.warn,
            comparable: self.comparable,
            images: self.images.clone(),
        })
    }

    /// The snapshot's id, where the kernel shows its device: no command of lvm2 is needed then.
    fn shown_by_kernel(&self, path: &Path) -> Option<String> {
        let Ok(Named::Id(id)) = of_path(path) else {
            return None;
        };
        // The group's id, the first half of either, is the same.
        let (group, own) = id.split_at_checked(GROUP_ID)?;
        (Some(group) == self.origin_id.get(..GROUP_ID)).then(|| own.to_owned())
    }

    /// The same from lvm2, where whoever makes the devices' names is slow.
    fn listed(&self) -> Result<(String, PathBuf)> {
        let volumes = Lvm::find()?.volumes_of(&self.group)?;
        let here = |volume: &&Volume| volume.name == self.name && is_ours(volume, self.id);
        let found = volumes.iter().find(here).ok_or_else(|| {
            let what = format!(
                "the snapshot {}/{} that was just taken is gone",
                self.group, self.name
            );
            Error::new(ErrorKind::Broken, what)
        })?;
        Ok((found.uuid.clone(), PathBuf::from(&found.path)))
    }
}

/// A file of the file system on the volume of a unit.
fn file_in<'a>(unit: &[&'a Found]) -> Option<&'a Path> {
    let found = unit.iter().find(|found| found.inside.is_some())?;
    found.request.disk.source.as_ref()?.path()
}

fn write_back_file_system(file: &Path) -> Result<()> {
    let failed = |e| {
        Error::io(
            format!("cannot write back the file system of {}", file.display()),
            e,
        )
    };
    let opened = File::open(file).map_err(failed)?;
    rustix::fs::syncfs(&opened).map_err(|e| failed(e.into()))
}

impl Made {
    /// `vg/lv`
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    pub(crate) fn origin_name(&self) -> String {
        format!("{}/{}", self.group, self.origin)
    }

    /// A name for this snapshot's purposes that no other volume has.
    pub(crate) fn side_name(&self, purpose: &str) -> String {
        let own: String = self.uuid.chars().take(10).collect();
        format!("disksnap.{purpose}.{}.{own}", self.id.short())
    }

    /// The snapshot among all volumes.
    pub(crate) fn among<'a>(&self, volumes: &'a [Volume]) -> Option<&'a Volume> {
        volumes
            .iter()
            .find(|volume| volume.group == self.group && volume.uuid == self.uuid)
    }

    /// What has become of it, from lvm2 itself.
    pub(crate) fn health(&self) -> Result<Health> {
        let volumes = Lvm::find()?.volumes_of(&self.group)?;
        let name = self.full_name();
        let Some(volume) = self.among(&volumes) else {
            return Ok(Health::Gone(format!(
                "there is no logical volume {name} any more"
            )));
        };
        let fault = if volume.invalid || volume.attributes.chars().nth(4) == Some('I') {
            Some(format!(
                "the snapshot {name} has overflowed: more was overwritten than it had room for"
            ))
        } else if volume.merging {
            Some(format!(
                "the snapshot {name} is being merged into {}, now or at its next activation",
                self.origin_name()
            ))
        } else if volume.merge_failed {
            Some(format!("the merge of the snapshot {name} has failed"))
        } else if !volume.active {
            Some(format!(
                "{name} is not active: `lvchange -ay -K {name}` activates it"
            ))
        } else if volume.attributes.chars().nth(1) == Some('w') {
            Some(format!("{name} can be written to"))
        } else if !volume.health.is_empty() {
            Some(format!("{name} is not well: {}", volume.health))
        } else {
            pool_fault(volume, &volumes)
        };
        let danger = || danger(volume, &volumes, self.warn).map_or(Health::Active, Health::Endangered);
        Ok(fault.map_or_else(danger, Health::Broken))
    }

    /// Deletes it. Idempotent.
    ///
    /// # Errors
    /// `Busy` when something has it open, or it is being merged; `Broken` when it does not bear our tags any
    /// more, and then it is left alone.
    pub(crate) fn delete(&self, dir: &Path) -> Result<()> {
        metadata::tidy(dir);
        let lvm = Lvm::find()?;
        let volumes = lvm.volumes_of(&self.group)?;
        let Some(volume) = self.among(&volumes) else {
            return Ok(());
        };
        if !is_ours(volume, self.id) {
            let what = format!(
                "the logical volume {} does not bear this snapshot's tags",
                volume.full_name()
            );
            return Err(Error::new(ErrorKind::Broken, what).hint(
                "It is left alone; if it is of no use, remove it with `lvremove`, then delete again.",
            ));
        }
        remove(&lvm, &[volume]).map(drop)
    }
}

/// Removes what a request has made, whatever it is, and lets no late take make more. Idempotent. `dir` is the image
/// directory.
pub(crate) fn abort(id: SnapshotId, dir: &Path) -> Result<()> {
    metadata::tidy(dir);
    let marker = &marker::path(dir, id);
    let closed = marker::close(marker)?;
    let lvm = Lvm::find()?;
    let volumes = lvm.volumes()?;
    let ours: Vec<&Volume> = volumes.iter().filter(|volume| is_ours(volume, id)).collect();
    // Where somebody else was quicker with one of several, the others may be there still.
    if matches!(remove(&lvm, &ours)?, Removed::Some) {
        for volume in ours {
            remove(&lvm, &[volume])?;
        }
    }
    marker::remove(marker)?;
    drop(closed);
    Ok(())
}

/// What `lvremove` found to do.
enum Removed {
    All,
    Some,
}

/// Removes these, all by one command.
fn remove(lvm: &Lvm, volumes: &[&Volume]) -> Result<Removed> {
    if let Some(volume) = volumes.iter().find(|volume| volume.merging) {
        let name = volume.full_name();
        let what = format!("the snapshot {name} is being merged into its origin, and goes with that");
        return Err(Error::new(ErrorKind::Busy, what).hint(
            "Activate the origin anew when nothing uses it (lvchange -an, then -ay), and delete again.",
        ));
    }
    let names: Vec<String> = volumes.iter().map(|volume| volume.full_name()).collect();
    if names.is_empty() {
        return Ok(Removed::All);
    }
    let arguments = std::iter::once("-y").chain(names.iter().map(String::as_str));
    match lvm.run("lvremove", &arguments.collect::<Vec<_>>(), None) {
        Ok(_) => Ok(Removed::All),
        // Somebody else was quicker.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Removed::Some),
        Err(error) if error.kind() == ErrorKind::Busy => Err(error.hint(format!(
            "Find what has /dev/{} open or mounted, end it, and delete again.",
            names.join(" or /dev/")
        ))),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_lvm2_takes() {
        let origin = Volume {
            group: "vg".to_owned(),
            name: "web-1".to_owned(),
            uuid: "orz3sCJmO20u3PYupqXsldYIUxlH10br".to_owned(),
            ..Volume::default()
        };
        let id = SnapshotId::random();
        let name = name(id, &origin);
        assert_eq!(name, format!("disksnap.{}.orz3sCJmO2", id.short()));
        assert!(name.len() == 32 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '.'));
        assert!(can_be_named(&origin).is_ok());
        let long = Volume {
            group: "g".repeat(84),
            ..origin.clone()
        };
        assert!(can_be_named(&long).is_ok());
        let longer = Volume {
            group: "g".repeat(85),
            ..origin.clone()
        };
        assert!(can_be_named(&longer).is_err());
        let dashes = Volume {
            group: "g-".repeat(30),
            ..origin
        };
        assert!(can_be_named(&dashes).is_err(), "every dash counts twice");
    }
}
