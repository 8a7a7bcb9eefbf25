//! The method `reflink` passes the suite on XFS and on btrfs, with the domain off and with it running in a QEMU.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::sync::Arc;

use disksnap_conformance::{RawFiles, assert_conforms};
use disksnap_conformance_qemu::{Process, QemuFixture, become_guardian_when_asked};
use disksnap_core::Capability;
use disksnap_reflink::Reflink;
use disksnap_test_support::{LoopFsKind, loop_fs, need};

/// Not `GuestSafe`: a guest that overwrites shared extents can run out of room.
const CAPABILITIES: [Capability; 4] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
];

const ROOM: u64 = 512 << 20;

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

fn conforms_off(kind: LoopFsKind) {
    let fs = loop_fs(kind, ROOM, "");
    assert_conforms(RawFiles::new(fs.path(), CAPABILITIES, || Arc::new(Reflink)));
}

fn conforms_running(kind: LoopFsKind) {
    let fs = loop_fs(kind, ROOM, "");
    let fixture = QemuFixture::new(Process::Machine, CAPABILITIES, || Arc::new(Reflink))
        .raw_images_in(fs.path())
        .guarded_by_test("becomes_the_guardian_when_asked");
    assert_conforms(fixture);
}

#[test]
fn conforms_on_xfs_with_the_domain_off() {
    need!("xfs");
    conforms_off(LoopFsKind::Xfs);
}

#[test]
fn conforms_on_btrfs_with_the_domain_off() {
    need!("btrfs");
    conforms_off(LoopFsKind::Btrfs);
}

#[test]
fn conforms_on_xfs_with_the_domain_running() {
    need!("xfs", "qemu-system-x86_64");
    conforms_running(LoopFsKind::Xfs);
}

#[test]
fn conforms_on_btrfs_with_the_domain_running() {
    need!("btrfs", "qemu-system-x86_64");
    conforms_running(LoopFsKind::Btrfs);
}
