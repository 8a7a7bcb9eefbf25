//! Four disks on four layers, each by its own method, in one call and at one instant.

use disksnap_test_support::{DiskSpec, GuestSetup, LoopFsKind, MIB, Qemu, loop_fs, need, pattern};
use serde_json::json;

use crate::site::{Site, arg};

const SIZE: u64 = 16 * MIB;
const DISKS: [&str; 4] = ["vda", "vdb", "vdc", "vdd"];
const REQUEST: &str = "<domainblocksnapshot>
  <name>mixed</name>
  <snapshot disk='vda'><fleece/></snapshot>
  <snapshot disk='vdb'><diskSnapshot method='qemu'/></snapshot>
  <snapshot disk='vdc'><diskSnapshot method='btrfs'/></snapshot>
  <snapshot disk='vdd'><diskSnapshot method='reflink'/></snapshot>
</domainblocksnapshot>
";

/// A raw image on a file system.
fn image(spec: DiskSpec, dir: &std::path::Path) -> DiskSpec {
    let path = dir.join("disk.raw");
    let made = std::fs::File::create(&path).and_then(|file| file.set_len(SIZE));
    made.unwrap();
    spec.image(&path)
}

#[test]
fn four_disks_by_four_methods_are_one_instant() {
    need!("guest", "btrfs", "xfs");
    let site = Site::new();
    let btrfs = loop_fs(LoopFsKind::Btrfs, 256 << 20, "");
    let xfs = loop_fs(LoopFsKind::Xfs, 400 << 20, "");
    let machine = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE).qcow2())
        .disk(image(DiskSpec::new("vdc", SIZE), btrfs.path()))
        .disk(image(DiskSpec::new("vdd", SIZE), xfs.path()))
        .guest(GuestSetup::new().writer(&DISKS))
        .start();
    machine.wait_writer(5);
    let xml = arg(&machine.domain_xml_file());
    let request = site.file("request.xml", REQUEST);
    let before = machine.writer_rounds();
    let created = site.json(&["snapshot", "create", "-d", &xml, "--xml", &request]);
    let after = machine.writer_rounds();
    let methods: Vec<&str> = created["disks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["method"].as_str().unwrap())
        .collect();
    assert_eq!(
        methods,
        ["qemu-fleece", "qemu-external-qcow2", "btrfs", "reflink"]
    );
    assert!(created["window"]["paused"].as_u64().unwrap() > 0, "{created:#}");
    machine.wait_writer(5);
    // The guest writes each round's number to every disk in order: at one instant no two differ by more than one.
    let round = |disk: &str| {
        let ended = site.run(&["read", "-d", &xml, "mixed", disk, "--length", "8"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        u64::from_le_bytes(ended.stdout.try_into().unwrap())
    };
    let rounds = DISKS.map(round);
    assert!(
        rounds.is_sorted_by(|a, b| a >= b) && rounds[0] - rounds[3] <= 1,
        "{rounds:?}"
    );
    assert!(
        (before..=after + 1).contains(&rounds[0]),
        "{rounds:?} between {before} and {after}"
    );
    // Each is the same as often as it is read, while the guest writes.
    let whole = |disk: &str| {
        let to = site.path(disk);
        site.ok(&["read", "-d", &xml, "mixed", disk, "--to", to.to_str().unwrap()]);
        let digest = pattern::digest_file(&to);
        std::fs::remove_file(to).unwrap();
        digest
    };
    let first = DISKS.map(whole);
    machine.wait_writer(5);
    assert_eq!(first, DISKS.map(whole));
    // One export for every method, and one delete.
    site.ok(&["export", "start", "-d", &xml, "mixed"]);
    let served = site.json(&["export", "list", "-d", &xml]);
    assert_eq!(served["exports"].as_array().unwrap().len(), 4, "{served:#}");
    let deleted = site.json(&["snapshot", "delete", "-d", &xml, "mixed"]);
    assert_eq!(deleted["deleted"][0]["when"], "now");
    assert_eq!(
        site.json(&["snapshot", "list", "-d", &xml]),
        json!({ "snapshots": [] })
    );
    machine.wait_writer(5);
    assert!(site.images().is_empty());
    let nodes = machine
        .qmp("query-named-block-nodes", json!({ "flat": true }))
        .to_string();
    assert!(!nodes.contains("\"ds-"), "{nodes}");
}
