//! A file system of a kind of its own, in an image file: btrfs or XFS, where the machine can mount them.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::tools;

/// What file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopFsKind {
    /// btrfs.
    Btrfs,
    /// XFS whose files can share extents.
    Xfs,
    /// XFS made with `reflink=0`.
    XfsWithoutReflink,
}

impl LoopFsKind {
    /// The capability that it needs.
    fn capability(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Xfs | Self::XfsWithoutReflink => "xfs",
        }
    }

    fn mkfs(self) -> (String, &'static [&'static str]) {
        let arguments: &[&str] = match self {
            Self::Btrfs => &["-q", "-f"],
            Self::Xfs => &["-q", "-m", "reflink=1"],
            Self::XfsWithoutReflink => &["-q", "-m", "reflink=0"],
        };
        (format!("mkfs.{}", self.capability()), arguments)
    }
}

/// A mounted file system. Unmounted when dropped, also by a panic; its loop device goes with the mount.
#[derive(Debug)]
pub struct LoopFs {
    point: PathBuf,
    // Last: removed after the unmount.
    _dir: TempDir,
    /// Where its image is, when that is a place of its own.
    _image: Option<TempDir>,
}

impl LoopFs {
    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.point
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        // Detached, since a process that dies may hold a file a little longer.
        if unmount(&self.point, UnmountFlags::DETACH).is_err() {
            let _ = Command::new("umount").arg("-l").arg(&self.point).output();
        }
    }
}

/// Makes a file system of `bytes` (XFS needs 300 MiB, btrfs 128; the image is sparse) and mounts it with
/// these options (`""` for none). Needs the capability `btrfs` or `xfs`; panics without.
#[must_use]
pub fn loop_fs(kind: LoopFsKind, bytes: u64, options: &str) -> LoopFs {
    try_loop_fs(kind, bytes, options).unwrap_or_else(|why| panic!("no {kind:?} file system: {why}"))
}

/// The same, with the image in this directory: where that has less room than `bytes`, the file system's device fails writes.
#[must_use]
pub fn loop_fs_in(directory: &Path, kind: LoopFsKind, bytes: u64, options: &str) -> LoopFs {
    let image = directory.join("image");
    mounted(kind, &image, None, bytes, options).unwrap_or_else(|why| panic!("no {kind:?} file system: {why}"))
}

/// Mounts a file system that is in an image, with these options, and unmounts it again: its journal is replayed so.
///
/// # Errors
/// What the kernel refuses.
pub fn replay_journal(kind: LoopFsKind, image: &Path, options: &str) -> Result<(), String> {
    let dir = crate::temp_dir();
    let options = format!("loop{}{options}", if options.is_empty() { "" } else { "," });
    let mut mount = Command::new("mount");
    mount.args(["-t", kind.capability(), "-o", &options]);
    run(mount.arg(image).arg(dir.path()))?;
    run(Command::new("umount").arg(dir.path()))
}

fn try_loop_fs(kind: LoopFsKind, bytes: u64, options: &str) -> Result<LoopFs, String> {
    let dir = crate::temp_dir();
    let image = dir.path().join("image");
    mounted(kind, &image, Some(dir), bytes, options)
}

/// `place` is where the image is, when it goes with the file system.
fn mounted(
    kind: LoopFsKind,
    image: &Path,
    place: Option<TempDir>,
    bytes: u64,
    options: &str,
) -> Result<LoopFs, String> {
    let dir = crate::temp_dir();
    let point = dir.path().join("fs");
    std::fs::create_dir(&point).expect("a directory can be made in a temporary one");
    let made = std::fs::File::create(image).and_then(|file| file.set_len(bytes));
    made.expect("a sparse file can be made in a temporary directory");
    let (mkfs, arguments) = kind.mkfs();
    let mkfs = tools::find(&mkfs).ok_or_else(|| format!("the program {mkfs} is not there"))?;
    run(Command::new(mkfs).args(arguments).arg(image))?;
    let options = format!("loop{}{options}", if options.is_empty() { "" } else { "," });
    let mut mount = Command::new("mount");
    mount.args(["-t", kind.capability(), "-o", &options]);
    run(mount.arg(image).arg(&point))?;
    Ok(LoopFs {
        point,
        _dir: dir,
        _image: place,
    })
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}", errors.trim()))
}

/// Why no such file system can be mounted here: tried, not guessed.
pub(crate) fn lacking(kind: LoopFsKind) -> Option<String> {
    let least = match kind {
        LoopFsKind::Btrfs => 128 << 20,
        _ => 320 << 20,
    };
    if !rustix::process::geteuid().is_root() {
        return Some("mounting needs root".to_owned());
    }
    try_loop_fs(kind, least, "").err()
}
