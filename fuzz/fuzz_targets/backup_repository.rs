//! Any texts as the small files of a repository: it is listed, or what is wrong with it is told.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| disksnap_backup::fuzzing::repository(data));
