//! Any text as the place to listen on: answered, and what is accepted reads back as the same place.
#![no_main]

use disksnap_core::Listen;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(listen) = text.parse::<Listen>() else {
        return;
    };
    assert_eq!(
        listen.to_string().parse::<Listen>().expect("its own text"),
        listen
    );
});
