//! Subvolumes for tests.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test program")]

#[path = "../../../../image-file/testing/rig.rs"]
pub mod rig;
pub mod told;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_test_support::{LoopFs, LoopFsKind, loop_fs, tools};

/// A btrfs of half a GiB.
pub fn btrfs() -> LoopFs {
    loop_fs(LoopFsKind::Btrfs, 512 << 20, "")
}

/// Runs the `btrfs` program; panics with its error.
pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(tools::program("btrfs"));
    let output = command.args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn create(subvolume: &Path) -> PathBuf {
    run(["subvolume".as_ref(), "create".as_ref(), subvolume.as_os_str()]);
    subvolume.to_owned()
}

pub fn delete(subvolume: &Path) {
    run(["subvolume".as_ref(), "delete".as_ref(), subvolume.as_os_str()]);
}

/// The subvolumes of a file system that are snapshots of this method's making.
pub fn snapshots(fs: &Path) -> Vec<String> {
    let listed = run(["subvolume".as_ref(), "list".as_ref(), fs.as_os_str()]);
    let paths = listed.lines().filter_map(|line| line.split(" path ").nth(1));
    paths
        .filter(|path| path.contains(".snapshot/"))
        .map(str::to_owned)
        .collect()
}
