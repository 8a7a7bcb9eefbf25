//! Volume groups of real LVM, and a domain that is off on their volumes.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use disksnap_conformance::{InactiveConnector, MemoryCatalog};
use disksnap_core::{
    Access, Alias, BackingStore, Connector, Control, Disk, DiskChoice, DiskRequest, DiskSnapshot, Disks,
    Dispatcher, Domain, DomainId, Driver, Error, Fit, Health, Inside, MethodChoice, Options, Probe, Registry,
    Snapshot, SnapshotName, SnapshotRequest, Sockets, Source,
};
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector};
use disksnap_image_file::ByHeaders;
use disksnap_lvm::LogicalVolume;
use tempfile::TempDir;

/// Runs a program, and gives what it printed or its error.
pub(crate) fn try_run<S: AsRef<OsStr>>(words: &[S]) -> Result<String, String> {
    let [program, arguments @ ..] = words else {
        panic!("no program")
    };
    let mut command = Command::new(program);
    let output = command.args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!(
            "{command:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        ))
    }
}

/// Runs a program that must succeed; its words are separated by white space.
pub(crate) fn run(line: &str) -> String {
    try_run(&line.split_whitespace().collect::<Vec<_>>()).unwrap_or_else(|why| panic!("{why}"))
}

/// A volume group on one of the guest's disks; all in it goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) name: String,
}

impl Group {
    pub(crate) fn new(name: &str, options: &str) -> Self {
        Self::on("/dev/vda", name, options)
    }

    pub(crate) fn on(disk: &str, name: &str, options: &str) -> Self {
        run(&format!("vgcreate -y {options} {name} {disk}"));
        Self {
            name: name.to_owned(),
        }
    }

    /// A plain volume of this size in MiB.
    pub(crate) fn plain(&self, name: &str, mib: u64) -> PathBuf {
        run(&format!("lvcreate -y -Wn -L {mib}m -n {name} {}", self.name));
        self.path(name)
    }

    /// A thin pool of this size in MiB, which fails writes when it is full.
    pub(crate) fn pool(&self, name: &str, mib: u64) {
        run(&format!(
            "lvcreate -y --type thin-pool -Zn -c 64k -L {mib}m --poolmetadatasize 2m -n {name} {}",
            self.name
        ));
        run(&format!("lvchange --errorwhenfull y {}/{name}", self.name));
    }

    /// A thin volume of this size in MiB.
    pub(crate) fn thin(&self, pool: &str, name: &str, mib: u64) -> PathBuf {
        run(&format!(
            "lvcreate -y -V {mib}m --thinpool {}/{pool} -n {name}",
            self.name
        ));
        self.path(name)
    }

    pub(crate) fn path(&self, volume: &str) -> PathBuf {
        PathBuf::from(format!("/dev/{}/{volume}", self.name))
    }

    /// The names of its volumes, those that lvm2 hides left out.
    pub(crate) fn volumes(&self) -> Vec<String> {
        let listed = run(&format!("lvs --noheadings -o lv_name {}", self.name));
        let mut names: Vec<String> = listed.split_whitespace().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// One field of one volume.
    pub(crate) fn field(&self, volume: &str, field: &str) -> String {
        let told = run(&format!("lvs --noheadings -a -o {field} {}/{volume}", self.name));
        told.trim().to_owned()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let removed = try_run(&["vgremove", "-ff", "-y", &self.name]);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// A raw disk that is this device.
pub(crate) fn block(target: &str, device: &Path) -> Disk {
    formatted(
        target,
        Source::Block {
            dev: device.to_owned(),
        },
        "raw",
    )
}

/// A raw disk that is this file.
pub(crate) fn file(target: &str, file: &Path) -> Disk {
    formatted(
        target,
        Source::File {
            file: file.to_owned(),
        },
        "raw",
    )
}

pub(crate) fn formatted(target: &str, source: Source, format: &str) -> Disk {
    Disk {
        driver: Driver {
            name: Some("qemu".to_owned()),
            format: Some(format.to_owned()),
        },
        ..Disk::new(target, source)
    }
}

/// The same disk, whose document names all layers that the headers of its images name.
pub(crate) fn named(disk: Disk) -> Disk {
    let below = ByHeaders::of(&disk).below;
    let backing = below.into_iter().rev().fold(None, |backing, layer| {
        Some(BackingStore {
            backing: backing.map(Box::new),
            ..layer
        })
    });
    Disk { backing, ..disk }
}

/// A domain, off or running, and the method behind a dispatcher.
pub(crate) struct Rig {
    pub(crate) domain: Domain,
    pub(crate) dispatcher: Dispatcher,
    connector: Arc<dyn Connector>,
    pub(crate) dir: TempDir,
}

impl Rig {
    /// A domain that is off.
    pub(crate) fn new(disks: Vec<Disk>) -> Self {
        let dir = TempDir::new().unwrap();
        let connector = Arc::new(InactiveConnector::new(dir.path()));
        Self::reached(disks, Sockets::default(), connector, dir)
    }

    /// The domain that the process with this monitor holds. The test program's test `becomes_the_guardian_when_asked` is
    /// the guardian.
    pub(crate) fn running(disks: Vec<Disk>, monitor: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        let paths = Paths {
            images: dir.path().join("images"),
            run: dir.path().join("run"),
        };
        for dir in [&paths.images, &paths.run] {
            std::fs::create_dir(dir).unwrap();
        }
        let sockets = Sockets {
            monitor: Some(monitor.to_owned()),
            agent: None,
        };
        let guardian = GuardianProgram::Program {
            path: std::env::current_exe().unwrap(),
            arguments: ["--exact", "becomes_the_guardian_when_asked"]
                .map(Into::into)
                .to_vec(),
        };
        let connector = QemuConnector::new(paths).guardian(guardian);
        Self::reached(disks, sockets, Arc::new(connector), dir)
    }

    fn reached(disks: Vec<Disk>, sockets: Sockets, connector: Arc<dyn Connector>, dir: TempDir) -> Self {
        let mut registry = Registry::empty();
        registry.add(Arc::new(LogicalVolume)).unwrap();
        let catalog = Arc::new(MemoryCatalog::new());
        Self {
            dispatcher: Dispatcher::new(registry, catalog, Arc::clone(&connector)),
            domain: Domain {
                id: DomainId::new("domain", None),
                disks,
                sockets,
            },
            connector,
            dir,
        }
    }

    pub(crate) async fn control(&self) -> Arc<dyn Control> {
        self.connector.control(&self.domain).await.unwrap()
    }

    /// What the method is asked of each disk, told the same of all.
    pub(crate) fn requests(&self, options: &[(&str, &str)]) -> Vec<DiskRequest> {
        let one = |disk: &Disk| DiskRequest {
            disk: disk.clone(),
            alias: Alias(format!("{}-backup", disk.target)),
            options: options.iter().copied().collect(),
        };
        self.domain.disks.iter().map(one).collect()
    }

    pub(crate) async fn probe(&self, options: &[(&str, &str)]) -> Vec<Probe> {
        let requests = self.requests(options);
        LogicalVolume
            .probe(&*self.control().await, &requests)
            .await
            .unwrap()
    }

    /// The kind and the reason why the method does not suit the first disk; panics when it does.
    pub(crate) async fn unfit(&self, options: &[(&str, &str)]) -> (disksnap_core::ErrorKind, String) {
        match &self.probe(options).await[0].fit {
            Fit::Unfit { kind, why } => (*kind, why.clone()),
            fit => panic!("it is {fit:?}"),
        }
    }

    pub(crate) async fn try_create(&self, name: &str, options: &[(&str, &str)]) -> Result<Snapshot, Error> {
        let method = MethodChoice {
            method: "lvm".to_owned(),
            options: options.iter().copied().collect::<Options>(),
        };
        let choices = self.domain.disks.iter().map(|disk| DiskChoice {
            method: Some(method.clone()),
            ..DiskChoice::new(&disk.target)
        });
        let request = SnapshotRequest {
            name: Some(name.parse().unwrap()),
            disks: Disks::Named(choices.collect()),
            // No test here is about it, and the guest is slow where the host is busy.
            deadline: std::time::Duration::from_mins(1),
            ..SnapshotRequest::default()
        };
        self.dispatcher.create(&self.domain, &request).await
    }

    pub(crate) async fn create(&self, name: &str) -> Snapshot {
        self.try_create(name, &[]).await.unwrap()
    }

    pub(crate) async fn delete(&self, name: &str) {
        let name: SnapshotName = name.parse().unwrap();
        self.dispatcher.delete(&self.domain, &name).await.unwrap();
    }

    pub(crate) async fn health(&self, name: &str) -> Health {
        let name: SnapshotName = name.parse().unwrap();
        let shown = self.dispatcher.show(&self.domain, &name).await.unwrap();
        shown.health[0].clone()
    }
}

/// The device that a disk of a snapshot is read from.
pub(crate) fn device(snapshot: &Snapshot, target: &str) -> PathBuf {
    match &snapshot.disk(target).unwrap().access {
        Access::Source {
            source: Source::Block { dev },
            ..
        } => dev.clone(),
        other => panic!("it is reached by {other:?}"),
    }
}

/// Where a disk's image is in the snapshot that is its volume's.
pub(crate) fn inside<'a>(snapshot: &'a Snapshot, target: &str) -> &'a Inside {
    match &snapshot.disk(target).unwrap().access {
        Access::Inside(inside) => inside,
        other => panic!("it is reached by {other:?}"),
    }
}

/// Fills so many bytes of a device with one byte, on to the disk itself.
pub(crate) fn fill(device: &Path, offset: u64, len: usize, byte: u8) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(device).unwrap();
    file.write_all_at(&vec![byte; len], offset).unwrap();
    file.sync_all().unwrap();
}

/// Whether so many bytes of a device are all this one.
pub(crate) fn is_full_of(device: &Path, offset: u64, len: usize, byte: u8) -> bool {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![!byte; len];
    std::fs::File::open(device)
        .unwrap()
        .read_exact_at(&mut bytes, offset)
        .unwrap();
    bytes.iter().all(|b| *b == byte)
}
