//! Any lines as what the device mapper, the kernel and `thin_delta --version` print: understood, or passed over.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_lvm::fuzzing::lines(data));
