//! Any text as a snapshot request: answered, and what is read of a method can be written and read again.
#![no_main]

use disksnap_core::Disks;
use disksnap_xml::{Element, disk_snapshot_element, snapshot_request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(request) = snapshot_request(text) else {
        return;
    };
    let Disks::Named(disks) = &request.disks else {
        return;
    };
    let snapshots = disks.iter().map(|disk| {
        let method = disk.method.as_ref().map(disk_snapshot_element);
        let method = method.transpose().expect("what was XML can be XML");
        Element::new("snapshot")
            .attr("disk", &disk.target)
            .children(method)
    });
    let root = Element::new("domainblocksnapshot").children(snapshots);
    let again = root.to_document().expect("what was XML can be XML");
    let again = snapshot_request(&again).expect("what was written can be read");
    assert_eq!(again.disks, request.disks);
});
