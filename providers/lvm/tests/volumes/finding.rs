//! Whatever path a disk has, its volume is found.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use disksnap_core::{Disk, ErrorKind, Fit, Source};

use crate::support::{Group, Rig, block, file, formatted, run, try_run};

#[tokio::test]
#[ignore = "runs in the guest"]
async fn by_every_name_it_has() {
    let group = Group::new("my-vg", "");
    let disk = group.plain("web-1.data", 8);
    group.plain("other", 4);
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    symlink(&disk, &link).unwrap();
    let node = PathBuf::from(format!(
        "/dev/dm-{}",
        group.field("web-1.data", "lv_kernel_minor")
    ));
    let mapped = PathBuf::from("/dev/mapper/my--vg-web--1.data");
    for path in [&disk, &link, &node, &mapped] {
        let probe = Rig::new(vec![block("vda", path)]).probe(&[]).await.remove(0);
        assert_eq!(probe.fit, Fit::Natural, "{}", path.display());
        assert_eq!(probe.unit, "my-vg/web-1.data");
    }
    // A device that the document calls a file; a qcow2 image on one.
    let probe = Rig::new(vec![file("vda", &disk)]).probe(&[]).await.remove(0);
    assert_eq!(probe.unit, "my-vg/web-1.data");
    run(&format!("qemu-img create -q -f qcow2 {} 4M", disk.display()));
    let qcow2 = formatted("vda", Source::Block { dev: disk.clone() }, "qcow2");
    let rig = Rig::new(vec![qcow2]);
    let snapshot = rig.create("qcow2").await;
    assert_eq!(snapshot.disks[0].size, Some(4 << 20));
    rig.delete("qcow2").await;
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn by_the_path_that_the_request_gives() {
    let group = Group::new("vg", "");
    let (disk, other) = (group.plain("disk", 8), group.plain("other", 8));
    let disk_path = [("device.path", disk.to_str().unwrap())];
    // Behind a network disk there may be a volume of this very host; only the request knows.
    let served = Source::Network {
        protocol: "iscsi".to_owned(),
        name: Some("iqn.2026-01.test:disk/0".to_owned()),
        hosts: Vec::new(),
        tls: false,
    };
    let rig = Rig::new(vec![formatted("vda", served, "raw")]);
    let probe = rig.probe(&disk_path).await.remove(0);
    assert_eq!(probe.unit, "vg/disk");
    assert!(
        probe.warnings.iter().any(|text| text.contains("cannot be seen")),
        "{:?}",
        probe.warnings
    );
    assert_eq!(rig.unfit(&[]).await.0, ErrorKind::Unsupported);

    let own = Rig::new(vec![block("vda", &disk)]);
    assert_eq!(own.probe(&disk_path).await[0].fit, Fit::Natural);
    let (kind, why) = own.unfit(&[("device.path", other.to_str().unwrap())]).await;
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(why.contains("/dev/vg/other is not"), "{why}");
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_is_no_volume_or_only_part_of_one_is_told() {
    let group = Group::new("vg", "");
    let disk = group.plain("disk", 8);
    run("lvcreate -y -s -L 4m -n snap vg/disk");
    group.pool("pool", 16);
    let why = async |path: &str| Rig::new(vec![block("vda", path.as_ref())]).unfit(&[]).await.1;
    assert!(why("/dev/vdb").await.contains("not a logical volume"));
    assert!(why("/dev/mapper/vg-disk-real").await.contains("part of one"));
    assert!(why("/dev/mapper/vg-pool_tdata").await.contains("part of one"));
    assert!(why("/dev/vg/snap").await.contains("itself a classic snapshot"));
    assert!(why("/dev/null").await.contains("not a block device"));
    // Another layer of device-mapper on top of a volume.
    let sectors = (8 << 20) / 512;
    let table = format!("0 {sectors} linear {} 0", disk.display());
    try_run(&["dmsetup", "create", "layer", "--table", &table]).unwrap();
    run("dmsetup mknodes layer");
    let said = why("/dev/mapper/layer").await;
    run("dmsetup remove layer");
    assert!(said.contains("not a logical volume"), "{said}");
    let empty = Disk {
        source: None,
        ..block("vda", &disk)
    };
    assert!(Rig::new(vec![empty]).unfit(&[]).await.1.contains("empty"));
}
