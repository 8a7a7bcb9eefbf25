//! Any bytes as the replies of an NBD server after a good handshake: every request ends.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_nbd::fuzzing::session(data));
