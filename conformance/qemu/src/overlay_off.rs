//! Domains that are off, whose disks move onto overlays: image files that are written and read by qemu's own programs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_conformance::{Fixture, Setting};
use disksnap_core::{
    Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, DomainId, Error, ErrorKind, MethodChoice,
    Options, Result, Snapshot, Sockets, Source,
};
use disksnap_hypervisor::{Paths, QemuConnector};
use disksnap_storage_daemon::StorageDaemons;
use disksnap_test_support::tools;
use uuid::Uuid;

use crate::overlay::{damage, files_of_overlays, read_image};
use crate::setting::read_export;

/// 2 MiB and a sector: no multiple of any cluster.
const SIZE: u64 = (2 << 20) + 512;
/// The images' formats, in turn.
const FORMATS: [&str; 2] = ["qcow2", "raw"];

/// Makes domains that are off, for a method that changes which image a disk is.
pub struct OverlaysOff {
    make: Arc<dyn Fn() -> Arc<dyn DiskSnapshot> + Send + Sync>,
    capabilities: Vec<Capability>,
}

impl fmt::Debug for OverlaysOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverlaysOff").finish_non_exhaustive()
    }
}

impl OverlaysOff {
    /// `make` gives a new provider at each call.
    pub fn new(
        capabilities: impl IntoIterator<Item = Capability>,
        make: impl Fn() -> Arc<dyn DiskSnapshot> + Send + Sync + 'static,
    ) -> Self {
        Self {
            make: Arc::new(make),
            capabilities: capabilities.into_iter().collect(),
        }
    }

    /// Why this machine cannot have such a domain, or `None` when it can.
    #[must_use]
    pub fn lacking() -> Option<String> {
        use disksnap_test_support::require::lacking;
        let programs = ["qemu-img", "qemu-io", "qemu-storage-daemon"];
        programs.into_iter().find_map(lacking)
    }
}

#[async_trait]
impl Fixture for OverlaysOff {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        (self.make)()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let method = self.provider().method().name;
        Ok(Box::new(Off::new(method, disks)?))
    }
}

#[derive(Debug)]
struct Off {
    /// Nobody answers for the domain; it serves the images of its snapshots.
    connector: QemuConnector,
    dir: tempfile::TempDir,
    domain: Domain,
    method: String,
}

impl Off {
    fn new(method: String, disks: usize) -> Result<Self> {
        let temporary = |e| Error::io("cannot make a temporary directory", e);
        // Sockets go into it, and their paths must be short.
        let dir = tempfile::Builder::new().prefix("dsnap-").tempdir();
        let dir = dir.map_err(temporary)?;
        let images = dir.path().join("disks");
        let paths = Paths {
            images: dir.path().join("images"),
            run: dir.path().join("run"),
        };
        for dir in [&images, &paths.images, &paths.run] {
            std::fs::create_dir(dir).map_err(temporary)?;
        }
        let served = StorageDaemons::new(paths.run.clone()).program(tools::program("qemu-storage-daemon"));
        let mut all = Vec::with_capacity(disks);
        for (letter, format) in ('a'..='z').zip(FORMATS.into_iter().cycle()).take(disks) {
            let file = images.join(format!("vd{letter}.{format}"));
            let (path, size) = (file.to_string_lossy().into_owned(), SIZE.to_string());
            run("qemu-img", &["create", "-q", "-f", format, &path, &size])?;
            let mut disk = Disk::new(format!("vd{letter}"), Source::File { file });
            disk.driver.name = Some("qemu".to_owned());
            disk.driver.format = Some(format.to_owned());
            all.push(disk);
        }
        let domain = Domain {
            id: DomainId::new("conform", Some(Uuid::new_v4())),
            disks: all,
            sockets: Sockets::default(),
        };
        Ok(Self {
            connector: QemuConnector::new(paths).images(Arc::new(served)),
            dir,
            domain,
            method,
        })
    }

    fn disks(&self) -> PathBuf {
        self.dir.path().join("disks")
    }

    /// The image that a disk is now, and its format.
    fn image(&self, target: &str) -> Result<(&Path, &str)> {
        let disk = self.domain.disk(target)?;
        let path = disk.source.as_ref().and_then(Source::path);
        path.zip(disk.driver.format.as_deref())
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the fixture's disk has no image"))
    }

    /// One command of `qemu-io` on a disk.
    fn io(&self, target: &str, command: &str) -> Result<()> {
        let (path, format) = self.image(target)?;
        run("qemu-io", &["-f", format, "-c", command, &path.to_string_lossy()])
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(tools::program(program)).args(arguments).output();
    let output = output.map_err(|e| Error::io(format!("cannot run {program}"), e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::new(ErrorKind::Io, format!("{program}: {said}")))
}

#[async_trait]
impl Setting for Off {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(self.connector.clone())
    }

    fn choice(&self, target: &str) -> DiskChoice {
        DiskChoice {
            method: Some(MethodChoice {
                method: self.method.clone(),
                options: Options::default(),
            }),
            ..DiskChoice::new(target)
        }
    }

    fn unfit_disk(&self) -> Disk {
        let pool = Source::Volume {
            pool: "pool".to_owned(),
            volume: "volume".to_owned(),
        };
        Disk::new("vdz", pool)
    }

    fn size(&self, _: &str) -> u64 {
        SIZE
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        self.io(target, &format!("write -P {byte} {offset} {len}"))
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        self.io(target, &format!("write -z {offset} {len}"))
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        let (path, format) = self.image(target)?;
        read_image(self.dir.path(), path, format, offset, len)
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        match source.path() {
            Some(path) => read_image(self.dir.path(), path, format, offset, len),
            None => read_export(source, offset, len).await,
        }
    }

    fn adopt(&mut self, disks: &[Disk]) -> Result<()> {
        for disk in disks {
            let mut known = self.domain.disks.iter_mut();
            let known = known.find(|known| known.target == disk.target);
            let unknown = || {
                let what = format!("the domain has no disk '{}'", disk.target);
                Error::new(ErrorKind::Invalid, what)
            };
            known.ok_or_else(unknown)?.clone_from(disk);
        }
        Ok(())
    }

    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        damage(snapshot)
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        files_of_overlays(&self.disks())
    }
}
