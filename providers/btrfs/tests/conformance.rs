//! The method `btrfs` passes the suite, with the domain off and with it running in a QEMU.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::sync::Arc;

use disksnap_btrfs::Btrfs;
use disksnap_conformance::{RawFiles, assert_conforms};
use disksnap_conformance_qemu::{InSubvolumes, Process, QemuFixture, become_guardian_when_asked};
use disksnap_core::Capability;
use disksnap_test_support::need;

use support::btrfs;

/// Not `GuestSafe`: a guest that overwrites shared extents can run out of room.
const CAPABILITIES: [Capability; 5] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
    Capability::Compare,
];

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

#[test]
fn conforms_with_the_domain_off() {
    need!("btrfs");
    let fs = btrfs();
    assert_conforms(InSubvolumes {
        fs: fs.path().to_owned(),
        make: Box::new(|images| RawFiles::new(images, CAPABILITIES, || Arc::new(Btrfs))),
    });
}

#[test]
fn conforms_with_the_domain_running() {
    need!("btrfs", "qemu-system-x86_64");
    let fs = btrfs();
    assert_conforms(InSubvolumes {
        fs: fs.path().to_owned(),
        make: Box::new(|images| {
            QemuFixture::new(Process::Machine, CAPABILITIES, || Arc::new(Btrfs))
                .raw_images_in(images)
                .guarded_by_test("becomes_the_guardian_when_asked")
        }),
    });
}
