//! The block graph of real hypervisors: disks are found by alias, id and file, through filters and backing chains.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Place, daemon_domain, disk_of, qemu_domain};
use disksnap_core::{Disk, ErrorKind, Source};
use disksnap_hypervisor::{Graph, Schema};
use disksnap_test_support::{DiskSpec, MIB, Qemu, QemuVersion, StorageDaemon};
use serde_json::json;

const VERSIONS: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];

fn by_alias(target: &str, alias: &str) -> Disk {
    let source = Source::Other {
        kind: "vhostuser".into(),
    };
    let mut disk = Disk::new(target, source);
    disk.alias = Some(alias.to_owned());
    disk
}

#[tokio::test]
async fn a_machine_s_disks_are_found_by_alias_and_by_file() {
    for version in VERSIONS {
        let qemu = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new("vda", 4 * MIB).qcow2())
            .disk(DiskSpec::new("vdb", 8 * MIB).wrapped())
            .disk(DiskSpec::new("sda", 2 * MIB))
            .start();
        let place = Place::new();
        let control = place.control(&qemu_domain(&qemu));
        let graph = Graph::read(&control).await.unwrap();
        for (target, size) in [("vda", 4 * MIB), ("vdb", 8 * MIB), ("sda", 2 * MIB)] {
            let alias = qemu.alias(target);
            let by_alias = graph.root_of_disk(&by_alias(target, alias)).unwrap();
            let by_file = graph.root_of_disk(&disk_of(target, qemu.image(target))).unwrap();
            assert_eq!(by_alias, by_file, "{version:?} {target}");
            assert_eq!(by_alias.device.as_ref().unwrap().id.as_deref(), Some(alias));
            assert_eq!(by_alias.top, qemu.top_node(target));
            assert_eq!(graph.node(&by_alias.format).unwrap().size, size);
            assert!(!by_alias.stale);
            // The path is one that the drive can be set by. (Setting what is set already crashes QEMU 7.2.)
            let path = &by_alias.device.unwrap().qom_path;
            assert_eq!(
                qemu.qmp("qom-get", json!({"path": path, "property": "drive"})),
                json!(by_alias.top)
            );
        }
        assert_eq!(
            graph
                .root_of_disk(&disk_of("vda", qemu.image("vda")))
                .unwrap()
                .format,
            qemu.format_node("vda")
        );
    }
}

#[tokio::test]
async fn a_user_s_alias_is_found_with_and_without_its_prefix() {
    let qemu = Qemu::builder()
        .args([
            "-blockdev",
            "driver=null-co,node-name=n,size=1048576",
            "-device",
            "virtio-blk-pci,drive=n,id=ua-data",
        ])
        .start();
    let place = Place::new();
    let graph = Graph::read(&place.control(&qemu_domain(&qemu))).await.unwrap();
    for alias in ["ua-data", "data"] {
        assert_eq!(graph.root_of_disk(&by_alias("vda", alias)).unwrap().top, "n");
    }
    let error = graph.root_of_disk(&by_alias("vda", "dta")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(
        error.next_step().unwrap().contains("ua-data"),
        "{:?}",
        error.next_step()
    );
}

#[tokio::test]
async fn filters_and_backing_chains_are_seen_through() {
    for version in VERSIONS {
        let qemu = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new("vda", 4 * MIB).qcow2())
            .start();
        let place = Place::new();
        let control = place.control(&qemu_domain(&qemu));
        let disk = disk_of("vda", qemu.image("vda"));
        let before = Graph::read(&control).await.unwrap().root_of_disk(&disk).unwrap();

        qemu.qmp(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "target", "size": 4 * MIB}),
        );
        qemu.qmp(
            "blockdev-backup",
            json!({"job-id": "job", "device": before.format, "target": "target",
            "sync": "none", "filter-node-name": "filter"}),
        );
        let graph = Graph::read(&control).await.unwrap();
        let during = graph.root_of_disk(&disk).unwrap();
        assert_eq!((during.top.as_str(), &during.format), ("filter", &before.format));
        assert_eq!(
            graph
                .jobs_on(&during.chain)
                .map(|j| j.id.as_str())
                .collect::<Vec<_>>(),
            ["job"]
        );
        assert_eq!(graph.jobs_on(&["other".to_owned()]).count(), 0);
        qemu.qmp("block-job-cancel", json!({"device": "job", "force": true}));
        qemu.monitor().wait_event("BLOCK_JOB_CANCELLED");

        // An overlay becomes the disk; the document still names the base.
        let overlay = place.dir.path().join("overlay.qcow2");
        std::fs::File::create(&overlay).unwrap();
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "file", "node-name": "of", "filename": overlay}),
        );
        qemu.qmp(
            "blockdev-create",
            json!({"job-id": "c", "options": {"driver": "qcow2", "file": "of", "size": 4 * MIB}}),
        );
        while qemu.qmp("query-jobs", json!({}))[0]["status"] != "concluded" {}
        qemu.qmp("job-dismiss", json!({"id": "c"}));
        qemu.qmp(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "ov", "file": "of", "backing": null}),
        );
        qemu.qmp(
            "blockdev-snapshot",
            json!({"node": before.format, "overlay": "ov"}),
        );
        let graph = Graph::read(&control).await.unwrap();
        let stale = graph.root_of_disk(&disk).unwrap();
        assert!(stale.stale);
        assert_eq!(
            (stale.top.as_str(), stale.backing.as_slice()),
            ("ov", &[before.format.clone()][..])
        );
        let fresh = graph.root_of_disk(&disk_of("vda", &overlay)).unwrap();
        assert!(!fresh.stale);
        assert_eq!(fresh.chain, ["ov", "of"]);

        let mut lie = disk_of("vda", std::path::Path::new("/other"));
        lie.alias = Some(qemu.alias("vda").to_owned());
        assert_eq!(graph.root_of_disk(&lie).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn a_storage_daemon_s_disks_are_found_by_file() {
    for version in VERSIONS {
        let daemon = StorageDaemon::builder()
            .version(version)
            .without_guest_side()
            .disk(DiskSpec::new("vda", 4 * MIB).qcow2())
            .disk(DiskSpec::new("vdb", 4 * MIB))
            .start();
        let place = Place::new();
        let control = place.control(&daemon_domain(&daemon));
        let disk = disk_of("vdb", daemon.image("vdb"));
        let nodes = Graph::read(&control).await.unwrap().root_of_disk(&disk).unwrap();
        assert_eq!((nodes.top.as_str(), nodes.device), ("top-vdb", None));
        assert_eq!(nodes.format, daemon.format_node("vdb"));

        // A filter that is made and not yet in the way, and then is.
        daemon.qmp(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "t", "size": 4 * MIB}),
        );
        daemon.qmp(
            "blockdev-add",
            json!({"driver": "copy-before-write", "node-name": "cbw", "file": nodes.format, "target": "t"}),
        );
        let dangling = Graph::read(&control).await.unwrap().root_of_disk(&disk).unwrap();
        assert_eq!(dangling.top, "top-vdb");
        daemon.qmp(
            "blockdev-reopen",
            json!({"options": [{"driver": "raw", "node-name": "top-vdb", "file": "cbw"}]}),
        );
        daemon.qmp(
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": "acc", "file": "cbw"}),
        );
        let through = Graph::read(&control).await.unwrap().root_of_disk(&disk).unwrap();
        assert_eq!(
            (through.top.as_str(), &through.format),
            ("top-vdb", &nodes.format)
        );
        assert!(through.chain.contains(&"cbw".to_owned()));

        let error = Graph::read(&control)
            .await
            .unwrap()
            .root_of_disk(&disk_of("vdc", std::path::Path::new("/nowhere")))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(
            error
                .next_step()
                .unwrap()
                .contains(daemon.image("vda").to_str().unwrap())
        );
    }
}

#[tokio::test]
async fn each_version_answers_for_itself_what_it_can_do() {
    let mut answers = Vec::new();
    for version in VERSIONS {
        let daemon = StorageDaemon::builder()
            .version(version)
            .without_guest_side()
            .start();
        let place = Place::new();
        let schema = Schema::of(&place.control(&daemon_domain(&daemon))).await.unwrap();
        assert!(schema.has_command("blockdev-add") && schema.has_event("BLOCK_EXPORT_DELETED"));
        assert!(schema.has_driver("snapshot-access") && !schema.has_driver("no-such-driver"));
        assert!(schema.has("transaction/actions/+blockdev-backup"));
        assert!(schema.has("block-export-add/+nbd/bitmaps"));
        assert!(
            !schema.has_command("query-status") && !schema.has("blockdev-add/driver/^") && !schema.has("")
        );
        assert!(!schema.has_command("BLOCK_EXPORT_DELETED") && !schema.has_event("blockdev-add"));
        answers.push((
            schema.driver_has_option("copy-before-write", "on-cbw-error"),
            schema.has("blockdev-add/+copy-before-write/on-cbw-error/^break-snapshot"),
            schema.command_has_arg("blockdev-backup", "discard-source"),
            schema.driver_has_option("copy-before-write", "min-cluster-size"),
        ));
        let mut errors = schema.enum_values("blockdev-add/+copy-before-write/on-cbw-error");
        errors.sort_unstable();
        assert_eq!(errors, ["break-guest-write", "break-snapshot"]);
    }
    assert_eq!(answers, [(true, true, false, false), (true, true, true, true)]);
}
