//! What must hold when images are put back, whichever method took them: a module of the methods' test programs.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test program")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use disksnap_core::{DiskSnapshot, ErrorKind, SnapshotId};
use disksnap_test_support::{DiskSpec, Qemu};
use rustix::fs::{XattrFlags, getxattr, setxattr};

use super::rig::{Rig, disk, file, is_full_of, raw};

/// Another user's id: nobody's.
const SOMEBODY: u32 = 65534;

/// The file that takes an image's place, by the name that it has until then.
pub fn beside(image: &Path, id: SnapshotId) -> PathBuf {
    let name = image.file_name().unwrap().to_str().unwrap();
    image.with_file_name(format!(".{name}.{}.revert", id.short()))
}

/// The names in a directory.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// Back to the first of two snapshots and to the second and to the first again: each is there all the time.
pub async fn back_and_forth(provider: impl DiskSnapshot + 'static, dir: &Path) {
    let image = raw(&dir.join("a.raw"), 1);
    let rig = Rig::off(provider, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    raw(&image, 2);
    let second = rig.create("second").await;
    raw(&image, 3);
    for (snapshot, byte) in [(&first, 1), (&first, 1), (&second, 2), (&first, 1)] {
        assert_eq!(rig.revert(snapshot).await.unwrap(), Vec::<String>::new());
        assert!(is_full_of(&image, byte), "the image is not what it was");
        assert!(is_full_of(&file(&first, "vda"), 1) && is_full_of(&file(&second, "vda"), 2));
        raw(&image, 9);
    }
    assert!(
        is_full_of(&file(&first, "vda"), 1),
        "the image is written to, not the snapshot"
    );
    rig.delete("first").await;
    rig.revert(&second).await.unwrap();
    assert!(is_full_of(&image, 2));
    rig.delete("second").await;
    assert_eq!(names(dir), ["a.raw"]);
}

/// Owner, mode and attributes are those of the image, also where they have changed since.
pub async fn attributes_are_kept(provider: impl DiskSnapshot + 'static, dir: &Path) {
    let image = raw(&dir.join("a.raw"), 1);
    let rig = Rig::off(provider, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    raw(&image, 2);
    chown(&image, Some(SOMEBODY), Some(1234)).unwrap();
    fs::set_permissions(&image, Permissions::from_mode(0o640)).unwrap();
    setxattr(&image, "user.told", b"yes", XattrFlags::empty()).unwrap();
    fs::hard_link(&image, dir.join("another-name")).unwrap();

    let warnings = rig.revert(&snapshot).await.unwrap();
    assert!(
        warnings.len() == 1 && warnings[0].contains("hard links"),
        "{warnings:?}"
    );
    let now = image.metadata().unwrap();
    assert_eq!(
        (now.uid(), now.gid(), now.mode() & 0o7777),
        (SOMEBODY, 1234, 0o640)
    );
    let mut value = [0_u8; 8];
    assert_eq!(getxattr(&image, "user.told", &mut value[..]).unwrap(), 3);
    assert!(value.starts_with(b"yes") && is_full_of(&image, 1));
    assert!(is_full_of(&dir.join("another-name"), 2));

    fs::remove_file(&image).unwrap();
    rig.revert(&snapshot).await.unwrap();
    assert!(is_full_of(&image, 1), "an image that is gone comes back");
    rig.delete("one").await;
}

/// What a revert leaves that was killed, at each of its steps, is finished by the next, or goes with the snapshot.
pub async fn a_killed_revert_is_finished(provider: impl DiskSnapshot + 'static, dir: &Path) {
    let (a, b) = (raw(&dir.join("a.raw"), 1), raw(&dir.join("b.raw"), 2));
    let rig = Rig::off(provider, vec![disk("vda", "raw", &a), disk("vdb", "raw", &b)]);
    let snapshot = rig.create("one").await;
    let (new_a, new_b) = (beside(&a, snapshot.id), beside(&b, snapshot.id));
    // Killed while it made the first, while it made the second, and between the two renames.
    let steps: [&[&Path]; 3] = [&[&new_a], &[&new_a, &new_b], &[&new_b]];
    for left in steps {
        raw(&a, 8);
        raw(&b, 9);
        for path in left {
            fs::write(path, b"half of it").unwrap();
        }
        if left == [new_b.as_path()] {
            raw(&a, 1);
        }
        rig.revert(&snapshot).await.unwrap();
        assert!(is_full_of(&a, 1) && is_full_of(&b, 2));
        assert!(!new_a.exists() && !new_b.exists());
    }
    for path in [&new_a, &new_b] {
        fs::write(path, b"half of it").unwrap();
    }
    rig.delete("one").await;
    assert_eq!(names(dir), ["a.raw", "b.raw"]);
}

/// An image that a QEMU has open is not replaced under it, whatever the document says; nor are the others then.
pub async fn an_image_in_use_is_not_replaced(provider: impl DiskSnapshot + 'static, dir: &Path) {
    let (a, b) = (raw(&dir.join("a.raw"), 1), raw(&dir.join("b.raw"), 2));
    let rig = Rig::off(provider, vec![disk("vda", "raw", &a), disk("vdb", "raw", &b)]);
    let snapshot = rig.create("one").await;
    raw(&a, 8);
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 1 << 20).image(&b))
        .start();
    for unit in &snapshot.units {
        let revert = rig.provider.revert(&unit.unit).unwrap();
        let reverted = revert
            .revert(&*rig.control().await, snapshot.id, &unit.unit, &[])
            .await;
        if unit.unit.disks.iter().any(|disk| disk.target == "vdb") {
            let error = reverted.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
            assert!(error.to_string().contains("b.raw is in use"), "{error}");
        }
    }
    if snapshot.units.len() == 1 {
        assert!(is_full_of(&a, 8), "all or none");
    }
    drop(qemu);
    rig.revert(&snapshot).await.unwrap();
    assert!(is_full_of(&a, 1) && is_full_of(&b, 2));
    rig.delete("one").await;
    assert_eq!(names(dir), ["a.raw", "b.raw"]);
}

/// While the domain runs, nothing is put back, and the error says what to do.
pub async fn a_running_domain_is_left_alone(provider: impl DiskSnapshot + 'static, dir: &Path) {
    let image = raw(&dir.join("a.raw"), 1);
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 1 << 20).image(&image))
        .start();
    let rig = Rig::running(provider, &qemu);
    let snapshot = rig.create("one").await;
    qemu.write("vda", 0, 1 << 20, 2);
    let error = rig.revert(&snapshot).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(format!("{error:?}").contains("Shut the domain down"), "{error:?}");
    assert!(is_full_of(&image, 2));
    rig.delete("one").await;
}

/// A disk that has another image by now: an overlay would lose its base.
pub async fn another_image_stands_against_it(provider: impl DiskSnapshot + 'static, dir: &Path) {
    let image = raw(&dir.join("a.raw"), 1);
    let mut rig = Rig::off(provider, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("one").await;
    raw(&image, 2);
    rig.disks_are(vec![disk("vda", "qcow2", &raw(&dir.join("overlay.qcow2"), 3))]);
    let error = rig.revert(&snapshot).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.to_string().contains("overlay.qcow2"), "{error}");
    rig.disks_are(Vec::new());
    assert_eq!(
        rig.revert(&snapshot).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert!(is_full_of(&image, 2));

    // By a link it is the same image.
    let link = dir.join("link.raw");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    rig.disks_are(vec![disk("vda", "raw", &link)]);
    rig.revert(&snapshot).await.unwrap();
    assert!(is_full_of(&image, 1) && link.is_symlink());
}

/// Both files are marked so that what is overwritten is not copied, and still are.
pub async fn a_nocow_image_is_put_back(provider: impl DiskSnapshot + 'static, dir: &Path) {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let image = dir.join("a.raw");
    let made = File::create(&image).unwrap();
    ioctl_setflags(&made, ioctl_getflags(&made).unwrap() | IFlags::NOCOW).unwrap();
    raw(&image, 1);
    let rig = Rig::off(provider, vec![disk("vda", "raw", &image)]);
    let snapshot = rig.create("nocow").await;
    raw(&image, 2);
    rig.revert(&snapshot).await.unwrap();
    assert!(is_full_of(&image, 1));
    let now = File::open(&image).unwrap();
    assert!(ioctl_getflags(&now).unwrap().contains(IFlags::NOCOW));
    rig.delete("nocow").await;
}
