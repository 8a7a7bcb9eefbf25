//! Volumes that a real QEMU writes to while they are snapshotted: it is paused for the take, and without that they are
//! not sound.

use std::path::Path;
use std::time::{Duration, Instant};

use disksnap_core::{DiskSnapshot, SnapshotId, Source};
use disksnap_lvm::LogicalVolume;
use disksnap_test_support::{DiskSpec, MIB, Qemu, firmware_writer_round};
use serde_json::json;

use crate::support::{Group, Rig, block, device, formatted, run, try_run};

/// How long snapshots of one machine are taken; what is sound once may be so by chance.
const TRYING: Duration = Duration::from_secs(45);
/// No chance any more.
const CONTROLS: u32 = 40;
/// The size of a disk in MiB.
const SIZE: u64 = 32;

/// A machine that runs, and rests while what was taken of it is looked at: they share a processor.
struct Rest<'a>(&'a Qemu);

impl<'a> Rest<'a> {
    fn of(qemu: &'a Qemu) -> Self {
        assert_eq!(qemu.status(), "running");
        qemu.wait_writer(8);
        qemu.qmp("stop", json!({}));
        Self(qemu)
    }
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.0.qmp("cont", json!({}));
    }
}

/// What `qemu-img check` finds wrong.
fn check(image: &Path) -> Result<String, String> {
    try_run(&["qemu-img", "check", "-q", "-f", "qcow2", image.to_str().unwrap()])
}

/// The round that the writer was in, from an image of its whole disk.
fn round(image: &Path, format: &str) -> u32 {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let from = image.display();
    run(&format!(
        "qemu-img convert -f {format} -O raw {from} {}",
        raw.display()
    ));
    let disk = std::fs::read(raw).unwrap();
    firmware_writer_round(&disk).unwrap_or_else(|why| panic!("{from}: {why}"))
}

#[tokio::test]
#[ignore = "runs in the guest"]
#[expect(
    clippy::print_stderr,
    reason = "how many rounds it was, and how the control went"
)]
async fn a_qcow2_image_that_is_written_to_is_sound() {
    let group = Group::new("vg", "");
    let volume = group.plain("disk", 4 * SIZE);
    // The smallest clusters and next to no cache: nearly every write changes the image's tables.
    run(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=512 {} {SIZE}M",
        volume.display()
    ));
    let disk = DiskSpec::new("sda", SIZE * MIB)
        .l2_cache_size(1024)
        .image(&volume);
    let qemu = Qemu::builder().disk(disk).firmware_writer().start();
    let source = Source::Block { dev: volume.clone() };
    let rig = Rig::running(vec![formatted("sda", source, "qcow2")], &qemu.qmp_path());
    let (mut tries, mut unsound) = (0, 0);
    while unsound == 0 && tries < CONTROLS {
        qemu.wait_writer(8);
        tries += 1;
        unsound += u32::from(!is_sound_without_the_pause(&rig).await);
    }
    let (mut rounds, mut last, begun) = (0, 0, Instant::now());
    while rounds < 3 || begun.elapsed() < TRYING {
        qemu.wait_writer(8);
        let snapshot = rig.create("one").await;
        assert!(snapshot.window.paused_us > 0, "it was paused");
        let _rest = Rest::of(&qemu);
        let taken = device(&snapshot, "sda");
        check(&taken).unwrap_or_else(|why| panic!("snapshot {rounds}: {why}"));
        let now = round(&taken, "qcow2");
        assert!(now > last, "the guest does not write on: {now} after {last}");
        (rounds, last) = (rounds + 1, now);
        rig.delete("one").await;
    }
    eprintln!("{rounds} of {rounds} sound; without the pause {unsound} of {tries} not");
    assert!(unsound > 0, "the control must fail, or the check proves nothing");
    qemu.wait_writer(8);
}

/// The control: the guest runs on while its volume is taken.
async fn is_sound_without_the_pause(rig: &Rig) -> bool {
    let (control, requests, id) = (rig.control().await, rig.requests(&[]), SnapshotId::random());
    let prepared = LogicalVolume.prepare(&*control, id, &requests).await.unwrap();
    let taken = LogicalVolume.take(&*control, &prepared[0]).await.unwrap();
    let unit = LogicalVolume.complete(&*control, id, &prepared[0], &taken);
    let unit = unit.await.unwrap();
    let volume = &unit.disks[0].details["snapshot.volume"];
    let sound = check(Path::new(&format!("/dev/{volume}"))).is_ok();
    LogicalVolume.delete(&*control, id, &unit).await.unwrap();
    sound
}

/// A classic and a thin volume of one machine: one instant, to the write.
#[tokio::test]
#[ignore = "runs in the guest"]
#[expect(clippy::print_stderr, reason = "how many rounds it was")]
async fn raw_volumes_that_are_written_to_are_one_instant() {
    let group = Group::new("vg", "");
    group.pool("pool", 3 * SIZE);
    let volumes = [group.plain("plain", SIZE), group.thin("pool", "thin", SIZE)];
    for volume in &volumes {
        run(&format!("blkdiscard -z {}", volume.display()));
    }
    let spec = |n: usize, target| DiskSpec::new(target, SIZE * MIB).image(&volumes[n]);
    let machine = Qemu::builder().disk(spec(0, "sda")).disk(spec(1, "sdb"));
    let qemu = machine.firmware_writer().start();
    let disks = vec![block("sda", &volumes[0]), block("sdb", &volumes[1])];
    let rig = Rig::running(disks, &qemu.qmp_path());
    let (mut rounds, mut last, begun) = (0, 0, Instant::now());
    while rounds < 3 || begun.elapsed() < TRYING / 2 {
        qemu.wait_writer(8);
        let snapshot = rig.create("one").await;
        let _rest = Rest::of(&qemu);
        let [first, second] = ["sda", "sdb"].map(|target| round(&device(&snapshot, target), "raw"));
        assert!(
            first == second || first == second + 1,
            "{first} and {second} are not one instant"
        );
        assert!(
            second > last,
            "the guest does not write on: {second} after {last}"
        );
        (rounds, last) = (rounds + 1, second);
        rig.delete("one").await;
    }
    eprintln!("{rounds} of {rounds} one instant");
    qemu.wait_writer(8);
}
