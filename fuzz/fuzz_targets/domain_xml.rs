//! Any text as a domain's document: answered, kept byte for byte, and edited only where asked.
#![no_main]

use disksnap_core::{MethodChoice, Options};
use disksnap_xml::DomainDocument;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let document = match DomainDocument::parse(text) {
        Ok(document) => document,
        Err(error) => {
            // A fault without a place is of no use to anyone; only a document too long has none.
            assert!(error.context().any(|(key, _)| key == "line" || key == "bytes"), "{error}");
            return;
        }
    };
    assert_eq!(document.text(), text);
    for disk in &document.domain().disks {
        let same = document.with_disk(&disk.target, disk).expect("the disk is its own");
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
        assert_eq!(without.domain().disk(&disk.target).expect("still there").method, None);
    }
    document.with_exports(None, &[]).expect("nothing is served");
});
