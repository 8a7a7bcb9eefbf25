//! Any bytes as all that an NBD server says: the client ends.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_nbd::fuzzing::conversation(data));
