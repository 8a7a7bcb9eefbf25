//! Any bytes as the items of a file in two snapshots: what differs is told in order and within the file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_btrfs::fuzzing::differing(data));
