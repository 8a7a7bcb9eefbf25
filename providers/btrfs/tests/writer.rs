//! Snapshots of a QEMU whose guest goes on writing: sound images, one instant across disks.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use disksnap_btrfs::Btrfs;
use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_core::{DiskSnapshot, Effect, ErrorKind, Fit, SnapshotId};
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, QemuVersion, need};
use serde_json::json;
use support::rig::{
    Rig, all_sound_while_the_guest_writes, an_overlay_is_seen, check, file, machine, qemu_img, raw,
};
use support::{btrfs, create, snapshots};

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

#[tokio::test]
async fn images_are_sound_while_the_guest_writes() {
    need!("btrfs", "qemu-system-x86_64", "guest");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let guest = GuestSetup::new().writer(&["vda", "vdb"]);
    let qemu = machine(&images, "cluster_size=4096").guest(guest).start();
    let rig = Rig::running(Btrfs, &qemu);
    all_sound_while_the_guest_writes(&rig, &qemu, 20).await;
}

/// From now on nothing that is written to `sda` can be flushed to its image.
fn fail_flushes(qemu: &Qemu) {
    let storage = qemu.format_node("sda").replace("format", "storage");
    let error = json!({"event": "none", "iotype": "flush", "errno": 5});
    qemu.qmp(
        "blockdev-add",
        json!({"driver": "blkdebug", "node-name": "broken", "image": storage, "inject-error": [error]}),
    );
    let node = qemu.format_node("sda");
    let options = json!({"driver": "qcow2", "node-name": node, "file": "broken", "discard": "unmap"});
    qemu.qmp("blockdev-reopen", json!({"options": [options]}));
}

/// QEMU pauses without a word, and the guest's writes are not in the image.
#[tokio::test]
async fn a_disk_whose_flush_fails_is_not_taken() {
    need!("btrfs", "qemu-system-x86_64");
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let fs = btrfs();
        let images = create(&fs.path().join("images"));
        let image = images.join("sda.qcow2");
        let made = ["create", "-q", "-f", "qcow2", "sda.qcow2", "8M"];
        qemu_img(&made, &images).unwrap();
        // On SCSI: the firmware turns off the write cache of virtio-blk, and then writes fail, and are told.
        let spec = DiskSpec::new("sda", 8 * MIB).qcow2().image(&image);
        let qemu = Qemu::builder().version(version).disk(spec).start();
        let rig = Rig::running(Btrfs, &qemu);
        qemu.write("sda", 0, MIB, 0x61);
        fail_flushes(&qemu);
        qemu.write("sda", 0, MIB, 0x62);
        let error = rig.try_create("one", &[]).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Io, Effect::RolledBack),
            "{error}"
        );
        assert!(error.to_string().contains("disk sda"), "{error}");
        assert_eq!(
            (qemu.status().as_str(), snapshots(fs.path()).len()),
            ("running", 0)
        );

        // The control: nothing else stands in the way.
        let (control, requests, id) = (rig.control().await, rig.requests(&[]), SnapshotId::random());
        let prepared = Btrfs.prepare(&*control, id, &requests).await.unwrap();
        control.pause().await.unwrap();
        Btrfs.take(&*control, &prepared[0]).await.unwrap();
        control.resume().await.unwrap();
        Btrfs
            .abort(&*control, id, &requests, Some(&prepared))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn lazy_reference_counts_are_told() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let qemu = machine(&images, "lazy_refcounts=on").start();
    let rig = Rig::running(Btrfs, &qemu);
    qemu.write("vda", 0, MIB, 0x61);
    for probe in rig.probe(&[]).await {
        assert!(
            probe.warnings.iter().any(|w| w.contains("lazy_refcounts")),
            "{probe:?}"
        );
    }
    let snapshot = rig.create("lazy").await;
    assert!(
        snapshot.warnings.iter().any(|w| w.contains("lazy_refcounts")),
        "{:?}",
        snapshot.warnings
    );
    let (from, to) = (file(&snapshot, "vda"), rig.dir.path().join("read.raw"));
    let arguments = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        from.to_str().unwrap(),
        to.to_str().unwrap(),
    ];
    qemu_img(&arguments, rig.dir.path()).unwrap();
    let content = std::fs::read(&to).unwrap();
    assert!(
        content[..1 << 20].iter().all(|byte| *byte == 0x61),
        "the content is right all the same"
    );
    let scratch = rig.dir.path();
    let mended = scratch.join("mended.qcow2");
    std::fs::copy(&from, &mended).unwrap();
    let repair = [
        "check",
        "-q",
        "-r",
        "all",
        "-f",
        "qcow2",
        mended.to_str().unwrap(),
    ];
    qemu_img(&repair, scratch).unwrap();
    check(&mended, scratch).unwrap();
    rig.delete("lazy").await;

    drop(qemu);
    let off = Rig::off(
        Btrfs,
        rig.domain
            .disks
            .iter()
            .filter(|d| d.target == "vda")
            .cloned()
            .collect(),
    );
    assert_eq!(
        off.probe(&[]).await[0].warnings,
        Vec::<String>::new(),
        "off, its counts are right"
    );
}

#[tokio::test]
async fn an_overlay_that_the_document_does_not_know_is_seen() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let qemu = machine(&images, "cluster_size=65536").start();
    an_overlay_is_seen(&Rig::running(Btrfs, &qemu), &qemu).await;
}

#[tokio::test]
async fn a_job_that_writes_to_a_layer_is_waited_for() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    raw(&images.join("base.raw"), 1);
    let overlay = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "top.qcow2",
    ];
    qemu_img(&overlay, &images).unwrap();
    let spec = DiskSpec::new("vda", MIB).qcow2().image(&images.join("top.qcow2"));
    let qemu = Qemu::builder().disk(spec).start();
    let rig = Rig::running(Btrfs, &qemu);
    assert_eq!(rig.probe(&[]).await[0].fit, Fit::Possible);

    let top = qemu.format_node("vda");
    qemu.qmp(
        "block-stream",
        json!({"job-id": "s0", "device": top, "speed": 1024}),
    );
    match rig.probe(&[]).await[0].fit.clone() {
        Fit::Unfit { kind, why } => assert!(kind == ErrorKind::Busy && why.contains("s0"), "{why}"),
        fit => panic!("it is {fit:?}"),
    }
    assert_eq!(
        rig.try_create("busy", &[]).await.unwrap_err().kind(),
        ErrorKind::Busy
    );
    qemu.qmp("block-job-cancel", json!({"device": "s0", "force": true}));
    while qemu.qmp("query-jobs", json!({})) != json!([]) {}
    rig.create("free").await;
    rig.delete("free").await;
}
