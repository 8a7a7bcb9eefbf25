//! Any text as the journal of a point that is being pulled: refused, or gone on with from just there, in memory that the text warrants.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_backup::fuzzing::journal(data));
