//! Merge, revert and jobs, the method in a domain's document, and the document that follows its disks.

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need};
use serde_json::json;

use crate::site::{Site, arg};

/// A daemon with one qcow2 disk, and its document.
fn daemon() -> (StorageDaemon, String) {
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", 4 * MIB).qcow2())
        .without_guest_side()
        .start();
    let xml = arg(&daemon.domain_xml_file());
    (daemon, xml)
}

#[test]
fn a_fleecing_snapshot_is_neither_merged_nor_reverted_and_the_error_says_what_to_do() {
    need!("qemu-storage-daemon");
    let (site, (_daemon, xml)) = (Site::new(), daemon());
    let fleece = "vda,method=qemu-fleece";
    site.ok(&["snapshot", "create", "-d", &xml, "--name", "s", "--disk", fleece]);
    let merge = site.fails(5, &["snapshot", "merge", "-d", &xml, "s"]);
    assert!(merge.contains("there is nothing to merge"), "{merge}");
    assert!(merge.contains("disksnap snapshot delete"), "{merge}");
    let revert = site.fails(5, &["snapshot", "revert", "-d", &xml, "s"]);
    assert!(revert.contains("cannot be put back"), "{revert}");
    let unknown = site.fails(3, &["snapshot", "revert", "-d", &xml, "s", "--disk", "vdb"]);
    assert!(unknown.contains("the snapshot has no disk 'vdb'"), "{unknown}");
    let list = site.json(&["snapshot", "list", "-d", &xml]);
    assert_eq!(list["snapshots"][0]["state"], "active");
    assert_eq!(site.json(&["job", "list"]), json!({ "jobs": [] }));
    let id = "6f1f2a36-6a29-4a4c-a45c-3d0b3a6c0f11";
    let none = site.fails(3, &["job", "cancel", id]);
    assert!(none.contains(&format!("no job {id} is under way")), "{none}");
}

#[test]
fn a_disk_s_method_is_set_in_its_document_and_nothing_else_changes() {
    need!("qemu-storage-daemon");
    let (site, (_daemon, xml)) = (Site::new(), daemon());
    let before = std::fs::read_to_string(&xml).unwrap();
    let set = ["disk", "set-method", "-d", &xml, "vda"];
    site.ok(&[&set[..], &["qemu-fleece", "fleece.way=job"]].concat());
    let after = std::fs::read_to_string(&xml).unwrap();
    let element = after.lines().filter(|line| !before.contains(line.trim()));
    let element: String = element.map(str::trim).collect();
    assert_eq!(
        element,
        r#"<diskSnapshot method="qemu-fleece"><fleece way="job"/></diskSnapshot>"#.replace('"', "'")
    );
    let plan = site.json(&["plan", "-d", &xml]);
    assert_eq!(plan["disks"][0]["why"], "disk");
    assert_eq!(plan["disks"][0]["details"]["fleece.way"], "job");
    // What nobody could use is not written down.
    for wrong in [&["qemu-fleec"][..], &["qemu-fleece", "fleece.wya=job"]] {
        let ended = site.run(&[&set[..], wrong].concat());
        assert_ne!(ended.code, Some(0), "{wrong:?}");
        assert_eq!(std::fs::read_to_string(&xml).unwrap(), after, "{wrong:?}");
    }
    site.ok(&[&set[..], &["--none"]].concat());
    assert_eq!(std::fs::read_to_string(&xml).unwrap(), before);
}

#[test]
fn a_defined_domain_s_method_is_set_in_its_definition() {
    need!("qemu-storage-daemon");
    let (site, (daemon, xml)) = (Site::new(), daemon());
    site.ok(&["domain", "define", &xml]);
    site.ok(&["disk", "set-method", "-d", daemon.name(), "vda", "memory"]);
    let plan = site.json(&["plan", "-d", daemon.name()]);
    assert_eq!(plan["disks"][0]["method"], "memory");
    let from_file = site.json(&["plan", "-d", &xml]);
    assert_eq!(from_file["disks"][0]["method"], "qemu-fleece");
    let updated = site.json(&["domain", "update", "-d", daemon.name()]);
    assert_eq!(updated, json!({ "targets": [] }));
}
