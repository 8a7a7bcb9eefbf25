//! Volumes that fill up under a machine that writes: a classic snapshot that overflows, and a thin pool, which fails the
//! writes that find no room, or has them wait.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_core::{ErrorKind, Health};
use disksnap_test_support::{DiskSpec, MIB, Qemu, firmware_writer_round};
use serde_json::json;

use crate::support::{Group, Rig, block, device, fill, run};

/// The size of a disk in MiB.
const SIZE: u64 = 8;
/// How often the machine writes in a second: what fills up is looked at several times before it is full.
const WRITES: u32 = 40;
/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(5);

/// A machine that writes to this volume, which held only zeroes, and flushes each write: the firmware asks a virtio disk for that.
fn machine(volume: &Path) -> Qemu {
    run(&format!("blkdiscard -z {}", volume.display()));
    let disk = DiskSpec::new("vda", SIZE * MIB).image(volume);
    let qemu = Qemu::builder().disk(disk).firmware_writer().start();
    let device = format!("/machine/peripheral/{}/virtio-backend", qemu.alias("vda"));
    let pace = json!({
        "id": device, "iops": WRITES, "iops_rd": 0, "iops_wr": 0, "bps": 0, "bps_rd": 0, "bps_wr": 0,
    });
    qemu.qmp("block_set_io_throttle", pace);
    qemu.wait_writer(8);
    qemu
}

/// Waits for it, looking again after so many rounds of the guest's, which stands still meanwhile.
async fn wait_while_it_writes(qemu: &Qemu, rig: &Rig, mut done: impl FnMut(Health) -> bool) {
    let since = Instant::now();
    loop {
        qemu.wait_writer(8);
        qemu.qmp("stop", json!({}));
        let health = rig.health("one").await;
        qemu.qmp("cont", json!({}));
        if done(health.clone()) {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "it stays {health:?}");
    }
}

/// The guest writes on, was told of no error by its disk, and all that it wrote is there.
fn is_whole(qemu: &Qemu, volume: &Path) {
    qemu.wait_writer(16);
    assert_eq!(qemu.status(), "running");
    qemu.qmp("stop", json!({}));
    firmware_writer_round(&std::fs::read(volume).unwrap())
        .unwrap_or_else(|why| panic!("a write of the guest's is lost: {why}"));
    assert!(!qemu.serial().contains("GUEST FAILED"), "{}", qemu.serial());
}

fn had_io_error(qemu: &Qemu) -> bool {
    qemu.monitor()
        .events()
        .iter()
        .any(|event| event == "BLOCK_IO_ERROR")
}

async fn is_refused(rig: &Rig) {
    let name = "one".parse().unwrap();
    let refused = rig.dispatcher.open(&rig.domain, &name, "vda").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Broken, "{refused}");
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_snapshot_that_overflows_gives_no_other_bytes_and_fails_no_write() {
    const PIECE: usize = 256 << 10;
    let group = Group::new("vg", "-s 1m");
    let volume = group.plain("disk", SIZE);
    let qemu = machine(&volume);
    let rig = Rig::running(vec![block("vda", &volume)], &qemu.qmp_path());
    let snapshot = rig
        .try_create("one", &[("snapshot.size", "1048576")])
        .await
        .unwrap();
    let instant = std::fs::read(device(&snapshot, "vda")).unwrap();
    firmware_writer_round(&instant).unwrap();
    let reader = File::open(device(&snapshot, "vda")).unwrap();
    let read = |piece: usize| {
        let mut bytes = vec![0; PIECE];
        reader.read_exact_at(&mut bytes, (piece * PIECE) as u64)?;
        assert!(
            bytes == instant[piece * PIECE..][..PIECE],
            "other bytes in {piece}"
        );
        std::io::Result::Ok(())
    };
    let pieces = instant.len() / PIECE;
    for piece in 0..pieces / 2 {
        read(piece).unwrap();
    }
    // The guest overwrites by and by more than there is room for.
    let (mut told_before, mut reason) = (false, String::new());
    wait_while_it_writes(&qemu, &rig, |health| {
        match health {
            Health::Endangered(_) => told_before = true,
            Health::Broken(why) => reason = why,
            _ => {}
        }
        !reason.is_empty()
    })
    .await;
    assert!(told_before, "nobody was told that it fills up");
    assert!(reason.contains("overflowed"), "{reason}");
    let refused = (pieces / 2..pieces).filter(|piece| read(*piece).is_err());
    assert!(refused.count() > 0, "all of it is still given");
    is_refused(&rig).await;
    drop(reader);
    rig.delete("one").await;
    assert_eq!(group.volumes(), ["disk"]);
    is_whole(&qemu, &volume);
    assert!(!had_io_error(&qemu));
}

/// A machine on a thin volume, whose pool has room for a few of the writes that come after the snapshot.
struct Crowded {
    qemu: Qemu,
    rig: Rig,
    volume: PathBuf,
    instant: Vec<u8>,
    taken: PathBuf,
    // Last: nothing uses it any more.
    group: Group,
}

impl Crowded {
    /// The machine stands still by the user's will.
    async fn new(waits: bool) -> Self {
        let group = Group::new("vg", "-s 1m");
        group.pool("pool", 2 * SIZE);
        if waits {
            run("lvchange --errorwhenfull n vg/pool");
        }
        let filler = group.thin("pool", "filler", SIZE);
        let volume = group.thin("pool", "disk", SIZE);
        let qemu = machine(&volume);
        fill(&filler, 0, usize::try_from((SIZE - 1) * MIB).unwrap(), 1);
        let rig = Rig::running(vec![block("vda", &volume)], &qemu.qmp_path());
        qemu.qmp("stop", json!({}));
        let snapshot = rig.create("one").await;
        let taken = device(&snapshot, "vda");
        let instant = std::fs::read(&taken).unwrap();
        firmware_writer_round(&instant).unwrap();
        Self {
            qemu,
            rig,
            volume,
            instant,
            taken,
            group,
        }
    }

    /// It is told before there is no room.
    async fn is_told_before(&self) {
        let health = self.rig.health("one").await;
        let Health::Endangered(why) = &health else {
            panic!("{health:?}")
        };
        assert!(why.contains("vg/pool") && why.contains("wait or fail"), "{why}");
    }

    /// It is told as broken while there is none, and nothing more is begun; what it holds is right for all that.
    async fn is_told(&self) {
        let health = self.rig.health("one").await;
        let Health::Broken(why) = &health else {
            panic!("{health:?}")
        };
        assert!(why.contains("vg/pool is full"), "{why}");
        is_refused(&self.rig).await;
        let error = self.rig.try_create("more", &[]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert!(std::fs::read(&self.taken).unwrap() == self.instant, "other bytes");
    }
}

/// A write of the guest's fails, as it would without a snapshot; nothing that it was told is written is lost.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_pool_that_fails_writes_has_room_again_when_the_snapshot_is_deleted() {
    let crowded = Crowded::new(false).await;
    let qemu = &crowded.qemu;
    crowded.is_told_before().await;
    qemu.qmp("cont", json!({}));
    let since = Instant::now();
    // By the host's cache QEMU learns of an error and not of its kind, and passes it on; else it stops the guest.
    let fails = || qemu.serial().contains("GUEST FAILED") || qemu.status() == "io-error";
    while !fails() {
        assert!(since.elapsed() < PATIENCE, "there is always room");
        std::thread::sleep(Duration::from_millis(50));
    }
    let status = qemu.status();
    crowded.is_told().await;
    assert_eq!(qemu.status(), status, "it is not ours to let go, nor to stop");
    crowded.rig.delete("one").await;
    assert_eq!(crowded.group.volumes(), ["disk", "filler", "pool"]);
    firmware_writer_round(&std::fs::read(&crowded.volume).unwrap())
        .unwrap_or_else(|why| panic!("a write of the guest's is lost: {why}"));
    // The kernel tells the guest's error to the next who asks, too, once. dm-thin copies what was shared until now, so that each
    // first write wants room for a moment.
    let _ = File::open(&crowded.volume).and_then(|file| file.sync_all());
    fill(&crowded.volume, 0, 256 << 10, 2);
}

/// The guest's writes wait, and go on when the snapshot is deleted.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_pool_that_has_writes_wait_goes_on_when_the_snapshot_is_deleted() {
    // It would fail them after a minute.
    std::fs::write("/sys/module/dm_thin_pool/parameters/no_space_timeout", "0").unwrap();
    let crowded = Crowded::new(true).await;
    let qemu = &crowded.qemu;
    crowded.is_told_before().await;
    qemu.qmp("cont", json!({}));
    let since = Instant::now();
    while crowded.rig.health("one").await.is_good() {
        assert!(since.elapsed() < PATIENCE, "there is always room");
    }
    crowded.is_told().await;
    assert_eq!(qemu.status(), "running");
    crowded.rig.delete("one").await;
    assert_eq!(crowded.group.volumes(), ["disk", "filler", "pool"]);
    is_whole(qemu, &crowded.volume);
    assert!(!had_io_error(qemu));
}
