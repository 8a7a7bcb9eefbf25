//! Checkpoints that begin with snapshots, and what has changed since, told by the command on a real QEMU.

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu};
use serde_json::json;

use crate::site::{Site, arg};

#[test]
fn a_checkpoint_begins_and_what_changed_since_is_listed() {
    let site = Site::new();
    let machine = Qemu::builder()
        .disk(DiskSpec::new("vda", 16 * MIB).qcow2())
        .disk(DiskSpec::new("vdb", 8 * MIB))
        .start();
    let xml = arg(&machine.domain_xml_file());
    let create = ["snapshot", "create", "-d", &xml];
    site.ok(&[&create[..], &["--name", "monday", "--checkpoint"]].concat());
    machine.disk("vda").fill(MIB, 128 * KIB, 1);
    machine.disk("vdb").fill(0, 64 * KIB, 2);
    let taken = site.json(&[&create[..], &["--name", "tuesday", "--checkpoint=second"]].concat());
    assert_eq!(taken["checkpoint"], "second");
    let text = site.ok(&["changes", "-d", &xml, "--from", "monday"]);
    assert_eq!(
        text,
        "DISK  OFFSET  LENGTH\nvda  1048576  131072\nvdb  0  65536\n"
    );
    let json = site.json(&[
        "changes", "-d", &xml, "--from", "monday", "--to", "tuesday", "--disk", "vdb",
    ]);
    assert_eq!(
        json,
        json!({"changes": [{"disk": "vdb", "offset": 0, "length": 65536}], "superset": []})
    );
    let shown = site.ok(&["--output", "xml", "domain", "show", "-d", &xml]);
    assert!(shown.contains("<checkpoint name='monday'/>") && shown.contains("<checkpoint name='second'/>"));
    // Beside the data, for any NBD client.
    site.ok(&[
        "export",
        "start",
        "-d",
        &xml,
        "tuesday",
        "--disk",
        "vda",
        "--checkpoint",
        "monday",
    ]);
    let exports = site.ok(&["--output", "xml", "export", "list", "-d", &xml]);
    assert!(exports.contains("checkpoint='monday'"), "{exports}");
    let uri = site.json(&["export", "list", "-d", &xml])["exports"][0]["uri"].clone();
    let told = std::process::Command::new(disksnap_test_support::tools::program("nbdinfo"))
        .args(["--map=qemu:dirty-bitmap:monday", "--json", uri.as_str().unwrap()])
        .output()
        .unwrap();
    let map: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    let dirty = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["type"] == 1);
    let dirty: Vec<_> = dirty
        .map(|extent| (extent["offset"].as_u64(), extent["length"].as_u64()))
        .collect();
    assert_eq!(dirty, [(Some(MIB), Some(128 * KIB))]);
    // A checkpoint that is being told stays.
    let refused = site.fails(6, &["checkpoint", "remove", "-d", &xml, "monday"]);
    assert!(refused.contains("is being exported"), "{refused}");
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    site.fails(3, &["changes", "-d", &xml, "--from", "sunday"]);
    site.fails(2, &["changes", "-d", &xml, "--from", "second", "--to", "tuesday"]);
    site.fails(
        4,
        &[&create[..], &["--name", "wednesday", "--checkpoint=monday"]].concat(),
    );
    site.fails(2, &[&create[..], &["--name", "x", "--checkpoint=a/b"]].concat());
    site.ok(&["checkpoint", "remove", "-d", &xml, "monday"]);
    let validation = site.json(&["checkpoint", "validate", "-d", &xml]);
    assert_eq!(validation["sound"], true, "{validation:#}");
    machine.quit();
    let ended = site.run(&["checkpoint", "validate", "-d", &xml]);
    let text = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(ended.code, Some(11), "{text}");
    assert!(text.contains("second      vdb   lost"), "{text}");
    let dropped = site.json(&["checkpoint", "drop-broken", "-d", &xml]);
    assert_eq!(dropped["full"], json!(["vdb"]), "{dropped:#}");
    site.ok(&["checkpoint", "validate", "-d", &xml]);
}
