//! A file system that fills up early, for tests of full fleece images.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// A directory on a file system of its own. Unmounted when dropped.
#[derive(Debug)]
pub struct SmallFs {
    point: PathBuf,
    // Last: removed after the unmount.
    _dir: TempDir,
}

impl SmallFs {
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.point
    }
}

/// Makes a file system of `bytes` (rounded up to pages). Needs the capability `small-fs`; panics without.
#[must_use]
pub fn small_fs(bytes: u64) -> SmallFs {
    let dir = crate::temp_dir();
    let point = dir.path().join("small");
    std::fs::create_dir(&point).expect("a directory can be made in a temporary one");
    mount_tmpfs(&point, bytes).unwrap_or_else(|error| panic!("cannot mount a tmpfs: {error}"));
    SmallFs { point, _dir: dir }
}

fn mount_tmpfs(point: &Path, bytes: u64) -> rustix::io::Result<()> {
    let options = std::ffi::CString::new(format!("size={bytes},mode=0755"));
    let options = options.expect("the options hold no NUL");
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("disksnap-test", point, "tmpfs", flags, Some(options.as_c_str()))
}

/// Why no small file system can be mounted here: tried, not guessed.
pub(crate) fn lacking() -> Option<String> {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let tried = mount_tmpfs(dir.path(), 4096).map(|()| unmounted(dir.path()));
    tried
        .err()
        .map(|error| format!("a tmpfs cannot be mounted ({error}); it needs root"))
}

fn unmounted(point: &Path) {
    if unmount(point, UnmountFlags::DETACH).is_err() {
        let _ = Command::new("umount").arg("-l").arg(point).output();
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        unmounted(&self.point);
    }
}
