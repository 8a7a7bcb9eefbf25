//! A chain of images and digests with any bytes of it changed: what is read is what it held, or it is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_backup::fuzzing::chain(data));
