//! What the provider's tests share: a dispatcher over a real QEMU, and readers of images as they lie there.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    Access, Altered, Control, Disk, DiskChoice, Disks, Dispatcher, Domain, Health, MergeInto, MergeOptions,
    MethodChoice, Registry, Result, Snapshot, SnapshotName, SnapshotRequest,
};
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector};
use disksnap_qemu_external_qcow2::QemuExternalQcow2;
use disksnap_qemu_fleece::QemuFleece;
use disksnap_test_support::{Qemu, tools};
use disksnap_xml::DomainDocument;
use serde_json::{Value, json};

/// Longer than any merge's end takes on a loaded machine.
pub const DEADLINE: Duration = Duration::from_mins(1);

/// A dispatcher with a state directory of its own, and one domain.
pub struct Rig {
    pub dispatcher: Dispatcher,
    pub connector: QemuConnector,
    pub domain: Domain,
    pub dir: tempfile::TempDir,
}

impl Rig {
    pub async fn new(domain_xml: &str) -> Self {
        // With a domain off, the images are merged by this.
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(Some(&dir.path().join("state"))).unwrap();
        let paths = Paths {
            images: state.images(),
            run: state.run(),
        };
        let connector = QemuConnector::new(paths).guardian(guardian_program());
        let catalog = SqliteCatalog::open(state).await.unwrap();
        let mut registry = Registry::empty();
        registry.add(Arc::new(QemuExternalQcow2)).unwrap();
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

    /// A create of these disks; the domain's document follows.
    pub async fn create(&mut self, name: &str, targets: &[&str]) -> Result<Snapshot> {
        self.create_as(request(name, targets)).await
    }

    pub async fn create_as(&mut self, request: SnapshotRequest) -> Result<Snapshot> {
        let snapshot = self.dispatcher.create(&self.domain, &request).await?;
        for disk in &snapshot.disks {
            self.follow(disk.modified_disk.clone());
        }
        Ok(snapshot)
    }

    /// Brings the domain's document up to date.
    pub fn follow(&mut self, disks: impl IntoIterator<Item = Disk>) {
        for disk in disks {
            let old = self.domain.disks.iter_mut().find(|d| d.target == disk.target);
            *old.unwrap() = disk;
        }
    }

    pub async fn merge(&mut self, name: &str) -> Result<Altered> {
        self.merge_into(name, MergeInto::Base).await
    }

    /// Frees the disk of a snapshot.
    pub async fn stream(&mut self, name: &str) -> Result<Altered> {
        self.merge_into(name, MergeInto::Overlay).await
    }

    pub async fn merge_into(&mut self, name: &str, into: MergeInto) -> Result<Altered> {
        let options = options(into);
        let mut go_on = |_: &[_]| ControlFlow::Continue(());
        let altered = self
            .dispatcher
            .merge(&self.domain, &name_of(name), &options, &mut go_on)
            .await?;
        self.follow(altered.disks.clone());
        Ok(altered)
    }

    pub async fn delete(&mut self, name: &str) {
        let deletion = self
            .dispatcher
            .delete(&self.domain, &name_of(name))
            .await
            .unwrap();
        self.follow(deletion.altered.disks);
    }

    pub async fn revert(&mut self, name: &str) -> Result<Altered> {
        let altered = self.dispatcher.revert(&self.domain, &name_of(name), &[]).await?;
        self.follow(altered.disks.clone());
        Ok(altered)
    }

    pub async fn health(&self, name: &str) -> Health {
        self.shown(name).await.overall().clone()
    }

    pub async fn shown(&self, name: &str) -> disksnap_core::Inspected {
        self.dispatcher.show(&self.domain, &name_of(name)).await.unwrap()
    }

    /// The whole content of one disk of a snapshot, as any program of the host reads it.
    pub async fn read(&self, name: &str, target: &str) -> Vec<u8> {
        assert_eq!(self.health(name).await, Health::Active, "{name}");
        let shown = self.shown(name).await;
        let Access::Source { source, format, .. } = &shown.snapshot.disk(target).unwrap().access else {
            panic!("not a file")
        };
        content(source.path().unwrap(), format)
    }

    /// Where the disk is now, by the document.
    pub fn image(&self, target: &str) -> PathBuf {
        let disk = self.domain.disk(target).unwrap();
        disk.source.as_ref().unwrap().path().unwrap().to_owned()
    }

    /// The content of a disk of a domain that is off.
    pub fn content(&self, target: &str) -> Vec<u8> {
        let disk = self.domain.disk(target).unwrap();
        content(&self.image(target), disk.driver.format.as_deref().unwrap())
    }
}

/// The content of an image, opened as its headers say.
pub fn content(path: &Path, format: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    let (from, to) = (path.to_str().unwrap(), copy.to_str().unwrap());
    run(
        "qemu-img",
        &["convert", "-U", "-f", format, "-O", "raw", from, to],
    );
    std::fs::read(copy).unwrap()
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(tools::program(program))
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// What `qemu-img info` says.
pub fn info(path: &Path) -> Value {
    let text = run(
        "qemu-img",
        &["info", "-U", "--output=json", path.to_str().unwrap()],
    );
    serde_json::from_str(&text).unwrap()
}

/// What the guest sees on a disk, whichever image it stands on now.
pub fn live(qemu: &Qemu, target: &str) -> Vec<u8> {
    qemu.disk(target).flush();
    let (path, format) = top_of(qemu, target);
    content(&path, &format)
}

/// The top image of a machine's disk and its format.
pub fn top_of(qemu: &Qemu, target: &str) -> (PathBuf, String) {
    let alias = qemu.alias(target).to_owned();
    let blocks = qemu.qmp("query-block", json!({}));
    let mut blocks = blocks.as_array().unwrap().iter();
    let block = blocks.find(|b| {
        let qdev = b["qdev"].as_str().unwrap_or_default();
        qdev == alias || qdev.contains(&format!("/{alias}/"))
    });
    let image = &block.unwrap()["inserted"]["image"];
    // A wrapper shows the format below it as its own file, in JSON or by its path.
    let mut format = image["format"].as_str().unwrap().to_owned();
    let mut path = image["filename"].as_str().unwrap().to_owned();
    if let Some(json) = path.strip_prefix("json:") {
        let options: Value = serde_json::from_str(json).unwrap();
        let file = &options["file"];
        if let Some(driver) = file["driver"].as_str().filter(|d| *d != "file") {
            driver.clone_into(&mut format);
        }
        let name = |v: &Value| v["filename"].as_str().map(str::to_owned);
        path = name(file).or(name(&file["file"])).or(name(&options)).unwrap();
    }
    (path.into(), format)
}

/// Everything of ours in a machine, and the files beside its images that are no images of a disk.
pub fn leftovers(qemu: &Qemu) -> Vec<String> {
    let mut left = Vec::new();
    for (command, key) in [("query-named-block-nodes", "node-name"), ("query-jobs", "id")] {
        let answer = qemu.qmp(command, json!({}));
        let names = answer.as_array().unwrap().iter().filter_map(|x| x[key].as_str());
        left.extend(names.filter(|n| n.starts_with("ds")).map(str::to_owned));
    }
    left.extend(extra_files(qemu.dir()));
    left
}

/// The files that only snapshots and their merges make.
pub fn extra_files(dir: &Path) -> Vec<String> {
    let files = std::fs::read_dir(dir).unwrap();
    let names = files.map(|f| f.unwrap().file_name().into_string().unwrap());
    let ours = |name: &String| {
        let id = |text: &str| text.len() == 12 && text.chars().all(|c| c.is_ascii_hexdigit());
        name.contains("disksnap") || name.rsplit('.').next().is_some_and(id)
    };
    names.filter(ours).collect()
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

pub fn options(into: MergeInto) -> MergeOptions {
    MergeOptions {
        into,
        deadline: DEADLINE,
        ..MergeOptions::default()
    }
}

/// These disks by this method, by the name that documents have for it.
pub fn request(name: &str, targets: &[&str]) -> SnapshotRequest {
    let choices = targets.iter().map(|target| choice(target, "qemu", &[]));
    SnapshotRequest {
        name: Some(name_of(name)),
        disks: Disks::Named(choices.collect()),
        deadline: DEADLINE,
        ..SnapshotRequest::default()
    }
}

pub fn choice(target: &str, method: &str, options: &[(&str, &str)]) -> DiskChoice {
    DiskChoice {
        method: Some(MethodChoice {
            method: method.to_owned(),
            options: options.iter().copied().collect(),
        }),
        ..DiskChoice::new(target)
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

/// A machine's document as it was when it was started.
pub fn old_document(qemu: &Qemu) -> Domain {
    let document = DomainDocument::parse(qemu.domain_xml()).unwrap();
    document.domain().clone()
}
