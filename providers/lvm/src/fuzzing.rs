//! Doors for fuzz targets: what lvm2, `dmsetup`, `thin_delta` and the kernel print. Not part of the interface.

use crate::{mapper, mount, thin_delta, volume};

/// Takes `data` as the report of `lvs`.
pub fn report(data: &[u8]) {
    let Ok(volumes) = volume::parse(&String::from_utf8_lossy(data)) else {
        return;
    };
    for volume in volumes {
        let _ = (volume.full_name(), volume.kind(), volume.is_classic_snapshot());
    }
}

/// Takes `data` as what `thin_delta` prints of two devices of a pool with chunks of 64 KiB.
///
/// # Panics
/// If the ranges that it tells are not in order, or are not whole chunks.
pub fn differing(data: &[u8]) {
    const CHUNK: u64 = 64 << 10;
    let mut last = 0;
    let each = |range: std::ops::Range<u64>| {
        assert!(
            range.start >= last && range.start < range.end,
            "{range:?} after {last}"
        );
        assert!(
            range.start.is_multiple_of(CHUNK) && range.end.is_multiple_of(CHUNK),
            "{range:?}"
        );
        last = range.end;
        Ok(())
    };
    let _ = thin_delta::parse(data, CHUNK, [1, 2], each);
}

/// Takes each line of `data` as a table or status of the device mapper, as a version, and as a line of
/// `/proc/self/mountinfo`.
pub fn lines(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for line in text.lines().chain([&*text]) {
        mapper::parse_each(line);
        mount::parse_any(line);
        let _ = thin_delta::must_be_sound(line);
    }
}
