//! Any bytes as the lines of a monitor or guest agent: each a message, or the end.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_hypervisor::fuzzing::lines(data));
