//! Any text as a domain's document: answered, kept byte for byte, and edited only where asked.
#![no_main]

use disksnap_core::{BackingStore, MethodChoice, Options, Source};
use disksnap_xml::DomainDocument;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let document = match DomainDocument::parse(text) {
        Ok(document) => document,
        Err(error) => {
            // A fault without a place is of no use to anyone; only a document too long has none.
            assert!(
                error.context().any(|(key, _)| key == "line" || key == "bytes"),
                "{error}"
            );
            return;
        }
    };
    assert_eq!(document.text(), text);
    for disk in &document.domain().disks {
        let same = document
            .with_disk(&disk.target, disk)
            .expect("the disk is its own");
        assert_eq!(same.text(), text);
        let choice = MethodChoice {
            method: "m".to_owned(),
            options: Options::from_iter([("a.b", "c")]),
        };
        let with = document
            .with_method(&disk.target, Some(&choice))
            .expect("any disk can name a method");
        let named = with.domain().disk(&disk.target).expect("it is still there");
        assert_eq!(named.method.as_ref(), Some(&choice));
        let without = document.with_method(&disk.target, None).expect("or none");
        assert_eq!(
            without.domain().disk(&disk.target).expect("still there").method,
            None
        );
    }
    document.with_exports(None, &[]).expect("nothing is served");
    // What a backup saves beside the disks, if it can be told.
    let _ = (document.efi_variables(), document.tpm());
    for disk in &document.domain().disks {
        let ends = document.ends_chain(&disk.target).expect("the disk is there");
        let mut below = disk.clone();
        below.backing = Some(BackingStore {
            format: Some("qcow2".to_owned()),
            source: Source::File { file: "/a&b".into() },
            data_store: None,
            backing: None,
        });
        let after = document
            .with_disk(&disk.target, &below)
            .expect("any disk can stand on a file");
        let said = after.domain().disk(&disk.target).expect("it is still there");
        assert_eq!(said.backing, below.backing, "{ends}");
    }
});
