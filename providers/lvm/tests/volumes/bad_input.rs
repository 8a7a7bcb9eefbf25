//! What cannot work is refused by kind, before anything is made.

use disksnap_core::{DiskSnapshot, ErrorKind, SnapshotId};
use disksnap_lvm::LogicalVolume;

use crate::support::{Group, Rig, block, formatted, run};

#[tokio::test]
#[ignore = "runs in the guest"]
async fn sizes_that_are_none() {
    let group = Group::new("vg", "");
    group.pool("pool", 16);
    let rig = Rig::new(vec![block("vda", &group.plain("disk", 8))]);
    let bad = [
        ("snapshot.size", "0"),
        ("snapshot.size", "0%"),
        ("snapshot.size", "200%FREE"),
        ("snapshot.size", "1G"),
        ("snapshot.warn", "0"),
        ("device.path", "vg/disk"),
    ];
    for (key, value) in bad {
        let error = rig.try_create("bad", &[(key, value)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{key}={value}: {error}");
        assert!(error.to_string().contains(key), "{error}");
    }
    let thin = Rig::new(vec![block("vda", &group.thin("pool", "thin", 8))]);
    let error = thin
        .try_create("bad", &[("snapshot.size", "4194304")])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert_eq!(group.volumes(), ["disk", "pool", "thin"]);
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_group_that_is_full() {
    let group = Group::new("vg", "");
    let (one, other) = (group.plain("one", 32), group.plain("other", 32));
    run("lvcreate -y -Wn -l 100%FREE -n filler vg");
    run("lvreduce -f -l -3 vg/filler");
    let rig = Rig::new(vec![block("vda", &one), block("vdb", &other)]);
    // Each alone fits, both together do not.
    let two = [("snapshot.size", "8388608")];
    let error = rig.try_create("two", &two).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    let alone = Rig::new(vec![block("vda", &one)]);
    alone.try_create("alone", &two).await.unwrap();
    let error = rig
        .try_create("none", &[("snapshot.size", "50%FREE")])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    alone.delete("alone").await;

    // Filled up only after it was looked at.
    let (control, requests, id) = (alone.control().await, alone.requests(&two), SnapshotId::random());
    let prepared = LogicalVolume.prepare(&*control, id, &requests).await.unwrap();
    run("lvextend -l +100%FREE vg/filler");
    let error = LogicalVolume.take(&*control, &prepared[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    LogicalVolume.abort(&*control, id, &requests, None).await.unwrap();
    assert_eq!(group.volumes(), ["filler", "one", "other"]);
    assert_eq!(std::fs::read_dir(alone.dir.path()).unwrap().count(), 0);
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_volume_that_vanished_or_sleeps() {
    let group = Group::new("vg", "");
    let disk = group.plain("disk", 8);
    let rig = Rig::new(vec![block("vda", &disk)]);
    run("lvchange -an vg/disk");
    let (kind, why) = rig.unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unavailable, "{why}");
    assert!(why.contains("lvchange -ay vg/disk"), "{why}");
    run("lvchange -ay vg/disk");

    let (control, requests, id) = (rig.control().await, rig.requests(&[]), SnapshotId::random());
    let prepared = LogicalVolume.prepare(&*control, id, &requests).await.unwrap();
    run("lvremove -y vg/disk");
    let error = LogicalVolume.take(&*control, &prepared[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    // Another of the same name is not the one that was prepared.
    group.plain("disk", 8);
    let error = LogicalVolume.take(&*control, &prepared[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    LogicalVolume
        .abort(&*control, id, &requests, Some(&prepared))
        .await
        .unwrap();
    run("lvremove -y vg/disk");
    let error = rig.try_create("gone", &[]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    for name in [
        "/dev/vg/no-such",
        "/dev/no-such/disk",
        "/dev/mapper/vg-gone",
        "/dev/sdz",
    ] {
        let missing = Rig::new(vec![block("vda", name.as_ref())]);
        assert_eq!(missing.unfit(&[]).await.0, ErrorKind::NotFound, "{name}");
    }
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn images_that_would_not_be_whole() {
    let group = Group::new("vg", "");
    let (disk, base) = (group.plain("disk", 8), group.plain("base", 8));
    let source = || disksnap_core::Source::Block { dev: disk.clone() };
    for format in ["qcow2", "vmdk"] {
        let rig = Rig::new(vec![formatted("vda", source(), format)]);
        assert_eq!(
            rig.unfit(&[]).await.0,
            if format == "vmdk" {
                ErrorKind::Unsupported
            } else {
                ErrorKind::Io
            }
        );
    }
    let (disk, base) = (disk.display(), base.display());
    run(&format!("qemu-img create -q -f qcow2 -b {base} -F raw {disk} 4M"));
    let rig = Rig::new(vec![formatted("vda", source(), "qcow2")]);
    let (kind, why) = rig.unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains("backing file"), "{why}");
}

/// What the next test runs without lvm2.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn without_lvm2() {
    if std::env::var_os("DISKSNAP_LVM").is_none() {
        return;
    }
    let rig = Rig::new(vec![block("vda", "/dev/vg/disk".as_ref())]);
    let (kind, why) = rig.unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unavailable, "{why}");
    assert!(why.contains("Install lvm2"), "{why}");
    // A disk that is on no volume needs none to be told so.
    let elsewhere = Rig::new(vec![block("vda", "/dev/vdb".as_ref())]);
    assert_eq!(elsewhere.unfit(&[]).await.0, ErrorKind::Unsupported);
}

#[test]
#[ignore = "runs in the guest"]
fn a_missing_lvm2() {
    let group = Group::new("vg", "");
    group.plain("disk", 4);
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "bad_input::without_lvm2", "--ignored"]);
    let output = command.env("DISKSNAP_LVM", "/no/such/lvm").output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}
