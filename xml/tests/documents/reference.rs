//! The examples of the reference are read by the parsers they are written for.

use disksnap_xml::{DomainDocument, checkpoints, export_request, snapshot_request};

const REFERENCE: &str = include_str!("../../../docs/xml.md");

#[test]
fn every_example_is_read() {
    let mut seen = Vec::new();
    for block in REFERENCE.split("```xml\n").skip(1) {
        let text = block.split("```").next().unwrap();
        let root = text.trim_start().trim_start_matches('<');
        let root: String = root.chars().take_while(char::is_ascii_alphanumeric).collect();
        let read = match root.as_str() {
            "domain" => DomainDocument::parse(text).map(|_| ()),
            "domainblocksnapshot" => snapshot_request(text).map(|_| ()),
            "blockexport" => export_request(text).map(|_| ()),
            "domaincheckpoints" => checkpoints(text).map(|_| ()),
            // Written only; well-formed as any document.
            _ => {
                let found = DomainDocument::parse(text).unwrap_err().to_string();
                assert!(
                    found.contains("expected a document whose root is <domain>"),
                    "{found}\n{text}"
                );
                Ok(())
            }
        };
        read.unwrap_or_else(|error| panic!("{error}\n{text}"));
        seen.push(root);
    }
    for wanted in [
        "domain",
        "domainblocksnapshot",
        "blockexport",
        "domaincheckpoints",
        "domainblocksnapshots",
        "diskSnapshotPlan",
        "diskSnapshotMethods",
    ] {
        assert!(seen.iter().any(|root| root == wanted), "no example of <{wanted}>");
    }
}
