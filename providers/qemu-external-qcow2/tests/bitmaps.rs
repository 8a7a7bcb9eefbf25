//! The bitmaps of a disk across snapshots and merges: exactly what was written, and nothing forgotten.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;

use disksnap_core::MergeInto;
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion, need};
use rig::{Rig, info, leftovers};
use serde_json::{Value, json};

const SIZE: u64 = 8 * MIB;
const CLUSTER: u64 = 64 * KIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// What is known of a bitmap: dirty bytes, whether it records, whether it is persistent.
type Told = (u64, bool, bool);

/// The named bitmaps of a node.
fn bitmaps(qemu: &Qemu, node: &str) -> BTreeMap<String, Told> {
    let nodes = qemu.qmp("query-named-block-nodes", json!({"flat": true}));
    let mut nodes = nodes.as_array().unwrap().iter();
    let node = nodes.find(|n| n["node-name"] == node).unwrap();
    let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let told = |b: &Value| {
        let name = b["name"].as_str()?.to_owned();
        let is = |key: &str| b[key].as_bool().unwrap();
        Some((
            name,
            (b["count"].as_u64().unwrap(), is("recording"), is("persistent")),
        ))
    };
    bitmaps.iter().filter_map(told).collect()
}

fn add(qemu: &Qemu, node: &str, name: &str) {
    let bitmap = json!({"node": node, "name": name, "persistent": true, "granularity": CLUSTER});
    qemu.qmp("block-dirty-bitmap-add", bitmap);
}

/// Dirties one cluster, known by its number.
fn dirty(qemu: &Qemu, cluster: u64) {
    qemu.disk("vda").fill(cluster * CLUSTER + 512, 512, 1);
    qemu.disk("vda").flush();
}

fn node_on_top(qemu: &Qemu) -> String {
    let blocks = qemu.qmp("query-block", json!({}));
    let mut blocks = blocks.as_array().unwrap().iter();
    let block = blocks.find(|b| b["qdev"].as_str().is_some_and(|q| q.contains("virtio-disk0")));
    block.unwrap()["inserted"]["node-name"]
        .as_str()
        .unwrap()
        .to_owned()
}

const BASE: &str = "libvirt-1-format";

/// Two snapshots, with a checkpoint's change of bitmaps between, merged in either order.
async fn hold_the_union(version: QemuVersion, wrapped: bool, order: [&str; 2]) {
    let spec = DiskSpec::new("vda", SIZE).qcow2();
    let spec = if wrapped { spec.wrapped() } else { spec };
    let qemu = Qemu::builder().version(version).disk(spec).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    add(&qemu, BASE, "c1");
    dirty(&qemu, 1);
    dirty(&qemu, 2);
    rig.create("one", &["vda"]).await.unwrap();
    let first = node_on_top(&qemu);
    assert_eq!(
        bitmaps(&qemu, &first)["c1"],
        (0, true, true),
        "it goes on on the overlay"
    );
    dirty(&qemu, 2);
    dirty(&qemu, 3);
    // A new checkpoint: the former bitmap stops, and the next one is born on the overlay.
    qemu.qmp("block-dirty-bitmap-disable", json!({"node": first, "name": "c1"}));
    add(&qemu, &first, "c2");
    dirty(&qemu, 4);
    rig.create("two", &["vda"]).await.unwrap();
    let second = node_on_top(&qemu);
    assert_eq!(bitmaps(&qemu, &second).keys().collect::<Vec<_>>(), ["c2"]);
    dirty(&qemu, 5);
    rig.merge(order[0]).await.unwrap();
    dirty(&qemu, 6);
    rig.merge(order[1]).await.unwrap();
    dirty(&qemu, 7);
    let expected = BTreeMap::from([
        ("c1".to_owned(), (3 * CLUSTER, false, true)),
        ("c2".to_owned(), (4 * CLUSTER, true, true)),
    ]);
    assert_eq!(bitmaps(&qemu, BASE), expected);
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
    qemu.quit();
    let told = info(qemu.image("vda"));
    let kept = told["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert_eq!(kept.len(), 2, "{told}");
    rig::run("qemu-img", &["check", "-q", qemu.image("vda").to_str().unwrap()]);
}

#[tokio::test]
async fn hold_the_union_when_merged_oldest_first() {
    hold_the_union(QemuVersion::V10_0, false, ["one", "two"]).await;
}

#[tokio::test]
async fn hold_the_union_when_merged_newest_first() {
    hold_the_union(QemuVersion::V10_0, true, ["two", "one"]).await;
}

#[tokio::test]
async fn hold_the_union_in_7_2() {
    need!("qemu-7.2");
    hold_the_union(QemuVersion::V7_2, false, ["two", "one"]).await;
}

/// The control: what a commit makes of the bitmaps by itself.
#[tokio::test]
async fn a_plain_commit_loses_them() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"]).await.unwrap();
    let top = node_on_top(&qemu);
    add(&qemu, &top, "c1");
    dirty(&qemu, 1);
    let commit = json!({"job-id": "plain", "device": top, "top-node": top, "base-node": BASE});
    qemu.qmp("block-commit", commit);
    qemu.monitor().wait_event("BLOCK_JOB_READY");
    qemu.qmp("job-complete", json!({"id": "plain"}));
    qemu.monitor().wait_event("BLOCK_JOB_COMPLETED");
    assert_eq!(node_on_top(&qemu), BASE);
    assert_eq!(bitmaps(&qemu, BASE), BTreeMap::new());
}

#[tokio::test]
async fn a_cancelled_merge_leaves_them_recording() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    add(&qemu, BASE, "c1");
    dirty(&qemu, 1);
    rig.create("one", &["vda"]).await.unwrap();
    dirty(&qemu, 2);
    let mut looks = 0;
    let mut stop = |_: &[_]| {
        looks += 1;
        std::ops::ControlFlow::Break(())
    };
    let name = rig::name_of("one");
    let cancelled = rig
        .dispatcher
        .merge(&rig.domain, &name, &rig::options(MergeInto::Base), &mut stop)
        .await;
    assert_eq!(cancelled.unwrap_err().kind(), disksnap_core::ErrorKind::Refused);
    assert_eq!(looks, 1);
    assert!(bitmaps(&qemu, BASE)["c1"].1);
    dirty(&qemu, 3);
    rig.merge("one").await.unwrap();
    assert_eq!(bitmaps(&qemu, BASE)["c1"], (3 * CLUSTER, true, true));
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

/// With the domain off: `qemu-img` does the same.
#[tokio::test]
async fn are_united_with_the_domain_off() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    add(&qemu, BASE, "c1");
    dirty(&qemu, 1);
    rig.create("one", &["vda"]).await.unwrap();
    dirty(&qemu, 2);
    let top = node_on_top(&qemu);
    qemu.qmp("block-dirty-bitmap-disable", json!({"node": top, "name": "c1"}));
    add(&qemu, &top, "c2");
    dirty(&qemu, 3);
    qemu.quit();
    rig.merge("one").await.unwrap();
    let path = qemu.image("vda").to_str().unwrap().to_owned();
    rig::run("qemu-img", &["check", "-q", &path]);
    qemu.restart();
    let expected = BTreeMap::from([
        ("c1".to_owned(), (2 * CLUSTER, false, true)),
        ("c2".to_owned(), (CLUSTER, true, true)),
    ]);
    assert_eq!(bitmaps(&qemu, BASE), expected);
    assert_eq!(leftovers(&qemu), Vec::<String>::new());
}

/// With the header of the image above the merged one, which names another one then, its bitmaps are written anew, and the file may
/// grow: the snapshot that is read from it is as good as before.
#[tokio::test]
async fn of_the_image_above_are_written_anew_and_its_snapshot_stays_good() {
    for off in [false, true] {
        let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
        let mut rig = Rig::new(&qemu.domain_xml()).await;
        add(&qemu, BASE, "c1");
        let mut kept = Vec::new();
        for (n, name) in (1..).zip(["one", "two", "three", "four"]) {
            dirty(&qemu, n);
            rig.create(name, &["vda"]).await.unwrap();
            add(&qemu, &node_on_top(&qemu), &format!("c-{name}"));
        }
        dirty(&qemu, 5);
        qemu.quit();
        if !off {
            qemu.restart_on(&[("vda", &rig.image("vda"))]);
        }
        for name in ["one", "two", "three", "four"] {
            kept.push((name, rig.read(name, "vda").await));
        }
        for gone in ["two", "one", "three", "four"] {
            rig.merge(gone).await.unwrap();
            kept.retain(|(name, _)| *name != gone);
            for (name, before) in &kept {
                let now = rig.read(name, "vda").await;
                assert!(now == *before, "{name} after {gone}, off {off}");
            }
        }
        let left = rig::extra_files(qemu.dir());
        assert_eq!(left, Vec::<String>::new());
    }
}
