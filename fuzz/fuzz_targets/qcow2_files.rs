//! Any bytes as a qcow2 file: what its header names is let pass only where the document names it, and its tables are read or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_image_file::fuzzing::image(data));
