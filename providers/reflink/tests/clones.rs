//! What the method makes of image files: where a clone goes, what it is, what is refused.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

#[path = "../../../image-file/testing/rig.rs"]
mod rig;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use disksnap_core::{ErrorKind, Fit, Health};
use disksnap_reflink::Reflink;
use disksnap_test_support::{LoopFs, LoopFsKind, loop_fs, need, skip, small_fs, tools};
use rig::{Rig, disk, file, is_full_of, over, qemu_img, raw};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

const ROOM: u64 = 320 << 20;

fn xfs() -> LoopFs {
    loop_fs(LoopFsKind::Xfs, ROOM, "")
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[tokio::test]
async fn a_clone_is_read_only_and_the_images_owners() {
    need!("xfs");
    let fs = xfs();
    let image = raw(&fs.path().join("a.raw"), 1);
    chown(&image, Some(1234), Some(1235)).unwrap();
    let rig = Rig::off(Reflink, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    raw(&image, 2);
    let clone = file(&snapshot, "vda");
    assert_eq!(clone.parent(), image.parent(), "beside the image");
    assert!(is_full_of(&clone, 1));
    let found = clone.metadata().unwrap();
    assert_eq!(
        (found.uid(), found.gid(), found.mode() & 0o777),
        (1234, 1235, 0o400)
    );
    rig.delete("one").await;
    assert_eq!(count(fs.path()), 1);
}

/// Were it a copy, the file system would be full.
#[tokio::test]
async fn a_clone_takes_no_room() {
    need!("xfs");
    let fs = xfs();
    let image = fs.path().join("a.raw");
    fs::write(&image, vec![1; 100 << 20]).unwrap();
    let rig = Rig::off(Reflink, vec![disk("vda", "raw", &image)]);
    for n in 0..8 {
        rig.create(&n.to_string()).await;
    }
    assert_eq!(count(fs.path()), 9);
    let probe = &rig.probe(&[]).await[0];
    assert_eq!(
        probe.warnings,
        Vec::<String>::new(),
        "there is room for one image overwritten"
    );
    fs::write(fs.path().join("other"), vec![1; 100 << 20]).unwrap();
    let probe = &rig.probe(&[]).await[0];
    assert!(probe.warnings[0].contains("takes new room"), "{probe:?}");
}

#[tokio::test]
async fn a_file_system_that_cannot_share_extents_is_refused() {
    need!("xfs", "small-fs");
    let (plain, memory) = (
        loop_fs(LoopFsKind::XfsWithoutReflink, ROOM, ""),
        small_fs(8 << 20),
    );
    for dir in [plain.path(), memory.path()] {
        let rig = Rig::off(Reflink, vec![disk("vda", "raw", &raw(&dir.join("a.raw"), 1))]);
        let said = rig.unfit(&[]).await;
        assert!(said.contains("cannot share extents"), "{}: {said}", dir.display());
        let error = rig.try_create("bad", &[]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(count(dir), 1, "no trace of the attempt");
    }
}

#[tokio::test]
async fn the_clone_goes_where_the_caller_says() {
    need!("xfs");
    let fs = xfs();
    let (one, other, there) = (
        fs.path().join("one"),
        fs.path().join("other"),
        fs.path().join("there"),
    );
    for dir in [&one, &other, &there] {
        fs::create_dir(dir).unwrap();
    }
    // Two images of one name.
    let (a, b) = (raw(&one.join("a.raw"), 1), raw(&other.join("a.raw"), 2));
    let rig = Rig::off(Reflink, vec![disk("vda", "raw", &a), disk("vdb", "raw", &b)]);
    let dir = [("clone.dir", there.to_str().unwrap())];
    let snapshot = rig.try_create("there", &dir).await.unwrap();
    assert_eq!(count(&there), 2);
    assert!(is_full_of(&file(&snapshot, "vda"), 1) && is_full_of(&file(&snapshot, "vdb"), 2));
    rig.delete("there").await;
    assert_eq!(count(&there), 0);

    let bad = [
        ("relative", "absolute"),
        (rig.dir.path().to_str().unwrap(), "not on the file system"),
        (a.to_str().unwrap(), "is not a directory"),
        ("/nowhere/at/all", "is not a directory"),
    ];
    for (dir, why) in bad {
        let said = rig.unfit(&[&[("clone.dir", dir)]]).await;
        assert!(said.contains(why), "{dir}: {said}");
        let error = rig.try_create("bad", &[("clone.dir", dir)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{dir}: {error}");
    }
}

#[tokio::test]
async fn on_btrfs_a_clone_crosses_subvolumes_and_matches_nocow() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, ROOM, "");
    let (images, clones) = (fs.path().join("images"), fs.path().join("clones"));
    for subvolume in [&images, &clones] {
        let mut command = Command::new(tools::program("btrfs"));
        assert!(
            command
                .args(["subvolume", "create"])
                .arg(subvolume)
                .output()
                .unwrap()
                .status
                .success()
        );
    }
    let nocow = |path: &Path| {
        let file = File::open(path).unwrap();
        ioctl_setflags(&file, ioctl_getflags(&file).unwrap() | IFlags::NOCOW).unwrap();
    };
    let is_nocow = |path: &Path| {
        ioctl_getflags(File::open(path).unwrap())
            .unwrap()
            .contains(IFlags::NOCOW)
    };
    let (plain, odd) = (raw(&images.join("plain.raw"), 1), images.join("nocow.raw"));
    File::create(&odd).unwrap();
    nocow(&odd);
    raw(&odd, 2);
    // What is made in it is made NOCOW.
    let inherits = clones.join("inherits");
    fs::create_dir(&inherits).unwrap();
    nocow(&inherits);

    let rig = Rig::off(
        Reflink,
        vec![disk("vda", "raw", &plain), disk("vdb", "raw", &odd)],
    );
    for dir in [&images, &clones, &inherits] {
        let snapshot = rig
            .try_create("one", &[("clone.dir", dir.to_str().unwrap())])
            .await
            .unwrap();
        let (of_plain, of_odd) = (file(&snapshot, "vda"), file(&snapshot, "vdb"));
        assert!(is_full_of(&of_plain, 1) && is_full_of(&of_odd, 2));
        assert_eq!(
            (is_nocow(&of_plain), is_nocow(&of_odd)),
            (false, true),
            "{}",
            dir.display()
        );
        rig.delete("one").await;
    }
}

#[tokio::test]
async fn an_image_that_needs_another_file_is_refused() {
    need!("xfs", "qemu-img");
    let fs = xfs();
    let dir = fs.path();
    let base = raw(&dir.join("base.raw"), 1);
    qemu_img(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "top.qcow2",
        ],
        dir,
    )
    .unwrap();
    qemu_img(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=data",
            "odd.qcow2",
            "1M",
        ],
        dir,
    )
    .unwrap();
    let cases = [
        (
            disk("vda", "qcow2", &dir.join("top.qcow2")),
            "header names the backing file",
        ),
        (
            over(disk("vda", "raw", &base), &dir.join("data")),
            "has the backing file",
        ),
        (disk("vda", "qcow2", &dir.join("odd.qcow2")), "in another file"),
        (disk("vda", "qcow2", &base), "does not begin as a qcow2"),
        (disk("vda", "vmdk", &base), "vmdk"),
        (disk("vda", "raw", dir), "is not a file"),
        (disk("vda", "raw", &dir.join("missing")), "cannot find"),
        (disk("../vda", "raw", &base), "file name"),
    ];
    for (disk, why) in cases {
        let rig = Rig::off(Reflink, vec![disk]);
        let said = rig.unfit(&[]).await;
        assert!(said.contains(why), "{why}: {said}");
        assert!(rig.try_create("bad", &[]).await.is_err());
    }
}

#[tokio::test]
async fn an_image_behind_a_link_is_cloned_beside_itself() {
    need!("xfs");
    let (fs, links) = (xfs(), tempfile::tempdir().unwrap());
    let image = raw(&fs.path().join("a.raw"), 1);
    let link = links.path().join("vm.raw");
    symlink(&image, &link).unwrap();
    let rig = Rig::off(Reflink, vec![disk("vda", "raw", &link)]);
    let snapshot = rig.create("one").await;
    assert!(file(&snapshot, "vda").starts_with(fs.path()));
    rig.delete("one").await;
    assert_eq!((count(fs.path()), count(links.path())), (1, 1));
}

#[tokio::test]
async fn a_clone_that_was_tampered_with_is_told() {
    need!("xfs");
    let fs = xfs();
    let rig = Rig::off(
        Reflink,
        vec![disk("vda", "raw", &raw(&fs.path().join("a.raw"), 1))],
    );
    let snapshot = rig.create("one").await;
    let clone = file(&snapshot, "vda");
    let health = async || {
        rig.dispatcher
            .show(&rig.domain, &snapshot.name)
            .await
            .unwrap()
            .health[0]
            .clone()
    };
    assert_eq!(health().await, Health::Active);
    raw(&clone, 2);
    assert!(matches!(health().await, Health::Broken(why) if why.contains("written to since")));
    File::options()
        .write(true)
        .open(&clone)
        .unwrap()
        .set_len(512)
        .unwrap();
    assert!(matches!(health().await, Health::Broken(why) if why.contains("512 bytes")));
    fs::remove_file(&clone).unwrap();
    assert!(matches!(health().await, Health::Gone(_)));
    fs::create_dir(&clone).unwrap();
    assert!(matches!(health().await, Health::Broken(why) if why.contains("not a file")));
    fs::remove_dir(&clone).unwrap();
    rig.delete("one").await;
}

/// Whoever may write in the directory must not lead us to write elsewhere.
#[tokio::test]
async fn a_link_in_the_clones_place_is_not_followed() {
    need!("xfs");
    let fs = xfs();
    let (image, victim) = (
        raw(&fs.path().join("a.raw"), 1),
        raw(&fs.path().join("victim"), 7),
    );
    let rig = Rig::off(Reflink, vec![disk("vda", "raw", &image)]);
    let (control, id) = (rig.control().await, disksnap_core::SnapshotId::random());
    let requests = rig.requests(&[]);
    let prepared = rig.provider.prepare(&*control, id, &requests).await.unwrap();
    let clone = Path::new(prepared[0].data["file"].as_str().unwrap());
    fs::remove_file(clone).unwrap();
    symlink(&victim, clone).unwrap();
    assert!(rig.provider.take(&*control, &prepared[0]).await.is_err());
    fs::remove_file(clone).unwrap();
    fs::hard_link(&victim, clone).unwrap();
    assert!(rig.provider.take(&*control, &prepared[0]).await.is_err());
    rig.provider
        .abort(&*control, id, &requests, Some(&prepared))
        .await
        .unwrap();
    assert!(is_full_of(&victim, 7));
}

const AS_NOBODY: &str = "DISKSNAP_TEST_AS_NOBODY";
const NOBODY: u32 = 65534;

/// What the next test runs as another user.
#[tokio::test]
async fn as_nobody() {
    let Some(dir) = std::env::var_os(AS_NOBODY) else {
        return;
    };
    let dir = Path::new(&dir);
    let mine = Rig::off(Reflink, vec![disk("vda", "raw", &dir.join("mine/a.raw"))]);
    mine.create("one").await;
    mine.delete("one").await;
    let roots = Rig::off(Reflink, vec![disk("vda", "raw", &dir.join("a.raw"))]);
    match roots.probe(&[]).await[0].fit.clone() {
        Fit::Unfit { kind, why } => assert!(kind == ErrorKind::Denied && why.contains("make files"), "{why}"),
        fit => panic!("it is {fit:?}"),
    }
}

#[test]
fn who_is_not_root_clones_what_is_theirs() {
    need!("xfs");
    let fs = xfs();
    let (point, mine) = (fs.path(), fs.path().join("mine"));
    fs::set_permissions(point.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(&mine).unwrap();
    raw(&point.join("a.raw"), 1);
    for path in [raw(&mine.join("a.raw"), 1), mine] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(&program);
    command.args(["--exact", "as_nobody"]).env(AS_NOBODY, point);
    let output = match command.uid(NOBODY).gid(NOBODY).current_dir("/").output() {
        Ok(output) => output,
        Err(error) => skip!("xfs", "another user cannot run {}: {error}", program.display()),
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}
