//! Which subvolume a disk's image is in, which disks share one, and where a snapshot of it goes.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use disksnap_core::{DiskRequest, SnapshotId};
use disksnap_image_file::{file_system, mount_options, path_of, target_in_names};
use rustix::fs::{Access, access};
use rustix::process::geteuid;

use crate::subvolume::{self, Info, is_btrfs, root_of};

/// The option that says in which directory the snapshot goes.
pub(crate) const SNAPSHOT_DIR: &str = "snapshot.dir";

/// Disks whose images are in one subvolume, in the request's order.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    /// The root directory of the subvolume.
    pub(crate) root: PathBuf,
    pub(crate) requests: Vec<&'a DiskRequest>,
}

/// The groups of all requests whose subvolume is found.
pub(crate) fn groups(requests: &[DiskRequest]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for request in requests {
        let Ok(root) = root(request) else {
            continue;
        };
        match groups.iter_mut().find(|group| group.root == root) {
            Some(group) => group.requests.push(request),
            None => groups.push(Group {
                root,
                requests: vec![request],
            }),
        }
    }
    groups
}

/// The root of the subvolume that a disk's image is in, or was in.
pub(crate) fn root(request: &DiskRequest) -> Result<PathBuf, String> {
    let image = path_of(&request.disk)?;
    let shown = image.display();
    let found = image
        .canonicalize()
        .or_else(|_| image.parent().unwrap_or(image).canonicalize());
    let path = found.map_err(|e| format!("cannot find {shown}: {e}"))?;
    match is_btrfs(&path) {
        Ok(true) => {}
        Ok(false) => return Err(format!("{shown} is not on btrfs")),
        Err(error) => return Err(format!("cannot look at {shown}: {error}")),
    }
    root_of(&path).map_err(|_| {
        format!("the root of the subvolume that holds {shown} is not mounted: only a directory in it is")
    })
}

/// Where the snapshot of a group goes: a subvolume of the name `name` in a directory of its own. It follows
/// from the request alone, so that abort finds it after a kill.
///
/// In a directory of its own, because abort then has the last word: once the directory is gone, a take that
/// was given up for late can no longer put a snapshot there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    pub(crate) name: OsString,
}

impl Group<'_> {
    /// Where its snapshot goes.
    ///
    /// # Errors
    /// What the request says that cannot be.
    pub(crate) fn place(&self, id: SnapshotId) -> Result<Place, String> {
        let name = self.root.file_name().unwrap_or(OsStr::new("root"));
        let mut dir = name.to_owned();
        let target = self
            .requests
            .first()
            .map(|request| target_in_names(&request.disk));
        dir.push(format!(
            ".{}.{}.snapshot",
            target.transpose()?.unwrap_or_default(),
            id.short()
        ));
        Ok(Place {
            dir: self.parent()?.join(dir),
            name: name.to_owned(),
        })
    }

    /// The directory in which the snapshot gets one of its own: where the caller says, else beside the
    /// subvolume, else, where that is another file system, in it.
    pub(crate) fn parent(&self) -> Result<PathBuf, String> {
        let mut said = self.requests.iter().filter_map(|r| r.options.get(SNAPSHOT_DIR));
        if let Some(dir) = said.next() {
            return match said.find(|other| *other != dir) {
                Some(other) => Err(format!(
                    "disks in one subvolume share one snapshot, and {SNAPSHOT_DIR} says both {dir} and {other}"
                )),
                None if Path::new(dir).is_absolute() => Ok(PathBuf::from(dir)),
                None => Err(format!("{SNAPSHOT_DIR} must be an absolute path, not {dir}")),
            };
        }
        let of = |path: &Path| file_system(path).ok();
        let beside = self.root.parent().filter(|dir| of(dir) == of(&self.root));
        Ok(beside.unwrap_or(&self.root).to_owned())
    }

    /// Whether a snapshot can be there.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn can_hold_snapshot(&self) -> Result<(), String> {
        let parent = self.parent()?;
        let shown = parent.display();
        if !parent.is_dir() {
            return Err(format!("{shown} is not a directory"));
        }
        let of =
            |path: &Path| file_system(path).map_err(|e| format!("cannot look at {}: {e}", path.display()));
        if of(&parent)? == of(&self.root)? {
            return Ok(());
        }
        Err(format!(
            "{shown} is not on the file system of {}, which a snapshot cannot leave",
            self.root.display()
        ))
    }

    /// Whether we may make a snapshot there, and delete it again: everyone may snapshot what is theirs, and
    /// not everyone may delete a snapshot.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn permitted(&self) -> Result<(), String> {
        let (parent, shown) = (self.parent()?, self.root.display());
        let me = geteuid();
        if !me.is_root() {
            let found = self
                .root
                .metadata()
                .map_err(|e| format!("cannot look at {shown}: {e}"))?;
            if found.uid() != me.as_raw() {
                return Err(format!(
                    "only root and its owner may snapshot the subvolume {shown}"
                ));
            }
            let options = mount_options(&self.root);
            if !options.iter().any(|option| option == "user_subvol_rm_allowed") {
                return Err(format!(
                    "a snapshot of {shown} could be made and not deleted again: that takes root, or a mount with \
                     user_subvol_rm_allowed"
                ));
            }
        }
        let allowed = access(&parent, Access::WRITE_OK | Access::EXEC_OK);
        allowed.map_err(|e| format!("cannot make a directory in {}: {e}", parent.display()))
    }

    /// What btrfs says of the subvolume.
    pub(crate) fn info(&self) -> io::Result<Info> {
        subvolume::info(&subvolume::open_dir(&self.root)?)
    }

    /// The unit's key: the subvolume's own id, wherever it is mounted.
    pub(crate) fn unit(&self) -> String {
        match self.info() {
            Ok(info) if !info.uuid.is_nil() => info.uuid.to_string(),
            _ => self.root.display().to_string(),
        }
    }
}
