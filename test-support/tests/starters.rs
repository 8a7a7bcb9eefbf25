//! Each starter starts the real thing; what the guest's side writes is there when read another way.

use disksnap_test_support::{
    DiskSpec, GIB, KIB, MIB, Qemu, QemuVersion, StorageDaemon, Writer, firmware_writer_round, need, pattern,
    small_fs, tools,
};
use serde_json::json;

const VERSIONS: [QemuVersion; 2] = [QemuVersion::V10_0, QemuVersion::V7_2];

#[test]
fn a_storage_daemon_takes_a_guests_writes() {
    need!("fuse");
    for version in VERSIONS {
        let daemon = StorageDaemon::builder()
            .version(version)
            .disk(DiskSpec::new("vda", 8 * MIB))
            .disk(DiskSpec::new("vdb", 8 * MIB).cluster_size(4096))
            .start();
        let mut expected = vec![0; 8 << 20];
        let data = pattern::bytes(1, 300_000);
        expected[70_000..370_000].copy_from_slice(&data);
        expected[70_000..70_512].fill(0xa5);
        expected[131_072..196_608].fill(0);
        expected[262_144..327_680].fill(0);
        for target in ["vda", "vdb"] {
            let disk = daemon.disk(target);
            disk.write(70_000, &data);
            disk.fill(70_000, 512, 0xa5);
            disk.zero(131_072, 65536);
            disk.discard(262_144, 65536);
            assert!(disk.read(0, 8 * MIB) == expected, "{target} of {version:?}");
            assert_eq!(
                disk.digest(),
                pattern::digest(&expected),
                "{target} of {version:?}"
            );
        }
    }
}

#[test]
fn a_filter_under_the_wrapper_sees_the_guests_writes() {
    need!("fuse");
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", MIB).qcow2())
        .start();
    let disk = daemon.disk("vda");
    disk.fill(0, MIB, 1);
    let fleece = daemon.dir().join("fleece");
    std::fs::File::create(&fleece)
        .and_then(|x| x.set_len(MIB))
        .expect("the fleece image is made");
    let source = daemon.format_node("vda");
    daemon.qmp(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "fl",
        "file": {"driver": "file", "filename": fleece}}),
    );
    daemon.qmp(
        "blockdev-add",
        json!({"driver": "copy-before-write", "node-name": "cbw",
        "file": source, "target": "fl", "on-cbw-error": "break-snapshot"}),
    );
    daemon.qmp(
        "blockdev-reopen",
        json!({"options": [
        {"driver": "raw", "node-name": daemon.top_node("vda"), "file": "cbw", "discard": "unmap"}]}),
    );
    disk.fill(64 * KIB, 64 * KIB, 2);
    disk.zero(256 * KIB, 64 * KIB);
    let kept = std::fs::read(&fleece).expect("the fleece image is readable");
    assert!(
        kept[65536..131_072].iter().all(|x| *x == 1),
        "the old data was copied before the write"
    );
    assert!(
        kept[262_144..327_680].iter().all(|x| *x == 1),
        "… and before the zeroing"
    );
    assert_eq!(disk.read(64 * KIB, 1), [2]);
}

#[test]
fn an_idle_machine_takes_writes_through_its_monitor() {
    for version in VERSIONS {
        // See `Qemu::disk` for why 7.2 gets no iothread here.
        let threaded = |disk: DiskSpec| {
            if version == QemuVersion::V7_2 {
                disk
            } else {
                disk.iothread()
            }
        };
        let vm = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new("vda", 4 * MIB).qcow2())
            .disk(threaded(DiskSpec::new("vdb", 4 * MIB).wrapped()))
            .disk(threaded(DiskSpec::new("sda", 4 * MIB).qcow2()))
            .start();
        assert_eq!(vm.status(), "running");
        let mut expected = vec![0; 4 << 20];
        let data = pattern::bytes(2, 8192);
        expected[4096..12288].copy_from_slice(&data);
        expected[65536..131_072].fill(7);
        expected[69632..73728].fill(0);
        for target in ["vda", "vdb", "sda"] {
            let disk = vm.disk(target);
            disk.write(4096, &data);
            vm.write(target, 65536, 65536, 7);
            disk.zero(69632, 4096);
            disk.discard(MIB, 65536);
            assert_eq!(disk.read(4096, 8192), data, "{target} of {version:?}");
            assert_eq!(
                disk.digest(),
                pattern::digest(&expected),
                "{target} of {version:?}"
            );
            let error = disk.try_fill(4 * MIB, 512, 1).expect_err("past the end");
            assert!(error.contains("Input/output error"), "{error}");
        }
    }
}

#[test]
fn a_disk_in_an_iothread_takes_writes_on_7_2() {
    let disk = DiskSpec::new("vda", MIB).qcow2().iothread();
    let vm = Qemu::builder().version(QemuVersion::V7_2).disk(disk).start();
    vm.write("vda", 0, 4096, 3);
    vm.disk("vda").write(4096, &[1, 2]);
    assert_eq!(vm.disk("vda").read(4095, 3), [3, 1, 2]);
}

#[test]
fn a_machine_survives_kill_and_restart() {
    let vm = Qemu::builder()
        .disk(DiskSpec::new("vda", MIB).qcow2())
        .prelaunch()
        .start();
    assert_eq!(vm.status(), "prelaunch");
    vm.write("vda", 0, 4096, 9);
    vm.disk("vda").flush();
    vm.kill9();
    assert!(!vm.is_running());
    vm.restart();
    assert_eq!(vm.disk("vda").read(0, 2), [9, 9]);
    assert!(vm.quit().success());
}

#[test]
fn a_storage_daemon_survives_kill_and_restart() {
    need!("fuse");
    let mut daemon = StorageDaemon::builder().disk(DiskSpec::new("vda", MIB)).start();
    let disk = daemon.disk("vda");
    disk.fill(0, 4096, 9);
    daemon.kill9();
    assert!(disk.try_fill(0, 512, 1).is_err(), "the guest's side died with it");
    drop(disk);
    daemon.restart();
    assert_eq!(daemon.disk("vda").read(0, 2), [9, 9]);
    assert!(daemon.quit().success());
}

#[test]
fn a_daemon_without_a_guests_side_needs_no_fuse() {
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", GIB))
        .without_guest_side()
        .start();
    let nodes = daemon.qmp("query-named-block-nodes", json!({"flat": true}));
    let named = nodes
        .as_array()
        .is_some_and(|x| x.iter().any(|x| x["node-name"] == "top-vda"));
    assert!(named, "{nodes}");
}

#[test]
fn a_writer_goes_on_until_stopped() {
    let vm = Qemu::builder()
        .disk(DiskSpec::new("vda", MIB))
        .disk(DiskSpec::new("vdb", MIB))
        .start();
    let writer = Writer::start(vec![vm.disk("vda"), vm.disk("vdb")], MIB, 1);
    writer.wait(40);
    assert!(writer.stop() >= 40);
    assert_eq!(
        vm.disk("vda").digest(),
        vm.disk("vdb").digest(),
        "both disks got the same rounds"
    );
}

#[test]
fn many_disks_fit_a_machine() {
    let mut builder = Qemu::builder();
    for n in 0..64 {
        builder = builder.disk(DiskSpec::new(&format!("sd{n}"), MIB));
        builder = builder.disk(DiskSpec::new(&format!("vd{n}"), MIB));
    }
    let vm = builder.start();
    vm.write("vd63", 0, 512, 1);
    vm.write("sd63", 0, 512, 1);
}

#[test]
fn the_domain_xml_names_the_disks_and_sockets() {
    let vm = Qemu::builder()
        .disk(DiskSpec::new("vda", MIB).qcow2())
        .disk(DiskSpec::new("sda", MIB).read_only())
        .start();
    let xml = vm.domain_xml();
    let image = vm.image("vda").display();
    assert!(
        xml.contains(&format!("<source file='{image}' index='1'/>")),
        "{xml}"
    );
    assert!(xml.contains("<alias name='virtio-disk0'/>"), "{xml}");
    assert!(xml.contains("<alias name='scsi0-0-1-0'/>"), "{xml}");
    assert!(
        xml.contains(&format!("<disksnap:monitor path='{}'/>", vm.qmp_path().display())),
        "{xml}"
    );
    assert_eq!(vm.alias("sda"), "scsi0-0-1-0");
    let schema = tools::libvirt_schema("domain.rng");
    let output = std::process::Command::new(tools::program("xmllint"))
        .args(["--noout", "--nonet", "--relaxng"])
        .args([schema, vm.domain_xml_file()])
        .output()
        .expect("xmllint starts");
    assert!(
        output.status.success(),
        "{}\n{xml}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(vm.domain_xml_file().is_file());
}

#[test]
fn a_small_file_system_is_full_soon() {
    need!("small-fs");
    let fs = small_fs(MIB);
    let error = std::fs::write(fs.path().join("big"), vec![1; 2 << 20]).expect_err("no space");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    let path = fs.path().to_path_buf();
    drop(fs);
    assert!(!path.exists());
}

#[test]
fn the_firmwares_writer_writes_in_order_to_all_disks() {
    need!("qemu-system-x86_64", "qemu-img");
    for (version, disks) in VERSIONS.into_iter().zip([["vda", "vdb"], ["sda", "sdb"]]) {
        let vm = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new(disks[0], 4 * MIB))
            .disk(
                DiskSpec::new(disks[1], 4 * MIB)
                    .cluster_size(512)
                    .l2_cache_size(1024),
            )
            .firmware_writer()
            .start();
        vm.wait_writer(16);
        vm.qmp("stop", json!({}));
        let printed = vm.writer_rounds();
        vm.quit();
        let raw = vm.dir().join("second.raw");
        let mut convert = std::process::Command::new(version.program("qemu-img"));
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
        let converted = convert.args([vm.image(disks[1]), &raw]).status();
        assert!(converted.expect("qemu-img starts").success());
        let round = |image: &std::path::Path| {
            let disk = std::fs::read(image).expect("an image can be read");
            u64::from(firmware_writer_round(&disk).unwrap_or_else(|why| panic!("{version:?}: {why}")))
        };
        let (first, second) = (round(vm.image(disks[0])), round(&raw));
        assert!(
            first == second || first == second + 1,
            "{first} and {second} are no instant"
        );
        assert!(
            printed <= second && second < printed + 16,
            "{printed} and {second}"
        );
    }
}
