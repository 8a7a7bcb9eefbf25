//! Any text as a point's manifest: refused, or written again as it was understood; its files are its own.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_backup::fuzzing::manifest(data));
