//! The method passes the suite, on plain and on thin volumes of a domain that is off.
//!
//! Here only what tells soonest that something is wrong: all cases take minutes, and the tests of the command run them, by
//! `disksnap conform lvm`.

use std::sync::Arc;

use disksnap_conformance::assert_cases;
use disksnap_conformance_qemu::LogicalVolumes;
use disksnap_core::Capability;
use disksnap_lvm::LogicalVolume;

use crate::support::Group;

const CAPABILITIES: [Capability; 4] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
];

/// The cases that are run here, by the beginning of their names.
const SOON: [&str; 6] = [
    "capabilities",
    "content-",
    "several-disks",
    "damage-is-told",
    "revert-content",
    "revert-spares",
];

fn assert_conforms(pool: Option<&str>, capabilities: Vec<Capability>) {
    let volumes = LogicalVolumes::new("vg", pool, capabilities, || Arc::new(LogicalVolume)).unwrap();
    assert_cases(volumes, |case| SOON.iter().any(|begin| case.starts_with(begin)));
}

#[test]
#[ignore = "runs in the guest"]
fn classic() {
    let _group = Group::new("vg", "-s 64k");
    assert_conforms(None, [&CAPABILITIES[..], &[Capability::GuestSafe]].concat());
}

#[test]
#[ignore = "runs in the guest"]
fn thin() {
    let group = Group::new("vg", "-s 64k");
    group.pool("pool", 256);
    assert_conforms(Some("pool"), [&CAPABILITIES[..], &[Capability::Compare]].concat());
}
