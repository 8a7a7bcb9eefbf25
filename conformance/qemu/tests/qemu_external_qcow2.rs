//! The method `qemu-external-qcow2` passes the suite in each kind of process and each QEMU.

use std::sync::Arc;

use disksnap_conformance::{assert_cases, assert_conforms};
use disksnap_conformance_qemu::{
    OverlayFixture, OverlaysOff, Process, QemuFixture, QemuVersion, become_guardian_when_asked, lacking,
};
use disksnap_core::Capability;
use disksnap_qemu_external_qcow2::QemuExternalQcow2;
use disksnap_test_support::skip;

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

const CAPABILITIES: [Capability; 5] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
    Capability::Merge,
];

fn fixture(process: Process, version: QemuVersion) -> OverlayFixture {
    let fixture = QemuFixture::new(process, CAPABILITIES, || Arc::new(QemuExternalQcow2));
    OverlayFixture(
        fixture
            .version(version)
            .guarded_by_test("becomes_the_guardian_when_asked"),
    )
}

/// What goes wrong at every single point takes minutes, and is the same in every process.
fn no_mishaps(case: &str) -> bool {
    let every = ["-call-fails", "-disconnected", "-killed"];
    case == "create-killed" || !every.iter().any(|end| case.ends_with(end))
}

#[test]
fn in_a_machine() {
    assert_conforms(fixture(Process::Machine, QemuVersion::V10_0));
}

#[test]
fn with_the_domain_off() {
    if let Some(why) = OverlaysOff::lacking() {
        skip!("qemu-img", "{why}");
    }
    assert_conforms(OverlaysOff::new(CAPABILITIES, || Arc::new(QemuExternalQcow2)));
}

#[test]
fn in_a_storage_daemon() {
    if let Some(why) = lacking(Process::ExportedStorageDaemon, QemuVersion::V10_0) {
        skip!("qemu-storage-daemon", "{why}");
    }
    assert_cases(
        fixture(Process::ExportedStorageDaemon, QemuVersion::V10_0),
        no_mishaps,
    );
}

#[test]
fn in_a_machine_of_the_old_qemu() {
    if let Some(why) = lacking(Process::Machine, QemuVersion::V7_2) {
        skip!("qemu-7.2", "{why}");
    }
    assert_cases(fixture(Process::Machine, QemuVersion::V7_2), no_mishaps);
}
