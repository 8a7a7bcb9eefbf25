//! Any bytes as each message of an NBD server: understood or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_nbd::fuzzing::messages(data));
