//! A door for a fuzz target: what `qemu-img info` prints of an image. Not part of the interface.

use crate::off;

/// Takes `data` as that.
///
/// # Panics
/// If a bitmap is told of an image that the chain does not have.
pub fn info(data: &[u8]) {
    let Ok(image) = off::read(&String::from_utf8_lossy(data)) else {
        return;
    };
    let layers = off::Layers::of(vec![image]);
    let told = off::tell(&layers);
    assert!(
        told.bitmaps
            .iter()
            .all(|bitmap| bitmap.layer < layers.images.len())
    );
}
