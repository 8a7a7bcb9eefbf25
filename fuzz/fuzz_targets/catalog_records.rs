//! Any text as a record of the catalog: refused, or written again as it was understood.
#![no_main]

use disksnap_core::{Checkpoint, Definition, Export, Intent, Moved, NbdServer, Snapshot, Source};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn same<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(text: &str) {
    let Ok(record) = serde_json::from_str::<T>(text) else {
        return;
    };
    let written = serde_json::to_string(&record).expect("what was a record can be one");
    assert_eq!(
        serde_json::from_str::<T>(&written).expect("it can be read"),
        record,
        "{written}"
    );
}

fuzz_target!(|text: &str| {
    same::<Snapshot>(text);
    same::<Intent>(text);
    same::<Checkpoint>(text);
    same::<Definition>(text);
    same::<Moved>(text);
    same::<NbdServer>(text);
    same::<Export>(text);
    same::<Source>(text);
});
