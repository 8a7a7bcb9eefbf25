//! What changed, told by snapshots that lie on this host, of a domain that is off: from the bitmaps in the image that is in the snapshot.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::path::Path;

use disksnap_test_support::{KIB, LoopFsKind, MIB, loop_fs, need};
use rig::{Rig, run};

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// What a running guest would do to its image, bitmaps and all.
fn write(image: &Path, offset: u64) {
    let command = format!("write {offset} 64k");
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", &command, image.to_str().unwrap()],
    );
}

/// Written and put back again: the bitmap is that of the image that is back.
#[tokio::test]
async fn of_a_clone_of_an_image_and_after_it_is_put_back() {
    need!("xfs", "qemu-img");
    let fs = loop_fs(LoopFsKind::Xfs, 320 * MIB, "");
    let image = fs.path().join("vda.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "16M"],
    );
    let rig = Rig::new(&format!(
        "<domain type='qemu'><name>off</name><uuid>{}</uuid><devices><disk type='file' device='disk'>\
         <driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
        uuid::Uuid::new_v4(),
        image.display()
    ))
    .await;
    let take = async |name: &str, checkpoint: bool| {
        let request = rig::by("reflink", rig::request(name, &["vda"], checkpoint));
        rig.dispatcher.create(&rig.domain, &request).await.unwrap()
    };
    take("a", true).await;
    write(&image, MIB);
    take("b", false).await;
    write(&image, 3 * MIB);
    let ranges = async |name: &str| {
        let changed = rig.changed(name, "vda", "a").await.unwrap();
        changed.into_iter().map(|(range, _)| range).collect::<Vec<_>>()
    };
    let piece = |offset: u64| offset..offset + 64 * KIB;
    assert_eq!(ranges("b").await, [piece(MIB)]);
    let reverted = rig.dispatcher.revert(&rig.domain, &rig::name_of("b"), &[]).await;
    reverted.unwrap();
    write(&image, 5 * MIB);
    take("c", false).await;
    assert_eq!(ranges("c").await, [piece(MIB), piece(5 * MIB)]);
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    assert!(validation.is_sound(), "{validation:?}");
}
