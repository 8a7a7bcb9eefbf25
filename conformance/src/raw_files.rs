//! A ready-made fixture for methods that snapshot plain raw files of a domain that is off.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, DomainId, Driver, Error,
    ErrorKind, MethodChoice, Options, Result, Snapshot, Sockets, Source,
};
use uuid::Uuid;

use crate::{Fixture, InactiveConnector, Setting, read_file};

/// 2 MiB and a sector: no multiple of any cluster.
const SIZE: u64 = (2 << 20) + 512;

/// Makes domains whose disks are sparse raw files in a directory of their own.
pub struct RawFiles {
    parent: PathBuf,
    make: Arc<dyn Fn() -> Arc<dyn DiskSnapshot> + Send + Sync>,
    capabilities: Vec<Capability>,
    options: Arc<dyn Fn(&Path) -> Options + Send + Sync>,
}

impl fmt::Debug for RawFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawFiles")
            .field("parent", &self.parent)
            .finish_non_exhaustive()
    }
}

impl RawFiles {
    /// Settings go into directories under `parent`, which must exist; `make` gives a new provider at each call.
    pub fn new(
        parent: impl Into<PathBuf>,
        capabilities: impl IntoIterator<Item = Capability>,
        make: impl Fn() -> Arc<dyn DiskSnapshot> + Send + Sync + 'static,
    ) -> Self {
        Self {
            parent: parent.into(),
            make: Arc::new(make),
            capabilities: capabilities.into_iter().collect(),
            options: Arc::new(|_| Options::default()),
        }
    }

    /// Tells the method this of each disk, by the path of its image.
    #[must_use]
    pub fn with_options(mut self, options: impl Fn(&Path) -> Options + Send + Sync + 'static) -> Self {
        self.options = Arc::new(options);
        self
    }
}

#[async_trait]
impl Fixture for RawFiles {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        (self.make)()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let method = self.provider().method().name;
        let setting = RawSetting::new(&self.parent, disks, |image| MethodChoice {
            method: method.clone(),
            options: (self.options)(image),
        })?;
        Ok(Box::new(setting))
    }
}

/// One such domain; useful by itself in a fixture that does more. Removes its directory when dropped.
#[derive(Debug)]
pub struct RawSetting {
    dir: PathBuf,
    domain: Domain,
    choices: Vec<DiskChoice>,
}

impl RawSetting {
    /// A domain with this many disks, `vda`, `vdb`, …, in a new directory under `parent`. `choose` says for
    /// the path of each image which method it is to have.
    pub fn new(parent: &Path, disks: usize, choose: impl Fn(&Path) -> MethodChoice) -> Result<Self> {
        let dir = parent.join(format!("disksnap-conform-{}", Uuid::new_v4().simple()));
        std::fs::create_dir(&dir).map_err(|e| Error::io(format!("cannot create {}", dir.display()), e))?;
        let mut setting = Self {
            dir,
            domain: Domain {
                id: DomainId::new("conform", Some(Uuid::new_v4())),
                disks: Vec::new(),
                sockets: Sockets::default(),
            },
            choices: Vec::new(),
        };
        for letter in ('a'..='z').take(disks) {
            let target = format!("vd{letter}");
            let image = setting.dir.join(format!("{target}.raw"));
            let made = File::create(&image).and_then(|file| file.set_len(SIZE));
            made.map_err(|e| Error::io(format!("cannot create {}", image.display()), e))?;
            setting.choices.push(DiskChoice {
                method: Some(choose(&image)),
                ..DiskChoice::new(&target)
            });
            let disk = Disk::new(target, Source::File { file: image });
            setting.domain.disks.push(Disk {
                driver: Driver {
                    name: Some("qemu".to_owned()),
                    format: Some("raw".to_owned()),
                },
                ..disk
            });
        }
        Ok(setting)
    }

    /// The directory that everything is in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn image(&self, target: &str) -> Result<&Path> {
        let disk = self.domain.disk(target)?;
        let path = disk.source.as_ref().and_then(Source::path);
        path.ok_or_else(|| Error::new(ErrorKind::Internal, "the fixture's disk has no path"))
    }
}

impl Drop for RawSetting {
    /// Nothing to be done where it fails: the directory is one of a test.
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[async_trait]
impl Setting for RawSetting {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(InactiveConnector::new(&self.dir))
    }

    fn choice(&self, target: &str) -> DiskChoice {
        let known = self.choices.iter().find(|c| c.target == target);
        known.cloned().unwrap_or_else(|| DiskChoice::new(target))
    }

    fn unfit_disk(&self) -> Disk {
        let source = Source::Network {
            protocol: "nbd".to_owned(),
            name: None,
            hosts: Vec::new(),
            tls: false,
        };
        Disk::new("vdz", source)
    }

    fn size(&self, _: &str) -> u64 {
        SIZE
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        let image = self.image(target)?;
        let bytes = vec![byte; usize::try_from(len).unwrap_or_default()];
        let written = OpenOptions::new()
            .write(true)
            .open(image)
            .and_then(|file| file.write_all_at(&bytes, offset));
        written.map_err(|e| Error::io(format!("cannot write {}", image.display()), e))
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        self.fill(target, offset, len, 0).await
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        let file = self.image(target)?.to_owned();
        read_file(&Source::File { file }, "raw", offset, len)
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        read_file(source, format, offset, len)
    }

    /// To other raw files.
    fn adopt(&mut self, disks: &[Disk]) -> Result<()> {
        for disk in disks {
            let path = disk.source.as_ref().and_then(Source::path);
            if path.is_none() || disk.driver.format.as_deref() != Some("raw") || disk.backing.is_some() {
                let what = format!("the fixture reads raw files, and {} is none now", disk.target);
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            let known = self
                .domain
                .disks
                .iter_mut()
                .find(|known| known.target == disk.target);
            let known = known.ok_or_else(|| {
                Error::new(
                    ErrorKind::Invalid,
                    format!("the domain has no disk '{}'", disk.target),
                )
            })?;
            known.clone_from(disk);
        }
        Ok(())
    }

    /// Removes the files that the snapshot is read from.
    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        for disk in &snapshot.disks {
            if let Access::Source { source, .. } = &disk.access
                && let Some(path) = source.path()
            {
                std::fs::remove_file(path)
                    .map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))?;
            }
        }
        Ok(())
    }

    /// All files in the directory that are no disks of the domain.
    async fn leftovers(&self) -> Result<Vec<String>> {
        let failed = |e| Error::io(format!("cannot list {}", self.dir.display()), e);
        let mut left = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let is_disk = |disk: &Disk| disk.source.as_ref().and_then(Source::path) == Some(&path);
            if !self.domain.disks.iter().any(is_disk) {
                left.push(path.display().to_string());
            }
        }
        Ok(left)
    }
}
