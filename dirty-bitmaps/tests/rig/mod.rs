//! What the tests share: a dispatcher with a tracker over a real QEMU, and a reader of snapshots and of what changed.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    CheckpointName, Command, Control, Disk, DiskChoice, Disks, Dispatcher, Domain, ExportDisk, ExportRequest,
    MethodChoice, NetworkHost, NewCheckpoint, Opened, Options, Registry, Result, Snapshot, SnapshotName,
    SnapshotRequest, Source, StopExports,
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
        let client = Client::connect(&uri(&opened.source), &ConnectOptions::default())
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
        let changed = changed_in(&opened).await;
        self.dispatcher.close(&self.domain, opened).await?;
        Ok(changed)
    }

    /// The whole content of a snapshot's disks and what changed in them, served all together: each since a checkpoint, or
    /// since none.
    ///
    /// # Errors
    /// Why they are not served.
    pub async fn tell(
        &self,
        snapshot: &Snapshot,
        since: &BTreeMap<&'static str, Option<String>>,
    ) -> Result<BTreeMap<&'static str, Told>> {
        let wanted = since.iter().map(|(target, since)| ExportDisk {
            alias: snapshot.disk(target).unwrap().alias.clone(),
            name: None,
            checkpoint: since.as_deref().map(checkpoint),
        });
        let request = ExportRequest {
            listen: None,
            tls: None,
            allow_remote: false,
            disks: wanted.collect(),
        };
        self.dispatcher.start_exports(&self.domain, &request).await?;
        let mut told = BTreeMap::new();
        for (target, since) in since {
            let source = self.dispatcher.backup_source(&self.domain, snapshot, target);
            let uri = uri(&source.await.unwrap().unwrap());
            told.insert(*target, Told::over(&uri, since.as_deref()).await);
        }
        let stopped = self
            .dispatcher
            .stop_exports(&self.domain, &StopExports::All)
            .await;
        stopped.unwrap();
        Ok(told)
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

/// What changed in what is opened, as it tells.
pub async fn changed_in(opened: &Opened) -> Vec<(Range<u64>, Vec<u8>)> {
    let told = Told::over(&uri(&opened.source), opened.bitmap.as_deref()).await;
    let data = |range: &Range<u64>| {
        told.content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec()
    };
    told.changed
        .iter()
        .map(|range| (range.clone(), data(range)))
        .collect()
}

/// Runs a program of QEMU's.
pub fn run(program: &str, arguments: &[&str]) {
    let output = std::process::Command::new(tools::program(program))
        .args(arguments)
        .output();
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A disk of a snapshot, as it is read.
pub struct Told {
    pub content: Vec<u8>,
    pub changed: Vec<Range<u64>>,
}

impl Told {
    async fn over(uri: &Uri, since: Option<&str>) -> Self {
        let context = since.map(dirty_bitmap_context);
        let options = ConnectOptions {
            meta_contexts: context.iter().cloned().collect(),
            ..ConnectOptions::default()
        };
        let client = Client::connect(uri, &options).await.unwrap();
        let length = usize::try_from(client.size()).unwrap();
        let content = client.read(0, length).await.unwrap().to_vec();
        let mut changed = Vec::new();
        if let Some(context) = context {
            let mut extents = client.extents(&context, 0..client.size()).unwrap();
            while let Some(extent) = extents.next().await.unwrap() {
                if extent.is_dirty() {
                    changed.push(extent.offset..extent.end());
                }
            }
        }
        client.disconnect().await;
        Self { content, changed }
    }

    /// What was before, with what changed applied.
    pub fn applied(&self, mut before: Vec<u8>) -> Vec<u8> {
        for range in &self.changed {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            before[range.clone()].copy_from_slice(&self.content[range]);
        }
        before
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

fn uri(source: &Source) -> Uri {
    let Source::Network {
        name: Some(export),
        hosts,
        ..
    } = source
    else {
        panic!("not a network source: {source}")
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
