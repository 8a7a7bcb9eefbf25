//! Domains whose disks move onto overlays: the guest's side follows them, and everything beside the images is seen.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_conformance::{Fixture, Setting, read_file};
use disksnap_core::{
    Access, Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, Error, ErrorKind, MethodChoice,
    Result, Snapshot, Source,
};
use disksnap_nbd::{Client, CommandFlags, ConnectOptions, Uri};
use disksnap_test_support::tools;
use serde_json::{Value, json};

use crate::setting::QemuSetting;
use crate::{Process, QemuFixture};

/// What every name begins with that the method gives inside QEMU.
const OURS: &str = "dsx-";

/// A [`QemuFixture`] for a method that changes which image a disk is.
#[derive(Debug, Clone)]
pub struct OverlayFixture(pub QemuFixture);

#[async_trait]
impl Fixture for OverlayFixture {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        self.0.provider()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.0.expected_capabilities()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let choice = MethodChoice {
            method: self.provider().method().name,
            options: self.0.options.clone(),
        };
        let setting = OverlaySetting {
            inner: QemuSetting::new(&self.0, disks, choice)?,
            exported: self.0.process == Process::ExportedStorageDaemon,
        };
        Ok(Box::new(setting))
    }

    fn postmortem(&self) -> Option<String> {
        self.0.postmortem()
    }
}

struct OverlaySetting {
    inner: QemuSetting,
    /// The guest's side is an NBD export, and not a device.
    exported: bool,
}

impl fmt::Debug for OverlaySetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl OverlaySetting {
    /// A connection to the export that stands for the guest's device.
    async fn guest(&self, target: &str) -> Result<Client> {
        let uri = Uri::unix(self.inner.guest_socket(), target);
        let client = Client::connect(&uri, &ConnectOptions::default()).await;
        client.map_err(|e| io(format!("cannot connect to the guest's side of {target}"), e))
    }

    /// The directory of a disk's images.
    fn dirs(&self) -> Vec<PathBuf> {
        let paths = self
            .domain()
            .disks
            .iter()
            .filter_map(|d| d.source.as_ref()?.path());
        let mut dirs: Vec<PathBuf> = paths.filter_map(|p| Some(p.parent()?.to_owned())).collect();
        dirs.dedup();
        dirs
    }

    /// The image that a machine's device is on now, and its format.
    fn top(&self, target: &str) -> Result<(PathBuf, String)> {
        let disk = self.domain().disk(target)?;
        let alias = disk.alias.clone().unwrap_or_default();
        let blocks = self.inner.monitor("query-block", &json!({}))?;
        let of_disk = |block: &&Value| {
            let qdev = block["qdev"].as_str().unwrap_or_default();
            qdev == alias || qdev.contains(&format!("/{alias}/"))
        };
        let block = blocks.as_array().into_iter().flatten().find(of_disk);
        let image = block.map(|block| &block["inserted"]["image"]);
        let text = |key: &str| image.and_then(|image| image[key].as_str()).map(str::to_owned);
        let found = text("filename").zip(text("format"));
        let (mut path, format) =
            found.ok_or_else(|| Error::new(ErrorKind::Internal, "the fixture's disk has no image"))?;
        if let Some(options) = path.strip_prefix("json:") {
            let options: Value = serde_json::from_str(options).unwrap_or_default();
            let file = &options["file"]["filename"];
            file.as_str().unwrap_or_default().clone_into(&mut path);
        }
        Ok((path.into(), format))
    }
}

/// A range of an image with its chain; a copy of it is in `dir` meanwhile.
pub(crate) fn read_image(dir: &Path, path: &Path, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
    let copy = dir.join("overlay-copy.raw");
    let mut command = std::process::Command::new(tools::program("qemu-img"));
    command
        .args(["convert", "-U", "-f", format, "-O", "raw"])
        .arg(path)
        .arg(&copy);
    let output = command
        .output()
        .map_err(|e| Error::io("cannot run qemu-img", e))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::new(ErrorKind::Io, format!("qemu-img: {said}")));
    }
    let bytes = read_file(&Source::File { file: copy.clone() }, "raw", offset, len)?;
    std::fs::remove_file(&copy).map_err(|e| Error::io("cannot remove a copy", e))?;
    Ok(bytes)
}

/// Somebody writes to what the snapshot is read from; that it is the same byte is nothing to rely on.
pub(crate) fn damage(snapshot: &Snapshot) -> Result<()> {
    for disk in &snapshot.disks {
        let Access::Source { source, .. } = &disk.access else {
            continue;
        };
        let path = source.path().unwrap_or(Path::new(""));
        let failed = |e| Error::io(format!("cannot damage {}", path.display()), e);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).map_err(failed)?;
        file.write_all_at(&byte, 0).map_err(failed)?;
    }
    Ok(())
}

/// The files in a directory that only the method makes.
pub(crate) fn files_of_overlays(dir: &Path) -> Result<Vec<String>> {
    let id = |text: &str| text.len() == 12 && text.chars().all(|c| c.is_ascii_hexdigit());
    let failed = |e| Error::io(format!("cannot list {}", dir.display()), e);
    let mut left = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if name.contains("disksnap") || name.rsplit('.').next().is_some_and(id) {
            left.push(format!("file {name}"));
        }
    }
    Ok(left)
}

fn io(what: String, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Io, what).because(error)
}

#[async_trait]
impl Setting for OverlaySetting {
    fn domain(&self) -> &Domain {
        self.inner.domain()
    }

    fn connector(&self) -> Arc<dyn Connector> {
        self.inner.connector()
    }

    fn choice(&self, target: &str) -> DiskChoice {
        self.inner.choice(target)
    }

    fn unfit_disk(&self) -> Disk {
        self.inner.unfit_disk()
    }

    fn size(&self, target: &str) -> u64 {
        self.inner.size(target)
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        if !self.exported {
            return self.inner.fill(target, offset, len, byte).await;
        }
        let bytes = vec![byte; usize::try_from(len).unwrap_or_default()];
        let client = self.guest(target).await?;
        let written = client.write(offset, bytes, CommandFlags::empty()).await;
        client.disconnect().await;
        written.map_err(|e| io(format!("cannot write to {target}"), e))
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        if !self.exported {
            return self.inner.zero(target, offset, len).await;
        }
        let client = self.guest(target).await?;
        let zeroed = client.write_zeroes(offset, len, CommandFlags::empty()).await;
        client.disconnect().await;
        zeroed.map_err(|e| io(format!("cannot zero {target}"), e))
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        if self.exported {
            let client = self.guest(target).await?;
            let bytes = client
                .read(offset, usize::try_from(len).unwrap_or_default())
                .await;
            client.disconnect().await;
            return bytes
                .map(|bytes| bytes.to_vec())
                .map_err(|e| io(format!("cannot read {target}"), e));
        }
        if len <= crate::setting::SHORT_READ {
            return self.inner.read_disk(target, offset, len).await;
        }
        self.inner.flush(target);
        let (path, format) = self.top(target)?;
        read_image(self.inner.state_dir(), &path, &format, offset, len)
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        match source.path() {
            Some(path) => read_image(self.inner.state_dir(), path, format, offset, len),
            None => self.inner.read_snapshot(source, format, offset, len).await,
        }
    }

    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        damage(snapshot)
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = self.inner.leftovers().await?;
        for (kind, command, key) in [
            ("node", "query-named-block-nodes", "node-name"),
            ("job", "query-jobs", "id"),
        ] {
            let names = self.inner.names(command, key)?.into_iter();
            let ours = names.filter(|name| name.starts_with(OURS));
            left.extend(ours.map(|name| format!("{kind} {name}")));
        }
        for dir in self.dirs() {
            left.extend(files_of_overlays(&dir)?);
        }
        Ok(left)
    }
}
