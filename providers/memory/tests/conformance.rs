//! The method `memory` passes the suite, with the domain off and with it running in a QEMU that can be paused.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::sync::Arc;

use disksnap_conformance::{RawFiles, assert_conforms};
use disksnap_conformance_qemu::{Process, QemuFixture, become_guardian_when_asked};
use disksnap_core::Capability;
use disksnap_memory::Memory;

const CAPABILITIES: [Capability; 5] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::GuestSafe,
    Capability::Revert,
];

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

#[test]
fn conforms_with_the_domain_off() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    assert_conforms(RawFiles::new(dir.path(), CAPABILITIES, || Arc::new(Memory)));
}

#[test]
fn conforms_with_the_domain_running() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let fixture = QemuFixture::new(Process::Machine, CAPABILITIES, || Arc::new(Memory))
        .raw_images_in(dir.path())
        .guarded_by_test("becomes_the_guardian_when_asked");
    assert_conforms(fixture);
}
