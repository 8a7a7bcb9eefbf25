//! What is refused must not stand in the way of what it has to wait for.

use disksnap_test_support::{DiskSpec, MIB, Qemu, Writer};
use serde_json::json;

use crate::site::{Site, arg};

#[test]
fn a_delete_that_has_to_wait_for_another_one_does_not_stop_that() {
    let (qemu, site) = (
        Qemu::builder().disk(DiskSpec::new("vda", MIB).qcow2()).start(),
        Site::new(),
    );
    let xml = arg(&qemu.domain_xml_file());
    qemu.quit();
    let act = |words: &[&str]| site.ok(&[&["-d", &xml, "snapshot"], words].concat());
    // An image of ours, on which another snapshot stands, and the disk no more.
    act(&["create", "--name", "lowest"]);
    act(&["create", "--name", "first"]);
    act(&["create", "--name", "second"]);
    act(&["revert", "first"]);
    act(&["merge", "--into", "overlay", "first"]);
    let delete = ["-d", &xml, "snapshot", "delete", "first"];
    // It is refused before anything is written down that a kill could leave.
    for point in [None, Some("after catalog write down what is to be done:1")] {
        let mut command = site.command(&delete);
        command.envs(point.map(|point| ("DISKSNAP_FAULT", point)));
        let ended = crate::site::ended(command.output().unwrap());
        assert_eq!(ended.code, Some(6), "{}", ended.stderr);
        assert!(
            ended.stderr.contains("effect: nothing was changed"),
            "{}",
            ended.stderr
        );
        assert_eq!(site.json(&["recover"])["recovered"], json!([]));
    }
    act(&["delete", "second"]);
    act(&["delete", "first"]);
    act(&["delete", "lowest"]);
    assert_eq!(
        site.json(&["-d", &xml, "snapshot", "list"])["snapshots"],
        json!([])
    );
}

/// One disk's merge must not have begun when that of another is refused: what it has begun with is spoilt.
#[test]
fn a_delete_that_is_refused_for_one_disk_leaves_the_other_as_it_was() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 8 * MIB).qcow2())
        .disk(DiskSpec::new("vdb", 8 * MIB).qcow2())
        .start();
    let site = Site::new();
    let xml = arg(&qemu.domain_xml_file());
    let run = |words: &[&str]| site.json(&[&["-d", &xml][..], words].concat());
    let create = |name: &str, disks: &[&str]| {
        let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
        run(&[
            &["snapshot", "create", "--name", name][..],
            &disks.collect::<Vec<_>>(),
        ]
        .concat())
    };
    let read = |name: &str, disk: &str| {
        let to = site.path("whole.raw");
        site.ok(&["-d", &xml, "read", name, disk, "--to", &arg(&to)]);
        let content = std::fs::read(&to).unwrap();
        std::fs::remove_file(to).unwrap();
        content
    };
    let writer = Writer::start(["vda", "vdb"].map(|disk| qemu.disk(disk)).to_vec(), 8 * MIB, 3);
    create("outside", &["vda,method=qemu", "vdb,method=qemu"]);
    writer.wait(3);
    create("inside", &["vdb,method=qemu-fleece"]);
    writer.wait(3);
    let kept = [
        read("outside", "vda"),
        read("outside", "vdb"),
        read("inside", "vdb"),
    ];
    // Whoever reads it is not stopped for nothing.
    run(&["export", "start", "outside"]);
    let before = [run(&["snapshot", "list"]), run(&["export", "list"])];
    for words in [
        ["snapshot", "delete", "outside"],
        ["snapshot", "merge", "outside"],
    ] {
        let merges = words[1] == "merge";
        if merges {
            run(&["export", "stop", "outside"]);
        }
        let told = site.fails(6, &[&["-d", &xml][..], &words].concat());
        assert!(
            told.contains("a fleecing snapshot is active on the disk") && told.contains("disk vdb"),
            "{told}"
        );
        assert!(told.contains("effect: nothing was changed"), "{told}");
        assert_eq!(run(&["snapshot", "list"]), before[0]);
        if !merges {
            assert_eq!(run(&["export", "list"]), before[1]);
        }
        assert_eq!(qemu.qmp("query-jobs", json!({})), json!([]));
        assert_eq!(site.json(&["recover"])["recovered"], json!([]));
        writer.wait(3);
    }
    let again = [
        read("outside", "vda"),
        read("outside", "vdb"),
        read("inside", "vdb"),
    ];
    assert!(again == kept, "the snapshots hold their instants");
    run(&["snapshot", "delete", "inside"]);
    writer.wait(3);
    run(&["snapshot", "delete", "outside"]);
    writer.wait(3);
    writer.stop();
    assert_eq!(run(&["snapshot", "list"])["snapshots"], json!([]));
    assert_eq!(qemu.status(), "running");
}
