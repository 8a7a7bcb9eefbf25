//! Any bytes as the beginning of a qcow2 image: a header, or refused. What it names stays within the input.
#![no_main]

use disksnap_image_file::Qcow2;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(header) = Qcow2::parse(data) else { return };
    for name in [&header.backing, &header.backing_format, &header.data_file]
        .into_iter()
        .flatten()
    {
        // A byte that is no UTF-8 is three in the text.
        assert!(name.len() <= 3 * data.len(), "{header:?}");
    }
});
