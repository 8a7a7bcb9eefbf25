//! Overlays in a real QEMU with devices: taken under a writer, merged in every order, beside fleeces.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::os::unix::fs::MetadataExt;

use disksnap_core::{Access, Disks, Effect, ErrorKind, Fit, Health, MergeInto, SnapshotRequest, Source};
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion, Writer, need, pattern};
use rig::{Rig, assert_one_instant, choice, content, extra_files, info, leftovers, live, request, top_of};
use serde_json::json;

const SIZE: u64 = 8 * MIB;
const TARGETS: [&str; 4] = ["vda", "vdb", "sda", "vdc"];

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// Four disks: every bus and format, one behind a wrapper.
fn four_disks(version: QemuVersion) -> Qemu {
    Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .disk(DiskSpec::new("sda", SIZE).cluster_size(4096).scsi())
        .disk(DiskSpec::new("vdc", SIZE).qcow2().wrapped())
        .start()
}

async fn keeps_its_content_and_merges(version: QemuVersion) {
    let qemu = four_disks(version);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    for (n, target) in (1..).zip(TARGETS) {
        qemu.disk(target).fill(0, SIZE / 2, n);
    }
    let before: Vec<Vec<u8>> = TARGETS.iter().map(|t| live(&qemu, t)).collect();
    let snapshot = rig.create("one", &TARGETS).await.unwrap();
    assert_eq!(qemu.status(), "running");
    assert_eq!(snapshot.window.paused_us, 0, "one transaction needs no pause");
    for target in TARGETS {
        let disk = qemu.disk(target);
        disk.fill(64 * KIB - 512, MIB, 0xbb);
        disk.zero(2 * MIB, MIB);
        disk.discard(SIZE / 2 - MIB, 2 * MIB);
        disk.flush();
    }
    let after: Vec<Vec<u8>> = TARGETS.iter().map(|t| live(&qemu, t)).collect();
    for (n, target) in TARGETS.into_iter().enumerate() {
        assert_ne!(before[n], after[n]);
        assert!(rig.read("one", target).await == before[n], "{target}");
        let record = snapshot.disk(target).unwrap();
        let modified = record.modified_disk.as_ref().unwrap();
        let overlay = modified.source.as_ref().unwrap().path().unwrap();
        assert_eq!(std::fs::metadata(overlay).unwrap().mode() & 0o777, 0o600);
        assert_eq!(overlay.parent(), Some(qemu.dir()), "beside the image");
        assert_eq!(modified.driver.format.as_deref(), Some("qcow2"));
        let backing = modified.backing.as_ref().unwrap();
        let base = Source::File {
            file: qemu.image(target).to_owned(),
        };
        assert_eq!(backing.source, base);
        let format = if target == "vdb" { "raw" } else { "qcow2" };
        assert_eq!(backing.format.as_deref(), Some(format));
        assert!(backing.backing.is_none());
        let Access::Source { source, .. } = &record.access else {
            panic!("no source")
        };
        assert_eq!(*source, base);
        let told = info(overlay);
        assert_eq!(told["full-backing-filename"], json!(qemu.image(target)));
        assert_eq!(told["backing-filename-format"], format);
    }
    rig.merge("one").await.unwrap();
    for (n, target) in TARGETS.into_iter().enumerate() {
        assert!(live(&qemu, target) == after[n], "{target}");
        assert_eq!(rig.image(target), qemu.image(target));
        qemu.disk(target).fill(0, MIB, 0x11);
    }
    assert_eq!(qemu.status(), "running");
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

#[tokio::test]
async fn a_snapshot_keeps_its_content_and_is_merged() {
    keeps_its_content_and_merges(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn a_snapshot_keeps_its_content_and_is_merged_in_7_2() {
    need!("qemu-7.2");
    keeps_its_content_and_merges(QemuVersion::V7_2).await;
}

/// Takes three snapshots under a writer and merges them in this order; each must stay right until it goes.
async fn merges_in_order(order: [&str; 3]) {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let targets = ["vda", "vdb"];
    let writer = Writer::start(targets.iter().map(|t| qemu.disk(t)).collect(), SIZE, 7);
    let mut kept = Vec::new();
    for name in ["one", "two", "three"] {
        writer.wait(5);
        rig.create(name, &targets).await.unwrap();
        let disks = [rig.read(name, "vda").await, rig.read(name, "vdb").await];
        assert_one_instant(&disks);
        kept.push((name, disks));
    }
    for gone in order {
        writer.wait(5);
        rig.merge(gone).await.unwrap();
        kept.retain(|(name, _)| *name != gone);
        for (name, disks) in &kept {
            for (target, before) in targets.iter().zip(disks) {
                assert!(
                    rig.read(name, target).await == *before,
                    "{name} {target} after the merge of {gone}"
                );
            }
        }
    }
    writer.wait(5);
    writer.stop();
    for target in targets {
        assert_eq!(top_of(&qemu, target).0, qemu.image(target));
        assert_eq!(rig.image(target), qemu.image(target));
    }
    // The guest's last round is on both disks.
    let disks: Vec<Vec<u8>> = targets.iter().map(|t| live(&qemu, t)).collect();
    assert_eq!(disks[0][..8], disks[1][..8]);
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
    qemu.quit();
    rig::run("qemu-img", &["check", "-q", qemu.image("vda").to_str().unwrap()]);
}

#[tokio::test]
async fn oldest_first() {
    merges_in_order(["one", "two", "three"]).await;
}

#[tokio::test]
async fn newest_first() {
    merges_in_order(["three", "two", "one"]).await;
}

#[tokio::test]
async fn the_middle_first() {
    merges_in_order(["two", "three", "one"]).await;
}

/// A hypervisor that was started on the overlays has opened all below them by itself, and lets go by itself of what a merge
/// takes out of the chain.
async fn merges_after_a_start(version: QemuVersion, into: MergeInto, order: [&str; 3]) {
    let sda = DiskSpec::new("sda", SIZE).qcow2().scsi();
    let qemu = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(if into == MergeInto::Overlay {
            sda.wrapped()
        } else {
            sda
        })
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let targets = ["vda", "sda"];
    let mut kept = Vec::new();
    let fill = |n: u64| {
        for target in targets {
            qemu.disk(target)
                .fill(n * MIB, 2 * MIB, u8::try_from(n).unwrap() + 1);
        }
    };
    for (n, name) in ["one", "two", "three"].into_iter().enumerate() {
        fill(u64::try_from(n).unwrap());
        rig.create(name, &targets).await.unwrap();
        kept.push((name, [rig.read(name, "vda").await, rig.read(name, "sda").await]));
    }
    fill(4);
    qemu.quit();
    let images = targets.map(|target| rig.image(target));
    let started: Vec<_> = targets
        .into_iter()
        .zip(images.iter().map(std::path::PathBuf::as_path))
        .collect();
    qemu.restart_on(&started);
    for (n, gone) in order.into_iter().enumerate() {
        fill(u64::try_from(n).unwrap() + 3);
        let now = targets.map(|target| live(&qemu, target));
        rig.merge_into(gone, into).await.unwrap();
        if into == MergeInto::Base {
            kept.retain(|(name, _)| *name != gone);
        }
        for (target, now) in targets.iter().zip(now) {
            assert!(live(&qemu, target) == now, "{target} after the merge of {gone}");
            assert_eq!(rig.image(target), top_of(&qemu, target).0);
        }
        for (name, disks) in &kept {
            for (target, before) in targets.iter().zip(disks) {
                let read = rig.read(name, target).await;
                assert!(read == *before, "{name} {target} after the merge of {gone}");
            }
        }
    }
    for (name, _) in kept.into_iter().rev() {
        rig.delete(name).await;
    }
    fill(1);
    let tops = targets.map(|target| rig.image(target));
    let mut left = leftovers(&qemu);
    left.retain(|name| !tops.iter().any(|top| top.ends_with(name)));
    assert_eq!(left, Vec::<String>::new());
}

#[tokio::test]
async fn what_a_hypervisor_was_started_on_is_merged_in_any_order() {
    for order in [
        ["one", "two", "three"],
        ["three", "two", "one"],
        ["two", "three", "one"],
    ] {
        merges_after_a_start(QemuVersion::V10_0, MergeInto::Base, order).await;
    }
}

#[tokio::test]
async fn what_a_hypervisor_was_started_on_is_freed_in_any_order() {
    for order in [["one", "three", "two"], ["two", "one", "three"]] {
        merges_after_a_start(QemuVersion::V10_0, MergeInto::Overlay, order).await;
    }
}

/// QEMU commits below filters only: what it would refuse for one disk is known before the other's commit begins.
#[tokio::test]
async fn below_a_wrapper_a_hypervisor_was_started_on_nothing_is_begun() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("sda", SIZE).qcow2().wrapped().scsi())
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    for name in ["one", "two"] {
        rig.create(name, &["vda", "sda"]).await.unwrap();
        qemu.disk("vda").fill(0, MIB, 3);
        qemu.disk("sda").fill(0, MIB, 3);
    }
    qemu.quit();
    let images = ["vda", "sda"].map(|target| rig.image(target));
    qemu.restart_on(&[("vda", &images[0]), ("sda", &images[1])]);
    for name in ["one", "two"] {
        let error = rig.merge(name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!(error.effect(), Effect::None);
        assert!(error.next_step().unwrap().contains("domain off"), "{error:?}");
        assert_eq!(rig.health(name).await, Health::Active);
    }
    qemu.quit();
    rig.merge("one").await.unwrap();
    rig.merge("two").await.unwrap();
    assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
}

#[tokio::test]
async fn what_a_hypervisor_was_started_on_is_merged_in_7_2() {
    need!("qemu-7.2");
    merges_after_a_start(QemuVersion::V7_2, MergeInto::Base, ["two", "one", "three"]).await;
    merges_after_a_start(QemuVersion::V7_2, MergeInto::Overlay, ["two", "three", "one"]).await;
}

#[tokio::test]
async fn overlays_and_fleeces_are_one_instant_while_a_writer_goes_on() {
    let qemu = four_disks(QemuVersion::V10_0);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let writer = Writer::start(TARGETS.iter().map(|t| qemu.disk(t)).collect(), SIZE, 3);
    for round in 0..2 {
        writer.wait(2);
        let name = format!("r{round}");
        let choices = TARGETS
            .iter()
            .enumerate()
            .map(|(n, target)| match (n + round) % 2 {
                0 => choice(target, "qemu", &[]),
                _ => choice(
                    target,
                    "qemu-fleece",
                    &[("fleece.way", ["classic", "job"][round])],
                ),
            });
        let mut request = request(&name, &[]);
        request.disks = Disks::Named(choices.collect());
        rig.create_as(request).await.unwrap();
        writer.wait(5);
        let shown = rig.shown(&name).await;
        let mut disks = Vec::new();
        for record in &shown.snapshot.disks {
            disks.push(match &record.access {
                Access::Source { source, format, .. } => content(source.path().unwrap(), format),
                Access::Node(_) => fleeced(&rig, &name, &record.target).await,
                other @ Access::Inside(_) => panic!("{other:?}"),
            });
        }
        assert_one_instant(&disks);
        rig.delete(&name).await;
    }
    writer.stop();
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

async fn fleeced(rig: &Rig, name: &str, target: &str) -> Vec<u8> {
    let name = rig::name_of(name);
    let opened = rig.dispatcher.open(&rig.domain, &name, target).await.unwrap();
    let Source::Network {
        name: Some(export),
        hosts,
        ..
    } = &opened.source
    else {
        panic!("not a network source")
    };
    let disksnap_core::NetworkHost::Unix { socket } = &hosts[0] else {
        panic!("not a unix socket")
    };
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy");
    rig::run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, copy.to_str().unwrap()],
    );
    rig.dispatcher.close(&rig.domain, opened).await.unwrap();
    std::fs::read(copy).unwrap()
}

#[tokio::test]
async fn a_raw_image_of_an_odd_size_keeps_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("odd: name.raw");
    let bytes = pattern::bytes(5, (2 << 20) + 777);
    std::fs::write(&image, &bytes).unwrap();
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 0).image(&image))
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let snapshot = rig.create("one", &["vda"]).await.unwrap();
    assert_eq!(snapshot.disks[0].size, Some((2 << 20) + 1024));
    qemu.disk("vda").fill(0, 512, 1);
    qemu.disk("vda").fill((2 << 20) + 512, 512, 2);
    assert_eq!(std::fs::read(&image).unwrap(), bytes);
    rig.merge("one").await.unwrap();
    let merged = std::fs::read(&image).unwrap();
    assert_eq!(merged[..512], [1; 512]);
    assert_eq!(merged[512..(2 << 20) + 512], bytes[512..(2 << 20) + 512]);
    assert_eq!(merged[(2 << 20) + 512..(2 << 20) + 777], [2; 265]);
}

#[tokio::test]
async fn what_stands_against_it_is_told_by_kind_and_nothing_is_left() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE).read_only())
        .disk(DiskSpec::new("vdc", SIZE).qcow2())
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let fails = async |rig: &mut Rig, target: &str, options: &[(&str, &str)], kind: ErrorKind| {
        let mut wanted = request("no", &[]);
        wanted.disks = Disks::Named(vec![choice("vda", "qemu", &[]), choice(target, "qemu", options)]);
        let error = rig.create_as(wanted).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(leftovers(&qemu), Vec::<String>::new(), "{error}");
        assert_eq!(qemu.status(), "running");
        error
    };
    fails(&mut rig, "vdb", &[], ErrorKind::Unsupported).await;
    let there = qemu.dir().join("there");
    std::fs::write(&there, "precious").unwrap();
    let path = there.to_str().unwrap();
    fails(
        &mut rig,
        "vdc",
        &[("source.file", path)],
        ErrorKind::AlreadyExists,
    )
    .await;
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "precious");
    fails(
        &mut rig,
        "vdc",
        &[("source.file", "relative")],
        ErrorKind::Invalid,
    )
    .await;
    fails(
        &mut rig,
        "vdc",
        &[("source.file", "/no/such/dir/x")],
        ErrorKind::NotFound,
    )
    .await;
    fails(&mut rig, "vdc", &[("sourcefile", "/x")], ErrorKind::Invalid).await;
    let null = json!({"driver": "null-co", "node-name": "null", "size": SIZE});
    qemu.qmp("blockdev-add", null);
    let slow = json!({"job-id": "theirs", "device": "libvirt-3-format", "target": "null", "sync": "full", "speed": 1});
    qemu.disk("vdc").fill(0, MIB, 1);
    qemu.qmp("blockdev-mirror", slow);
    fails(&mut rig, "vdc", &[], ErrorKind::Busy).await;
    qemu.qmp("block-job-cancel", json!({"device": "theirs", "force": true}));
    qemu.monitor().wait_event("BLOCK_JOB_CANCELLED");
    let fleece = || {
        let mut wanted = request("fleece", &[]);
        wanted.disks = Disks::Named(vec![choice("vdc", "qemu-fleece", &[])]);
        wanted
    };
    rig.create_as(fleece()).await.unwrap();
    let mut wanted = request("no", &["vda", "vdc"]);
    wanted.name = None;
    let error = rig.create_as(wanted).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.delete("fleece").await;
    // The other way round a fleece is taken of an overlay, and the merge must wait for it.
    rig.create("one", &["vdc"]).await.unwrap();
    rig.create_as(fleece()).await.unwrap();
    let error = rig.merge("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.delete("fleece").await;
    assert_eq!(rig.health("one").await, Health::Active);
    rig.merge("one").await.unwrap();
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

#[tokio::test]
async fn a_base_that_was_written_to_is_told() {
    let qemu = four_disks(QemuVersion::V10_0);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda", "vdb"]).await.unwrap();
    assert_eq!(rig.health("one").await, Health::Active);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(qemu.image("vdb"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0], 0).unwrap();
    assert!(matches!(rig.health("one").await, Health::Broken(_)));
    let given = rig
        .dispatcher
        .open(&rig.domain, &rig::name_of("one"), "vdb")
        .await;
    assert_eq!(given.unwrap_err().kind(), ErrorKind::Broken);
    rig.merge("one").await.unwrap();
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

/// A qcow2 file is snapshotted by QEMU; nobody gets another disk without asking while there is another way.
#[tokio::test]
async fn it_is_the_default_for_a_qcow2_file_of_a_domain_that_is_off() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    let methods = async || {
        let plan = rig
            .dispatcher
            .plan(&rig.domain, &SnapshotRequest::default())
            .await
            .unwrap();
        let of = |d: &disksnap_core::PlannedDisk| (d.method.clone().unwrap(), d.probe.fit.clone());
        plan.disks.iter().map(of).collect::<Vec<_>>()
    };
    let both = |method: &str, raw: Fit| vec![(method.to_owned(), Fit::Natural), (method.to_owned(), raw)];
    assert_eq!(methods().await, both("qemu-fleece", Fit::Natural));
    qemu.quit();
    assert_eq!(methods().await, both("qemu-external-qcow2", Fit::Possible));
}
