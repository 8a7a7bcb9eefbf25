//! Any text as a document of checkpoints: answered, and a sound set can be written and is read the same.
#![no_main]

use disksnap_core::Lineage;
use disksnap_xml::{checkpoints, checkpoints_document};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(read) = checkpoints(text) else { return };
    let Ok(lineage) = Lineage::new(read) else { return };
    let set = lineage.into_checkpoints();
    let written = checkpoints_document(&set).expect("what was XML can be XML");
    assert_eq!(checkpoints(&written).expect("it can be read"), set);
});
