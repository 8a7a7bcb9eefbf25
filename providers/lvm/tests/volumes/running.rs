//! Volumes that a real storage daemon holds while they are snapshotted: it has no guest that could be paused.

use std::fs::File;
use std::os::unix::fs::FileExt;

use disksnap_core::{ErrorKind, Fit, Source};

use crate::sound::Daemon;
use crate::support::{Group, Rig, block, device, formatted, is_full_of, run};

const MIB: usize = 1 << 20;

#[tokio::test]
#[ignore = "runs in the guest"]
async fn one_raw_volume_is_taken_and_several_are_not() {
    let group = Group::new("vg", "");
    let (disk, other) = (group.plain("disk", 8), group.plain("other", 8));
    let daemon = Daemon::start(&disk, "raw");
    let guest = File::options().write(true).open(&daemon.guest).unwrap();
    let write = |byte| {
        guest.write_all_at(&vec![byte; MIB], 0).unwrap();
        guest.sync_all().unwrap();
    };
    let rig = Rig::running(vec![block("vda", &disk)], &daemon.monitor);
    write(1);
    let probe = rig.probe(&[]).await.remove(0);
    assert_eq!(probe.fit, Fit::Natural, "{probe:?}");
    let snapshot = rig.create("one").await;
    write(2);
    assert!(is_full_of(&device(&snapshot, "vda"), 0, MIB, 1));
    assert!(is_full_of(&disk, 0, MIB, 2));
    rig.delete("one").await;

    let both = Rig::running(vec![block("vda", &disk), block("vdb", &other)], &daemon.monitor);
    let error = both.try_create("both", &[]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    write(3);
    assert_eq!(group.volumes(), ["disk", "other"]);
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_image_that_needs_the_pause_is_refused() {
    let group = Group::new("vg", "");
    let disk = group.plain("disk", 8);
    run(&format!("qemu-img create -q -f qcow2 {} 4M", disk.display()));
    let daemon = Daemon::start(&disk, "qcow2");
    let rig = Rig::running(
        vec![formatted("vda", Source::Block { dev: disk.clone() }, "qcow2")],
        &daemon.monitor,
    );
    let (kind, why) = rig.unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains("cannot be paused"), "{why}");
}
