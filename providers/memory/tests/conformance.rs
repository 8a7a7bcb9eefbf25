//! The method `memory` passes the suite, with the domain off and with it running.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

use std::sync::Arc;

use disksnap_conformance::{RawFiles, assert_conforms};
use disksnap_core::Capability;
use disksnap_memory::Memory;

const CAPABILITIES: [Capability; 4] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::GuestSafe,
];

#[test]
fn conforms_with_the_domain_off() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    assert_conforms(RawFiles::new(dir.path(), CAPABILITIES, || Arc::new(Memory)));
}
