//! Real disks whose flush fails: QEMU's `stop` does not say so, and the control does. No option of a node is changed.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Place, disk_of, qemu_domain};
use disksnap_core::{Control, Disk, DiskNode, ErrorKind};
use disksnap_test_support::{DiskSpec, MIB, Qemu, QemuBuilder, QemuVersion};
use serde_json::{Value, json};

const VERSIONS: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];
/// A QEMU, and whether the disks are served in an iothread.
const SETTINGS: [(QemuVersion, bool); 3] = [
    (QemuVersion::V7_2, false),
    (QemuVersion::V10_0, false),
    (QemuVersion::V10_0, true),
];

/// Disks on SCSI, whose write cache stays on: the firmware turns that of virtio-blk off at some time, and then each
/// write is flushed, and fails, by itself.
fn machine((version, threaded): (QemuVersion, bool)) -> Qemu {
    let mut disks = [
        DiskSpec::new("sda", 4 * MIB).qcow2(),
        DiskSpec::new("sdb", 4 * MIB),
        DiskSpec::new("sdc", 4 * MIB).qcow2().wrapped(),
    ];
    if threaded {
        disks = disks.map(DiskSpec::iothread);
    }
    let builder = Qemu::builder().version(version);
    let qemu = disks.into_iter().fold(builder, QemuBuilder::disk).start();
    // What is written over later needs no new cluster then, which would need a flush.
    write_all(&qemu, 0x30);
    qemu
}

fn write_all(qemu: &Qemu, byte: u8) {
    for target in TARGETS {
        qemu.write(target, 0, MIB, byte);
    }
}

const TARGETS: [&str; 3] = ["sda", "sdb", "sdc"];

/// From now on flushing this disk fails below its format node, this often.
fn fail_flushes(qemu: &Qemu, target: &str, once: bool) {
    let node = qemu.format_node(target);
    let storage = node.replace("format", "storage");
    let error = json!({"event": "none", "iotype": "flush", "errno": 5, "once": once});
    let broken = format!("broken-{target}");
    let options =
        json!({"driver": "blkdebug", "node-name": broken, "image": storage, "inject-error": [error]});
    qemu.qmp("blockdev-add", options);
    reopen(qemu, target, &broken);
}

fn reopen(qemu: &Qemu, target: &str, file: &str) {
    let node = qemu.format_node(target);
    let format = if target == "sdb" { "raw" } else { "qcow2" };
    let options = json!({"driver": format, "node-name": node, "file": file, "discard": "unmap"});
    qemu.qmp("blockdev-reopen", json!({"options": [options]}));
}

/// All that QEMU tells of its nodes, but what the statistics count.
fn nodes(qemu: &Qemu) -> Value {
    qemu.qmp("query-named-block-nodes", json!({}))
}

fn disks(qemu: &Qemu) -> Vec<Disk> {
    TARGETS
        .iter()
        .map(|target| disk_of(target, qemu.image(target)))
        .collect()
}

fn only<'a>(nodes: &'a [DiskNode], target: &str) -> &'a [DiskNode] {
    let n = nodes.iter().position(|node| node.target == target).unwrap();
    &nodes[n..=n]
}

#[tokio::test]
async fn disks_are_flushed_and_stay_as_they_are() {
    for setting in SETTINGS {
        let qemu = machine(setting);
        let place = Place::new();
        let control = place.control(&qemu_domain(&qemu));
        let disks = disks(&qemu);
        let found = control
            .flush_nodes(&disks.iter().collect::<Vec<_>>())
            .await
            .unwrap();
        let tops: Vec<String> = TARGETS.iter().map(|target| qemu.top_node(target)).collect();
        assert_eq!(found.iter().map(|n| n.node.clone()).collect::<Vec<_>>(), tops);
        write_all(&qemu, 0x31);
        control.pause().await.unwrap();
        let before = nodes(&qemu);
        control.flush(&found).await.unwrap();
        assert_eq!(nodes(&qemu), before, "{setting:?}");
        control.resume().await.unwrap();
        assert_eq!(qemu.status(), "running");
    }
}

#[tokio::test]
async fn a_flush_that_fails_is_told_with_the_disk() {
    for setting in SETTINGS {
        for target in TARGETS {
            let qemu = machine(setting);
            let place = Place::new();
            let control = place.control(&qemu_domain(&qemu));
            let disks = disks(&qemu);
            fail_flushes(&qemu, target, false);
            let found = control
                .flush_nodes(&disks.iter().collect::<Vec<_>>())
                .await
                .unwrap();
            write_all(&qemu, 0x32);
            // This is what hides it.
            control.pause().await.unwrap();
            let before = nodes(&qemu);
            let error = control.flush(&found).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{setting:?} {target}: {error}");
            assert!(error.to_string().contains(&format!("disk {target}")), "{error}");
            assert_eq!(nodes(&qemu), before, "{setting:?} {target}");
            for other in TARGETS.iter().filter(|other| **other != target) {
                control.flush(only(&found, other)).await.unwrap();
            }
            control.resume().await.unwrap();
            assert_eq!(qemu.status(), "running");
        }
    }
}

/// QEMU writes again what it could not write: then the disk is as the guest thinks it is.
#[tokio::test]
async fn a_flush_that_failed_once_is_made_up_for() {
    for setting in SETTINGS {
        let qemu = machine(setting);
        let place = Place::new();
        let control = place.control(&qemu_domain(&qemu));
        let disks = disks(&qemu);
        let found = control
            .flush_nodes(&disks.iter().collect::<Vec<_>>())
            .await
            .unwrap();
        fail_flushes(&qemu, "sda", true);
        qemu.write("sda", 0, MIB, 0x33);
        control.pause().await.unwrap();
        control.flush(&found).await.unwrap();
        control.resume().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_read_only_has_nothing_to_flush() {
    for version in VERSIONS {
        let qemu = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new("vda", MIB))
            .disk(DiskSpec::new("vdb", MIB).read_only())
            .start();
        let place = Place::new();
        let control = place.control(&qemu_domain(&qemu));
        let disks = ["vda", "vdb"].map(|target| disk_of(target, qemu.image(target)));
        let found = control.flush_nodes(&[&disks[0], &disks[1]]).await.unwrap();
        assert_eq!(
            found.iter().map(|n| n.target.as_str()).collect::<Vec<_>>(),
            ["vda"]
        );
        control.flush(&found).await.unwrap();
    }
}

/// A node that went since it was looked up has not been flushed.
#[tokio::test]
async fn a_node_that_is_gone_is_an_error() {
    let qemu = machine(SETTINGS[0]);
    let place = Place::new();
    let control = place.control(&qemu_domain(&qemu));
    let gone = DiskNode {
        target: "vda".to_owned(),
        node: "gone".to_owned(),
    };
    let error = control.flush(&[gone]).await.unwrap_err();
    assert!(error.to_string().contains("node gone"), "{error}");
}
