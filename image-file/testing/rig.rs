//! A method that takes image files, behind a dispatcher, over a domain that is off or one that runs in a QEMU:
//! a module of the test programs of every such method.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test program")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use disksnap_conformance::{InactiveConnector, MemoryCatalog};
use disksnap_core::{
    Access, Alias, BackingStore, Connector, Control, Disk, DiskChoice, DiskRequest, DiskSnapshot, Disks,
    Dispatcher, Domain, DomainId, Driver, Error, ErrorKind, Fit, MethodChoice, Options, Probe, Quiesce,
    Registry, Snapshot, SnapshotId, SnapshotName, SnapshotRequest, Sockets, Source,
};
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector};
use disksnap_image_file::ByHeaders;
use disksnap_test_support::{DiskSpec, Qemu, QemuBuilder, tools};
use disksnap_xml::DomainDocument;
use serde_json::json;
use tempfile::TempDir;

pub struct Rig {
    pub domain: Domain,
    pub dispatcher: Dispatcher,
    pub provider: Arc<dyn DiskSnapshot>,
    connector: Arc<dyn Connector>,
    /// Where sockets and scratch files are.
    pub dir: TempDir,
}

impl Rig {
    /// A domain that is off, with these disks.
    pub fn off(provider: impl DiskSnapshot + 'static, disks: Vec<Disk>) -> Self {
        let dir = TempDir::new().unwrap();
        let domain = Domain {
            id: DomainId::new("off", None),
            disks,
            sockets: Sockets::default(),
        };
        let connector = Arc::new(InactiveConnector::new(dir.path()));
        Self::new(Arc::new(provider), domain, connector, dir)
    }

    /// The domain that runs in this QEMU. The test program's test `becomes_the_guardian_when_asked` is the
    /// guardian.
    pub fn running(provider: impl DiskSnapshot + 'static, qemu: &Qemu) -> Self {
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
        let document = DomainDocument::parse(qemu.domain_xml()).unwrap();
        Self::new(Arc::new(provider), document.domain().clone(), connector, dir)
    }

    fn new(
        provider: Arc<dyn DiskSnapshot>,
        domain: Domain,
        connector: Arc<dyn Connector>,
        dir: TempDir,
    ) -> Self {
        let mut registry = Registry::empty();
        registry.add(Arc::clone(&provider)).unwrap();
        let catalog = Arc::new(MemoryCatalog::new());
        Self {
            dispatcher: Dispatcher::new(registry, catalog, Arc::clone(&connector)),
            domain,
            provider,
            connector,
            dir,
        }
    }

    /// Gives the domain other disks, as a newer document would.
    pub fn disks_are(&mut self, disks: Vec<Disk>) {
        self.domain.disks = disks;
    }

    pub async fn control(&self) -> Arc<dyn Control> {
        self.connector.control(&self.domain).await.unwrap()
    }

    /// What the method says of these disks, told this of each.
    pub async fn probe(&self, options: &[&[(&str, &str)]]) -> Vec<Probe> {
        let requests = self.requests(options);
        self.provider
            .probe(&*self.control().await, &requests)
            .await
            .unwrap()
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
        self.try_create_quiesced(name, options, Quiesce::None).await
    }

    pub async fn try_create_quiesced(
        &self,
        name: &str,
        options: &[(&str, &str)],
        quiesce: Quiesce,
    ) -> Result<Snapshot, Error> {
        let method = MethodChoice {
            method: self.provider.method().name,
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
            quiesce,
            ..SnapshotRequest::default()
        };
        self.dispatcher.create(&self.domain, &request).await
    }

    pub async fn create(&self, name: &str) -> Snapshot {
        self.try_create(name, &[]).await.unwrap()
    }

    /// Puts a snapshot back; gives what the operator should know.
    pub async fn revert(&self, snapshot: &Snapshot) -> Result<Vec<String>, Error> {
        let control = self.control().await;
        let mut warnings = Vec::new();
        for record in &snapshot.units {
            let revert = self.provider.revert(&record.unit).unwrap();
            let affected = revert.revert(&*control, snapshot.id, &record.unit, &[]).await?;
            assert_eq!(affected.unit.as_ref(), Some(&record.unit), "the snapshot stays");
            assert!(affected.disks.is_empty() && affected.peers.is_empty());
            warnings.extend(affected.warnings);
        }
        Ok(warnings)
    }

    pub async fn delete(&self, name: &str) {
        let name: SnapshotName = name.parse().unwrap();
        self.dispatcher.delete(&self.domain, &name).await.unwrap();
    }
}

/// Where a disk of a snapshot is read.
pub fn file(snapshot: &Snapshot, target: &str) -> PathBuf {
    image(&snapshot.disk(target).unwrap().access)
}

fn image(access: &Access) -> PathBuf {
    match access {
        Access::Source {
            source: Source::File { file },
            ..
        } => file.clone(),
        other => panic!("it is reached by {other:?}"),
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
            data_store: None,
            backing: None,
        }),
        ..disk
    }
}

/// The same disk, whose document names all layers that the headers of its images name.
pub fn named(disk: Disk) -> Disk {
    let below = ByHeaders::of(&disk).below;
    let backing = below.into_iter().rev().fold(None, |backing, layer| {
        Some(BackingStore {
            backing: backing.map(Box::new),
            ..layer
        })
    });
    Disk { backing, ..disk }
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

/// A machine with two qcow2 disks of 64 MiB, `vda` and `vdb`, whose images are in `dir`, made with these options.
pub fn machine(dir: &Path, options: &str) -> QemuBuilder {
    let spec = |target: &str| {
        let image = dir.join(format!("{target}.qcow2"));
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu_img(&[&create[..], &[image.to_str().unwrap(), "64M"]].concat(), dir).unwrap();
        DiskSpec::new(target, 64 << 20).qcow2().image(&image)
    };
    Qemu::builder().disk(spec("vda")).disk(spec("vdb"))
}

/// What `qemu-img check` finds wrong with a qcow2 image.
pub fn check(image: &Path, dir: &Path) -> Result<(), String> {
    qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()], dir)
}

/// Takes as many snapshots of a [`machine`] while its guest's writer goes on. Each must be sound and one instant
/// across both disks. Then the same without the pause, and says how that went.
#[expect(
    clippy::print_stderr,
    reason = "how the control went is worth seeing, and no verdict"
)]
pub async fn all_sound_while_the_guest_writes(rig: &Rig, qemu: &Qemu, rounds: usize) {
    let (mut takes, scratch) = (Vec::new(), rig.dir.path());
    for n in 0..rounds {
        qemu.wait_writer(5);
        let snapshot = rig.create(&n.to_string()).await;
        takes.push(snapshot.window.taken_us);
        for target in ["vda", "vdb"] {
            check(&file(&snapshot, target), scratch).unwrap_or_else(|why| panic!("round {n}: {why}"));
        }
        let (first, last) = (round(&snapshot, "vda", scratch), round(&snapshot, "vdb", scratch));
        assert!(first > 0, "the writer's rounds are not in the snapshot");
        assert!(
            first == last || first == last + 1,
            "{first} and {last} are not one instant"
        );
        rig.delete(&n.to_string()).await;
    }
    let mut unsound = 0;
    for _ in 0..rounds {
        qemu.wait_writer(5);
        unsound += usize::from(!is_sound_without_the_pause(rig).await);
    }
    assert_eq!(qemu.status(), "running");
    takes.sort_unstable();
    let (least, median, most) = (takes[0], takes[rounds / 2], takes[rounds - 1]);
    eprintln!(
        "takes: {least} to {most} µs, median {median}; without the pause {unsound} of {rounds} unsound"
    );
}

/// The control: the guest runs on while its disks are taken. By chance they can be sound all the same.
pub async fn is_sound_without_the_pause(rig: &Rig) -> bool {
    let (control, requests, id) = (rig.control().await, rig.requests(&[]), SnapshotId::random());
    let (provider, mut sound) = (&rig.provider, true);
    let prepared = provider.prepare(&*control, id, &requests).await.unwrap();
    for unit in &prepared {
        let taken = provider.take(&*control, unit).await.unwrap();
        let unit = provider.complete(&*control, id, unit, &taken).await.unwrap();
        for disk in &unit.disks {
            sound &= check(&image(&disk.access), rig.dir.path()).is_ok();
        }
        provider.delete(&*control, id, &unit).await.unwrap();
    }
    sound
}

/// The round that the test writer was in, from a snapshot's disk.
pub fn round(snapshot: &Snapshot, target: &str, scratch: &Path) -> u64 {
    let format = match &snapshot.disk(target).unwrap().access {
        Access::Source { format, .. } => format.clone(),
        other => panic!("it is reached by {other:?}"),
    };
    let (from, to) = (file(snapshot, target), scratch.join("round.raw"));
    let (from, to_text) = (from.to_str().unwrap(), to.to_str().unwrap());
    qemu_img(&["convert", "-f", &format, "-O", "raw", from, to_text], scratch).unwrap();
    let bytes = std::fs::read(&to).unwrap();
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// An overlay that the document does not know stands against a snapshot: the guest writes to it, and no more to the
/// image that the document names.
pub async fn an_overlay_is_seen(rig: &Rig, qemu: &Qemu) {
    let below = qemu.format_node("vda").to_owned();
    qemu.write("vda", 0, 4 << 20, 0x33);
    let overlay = rig.dir.path().join("overlay.qcow2");
    let created = ["create", "-q", "-f", "qcow2", overlay.to_str().unwrap(), "64M"];
    qemu_img(&created, rig.dir.path()).unwrap();
    let file = json!({"driver": "file", "filename": overlay});
    let node = json!({"driver": "qcow2", "node-name": "over", "backing": null, "file": file});
    qemu.qmp("blockdev-add", node);
    qemu.qmp("blockdev-snapshot", json!({"node": below, "overlay": "over"}));
    let stale = rig.unfit(&[]).await;
    assert!(
        stale.contains("overlay.qcow2") && stale.contains("another time"),
        "{stale}"
    );
    assert_eq!(
        rig.probe(&[]).await[1].fit,
        Fit::Possible,
        "the other disk is as it was"
    );
    assert_eq!(
        rig.try_create("stale", &[]).await.unwrap_err().kind(),
        ErrorKind::Unsupported
    );

    // Back on the image that the document names, by way of a job that is in no hurry.
    qemu.write("vda", 0, 4 << 20, 0x44);
    let commit = json!({"job-id": "c0", "device": "over", "speed": 65536});
    qemu.qmp("block-commit", commit);
    assert!(rig.probe(&[]).await[0].fit != Fit::Possible);
    qemu.qmp("block-job-set-speed", json!({"device": "c0", "speed": 0}));
    let status = || qemu.qmp("query-jobs", json!({}))[0]["status"].clone();
    while status() == "running" {}
    qemu.qmp("job-complete", json!({"id": "c0"}));
    while !status().is_null() {}
    assert_eq!(rig.probe(&[]).await[0].fit, Fit::Possible);
}
