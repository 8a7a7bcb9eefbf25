//! What changed since a checkpoint, told of a real QEMU: increments applied to what was before give the snapshot.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;

use disksnap_core::{Command, Opened, Start, Tracker};
use disksnap_dirty_bitmaps::DirtyBitmaps;
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion};
use rig::Rig;
use serde_json::json;

const SIZE: u64 = 8 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

fn applied(mut base: Vec<u8>, changed: &[(std::ops::Range<u64>, Vec<u8>)]) -> Vec<u8> {
    for (range, data) in changed {
        let start = usize::try_from(range.start).unwrap();
        base[start..start + data.len()].copy_from_slice(data);
    }
    base
}

fn length(changed: &[(std::ops::Range<u64>, Vec<u8>)]) -> u64 {
    changed.iter().map(|(range, _)| range.end - range.start).sum()
}

async fn increments_are_exact(version: QemuVersion) {
    let qemu = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    let targets = ["vda", "vdb"];
    for target in targets {
        qemu.disk(target).fill(0, SIZE / 2, 1);
    }
    let first = rig.create("one", &targets, true).await.unwrap();
    assert_eq!(first.checkpoint.as_ref().unwrap().as_str(), "one");
    assert!(
        first
            .warnings
            .iter()
            .any(|w| w.starts_with("vdb: the checkpoint ends when")),
        "{:?}",
        first.warnings
    );
    for target in targets {
        qemu.disk(target).fill(MIB, 64 * KIB, 2);
        qemu.disk(target).zero(2 * MIB, 64 * KIB);
    }
    // Without a checkpoint of its own: the bitmap goes on, and what it held at the instant is kept.
    rig.create("plain", &targets, false).await.unwrap();
    for target in targets {
        qemu.disk(target).fill(3 * MIB, 64 * KIB, 3);
    }
    rig.create("two", &targets, true).await.unwrap();
    for target in targets {
        qemu.disk(target).fill(5 * MIB, 128 * KIB, 4);
        qemu.disk(target).discard(MIB, 64 * KIB);
    }
    rig.create("three", &targets, true).await.unwrap();
    for target in targets {
        qemu.disk(target).fill(0, SIZE, 5);
        let base = rig.read("one", target).await;
        for (name, since, bytes) in [
            ("plain", "one", 128 * KIB),
            ("two", "one", 192 * KIB),
            ("three", "one", 320 * KIB),
            ("three", "two", 192 * KIB),
        ] {
            let changed = rig.changed(name, target, since).await.unwrap();
            // 7.2 lets a discard that a disk does not keep pass unseen: nothing changes then.
            assert!(
                length(&changed) <= bytes,
                "{version:?} {target}: {name} since {since}"
            );
            let before = if since == "one" {
                base.clone()
            } else {
                rig.read("two", target).await
            };
            assert_eq!(
                applied(before, &changed),
                rig.read(name, target).await,
                "{target}: {name} since {since}"
            );
        }
    }
    for name in ["plain", "one", "two", "three"] {
        rig.delete(name).await;
    }
    assert_eq!(
        rig.bitmaps().await,
        [
            format!("{}:one", qemu.format_node("vda")),
            format!("{}:three*", qemu.format_node("vda")),
            format!("{}:two", qemu.format_node("vda")),
            format!("{}:one", qemu.format_node("vdb")),
            format!("{}:three*", qemu.format_node("vdb")),
            format!("{}:two", qemu.format_node("vdb")),
        ]
    );
}

#[tokio::test]
async fn increments_are_exact_in_10_0() {
    increments_are_exact(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn increments_are_exact_in_7_2() {
    increments_are_exact(QemuVersion::V7_2).await;
}

/// Where what is opened has changed.
async fn at(opened: &Opened) -> Vec<std::ops::Range<u64>> {
    let changed = rig::changed_in(opened).await;
    changed.into_iter().map(|(range, _)| range).collect()
}

/// An exported bitmap cannot be exported a second time: each reader has one of its own.
async fn two_tell_at_once(version: QemuVersion) {
    let qemu = Qemu::builder()
        .version(version)
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"], true).await.unwrap();
    rig.delete("one").await;
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    let two = rig.create("two", &["vda"], true).await.unwrap();
    let (name, since) = (rig::name_of("two"), rig::checkpoint("one"));
    let open = async || {
        let opened = rig.dispatcher.open_since(&rig.domain, &name, "vda", &since).await;
        opened.unwrap()
    };
    let nodes = || qemu.qmp("query-named-block-nodes", serde_json::json!({"flat": true}));
    let before = nodes().as_array().unwrap().len();
    let (first, second) = (open().await, open().await);
    let piece = MIB..MIB + 64 * KIB;
    let expected = [piece];
    assert_eq!(
        [at(&first).await, at(&second).await],
        [expected.clone(), expected.clone()]
    );
    rig.dispatcher.close(&rig.domain, first).await.unwrap();
    let third = open().await;
    assert_eq!(
        [at(&second).await, at(&third).await],
        [expected.clone(), expected.clone()]
    );
    rig.dispatcher.close(&rig.domain, second).await.unwrap();
    assert_eq!(at(&third).await, expected);
    // And an export that was asked for, beside a reader's.
    let asked = BTreeMap::from([("vda", Some("one".to_owned()))]);
    let told = rig.tell(&two, &asked).await.unwrap();
    assert_eq!(told["vda"].changed, expected);
    rig.dispatcher.close(&rig.domain, third).await.unwrap();
    assert_eq!(nodes().as_array().unwrap().len(), before);
    let of_the_disk = |name: &String| name.starts_with(qemu.format_node("vda"));
    assert!(
        rig.bitmaps().await.iter().all(of_the_disk),
        "{:?}",
        rig.bitmaps().await
    );
}

#[tokio::test]
async fn two_tell_at_once_in_10_0() {
    two_tell_at_once(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn two_tell_at_once_in_7_2() {
    two_tell_at_once(QemuVersion::V7_2).await;
}

/// The guardian has let the guest go before the window takes back what it took: what is written then is not forgotten.
#[tokio::test]
async fn what_is_written_before_a_failed_window_is_undone_is_known() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"], true).await.unwrap();
    rig.delete("one").await;
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    let control = rig.control();
    let starts = [Start {
        disk: rig.domain.disks[0].clone(),
        top: None,
        starts: Some("two".to_owned()),
        recording: Some("one".to_owned()),
        copy: Some("copy".to_owned()),
    }];
    let mut batch = DirtyBitmaps.start(&*control, &starts).await.unwrap().unwrap();
    let take = Command::new(batch.execute, json!({ batch.list: batch.items }));
    control.monitor(take).await.unwrap();
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 2);
    batch.undo.reverse();
    for answer in control.monitor_each(batch.undo).await.unwrap() {
        answer.unwrap();
    }
    qemu.disk("vda").fill(3 * MIB, 64 * KIB, 3);
    DirtyBitmaps.abort(&*control, &starts).await.unwrap();
    qemu.disk("vda").fill(4 * MIB, 64 * KIB, 4);
    let node = qemu.format_node("vda");
    assert_eq!(rig.bitmaps().await, [format!("{node}:one*")]);
    rig.create("three", &["vda"], false).await.unwrap();
    let changed = rig.changed("three", "vda", "one").await.unwrap();
    assert_eq!(length(&changed), 256 * KIB, "{changed:?}");
}
