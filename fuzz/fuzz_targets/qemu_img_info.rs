//! Any bytes as what `qemu-img info` prints of a chain: the bitmaps of its images, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_dirty_bitmaps::fuzzing::info(data));
