//! What is refused must not stand in the way of what it has to wait for.

use disksnap_test_support::{DiskSpec, MIB, Qemu};
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
    for point in [None, Some("after catalog write down what is to be done:1")] {
        let mut command = site.command(&delete);
        command.envs(point.map(|point| ("DISKSNAP_FAULT", point)));
        let ended = crate::site::ended(command.output().unwrap());
        assert_eq!(ended.code, point.is_none().then_some(6), "{}", ended.stderr);
        let told = site.json(&["recover"]);
        let left = point.map(|_| "undone").into_iter().collect::<Vec<_>>();
        let how: Vec<&str> = told["recovered"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["how"].as_str().unwrap())
            .collect();
        assert_eq!(how, left, "{told:#}");
    }
    act(&["delete", "second"]);
    act(&["delete", "first"]);
    act(&["delete", "lowest"]);
    assert_eq!(
        site.json(&["-d", &xml, "snapshot", "list"])["snapshots"],
        json!([])
    );
}
