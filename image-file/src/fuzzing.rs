//! Doors for fuzz targets: what `qemu-img map` prints. Not part of the interface.

use crate::map::Telling;

/// Takes `data` as the map of a disk of 1 MiB.
///
/// # Panics
/// If the pieces do not follow one another, or go beyond the disk.
pub fn map(data: &[u8]) {
    const SIZE: u64 = 1 << 20;
    let (mut telling, mut at) = (Telling::of(SIZE), 0);
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        match telling.piece(line) {
            Err(_) => return,
            Ok(None) => {}
            Ok(Some(piece)) => {
                assert!(
                    piece.start == at && piece.end > at && piece.end <= SIZE,
                    "{piece:?} after {at}"
                );
                let _ = piece.at(piece.end - 1);
                at = piece.end;
            }
        }
    }
    assert_eq!(telling.all_is_told().is_ok(), at == SIZE);
}
