//! Images with backing files: taken where the snapshot holds every layer as a reader finds it, else refused.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use disksnap_btrfs::Btrfs;
use disksnap_core::{ErrorKind, Fit};
use disksnap_test_support::need;
use support::rig::{Rig, disk, file, is_full_of, named, over, qemu_img, raw};
use support::{btrfs, create};

/// An overlay in `dir` over `base`, by that name.
fn overlay(dir: &Path, name: &str, base: &str) {
    let format = if Path::new(base).extension().is_some_and(|x| x == "raw") {
        "raw"
    } else {
        "qcow2"
    };
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-b", base, "-F", format, name],
        dir,
    )
    .unwrap();
}

#[tokio::test]
async fn a_chain_inside_the_subvolume_is_taken_whole() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    fs::create_dir(images.join("bases")).unwrap();
    let base = raw(&images.join("bases/base.raw"), 1);
    overlay(&images, "middle.qcow2", "bases/base.raw");
    overlay(&images, "top.qcow2", "./middle.qcow2");
    let top = disk("vda", "qcow2", &images.join("top.qcow2"));
    // With the domain off what only a header names is not trusted, on whichever layer.
    for disk in [top.clone(), over(top.clone(), &images.join("middle.qcow2"))] {
        let rig = Rig::off(Btrfs, vec![disk]);
        assert!(rig.unfit(&[]).await.contains("the domain's document does not"));
    }
    {
        raw(&base, 1);
        let rig = Rig::off(Btrfs, vec![named(top)]);
        assert_eq!(rig.probe(&[]).await[0].fit, Fit::Possible);
        let snapshot = rig.create("whole").await;
        raw(&base, 2);
        let (from, to) = (file(&snapshot, "vda"), rig.dir.path().join("read.raw"));
        let arguments = [
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            from.to_str().unwrap(),
            to.to_str().unwrap(),
        ];
        qemu_img(&arguments, rig.dir.path()).unwrap();
        assert!(
            is_full_of(&to, 1),
            "the snapshot reads its own base, not the live one"
        );
        rig.delete("whole").await;
    }
}

#[tokio::test]
async fn a_chain_that_would_read_a_live_file_is_refused() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let (images, bases) = (
        create(&fs.path().join("images")),
        create(&fs.path().join("bases")),
    );
    let inside = raw(&images.join("base.raw"), 1);
    raw(&bases.join("base.raw"), 1);
    symlink(&inside, images.join("link.raw")).unwrap();
    let cases = [
        ("absolute.qcow2", inside.to_str().unwrap(), "not relative"),
        ("outside.qcow2", "../bases/base.raw", "another subvolume"),
        ("link.qcow2", "link.raw", "symbolic link"),
    ];
    for (name, base, why) in cases {
        overlay(&images, name, base);
        let rig = Rig::off(Btrfs, vec![disk("vda", "qcow2", &images.join(name))]);
        let said = rig.unfit(&[]).await;
        assert!(said.contains(why), "{name}: {said}");
        let error = rig.try_create("bad", &[]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}: {error}");
    }
    // A layer further down, which the top's own header does not name.
    overlay(&images, "above.qcow2", "absolute.qcow2");
    let deep = Rig::off(Btrfs, vec![disk("vda", "qcow2", &images.join("above.qcow2"))]);
    assert!(deep.unfit(&[]).await.contains("not relative"));
    assert_eq!(fs::read_dir(fs.path()).unwrap().count(), 2);
}

#[tokio::test]
async fn a_document_that_tells_another_chain_is_refused() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let (base, other) = (
        raw(&images.join("base.raw"), 1),
        raw(&images.join("other.raw"), 2),
    );
    overlay(&images, "top.qcow2", "base.raw");
    let top = disk("vda", "qcow2", &images.join("top.qcow2"));
    let differs = Rig::off(Btrfs, vec![over(top, &other)]);
    assert!(differs.unfit(&[]).await.contains("other.raw"));
    let alone = Rig::off(Btrfs, vec![over(disk("vda", "raw", &base), &other)]);
    assert!(alone.unfit(&[]).await.contains("read without it"));

    // By a link in another directory, QEMU would look for the base there.
    let links = tempfile::tempdir().unwrap();
    symlink(images.join("top.qcow2"), links.path().join("top.qcow2")).unwrap();
    let linked = Rig::off(Btrfs, vec![disk("vda", "qcow2", &links.path().join("top.qcow2"))]);
    assert!(linked.unfit(&[]).await.contains("by its own path"));
    symlink(&base, links.path().join("base.raw")).unwrap();
    let without_chain = Rig::off(Btrfs, vec![disk("vda", "raw", &links.path().join("base.raw"))]);
    assert_eq!(without_chain.probe(&[]).await[0].fit, Fit::Possible);
}

#[tokio::test]
async fn data_in_another_file_is_refused() {
    need!("btrfs", "qemu-img");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    qemu_img(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=data",
            "top.qcow2",
            "1M",
        ],
        &images,
    )
    .unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "qcow2", &images.join("top.qcow2"))]);
    assert!(rig.unfit(&[]).await.contains("its data in another file"));
}
