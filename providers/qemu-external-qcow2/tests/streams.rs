//! Merges into the overlay: the disk is freed of the snapshot's image, and every snapshot stays what it was.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use disksnap_core::{ErrorKind, Health, MergeInto, Progress};
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion, Writer, need, pattern};
use rig::{Rig, assert_one_instant, content, extra_files, info, leftovers, live, top_of};
use serde_json::{Value, json};

const SIZE: u64 = 8 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// The images below the disk's, by the headers.
fn below(qemu: &Qemu, target: &str) -> Vec<String> {
    let mut path = top_of(qemu, target).0;
    let mut found = Vec::new();
    while let Some(name) = info(&path)["full-backing-filename"].as_str() {
        found.push(name.to_owned());
        path = name.into();
    }
    found
}

/// The files that a machine has open as images.
fn open_files(qemu: &Qemu) -> Vec<String> {
    let nodes = qemu.qmp("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap().iter();
    let files = nodes.filter(|n| n["drv"] == "file");
    files.map(|n| n["file"].as_str().unwrap().to_owned()).collect()
}

/// Takes three snapshots under a writer and frees the disks of them in this order; all must stay right.
async fn frees_in_order(version: QemuVersion, order: [&str; 3]) {
    let qemu = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2().wrapped())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let targets = ["vda", "vdb"];
    for target in targets {
        qemu.disk(target).write(SIZE / 2, &pattern::bytes(3, 1 << 20));
    }
    let writer = Writer::start(targets.iter().map(|t| qemu.disk(t)).collect(), SIZE, 7);
    let mut kept = Vec::new();
    for name in ["one", "two", "three"] {
        writer.wait(5);
        rig.create(name, &targets).await.unwrap();
        let disks = [rig.read(name, "vda").await, rig.read(name, "vdb").await];
        assert_one_instant(&disks);
        kept.push((name, disks));
    }
    for (n, freed) in order.into_iter().enumerate() {
        writer.wait(5);
        let altered = rig.stream(freed).await.unwrap();
        assert!(altered.ended.is_empty() && !altered.gone, "{altered:?}");
        for target in targets {
            assert_eq!(below(&qemu, target).len(), 2 - n, "{target} after {freed}");
        }
        for (name, disks) in &kept {
            for (target, before) in targets.iter().zip(disks) {
                let now = rig.read(name, target).await;
                assert!(now == *before, "{name} {target} after {freed}");
            }
        }
        // Nobody minds being asked twice.
        assert!(rig.stream(freed).await.unwrap().disks.is_empty());
    }
    writer.wait(5);
    writer.stop();
    let disks: Vec<Vec<u8>> = targets.iter().map(|t| live(&qemu, t)).collect();
    assert_eq!(
        disks[0][..8],
        disks[1][..8],
        "the guest's last round is on both disks"
    );
    for (target, now) in targets.iter().zip(&disks) {
        let (path, format) = top_of(&qemu, target);
        assert_eq!(rig.image(target), path);
        assert!(rig.domain.disk(target).unwrap().backing.is_none());
        // Alone, where nothing of the chain is to be found.
        let alone = tempfile::tempdir().unwrap();
        let copy = alone.path().join("alone.qcow2");
        std::fs::copy(&path, &copy).unwrap();
        assert!(content(&copy, &format) == *now);
    }
    assert_eq!(open_files(&qemu).len(), 2, "{:?}", open_files(&qemu));
    for name in ["three", "two", "one"] {
        rig.delete(name).await;
    }
    // What the domain began with, nobody but its owner removes.
    assert!(targets.iter().all(|target| qemu.image(target).exists()));
    let tops = targets.map(|target| rig.image(target).file_name().unwrap().to_owned());
    let left: Vec<String> = extra_files(qemu.dir());
    assert!(
        left.len() == 2 && left.iter().all(|name| tops.iter().any(|top| **top == **name)),
        "{left:?}"
    );
    qemu.quit();
    for target in targets {
        rig::run("qemu-img", &["check", "-q", rig.image(target).to_str().unwrap()]);
    }
}

#[tokio::test]
async fn oldest_first() {
    frees_in_order(QemuVersion::V10_0, ["one", "two", "three"]).await;
}

#[tokio::test]
async fn newest_first() {
    frees_in_order(QemuVersion::V10_0, ["three", "two", "one"]).await;
}

#[tokio::test]
async fn the_middle_first() {
    frees_in_order(QemuVersion::V10_0, ["two", "one", "three"]).await;
}

#[tokio::test]
async fn the_middle_first_in_7_2() {
    need!("qemu-7.2");
    frees_in_order(QemuVersion::V7_2, ["two", "three", "one"]).await;
}

/// Both ways in one chain: what is left of it is right, and what stands by itself stands in the way of nothing but
/// what would change it.
#[tokio::test]
async fn both_ways_go_together() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    for (n, name) in ["one", "two", "three"].into_iter().enumerate() {
        qemu.disk("vda").fill(u64::try_from(n).unwrap() * MIB, MIB, 0x11);
        rig.create(name, &["vda"]).await.unwrap();
    }
    qemu.disk("vda").fill(3 * MIB, MIB, 0x11);
    let now = live(&qemu, "vda");
    let two = rig.read("two", "vda").await;
    rig.stream("two").await.unwrap();
    // The disk stands on `one`'s image still, and `two` is read from it as well.
    let error = rig.merge("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.merge("three").await.unwrap();
    assert!(live(&qemu, "vda") == now);
    assert!(rig.read("two", "vda").await == two);
    rig.delete("two").await;
    rig.merge("one").await.unwrap();
    assert!(live(&qemu, "vda") == now);
    assert_eq!(rig.image("vda"), qemu.image("vda"));
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

type Told = (u64, bool, bool);

/// Dirty bytes, recording, persistent, of the bitmaps of the disk's top node.
fn bitmaps(qemu: &Qemu) -> BTreeMap<String, Told> {
    let node = top_node(qemu);
    let nodes = qemu.qmp("query-named-block-nodes", json!({"flat": true}));
    let mut nodes = nodes.as_array().unwrap().iter();
    let node = nodes.find(|n| n["node-name"] == *node).unwrap();
    let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let told = |b: &Value| {
        let is = |key: &str| b[key].as_bool().unwrap();
        let told = (b["count"].as_u64().unwrap(), is("recording"), is("persistent"));
        Some((b["name"].as_str()?.to_owned(), told))
    };
    bitmaps.iter().filter_map(told).collect()
}

fn top_node(qemu: &Qemu) -> String {
    let blocks = qemu.qmp("query-block", json!({}));
    let mut blocks = blocks.as_array().unwrap().iter();
    let block = blocks.find(|b| b["qdev"].as_str().is_some_and(|q| q.contains("virtio-disk0")));
    let node = &block.unwrap()["inserted"]["node-name"];
    node.as_str().unwrap().to_owned()
}

const CLUSTER: u64 = 64 * KIB;

fn add(qemu: &Qemu, name: &str) {
    let bitmap = json!({"node": top_node(qemu), "name": name, "persistent": true, "granularity": CLUSTER});
    qemu.qmp("block-dirty-bitmap-add", bitmap);
}

fn dirty(qemu: &Qemu, cluster: u64) {
    qemu.disk("vda").fill(cluster * CLUSTER + 512, 512, 1);
    qemu.disk("vda").flush();
}

/// A disk of much data with bitmaps over two snapshots: what recorded before the first and between them.
async fn with_bitmaps(version: QemuVersion) -> (Qemu, Rig) {
    let spec = DiskSpec::new("vda", SIZE).qcow2();
    let qemu = Qemu::builder().version(version).disk(spec).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    qemu.disk("vda").fill(0, SIZE, 0x77);
    add(&qemu, "c1");
    dirty(&qemu, 1);
    dirty(&qemu, 2);
    rig.create("one", &["vda"]).await.unwrap();
    dirty(&qemu, 2);
    dirty(&qemu, 3);
    // A checkpoint: the former bitmap stops, the next begins.
    qemu.qmp(
        "block-dirty-bitmap-disable",
        json!({"node": top_node(&qemu), "name": "c1"}),
    );
    add(&qemu, "c2");
    dirty(&qemu, 4);
    rig.create("two", &["vda"]).await.unwrap();
    dirty(&qemu, 5);
    (qemu, rig)
}

/// What `with_bitmaps` and a write to the sixth cluster leave: exactly what was written, though all was copied.
fn expected() -> BTreeMap<String, Told> {
    BTreeMap::from([
        ("c1".to_owned(), (3 * CLUSTER, false, true)),
        ("c2".to_owned(), (3 * CLUSTER, true, true)),
    ])
}

async fn bitmaps_hold_the_union(version: QemuVersion, order: [&str; 2]) {
    let (qemu, mut rig) = with_bitmaps(version).await;
    for name in order {
        rig.stream(name).await.unwrap();
    }
    dirty(&qemu, 6);
    assert_eq!(bitmaps(&qemu), expected());
    assert_eq!(rig.health("one").await, Health::Active);
    assert_eq!(rig.health("two").await, Health::Active);
    qemu.quit();
    let told = info(&rig.image("vda"));
    let kept = told["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert_eq!(kept.len(), 2, "{told}");
}

#[tokio::test]
async fn bitmaps_hold_exactly_what_was_written() {
    bitmaps_hold_the_union(QemuVersion::V10_0, ["one", "two"]).await;
    bitmaps_hold_the_union(QemuVersion::V10_0, ["two", "one"]).await;
}

#[tokio::test]
async fn bitmaps_hold_exactly_what_was_written_in_7_2() {
    need!("qemu-7.2");
    bitmaps_hold_the_union(QemuVersion::V7_2, ["one", "two"]).await;
}

/// The control: what a plain stream leaves of them.
#[tokio::test]
async fn a_plain_stream_forgets_what_was_written_before() {
    let (qemu, _rig) = with_bitmaps(QemuVersion::V10_0).await;
    let stream = json!({"job-id": "plain", "device": top_node(&qemu)});
    qemu.qmp("block-stream", stream);
    qemu.monitor().wait_event("BLOCK_JOB_COMPLETED");
    dirty(&qemu, 6);
    assert_ne!(bitmaps(&qemu), expected());
}

#[tokio::test]
async fn with_the_domain_off_bitmaps_hold_it_too() {
    for order in [["one", "two"], ["two", "one"]] {
        let (qemu, mut rig) = with_bitmaps(QemuVersion::V10_0).await;
        qemu.quit();
        for name in order {
            rig.stream(name).await.unwrap();
        }
        let told = info(&rig.image("vda"));
        let kept = told["format-specific"]["data"]["bitmaps"].as_array().unwrap();
        assert_eq!(kept.len(), 2, "{told}");
        assert_eq!(told["full-backing-filename"], Value::Null);
        assert_eq!(rig.health("one").await, Health::Active);
        assert_eq!(rig.health("two").await, Health::Active);
        let machine = Qemu::builder()
            .disk(DiskSpec::new("vda", 0).qcow2().image(&rig.image("vda")))
            .start();
        dirty(&machine, 6);
        assert_eq!(bitmaps(&machine), expected(), "{order:?}");
    }
}

/// A guest's disk of which much is in the base, so that a stream takes a while.
async fn slow() -> (Qemu, Rig, Vec<u8>, Vec<u8>) {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 8 * SIZE).qcow2())
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    qemu.disk("vda").fill(0, 8 * SIZE, 0x44);
    rig.create("one", &["vda"]).await.unwrap();
    qemu.disk("vda").fill(MIB, MIB, 0x55);
    rig.create("two", &["vda"]).await.unwrap();
    qemu.disk("vda").fill(2 * MIB, MIB, 0x66);
    qemu.disk("vda").flush();
    let (one, two) = (rig.read("one", "vda").await, rig.read("two", "vda").await);
    (qemu, rig, one, two)
}

/// QEMU crashes when its nodes are asked for while a stream has ended and nobody has dismissed it: nobody may have to, since
/// whoever would may be killed before.
#[tokio::test]
async fn a_stream_goes_when_it_ends() {
    let (qemu, rig, one, _) = slow().await;
    let mut dismissed = Vec::new();
    let mut look = |_: &[disksnap_core::JobUnit]| {
        let jobs = qemu.qmp("query-block-jobs", json!({}));
        dismissed.extend(
            jobs.as_array()
                .unwrap()
                .iter()
                .map(|job| job["auto-dismiss"].clone()),
        );
        ControlFlow::Continue(())
    };
    let (name, options) = (rig::name_of("one"), rig::options(MergeInto::Overlay));
    let merged = rig
        .dispatcher
        .merge(&rig.domain, &name, &options, &mut look)
        .await;
    merged.unwrap();
    assert!(!dismissed.is_empty(), "no stream was seen");
    assert!(dismissed.iter().all(|auto| *auto == true), "{dismissed:?}");
    assert!(rig.read("one", "vda").await == one);
}

/// A stream that is cancelled, or whose QEMU dies, takes nothing from any snapshot, and can be done again.
#[tokio::test]
async fn cancelled_or_killed_nothing_is_lost() {
    for dies in [false, true] {
        let (qemu, mut rig, one, two) = slow().await;
        let now = live(&qemu, "vda");
        let mut stop = |units: &[disksnap_core::JobUnit]| {
            assert!(!matches!(units[0].progress, Progress::Idle), "{units:?}");
            if dies {
                qemu.kill9();
            }
            ControlFlow::Break(())
        };
        let name = rig::name_of("one");
        let merged = rig
            .dispatcher
            .merge(&rig.domain, &name, &rig::options(MergeInto::Overlay), &mut stop)
            .await;
        let error = merged.unwrap_err();
        assert!(dies || error.kind() == ErrorKind::Refused, "{error}");
        assert!(rig.read("one", "vda").await == one);
        assert!(
            rig.read("two", "vda").await == two,
            "its image was written to, and reads the same"
        );
        if dies {
            assert!(rig.content("vda") == now);
        } else {
            assert!(live(&qemu, "vda") == now);
        }
        rig.stream("one").await.unwrap();
        assert!(rig.read("one", "vda").await == one);
        assert!(rig.read("two", "vda").await == two);
        assert_eq!(
            rig.domain.disk("vda").unwrap().backing.as_ref().unwrap().backing,
            None
        );
        // Somebody else's write is found as before.
        let image = rig.shown("two").await.snapshot.disks[0].access.clone();
        let disksnap_core::Access::Source { source, .. } = image else {
            panic!("not a file")
        };
        let path = source.path().unwrap();
        let file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        std::io::Write::write_all(&mut &file, &[0]).unwrap();
        assert!(matches!(rig.health("two").await, Health::Broken(_)));
    }
}

#[tokio::test]
async fn a_domain_that_is_off_is_freed_in_any_order() {
    for order in [["one", "two"], ["two", "one"]] {
        let (qemu, mut rig, one, two) = slow().await;
        qemu.quit();
        let now = rig.content("vda");
        for name in order {
            rig.stream(name).await.unwrap();
            assert!(rig.content("vda") == now);
            assert!(rig.read("one", "vda").await == one);
            assert!(rig.read("two", "vda").await == two);
        }
        assert_eq!(info(&rig.image("vda"))["full-backing-filename"], Value::Null);
        assert!(rig.domain.disk("vda").unwrap().backing.is_none());
        // The instant can be put back, and what is written then is no part of it.
        rig.revert("one").await.unwrap();
        assert!(rig.content("vda") == one);
        assert!(rig.read("two", "vda").await == two);
        rig.delete("two").await;
        rig.delete("one").await;
        assert!(rig.content("vda") == one);
        assert_eq!(rig.image("vda"), qemu.image("vda"));
        assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
    }
}

/// The document from before would have a domain write to what is the snapshot alone now.
#[tokio::test]
async fn an_old_document_is_refused() {
    let (qemu, mut rig, one, _) = slow().await;
    let old = rig::old_document(&qemu);
    rig.stream("one").await.unwrap();
    rig.stream("two").await.unwrap();
    qemu.quit();
    let now = std::mem::replace(&mut rig.domain, old);
    let error = rig.create("three", &["vda"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let outdated = rig.dispatcher.outdated(&rig.domain).await.unwrap();
    assert_eq!(outdated[..], now.disks[..1], "it is told what the disk is");
    rig.domain = now;
    rig.create("three", &["vda"]).await.unwrap();
    assert!(rig.read("one", "vda").await == one);
}

/// The image of a snapshot was removed under a running domain: while it is open, a stream saves the disk.
#[tokio::test]
async fn a_disk_is_saved_from_a_base_that_was_removed() {
    let (qemu, mut rig, _, _) = slow().await;
    let now = live(&qemu, "vda");
    std::fs::remove_file(qemu.image("vda")).unwrap();
    assert!(matches!(rig.health("one").await, Health::Gone(_)));
    rig.stream("one").await.unwrap();
    rig.stream("two").await.unwrap();
    qemu.disk("vda").flush();
    assert!(content(&rig.image("vda"), "qcow2") == now);
    assert!(!Path::new(qemu.image("vda")).exists());
}

/// Copied by a job, then QEMU dies: what it had in memory is in the images, whichever way the merge went.
#[tokio::test]
async fn what_was_merged_survives_the_death_of_qemu() {
    for (into, name) in [
        (MergeInto::Overlay, "two"),
        (MergeInto::Overlay, "one"),
        (MergeInto::Base, "one"),
        (MergeInto::Base, "two"),
    ] {
        let (qemu, mut rig, _, _) = slow().await;
        let now = live(&qemu, "vda");
        rig.merge_into(name, into).await.unwrap();
        qemu.kill9();
        assert!(rig.content("vda") == now, "{name} into the {into:?}");
    }
}
