//! Snapshots of a QEMU whose guest goes on writing: sound images, one instant across disks.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::path::Path;

use disksnap_btrfs::Btrfs;
use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_core::{DiskSnapshot, SnapshotId};
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, QemuBuilder, need};
use support::rig::{Rig, file, qemu_img, round};
use support::{btrfs, create};

const SIZE: u64 = 64 * MIB;
const ROUNDS: usize = 20;

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

/// A machine with two qcow2 disks whose images are in `dir`, made with these options.
fn machine(dir: &Path, options: &str) -> QemuBuilder {
    let spec = |target: &str| {
        let image = dir.join(format!("{target}.qcow2"));
        qemu_img(
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options,
                image.to_str().unwrap(),
                "64M",
            ],
            dir,
        )
        .unwrap();
        DiskSpec::new(target, SIZE).qcow2().image(&image)
    };
    Qemu::builder().disk(spec("vda")).disk(spec("vdb"))
}

fn check(image: &Path, dir: &Path) -> Result<(), String> {
    qemu_img(&["check", "-q", "-f", "qcow2", image.to_str().unwrap()], dir)
}

#[tokio::test]
#[expect(
    clippy::print_stderr,
    reason = "how the control went is worth seeing, and no verdict"
)]
async fn images_are_sound_while_the_guest_writes() {
    need!("btrfs", "qemu-system-x86_64", "guest");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let guest = GuestSetup::new().writer(&["vda", "vdb"]);
    let qemu = machine(&images, "cluster_size=4096").guest(guest).start();
    let rig = Rig::running(&qemu);
    let mut takes = Vec::new();
    for n in 0..ROUNDS {
        qemu.wait_writer(5);
        let snapshot = rig.create(&n.to_string()).await;
        assert_eq!(snapshot.units.len(), 1);
        takes.push(snapshot.window.taken_us);
        for target in ["vda", "vdb"] {
            check(&file(&snapshot, target), rig.dir.path()).unwrap_or_else(|why| panic!("round {n}: {why}"));
        }
        let (first, last) = (
            round(&snapshot, "vda", rig.dir.path()),
            round(&snapshot, "vdb", rig.dir.path()),
        );
        assert!(
            first == last || first == last + 1,
            "{first} and {last} are not one instant"
        );
        rig.delete(&n.to_string()).await;
    }
    let unsound = control(&rig, &qemu).await;
    assert_eq!(qemu.status(), "running");
    takes.sort_unstable();
    eprintln!(
        "control without the pause: {unsound} of {ROUNDS} unsound; takes {} to {} µs, median {}",
        takes[0],
        takes[ROUNDS - 1],
        takes[ROUNDS / 2]
    );
}

/// The same takes with the guest running on: how many images are unsound. By chance it can be none.
async fn control(rig: &Rig, qemu: &Qemu) -> usize {
    let (control, requests) = (rig.control().await, rig.requests(&[]));
    let mut unsound = 0;
    for _ in 0..ROUNDS {
        qemu.wait_writer(5);
        let id = SnapshotId::random();
        let prepared = Btrfs.prepare(&*control, id, &requests).await.unwrap();
        let taken = Btrfs.take(&*control, &prepared[0]).await.unwrap();
        let unit = Btrfs.complete(&*control, id, &prepared[0], &taken).await.unwrap();
        let images = unit.data["images"].as_array().unwrap();
        let files = images.iter().map(|image| image["file"].as_str().unwrap());
        let mut checked = files.map(|image| check(Path::new(image), rig.dir.path()));
        unsound += usize::from(checked.any(|checked| checked.is_err()));
        Btrfs.delete(&*control, id, &unit).await.unwrap();
    }
    unsound
}

#[tokio::test]
async fn lazy_reference_counts_are_told() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let qemu = machine(&images, "lazy_refcounts=on").start();
    let rig = Rig::running(&qemu);
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
