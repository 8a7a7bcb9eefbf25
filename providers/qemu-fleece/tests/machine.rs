//! Fleeces in a real QEMU with devices: the filter put in while the guest is paused, encryption, jobs, resizes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use disksnap_core::{Disks, Effect, ErrorKind, Health};
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion, Writer};
use rig::{Rig, request};
use serde_json::json;

const SIZE: u64 = 8 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// Four disks: every bus and format, with and without an iothread.
fn four_disks(version: QemuVersion) -> Qemu {
    let mut builder = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .disk(DiskSpec::new("sda", SIZE).qcow2().scsi());
    // 7.2 aborts when its own monitor zeroes a disk of an iothread.
    if version == QemuVersion::V10_0 {
        builder = builder.disk(DiskSpec::new("vdc", SIZE).qcow2().iothread());
    }
    builder.start()
}

fn targets(version: QemuVersion) -> Vec<&'static str> {
    let all = ["vda", "vdb", "sda", "vdc"];
    if version == QemuVersion::V10_0 {
        all.to_vec()
    } else {
        all[..3].to_vec()
    }
}

async fn keeps_its_content(version: QemuVersion, way: &str) {
    let qemu = four_disks(version);
    let rig = Rig::new(&qemu.domain_xml()).await;
    let targets = targets(version);
    for (n, target) in (1..).zip(&targets) {
        qemu.disk(target).fill(0, SIZE / 2, n);
    }
    let digests = || targets.iter().map(|t| qemu.disk(t).digest()).collect::<Vec<_>>();
    let before = digests();
    let snapshot = rig.create("one", &targets, way).await.unwrap();
    assert_eq!(qemu.status(), "running");
    assert_eq!(
        snapshot.window.paused_us > 0,
        way == "filter",
        "only filters need a pause: {:?}",
        snapshot.window
    );
    for target in &targets {
        let disk = qemu.disk(target);
        disk.fill(64 * KIB - 512, MIB, 0xbb);
        disk.zero(2 * MIB, MIB);
        disk.discard(SIZE / 2 - MIB, 2 * MIB);
        disk.flush();
    }
    let after = digests();
    for (n, target) in targets.iter().enumerate() {
        assert_ne!(before[n], after[n]);
        assert_eq!(rig.digest("one", target).await, before[n], "{way} {target}");
    }
    rig.delete("one").await;
    assert_eq!(digests(), after);
    for target in &targets {
        qemu.disk(target).fill(0, MIB, 0x11);
    }
    assert_eq!(qemu.status(), "running");
    rig.assert_clean().await;
}

#[tokio::test]
async fn filter_keeps_its_content() {
    keeps_its_content(QemuVersion::V10_0, "filter").await;
}

#[tokio::test]
async fn job_keeps_its_content() {
    keeps_its_content(QemuVersion::V10_0, "job").await;
}

#[tokio::test]
async fn classic_keeps_its_content() {
    keeps_its_content(QemuVersion::V10_0, "classic").await;
}

#[tokio::test]
async fn classic_keeps_its_content_in_7_2() {
    keeps_its_content(QemuVersion::V7_2, "classic").await;
}

#[tokio::test]
async fn mixed_ways_are_one_instant_while_a_writer_goes_on() {
    let qemu = four_disks(QemuVersion::V10_0);
    let rig = Rig::new(&qemu.domain_xml()).await;
    let targets = targets(QemuVersion::V10_0);
    let writer = Writer::start(targets.iter().map(|t| qemu.disk(t)).collect(), SIZE, 3);
    for round in 0..6 {
        writer.wait(2);
        let mut request = request(&format!("r{round}"), &targets, "");
        if let Disks::Named(disks) = &mut request.disks {
            for (n, disk) in disks.iter_mut().enumerate() {
                disk.options
                    .push("fleece.way", ["filter", "job", "classic"][(n + round) % 3]);
            }
        }
        let name = format!("r{round}");
        rig.dispatcher.create(&rig.domain, &request).await.unwrap();
        writer.wait(10);
        let mut disks = Vec::new();
        for target in &targets {
            disks.push(rig.read(&name, target).await);
        }
        rig::assert_one_instant(&disks);
        rig.delete(&name).await;
    }
    writer.stop();
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_guest_that_was_not_running_stays_so() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .prelaunch()
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    let snapshot = rig.create("one", &["vda"], "filter").await.unwrap();
    assert_eq!(
        (qemu.status().as_str(), snapshot.window.paused_us),
        ("prelaunch", 0)
    );
    qemu.disk("vda").fill(0, MIB, 1);
    assert!(rig.read("one", "vda").await.iter().all(|byte| *byte == 0));
    rig.delete("one").await;
    assert_eq!(qemu.status(), "prelaunch");
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_foreign_job_is_refused_by_name() {
    let qemu = four_disks(QemuVersion::V10_0);
    let rig = Rig::new(&qemu.domain_xml()).await;
    let target = rig.free_path("mirror.raw");
    std::fs::File::create(&target).unwrap().set_len(SIZE).unwrap();
    qemu.qmp(
        "blockdev-add",
        json!({"driver": "file", "node-name": "m", "filename": target.to_str().unwrap()}),
    );
    let device = qemu.top_node("vda");
    qemu.qmp(
        "blockdev-mirror",
        json!({"job-id": "users-mirror", "device": device, "target": "m", "sync": "full"}),
    );
    for way in ["", "job", "classic"] {
        let error = rig.create("x", &["vda"], way).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("users-mirror"), "{error}");
    }
    rig.create("other", &["vdb"], "").await.unwrap();
    rig.delete("other").await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_job_that_is_in_the_way_of_a_delete_is_named_and_the_delete_can_be_repeated() {
    let qemu = four_disks(QemuVersion::V10_0);
    let rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda", "vdb"], "filter").await.unwrap();
    let overlay = rig.free_path("overlay.qcow2");
    let made = std::process::Command::new(disksnap_test_support::tools::program("qemu-img"))
        .args(["create", "-q", "-f", "qcow2", overlay.to_str().unwrap(), "8M"])
        .status();
    assert!(made.unwrap().success());
    let file = json!({"driver": "file", "filename": overlay.to_str().unwrap()});
    let node = json!({"driver": "qcow2", "node-name": "users-overlay", "file": file, "backing": null});
    qemu.qmp("blockdev-add", node);
    let top = qemu.qmp("query-block", json!({}));
    let top = top
        .as_array()
        .unwrap()
        .iter()
        .find(|b| b["qdev"].as_str().unwrap().contains("virtio-disk0"))
        .unwrap();
    let top = top["inserted"]["node-name"].as_str().unwrap();
    qemu.qmp(
        "blockdev-snapshot",
        json!({"node": top, "overlay": "users-overlay"}),
    );
    let error = rig
        .dispatcher
        .delete(&rig.domain, &rig::name_of("one"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("users-overlay"), "{error}");
    qemu.disk("vda").fill(0, MIB, 4);
    // The user takes the overlay away again.
    qemu.qmp(
        "qom-set",
        json!({"path": "/machine/peripheral/virtio-disk0", "property": "drive", "value": top}),
    );
    qemu.qmp("blockdev-del", json!({"node-name": "users-overlay"}));
    rig.delete("one").await;
    qemu.disk("vda").fill(0, MIB, 5);
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_resize_below_a_fleece_does_not_reach_the_snapshot() {
    let qemu = four_disks(QemuVersion::V10_0);
    let rig = Rig::new(&qemu.domain_xml()).await;
    qemu.disk("vda").fill(0, SIZE, 7);
    let before = qemu.disk("vda").digest();
    rig.create("one", &["vda"], "filter").await.unwrap();
    let source = json!({"node-name": qemu.format_node("vda"), "size": SIZE * 2});
    let refused = qemu.monitor().try_execute("block_resize", &source).unwrap();
    assert!(
        refused.is_err(),
        "QEMU refuses to resize the image below the fleece: {refused:?}"
    );
    assert_eq!(rig.digest("one", "vda").await, before);
    rig.delete("one").await;
    qemu.qmp("block_resize", source);
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_killed_machine_leaves_a_snapshot_that_is_gone() {
    let qemu = four_disks(QemuVersion::V10_0);
    let rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("lost", &["vda", "sda"], "").await.unwrap();
    qemu.kill9();
    assert!(matches!(rig.health("lost").await, Health::Gone(_)));
    let error = rig.create("more", &["vda"], "").await.unwrap_err();
    assert!(error.to_string().contains("off"), "{error}");
    qemu.restart();
    assert!(matches!(rig.health("lost").await, Health::Gone(_)));
    rig.delete("lost").await;
    rig.assert_clean().await;
}

/// A machine with a disk that QEMU encrypts, `vdx`.
async fn encrypting(dir: &std::path::Path) -> (Qemu, Rig) {
    let image = dir.join("luks.img");
    let made = std::process::Command::new(disksnap_test_support::tools::program("qemu-img"))
        .args([
            "create",
            "-q",
            "-f",
            "luks",
            "--object",
            "secret,id=k,data=pass",
            "-o",
            "key-secret=k,iter-time=10",
        ])
        .args([image.to_str().unwrap(), "8M"])
        .status();
    assert!(made.unwrap().success());
    let file = json!({"driver": "file", "filename": image.to_str().unwrap()});
    let node = json!({"driver": "luks", "node-name": "enc", "key-secret": "k", "file": file}).to_string();
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE))
        .args(["-object", "secret,id=k,data=pass", "-blockdev", &node])
        .args(["-device", "virtio-blk-pci,drive=enc,id=ua-secret"])
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let mut disk = disksnap_core::Disk::new("vdx", disksnap_core::Source::File { file: image });
    disk.alias = Some("ua-secret".to_owned());
    rig.domain.disks.push(disk);
    (qemu, rig)
}

/// Nothing of an encrypted disk may come to rest in plain.
#[tokio::test]
async fn an_encrypted_disk_has_an_encrypted_fleece_by_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let (qemu, rig) = encrypting(dir.path()).await;
    let write = |pattern: u8| {
        let device = "/machine/peripheral/ua-secret/virtio-backend";
        let line = format!("qemu-io -d {device} \"write -P {pattern} 0 4M\"");
        let told = qemu.qmp("human-monitor-command", json!({"command-line": line}));
        assert_eq!(told, "", "the monitor tells only errors");
    };
    for way in ["filter", "job", "classic"] {
        write(0x5a);
        let made = rig.create("s", &["vdx"], way).await.unwrap();
        assert_eq!(made.disks[0].details["fleece.encrypted"], "yes");
        write(0xa5);
        let read = rig.read("s", "vdx").await;
        assert!(
            read[..4 << 20].iter().all(|byte| *byte == 0x5a),
            "{way}: the snapshot reads in plain"
        );
        let fleece = std::fs::read(&made.disks[0].details["fleece.file"]).unwrap();
        assert!(
            fleece.len() > 4 << 20,
            "{way}: the old data is in the fleece image"
        );
        assert!(
            !fleece.windows(16).any(|w| w == [0x5a; 16]),
            "{way}: and nothing of it in plain"
        );
        rig.delete("s").await;
        rig.assert_clean().await;
    }
}

#[tokio::test]
async fn a_create_that_is_refused_in_the_window_leaves_the_guest_running_and_nothing_behind() {
    let qemu = four_disks(QemuVersion::V10_0);
    let rig = Rig::new(&qemu.domain_xml()).await;
    let targets = targets(QemuVersion::V10_0);
    // Something that uses the last disk's node in a way that no device may be moved from.
    let file = rig.free_path("exists");
    std::fs::write(&file, "x").unwrap();
    let mut bad = request("bad", &targets, "");
    if let Disks::Named(disks) = &mut bad.disks {
        disks[3].options.push("fleece.file", file.to_str().unwrap());
    }
    let error = rig.dispatcher.create(&rig.domain, &bad).await.unwrap_err();
    assert!(
        matches!(error.effect(), Effect::None | Effect::RolledBack),
        "{error:?}"
    );
    assert_eq!(qemu.status(), "running");
    rig.assert_clean().await;
    rig.create("good", &targets, "").await.unwrap();
    rig.delete("good").await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_qemu_of_another_user_gets_an_image_of_its_own_where_it_can_reach_it() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    if !rustix::process::geteuid().is_root() {
        disksnap_test_support::skip!("root", "only root can start a QEMU as another user");
    }
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .args(["-run-with", "user=nobody"])
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    qemu.disk("vda").fill(0, MIB, 1);
    let error = rig.create("x", &["vda"], "").await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    assert!(error.next_step().unwrap().contains("fleece.file"), "{error:?}");
    rig.assert_clean().await;

    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for way in ["filter", "job", "classic"] {
        let file = place.path().join("fleece");
        let options = [("fleece.file", file.to_str().unwrap()), ("fleece.way", way)];
        rig.dispatcher
            .create(&rig.domain, &rig::with_options("x", "vda", &options))
            .await
            .unwrap();
        let meta = std::fs::metadata(&file).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (65534, 0o600), "{way}");
        qemu.disk("vda").fill(0, MIB, 2);
        let kept = rig
            .dispatcher
            .show(&rig.domain, &rig::name_of("x"))
            .await
            .unwrap();
        assert_eq!(*kept.overall(), Health::Active, "{way}");
        rig.delete("x").await;
        assert!(!file.exists());
    }
    rig.assert_clean().await;
}
