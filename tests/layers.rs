//! One disk on three layers, snapshotted at each of them in turn while its guest writes: a qcow2 image on btrfs in a
//! logical volume. It runs in a guest that has LVM, where the machine is one within a machine.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use disksnap::{
    Access, DiskChoice, Disks, Disksnap, Domain, ErrorKind, Fit, MethodChoice, Options, Piece, Snapshot,
    SnapshotRequest, Source, nbd_uri,
};
use disksnap_test_support::{DiskSpec, LvmGuest, MIB, Qemu, firmware_writer_round, need};
use libtest_mimic::{Arguments, Trial};

/// The levels, outermost last.
const LEVELS: [&str; 3] = ["qemu-fleece", "btrfs", "lvm"];
/// The size of the disk.
const SIZE: u64 = 8 * MIB;
const LIVE: &str = "/mnt/live";

fn main() {
    disksnap::run_if_asked();
    let here = Trial::test("a_disk_can_be_taken_at_each_of_its_layers", || {
        in_guest();
        Ok(())
    });
    let there = Trial::test("in_the_guest", || {
        let runtime = tokio::runtime::Runtime::new()?;
        runtime.block_on(each_layer_in_turn());
        Ok(())
    });
    let tests = vec![here, there.with_ignored_flag(true)];
    libtest_mimic::run(&Arguments::from_args(), tests).exit();
}

fn in_guest() {
    need!("lvm");
    let mut guest = LvmGuest::start_with_qemu(&[512 * MIB]);
    let me = guest.put(&std::env::current_exe().unwrap());
    let command = [me.as_str(), "--ignored", "--exact", "in_the_guest"];
    let output = guest.run_with(&[("DISKSNAP_TOOLS", "system")], &command);
    let told = format!("{}\n{}\n{}", output.stdout, output.stderr, guest.serial());
    assert_eq!(output.status, 0, "{told}");
    assert!(output.stdout.contains("1 passed"), "{told}");
}

/// Runs a program; its words are separated by white space.
fn run(line: &str) {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(output.status.success(), "{line}: {told}");
}

/// The volume with its btrfs and the image on that; the path of the image.
fn layers() -> PathBuf {
    run("vgcreate -y vg /dev/vda");
    run("lvcreate -y -Wn -L 200m -n data vg");
    run("mkfs.btrfs -q -M /dev/vg/data");
    std::fs::create_dir_all(LIVE).unwrap();
    run(&format!("mount -t btrfs /dev/vg/data {LIVE}"));
    run(&format!("btrfs subvolume create {LIVE}/vms"));
    let image = Path::new(LIVE).join("vms/disk.qcow2");
    let options = "-q -f qcow2 -o cluster_size=4096";
    run(&format!("qemu-img create {options} {} {SIZE}", image.display()));
    image
}

async fn each_layer_in_turn() {
    let image = layers();
    let disk = DiskSpec::new("sda", SIZE).qcow2().image(&image);
    let qemu = Qemu::builder().disk(disk).firmware_writer().start();
    let state = tempfile::tempdir().unwrap();
    let disksnap = Disksnap::open(Some(&state.path().join("s"))).await.unwrap();
    let document = disksnap.load(qemu.domain_xml_file().to_str().unwrap()).await;
    let domain = document.unwrap().domain().clone();

    let (mut last, mut snapshots) = (0, Vec::new());
    for level in LEVELS {
        qemu.wait_writer(8);
        let snapshot = take(&disksnap, &domain, level).await;
        assert_eq!(snapshot.disks[0].method, level);
        let printed = qemu.writer_rounds();
        qemu.wait_writer(16);
        // Each is of its own instant, whatever has been written since.
        if level != "lvm" {
            let round = read(&disksnap, &domain, &snapshot).await;
            assert!(
                last < round && u64::from(round) < printed + 16,
                "{level}: {round} after {last}, and {printed} was printed"
            );
            last = round;
        }
        snapshots.push(snapshot);
    }
    let outermost = snapshots.last().unwrap();
    refuses_to_be_read(&disksnap, &domain, outermost).await;
    becomes_another_machines_disk(&disksnap, &domain, outermost).await;

    // The inner ones are still what they were.
    for snapshot in &snapshots[..2] {
        assert!(read(&disksnap, &domain, snapshot).await <= last);
        disksnap
            .dispatcher()
            .delete(&domain, &snapshot.name)
            .await
            .unwrap();
    }
    assert_eq!(qemu.status(), "running");
    qemu.wait_writer(8);
    qemu.quit();
    run(&format!("umount {LIVE}"));
    // Now that its origin is mounted no more, it can be mounted as on another machine.
    let round = read_inside(outermost);
    assert!(last < round, "lvm: {round} after {last}");
    disksnap
        .dispatcher()
        .delete(&domain, &outermost.name)
        .await
        .unwrap();
    run("vgremove -ff -y vg");
}

async fn take(disksnap: &Disksnap, domain: &Domain, level: &str) -> Snapshot {
    let choice = DiskChoice {
        method: Some(MethodChoice {
            method: level.to_owned(),
            options: Options::default(),
        }),
        ..DiskChoice::new("sda")
    };
    let request = SnapshotRequest {
        name: Some(level.parse().unwrap()),
        disks: Disks::Named(vec![choice]),
        // No test here is about it, and the guest is slow where the host is busy.
        deadline: Duration::from_mins(1),
        ..SnapshotRequest::default()
    };
    let plan = disksnap.dispatcher().plan(domain, &request).await.unwrap();
    let fit = &plan.disks[0].probe.fit;
    assert!(!matches!(fit, Fit::Unfit { .. }), "{level}: {fit:?}");
    disksnap.dispatcher().create(domain, &request).await.unwrap()
}

/// The round that the writer was in, read as the snapshot says.
async fn read(disksnap: &Disksnap, domain: &Domain, snapshot: &Snapshot) -> u32 {
    let reader = disksnap.read(domain, &snapshot.name, "sda").await.unwrap();
    let mut disk = vec![0; usize::try_from(reader.size()).unwrap()];
    let mut pieces = reader.pieces(0, reader.size()).unwrap();
    while let Some(piece) = pieces.next().await.unwrap() {
        if let Piece::Data { offset, data } = piece {
            disk[usize::try_from(offset).unwrap()..][..data.len()].copy_from_slice(&data);
        }
    }
    drop(pieces);
    reader.close().await.unwrap();
    firmware_writer_round(&disk).unwrap_or_else(|why| panic!("{}: {why}", snapshot.name))
}

async fn refuses_to_be_read(disksnap: &Disksnap, domain: &Domain, snapshot: &Snapshot) {
    let error = disksnap.read(domain, &snapshot.name, "sda").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("/vms/disk.qcow2"), "{error}");
    assert!(
        error.next_step().unwrap().contains("disksnap attach"),
        "{error:?}"
    );
}

/// The device, and not the disk, which no host could find in it without mounting it.
async fn becomes_another_machines_disk(disksnap: &Disksnap, domain: &Domain, snapshot: &Snapshot) {
    let appliance = Qemu::builder()
        .args(["-device", "pcie-root-port,id=rp1,chassis=1,addr=0x10"])
        .start();
    let document = disksnap.load(appliance.domain_xml_file().to_str().unwrap()).await;
    let to = document.unwrap().domain().clone();
    let dispatcher = disksnap.dispatcher();
    let attached = dispatcher
        .attach(domain, &snapshot.name, "sda", &to, None)
        .await
        .unwrap();
    let source = Source::Network {
        protocol: "nbd".to_owned(),
        name: Some(attached.disk.name.clone()),
        hosts: vec![attached.disk.listen.host()],
        tls: false,
    };
    let uri = nbd_uri(&source).unwrap();
    run(&format!(
        "qemu-img dd -f raw -O raw bs=64k count=2 if={uri} of=/tmp/head"
    ));
    // The magic number of a btrfs.
    assert_eq!(&std::fs::read("/tmp/head").unwrap()[0x10040..][..8], b"_BHRfS_M");
    // No kernel runs there that would let the disk go.
    appliance.quit();
    let detached = dispatcher
        .detach(domain, &snapshot.name, "sda", None, None)
        .await
        .unwrap();
    assert_eq!(detached.len(), 1);
}

fn read_inside(snapshot: &Snapshot) -> u32 {
    let Access::Inside(inside) = &snapshot.disks[0].access else {
        panic!("{:?}", snapshot.disks[0].access)
    };
    assert_eq!(inside.file_system, "btrfs");
    run("mkdir -p /mnt/taken");
    let (options, device) = (&inside.options, inside.device.display());
    run(&format!("mount -t btrfs -o {options} {device} /mnt/taken"));
    let image = Path::new("/mnt/taken").join(inside.image.path.strip_prefix("/").unwrap());
    let format = &inside.image.format;
    run(&format!("qemu-img check -q -f {format} {}", image.display()));
    run(&format!(
        "qemu-img convert -f {format} -O raw {} /tmp/disk",
        image.display()
    ));
    let disk = std::fs::read("/tmp/disk").unwrap();
    run("umount /mnt/taken");
    firmware_writer_round(&disk).unwrap_or_else(|why| panic!("lvm: {why}"))
}
