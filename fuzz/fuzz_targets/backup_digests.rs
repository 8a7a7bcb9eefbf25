//! Any bytes as two files of digests: what they tell of the disk is in order and within it, or they are refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_backup::fuzzing::digests(data));
