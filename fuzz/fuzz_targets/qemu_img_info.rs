//! Any bytes as what `qemu-img info` prints of an image: its bitmaps, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_dirty_bitmaps::fuzzing::info(data));
