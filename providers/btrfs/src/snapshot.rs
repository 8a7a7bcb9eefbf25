//! One snapshot of one subvolume: the directory made for it, the system call that takes it, what is
//! remembered of it, how it is found to be and deleted.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, fchown};
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Health, Result, faults};
use disksnap_image_file::{Qcow2, room};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::compare;
use crate::place::Place;
use crate::subvolume::{self, Info};

/// Roughly what a snapshot needs for itself. The data takes no room.
const NEEDED: u64 = 8 << 20;
/// How often a delete looks again for what a take that was given up has put there meanwhile.
const LOOKS: usize = 3;

/// What is remembered of a snapshot to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Planned {
    /// The root of the subvolume.
    pub(crate) root: PathBuf,
    /// The subvolume's own id.
    pub(crate) of: Uuid,
    /// The directory of its own.
    pub(crate) dir: PathBuf,
    /// The snapshot's name in it.
    pub(crate) name: PathBuf,
    pub(crate) images: Vec<Image>,
}

/// A disk's image in the subvolume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) target: String,
    /// From the root of the subvolume.
    pub(crate) path: PathBuf,
    pub(crate) format: String,
    /// The layers below, nearest first, from the root of the subvolume, each with its format.
    #[serde(default)]
    pub(crate) below: Vec<(PathBuf, String)>,
    /// Whether the document says that the hypervisor encrypts it.
    #[serde(default)]
    pub(crate) encrypted: bool,
}

/// What is remembered of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// The root of the subvolume that it is a snapshot of; empty in a record of old.
    #[serde(default)]
    pub(crate) root: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) name: PathBuf,
    /// The snapshot's own id.
    pub(crate) uuid: Uuid,
    /// The transaction of its last change: its making.
    changed: u64,
    pub(crate) images: Vec<MadeImage>,
    /// Whether another snapshot can be compared with it; tried, since that takes more than making one.
    #[serde(default)]
    pub(crate) comparable: bool,
}

/// A disk's image in the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MadeImage {
    pub(crate) target: String,
    pub(crate) file: PathBuf,
    pub(crate) format: String,
    /// The layers below, nearest first, each with its format.
    #[serde(default)]
    pub(crate) below: Vec<(PathBuf, String)>,
    /// The virtual size in bytes.
    pub(crate) size: u64,
    /// The length of the file in bytes.
    length: u64,
}

impl Planned {
    pub(crate) fn place(&self) -> Place {
        Place {
            dir: self.dir.clone(),
            name: self.name.clone().into(),
        }
    }

    /// Makes the directory, and writes back what is dirty: a take that had to do it would keep the guest
    /// waiting. Done again, it finds the directory.
    pub(crate) fn prepare(&self) -> Result<()> {
        let parent = self.dir.parent().unwrap_or(Path::new("/"));
        let room = room(parent).map_err(|e| Error::io(format!("cannot look at {}", parent.display()), e))?;
        if room < NEEDED {
            let short = format!(
                "{} has {room} bytes free, and a snapshot needs about {NEEDED}",
                parent.display()
            );
            return Err(Error::new(ErrorKind::NoSpace, short).hint("Free some space on that file system."));
        }
        self.make_dir()
            .map_err(|e| Error::io(format!("cannot make the directory {}", self.dir.display()), e))?;
        let failed = |e| Error::io(format!("cannot write back {}", self.root.display()), e);
        let root = subvolume::open_dir(&self.root).map_err(failed)?;
        // Twice: the first may take long, and the guest goes on writing meanwhile.
        for _ in 0..2 {
            rustix::fs::syncfs(&root).map_err(|e| failed(e.into()))?;
        }
        Ok(())
    }

    /// Passable, not listable, for the group that may read the first image: what protected the subvolume
    /// from above does not protect the snapshot.
    fn make_dir(&self) -> io::Result<()> {
        let mut dir = DirBuilder::new();
        dir.mode(0o710);
        match faults::around("file", "make directory", || dir.create(&self.dir)) {
            // The name holds the request's id: it is from this very request.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let dir = subvolume::open_dir(&self.dir)?;
        let Some(image) = self.images.first() else {
            return Ok(());
        };
        let group = self.root.join(&image.path).metadata()?.gid();
        match fchown(&dir, None, Some(group)) {
            // Only members give files to a group; then it stays ours.
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes the snapshot. The one thing that is done while the guest stands still.
    pub(crate) fn take(&self) -> Result<()> {
        let failed = |e| {
            let what = format!(
                "cannot snapshot {} to {}",
                self.root.display(),
                self.dir.display()
            );
            Error::io(what, e)
        };
        let root = subvolume::open_dir(&self.root).map_err(failed)?;
        if subvolume::info(&root).map_err(failed)?.uuid != self.of {
            return Err(failed(io::Error::other("another subvolume has taken its place")));
        }
        let dir = subvolume::open_dir(&self.dir).map_err(failed)?;
        subvolume::snapshot(&root, &dir, self.name.as_os_str()).map_err(|error| {
            let busy = error.kind() == io::ErrorKind::ExecutableFileBusy;
            let error = failed(error);
            if busy {
                error.hint("A subvolume with an active swap file cannot be snapshotted.")
            } else {
                error
            }
        })
    }

    /// Looks at what the snapshot has become.
    pub(crate) fn complete(&self) -> Result<Made> {
        let failed = |e| {
            Error::io(
                format!("cannot look at the snapshot in {}", self.dir.display()),
                e,
            )
        };
        let dir = subvolume::open_dir(&self.dir).map_err(failed)?;
        let snapshot = subvolume::open_in(&dir, self.name.as_os_str()).map_err(failed)?;
        let info = subvolume::info(&snapshot).map_err(failed)?;
        let at = self.dir.join(&self.name);
        let images = self.images.iter().map(|image| image.in_snapshot(&at));
        let images = images.collect::<Result<Vec<_>>>()?;
        Ok(Made {
            root: self.root.clone(),
            dir: self.dir.clone(),
            name: self.name.clone(),
            uuid: info.uuid,
            changed: info.changed,
            comparable: self.is_comparable(&images),
            images,
        })
    }
}

impl Planned {
    /// Whether the disks of this snapshot can be compared with those of another one: all, or none.
    fn is_comparable(&self, made: &[MadeImage]) -> bool {
        let encrypted = self.images.iter().any(|image| image.encrypted);
        !encrypted
            && made
                .iter()
                .all(|image| compare::is_possible(&compare::files(image)))
    }
}

impl Image {
    fn in_snapshot(&self, at: &Path) -> Result<MadeImage> {
        let file = at.join(&self.path);
        let failed =
            |e| Error::io(format!("cannot look at {}", file.display()), e).with("disk", &self.target);
        let opened = File::open(&file).map_err(failed)?;
        let length = opened.metadata().map_err(failed)?.len();
        let size = match self.format.as_str() {
            "qcow2" => Qcow2::read(&opened).map_err(failed)?.size,
            _ => length,
        };
        Ok(MadeImage {
            target: self.target.clone(),
            format: self.format.clone(),
            below: self
                .below
                .iter()
                .map(|(path, format)| (at.join(path), format.clone()))
                .collect(),
            size,
            length,
            file,
        })
    }
}

impl Made {
    pub(crate) fn place(&self) -> Place {
        Place {
            dir: self.dir.clone(),
            name: self.name.clone().into(),
        }
    }

    /// What has become of the snapshot, from btrfs itself.
    pub(crate) fn health(&self) -> Health {
        let shown = self.dir.join(&self.name);
        let shown = shown.display();
        let found = subvolume::open_dir(&self.dir)
            .and_then(|dir| subvolume::open_in(&dir, self.name.as_os_str()))
            .and_then(|snapshot| subvolume::info(&snapshot));
        let info = match found {
            Ok(info) => info,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Health::Gone(format!("{shown} does not exist any more"));
            }
            Err(error) => return Health::Broken(format!("cannot look at {shown}: {error}")),
        };
        if info.uuid != self.uuid {
            return Health::Broken(format!("{shown} is another subvolume, not the one that was made"));
        }
        if !info.read_only {
            return Health::Broken(format!("{shown} can be written to"));
        }
        if info.changed != self.changed {
            return Health::Broken(format!("{shown} has been written to since it was made"));
        }
        let broken = self.images.iter().find_map(MadeImage::fault);
        broken.map_or(Health::Active, Health::Broken)
    }
}

impl MadeImage {
    fn fault(&self) -> Option<String> {
        let (shown, was) = (self.file.display(), self.length);
        match self.file.symlink_metadata().map(|found| found.len()) {
            Ok(is) if is == was => None,
            Ok(is) => Some(format!("{shown} has {is} bytes and should have {was}")),
            Err(error) => Some(format!("cannot look at {shown}: {error}")),
        }
    }
}

/// Deletes the snapshot at a place, if `is_ours` knows it, and its directory. Idempotent.
///
/// # Errors
/// `Broken` where something else is there, which is left alone; `Denied` where we may not delete it.
pub(crate) fn remove(place: &Place, is_ours: impl Fn(&Info) -> bool) -> Result<()> {
    let failed = |e| {
        Error::io(
            format!("cannot delete the snapshot in {}", place.dir.display()),
            e,
        )
    };
    let mut gone = false;
    for _ in 0..LOOKS {
        let dir = match subvolume::open_dir(&place.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed)?,
        };
        delete_in(&dir, place, &is_ours)?;
        match faults::around("file", "remove directory", || std::fs::remove_dir(&place.dir)) {
            // A take that was given up may have come between: look again.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => continue,
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => gone = true,
        }
        break;
    }
    if !gone {
        return Err(failed(io::ErrorKind::DirectoryNotEmpty.into())
            .hint("Something else is in that directory: move it away, and delete again."));
    }
    // Without it a power cut could bring the snapshot back, and the catalog would not know it any more.
    let parent = place.dir.parent().unwrap_or(Path::new("/"));
    let synced = subvolume::open_dir(parent).and_then(|dir| Ok(rustix::fs::syncfs(&dir)?));
    synced.map_err(failed)
}

fn delete_in(dir: &File, place: &Place, is_ours: &impl Fn(&Info) -> bool) -> Result<()> {
    let failed = |e| {
        Error::io(
            format!("cannot delete the snapshot in {}", place.dir.display()),
            e,
        )
    };
    let snapshot = match subvolume::open_in(dir, &place.name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    let info = subvolume::info(&snapshot).map_err(failed)?;
    if !is_ours(&info) {
        let what = format!(
            "the subvolume in {} is not the snapshot that was made",
            place.dir.display()
        );
        return Err(
            Error::new(ErrorKind::Broken, what).hint("It is left alone: move it away, and delete again.")
        );
    }
    subvolume::destroy(&snapshot, dir, &place.name).map_err(|error| {
        let denied = error.kind() == io::ErrorKind::PermissionDenied;
        let error = failed(error);
        if denied {
            error.hint("Delete it as root, or mount the file system with user_subvol_rm_allowed.")
        } else {
            error
        }
    })
}
