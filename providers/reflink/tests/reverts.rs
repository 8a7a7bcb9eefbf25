//! Clones put back, on XFS and on btrfs, with the domain off.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

#[path = "../../../image-file/testing/reverts.rs"]
mod reverts;
#[path = "../../../image-file/testing/rig.rs"]
mod rig;

use std::fs;

use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_core::ErrorKind;
use disksnap_reflink::Reflink;
use disksnap_test_support::{LoopFs, LoopFsKind, loop_fs, need};
use rig::{Rig, disk, file, is_full_of, raw};

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

fn xfs() -> LoopFs {
    loop_fs(LoopFsKind::Xfs, 512 << 20, "")
}

#[tokio::test]
async fn clones_are_put_back_in_any_order() {
    need!("xfs", "btrfs");
    reverts::back_and_forth(Reflink, xfs().path()).await;
    let btrfs = loop_fs(LoopFsKind::Btrfs, 512 << 20, "");
    reverts::back_and_forth(Reflink, btrfs.path()).await;
    reverts::a_nocow_image_is_put_back(Reflink, btrfs.path()).await;
}

#[tokio::test]
async fn an_image_keeps_its_attributes() {
    need!("xfs");
    reverts::attributes_are_kept(Reflink, xfs().path()).await;
}

#[tokio::test]
async fn a_killed_revert_is_finished() {
    need!("xfs");
    reverts::a_killed_revert_is_finished(Reflink, xfs().path()).await;
}

#[tokio::test]
async fn an_image_in_use_is_not_replaced() {
    need!("xfs", "qemu-system-x86_64");
    let fs = xfs();
    reverts::an_image_in_use_is_not_replaced(Reflink, fs.path()).await;
    reverts::a_running_domain_is_left_alone(Reflink, fs.path()).await;
}

#[tokio::test]
async fn another_image_stands_against_it() {
    need!("xfs");
    reverts::another_image_stands_against_it(Reflink, xfs().path()).await;
}

#[tokio::test]
async fn a_clone_that_was_tampered_with_is_not_put_back() {
    need!("xfs");
    let fs = xfs();
    let image = raw(&fs.path().join("a.raw"), 1);
    let rig = Rig::off(Reflink, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    raw(&image, 2);
    let clone = file(&snapshot, "vda");
    fs::remove_file(&clone).unwrap();
    assert_eq!(rig.revert(&snapshot).await.unwrap_err().kind(), ErrorKind::Broken);
    raw(&clone, 3);
    assert_eq!(rig.revert(&snapshot).await.unwrap_err().kind(), ErrorKind::Broken);
    assert!(is_full_of(&image, 2));
}
