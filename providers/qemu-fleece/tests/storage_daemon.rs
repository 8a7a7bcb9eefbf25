//! Fleeces in a real storage daemon, whose disks the test writes like a guest: every way, every order.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use disksnap_core::{ErrorKind, Health};
use disksnap_test_support::{DiskSpec, KIB, MIB, QemuVersion, StorageDaemon, Writer, need, pattern};
use rig::{Rig, name_of, request, with_options};
use serde_json::json;

const SIZE: u64 = 8 * MIB;

fn two_disks(version: QemuVersion) -> StorageDaemon {
    let daemon = StorageDaemon::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    for (seed, target) in [(1, "vda"), (2, "vdb")] {
        daemon
            .disk(target)
            .write(0, &pattern::bytes(seed, usize::try_from(SIZE).unwrap()));
    }
    daemon
}

/// Changes a disk in all the ways that a guest can, at cluster edges, in the middle and at the end.
fn disturb(daemon: &StorageDaemon, target: &str) {
    let disk = daemon.disk(target);
    for at in [0, 64 * KIB - 512, 128 * KIB, MIB + 4096, SIZE - 512] {
        disk.fill(at, 512, 0xee);
    }
    disk.fill(2 * MIB, 300 * KIB, 0xaa);
    disk.zero(3 * MIB, 200 * KIB);
    disk.discard(4 * MIB, 256 * KIB);
    disk.fill(4 * MIB + 8 * KIB, 4096, 0x55);
    disk.flush();
}

/// The names of all nodes.
fn nodes(daemon: &StorageDaemon) -> Vec<String> {
    let nodes = daemon.qmp("query-named-block-nodes", json!({ "flat": true }));
    let names = nodes.as_array().unwrap().iter();
    names
        .map(|node| node["node-name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn what_a_killed_inspection_left_goes_with_the_next() {
    need!("fuse");
    let daemon = two_disks(QemuVersion::V10_0);
    let rig = Rig::new(&daemon.domain_xml()).await;
    rig.create("one", &["vda"], "filter").await.unwrap();
    let before = nodes(&daemon);
    let access = before.iter().find(|name| name.ends_with("-acc")).unwrap();
    // No process has such a number.
    let left = |kind: char| access.replace("-acc", &format!("-x{kind}zz00"));
    let window = json!({ "driver": "raw", "node-name": left('w'), "read-only": true, "file": access });
    daemon.qmp("blockdev-add", window);
    let sink = json!({ "driver": "null-co", "node-name": left('n'), "size": SIZE });
    daemon.qmp("blockdev-add", sink);
    let job = json!({ "job-id": left('j'), "device": left('w'), "target": left('n'), "sync": "full" });
    daemon.qmp("blockdev-mirror", job);
    assert_eq!(rig.health("one").await, Health::Active);
    assert_eq!(nodes(&daemon), before);
    assert_eq!(daemon.qmp("query-jobs", json!({})), json!([]));
    rig.delete("one").await;
    rig.assert_clean().await;
}

async fn keeps_its_content(version: QemuVersion, way: &str) {
    need!("fuse");
    let daemon = two_disks(version);
    let rig = Rig::new(&daemon.domain_xml()).await;
    let before = [daemon.disk("vda").digest(), daemon.disk("vdb").digest()];
    let snapshot = rig.create("one", &["vda", "vdb"], way).await.unwrap();
    assert_eq!(
        snapshot.disks[0].details["fleece.way"],
        if way.is_empty() { "filter" } else { way }
    );
    disturb(&daemon, "vda");
    disturb(&daemon, "vdb");
    let after = [daemon.disk("vda").digest(), daemon.disk("vdb").digest()];
    assert_ne!(before, after);
    assert_eq!(
        [rig.digest("one", "vda").await, rig.digest("one", "vdb").await],
        before
    );
    assert_eq!(rig.health("one").await, Health::Active);
    rig.delete("one").await;
    assert_eq!([daemon.disk("vda").digest(), daemon.disk("vdb").digest()], after);
    disturb(&daemon, "vda");
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
async fn the_safest_way_is_chosen() {
    keeps_its_content(QemuVersion::V10_0, "").await;
}

#[tokio::test]
async fn qemu_7_2_is_not_trusted_with_snapshot_access() {
    need!("fuse");
    let daemon = two_disks(QemuVersion::V7_2);
    let rig = Rig::new(&daemon.domain_xml()).await;
    for way in ["filter", "job"] {
        let error = rig.create("x", &["vda"], way).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{way}: {error}");
    }
    let snapshot = rig.create("x", &["vda"], "").await.unwrap();
    assert_eq!(snapshot.disks[0].details["fleece.way"], "classic");
    rig.delete("x").await;
    rig.assert_clean().await;
}

/// Two fleeces of one disk, with every pair of ways, deleted in either order.
async fn two_of_one_disk(version: QemuVersion, ways: [&str; 2]) {
    need!("fuse");
    for older_first in [true, false] {
        let daemon = two_disks(version);
        let rig = Rig::new(&daemon.domain_xml()).await;
        let disk = daemon.disk("vda");
        let first = disk.digest();
        rig.create("first", &["vda"], ways[0]).await.unwrap();
        disk.fill(0, 256 * KIB, 1);
        disk.zero(MIB, 128 * KIB);
        let second = disk.digest();
        let made = rig.create("second", &["vda"], ways[1]).await.unwrap();
        assert!(
            made.disks[0].alias.0.ends_with("-backup2"),
            "{}",
            made.disks[0].alias
        );
        disturb(&daemon, "vda");
        assert_eq!(
            [
                rig.digest("first", "vda").await,
                rig.digest("second", "vda").await
            ],
            [first.clone(), second.clone()]
        );
        let (gone, stays, content) = if older_first {
            ("first", "second", second)
        } else {
            ("second", "first", first)
        };
        rig.delete(gone).await;
        disk.fill(5 * MIB, MIB, 9);
        assert_eq!(
            rig.digest(stays, "vda").await,
            content,
            "{ways:?}, {gone} deleted"
        );
        assert_eq!(rig.health(stays).await, Health::Active);
        rig.delete(stays).await;
        rig.assert_clean().await;
        disk.fill(0, MIB, 3);
    }
}

#[tokio::test]
async fn two_filters_go_in_any_order() {
    two_of_one_disk(QemuVersion::V10_0, ["filter", "filter"]).await;
}

#[tokio::test]
async fn a_filter_and_a_job_go_in_any_order() {
    two_of_one_disk(QemuVersion::V10_0, ["filter", "job"]).await;
    two_of_one_disk(QemuVersion::V10_0, ["job", "filter"]).await;
}

#[tokio::test]
async fn two_jobs_go_in_any_order() {
    two_of_one_disk(QemuVersion::V10_0, ["job", "job"]).await;
}

#[tokio::test]
async fn a_filter_and_a_classic_go_in_any_order() {
    two_of_one_disk(QemuVersion::V10_0, ["filter", "classic"]).await;
    two_of_one_disk(QemuVersion::V10_0, ["classic", "filter"]).await;
}

#[tokio::test]
async fn two_classics_go_in_any_order() {
    two_of_one_disk(QemuVersion::V10_0, ["classic", "classic"]).await;
    two_of_one_disk(QemuVersion::V7_2, ["classic", "classic"]).await;
}

#[tokio::test]
async fn five_disks_are_one_instant_while_a_writer_goes_on() {
    need!("fuse");
    let targets = ["vda", "vdb", "vdc", "vdd", "vde"];
    let mut builder = StorageDaemon::builder();
    for (n, target) in targets.iter().enumerate() {
        let spec = DiskSpec::new(target, 4 * MIB);
        builder = builder.disk(if n % 2 == 0 { spec.qcow2() } else { spec });
    }
    let daemon = builder.start();
    let rig = Rig::new(&daemon.domain_xml()).await;
    let writer = Writer::start(targets.iter().map(|t| daemon.disk(t)).collect(), 4 * MIB, 7);
    for (round, way) in ["filter", "job", "classic"].iter().cycle().take(6).enumerate() {
        writer.wait(3);
        let name = format!("r{round}");
        rig.create(&name, &targets, way).await.unwrap();
        writer.wait(20);
        let mut disks = Vec::new();
        for target in targets {
            disks.push(rig.read(&name, target).await);
        }
        rig::assert_one_instant(&disks);
        rig.delete(&name).await;
    }
    assert!(writer.stop() > 100);
    rig.assert_clean().await;
}

#[tokio::test]
async fn odd_sizes_keep_their_last_sector() {
    need!("fuse");
    let size = MIB + 37 * 512;
    for way in ["filter", "job", "classic"] {
        let daemon = StorageDaemon::builder()
            .disk(DiskSpec::new("vda", size))
            .disk(DiskSpec::new("vdb", size).qcow2().cluster_size(4096))
            .start();
        let rig = Rig::new(&daemon.domain_xml()).await;
        for target in ["vda", "vdb"] {
            daemon
                .disk(target)
                .write(0, &pattern::bytes(5, usize::try_from(size).unwrap()));
        }
        let before = daemon.disk("vda").digest();
        rig.create("odd", &["vda", "vdb"], way).await.unwrap();
        for target in ["vda", "vdb"] {
            daemon.disk(target).fill(size - 512, 512, 0xff);
            daemon.disk(target).zero(MIB, 36 * 512);
        }
        for target in ["vda", "vdb"] {
            assert_eq!(rig.digest("odd", target).await, before, "{way} {target}");
        }
        rig.delete("odd").await;
        rig.assert_clean().await;
    }
}

#[tokio::test]
async fn a_full_fleece_image_breaks_the_snapshot_and_never_the_guest() {
    need!("fuse", "small-fs");
    let small = disksnap_test_support::small_fs(3 * MIB);
    let daemon = two_disks(QemuVersion::V10_0);
    let rig = Rig::new(&daemon.domain_xml()).await;
    let file = small.path().join("fleece");
    let request = with_options("full", "vda", &[("fleece.file", file.to_str().unwrap())]);
    let snapshot = rig.dispatcher.create(&rig.domain, &request).await.unwrap();
    assert_eq!(snapshot.disks[0].details["guest-safe"], "yes");
    assert_eq!(rig.health("full").await, Health::Active);
    daemon.disk("vda").fill(0, SIZE, 0x77);
    let content = daemon.disk("vda").read(0, SIZE);
    assert!(
        content.iter().all(|byte| *byte == 0x77),
        "the guest's own writes are whole"
    );
    assert!(
        matches!(rig.health("full").await, Health::Broken(_)),
        "{:?}",
        rig.health("full").await
    );
    let refused = rig
        .dispatcher
        .open(&rig.domain, &name_of("full"), "vda")
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Broken);
    rig.delete("full").await;
    assert!(!file.exists());
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_fleece_path_that_exists_is_never_overwritten() {
    need!("fuse");
    let daemon = two_disks(QemuVersion::V10_0);
    let rig = Rig::new(&daemon.domain_xml()).await;
    let precious = rig.free_path("precious");
    std::fs::write(&precious, "data").unwrap();
    let request = with_options("x", "vda", &[("fleece.file", precious.to_str().unwrap())]);
    let error = rig.dispatcher.create(&rig.domain, &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error:?}");
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "data");
    assert_eq!(
        std::fs::read_dir(rig.dir.path()).unwrap().count(),
        2,
        "state and the precious file, nothing else"
    );
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_chosen_fleece_image_is_private_and_goes_with_the_snapshot() {
    use std::os::unix::fs::MetadataExt;
    need!("fuse");
    let daemon = two_disks(QemuVersion::V10_0);
    let rig = Rig::new(&daemon.domain_xml()).await;
    for way in ["filter", "job", "classic"] {
        let file = rig.free_path("fleece");
        let options = [("fleece.file", file.to_str().unwrap()), ("fleece.way", way)];
        rig.dispatcher
            .create(&rig.domain, &with_options("x", "vda", &options))
            .await
            .unwrap();
        let meta = std::fs::metadata(&file).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.nlink()), (0o600, 1), "{way}");
        rig.delete("x").await;
        assert_eq!(
            std::fs::read_dir(rig.dir.path()).unwrap().count(),
            1,
            "{way}: only the state is left"
        );
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_dead_daemon_leaves_a_snapshot_that_is_gone_and_can_be_deleted() {
    need!("fuse");
    let mut daemon = two_disks(QemuVersion::V10_0);
    let rig = Rig::new(&daemon.domain_xml()).await;
    rig.create("lost", &["vda", "vdb"], "").await.unwrap();
    daemon.kill9();
    assert!(matches!(rig.health("lost").await, Health::Gone(_)));
    daemon.restart();
    assert!(matches!(rig.health("lost").await, Health::Gone(_)));
    rig.delete("lost").await;
    rig.assert_clean().await;
    rig.create("again", &["vda"], "").await.unwrap();
    rig.delete("again").await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_refused_take_leaves_nothing() {
    need!("fuse");
    let daemon = two_disks(QemuVersion::V10_0);
    let rig = Rig::new(&daemon.domain_xml()).await;
    // A filter and a job cannot be one instant where there is no guest to pause.
    let mut mixed = request("mixed", &["vda", "vdb"], "");
    if let disksnap_core::Disks::Named(disks) = &mut mixed.disks {
        disks[0].options.push("fleece.way", "filter");
        disks[1].options.push("fleece.way", "job");
    }
    let error = rig.dispatcher.create(&rig.domain, &mixed).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unsupported, disksnap_core::Effect::RolledBack)
    );
    rig.assert_clean().await;
    rig.create("mixed", &["vda", "vdb"], "").await.unwrap();
    rig.delete("mixed").await;
    rig.assert_clean().await;
}
