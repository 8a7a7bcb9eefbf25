//! What two snapshots are told to differ in where the images are no raw ones: as the guest sees it.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "what is told may be one range")]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use disksnap_btrfs::Btrfs;
use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_core::{Capability, Disk, DiskSnapshot, Snapshot};
use disksnap_test_support::pattern::Random;
use disksnap_test_support::{need, tools};
use support::rig::{Rig, disk, machine, named, qemu_img};
use support::told::{assert_told, ranges};
use support::{btrfs, create};

const MIB: u64 = 1 << 20;

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

/// Writes to an image as a guest would, by these commands of `qemu-io`.
fn io(image: &Path, commands: &[String]) {
    let mut program = Command::new(tools::program("qemu-io"));
    program.args(["-f", "qcow2", "-d", "unmap"]);
    program.args(commands.iter().flat_map(|command| ["-c", command]));
    let output = program.arg(image).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && !said.contains("failed"),
        "{commands:?}: {said}"
    );
}

/// A command that changes something of a disk of 8 MiB.
fn step(random: &mut Random) -> String {
    let (start, length) = (random.below(15) * MIB / 2, 512 + random.below(300) * 512);
    let (start, byte) = (start + random.below(300) * 512, 1 + random.below(255));
    match random.below(6) {
        0 => format!("write -z {start} {length}"),
        1 => format!("write -z -u {start} {length}"),
        2 => format!("discard {start} {length}"),
        _ => format!("write -P {byte} {start} {length}"),
    }
}

/// A random life of a qcow2 image made with these options; any two of its snapshots are compared.
async fn lives(images: &Path, options: &str, seed: u64) {
    let image = images.join("a.qcow2");
    let new = ["create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "8M"];
    qemu_img(&new, images).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "qcow2", &image)]);
    assert!(
        rig.probe(&[]).await[0]
            .capabilities
            .contains(&Capability::Compare)
    );
    let mut random = Random::new(seed);
    let mut all: Vec<Snapshot> = vec![rig.create("first").await];
    let mut like = 0;
    for round in 0..6 {
        let done: Vec<String> = (0..random.below(8)).map(|_| step(&mut random)).collect();
        if !done.is_empty() {
            io(&image, &done);
        }
        all.push(rig.create(&round.to_string()).await);
        let any = usize::try_from(random.below(all.len() as u64)).unwrap();
        let what = format!("{options}, seed {seed}, {done:?}");
        let last = all.last().unwrap();
        let told = assert_told(&rig, &all[like], last, &what).await;
        assert!(
            !done.is_empty() || told.is_empty(),
            "nothing was done, and told is {told:?}"
        );
        assert_told(&rig, last, &all[any], &what).await;
        like = all.len() - 1;
        if random.below(3) == 0 {
            like = any;
            rig.revert(&all[any]).await.unwrap();
        }
    }
}

#[tokio::test]
async fn nothing_is_missed_of_a_qcow2_image() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    for (seed, options) in ["cluster_size=4k", "extended_l2=on"].into_iter().enumerate() {
        let images = create(&fs.path().join(seed.to_string()));
        lives(&images, options, seed as u64).await;
    }
}

/// A file that is cut off reads zeros beyond its end, though its tables are the same.
#[tokio::test]
async fn what_is_cut_off_is_told() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "8M"], &images).unwrap();
    let image = images.join("a.qcow2");
    io(
        &image,
        &["write -P 1 0 64k".to_owned(), "write -P 9 3M 64k".to_owned()],
    );
    let rig = Rig::off(Btrfs, vec![disk("vda", "qcow2", &image)]);
    let whole = rig.create("whole").await;
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length / (64 << 10) * (64 << 10) - 4096).unwrap();
    let cut = rig.create("cut").await;
    for (was, is) in [(&whole, &cut), (&cut, &whole)] {
        assert!(!assert_told(&rig, was, is, "cut off").await.is_empty());
    }
}

/// An overlay comes between, is written to, and is committed again: the layers of the two snapshots are others.
#[tokio::test]
async fn nothing_is_missed_of_a_chain() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let create_over = |name: &str, below: &str| {
        let format = below.rsplit('.').next().unwrap();
        qemu_img(
            &["create", "-q", "-f", "qcow2", "-b", below, "-F", format, name],
            &images,
        )
        .unwrap();
        images.join(name)
    };
    fs::write(images.join("base.raw"), vec![1; 8 << 20]).unwrap();
    let top = create_over("top.qcow2", "base.raw");
    let write = |image: &Path, what: &str| io(image, &[what.to_owned()]);
    write(&top, "write -P 2 1M 1M");
    let mut rig = Rig::off(Btrfs, vec![named(disk("vda", "qcow2", &top))]);
    let first = rig.create("first").await;
    write(&top, "write -P 3 1536k 1M");
    let written = rig.create("written").await;
    assert_eq!(
        assert_told(&rig, &first, &written, "written").await,
        [MIB * 3 / 2..MIB * 5 / 2]
    );

    let over = create_over("over.qcow2", "top.qcow2");
    rig.disks_are(vec![named(disk("vda", "qcow2", &over))]);
    let overlaid = rig.create("overlaid").await;
    assert_eq!(assert_told(&rig, &written, &overlaid, "overlaid").await, []);
    write(&over, "write -P 4 5M 64k");
    write(&over, "write -z 1M 64k");
    let higher = rig.create("higher").await;
    let both = [MIB..MIB + (64 << 10), 5 * MIB..5 * MIB + (64 << 10)];
    assert_eq!(assert_told(&rig, &overlaid, &higher, "written above").await, both);
    assert_eq!(assert_told(&rig, &written, &higher, "written above").await, both);
    assert_eq!(assert_told(&rig, &higher, &written, "written above").await, both);

    qemu_img(&["commit", "-q", "over.qcow2"], &images).unwrap();
    rig.disks_are(vec![named(disk("vda", "qcow2", &top))]);
    let committed = rig.create("committed").await;
    assert_told(&rig, &higher, &committed, "committed").await;
    assert_eq!(assert_told(&rig, &written, &committed, "committed").await, both);

    // Another base below, and the format of the top another.
    let flat = images.join("flat.raw");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "flat.raw"];
    qemu_img(&convert, &images).unwrap();
    rig.disks_are(vec![disk("vda", "raw", &flat)]);
    let flat = rig.create("flat").await;
    assert_told(&rig, &committed, &flat, "flat").await;
    assert_told(&rig, &flat, &first, "flat").await;
}

/// The snapshots are of a guest that goes on writing to a qcow2 image.
#[tokio::test]
async fn nothing_is_missed_while_the_guest_writes() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let qemu = machine(&images, "cluster_size=64k").start();
    let rig = Rig::running(Btrfs, &qemu);
    let mut all = Vec::new();
    for round in 0..3_u8 {
        for n in 0..20 {
            let start = (u64::from(round) * 7 + n * 13) % 60 * MIB + n * 512;
            qemu.write("vda", start, 4096 + n * 512, round * 20 + 1);
        }
        all.push(rig.create(&round.to_string()).await);
    }
    for (earlier, later) in [(0, 1), (1, 2), (2, 0)] {
        assert_told(&rig, &all[earlier], &all[later], "written by a guest").await;
    }
    assert_eq!(ranges(&rig, &all[0], &all[0]).await, []);
}

/// What cannot be read by its record alone cannot be mapped.
#[tokio::test]
async fn an_encrypted_image_is_not_compared() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "8M"], &images).unwrap();
    // The header's method of encryption: LUKS, whose making takes seconds.
    let file = fs::OpenOptions::new().write(true).open(images.join("a.qcow2"));
    file.unwrap().write_all_at(&2_u32.to_be_bytes(), 32).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "qcow2", &images.join("a.qcow2"))]);
    let probe = rig.probe(&[]).await.remove(0);
    assert!(!probe.capabilities.contains(&Capability::Compare), "{probe:?}");
    let snapshot = rig.create("one").await;
    assert!(Btrfs.compare(&snapshot.units[0].unit).is_none());

    // A raw file that the document says is encrypted begins with what the guest does not see.
    let raw = Disk {
        encrypted: true,
        ..disk("vda", "raw", &images.join("a.qcow2"))
    };
    let rig = Rig::off(Btrfs, vec![raw]);
    assert!(
        !rig.probe(&[]).await[0]
            .capabilities
            .contains(&Capability::Compare)
    );
    let snapshot = rig.create("one").await;
    assert!(Btrfs.compare(&snapshot.units[0].unit).is_none());
}
