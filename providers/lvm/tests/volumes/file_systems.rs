//! Images in a file system on a volume: the snapshot is of the volume, and says where the image is in it.

use std::path::Path;

use disksnap_core::{Capability, DiskSnapshot, ErrorKind, Fit, Source};
use disksnap_lvm::LogicalVolume;

use crate::support::{Group, Rig, file, formatted, inside, named, run, try_run};

/// A mounted file system, which goes with the test.
pub(crate) struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    pub(crate) fn new(device: &Path, at: &'a Path, options: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run(&format!("mount {options} {} {}", device.display(), at.display()));
        Self(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let unmounted = crate::support::try_run(&["umount", self.0.to_str().unwrap()]);
        if !std::thread::panicking() {
            unmounted.unwrap();
        }
    }
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn on_ext4_two_disks_share_one_snapshot() {
    let group = Group::new("vg", "");
    let volume = group.plain("data", 32);
    run(&format!("mke2fs -q -t ext4 {}", volume.display()));
    let (live, taken) = (Path::new("/mnt/li ve"), Path::new("/mnt/taken"));
    std::fs::create_dir_all(live).unwrap();
    crate::support::try_run(&["mount", volume.to_str().unwrap(), live.to_str().unwrap()]).unwrap();
    let _mounted = Mounted(live);
    std::fs::create_dir(live.join("vms")).unwrap();
    let (a, b) = (live.join("vms/a.raw"), live.join("b.qcow2"));
    std::fs::write(&a, vec![1; 1 << 20]).unwrap();
    crate::support::try_run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        b.to_str().unwrap(),
        "4M",
    ])
    .unwrap();
    let rig = Rig::new(vec![
        file("vda", &a),
        formatted("vdb", Source::File { file: b.clone() }, "qcow2"),
    ]);
    let probes = rig.probe(&[]).await;
    assert!(
        probes
            .iter()
            .all(|probe| probe.fit == Fit::Possible && probe.unit == "vg/data"),
        "{probes:?}"
    );
    assert!(!probes[0].capabilities.contains(&Capability::DirectRead));
    assert!(!probes[0].capabilities.contains(&Capability::Revert));

    let snapshot = rig.create("fs").await;
    std::fs::write(&a, vec![2; 1 << 20]).unwrap();
    assert_eq!(snapshot.units.len(), 1);
    assert!(
        LogicalVolume.revert(&snapshot.units[0].unit).is_none(),
        "other files would go back too"
    );
    let of = |target: &str| snapshot.disk(target).unwrap();
    let image = |target: &str| inside(&snapshot, target).image.clone();
    assert_eq!(image("vda").path, Path::new("/vms/a.raw"));
    assert_eq!(image("vdb").path, Path::new("/b.qcow2"));
    assert_eq!(
        (image("vda").format, image("vdb").format),
        ("raw".into(), "qcow2".into())
    );
    assert_eq!(inside(&snapshot, "vda").file_system, "ext4");
    assert_eq!((of("vda").size, of("vdb").size), (Some(1 << 20), Some(4 << 20)));
    // No reader takes the device for the disk.
    assert!(
        rig.dispatcher
            .open(&rig.domain, &"fs".parse().unwrap(), "vda")
            .await
            .is_err()
    );
    {
        let device = &inside(&snapshot, "vda").device;
        run(&format!("e2fsck -fn {}", device.display()));
        let _mounted = Mounted::new(device, taken, "-o ro,noload");
        assert!(
            std::fs::read(taken.join("vms/a.raw"))
                .unwrap()
                .iter()
                .all(|byte| *byte == 1)
        );
    }
    rig.delete("fs").await;
    assert_eq!(group.volumes(), ["data"]);

    // The disks share the snapshot's room: they cannot be told different sizes for it.
    let mut requests = rig.requests(&[("snapshot.size", "4194304")]);
    requests[1].options.push("snapshot.warn", "90");
    requests[0].options = [("snapshot.size", "8388608")].into_iter().collect();
    let probes = LogicalVolume
        .probe(&*rig.control().await, &requests)
        .await
        .unwrap();
    let differs =
        |fit: &Fit| matches!(fit, Fit::Unfit { kind: ErrorKind::Invalid, why } if why.contains("share one"));
    assert!(probes.iter().all(|probe| differs(&probe.fit)), "{probes:?}");
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn on_btrfs_the_path_counts_from_the_top_and_nobody_mounts_it() {
    let group = Group::new("vg", "");
    let (volume, second) = (group.plain("data", 160), group.plain("second", 160));
    run(&format!("mkfs.btrfs -q -M {}", volume.display()));
    let live = Path::new("/mnt/btrfs");
    std::fs::create_dir_all("/mnt/top").unwrap();
    {
        let _mounted = Mounted::new(&volume, Path::new("/mnt/top"), "-t btrfs");
        std::fs::create_dir(Path::new("/mnt/top/vms")).unwrap();
    }
    {
        let _mounted = Mounted::new(&volume, Path::new("/mnt/top"), "-t btrfs");
        std::fs::create_dir_all(live).unwrap();
        run("mount -o bind /mnt/top/vms /mnt/btrfs");
        let _bound = Mounted(live);
        let image = live.join("a.raw");
        std::fs::write(&image, vec![1; 1 << 20]).unwrap();
        let rig = Rig::new(vec![file("vda", &image)]);
        let snapshot = rig.create("fs").await;
        let taken = inside(&snapshot, "vda");
        assert_eq!(taken.image.path, Path::new("/vms/a.raw"));
        let name = "fs".parse().unwrap();
        let error = rig.dispatcher.open(&rig.domain, &name, "vda").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let hint = error.next_step().unwrap();
        assert!(
            hint.contains("disksnap attach") && hint.contains("/vms/a.raw"),
            "{hint}"
        );
        assert!(taken.why.contains("btrfs of one id"), "{}", taken.why);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains("disksnap"), "{mounts}");
        rig.delete("fs").await;
    }
    // A snapshot of one device of two would be torn.
    run(&format!(
        "mkfs.btrfs -q -f -M -d single -m single {} {}",
        volume.display(),
        second.display()
    ));
    let options = format!("-t btrfs -o device={}", second.display());
    let _mounted = Mounted::new(&volume, live, &options);
    let image = live.join("a.raw");
    std::fs::write(&image, [1; 512]).unwrap();
    let (kind, why) = Rig::new(vec![file("vda", &image)]).unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains("2 devices"), "{why}");
}

/// An image over two others, named by its own header and by that of the one below in two ways.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_chain_in_one_file_system_is_recorded_whole() {
    let group = Group::new("vg", "");
    let volume = group.plain("data", 32);
    run(&format!("mke2fs -q -t ext4 {}", volume.display()));
    let (live, taken) = (Path::new("/mnt/chain"), Path::new("/mnt/taken"));
    let _mounted = Mounted::new(&volume, live, "");
    std::fs::create_dir(live.join("bases")).unwrap();
    std::fs::write(live.join("bases/a.raw"), vec![1; 1 << 20]).unwrap();
    run("qemu-img create -q -f qcow2 -b a.raw -F raw /mnt/chain/bases/b.qcow2");
    let absolute = "-b /mnt/chain/bases/b.qcow2 -F qcow2";
    run(&format!(
        "qemu-img create -q -f qcow2 {absolute} /mnt/chain/c.qcow2"
    ));
    let top = live.join("c.qcow2");
    let disk = |file: &Path| {
        formatted(
            "vda",
            Source::File {
                file: file.to_owned(),
            },
            "qcow2",
        )
    };
    // With the domain off what only a header names is not trusted.
    let (kind, why) = Rig::new(vec![disk(&top)]).unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Invalid, "{why}");
    assert!(why.contains("the domain's document does not"), "{why}");
    let rig = Rig::new(vec![named(disk(&top))]);
    let snapshot = rig.create("chain").await;
    let place = inside(&snapshot, "vda");
    let below: Vec<_> = place
        .below
        .iter()
        .map(|file| (&*file.path, &*file.format))
        .collect();
    let expected = [
        (Path::new("/bases/b.qcow2"), "qcow2"),
        (Path::new("/bases/a.raw"), "raw"),
    ];
    assert_eq!(
        (place.image.path.as_path(), below),
        (Path::new("/c.qcow2"), expected.to_vec())
    );

    // What is below changes, and the snapshot does not: read by the record, and not by the absolute name.
    std::fs::write(live.join("bases/a.raw"), vec![2; 1 << 20]).unwrap();
    {
        let _mounted = Mounted::new(&place.device, taken, "-o ro,noload");
        let file = |path: &Path| taken.join(path.strip_prefix("/").unwrap()).display().to_string();
        let chain = format!(
            "json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}},\"backing\":{{\"driver\":\"qcow2\",\
             \"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}},\"backing\":{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\
             \"filename\":\"{}\"}}}}}}}}",
            file(&place.image.path),
            file(&place.below[0].path),
            file(&place.below[1].path)
        );
        try_run(&["qemu-img", "convert", "-U", "-O", "raw", &chain, "/tmp/read"]).unwrap();
        let read = std::fs::read("/tmp/read").unwrap();
        assert!(read.len() == 1 << 20 && read.iter().all(|byte| *byte == 1));
        std::fs::remove_file("/tmp/read").unwrap();
    }
    rig.delete("chain").await;

    // A layer elsewhere would be read as it is by then.
    std::fs::write("/tmp/base.raw", vec![1; 1 << 20]).unwrap();
    run("qemu-img create -q -f qcow2 -b /tmp/base.raw -F raw /mnt/chain/partly.qcow2");
    let (kind, why) = Rig::new(vec![disk(&live.join("partly.qcow2"))]).unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(
        why.contains("/tmp/base.raw") && why.contains("would not hold it"),
        "{why}"
    );
    std::fs::remove_file("/tmp/base.raw").unwrap();
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn elsewhere_there_is_no_volume() {
    let group = Group::new("vg", "");
    let volume = group.plain("data", 4);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    std::fs::write(&image, [1; 512]).unwrap();
    let (kind, why) = Rig::new(vec![file("vda", &image)]).unfit(&[]).await;
    assert_eq!(kind, ErrorKind::Unsupported, "{why}");
    // Not even where the request says so.
    let named = [("device.path", volume.to_str().unwrap())];
    let (kind, why) = Rig::new(vec![file("vda", &image)]).unfit(&named).await;
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(
        why.contains("device.path says that the image is on /dev/vg/data, and it is not"),
        "{why}"
    );
    let (kind, _) = Rig::new(vec![file("vda", &dir.path().join("missing"))])
        .unfit(&[])
        .await;
    assert_eq!(kind, ErrorKind::NotFound);
}
