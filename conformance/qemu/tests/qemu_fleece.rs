//! The method `qemu-fleece` passes the suite: each way, each kind of process and each QEMU once.
//! `disksnap conform qemu-fleece` tries every combination.

use std::sync::Arc;

use disksnap_conformance::assert_conforms;
use disksnap_conformance_qemu::{Process, QemuFixture, QemuVersion, become_guardian_when_asked, lacking};
use disksnap_core::Capability;
use disksnap_qemu_fleece::QemuFleece;
use disksnap_test_support::skip;

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

fn fixture(process: Process, version: QemuVersion, way: &str) -> QemuFixture {
    let mut capabilities = vec![Capability::Active, Capability::Export];
    if way == "filter" {
        capabilities.push(Capability::GuestSafe);
    }
    QemuFixture::new(process, capabilities, || Arc::new(QemuFleece))
        .version(version)
        .option("fleece.way", way)
        .guarded_by_test("becomes_the_guardian_when_asked")
}

#[test]
fn way_filter_in_a_machine() {
    assert_conforms(fixture(Process::Machine, QemuVersion::V10_0, "filter"));
}

#[test]
fn way_job_in_a_storage_daemon() {
    if let Some(why) = lacking(Process::StorageDaemon, QemuVersion::V10_0) {
        skip!("fuse", "{why}");
    }
    assert_conforms(fixture(Process::StorageDaemon, QemuVersion::V10_0, "job"));
}

#[test]
fn way_classic_in_a_machine_of_the_old_qemu() {
    if let Some(why) = lacking(Process::Machine, QemuVersion::V7_2) {
        skip!("qemu-7.2", "{why}");
    }
    assert_conforms(fixture(Process::Machine, QemuVersion::V7_2, "classic"));
}
