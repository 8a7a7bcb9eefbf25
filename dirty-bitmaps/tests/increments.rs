//! What changed since a checkpoint, told of a real QEMU: increments applied to what was before give the snapshot.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion};
use rig::Rig;

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
