//! Snapshots put back: each image and nothing else, also after a kill, with the domain off.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

#[path = "../../../image-file/testing/reverts.rs"]
mod reverts;
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use disksnap_btrfs::Btrfs;
use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_core::ErrorKind;
use disksnap_test_support::need;
use support::rig::{self, Rig, disk, file, is_full_of, named, qemu_img, raw};
use support::{btrfs, create, delete, snapshots};

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

#[tokio::test]
async fn snapshots_are_put_back_in_any_order() {
    need!("btrfs");
    let fs = btrfs();
    reverts::back_and_forth(Btrfs, &create(&fs.path().join("images"))).await;
}

#[tokio::test]
async fn an_image_keeps_its_attributes() {
    need!("btrfs");
    let fs = btrfs();
    reverts::attributes_are_kept(Btrfs, &create(&fs.path().join("images"))).await;
    reverts::a_nocow_image_is_put_back(Btrfs, &create(&fs.path().join("nocow"))).await;
}

#[tokio::test]
async fn a_killed_revert_is_finished() {
    need!("btrfs");
    let fs = btrfs();
    reverts::a_killed_revert_is_finished(Btrfs, &create(&fs.path().join("images"))).await;
}

#[tokio::test]
async fn an_image_in_use_is_not_replaced() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    reverts::an_image_in_use_is_not_replaced(Btrfs, &create(&fs.path().join("images"))).await;
    reverts::a_running_domain_is_left_alone(Btrfs, &create(&fs.path().join("running"))).await;
}

#[tokio::test]
async fn another_image_stands_against_it() {
    need!("btrfs");
    let fs = btrfs();
    reverts::another_image_stands_against_it(Btrfs, &create(&fs.path().join("images"))).await;
}

/// Another domain's image, a subvolume in the subvolume and a file beside are as they have become.
#[tokio::test]
async fn nothing_but_the_images_goes_back() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let nested = create(&images.join("nested"));
    let mine = [raw(&images.join("a.raw"), 1), raw(&nested.join("b.raw"), 2)];
    let others = [images.join("other.raw"), nested.join("other.raw")];
    for other in &others {
        raw(other, 3);
    }
    fs::write(images.join("doomed"), b"").unwrap();
    let rig = Rig::off(
        Btrfs,
        vec![disk("vda", "raw", &mine[0]), disk("vdb", "raw", &mine[1])],
    );
    let snapshot = rig.create("one").await;
    for image in mine.iter().chain(&others) {
        raw(image, 9);
    }
    fs::remove_file(images.join("doomed")).unwrap();
    fs::write(images.join("born"), b"").unwrap();

    rig.revert(&snapshot).await.unwrap();
    assert!(is_full_of(&mine[0], 1) && is_full_of(&mine[1], 2));
    assert!(others.iter().all(|other| is_full_of(other, 9)));
    let names = reverts::names(&images);
    let left: Vec<&String> = names.iter().filter(|name| !name.ends_with(".snapshot")).collect();
    assert_eq!(left, ["a.raw", "born", "nested", "other.raw"]);
    assert_eq!(nested.metadata().unwrap().ino(), 256, "still a subvolume");
    assert_eq!(snapshots(fs.path()).len(), 2);
    rig.delete("one").await;
}

/// The top of a file system is a mount point, and cannot be replaced; what is in it can.
#[tokio::test]
async fn images_at_the_top_of_a_file_system_go_back() {
    need!("btrfs");
    let fs = btrfs();
    let image = raw(&fs.path().join("a.raw"), 1);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    raw(&image, 2);
    rig.revert(&snapshot).await.unwrap();
    assert!(is_full_of(&image, 1));
    rig.delete("one").await;
    assert_eq!(reverts::names(fs.path()), ["a.raw"]);
}

fn inode(path: &Path) -> u64 {
    path.metadata().unwrap().ino()
}

/// A base that nobody wrote to is left alone; one that was committed to goes back with what stands on it.
#[tokio::test]
async fn a_chain_goes_back_as_one() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let (base, top) = (raw(&images.join("base.raw"), 1), images.join("top.qcow2"));
    let overlay = |name: &str| {
        let create = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", name];
        qemu_img(&create, &images).unwrap();
    };
    overlay("top.qcow2");
    overlay("new.qcow2");
    let rig = Rig::off(Btrfs, vec![named(disk("vda", "qcow2", &top))]);
    let snapshot = rig.create("one").await;
    let content = fs::read(&top).unwrap();

    let was = inode(&base);
    fs::copy(images.join("new.qcow2"), &top).unwrap();
    assert_eq!(rig.revert(&snapshot).await.unwrap(), Vec::<String>::new());
    assert_eq!((fs::read(&top).unwrap() == content, inode(&base)), (true, was));

    // What was written through the overlay, and committed into the base.
    fs::write(images.join("two.raw"), vec![2; 1 << 20]).unwrap();
    let write = [
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "two.raw",
        "top.qcow2",
    ];
    qemu_img(&write, &images).unwrap();
    qemu_img(&["commit", "-q", "top.qcow2"], &images).unwrap();
    assert!(is_full_of(&base, 2));
    let warnings = rig.revert(&snapshot).await.unwrap();
    assert!(
        warnings.len() == 1 && warnings[0].contains("base.raw has changed since"),
        "{warnings:?}"
    );
    assert!(is_full_of(&base, 1) && fs::read(&top).unwrap() == content);
    rig.delete("one").await;
}

#[tokio::test]
async fn a_snapshot_that_is_no_more_one_is_not_put_back() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = raw(&images.join("a.raw"), 1);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    raw(&image, 2);
    delete(file(&snapshot, "vda").parent().unwrap());
    let error = rig.revert(&snapshot).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(is_full_of(&image, 2) && reverts::names(&images) == ["a.raw"]);
}
