//! The method behind a dispatcher, over a domain that is off or one that runs in a QEMU.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use disksnap_btrfs::Btrfs;
use disksnap_conformance::{InactiveConnector, MemoryCatalog};
use disksnap_core::{
    Access, Alias, BackingStore, Connector, Control, Disk, DiskChoice, DiskRequest, DiskSnapshot, Disks,
    Dispatcher, Domain, DomainId, Driver, Error, Fit, MethodChoice, Options, Probe, Registry, Snapshot,
    SnapshotName, SnapshotRequest, Sockets, Source,
};
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector};
use disksnap_test_support::{Qemu, tools};
use disksnap_xml::DomainDocument;
use tempfile::TempDir;

pub struct Rig {
    pub domain: Domain,
    pub dispatcher: Dispatcher,
    connector: Arc<dyn Connector>,
    /// Where sockets and scratch files are.
    pub dir: TempDir,
}

impl Rig {
    /// A domain that is off, with these disks.
    pub fn off(disks: Vec<Disk>) -> Self {
        let dir = TempDir::new().unwrap();
        let domain = Domain {
            id: DomainId::new("off", None),
            disks,
            sockets: Sockets::default(),
        };
        let connector = Arc::new(InactiveConnector::new(dir.path()));
        Self::new(domain, connector, dir)
    }

    /// The domain that runs in this QEMU. The test program's test `becomes_the_guardian_when_asked` is the
    /// guardian.
    pub fn running(qemu: &Qemu) -> Self {
        let dir = tempfile::Builder::new().prefix("dsnap-").tempdir().unwrap();
        let paths = Paths {
            images: dir.path().join("images"),
            run: dir.path().join("run"),
        };
        for dir in [&paths.images, &paths.run] {
            std::fs::create_dir(dir).unwrap();
        }
        let guardian = GuardianProgram::Program {
            path: std::env::current_exe().unwrap(),
            arguments: ["--exact", "becomes_the_guardian_when_asked"]
                .map(Into::into)
                .to_vec(),
        };
        let connector = Arc::new(QemuConnector::new(paths).guardian(guardian));
        let document = DomainDocument::parse(&qemu.domain_xml()).unwrap();
        Self::new(document.domain().clone(), connector, dir)
    }

    fn new(domain: Domain, connector: Arc<dyn Connector>, dir: TempDir) -> Self {
        let mut registry = Registry::empty();
        registry.add(Arc::new(Btrfs)).unwrap();
        let catalog = Arc::new(MemoryCatalog::new());
        Self {
            dispatcher: Dispatcher::new(registry, catalog, Arc::clone(&connector)),
            domain,
            connector,
            dir,
        }
    }

    pub async fn control(&self) -> Arc<dyn Control> {
        self.connector.control(&self.domain).await.unwrap()
    }

    /// What the method says of these disks, told this of each.
    pub async fn probe(&self, options: &[&[(&str, &str)]]) -> Vec<Probe> {
        let requests = self.requests(options);
        Btrfs.probe(&*self.control().await, &requests).await.unwrap()
    }

    pub fn requests(&self, options: &[&[(&str, &str)]]) -> Vec<DiskRequest> {
        let one = |(n, disk): (usize, &Disk)| DiskRequest {
            disk: disk.clone(),
            alias: Alias(format!("{}-backup", disk.target)),
            options: options
                .get(n)
                .copied()
                .unwrap_or_default()
                .iter()
                .copied()
                .collect(),
        };
        self.domain
            .disks
            .iter()
            .filter(|disk| disk.source.is_some())
            .enumerate()
            .map(one)
            .collect()
    }

    /// Why the method does not suit the first disk; panics when it does.
    pub async fn unfit(&self, options: &[&[(&str, &str)]]) -> String {
        match &self.probe(options).await[0].fit {
            Fit::Unfit { why, .. } => why.clone(),
            fit => panic!("it is {fit:?}"),
        }
    }

    pub async fn try_create(&self, name: &str, options: &[(&str, &str)]) -> Result<Snapshot, Error> {
        let method = MethodChoice {
            method: "btrfs".to_owned(),
            options: options.iter().copied().collect::<Options>(),
        };
        let disks = self.domain.disks.iter().filter(|disk| disk.source.is_some());
        let choices = disks.map(|disk| DiskChoice {
            method: Some(method.clone()),
            ..DiskChoice::new(&disk.target)
        });
        let request = SnapshotRequest {
            name: Some(name.parse().unwrap()),
            disks: Disks::Named(choices.collect()),
            ..SnapshotRequest::default()
        };
        self.dispatcher.create(&self.domain, &request).await
    }

    pub async fn create(&self, name: &str) -> Snapshot {
        self.try_create(name, &[]).await.unwrap()
    }

    pub async fn delete(&self, name: &str) {
        let name: SnapshotName = name.parse().unwrap();
        self.dispatcher.delete(&self.domain, &name).await.unwrap();
    }
}

/// Where a disk of a snapshot is read.
pub fn file(snapshot: &Snapshot, target: &str) -> PathBuf {
    match &snapshot.disk(target).unwrap().access {
        Access::Source {
            source: Source::File { file },
            ..
        } => file.clone(),
        other => panic!("{target} is reached by {other:?}"),
    }
}

/// A disk whose image is this file.
pub fn disk(target: &str, format: &str, file: &Path) -> Disk {
    Disk {
        driver: Driver {
            name: Some("qemu".to_owned()),
            format: Some(format.to_owned()),
        },
        ..Disk::new(
            target,
            Source::File {
                file: file.to_owned(),
            },
        )
    }
}

/// The same disk, whose document names a layer below it.
pub fn over(disk: Disk, file: &Path) -> Disk {
    Disk {
        backing: Some(BackingStore {
            format: None,
            source: Source::File {
                file: file.to_owned(),
            },
            backing: None,
        }),
        ..disk
    }
}

/// A raw image full of one byte.
pub fn raw(file: &Path, byte: u8) -> PathBuf {
    std::fs::write(file, vec![byte; 1 << 20]).unwrap();
    file.to_owned()
}

/// Whether a raw image is full of one byte.
pub fn is_full_of(file: &Path, byte: u8) -> bool {
    let bytes = std::fs::read(file).unwrap();
    bytes.len() == 1 << 20 && bytes.iter().all(|b| *b == byte)
}

/// Runs `qemu-img`; gives its error.
pub fn qemu_img(arguments: &[&str], dir: &Path) -> Result<(), String> {
    let mut command = Command::new(tools::program("qemu-img"));
    let output = command.args(arguments).current_dir(dir).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&text)))
    }
}

/// The round that the test writer was in, from a snapshot's disk.
pub fn round(snapshot: &Snapshot, target: &str, scratch: &Path) -> u64 {
    let format = match &snapshot.disk(target).unwrap().access {
        Access::Source { format, .. } => format.clone(),
        Access::Node(_) => panic!("a node"),
    };
    let (from, to) = (file(snapshot, target), scratch.join("round.raw"));
    let (from, to_text) = (from.to_str().unwrap(), to.to_str().unwrap());
    qemu_img(&["convert", "-f", &format, "-O", "raw", from, to_text], scratch).unwrap();
    let bytes = std::fs::read(&to).unwrap();
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}
