//! Snapshots of a QEMU whose guest goes on writing: sound images, one instant across disks.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

#[path = "../../../image-file/testing/rig.rs"]
mod rig;

use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_reflink::Reflink;
use disksnap_test_support::{GuestSetup, LoopFsKind, MIB, loop_fs, need};
use rig::{Rig, all_sound_while_the_guest_writes, an_overlay_is_seen, file, machine, qemu_img};

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

async fn sound(kind: LoopFsKind) {
    let fs = loop_fs(kind, 512 << 20, "");
    let guest = GuestSetup::new().writer(&["vda", "vdb"]);
    let qemu = machine(fs.path(), "cluster_size=4096").guest(guest).start();
    let rig = Rig::running(Reflink, &qemu);
    all_sound_while_the_guest_writes(&rig, &qemu, 20).await;
}

#[tokio::test]
async fn images_are_sound_on_xfs_while_the_guest_writes() {
    need!("xfs", "qemu-system-x86_64", "guest");
    sound(LoopFsKind::Xfs).await;
}

#[tokio::test]
async fn images_are_sound_on_btrfs_while_the_guest_writes() {
    need!("btrfs", "qemu-system-x86_64", "guest");
    sound(LoopFsKind::Btrfs).await;
}

#[tokio::test]
async fn lazy_reference_counts_are_told() {
    need!("xfs", "qemu-system-x86_64");
    let fs = loop_fs(LoopFsKind::Xfs, 512 << 20, "");
    let qemu = machine(fs.path(), "lazy_refcounts=on").start();
    let rig = Rig::running(Reflink, &qemu);
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
    rig.delete("lazy").await;

    drop(qemu);
    let off = Rig::off(
        Reflink,
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
    need!("xfs", "qemu-system-x86_64");
    let fs = loop_fs(LoopFsKind::Xfs, 512 << 20, "");
    let qemu = machine(fs.path(), "cluster_size=65536").start();
    an_overlay_is_seen(&Rig::running(Reflink, &qemu), &qemu).await;
}
