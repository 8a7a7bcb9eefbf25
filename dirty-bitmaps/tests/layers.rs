//! Checkpoints across external snapshots: the changes of one lie in several layers, and are told as one.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::ops::Range;
use std::task::Poll;

use disksnap_core::{Disk, ErrorKind, MergeOptions, SnapshotRequest};
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuVersion};
use rig::Rig;

const SIZE: u64 = 8 * MIB;
const STEP: u64 = 64 * KIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

fn external(name: &str, checkpoint: bool) -> SnapshotRequest {
    rig::by("qemu-external-qcow2", rig::request(name, &["vda"], checkpoint))
}

async fn ranges(rig: &Rig, name: &str, since: &str) -> Vec<Range<u64>> {
    let changed = rig.changed(name, "vda", since).await.unwrap();
    changed.into_iter().map(|(range, _)| range).collect()
}

/// The pieces of the disk with these numbers.
fn pieces(numbers: &[u64]) -> Vec<Range<u64>> {
    numbers.iter().map(|n| n * MIB..n * MIB + STEP).collect()
}

fn write(qemu: &Qemu, number: u64) {
    qemu.disk("vda")
        .fill(number * MIB, STEP, 1 + u8::try_from(number).unwrap());
}

#[tokio::test]
async fn changes_are_told_across_layers_and_after_merges_and_removals() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("a", &["vda"], true).await.unwrap();
    rig.delete("a").await;
    write(&qemu, 1);
    let one = rig
        .dispatcher
        .create(&rig.domain, &external("one", true))
        .await
        .unwrap();
    rig.follow(&one);
    write(&qemu, 2);
    let two = rig
        .dispatcher
        .create(&rig.domain, &external("two", false))
        .await
        .unwrap();
    rig.follow(&two);
    write(&qemu, 3);
    // The snapshots that lie on this host tell it from the bitmaps in their own layers.
    assert_eq!(ranges(&rig, "one", "a").await, pieces(&[1]));
    assert_eq!(ranges(&rig, "two", "a").await, pieces(&[1, 2]));
    assert_eq!(ranges(&rig, "two", "one").await, pieces(&[2]));
    rig.create("now", &["vda"], true).await.unwrap();
    assert_eq!(ranges(&rig, "now", "a").await, pieces(&[1, 2, 3]));
    assert_eq!(ranges(&rig, "now", "one").await, pieces(&[2, 3]));
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    assert!(validation.is_sound(), "{validation:?}");
    rig.delete("now").await;
    // One in the middle, whose bitmap is in two layers and whose heir's is below them.
    let name = rig::checkpoint("one");
    rig.dispatcher
        .remove_checkpoint(&rig.domain, &name)
        .await
        .unwrap();
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    assert!(validation.is_sound(), "{validation:?}");
    write(&qemu, 4);
    rig.create("later", &["vda"], false).await.unwrap();
    assert_eq!(ranges(&rig, "later", "a").await, pieces(&[1, 2, 3, 4]));
    assert_eq!(ranges(&rig, "later", "now").await, pieces(&[4]));
    rig.delete("later").await;
    for name in ["one", "two"] {
        merge(&mut rig, name).await;
        let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
        assert!(validation.is_sound(), "after the merge of {name}: {validation:?}");
    }
    write(&qemu, 5);
    rig.create("last", &["vda"], false).await.unwrap();
    assert_eq!(ranges(&rig, "last", "a").await, pieces(&[1, 2, 3, 4, 5]));
    assert_eq!(ranges(&rig, "last", "now").await, pieces(&[4, 5]));
}

/// What a checkpoint's bitmap is in a layer below: opened for writing for a moment, and read-only afterwards.
#[tokio::test]
async fn the_last_one_is_removed_although_its_heir_is_below() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("a", &["vda"], true).await.unwrap();
    rig.delete("a").await;
    write(&qemu, 1);
    rig.create("b", &["vda"], true).await.unwrap();
    rig.delete("b").await;
    write(&qemu, 2);
    let one = rig
        .dispatcher
        .create(&rig.domain, &external("one", false))
        .await
        .unwrap();
    rig.follow(&one);
    write(&qemu, 3);
    let name = rig::checkpoint("b");
    rig.dispatcher
        .remove_checkpoint(&rig.domain, &name)
        .await
        .unwrap();
    write(&qemu, 4);
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    assert!(validation.is_sound(), "{validation:?}");
    rig.create("now", &["vda"], false).await.unwrap();
    assert_eq!(ranges(&rig, "now", "a").await, pieces(&[1, 2, 3, 4]));
    assert_eq!(ranges(&rig, "one", "a").await, pieces(&[1, 2]));
}

/// The overlay is made while the domain is off, and the bitmap goes on in it.
#[tokio::test]
async fn an_overlay_made_while_the_domain_is_off_goes_on_recording() {
    for checkpoint in [false, true] {
        let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
        let mut rig = Rig::new(&qemu.domain_xml()).await;
        rig.create("a", &["vda"], true).await.unwrap();
        rig.delete("a").await;
        write(&qemu, 1);
        qemu.quit();
        let one = rig
            .dispatcher
            .create(&rig.domain, &external("one", checkpoint))
            .await
            .unwrap();
        rig.follow(&one);
        let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
        assert!(validation.is_sound(), "{validation:?}");
        let names: Vec<&str> = validation
            .marks
            .iter()
            .map(|mark| mark.checkpoint.as_str())
            .collect();
        assert_eq!(names, if checkpoint { vec!["a", "one"] } else { vec!["a"] });
    }
}

/// Merges a snapshot into its base, and follows the disk.
async fn merge(rig: &mut Rig, name: &str) {
    let mut on = |_: &[disksnap_core::JobUnit]| std::ops::ControlFlow::Continue(());
    let name = rig::name_of(name);
    let altered = rig
        .dispatcher
        .merge(&rig.domain, &name, &MergeOptions::default(), &mut on)
        .await
        .unwrap();
    let disks: Vec<Disk> = altered.disks;
    rig.stand_on(&disks);
}

/// Left at any moment after its instant, as by a kill, and taken back: the bitmap before goes on, and knows what was
/// written meanwhile.
#[tokio::test]
async fn a_create_that_is_taken_back_lets_the_bitmap_before_go_on() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("a", &["vda"], true).await.unwrap();
    rig.delete("a").await;
    let is_taken = || {
        let nodes = qemu.qmp("query-named-block-nodes", serde_json::json!({"flat": true}));
        nodes.to_string().contains("\"name\":\"one\"")
    };
    let mut taken_back = 0;
    loop {
        let request = external("one", true);
        let create = rig.dispatcher.create(&rig.domain, &request);
        match until(is_taken, taken_back, create).await {
            None => {}
            // The one before was left when all was done.
            Some(Err(error)) if error.kind() == ErrorKind::AlreadyExists => break,
            Some(created) => {
                rig.follow(&created.unwrap());
                break;
            }
        }
        write(&qemu, 2);
        rig.dispatcher.recover(None).await.unwrap();
        write(&qemu, 3);
        let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
        assert!(validation.is_sound(), "the {taken_back}th: {validation:?}");
        rig.create("now", &["vda"], false).await.unwrap();
        assert_eq!(ranges(&rig, "now", "a").await, pieces(&[2, 3]));
        rig.delete("now").await;
        taken_back += 1;
    }
    assert!(taken_back > 0, "no create was left after its instant");
}

/// What a future gives when it is asked only so often more after something is so.
async fn until<T>(is_so: impl Fn() -> bool, more: usize, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut since) = (std::pin::pin!(future), None);
    std::future::poll_fn(move |context| match future.as_mut().poll(context) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => {
            since = match since {
                Some(asked) => Some(asked + 1),
                None => is_so().then_some(0),
            };
            if since == Some(more) {
                Poll::Ready(None)
            } else {
                Poll::Pending
            }
        }
    })
    .await
}

/// The overlay is larger than what it lies on: what the smaller bitmaps know is told, and handed over.
#[tokio::test]
async fn a_disk_may_grow_between_its_layers() {
    for version in [QemuVersion::V10_0, QemuVersion::V7_2] {
        let qemu = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new("vda", SIZE).qcow2())
            .start();
        let mut rig = Rig::new(&qemu.domain_xml()).await;
        for (number, name) in [(1, "a"), (2, "b"), (3, "c")] {
            rig.create(name, &["vda"], true).await.unwrap();
            rig.delete(name).await;
            write(&qemu, number);
        }
        let request = external("one", false);
        let one = rig.dispatcher.create(&rig.domain, &request).await.unwrap();
        rig.follow(&one);
        let drives = qemu.qmp("query-block", serde_json::json!({}));
        let node = &drives[0]["inserted"]["node-name"];
        let resize = serde_json::json!({ "node-name": node, "size": SIZE + 2 * MIB + STEP });
        qemu.qmp("block_resize", resize);
        write(&qemu, 10);
        rig.create("now", &["vda"], false).await.unwrap();
        assert_eq!(
            ranges(&rig, "now", "a").await,
            pieces(&[1, 2, 3, 10]),
            "{version:?}"
        );
        assert_eq!(ranges(&rig, "now", "b").await, pieces(&[2, 3, 10]), "{version:?}");
        rig.delete("now").await;
        let before = rig.bitmaps().await.len();
        let remove = async |name: &str| {
            let name = rig::checkpoint(name);
            rig.dispatcher.remove_checkpoint(&rig.domain, &name).await
        };
        remove("b").await.unwrap();
        // The heir's share is in the top layer now, and nothing else was left behind.
        assert_eq!(rig.bitmaps().await.len(), before + 1, "{:?}", rig.bitmaps().await);
        let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
        assert!(validation.is_sound(), "{validation:?}");
        write(&qemu, 4);
        rig.create("later", &["vda"], false).await.unwrap();
        assert_eq!(
            ranges(&rig, "later", "a").await,
            pieces(&[1, 2, 3, 4, 10]),
            "{version:?}"
        );
        assert_eq!(
            ranges(&rig, "later", "c").await,
            pieces(&[3, 4, 10]),
            "{version:?}"
        );
        rig.delete("later").await;
        // Off, it cannot be done, and nothing is touched.
        qemu.quit();
        let error = remove("c").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
        assert!(validation.is_sound(), "{validation:?}");
    }
}
