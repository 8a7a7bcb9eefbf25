//! What the tests share: a dispatcher with a tracker over a real QEMU, and a reader of snapshots and of what changed.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]

use std::ops::Range;
use std::sync::Arc;

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    CheckpointName, Command, Control, Disk, DiskChoice, Disks, Dispatcher, Domain, MethodChoice, NetworkHost,
    NewCheckpoint, Opened, Options, Registry, Result, Snapshot, SnapshotName, SnapshotRequest, Source,
};
use disksnap_dirty_bitmaps::DirtyBitmaps;
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector};
use disksnap_nbd::{Client, ConnectOptions, Uri, dirty_bitmap_context};
use disksnap_qemu_external_qcow2::QemuExternalQcow2;
use disksnap_qemu_fleece::QemuFleece;
use disksnap_reflink::Reflink;
use disksnap_storage_daemon::StorageDaemons;
use disksnap_test_support::tools;
use disksnap_xml::DomainDocument;
use serde_json::{Value, json};

/// A dispatcher with a state directory of its own, and one domain.
pub struct Rig {
    pub dispatcher: Dispatcher,
    pub domain: Domain,
    connector: QemuConnector,
    _dir: tempfile::TempDir,
}

impl Rig {
    pub async fn new(domain_xml: &str) -> Self {
        let dir = temp_dir();
        let state = StateDir::open(Some(&dir.path().join("state"))).unwrap();
        let paths = Paths {
            images: state.images(),
            run: state.run(),
        };
        let arguments = ["--exact", "becomes_the_guardian_when_asked"]
            .map(Into::into)
            .to_vec();
        let path = std::env::current_exe().unwrap();
        let guardian = GuardianProgram::Program { path, arguments };
        let daemons = StorageDaemons::new(state.run()).program(tools::program("qemu-storage-daemon"));
        let connector = QemuConnector::new(paths)
            .guardian(guardian)
            .images(Arc::new(daemons));
        let catalog = SqliteCatalog::open(state).await.unwrap();
        let mut registry = Registry::empty();
        registry.add(Arc::new(QemuFleece)).unwrap();
        registry.add(Arc::new(QemuExternalQcow2)).unwrap();
        registry.add(Arc::new(Reflink)).unwrap();
        let dispatcher = Dispatcher::new(registry, Arc::new(catalog), Arc::new(connector.clone()));
        Self {
            dispatcher: dispatcher.tracked_by(Arc::new(DirtyBitmaps)),
            domain: DomainDocument::parse(domain_xml).unwrap().domain().clone(),
            connector,
            _dir: dir,
        }
    }

    pub fn control(&self) -> Arc<dyn Control> {
        Arc::new(self.connector.control(&self.domain).unwrap())
    }

    /// A snapshot of these disks by the default method, and a checkpoint of the same name where `checkpoint` says so.
    pub async fn create(&self, name: &str, targets: &[&str], checkpoint: bool) -> Result<Snapshot> {
        let request = request(name, targets, checkpoint);
        self.dispatcher.create(&self.domain, &request).await
    }

    pub async fn delete(&self, name: &str) {
        let deleted = self.dispatcher.delete(&self.domain, &name_of(name)).await;
        deleted.unwrap();
    }

    /// The whole content of one disk of a snapshot.
    pub async fn read(&self, name: &str, target: &str) -> Vec<u8> {
        let opened = self
            .dispatcher
            .open(&self.domain, &name_of(name), target)
            .await
            .unwrap();
        let client = Client::connect(&uri(&opened), &ConnectOptions::default())
            .await
            .unwrap();
        let all = client
            .read(0, usize::try_from(client.size()).unwrap())
            .await
            .unwrap();
        client.disconnect().await;
        self.dispatcher.close(&self.domain, opened).await.unwrap();
        all.to_vec()
    }

    /// What changed in a disk between a checkpoint and a snapshot: where, and what is there now.
    pub async fn changed(&self, name: &str, target: &str, since: &str) -> Result<Vec<(Range<u64>, Vec<u8>)>> {
        let (name, since) = (name_of(name), checkpoint(since));
        let opened = self
            .dispatcher
            .open_since(&self.domain, &name, target, &since)
            .await?;
        let context = dirty_bitmap_context(opened.bitmap.as_deref().unwrap());
        let options = ConnectOptions {
            meta_contexts: vec![context.clone()],
            ..ConnectOptions::default()
        };
        let client = Client::connect(&uri(&opened), &options).await.unwrap();
        let mut extents = client.extents(&context, 0..client.size()).unwrap();
        let mut changed = Vec::new();
        while let Some(extent) = extents.next().await.unwrap() {
            if extent.is_dirty() {
                let length = usize::try_from(extent.length).unwrap();
                let data = client.read(extent.offset, length).await.unwrap();
                changed.push((extent.offset..extent.end(), data.to_vec()));
            }
        }
        drop(extents);
        client.disconnect().await;
        self.dispatcher.close(&self.domain, opened).await?;
        Ok(changed)
    }

    /// The names of all bitmaps of the disks, scratch and all, with `*` where one records.
    pub async fn bitmaps(&self) -> Vec<String> {
        let ask = Command::new("query-named-block-nodes", json!({"flat": true}));
        let nodes = self.control().monitor(ask).await.unwrap();
        let mut names = Vec::new();
        for node in nodes.as_array().unwrap() {
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                let Some(name) = bitmap["name"].as_str() else {
                    continue;
                };
                let star = if bitmap["recording"] == Value::Bool(true) {
                    "*"
                } else {
                    ""
                };
                names.push(format!("{}:{name}{star}", node["node-name"].as_str().unwrap()));
            }
        }
        names.sort();
        names
    }
}

pub fn request(name: &str, targets: &[&str], checkpoint: bool) -> SnapshotRequest {
    SnapshotRequest {
        name: Some(name_of(name)),
        disks: Disks::Named(targets.iter().map(|target| DiskChoice::new(*target)).collect()),
        checkpoint: checkpoint.then_some(NewCheckpoint::AsSnapshot),
        ..SnapshotRequest::default()
    }
}

pub fn name_of(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

pub fn checkpoint(name: &str) -> CheckpointName {
    name.parse().unwrap()
}

fn uri(opened: &Opened) -> Uri {
    let Source::Network {
        name: Some(export),
        hosts,
        ..
    } = &opened.source
    else {
        panic!("not a network source: {}", opened.source)
    };
    match &hosts[0] {
        NetworkHost::Unix { socket } => Uri::unix(socket, export),
        NetworkHost::Tcp { name, port } => Uri::tcp(name, port.unwrap(), export),
    }
}

/// In memory where there is such a place: that a catalog is durable is tried elsewhere.
fn temp_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// What the test of this name does: when asked it does not return.
pub fn become_guardian_when_asked() {
    disksnap_hypervisor::guardian::run_if_asked();
    assert!(
        std::env::var_os("DISKSNAP_GUARDIAN").is_none(),
        "a guardian does not go on as a test"
    );
}

/// The same request, by this method.
pub fn by(method: &str, mut request: SnapshotRequest) -> SnapshotRequest {
    if let Disks::Named(choices) = &mut request.disks {
        for choice in choices {
            choice.method = Some(MethodChoice {
                method: method.to_owned(),
                options: Options::default(),
            });
        }
    }
    request
}

impl Rig {
    /// Goes on with the disks that a snapshot gave the domain.
    pub fn follow(&mut self, snapshot: &Snapshot) {
        let disks: Vec<Disk> = snapshot
            .disks
            .iter()
            .filter_map(|disk| disk.modified_disk.clone())
            .collect();
        self.stand_on(&disks);
    }

    /// Goes on with these disks.
    pub fn stand_on(&mut self, disks: &[Disk]) {
        for disk in disks {
            let known = self
                .domain
                .disks
                .iter_mut()
                .find(|known| known.target == disk.target);
            *known.unwrap() = disk.clone();
        }
    }
}
