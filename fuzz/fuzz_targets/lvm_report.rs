//! Any text as the report of `lvs`: a list of volumes, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_lvm::fuzzing::report(data));
