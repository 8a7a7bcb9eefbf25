//! Any bytes as a set of checkpoints in JSON, and as oVirt's tables in JSON and in CSV: answered, and what is read can be
//! written and is read the same.
#![no_main]

use disksnap_checkpoint_set::json;
use disksnap_checkpoint_set::ovirt::{Table, Tables};
use disksnap_core::Lineage;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(set) = json::read(bytes) {
        let set = Lineage::new(set).map(Lineage::into_checkpoints);
        let forms = set.as_deref().map(|set| (set, json::Set::new(set)));
        if let Ok((set, Ok(form))) = forms {
            let mut written = Vec::new();
            form.write(&mut written).expect("memory takes it");
            assert_eq!(json::read(&written[..]).expect("it can be read"), set);
        }
    }
    if let Ok(tables) = Tables::read_json(bytes) {
        let mut written = Vec::new();
        tables.write_json(&mut written).expect("memory takes it");
        assert_eq!(Tables::read_json(&written[..]).expect("it can be read"), tables);
    }
    // One file after the other, as if there were two.
    let (checkpoints, disks) = bytes.split_at(bytes.len() / 2);
    if let Ok(tables) = Tables::read_csv(checkpoints, disks) {
        let write = |table| {
            let mut written = Vec::new();
            tables.write_csv(table, &mut written).expect("memory takes it");
            written
        };
        let (checkpoints, disks) = (write(Table::Checkpoints), write(Table::Disks));
        let again = Tables::read_csv(&checkpoints[..], &disks[..]).expect("it can be read");
        assert_eq!(again, tables);
    }
});
