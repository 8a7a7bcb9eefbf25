//! Any text as an export request: answered, and what is read can be written and is read the same.
#![no_main]

use disksnap_xml::{export_request, export_request_document};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(request) = export_request(text) else { return };
    let written = export_request_document(&request).expect("what was XML can be XML");
    assert_eq!(export_request(&written).expect("it can be read"), request);
});
