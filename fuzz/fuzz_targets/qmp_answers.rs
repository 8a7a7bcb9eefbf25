//! Any lines as the answers about block graph and schema: read in bounded time, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_hypervisor::fuzzing::answers(data));
