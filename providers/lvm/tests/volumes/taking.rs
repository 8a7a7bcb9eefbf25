//! What is made, how it is named, and what is told of it as it fills up.

use disksnap_core::{Capability, DiskSnapshot, ErrorKind, Fit, Health, SnapshotId};
use disksnap_lvm::LogicalVolume;

use crate::support::{Group, Rig, block, device, fill, is_full_of, run, try_run};

const MIB: usize = 1 << 20;

#[tokio::test]
#[ignore = "runs in the guest"]
async fn plain_and_thin_volumes_in_one_create() {
    let group = Group::new("my-vg", "");
    group.pool("pool", 64);
    let (plain, thin) = (group.plain("web-1.data", 16), group.thin("pool", "th-in", 32));
    for device in [&plain, &thin] {
        fill(device, 0, MIB, 1);
    }
    let rig = Rig::new(vec![block("vda", &plain), block("vdb", &thin)]);
    let probes = rig.probe(&[]).await;
    assert!(probes.iter().all(|probe| probe.fit == Fit::Natural), "{probes:?}");
    assert_eq!(probes[0].details["way"], "classic");
    assert_eq!(probes[1].details["way"], "thin");
    assert!(probes[0].capabilities.contains(&Capability::GuestSafe));
    assert!(!probes[1].capabilities.contains(&Capability::GuestSafe));

    let snapshot = rig.create("both").await;
    for (target, device_of) in [("vda", &plain), ("vdb", &thin)] {
        fill(device_of, 0, MIB, 2);
        let taken = device(&snapshot, target);
        assert!(is_full_of(&taken, 0, MIB, 1), "{target}");
        let written = std::fs::OpenOptions::new().write(true).open(&taken);
        let refused = written.and_then(|file| std::io::Write::write(&mut &file, &[0; 512]));
        assert!(refused.is_err(), "{target} can be written to");
    }
    let id = snapshot.id;
    for volume in group
        .volumes()
        .iter()
        .filter(|name| name.starts_with("disksnap."))
    {
        assert!(
            volume.starts_with(&format!("disksnap.{}.", id.short())),
            "{volume}"
        );
        assert_eq!(
            group.field(volume, "lv_tags"),
            format!("disksnap,disksnap.id={id}")
        );
    }
    assert_eq!(rig.health("both").await, Health::Active);
    rig.delete("both").await;
    assert_eq!(group.volumes(), ["pool", "th-in", "web-1.data"]);
    assert!(is_full_of(&plain, 0, MIB, 2) && is_full_of(&thin, 0, MIB, 2));
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_overflowed_snapshot_is_broken_and_the_disk_is_not() {
    let group = Group::new("vg", "");
    let disk = group.plain("disk", 32);
    let rig = Rig::new(vec![block("vda", &disk)]);
    let small = [("snapshot.size", "4194304"), ("snapshot.warn", "50")];
    rig.try_create("small", &small).await.unwrap();
    fill(&disk, 0, 3 * MIB, 1);
    // What is filling up is told before the next one is made.
    let warned = &rig.probe(&small).await[0].warnings;
    assert!(warned.iter().any(|text| text.contains("% full")), "{warned:?}");
    // And wherever this one is looked at or read, by the mark that it was made with.
    is_endangered(&rig, "small", "disksnap.").await;
    let unmarked = [("snapshot.size", "4194304"), ("snapshot.warn", "100")];
    rig.try_create("unmarked", &unmarked).await.unwrap();
    assert_eq!(rig.health("unmarked").await, Health::Active);
    rig.delete("unmarked").await;

    fill(&disk, 0, 8 * MIB, 2);
    assert!(is_full_of(&disk, 0, 8 * MIB, 2), "the disk's own writes arrive");
    let why = match rig.health("small").await {
        Health::Broken(why) => why,
        other => panic!("{other:?}"),
    };
    assert!(why.contains("overflowed"), "{why}");
    let name = "small".parse().unwrap();
    let read = rig.dispatcher.open(&rig.domain, &name, "vda").await;
    assert_eq!(read.unwrap_err().kind(), ErrorKind::Broken);
    let reverted = rig.dispatcher.revert(&rig.domain, &name, &[]).await;
    assert_eq!(reverted.unwrap_err().kind(), ErrorKind::Broken);
    rig.delete("small").await;
    assert_eq!(group.volumes(), ["disk"]);
}

/// Its room runs out, and everyone who looks at it or reads it is told so.
async fn is_endangered(rig: &Rig, name: &str, what: &str) {
    let health = rig.health(name).await;
    let Health::Endangered(why) = &health else {
        panic!("{health:?}")
    };
    assert!(why.contains(what) && why.contains("% full"), "{why}");
    assert!(health.is_good());
    let name = name.parse().unwrap();
    let opened = rig.dispatcher.open(&rig.domain, &name, "vda").await.unwrap();
    assert_eq!(&opened.warnings, std::slice::from_ref(why));
    rig.dispatcher.close(&rig.domain, opened).await.unwrap();
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_full_pool_is_told_and_takes_no_more_snapshots() {
    let group = Group::new("vg", "");
    group.pool("pool", 16);
    let (disk, filler) = (group.thin("pool", "disk", 32), group.thin("pool", "filler", 32));
    fill(&disk, 0, MIB, 1);
    let rig = Rig::new(vec![block("vda", &disk)]);
    rig.create("thin").await;
    fill(&filler, 0, 13 * MIB, 1);
    let warned = &rig.probe(&[]).await[0].warnings;
    assert!(
        warned
            .iter()
            .any(|text| text.contains("vg/pool") && text.contains("% full")),
        "{warned:?}"
    );
    is_endangered(&rig, "thin", "vg/pool").await;
    let full = try_run(&[
        "dd",
        "if=/dev/zero",
        "of=/dev/vg/filler",
        "bs=1M",
        "count=32",
        "conv=fsync",
    ]);
    assert!(full.is_err(), "it is not full");

    let why = match rig.health("thin").await {
        Health::Broken(why) => why,
        other => panic!("{other:?}"),
    };
    assert!(why.contains("vg/pool is full"), "{why}");
    let error = rig.try_create("more", &[]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    run("lvremove -y vg/filler");
    assert_eq!(rig.health("thin").await, Health::Active);
    rig.delete("thin").await;
    assert_eq!(group.volumes(), ["disk", "pool"]);
}

/// A take that was given up for late, and ends when all is undone.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_late_take_leaves_nothing() {
    let group = Group::new("vg", "");
    let rig = Rig::new(vec![block("vda", &group.plain("disk", 8))]);
    let (control, requests, id) = (rig.control().await, rig.requests(&[]), SnapshotId::random());
    let prepared = LogicalVolume.prepare(&*control, id, &requests).await.unwrap();
    LogicalVolume
        .abort(&*control, id, &requests, Some(&prepared))
        .await
        .unwrap();
    let late = LogicalVolume.take(&*control, &prepared[0]).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::NotFound);

    // And one that is on its way while it is undone.
    let id = SnapshotId::random();
    let prepared = LogicalVolume.prepare(&*control, id, &requests).await.unwrap();
    let (taken, aborted) = tokio::join!(
        LogicalVolume.take(&*control, &prepared[0]),
        LogicalVolume.abort(&*control, id, &requests, None),
    );
    aborted.unwrap();
    drop(taken);
    assert_eq!(group.volumes(), ["disk"]);
    assert_eq!(std::fs::read_dir(rig.dir.path()).unwrap().count(), 0);
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_is_not_ours_is_left_alone() {
    let group = Group::new("vg", "");
    let disk = group.plain("disk", 8);
    run("lvcreate -y -s -L 4m -n mine --addtag disksnap vg/disk");
    let rig = Rig::new(vec![block("vda", &disk)]);
    let snapshot = rig.create("one").await;
    let (control, requests) = (rig.control().await, rig.requests(&[]));
    LogicalVolume
        .abort(&*control, SnapshotId::random(), &requests, None)
        .await
        .unwrap();
    assert_eq!(group.volumes().len(), 3);

    let taken = device(&snapshot, "vda");
    run(&format!(
        "lvchange -y --deltag disksnap.id={} {}",
        snapshot.id,
        taken.display()
    ));
    let name = "one".parse().unwrap();
    let refused = rig.dispatcher.delete(&rig.domain, &name).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Broken, "{refused}");
    assert_eq!(group.volumes().len(), 3);
    run(&format!("lvremove -y {}", taken.display()));
    rig.delete("one").await;
    assert_eq!(group.volumes(), ["disk", "mine"]);
}

/// Whoever reads the snapshot is in the way of its delete, and is told so; then it goes.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_open_snapshot_is_busy() {
    let group = Group::new("vg", "");
    let rig = Rig::new(vec![block("vda", &group.plain("disk", 8))]);
    let snapshot = rig.create("read").await;
    let open = std::fs::File::open(device(&snapshot, "vda")).unwrap();
    let name = "read".parse().unwrap();
    let busy = rig.dispatcher.delete(&rig.domain, &name).await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    drop(open);
    rig.delete("read").await;
    assert_eq!(group.volumes(), ["disk"]);
}
