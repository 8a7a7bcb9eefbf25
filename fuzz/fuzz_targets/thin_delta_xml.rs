//! Any bytes as what `thin_delta` prints: ranges in order, in whole chunks, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_lvm::fuzzing::differing(data));
