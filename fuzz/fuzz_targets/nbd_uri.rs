//! Any bytes as an NBD URI: refused, or written again as it was understood.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_nbd::fuzzing::uri(data));
