//! Subvolumes for tests, and the suite's settings in one each.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test program")]

#[path = "../../../../image-file/testing/rig.rs"]
pub mod rig;

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_conformance::{Fixture, Setting};
use disksnap_core::{
    Access, Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, Result, Snapshot, Source,
};
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

/// Another fixture's settings, each in a subvolume of its own.
pub struct InSubvolumes<F> {
    pub fs: PathBuf,
    /// Makes the other fixture, for images in this directory.
    pub make: Box<dyn Fn(&Path) -> F + Send + Sync>,
}

impl<F> fmt::Debug for InSubvolumes<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InSubvolumes")
            .field("fs", &self.fs)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl<F: Fixture> Fixture for InSubvolumes<F> {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        (self.make)(&self.fs).provider()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        (self.make)(&self.fs).expected_capabilities()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let dir = tempfile::tempdir_in(&self.fs).unwrap();
        let subvolume = create(&dir.path().join("images"));
        let inner = (self.make)(&subvolume).setting(disks).await?;
        Ok(Box::new(InSubvolume {
            inner: Some(inner),
            dir,
        }))
    }
}

struct InSubvolume {
    /// Taken when dropped: it goes before its subvolume.
    inner: Option<Box<dyn Setting>>,
    dir: tempfile::TempDir,
}

impl fmt::Debug for InSubvolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InSubvolume")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl InSubvolume {
    fn inner(&self) -> &dyn Setting {
        &**self.inner.as_ref().unwrap()
    }
}

impl Drop for InSubvolume {
    fn drop(&mut self) {
        self.inner = None;
        delete(&self.dir.path().join("images"));
    }
}

#[async_trait]
impl Setting for InSubvolume {
    fn domain(&self) -> &Domain {
        self.inner().domain()
    }

    fn connector(&self) -> Arc<dyn Connector> {
        self.inner().connector()
    }

    fn choice(&self, target: &str) -> DiskChoice {
        self.inner().choice(target)
    }

    fn unfit_disk(&self) -> Disk {
        self.inner().unfit_disk()
    }

    fn size(&self, target: &str) -> u64 {
        self.inner().size(target)
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        self.inner().fill(target, offset, len, byte).await
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        self.inner().zero(target, offset, len).await
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.inner().read_disk(target, offset, len).await
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.inner().read_snapshot(source, format, offset, len).await
    }

    /// Files cannot be removed from a read-only subvolume: the whole of it is.
    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        for disk in &snapshot.disks {
            let Access::Source { source, .. } = &disk.access else {
                continue;
            };
            let mut dirs = source.path().unwrap().ancestors().skip(1);
            let root = dirs.find(|dir| dir.metadata().is_ok_and(|found| found.ino() == 256));
            delete(root.unwrap());
        }
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = self.inner().leftovers().await?;
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("images") {
                left.push(path.display().to_string());
            }
        }
        Ok(left)
    }
}
