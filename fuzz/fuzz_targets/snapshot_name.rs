//! Any text as a snapshot's name: answered, and what is accepted is harmless and stays what it was.
#![no_main]

use disksnap_core::SnapshotName;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(name) = text.parse::<SnapshotName>() else {
        return;
    };
    assert_eq!(name.as_str(), text);
    assert!(!text.contains(['/', '\0', '\n']) && !text.starts_with(['-', '.']) && !text.is_empty());
});
