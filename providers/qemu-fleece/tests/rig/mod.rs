//! What the provider's tests share: a dispatcher over a real QEMU, and a reader of what it exports.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]

use std::path::PathBuf;
use std::sync::Arc;

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    Command, Control, DiskChoice, Disks, Dispatcher, Domain, Health, MethodChoice, NetworkHost, Registry,
    Snapshot, SnapshotName, SnapshotRequest, Source,
};
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector};
use disksnap_nbd::{Client, ConnectOptions, Uri};
use disksnap_qemu_fleece::QemuFleece;
use disksnap_test_support::pattern;
use disksnap_xml::DomainDocument;
use serde_json::json;

/// A dispatcher with a state directory of its own, and one domain.
pub struct Rig {
    pub dispatcher: Dispatcher,
    pub connector: QemuConnector,
    pub domain: Domain,
    pub dir: tempfile::TempDir,
}

impl Rig {
    pub async fn new(domain_xml: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(Some(&dir.path().join("state"))).unwrap();
        let paths = Paths {
            images: state.images(),
            run: state.run(),
        };
        let connector = QemuConnector::new(paths).guardian(guardian_program());
        let catalog = SqliteCatalog::open(state).await.unwrap();
        let mut registry = Registry::empty();
        registry.add(Arc::new(QemuFleece)).unwrap();
        let dispatcher = Dispatcher::new(registry, Arc::new(catalog), Arc::new(connector.clone()));
        let domain = DomainDocument::parse(domain_xml).unwrap().domain().clone();
        Self {
            dispatcher,
            connector,
            domain,
            dir,
        }
    }

    pub fn control(&self) -> Arc<dyn Control> {
        Arc::new(self.connector.control(&self.domain).unwrap())
    }

    /// A create of these disks (`way` empty: whatever the provider chooses), under this name.
    pub async fn create(&self, name: &str, targets: &[&str], way: &str) -> disksnap_core::Result<Snapshot> {
        self.dispatcher
            .create(&self.domain, &request(name, targets, way))
            .await
    }

    pub async fn delete(&self, name: &str) {
        self.dispatcher
            .delete(&self.domain, &name_of(name))
            .await
            .unwrap();
    }

    pub async fn health(&self, name: &str) -> Health {
        self.dispatcher
            .show(&self.domain, &name_of(name))
            .await
            .unwrap()
            .overall()
            .clone()
    }

    /// The whole content of one disk of a snapshot, through an export of its own.
    pub async fn read(&self, name: &str, target: &str) -> Vec<u8> {
        let opened = self
            .dispatcher
            .open(&self.domain, &name_of(name), target)
            .await
            .unwrap();
        let client = Client::connect(&uri(&opened.source), &ConnectOptions::default())
            .await
            .unwrap();
        let (mut all, mut at) = (Vec::new(), 0);
        while at < client.size() {
            let step = (client.size() - at).min(4 << 20);
            all.extend(client.read(at, usize::try_from(step).unwrap()).await.unwrap());
            at += step;
        }
        client.disconnect().await;
        self.dispatcher.close(&self.domain, opened).await.unwrap();
        all
    }

    pub async fn digest(&self, name: &str, target: &str) -> String {
        pattern::digest(&self.read(name, target).await)
    }

    /// Everything of ours that is in QEMU or among the images: nothing, when nothing is left behind.
    pub async fn leftovers(&self) -> Vec<String> {
        let control = self.control();
        let mut left = Vec::new();
        if control.state().await.unwrap().is_active() {
            let ask = [
                ("query-named-block-nodes", json!({"flat": true}), "node-name"),
                ("query-jobs", json!({}), "id"),
                ("query-block-exports", json!({}), "id"),
                ("qom-list", json!({"path": "/objects"}), "name"),
            ];
            for (command, arguments, key) in ask {
                let Ok(answer) = control.monitor(Command::new(command, arguments)).await else {
                    assert_eq!(
                        command, "qom-list",
                        "a storage daemon may have no objects, but has the rest"
                    );
                    continue;
                };
                let names = answer.as_array().unwrap().iter().filter_map(|x| x[key].as_str());
                left.extend(names.filter(|n| n.starts_with("ds-")).map(str::to_owned));
            }
        }
        let files = std::fs::read_dir(control.image_dir()).unwrap();
        left.extend(files.map(|f| f.unwrap().file_name().into_string().unwrap()));
        left
    }

    pub async fn assert_clean(&self) {
        assert_eq!(self.leftovers().await, Vec::<String>::new());
    }

    /// A path for a fleece image that nothing uses yet.
    pub fn free_path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// This very test program, asked for its one test that becomes the guardian.
fn guardian_program() -> GuardianProgram {
    let arguments = ["--exact", "becomes_the_guardian_when_asked"]
        .map(Into::into)
        .to_vec();
    GuardianProgram::Program {
        path: std::env::current_exe().unwrap(),
        arguments,
    }
}

/// What that test does: when asked it does not return.
pub fn become_guardian_when_asked() {
    disksnap_hypervisor::guardian::run_if_asked();
    assert!(
        std::env::var_os("DISKSNAP_GUARDIAN").is_none(),
        "a guardian does not go on as a test"
    );
}

pub fn name_of(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

pub fn request(name: &str, targets: &[&str], way: &str) -> SnapshotRequest {
    let choice = |target: &&str| {
        let mut choice = DiskChoice::new(*target);
        if !way.is_empty() {
            choice.options.push("fleece.way", way);
        }
        choice
    };
    let disks = Disks::Named(targets.iter().map(choice).collect());
    SnapshotRequest {
        name: Some(name_of(name)),
        disks,
        ..SnapshotRequest::default()
    }
}

/// One disk, told these options.
pub fn with_options(name: &str, target: &str, options: &[(&str, &str)]) -> SnapshotRequest {
    let options = options.iter().copied().collect();
    let method = Some(MethodChoice {
        method: "qemu-fleece".to_owned(),
        options,
    });
    let choice = DiskChoice {
        method,
        ..DiskChoice::new(target)
    };
    SnapshotRequest {
        name: Some(name_of(name)),
        disks: Disks::Named(vec![choice]),
        ..SnapshotRequest::default()
    }
}

pub fn uri(source: &Source) -> Uri {
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

/// The writer ends each round by writing its number to the disks' beginnings, in the disks' order: at one
/// instant no disk is behind a later one, and none is ahead by more than one.
pub fn assert_one_instant(disks: &[Vec<u8>]) {
    let round = |disk: &Vec<u8>| u64::from_le_bytes(disk[..8].try_into().unwrap());
    let rounds: Vec<u64> = disks.iter().map(round).collect();
    let (first, last) = (rounds[0], rounds[rounds.len() - 1]);
    assert!(
        rounds.is_sorted_by(|a, b| a >= b) && first - last <= 1,
        "{rounds:?} are not one instant"
    );
}
