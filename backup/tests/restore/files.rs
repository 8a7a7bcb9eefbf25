//! New files: whole and durable under their name, or not there.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use disksnap_backup::{Compression, ErrorKind, Silent, Target, restore_disk};
use disksnap_test_support::{need, small_fs};

use crate::rig::{Saved, StopAfter, content_digest, names_in, reads_as, run, text};

fn raw(saved: &Saved, sparse: bool) -> Target {
    Target::Raw {
        path: saved.path("out"),
        sparse,
    }
}

fn qcow2(saved: &Saved, compression: Compression) -> Target {
    Target::Qcow2 {
        path: saved.path("out"),
        compression,
    }
}

#[tokio::test]
async fn every_point_in_every_form() {
    let saved = Saved::new().await;
    let targets = [
        raw(&saved, true),
        raw(&saved, false),
        qcow2(&saved, Compression::None),
        qcow2(&saved, Compression::Zstd(1)),
    ];
    for n in 0..saved.points.len() {
        for target in &targets {
            let (chain, disk) = saved.chain(n).await;
            let restored = restore_disk(chain, disk, target, false, &Silent).await.unwrap();
            assert_eq!(restored.digest, content_digest(&saved.contents[n]));
            assert_eq!(restored.bytes, disk.size);
            assert_eq!(restored.notes, [""; 0]);
            let (out, format) = match target {
                Target::Qcow2 { path, .. } => (path, "qcow2"),
                Target::Raw { path, .. } => (path, "raw"),
                _ => unreachable!(),
            };
            reads_as(out, format, &saved.contents[n]);
            let about = out.metadata().unwrap();
            assert_eq!(about.mode() & 0o777, 0o600);
            let room = about.blocks() * 512;
            match target {
                Target::Raw { sparse: false, .. } => assert!(room >= disk.size, "{room}"),
                Target::Raw { .. } => assert!(room < disk.size, "{room}"),
                _ => {
                    run("qemu-img", &["check", "-q", text(out)]);
                    assert!(!run("qemu-img", &["info", text(out)]).contains("backing"));
                }
            }
            std::fs::remove_file(out).unwrap();
        }
        assert_eq!(names_in(saved.dir.path()), ["repository"]);
    }
}

#[tokio::test]
async fn what_exists_is_never_overwritten() {
    let saved = Saved::new().await;
    std::fs::write(saved.path("out"), "mine").unwrap();
    for target in [raw(&saved, true), qcow2(&saved, Compression::None)] {
        // `overwrite` is for devices and exports alone.
        for overwrite in [false, true] {
            let (chain, disk) = saved.chain(0).await;
            let error = restore_disk(chain, disk, &target, overwrite, &Silent)
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
            assert_eq!(std::fs::read_to_string(saved.path("out")).unwrap(), "mine");
        }
    }
    assert_eq!(names_in(saved.dir.path()), ["out", "repository"]);
}

/// Somebody takes the name while the disk is being restored.
#[tokio::test]
async fn nor_what_comes_to_exist_meanwhile() {
    #[derive(Debug)]
    struct Taker(std::path::PathBuf);
    impl disksnap_backup::Watcher for Taker {
        fn event(&self, _: &disksnap_backup::Event<'_>) {
            std::fs::write(&self.0, "mine").unwrap();
        }
        fn stop(&self) -> bool {
            false
        }
    }
    let saved = Saved::new().await;
    for target in [raw(&saved, true), qcow2(&saved, Compression::None)] {
        let (chain, disk) = saved.chain(0).await;
        let taker = Taker(saved.path("out"));
        let error = restore_disk(chain, disk, &target, false, &taker)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert_eq!(std::fs::read_to_string(saved.path("out")).unwrap(), "mine");
        std::fs::remove_file(saved.path("out")).unwrap();
        assert_eq!(names_in(saved.dir.path()), ["repository"]);
    }
}

#[tokio::test]
async fn a_flipped_bit_is_found_and_nothing_has_the_name() {
    let saved = Saved::new().await;
    saved.damage();
    for target in [raw(&saved, false), qcow2(&saved, Compression::None)] {
        let (chain, disk) = saved.chain(0).await;
        let error = restore_disk(chain, disk, &target, false, &Silent)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
        assert!(error.to_string().contains("disk vda"), "{error}");
        assert_eq!(names_in(saved.dir.path()), ["repository"], "{error}");
    }
}

#[tokio::test]
async fn a_manifest_of_another_content_is_found() {
    let saved = Saved::new().await;
    let (chain, disk) = saved.chain(1).await;
    let mut wrong = disk.clone();
    wrong.content = saved.points[0].disks[0].content;
    let error = restore_disk(chain, &wrong, &raw(&saved, true), false, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    let (chain, _) = saved.chain(1).await;
    wrong.size += 512;
    let error = restore_disk(chain, &wrong, &raw(&saved, true), false, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(names_in(saved.dir.path()), ["repository"]);
}

#[tokio::test]
async fn stopped_it_leaves_nothing() {
    let saved = Saved::new().await;
    for target in [raw(&saved, true), qcow2(&saved, Compression::None)] {
        let (chain, disk) = saved.chain(2).await;
        let watcher = StopAfter(1 << 20, AtomicU64::new(0));
        let error = restore_disk(chain, disk, &target, false, &watcher)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert_eq!(names_in(saved.dir.path()), ["repository"]);
    }
}

/// Whoever waits for it goes away.
#[tokio::test]
async fn dropped_it_leaves_nothing() {
    let saved = Saved::new().await;
    for target in [raw(&saved, false), qcow2(&saved, Compression::Zstd(9))] {
        let (chain, disk) = saved.chain(2).await;
        let restoring = restore_disk(chain, disk, &target, false, &Silent);
        let dropped = tokio::time::timeout(Duration::from_millis(3), restoring).await;
        // Where it was quicker than that, it is there as a whole.
        if dropped.is_ok() {
            std::fs::remove_file(saved.path("out")).unwrap();
        }
        for _ in 0..6000 {
            if names_in(saved.dir.path()) == ["repository"] {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(names_in(saved.dir.path()), ["repository"]);
    }
}

#[tokio::test]
async fn without_room_nothing_has_the_name() {
    need!("small-fs");
    let saved = Saved::new().await;
    let small = small_fs(1 << 20);
    let out = small.path().join("out");
    let targets = [
        Target::Raw {
            path: out.clone(),
            sparse: true,
        },
        Target::Raw {
            path: out.clone(),
            sparse: false,
        },
        Target::Qcow2 {
            path: out,
            compression: Compression::None,
        },
    ];
    for target in targets {
        let (chain, disk) = saved.chain(0).await;
        let error = restore_disk(chain, disk, &target, false, &Silent)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{target:?}: {error:?}");
        assert_eq!(names_in(small.path()), [""; 0], "{target:?}");
    }
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_named() {
    let saved = Saved::new().await;
    let path = saved.path("not/here");
    for target in [
        Target::Raw {
            path: path.clone(),
            sparse: true,
        },
        Target::Qcow2 {
            path: path.clone(),
            compression: Compression::None,
        },
    ] {
        let (chain, disk) = saved.chain(0).await;
        let error = restore_disk(chain, disk, &target, false, &Silent)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(error.to_string().contains("not/here"), "{error}");
    }
}
