//! What the method makes of subvolumes: which one, where its snapshot goes, who may delete it, what is refused.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use disksnap_btrfs::Btrfs;
use disksnap_core::{Capability, DiskSnapshot, ErrorKind, Fit, Health, SnapshotId};
use disksnap_test_support::{LoopFsKind, loop_fs, need, skip};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use support::rig::{Rig, disk, file, is_full_of, raw};
use support::{btrfs, create, delete, run, snapshots};

#[tokio::test]
async fn disks_in_one_subvolume_share_one_snapshot() {
    need!("btrfs");
    let fs = btrfs();
    let (one, other) = (create(&fs.path().join("one")), create(&fs.path().join("other")));
    fs::create_dir(one.join("deep")).unwrap();
    let images = [one.join("a.raw"), one.join("deep/b.raw"), other.join("c.raw")];
    let targets = ["vda", "vdb", "vdc"];
    let disks = (1..)
        .zip(&images)
        .map(|(n, image)| disk(targets[usize::from(n) - 1], "raw", &raw(image, n)));
    let rig = Rig::off(Btrfs, disks.collect());

    let probes = rig.probe(&[]).await;
    assert_eq!(probes[0].unit, probes[1].unit);
    assert_ne!(probes[0].unit, probes[2].unit);
    let first = rig.create("first").await;
    assert_eq!((first.units.len(), snapshots(fs.path()).len()), (2, 2));
    for image in &images {
        raw(image, 9);
    }
    let second = rig.create("second").await;
    assert_eq!(snapshots(fs.path()).len(), 4);
    for (n, target) in (1..).zip(targets) {
        assert!(is_full_of(&file(&first, target), n), "{target}");
        assert!(is_full_of(&file(&second, target), 9), "{target}");
    }

    rig.delete("first").await;
    assert_eq!(
        snapshots(fs.path()).len(),
        2,
        "deleted with its two units, and nothing else"
    );
    assert!(is_full_of(&file(&second, "vda"), 9));
    rig.delete("second").await;
    assert_eq!(snapshots(fs.path()), Vec::<String>::new());
    assert_eq!(
        fs::read_dir(fs.path()).unwrap().count(),
        2,
        "only the two subvolumes are left"
    );
}

#[tokio::test]
async fn the_innermost_subvolume_is_taken() {
    need!("btrfs");
    let fs = btrfs();
    let outer = create(&fs.path().join("outer"));
    let inner = create(&outer.join("inner"));
    raw(&outer.join("not-mine.raw"), 7);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &raw(&inner.join("a.raw"), 1))]);
    let snapshot = rig.create("inner").await;
    let taken = file(&snapshot, "vda");
    assert!(
        taken.starts_with(&outer),
        "beside the inner, in the outer: {}",
        taken.display()
    );
    assert!(is_full_of(&taken, 1));
    assert!(!taken.with_file_name("not-mine.raw").exists());
    rig.delete("inner").await;
    assert_eq!(fs::read_dir(&outer).unwrap().count(), 2);
}

#[tokio::test]
async fn the_top_of_a_mounted_file_system_is_a_subvolume_too() {
    need!("btrfs");
    let fs = btrfs();
    let image = raw(&fs.path().join("a.raw"), 1);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let (first, second) = (rig.create("first").await, rig.create("second").await);
    raw(&image, 2);
    for snapshot in [&first, &second] {
        let taken = file(snapshot, "vda");
        assert!(
            taken.starts_with(fs.path()),
            "in it, since beside it is another file system"
        );
        assert!(is_full_of(&taken, 1));
    }
    rig.delete("first").await;
    rig.delete("second").await;
    assert_eq!(fs::read_dir(fs.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn the_snapshot_goes_where_the_caller_says() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let (a, b) = (raw(&images.join("a.raw"), 1), raw(&images.join("b.raw"), 2));
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &a), disk("vdb", "raw", &b)]);
    let there = create(&fs.path().join("snaps"));
    let there = there.to_str().unwrap();
    let snapshot = rig.try_create("there", &[("snapshot.dir", there)]).await.unwrap();
    assert_eq!(snapshot.units.len(), 1);
    assert!(file(&snapshot, "vdb").starts_with(there));
    rig.delete("there").await;
    assert_eq!(fs::read_dir(there).unwrap().count(), 0);

    let elsewhere = rig.dir.path().to_str().unwrap();
    let bad = [
        ("relative", "absolute"),
        (elsewhere, "not on the file system"),
        (a.to_str().unwrap(), "is not a directory"),
        ("/nowhere/at/all", "is not a directory"),
    ];
    for (dir, why) in bad {
        let said = rig
            .unfit(&[&[("snapshot.dir", dir)], &[("snapshot.dir", dir)]])
            .await;
        assert!(said.contains(why), "{dir}: {said}");
        let error = rig.try_create("bad", &[("snapshot.dir", dir)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{dir}: {error}");
    }
    let two = [("snapshot.dir", there)];
    let said = rig
        .unfit(&[&two, &[("snapshot.dir", fs.path().to_str().unwrap())]])
        .await;
    assert!(said.contains("share one snapshot"), "{said}");
    let one_said = rig.probe(&[&[], &two]).await;
    assert!(
        one_said.iter().all(|probe| probe.fit == Fit::Possible),
        "{one_said:?}"
    );
    assert_eq!(
        fs::read_dir(fs.path()).unwrap().count(),
        2,
        "nothing left of what was refused"
    );
}

#[tokio::test]
async fn a_nocow_image_keeps_its_content_too() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = images.join("a.raw");
    let made = fs::File::create(&image).unwrap();
    ioctl_setflags(&made, ioctl_getflags(&made).unwrap() | IFlags::NOCOW).unwrap();
    raw(&image, 1);
    assert!(ioctl_getflags(&made).unwrap().contains(IFlags::NOCOW));
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("nocow").await;
    raw(&image, 2);
    assert!(is_full_of(&file(&snapshot, "vda"), 1));
    rig.delete("nocow").await;
}

#[tokio::test]
async fn what_is_not_in_a_subvolume_is_refused() {
    need!("btrfs");
    let fs = btrfs();
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = Rig::off(
        Btrfs,
        vec![disk("vda", "raw", &raw(&dir.path().join("a.raw"), 1))],
    );
    let said = elsewhere.unfit(&[]).await;
    assert!(said.contains("not on btrfs"), "{said}");

    let missing = Rig::off(Btrfs, vec![disk("vda", "raw", &fs.path().join("missing.raw"))]);
    assert!(missing.unfit(&[]).await.contains("cannot find"));
    let no_file = Rig::off(Btrfs, vec![disk("vda", "raw", fs.path())]);
    assert!(no_file.unfit(&[]).await.contains("is not a file"));
    let not_qcow2 = Rig::off(
        Btrfs,
        vec![disk("vda", "qcow2", &raw(&fs.path().join("a.raw"), 1))],
    );
    assert!(not_qcow2.unfit(&[]).await.contains("does not begin as a qcow2"));
    let other = Rig::off(Btrfs, vec![disk("vda", "vmdk", &fs.path().join("a.raw"))]);
    assert!(other.unfit(&[]).await.contains("vmdk"));
    let odd = Rig::off(Btrfs, vec![disk("../../vda", "raw", &fs.path().join("a.raw"))]);
    assert!(odd.unfit(&[]).await.contains("file name"));
}

/// A bind mount that goes with the test.
struct Bound<'a>(&'a Path);

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn a_subvolume_whose_root_is_not_mounted_is_refused() {
    need!("btrfs");
    let fs = btrfs();
    let (images, dir) = (create(&fs.path().join("images")), tempfile::tempdir().unwrap());
    fs::create_dir(images.join("deep")).unwrap();
    raw(&images.join("deep/a.raw"), 1);
    mount_bind(images.join("deep"), dir.path()).unwrap();
    let _bound = Bound(dir.path());
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &dir.path().join("a.raw"))]);
    let said = rig.unfit(&[]).await;
    assert!(said.contains("only a directory in it"), "{said}");
}

#[tokio::test]
async fn a_snapshot_that_was_tampered_with_is_told() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &raw(&images.join("a.raw"), 1))]);
    let snapshot = rig.create("one").await;
    let taken = file(&snapshot, "vda");
    let root = taken.parent().unwrap();
    let health = async || {
        rig.dispatcher
            .show(&rig.domain, &snapshot.name)
            .await
            .unwrap()
            .health[0]
            .clone()
    };
    let set = |ro: &str| {
        run([
            "property".as_ref(),
            "set".as_ref(),
            root.as_os_str(),
            "ro".as_ref(),
            ro.as_ref(),
        ])
    };
    run(["filesystem".as_ref(), "sync".as_ref(), fs.path().as_os_str()]);
    assert_eq!(health().await, Health::Active);

    set("false");
    assert!(matches!(health().await, Health::Broken(why) if why.contains("can be written")));
    raw(&taken, 2);
    set("true");
    assert!(matches!(health().await, Health::Broken(why) if why.contains("written to since")));

    delete(root);
    assert!(matches!(health().await, Health::Gone(_)));
    create(root);
    assert!(matches!(health().await, Health::Broken(why) if why.contains("another subvolume")));
    let refused = rig
        .dispatcher
        .delete(&rig.domain, &snapshot.name)
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Broken);
    assert!(root.exists(), "what is not ours is left alone");
    delete(root);
    rig.delete("one").await;
    assert_eq!(fs::read_dir(fs.path()).unwrap().count(), 1);
}

/// A take that was given up for late, and ends when all is undone.
#[tokio::test]
async fn a_late_take_leaves_nothing() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &raw(&images.join("a.raw"), 1))]);
    let (control, id) = (rig.control().await, SnapshotId::random());
    let requests = rig.requests(&[]);
    let prepared = Btrfs.prepare(&*control, id, &requests).await.unwrap();
    Btrfs
        .abort(&*control, id, &requests, Some(&prepared))
        .await
        .unwrap();
    let late = Btrfs.take(&*control, &prepared[0]).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::NotFound);
    assert_eq!(fs::read_dir(fs.path()).unwrap().count(), 1);
}

const AS_NOBODY: &str = "DISKSNAP_TEST_AS_NOBODY";
const NOBODY: u32 = 65534;

/// What the next test runs as another user.
#[tokio::test]
async fn as_nobody() {
    let Some(dir) = std::env::var_os(AS_NOBODY) else {
        return;
    };
    let images = Path::new(&dir).join("images");
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &images.join("a.raw"))]);
    let fits = rig.probe(&[]).await[0].fit.clone();
    if let Fit::Unfit { kind, why } = fits {
        assert_eq!(kind, ErrorKind::Denied);
        assert!(why.contains("user_subvol_rm_allowed"), "{why}");
        std::process::exit(42);
    }
    // Whoever is not root may not search the tree.
    assert!(
        !rig.probe(&[]).await[0]
            .capabilities
            .contains(&Capability::Compare)
    );
    let snapshot = rig.create("mine").await;
    assert!(Btrfs.compare(&snapshot.units[0].unit).is_none());
    assert!(is_full_of(&file(&snapshot, "vda"), 1));
    rig.delete("mine").await;
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);

    let roots = Rig::off(
        Btrfs,
        vec![disk("vda", "raw", &Path::new(&dir).join("../roots/a.raw"))],
    );
    assert!(roots.unfit(&[]).await.contains("only root and its owner"));
}

#[test]
fn who_is_not_root_snapshots_what_is_theirs_where_they_may_delete_it() {
    need!("btrfs");
    for (options, code) in [("user_subvol_rm_allowed", 0), ("", 42)] {
        let fs = loop_fs(LoopFsKind::Btrfs, 256 << 20, options);
        let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        open(fs.path().parent().unwrap());
        let home = fs.path().join("home");
        fs::create_dir(&home).unwrap();
        let images = create(&home.join("images"));
        raw(&images.join("a.raw"), 1);
        for path in [home.clone(), images.clone(), images.join("a.raw")] {
            chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        raw(&create(&fs.path().join("roots")).join("a.raw"), 1);
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(&program);
        command.args(["--exact", "as_nobody"]).env(AS_NOBODY, &home);
        let output = match command.uid(NOBODY).gid(NOBODY).current_dir("/").output() {
            Ok(output) => output,
            Err(error) => skip!("btrfs", "another user cannot run {}: {error}", program.display()),
        };
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {text}");
    }
}

#[tokio::test]
async fn the_snapshots_directory_is_for_who_may_read_the_image() {
    need!("btrfs");
    let fs = btrfs();
    let image = raw(&create(&fs.path().join("images")).join("a.raw"), 1);
    chown(&image, Some(NOBODY), Some(1234)).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    let taken = file(&snapshot, "vda");
    let dir = taken.ancestors().nth(2).unwrap().metadata().unwrap();
    assert_eq!((dir.uid(), dir.gid(), dir.mode() & 0o777), (0, 1234, 0o710));
    rig.delete("one").await;
}
