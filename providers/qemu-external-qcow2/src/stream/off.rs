//! Streaming with the domain off: `qemu-img rebase`, which copies what the new chain would lack.

use std::path::Path;

use disksnap_core::Result;

use crate::layer::{Layer, unfit};
use crate::off_bitmaps::{Bitmap, bitmaps_of, change, gather};
use crate::qemu_img;

/// What the names of bitmaps begin with that keep another's content.
const KEPT: &str = "disksnap-kept-";

/// Brings the bitmaps together, copies the base's data into the overlay at `at`, and puts the overlay on what is below
/// the base. Idempotent: until the overlay's header names another image, all that was done can be done again.
///
/// `qemu-img` marks what it copies in the bitmaps that record, like any writer, and the disk does not change by it: so
/// their content is kept meanwhile. Killed on the way they tell of more than has changed, and never of less.
pub(super) async fn finish(layers: &[Layer], at: usize) -> Result<()> {
    let [overlay, base, below @ ..] = &layers[at..] else {
        return Err(unfit("the overlay has no backing image"));
    };
    gather(base, overlay).await?;
    // What a killed attempt kept may be older than what a domain has written since.
    tidy(overlay).await?;
    let known = bitmaps_of(overlay).await?;
    let recording: Vec<&Bitmap> = known.iter().filter(|b| b.recording()).collect();
    for bitmap in &recording {
        let kept = kept(bitmap);
        change(
            overlay,
            &["--add", "--disable", "--merge", &bitmap.name],
            &kept,
            None,
        )
        .await?;
    }
    qemu_img::rebase(&layers[at..]).await?;
    for bitmap in recording {
        let kept = kept(bitmap);
        change(overlay, &["--clear", "--merge", &kept.name], bitmap, None).await?;
    }
    tidy(overlay).await?;
    qemu_img::name_below(overlay, below.first()).await
}

fn kept(bitmap: &Bitmap) -> Bitmap {
    Bitmap {
        name: format!("{KEPT}{}", bitmap.name),
        ..bitmap.clone()
    }
}

/// What is left to do after the end, also of a stream whose process was killed right then. Idempotent.
pub(super) async fn conclude(layers: &[Layer], overlay: &Path) -> Result<()> {
    let Some(at) = layers.iter().position(|layer| layer.is_at(overlay)) else {
        return Ok(());
    };
    tidy(&layers[at]).await?;
    // A job that a hypervisor ran may have written another format there.
    qemu_img::name_below(&layers[at], layers.get(at + 1)).await
}

/// Removes the bitmaps that kept others' content. Idempotent.
async fn tidy(overlay: &Layer) -> Result<()> {
    for bitmap in bitmaps_of(overlay).await? {
        if bitmap.name.starts_with(KEPT) {
            change(overlay, &["--remove"], &bitmap, None).await?;
        }
    }
    Ok(())
}
