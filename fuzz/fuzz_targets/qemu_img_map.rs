//! Any bytes as what `qemu-img map` prints: pieces one after the other, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_image_file::fuzzing::map(data));
