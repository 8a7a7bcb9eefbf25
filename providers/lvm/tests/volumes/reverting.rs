//! Putting a snapshot back: at once, at the next activation, beside other snapshots.

use disksnap_core::{ErrorKind, Health};

use crate::support::{Group, Rig, block, device, fill, is_full_of, run};

const MIB: usize = 1 << 20;

#[tokio::test]
#[ignore = "runs in the guest"]
async fn at_once_where_nothing_has_the_volume_open() {
    let group = Group::new("vg", "");
    group.pool("pool", 64);
    let (plain, thin) = (group.plain("plain", 16), group.thin("pool", "thin", 16));
    let rig = Rig::new(vec![block("vda", &plain), block("vdb", &thin)]);
    for device in [&plain, &thin] {
        // What an earlier volume left there is none of this one's.
        fill(device, 0, 2 * MIB, 0);
        fill(device, 0, MIB, 1);
    }
    let (name, later) = ("one".parse().unwrap(), "later".parse().unwrap());
    rig.create("one").await;
    for device in [&plain, &thin] {
        fill(device, 0, 2 * MIB, 2);
    }
    let second = rig.create("later").await;
    for device in [&plain, &thin] {
        fill(device, 0, MIB, 3);
    }
    let altered = rig.dispatcher.revert(&rig.domain, &name, &[]).await.unwrap();
    assert!(altered.gone && altered.deferred.is_empty(), "{altered:?}");
    assert_eq!(altered.warnings.len(), 2, "{:?}", altered.warnings);
    for (target, device_of) in [("vda", &plain), ("vdb", &thin)] {
        assert!(is_full_of(device_of, 0, MIB, 1), "{target}");
        assert!(is_full_of(device_of, MIB as u64, MIB, 0), "{target}");
        // The other snapshot is what it was, and the disk can be written.
        assert!(is_full_of(&device(&second, target), 0, 2 * MIB, 2), "{target}");
        fill(device_of, 0, MIB, 4);
    }
    assert_eq!(rig.health("later").await, Health::Active);
    let again = rig.dispatcher.revert(&rig.domain, &name, &[]).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::NotFound, "given up: {again}");
    // LVM has cut the tie between the thin volume and its other snapshot, which is put back all the same, and stays.
    for round in 0..2 {
        let altered = rig
            .dispatcher
            .revert(&rig.domain, &later, &["vdb".to_owned()])
            .await
            .unwrap();
        assert!(!altered.gone && altered.deferred.is_empty(), "{altered:?}");
        assert!(is_full_of(&thin, 0, 2 * MIB, 2), "round {round}");
        fill(&thin, 0, MIB, 5);
    }
    let open = std::fs::File::open(&thin).unwrap();
    let busy = rig
        .dispatcher
        .revert(&rig.domain, &later, &["vdb".to_owned()])
        .await
        .unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    drop(open);
    assert!(is_full_of(&device(&second, "vdb"), 0, 2 * MIB, 2) && is_full_of(&thin, 0, MIB, 5));
    rig.dispatcher
        .revert(&rig.domain, &later, &["vda".to_owned()])
        .await
        .unwrap();
    assert!(is_full_of(&plain, 0, 2 * MIB, 2));
    rig.delete("later").await;
    assert_eq!(group.volumes(), ["plain", "pool", "thin"]);
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn at_the_next_activation_where_something_has() {
    let group = Group::new("vg", "");
    group.pool("pool", 64);
    for disk in [group.plain("plain", 16), group.thin("pool", "thin", 16)] {
        let volume = format!("vg/{}", disk.file_name().unwrap().to_str().unwrap());
        let rig = Rig::new(vec![block("vda", &disk)]);
        fill(&disk, 0, MIB, 1);
        let name = "open".parse().unwrap();
        rig.create("open").await;
        fill(&disk, 0, MIB, 2);
        let open = std::fs::File::open(&disk).unwrap();
        let altered = rig.dispatcher.revert(&rig.domain, &name, &[]).await.unwrap();
        let [why] = altered.deferred.as_slice() else {
            panic!("{altered:?}")
        };
        assert!(why.contains("next activated") && why.contains(&volume), "{why}");
        assert!(!altered.gone);
        assert!(is_full_of(&disk, 0, MIB, 2), "not yet");

        // Until then nothing takes it for a snapshot, nor makes others.
        let health = rig.health("open").await;
        assert!(
            matches!(&health, Health::Broken(why) if why.contains("being merged")),
            "{health:?}"
        );
        assert_eq!(
            rig.try_create("more", &[]).await.unwrap_err().kind(),
            ErrorKind::Busy
        );
        let busy = rig.dispatcher.delete(&rig.domain, &name).await.unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");

        drop(open);
        run(&format!("lvchange -an {volume}"));
        run(&format!("lvchange -ay {volume}"));
        // A classic merge goes on in the background.
        while group.field(volume.strip_prefix("vg/").unwrap(), "lv_merging") == "merging" {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        assert!(is_full_of(&disk, 0, MIB, 1));
        assert!(matches!(rig.health("open").await, Health::Gone(_)));
        rig.delete("open").await;
    }
    assert_eq!(group.volumes(), ["plain", "pool", "thin"]);
}

/// The call that asked for the merge did not live to see its end; the next one finishes.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_was_left_to_the_next_activation_is_finished_when_asked_again() {
    use disksnap_core::DiskSnapshot as _;
    let group = Group::new("vg", "");
    let disk = group.plain("plain", 16);
    let rig = Rig::new(vec![block("vda", &disk)]);
    fill(&disk, 0, MIB, 1);
    let snapshot = rig.create("open").await;
    fill(&disk, 0, MIB, 2);
    let (control, unit) = (rig.control().await, &snapshot.units[0].unit);
    let revert = disksnap_lvm::LogicalVolume.revert(unit).unwrap();
    let open = std::fs::File::open(&disk).unwrap();
    let first = revert.revert(&*control, snapshot.id, unit, &[]).await.unwrap();
    assert!(first.deferred.is_some());
    let again = revert.revert(&*control, snapshot.id, unit, &[]).await.unwrap();
    assert_eq!(again, first);
    drop(open);
    for _ in 0..2 {
        let done = revert.revert(&*control, snapshot.id, unit, &[]).await.unwrap();
        assert_eq!((done.unit, done.deferred), (None, None));
    }
    assert!(is_full_of(&disk, 0, MIB, 1));
    assert_eq!(group.volumes(), ["plain"]);
}

/// A thin snapshot outlives its volume, a classic one goes with it.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_volume_that_vanished_is_told_and_nothing_is_made() {
    let group = Group::new("vg", "");
    group.pool("pool", 64);
    let (plain, thin) = (group.plain("plain", 16), group.thin("pool", "thin", 16));
    let rig = Rig::new(vec![block("vda", &plain), block("vdb", &thin)]);
    fill(&thin, 0, MIB, 1);
    let snapshot = rig.create("one").await;
    run("lvremove -y -f vg/plain vg/thin");
    let name = "one".parse().unwrap();
    let shown = rig.dispatcher.show(&rig.domain, &name).await.unwrap();
    assert!(matches!(shown.health[0], Health::Gone(_)), "{:?}", shown.health);
    assert_eq!(shown.health[1], Health::Active);
    assert!(is_full_of(&device(&snapshot, "vdb"), 0, MIB, 1));
    for (target, kind) in [("vda", ErrorKind::Broken), ("vdb", ErrorKind::NotFound)] {
        let targets = [target.to_owned()];
        let refused = rig.dispatcher.revert(&rig.domain, &name, &targets).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), kind, "{target}: {refused}");
    }
    assert_eq!(group.volumes().len(), 2, "the pool and the thin snapshot");
    rig.delete("one").await;
    assert_eq!(group.volumes(), ["pool"]);
    let left = std::fs::read_dir(rig.dir.path()).unwrap().count();
    assert_eq!(left, 0, "files are left");
}
