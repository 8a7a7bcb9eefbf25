//! Another fixture's settings, each in a btrfs subvolume of its own.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_conformance::{Fixture, Setting};
use disksnap_core::{
    Access, Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, Error, ErrorKind, Result,
    Snapshot, Source,
};
use disksnap_test_support::tools;

/// Runs `btrfs subvolume` with a verb and a path.
fn subvolume(verb: &str, path: &Path) -> Result<()> {
    let mut command = Command::new(tools::program("btrfs"));
    let arguments: [&OsStr; 3] = ["subvolume".as_ref(), verb.as_ref(), path.as_os_str()];
    let output = command.args(arguments).output();
    let output = output.map_err(|e| Error::io("cannot run btrfs", e))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(ErrorKind::Internal, format!("{command:?}: {errors}")))
}

/// Another fixture's settings, each in a subvolume of its own.
pub struct InSubvolumes<F> {
    /// A directory on btrfs.
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
        let dir = tempfile::tempdir_in(&self.fs).map_err(|e| Error::io("cannot make a directory", e))?;
        let images = dir.path().join("images");
        subvolume("create", &images)?;
        let inner = (self.make)(&images).setting(disks).await?;
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
        match &self.inner {
            Some(inner) => &**inner,
            None => unreachable!("it is there until this is dropped"),
        }
    }
}

impl Drop for InSubvolume {
    fn drop(&mut self) {
        self.inner = None;
        // Where it fails the file system, which is the test's own, goes with it.
        let _ = subvolume("delete", &self.dir.path().join("images"));
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

    fn adopt(&mut self, disks: &[Disk]) -> Result<()> {
        match &mut self.inner {
            Some(inner) => inner.adopt(disks),
            None => unreachable!("it is there until this is dropped"),
        }
    }

    /// Files cannot be removed from a read-only subvolume: the whole of it is.
    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        for disk in &snapshot.disks {
            let Access::Source { source, .. } = &disk.access else {
                continue;
            };
            // The root of every subvolume has this inode number.
            let is_root = |dir: &&Path| dir.metadata().is_ok_and(|found| found.ino() == 256);
            let mut dirs = source.path().into_iter().flat_map(Path::ancestors).skip(1);
            if let Some(root) = dirs.find(is_root) {
                subvolume("delete", root)?;
            }
        }
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = self.inner().leftovers().await?;
        let listed = |e| Error::io("cannot list a directory", e);
        for entry in std::fs::read_dir(self.dir.path()).map_err(listed)? {
            let path = entry.map_err(listed)?.path();
            if !path.ends_with("images") {
                left.push(path.display().to_string());
            }
        }
        Ok(left)
    }
}
