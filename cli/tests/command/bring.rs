//! Merge, revert and jobs, the method in a domain's document, and the document that follows its disks.

use std::process::Command;

use disksnap_test_support::{DiskSpec, MIB, Qemu, StorageDaemon, need, tools};
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

/// A domain that is off, with one qcow2 disk: its image and its document.
fn off(site: &Site) -> (String, String) {
    let image = arg(&site.path("a.qcow2"));
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]);
    let xml = site.file(
        "vm.xml",
        &format!(
            "<domain type='kvm'>\n  <name>off</name>\n  <devices>\n    <disk type='file' device='disk'>\n      \
             <driver name='qemu' type='qcow2'/>\n      <source file='{image}'/>\n      <target dev='vda'/>\n    \
             </disk>\n  </devices>\n</domain>\n"
        ),
    );
    (image, xml)
}

fn qemu(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(tools::program(program))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The image that the document names for the disk.
fn named(xml: &str) -> String {
    let text = std::fs::read_to_string(xml).unwrap();
    let (_, rest) = text.split_once("<source file='").unwrap();
    rest.split_once('\'').unwrap().0.to_owned()
}

fn write(xml: &str, byte: u8) {
    qemu("qemu-io", &["-c", &format!("write -P {byte} 0 1M"), &named(xml)]);
}

/// What the domain would read there.
fn holds(xml: &str, byte: u8) {
    qemu(
        "qemu-io",
        &["-r", "-c", &format!("read -P {byte} 0 1M"), &named(xml)],
    );
}

#[test]
fn overlays_of_a_domain_that_is_off_are_merged_reverted_and_deleted_and_the_document_follows() {
    need!("qemu-img");
    let site = Site::new();
    let (image, xml) = off(&site);
    let before = std::fs::read_to_string(&xml).unwrap();
    let run = |words: &[&str]| site.json(&[&words[..2], &["-d", &xml], &words[2..]].concat());
    write(&xml, 1);
    run(&["snapshot", "create", "--name", "one"]);
    assert_ne!(named(&xml), image);
    write(&xml, 2);
    run(&["snapshot", "create", "--name", "two"]);
    write(&xml, 3);
    // Back to the second instant; the first snapshot reads what it read.
    run(&["snapshot", "revert", "two"]);
    holds(&xml, 2);
    let to = site.path("one.raw");
    site.ok(&[
        "read",
        "-d",
        &xml,
        "one",
        "vda",
        "--length",
        "1M",
        "--to",
        &arg(&to),
    ]);
    assert!(std::fs::read(&to).unwrap() == vec![1; 1 << 20]);
    write(&xml, 4);
    // The middle of the chain goes, and the disk keeps its content.
    let merged = run(&["snapshot", "merge", "one"]);
    assert_eq!(
        (&merged["gone"], &merged["ended"][0]),
        (&json!(true), &json!("vda"))
    );
    holds(&xml, 4);
    let list = run(&["snapshot", "list"]);
    assert_eq!(list["snapshots"][0]["name"], "two");
    assert_eq!(list["snapshots"][0]["state"], "active");
    run(&["snapshot", "delete", "two"]);
    holds(&xml, 4);
    assert_eq!(std::fs::read_to_string(&xml).unwrap(), before);
    let left = crate::site::list(site.dir.path());
    let left: Vec<&str> = left
        .iter()
        .map(|p| p.file_name().unwrap().to_str().unwrap())
        .collect();
    assert_eq!(left, ["a.qcow2", "one.raw", "state", "vm.xml"]);
}

#[test]
fn a_document_that_was_kept_is_refused_until_it_is_brought_up_to_date() {
    need!("qemu-img");
    let site = Site::new();
    let (image, xml) = off(&site);
    let created = [
        "snapshot",
        "create",
        "-d",
        &xml,
        "--name",
        "one",
        "--keep-document",
    ];
    let ended = site.run(&created);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("is out of date now"), "{}", ended.stderr);
    assert_eq!(named(&xml), image);
    for words in [
        ["create", "--name"],
        ["merge", "one"],
        ["revert", "one"],
        ["delete", "one"],
    ] {
        let mut arguments = vec!["snapshot", words[0], "-d", &xml, words[1]];
        if words[0] == "create" {
            arguments.push("two");
        }
        let refused = site.fails(2, &arguments);
        assert!(
            refused.contains("the domain's document is out of date"),
            "{refused}"
        );
        assert!(refused.contains("disksnap domain update"), "{refused}");
    }
    let updated = site.json(&["domain", "update", "-d", &xml]);
    assert_eq!(updated, json!({ "targets": ["vda"] }));
    assert_ne!(named(&xml), image);
    site.ok(&["snapshot", "delete", "-d", &xml, "one"]);
    assert_eq!(named(&xml), image);
}

#[test]
fn a_merge_under_a_running_machine_ends_and_can_be_cancelled() {
    need!("qemu-system-x86_64");
    let machine = Qemu::builder()
        .disk(DiskSpec::new("vda", 16 * MIB).qcow2())
        .start();
    let (site, xml) = (Site::new(), arg(&machine.domain_xml_file()));
    let image = named(&xml);
    site.ok(&[
        "snapshot",
        "create",
        "-d",
        &xml,
        "--name",
        "s",
        "--disk",
        "vda,method=qemu",
    ]);
    assert_ne!(named(&xml), image);
    machine.disk("vda").fill(0, 8 * MIB, 7);
    let overlay = named(&xml);
    let mut merging = site
        .command(&["snapshot", "merge", "-d", &xml, "s"])
        .spawn()
        .unwrap();
    let job = loop {
        let jobs = site.json(&["job", "list"]);
        if let Some(job) = jobs["jobs"].get(0) {
            break Some(job["id"].as_str().unwrap().to_owned());
        }
        if merging.try_wait().unwrap().is_some() {
            break None;
        }
    };
    if let Some(id) = job {
        // It may have ended just now.
        let cancelled = site.run(&["job", "cancel", &id]);
        assert!(matches!(cancelled.code, Some(0 | 3)), "{}", cancelled.stderr);
    }
    let merged = merging.wait().unwrap().success();
    assert_eq!(named(&xml) == overlay, !merged, "the document follows, or stays");
    if !merged {
        site.ok(&["snapshot", "merge", "-d", &xml, "s"]);
    }
    assert_eq!(named(&xml), image);
    assert!(machine.disk("vda").read(0, 8 * MIB) == vec![7; 8 << 20]);
    assert_eq!(site.json(&["job", "list"]), json!({ "jobs": [] }));
    assert!(!std::path::Path::new(&overlay).exists());
}
