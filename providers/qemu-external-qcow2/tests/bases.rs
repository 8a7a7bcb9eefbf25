//! Bases that are no plain files: an NBD export, a qcow2 image with its data in another file, an encrypted one.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_core::{Access, BackingStore, Disk, ErrorKind, Fit, Health, NetworkHost, Source};
use disksnap_test_support::{DiskSpec, MIB, Qemu, QemuVersion, StorageDaemon, need, pattern, tools};
use disksnap_xml::DomainDocument;
use rig::{Rig, content, extra_files, info, live, request, run, top_of};
use serde_json::json;

const SIZE: u64 = 4 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// An NBD server with one writable export `vol`, of a raw image.
fn server() -> (StorageDaemon, PathBuf) {
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vdb", SIZE))
        .without_guest_side()
        .start();
    let socket = daemon.dir().join("vol.sock");
    let addr = json!({"type": "unix", "data": {"path": socket}});
    daemon.qmp("nbd-server-start", json!({"addr": addr, "max-connections": 0}));
    let node = daemon.top_node("vdb");
    let export = json!({"type": "nbd", "id": "vol", "name": "vol", "node-name": node, "writable": true});
    daemon.qmp("block-export-add", export);
    (daemon, socket)
}

/// A machine whose disk `vdn` is that export, and its document.
fn machine(version: QemuVersion, socket: &Path) -> (Qemu, String) {
    let server = json!({"type": "unix", "path": socket});
    let storage = json!({"driver": "nbd", "node-name": "storage-n", "server": server, "export": "vol", "discard": "unmap"});
    let format = json!({"driver": "raw", "node-name": "format-n", "file": "storage-n", "discard": "unmap"});
    let qemu = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .args(["-blockdev".to_owned(), storage.to_string()])
        .args(["-blockdev".to_owned(), format.to_string()])
        .args(["-device", "virtio-blk-pci,drive=format-n,id=virtio-disk9"])
        .start();
    let disk = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>\
         <source protocol='nbd' name='vol'><host transport='unix' socket='{}'/></source>\
         <target dev='vdn' bus='virtio'/><alias name='virtio-disk9'/></disk></devices>",
        socket.display()
    );
    let document = qemu.domain_xml().replace("</devices>", &disk);
    (qemu, document)
}

/// The guest's write to the disk of that device.
fn write(qemu: &Qemu, command: &str) {
    let device = "/machine/peripheral/virtio-disk9/virtio-backend";
    let line = format!("qemu-io -d {device} \"{command}\"");
    qemu.qmp("human-monitor-command", json!({ "command-line": line }));
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///vol?socket={}", socket.display())
}

/// A raw disk's whole content through NBD.
fn remote(socket: &Path) -> Vec<u8> {
    content(Path::new(&uri(socket)), "raw")
}

fn export(socket: &Path) -> Source {
    Source::Network {
        protocol: "nbd".to_owned(),
        name: Some("vol".to_owned()),
        hosts: vec![NetworkHost::Unix {
            socket: socket.to_owned(),
        }],
        tls: false,
    }
}

fn byte_at(content: &[u8], offset: u64) -> u8 {
    content[usize::try_from(offset).unwrap()]
}

/// The document with this disk passes libvirt's schema, where both are at hand.
fn assert_libvirt_takes(document: &str, disk: &Disk) {
    let schema = tools::libvirt_schema("domain.rng");
    let (Some(xmllint), true) = (tools::find("xmllint"), schema.is_file()) else {
        return;
    };
    let layers = std::iter::successors(disk.backing.as_ref(), |layer| layer.backing.as_deref());
    let apart = disk.data_store.is_some() || layers.into_iter().any(|layer| layer.data_store.is_some());
    if apart
        && !std::fs::read_to_string(schema.with_file_name("domaincommon.rng"))
            .unwrap()
            .contains("dataStore")
    {
        // Of a libvirt before 10.10, which takes no notice of such an element.
        return;
    }
    let document = DomainDocument::parse(document).unwrap();
    let changed = document.with_disk(&disk.target, disk).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("domain.xml");
    std::fs::write(&file, changed.text()).unwrap();
    let checked = Command::new(xmllint)
        .args(["--noout", "--nonet", "--relaxng"])
        .args([&schema, &file])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(checked.status.success(), "{said}\n{}", changed.text());
}

async fn an_export_is_a_base(version: QemuVersion) {
    let (_daemon, socket) = server();
    let (qemu, document) = machine(version, &socket);
    write(&qemu, "write -P 1 0 1M");
    let mut rig = Rig::new(&document).await;
    let original = rig.domain.disk("vdn").unwrap().clone();
    let snapshot = rig.create("one", &["vdn", "vda"]).await.unwrap();
    let record = snapshot.disk("vdn").unwrap();
    let modified = record.modified_disk.as_ref().unwrap();
    let base = BackingStore {
        format: Some("raw".to_owned()),
        source: export(&socket),
        data_store: None,
        backing: None,
    };
    assert_eq!(modified.backing, Some(base));
    assert!(matches!(&record.access, Access::Source { source, .. } if *source == export(&socket)));
    assert_libvirt_takes(&document, modified);
    let overlay = rig.image("vdn");
    assert_eq!(info(&overlay)["backing-filename"], uri(&socket));
    write(&qemu, "write -P 2 64k 64k");
    write(&qemu, "flush");
    assert_eq!(rig.health("one").await, Health::Active);
    assert_eq!(byte_at(&remote(&socket), 65536), 1, "the base does not change");
    let now = content(&overlay, "qcow2");
    assert_eq!((byte_at(&now, 0), byte_at(&now, 65536)), (1, 2));
    // One more, and both ways to merge.
    rig.create("two", &["vdn"]).await.unwrap();
    write(&qemu, "write -P 3 128k 64k");
    write(&qemu, "flush");
    rig.merge("one").await.unwrap();
    let merged = remote(&socket);
    assert_eq!([0, 65536, 131_072].map(|at| byte_at(&merged, at)), [1, 2, 1]);
    assert_eq!(rig.health("two").await, Health::Active);
    rig.stream("two").await.unwrap();
    let alone = content(&rig.image("vdn"), "qcow2");
    assert_eq!([0, 65536, 131_072].map(|at| byte_at(&alone, at)), [1, 2, 3]);
    assert!(rig.domain.disk("vdn").unwrap().backing.is_none());
    assert!(remote(&socket) == merged, "the snapshot has its instant still");
    // With the domain off it can be put back, and merged by qemu-img.
    qemu.quit();
    rig.revert("two").await.unwrap();
    let top = rig.image("vdn");
    assert!(content(&top, "qcow2") == merged);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 4 0 64k", top.to_str().unwrap()],
    );
    rig.merge("two").await.unwrap();
    assert_eq!(byte_at(&remote(&socket), 0), 4);
    assert_eq!(*rig.domain.disk("vdn").unwrap(), original);
    // And snapshotted by it.
    rig.create("three", &["vdn"]).await.unwrap();
    let top = rig.image("vdn");
    assert_eq!(byte_at(&content(&top, "qcow2"), 0), 4);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 5 0 64k", top.to_str().unwrap()],
    );
    assert_eq!(byte_at(&remote(&socket), 0), 4);
    rig.stream("three").await.unwrap();
    let alone = content(&rig.image("vdn"), "qcow2");
    assert_eq!([0, 65536, 131_072].map(|at| byte_at(&alone, at)), [5, 2, 1]);
    assert_eq!(
        info(&rig.image("vdn"))["backing-filename"],
        serde_json::Value::Null
    );
}

#[tokio::test]
async fn an_nbd_export_is_a_base() {
    an_export_is_a_base(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn an_nbd_export_is_a_base_in_7_2() {
    need!("qemu-7.2");
    an_export_is_a_base(QemuVersion::V7_2).await;
}

#[tokio::test]
async fn an_export_whose_server_is_gone_is_told() {
    let (mut daemon, socket) = server();
    let (qemu, document) = machine(QemuVersion::V10_0, &socket);
    let mut rig = Rig::new(&document).await;
    rig.create("one", &["vdn"]).await.unwrap();
    qemu.quit();
    daemon.quit();
    let health = rig.health("one").await;
    assert!(
        matches!(&health, Health::Broken(why) if why.contains("cannot be reached")),
        "{health:?}"
    );
    let error = rig.revert("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    // What no header can name.
    let mut disk = rig.domain.disk("vdn").unwrap().clone();
    disk.backing = None;
    disk.driver.format = Some("raw".to_owned());
    for (protocol, tls) in [("rbd", false), ("nbd", true)] {
        disk.source = Some(match export(&socket) {
            Source::Network { name, hosts, .. } => Source::Network {
                protocol: protocol.to_owned(),
                name,
                hosts,
                tls,
            },
            other => other,
        });
        assert!(why_unfit(&rig, disk.clone()).await.contains("cannot name"));
    }
}

/// Why the method refuses a disk in the place of the rig's first, by its own probe.
async fn why_unfit(rig: &Rig, disk: Disk) -> String {
    let mut domain = rig.domain.clone();
    let request = request("no", &[&disk.target]);
    domain.disks.retain(|d| d.target != disk.target);
    domain.disks.push(disk);
    let plan = rig.dispatcher.plan(&domain, &request).await.unwrap();
    match &plan.disks[0].probe.fit {
        Fit::Unfit { why, .. } => why.clone(),
        fit => panic!("{fit:?}"),
    }
}

/// A qcow2 image whose data is in another file beside it.
fn image_with_data_file(dir: &Path) -> (PathBuf, PathBuf) {
    let (image, data) = (dir.join("image.qcow2"), dir.join("data.raw"));
    let size = SIZE.to_string();
    let options = format!("data_file={},data_file_raw=on", data.display());
    let make = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &options,
        image.to_str().unwrap(),
        &size,
    ];
    run("qemu-img", &make);
    (image, data)
}

async fn data_outside_is_a_base(version: QemuVersion) {
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = image_with_data_file(dir.path());
    let qemu = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", 0).qcow2().image(&image))
        .start();
    qemu.disk("vda").write(0, &pattern::bytes(1, 1 << 20));
    let before = live(&qemu, "vda");
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"]).await.unwrap();
    assert_libvirt_takes(&qemu.domain_xml(), rig.domain.disk("vda").unwrap());
    qemu.disk("vda").fill(65536, 65536, 0x22);
    let after = live(&qemu, "vda");
    assert!(rig.read("one", "vda").await == before);
    assert!(std::fs::read(&data).unwrap() == before, "it is where it was");
    rig.merge("one").await.unwrap();
    assert!(live(&qemu, "vda") == after);
    assert_eq!(top_of(&qemu, "vda").0, image);
    qemu.disk("vda").flush();
    assert!(std::fs::read(&data).unwrap() == after);
    // With the domain off.
    qemu.quit();
    rig.create("two", &["vda"]).await.unwrap();
    let top = rig.image("vda");
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 0 64k", top.to_str().unwrap()],
    );
    let changed = rig.content("vda");
    assert!(rig.read("two", "vda").await == after);
    rig.revert("two").await.unwrap();
    assert!(rig.content("vda") == after);
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 0 64k", top.to_str().unwrap()],
    );
    rig.merge("two").await.unwrap();
    assert!(std::fs::read(&data).unwrap() == changed);
    // Somebody writes to the data behind the snapshot's back: its image does not show that.
    rig.create("three", &["vda"]).await.unwrap();
    assert_eq!(rig.health("three").await, Health::Active);
    let file = std::fs::OpenOptions::new().append(true).open(&data).unwrap();
    std::io::Write::write_all(&mut &file, &[0]).unwrap();
    assert!(matches!(rig.health("three").await, Health::Broken(_)));
    std::fs::remove_file(&data).unwrap();
    assert!(matches!(rig.health("three").await, Health::Broken(_)));
}

#[tokio::test]
async fn an_image_with_its_data_in_another_file_is_a_base() {
    data_outside_is_a_base(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn an_image_with_its_data_in_another_file_is_a_base_in_7_2() {
    need!("qemu-7.2");
    data_outside_is_a_base(QemuVersion::V7_2).await;
}

/// A stream frees the disk of both files.
#[tokio::test]
async fn a_stream_leaves_the_data_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = image_with_data_file(dir.path());
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 0).qcow2().image(&image))
        .start();
    qemu.disk("vda").fill(0, SIZE, 0x31);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"]).await.unwrap();
    qemu.disk("vda").fill(0, MIB, 0x32);
    let now = live(&qemu, "vda");
    rig.stream("one").await.unwrap();
    assert_eq!(byte_at(&rig.read("one", "vda").await, 0), 0x31);
    let nodes = qemu.qmp("query-named-block-nodes", json!({"flat": true}));
    assert!(!nodes.to_string().contains("data.raw"), "{nodes:#}");
    std::fs::remove_file(image).unwrap();
    std::fs::remove_file(data).unwrap();
    assert!(live(&qemu, "vda") == now);
}

/// QEMU has been told of another data file than the header names: whoever reads the snapshot would read that one.
#[tokio::test]
async fn data_elsewhere_than_the_header_says_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = image_with_data_file(dir.path());
    let other = dir.path().join("other.raw");
    std::fs::copy(&data, &other).unwrap();
    let node = json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": image},
        "data-file": {"driver": "file", "filename": other}});
    let qemu = Qemu::builder()
        .args(["-blockdev".to_owned(), node.to_string()])
        .args(["-device", "virtio-blk-pci,drive=n,id=virtio-disk9"])
        .start();
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vdn' bus='virtio'/><alias name='virtio-disk9'/></disk></devices>",
        image.display()
    );
    let rig = Rig::new(&qemu.domain_xml().replace("</devices>", &disk)).await;
    let disk = rig.domain.disk("vdn").unwrap().clone();
    let why = why_unfit(&rig, disk).await;
    assert!(why.contains("other.raw") && why.contains("data.raw"), "{why}");
}

/// An overlay of an encrypted disk would hold in plain what the guest writes.
#[tokio::test]
async fn an_encrypted_image_is_refused_running_and_off() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("luks.qcow2");
    let size = SIZE.to_string();
    let options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=1";
    let secret = "secret,id=k,data=geheim";
    let path = image.to_str().unwrap();
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, path, &size,
        ],
    );
    let node = json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": image},
        "encrypt": {"format": "luks", "key-secret": "k"}});
    let qemu = Qemu::builder()
        .args(["-object", secret])
        .args(["-blockdev".to_owned(), node.to_string()])
        .args(["-device", "virtio-blk-pci,drive=n,id=virtio-disk9"])
        .start();
    // A document that does not say so.
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>\
         <target dev='vdn' bus='virtio'/><alias name='virtio-disk9'/></disk></devices>"
    );
    let mut rig = Rig::new(&qemu.domain_xml().replace("</devices>", &disk)).await;
    let disk = rig.domain.disk("vdn").unwrap().clone();
    assert!(why_unfit(&rig, disk.clone()).await.contains("encrypts"));
    qemu.quit();
    assert!(why_unfit(&rig, disk.clone()).await.contains("encrypts"));
    // Nor is a layer of it below another.
    let top = dir.path().join("top.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            path,
            "-F",
            "qcow2",
            top.to_str().unwrap(),
            &size,
        ],
    );
    let above = Disk {
        source: Some(Source::File { file: top }),
        backing: Some(BackingStore {
            format: Some("qcow2".to_owned()),
            source: disk.source.clone().unwrap(),
            data_store: None,
            backing: None,
        }),
        ..disk
    };
    assert!(why_unfit(&rig, above).await.contains("encrypts"));
    let error = rig.create("one", &["vdn"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(extra_files(dir.path()), Vec::<String>::new());
}
